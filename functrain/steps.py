"""The step: `state, metrics = step(state, batch)`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor, nn

from functrain import activations, compilation, keys, optimizers, schedules
from functrain import metrics as m
from functrain.activations import Recompute
from functrain.agreement import agree
from functrain.architecture import Slots, held_values, holds_shards
from functrain.checks import boolean, is_number
from functrain.clipping import check_dense, clip_by_global_norm
from functrain.distributed import World
from functrain.errors import ConfigError, FunctrainError, StateError
from functrain.forms import Form
from functrain.gradients import (
    Accumulated,
    Batches,
    ValueAndGrad,
    accumulate,
    value_and_grad,
)
from functrain.guards import SpikeGuard
from functrain.metrics import Metrics
from functrain.objectives.base import Carrying, Coupled, Objective, advanced
from functrain.optimizers import Optimizer, OptimizerState, foreign
from functrain.precision import POLICIES, LossScale, Precision, policy, unscale, update_loss_scale
from functrain.reductions import Reduction, reduction_name
from functrain.schedules import Plateau, Schedule
from functrain.state import (
    SchedulerState,
    TrainState,
    check_state,
    consume,
    device_of,
    disown_repeated,
    refuse_aliases,
    writable_state,
)
from functrain.trees import (
    Tensors,
    disown_shared,
    global_norm,
    owning,
    succeeding,
    versions,
)

if TYPE_CHECKING:
    from functrain.distributed.sharding import Sharding

Transform = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Mapping[str, Tensor]]


def is_optimizer(_step: object, _field: object, given: Any) -> None:
    """Raise `ConfigError` unless `given` is an optimizer as `functrain.optim` makes them."""
    missing = [name for name in ("init", "update", "lr", "kind") if not hasattr(given, name)]
    made = not isinstance(given, type)
    if made and not missing and not isinstance(given, torch.optim.Optimizer):
        return
    name = getattr(given, "__name__", type(given).__name__)
    hint = "functrain.optim.adamw(weight_decay=0.1), say"
    if made and missing == ["kind"]:
        hint = "a class of one's own has a `kind` too, the name by which its states are known"
    elif isinstance(given, torch.optim.Optimizer):
        hint = f"functrain.optim.from_torch(torch.optim.{name}, …) makes one of torch's class"
    elif isinstance(given, type) and issubclass(given, torch.optim.Optimizer):
        hint = f"functrain.optim.from_torch({name}, …) makes one of the class"
    elif callable(given):
        hint = f"it has not been called: {name}()"
    raise ConfigError(f"optimizer: {name}, expected one of functrain.optim; {hint}")


@attrs.frozen(kw_only=True, eq=False)
class Step:
    """A pure training step: an attrs record of its parts, called as `step(state, batch)`.

    The bits of the result depend on the arguments alone: the same (state, batch) gives the same
    (state, metrics), and nothing that was passed in is changed, unless donated. Derive another
    step with `attrs.evolve(step, max_grad_norm=0.5)`.

    `schedule`: the learning rate as a function of applied updates. `microbatches`: the number of
    equal slices of each batch. `transform`: a pure function of (grads, params), applied before
    clipping, such as `functrain.adaptive_clip`. `max_grad_norm`: the limit of global-norm clipping,
    or None. `ema_decay`: keep a moving average of the params in `state.average`. `guard`: skip
    steps whose loss or gradient norm is a spike. `donate`: reuse the old state's memory, which
    consumes that state.

    `compile`: compile the model's body, once for each shape of its inputs
    (`functrain.compilation`); the result differs from the uncompiled one by rounding. `checkpoint`:
    one or several patterns of module names, such as `"model.layers.*"`, whose activations are
    recomputed in the backward pass: less memory, the same bits (`functrain.activations`).
    `recompute`: `"full"`, or `"selective"`, which keeps the results of matrix products and
    attention: more memory than `"full"`, and a few per cent of the time instead of up to a third.

    `world`: the workers that share each batch (`functrain.distributed.world()`); each calls the
    step with its own part, and `microbatches` counts those of the whole batch. `reduction`:
    `"fast"`, or `"canonical"`, a fixed binary tree over the micro-batches, which gives the same
    bits on any number of workers as long as each has a power of two of them. `sharded`: each worker
    keeps some rows of the params, moments, average and reference, as DTensors, and gathers a
    block's params while it computes: a fraction of the memory, and with `"canonical"` the same
    bits. In that case, with W workers, micro-batch j of worker r is number j·W + r of the whole
    batch; `train` reads them in this order, and so does `World.read` with `strided=True`.
    """

    objective: Objective
    architecture: nn.Module = attrs.field(repr=False)
    optimizer: Optimizer = attrs.field(validator=is_optimizer)
    schedule: Schedule | Plateau = attrs.field(converter=schedules.checked)
    precision: Precision = attrs.field(default=POLICIES["fp32"], converter=policy)
    microbatches: int = 1
    max_grad_norm: float | None = None
    transform: Transform | None = None
    ema_decay: float | None = None
    guard: SpikeGuard | None = None
    donate: bool = attrs.field(default=False, validator=boolean)
    compile: bool = False
    checkpoint: tuple[str, ...] = attrs.field(default=(), converter=activations.patterns)
    recompute: Recompute = "full"
    reduction: Reduction = attrs.field(default="fast", validator=reduction_name)
    world: World | None = None
    sharded: bool = attrs.field(default=False, validator=boolean)
    _sharding: Sharding | None = attrs.field(init=False, repr=False)
    value_and_grad: ValueAndGrad = attrs.field(init=False, repr=False)
    gradient: Accumulated = attrs.field(init=False, repr=False)
    # Looked up once: isinstance on a protocol takes longer than a step's smallest kernels.
    _carrying: Carrying | None = attrs.field(init=False, repr=False)
    _form: Form = attrs.field(init=False, repr=False)

    @_sharding.default
    def _found_sharding(self) -> Sharding | None:
        if self.world is not None and not isinstance(self.world, World):
            raise ConfigError(
                f"world: {self.world!r}, expected functrain.distributed.world(), or None"
            )
        if not self.sharded:
            return None
        if self.world is None:
            raise ConfigError(
                "sharded: True, and the step has no world to share with; give it "
                "world=functrain.distributed.world()"
            )
        if self.world.size == 1:
            return None
        self._check_sharded()
        # Here, since DTensor takes a second to import.
        from functrain.distributed.sharding import sharding

        return sharding(self.architecture, self.world, tree=self.reduction == "canonical")

    def _check_sharded(self) -> None:
        if self.compile:
            raise ConfigError("sharded: not with compile=True, which sees no gathering of blocks")
        if self.transform is not None:
            raise ConfigError(
                "sharded: not with a transform, which would be given a worker's rows of the "
                "gradients as if they were the whole; leave transform out"
            )
        if not optimizers.is_elementwise(self.optimizer):
            raise ConfigError(
                f"sharded: {self.optimizer.kind} is not known to update element by element, and "
                "each worker has some rows alone; take adamw, adam, sgd or another such"
            )

    @value_and_grad.default
    def _value_and_grad(self) -> ValueAndGrad:
        return value_and_grad(
            self.objective,
            self.architecture,
            precision=self.precision,
            compile=self.compile,
            checkpoint=self.checkpoint,
            recompute=self.recompute,
            shards=self._sharding,
        )

    @gradient.default
    def _gradient(self) -> Accumulated:
        several = self.world is not None and self.world.size > 1
        return accumulate(
            self.value_and_grad,
            self.microbatches,
            tree=self.reduction == "canonical",
            workers=(self._sharding or self.world) if several else None,
        )

    @_carrying.default
    def _found_carrying(self) -> Carrying | None:
        return self.objective if isinstance(self.objective, Carrying) else None

    @_form.default
    def _found_form(self) -> Form:
        return Form(
            places=self._places,
            optimizer=self.optimizer,
            schedule=self.schedule,
            precision=self.precision,
            guard=self.guard,
            averaged=self.ema_decay is not None,
            carrying=self._carrying,
            donated=self.donate,
            kept=self.objective.kept() or {},
            sharding=self._sharding,
        )

    def __attrs_post_init__(self) -> None:
        if self.guard is not None and not isinstance(self.guard, SpikeGuard):
            raise ConfigError(f"guard: {self.guard!r}, expected a functrain.SpikeGuard(), or None")
        if self.transform is not None and not callable(self.transform):
            raise ConfigError(
                f"transform: {self.transform!r}, expected a function of (grads, params), or None"
            )
        norm, decay = self.max_grad_norm, self.ema_decay
        if norm is not None and not (is_number(norm) and 0 < norm < float("inf")):
            raise ConfigError(f"max_grad_norm: {norm!r}, expected a positive finite number or None")
        if decay is not None and not (is_number(decay) and 0 <= decay < 1):
            raise ConfigError(f"ema_decay: {decay!r}, expected a number in [0, 1) or None")
        if not self._places.trainable:
            raise ConfigError(
                "architecture: every parameter is frozen (requires_grad is False), so there is "
                "nothing to train; unfreeze some before functrain.split"
            )
        for name, held in held_values(self.architecture).items():
            if self.precision.cast not in (None, held.dtype) and held.is_floating_point():
                raise ConfigError(
                    f"precision: {self.precision.name!r} computes in {self.precision.cast}, and "
                    f"the base that the architecture holds is {held.dtype} ({name}); read the base "
                    "in that dtype before functrain.lora.attach"
                )
        if holds_shards(self.architecture) and self._sharding is None:
            raise ConfigError(
                "architecture: its base, under adapters, is in shards, of which each worker has "
                "some rows; give the step sharded=True, and the world that they are of"
            )
        self._check_world()
        coupled = self.objective.batch_coupled and not isinstance(self.objective, Coupled)
        if coupled and self.microbatches > 1:
            raise ConfigError(
                f"microbatches={self.microbatches}: the {self.objective.name!r} loss couples the "
                "examples of a batch, so its micro-batches would be another loss; use 1, or give "
                "the objective observe and couple (functrain.objectives.Coupled)"
            )

    def _check_world(self) -> None:
        size = 1 if self.world is None else self.world.size
        own = self.microbatches // size
        if self.reduction == "canonical" and size > 1 and own & (own - 1):
            raise ConfigError(
                f"microbatches: {self.microbatches} are {own} for each of {size} workers, and "
                "reduction='canonical' needs a power of two on each, so that its sum is a branch "
                f"of one binary tree; give {size * 2 ** (own.bit_length() - 1)} or "
                f"{size * 2 ** own.bit_length()}"
            )
        if size > 1 and self._places.statistical and self.objective.mode == "train":
            raise ConfigError(
                "architecture: a module keeps running statistics (BatchNorm), and each worker "
                "would keep those of its own part of the batch; use LayerNorm, RMSNorm or "
                "GroupNorm, or one worker"
            )

    def init(
        self, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor], *, seed: int = 0
    ) -> TrainState:
        """The state before the first step.

        For a `sharded` step, `params` are whole and the same on every worker, or already sharded
        (`functrain.distributed.shard`). Nothing is copied unless the step donates and the params
        are not the state's own to overwrite (a plain mapping, or storage that the reference uses);
        then they are cloned.
        """
        return self._form.first(params, buffers, seed)

    def objective_of(self, state: TrainState) -> Objective:
        """The objective, given what the state carries for it: a moving reference, running means."""
        if self._carrying is None:
            return self.objective
        return self._carrying.carrying(state.reference, state.running)

    def adopt(self, state: TrainState) -> TrainState:
        """Start this stage from a state of another: keep its params and buffers, reset the rest.

        Optimizer, schedule, loss scale, counts and cursor begin anew; the key is derived from the
        old key, the old step and this stage's name, so that no randomness repeats. Two steps with
        the same optimizer and precision can take turns on one state without this. Raises
        `StateError` for adapters of another base or scale.
        """
        check_state(state, "adopt")
        if state.base is not None and self._places.base is not None:
            self._form.check_base(state)
        seed = keys.derive(state.key, "adopt", self.objective.name, state.step)
        return self.init(state.params, state.buffers, seed=seed)

    def __call__(
        self, state: TrainState, batch: Batches, *, donate: bool | None = None
    ) -> tuple[TrainState, Metrics]:
        """Take one step: the next state, and metrics as (sum, weight).

        If the gradients are not finite (an fp16 overflow, a bad batch), nothing is applied: params,
        moments, schedule and average stay, the loss scale backs off, and `skipped` is 1. The host
        does not wait for an accelerator, except in optimizers that go through
        `functrain.optim.from_torch` (all but the fused Adam).

        `donate` overrides the step's own setting for this call. Tensors taken out of a donated
        state, for instance by `dict(state.params)`, are overwritten too; keep them with
        `functrain.trees.clone`.

        Raises `BatchError` before any compute, `StateError` for a state of another step,
        `ConsumedStateError` for a donated one, `AliasError` if donating would overwrite the
        reference or the average, and `ConfigError` inside `torch.compile`.
        """
        compilation.refuse_tracing("step")
        self.check(state)
        self._form.check_trained(state.params)
        device = device_of(state.params)
        donate = self.donate if donate is None else donate
        if not isinstance(donate, bool):  # "no" would be taken for yes
            raise ConfigError(
                f"donate: {donate!r}, expected True, False, or None for the step's own"
            )
        if donate:
            disown_repeated(state)
        # The bits must not depend on the contexts that the caller is in. This also restores what
        # an inner context leaves on when its exit is interrupted.
        with torch.inference_mode(False), torch.autocast(device.type, enabled=False):
            if self.world is not None and self.world.size > 1:
                self.world.begin(state.step, state.key)
                if self.world.first_time(self):
                    agree(self.world, self, state)
            objective = self.objective_of(state)
            if self._sharding is None:
                return self._advanced(state, batch, objective, donate)
            with self._sharding.rows_of_state(state) as rows:
                successor, metrics = self._advanced(rows, batch, objective, donate)
            return self._sharding.whole_state(successor), metrics

    def _advanced(
        self, state: TrainState, batch: Batches, objective: Objective, donate: bool
    ) -> tuple[TrainState, Metrics]:
        if donate:
            refuse_aliases(state, self._places.trainable, self.objective.kept())
        rate = self.learning_rate(state)
        result = self.gradient(
            state.params,
            state.buffers,
            batch,
            key=keys.derive(state.key, "step", state.step),
            scaler=state.scaler,
            objective=objective,
        )
        if "loss" not in result.metrics:
            raise ConfigError(
                f"objective {self.objective.name!r}: its metrics have no 'loss', by which a step "
                "that is not finite is known; add metrics.mean(total, weight)"
            )
        unscaled = unscale(result.grads, state.scaler, donate=True)  # the step's own
        norm = self._norm(unscaled)
        finite = torch.isfinite(norm) & torch.isfinite(result.metrics["loss"]).to(norm.device)
        grads, transformed = self._clipped(unscaled, state.params, norm, donate)
        if transformed is not norm:
            finite = finite & torch.isfinite(transformed)
        applied = self._unless_spike(state, result.metrics, norm, finite)
        metrics = result.metrics | self._metrics(norm, rate, applied, state.scaler)
        # Before anything is written: a user's objective may raise, or return what is refused.
        running = self._advanced_running(state.running, metrics, applied)
        update = None
        begun = self._versions(state) if donate else []
        try:
            update = self._updated(grads, state, rate, applied, donate)
            successor = self._successor(
                state, update, result.buffers, running, metrics, finite, applied
            )
            if donate:
                consume(state, successor)
        except BaseException as error:
            # Part of the memory may hold the next state's values already, and no state is better
            # than a torn one. If the optimizer raised before it wrote, the state is intact.
            refused = update is None and isinstance(error, FunctrainError)
            if donate and not (refused and self._versions(state) == begun):
                consume(state, None)
            raise
        return successor, metrics

    def _successor(
        self,
        state: TrainState,
        update: tuple[Tensors, OptimizerState],
        buffers: Tensors,
        running: Tensors | None,
        metrics: Metrics,
        finite: Tensor,
        applied: Tensor,
    ) -> TrainState:
        """The state after a step; the loss scale follows `finite`: a spike is not an overflow."""
        params, optimizer = update
        counted, scaler, guard = state.scheduler, state.scaler, state.guard
        count = counted.count + applied
        if scaler is not None:
            scaler = update_loss_scale(scaler, finite)
        if self.guard is not None and guard is not None:
            guard = self.guard.observe(guard, metrics["loss"], metrics["grad_norm"], applied)
        return attrs.evolve(
            state,
            step=state.step + 1,
            params=params,
            buffers=_where(applied, buffers, state.buffers),
            optimizer=optimizer,
            scheduler=SchedulerState(count=count, plateau=counted.plateau),
            scaler=scaler,
            guard=guard,
            average=self._averaged(state.average, params, applied),
            reference=self._moved_reference(state, params, applied),
            running=running,
        )

    def _unless_spike(
        self, state: TrainState, metrics: Metrics, norm: Tensor, finite: Tensor
    ) -> Tensor:
        if self.guard is None or state.guard is None:
            return finite
        return finite & ~self.guard.spike(state.guard, metrics["loss"], norm).to(norm.device)

    def _moved_reference(
        self, state: TrainState, params: Tensors, applied: Tensor
    ) -> Tensors | None:
        """α·π + (1−α)·ref if the step is a multiple of k (TR-DPO, 2404.09656)."""
        objective, reference = self._carrying, state.reference
        if objective is None or reference is None:
            return reference
        mixup = objective.reference_mixup
        if mixup is None or (state.step + 1) % objective.reference_sync:
            return reference
        moved = self._moved(reference, params, mixup)
        return _where(applied, self._moved_frozen(moved, params, mixup), reference)

    def _moved(self, values: Tensors, params: Tensors, weight: float) -> Tensors:
        """`values` moved towards the params, for trainable names only.

        Frozen params would not move, and may be integers or infinite.
        """
        names = [name for name in values if name in self._places.trainable]
        # Detached: a module's own Parameters in a state would start an autograd history.
        old = [values[name].detach() for name in names]
        new = [params[name].detach().to(each.dtype) for name, each in zip(names, old, strict=True)]
        moved = torch._foreach_lerp(old, new, weight)
        return Tensors({**values, **dict(zip(names, moved, strict=True))})

    def _moved_frozen(self, values: Tensors, params: Tensors, weight: float) -> Tensors:
        """`values` moved towards the frozen params, which differ if the reference is another model.

        Equal elements stay as they are, infinite or not; integers are not interpolated.
        """
        moved = dict(values)
        for name, old in values.items():
            new = params[name].detach()
            if (
                name in self._places.trainable
                or new is old
                or not (old.is_floating_point() or old.is_complex())
            ):
                continue
            moved[name] = _moved_where_apart(old, new.to(old.dtype), weight)
        return Tensors(moved)

    def _advanced_running(
        self, running: Tensors | None, metrics: Metrics, applied: Tensor
    ) -> Tensors | None:
        if self._carrying is None or running is None:
            return running
        return _where(applied, advanced(self._carrying, running, metrics), running)

    def learning_rate(self, state: TrainState) -> Tensor:
        """The learning rate of the next update: float64, 0-d."""
        plateau = state.scheduler.plateau
        if isinstance(self.schedule, Plateau):
            if plateau is None:
                raise StateError(
                    "scheduler.plateau: missing, since this state was made by a step with another "
                    "schedule; go on with attrs.evolve(state, scheduler=attrs.evolve("
                    "state.scheduler, plateau=schedule.init()))"
                )
            return torch.tensor(plateau.learning_rate, dtype=torch.float64, device="cpu")
        return schedules.learning_rate(self.schedule, state.scheduler.count, bound=state.step)

    def observe(self, state: TrainState, value: float) -> TrainState:
        """Show an evaluation's value to a `reduce_on_plateau` schedule: the state after it.

        With any other schedule, the state itself. Raises `ConfigError` if `value` is not a number.
        """
        check_state(state)
        plateau = state.scheduler.plateau
        if not isinstance(self.schedule, Plateau) or plateau is None:
            return state
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError) as error:
            raise ConfigError(f"value: {value!r}, expected a number, as evaluate gives") from error
        seen = self.schedule.observe(plateau, number)
        return attrs.evolve(state, scheduler=attrs.evolve(state.scheduler, plateau=seen))

    def _norm(self, grads: Mapping[str, Tensor]) -> Tensor:
        if self._sharding is None:
            return global_norm(grads)
        return self._sharding.global_norm(grads)

    @property
    def _places(self) -> Slots:
        return self.value_and_grad.places

    def check(self, state: TrainState) -> None:
        """Raise `StateError` unless `state` is a state of this step."""
        self._form.check(state)

    def _updated(
        self,
        grads: Mapping[str, Tensor],
        state: TrainState,
        rate: Tensor,
        applied: Tensor,
        donate: bool,
    ) -> tuple[Tensors, OptimizerState]:
        given = writable_state(state, self._places.trainable) if donate else state
        own = {slot: items.own for slot, items in given.optimizer.slots.items()}
        kept = given.params.own
        update = self.optimizer.update
        if self._sharding is not None:
            update = self._sharding.placed(update)
        known = optimizers.is_torchs(self.optimizer)
        begun = None if donate or known else self._versions(state)
        with self._drawing(state):
            returned = update(
                grads, given.optimizer, given.params, rate, applied=applied, donate=donate
            )
        if begun is not None and self._versions(state) != begun:
            raise ConfigError(
                f"optimizer {self.optimizer.kind!r}: its update has written into the params or "
                "slots that it was given, which are the old state's; it may where donate is True, "
                "and makes new ones where it is False"
            )
        if not known:
            returned = foreign.updated(self.optimizer.kind, returned, given.params)
        params, optimizer = returned
        if donate:
            for slot, items in optimizer.slots.items():
                owning(items, own.get(slot, items.keys()))
            owning(params, kept)
        else:
            before = state.optimizer.slots
            slots = {
                slot: succeeding(items, before.get(slot, Tensors()))
                for slot, items in optimizer.slots.items()
            }
            params = succeeding(params, state.params)
            optimizer = attrs.evolve(optimizer, slots=slots)
        if not known:
            old = [] if donate else [state.params, *state.optimizer.slots.values()]
            disown_shared(*old, params, *optimizer.slots.values())
        return params, optimizer

    def _versions(self, state: TrainState) -> list[int]:
        """Version counters that change if an update writes in place.

        Slots are left out for torch's own optimizers, which raise before they write.
        """
        found = versions(state.params)
        if not optimizers.is_torchs(self.optimizer):
            for items in state.optimizer.slots.values():
                found += versions(items)
        return found

    def _drawing(self, state: TrainState) -> AbstractContextManager[None]:
        """A context in which the optimizer draws (SGLD's noise) from the state's key alone."""
        if not optimizers.may_draw(self.optimizer):
            return nullcontext()
        key = keys.derive(state.key, "optimizer", state.step)
        return keys.seeded(key, device_of(state.params))

    def _clipped(
        self, grads: Mapping[str, Tensor], params: Mapping[str, Tensor], norm: Tensor, donate: bool
    ) -> tuple[Mapping[str, Tensor], Tensor]:
        """The gradients to apply, and their norm before clipping."""
        if self.transform is not None:
            grads = self._transformed(grads, params, donate)
            norm = global_norm(grads)
        if self.max_grad_norm is None:
            return grads, norm
        # The step's own gradients are scaled in place; a transform's may belong to anybody. The
        # fused kernel's grad_scale is not used: it divides, so that a quarter of the gradients
        # would differ from torch's clipping in the last bit, to save 0.2 % of a large step.
        clipped, _ = clip_by_global_norm(
            grads, self.max_grad_norm, norm=norm, donate=self.transform is None
        )
        return clipped, norm

    def _transformed(
        self, own: Mapping[str, Tensor], params: Mapping[str, Tensor], donate: bool
    ) -> dict[str, Tensor]:
        """The result of the transform on the step's own gradients.

        Gradients that are not the step's own are copied where the optimizer may write into them,
        and so are params returned as gradients, which a donated update would overwrite before it
        has read them. Clipping makes copies anyway.
        """
        assert self.transform is not None
        begun = versions(params)
        given = self.transform(own, params)
        if versions(params) != begun:
            raise ConfigError(
                "transform: it has written into the params, which are the state's; give it a clone "
                "to write into"
            )
        if not isinstance(given, Mapping):
            raise ConfigError(
                f"transform: it returned a {type(given).__name__}, expected the gradients, a "
                "mapping by name"
            )
        check_dense("transform", given)
        in_place = donate and self.max_grad_norm is None
        writes = in_place and optimizers.may_write(self.optimizer)

        def taken(name: str, grad: Tensor) -> Tensor:
            plain = grad.detach() if grad.requires_grad else grad
            others = writes and plain is not own.get(name)
            return plain.clone() if others or (in_place and grad is params.get(name)) else plain

        return {name: taken(name, grad) for name, grad in given.items()}

    def _averaged(
        self, average: Tensors | None, params: Tensors, applied: Tensor
    ) -> Tensors | None:
        if self.ema_decay is None or average is None:
            return average
        return _where(applied, self._moved(average, params, 1 - self.ema_decay), average)

    def _metrics(
        self, norm: Tensor, rate: Tensor, applied: Tensor, scaler: LossScale | None
    ) -> Metrics:
        one = torch.ones((), dtype=torch.float64, device="cpu")
        return Metrics(
            {
                "grad_norm": m.mean(norm, one),
                "learning_rate": m.mean(rate, one),
                "loss_scale": m.mean(one if scaler is None else scaler.scale, one),
                "skipped": m.total(~applied),
            }
        )


def _moved_where_apart(old: Tensor, new: Tensor, weight: float) -> Tensor:
    """`old` moved towards `new` where they differ; `old` itself if they are equal throughout.

    The latter is checked on the CPU only: on an accelerator the host would wait.
    """
    narrow = old.dtype.itemsize == 1  # 8-bit floats support casts and nothing else
    one, other = (old.float(), new.float()) if narrow else (old, new)
    if old.device.type == "cpu" and torch.equal(one, other):
        return old
    return torch.where(one == other, one, torch.lerp(one, other, weight)).to(old.dtype)


def _where(applied: Tensor, new: Tensors, old: Tensors) -> Tensors:
    """`new` if the step is applied, else `old`, without waiting for an accelerator."""
    if applied.device.type == "cpu":
        return new if bool(applied) else old
    return Tensors(
        {n: t if t is old[n] else torch.where(applied, t, old[n]) for n, t in new.items()}
    )
