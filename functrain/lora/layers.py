"""A linear layer with an adapter beside its weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from functrain.lora.config import LoRA


class Adapted(nn.Module):
    """What an adapted layer has besides the weight and bias of the layer that it replaces.

    `lora_A` [rank, inputs] and `lora_B` [outputs, rank], and with DoRA `lora_magnitude` [outputs].
    The arithmetic and its order are peft's, so that an adapter has the same outputs in both.
    """

    lora_A: Tensor  # noqa: N815
    lora_B: Tensor  # noqa: N815
    lora_magnitude: Tensor | None
    weight: Tensor
    bias: nn.Parameter  # or None, as nn.Linear annotates it

    def adapt(self, layer: nn.Module, lora: LoRA) -> None:
        """Take over the layer's parameters and hooks, and add the adapter's on the meta device."""
        nn.Module.__init__(self)
        own = {k: v for k, v in vars(layer).items() if not k.startswith("_") or "hook" in k}
        self.__dict__.update(own)
        self.training = layer.training
        self.scaling, self.dropout = lora.scaling, lora.dropout
        for name, parameter in layer._parameters.items():
            self.register_parameter(name, parameter)
        outputs, inputs = self.oriented(self.weight).shape

        def room(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=torch.float32, device="meta"))

        self.lora_A, self.lora_B = room(lora.rank, inputs), room(outputs, lora.rank)
        self.register_parameter("lora_magnitude", room(outputs) if lora.dora else None)

    def oriented(self, weight: Tensor) -> Tensor:
        """The weight as [outputs, inputs]."""
        raise NotImplementedError

    def plain(self, x: Tensor) -> Tensor:
        """The output of the layer without its adapter."""
        raise NotImplementedError

    def delta(self) -> Tensor:
        """What the adapter adds to the weight, [outputs, inputs], without DoRA's magnitudes."""
        return (self.lora_B @ self.lora_A) * self.scaling

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """The layer's output plus the adapter's, in the dtype of the layer's."""
        result = self.plain(input)
        dropping = self.training and self.dropout > 0
        dropped = input.to(self.lora_A.dtype)
        if dropping:
            dropped = F.dropout(dropped, self.dropout)
        if self.lora_magnitude is None:
            update = F.linear(F.linear(dropped, self.lora_A), self.lora_B) * self.scaling
        else:
            update = self._directed(dropped, None if dropping else result)
        return (result + update).to(result.dtype)

    def _directed(self, x: Tensor, result: Tensor | None) -> Tensor:
        """DoRA's update: (m / ‖W + sBA‖ − 1) · Wx + (m / ‖W + sBA‖) · sBAx; the norm is a constant.

        `result`: the plain output for this `x`, where it is at hand.
        """
        assert self.lora_magnitude is not None
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            norm = row_norms(self.oriented(self.weight), self.delta())
        ratio = magnitude_ratio(self.lora_magnitude, norm).view(1, -1)
        if result is None:
            base = F.linear(x, self.oriented(self.weight).to(x.dtype))
        else:
            base = result if self.bias is None else result - self.bias
        update = F.linear(F.linear(x, self.lora_A), self.lora_B)
        return (ratio - 1) * base + ratio * update * self.scaling


def row_norms(weight: Tensor, delta: Tensor) -> Tensor:
    """The Euclidean norm of each row of `weight + delta`, in the dtype of `delta`."""
    norm: Tensor = torch.linalg.norm(weight.to(delta.dtype) + delta, dim=1)
    return norm


def magnitude_ratio(magnitude: Tensor, norm: Tensor) -> Tensor:
    """m / ‖W + sBA‖ by row; 1 for a row of zeros, so that its B gets a gradient and not NaN."""
    zeros = norm == 0
    return magnitude.masked_fill(zeros, 1.0) / norm.masked_fill(zeros, 1.0)


class LoRALinear(Adapted, nn.Linear):
    """`nn.Linear` with an adapter."""

    def __init__(self, layer: nn.Linear, lora: LoRA) -> None:
        self.adapt(layer, lora)

    def oriented(self, weight: Tensor) -> Tensor:
        """The weight as it is."""
        return weight

    def plain(self, x: Tensor) -> Tensor:
        """`nn.Linear`'s output."""
        return F.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        """As `nn.Linear`'s, with the rank."""
        return f"{nn.Linear.extra_repr(self)}, rank={self.lora_A.shape[0]}"


class LoRAFalconLinear(LoRALinear):
    """Falcon's linear layer, which adds its bias after the product, with an adapter."""

    def plain(self, x: Tensor) -> Tensor:
        """`FalconLinear`'s output."""
        product = x @ self.weight.T
        # It may be None, though nn.Linear's annotation says otherwise.
        return product if self.bias is None else product + self.bias


class LoRAConv1D(Adapted):
    """GPT-2's `Conv1D`, a linear layer whose weight is [inputs, outputs], with an adapter."""

    def __init__(self, layer: Any, lora: LoRA) -> None:
        self.adapt(layer, lora)

    def oriented(self, weight: Tensor) -> Tensor:
        """The weight's transpose."""
        return weight.T

    def plain(self, x: Tensor) -> Tensor:
        """`Conv1D`'s output."""
        assert self.bias is not None
        shape = (*x.shape[:-1], self.weight.shape[1])
        return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).view(shape)


def is_adaptable(layer: nn.Module) -> bool:
    """Whether a layer is linear, and not `unfit`."""
    return _kind(layer) is not None and unfit(layer) is None


def adapted(layer: nn.Module, lora: LoRA) -> Adapted:
    """A layer that `is_adaptable`, with an adapter."""
    kind = _kind(layer)
    assert kind is not None
    return kind(layer, lora)


def _kind(layer: nn.Module) -> Callable[[Any, LoRA], Adapted] | None:
    if type(layer).forward is nn.Linear.forward and "forward" not in vars(layer):
        return LoRALinear
    if not type(layer).__module__.startswith("transformers."):
        return None
    if type(layer).__name__ == "Conv1D":
        return LoRAConv1D
    if type(layer).__name__ == "FalconLinear" and isinstance(layer, nn.Linear):
        return LoRAFalconLinear
    return None


def unfit(layer: nn.Module) -> str | None:
    """Why a layer that computes as a linear one cannot be adapted: it is more than that.

    A parametrized one (`torch.nn.utils.parametrizations.weight_norm`), say, has no weight to put an
    adapter beside; and what else a layer holds, the adapted one would lack.
    """
    if _kind(layer) is None:
        return None
    if "weight" not in layer._parameters:
        return "its weight is computed of other tensors"
    held = {*layer._parameters, *layer._buffers, *layer._modules} - {"weight", "bias"}
    return f"it holds {min(held)!r} beside its weight and bias" if held else None


def never_called(architecture: nn.Module) -> set[str]:
    """The names of the layers that are never called: another module computes with their weights.

    An adapter in their place would have no effect, nor has it one in peft.
    """
    found = set()
    for name, module in architecture.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, nn.MultiheadAttention):
            found.add(f"{prefix}out_proj")
        if "A_log" in module._parameters:  # the mixers of Mamba, FalconMamba and Jamba
            found.add(f"{prefix}dt_proj")
    return found


# By `model_type`, as peft has them.
_READ_BY_KERNELS = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")


def read_by_kernels(architecture: nn.Module) -> set[str]:
    """The names of the layers whose weights Mamba's fast CUDA kernels read themselves.

    They are the out_proj of these models' mixers (Gu & Dao, 2312.00752), for which peft takes no
    adapter. Elsewhere it is called, so that an adapter has an effect where the layer is named.
    """
    if getattr(getattr(architecture, "config", None), "model_type", None) not in _READ_BY_KERNELS:
        return set()
    names = (name for name, _ in architecture.named_modules())
    return {name for name in names if name.rpartition(".")[2] == "out_proj"}
