"""Clipping of gradients: by their global norm, by value, and by the norms of the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from functrain.checks import check_positive, check_tensors
from functrain.errors import ConfigError
from functrain.norms import row_norms
from functrain.trees import Tensors, global_norm, map_leaves, tensors


def clip_by_global_norm(
    grads: Mapping[str, Tensor],
    max_norm: float,
    *,
    norm: Tensor | None = None,
    donate: bool = False,
) -> tuple[Tensors, Tensor]:
    """Scale all gradients so that their global norm is at most `max_norm`: `(grads, norm)`.

    The factor is that of `torch.nn.utils.clip_grads_with_norm_`, min(1, max_norm / (norm + 1e-6)),
    with the norm accumulated in float64 (Pascanu et al., 1211.5063). A non-finite norm spreads to
    every gradient: test it before.

    `norm`: the global norm, if it is known already. `donate=True` scales the gradients in place.
    """
    check_positive("max_norm", max_norm)
    check_tensors("grads", grads)
    if norm is None:
        check_dense("grads", grads)
        norm = global_norm(grads)
    if not isinstance(norm, Tensor) or norm.ndim != 0:
        raise ConfigError(f"norm: {norm!r}, expected a 0-d tensor, as functrain.trees.global_norm")
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
    """The factor in float32 if all leaves are, to which the kernel would round it anyway.

    In float64 it would be converted again for each leaf.
    """
    return factor.float() if {leaf.dtype for leaf in leaves} == {torch.float32} else factor


def clip_by_value(grads: Mapping[str, Tensor], limit: float) -> Tensors:
    """Clamp each element to [−limit, limit]."""
    check_positive("limit", limit)
    check_tensors("grads", grads)
    check_dense("grads", grads)
    for name, grad in grads.items():
        if grad.is_complex():
            raise ConfigError(f"grads/{name}: {grad.dtype}, which has no order to clamp in")
    return map_leaves(lambda grad: grad.clamp(-limit, limit), grads)


def adaptive_clip(
    grads: Mapping[str, Tensor],
    params: Mapping[str, Tensor],
    *,
    factor: float = 0.01,
    eps: float = 1e-3,
) -> Tensors:
    """Limit each unit's gradient norm to `factor` times its weight norm (taken as at least `eps`).

    A unit is a row of a matrix (an output), or a whole vector or scalar. This is adaptive gradient
    clipping (Brock et al., 2102.06171).
    """
    check_positive("factor", factor)
    check_positive("eps", eps)
    check_tensors("grads", grads)
    check_tensors("params", params)
    check_dense("grads", grads)
    check_dense("params", {name: params[name] for name in grads if name in params})
    for name, grad in grads.items():
        if name not in params or params[name].shape != grad.shape:
            found = f"of shape {list(params[name].shape)}" if name in params else "missing"
            raise ConfigError(
                f"params/{name}: {found}, expected {list(grad.shape)} as its gradient"
            )

    limits = _unit_norms([params[name] for name in grads])
    norms = _unit_norms(list(grads.values()))
    clipped = {}
    for (name, grad), norm, limit in zip(grads.items(), norms, limits, strict=True):
        most = factor * limit.clamp(min=eps)
        scale = torch.where(norm > most, most / norm, 1.0)
        # The factor is narrowed, since it would widen the whole gradient to float64.
        scale = scale.to(torch.promote_types(grad.dtype, torch.float32))
        clipped[name] = (grad * scale).to(grad.dtype)
    return Tensors(clipped)


def _unit_norms(leaves: Sequence[Tensor]) -> list[Tensor]:
    """Each unit's norm, to broadcast over it; float64, since float32 squares would overflow."""
    return [
        norms.view(-1, *[1] * (leaf.ndim - 1)) if leaf.ndim > 1 else torch.linalg.vector_norm(norms)
        for leaf, norms in zip(leaves, row_norms(leaves), strict=True)
    ]


def check_dense(what: str, given: Mapping[str, object]) -> None:
    for name, each in given.items():
        if not isinstance(each, Tensor):
            raise ConfigError(
                f"{what}/{name}: {type(each).__name__}, expected a tensor; leave out what has none"
            )
        if each.layout is not torch.strided:
            raise ConfigError(
                f"{what}/{name}: {each.layout}, expected a dense tensor; {name}.to_dense() is one"
            )
