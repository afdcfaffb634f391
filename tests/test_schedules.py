"""Every schedule equals its torch or transformers namesake over its whole length and beyond."""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Callable
from typing import Any

import attrs
import numpy as np
import pytest
import torch
import zoo
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.optim import lr_scheduler
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import optimization as namesakes

import functrain as ft
from functrain import optim, schedules
from functrain.errors import ConfigError

PEAKS = st.sampled_from([3e-4, 1e-3, 0.1, 1.0, 2.5])
LENGTHS = st.integers(1, 60)
SHAPES = st.sampled_from(["linear", "cosine", "1-sqrt"])


def _optimizer(peak: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.zeros(1)], lr=peak)


def _rates(scheduler: Any, steps: int) -> list[float]:
    """What an ordinary loop's scheduler gives for updates 0 to `steps` − 1."""
    rates = []
    for _ in range(steps):
        rates.append(scheduler.get_last_lr()[0])
        scheduler.optimizer.step()
        scheduler.step()
    return rates


def _assert_same(schedule: Any, scheduler: Any, steps: int) -> None:
    """The same bits for each update, `0.0` and `-0.0` being the same."""
    assert [schedule(count) for count in range(steps)] == _rates(scheduler, steps)


def _assert_close(schedule: Any, scheduler: Any, steps: int) -> None:
    ours = [schedule(count) for count in range(steps)]
    assert ours == pytest.approx(_rates(scheduler, steps), rel=1e-12, abs=0.0)


@st.composite
def _lengths(draw: st.DrawFn) -> tuple[int, int]:
    """A total and a warmup that fits it, often none and often all of it."""
    total = draw(LENGTHS)
    return total, draw(st.sampled_from([0, 1, total]) | st.integers(0, total))


# transformers' namesakes are LambdaLRs, so the bits are the same.


@given(peak=PEAKS)
def test_constant(peak: float) -> None:
    namesake = namesakes.get_constant_schedule(_optimizer(peak))
    _assert_same(schedules.constant(peak), namesake, 20)


@given(peak=PEAKS, warmup=st.integers(0, 30))
def test_constant_with_warmup(peak: float, warmup: int) -> None:
    namesake = namesakes.get_constant_schedule_with_warmup(_optimizer(peak), warmup)
    _assert_same(schedules.constant_with_warmup(peak, warmup=warmup), namesake, warmup + 10)


@given(peak=PEAKS, lengths=_lengths())
def test_linear(peak: float, lengths: tuple[int, int]) -> None:
    total, warmup = lengths
    namesake = namesakes.get_linear_schedule_with_warmup(_optimizer(peak), warmup, total)
    _assert_same(schedules.linear(peak, total=total, warmup=warmup), namesake, 2 * total + 5)


@given(peak=PEAKS, lengths=_lengths(), cycles=st.sampled_from([0.5, 1.0, 1.5, 3]))
def test_cosine(peak: float, lengths: tuple[int, int], cycles: float) -> None:
    total, warmup = lengths
    namesake = namesakes.get_cosine_schedule_with_warmup(_optimizer(peak), warmup, total, cycles)
    ours = schedules.cosine(peak, total=total, warmup=warmup, cycles=cycles)
    _assert_same(ours, namesake, 2 * total + 5)


@given(
    peak=PEAKS,
    lengths=_lengths(),
    cycles=st.sampled_from([0.5, 1.0, 1.5]),
    least=st.floats(0, 1),
    make=st.sampled_from([schedules.cosine, schedules.cosine_with_min_lr]),
)
def test_cosine_with_min_lr(
    peak: float, lengths: tuple[int, int], cycles: float, least: float, make: Any
) -> None:
    total, warmup = lengths
    namesake = namesakes.get_cosine_with_min_lr_schedule_with_warmup(
        _optimizer(peak), warmup, total, cycles, min_lr=least * peak
    )
    ours = make(peak, total=total, warmup=warmup, cycles=cycles, min_lr=least * peak)
    _assert_same(ours, namesake, 2 * total + 5)


@given(peak=PEAKS, lengths=_lengths(), cycles=st.integers(1, 5))
def test_cosine_with_restarts(peak: float, lengths: tuple[int, int], cycles: int) -> None:
    total, warmup = lengths
    namesake = namesakes.get_cosine_with_hard_restarts_schedule_with_warmup(
        _optimizer(peak), warmup, total, cycles
    )
    ours = schedules.cosine_with_restarts(peak, total=total, warmup=warmup, cycles=cycles)
    _assert_same(ours, namesake, 2 * total + 5)


@given(
    peak=PEAKS,
    lengths=_lengths(),
    power=st.sampled_from([0.5, 1.0, 2.0, 3]),
    end=st.sampled_from([0.0, 1e-7, 1e-4]),
)
def test_polynomial(peak: float, lengths: tuple[int, int], power: float, end: float) -> None:
    total, warmup = lengths
    ours = schedules.polynomial(peak, total=total, warmup=warmup, power=power, end=end)
    if warmup == total:
        # The namesake divides by zero at `total`.
        assert [ours(total), ours(total + 1)] == [peak * (end / peak)] * 2
        return
    namesake = namesakes.get_polynomial_decay_schedule_with_warmup(
        _optimizer(peak), warmup, total, lr_end=end, power=power
    )
    _assert_same(ours, namesake, 2 * total + 5)


@given(
    peak=PEAKS, warmup=st.integers(0, 30), timescale=st.none() | st.integers(1, 100), data=st.data()
)
def test_inverse_sqrt(peak: float, warmup: int, timescale: int | None, data: Any) -> None:
    namesake = namesakes.get_inverse_sqrt_schedule(_optimizer(peak), warmup, timescale)
    ours = schedules.inverse_sqrt(peak, warmup=warmup, timescale=timescale)
    _assert_same(ours, namesake, warmup + 60)


@given(
    peak=PEAKS,
    parts=st.tuples(st.integers(0, 20), st.integers(0, 20), st.integers(0, 20)),
    up=SHAPES,
    down=SHAPES,
    ratio=st.sampled_from([0.0, 0.1, 0.5]),
    cycles=st.sampled_from([0.5, 1.5]),
)
def test_warmup_stable_decay(
    peak: float, parts: tuple[int, int, int], up: Any, down: Any, ratio: float, cycles: float
) -> None:
    warmup, stable, decay = parts
    namesake = namesakes.get_wsd_schedule(
        _optimizer(peak),
        warmup,
        decay,
        num_stable_steps=stable,
        warmup_type=up,
        decay_type=down,
        min_lr_ratio=ratio,
        num_cycles=cycles,
    )
    ours = schedules.warmup_stable_decay(
        peak,
        total=sum(parts),
        decay=decay,
        warmup=warmup,
        warmup_shape=up,
        decay_shape=down,
        min_ratio=ratio,
        cycles=cycles,
    )
    _assert_same(ours, namesake, sum(parts) + 10)


# torch's namesakes multiply what they had, so they gather rounding; the closed form does not.


@given(peak=PEAKS, every=st.integers(1, 20), gamma=st.floats(0.05, 1.5))
def test_step(peak: float, every: int, gamma: float) -> None:
    namesake = lr_scheduler.StepLR(_optimizer(peak), every, gamma)
    _assert_close(schedules.step(peak, every=every, gamma=gamma), namesake, 100)


@given(
    peak=PEAKS,
    milestones=st.lists(st.integers(0, 60), max_size=6).map(sorted),
    gamma=st.floats(0.05, 1.5),
)
def test_multistep(peak: float, milestones: list[int], gamma: float) -> None:
    """Also where a milestone is given twice, which counts twice."""
    namesake = lr_scheduler.MultiStepLR(_optimizer(peak), milestones, gamma)
    ours = schedules.multistep(peak, milestones=milestones, gamma=gamma)
    _assert_close(ours, namesake, 80)


@given(peak=PEAKS, gamma=st.floats(0.5, 1.05))
def test_exponential(peak: float, gamma: float) -> None:
    namesake = lr_scheduler.ExponentialLR(_optimizer(peak), gamma)
    _assert_close(schedules.exponential(peak, gamma=gamma), namesake, 200)


@given(
    peak=PEAKS,
    total=LENGTHS,
    pct_start=st.sampled_from([0.05, 0.25, 0.3, 0.5, 0.9]),
    anneal=st.sampled_from(["cos", "linear"]),
    div_factor=st.sampled_from([2.0, 25.0]),
    final=st.sampled_from([1.0, 1e4]),
)
def test_one_cycle(
    peak: float, total: int, pct_start: float, anneal: Any, div_factor: float, final: float
) -> None:
    """To `total` the same bits (torch computes it from the count, too), and then it stays."""
    ours = schedules.one_cycle(
        peak,
        total=total,
        pct_start=pct_start,
        anneal=anneal,
        div_factor=div_factor,
        final_div_factor=final,
    )
    end = ours(total - 1)
    assert [ours(total), ours(10 * total)] == [end, end]
    if pct_start * total == 1:
        assert ours(0) == peak  # torch's divides by zero where the rise has no length
        return
    namesake = lr_scheduler.OneCycleLR(
        _optimizer(peak),
        peak,
        total,
        pct_start=pct_start,
        anneal_strategy=anneal,
        cycle_momentum=False,
        div_factor=div_factor,
        final_div_factor=final,
    )
    _assert_same(ours, namesake, total)


# Most near one another, so that the thresholds decide; a few that are hardly numbers.
VALUES = st.one_of(
    st.floats(0.1, 3.0),
    st.sampled_from([1.0, 0.99995, 1.00005, 0.95, 1.05, 0.0, -1.0, -1.05]),
    st.sampled_from([math.nan, math.nan, math.inf, -math.inf]),
)


@settings(max_examples=300)
@given(
    peak=PEAKS,
    mode=st.sampled_from(["min", "max"]),
    threshold_mode=st.sampled_from(["rel", "abs"]),
    threshold=st.sampled_from([0.0, 1e-4, 0.1, 0.1, 1.0]),
    factor=st.sampled_from([0.1, 0.5, 0.9]),
    patience=st.integers(0, 3),
    cooldown=st.integers(0, 3),
    least=st.sampled_from([0.0, 1e-4, 0.05]),
    eps=st.sampled_from([0.0, 1e-8, 0.05]),
    values=st.lists(VALUES, min_size=1, max_size=60),
)
@example(  # a fall by exactly `eps` is none
    peak=0.1,
    mode="min",
    threshold_mode="rel",
    threshold=0.1,
    factor=0.5,
    patience=0,
    cooldown=0,
    least=0.0,
    eps=0.05,
    values=[1.0, 1.0],
)
def test_reduce_on_plateau(
    peak: float, least: float, eps: float, values: list[float], **options: Any
) -> None:
    """After every value the same rate, best value and counters, whatever was measured."""
    least = min(least, peak)
    namesake: Any = lr_scheduler.ReduceLROnPlateau(
        _optimizer(peak), min_lr=least, eps=eps, **options
    )
    plateau = schedules.reduce_on_plateau(peak, min_lr=least, eps=eps, **options)
    state = plateau.init()
    for value in values:
        namesake.step(value)
        before = attrs.evolve(state)
        state, seen = plateau.observe(state, value), state
        assert seen == before or math.isnan(seen.best)
        assert state.learning_rate == namesake.get_last_lr()[0]
        assert state.best == namesake.best
        assert (state.bad, state.cooldown) == (
            namesake.num_bad_epochs,
            namesake.cooldown_counter,
        )


def test_a_value_that_is_not_a_number_is_no_improvement() -> None:
    plateau = schedules.reduce_on_plateau(1.0, patience=1, factor=0.5)
    state = plateau.init()
    for _ in range(2):
        state = plateau.observe(state, math.nan)
    assert state.learning_rate == 0.5


@pytest.mark.parametrize("number", [int, np.float64])
def test_what_a_plateau_has_seen_is_in_floats(number: Any) -> None:
    """Whatever it was given: a checkpoint takes no numpy number, and tells 2 from 2.0."""
    plateau = schedules.reduce_on_plateau(
        number(2), factor=0.25, min_lr=number(1), patience=0, threshold=0.5
    )
    state = plateau.init()
    for value in (number(4), number(4), number(1)):
        assert type(state.learning_rate) is type(state.best) is float
        state = plateau.observe(state, value)
    assert (state.learning_rate, type(state.learning_rate), type(state.best)) == (1.0, float, float)


EXAMPLES: dict[str, Callable[[], Any]] = {
    "constant": lambda: schedules.constant(1e-3),
    "constant_with_warmup": lambda: schedules.constant_with_warmup(1e-3, warmup=3),
    "linear": lambda: schedules.linear(1e-3, total=9, warmup=3),
    "cosine": lambda: schedules.cosine(1e-3, total=9),
    "cosine_with_min_lr": lambda: schedules.cosine_with_min_lr(1e-3, total=9, min_lr=1e-4),
    "cosine_with_restarts": lambda: schedules.cosine_with_restarts(1e-3, total=9, cycles=2),
    "polynomial": lambda: schedules.polynomial(1e-3, total=9),
    "inverse_sqrt": lambda: schedules.inverse_sqrt(1e-3, warmup=3),
    "warmup_stable_decay": lambda: schedules.warmup_stable_decay(1e-3, total=9, decay=3),
    "step": lambda: schedules.step(1e-3, every=3),
    "multistep": lambda: schedules.multistep(1e-3, milestones=[3, 6]),
    "exponential": lambda: schedules.exponential(1e-3, gamma=0.9),
    "one_cycle": lambda: schedules.one_cycle(1e-3, total=9),
    "reduce_on_plateau": lambda: schedules.reduce_on_plateau(1e-3, patience=2),
}


def test_every_schedule_is_exercised_here() -> None:
    assert EXAMPLES.keys() == schedules.SCHEDULES.keys()


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_a_schedule_is_a_hashable_value(name: str) -> None:
    """Equal records hash equally, every field tells records apart, and they pickle."""
    one, other = EXAMPLES[name](), EXAMPLES[name]()
    assert one == other
    assert hash(one) == hash(other)
    assert pickle.loads(pickle.dumps(one)) == one  # noqa: S301
    for field in attrs.fields(type(one)):
        value = getattr(one, field.name)
        if type(value) in (int, float):
            other = value + 1 if type(value) is int else value * 0.9 or 1e-4
            assert attrs.evolve(one, **{field.name: other}) != one
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        one.peak = 1.0


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_named_makes_the_same_record(name: str) -> None:
    made = EXAMPLES[name]()
    options = {
        field.name: getattr(made, field.name)
        for field in attrs.fields(type(made))
        if field.name != "peak"
    }
    assert schedules.named(name, 1e-3, **options) == made


WRONG: list[tuple[Callable[[], Any], str]] = [
    (lambda: schedules.named("cosin", 1e-3), "'cosin' is unknown; did you mean 'cosine'"),
    (lambda: schedules.named("cosine", 1e-3), "total must be given"),
    (lambda: schedules.named("warmup_stable_decay", 1e-3), "total and decay must be given"),
    (lambda: schedules.named("cosine", 1e-3, total=9, warmpu=3), "'warmpu'; did you mean 'warmup'"),
    (lambda: schedules.constant(-1.0), r"constant.peak: -1.0, expected a finite number"),
    (lambda: schedules.constant(math.nan), r"constant.peak: nan, expected a finite number"),
    (lambda: schedules.constant(math.inf), r"constant.peak: inf, expected a finite number"),
    (lambda: schedules.constant(True), r"constant.peak: True, expected a finite number"),
    (lambda: schedules.named("constant", "3e-4"), r"constant.peak: '3e-4', expected a finite"),  # type: ignore[arg-type]
    (lambda: schedules.linear(1.0, total=3, warmup=4), "linear.warmup: 4 is more than total 3"),
    (lambda: schedules.cosine(1.0, total=3, warmup=4), "cosine.warmup: 4 is more than total 3"),
    (lambda: schedules.linear(1.0, total=3.5), "linear.total: 3.5, expected an integer"),  # type: ignore[arg-type]
    (lambda: schedules.linear(1.0, total=-3), "linear.total: -3, expected an integer"),
    (lambda: schedules.linear(1.0, total=3, warmup=True), "linear.warmup: True, expected an int"),
    (lambda: schedules.cosine(1.0, total=3, cycles=0), "cosine.cycles: 0, expected a positive"),
    (lambda: schedules.polynomial(1e-3, total=9, end=1.0), "less than the peak 0.001"),
    (lambda: schedules.inverse_sqrt(1.0, timescale=0), "inverse_sqrt.timescale: 0, expected a pos"),
    (
        lambda: schedules.warmup_stable_decay(1.0, total=9, warmup=5, decay=5),
        "warmup 5 . decay 5 is more than total 9",
    ),
    (
        lambda: schedules.warmup_stable_decay(1.0, total=9, decay=5, decay_shape="cosin"),  # type: ignore[arg-type]
        "warmup_stable_decay.decay_shape: 'cosin'; did you mean 'cosine'",
    ),
    (lambda: schedules.step(1.0, every=0), "step.every: 0, expected an integer of at least 1"),
    (lambda: schedules.step(1.0, every=2.5), "step.every: 2.5, expected an integer"),  # type: ignore[arg-type]
    (lambda: schedules.multistep(1.0, milestones=[4, 2]), r"milestones: \[4, 2\], expected rising"),
    (lambda: schedules.multistep(1.0, milestones=[-1]), r"milestones: \[-1\], expected rising"),
    (lambda: schedules.multistep(1.0, milestones=[2.5]), r"milestones: \[2.5\], expected rising"),
    (lambda: schedules.exponential(1.0, gamma=0.0), "exponential.gamma: 0.0, expected a positive"),
    (lambda: schedules.one_cycle(1.0, total=0), "one_cycle.total: 0, expected an integer"),
    (lambda: schedules.one_cycle(1.0, total=9, pct_start=1.5), "one_cycle.pct_start: 1.5"),
    (lambda: schedules.multistep(1.0, milestones=3), "multistep.milestones: 3, expected rising"),  # type: ignore[arg-type]
    (lambda: schedules.multistep(1.0, milestones="34"), r"multistep.milestones: \['3', '4'\], exp"),  # type: ignore[arg-type]
    (lambda: schedules.multistep(1.0, milestones=[1, None]), r"milestones: \[1, None\], expected"),  # type: ignore[list-item]
    (
        lambda: schedules.one_cycle(1.0, total=9, pct_start="a"),
        "one_cycle.pct_start: 'a', expected",
    ),  # type: ignore[arg-type]
    (lambda: schedules.reduce_on_plateau(1.0, factor="a"), "reduce_on_plateau.factor: 'a', expect"),  # type: ignore[arg-type]
    (lambda: schedules.reduce_on_plateau(1.0, min_lr=2.0), "min_lr: 2.0 is more than the peak 1.0"),
    (lambda: schedules.cosine(1e-3, total=9, min_lr=1e-2), "cosine.min_lr: 0.01 is more than the"),
    (lambda: schedules.cosine(1e-3, total=9, cycles=1e308), r"cycles: 1e\+308, expected at most 2"),
    (
        lambda: schedules.cosine_with_min_lr(1e-3, total=9, min_lr=1e-2),
        "cosine_with_min_lr.min_lr: 0.01 is more than the peak 0.001; both are learning rates",
    ),
    (lambda: schedules.named(3, 1e-3), "schedule: 3 is unknown; known: "),  # type: ignore[arg-type]
    (lambda: schedules.reduce_on_plateau(0.0), "reduce_on_plateau.peak: 0.0, expected a positive"),
    (lambda: schedules.reduce_on_plateau(1.0, factor=1.0), "reduce_on_plateau.factor: 1.0"),
    (lambda: schedules.reduce_on_plateau(1.0, mode="mim"), "mode: 'mim'; did you mean 'min'"),  # type: ignore[arg-type]
    (lambda: schedules.reduce_on_plateau(1.0, patience=-1), "patience: -1, expected an integer"),
]


@pytest.mark.parametrize(("make", "message"), WRONG, ids=[message for _, message in WRONG])
def test_what_makes_no_sense_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize("name", sorted(EXAMPLES))
@pytest.mark.parametrize("value", ["a", None, True, math.nan, math.inf, -1, [], {}], ids=repr)
def test_what_is_no_number_is_refused_by_every_field(name: str, value: Any) -> None:
    made = EXAMPLES[name]()
    for field in attrs.fields(type(made)):
        allowed = (field.name == "timescale" and value is None) or (
            field.name == "milestones" and value in ([], {})  # none at all: a constant
        )
        if not allowed:
            with pytest.raises(ConfigError, match=rf"{name}\.{field.name}: "):
                attrs.evolve(made, **{field.name: value})


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_a_schedule_is_taken_as_it_is(name: str) -> None:
    schedule = EXAMPLES[name]()
    assert schedules.checked(schedule) is schedule


def test_a_number_is_a_constant_and_any_function_of_the_count_a_schedule() -> None:
    assert schedules.checked(1e-3) == schedules.constant(1e-3)
    assert schedules.checked(1) == schedules.constant(1.0)
    assert schedules.checked(_halving) is _halving


@pytest.mark.parametrize(
    "schedule",
    [
        schedules.exponential(1.0, gamma=1e300),
        schedules.step(1.0, every=1, gamma=1e300),
        schedules.multistep(1.0, gamma=1e300, milestones=[1, 2]),
    ],
)
@pytest.mark.parametrize("give", [schedules.learning_rate, schedules._looked_up])
def test_a_learning_rate_beyond_all_floats_is_refused(schedule: Any, give: Any) -> None:
    assert float(give(schedule, torch.tensor(1), bound=1)) == 1e300
    with pytest.raises(ConfigError, match="schedule: inf after 2 updates, expected a finite"):
        give(schedule, torch.tensor(2), bound=2)


def _halving(count: int) -> float:
    return 0.5**count


class Unhashable:
    """A schedule that cannot be looked up."""

    __hash__ = None  # type: ignore[assignment]

    def __call__(self, count: int) -> float:
        return 1.0


CALL = "ft.schedules."
NO_SCHEDULE: list[tuple[Any, str]] = [
    ("cosine", "schedule: 'cosine', expected a schedule: " + CALL + "cosine(3e-4, total=…)"),
    ("constant", CALL + "constant(3e-4)"),
    ("warmup_stable_decay", CALL + "warmup_stable_decay(3e-4, total=…, decay=…)"),
    ("cosin", "schedule: 'cosin', expected a schedule; did you mean 'cosine'"),
    (schedules.cosine, "schedule: cosine has not been called; expected " + CALL + "cosine(3"),
    (schedules.reduce_on_plateau, "reduce_on_plateau has not been called; expected " + CALL),
    (schedules.named, "named has not been called; expected ft.schedules.named('cosine', 3e-4"),
    (dict, "schedule: the class dict, expected a schedule"),
    (None, "schedule: None, expected a schedule such as "),
    (True, "schedule: True, expected a schedule such as "),
    ([1e-3], "schedule: [0.001], expected a schedule such as "),
    (math.nan, "schedule: nan, expected a positive finite learning rate"),
    (math.inf, "schedule: inf, expected a positive finite learning rate"),
    (0.0, "schedule: 0.0, expected a positive finite learning rate"),
    (-1, "schedule: -1, expected a positive finite learning rate"),
    (Unhashable(), "expected a hashable function"),
]


@pytest.mark.parametrize(("value", "message"), NO_SCHEDULE, ids=[m for _, m in NO_SCHEDULE])
def test_what_is_no_schedule_is_refused(value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        schedules.checked(value)


@pytest.mark.parametrize("name", sorted(set(EXAMPLES) - {"reduce_on_plateau"}))
def test_the_learning_rate_is_the_schedule_at_the_count(name: str) -> None:
    schedule = EXAMPLES[name]()
    for count in (0, 1, 4, 8, 9, 10, 5000):
        rate = schedules.learning_rate(schedule, torch.tensor(count), bound=count + 3)
        assert rate.dtype == torch.float64
        assert rate.shape == ()
        assert float(rate) == schedule(count)


@pytest.mark.parametrize("bound", [0, 1, 1022, 1023, 1024, 5000])
def test_the_table_of_an_accelerator_covers_every_count(bound: int) -> None:
    """What would be looked up there, looked up here, at each end of the table."""
    schedule = schedules.cosine(1e-3, total=900, warmup=20)
    for count in {0, bound // 2, bound}:
        rate = schedules._looked_up(schedule, torch.tensor(count), bound)
        assert (rate.dtype, rate.shape, float(rate)) == (torch.float64, (), schedule(count))


def test_a_look_up_reads_nothing_back() -> None:
    """A count that were read on the host would stall an accelerator's queue at every step."""
    seen: list[str] = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, _types: Any, args: Any, kwargs: Any) -> Any:
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    count = torch.tensor(5)
    schedules._looked_up(schedules.constant(1.0), count, 5)  # makes the table
    with Record():
        schedules._looked_up(schedules.constant(1.0), count, 5)
    assert seen == ["aten.take.default"]


@pytest.mark.parametrize("bad", [-1e-9, math.nan, math.inf, None, "x"])
@pytest.mark.parametrize("give", [schedules.learning_rate, schedules._looked_up])
def test_what_is_no_learning_rate_is_refused_when_it_is_reached(give: Any, bad: Any) -> None:
    """Below 0 a step would climb, and NaN would end the params, both without a word."""
    rates = (1e-3, 0.0, bad)

    def schedule(count: int) -> float:
        return rates[count]

    for count in range(2):
        assert float(give(schedule, torch.tensor(count), bound=count)) == rates[count]
    with pytest.raises(ConfigError, match="after 2 updates, expected a finite learning rate"):
        give(schedule, torch.tensor(2), bound=2)


def test_a_list_of_learning_rates_need_not_be_longer_than_the_run() -> None:
    """The table of an accelerator is made for more counts than there will be."""
    rates = tuple(0.1 * count for count in range(5))

    def schedule(count: int) -> float:
        return rates[count]

    for count in range(5):
        assert float(schedules._looked_up(schedule, torch.tensor(count), count)) == rates[count]
    with pytest.raises(IndexError):
        schedules._looked_up(schedule, torch.tensor(5), 5)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", sorted(set(EXAMPLES) - {"reduce_on_plateau"}))
def test_the_learning_rate_on_an_accelerator_is_the_schedules_own(name: str) -> None:
    schedule = EXAMPLES[name]()
    for count in (0, 1, 4, 9, 1023, 1024, 5000):
        on_device = torch.tensor(count, device="cuda")
        schedules.learning_rate(schedule, on_device, bound=count + 3)  # makes the table
        torch.cuda.set_sync_debug_mode("error")
        try:
            rate = schedules.learning_rate(schedule, on_device, bound=count + 3)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert rate.device.type == "cuda"
        assert float(rate) == schedule(count)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1e-9])
def test_a_schedule_of_ones_own_that_gives_no_learning_rate_is_refused(bad: float) -> None:
    """At the count, before anything is donated; what lies beyond the run is never asked for."""
    architecture, params, buffers = zoo.split("tied")
    values = (1e-2, 0.0, bad)
    optimizer = optim.adamw()
    step = ft.pretrain_step(architecture, optimizer, schedule=lambda n: values[n], donate=True)
    state = step.init(params, buffers)
    for _ in range(2):
        state, _ = step(state, zoo.batch())
    with pytest.raises(ConfigError, match=f"schedule: {bad} after 2 updates, expected a f"):
        step(state, zoo.batch())
    assert state.step == 2
