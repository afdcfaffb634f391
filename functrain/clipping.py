"""Clipping: of gradients by their global norm, by value, and by the norm of the weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from functrain.errors import ConfigError, is_number
from functrain.trees import Tensors, global_norm, map_leaves, tensors


def clip_by_global_norm(
    grads: Mapping[str, Tensor],
    max_norm: float,
    *,
    norm: Tensor | None = None,
    donate: bool = False,
) -> tuple[Tensors, Tensor]:
    """Scale all gradients so that their global norm is at most `max_norm`: `(grads, norm)`.

    The factor is `torch.nn.utils.clip_grads_with_norm_`'s, min(1, max_norm / (norm + 1e-6)), with
    the norm accumulated in float64 (Pascanu et al., 1211.5063). `norm` spares the computation
    where it is known; `donate=True` scales the gradients in place. A norm that is not finite
    spreads to every gradient: test it before.
    """
    _check_positive("max_norm", max_norm)
    _check_named("grads", grads)
    norm = global_norm(grads) if norm is None else norm
    factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    leaves = list(grads.values())
    if donate:
        if leaves and (factor.device.type != "cpu" or float(factor) != 1.0):
            torch._foreach_mul_(leaves, _narrowed(factor, leaves))
        return tensors(grads), norm
    if leaves:
        # A 0-d gradient times the float64 factor would become float64.
        scaled = torch._foreach_mul(leaves, factor)
        leaves = [new.to(old.dtype) for new, old in zip(scaled, leaves, strict=True)]
    return Tensors(zip(grads, leaves, strict=True)), norm


def _narrowed(factor: Tensor, leaves: list[Tensor]) -> Tensor:
    """The factor in the leaves' dtype, where the kernel rounds it to that one itself.

    In its own it would be converted anew for each of them.
    """
    plain = all(leaf.dtype == torch.float32 for leaf in leaves)
    return factor.float() if plain else factor


def clip_by_value(grads: Mapping[str, Tensor], limit: float) -> Tensors:
    """Each element clamped to [−limit, limit]."""
    _check_positive("limit", limit)
    _check_named("grads", grads)
    return map_leaves(lambda grad: grad.clamp(-limit, limit), grads)


def adaptive_clip(
    grads: Mapping[str, Tensor],
    params: Mapping[str, Tensor],
    *,
    factor: float = 0.01,
    eps: float = 1e-3,
) -> Tensors:
    """Each unit's gradient norm held to `factor` times the norm of its weights, at least `eps`.

    A unit is a row of a matrix (an output), a whole vector or scalar otherwise; adaptive gradient
    clipping (Brock et al., 2102.06171).
    """
    _check_positive("factor", factor)
    _check_positive("eps", eps)
    _check_named("grads", grads)
    _check_named("params", params)

    def clipped(grad: Tensor, param: Tensor) -> Tensor:
        limit = factor * _unit_norm(param).clamp(min=eps)
        norm = _unit_norm(grad)
        return grad * torch.where(norm > limit, limit / norm.clamp(min=1e-12), 1.0)

    return Tensors({name: clipped(grad, params[name]) for name, grad in grads.items()})


def _unit_norm(tensor: Tensor) -> Tensor:
    dims = tuple(range(1, tensor.ndim)) if tensor.ndim > 1 else tuple(range(tensor.ndim))
    if not dims:
        return tensor.abs()
    norm: Tensor = torch.linalg.vector_norm(tensor, dim=dims, keepdim=True)
    return norm


def _check_named(name: str, given: object) -> None:
    """Raise `ConfigError` for the parameters of a module, say, whose gradients torch clips."""
    if not isinstance(given, Mapping):
        raise ConfigError(
            f"{name}: {type(given).__name__}, expected a mapping of names to tensors, as "
            "functrain.value_and_grad gives its grads"
        )


def _check_positive(name: str, value: float) -> None:
    if not is_number(value) or not 0 < value < float("inf"):
        raise ConfigError(f"{name}: {value!r}, expected a positive finite number")
