"""Numerics: what must stay the same for a resumed run to compute the same bits.

The same program on the same numbers gives different bits under a different torch, instruction set,
number of threads or deterministic flag. Comparing these by name finds most differences; the canary,
a hash over the results of a few small operations, finds the rest.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.adamw import adamw as adamw_kernel

from functrain import keys
from functrain.agreement import keeps_denormals
from functrain.checkpoint.manifest import plain
from functrain.errors import CheckpointError, ConfigError, NumericsWarning
from functrain.trees import digest

_cached: dict[tuple[object, ...], str] = {}


def numerics(device: torch.device | str | None = None) -> dict[str, Any]:
    """What the bits of a step depend on besides its arguments, as plain data."""
    where = torch.device("cpu" if device is None else device)
    found: dict[str, Any] = {
        "torch": torch.__version__,
        "device": _device_name(where),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul_precision": torch.get_float32_matmul_precision(),
    }
    key = (*found.values(), where, torch.backends.mkldnn.enabled, keeps_denormals())
    if key not in _cached:
        _cached[key] = canary(where)
    return {**found, "canary": _cached[key]}


def conditioned(device: torch.device, conditions: Mapping[str, Any] | None) -> dict[str, Any]:
    """The numerics and the caller's own conditions, as a manifest holds them."""
    if conditions is not None and not isinstance(conditions, Mapping):
        raise ConfigError(
            f"conditions: {conditions!r}, expected a mapping of names to numbers and texts, or None"
        )
    return {**numerics(device), **plain(conditions or {}, "conditions")}


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def canary(device: torch.device) -> str:
    """A hash over the results of small operations of every kind that a step is made of.

    It is the same in every context (autocast, say) in which a step has the same bits.
    """
    hasher = hashlib.sha256()
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(device.type, enabled=False),
        keys.seeded(0, device),
    ):
        x, weight = (
            torch.randn(rows, 96, dtype=torch.float32, device="cpu").to(device)
            for rows in (64, 128)
        )
        for operation in _OPERATIONS:
            hasher.update(digest(operation(x, weight)).encode())
    if not keeps_denormals():
        hasher.update(b"no denormals")  # no result above is small enough to reveal it
    return hasher.hexdigest()[:32]


def _backward(x: Tensor, weight: Tensor) -> Tensor:
    leaf = weight.detach().clone().requires_grad_()
    with torch.enable_grad():
        loss = F.cross_entropy(F.linear(x, leaf), torch.arange(len(x), device=x.device))
        (grad,) = torch.autograd.grad(loss, leaf)
    return grad


def _attention(x: Tensor, weight: Tensor) -> Tensor:
    q, k = x.view(1, 4, 16, 96), weight.view(1, 4, 32, 96)
    return F.scaled_dot_product_attention(q, k, k)


def _adam(x: Tensor, weight: Tensor) -> Tensor:
    param, grad = weight.detach().clone(), weight.sin()
    first, second, count = torch.zeros_like(param), torch.zeros_like(param), x.new_zeros(())
    # The kernel of `torch.optim.AdamW`: the first instance of that class imports the compiler,
    # which takes a second.
    options: dict[str, Any] = {"beta1": 0.9, "beta2": 0.999, "weight_decay": 1e-2, "eps": 1e-8}
    options |= {"lr": 1e-2, "amsgrad": False, "maximize": False}
    with torch.no_grad():
        adamw_kernel([param], [grad], [first], [second], [], [count], **options)
    return param


_OPERATIONS: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    lambda x, w: F.linear(x, w),
    lambda x, w: F.linear(x.bfloat16(), w.bfloat16()),
    lambda x, w: F.softmax(x, -1),
    lambda x, w: F.log_softmax(x, -1),
    lambda x, w: F.layer_norm(x, (96,)),
    lambda x, w: F.rms_norm(x, (96,)),
    lambda x, w: F.gelu(x),
    lambda x, w: F.silu(x),
    lambda x, w: x.exp().log1p().tanh(),
    lambda x, w: x.abs().rsqrt() + x.erf() + x.cos(),
    lambda x, w: x.sum() + w.mean(),
    lambda x, w: x.cumsum(0),
    lambda x, w: torch.linalg.vector_norm(w, dtype=torch.float64),
    _attention,
    _backward,
    _adam,
)


def compare(
    stored: Mapping[str, Any], now: Mapping[str, Any], where: Path, *, strict: bool
) -> None:
    """Warn (`NumericsWarning`) where a value in `now` differs from the stored one.

    With `strict`, raise `CheckpointError` instead.
    """
    parts = [
        f"{name} {stored.get(name)!r} then, {now[name]!r} now"
        for name in sorted(now)
        if stored.get(name) != now[name]
    ]
    if not parts:
        return
    message = f"{where}: the run goes on, but not with the same bits: {'; '.join(parts)}"
    if strict:
        raise CheckpointError(
            f"{where}: it was computed under other numerics: {'; '.join(parts)}; put them back, or "
            "load with strict=False"
        )
    warnings.warn(message, NumericsWarning, stacklevel=3)
