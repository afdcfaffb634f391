"""What some modules do besides computing with their values, and what a binding does about it.

A bound model is a function of its params, its buffers and its arguments. Some modules of torch and
transformers are not so by themselves: they bypass their submodules, remember the longest batch,
keep keys and values that nobody asked for, or write into their own weights.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from functrain.errors import ArchitectureError
from functrain.trees import versions


class _Holder:
    """A token that keeps something off; weakly held, in case an interrupt leaves it behind."""


_holders: weakref.WeakSet[_Holder] = weakref.WeakSet()
_before = True


@contextmanager
def submodules_called() -> Generator[None]:
    """A context in which torch's transformer layers call their submodules in eval mode too.

    Their fast path reads the submodules' weights without calling them: adapters and hooks are
    bypassed, and the bits are not those of train mode. The switch is shared by all threads, so it
    is restored when the last of them leaves. No lock guards it, since an interrupt between two
    lines could leave that held for ever.
    """
    global _before
    own = _Holder()
    if not _holders:
        _before = torch.backends.mha.get_fastpath_enabled()
    try:
        _holders.add(own)
        torch.backends.mha.set_fastpath_enabled(False)
        yield
    finally:
        _holders.discard(own)
        if not _holders:
            torch.backends.mha.set_fastpath_enabled(_before)


def caching(modules: Iterable[nn.Module]) -> tuple[Any, ...]:
    """The configs of transformers' that may ask for a cache of keys and values (`use_cache`).

    Those of other models may be frozen, and mean something else by it.
    """
    configs = [getattr(module, "config", None) for module in modules]
    theirs = [each for each in configs if hasattr(each, "to_diff_dict")]
    found = {id(each): each for each in theirs if type(getattr(each, "use_cache", None)) is bool}
    return tuple(found.values())


# By the id of a config, which several architectures may share: who keeps its cache off, and the
# configs that asked for one. These stay until they ask again, in case of an interrupt before that.
_uncached: dict[int, weakref.WeakSet[_Holder]] = {}
_asked: dict[int, Any] = {}


@contextmanager
def uncached(configs: Iterable[Any]) -> Generator[None]:
    """A context in which models with these `caching` configs keep no keys and values unasked.

    A forward with a cache takes the tokens of a row for one sequence, whatever `position_ids` say;
    its keys are other memory, with which some attention has other last bits (GPT-2's, eager); and
    the second forward of a recomputed block would add to it again. `use_cache=True`, as an
    argument, still gives one.
    """
    own = _Holder()
    held = [(config, _uncached.setdefault(id(config), weakref.WeakSet())) for config in configs]
    try:
        for config, holders in held:
            holders.add(own)
            if config.use_cache:
                _asked[id(config)] = config
                config.use_cache = False
        yield
    finally:
        for config, holders in held:
            holders.discard(own)
            if not holders and id(config) in _asked:
                config.use_cache = True
                if holders:  # another thread has begun just now, and found it off
                    config.use_cache = False
                else:
                    _asked.pop(id(config), None)


def dynamic_rotary(modules: Iterable[nn.Module]) -> tuple[nn.Module, ...]:
    """Transformers' rotary embeddings that write a batch's frequencies into their buffers.

    "dynamic" keeps those of the longest length seen, "longrope" (Phi-3) those of the last one.
    """
    return tuple(m for m in modules if "max_seq_len_cached" in vars(m) and _is_dynamic(m))


def _is_dynamic(module: nn.Module) -> bool:
    kind: Any = getattr(module, "rope_type", "")  # or a dict, one for each kind of layer
    kinds = kind.values() if isinstance(kind, dict) else [kind]
    return any("dynamic" in each or each == "longrope" for each in kinds)


@contextmanager
def called_afresh(modules: Iterable[nn.Module]) -> Generator[None]:
    """A context in which each call of these `dynamic_rotary` modules is like their first.

    Their frequencies are then those of the length that they are called with, whatever came before,
    and the buffers that hold them stay as they are.
    """
    with ExitStack() as stack:
        for module in modules:
            own, usual = vars(module), module.forward
            restore = _forward_put_back(own, own.get("forward"))
            own["forward"] = _afresh(module, usual)
            stack.callback(restore)
        yield


def _forward_put_back(own: dict[str, Any], before: Any) -> Callable[[], None]:
    def restore() -> None:
        if before is None:
            own.pop("forward", None)
        else:
            own["forward"] = before

    return restore


_ORIGINAL, _LONGEST = "original_inv_freq", "max_seq_len_cached"


def _afresh(module: Any, forward: Callable[..., Any]) -> Callable[..., Any]:
    def called(*args: Any, **kwargs: Any) -> Any:
        before = dict(module._buffers)
        for name in before:
            if name.endswith(_ORIGINAL):
                # Each kind of layer may have its own, with a prefix.
                prefix = name.removesuffix(_ORIGINAL)
                module._buffers[f"{prefix}inv_freq"] = before[name].clone()
                setattr(module, f"{prefix}{_LONGEST}", module.original_max_seq_len)
        try:
            return forward(*args, **kwargs)
        finally:
            module._buffers.update(before)

    return called


def written(params: Mapping[str, Tensor], before: list[int]) -> list[str]:
    """The names of the params that were written to since these `versions`."""
    after = versions(params)
    if after == before:
        return []
    return [n for n, old, new in zip(params, before, after, strict=True) if old != new]


def refuse_scaling(architecture: nn.Module) -> None:
    """Raise `ArchitectureError` for an embedding with `max_norm`, which writes into its weight."""
    for name, module in architecture.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
            raise ArchitectureError(
                f"{name or type(module).__name__}: an embedding with max_norm writes into its "
                "weight as it is read, and a step changes nothing that it is given; set its "
                "max_norm to None, and scale what it returns in the forward"
            )


def write_error(name: str) -> ArchitectureError:
    """The error for a forward that wrote into a parameter."""
    return ArchitectureError(
        f"{name}: the model's forward wrote into this parameter, so that what it was given (a "
        "state's params, say) has other values now; a forward may write into buffers alone. "
        "Transformers' RWKV does it in eval mode unless model.config.rescale_every is 0: set that "
        "before functrain.split, or use functrain.models.from_pretrained, which does"
    )


def lost_error(name: str) -> ArchitectureError:
    """The error for a forward that replaced a parameter."""
    return ArchitectureError(
        f"{name}: the model's forward gave this parameter other values (`.data = …`, or a new "
        "nn.Parameter), which no state would have after the step; register what a forward moves as "
        "a buffer before functrain.split, or compute with the new values and leave the parameter"
    )
