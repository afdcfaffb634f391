"""Any `torch.optim.Optimizer` class as a pure pair."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from functrain.errors import ConfigError
from functrain.optimizers.base import (
    Group,
    OptimizerState,
    advanced,
    checked,
    grouped,
    owned,
    rate_of,
    zero_count,
)
from functrain.trees import Tensors, tensors


def sgd(
    lr: float = 1e-3,
    *,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    groups: Sequence[Group] = (),
    **options: Any,
) -> Adapter:
    """SGD with momentum, as `torch.optim.SGD`."""
    return from_torch(
        torch.optim.SGD,
        lr=lr,
        momentum=momentum,
        weight_decay=weight_decay,
        groups=groups,
        **options,
    )


def adafactor(lr: float = 1e-2, *, groups: Sequence[Group] = (), **options: Any) -> Adapter:
    """Adafactor (Shazeer & Stern, 1804.04235), as `torch.optim.Adafactor`."""
    return from_torch(torch.optim.Adafactor, lr=lr, groups=groups, **options)


def from_torch(
    cls: Callable[..., torch.optim.Optimizer],
    *,
    lr: float = 1e-3,
    groups: Sequence[Group] = (),
    **options: Any,
) -> Adapter:
    """Any `torch.optim.Optimizer` class as a pure pair: `from_torch(torch.optim.RAdam, eps=1e-6)`.

    The class must keep its state per parameter (tensors and numbers), as the interface says; one
    that writes into its parameter groups, or needs a closure, is refused with `ConfigError`.
    """
    return Adapter(cls=cls, lr=lr, options=options, groups=tuple(groups))


@attrs.frozen(kw_only=True)
class Adapter:
    """Any torch optimizer class as a pure pair; see `from_torch`.

    The class creates its per-parameter state at its first update, so `slots` is empty before. A
    Python number in that state is kept as a 0-d tensor of dtype int64, float64 or bool, which is
    how it is known again.
    """

    cls: Callable[..., torch.optim.Optimizer]
    lr: float
    options: Mapping[str, Any]
    groups: tuple[Group, ...] = ()

    def __attrs_post_init__(self) -> None:
        every: list[Mapping[str, Any]] = [{}, *(g.options for g in self.groups)]
        for options in every:
            merged = {**self.options, **{k: v for k, v in options.items() if k != "lr_scale"}}
            checked(self.cls, lr=self.lr, **merged)

    @property
    def kind(self) -> str:
        """The name of the class."""
        return getattr(self.cls, "__name__", type(self.cls).__name__)

    def init(self, params: Mapping[str, Tensor]) -> OptimizerState:
        """No slots yet: the class makes them at the first update."""
        return OptimizerState(kind=self.kind, count=zero_count(params), slots={})

    def update(
        self,
        grads: Mapping[str, Tensor],
        state: OptimizerState,
        params: Mapping[str, Tensor],
        learning_rate: Tensor | float,
        *,
        applied: Tensor | None = None,
        donate: bool = False,
    ) -> tuple[Tensors, OptimizerState]:
        """One `step()` of the class on copies, or in place when donated.

        On an accelerator this waits for the learning rate and for `applied`.
        """
        if applied is not None and not bool(applied):
            return tensors(params), state
        new_params, slots = owned(params, state.slots, grads, donate)
        leaves = {name: new_params[name].detach() for name in new_params if name in grads}
        for name, leaf in leaves.items():
            leaf.grad = grads[name]
        optimizer = self._optimizer(leaves, learning_rate)
        for name, leaf in leaves.items():
            own = {slot: _number(t[name]) for slot, t in slots.items() if name in t}
            if own:
                optimizer.state[leaf] = own
        before = [dict(g) for g in optimizer.param_groups]
        optimizer.step()
        _refuse_group_state(self.cls, before, optimizer.param_groups)
        new_slots = _slots({name: optimizer.state[leaf] for name, leaf in leaves.items()}, slots)
        new_params = Tensors({**new_params, **{n: leaf.detach() for n, leaf in leaves.items()}})
        count = advanced(state.count, applied)
        return new_params, attrs.evolve(state, count=count, slots=new_slots)

    def _optimizer(
        self, leaves: Mapping[str, Tensor], learning_rate: Tensor | float
    ) -> torch.optim.Optimizer:
        param_groups = []
        for options, names in grouped(self.groups, leaves, leaves):
            own = {k: v for k, v in options.items() if k != "lr_scale"}
            rate = float(rate_of(learning_rate, options))
            param_groups.append({"params": [leaves[n] for n in names], "lr": rate, **own})
        return self.cls(param_groups, lr=float(learning_rate), **self.options)


def _number(value: Tensor) -> Tensor | float:
    is_number = value.ndim == 0 and value.dtype in (torch.int64, torch.float64, torch.bool)
    if not is_number:
        return value
    number: float = value.item()
    return number


def _slots(
    states: Mapping[str, Mapping[str, Any]], before: Mapping[str, Tensors]
) -> dict[str, Tensors]:
    slots: dict[str, dict[str, Tensor]] = {slot: dict(t) for slot, t in before.items()}
    for name, state in states.items():
        for slot, value in state.items():
            if value is None:
                continue
            if not isinstance(value, Tensor | int | float):
                raise ConfigError(
                    f"optimizer state {slot!r} of {name} is a {type(value).__name__}; "
                    "only tensors and numbers can be carried and saved"
                )
            kept = value.detach() if isinstance(value, Tensor) else _as_tensor(value)
            slots.setdefault(slot, {})[name] = kept
    return {slot: Tensors(items) for slot, items in sorted(slots.items())}


def _as_tensor(value: float | bool) -> Tensor:
    if isinstance(value, bool):
        return torch.tensor(value, dtype=torch.bool)
    return torch.tensor(value, dtype=torch.int64 if isinstance(value, int) else torch.float64)


def _refuse_group_state(
    cls: Callable[..., torch.optim.Optimizer],
    before: list[dict[str, Any]],
    after: list[dict[str, Any]],
) -> None:
    for old, new in zip(before, after, strict=True):
        for key in new:
            if key != "params" and (key not in old or old[key] is not new[key]):
                name = getattr(cls, "__name__", repr(cls))
                raise ConfigError(
                    f"{name} keeps {key!r} in its parameter groups; a pure update can carry only "
                    "per-parameter state"
                )
