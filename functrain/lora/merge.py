"""Adapters merged into the weights of their base, and adapters without effect."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from functrain.architecture import check_fit, held_values, holds_shards, slots
from functrain.lora.attach import adapter_of, layers_of
from functrain.lora.layers import Adapted, magnitude_ratio, row_norms
from functrain.trees import Tensors, laid_out, map_leaves, whole


def merged(architecture: nn.Module, params: Mapping[str, Tensor]) -> tuple[nn.Module, Tensors]:
    """Merge the adapters into the weights: `(architecture before attach, its params)`.

    W + s·B·A, with DoRA scaled to the trained magnitudes by row, is computed in float32 at least
    and rounded to the base's dtype. Other params are the base's own tensors; nothing is written, so
    that the unmerged model stays as it was. A base in shards stays so: one layer at a time is
    whole.
    """
    adapter = adapter_of(architecture)
    check_fit(params, slots(architecture).params, "params")
    values = dict(held_values(architecture))
    beside = {name: tensor for name, tensor in params.items() if ".lora_" not in name}
    values |= beside if holds_shards(architecture) else map_leaves(whole, beside)
    for name, layer in layers_of(architecture).items():
        weight = values[f"{name}.weight"]
        values[f"{name}.weight"] = _merged(layer, weight, name, params)
    return adapter.base, Tensors(values)


def _merged(layer: Adapted, weight: Tensor, name: str, params: Mapping[str, Tensor]) -> Tensor:
    own = layer.oriented(whole(weight))
    a, b = whole(params[f"{name}.lora_A"]), whole(params[f"{name}.lora_B"])
    delta = (b @ a) * layer.scaling
    # Not by `torch.promote_types`, which refuses floats of 8 bits.
    wide = max(own.dtype, delta.dtype, key=lambda dtype: dtype.itemsize)
    summed = own.to(wide) + delta
    if layer.lora_magnitude is not None:
        magnitude = whole(params[f"{name}.lora_magnitude"])
        ratio = magnitude_ratio(magnitude, row_norms(own, delta))
        summed = ratio.unsqueeze(1) * summed
    return laid_out(layer.oriented(summed).to(weight.dtype).contiguous(), weight)


def reference(architecture: nn.Module, params: Mapping[str, Tensor]) -> Tensors:
    """The params under which the adapted model is its base: the reference for `dpo_step`.

    B is 0, and DoRA's magnitudes are those of the base. What is trained besides the adapters is as
    it is in `params`, so take this before training.
    """
    layers = layers_of(architecture)
    check_fit(params, slots(architecture).params, "params")
    base = held_values(architecture)
    values = dict(params)
    for name, layer in layers.items():
        values[f"{name}.lora_B"] = torch.zeros_like(params[f"{name}.lora_B"])
        if layer.lora_magnitude is not None:
            weight = base.get(f"{name}.weight", params.get(f"{name}.weight"))
            magnitude = params[f"{name}.lora_magnitude"]
            zero = torch.zeros((), dtype=magnitude.dtype, device=weight.device)
            norms = row_norms(layer.oriented(whole(weight)), zero)
            values[f"{name}.lora_magnitude"] = laid_out(norms, magnitude)
    return Tensors(values)
