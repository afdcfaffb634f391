"""The demo, killed in every stage: it ends with the fingerprint of one that was left alone."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from checkpoint import faults
from processes import exit_code, reaped

from functrain import checkpoint
from functrain.checkpoint import files
from functrain.cli import main
from functrain.tracking import jsonl

SPAWNED = """
import sys
sys.path.insert(0, sys.argv[1])
from cli.test_cli_demo import killed_in
sys.exit(killed_in(sys.argv[2], sys.argv[3:]))
"""


def killed_in(stage: str, arguments: Sequence[str]) -> int:
    """The command in a process that is killed in a stage: in each at another point.

    Before a save, in the middle of one, and where a step that is to be saved has been made but not
    yet been logged.
    """
    if stage == "pretrain":
        checkpoint.save = _before(6, stage, checkpoint.save)
    if stage == "sft":
        files.write_file = _during(stage, files.write_file)
    if stage == "dpo":
        jsonl.JSONLTracker.log = _unlogged(stage, jsonl.JSONLTracker.log)  # type: ignore[method-assign]
    return main(arguments)


def _killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _before(wanted: int, stage: str, real: Any) -> Any:
    def save(directory: Any, state: Any, **options: Any) -> Any:
        if stage in str(directory) and state.step == wanted:
            _killed()
        return real(directory, state, **options)

    return save


def _during(stage: str, real: Any) -> Any:
    def write(filesystem: Any, path: Path, contents: Any) -> Any:
        inside = f"/{stage}/" in str(path) and "step-000000000006" in str(path)
        if inside and path.name == "optimizer.safetensors":
            data = b"".join(contents)
            path.write_bytes(data[: len(data) // 2])
            _killed()
        return real(filesystem, path, contents)

    return write


def _unlogged(stage: str, real: Any) -> Any:
    def log(self: Any, step: int, metrics: Any) -> None:
        if step == 9 and f"/{stage}/" in self._file.name:
            _killed()
        real(self, step, metrics)

    return log


def _forked(stage: str, arguments: Sequence[str]) -> int | None:
    """The exit code of the command in a fork of this process, which has imported all it needs."""

    def work() -> None:
        with contextlib.redirect_stderr(os.fdopen(os.dup(2), "w", buffering=1)):
            os._exit(killed_in(stage, arguments))

    with reaped(faults.forked(work)) as process:
        return exit_code(process, limit=120)


def _spawned(stage: str, arguments: Sequence[str]) -> int:
    """The exit code of the command in a process that is begun afresh."""
    tests = str(Path(__file__).parents[1])
    program = [sys.executable, "-c", SPAWNED, tests, stage, *arguments]
    return subprocess.run(program, timeout=120, check=False).returncode


def _fingerprint(out: str) -> str:
    found = re.search(r"^fingerprint  ([0-9a-f]{64})$", out, re.MULTILINE)
    assert found is not None, out
    return found[1]


def _metrics(path: Path) -> list[dict[str, object]]:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in r.items() if k not in jsonl.CLOCKS} for r in records]


@pytest.mark.parametrize("launched", [_forked, pytest.param(_spawned, marks=pytest.mark.long)])
def test_demo_killed_in_each_stage_and_resumed_equals_one_left_alone(
    launched: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone, killed = tmp_path / "left alone", tmp_path / "killed"
    assert main(["demo", "--scale", "tiny", "--directory", str(alone)]) == 0
    out = capsys.readouterr().out
    expected = _fingerprint(out)
    for shown in ("text bits per byte", "trigram", "completion perplexity", "accuracy", "next"):
        assert shown in out
    assert f"functrain generate {shlex.quote(str(alone))} " in out
    assert f"functrain pretrain {shlex.quote(f'{alone}/pretrain/config.toml')} " in out
    assert (alone / "report.html").is_file()

    arguments = ["demo", "--scale", "tiny", "--directory", str(killed)]
    for stage, latest in (("pretrain", 3), ("sft", 3), ("dpo", 6)):
        assert launched(stage, arguments) == -9
        saved = sorted((killed / stage / "checkpoints").glob("step-*"))
        assert saved[-1].name == f"step-{latest:012d}"
        if stage == "pretrain":
            assert main(arguments) == 2  # not without --resume
            arguments.append("--resume")
    assert main(arguments) == 0
    assert _fingerprint(capsys.readouterr().out) == expected
    for stage in ("pretrain", "sft", "dpo"):
        assert _metrics(killed / stage / "metrics.jsonl") == _metrics(
            alone / stage / "metrics.jsonl"
        )

    assert main(arguments) == 0  # once more: there is nothing left to do
    again = capsys.readouterr()
    assert "finished already" in again.err
    assert _fingerprint(again.out) == expected
    assert main([*arguments, "--seed", "1"]) == 2
    assert "train.seed: 1, and the run has 0" in capsys.readouterr().err
