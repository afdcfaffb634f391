"""SIGINT and SIGTERM: the step is finished and saved, and a resumed run is the one left alone.

A launch is the command line in a process of its own, forked from this one, which has torch loaded,
or begun afresh. The signals come from outside once it has said that it trains, after a random
while; to come at a certain place, the process waits there until its signal has been sent.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import IO, Any

import attrs
import numpy as np
import pytest
import tally
from checkpoint import faults
from cli.test_cli_run import _fingerprint, _records
from processes import exit_code, reaped

from functrain import checkpoint
from functrain.checkpoint.filesystem import FileSystem
from functrain.cli import commands, main
from functrain.cli import run as cli_run
from functrain.cli.directory import LOCK
from functrain.steps import Step
from functrain.tracking import jsonl

SIGNALS = (signal.SIGTERM, signal.SIGINT)
STEPS = 40
SAVE_EVERY = 9
KEEP = 2
TOML = """
[model]
width = 8
layers = 1
heads = 2
dropout = 0.1
[data]
train = {train}
held_out = {held_out}
vocabulary = 31
time = 8
[schedule]
name = "reduce_on_plateau"
peak = 1e-2
patience = 0
[train]
steps = {steps}
batch_size = 4
microbatches = 2
spike_deviations = 6.0
ema_decay = 0.9
save_every = {save_every}
keep = {keep}
log_every = 1
threads = 1
device = "cpu"
[evaluation]
every = 5
limit = 4
"""


@attrs.frozen
class Run:
    """A run of the command line: its config and its directory."""

    config: Path
    directory: Path

    @property
    def checkpoints(self) -> Path:
        return self.directory / "checkpoints"

    @property
    def arguments(self) -> list[str]:
        """Of the command that begins the run, or goes on with it."""
        return ["pretrain", str(self.config), "--directory", str(self.directory), "--resume"]

    def newest(self) -> int:
        """The step of the newest checkpoint, which is whole; 0 where there is none."""
        path = checkpoint.latest(self.checkpoints)
        if path is None:
            return 0
        checkpoint.load_tensors(path, "params/*")  # compares the hashes of all files
        return int(path.name.removeprefix("step-"))

    def logged(self) -> int:
        """The step of the last record; 0 where there is none."""
        records = jsonl.read(self.directory / "metrics.jsonl")
        return int(records[-1]["step"]) if records else 0

    def result(self) -> Result:
        """What it comes to."""
        return _fingerprint(self.directory), _records(self.directory)

    def rests(self) -> list[str]:
        """What lies about that no run leaves which was not aborted."""
        hidden = [path.name for path in self.directory.glob(".*") if path.name != LOCK]
        return hidden + faults.leftovers(self.checkpoints)


def begun(base: Path, name: str = "run") -> Run:
    """A run that has yet to begin: with an average, a guard, a schedule that sees evaluations."""
    files = {data: base / f"{data}.npy" for data in ("train", "held_out")}
    for seed, path in enumerate(files.values()):
        np.save(path, np.random.default_rng(seed).integers(0, 31, 400).astype(np.uint16))
    quoted = {data: json.dumps(str(path)) for data, path in files.items()}
    config = base / f"{name}.toml"
    config.write_text(TOML.format(steps=STEPS, save_every=SAVE_EVERY, keep=KEEP, **quoted))
    return Run(config, base / name)


Result = tuple[str, list[dict[str, Any]]]
"""What a run comes to: the hashes of its last checkpoint, and its records."""


def left_alone(base: Path, *options: str) -> Result:
    """What a run comes to that nobody stops."""
    run = begun(base, "alone")
    assert main([*run.arguments, *options]) == 0
    return run.result()


@pytest.fixture(scope="module")
def alone() -> Result:
    """The run left alone; made in this process, all that its forks need has been imported."""
    with faults.scratch() as base:
        return left_alone(base)


@attrs.define
class Launch:
    """A process that goes on with a run: what it says, and how it ends."""

    run: Run
    before: int
    """The step of the newest checkpoint when it began."""
    process: int
    said: IO[str]
    word: int
    """Where a process that waits gets its word from."""
    lines: list[str] = attrs.field(factory=list)

    def heard(self, beginning: str) -> bool:
        """Wait until a line begins so; whether one does before the process ends."""
        while line := self.said.readline():
            self.lines.append(line)
            if line.startswith(beginning):
                return True
        return False

    def send(self, number: int) -> None:
        """Send a signal, and then the word that it has been sent."""
        os.kill(self.process, number)
        os.write(self.word, b".")

    def ended(self) -> int:
        """The exit code, once there is one; negative where a signal has killed it."""
        with reaped(self.process):
            self.lines += self.said.readlines()
            self.said.close(), os.close(self.word)
            code = exit_code(self.process, limit=60)
        assert code is not None, "it has said all and still ran a minute later"
        return code

    @property
    def saved(self) -> int:
        """The step of the last save that was acknowledged; 0 where none was."""
        steps = [int(line.split("-")[1]) for line in self.lines if line.startswith("saved step-")]
        return max(steps, default=0)

    @property
    def stopped(self) -> bool:
        """Whether it has come to say where it stopped."""
        return any(line.startswith("stopped at step ") for line in self.lines)


@functools.cache
def parsed(command: str, *rest: str) -> Any:
    """The arguments of a command, which cost a launch more time than all the rest: parsed once."""
    return commands.stage_arguments(command, rest)


def forked(run: Run, prepare: Callable[[int], object] | None = None) -> Launch:
    """A launch in a fork of this process, after `prepare`; it says what it has saved."""
    reading, writing = os.pipe()
    waiting, word = os.pipe()
    before, known = run.newest(), parsed(*run.arguments)

    def work() -> None:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # as it will be again after the command
        os.close(word)
        os.dup2(writing, 1), os.dup2(writing, 2)
        sys.stdout = sys.stderr = os.fdopen(2, "w", buffering=1)
        save = checkpoint.save

        def said(*arguments: Any, **options: Any) -> Path:
            path = save(*arguments, **options)
            say(f"saved {path.name}")
            return path

        checkpoint.save = said
        commands.stage_arguments = lambda *_: known
        if prepare is not None:
            prepare(waiting)
        os._exit(main(run.arguments))

    process = faults.forked(work)
    os.close(writing), os.close(waiting)
    return Launch(run, before, process, os.fdopen(reading), word)


def spawned(run: Run, *options: str) -> Launch:
    """A launch in a process that is begun afresh."""
    reading, writing = os.pipe()
    command = [sys.executable, "-m", "functrain", *run.arguments, *options]
    process = os.posix_spawn(
        command[0],
        command,
        os.environ,
        file_actions=[(os.POSIX_SPAWN_DUP2, writing, into) for into in (1, 2)],
    )
    os.close(writing)
    nobody = os.open(os.devnull, os.O_WRONLY)
    return Launch(run, run.newest(), process, os.fdopen(reading), nobody)


def say(line: str) -> None:
    """Say something from within a launch."""
    os.write(2, f"{line}\n".encode())


@attrs.frozen
class Hold:
    """Before the `count`-th call of a function a process says so, and waits for a word.

    With `asked`, the calls are counted from when it has been asked to stop.
    """

    owner: Any
    name: str
    count: int = 1
    asked: bool = False

    def __call__(self, waiting: int) -> None:
        """Put it in place, in the process that is to wait."""
        real, left = getattr(self.owner, self.name), self.count

        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            # The handler is a method of what knows whether it was called.
            if not self.asked or signal.getsignal(signal.SIGINT).__self__:
                left -= 1
                if left == 0:
                    say("waiting")
                    os.read(waiting, 1)
            return real(*arguments, **options)

        setattr(self.owner, self.name, call)


def check_stopped(launch: Launch, code: int, number: int) -> None:
    """What is promised of the first signal: the step is finished, logged and saved."""
    said, run = "".join(launch.lines), launch.run
    assert code == 128 + number, said
    assert f"{signal.Signals(number).name}: finishing this step and saving" in said
    assert launch.before <= run.newest() == run.logged(), said
    assert f"stopped at step {run.newest()}; go on with: functrain pretrain" in said
    assert "Traceback" not in said


def check_aborted(launch: Launch, code: int, number: int) -> None:
    """What is promised of the second: it is the end, and no acknowledged checkpoint is lost."""
    said, run = "".join(launch.lines), launch.run
    assert code == 128 + number, said
    assert not launch.stopped, said
    assert max(launch.before, launch.saved) <= run.newest() <= run.logged(), said
    assert "Traceback" not in said


def check_end(run: Run, alone: Result, *, saved: bool = True) -> None:
    """What is promised of a resumed run: it is the one left alone.

    And where it has saved since it was last aborted, nothing is left over of that.
    """
    assert run.result() == alone
    if saved:
        assert run.rests() == []
        assert len(list(run.checkpoints.glob("step-*"))) == KEEP


PLACES = {
    "the building of the model": Hold(cli_run, "build"),
    "the first evaluation": Hold(cli_run, "evaluate"),
    "a step": Hold(Step, "__call__", 3),
    "an evaluation": Hold(cli_run, "evaluate"),
    "the record of a step": Hold(jsonl.JSONLTracker, "log", 2),
    "a save, before a file": Hold(FileSystem, "create", 3),
    "a save, before its rename": Hold(FileSystem, "rename"),
    "a prune": Hold(FileSystem, "unlink", 2),
}


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_at_any_place_is_heeded_after_the_step(number: int, alone: Result) -> None:
    """One launch after the other goes on with the run, and is stopped at another place."""
    with faults.scratch() as base:
        run = begun(base)
        for hold in PLACES.values():
            stopped_at(hold, run, number)
        assert main(run.arguments) == 0
        check_end(run, alone)
        tally.add("launches stopped by a signal", len(PLACES))


def stopped_at(hold: Hold, run: Run, number: int) -> None:
    """Launch a run, and stop it at a place."""
    launch = forked(run, hold)
    assert launch.heard("waiting"), launch.lines
    launch.send(number)
    check_stopped(launch, launch.ended(), number)


def at_line(count: int, number: int) -> Callable[[int], None]:
    """A signal to itself at the `count`-th line that the training loop of the command runs."""
    left = count

    def line(_frame: FrameType, event: str, _: Any) -> Any:
        nonlocal left
        left -= event == "line"
        if left == 0 and event == "line":
            signal.raise_signal(number)
        return line

    def call(frame: FrameType, _event: str, _: Any) -> Any:
        return line if frame.f_code is cli_run._trained.__code__ else None

    return lambda _: sys.settrace(call)


@pytest.mark.parametrize("iterations", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_signal_at_any_line_of_the_loop_is_heeded_after_the_step(
    iterations: int, alone: Result
) -> None:
    """Not only where the loop looks for one: at each line of some iterations, in launches from the
    same step on; the next iteration is one that saves anyway."""
    start = SAVE_EVERY - 1 - iterations
    with faults.scratch() as base:
        run = begun(base)
        stopped_at(Hold(Step, "__call__", start), run, signal.SIGTERM)
        assert run.newest() == start
        made = [0]
        while made[-1] <= iterations:
            copy, number = Run(run.config, faults.copy_of(run.directory)), SIGNALS[len(made) % 2]
            launch = forked(copy, at_line(len(made), number))
            check_stopped(launch, launch.ended(), number)
            made.append(copy.newest() - launch.before)
            if made[-2] + 1 == made[-1]:  # once for each step
                assert main(copy.arguments) == 0
                check_end(copy, alone)
        assert made == sorted(made), "a later line is in a later step"
        each = [made.count(number + 1) for number in range(iterations)]
        assert min(each) >= 10, "an iteration has that many lines"
        tally.add("launches stopped by a signal", len(made))


OPERATIONS = {"create": 7, "sync": 9, "rename": 1, "unlink": 7}
"""Calls of the file system in a save, and in the prune after it that removes a checkpoint."""


def held(dice: random.Random) -> Hold:
    """At a random operation of the save that the first signal has asked for."""
    name = dice.choice(list(OPERATIONS))
    return Hold(FileSystem, name, dice.randint(1, OPERATIONS[name]), asked=True)


@pytest.fixture(scope="module")
def seconds(alone: Result) -> float:
    """The time between the first word of a run and its last save."""
    with faults.scratch() as base:
        launch = forked(begun(base))
        assert launch.heard("pretrain: ")
        begin = time.perf_counter()
        assert launch.heard(f"saved step-{STEPS:012d}")
        taken = time.perf_counter() - begin
        assert launch.ended() == 0
    return taken


@attrs.define
class Chance:
    """Runs that are stopped after random whiles, some of them aborted in the save of that."""

    dice: random.Random
    seconds: float
    """The longest while."""
    stops: int
    """So many launches are stopped."""
    stopped: list[int] = attrs.field(factory=list)
    """At which step each launch was stopped; those not counted that came to the end before."""
    aborted: int = 0

    def play(self, run: Run, alone: Result) -> None:
        """Launch a run, and again, until it has come to the end."""
        for number in itertools.cycle(SIGNALS):
            hold = held(self.dice) if self.dice.random() < 0.5 else None
            launch = forked(run, hold)
            if launch.heard("pretrain: ") and len(self.stopped) < self.stops:
                time.sleep(self.dice.random() * self.seconds)
                os.kill(launch.process, number)
            if hold is not None and launch.heard("waiting"):
                second = self.dice.choice(SIGNALS)
                launch.send(second)
                check_aborted(launch, launch.ended(), second)
                self.aborted += 1
                continue
            code = launch.ended()
            if code == 0:
                check_end(run, alone, saved=launch.saved > 0)
                return
            check_stopped(launch, code, number)
            self.stopped.append(run.newest())


@pytest.mark.parametrize(
    ("seed", "stops"),
    [(0, 22), *(pytest.param(seed, 45, marks=pytest.mark.long) for seed in (0, 1))],
)
def test_random_signals_lose_no_completed_step(
    seed: int, stops: int, alone: Result, seconds: float
) -> None:
    """Stopped wherever they are, and aborted in between, all runs end as the one left alone."""
    chance = Chance(random.Random(seed), seconds / 4, stops)

    def enough() -> bool:
        """Some have been aborted, and the stops are spread over the run."""
        quarters = Counter(step * 4 // STEPS for step in chance.stopped)
        spread = min(quarters[each] for each in range(4)) >= stops // 22
        return len(chance.stopped) >= stops and spread and chance.aborted >= stops // 9

    while not enough() and len(chance.stopped) < 5 * stops:
        chance.stops = max(stops, len(chance.stopped) + stops // 4)
        with faults.scratch() as base:
            chance.play(begun(base), alone)
    assert enough()
    off = sum(step % SAVE_EVERY > 0 for step in chance.stopped)
    assert off >= len(chance.stopped) / 2, "no save was due"
    tally.add("launches stopped by a signal", len(chance.stopped))
    tally.add("launches aborted by a second signal", chance.aborted)


@pytest.mark.long
def test_processes_begun_afresh_heed_a_signal_and_a_second_one(tmp_path: Path) -> None:
    """Without a fork and without what a fork is prepared with."""
    run, more = begun(tmp_path), ("--train.steps", "1000000")
    for number in SIGNALS:
        launch = spawned(run, *more)
        assert launch.heard("pretrain  "), launch.lines  # a first step
        launch.send(number)
        check_stopped(launch, launch.ended(), number)
        tally.add("launches stopped by a signal")
    for _ in range(9):
        launch = spawned(run, *more)
        assert launch.heard("pretrain  "), launch.lines
        launch.send(signal.SIGTERM)
        assert launch.heard("SIGTERM: finishing"), launch.lines
        launch.send(signal.SIGINT)
        code = launch.ended()
        if not launch.stopped:
            break  # nearly always: else the second has come when the first was heeded
    check_aborted(launch, code, signal.SIGINT)
    tally.add("launches aborted by a second signal")
    steps = ("--train.steps", str(run.newest() + 3))
    assert main([*run.arguments, *steps]) == 0
    check_end(run, left_alone(tmp_path, *steps))
