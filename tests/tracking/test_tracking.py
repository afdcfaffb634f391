"""metrics.jsonl, the progress line and the report: nothing lost, nothing fetched, all escaped."""

from __future__ import annotations

import io
import math
import random
import resource
import signal
from collections.abc import Generator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import attrs
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import functrain as ft
from functrain.tracking import charts, jsonl, report
from functrain.tracking.progress import Progress

NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda n: n != "step")
RECORDS = st.lists(st.dictionaries(NAMES, st.floats()), min_size=1, max_size=6)


def _written(path: Path, records: Any) -> bytes:
    tracker = jsonl.JSONLTracker(path)
    for step, record in enumerate(records):
        tracker.log(step, record)
    tracker.close()
    return path.read_bytes()


def _same(one: Any, other: Any) -> bool:
    return repr(one) == repr(other)


@given(records=RECORDS)
def test_what_is_logged_is_read(records: Any, tmp_path_factory: Any) -> None:
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    _written(path, records)
    expected = [{"step": step, **record} for step, record in enumerate(records)]
    assert _same(jsonl.read(path), expected)


def test_a_torn_file_reads_up_to_the_tear(tmp_path: Path) -> None:
    records = [{"loss": 1.5, "grad_norm": math.nan}, {"loss": 2.0}, {"loss": -math.inf}]
    path = tmp_path / "metrics.jsonl"
    data = _written(path, records)
    whole = jsonl.read(path)
    for size in range(len(data) + 1):
        path.write_bytes(data[:size])
        assert _same(jsonl.read(path), whole[: data[:size].count(b"\n")])


@given(records=RECORDS, torn=st.binary(max_size=99_999).map(lambda data: data.replace(b"\n", b"")))
def test_what_is_logged_after_a_torn_line_is_not_glued_to_it(
    records: Any, torn: bytes, tmp_path_factory: Any
) -> None:
    """Nor is anything touched before a line is logged: another may only look."""
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    before = _written(path, records) + torn
    path.write_bytes(before)
    jsonl.JSONLTracker(path).close()
    assert path.read_bytes() == before
    _written(path, records)
    expected = [{"step": step, **record} for step, record in enumerate(records)]
    assert _same(jsonl.read(path), expected * 2)


def test_a_line_that_is_all_torn_goes(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"{" * 200_000)
    assert _written(path, [{"loss": 1.0}]) == b'{"step":0,"loss":1.0}\n'


def test_a_metric_of_the_name_step_is_refused(tmp_path: Path) -> None:
    """It stood in the place of the step."""
    path = tmp_path / "metrics.jsonl"
    refused = pytest.raises(ft.DataError, match="a metric of step 0 is named 'step'")
    with closing(jsonl.JSONLTracker(path)) as tracker, refused:
        tracker.log(0, {"step": 9.0, "loss": 1.0})
    assert jsonl.read(path) == []


@pytest.mark.parametrize(
    ("step", "metrics", "message"),
    [
        (2.0, {}, r"step 2\.0, expected an integer"),
        (True, {}, "step True, expected an integer"),
        ("a", {}, "step 'a', expected an integer"),
        (None, {}, "step None, expected an integer"),
        (2**64, {}, "step 18446744073709551616 cannot be written as JSON"),
        (2, {3: 1.0}, "step 2 cannot be written as JSON"),
        (2, {"loss": "low"}, "'loss' of step 2 is 'low', expected a number"),
        (2, {"loss": None}, "'loss' of step 2 is None, expected a number"),
        (
            2,
            {"loss": torch.ones(2)},
            r"'loss' of step 2 is tensor\(\[1., 1.\]\), expected a number",
        ),
    ],
)
def test_what_would_not_be_read_is_not_logged(
    step: Any, metrics: Any, message: str, tmp_path: Path
) -> None:
    """One such line, and the whole file could not be read, nor its run go on."""
    path = tmp_path / "metrics.jsonl"
    with closing(jsonl.JSONLTracker(path)) as tracker:
        tracker.log(np.int64(1), {"loss": np.float32(2.0)})  # type: ignore[arg-type, dict-item]
        with pytest.raises(ft.DataError, match=message):
            tracker.log(step, metrics)
    with pytest.raises(ft.DataError, match=r"metrics.jsonl: the tracker is closed"):
        tracker.log(2, {})
    assert jsonl.read(path) == [{"step": 1, "loss": 2.0}]


@given(records=RECORDS, step=st.integers(-1, 7), torn=st.binary(max_size=5))
def test_truncated_is_never_having_logged_more(
    records: Any, step: int, torn: bytes, tmp_path_factory: Any
) -> None:
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    _written(path, records)
    with path.open("ab") as file:
        file.write(torn.replace(b"\n", b""))
    jsonl.truncate_after(path, step)
    shorter = path.with_name("shorter.jsonl")
    assert path.read_bytes() == _written(shorter, records[: step + 1])


def test_what_is_no_record_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for text in ("x\n", "[1]\n", '{"loss": 1}\n', '{"step": true}\n'):
        path.write_text('{"step": 0}\n' + text)
        with pytest.raises(ft.DataError, match=r"metrics.jsonl:2: "):
            jsonl.read(path)
    assert jsonl.read(tmp_path / "nowhere.jsonl") == []
    (tmp_path / "file").write_text("")
    with pytest.raises(ft.DataError, match="cannot be written"):
        jsonl.JSONLTracker(tmp_path / "file" / "metrics.jsonl")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Unread(dict[str, float]):
    """Metrics that must not be looked at."""

    def __getitem__(self, name: str) -> float:
        raise AssertionError("a value was read for a line that is not drawn")


def test_elsewhere_there_is_a_line_every_five_seconds() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = Progress(100, "pretrain", stream=stream, clock=clock)
    for step in range(1, 101):
        clock.now += 1.0
        drawn = step == 100 or step % 5 == 1
        metrics = {"loss": 2.5, "tokens_per_second": 12345.6}
        progress.update(step, metrics if drawn else Unread(metrics))
    progress.close()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 21
    assert "\r" not in stream.getvalue()
    for part in ("pretrain", " 51/100", "51%", "loss 2.5000", "12,346 tokens/s", "0:49 left"):
        assert part in lines[10]
    assert "100/100" in lines[-1]
    assert "left" not in lines[-1]


def test_an_evaluation_is_told_whenever_it_is_made() -> None:
    """Also a moment after a line; the next one is five seconds later."""
    stream, clock = io.StringIO(), Clock()
    progress = Progress(100, "sft", stream=stream, clock=clock)
    for step in range(1, 9):
        clock.now += 1.0
        progress.update(step, {"loss": 2.5} | ({"eval_loss": 2.25} if step == 3 else {}))
    told = [line.split()[1] for line in stream.getvalue().splitlines()]
    assert told == ["1/100", "3/100", "8/100"]
    assert "held out 2.2500" in stream.getvalue().splitlines()[1]


def test_on_a_terminal_a_bar_is_redrawn() -> None:
    stream, clock = Terminal(), Clock()
    with Progress(3, "sft", stream=stream, clock=clock) as progress:
        for step in range(1, 4):
            clock.now += 3000.0
            progress.update(step, {"loss": 1.0})
    assert "1/3" in stream.getvalue()
    assert "50:00 left" in stream.getvalue()
    assert "3/3" in stream.getvalue()
    assert "\x1b[" in stream.getvalue()


def test_on_a_dumb_terminal_there_are_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot go back in a line: a bar would be drawn at the end alone."""
    monkeypatch.setenv("TERM", "dumb")
    stream, clock = Terminal(), Clock()
    with Progress(3, "sft", stream=stream, clock=clock) as progress:
        progress.update(1, {"loss": 1.0})
        assert "1/3" in stream.getvalue()


@given(
    count=st.integers(1, 3000),
    seed=st.integers(0, 99),
    broken=st.sampled_from([0.0, 0.01, 0.5, 1.0]),
    value=st.sampled_from([math.nan, math.inf, -math.inf]),
)
def test_thinning_keeps_the_extremes_and_the_order(
    count: int, seed: int, broken: float, value: float
) -> None:
    draw = random.Random(seed)
    values = [value if draw.random() < broken else draw.uniform(-9, 9) for _ in range(count)]
    points = list(enumerate(values))
    thin = charts.thinned(points, 100)
    assert len(thin) <= 100
    assert [step for step, _ in thin] == sorted({step for step, _ in thin})
    assert all(value is values[step] for step, value in thin)
    kept, whole = ({v for _, v in each if math.isfinite(v)} for each in (thin, points))
    assert bool(kept) == bool(whole)
    if kept:
        assert {min(kept), max(kept)} == {min(whole), max(whole)}


def test_a_stretch_without_a_value_stays_a_gap() -> None:
    points = [(float(i), math.nan if 400 <= i < 600 else 1.0) for i in range(1000)]
    svg = charts.drawn(charts.Chart("Loss", (charts.Curve("train", tuple(points)),)))
    assert svg.count("<polyline") == 2


@given(low=st.floats(-1e9, 1e9), width=st.floats(1e-6, 1e9))
def test_ticks_are_few_round_and_inside(low: float, width: float) -> None:
    high = low + width
    marks = charts.ticks(low, high)
    slack = 1e-6 * width + 1e-9 * max(abs(low), abs(high))
    assert len(marks) <= 7
    assert all(low - slack <= mark <= high + slack for mark in marks)


@attrs.frozen
class Sample:
    prompt: str
    answers: tuple[tuple[str, str], ...]


TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]))
VALUES = st.floats() | st.sampled_from([math.nan, math.inf, 0.0, 1e-30, 1e30, 1.7e308])


@given(
    text=TEXT,
    losses=st.lists(VALUES, max_size=30),
    names=st.sampled_from(["loss", "eval_loss", "grad_norm", "rewards/margins"]),
)
def test_any_run_makes_a_page_that_fetches_nothing(
    text: str, losses: list[float], names: str
) -> None:
    hostile = f'</pre><script>alert("{text}")</script>&{text}'
    page = report.render_report(
        title=hostile,
        stages=[
            report.StageRecord(
                name=hostile,
                metrics=[{"step": n, names: loss} for n, loss in enumerate(losses)],
                config=hostile,
            )
        ],
        table=[(hostile, hostile, "1", "2")],
        samples=[Sample(hostile, ((hostile, hostile),))],
        fingerprint=hostile,
        commands=[hostile],
    )
    assert "<script" not in page
    assert "http" not in page.replace(text, "") or "http" in text
    assert "nan" not in page.replace(text, "").lower().split("<svg", 1)[-1].split("</svg>")[0]
    for svg in page.split("<svg")[1:]:
        ElementTree.fromstring("<svg" + svg.split("</svg>")[0] + "</svg>")


def test_nan_is_a_gap_and_one_value_a_dot() -> None:
    values = [1.0, 2.0, math.nan, 3.0, math.inf, 2.0, 1.0]
    records = [{"step": n, "loss": v} for n, v in enumerate(values)]
    svg = charts.drawn(charts.Chart("Loss", (charts.curve("train", records, "loss"),)))
    assert svg.count("<polyline") == 2
    assert svg.count("<circle") == 1
    nothing = charts.Chart("Loss", (charts.curve("train", [{"step": 0}], "loss"),))
    assert charts.drawn(nothing) == ""


def test_the_charts_are_those_of_the_stage() -> None:
    plain = {"loss": 1.0, "grad_norm": 1.0, "loss_scale": 1.0, "skipped": 0.0}
    records = [{"step": n, **plain} for n in range(3)]
    assert [c.title for c in report.charts(records)] == ["Loss, nats", "Gradient norm"]
    moving = [{**r, "loss_scale": 2.0**n} for n, r in enumerate(records)]
    assert "Loss scale" in [c.title for c in report.charts(moving)]
    still = [{**r, "padding": 0.0, "data_seconds": 1e-5} for r in records]
    assert report.charts(still) == report.charts(records)
    padded = [{**r, "padding": 0.25, "data_seconds": 0.5, "mfu": 0.3} for r in records]
    assert [c.title for c in report.charts(padded)][2:] == [
        "Padding, part of the tokens",
        "Waiting for data, seconds a step",
        "Model FLOPs utilisation",
    ]
    preferred = [{**r, "rewards/margins": 1.0, "eval_rewards/margins": 1.0} for r in records]
    assert "Reward margin, nats" in [c.title for c in report.charts(preferred)]


def test_a_report_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "report.html"
    report.write_report(target, title="a run", stages=[report.StageRecord(name="sft", metrics=[])])
    assert "No metrics were logged" in target.read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_a_line_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    """On a disk that fills up within it; the lines before it and after it stay readable."""
    path = tmp_path / "metrics.jsonl"
    with closing(jsonl.JSONLTracker(path)) as tracker:
        tracker.log(1, {"loss": 2.0})
        refused = pytest.raises(ft.DataError, match=r"cannot be written \(File too large\)")
        with _at_most(path.stat().st_size + 5), refused:
            tracker.log(2, {"loss": 1.5})
        tracker.log(3, {"loss": 1.0})
    assert [record["step"] for record in jsonl.read(path)] == [1, 3]


def test_what_cannot_be_written_anew_stays_as_it_was(tmp_path: Path) -> None:
    """On a disk that fills up within it; nothing of the new file is left."""
    path, page = tmp_path / "metrics.jsonl", tmp_path / "report.html"
    before = _written(path, [{"loss": 1.0}, {"loss": 0.5}])
    page.write_text("an older one")
    refused = pytest.raises(ft.DataError, match=r"metrics.jsonl: cannot be written \(File too lar")
    with _at_most(5), refused:
        jsonl.truncate_after(path, 0)
    with _at_most(5), pytest.raises(OSError, match="File too large"):
        report.write_report(page, title="a run", stages=[])
    assert (path.read_bytes(), page.read_text()) == (before, "an older one")
    assert {each.name for each in tmp_path.iterdir()} == {path.name, page.name}


@contextmanager
def _at_most(size: int) -> Generator[None]:
    """Within it no file can grow beyond a size in bytes, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
