"""What was found by trying a model, valid for as long as its config stays the same."""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

import attrs
from torch import Tensor, nn

Value = TypeVar("Value")


class Verdicts(Generic[Value]):
    """What is known of each architecture, by its config: with another config it is another model.

    The kind of attention and a soft cap may be set at any time. Steps and evaluations
    may alternate between two configs, so earlier ones are kept too.
    """

    def __init__(self) -> None:
        self._known: weakref.WeakKeyDictionary[nn.Module, list[tuple[Any, dict[Any, Value]]]] = (
            weakref.WeakKeyDictionary()
        )

    def of(self, architecture: nn.Module) -> dict[Any, Value]:
        """What is known of the architecture as it is now, to read and to add to; 5 µs."""
        config = getattr(architecture, "config", None)
        now = config if isinstance(config, Mapping) else _attributes(config) or {"": config}
        kept = self._known.setdefault(architecture, [])
        for config_then, found in kept:
            if _same(config_then, now):
                return found
        del kept[:-_KEPT]
        kept.append(({key: _copied(value) for key, value in now.items()}, {}))
        return kept[-1][1]


_KEPT = 7


@attrs.frozen(eq=False)
class _Then:
    """The attributes of an object at one time; equal to an object that has the same ones."""

    kind: type
    attributes: Mapping[str, Any]

    def __eq__(self, now: object) -> bool:
        return type(now) is self.kind and self.attributes == _attributes(now)

    def __hash__(self) -> int:
        return id(self)


def _same(then: object, now: object) -> bool:
    """Whether two configs are equal; within them Python compares identity before equality."""
    try:
        return bool(then == now)
    except Exception:  # arrays compare by element, and are not the same object
        return False


def _copied(value: Any) -> Any:
    """A value of a config, copied to compare later ones with."""
    try:
        return _parts(value)
    except Exception:  # it holds itself, or a property raises: it is compared by identity
        return value


def _parts(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _parts(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_parts(part) for part in value]
    if isinstance(value, tuple):
        return tuple(_parts(part) for part in value)
    if isinstance(value, set):
        return set(value)
    attributes = _attributes(value)
    if not attributes or _is_whole(value):
        return value
    return _Then(type(value), {name: _parts(part) for name, part in attributes.items()})


def _is_whole(value: object) -> bool:
    """Whether a value is compared by identity or by its own equality, as one with a hash is."""
    if isinstance(value, Tensor | nn.Module) or callable(value):
        return True
    kind = type(value)
    records = attrs.has(kind) or dataclasses.is_dataclass(kind)
    return not records and kind.__hash__ not in (None, object.__hash__)


def _attributes(value: object) -> Mapping[str, Any]:
    """What may change within an object: its attributes, including those in slots."""
    own = getattr(value, "__dict__", {})
    kind: Any = type(value)
    names = _slots(kind)
    if not names:
        return own
    return {**own, **{name: getattr(value, name) for name in names if hasattr(value, name)}}


@functools.lru_cache(maxsize=256)
def _slots(kind: type) -> tuple[str, ...]:
    found: list[str] = []
    for cls in kind.__mro__:
        names = vars(cls).get("__slots__", ())
        found += [names] if isinstance(names, str) else names
    return tuple(name for name in found if name not in ("__dict__", "__weakref__"))
