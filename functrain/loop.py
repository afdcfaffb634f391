"""Training as a generator of (state, metrics): the loop body is the user's, and so is control."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any, Protocol

import attrs

from functrain.checkpoint import prune, save
from functrain.errors import ConfigError, StateError
from functrain.metrics import Metrics
from functrain.objectives.batches import Batch, targets_in
from functrain.state import TrainState
from functrain.steps import Step, checked_batches, evaluate


class Source(Protocol):
    """Data as a function of position; those of `functrain.data` are such."""

    @property
    def batch_size(self) -> int:
        """Samples in a batch unless `train` is told otherwise."""
        ...

    def __len__(self) -> int:
        """Samples in an epoch."""
        ...

    def at(self, position: int, n: int) -> Batch:
        """Samples `position` to `position + n − 1`, counted over epochs without end."""
        ...


def train(
    step: Step,
    state: TrainState,
    source: Source,
    *,
    steps: int | None = None,
    tokens: int | None = None,
    epochs: float | None = None,
    batch_size: int | None = None,
    evaluation: Iterable[Batch] | None = None,
    evaluate_every: int | None = None,
    directory: str | os.PathLike[str] | None = None,
    save_every: int | None = None,
    keep: int | None = None,
) -> Generator[tuple[TrainState, Metrics], TrainState | None, None]:
    """Yield (state, metrics) after every step, from `state` on, until a total is reached.

        for state, metrics in train(step, state, source, steps=10_000):
            ...                                     # stop with `break`; nothing else runs

    `steps` (calls), `tokens` (targets trained on) and `epochs` are totals since the stage began,
    as the state counts them, so that a resumed run is the same call; the first to be reached ends
    it. The batch is `source.at(state.cursor.samples, batch_size)`. With `evaluation`, the metrics
    of every `evaluate_every`-th step and of the last hold `eval_…` too, and a `reduce_on_plateau`
    schedule sees `eval_loss`. With `directory`, every `save_every`-th state and the last are
    saved before they are yielded, and the newest `keep` are kept.

    `run.send(other)` goes on from another state; the generator yields that state back at once.
    Where the step donates, a yielded state is consumed by the next iteration.

    Raises `ConfigError` for a total or an interval that makes no sense, before the first step.
    """
    if not isinstance(step, Step) or not isinstance(state, TrainState):
        given = ", ".join(type(each).__name__ for each in (step, state))
        raise ConfigError(f"train: expected (step, state, source), got {given} first")
    if not hasattr(source, "at"):
        raise ConfigError(
            f"train: a source of the type {type(source).__name__} has no at(position, n); "
            "functrain.data makes sources, and batches of your own go into a loop of your own"
        )
    checked = _Plan(
        steps=steps,
        tokens=tokens,
        samples=None if epochs is None else _samples(epochs, source),
        batch_size=source.batch_size if batch_size is None else batch_size,
        evaluation=_batches(step, evaluation),
        evaluate_every=evaluate_every,
        directory=None if directory is None else Path(directory),
        save_every=save_every,
        keep=keep,
    )
    return _run(step, state, source, checked)


def _samples(epochs: float, source: Source) -> int:
    number = isinstance(epochs, int | float) and not isinstance(epochs, bool)
    if not number or not 0 < epochs < float("inf") or round(epochs * len(source)) < 1:
        raise ConfigError(
            f"epochs: {epochs!r}, expected a positive number, of at least one of the source's "
            f"{len(source):,} samples"
        )
    return round(epochs * len(source))


def _positive(_record: object, field: attrs.Attribute[Any], value: int | None) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ConfigError(f"{field.name}: {value!r}, expected an integer of at least 1")


@attrs.frozen(kw_only=True, eq=False)
class _Plan:
    """The arguments of `train`, checked."""

    steps: int | None = attrs.field(validator=_positive)
    tokens: int | None = attrs.field(validator=_positive)
    samples: int | None = attrs.field(validator=_positive)
    batch_size: int = attrs.field(validator=_positive)
    evaluation: list[Batch] | None
    evaluate_every: int | None = attrs.field(validator=_positive)
    directory: Path | None
    save_every: int | None = attrs.field(validator=_positive)
    keep: int | None = attrs.field(validator=_positive)

    def __attrs_post_init__(self) -> None:
        if self.steps is None and self.tokens is None and self.samples is None:
            raise ConfigError("train: give an end: steps=…, tokens=… or epochs=…, each a total")
        if self.evaluate_every is not None and self.evaluation is None:
            raise ConfigError("evaluate_every: there is nothing to evaluate; give evaluation=…")
        if self.directory is None and (self.save_every is not None or self.keep is not None):
            raise ConfigError("save_every, keep: there is nowhere to save; give directory=…")

    def done(self, state: TrainState) -> bool:
        """Whether a total has been reached."""
        cursor = state.cursor
        reached = (
            (self.steps, state.step),
            (self.tokens, cursor.tokens),
            (self.samples, cursor.samples),
        )
        return any(total is not None and now >= total for total, now in reached)

    def evaluates(self, state: TrainState) -> bool:
        """Whether this state is to be evaluated."""
        return self.evaluation is not None and self._due(self.evaluate_every, state)

    def saves(self, state: TrainState) -> bool:
        """Whether this state is to be saved."""
        return self.directory is not None and self._due(self.save_every, state)

    def _due(self, every: int | None, state: TrainState) -> bool:
        return self.done(state) or (every is not None and state.step % every == 0)


def _batches(step: Step, evaluation: Iterable[Batch] | None) -> list[Batch] | None:
    batches = None if evaluation is None else list(checked_batches(step, evaluation))
    if batches is not None and not batches:
        raise ConfigError("evaluation: no batches; give at least one, or None")
    return batches


def _run(
    step: Step, state: TrainState, source: Source, plan: _Plan
) -> Generator[tuple[TrainState, Metrics], TrainState | None, None]:
    while not plan.done(state):
        state, metrics = _advanced(step, state, source, plan)
        sent = yield state, metrics
        while sent is not None:
            if not isinstance(sent, TrainState):
                raise StateError(f"send: expected a TrainState, got {type(sent).__name__}")
            state = sent
            sent = yield state, metrics


def _advanced(
    step: Step, state: TrainState, source: Source, plan: _Plan
) -> tuple[TrainState, Metrics]:
    cursor = state.cursor
    batch = source.at(cursor.samples, plan.batch_size)
    state, metrics = step(state, batch)
    # Counted here, where the batch still is on the CPU: the step's own count is on its device.
    tokens = cursor.tokens + int(targets_in(batch))
    moved = attrs.evolve(cursor, samples=cursor.samples + plan.batch_size, tokens=tokens)
    state = attrs.evolve(state, cursor=moved)
    if plan.evaluates(state) and plan.evaluation is not None:
        measured = evaluate(step, state, plan.evaluation)
        state = step.observe(state, float(measured["eval_loss"]))
        metrics = metrics | measured
    if plan.saves(state) and plan.directory is not None:
        save(plan.directory, state)
        if plan.keep is not None:
            prune(plan.directory, plan.keep)
    return state, metrics
