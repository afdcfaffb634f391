"""The store as a state machine: whatever is done to a directory of checkpoints, in any order, what
is in it is what a dictionary says must be in it."""

from __future__ import annotations

import fcntl
import functools
import math
import shutil
import tempfile
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import attrs
import pytest
import tally
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import nn

import functrain as ft
from functrain import checkpoint
from functrain.errors import SaveWarning

FILES = ("model.safetensors", "optimizer.safetensors", "extra.safetensors", "state.json")
STEPS = st.integers(0, 9)
VARIANTS = st.integers(1, 2)
METRICS = st.sampled_from([1.0, 0.5, 1.0, None, math.nan])  # equals, often


def _first() -> ft.TrainState:
    with ft.keys.seeded(1):
        architecture, params, buffers = ft.split(nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 3)))
    return ft.pretrain_step(architecture, ft.optim.adamw()).init(params, buffers)


LIKE = _first()


@functools.cache
def state_of(step: int, variant: int) -> ft.TrainState:
    """A state of that step; another variant has other params."""
    params = {name: torch.full_like(p, step + variant / 4) for name, p in LIKE.params.items()}
    return attrs.evolve(LIKE, step=step, key=variant, params=ft.trees.Tensors(params))


@functools.cache
def print_of(step: int, variant: int) -> str:
    return ft.fingerprint(state_of(step, variant))


def name_of(step: int) -> str:
    return f"step-{step:012d}"


@attrs.define
class Saved:
    """What must be there: `whole` until it is damaged, `readable` while its manifest is, `sized`
    while its files have their sizes as well."""

    variant: int
    metric: float | None
    whole: bool = True
    readable: bool = True
    sized: bool = True


class Store(RuleBasedStateMachine):
    """`held` says what must be there; each rule does something and compares."""

    runs = 0
    rules_run = 0

    @initialize()
    def begin(self) -> None:
        type(self).runs += 1
        self.root = Path(tempfile.mkdtemp(prefix="store-")) / "run"
        self.held: dict[int, Saved] = {}
        self.left: set[str] = set()
        self.aside = 0

    def teardown(self) -> None:
        if hasattr(self, "root"):
            shutil.rmtree(self.root.parent)

    # What is done.

    @rule(step=STEPS, variant=VARIANTS, metric=METRICS)
    def save(self, step: int, variant: int, metric: float | None) -> None:
        """A step that is there: a no-op where it is the same, else an error; leftovers go.

        One that is damaged is put aside and saved anew.
        """
        there = self.held.get(step)
        if there is not None and there.whole:
            self.save_again(step, variant, there)
            return
        metrics = {} if metric is None else {"eval_loss": metric}
        with pytest.warns(SaveWarning, match="was damaged") if there else nullcontext():
            path = ft.save(self.root, state_of(step, variant), metrics=metrics)
        assert path == self.root / name_of(step)
        self.held[step] = Saved(variant, metric)
        self.left.clear()
        self.aside += there is not None

    def save_again(self, step: int, variant: int, there: Saved) -> None:
        path = self.root / name_of(step)
        before = {each.name: each.read_bytes() for each in path.iterdir()}
        if there.variant == variant:
            with pytest.warns(SaveWarning, match=r"its metrics stay .* not \{'eval_loss': 9.0\}"):
                again = ft.save(self.root, state_of(step, variant), metrics={"eval_loss": 9.0})
            assert again == path
        else:
            with pytest.raises(ft.CheckpointError):
                ft.save(self.root, state_of(step, variant))
        assert {each.name: each.read_bytes() for each in path.iterdir()} == before
        self.left.clear()

    @precondition(lambda self: self.held)
    @rule(last=st.integers(1, 3), every=st.none() | st.integers(2, 4), best=VARIANTS | st.none())
    def prune(self, last: int, every: int | None, best: int | None) -> None:
        """The newest few, those that `every` divides and the best stay, and nothing else goes;
        nothing at all where one of the newest few is damaged."""
        keep = checkpoint.Keep(last=last, every=every, best=best)
        unknown = {s for s, saved in self.held.items() if best is not None and not saved.readable}
        steps = sorted(self.held)
        kept = set(steps[-last:])
        kept |= {step for step in steps if every is not None and step % every == 0}
        measured = [
            (saved.metric, -step)
            for step, saved in self.held.items()
            if saved.metric is not None and not math.isnan(saved.metric) and step not in unknown
        ]
        kept |= {-step for _, step in sorted(measured)[: best or 0]} | unknown
        damaged = not all(self.held[step].sized for step in steps[-last:])
        nothing = damaged and bool(set(steps) - kept)
        with (
            pytest.warns(SaveWarning, match="not removed") if unknown or nothing else nullcontext()
        ):
            checkpoint.prune(self.root, keep)
        if nothing:
            return
        self.held = {step: saved for step, saved in self.held.items() if step in kept}

    @rule(step=STEPS, files=st.integers(0, 3))
    def kill_a_save(self, step: int, files: int) -> None:
        """A temporary directory is left, with some files, one of them torn."""
        self.root.mkdir(exist_ok=True)
        name = f".tmp-{name_of(step)}"
        torn = self.root / name
        torn.mkdir(exist_ok=True)
        for file in FILES[:files]:
            (torn / file).write_bytes(b"half")
        self.left.add(name)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), files=st.integers(0, 3))
    def kill_a_prune(self, data: st.DataObject, files: int) -> None:
        """A checkpoint has got its other name, and some of its files are gone."""
        step = data.draw(st.sampled_from(sorted(self.held)))
        name = f".trash-{name_of(step)}"
        trash = (self.root / name_of(step)).rename(self.root / name)
        for file in FILES[:files]:
            (trash / file).unlink(missing_ok=True)
        del self.held[step]
        self.left.add(name)

    @precondition(lambda self: self.held)
    @rule(
        data=st.data(),
        file=st.sampled_from([*FILES, "manifest.json"]),
        how=st.sampled_from(["flip", "cut", "remove"]),
    )
    def corrupt(self, data: st.DataObject, file: str, how: str) -> None:
        """A bit flips, the end is lost, or the file."""
        step = data.draw(st.sampled_from(sorted(self.held)))
        path = self.root / name_of(step) / file
        saved = self.held[step]
        if not path.exists() or not (content := bytearray(path.read_bytes())):
            return
        if how == "remove":
            path.unlink()
        elif how == "cut":
            path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
        elif saved.whole:  # a second flip might undo the first
            # From the end, where the tensors are: the form of a header is checked anyway.
            content[-data.draw(st.integers(1, len(content)))] ^= 1 << data.draw(st.integers(0, 7))
            path.write_bytes(content)
        else:
            return
        saved.whole = False
        saved.readable = saved.readable and file != "manifest.json"
        saved.sized = saved.sized and saved.readable and how == "flip"

    @rule(step=STEPS, variant=VARIANTS)
    def write_beside_another_writer(self, step: int, variant: int) -> None:
        """Another process holds the lock: a save is refused, a prune warns, nothing changes."""
        self.root.mkdir(exist_ok=True)
        before = sorted(each.name for each in self.root.iterdir())
        with (self.root / ".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with pytest.raises(ft.CheckpointError, match="another process is saving"):
                ft.save(self.root, state_of(step, variant))
            with pytest.warns(SaveWarning, match="another process"):
                checkpoint.prune(self.root, 1)
            self.load_the_newest()
        assert sorted(each.name for each in self.root.iterdir()) == sorted({*before, ".lock"})

    # What is read.

    @rule()
    def load_the_newest(self) -> None:
        """The newest state, and an error where that one is damaged: never an older one unasked."""
        newest = max(self.held, default=None)
        self.loads(newest if newest is not None else 0, lambda: ft.load(self.root, like=LIKE))

    @rule(step=STEPS)
    def load_one(self, step: int) -> None:
        """The state of a step, or an error where there is none or it is damaged."""
        self.loads(step, lambda: ft.load(self.root / name_of(step), like=LIKE))

    def loads(self, step: int, load: Callable[[], ft.TrainState]) -> None:
        saved = self.held.get(step)
        if saved is None or not saved.whole:
            with pytest.raises(ft.CheckpointError):
                load()
        else:
            assert ft.fingerprint(load()) == print_of(step, saved.variant)

    @rule()
    def load_the_newest_valid(self) -> None:
        """With `older`: the newest that is whole, and a warning for each one passed over."""
        whole = max((s for s, saved in self.held.items() if saved.whole), default=None)
        if whole is None:
            with pytest.raises(ft.CheckpointError):
                ft.load(self.root, like=LIKE, older=True)
            return
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            state = ft.load(self.root, like=LIKE, older=True)
        assert ft.fingerprint(state) == print_of(whole, self.held[whole].variant)
        passed = [step for step in sorted(self.held, reverse=True) if step > whole]
        assert len(seen) == len(passed)
        for step, warning in zip(passed, seen, strict=True):
            assert issubclass(warning.category, SaveWarning)
            assert name_of(step) in str(warning.message)

    # What always holds.

    @invariant()
    def holds_what_it_should(self) -> None:
        """The names in the directory, and the newest of them."""
        type(self).rules_run += 1
        if not hasattr(self, "root") or not self.root.exists():
            return
        names = {each.name for each in self.root.iterdir()} - {".lock"}
        aside = {name for name in names if name.startswith(".damaged-step-")}
        assert len(aside) == self.aside
        names -= aside
        assert names == {name_of(step) for step in self.held} | self.left
        newest = max(self.held, default=None)
        assert ft.latest(self.root) == (None if newest is None else self.root / name_of(newest))


def _run(machine: type[Store], **options: Any) -> None:
    machine.runs = machine.rules_run = 0
    run_state_machine_as_test(machine, settings=settings(deadline=None, **options))


def test_any_sequence_of_operations_leaves_what_it_should() -> None:
    """150 sequences of up to 14 operations, the same in every run."""
    _run(Store, max_examples=150, stateful_step_count=14, derandomize=True)
    assert Store.runs >= 150
    assert Store.rules_run >= 1_000
    tally.add("sequences of the store machine", Store.runs)


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_ten_thousand_sequences_of_operations_leave_what_they_should() -> None:
    """10,000 sequences of up to 30 operations, others in every run."""
    _run(Store, max_examples=10_000, stateful_step_count=30, derandomize=False)
    assert Store.runs >= 10_000
    tally.add("sequences of the store machine", Store.runs)


def test_a_save_that_returns_can_be_loaded_even_where_a_damaged_one_was(tmp_path: Path) -> None:
    """A run that goes on from an older checkpoint comes to the damaged step again, and saves it."""
    path = ft.save(tmp_path, state_of(3, 1))
    (path / "model.safetensors").write_bytes(b"")
    with pytest.warns(SaveWarning, match="was damaged and is now .damaged-step-000000000003-1"):
        ft.save(tmp_path, state_of(3, 1))
    assert ft.fingerprint(ft.load(tmp_path, like=LIKE)) == print_of(3, 1)
    assert (tmp_path / ".damaged-step-000000000003-1" / "manifest.json").is_file()
