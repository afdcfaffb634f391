"""Training runs killed at random instants end, once resumed, with the bits of the run left alone.

Each kill is a SIGKILL from outside, to a process that trains and saves; it comes a random while
after a random step. A resumed process is killed in its turn, until one comes to the end.
"""

from __future__ import annotations

import functools
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import attrs
import pytest
import tally
from checkpoint import faults
from checkpoint.test_resume import BATCH, CLIP, ROWS, SEEDS, STEPS, _source, _step
from processes import exit_code, reaped

import functrain as ft
from functrain import checkpoint
from functrain.checkpoint.filesystem import FileSystem

EVERY = 3
"""Steps from save to save; the last state, of step 60, is one that is saved."""
KEEP = 2
REACH = 12
"""Steps and beginnings of saves before the place to which a process comes, at most."""
KILLS, MANY_KILLS = 25, 125
"""Of each kind of run; there are four."""


@attrs.frozen
class Alone:
    """The run that is never killed, and never saves: its fingerprint after each number of steps.

    With it the seconds that a step with a save takes, and the writing of one.
    """

    prints: tuple[str, ...]
    step: float
    writing: float


@functools.cache
def alone() -> Alone:
    """It drops out, clips, accumulates, averages, overflows and begins its data six times anew."""
    step, begin = _step()
    state = begin(SEEDS[0])
    prints, seen = [ft.fingerprint(state)], []
    for now, metrics in ft.train(step, state, _source(), steps=STEPS):
        state = now
        prints.append(ft.fingerprint(state))
        seen.append(metrics.to_dict())
    applied = [each["grad_norm"] for each in seen if not each["skipped"]]
    assert 2 <= len(seen) - len(applied) <= 20, "overflows are skipped, but not always"
    assert sum(norm > CLIP for norm in applied) > len(applied) / 2, "clipping acts"
    assert STEPS * BATCH > 6 * ROWS, "epochs end"
    assert len(set(prints)) == STEPS + 1
    return Alone(tuple(prints), *_seconds(step, state))


def _seconds(step: ft.Step, state: ft.TrainState) -> tuple[float, float]:
    """How long a step with a save takes, and in it the writing, where nothing else is busy."""
    begun, steps, writings = 0.0, [], []

    def begin() -> None:
        nonlocal begun
        begun = time.perf_counter()

    with faults.scratch() as directory, saying(begin):
        for _ in range(10):
            before = time.perf_counter()
            state, _ = step(state, _source().at(0, BATCH))
            ft.save(directory, state)
            after = time.perf_counter()
            steps.append(after - before)
            writings.append(after - begun)
    return min(steps), min(writings)


@contextmanager
def saying(say: Callable[[], object]) -> Generator[None]:
    """Within it, something is said when the writing of a save begins."""
    mkdir = FileSystem.mkdir

    def said(self: FileSystem, path: Path) -> None:
        mkdir(self, path)
        if path.name.startswith(".tmp-step-"):
            say()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FileSystem, "mkdir", said)
        yield


@attrs.frozen
class Kind:
    """How a run trains and saves."""

    donate: bool
    background: bool

    @property
    def sync(self) -> float:
        """The seconds that the disk takes for a sync.

        Beside the steps so many that the save before is not done when the next one is due.
        """
        return 0.002 if self.background else 0.0

    @property
    def writing(self) -> float:
        """The seconds from the beginning of a save to its rename: it syncs six files and itself."""
        return alone().writing + 7 * self.sync

    def train(self, directory: Path, pipe: int) -> None:
        """The work of a process: to go on from the newest checkpoint, and say how far it is."""

        def say(*words: object) -> None:
            os.write(pipe, (" ".join(map(str, words)) + "\n").encode())

        sync = FileSystem.sync

        def slow(files: FileSystem, descriptor: int) -> None:
            time.sleep(self.sync)
            sync(files, descriptor)

        step, begin = _step(donate=self.donate)
        state, saving = begin(SEEDS[0]), 0
        if checkpoint.latest(directory) is not None:
            state = ft.load(directory, like=state, strict=True)
            say("loaded", state.step, ft.fingerprint(state))
        options = {"directory": directory, "save_every": EVERY, "keep": KEEP}
        with saying(lambda: say("saving")), pytest.MonkeyPatch.context() as patch:
            patch.setattr(FileSystem, "sync", slow)
            for now, _ in ft.train(
                step, state, _source(), steps=STEPS, background=self.background, **options
            ):
                state = now
                if state.step % EVERY == 0:
                    # A save beside the steps is acknowledged when the next one begins.
                    say("saved", saving if self.background else state.step)
                    saving = state.step
                say("step", state.step)
        say("ended", state.step, ft.fingerprint(state))


@attrs.define
class Killed:
    """A run that is killed again and again: what its processes have said."""

    kind: Kind
    directory: Path
    dice: random.Random
    acknowledged: int = 0
    """The step of the newest save that some process has acknowledged."""
    step: int = 0
    """Where the newest process was, as far as it has said."""
    ended: bool = False
    """Whether a process has come to the end."""

    def launch(self, kill: bool) -> bool:
        """Go on in a new process, and maybe kill it; whether it has been killed."""
        reading, writing = os.pipe()
        child = faults.forked(lambda: self.kind.train(self.directory, writing))
        os.close(writing)
        self.step = self.acknowledged
        with reaped(child), os.fdopen(reading) as said:
            if kill:
                self.wait(said)
                os.kill(child, signal.SIGKILL)
            for line in said:
                self.heard(line)
            code = exit_code(child, limit=60)
        assert code is not None
        assert (kill and faults.was_killed(code)) or (code == 0 and self.ended), code
        return code != 0

    def wait(self, said: IO[str]) -> None:
        """Let a process come to a random place, in a save half of the time, and go on for a
        random while."""
        left, about = self.dice.randrange(REACH), ""
        place = self.dice.choice(("step", "saving"))
        while (left > 0 or about not in ("", place)) and (line := said.readline()):
            about = self.heard(line)
            left -= about in ("step", "saving")
        longest = self.kind.writing if about == "saving" else alone().step
        time.sleep(self.dice.random() * longest)

    def heard(self, line: str) -> str:
        """Take in what a process says, and compare; what it is about."""
        about, *rest = line.split()
        if about == "saving":
            return about
        step = int(rest[0])
        if about == "loaded":
            assert step >= self.acknowledged, "an acknowledged save is lost"
        if about in ("loaded", "ended"):
            assert rest[1] == alone().prints[step], f"{about}: step {step} has other bits"
        if about in ("loaded", "saved"):
            self.acknowledged = max(self.acknowledged, step)
        self.step = max(self.step, step)
        self.ended |= about == "ended"
        return about

    def left(self) -> set[str]:
        """Of what a killed save or prune has left: `.tmp`, `.trash`."""
        names = faults.leftovers(self.directory) if self.directory.exists() else []
        return {name.split("-")[0] for name in names}


BACKGROUND = pytest.mark.parametrize("background", [False, True], ids=["saving", "saving beside"])
DONATE = pytest.mark.parametrize("donate", [False, True], ids=["pure", "donated"])


@BACKGROUND
@DONATE
def test_random_kills_of_training_runs_lose_nothing(donate: bool, background: bool) -> None:
    """From the newest save that was acknowledged, or a later one, to the same bits at the end."""
    kill_at_random(donate, background, KILLS)


@pytest.mark.long
@BACKGROUND
@DONATE
def test_many_random_kills_of_training_runs_lose_nothing(donate: bool, background: bool) -> None:
    kill_at_random(donate, background, MANY_KILLS)


def kill_at_random(donate: bool, background: bool, most: int) -> None:
    """Launch runs that are killed at random moments until so many were, and check their ends."""
    kind, dice = Kind(donate, background), random.Random(2 * donate + background)
    alone()  # once, before the forks
    quarters: Counter[int] = Counter()
    left: Counter[str] = Counter()
    unsaved = kills = 0
    while kills < most:
        with faults.scratch() as base:
            run = Killed(kind, base / "run", dice)
            while run.launch(kill=kills < most):
                kills += 1
                quarters[run.step * 4 // (STEPS + 1)] += 1
                left.update(run.left())
                unsaved += run.step > run.acknowledged
            check_the_end(run.directory)
    assert min(quarters[each] for each in range(4)) >= most // 20, "the kills are spread"
    assert left[".tmp"] >= most // 25, "some kills fall into a save"
    assert unsaved >= most // 4, "and many where steps are not saved yet"
    tally.add("random kills of training runs", kills)


def check_the_end(directory: Path) -> None:
    """The last state is there, and after one more save and prune nothing else but what is kept."""
    _, begin = _step()
    state = ft.load(directory, like=begin(0), strict=True)
    assert ft.fingerprint(state) == alone().prints[STEPS]
    ft.save(directory, state)
    checkpoint.prune(directory, KEEP)
    assert faults.leftovers(directory) == []
    kept = sorted(path.name for path in directory.glob("step-*"))
    assert kept == [f"step-{step:012d}" for step in (STEPS - EVERY, STEPS)]
