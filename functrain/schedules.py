"""The learning rate as a function of applied updates.

A schedule is any hashable callable from a count to a learning rate. Those here are frozen records
with the values of their torch or transformers namesakes:
`cosine(3e-4, total=10_000, warmup=100)(500)`. `reduce_on_plateau` depends on evaluations, so it is
a record whose state is separate: `init`, `observe`.
"""

from __future__ import annotations

import functools
import math
from bisect import bisect_right
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, Literal

import attrs
import torch
from torch import Tensor

from functrain.checks import check_not_negative, check_positive, is_integer, is_number
from functrain.errors import ConfigError, did_you_mean

Schedule = Callable[[int], float]
Shape = Literal["linear", "cosine", "1-sqrt"]


_MOST_WAVES = 2**53


def _not_negative(record: object, field: attrs.Attribute[Any], value: float) -> None:
    check_not_negative(f"{_name(record)}.{field.name}", value)


def _positive(record: object, field: attrs.Attribute[Any], value: float) -> None:
    check_positive(f"{_name(record)}.{field.name}", value)


def _at_least(least: int) -> Callable[[object, attrs.Attribute[Any], int], None]:
    def check(record: object, field: attrs.Attribute[Any], value: int) -> None:
        if not is_integer(value, least):
            raise ConfigError(
                f"{_name(record)}.{field.name}: {value!r}, expected an integer of at least {least} "
                "(updates)"
            )

    return check


_count = _at_least(0)
_positive_count = _at_least(1)


def _waves(record: object, field: attrs.Attribute[Any], value: float) -> None:
    _positive(record, field, value)
    if value > _MOST_WAVES:
        raise ConfigError(
            f"{_name(record)}.{field.name}: {value!r}, expected at most 2^53: of more waves no "
            "fraction can be told"
        )


def _fraction(record: object, field: attrs.Attribute[Any], value: float) -> None:
    if not is_number(value) or not 0 < value < 1:
        raise ConfigError(f"{_name(record)}.{field.name}: {value!r}, expected (0, 1)")


def _at_most_peak(record: Cosine | Plateau) -> None:
    if record.min_lr > record.peak:
        raise ConfigError(
            f"{_name(record)}.min_lr: {record.min_lr} is more than the peak {record.peak}; both "
            "are learning rates"
        )


def _milestones(given: Iterable[int]) -> tuple[int, ...]:
    if not isinstance(given, Iterable):
        raise ConfigError(f"multistep.milestones: {given!r}, expected rising counts: [1000, 2000]")
    return tuple(given)


def _one_of(*known: str) -> Callable[[object, attrs.Attribute[Any], str], None]:
    def check(record: object, field: attrs.Attribute[Any], value: str) -> None:
        if value not in known:
            raise ConfigError(
                f"{_name(record)}.{field.name}: {value!r}; {did_you_mean(str(value), known)}"
            )

    return check


def _power(base: float, exponent: int) -> float:
    """base^exponent; infinite where Python's own power raises `OverflowError`."""
    try:
        return float(base**exponent)
    except OverflowError:
        return math.inf


def _name(record: object) -> str:
    return next((n for n, c in SCHEDULES.items() if type(record) is c), type(record).__name__)


@attrs.frozen
class Constant:
    """The learning rate is `peak` throughout; transformers' `constant`."""

    peak: float = attrs.field(validator=_not_negative)

    def __call__(self, count: int) -> float:
        """The learning rate of the next update, after `count` applied ones."""
        return self.peak * self.factor(count)

    def factor(self, count: int) -> float:
        """The learning rate as a fraction of the peak."""
        return 1.0


@attrs.frozen
class ConstantWithWarmup(Constant):
    """Linear from 0 to `peak` over `warmup` updates, then constant; transformers' namesake."""

    warmup: int = attrs.field(default=0, validator=_count, kw_only=True)

    def factor(self, count: int) -> float:
        """The warmup's fraction of the peak, then that of `after`."""
        if count < self.warmup:
            return count / self.warmup
        return self.after(count)

    def after(self, count: int) -> float:
        """The fraction of the peak once the warmup is over."""
        return 1.0


@attrs.frozen
class Linear(ConstantWithWarmup):
    """Warmup, then linear to 0 at `total`; transformers' `linear`."""

    total: int = attrs.field(validator=_count, kw_only=True)

    def __attrs_post_init__(self) -> None:
        if self.warmup > self.total:
            raise ConfigError(
                f"{_name(self)}.warmup: {self.warmup} is more than total {self.total}; "
                "both count applied updates"
            )

    def progress(self, count: int) -> float:
        """How far `count` is from the end of the warmup to `total`: 0 to 1, above 1 beyond."""
        return (count - self.warmup) / max(1, self.total - self.warmup)

    def after(self, count: int) -> float:
        """The fraction of the way to `total` that is left."""
        return max(0.0, (self.total - count) / max(1, self.total - self.warmup))


@attrs.frozen
class Cosine(Linear):
    """Warmup, then `cycles` cosine waves (½: one descent) until `total` (SGDR, 1608.03983).

    It is transformers' `cosine`, and with `min_lr` (a learning rate) its `cosine_with_min_lr`.
    """

    cycles: float = attrs.field(default=0.5, validator=_waves, kw_only=True)
    min_lr: float = attrs.field(default=0.0, validator=_not_negative, kw_only=True)

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        _at_most_peak(self)

    def after(self, count: int) -> float:
        """½(1 + cos 2π·cycles·progress), rescaled to [min_lr/peak, 1]."""
        wave = 0.5 * (1.0 + math.cos(math.pi * self.cycles * 2.0 * self.progress(count)))
        if self.min_lr and self.peak:
            rate = self.min_lr / self.peak
            wave = wave * (1 - rate) + rate
        return max(0.0, wave)


@attrs.frozen
class CosineWithMinLR(Cosine):
    """`cosine` with a required `min_lr`, at which it ends; transformers' `cosine_with_min_lr`."""

    min_lr: float = attrs.field(validator=_not_negative, kw_only=True)


@attrs.frozen
class CosineWithRestarts(Linear):
    """Warmup, then `cycles` descents with hard restarts; transformers' `cosine_with_restarts`."""

    cycles: int = attrs.field(default=1, validator=_waves, kw_only=True)

    def after(self, count: int) -> float:
        """A cosine descent in each cycle, and 0 from `total` on."""
        progress = self.progress(count)
        if progress >= 1.0:
            return 0.0
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((self.cycles * progress) % 1.0))))


@attrs.frozen
class Polynomial(Linear):
    """Warmup, then (1 − progress)^`power` down to `end`; transformers' `polynomial`."""

    power: float = attrs.field(default=1.0, validator=_positive, kw_only=True)
    end: float = attrs.field(default=1e-7, validator=_not_negative, kw_only=True)

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        if not self.end < self.peak:
            raise ConfigError(
                f"polynomial.end: {self.end}, expected less than the peak {self.peak}"
            )

    def after(self, count: int) -> float:
        """The polynomial from the peak to `end`, then `end`."""
        if count > self.total or self.total == self.warmup:
            return self.end / self.peak
        left = 1 - (count - self.warmup) / (self.total - self.warmup)
        return float(((self.peak - self.end) * left**self.power + self.end) / self.peak)


@attrs.frozen
class InverseSqrt(ConstantWithWarmup):
    """Warmup, then 1/√(count/timescale); transformers' `inverse_sqrt` (Noam, 1706.03762).

    `timescale` defaults to the warmup, or to 10,000 without one.
    """

    timescale: int | None = attrs.field(
        default=None, validator=attrs.validators.optional(_positive), kw_only=True
    )

    def after(self, count: int) -> float:
        """The decay, shifted so that it begins at 1."""
        timescale = self.timescale or self.warmup or 10_000
        return 1.0 / math.sqrt((count + timescale - self.warmup) / timescale)


@attrs.frozen
class WarmupStableDecay(Constant):
    """Warmup, a plateau, and a decay over the last `decay` of `total` updates (2404.06395).

    It is transformers' `warmup_stable_decay`; `min_ratio` is the fraction of the peak at both ends.
    """

    total: int = attrs.field(validator=_count, kw_only=True)
    decay: int = attrs.field(validator=_count, kw_only=True)
    warmup: int = attrs.field(default=0, validator=_count, kw_only=True)
    warmup_shape: Shape = attrs.field(
        default="linear", validator=_one_of("linear", "cosine", "1-sqrt"), kw_only=True
    )
    decay_shape: Shape = attrs.field(
        default="cosine", validator=_one_of("linear", "cosine", "1-sqrt"), kw_only=True
    )
    min_ratio: float = attrs.field(default=0.0, validator=_not_negative, kw_only=True)
    cycles: float = attrs.field(default=0.5, validator=_waves, kw_only=True)

    def __attrs_post_init__(self) -> None:
        if self.warmup + self.decay > self.total:
            raise ConfigError(
                f"warmup_stable_decay: warmup {self.warmup} + decay {self.decay} is more than "
                f"total {self.total}"
            )

    def factor(self, count: int) -> float:
        """The fraction of the peak: up, level, down, and then `min_ratio`."""
        begin = self.total - self.decay
        if count < self.warmup:
            return self._scaled(self._up(count / self.warmup))
        if count < begin:
            return 1.0
        if count < self.total:
            return self._scaled(self._down((count - begin) / self.decay))
        return self.min_ratio

    def _scaled(self, factor: float) -> float:
        return max(0.0, factor * (1.0 - self.min_ratio) + self.min_ratio)

    def _up(self, progress: float) -> float:
        if self.warmup_shape == "cosine":
            return 0.5 * (1.0 - math.cos(math.pi * progress))
        return progress if self.warmup_shape == "linear" else 1.0 - math.sqrt(1.0 - progress)

    def _down(self, progress: float) -> float:
        if self.decay_shape == "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * self.cycles * 2.0 * progress))
        return 1.0 - (progress if self.decay_shape == "linear" else math.sqrt(progress))


@attrs.frozen
class StepDecay(Constant):
    """Multiplied by `gamma` every `every` updates; torch's `StepLR`."""

    every: int = attrs.field(validator=_positive_count, kw_only=True)
    gamma: float = attrs.field(default=0.1, validator=_positive, kw_only=True)

    def factor(self, count: int) -> float:
        """gamma^⌊count/every⌋."""
        return _power(self.gamma, count // self.every)


@attrs.frozen
class MultiStep(Constant):
    """Multiplied by `gamma` at each milestone; torch's `MultiStepLR`."""

    milestones: tuple[int, ...] = attrs.field(converter=_milestones, kw_only=True)
    gamma: float = attrs.field(default=0.1, validator=_positive, kw_only=True)

    def __attrs_post_init__(self) -> None:
        counts = all(type(m) is int and m >= 0 for m in self.milestones)
        if not counts or list(self.milestones) != sorted(self.milestones):
            raise ConfigError(
                f"multistep.milestones: {list(self.milestones)}, expected rising counts"
            )

    def factor(self, count: int) -> float:
        """gamma^(milestones passed)."""
        return _power(self.gamma, bisect_right(self.milestones, count))


@attrs.frozen
class Exponential(Constant):
    """Multiplied by `gamma` at each update; torch's `ExponentialLR`."""

    gamma: float = attrs.field(validator=_positive, kw_only=True)

    def factor(self, count: int) -> float:
        """gamma^count."""
        return _power(self.gamma, count)


@attrs.frozen
class OneCycle(Constant):
    """Up to `peak` over `pct_start` of `total`, then far down (1708.07120); torch's `OneCycleLR`.

    It begins at peak/`div_factor` and ends at peak/`div_factor`/`final_div_factor`, where it stays;
    torch's raises beyond `total`.
    """

    total: int = attrs.field(validator=_positive_count, kw_only=True)
    pct_start: float = attrs.field(default=0.3, validator=_fraction, kw_only=True)
    anneal: Literal["cos", "linear"] = attrs.field(
        default="cos", validator=_one_of("cos", "linear"), kw_only=True
    )
    div_factor: float = attrs.field(default=25.0, validator=_positive, kw_only=True)
    final_div_factor: float = attrs.field(default=1e4, validator=_positive, kw_only=True)

    def __call__(self, count: int) -> float:
        """Two anneals: from the initial learning rate to the peak, then to the least one."""
        # Computed in learning rates, as torch does, not in fractions of the peak: near the end of a
        # linear anneal the rest is a difference of nearly equal numbers, and the bits would differ.
        initial = self.peak / self.div_factor
        turn, last = self.pct_start * self.total - 1, self.total - 1
        if count <= turn:
            return self._between(initial, self.peak, count / turn if turn else 1.0)
        done = min(1.0, (count - turn) / (last - turn))
        return self._between(self.peak, initial / self.final_div_factor, done)

    def factor(self, count: int) -> float:
        """The learning rate as a fraction of the peak."""
        return self(count) / self.peak if self.peak else 0.0

    def _between(self, start: float, end: float, done: float) -> float:
        if self.anneal == "linear":
            return (end - start) * done + start
        return end + (start - end) / 2.0 * (math.cos(math.pi * done) + 1)


@attrs.frozen(kw_only=True)
class PlateauState:
    """What `reduce_on_plateau` has seen.

    `best`: the best value. `bad`: evaluations since without a better one. `cooldown`: evaluations
    left to cool down. `learning_rate`: the current one.
    """

    best: float
    bad: int = 0
    cooldown: int = 0
    learning_rate: float


@attrs.frozen
class Plateau:
    """The learning rate is multiplied by `factor` when evaluations stop improving.

    It is torch's `ReduceLROnPlateau`. `functrain.train` shows it the `eval_loss` of every
    `evaluate_every`-th step; a loop of your own calls `step.observe(state, value)`. The current
    rate is in the state (`scheduler.plateau`): during a run another `peak` changes nothing; evolve
    that record instead.
    """

    peak: float = attrs.field(validator=_positive)
    mode: Literal["min", "max"] = attrs.field(
        default="min", validator=_one_of("min", "max"), kw_only=True
    )
    factor: float = attrs.field(default=0.1, validator=_fraction, kw_only=True)
    patience: int = attrs.field(default=10, validator=_count, kw_only=True)
    threshold: float = attrs.field(default=1e-4, validator=_not_negative, kw_only=True)
    threshold_mode: Literal["rel", "abs"] = attrs.field(
        default="rel", validator=_one_of("rel", "abs"), kw_only=True
    )
    cooldown: int = attrs.field(default=0, validator=_count, kw_only=True)
    min_lr: float = attrs.field(default=0.0, validator=_not_negative, kw_only=True)
    eps: float = attrs.field(default=1e-8, validator=_not_negative, kw_only=True)

    def __attrs_post_init__(self) -> None:
        _at_most_peak(self)

    def init(self) -> PlateauState:
        """The state before the first evaluation."""
        best = math.inf if self.mode == "min" else -math.inf
        # Always floats: a checkpoint tells 1 from 1.0, and cannot hold a NumPy number.
        return PlateauState(best=best, learning_rate=float(self.peak))

    def observe(self, state: PlateauState, value: float) -> PlateauState:
        """The state after one more evaluation; NaN counts as no improvement."""
        better = self._better(value, state.best)
        bad = 0 if better or state.cooldown else state.bad + 1
        seen = attrs.evolve(
            state,
            best=float(value) if better else state.best,
            bad=bad,
            cooldown=max(0, state.cooldown - 1),
        )
        return self._reduced(seen) if bad > self.patience else seen

    def _better(self, value: float, best: float) -> bool:
        sign = 1 if self.mode == "min" else -1
        if self.threshold_mode == "abs":
            return sign * value < sign * best - self.threshold
        return sign * value < sign * best * (1 - sign * self.threshold)

    def _reduced(self, state: PlateauState) -> PlateauState:
        old = state.learning_rate
        new = float(max(old * self.factor, self.min_lr))
        rate = new if old - new > self.eps else old
        return attrs.evolve(state, bad=0, cooldown=self.cooldown, learning_rate=rate)


constant = Constant
constant_with_warmup = ConstantWithWarmup
linear = Linear
cosine = Cosine
cosine_with_min_lr = CosineWithMinLR
cosine_with_restarts = CosineWithRestarts
polynomial = Polynomial
inverse_sqrt = InverseSqrt
warmup_stable_decay = WarmupStableDecay
step = StepDecay
multistep = MultiStep
exponential = Exponential
one_cycle = OneCycle
reduce_on_plateau = Plateau

SCHEDULES: Mapping[str, Callable[..., Schedule | Plateau]] = {
    "constant": constant,
    "constant_with_warmup": constant_with_warmup,
    "linear": linear,
    "cosine": cosine,
    "cosine_with_min_lr": cosine_with_min_lr,
    "cosine_with_restarts": cosine_with_restarts,
    "polynomial": polynomial,
    "inverse_sqrt": inverse_sqrt,
    "warmup_stable_decay": warmup_stable_decay,
    "step": step,
    "multistep": multistep,
    "exponential": exponential,
    "one_cycle": one_cycle,
    "reduce_on_plateau": reduce_on_plateau,
}


def named(name: str, peak: float, **options: Any) -> Schedule | Plateau:
    """Make the schedule of that name, for config files.

    Raises `ConfigError` for unknown names and options, and for missing options.
    """
    if not isinstance(name, str) or name not in SCHEDULES:
        raise ConfigError(f"schedule: {name!r} is unknown; {did_you_mean(str(name), SCHEDULES)}")
    make: Any = SCHEDULES[name]
    fields = {f.name: f for f in attrs.fields(make) if f.name != "peak"}
    for option in options:
        if option not in fields:
            raise ConfigError(
                f"schedule {name}: no option {option!r}; {did_you_mean(option, fields)}"
            )
    missing = [n for n, f in fields.items() if f.default is attrs.NOTHING and n not in options]
    if missing:
        raise ConfigError(f"schedule {name}: {' and '.join(missing)} must be given")
    made: Schedule | Plateau = make(peak, **options)
    return made


def checked(value: Schedule | Plateau | float) -> Schedule | Plateau:
    """The given schedule, or `constant(value)` for a learning rate; else raises `ConfigError`."""
    if isinstance(value, Plateau):
        return value
    if is_number(value):
        if not 0 < value < math.inf:
            raise ConfigError(f"schedule: {value!r}, expected a positive finite learning rate")
        return constant(float(value))
    _refuse_unmade(value)
    if not callable(value):
        raise ConfigError(
            f"schedule: {value!r}, expected a schedule such as {_call('cosine')}, a function of "
            "the count, or a learning rate"
        )
    if not isinstance(value, Hashable):
        raise ConfigError(
            f"schedule: {value!r}, expected a hashable function: its values are looked up by it"
        )
    return value


def _refuse_unmade(value: object) -> None:
    """Raise `ConfigError` for the name or the class of a schedule instead of a schedule."""
    if isinstance(value, str):
        if value in SCHEDULES:
            raise ConfigError(f"schedule: {value!r}, expected a schedule: {_call(value)}")
        raise ConfigError(
            f"schedule: {value!r}, expected a schedule; {did_you_mean(value, SCHEDULES)}"
        )
    if value is named:
        raise ConfigError(
            "schedule: named has not been called; expected "
            "ft.schedules.named('cosine', 3e-4, total=…)"
        )
    if isinstance(value, type):
        for name, each in SCHEDULES.items():
            if each is value:
                raise ConfigError(f"schedule: {name} has not been called; expected {_call(name)}")
        raise ConfigError(f"schedule: the class {value.__name__}, expected a schedule")


def _call(name: str) -> str:
    make: Any = SCHEDULES[name]
    needed = [f"{f.name}=…" for f in attrs.fields(make)[1:] if f.default is attrs.NOTHING]
    return f"ft.schedules.{name}({', '.join(['3e-4', *needed])})"


def learning_rate(schedule: Schedule, count: Tensor, *, bound: int) -> Tensor:
    """`schedule(count)` as a 0-d float64 tensor, without waiting for an accelerator.

    `count` is at most `bound` (the calls so far). On an accelerator the value is looked up in a
    table there, because reading the count back would stall the queue. Raises `ConfigError` if a
    user's schedule returns no valid learning rate: below 0 a step would silently climb.
    """
    if count.device.type == "cpu":
        rate = _rate(schedule, int(count))
        return torch.scalar_tensor(rate, dtype=torch.float64, device="cpu")
    return _looked_up(schedule, count, bound)


def _rate(schedule: Schedule, count: int) -> float:
    value = schedule(count)
    try:
        rate = float(value)
    except (TypeError, ValueError, OverflowError):
        rate = math.nan
    if not 0 <= rate < math.inf:
        raise ConfigError(
            f"schedule: {value!r} after {count} updates, expected a finite learning rate of at "
            "least 0"
        )
    return rate


def _looked_up(schedule: Schedule, count: Tensor, bound: int) -> Tensor:
    size = max(1024, 1 << (bound + 1).bit_length())
    table, known = _table(schedule, size, str(count.device))
    if bound >= known:
        _rate(schedule, known)  # raises the error that ended the table
    # Not `table[count]`: indexing with a 0-d integer tensor reads it back on the host.
    return torch.take(table, count)


@functools.lru_cache(maxsize=16)
def _table(schedule: Schedule, size: int, device: str) -> tuple[Tensor, int]:
    """The first `size` learning rates, and how many of them come before the schedule fails.

    It may fail beyond the end of the run, as one that reads a list of learning rates does.
    """
    values: list[float] = []
    try:
        values.extend(_rate(schedule, count) for count in range(size))
    except Exception:
        values.append(math.nan)
        return torch.tensor(values, dtype=torch.float64, device=device), len(values) - 1
    return torch.tensor(values, dtype=torch.float64, device=device), size
