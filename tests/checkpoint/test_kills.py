"""kill -9 at any operation of a save, a prune or a recovery loses nothing.

Each kill is real: a forked child kills itself with SIGKILL before its k-th operation, and in the
middle of each write. In the ordinary run k goes over all that leave files of their own, in the long
form over all. That the kill was delivered is asserted, and so is their number.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import attrs
import pytest
import tally
from checkpoint import faults

import functrain as ft
from functrain import checkpoint
from functrain.checkpoint.filesystem import FileSystem


def save(number: int) -> Callable[[Path, FileSystem], object]:
    """The work of saving `states()[number]`."""
    return lambda run, files: ft.save(run, faults.states()[number], filesystem=files)


def prune(keep: int) -> Callable[[Path, FileSystem], object]:
    """The work of pruning."""
    return lambda run, files: checkpoint.prune(run, keep, filesystem=files)


def in_background(run: Path, files: FileSystem) -> None:
    """The work of a writer beside training that prunes as well."""
    with checkpoint.BackgroundWriter(run, keep=1, filesystem=files) as writer:
        writer.save(faults.states()[2])


def nothing(run: Path) -> None:
    """A run that has not begun."""


def two(run: Path) -> None:
    """A run with two checkpoints."""
    for number in range(2):
        ft.save(run, faults.states()[number])


def four(run: Path) -> None:
    """A run with four checkpoints."""
    for number in range(4):
        ft.save(run, faults.states()[number])


def first(name: str, work: Callable[[Path, FileSystem], object], run: Path) -> int:
    """The place of the first operation of this name in some work on a copy of a run."""
    operations = faults.operations(lambda files: work(faults.copy_of(run), files))
    return next(at for at, operation in enumerate(operations) if operation.name == name)


def killed_twice(run: Path) -> None:
    """A run that was killed in a save before its rename, and in a prune between two unlinks."""
    two(run)
    for work, at in (
        (save(2), first("rename", save(2), run)),
        (prune(1), first("unlink", prune(1), run) + 1),
    ):
        assert faults.was_killed(faults.in_child(lambda w=work, k=at: w(run, faults.Killing(k))))
    assert faults.leftovers(run) == [".tmp-step-000000000002", ".trash-step-000000000000"]


def killed_in_prune(run: Path) -> None:
    """A run that was killed in a prune, before its first rename was made durable."""
    four(run)
    at = first("rename", prune(1), run) + 1
    assert faults.was_killed(faults.in_child(lambda: prune(1)(run, faults.Killing(at))))
    assert faults.leftovers(run) == [".trash-step-000000000000"]


@attrs.frozen
class Work:
    """What is killed: after which beginning, what, and which step was acknowledged before."""

    begin: Callable[[Path], None]
    do: Callable[[Path, FileSystem], object]
    acknowledged: int | None
    least: int
    """The kills of the long form at least: fewer, and the enumeration is broken."""


WORKS = {
    "the first save": Work(nothing, save(0), None, 50),
    "a save": Work(two, save(2), 1, 54),
    "a save that is there already": Work(two, save(1), 1, 8),
    "a prune": Work(four, prune(2), 3, 25),
    "a recovery": Work(killed_twice, save(3), 1, 65),
    "a prune after a killed prune": Work(killed_in_prune, prune(1), 3, 28),
    "a background save and prune": Work(two, in_background, 1, 80),
}


UNCHANGING = {"list", "open", "stat", "read", "map", "open_directory", "sync", "close"}
"""The operations after which the files are for the living as they were before."""

EXTENT = pytest.mark.parametrize(
    "every",
    [pytest.param(False, id="telling"), pytest.param(True, id="every", marks=pytest.mark.long)],
)


@pytest.fixture
def base() -> Iterator[Path]:
    with faults.scratch() as directory:
        yield directory


@EXTENT
@pytest.mark.parametrize("name", WORKS)
def test_a_kill_at_every_operation_loses_nothing(name: str, every: bool, base: Path) -> None:
    """The newest acknowledged loads, a new save works, and nothing is left over."""
    work, run = WORKS[name], base / "run"
    work.begin(run)
    operations = faults.operations(lambda files: work.do(faults.copy_of(run), files))
    names = [operation.name for operation in operations]
    places = faults.telling(names, [every or each not in UNCHANGING for each in names])
    kills = 0
    for at, operation in enumerate(operations):
        whole = [False] if at in places else []
        for half in [*whole, True] if operation.name == "write" else whole:
            copy = faults.copy_of(run)
            killing = faults.Killing(at, half=half)
            code = faults.in_child(lambda k=killing, c=copy: work.do(c, k))
            assert faults.was_killed(code), f"operation {at}, {operation}: not killed"
            kills += 1
            check(copy, work.acknowledged)
    writes = names.count("write")
    assert kills == len(places) + writes
    assert len(operations) + writes >= work.least
    assert len(places) == len(operations) if every else set(names) == {names[at] for at in places}
    tally.add("kills at an operation", kills, part=not every)
    beyond = faults.Killing(len(operations))
    assert faults.in_child(lambda: work.do(faults.copy_of(run), beyond)) == 0, (
        "some were not enumerated"
    )


def check(run: Path, acknowledged: int | None) -> None:
    """What is promised after a kill."""
    if acknowledged is not None:
        assert faults.loaded(run) >= acknowledged
    faults.intact(run)
    newest = len(faults.states()) - 1
    ft.save(run, faults.states()[newest])
    assert faults.loaded(run) == newest
    assert faults.leftovers(run) == []


def test_a_kill_in_the_recovery_of_a_recovery_loses_nothing(base: Path) -> None:
    """Kills one upon another, each a little later than the one before, with no save between."""
    run = base / "run"
    killed_twice(run)
    operations = faults.operations(lambda files: save(3)(faults.copy_of(run), files))
    for at in range(len(operations)):
        if not faults.was_killed(faults.in_child(lambda k=at: save(3)(run, faults.Killing(k)))):
            break
        assert faults.loaded(run) >= 1
    else:
        at = len(operations)
    assert at >= 40
    check(run, 1)


SAVER = """
import sys, time
sys.path.insert(0, sys.argv[2])
import functrain as ft
from checkpoint import faults
for number, state in enumerate(faults.states(int(sys.argv[3]))):
    ft.save(sys.argv[1], state)
    ft.checkpoint.prune(sys.argv[1], 2)
    print(number, flush=True)
time.sleep(600)
"""
"""It does not come to an end: it is killed, however late."""


def kill_a_process(run: Path, after: int) -> None:
    """Kill a process of its own that saves and prunes, once it has acknowledged some saves."""
    tests, count = str(Path(__file__).parents[1]), after + 40
    command = [sys.executable, "-c", SAVER, str(run), tests, str(count)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            for _ in range(after):
                acknowledged = int(process.stdout.readline())
        finally:  # also where it has said something else: it does not end by itself
            process.kill()
        rest = process.stdout.read().split()
    assert process.returncode == -9
    acknowledged = int(rest[-1]) if rest else acknowledged
    faults.states.cache_clear(), faults.truth.cache_clear()
    states = faults.states(count)
    try:
        state = ft.load(run, like=states[0])
        assert state.step >= acknowledged
        assert ft.fingerprint(state) == ft.fingerprint(states[state.step])
        ft.save(run, states[-1])
        assert faults.leftovers(run) == []
    finally:
        faults.states.cache_clear()


def test_a_process_of_its_own_is_killed_and_loses_nothing(base: Path) -> None:
    """Without a fork: another interpreter, killed from outside, at whatever it is doing."""
    kill_a_process(base / "run", 5)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_many_processes_are_killed_and_lose_nothing(base: Path) -> None:
    for count in range(50):
        kill_a_process(base / str(count), 1 + count)
