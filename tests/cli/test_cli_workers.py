"""Runs under torchrun: the bits of one process, whoever is killed, on however many workers."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Self

import pytest
import tally
import torch
from workers import shared

from functrain import checkpoint
from functrain.cli import main
from functrain.tracking import jsonl

IMPORTED = (
    "torch.distributed.run",
    "functrain.cli.commands",
    "functrain.cli.run",
    "functrain.cli.summary",
    "functrain.tracking.report",
)
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
batch_size = 8
microbatches = 4
save_every = 2
threads = 1
device = "cpu"
reduction = "canonical"
timeout = 30.0
[evaluation]
every = 5
limit = 4
"""


def _config(tmp_path: Path, name: str, steps: int) -> tuple[Path, Path]:
    train, held_out = tmp_path / "train.txt", tmp_path / "held_out.txt"
    train.write_text(TEXT)
    held_out.write_text(TEXT[::-1])
    directory, path = tmp_path / name, tmp_path / f"{name}.toml"
    paths = {"directory": directory, "train": train, "held_out": held_out}
    quoted: dict[str, Any] = {key: f'"{value}"' for key, value in paths.items()}
    path.write_text(TOML.format(**quoted, steps=steps))
    return path, directory


# Restarted workers would take the addresses of those before them.
ENVIRONMENT = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def _arguments(size: int, restarts: int) -> list[str]:
    return [
        *("--standalone", f"--nproc-per-node={size}"),
        *(f"--max-restarts={restarts}", "--monitor-interval=0.1"),
    ]


def _torchrun(config: Path, size: int, *options: str, restarts: int = 0) -> subprocess.Popen[str]:
    command = ["torch.distributed.run", *_arguments(size, restarts), "-m", "functrain"]
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(Path(__file__).parents[2])}
    # To files: many restarts say more than a pipe holds.
    with config.with_suffix(".out").open("w") as out, config.with_suffix(".err").open("w") as err:
        return subprocess.Popen(
            [sys.executable, "-m", *command, "pretrain", str(config), *options],
            stdout=out,
            stderr=err,
            env=environment,
            text=True,
        )


SCRIPT = """
import sys
from functrain.cli import main
if code := main():
    sys.exit(code)
"""


class Forked:
    """The same, as torchrun's --run-path and --start-method=fork do it: nobody has to import."""

    def __init__(self, config: Path, size: int, *options: str, restarts: int = 0) -> None:
        script = config.with_suffix(".py")
        script.write_text(SCRIPT)
        group = shared()
        group.imports(*IMPORTED)
        asked = {
            "arguments": [*_arguments(size, restarts), str(script), "pretrain", str(config)],
            "environment": ENVIRONMENT,
            "out": str(config.with_suffix(".out")),
            "err": str(config.with_suffix(".err")),
        }
        asked["arguments"] += options
        self._group = group
        self._found: list[Any] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(asked,))
        warm = group.pid
        self._thread.start()
        try:
            while self.poll() is None and not _children(warm):
                time.sleep(0.01)
            (self.pid,) = _children(warm)
        except BaseException:
            group.kill()
            self._thread.join()
            raise

    def _run(self, asked: Any) -> None:
        try:
            self._found.extend(self._group.run("torchrun", 1, asked))
        except BaseException as error:
            self._error = error

    def poll(self) -> int | None:
        """Its exit code, once there is one."""
        if self._error is not None:
            raise self._error
        return int("value" not in self._found[0]) if self._found else None

    def wait(self, timeout: float) -> int | None:
        self._thread.join(timeout)
        return self.poll()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """End it and its workers, if the test has failed: other tests ask the same group."""
        if self._thread.is_alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGTERM)
            self._thread.join(10)
        if self._thread.is_alive():
            self._group.kill()
        self._thread.join()


Process = subprocess.Popen[str] | Forked


def _done(process: Process, config: Path) -> str:
    code = process.wait(120)
    assert code == 0, config.with_suffix(".err").read_text()
    return config.with_suffix(".out").read_text()


def _last(directory: Path) -> tuple[str, bytes, list[Any]]:
    """The newest checkpoint's name, its params, and the metrics without clocks."""
    newest = checkpoint.latest(directory / "checkpoints")
    assert newest is not None
    records = [
        {name: value for name, value in record.items() if name not in jsonl.CLOCKS}
        for record in jsonl.read(directory / "metrics.jsonl")
    ]
    return newest.name, (newest / "optimizer.safetensors").read_bytes(), records


def _children(pid: int) -> list[int]:
    try:
        found = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except (FileNotFoundError, ProcessLookupError):  # it has ended
        return []
    return [int(pid) for pid in found.split()]


def _reached(process: Process, directory: Path, step: int) -> None:
    """Wait until the run has a checkpoint of that step or a later one."""
    for _ in range(2000):
        newest = checkpoint.latest(directory / "checkpoints")
        if newest is not None and int(newest.name[5:]) >= step:
            break
        assert process.poll() is None, "the run ended before it came to that step"
        time.sleep(0.02)


def _killed(process: Process, directory: Path, step: int, rank: int) -> None:
    """Kill a worker when the run has come to that step."""
    _reached(process, directory, step)
    os.kill(_children(process.pid)[rank], signal.SIGKILL)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, bytes, list[Any]]:
    """What the run of `_config` comes to in one process."""
    config, directory = _config(tmp_path_factory.mktemp("alone"), "run", 30)
    before = torch.get_num_threads()
    assert main(["pretrain", str(config)]) == 0
    assert torch.get_num_threads() == before
    return _last(directory)


def test_a_killed_worker_of_forked_ones_restarts_the_group_and_the_end_is_the_same(
    tmp_path: Path,
) -> None:
    alone, expected = _config(tmp_path, "alone", 12)
    assert main(["pretrain", str(alone)]) == 0
    config, directory = _config(tmp_path, "run", 12)
    with Forked(config, 2, "--train.sharded", restarts=1) as process:
        _killed(process, directory, 4, rank=1)
        out = _done(process, config)
    assert out.count("finished, 12 of 12 steps") == 1, "rank 0 alone speaks"
    assert _last(directory) == _last(expected)


def test_two_spawned_workers_end_as_one_alone(tmp_path: Path) -> None:
    """The launch that is documented, with interpreters of their own."""
    alone, expected = _config(tmp_path, "alone", 6)
    config, directory = _config(tmp_path, "run", 6)
    process = _torchrun(config, 2)
    try:
        assert main(["pretrain", str(alone)]) == 0
        out = _done(process, config)
    finally:
        _ended(process)
    assert out.count("finished, 6 of 6 steps") == 1, "rank 0 alone speaks"
    assert _last(directory) == _last(expected)


def _ended(process: subprocess.Popen[str]) -> None:
    """End torchrun, if it still runs; it takes its workers along, at the latest after 30 s."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(40)
        finally:
            process.kill()
            process.wait()


@pytest.mark.long
@pytest.mark.parametrize("options", [(), ("--train.sharded",)], ids=" ".join)
def test_a_killed_worker_restarts_the_group_and_the_end_is_the_same(
    tmp_path: Path, alone: Any, options: tuple[str, ...]
) -> None:
    config, directory = _config(tmp_path, "run", 30)
    process = _torchrun(config, 2, *options, restarts=1)
    _killed(process, directory, 6, rank=1)
    out = _done(process, config)
    assert out.count("finished, 30 of 30 steps") == 1, "rank 0 alone speaks"
    assert _last(directory) == alone


@pytest.mark.long
def test_a_signal_stops_all_workers_at_one_step_and_they_go_on(tmp_path: Path, alone: Any) -> None:
    config, directory = _config(tmp_path, "run", 30)
    process = _torchrun(config, 2)
    _reached(process, directory, 4)
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    err = config.with_suffix(".err").read_text()
    assert err.count("functrain: ") == 0
    assert err.count("stopped at step") == 1
    _done(_torchrun(config, 2, "--resume"), config)
    assert _last(directory) == alone


@pytest.mark.long
def test_stopped_on_four_workers_it_goes_on_with_two_and_then_one(
    tmp_path: Path, alone: Any
) -> None:
    config, directory = _config(tmp_path, "run", 30)
    _done(_torchrun(config, 4, "--train.steps", "10", "--train.sharded"), config)
    _done(_torchrun(config, 2, "--train.steps", "20", "--resume"), config)
    assert main(["pretrain", str(config), "--resume"]) == 0
    assert _last(directory) == alone


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_a_hundred_kills_of_any_worker_at_any_moment(tmp_path: Path, alone: Any) -> None:
    chosen = random.Random(0)
    wanted, run = 100, 0
    counts = {"at any moment": 0, "while training": 0}
    while sum(counts.values()) < wanted:
        run += 1
        config, directory = _config(tmp_path, f"run{run}", 30)
        process = _torchrun(config, 2, restarts=1000)
        while process.poll() is None and sum(counts.values()) < wanted:
            # Most of a restart is imports: every other kill waits for steps to be made.
            moment = chosen.choice(sorted(counts))
            if moment == "while training":
                _grown(process, directory)
            time.sleep(chosen.uniform(0, 0.3 if moment == "while training" else 4))
            if process.poll() is None and (workers := _children(process.pid)):
                os.kill(chosen.choice(workers), signal.SIGKILL)
                counts[moment] += 1
        _done(process, config)
        assert _last(directory) == alone, f"run {run}, after {counts} kills"
    print(f"kills: {counts}, in {run} runs; the same end each time")
    for moment, count in counts.items():
        tally.add(f"kills of a worker {moment}", count)


def _grown(process: subprocess.Popen[str], directory: Path) -> None:
    """Wait until the run has made steps since now."""
    metrics = directory / "metrics.jsonl"
    before = metrics.stat().st_mtime_ns if metrics.exists() else 0
    while process.poll() is None:
        if metrics.exists() and metrics.stat().st_mtime_ns != before:
            return
        time.sleep(0.01)
