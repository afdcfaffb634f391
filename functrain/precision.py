"""Precision as a policy, and the dynamic loss scale as a record with pure functions.

The arithmetic is PyTorch's: autocast for the forward, and for the scale the kernels behind
`torch.amp.GradScaler`, so that its trajectory is the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import attrs
import torch
from torch import Tensor

from functrain.checks import boolean, is_number
from functrain.errors import ConfigError, did_you_mean
from functrain.trees import Tensors, map_leaves, tensors


@attrs.frozen(eq=False, kw_only=True)
class LossScale:
    """The dynamic loss scale of fp16 training: everything that its next value depends on.

    `scale`: float32, 0-d. `growth_count`: finite steps since the last change, int32, 0-d.
    """

    scale: Tensor
    growth_count: Tensor
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000


def init_loss_scale(
    initial: float = 2.0**16,
    *,
    growth_factor: float = 2.0,
    backoff_factor: float = 0.5,
    growth_interval: int = 2000,
) -> LossScale:
    """An initial loss scale, with `torch.amp.GradScaler`'s defaults."""
    _check_loss_scale(initial, growth_factor, backoff_factor, growth_interval)
    return LossScale(
        scale=torch.tensor(initial, dtype=torch.float32, device="cpu"),
        growth_count=torch.tensor(0, dtype=torch.int32, device="cpu"),
        # Always floats: a checkpoint tells 2 from 2.0.
        growth_factor=float(growth_factor),
        backoff_factor=float(backoff_factor),
        growth_interval=growth_interval,
    )


_LEAST, _MOST = 2.0**-150, (2 - 2.0**-24) * 2.0**127
"""Float32 rounds values of at most `_LEAST` to 0, and of at least `_MOST` to infinity."""


def _check_loss_scale(
    initial: object, growth_factor: Any, backoff_factor: Any, growth_interval: object
) -> None:
    if not is_number(initial) or not _LEAST < initial < _MOST:
        raise ConfigError(
            f"initial loss scale: {initial!r} is not a positive finite number in float32"
        )
    if type(growth_interval) is not int:
        raise ConfigError(f"loss scale: growth_interval={growth_interval!r}, expected an integer")
    for name, factor in (("growth_factor", growth_factor), ("backoff_factor", backoff_factor)):
        if not is_number(factor):
            raise ConfigError(f"loss scale: {name}={factor!r}, expected a number")
    if not growth_factor > 1 or not 0 < backoff_factor < 1 or growth_interval < 1:
        raise ConfigError(
            f"loss scale: growth_factor={growth_factor} must be above 1, "
            f"backoff_factor={backoff_factor} in (0, 1), growth_interval={growth_interval} >= 1"
        )


def scale_loss(loss: Tensor, scaler: LossScale | None) -> Tensor:
    """`loss` times the scale, or `loss` itself without a scaler."""
    return loss if scaler is None else loss * scaler.scale.to(loss.device)


def unscale(
    grads: Mapping[str, Tensor], scaler: LossScale | None, *, donate: bool = False
) -> Tensors:
    """Divide the gradients by the scale, multiplying by its reciprocal as `GradScaler` does.

    `donate=True` does it in place.
    """
    if scaler is None or not grads:
        return tensors(grads)
    inverse = scaler.scale.double().reciprocal().float()
    if donate:
        leaves = list(grads.values())
        torch._foreach_mul_(leaves, inverse.to(leaves[0].device))
        return tensors(grads)
    return map_leaves(lambda grad: grad * inverse.to(grad.device), grads)


def update_loss_scale(scaler: LossScale, finite: Tensor) -> LossScale:
    """The scale after a step: backed off if not `finite` (bool, 0-d), grown after an interval.

    It uses the kernel of `torch.amp.GradScaler.update`.
    """
    if not isinstance(finite, Tensor) or finite.dtype is not torch.bool:
        raise ConfigError(f"finite: {finite!r}, expected a tensor (bool, 0-d)")
    scale, count = scaler.scale.clone(), scaler.growth_count.clone()
    found_inf = (~finite).to(torch.float32).to(scale.device)
    torch._amp_update_scale_(
        scale,
        count,
        found_inf,
        scaler.growth_factor,
        scaler.backoff_factor,
        scaler.growth_interval,
    )
    return attrs.evolve(scaler, scale=scale, growth_count=count)


def _floating(_record: object, field: attrs.Attribute[Any], given: Any) -> None:
    if given is None or (isinstance(given, torch.dtype) and given.is_floating_point):
        return
    raise ConfigError(f"precision: {field.name}={given!r}, expected torch.bfloat16, say, or None")


@attrs.frozen(kw_only=True)
class Precision:
    """How a step computes; the state's params stay in their own dtype (float32 as a rule).

    `autocast`: the dtype of the forward's matrix products, or None. `cast`: the dtype to which
    floating params are cast for forward and backward, or None; gradients come back in the params'
    own dtype, so the state holds the master copy. `loss_scale`: keep a dynamic loss scale in the
    state, with `initial_scale` and `growth_interval`.
    """

    name: str
    autocast: torch.dtype | None = attrs.field(default=None, validator=_floating)
    cast: torch.dtype | None = attrs.field(default=None, validator=_floating)
    loss_scale: bool = attrs.field(default=False, validator=boolean)
    initial_scale: float = 2.0**16
    growth_interval: int = 2000

    def __attrs_post_init__(self) -> None:
        if self.loss_scale:
            # Checked without making a tensor, which the default device may not be able to hold.
            _check_loss_scale(self.initial_scale, 2.0, 0.5, self.growth_interval)

    def context(self, device: torch.device) -> AbstractContextManager[object]:
        """The autocast context of the forward on `device`."""
        if self.autocast is None:
            # The caller's autocast is turned off: the bits must depend on the arguments alone.
            on = torch.is_autocast_enabled(device.type)
            return torch.autocast(device.type, enabled=False) if on else nullcontext()
        return torch.autocast(device.type, dtype=self.autocast)

    def leaf(self, param: Tensor) -> Tensor:
        """The value that the forward sees: detached, and cast if this policy casts."""
        if self.cast is None or not param.is_floating_point():
            return param.detach()
        return param.detach().to(self.cast)

    def init_scaler(self, device: torch.device) -> LossScale | None:
        """An initial loss scale on `device`, or None if this policy has none."""
        if not self.loss_scale:
            return None
        scaler = init_loss_scale(self.initial_scale, growth_interval=self.growth_interval)
        scale, count = scaler.scale.to(device), scaler.growth_count.to(device)
        return attrs.evolve(scaler, scale=scale, growth_count=count)


POLICIES: Mapping[str, Precision] = {
    policy.name: policy
    for policy in (
        Precision(name="fp32"),
        Precision(name="bf16", autocast=torch.bfloat16),
        Precision(name="fp16", autocast=torch.float16, loss_scale=True),
        Precision(name="bf16_params", cast=torch.bfloat16),
    )
}


def policy(precision: str | Precision) -> Precision:
    """The policy of that name, or the policy itself; an unknown name raises `ConfigError`."""
    if isinstance(precision, Precision):
        return precision
    if not isinstance(precision, str) or precision not in POLICIES:
        raise ConfigError(
            f"precision: {precision!r} is unknown; {did_you_mean(str(precision), POLICIES)}"
        )
    return POLICIES[precision]
