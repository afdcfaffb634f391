"""What is printed: to a reader that goes, a full disk, or nowhere; no display ends a run."""

from __future__ import annotations

import errno
import io
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from functrain.cli import main
from functrain.cli.signals import Stop

GIVEN = {
    "model.width": 16,
    "model.layers": 1,
    "model.heads": 2,
    "data.time": 32,
    "train.steps": 2,
    "train.batch-size": 2,
    "train.threads": 1,
    "evaluation.limit": 2,
}


class Broken(io.StringIO):
    """A stream that cannot be written, nor flushed; perhaps a terminal that has gone."""

    def __init__(self, number: int, terminal: bool = False) -> None:
        super().__init__()
        self._number, self._terminal = number, terminal

    def isatty(self) -> bool:
        return self._terminal

    def write(self, _text: str) -> int:
        raise OSError(self._number, os.strerror(self._number))

    def flush(self) -> None:
        raise OSError(self._number, os.strerror(self._number))


def _pretrained(tmp_path: Path, *more: str) -> int:
    text = tmp_path / "train.txt"
    text.write_text("So that there is something to learn, this is said again. " * 20)
    options = [each for name, value in GIVEN.items() for each in (f"--{name}", str(value))]
    paths = ["--directory", str(tmp_path / "my run"), "--data.train", str(text)]
    return main(["pretrain", *options, *paths, "--data.held-out", str(text), *more])


def _process(arguments: list[str], **streams: int) -> subprocess.CompletedProcess[str]:
    # Buffered, as the output of a command is that a shell starts.
    environment = {**os.environ, "PYTHONUNBUFFERED": ""}
    return subprocess.run(
        [sys.executable, "-m", "functrain", *arguments],
        env=environment,
        text=True,
        timeout=60,
        check=False,
        **{"stderr": subprocess.PIPE, **streams},  # type: ignore[call-overload]
    )


@pytest.mark.parametrize("command", [["--help"], ["pretrain", "--help"], ["completion", "fish"]])
def test_a_reader_that_goes_is_no_error(command: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = _process(command, stdout=writing)
    os.close(writing)
    assert done.returncode == 141
    assert done.stderr == ""


@pytest.mark.parametrize("command", [["--help"], ["pretrain", "--help"], ["completion", "fish"]])
def test_a_full_disk_under_the_output_is_said(command: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        done = _process(command, stdout=full.fileno())
    assert done.returncode == 2
    assert done.stderr.startswith("functrain: stdout: cannot be written (No space left on device)")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("number", "terminal"), [(errno.EPIPE, False), (errno.ENOSPC, False), (errno.EIO, True)]
)
def test_no_display_ends_a_run(
    number: int,
    terminal: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "stderr", Broken(number, terminal))
    assert _pretrained(tmp_path) == 0
    assert "my run: finished, 2 of 2 steps" in capsys.readouterr().out


def test_streams_that_were_closed_end_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert _pretrained(tmp_path) == 0
    assert (tmp_path / "my run" / "report.html").is_file()
    for stream in (sys.stdout, sys.stderr):
        stream.close()


def test_what_is_wrong_has_its_exit_code_where_nobody_can_be_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "stderr", Broken(errno.EPIPE))
    assert main(["pretrian"]) == 2
    assert main(["inspect", "no/run"]) == 2


@pytest.mark.parametrize("number", [errno.EPIPE, errno.ENOSPC])
def test_a_run_whose_conclusion_cannot_be_printed_is_finished(
    number: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Broken(number))
        assert _pretrained(tmp_path) == (141 if number == errno.EPIPE else 2)
    assert ("cannot be written" in capsys.readouterr().err) == (number != errno.EPIPE)
    assert _pretrained(tmp_path, "--resume") == 0
    assert "my run: finished, 2 of 2 steps" in capsys.readouterr().out


def test_an_encoding_without_the_characters_replaces_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = io.BytesIO()
    with io.TextIOWrapper(written, encoding="ascii") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert _pretrained(tmp_path) == 0
        said = written.getvalue().decode("ascii")
    assert re.search(r"^fingerprint  [0-9a-f]{64}$", said, re.MULTILINE)
    assert "???" in said


def test_what_is_to_be_typed_next_can_be_typed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where a path has spaces."""
    run = tmp_path / "my run"
    assert _pretrained(tmp_path) == 0
    assert f"next         functrain generate '{run}' " in capsys.readouterr().out
    assert f"functrain inspect &#39;{run}&#39;" in (run / "report.html").read_text()
    config = tmp_path / "my config.toml"
    assert main(["init", "pretrain", str(config)]) == 0
    assert f"run it with: functrain pretrain '{config}'" in capsys.readouterr().out


def test_steps_that_changed_nothing_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first step ruins the params; the others are not finite. All, however few are logged."""
    ruin = ["--schedule.name", "constant", "--schedule.peak", "1e38", "--optimizer.name", "sgd"]
    assert _pretrained(tmp_path, *ruin, "--train.steps", "6", "--train.log-every", "4") == 0
    said = capsys.readouterr().out
    assert "skipped      5 of 6 steps: their loss or gradients were not finite\n" in said


def test_no_word_of_steps_where_each_changed_something(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _pretrained(tmp_path) == 0
    assert "skipped" not in capsys.readouterr().out


def _row(out: str, name: str) -> list[str]:
    (line,) = [line for line in out.splitlines() if name in line]
    return line.split(name)[1].split()


def test_what_was_measured_of_other_data_is_not_set_beside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _pretrained(tmp_path) == 0
    before = capsys.readouterr().out
    assert len(_row(before, "text perplexity")) == len(_row(before, "text bits per byte")) == 2
    limit = ["--resume", "--evaluation.limit", "1"]
    assert _pretrained(tmp_path, *limit) == 0  # nothing is left to be trained, or measured
    again = capsys.readouterr().out
    assert _row(again, "text perplexity") == _row(before, "text perplexity")
    assert "bits per byte" not in again
    assert _pretrained(tmp_path, *limit, "--train.steps", "3") == 0
    further = capsys.readouterr().out
    assert len(_row(further, "text perplexity")) == len(_row(further, "text bits per byte")) == 1


def test_a_signal_is_a_request_also_where_nobody_can_be_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    stop = Stop()
    with os.fdopen(writing, "w") as stream:
        monkeypatch.setattr(sys, "__stderr__", stream)
        stop.handle(signal.SIGINT, None)
    assert stop.exit_code == 130
