"""Optimizer state made of several tensors, such as the codes and scales of 8-bit moments.

Such a tensor is a wrapper around others (torch's `__tensor_flatten__` protocol). A state holds
plain tensors only, so that it can be compared, copied, saved and read anywhere: each inner tensor
is a slot of its own, `exp_avg:codes` and `exp_avg:scale` for `exp_avg`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import attrs
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_PART = ":"


def is_composite(value: object, param: Tensor) -> bool:
    """Whether a state tensor wraps others; not where the parameter itself is of that kind."""
    return is_traceable_wrapper_subclass(value) and not isinstance(param, type(value))


def parts(slot: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """The plain tensors of a composite, each under the name of its slot."""
    for inner in value.__tensor_flatten__()[0]:
        found = getattr(value, inner)
        if is_traceable_wrapper_subclass(found):
            yield from parts(f"{slot}{_PART}{inner}", found)
        else:
            yield f"{slot}{_PART}{inner}", found


def has_parts(slots: Iterable[str]) -> bool:
    """Whether any of the slots is a part of a composite."""
    return any(_PART in slot for slot in slots)


@attrs.frozen
class Form:
    """What a composite has besides its inner tensors: its class, context, size and stride."""

    kind: Any
    context: Any
    size: tuple[int, ...]
    stride: tuple[int, ...]
    inner: Mapping[str, Form | None]


def form(value: Any) -> Form | None:
    """The form of a composite; None for anything else. It holds no tensor."""
    if not is_traceable_wrapper_subclass(value):
        return None
    names, context = value.__tensor_flatten__()
    inner = {name: form(getattr(value, name)) for name in names}
    return Form(type(value), context, value.size(), value.stride(), inner)


def put_together(found: Mapping[str, Any], forms: Mapping[str, Form | None]) -> dict[str, Any]:
    """One parameter's state, with its composites of these forms reassembled from their parts.

    `KeyError` for a part that no form has, and for one that is missing.
    """
    plain = {slot: value for slot, value in found.items() if _PART not in slot}
    names = dict.fromkeys(slot.partition(_PART)[0] for slot in found if _PART in slot)
    return plain | {name: _made(name, found, forms[name]) for name in names}


def _made(slot: str, found: Mapping[str, Any], form: Form | None) -> Any:
    if form is None:
        return found[slot]
    inner = {name: _made(f"{slot}{_PART}{name}", found, own) for name, own in form.inner.items()}
    return form.kind.__tensor_unflatten__(inner, form.context, form.size, form.stride)
