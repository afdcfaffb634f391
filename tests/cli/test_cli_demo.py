"""The demo, killed in every stage: it ends with the fingerprint of one that was left alone."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from functrain.cli import main
from functrain.tracking import jsonl

# Each kill is at another point: before a save, in the middle of one, and where a step that is to be
# saved has been made but not yet been logged.
KILLED = """
import os, signal, sys
from functrain import checkpoint
from functrain.checkpoint import files
from functrain.tracking import jsonl
from functrain.cli import main

stage = sys.argv[1]

def killed(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def before(wanted, real):
    def save(directory, state, **options):
        if stage in str(directory) and state.step == wanted:
            killed()
        return real(directory, state, **options)
    return save

def during(real):
    def write(filesystem, path, contents):
        if path.name == "optimizer.safetensors" and "step-000000000006" in str(path):
            if f"/{stage}/" in str(path):
                data = b"".join(contents)
                path.write_bytes(data[: len(data) // 2])
                killed()
        return real(filesystem, path, contents)
    return write

def unlogged(real):
    def log(self, step, metrics):
        if step == 9 and f"/{stage}/" in self._file.name:
            killed()
        real(self, step, metrics)
    return log

if stage == "pretrain":
    checkpoint.save = before(6, checkpoint.save)
if stage == "sft":
    files.write_file = during(files.write_file)
if stage == "dpo":
    jsonl.JSONLTracker.log = unlogged(jsonl.JSONLTracker.log)
sys.exit(main(sys.argv[2:]))
"""


def _fingerprint(out: str) -> str:
    found = re.search(r"^fingerprint  ([0-9a-f]{64})$", out, re.MULTILINE)
    assert found is not None, out
    return found[1]


def _metrics(path: Path) -> list[dict[str, object]]:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in r.items() if k not in jsonl.CLOCKS} for r in records]


def test_demo_killed_in_each_stage_and_resumed_equals_one_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
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
        program = [sys.executable, "-c", KILLED, stage, *arguments]
        done = subprocess.run(program, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == -9, done.stderr
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
