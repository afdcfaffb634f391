"""The form of a step's states: how the first one is made, and whether a state fits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import attrs
import torch
from torch import Tensor

from functrain.architecture import Slots, check_fit
from functrain.errors import ConfigError, StateError
from functrain.guards import SpikeGuard
from functrain.objectives.base import Carrying
from functrain.optimizers import Optimizer, OptimizerState, foreign, is_torchs
from functrain.precision import Precision
from functrain.schedules import Plateau, Schedule
from functrain.state import (
    SchedulerState,
    TrainState,
    check_state,
    checked_key,
    device_of,
    why_apart,
)
from functrain.trees import (
    Tensors,
    clone,
    disown_shared,
    in_order,
    is_sharded,
    owning,
    storages,
    tensors,
)

if TYPE_CHECKING:
    from functrain.distributed.sharding import Sharding


@attrs.frozen(kw_only=True, eq=False)
class Form:
    """What a step asks of a state.

    `averaged`: whether it keeps a moving average. `carrying`: its objective, if that keeps tensors
    in the state. `donated`: whether the step overwrites its states. `kept`: the tensors that the
    objective reads besides the state.
    """

    places: Slots
    optimizer: Optimizer
    schedule: Schedule | Plateau
    precision: Precision
    guard: SpikeGuard | None
    averaged: bool
    carrying: Carrying | None
    donated: bool
    kept: Mapping[str, Tensor]
    sharding: Sharding | None

    def first(
        self, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor], seed: int
    ) -> TrainState:
        """The state before the first step; see `Step.init`."""
        self._check_values(params, buffers)
        with torch.inference_mode(False):  # inference tensors cannot be trained
            if self.sharding is None:
                return self._initial(params, buffers, seed)
            rows = self.sharding.local(params)
            return self.sharding.whole_state(self._initial(rows, buffers, seed))

    def _initial(
        self, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor], seed: int
    ) -> TrainState:
        params = self._masters(self._own(params))
        device = device_of(params)
        count = torch.zeros((), dtype=torch.int64, device=device)
        plateau = self.schedule.init() if isinstance(self.schedule, Plateau) else None
        return TrainState(
            step=0,
            params=params,
            buffers=tensors(buffers),
            optimizer=self._begun(params),
            scheduler=SchedulerState(count=count, plateau=plateau),
            scaler=self.precision.init_scaler(device),
            key=checked_key(seed),
            average=clone(params) if self.averaged else None,
            guard=None if self.guard is None else self.guard.init(device),
            reference=self._moving_reference(params),
            running=None if self.carrying is None else self.carrying.init_running(device),
            base=self.places.base,
        )

    def _moving_reference(self, params: Tensors) -> Tensors | None:
        objective = self.carrying
        if objective is None or objective.reference_mixup is None:
            return None
        if objective.reference is None:
            raise ConfigError(
                f"reference_mixup: {objective.reference_mixup!r}, and the objective has no "
                "reference that it could move; give it one, or leave reference_mixup None"
            )
        # A copy, so that no step of another run and no donation writes into it; in the params'
        # dtype, since a narrower one could round its small moves away.
        reference = objective.reference
        if self.sharding is not None:
            reference = self.sharding.local(reference)
        return Tensors(
            {
                name: tensor.detach().to(params[name].dtype, copy=True)
                for name, tensor in reference.items()
            }
        )

    def _begun(self, params: Tensors) -> OptimizerState:
        """The optimizer's initial state, which owns the slots whose memory nothing else holds."""
        optimizer = self.optimizer
        state = optimizer.init(Tensors({n: params[n] for n in self.places.trainable}))
        known = is_torchs(optimizer)
        if not known:
            state = foreign.begun(optimizer.kind, state)
        state = attrs.evolve(state, slots={s: owning(items) for s, items in state.slots.items()})
        if not known:
            disown_shared(params, *state.slots.values())
        return state

    def _own(self, params: Mapping[str, Tensor]) -> Tensors:
        ordered = {name: _plain(in_order(param)) for name, param in params.items()}
        if any(ordered[name] is not param for name, param in params.items()):
            params = Tensors(ordered)
        if not self.donated:
            return tensors(params)
        shared = storages(self.kept).keys() & storages(params).keys()
        return params if isinstance(params, Tensors) and not shared else clone(params)

    def _masters(self, params: Tensors) -> Tensors:
        """Widen trainable params to float32 at least, if the precision casts for the compute."""
        narrow = {
            name
            for name in self.places.trainable
            if self.precision.cast is not None and params[name].dtype.itemsize < 4
        }
        if not narrow:
            return params
        return Tensors({n: t.float() if n in narrow else t for n, t in params.items()})

    def _check_values(self, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> None:
        check_fit(params, self.places.params, "params")
        check_fit(buffers, self.places.buffers, "buffers")
        for name in sorted(self.places.trainable):
            self._check_dtype(name, params[name])

    def _check_dtype(self, name: str, param: Tensor) -> None:
        if not param.is_floating_point() and not param.is_complex():
            raise StateError(
                f"params/{name}: dtype {param.dtype}, which cannot be trained; freeze it with "
                "requires_grad_(False) before functrain.split"
            )
        if param.dtype.itemsize < 4 and self.precision.cast is None:
            raise StateError(
                f"params/{name}: dtype {param.dtype}, in which small updates are lost; split "
                "module.float(), and let the precision ('bf16', 'fp16', 'bf16_params') choose the "
                "dtype of the compute"
            )

    def check_trained(self, params: Mapping[str, Tensor]) -> None:
        """Raise `StateError`, as `init` does, for params that cannot be trained as they are."""
        if any(param.is_inference() for param in params.values()):
            raise StateError(
                "params: made under torch.inference_mode(), so they cannot be trained; go on with "
                "functrain.clone(state), or leave that mode where they are made or loaded"
            )
        if {param.dtype for param in params.values()} != {torch.float32}:
            for name in sorted(self.places.trainable):
                self._check_dtype(name, params[name])

    def check(self, state: TrainState) -> None:
        """Raise `StateError` unless `state` is a state of this form."""
        check_state(state)
        if not self.places.take(state.params):
            check_fit(state.params, self.places.params, "params")
        if is_sharded(state.params) != (self.sharding is not None):
            raise StateError(
                "params: this step is sharded and this state is not; make it "
                "functrain.distributed.shard(state, world)"
                if self.sharding is not None
                else "params: this state is in shards and this step is not sharded; give the step "
                "sharded=True, or take functrain.distributed.gathered(state)"
            )
        self.check_base(state)
        if not isinstance(state.scheduler.count, Tensor):
            raise StateError(
                f"scheduler.count: {state.scheduler.count!r}, expected a tensor, int64 and 0-d: "
                "torch.tensor(5)"
            )
        if state.optimizer.kind != self.optimizer.kind:
            raise StateError(
                f"optimizer: this state is {state.optimizer.kind}'s and this step's optimizer is "
                f"{self.optimizer.kind}; carry the state over with step.adopt(state)"
            )
        if self.precision.loss_scale != (state.scaler is not None):
            raise _apart("scaler", "a loss scale", f"precision {self.precision.name!r}")
        if (self.guard is None) != (state.guard is None) or (
            self.guard is not None
            and state.guard is not None
            and state.guard.losses.shape != (self.guard.window,)
        ):
            raise _apart("guard", "a spike guard or its window")
        if self.carrying is not None:
            self._check_carried(self.carrying, state)
        if self.averaged != (state.average is not None):
            raise _apart("average", "a moving average")
        # If the step keeps no average, a user's loop may keep its own in this field.
        if self.averaged and state.average is not None:
            self._check_like_params("average", state.average)

    def check_base(self, state: TrainState) -> None:
        """Raise `StateError` for adapters of another base or scale."""
        if (reason := why_apart(state.base, self.places.base)) is not None:
            raise StateError(f"base: this state is of another architecture: {reason}")

    def _check_like_params(self, field: str, values: Tensors) -> None:
        if not self.places.take(values):
            check_fit(values, self.places.params, field)
        if is_sharded(values) != (self.sharding is not None):
            raise StateError(
                f"{field}: {'whole' if self.sharding is not None else 'in shards'}, and the params "
                "are not; take both from one state, functrain.distributed.shard(state, world) or "
                "functrain.distributed.gathered(state)"
            )

    def _check_carried(self, objective: Carrying, state: TrainState) -> None:
        """Check the objective's fields; without such an objective, a user's loop may use them."""
        if (objective.reference_mixup is not None) != (state.reference is not None):
            raise _apart("reference", "a moving reference")
        if objective.reference_mixup is not None and state.reference is not None:
            self._check_like_params("reference", state.reference)
        expected: Mapping[str, Tensor] = objective.init_running(device_of(state.params)) or {}
        if expected.keys() != (state.running or {}).keys():
            raise _apart("running", "what the objective carries")


def _plain(param: Tensor) -> Tensor:
    """A parameter's values, detached, and cloned if they were made in inference mode."""
    if param.requires_grad:  # a mapping of a module's own parameters
        param = param.detach()
    return param.clone() if param.is_inference() else param


def _apart(field: str, about: str, whose: str = "this step") -> StateError:
    return StateError(
        f"{field}: {whose} and this state disagree about {about}; carry the state over with "
        "step.adopt(state)"
    )
