"""Gathering observations, which micro-batches need of each other, from every worker."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import attrs
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from functrain.distributed.exchange import hashed
from functrain.errors import ConfigError

_SIMPLE = (bool, int, float, str, type(None), enum.Enum, np.generic, torch.dtype, torch.device)
_EXCHANGE = "the exchange of observations"


class _Gathering(Protocol):
    @property
    def size(self) -> int: ...

    def gathered(self, tensor: Tensor, what: str) -> Tensor: ...


def gathered_observations(world: _Gathering, observed: Sequence[Any]) -> list[Any]:
    """The observations of all workers, those of worker 0 first.

    An observation is a tensor, [examples] or 0-d, or a record of such tensors, possibly nested: an
    attrs record, a dataclass, a tuple, a list, or a mapping (which comes back as a dict).
    Functions, texts and plain numbers in it are taken from this worker's own.

    Every worker must have the same number of them (for a tree, `World.part` has checked it), of the
    same form: names, dtypes, texts and plain numbers. Raises `ConfigError` otherwise, and for an
    observation without any tensor.
    """
    rows = [list(_tensors(each)) for each in observed]
    for each, row in zip(observed, rows, strict=True):
        if not row:
            raise ConfigError(_unknown(each, "without any tensor"))
    form = hashed("\n".join(map(_form, observed)).encode())
    told = world.gathered(torch.tensor([len(rows), form]), _EXCHANGE)
    if len(set(told[:, 0].tolist())) > 1:
        raise ConfigError(
            "micro-batches: the loss couples the examples of a batch, and the workers have "
            "different numbers of micro-batches; give each the same number"
        )
    if len(set(told[:, 1].tolist())) > 1:
        raise ConfigError(
            "observation: its names, dtypes, texts or plain numbers are other ones on one worker "
            "than on another; let observe return a record of one form, and what depends on the "
            "batch as tensors"
        )
    flat = [tensor.reshape(-1) for row in rows for tensor in row]
    own = torch.tensor([len(tensor) for tensor in flat], dtype=torch.int64)
    lengths = world.gathered(own, _EXCHANGE)
    longest = max(1, int(lengths.max())) if lengths.numel() else 1
    everyone: list[list[Tensor]] = []
    for index, tensor in enumerate(flat):
        every = world.gathered(pad(tensor, (0, longest - len(tensor))), _EXCHANGE)
        everyone.append([every[r, :n] for r, n in enumerate(lengths[:, index].tolist())])
    found: list[Any] = []
    for rank in range(world.size):
        parts = iter(each[rank] for each in everyone)
        found += [_rebuilt(each, parts) for each in observed]
    return found


def _inner(record: Any) -> Mapping[Any, Any] | None:
    """The members of a record, by name or index; None if it is not a record."""
    kind = type(record)
    if attrs.has(kind):
        return {f.name: getattr(record, f.name) for f in attrs.fields(kind) if f.init}
    if dataclasses.is_dataclass(kind):
        return {f.name: getattr(record, f.name) for f in dataclasses.fields(kind) if f.init}
    if isinstance(record, Mapping):
        return record
    if isinstance(record, (tuple, list)):
        return dict(enumerate(record))
    return None


def _tensors(record: Any) -> Iterator[Tensor]:
    if isinstance(record, Tensor):
        if record.ndim > 1:
            raise ConfigError(
                f"observation: a tensor of shape {list(record.shape)}; between workers an "
                "objective's observations are tensors [examples] or 0-d"
            )
        yield record.detach()
        return
    inner = _inner(record)
    if inner is None and not isinstance(record, _SIMPLE) and not callable(record):
        raise ConfigError(_unknown(record, "which may hold what only this worker has seen"))
    for each in (inner or {}).values():
        yield from _tensors(each)


def _unknown(given: Any, what: str) -> str:
    return (
        f"observation: a {type(given).__name__}, {what}; between workers let observe return "
        "tensors, [examples] or 0-d, or an attrs record, a dataclass, a tuple, a list or a mapping "
        "of them"
    )


def _form(record: Any) -> str:
    """What must be equal in an observation on every worker."""
    if isinstance(record, Tensor):
        return f"{record.dtype} {record.ndim}"
    inner = _inner(record)
    if inner is not None:
        parts = [f"{key!r}: {_form(each)}" for key, each in inner.items()]
        return f"{type(record).__qualname__} {parts}"
    return repr(record) if isinstance(record, _SIMPLE) else type(record).__qualname__


def _rebuilt(record: Any, parts: Iterator[Tensor]) -> Any:
    """`record` with its tensors replaced by the next `parts`."""
    if isinstance(record, Tensor):
        part = next(parts)
        return part if record.ndim else part.reshape(())
    inner = _inner(record)
    if inner is None:
        return record
    made = {key: _rebuilt(each, parts) for key, each in inner.items()}
    if attrs.has(type(record)):
        fields = [field for field in attrs.fields(type(record)) if field.init]
        return attrs.evolve(record, **{field.alias: made[field.name] for field in fields})
    if dataclasses.is_dataclass(type(record)):
        return dataclasses.replace(record, **made)
    if isinstance(record, Mapping):
        return made
    if hasattr(record, "_make"):  # a named tuple
        return type(record)._make(made.values())
    return type(record)(list(made.values()))
