"""Runs: refused, finished, interrupted and resumed, to the bit."""

from __future__ import annotations

import errno
import functools
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from checkpoint import faults
from hypothesis import given
from hypothesis import strategies as st
from processes import exit_code, reaped

from functrain import checkpoint, compilation, loop, memory
from functrain.cli import main, sources, toml
from functrain.cli import run as run_module
from functrain.cli.config import Pretrain
from functrain.cli.lock import held
from functrain.cli.origins import RunDirectory
from functrain.data.packing import packed_ids
from functrain.data.text import tokens
from functrain.errors import CheckpointError, ConfigError, DataError, DivergedError
from functrain.metrics import Metrics
from functrain.objectives import logprobs
from functrain.tracking import jsonl, progress, report

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]
TEXT = " ".join(WORDS[(i * i + i // 3) % 8] for i in range(900))
TOML = """
directory = {directory}
[model]
width = 16
layers = 1
heads = 2
dropout = 0.1
[data]
train = {train}
held_out = {held_out}
time = 32
[schedule]
name = "constant_with_warmup"
peak = 1e-2
warmup = 3
[train]
steps = {steps}
batch_size = 4
save_every = 4
threads = 1
device = "cpu"
[evaluation]
every = 5
limit = 4
"""


def _files(tmp_path: Path) -> tuple[Path, Path]:
    train, held_out = tmp_path / "train.txt", tmp_path / "held_out.txt"
    train.write_text(TEXT)
    held_out.write_text(TEXT[::-1])
    return train, held_out


def _config(tmp_path: Path, name: str = "run", steps: int = 10) -> tuple[str, Path]:
    train, held_out = _files(tmp_path)
    directory, path = tmp_path / name, tmp_path / f"{name}.toml"
    values = {"directory": directory, "train": train, "held_out": held_out}
    texts = {key: json.dumps(str(value)) for key, value in values.items()}
    path.write_text(TOML.format(steps=steps, **texts))
    return str(path), directory


def _fingerprint(directory: Path) -> str:
    """Of the newest state: the hashes of every file of its checkpoint."""
    newest = checkpoint.latest(directory / "checkpoints")
    assert newest is not None
    return (newest / "manifest.json").read_text()


def _records(directory: Path) -> list[dict[str, Any]]:
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    clocks = (*jsonl.CLOCKS, "time")
    return [{k: v for k, v in json.loads(line).items() if k not in clocks} for line in lines]


def test_a_run_leaves_what_is_needed_to_go_on_and_to_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given, run = _config(tmp_path)
    assert main(["pretrain", given]) == 0
    out = capsys.readouterr().out
    assert "finished, 10 of 10 steps" in out
    assert "text perplexity" in out
    assert "fingerprint" in out
    assert {path.name for path in run.iterdir()} == {
        ".lock",
        "config.toml",
        "tokenizer.json",
        "checkpoints",
        "data.txt",
        "environment.json",
        "metrics.jsonl",
        "report.html",
    }
    kept = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
    assert kept == ["step-000000000008", "step-000000000010"]
    records = _records(run)
    assert [record["step"] for record in records] == list(range(11))
    assert ["eval_loss" in record for record in records] == [
        step in (0, 5, 10) for step in range(11)
    ]
    assert records[-1]["eval_loss"] < records[0]["eval_loss"]
    # The resolved config is the same run.
    resolved = toml.read_any(run / "config.toml")
    assert resolved.train.threads == 1
    assert main(["pretrain", str(run / "config.toml"), "--directory", str(tmp_path / "two")]) == 0
    assert _fingerprint(tmp_path / "two") == _fingerprint(run)


def test_a_run_tells_its_trackers_and_goes_on_under_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, directory = _config(tmp_path, steps=4)
    pytest.importorskip("tensorboard")
    assert main(["pretrain", config, "--tracking.services", "tensorboard"]) == 0
    assert len(list((directory / "tensorboard").glob("events.*"))) == 1
    again = [str(directory / "config.toml"), "--resume", "--train.steps", "6"]
    assert main(["pretrain", *again]) == 0
    assert len(list((directory / "tensorboard").glob("events.*"))) == 2
    assert len(_records(directory)) == 7  # one of the evaluation before the first step
    capsys.readouterr()
    other = ["--directory", str(tmp_path / "other"), "--tracking.services"]
    assert main(["pretrain", config, *other, "wandbb"]) == 2
    error = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert "tracking.services: 'wandbb' is unknown; did you mean 'wandb'" in error


def test_a_tracker_that_is_not_installed_is_said_before_a_directory_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, directory = _config(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    assert main(["pretrain", config, "--tracking.services", "trackio"]) == 2
    assert "the package trackio is not installed; pip install trackio" in capsys.readouterr().err
    assert not directory.exists()


def test_a_run_says_that_its_logits_are_made_whole_and_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, _ = _config(tmp_path, "chunks", steps=1)
    assert main(["pretrain", config]) == 0
    assert "whole logits" not in capsys.readouterr().err
    monkeypatch.setattr(logprobs, "find_head", lambda _architecture: "it has hooks")
    config, _ = _config(tmp_path, "whole", steps=1)
    assert main(["pretrain", config]) == 0
    said = capsys.readouterr().err
    assert said.count("whole logits: it has hooks; their memory is") == 1
    assert main(["pretrain", config, "--directory", str(tmp_path / "f"), "--train.head=full"]) == 0
    assert "whole logits" not in capsys.readouterr().err  # it was asked for


def test_a_run_sets_the_threads_and_puts_them_back(tmp_path: Path) -> None:
    given, _ = _config(tmp_path)
    before = torch.get_num_threads()
    assert main(["pretrain", given, "--train.threads", str(before + 1)]) == 0
    assert torch.get_num_threads() == before


def test_a_directory_that_is_not_empty_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given, run = _config(tmp_path)
    run.mkdir()
    (run / "thesis.tex").write_text("precious")
    assert main(["pretrain", given]) == 2
    err = capsys.readouterr().err
    assert "not empty; go on with --resume, or give another --directory" in err
    assert main(["pretrain", given, "--resume"]) == 2  # no run of ours
    assert [path.name for path in run.iterdir()] == ["thesis.tex"]


def test_a_beginning_that_failed_is_begun_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With another config; where a step was logged or saved, or more lies there, nothing goes."""
    given, run = _config(tmp_path)

    def failing(*_: object, **_options: object) -> None:
        raise DataError("the first evaluation fails")

    with monkeypatch.context() as patched:
        patched.setattr("functrain.cli.run.evaluate", failing)
        assert main(["pretrain", given, "--train.seed", "7"]) == 2
    assert (run / "config.toml").is_file()
    told = _refused(["pretrain", given, "--resume"], capsys)
    assert "train.seed: 0, and the run has 7" in told
    assert "nothing has been trained there, so without --resume it is begun anew" in told
    (run / "tokenizer").mkdir()  # of another model that it began from
    (run / "thesis.tex").write_text("precious")
    assert "not empty" in _refused(["pretrain", given], capsys)
    (run / "thesis.tex").unlink()
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    assert "not empty" in _refused(["pretrain", given], capsys)
    (run / "metrics.jsonl").write_text('{"step": 0, "eval_loss": 1.0}\n')
    assert main(["pretrain", given]) == 0
    assert not (run / "tokenizer").exists()
    assert [each["step"] for each in _records(run)][:2] == [0, 1]
    assert "not empty" in _refused(["pretrain", given], capsys)


def test_ids_are_held_out_of_ids_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As text's, they would be counted as its bytes; said before a directory is made."""
    given, run = _config(tmp_path)
    np.save(tmp_path / "ids.npy", np.arange(300) % 50)
    for text in ([], ["--data.train", "embedded"]):
        asked = ["pretrain", given, *text, "--data.held-out", str(tmp_path / "ids.npy")]
        told = _refused(asked, capsys)
        assert f"data.held_out: {tmp_path}/ids.npy holds token ids, and data.train is text" in told
    assert not run.exists()


def test_resuming_a_finished_run_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given, run = _config(tmp_path)
    assert main(["pretrain", given, "--resume"]) == 0  # nothing there yet: it begins
    before, records = _fingerprint(run), _records(run)
    capsys.readouterr()
    assert main(["pretrain", given, "--resume"]) == 0
    assert "finished, 10 of 10 steps" in capsys.readouterr().out
    assert (_fingerprint(run), _records(run)) == (before, records)


def test_a_longer_total_goes_on_to_the_bit_of_the_longer_run(tmp_path: Path) -> None:
    given, run = _config(tmp_path)
    assert main(["pretrain", given]) == 0
    longer = ["--train.steps", "15", "--train.save-every", "7", "--resume"]
    assert main(["pretrain", given, *longer]) == 0
    alone, other = _config(tmp_path, "alone", steps=15)
    assert main(["pretrain", alone]) == 0
    assert _fingerprint(run) == _fingerprint(other)
    assert toml.read_any(run / "config.toml").train.steps == 15


def test_a_new_run_of_a_runs_config_ends_its_schedule_with_its_own_steps(tmp_path: Path) -> None:
    """Unless the total was given: then of the config's, or of the command's options."""
    given, run = _config(tmp_path, steps=2)
    cosine = ["--schedule.name", "cosine", "--schedule.warmup", "1"]
    assert main(["pretrain", given, *cosine]) == 0
    assert toml.read_any(run / "config.toml").schedule.total == 2
    for name, source, total, options in (
        ("open", run, 3, []),
        ("given", run, 5, ["--schedule.total", "5"]),
        ("the same", run, 2, ["--schedule.total", "2"]),
        ("inherited", tmp_path / "given", 5, []),
    ):
        more = ["--directory", str(tmp_path / name), "--train.steps", "3", *options]
        assert main(["pretrain", str(source / "config.toml"), *more]) == 0
        assert toml.read_any(tmp_path / name / "config.toml").schedule.total == total
    alone, other = _config(tmp_path, "alone", steps=3)
    assert main(["pretrain", alone, *cosine]) == 0
    assert _fingerprint(other) == _fingerprint(tmp_path / "open") != _fingerprint(run)
    # Nor does it matter that the other run was made longer than it was begun.
    config = str(run / "config.toml")
    assert main(["pretrain", config, "--resume", "--train.steps", "4"]) == 0
    assert toml.read_any(run / "config.toml").schedule.total == 2
    more = ["--directory", str(tmp_path / "longer"), "--train.steps", "3"]
    assert main(["pretrain", config, *more]) == 0
    assert _fingerprint(other) == _fingerprint(tmp_path / "longer")


@pytest.mark.parametrize(
    ("name", "then"),
    [
        ("cosine", "then goes on between 0 and 0.01"),
        ("linear", "then stays at 0"),
        ("constant_with_warmup", None),
    ],
)
def test_a_schedule_that_ends_before_the_run_is_told_with_what_comes_after_it(
    name: str, then: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given, run = _config(tmp_path, steps=4)
    assert main(["pretrain", given, "--schedule.name", name]) == 0
    assert "schedule.total" not in capsys.readouterr().err
    again = ["pretrain", str(run / "config.toml"), "--resume"]
    assert main([*again, "--train.steps", "6"]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("schedule.total") == (then is not None)
    if then is not None:
        assert f"{name} ends after 4 updates (schedule.total), and the run after 6 steps" in said
        assert f"the learning rate {then}" in said
        assert toml.read_any(run / "config.toml").schedule.total == 4
    assert main(again) == 0  # it is finished
    assert "schedule.total" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (["--schedule.peak", "0.5"], "schedule.peak: 0.5, and the run has 0.01"),
        (["--train.seed", "3"], "train.seed: 3, and the run has 0"),
        (["--train.threads", "3"], "train.threads: 3, and the run has 1"),
        (["--model.width", "32"], "model.width: 32, and the run has 16"),
        (["--data.time", "16"], "data.time: 16, and the run has 32"),
        (["--train.max-grad-norm", "inf"], "train.max_grad_norm: inf, and the run has 1.0"),
        (["--train.compile"], "train.compile: True, and the run has False"),
    ],
)
def test_a_config_that_changes_the_bits_is_refused_by_the_name_of_the_key(
    tmp_path: Path, override: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from functrain.cli import directory
    from functrain.cli.commands import stage_arguments

    given, run = _config(tmp_path)
    begun = directory.begun(stage_arguments("pretrain", [given]).config, threads=1, device="cpu")
    directory.write(run / "config.toml", toml.dumps(begun))
    assert main(["pretrain", given, *override, "--resume"]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert f"functrain pretrain {run}/config.toml --resume" in err
    assert toml.read_any(run / "config.toml") == begun


@pytest.mark.parametrize(
    ("unset", "message"),
    [
        (["--train.keep-best", "None"], "train.keep_best: None, and the run has 1"),
        (["--evaluation.limit=None"], "evaluation.limit: None, and the run has 4"),
        (["--data.held_out", "None"], "data.held_out: None, and the run has"),
    ],
)
def test_a_none_that_would_not_be_obeyed_is_refused(
    unset: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With what to do instead; a None that the run has too, or fills in, is as good as none."""
    from functrain.cli import directory
    from functrain.cli.commands import stage_arguments

    given, run = _config(tmp_path)
    asked = ["pretrain", given, "--train.keep-best", "1"]
    begun = directory.begun(stage_arguments("pretrain", asked[1:]).config, threads=1, device="cpu")
    directory.write(run / "config.toml", toml.dumps(begun))
    told = _refused(["pretrain", given, "--resume", *unset], capsys)
    assert message in told
    free = unset[0] != "--data.held_out"
    assert (f"out of {run}/config.toml" if free else "begin another --directory") in told
    kept = ["--train.keep-every", "None", "--schedule.total", "None", "--train.threads", "None"]
    assert main(["pretrain", given, "--resume", "--train.steps", "1", *kept]) == 0


def test_an_evaluation_may_change_unless_the_schedule_sees_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given, _ = _config(tmp_path)
    other = ["--evaluation.every", "3", "--resume"]
    assert main(["pretrain", given]) == 0
    assert main(["pretrain", given, *other]) == 0
    seen = ["--schedule.name", "reduce_on_plateau", "--schedule.warmup", "None"]
    seen += ["--directory", str(tmp_path / "seen")]
    assert main(["pretrain", given, *seen]) == 0
    assert main(["pretrain", given, *seen, *other]) == 2
    assert "evaluation.every: 3, and the run has 5" in capsys.readouterr().err


def test_a_schedule_that_sees_evaluations_is_the_same_wherever_a_sitting_ends(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Resumed with more steps, and made again up to a step at which nothing was to be seen."""
    given, run = _config(tmp_path, steps=9)
    seen = ["--schedule.name", "reduce_on_plateau", "--schedule.warmup", "None"]
    seen += ["--schedule.patience", "0", "--schedule.peak", "3", "--evaluation.every", "2"]
    seen += ["--train.save-every", "3", "--train.keep", "9"]
    assert main(["pretrain", given, *seen]) == 0
    other = [*seen, "--directory", str(tmp_path / "two")]
    assert main(["pretrain", given, *other, "--train.steps", "3"]) == 0
    assert main(["pretrain", given, *other, "--resume"]) == 0
    assert _fingerprint(tmp_path / "two") == _fingerprint(run)
    assert main(["verify", str(run), "--replay", "0..3"]) == 0
    assert main(["verify", str(tmp_path / "two"), "--replay", "0..9"]) == 0


def _unseal(config: Path) -> None:
    """As the configs of runs were before they had a hash of themselves."""
    lines = config.read_text().splitlines(keepends=True)
    config.write_text("".join([line for line in lines[:3] if "sha256" not in line] + lines[3:]))


EDITS = [
    ("peak = 0.01", "peak = 0.5", ""),
    ("max_grad_norm = 1.0", "max_grad_norm = inf", ": train.max_grad_norm is inf, and was 1.0;"),
    ("time = 32", "time = 16", ""),
    ("seed = 0", "seed = 7", ": train.seed is 7, and was 0;"),
    ("dropout = 0.1", "dropout = 0.2", ""),
    ('name = "adamw"', 'name = "adamw"\nweight_decay = 0.5', "weight_decay is 0.5, and was None;"),
    ("warmup = 3\n", "", ""),
    ("sha256 = ", 'sha256 = "0"  # ', ""),
]
FREE = [
    ("peak = 0.01", "peak = 1e-2"),
    ("keep = 2", "keep = 3"),
    ("steps = 2", "steps = 3"),
    ("every = 5", "every = 7"),
    ("timeout = 600.0", "timeout = 60"),
]


def test_a_runs_own_config_is_that_with_which_it_was_begun(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An edit of what may not change is refused, also where another config is given; then not one
    of what may, of how it is written, nor of a run that has no hash of its config.
    """
    given, run = _config(tmp_path, steps=2)
    assert main(["pretrain", given]) == 0
    config = run / "config.toml"
    text = config.read_text()
    for old, new, named in EDITS:
        assert old in text
        config.write_text(text.replace(old, new, 1))
        for path in (str(config), given):
            told = _refused(["pretrain", path, "--resume", "--train.steps", "4"], capsys)
            assert f"{config}: was changed after the run had begun" in told
            assert named in told
    for old, new in FREE:
        assert old in text
        text = text.replace(old, new, 1)
    config.write_text(text)
    again = ["pretrain", str(config), "--resume", "--train.steps"]
    assert main([*again, "3"]) == 0
    _unseal(config)
    assert main([*again, "4"]) == 0
    assert toml.read_any(config).sha256 is not None
    moved = run.rename(tmp_path / "moved")
    assert main([*["pretrain", given, "--directory", str(moved)], *again[2:], "4"]) == 0
    # Another run with it is another run.
    config, other = moved / "config.toml", tmp_path / "other"
    config.write_text(config.read_text().replace("seed = 0", "seed = 7"))
    more = ["--directory", str(other), "--train.steps"]
    assert main(["pretrain", str(config), *more, "2"]) == 0
    assert main(["pretrain", str(config), *more, "3", "--resume"]) == 0


BEGUN = """
stage = "pretrain"
sha256 = "4256134d568cfe039b1ea706b4f8e4773ba4f9bb6246c7d637757b9a6d4c5677"
[model]
width = 16
heads = 2
[data]
train = "x.txt"
sha256 = "0"
[optimizer]
name = "sgd"
momentum = 0.9
[schedule]
name = "multistep"
peak = 1e-3
milestones = [2, 3]
[train]
steps = 3
max_grad_norm = inf
timeout = 1
threads = 1
device = "cpu"
"""


def test_the_hash_of_a_config_is_one_for_every_later_version(tmp_path: Path) -> None:
    """Whatever options, defaults and free keys are added: the run of before can go on."""
    from functrain.cli import directory

    run = RunDirectory(tmp_path)
    run.config.write_text(BEGUN)
    run.metrics.write_text('{"step": 1, "loss": 1.0}\n')
    before = attrs.evolve(toml.read(run.config, Pretrain), directory=str(tmp_path))
    assert directory.resumed(before, threads=1, device="cpu").sha256 == before.sha256
    run.config.write_text(BEGUN.replace("momentum = 0.9", "momentum = 0.8"))
    with pytest.raises(ConfigError, match="was changed after the run had begun"):
        directory.resumed(before, threads=1, device="cpu")


def test_a_run_that_cannot_go_on_stays_as_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its config, where its newest checkpoint or its metrics are damaged."""
    given, run = _config(tmp_path, steps=4)
    assert main(["pretrain", given]) == 0
    state, metrics = run / "checkpoints" / "step-000000000004" / "state.json", run / "metrics.jsonl"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    more = ["pretrain", given, "--resume", "--train.steps", "50", "--train.keep", "1"]
    for damaged, told in ((state, "it is damaged"), (metrics, "remove that line, and the others")):
        damaged.write_bytes(b"x\n" + before[damaged])
        assert told in _refused(more, capsys)
        damaged.write_bytes(before[damaged])
        assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def test_data_may_lie_in_another_place_and_are_known_by_their_hash(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = _config(tmp_path, steps=2)
    assert main(["pretrain", config]) == 0
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("train", "held_out"):
        (tmp_path / f"{name}.txt").rename(moved / f"{name}.txt")
    again = ["pretrain", str(run / "config.toml"), "--resume", "--train.steps", "3"]
    told = _refused(again, capsys)
    assert "train.txt is not there" in told
    assert "where it was moved, give --data.train with its place now" in told
    again += ["--data.train", str(moved / "train.txt"), "--data.held-out"]
    other = _refused([*again, str(moved / "train.txt")], capsys)
    assert "data.held_out: " in other
    assert "is not what this run was begun with" in other
    assert main([*again, str(moved / "held_out.txt")]) == 0
    assert main([*again[:4], "4"]) == 0  # where they lie is written down


@pytest.mark.parametrize("which", ["train", "held_out"])
def test_other_data_than_the_run_was_begun_with_is_refused(
    which: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is held out too, which the best are chosen by, and a schedule may follow."""
    config, run = _config(tmp_path, steps=2)
    assert main(["pretrain", config]) == 0
    changed = tmp_path / f"{which}.txt"
    changed.write_text(changed.read_text() + " iota")
    told = f"data.{which}: {changed} is not what this run was begun with"
    assert told in _refused(["pretrain", config, "--resume", "--train.steps", "4"], capsys)
    assert told in _refused(["verify", str(run), "--replay", "0..2"], capsys)


@pytest.mark.parametrize(("time", "told"), [(8, False), (200, False), (201, True), (1024, True)])
def test_a_row_that_is_mostly_padding_is_told(time: int, told: bool) -> None:
    ids = np.arange(100, dtype=np.uint16)
    rows = tokens(ids, time=time, batch_size=2)
    said = sources.notes(rows, tokens(ids, time=8, batch_size=2))
    percent = f"{1 - 100 / time:.1%}"
    line = f"training text: 100 tokens in one row of data.time {time:,}, {percent} of which is pad"
    assert [line in each for each in said] == ([True] if told else [])
    # Only what is mostly padding: of several rows the last alone has some.
    assert sources.notes(tokens(ids, time=8, batch_size=2), rows)[:1] == [
        each.replace("training", "held-out") for each in said
    ]


@given(st.integers(0, 999), st.booleans())
def test_a_hash_is_of_every_token(place: int, packing: bool) -> None:
    """Wherever the one is that is another, of rows and of packed documents."""
    ids = np.arange(1000, dtype=np.uint16)
    other = ids.copy()
    other[place] += 1
    make: Any = functools.partial(packed_ids, ends=np.arange(100, 1001, 100)) if packing else tokens
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "_HASHED", 64)
        one, same, differs = (
            sources.digest(make(each, time=100, batch_size=1)) for each in (ids, ids.copy(), other)
        )
    assert one == same != differs


def _refused(arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What is said, in one line, by a command that ends with code 2."""
    capsys.readouterr()
    assert main(list(arguments)) == 2
    return " ".join(capsys.readouterr().err.split())


def test_one_process_at_a_time_trains_in_a_directory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The other touches nothing; a lock that was left behind is nobody's."""
    given, run = _config(tmp_path, steps=4)
    assert main(["pretrain", given]) == 0
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    more = ["pretrain", given, "--resume", "--train.steps", "6"]
    with held(RunDirectory(str(run)), new=False):
        assert f"{run}: another process is training here" in _refused(more, capsys)
        assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before
    assert main(more) == 0


def test_of_two_that_begin_a_run_at_once_one_is_refused(tmp_path: Path) -> None:
    """Both have found the directory empty; the second waits for nothing and changes nothing."""
    run = RunDirectory(str(tmp_path / "run"))
    with held(run, new=True):
        run.config.write_text("")
    said = "another process has begun a run here"
    with pytest.raises(ConfigError, match=said), held(run, new=True):
        raise AssertionError
    with held(run, new=False):
        pass


def test_what_cannot_be_gone_on_with_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given, run = _config(tmp_path, steps=4)
    assert main(["pretrain", given]) == 0
    config = (run / "config.toml").read_text()
    told = _refused(["pretrain", given, "--resume", "--train.steps", "3"], capsys)
    assert f"train.steps: 3, and {run} is at step 4 already" in told
    assert (run / "config.toml").read_text() == config
    told = _refused(["sft", "--directory", str(run), "--resume", "--model.from", str(run)], capsys)
    assert f"{run}: is a run of pretrain; go on with functrain pretrain" in told
    (run / "config.toml").unlink()
    told = _refused(["pretrain", given, "--resume"], capsys)
    assert "no config.toml in it there is no run to go on with; put that back" in told


def test_a_start_that_is_no_run_is_told_by_its_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = _refused(["sft", "--model.from", str(tmp_path)], capsys)
    assert f"model.from: {tmp_path}: no run's directory" in told


def test_the_config_of_a_run_that_was_moved_begins_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given, run = _config(tmp_path, steps=2)
    assert main(["pretrain", given]) == 0
    moved = run.rename(tmp_path / "moved")
    again = ["pretrain", str(moved / "config.toml"), "--resume", "--train.steps", "3"]
    told = _refused(again, capsys)
    assert f"of a run that was begun in {run} and lies in {moved} now" in told
    assert f"give --directory {moved}" in told
    assert not run.exists()
    assert main([*again, "--directory", str(moved)]) == 0
    assert "from step 2 on" in capsys.readouterr().err
    assert main(again) == 0  # it is written down where it lies
    other = tmp_path / "other"
    assert main([*again, "--directory", str(other)]) == 0  # another, which was asked for
    assert _fingerprint(other) == _fingerprint(moved)


def test_a_directory_that_cannot_be_written_is_an_error_of_the_config(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given, _ = _config(tmp_path)
    for directory in ("/proc/run", f"{given}/run"):
        told = _refused(["pretrain", given, "--directory", directory], capsys)
        assert f"{directory}: cannot be written" in told
    link = tmp_path / "link"
    link.symlink_to("nowhere")
    for directory in (str(link), f"{link}/run"):
        told = _refused(["pretrain", given, "--directory", directory], capsys)
        assert f"{link}: a link to what is not there" in told


@pytest.mark.parametrize("name", ["ids.bin", "ids.BIN"])
def test_a_token_that_no_model_has_is_refused_before_the_first_step(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the file and its place in it, though no batch of the run might meet it."""
    given, run = _config(tmp_path, steps=1)
    ids = np.full(5000, 7, dtype=np.uint16)
    ids[4321] = 999
    path = tmp_path / name
    ids.tofile(path)
    options = ["--data.train", str(path), "--data.vocabulary", "300", "--data.held-out", str(path)]
    told = _refused(["pretrain", given, *options], capsys)
    assert f"{path}: token 4321 is 999, expected in [0, 300)" in told
    assert not run.exists()


def test_a_config_that_cannot_be_built_leaves_no_directory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given, run = _config(tmp_path)
    assert main(["pretrain", given, "--data.train", str(tmp_path / "no.txt")]) == 2
    assert main(["pretrain", given, "--schedule.warmup", "99", "--schedule.name", "linear"]) == 2
    (tmp_path / "empty.jsonl").write_text('{"txt": "x"}')
    assert main(["pretrain", given, "--data.train", str(tmp_path / "empty.jsonl")]) == 2
    assert "empty.jsonl" in capsys.readouterr().err
    assert not run.exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (["--schedule.name", "cosine", "--schedule.min-lr", "1"], "schedule.min_lr: 1.0 is more"),
        (["--schedule.name", "cosine", "--schedule.cycles", "1e308"], "schedule.cycles: 1e+308"),
        (["--train.checkpoint", "nope"], "train.checkpoint: no module's name matches 'nope'"),
        (
            ["--train.checkpoint", "model.layers.*", "--model.checkpointing"],
            "train.checkpoint: 'model.layers.*', and model.checkpointing recomputes every block",
        ),
    ],
)
def test_what_the_library_refuses_is_told_by_the_key_of_the_config(
    override: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given, run = _config(tmp_path)
    assert message in _refused(["pretrain", given, *override], capsys)
    assert not run.exists()


def test_the_options_of_a_schedule_are_checked_before_data_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given, _ = _config(tmp_path)
    (tmp_path / "train.txt").write_bytes(b"\xff")  # not UTF-8
    wrong = ["--schedule.name", "cosine", "--schedule.min-lr", "1"]
    assert "schedule.min_lr: 1.0 is more" in _refused(["pretrain", given, *wrong], capsys)


def test_a_run_whose_params_say_nothing_any_more_ends_like_any_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its last words are why there are none."""
    given, run = _config(tmp_path, steps=3)
    diverging = ["--schedule.name", "constant", "--schedule.warmup", "None"]
    assert main(["pretrain", given, *diverging, "--schedule.peak", "1e38"]) == 0
    out = capsys.readouterr().out
    assert "skipped      2 of 3 steps: their loss or gradients were not finite" in out
    assert "fingerprint  " in out
    assert "(nothing: params: the largest logit of the next token is nan" in (
        run / "report.html"
    ).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (["--schedule.name", "reduce_on_plateau"], "'reduce_on_plateau' follows the held-out loss"),
        (["--train.keep-best", "2"], "train.keep_best: 2, and nothing is held out by whose loss"),
        (["--data.enable-thinking", "True"], "data.enable_thinking: the tokenizer has no chat"),
        (["--data.today", "1999-12-31"], "data.today: the tokenizer has no chat template to tell"),
    ],
)
def test_what_a_new_run_would_not_read_is_refused(
    override: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a run on text, of which nothing is held out."""
    given, run = _config(tmp_path)
    unmeasured = ["--data.held-out", "None", "--schedule.warmup", "None"]
    constant = ["--schedule.name", "constant"]
    assert message in _refused(["pretrain", given, *unmeasured, *constant, *override], capsys)
    assert not run.exists()


def test_a_truncated_checkpoint_is_refused_with_a_way_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given, run = _config(tmp_path)
    assert main(["pretrain", given]) == 0
    expected = _fingerprint(run)
    newest = run / "checkpoints" / "step-000000000010"
    model = newest / "model.safetensors"
    os.truncate(model, 100)
    assert main(["pretrain", given, "--resume"]) == 2
    err = capsys.readouterr().err
    assert f"damaged; to go on from the one before, remove {newest} and resume again" in err
    for path in newest.iterdir():
        path.unlink()
    newest.rmdir()
    assert main(["pretrain", given, "--resume"]) == 0
    assert _fingerprint(run) == expected


def test_a_checkpoint_that_is_whole_is_not_to_be_removed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under a config that was altered each is refused alike: all would go, one after the other."""
    given, run = _config(tmp_path, steps=5)
    assert main(["pretrain", given]) == 0
    config = run / "config.toml"
    _unseal(config)
    config.write_text(config.read_text().replace("layers = 1", "layers = 2"))
    error = _refused(["pretrain", str(config), "--resume"], capsys)
    assert "step-000000000005: against `like` it lacks" in error
    assert "remove" not in error
    config.write_text(config.read_text().replace("layers = 2", "layers = 1"))
    (run / "checkpoints" / "step-000000000004").rename(tmp_path / "elsewhere")
    os.truncate(run / "checkpoints" / "step-000000000005" / "state.json", 10)
    error = _refused(["pretrain", str(config), "--resume"], capsys)
    assert "it is the only one of this run; begin another --directory" in error


def _spawned(arguments: Sequence[str], said: Path) -> int:
    """The command in a process that is begun afresh; what it says is in a file."""
    command = [sys.executable, "-m", "functrain", *arguments]
    opened = (os.POSIX_SPAWN_OPEN, 2, said, os.O_WRONLY | os.O_CREAT, 0o600)
    actions = [opened, (os.POSIX_SPAWN_DUP2, 2, 1)]
    return os.posix_spawn(command[0], command, os.environ, file_actions=actions)


def _forked(arguments: Sequence[str], said: Path) -> int:
    """The same in a fork of this process, with the answers to signals of a new one."""

    def work() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        sys.stdout = sys.stderr = said.open("w", buffering=1)
        os._exit(main(arguments))

    return faults.forked(work)


def _wait_for_steps(run: Path, process: int) -> None:
    deadline = time.monotonic() + 60
    metrics = run / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < 6:
        assert exit_code(process) is None
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("number", "launched"),
    [
        (signal.SIGINT, _forked),
        (signal.SIGTERM, _spawned),
        pytest.param(signal.SIGINT, _spawned, marks=pytest.mark.long),
    ],
)
def test_a_signal_saves_and_resuming_ends_as_the_uninterrupted_run(
    tmp_path: Path, number: signal.Signals, launched: Callable[[Sequence[str], Path], int]
) -> None:
    given, run = _config(tmp_path, steps=1_000_000)
    slow = ["--train.save-every", "1000000", "--evaluation.every", "1000000"]
    with reaped(launched(["pretrain", given, *slow], tmp_path / "said")) as process:
        _wait_for_steps(run, process)
        os.kill(process, number)
        assert exit_code(process, limit=60) == 128 + number
    err = (tmp_path / "said").read_text()
    assert f"go on with: functrain pretrain {run}/config.toml --resume" in err
    assert "Traceback" not in err
    newest = checkpoint.latest(run / "checkpoints")
    assert newest is not None  # saved, though no save was due
    steps = str(int(newest.name.removeprefix("step-")) + 5)
    assert _records(run)[-1]["step"] == int(steps) - 5  # the last step made was not lost
    assert main(["pretrain", given, *slow, "--resume", "--train.steps", steps]) == 0
    alone, other = _config(tmp_path, "alone")
    assert main(["pretrain", alone, *slow, "--train.steps", steps]) == 0
    assert _fingerprint(run) == _fingerprint(other)
    assert _records(run) == _records(other)


@pytest.mark.parametrize(
    ("key", "value"), [("train.batch-size", 2**31 - 1), ("data.time", 2**31 - 1)]
)
def test_a_batch_larger_than_the_memory_is_refused_before_the_data_are_read(
    key: str, value: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given, run = _config(tmp_path)
    rows = [] if key == "train.batch-size" else ["--train.batch-size", "4096"]
    assert main(["pretrain", given, f"--{key}", str(value), *rows]) == 2
    said = capsys.readouterr().err
    assert "train.batch_size and data.time: " in said
    assert "GiB, and this machine has" in said
    assert not run.exists()


@pytest.mark.parametrize(("key", "value"), [("width", 2**31 - 8), ("hidden", 2**31 - 1)])
def test_a_model_larger_than_the_memory_is_refused_before_the_data_are_read(
    key: str, value: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given, run = _config(tmp_path)
    assert main(["pretrain", given, f"--model.{key}", str(value)]) == 2
    said = capsys.readouterr().err
    assert f"model.{key}" in said
    assert str(value) in said
    assert "GiB, and this machine has" in said
    assert not run.exists()


TWICE = """
import os, signal, sys, time
from functrain.cli.signals import stopping
with stopping() as stop:
    os.kill(os.getpid(), signal.{first})
    time.sleep(0.01)
    assert stop and stop.exit_code == {code}
    os.kill(os.getpid(), signal.{second})
    time.sleep(10)
sys.exit("alive")
"""


@pytest.mark.parametrize(
    ("first", "second", "code"), [("SIGINT", "SIGINT", 130), ("SIGTERM", "SIGINT", 143)]
)
def test_a_second_signal_aborts_at_once(first: str, second: str, code: int) -> None:
    program = TWICE.format(first=first, second=second, code=code)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 130
    assert f"{first}: finishing this step and saving; once more to abort" in done.stderr


def test_the_handlers_are_put_back() -> None:
    from functrain.cli.signals import stopping

    before = signal.getsignal(signal.SIGINT)
    with stopping() as stop:
        assert signal.getsignal(signal.SIGINT) != before
        assert not stop
        assert stop.exit_code == 0
    assert signal.getsignal(signal.SIGINT) is before


def _full_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full for the save of a step."""
    real = checkpoint.save

    def save(directory: Path, state: Any, **options: Any) -> Path:
        if state.step == step:
            raise CheckpointError("No space left on device")
        return real(directory, state, **options)

    monkeypatch.setattr(checkpoint, "save", save)


@pytest.mark.parametrize("policy", ["stop", "continue"])
def test_a_save_that_fails_is_loud_and_ends_the_run_or_not(
    policy: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A disk that is full for the first save, and has room again for the others."""
    given, run = _config(tmp_path)
    assert main(["pretrain", given, "--directory", str(tmp_path / "alone")]) == 0
    _full_at(4, monkeypatch)
    code = main(["pretrain", given, "--train.on-save-error", policy])
    said = capsys.readouterr().err
    assert "No space left on device" in said
    if policy == "stop":
        assert code == 2
        monkeypatch.undo()
        assert main(["pretrain", given, "--resume"]) == 0
    else:
        assert code == 0
        assert "going on without it" in said
    assert _fingerprint(run) == _fingerprint(tmp_path / "alone")


@pytest.mark.parametrize("policy", ["stop", "continue"])
def test_a_run_whose_last_state_is_not_saved_is_not_finished(
    policy: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """There is nothing that could go on without it; resumed, it ends as one left alone."""
    given, run = _config(tmp_path)
    assert main(["pretrain", given, "--directory", str(tmp_path / "alone")]) == 0
    _full_at(10, monkeypatch)
    told = _refused(["pretrain", given, "--train.on-save-error", policy], capsys)
    assert "No space left on device" in told
    monkeypatch.undo()
    assert main(["pretrain", given, "--resume"]) == 0
    assert _fingerprint(run) == _fingerprint(tmp_path / "alone")


def test_a_report_that_cannot_be_written_takes_nothing_of_the_result_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given, run = _config(tmp_path, steps=4)

    def full(_path: Path, _data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(report, "write", full)
    assert main(["pretrain", given]) == 0
    said = capsys.readouterr().out
    assert "finished, 4 of 4 steps" in said
    assert f"report       {run}/report.html: cannot be written (No space left on device)" in said
    assert f"`functrain report {run} --to FILE`" in said


@pytest.mark.parametrize("policy", ["stop", "continue"])
def test_a_line_that_cannot_be_logged_ends_the_run_or_not(
    policy: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given, run = _config(tmp_path)
    options = ["--train.log-every", "1", "--train.on-save-error", policy]
    alone = [*options, "--directory", str(tmp_path / "alone")]
    assert main(["pretrain", given, *alone]) == 0
    real = jsonl.JSONLTracker.log

    def log(tracker: jsonl.JSONLTracker, step: int, metrics: Any) -> None:
        if step == 6:
            raise DataError("metrics.jsonl: cannot be written (No space left on device)")
        real(tracker, step, metrics)

    monkeypatch.setattr(jsonl.JSONLTracker, "log", log)
    code = main(["pretrain", given, *options])
    said = capsys.readouterr().err
    assert "metrics.jsonl: cannot be written (No space left on device)" in said
    if policy == "stop":
        assert code == 2
        monkeypatch.undo()
        assert main(["pretrain", given, "--resume"]) == 0
        assert _records(run) == _records(tmp_path / "alone")
    else:
        assert code == 0
        assert "going on without step 6" in said
        assert _records(run) == [r for r in _records(tmp_path / "alone") if r["step"] != 6]
    assert _fingerprint(run) == _fingerprint(tmp_path / "alone")


def test_a_run_that_diverges_says_what_the_command_line_can_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not to go on otherwise than it was begun, which --resume refuses."""

    def diverged(*_: object) -> None:
        raise DivergedError("step 1: nothing comes of it")

    monkeypatch.setattr("functrain.cli.run.check_guard", diverged)
    told = _refused(["pretrain", _config(tmp_path, steps=1)[0]], capsys)
    assert "step 1: nothing comes of it" in told
    assert "begin another, with another --directory and a lower --schedule.peak" in told


def test_the_best_are_kept_beside_the_newest(tmp_path: Path) -> None:
    """Of all that are evaluated: `train.save_every`, 4 here, need not be among them."""
    given, run = _config(tmp_path)
    options = ["--train.keep", "1", "--train.keep-best", "1", "--evaluation.every", "3"]
    options += ["--schedule.peak", "0.3"]
    assert main(["pretrain", given, *options]) == 0
    losses = {r["step"]: r["eval_loss"] for r in _records(run) if "eval_loss" in r and r["step"]}
    best = min(losses, key=lambda step: losses[step])
    assert best % 4
    assert best != 10
    assert _kept(run) == {10, best}
    parts = [*options, "--directory", str(tmp_path / "parts")]
    assert main(["pretrain", given, *parts, "--train.steps", "5"]) == 0
    assert main(["pretrain", given, *parts, "--resume"]) == 0
    assert _kept(tmp_path / "parts") == {10, best}
    assert _fingerprint(tmp_path / "parts") == _fingerprint(run)


def _kept(run: Path) -> set[int]:
    return {int(path.name[5:]) for path in (run / "checkpoints").glob("step-*")}


def test_a_run_with_a_guard_is_resumed_with_its_window(tmp_path: Path) -> None:
    given, run = _config(tmp_path)
    guard = ["--train.spike-deviations", "6"]
    assert main(["pretrain", given, *guard]) == 0
    other = ["--directory", str(tmp_path / "two")]
    assert main(["pretrain", given, *guard, *other, "--train.steps", "6"]) == 0
    assert main(["pretrain", given, *guard, *other, "--resume"]) == 0
    assert _fingerprint(tmp_path / "two") == _fingerprint(run)


def test_the_clock_of_a_run(tmp_path: Path) -> None:
    """Tokens a second, seconds waited for data and, of a known peak, the utilisation."""
    given, run = _config(tmp_path, steps=3)
    assert main(["pretrain", given, "--train.peak-tflops", "0.5"]) == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["step"] and "eval_loss" not in line]
    assert len(steps) == 2
    flops = [
        line["mfu"] * 0.5e12 * line["num_tokens"] / line["tokens_per_second"] for line in steps
    ]
    # Of so small a model the head is most: 6 · width · vocabulary for each of 4 · 31 targets.
    assert flops[0] == pytest.approx(flops[1], rel=1e-9)
    assert 6 * 16 * 256 * 4 * 31 < flops[0] < 3 * 6 * 16 * 256 * 4 * 31
    assert all(line["data_seconds"] > 0 for line in steps)
    again = ["--resume", "--train.steps", "4", "--train.peak-tflops", "1"]
    assert main(["pretrain", str(run / "config.toml"), *again]) == 0  # no bit depends on it


def test_operations_are_the_models_however_they_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither what is recomputed nor compilation, under which nothing can be counted."""
    monkeypatch.setattr(compilation, "BACKEND", "eager")
    found = []
    for name, options in (
        ("plain", []),
        ("recomputed", ["--train.checkpoint", "model.layers.*"]),
        ("selective", ["--train.checkpoint", "model.layers.*", "--train.recompute", "selective"]),
        ("compiled", ["--train.compile"]),
    ):
        given, run = _config(tmp_path, name, steps=2)
        assert main(["pretrain", given, "--train.peak-tflops", "0.5", *options]) == 0
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        line = next(line for line in lines if "mfu" in line)
        found.append(line["mfu"] * line["num_tokens"] / line["tokens_per_second"])
    assert found == pytest.approx([found[0]] * 4, rel=1e-9)


def test_steps_that_are_not_logged_are_in_the_clock_of_those_that_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their metrics are not read, and the rate is over all steps since the last that were."""
    read = []
    to_dict = Metrics.to_dict

    def counted(self: Metrics) -> dict[str, float]:
        read.append(self)
        return to_dict(self)

    monkeypatch.setattr(Metrics, "to_dict", counted)
    monkeypatch.setattr(progress, "_PLAIN_SECONDS", 1e9)
    given, run = _config(tmp_path, steps=12)
    options = ["--train.log-every", "4", "--train.peak-tflops", "0.5", "--evaluation.every", "100"]
    begun = time.perf_counter()
    assert main(["pretrain", given, *options]) == 0
    elapsed = time.perf_counter() - begun
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 4, 8, 12]
    # The first draws the bar; then 4 and 8, and 12 with its evaluation; and that of the beginning.
    assert len(read) <= 8
    rates = [(line["tokens_per_second"], line["mfu"]) for line in lines[1:3]]
    assert all(rate > 4 * 4 * 31 / elapsed for rate, _ in rates)
    flops = [mfu / rate for rate, mfu in rates]
    assert flops[0] == pytest.approx(flops[1], rel=1e-9)  # of a token


def _slowed(call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A call that takes a minute more, by the clock alone."""
    clock, passed = time.perf_counter, [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + passed[0])

    def slow(*args: Any, **kwargs: Any) -> Any:
        passed[0] += 60
        return call(*args, **kwargs)

    return slow


@pytest.mark.parametrize(("pause", "every"), [(0.0, 1), (0.0, 4), (1e9, 4)])
def test_an_evaluation_takes_no_rate_away(
    pause: float, every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor its time from the steps', though each of them, or each that is logged, ends in one."""
    slow = _slowed(run_module.evaluate, monkeypatch)
    for module in (run_module, loop):
        monkeypatch.setattr(module, "evaluate", slow)
    monkeypatch.setattr(progress, "_PLAIN_SECONDS", pause)
    given, run = _config(tmp_path, steps=6 if every == 1 else 10)
    options = ["--train.log-every", "4", "--evaluation.every", str(every)]
    assert main(["pretrain", given, *options, "--train.peak-tflops", "0.5"]) == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == (
        [0, 1, 2, 3, 4, 5, 6] if every == 1 else [0, 4, 8, 10]
    )
    assert all("eval_loss" in line for line in lines)
    assert all(line["tokens_per_second"] > 4 * 31 / 15 for line in lines[1:])
    of_a_token = [line["mfu"] / line["tokens_per_second"] for line in lines[1:]]
    assert of_a_token == pytest.approx([of_a_token[0]] * len(of_a_token), rel=1e-9)


def test_what_a_save_takes_is_not_the_next_steps_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "save", _slowed(checkpoint.save, monkeypatch))
    given, run = _config(tmp_path, steps=2)
    options = ["--train.save-every", "1", "--evaluation.every", "100"]
    assert main(["pretrain", given, *options, "--train.steps", "3"]) == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[2]["tokens_per_second"] > 4 * 31 / 60


def test_a_compiled_run_is_resumed_and_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compilation, "BACKEND", "eager")
    given, run = _config(tmp_path, steps=4)
    options = ["--train.compile", "--train.compile-cache", str(tmp_path / "cache")]
    assert main(["pretrain", given, *options]) == 0
    assert "compiled (the first step of each shape takes long)" in capsys.readouterr().err
    assert checkpoint.inspect(run / "checkpoints")["numerics"]["compile"] is True
    elsewhere = ["--train.compile-cache", str(tmp_path / "elsewhere"), "--train.steps", "8"]
    assert main(["pretrain", str(run / "config.toml"), *elsewhere, "--resume"]) == 0
    assert main(["verify", str(run), "--replay", "4..8"]) == 0
    assert main(["pretrain", given, "--train.compile-cache", "x"]) == 2
    assert "train.compile_cache: nothing is compiled" in capsys.readouterr().err


def test_a_run_that_recomputes_is_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given, run = _config(tmp_path, steps=4)
    assert main(["pretrain", given]) == 0
    whole = _fingerprint(run)
    given, run = _config(tmp_path, "other", steps=4)
    options = ["--train.checkpoint", "model.layers.*"]
    assert main(["pretrain", given, *options]) == 0
    assert _fingerprint(run) == whole
    given, run = _config(tmp_path, "several", steps=4)
    several = "model.layers.[0,1].mlp, model.layers.0.self_attn"
    asked: list[bool] = []
    monkeypatch.setattr(memory, "keep_pages", lambda: bool(asked.append(True)))
    assert main(["pretrain", given, "--train.checkpoint", several, "--train.keep-pages"]) == 0
    assert _fingerprint(run) == whole
    assert asked == [True]
    assert (
        "train.keep_pages: this system's allocator has no such setting" in capsys.readouterr().err
    )
    monkeypatch.setattr(memory, "return_pages", lambda: bool(asked.append(False)))
    resumed = ["pretrain", given, "--train.checkpoint", several, "--resume"]
    assert main([*resumed, "--train.keep-pages", "--train.return-pages"]) == 2
    assert "train.return_pages: with train.keep_pages" in capsys.readouterr().err
    assert main([*resumed, "--train.return-pages"]) == 0
    assert asked == [True, False]
    assert "train.return_pages: this system's allocator" in capsys.readouterr().err
    assert main(["pretrain", given, "--train.checkpoint", "model.layers.*,", "--resume"]) == 2
    options = ["--train.checkpoint", "model.layers.*.mlp", "--train.steps", "6"]
    options += ["--train.recompute", "selective"]
    assert main(["pretrain", given, *options, "--resume"]) == 0
