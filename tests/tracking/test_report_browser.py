"""report.html in a real headless browser: on a phone and a screen, in light and dark."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from functrain.tracking import report

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")

SIZES = {"phone": (360, 740), "screen": (1280, 900)}
SIZE = pytest.mark.parametrize("size", list(SIZES))
SCHEME = pytest.mark.parametrize("scheme", ["light", "dark"])
# Without these it looks for servers of its makers at every start.
ALONE = [
    "--no-sandbox",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-quic",
]


class Said:
    prompt = "What is a very-long-word-" + "without-any-place-to-break" * 9
    answers = (("before", "x" * 400), ("after", "A state goes in, and a state comes out."))


def stage(name: str, steps: int = 200) -> report.StageRecord:
    """Everything that a run can have, some of it long."""
    metrics = [
        {
            "step": n,
            "loss": 3.0 / (n + 1) + 0.3,
            "perplexity": 20.0 / (n + 1) + 1.3,
            "grad_norm": 1.0 + n % 3,
            "learning_rate": 1e-3,
            "tokens_per_second": 1e5 + n,
            "peak_memory_gib": 1.5,
            "padding": 0.2,
        }
        for n in range(1, steps)
    ]
    metrics += [{"step": n, "eval_loss": 1.0, "eval_perplexity": 2.7} for n in range(0, steps, 50)]
    return report.StageRecord(
        name=name,
        metrics=sorted(metrics, key=lambda each: each["step"]),
        config='directory = "runs/a"\n' + f'train = "{"/very/long/path" * 20}"\n',
        notes=["training text: 12 of 13 files, " + "long/" * 60, "held-out: 3 truncated"],
        environment={"torch": "2.13.0", "system": "Linux-6.1-x86_64-with-glibc2.36" * 3},
        checkpoints=[
            report.CheckpointRow(
                step=100, size=10**9, sha256={"model.safetensors": "ab" * 32}, loss=1.25
            )
        ],
    )


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of its own, and two side by side."""
    path = tmp_path_factory.mktemp("pages")
    one, two = path / "one.html", path / "two.html"
    report.write_report(
        one,
        title="functrain sft: a-run-with-a-name",
        stages=[stage("sft")],
        table=[("sft", "completion perplexity", "6.49", "2.24")],
        samples=[Said()],
        fingerprint="ab" * 32,
        commands=["functrain generate runs/" + "long" * 40],
    )
    report.write_report(two, title="two", stages=[stage("a"), stage("b")], together=True)
    return {"one": one, "two": two}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as started:
        found = started.chromium.launch(executable_path=CHROMIUM, args=ALONE)
        yield found
        found.close()


@pytest.fixture
def shown(browser: Any, pages: dict[str, Path]) -> Iterator[Any]:
    """`shown(page, size, scheme)`: the page, opened; nothing may go wrong or be asked for."""
    contexts = []

    def open_(name: str, size: str, scheme: str = "light") -> Any:
        width, height = SIZES[size]
        context = browser.new_context(
            viewport={"width": width, "height": height},
            color_scheme=scheme,
            device_scale_factor=2,
            has_touch=size == "phone",
            is_mobile=size == "phone",
        )
        contexts.append(context)
        page = context.new_page()
        trouble: list[str] = []
        page.on("console", lambda message: trouble.append(message.text))
        page.on("pageerror", lambda error: trouble.append(str(error)))
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(pages[name].as_uri())
        assert trouble == []
        assert asked == [pages[name].as_uri()]
        page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
        return page

    yield open_
    for context in contexts:
        context.close()


@SIZE
@pytest.mark.parametrize("name", ["one", "two"])
def test_nothing_is_wider_than_the_page(shown: Any, name: str, size: str) -> None:
    """What is wide scrolls in a box of its own."""
    page = shown(name, size)
    width = SIZES[size][0]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("window.innerWidth") == width  # a phone has not zoomed out to fit
    outside = page.evaluate(
        """width => [...document.querySelectorAll('body *')].filter(each => {
            if (each.closest('.scroll') && !each.matches('.scroll')) return false;
            const box = each.getBoundingClientRect();
            return box.width > 0 && (box.left < -0.5 || box.right > width + 0.5);
        }).map(each => each.outerHTML.slice(0, 80))""",
        width,
    )
    assert outside == []


@SIZE
def test_it_can_be_read(shown: Any, size: str) -> None:
    """Letters of a size for the eye, charts of a height, none over another."""
    page = shown("one", size)
    sizes = page.evaluate(
        """() => {
            const found = {};
            const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
            while (walk.nextNode()) {
                const each = walk.currentNode.parentElement;
                if (each.matches('title')) continue;
                if (!walk.currentNode.textContent.trim()) continue;
                let size = parseFloat(getComputedStyle(each).fontSize);
                const svg = each.closest('svg');
                if (svg) size *= svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
                const name = svg ? 'chart' : each.tagName;
                found[name] = Math.min(found[name] ?? 99, size);
            }
            return found;
        }"""
    )
    assert sizes.pop("chart") >= 9
    assert min(sizes.values()) >= 12, sizes
    boxes = page.evaluate(
        """[...document.querySelectorAll('figure')].map(each => {
            const box = each.getBoundingClientRect();
            return [box.left, box.top, box.right, box.bottom];
        })"""
    )
    assert len(boxes) >= 6
    for n, (left, top, right, bottom) in enumerate(boxes):
        assert right - left >= 250
        assert bottom - top >= 120
        for other in boxes[:n]:
            apart = left >= other[2] or other[0] >= right or top >= other[3] or other[1] >= bottom
            assert apart


def contrast(one: str, other: str) -> float:
    """The contrast of two CSS colours, 1 to 21 (WCAG 2.2)."""

    def light(colour: str) -> float:
        parts = [int(each) / 255 for each in re.findall(r"\d+", colour)[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    bright, dark = sorted((light(one), light(other)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


@SCHEME
def test_everything_stands_out_from_what_is_behind_it(shown: Any, scheme: str) -> None:
    """Text by 4.5 to 1, curves and dots by 3 to 1, in light as in dark."""
    page = shown("two", "screen", scheme)
    found = page.evaluate(
        """() => {
            const behind = each => {
                for (; each; each = each.parentElement) {
                    const colour = getComputedStyle(each).backgroundColor;
                    if (!colour.endsWith(', 0)')) return colour;
                }
            };
            const texts = new Set(), marks = new Set();
            for (const each of document.querySelectorAll('body *')) {
                const style = getComputedStyle(each), ground = behind(each);
                const own = [...each.childNodes].some(n => n.nodeType == 3 && n.data.trim());
                const colour = each.closest('svg') ? style.fill : style.color;
                if (own && !each.matches('title')) texts.add(colour + '|' + ground);
                if (each.matches('.curve')) marks.add(style.stroke + '|' + ground);
                if (each.matches('.dot')) marks.add(style.fill + '|' + ground);
                if (each.matches('.key i'))
                    marks.add(style.backgroundColor + '|' + behind(each.parentElement));
            }
            return [[...texts], [...marks]];
        }"""
    )
    texts, marks = ([each.split("|") for each in part] for part in found)
    assert len(texts) >= 2
    assert len(marks) >= 2
    assert [each for each in texts if contrast(*each) < 4.5] == []
    assert [each for each in marks if contrast(*each) < 3] == []
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (contrast(ground, "rgb(255, 255, 255)") > 4.5) == (scheme == "dark")
