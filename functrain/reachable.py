"""Tensors reachable from a module's attributes, besides its registered slots.

A forward may take a tensor from a list, a closure, an object or an unregistered module. These are
searched without running any of their code: no property, no iterator.
"""

from __future__ import annotations

import collections
import functools
import itertools
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor, nn

# Bounds, since attributes may lead to a data set or to most of the program.
_DEEPEST, _MOST = 10, 100_000

_SLOTS = ("_parameters", "_buffers", "_modules")
_NOTHING_WITHIN = (str, bytes, int, float, complex, type(None), type, types.ModuleType)
_CONTAINERS = (list, tuple, set, frozenset, collections.deque)
_OFTEN_EMPTY = frozenset({dict, collections.OrderedDict, set, list})
_METHODS = (types.MethodType, types.BuiltinMethodType, types.MethodWrapperType)
# Not searched: a logger leads to all others, and a thread to what runs in it.
_CLOSED = frozenset({*sys.stdlib_module_names, "torch", "numpy"}) - {"__main__"}


def beside_slots(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors that attributes of a module and its submodules lead to, each with the attribute.

    It searches containers, functions and what they close over, methods, `functools.partial`,
    attributes and `__slots__` of objects, and unregistered modules, but no other objects of classes
    of torch, NumPy and the standard library; to a depth of 10, and at most 100,000 objects.
    """
    seen = {id(each) for each in module.modules()}
    found = list(_attributes(module))
    left = _MOST
    for _ in range(_DEEPEST):
        deeper: list[tuple[str, object]] = []
        for where, value in found:
            if issubclass(type(value), Tensor):
                yield where, value  # type: ignore[misc]
            elif id(value) not in seen:
                seen.add(id(value))
                inner = itertools.islice(_within(value), max(left - len(deeper), 0))
                deeper += [(where, each) for each in inner if _may_hold(each)]
        found, left = deeper, left - len(deeper)


def _attributes(module: nn.Module) -> Iterator[tuple[str, object]]:
    for path, each in module.named_modules():
        for key, value in vars(each).items():
            if key in _SLOTS or not _may_hold(value):
                continue
            # Left out is what is remade from the slots: a recurrent layer's list of weights, and
            # the weight that torch.nn.utils.spectral_norm computes before each forward.
            listed = key == "_flat_weights" and isinstance(each, nn.RNNBase)
            if not listed and f"{key}_orig" not in each._parameters:
                yield f"{path}.{key}" if path else key, value


def _may_hold(value: Any) -> bool:
    kind = type(value)  # isinstance would also ask the object's __class__
    if kind in _OFTEN_EMPTY:  # most attributes of a module: its hooks
        return bool(value)
    return not issubclass(kind, _NOTHING_WITHIN)


def _within(value: Any) -> Iterable[object]:
    """What an object holds directly."""
    kind: Any = type(value)
    if issubclass(kind, types.FunctionType):
        return _of_function(value)
    if issubclass(kind, _METHODS):
        return (value.__self__, getattr(value, "__func__", None))
    if issubclass(kind, functools.partial):
        return (value.func, *value.args, *value.keywords.values())
    return itertools.chain(_contents(value, kind), (get(value) for get in _getters(kind)))


def _of_function(function: types.FunctionType) -> Iterator[object]:
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    yield vars(function)
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not assigned yet
            continue


def _contents(value: Any, kind: type) -> Iterable[object]:
    if issubclass(kind, dict):
        return dict.values(value)
    for each in _CONTAINERS:
        if issubclass(kind, each):
            return each.__iter__(value)
    return ()


@functools.lru_cache(maxsize=1024)
def _getters(kind: type) -> tuple[Callable[[Any], object], ...]:
    """Readers of the attributes of objects of a kind: of `__dict__`, and of each slot."""
    plain = kind is types.SimpleNamespace or issubclass(kind, nn.Module)
    if not plain and str(kind.__module__).partition(".")[0] in _CLOSED:
        return ()
    members = [each for cls in kind.__mro__ for each in vars(cls).values()]
    slots = [each for each in members if isinstance(each, types.MemberDescriptorType)]
    return (_own_dict, *(functools.partial(_slot, each) for each in slots))


def _own_dict(value: object) -> object:
    try:
        return object.__getattribute__(value, "__dict__")
    except AttributeError:
        return None


def _slot(member: types.MemberDescriptorType, value: object) -> object:
    try:
        return member.__get__(value)
    except AttributeError:  # not assigned yet
        return None
