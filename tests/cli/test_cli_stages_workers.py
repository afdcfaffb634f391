"""Fine-tuning and alignment on several workers say and write what one process does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from workers import Group

import functrain as ft
from functrain.cli import main
from functrain.cli.restoring import restored

IMPORTED = (
    "functrain.cli.commands",
    "functrain.cli.run",
    "functrain.cli.summary",
    "functrain.tracking.report",
)
COMMON = [
    *("--train.steps", "2", "--train.batch-size", "8", "--train.save-every", "1"),
    *("--train.threads", "1", "--train.device", "cpu", "--evaluation.every", "1"),
    *("--data.time", "32", "--train.microbatches", "4", "--train.reduction", "canonical"),
    *("--train.timeout", "60"),
]
LORA = ["--lora.rank", "2", "--lora.targets", "q_proj, mlp.*", "--lora.dropout", "0.2"]
HEADING, AFTER = "<h2>Samples</h2>", "<h2>To go on</h2>"
SAID = [f"{i} plus one?" for i in range(12)]
CHATS = [{"prompt": said, "completion": f" {i + 1}"} for i, said in enumerate(SAID)]
PAIRS = [
    {"prompt": said, "chosen": f" {i + 1}", "rejected": f" {i + 2}"} for i, said in enumerate(SAID)
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretrained run, adapters over it, and what they were made of."""
    path = tmp_path_factory.mktemp("stages")
    (path / "text.txt").write_text("one two three four " * 40)
    for name, records in (("chats", CHATS), ("pairs", PAIRS)):
        lines = [json.dumps(record) + "\n" for record in records]
        (path / f"{name}.jsonl").write_text("".join(lines))
        (path / f"{name}_held_out.jsonl").write_text(lines[0])  # a sample takes seconds
    shape = ["--model.width", "16", "--model.layers", "1", "--model.heads", "2"]
    text = ["--data.train", str(path / "text.txt")]
    assert main(["pretrain", "--directory", str(path / "a"), *shape, *text, *COMMON]) == 0
    assert main(["sft", *_options(path, path / "b", "a", "chats"), *LORA]) == 0
    return path


def _options(path: Path, directory: Path, start: str, data: str) -> list[str]:
    train, held_out = (str(path / f"{data}{which}.jsonl") for which in ("", "_held_out"))
    given = ["--directory", str(directory), "--model.from", str(path / start)]
    return [*given, "--data.train", train, "--data.held-out", held_out, *COMMON]


def _seen(directory: Path) -> tuple[str, str]:
    """The fingerprint of the end, and what the report quotes."""
    text = (directory / "report.html").read_text().replace(str(directory), "RUN")
    return ft.fingerprint(restored(str(directory)).state), text[
        text.index(HEADING) : text.index(AFTER)
    ]


STAGES: dict[str, tuple[str, str, str, list[str]]] = {
    "sft": ("sft", "a", "chats", []),
    "adapters": ("sft", "a", "chats", LORA),
    "dpo": ("dpo", "a", "pairs", []),
    "adapters over adapters": ("dpo", "b", "pairs", [*LORA, "--lora.dora"]),
}


@pytest.mark.parametrize(
    ("name", "sharded"),
    [
        ("dpo", False),
        pytest.param("sft", True, marks=pytest.mark.long),
        pytest.param("dpo", True, marks=pytest.mark.long),
        pytest.param("adapters", True, marks=pytest.mark.long),
        ("adapters over adapters", True),
    ],
)
def test_a_stage_on_two_workers_is_that_of_one(
    group: Group, runs: Path, tmp_path: Path, capsys: Any, name: str, sharded: bool
) -> None:
    stage, start, data, more = STAGES[name]
    one, two = tmp_path / "one", tmp_path / "two"
    capsys.readouterr()
    assert main([stage, *_options(runs, one, start, data), *more]) == 0
    alone = capsys.readouterr().out.replace(str(one), "RUN")
    more = [*more, *(["--train.sharded"] if sharded else [])]
    arguments = [stage, *_options(runs, two, start, data), *more]
    first, second = group.values("command", 2, {"arguments": arguments})
    assert (first["code"], second["code"]) == (0, 0)
    assert first["out"].replace(str(two), "RUN") == alone
    assert not second["out"]
    assert _seen(two) == _seen(one)


def test_samples_may_take_longer_than_workers_wait(
    group: Group, runs: Path, tmp_path: Path
) -> None:
    arguments = ["sft", *_options(runs, tmp_path, "a", "chats")]
    arguments[arguments.index("--train.timeout") + 1] = "4"
    for each in group.values("command", 2, {"arguments": arguments, "speaks_in": 5}):
        assert each["code"] == 0, each["err"]
    assert HEADING in (tmp_path / "report.html").read_text()


def test_where_each_token_would_gather_too_much_the_model_is_not_asked(
    group: Group, runs: Path, tmp_path: Path
) -> None:
    arguments = ["sft", *_options(runs, tmp_path, "a", "chats"), "--train.sharded"]
    first, _ = group.values("command", 2, {"arguments": arguments, "gathered": 100})
    assert first["code"] == 0
    assert (
        "no samples: 0 MiB would be gathered for each token; ask the model afterwards"
        in first["err"]
    )
    assert HEADING not in (tmp_path / "report.html").read_text()
