"""The step: `state, metrics = step(state, batch)`, and the three stages made from it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TypedDict, Unpack

import attrs
import torch
from torch import Tensor, nn

from functrain import keys, schedules
from functrain import metrics as m
from functrain.architecture import Slots, bound, check_names
from functrain.errors import BatchError, ConfigError, StateError
from functrain.gradients import (
    Accumulated,
    Batches,
    ValueAndGrad,
    accumulate,
    clip_by_global_norm,
    value_and_grad,
)
from functrain.metrics import Metrics
from functrain.objectives.base import Objective
from functrain.objectives.batches import Batch, to_device
from functrain.objectives.language import LanguageModeling
from functrain.objectives.preference import PreferenceOptimization
from functrain.optimizers import Optimizer
from functrain.precision import POLICIES, LossScale, Precision, policy, unscale, update_loss_scale
from functrain.schedules import Plateau, Schedule
from functrain.state import (
    SchedulerState,
    TrainState,
    checked_key,
    consume,
    device_of,
    refuse_aliases,
)
from functrain.trees import Tensors, clone, global_norm, storages, tensors

Transform = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Mapping[str, Tensor]]


def _schedule(schedule: Schedule | Plateau | float) -> Schedule | Plateau:
    if isinstance(schedule, int | float):
        return schedules.constant(float(schedule))
    return schedule


@attrs.frozen(kw_only=True, eq=False)
class Step:
    """A pure training step: an attrs record of its parts, called as `step(state, batch)`.

    `schedule`: learning rate as a function of applied updates. `microbatches`: equal slices of
    each batch. `max_grad_norm`: global-norm clipping, or None. `transform`: a pure function of
    (grads, params) before that clipping, `functrain.adaptive_clip` for one. `ema_decay`: keeps
    `state.average`. `donate`: reuse the old state's memory, which is then consumed.

    Change any of it with `attrs.evolve(step, max_grad_norm=0.5)`. The bits of the result depend
    on the arguments alone: the same (state, batch) gives the same (state, metrics), and nothing
    that was passed in is changed, unless donated.
    """

    objective: Objective
    architecture: nn.Module = attrs.field(repr=False)
    optimizer: Optimizer
    schedule: Schedule | Plateau = attrs.field(converter=_schedule)
    precision: Precision = attrs.field(default=POLICIES["fp32"], converter=policy)
    microbatches: int = 1
    max_grad_norm: float | None = None
    transform: Transform | None = None
    ema_decay: float | None = None
    donate: bool = False
    value_and_grad: ValueAndGrad = attrs.field(init=False, repr=False)
    gradient: Accumulated = attrs.field(init=False, repr=False)

    @value_and_grad.default
    def _value_and_grad(self) -> ValueAndGrad:
        return value_and_grad(self.objective, self.architecture, precision=self.precision)

    @gradient.default
    def _gradient(self) -> Accumulated:
        return accumulate(self.value_and_grad, self.microbatches)

    def __attrs_post_init__(self) -> None:
        if self.max_grad_norm is not None and not 0 < self.max_grad_norm < float("inf"):
            raise ConfigError(
                f"max_grad_norm: {self.max_grad_norm}, expected a positive finite number or None"
            )
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ConfigError(f"ema_decay: {self.ema_decay}, expected [0, 1) or None")
        if self.objective.batch_coupled and self.microbatches > 1:
            raise ConfigError(
                f"microbatches={self.microbatches}: the {self.objective.name!r} loss couples the "
                "examples of a batch, so its micro-batches would be another loss; use 1"
            )
        if (kept := self.objective.kept()) is not None:
            check_names(
                kept, self._places.params, "reference", "it belongs to another architecture"
            )

    def init(
        self, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor], *, seed: int = 0
    ) -> TrainState:
        """The state before the first step.

        Nothing is copied, but where the step donates and the params are not the state's own to
        overwrite (a plain mapping, or storage that the reference uses): then they are cloned.
        """
        self._check_values(params, buffers)
        params = self._own(params)
        device = device_of(params)
        trained = Tensors({n: p for n, p in params.items() if n in self._places.trainable})
        count = torch.zeros((), dtype=torch.int64, device=device)
        plateau = self.schedule.init() if isinstance(self.schedule, Plateau) else None
        return TrainState(
            step=0,
            params=params,
            buffers=tensors(buffers),
            optimizer=self.optimizer.init(trained),
            scheduler=SchedulerState(count=count, plateau=plateau),
            scaler=self.precision.init_scaler(device),
            key=checked_key(seed),
            average=clone(params) if self.ema_decay is not None else None,
        )

    def adopt(self, state: TrainState) -> TrainState:
        """A state of another stage as this one's start: its params and buffers, the rest fresh.

        Optimizer, schedule, loss scale, counts and cursor begin anew; the key is derived from the
        old one, the old step and this stage's name, so that no randomness repeats. Two steps
        with the same optimizer and precision can also take turns on one state without this.
        """
        seed = keys.derive(state.key, "adopt", self.objective.name, state.step)
        return self.init(state.params, state.buffers, seed=seed)

    def __call__(
        self, state: TrainState, batch: Batches, *, donate: bool | None = None
    ) -> tuple[TrainState, Metrics]:
        """One step: the next state, and metrics as (sum, weight).

        Where the gradients are not finite (an fp16 overflow, a bad batch) nothing is applied:
        params, moments, schedule and average stay, the loss scale backs off, `skipped` is 1.
        Nothing here waits for an accelerator. `donate` overrides the record's own for this call.

        Raises `BatchError` before any compute, `StateError` for a state of another step,
        `ConsumedStateError` for a donated one, `AliasError` where donating would overwrite the
        reference or the average.
        """
        donate = self.donate if donate is None else donate
        self._check_state(state)
        if donate:
            refuse_aliases(state, self.objective.kept())
        rate = self.learning_rate(state)
        result = self.gradient(
            state.params,
            state.buffers,
            batch,
            key=keys.derive(state.key, "step", state.step),
            scaler=state.scaler,
        )
        unscaled = unscale(result.grads, state.scaler)
        norm = global_norm(unscaled)
        applied = torch.isfinite(norm) & torch.isfinite(result.metrics["loss"]).to(norm.device)
        grads = self._clipped(unscaled, state.params, norm)
        params, optimizer = self.optimizer.update(
            grads, state.optimizer, state.params, rate, applied=applied, donate=donate
        )
        count = state.scheduler.count
        successor = attrs.evolve(
            state,
            step=state.step + 1,
            params=params,
            buffers=_where(applied, result.buffers, state.buffers),
            optimizer=optimizer,
            scheduler=attrs.evolve(state.scheduler, count=count + applied.to(count.dtype)),
            scaler=None if state.scaler is None else update_loss_scale(state.scaler, applied),
            average=self._averaged(state.average, params, applied),
        )
        metrics = result.metrics | self._metrics(norm, rate, applied, state.scaler)
        if donate:
            consume(state, successor)
        return successor, metrics

    def learning_rate(self, state: TrainState) -> Tensor:
        """The learning rate of the next update: float64, 0-d."""
        plateau = state.scheduler.plateau
        if isinstance(self.schedule, Plateau):
            if plateau is None:
                raise StateError("scheduler.plateau: missing; this state was made by another step")
            return torch.tensor(plateau.learning_rate, dtype=torch.float64)
        return schedules.learning_rate(self.schedule, state.scheduler.count, bound=state.step)

    def observe(self, state: TrainState, value: float) -> TrainState:
        """The state after a `reduce_on_plateau` schedule has seen an evaluation's value.

        For every other schedule the state itself.
        """
        plateau = state.scheduler.plateau
        if not isinstance(self.schedule, Plateau) or plateau is None:
            return state
        seen = self.schedule.observe(plateau, float(value))
        return attrs.evolve(state, scheduler=attrs.evolve(state.scheduler, plateau=seen))

    @property
    def _places(self) -> Slots:
        return self.value_and_grad.places

    def _own(self, params: Mapping[str, Tensor]) -> Tensors:
        if not self.donate:
            return tensors(params)
        kept = self.objective.kept() or {}
        shared = storages(kept).keys() & storages(params).keys()
        return params if isinstance(params, Tensors) and not shared else clone(params)

    def _check_values(self, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> None:
        hint = "they belong to another architecture"
        check_names(params, self._places.params, "params", hint)
        check_names(buffers, self._places.buffers, "buffers", hint)
        for name, places in self._places.params.items():
            entries, key = places[0]
            slot = entries[key]
            if slot is not None and params[name].shape != slot.shape:
                raise StateError(
                    f"params/{name}: shape {list(params[name].shape)}, expected "
                    f"{list(slot.shape)}; {hint}"
                )

    def _check_state(self, state: TrainState) -> None:
        if not isinstance(state, TrainState):
            raise StateError(
                f"state: expected a TrainState from step.init, got {type(state).__name__}"
            )
        if state.optimizer.kind != self.optimizer.kind:
            raise StateError(
                f"optimizer: this state is {state.optimizer.kind}'s and this step's optimizer is "
                f"{self.optimizer.kind}; carry the state over with step.adopt(state)"
            )
        if self.precision.loss_scale != (state.scaler is not None):
            raise StateError(
                f"scaler: precision {self.precision.name!r} and this state disagree about a loss "
                "scale; carry the state over with step.adopt(state)"
            )
        if (self.ema_decay is not None) != (state.average is not None):
            raise StateError(
                "average: this step and this state disagree about a moving average; carry the "
                "state over with step.adopt(state)"
            )

    def _clipped(
        self, grads: Mapping[str, Tensor], params: Mapping[str, Tensor], norm: Tensor
    ) -> Mapping[str, Tensor]:
        if self.transform is not None:
            grads = self.transform(grads, params)
            norm = global_norm(grads)
        if self.max_grad_norm is None:
            return grads
        # The gradients are this step's own, so they are scaled in place.
        clipped, _ = clip_by_global_norm(grads, self.max_grad_norm, norm=norm, donate=True)
        return clipped

    def _averaged(
        self, average: Tensors | None, params: Tensors, applied: Tensor
    ) -> Tensors | None:
        if self.ema_decay is None or average is None:
            return average
        names, old = list(average), list(average.values())
        weight = 1 - self.ema_decay
        new = torch._foreach_lerp(old, [params[name] for name in names], weight)
        return _where(applied, Tensors(zip(names, new, strict=True)), average)

    def _metrics(
        self, norm: Tensor, rate: Tensor, applied: Tensor, scaler: LossScale | None
    ) -> Metrics:
        scale = torch.ones(()) if scaler is None else scaler.scale
        return Metrics(
            {
                "grad_norm": m.mean(norm),
                "learning_rate": m.mean(rate),
                "loss_scale": m.mean(scale),
                "skipped": m.total(~applied),
            }
        )


def _where(applied: Tensor, new: Tensors, old: Tensors) -> Tensors:
    """`new` where the step is applied, else `old`; no wait on an accelerator."""
    if applied.device.type == "cpu":
        return new if bool(applied) else old
    return Tensors(
        {n: t if t is old[n] else torch.where(applied, t, old[n]) for n, t in new.items()}
    )


class StepOptions(TypedDict, total=False):
    """The options that every stage's step takes; each is described at `Step`."""

    precision: str | Precision
    microbatches: int
    max_grad_norm: float | None
    transform: Transform | None
    ema_decay: float | None
    donate: bool


def make_step(
    objective: Objective,
    optimizer: Optimizer,
    *,
    architecture: nn.Module,
    schedule: Schedule | Plateau | float | None = None,
    **options: Unpack[StepOptions],
) -> Step:
    """The step that minimises `objective` with `optimizer`: the one place where the pieces meet.

    `schedule`: a schedule, a constant learning rate, or None for the optimizer's own `lr`. The
    other options are described at `Step`. Raises `ConfigError` for what cannot be combined.
    """
    return Step(
        objective=objective,
        architecture=architecture,
        optimizer=optimizer,
        schedule=optimizer.lr if schedule is None else schedule,
        **options,  # pyrefly: ignore[open-unpacking]
    )


def pretrain_step(
    architecture: nn.Module,
    optimizer: Optimizer,
    *,
    schedule: Schedule | Plateau | float | None = None,
    **options: Unpack[StepOptions],
) -> Step:
    """Next-token cross entropy over every labelled token; options as for `make_step`."""
    objective = LanguageModeling(name="pretrain")
    return make_step(objective, optimizer, architecture=architecture, schedule=schedule, **options)


def sft_step(
    architecture: nn.Module,
    optimizer: Optimizer,
    *,
    schedule: Schedule | Plateau | float | None = None,
    **options: Unpack[StepOptions],
) -> Step:
    """Cross entropy over the completion's tokens, which the labels single out."""
    objective = LanguageModeling(name="sft")
    return make_step(objective, optimizer, architecture=architecture, schedule=schedule, **options)


def dpo_step(
    architecture: nn.Module,
    optimizer: Optimizer,
    *,
    reference: Mapping[str, Tensor] | None = None,
    beta: float = 0.1,
    loss: str = "sigmoid",
    label_smoothing: float = 0.0,
    dropout: bool = False,
    schedule: Schedule | Plateau | float | None = None,
    **options: Unpack[StepOptions],
) -> Step:
    """Direct preference optimisation (2305.18290) against `reference`, params of this architecture.

    Without a reference every batch must carry `reference_logps`. See `PreferenceOptimization`.
    """
    objective = PreferenceOptimization(
        reference=reference,
        beta=beta,
        loss=loss,
        label_smoothing=label_smoothing,
        dropout=dropout,
    )
    return make_step(objective, optimizer, architecture=architecture, schedule=schedule, **options)


def evaluate(step: Step, state: TrainState, batches: Iterable[Batch]) -> Metrics:
    """The step's objective over `batches`, in eval mode and without gradients.

    `eval_loss`, `eval_perplexity` and the stage's other metrics, each divided once by the weight
    of all batches, so that neither batch size nor order matters. Changes nothing: no state is
    returned, and the global random generators are as before. Raises `BatchError` where there is
    nothing to evaluate.
    """
    gradient = step.value_and_grad
    device = device_of(state.params)
    measured = Metrics({})
    weight = torch.zeros((), dtype=torch.int64)
    values = gradient.values(state.params)
    buffers = clone(state.buffers)
    seed = keys.derive(state.key, "evaluate")
    with (
        torch.no_grad(),
        keys.seeded(seed, device),
        bound(step.architecture, values, buffers, "eval", places=gradient.places) as model,
    ):
        for batch in batches:
            step.objective.check(batch, gradient.vocabulary)
            weight = weight + step.objective.weight(batch).to(weight.device)
            with step.precision.context(device):
                _, metrics = step.objective(model, to_device(batch, device))
            measured = measured.merge(metrics)
    if not measured:
        raise BatchError("batches: none, so there is nothing to evaluate")
    step.objective.check_weight(weight)
    return measured.prefixed("eval_")
