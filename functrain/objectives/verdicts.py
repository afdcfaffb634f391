"""What was found by trying a model, for as long as its config stays as it was then."""

from __future__ import annotations

import copy
import weakref
from typing import Any, Generic, TypeVar

from torch import nn

Value = TypeVar("Value")


class Verdicts(Generic[Value]):
    """What is known of each architecture, by its config: a change of that is another model.

    `use_cache`, the kind of attention and a soft cap may be set at any time. Steps and evaluations
    may take turns with two configs, so those before are kept too.
    """

    def __init__(self) -> None:
        self._known: weakref.WeakKeyDictionary[nn.Module, list[tuple[Any, dict[Any, Value]]]] = (
            weakref.WeakKeyDictionary()
        )

    def of(self, architecture: nn.Module) -> dict[Any, Value]:
        """What is known of it as it is now, to look up and to add to; 3 µs."""
        config = getattr(architecture, "config", None)
        now = getattr(config, "__dict__", config)
        kept = self._known.setdefault(architecture, [])
        for config_then, found in kept:
            if config_then == now:
                return found
        del kept[:-_KEPT]
        kept.append((_copied(now), {}))
        return kept[-1][1]


_KEPT = 7


def _copied(now: Any) -> Any:
    """A config's attributes, which later ones are compared with."""
    if not isinstance(now, dict):
        return now
    copied = {key: copy.deepcopy(value) if _holds(value) else value for key, value in now.items()}
    # What is not equal to its own copy is told by its identity.
    return copied if copied == now else dict(now)


def _holds(value: object) -> bool:
    return type(value) in (dict, list) or hasattr(value, "to_diff_dict")
