"""Who reads a directory beside a run that saves and prunes gets a whole checkpoint, the newest.

By chance: processes that read as fast as they can beside one that saves and prunes as fast as it
can. And by design: other saves and a prune come before the n-th operation of a read, for every n.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Container, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
import processes
import pytest
import tally
import torch
from checkpoint import faults
from checkpoint.faults import Operation
from torch import Tensor

import functrain as ft
from functrain import checkpoint
from functrain.checkpoint import loading
from functrain.checkpoint.filesystem import OPERATING_SYSTEM, FileSystem
from functrain.checkpoint.manifest import directory_name
from functrain.state import leaves, map_tensors

Reader = Callable[[Path, FileSystem], int]
"""Reads the newest checkpoint of a run, compares all that it gets, and gives its step."""


def at(step: int) -> ft.TrainState:
    """A state whose every tensor is full of the number of its step: half of another one shows."""
    state = attrs.evolve(faults.states()[0], step=step)
    return map_tensors(state, lambda _, tensor: torch.full_like(tensor, step))


def save(run: Path, step: int) -> None:
    """Save `at(step)`, with a metric by which the first is the best."""
    ft.save(run, at(step), metrics={"eval_loss": float(step)})


def load(run: Path, files: FileSystem, *, older: bool = False) -> int:
    state = ft.load(run, like=faults.states()[0], strict=True, older=older, filesystem=files)
    assert ft.fingerprint(state) == ft.fingerprint(at(state.step)), f"step {state.step} is wrong"
    return state.step


def load_model(run: Path, files: FileSystem) -> int:
    like = faults.states()[0]
    params, buffers = checkpoint.load_model(run, like.params, like.buffers, filesystem=files)
    assert (params.keys(), buffers.keys()) == (like.params.keys(), like.buffers.keys())
    return filled_with({**params, **buffers})


def load_tensors(run: Path, files: FileSystem) -> int:
    found = checkpoint.load_tensors(run, "*", filesystem=files)
    assert found.keys() == {p for p, leaf in leaves(faults.states()[0]) if isinstance(leaf, Tensor)}
    return filled_with(found)


def filled_with(tensors: Mapping[str, Tensor]) -> int:
    """The one number that all the tensors are full of."""
    (number,) = {number for tensor in tensors.values() for number in tensor.flatten().tolist()}
    return int(number)


def inspect(run: Path, files: FileSystem) -> int:
    found = checkpoint.inspect(run, filesystem=files)
    step: int = found["leaves"]["step"]
    assert Path(found["path"]) == run / directory_name(step)
    assert found["metrics"] == {"eval_loss": float(step)}
    return step


READERS: dict[str, Reader] = {
    "load": load,
    "load, older": functools.partial(load, older=True),
    "load_model": load_model,
    "load_tensors": load_tensors,
    "inspect": inspect,
}


KEEPS: dict[str, int | checkpoint.Keep] = {
    "the last": 1,
    "the last two": 2,
    "the last and every tenth": checkpoint.Keep(last=1, every=10),
    "the last and the best": checkpoint.Keep(last=1, best=1),
}


@pytest.fixture
def base() -> Iterator[Path]:
    with faults.scratch() as directory:
        yield directory


def race(base: Path, keep: int | checkpoint.Keep, loads: int) -> None:
    """Readers, each a process that loads at least so many times, beside one that writes."""
    run, read, ended = base / "run", base / "read", base / "ended"
    save(run, 0)

    def write() -> None:
        try:
            for step in itertools.count(1):
                save(run, step)
                checkpoint.prune(run, keep)
                if read.exists():
                    return
        finally:
            ended.touch()

    def follow(reader: Reader) -> None:
        steps = [0]
        while len(steps) <= loads or len(set(steps)) <= 10:
            newest = ft.latest(run)
            assert newest is not None
            steps.append(reader(run, OPERATING_SYSTEM))
            assert steps[-1] >= step_of(newest), f"{steps[-1]}, and {newest.name} was there before"
            assert steps[-1] >= steps[-2], f"{steps[-1]} after {steps[-2]}"
            assert not ended.exists(), "the writer has ended"
        tally.add("loads beside a pruning writer", len(steps) - 1)

    writer = faults.forked(write)
    readers = {name: faults.forked(lambda r=reader: follow(r)) for name, reader in READERS.items()}
    try:
        ends = {name: processes.ended(child, limit=60 + loads) for name, child in readers.items()}
    finally:
        read.touch()
        written = processes.ended(writer)
    assert written == 0
    assert not any(ends.values()), f"failed: {[name for name, end in ends.items() if end]}"


def step_of(path: Path) -> int:
    """The step that the name of a checkpoint says."""
    return int(path.name.removeprefix("step-"))


@pytest.mark.parametrize("keep", KEEPS)
def test_no_read_beside_a_run_that_prunes_fails_or_goes_back(keep: str, base: Path) -> None:
    """Each gives a whole checkpoint, no older than the newest of before and than the last read."""
    race(base, KEEPS[keep], 40)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("keep", KEEPS)
def test_no_read_of_very_many_fails_or_goes_back(keep: str, base: Path) -> None:
    race(base, KEEPS[keep], 3000)


class Overtaken(faults.Watched):
    """Before some operations of a read, two saves and a prune of another process are done."""

    def __init__(self, run: Path, keep: int | checkpoint.Keep, before: Container[int]) -> None:
        super().__init__()
        self._run, self._keep, self._before, self._count = run, keep, before, 0

    def around(self, operation: Operation, perform: Callable[[], Any]) -> Any:
        count, self._count = self._count, self._count + 1
        if count in self._before:
            newest = ft.latest(self._run)
            assert newest is not None
            for step in (step_of(newest) + 1, step_of(newest) + 2):
                save(self._run, step)
            checkpoint.prune(self._run, self._keep)
            assert not newest.exists()
        return perform()


def two(run: Path) -> Path:
    """A run with two checkpoints."""
    for step in range(2):
        save(run, step)
    return run


PAIRS = [
    pytest.param(name, keep, marks=() if name == "load" or keep == "the last" else pytest.mark.long)
    for name in READERS
    for keep in KEEPS
]
"""Each reader and each way to keep; in the long form all pairs, though a reader sees no keeping."""


@pytest.mark.parametrize(("name", "keep"), PAIRS)
def test_what_goes_before_any_operation_of_a_read_is_read_anew(
    name: str, keep: str, base: Path
) -> None:
    """The newer one is read; the one that goes only where all of its files were open before."""
    reader, run = READERS[name], two(base / "run")
    operations = faults.operations(lambda files: reader(run, files))
    for number in range(len(operations)):
        copy = faults.copy_of(run)
        opens = any(operation.name == "open" for operation in operations[number:])
        found = reader(copy, Overtaken(copy, KEEPS[keep], {number}))
        assert found == (3 if opens else 1), f"operation {number}, {operations[number]}"
    assert len(operations) >= 4 * 3  # open, stat, read and close, of the manifest and two files
    tally.add("loads beside a pruning writer", len(operations))


@pytest.mark.parametrize("name", READERS)
def test_what_goes_again_and_again_is_read_or_an_error_says_so(
    name: str, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many times in a row are fine; what goes without end must not hang who reads.

    How many they are `load` shows; the others have the same patience, less of it here.
    """
    times = 90
    if name != "load":
        times = 9
        monkeypatch.setattr(loading, "_ATTEMPTS", 10)
    reader, run = READERS[name], two(base / "run")
    assert reader(run, Overtaken(run, 1, range(times))) == 1 + 2 * times
    with pytest.raises(ft.CheckpointError, match="vanish faster than they can be read"):
        reader(run, Overtaken(run, 1, range(10**9)))


@pytest.mark.parametrize("name", READERS)
def test_a_checkpoint_that_was_named_and_goes_is_an_error_and_never_another(
    name: str, base: Path
) -> None:
    run = two(base / "run")
    with pytest.raises(ft.CheckpointError, match=r"step-000000000001/.* is incomplete"):
        READERS[name](run / directory_name(1), Overtaken(run, 1, {0}))
