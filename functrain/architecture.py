"""A module without its weights, and the context in which it has them again.

`split` takes the weights out of a module and leaves it on the meta device, as pure structure, so
that stale weights cannot be used by accident and memory is not held twice. `bound` puts values
into its parameter slots while a loss *and its gradient* are computed.
"""

from __future__ import annotations

import hashlib
import itertools
import threading
import weakref
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any, Literal, get_args

import attrs
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from functrain.checks import check_tensors
from functrain.errors import ArchitectureError, ConfigError, StateError, did_you_mean
from functrain.quirks import (
    caching,
    called_afresh,
    dynamic_rotary,
    refuse_scaling,
    submodules_called,
    uncached,
    write_error,
    written,
)
from functrain.separable import check_separable
from functrain.trees import Tensors, digest, in_order, is_sharded, owning, versions

Mode = Literal["train", "eval"]
Place = tuple[dict[str, Tensor | None], str]


@attrs.frozen(eq=False)
class Slots:
    """Where each named value of an architecture goes: all its slots, both of them for a tied pair.

    `trainable`: the parameters with `requires_grad`. `statistical`: the parameters of modules that
    keep running statistics (BatchNorm), which must keep the statistics' dtype. `uncast`: the
    buffers that keep their dtype where params are cast: those statistics, and non-persistent ones.
    `base`: what the architecture holds itself, see `Held.base`. `rotary`: modules that would
    remember the longest batch, and `caching`: configs that may ask for a cache of keys and values
    (`functrain.quirks`). `vacant`: slots of buffers that are None, and whether each is persistent.
    `every`: the slots of `params` and `buffers`. `shapes`: the shapes of `params`.
    """

    params: Mapping[str, tuple[Place, ...]]
    buffers: Mapping[str, tuple[Place, ...]]
    modules: tuple[nn.Module, ...]
    trainable: frozenset[str]
    statistical: frozenset[str]
    uncast: frozenset[str]
    base: str | None = None
    rotary: tuple[nn.Module, ...] = ()
    caching: tuple[Any, ...] = ()
    vacant: tuple[tuple[Place, bool], ...] = ()
    every: tuple[Place, ...] = attrs.field(init=False)
    shapes: Mapping[str, torch.Size] = attrs.field(init=False)

    @every.default
    def _every(self) -> tuple[Place, ...]:
        groups = (*self.params.values(), *self.buffers.values())
        return tuple(place for at in groups for place in at)

    @shapes.default
    def _shapes(self) -> dict[str, torch.Size]:
        return {name: _tensor_at(at).shape for name, at in self.params.items()}

    def take(self, params: Mapping[str, Tensor]) -> bool:
        """Whether the params pass `check_fit`, found in a fraction of its time."""
        values = params.values()
        found = all(isinstance(value, Tensor) and not value.is_meta for value in values)
        return found and {name: value.shape for name, value in params.items()} == self.shapes


@attrs.frozen
class Held:
    """The parameters that an architecture holds itself, as constants, and their fingerprint.

    They are the frozen base under adapters (`functrain.lora`), and not part of a state, which so
    stays small. `scale`: the factor of the adapters' product, since another factor makes another
    model of the same names and shapes.
    """

    names: frozenset[str]
    fingerprint: str
    sharded: bool = False
    scale: float | None = None

    @property
    def base(self) -> str:
        """The text by which a state identifies it."""
        return (
            self.fingerprint if self.scale is None else f"{self.fingerprint} scale={self.scale!r}"
        )


_HELD = "functrain_held"


# All users of an architecture share its slots: one binding at a time, others wait.
_locks: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()


def split(module: nn.Module) -> tuple[nn.Module, Tensors, Tensors]:
    """Take the weights out of `module`: `(architecture, params, buffers)`.

    The architecture is `module` itself, now on the meta device. `params` and `buffers` are its
    tensors by their own names; only tensors that are not contiguous are copied, into the layout in
    which a checkpoint reads them. A tied parameter has one name, its first. Non-persistent buffers
    are included, since the forward needs them.

    Raises `ArchitectureError` for a module on the meta device, lazy parameters that have no shape
    yet, parameters that share storage without being the same parameter, parameters with hooks on
    their gradients, a buffer over a parameter's memory, and an embedding with `max_norm`. Warns
    (`FunctrainWarning`) if an attribute (a list, a closure, an object) leads to a trainable
    parameter or a buffer, and if different buffers share memory.
    """
    params, buffers = values_of(module)
    _refuse_meta({**params, **buffers})
    emptied(module)
    ours = Tensors({name: in_order(tensor.detach()) for name, tensor in params.items()})
    return module, owning(ours), Tensors({n: in_order(t.detach()) for n, t in buffers.items()})


def values_of(module: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The parameters and buffers in a module's slots, by name."""
    if not isinstance(module, nn.Module):
        raise ArchitectureError(f"split: expected an nn.Module, got {type(module).__name__}")
    if type(module).__module__.startswith("torch.jit"):
        raise ArchitectureError(
            "split: a module of torch.jit, whose weights cannot be exchanged; give the nn.Module "
            "that it was made of"
        )
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if is_lazy(tensor):
            raise ArchitectureError(
                f"{name}: it has no shape before the module's first call; call the module once on "
                "a batch, or give its layers their sizes"
            )
    places = slots(module)
    params = {name: _tensor_at(at) for name, at in places.params.items()}
    return params, {name: _tensor_at(at) for name, at in places.buffers.items()}


def emptied(module: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Put a module's slots on the meta device; returns what was in them, as `values_of` does."""
    params, buffers = values_of(module)
    check_separable(module, params, buffers)
    places = slots(module)
    # All are made before the first slot is filled, so a module that is refused keeps its weights.
    empty: dict[str, Tensor] = {
        name: nn.Parameter(_empty(name, tensor), requires_grad=tensor.requires_grad)
        for name, tensor in params.items()
    }
    empty |= {name: _empty(name, tensor) for name, tensor in buffers.items()}
    for name, at in (*places.params.items(), *places.buffers.items()):
        fill(at, empty[name])
    return params, buffers


def _empty(name: str, tensor: Tensor) -> Tensor:
    try:
        return torch.empty_like(tensor, device="meta")
    except (NotImplementedError, RuntimeError) as error:
        raise ArchitectureError(
            f"{name}: a tensor that has no form without values (dtype {tensor.dtype}, layout "
            f"{tensor.layout}); make it a plain one before functrain.split, or keep it as an "
            "attribute that is neither parameter nor buffer"
        ) from error


def held_by(architecture: nn.Module) -> Held | None:
    """What an architecture holds itself, or None."""
    found: Held | None = vars(architecture).get(_HELD)
    return found


def held_values(architecture: nn.Module) -> Tensors:
    """The parameters that an architecture holds itself, by name; they must not be written to."""
    held = held_by(architecture)
    if held is None:
        return Tensors()
    places = _places(architecture, "_parameters")
    return Tensors({name: _tensor_at(places[name]).detach() for name in held.names})


def hold(architecture: nn.Module, values: Mapping[str, Tensor], *, scale: float | None) -> None:
    """Have an architecture hold these values of its parameters itself, without a copy.

    `scale`: that of the adapters over them, if there are any; see `Held`.
    """
    places = _places(architecture, "_parameters")
    for name, value in values.items():
        fill(places[name], nn.Parameter(value.detach(), requires_grad=False))
    held = held_by(architecture)
    names = frozenset(values) | (frozenset() if held is None else held.names)
    tensors = {name: _tensor_at(places[name]) for name in sorted(names)}
    shards = [is_sharded({name: tensor}) for name, tensor in tensors.items()]
    if any(shards) and not all(shards):
        raise StateError(
            "params: some are in shards and some are whole; give all in shards "
            "(functrain.distributed.shard(params, world)), or all whole"
        )
    hasher = hashlib.sha256()
    for name, tensor in tensors.items():
        hasher.update(f"{name}\0{digest(tensor)}\0".encode())
    found = Held(names, hasher.hexdigest(), any(shards), scale)
    object.__setattr__(architecture, _HELD, found)


def holds_shards(architecture: nn.Module) -> bool:
    """Whether what an architecture holds itself is sharded."""
    held = held_by(architecture)
    return held is not None and held.sharded


def _has_whole(architecture: nn.Module, places: Slots) -> bool:
    """Whether every sharded value that is held has its slots in `places`, to be replaced."""
    held = held_by(architecture)
    return held is None or not held.sharded or held.names <= places.params.keys()


def check_module(architecture: object) -> None:
    """Raise `ArchitectureError` unless `architecture` is an `nn.Module`."""
    if not isinstance(architecture, nn.Module):
        raise ArchitectureError(
            f"architecture: expected the nn.Module that functrain.split returns first, got "
            f"{type(architecture).__name__}"
        )


def slots(architecture: nn.Module, *, held: bool = False) -> Slots:
    """Find every slot of every parameter and buffer; names are those of `named_parameters()`.

    Parameters that the architecture holds itself are left out, unless `held`. Raises
    `ArchitectureError` for an embedding with `max_norm`.
    """
    check_module(architecture)
    params = _places(architecture, "_parameters")
    own = held_by(architecture)
    if own is not None and not held:
        params = {name: at for name, at in params.items() if name not in own.names}
    buffers = _places(architecture, "_buffers")
    trainable = frozenset(n for n, at in params.items() if _tensor_at(at).requires_grad)
    modules = tuple(architecture.modules())
    refuse_scaling(architecture)
    keeping = [module for module in modules if "running_mean" in module._buffers]
    tables = {id(module._parameters) for module in keeping}
    statistical = frozenset(
        name for name, at in params.items() if any(id(entries) in tables for entries, _ in at)
    )
    passing = {(id(m._buffers), key) for m in modules for key in m._non_persistent_buffers_set}
    passing |= {(id(m._buffers), key) for m in keeping for key in m._buffers}
    uncast = frozenset(
        name for name, at in buffers.items() if any((id(e), key) in passing for e, key in at)
    )
    base = None if own is None else own.base
    rotary, configs = dynamic_rotary(modules), caching(modules)
    vacant = tuple(
        ((module._buffers, key), key not in module._non_persistent_buffers_set)
        for module in modules
        for key, buffer in module._buffers.items()
        if buffer is None
    )
    return Slots(
        params, buffers, modules, trainable, statistical, uncast, base, rotary, configs, vacant
    )


def _places(architecture: nn.Module, table: str) -> dict[str, tuple[Place, ...]]:
    first_name: dict[int, str] = {}
    found: dict[str, tuple[Place, ...]] = {}
    for prefix, module in architecture.named_modules():
        entries: dict[str, Tensor | None] = getattr(module, table)
        for key, tensor in entries.items():
            if tensor is None:
                continue
            name = first_name.setdefault(id(tensor), f"{prefix}.{key}" if prefix else key)
            found[name] = (*found.get(name, ()), (entries, key))
    return dict(sorted(found.items()))


def _tensor_at(places: tuple[Place, ...]) -> Tensor:
    entries, key = places[0]
    tensor = entries[key]
    assert tensor is not None  # `_places` leaves empty slots out
    return tensor


def fill(places: Sequence[Place], tensor: Tensor | None) -> None:
    """Put a tensor into every slot of one name."""
    for entries, key in places:
        entries[key] = tensor


def _refuse_meta(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.device.type == "meta":
            raise ArchitectureError(
                f"{name}: on the meta device, so there are no weights to take out; "
                "split a module that has its weights (was it split already?)"
            )


def check_names(
    given: Mapping[str, Tensor], expected: Mapping[str, object], what: str, hint: str
) -> None:
    """Raise `ArchitectureError` unless the names of `given` are those of `expected`."""
    if given.keys() == expected.keys():
        return
    missing = [name for name in expected if name not in given]
    unknown = [name for name in given if name not in expected]
    parts = []
    if missing:
        parts.append(f"missing {_some(missing)}")
    if unknown:
        near = did_you_mean(unknown[0], missing or expected)
        parts.append(f"unexpected {_some(unknown)} ({near})")
    raise ArchitectureError(f"{what}: {'; '.join(parts)}; {hint}")


def check_fit(
    values: Mapping[str, Tensor], places: Mapping[str, tuple[Place, ...]], what: str
) -> None:
    """Raise unless `values` are tensors with the names and shapes of `places`, and not on meta."""
    if not isinstance(values, Mapping):
        raise StateError(
            f"{what}: expected a mapping from names to tensors, as functrain.split returns it, got "
            f"{type(values).__name__}"
        )
    _refuse_tied(values, places, what)
    check_names(values, places, what, "they belong to another architecture")
    for name, ((entries, key), *_) in places.items():
        slot, value = entries[key], values[name]
        if not isinstance(value, Tensor):
            raise StateError(f"{what}/{name}: expected a tensor, got {type(value).__name__}")
        if slot is not None and value.shape != slot.shape:
            raise StateError(
                f"{what}/{name}: shape {list(value.shape)}, expected {list(slot.shape)}; they "
                "belong to another architecture"
            )
        if value.is_meta:
            raise StateError(
                f"{what}/{name}: on the meta device, so it has no values; take them with "
                "functrain.split(model)[1], before anything else is done with the model"
            )


def check_reference(values: Mapping[str, Tensor], places: Mapping[str, tuple[Place, ...]]) -> None:
    """Raise unless `values` can be the params of a reference: as `check_fit`, by dtype too.

    Where a parameter is floating another floating dtype is cast; integers would be codes of a
    quantised model.
    """
    check_fit(values, places, "reference")
    for name, ((entries, key), *_) in places.items():
        slot, value = entries[key], values[name]
        if slot is not None and slot.is_floating_point() and not value.is_floating_point():
            raise StateError(
                f"reference/{name}: dtype {value.dtype}, expected a floating one as {slot.dtype}; "
                "give params that are not quantised"
            )


def _refuse_tied(
    values: Mapping[str, Tensor], places: Mapping[str, tuple[Place, ...]], what: str
) -> None:
    """Refuse both names of a tied parameter, as a `state_dict` has them; `split` has the first."""
    if places.keys() - values.keys():
        return
    for name in sorted(values.keys() - places.keys()):
        key, tensor = name.rsplit(".", 1)[-1], values[name]
        for first, at in places.items():
            tied = any(key == slot for _, slot in at[1:])
            if tied and getattr(tensor, "shape", None) == values[first].shape:
                raise ArchitectureError(
                    f"{what}: unexpected {name!r}, which is tied to {first!r}; take "
                    "functrain.split(model)[1], where a tied parameter has one name"
                )


def _some(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


@contextmanager
def bound(
    architecture: nn.Module,
    params: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    mode: Mode = "train",
    *,
    places: Slots | None = None,
    gathers: bool = False,
) -> Generator[nn.Module]:
    """A context in which `architecture` computes with these values, in train or eval mode.

    Take the loss *and the gradient* inside: under activation checkpointing the backward runs the
    forward again, and after the context has ended it would find other values (with
    `functional_call` around the forward alone, the loss was right and the gradient, silently, 13.7
    times wrong). The slots are swapped, not copied, which costs no memory. On exit, also after an
    exception, they hold what they held before. An architecture has one binding at a time: other
    threads wait.

    Buffers are bound as they are: a module that updates them in place (BatchNorm in train mode)
    updates what was passed, so pass clones where that matters. Buffers that are None are None again
    at the end. A model of transformers keeps no keys and values, whatever `config.use_cache` says,
    unless it is called with `use_cache=True`. `places`: `slots(architecture)`, if known, which
    saves the search. `gathers`: the caller gathers what the architecture holds in shards.

    Raises `ArchitectureError` if the names are not the architecture's or `params` are sharded, and
    on exit if the model has written into `params` (other than through `.data`, which leaves no
    trace) or has made a persistent buffer that was None; `ConfigError` for another `mode`.
    """
    check_mode(mode)
    check_tensors("params", params)
    check_tensors("buffers", buffers)
    if is_sharded(dict(itertools.islice(params.items(), 1))):
        raise ArchitectureError(
            "params: in shards, of which each worker has some rows; bind the whole, of "
            "functrain.distributed.gathered(params)"
        )
    places = slots(architecture) if places is None else places
    if not gathers and not _has_whole(architecture, places):
        raise ArchitectureError(
            "architecture: its base, under adapters, is in shards, of which each worker has some "
            "rows; train it by a step with sharded=True, or attach the adapters to the whole, of "
            "functrain.distributed.gathered(params)"
        )
    hint = "these values belong to another architecture"
    check_names(params, places.params, "params", hint)
    check_names(buffers, places.buffers, "buffers", hint)
    with (
        _locks.setdefault(architecture, threading.RLock()),
        submodules_called(),
        called_afresh(places.rotary),
        uncached(places.caching),
    ):
        begun = versions(params)
        before = [(entries, key, entries[key]) for entries, key in places.every]
        modes = [module.training for module in places.modules]

        def restore() -> None:
            for entries, key, tensor in before:
                entries[key] = tensor
            for (entries, key), _ in places.vacant:
                entries[key] = None
            for module, training in zip(places.modules, modes, strict=True):
                _set_mode(module, training)

        restored = False
        try:
            try:
                for name, at in places.params.items():
                    fill(at, params[name])
                for name, at in places.buffers.items():
                    fill(at, buffers[name])
                for module in places.modules:
                    _set_mode(module, mode == "train")
                yield architecture
                for name in written(params, begun):
                    raise write_error(name)
                _refuse_made(places)
            finally:
                restore()
                restored = True
        finally:
            if not restored:  # Ctrl-C while restoring
                restore()


def check_mode(mode: object, where: str = "") -> None:
    """Raise `ConfigError` for an unknown mode, which would silently turn dropout off."""
    if mode not in get_args(Mode):
        raise ConfigError(f"{where}mode: {mode!r}, expected 'train' or 'eval'")


def _refuse_made(places: Slots) -> None:
    """Refuse persistent buffers that the forward made; others (a mask) each binding makes anew."""
    for (entries, key), persistent in places.vacant:
        if persistent and entries.get(key) is not None:
            raise ArchitectureError(
                f"buffers: the forward made {key!r}, registered as None, which no state has; "
                "register it at its full size before functrain.split, or with persistent=False "
                "where each call can make it anew"
            )


Substitution = Callable[[Mapping[str, Tensor]], AbstractContextManager[Mapping[str, Tensor]]]
_substitution: ContextVar[Substitution | None] = ContextVar("substitution", default=None)


@contextmanager
def substitution(given: Substitution) -> Generator[None]:
    """A context in which `given` is the way to call a bound model with other params.

    `torch.func.functional_call` cannot do that if the bound params are sharded. `given(params)` is
    a context in which the model, when called, computes with `params`; it yields those of them that
    are whole inside.
    """
    token = _substitution.set(given)
    try:
        yield
    finally:
        _substitution.reset(token)


def current_substitution() -> Substitution | None:
    """The way to call a bound model with other params, if not `torch.func.functional_call`."""
    return _substitution.get()


def _set_mode(module: nn.Module, training: bool) -> None:
    # A module's setattr looks for parameters first, which is slow, and most modes stay the same.
    if module.training != training:
        module.training = training


def bound_buffers(places: Slots) -> dict[str, Tensor]:
    """Inside a binding, the buffers as they are now, updated in place or assigned anew."""
    for name, ((entries, key), *_) in places.buffers.items():
        if entries.get(key) is None:
            raise ArchitectureError(
                f"buffers/{name}: the forward left none, expected a tensor as before; keep what "
                "comes and goes outside of the buffers"
            )
    return {name: _tensor_at(at) for name, at in places.buffers.items()}


@contextmanager
def kept_buffers(places: Slots) -> Generator[None]:
    """A context inside a binding, at whose end the buffers are as they were at its beginning."""
    before = bound_buffers(places)
    for name, buffer in before.items():
        fill(places.buffers[name], buffer.clone())
    try:
        yield
    finally:
        for name, buffer in before.items():
            fill(places.buffers[name], buffer)
