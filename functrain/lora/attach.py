"""Adapters over a frozen base: the architecture holds the base, and the params are the adapters."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from fnmatch import fnmatchcase

import attrs
import torch
from torch import Tensor, nn

from functrain import keys
from functrain.architecture import check_fit, check_module, held_by, hold, slots
from functrain.errors import ConfigError, did_you_mean
from functrain.lora.config import ALL_LINEAR, LoRA
from functrain.lora.layers import (
    Adapted,
    adapted,
    is_adaptable,
    never_called,
    read_by_kernels,
    row_norms,
    unfit,
)
from functrain.trees import Tensors, owning
from functrain.trees import whole as whole_of

_ADAPTER = "functrain_adapter"


@attrs.frozen(eq=False)
class Adapter:
    """What an architecture was adapted with: the layers by name, and the original architecture."""

    lora: LoRA
    layers: tuple[str, ...]
    base: nn.Module = attrs.field(repr=False)


def attach(
    architecture: nn.Module,
    params: Mapping[str, Tensor],
    lora: LoRA | None = None,
    *,
    seed: int = 0,
) -> tuple[nn.Module, Tensors]:
    """Put adapters into an architecture: `(adapted architecture, params of the adapters)`.

    The adapted one is a copy that holds `params`, the frozen base, as they are (they are not copied
    and nobody may write into them); the given one stays as it was. Only the adapters, `….lora_A`
    and `….lora_B` in float32, and what `lora.train` names are trained, checkpointed and moved: a
    state knows its base and their scale by a fingerprint, and is refused over others. B starts at
    0, so that the model starts as the base.

    Where `params` are in shards (`functrain.distributed.shard` or `split`), so is the base, for a
    step that is `sharded`; every worker must call this.

    The base computes in its own dtype, which a step's precision does not change: read it as
    bfloat16 where that is wanted. Several states of one adapted architecture share its base.

    Raises `ConfigError` for a pattern that matches no linear layer, for an architecture that has
    adapters already, and for a layer whose weight is tied to another parameter, that is more than a
    weight and a bias (a parametrized one), or whose weight another module reads without calling it
    (the `out_proj` of an `nn.MultiheadAttention`, Mamba's `dt_proj`). A layer's hooks become those
    of the adapted one: they are around layer and adapter.
    """
    lora = LoRA() if lora is None else lora
    if not isinstance(lora, LoRA):
        raise ConfigError(f"lora: {lora!r}, expected functrain.lora.LoRA(rank=8, …)")
    check_module(architecture)
    if held_by(architecture) is not None:
        raise ConfigError(
            "lora: the architecture has adapters already; merge them first: "
            "functrain.lora.merged(architecture, params)"
        )
    check_fit(params, slots(architecture).params, "params")
    made = copy.deepcopy(architecture)
    layers = _adapt(made, lora)
    trained = _trained(lora, params)
    if isinstance(params, Tensors):
        owning(params, ())  # a step that donates them works on copies from now on
    held = {name: value for name, value in params.items() if name not in trained}
    hold(made, held, scale=lora.scaling)
    for name, parameter in made.named_parameters():
        parameter.requires_grad_(name in trained or name.rsplit(".", 1)[-1].startswith("lora_"))
    object.__setattr__(made, _ADAPTER, Adapter(lora, tuple(layers), architecture))
    first = {**_initial(layers, params, seed), **{n: params[n].detach().clone() for n in trained}}
    return made, owning(Tensors(first))


def adapter_of(architecture: nn.Module) -> Adapter:
    """What an architecture was adapted with; `ConfigError` where it was not."""
    found = vars(architecture).get(_ADAPTER)
    if not isinstance(found, Adapter):
        raise ConfigError(
            "lora: the architecture has no adapters; functrain.lora.attach(architecture, params) "
            "makes one that has"
        )
    return found


def is_adapted(architecture: nn.Module) -> bool:
    """Whether an architecture has adapters."""
    return isinstance(vars(architecture).get(_ADAPTER), Adapter)


def layers_of(architecture: nn.Module) -> dict[str, Adapted]:
    """The adapted layers of an architecture by name."""
    found = dict(architecture.named_modules())
    layers = {name: found[name] for name in adapter_of(architecture).layers}
    return {name: each for name, each in layers.items() if isinstance(each, Adapted)}


def matching(architecture: nn.Module, patterns: tuple[str, ...]) -> list[str]:
    """The names of the linear layers that the patterns match, in the architecture's order."""
    linear = {
        name: module
        for name, module in architecture.named_modules()
        if name and is_adaptable(module)
    }
    tied = _tied_weights(architecture)
    never, kernels = never_called(architecture), read_by_kernels(architecture)
    shown = getattr(architecture, "get_output_embeddings", None)
    head = shown() if callable(shown) else None
    chosen: set[str] = set()
    for pattern in patterns:
        if pattern == ALL_LINEAR:
            found = [
                name
                for name, each in linear.items()
                if each is not head and _weight(each) not in tied and name not in never | kernels
            ]
        else:
            found = [name for name in linear if matches(name, pattern)]
            _refuse_unfit(architecture, pattern, found)
        if not found:
            missed = _missed(architecture, pattern, linear)
            raise ConfigError(f"lora targets: no linear layer's name {missed}")
        _refuse_passed_by(found, never)
        chosen.update(found)
    return [name for name in linear if name in chosen]


def _refuse_unfit(architecture: nn.Module, pattern: str, found: list[str]) -> None:
    """Refuse layers that are more than linear where they are named, not as one match of many."""
    if found and any(each in pattern for each in "*?["):
        return
    for name, module in architecture.named_modules():
        if name and matches(name, pattern) and (reason := unfit(module)) is not None:
            raise ConfigError(
                f"lora targets: {name} cannot be adapted: {reason}; leave it out, as 'all-linear' "
                "does"
            )


def _refuse_passed_by(names: list[str], passed: set[str]) -> None:
    name = next((each for each in names if each in passed), None)
    if name is not None:
        raise ConfigError(
            f"lora targets: {name} is never called, since the module around it computes with its "
            "weight, so that an adapter would have no effect; leave it out, as 'all-linear' does"
        )


def matches(name: str, pattern: str) -> bool:
    """Whether a shell pattern matches a name, or the end of it after a dot."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def _missed(architecture: nn.Module, pattern: str, linear: Mapping[str, object]) -> str:
    modules = {name: module for name, module in architecture.named_modules() if name}
    if pattern == ALL_LINEAR:
        others = [n for n, m in modules.items() if isinstance(m, nn.Linear) and n not in linear]
    else:
        others = [name for name in modules if matches(name, pattern)]
    if others:
        kind, reason = type(modules[others[0]]).__name__, unfit(modules[others[0]])
        own = f", and {reason}" if reason else ", which has a forward of its own"
        own = own if pattern == ALL_LINEAR else ""
        return f"matches {pattern!r}: {others[0]} is {kind}{own}"
    ends = {name.rsplit(".", 1)[-1] for name in linear}
    return f"matches {pattern!r}; {did_you_mean(pattern.rsplit('.', 1)[-1], ends)}"


def _adapt(architecture: nn.Module, lora: LoRA) -> dict[str, Adapted]:
    """Put adapted layers in place of the targets, wherever they are."""
    names = matching(architecture, lora.targets)
    modules = dict(architecture.named_modules())
    tied = _tied_weights(architecture)
    made: dict[int, Adapted] = {}
    for name in names:
        layer = modules[name]
        if _weight(layer) in tied:
            raise ConfigError(
                f"lora targets: {name}'s weight is tied to another parameter, which merging would "
                "change too; leave it out"
            )
        made[id(layer)] = adapted(layer, lora)
    for module in list(architecture.modules()):
        for key, child in module._modules.items():
            if id(child) in made:
                module._modules[key] = made[id(child)]
    return {name: made[id(modules[name])] for name in names}


def _tied_weights(architecture: nn.Module) -> set[int]:
    """The parameters that are in several places; a module on several paths counts as one."""
    places = slots(architecture).params.values()
    return {id(at[0][0][at[0][1]]) for at in places if len(at) > 1}


def _weight(layer: nn.Module) -> int:
    return id(layer._parameters["weight"])


def _trained(lora: LoRA, params: Mapping[str, Tensor]) -> set[str]:
    found: set[str] = set()
    for pattern in lora.train:
        names = {name for name in params if matches(name, pattern)}
        if not names:
            raise ConfigError(
                f"lora train: no parameter's name matches {pattern!r}; "
                f"{did_you_mean(pattern, params)}"
            )
        found |= names
    return found


def _initial(
    layers: Mapping[str, Adapted], params: Mapping[str, Tensor], seed: int
) -> dict[str, Tensor]:
    """A is uniform as `nn.Linear`'s initial weight is, B zero; DoRA's magnitudes are those of W.

    Each A has a key of its own name, so that it does not depend on which others there are.
    """
    found: dict[str, Tensor] = {}
    for name, layer in layers.items():
        weight = params[f"{name}.weight"]
        device = weight.device
        generator = torch.Generator().manual_seed(keys.derive(seed, "lora", name))
        rank, inputs = layer.lora_A.shape
        limit = 1 / math.sqrt(inputs)
        first = torch.empty(rank, inputs, dtype=torch.float32, device="cpu")
        first.uniform_(-limit, limit, generator=generator)
        found[f"{name}.lora_A"] = first.to(device)
        found[f"{name}.lora_B"] = torch.zeros(
            layer.lora_B.shape, dtype=torch.float32, device=device
        )
        if layer.lora_magnitude is not None:
            zero = torch.zeros((), dtype=torch.float32, device=device)
            norms = row_norms(layer.oriented(whole_of(weight)), zero)
            found[f"{name}.lora_magnitude"] = norms
    return found
