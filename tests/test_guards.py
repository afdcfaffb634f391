"""The spike guard: what is far from what was before is skipped, and its window is in the state."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
import zoo
from hypothesis import given
from hypothesis import strategies as st

import functrain as ft
from functrain import testing

CPU = torch.device("cpu")


class Spiky(zoo.Tied):
    """Its logits are a hundredfold where a batch begins with token 30."""

    def forward(self, input_ids: Any, **rest: Any) -> Any:
        size = torch.where(input_ids[0, 0] == 30, 100.0, 1.0)
        return {"logits": super().forward(input_ids, **rest)["logits"] * size}


class Spikes(zoo.Batches):
    """A source with a spike at some steps."""

    def __init__(self, *steps: int) -> None:
        super().__init__()
        self._steps = steps

    def at(self, position: int, n: int) -> dict[str, Any]:
        batch = super().at(position, n)
        ids = batch["input_ids"].clone()
        ids[0, 0] = 30 if position // n in self._steps else 1
        return {**batch, "input_ids": ids}


def _made(**options: Any) -> tuple[Any, Any]:
    # Of some models, one in hundreds, a loss of the first steps is a spike by itself.
    with torch.random.fork_rng():
        torch.manual_seed(0)
        architecture, params, buffers = ft.split(Spiky())
    given = {"guard": ft.SpikeGuard(window=8, most_skips=3), **options}
    step = ft.pretrain_step(architecture, ft.optim.adamw(1e-3), **given)
    return step, step.init(params, buffers)


def test_a_spike_is_skipped_and_enters_no_window() -> None:
    step, state = _made()
    skipped = {}
    for now, metrics in ft.train(step, state, Spikes(2, 12, 13), steps=14):
        skipped[now.step - 1] = int(metrics["skipped"])
        state = now
    # At step 2 half a window has not been seen yet.
    assert [count for count, was in skipped.items() if was] == [12, 13]
    assert int(state.optimizer.count) == 12
    assert int(state.guard.count) == 12
    assert int(state.guard.skips) == 2


def test_what_is_skipped_changes_nothing_but_the_count_of_calls_and_of_skips() -> None:
    step, state = _made()
    *_, (state, _) = ft.train(step, state, Spikes(), steps=6)
    before = ft.fingerprints(state)
    after, metrics = step(state, Spikes(0).at(0, 4))
    assert metrics["skipped"] == 1
    changed = {path for path, leaf in ft.fingerprints(after).items() if leaf != before[path]}
    assert changed == {"step", "guard/skips"}


def test_a_spike_is_no_overflow() -> None:
    """The loss scale goes on growing."""
    low = attrs.evolve(ft.precision.policy("fp16"), initial_scale=4.0)
    step, state = _made(precision=low)
    *_, (state, _) = ft.train(step, state, Spikes(), steps=6)
    spike, metrics = step(state, Spikes(0).at(0, 4))
    assert metrics["skipped"] == 1
    assert float(spike.scaler.scale) == float(state.scaler.scale)
    assert int(spike.scaler.growth_count) == int(state.scaler.growth_count) + 1


def test_too_many_skips_in_a_row_end_the_run() -> None:
    step, state = _made()
    run = ft.train(step, state, Spikes(*range(6, 99)), steps=40)
    last = [next(run)[0] for _ in range(9)][-1]
    assert int(last.guard.skips) == 3
    with pytest.raises(ft.DivergedError, match=r"step 10: 4 steps in a row .* those of step 6"):
        next(run)


def test_a_run_resumed_within_its_window_skips_the_same(tmp_path: Path) -> None:
    step, state = _made()
    testing.assert_resumable(step, state, Spikes(6, 7, 9), 12, tmp_path)


def test_the_guarded_step_is_pure_and_its_donation_the_same() -> None:
    step, state = _made()
    *_, (state, _) = ft.train(step, state, Spikes(), steps=6)
    for batch in (Spikes().at(4, 4), Spikes(1).at(4, 4)):
        testing.assert_pure(step, state, batch)
        testing.assert_donation_equal(step, state, batch)


@given(
    st.lists(st.floats(0.1, 10.0), min_size=0, max_size=20),
    st.floats(2.7, 3.3),
    st.sampled_from(["loss", "norm"]),
)
def test_a_spike_is_what_lies_so_many_deviations_above_the_mean(
    values: list[float], above: float, watched: str
) -> None:
    """Near the limit, where another variance would be seen; of the losses and of the norms."""
    guard = ft.SpikeGuard(window=8, deviations=3.0)
    one = torch.ones((), dtype=torch.float64)

    def both(value: float) -> dict[str, Any]:
        return {"loss": one, "norm": one, watched: one * value}

    state = guard.init(CPU)
    for each in values:
        state = guard.observe(state, **both(each), applied=torch.tensor(True))
    if len(values) < 4:  # half a window has not been seen yet
        assert not guard.spike(state, **both(1e6))
        return
    mean, deviation = statistics.mean(values[-8:]), statistics.stdev(values[-8:])
    value, limit = mean + above * deviation, mean + 3.0 * deviation
    if not math.isclose(value, limit, rel_tol=1e-9):
        assert bool(guard.spike(state, **both(value))) is (value > limit)


@given(st.lists(st.booleans(), max_size=12))
def test_what_was_skipped_is_counted_in_a_row_and_leaves_the_window(applied: list[bool]) -> None:
    guard = ft.SpikeGuard(window=4)
    state = guard.init(CPU)
    for number, yes in enumerate(applied):
        value = torch.tensor(1.0 + number)
        state = guard.observe(state, value, 2 * value, torch.tensor(yes))
    kept = [1.0 + number for number, yes in enumerate(applied) if yes]
    assert int(state.count) == len(kept)
    assert int(state.skips) == [*reversed(applied), True].index(True)
    for values, size in ((state.losses, 1), (state.norms, 2)):
        seen = values[: len(kept)].tolist()
        assert sorted(seen) == [size * each for each in kept[-4:]]


@pytest.mark.parametrize(
    "bad",
    [{"window": 3}, {"window": 8.0}, {"most_skips": 0}, {"deviations": 0}, {"deviations": "6"}],
)
def test_a_guard_that_makes_no_sense_is_refused(bad: Any) -> None:
    with pytest.raises(ft.ConfigError, match=next(iter(bad))):
        ft.SpikeGuard(**bad)


def test_a_state_of_another_guard_is_named() -> None:
    step, state = _made()
    for other in (None, ft.SpikeGuard(window=9)):
        with pytest.raises(ft.StateError, match="guard: this step and this state disagree"):
            attrs.evolve(step, guard=other)(state, zoo.batch())


def test_where_all_was_equal_nothing_is_a_spike() -> None:
    """A hinge loss that was 0 for a while: skipped, the next one would never enter the window."""
    guard = ft.SpikeGuard(window=8)
    one = torch.ones((), dtype=torch.float64)
    for equal in (0 * one, 0.1 * one):  # of 0.1 the variance is rounded to more than 0
        state = guard.init(CPU)
        for _ in range(7):
            state = guard.observe(state, equal, equal, torch.tensor(True))
        assert not bool(guard.spike(state, one, one))
        state = guard.observe(state, 1.01 * equal + 1e-3, equal, torch.tensor(True))
        assert bool(guard.spike(state, one, equal))
