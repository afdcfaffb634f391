"""What micro-batches need to know of each other, from every worker."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import attrs
import torch
from torch import Tensor
from torch.nn.functional import pad

from functrain.errors import ConfigError


class _Gathering(Protocol):
    @property
    def size(self) -> int: ...

    def gathered(self, tensor: Tensor, what: str) -> Tensor: ...


def gathered_observations(world: _Gathering, observed: Sequence[Any]) -> list[Any]:
    """The observations of all workers, those of worker 0 first.

    An observation is a tensor or an attrs record of them, each [examples] or 0-d; the workers have
    equally many, which `World.part` has seen to for those of a tree.
    """
    rows = [list(_tensors(each)) for each in observed]
    counts = torch.tensor([len(rows), *(len(t) for row in rows for t in row)], dtype=torch.int64)
    if len({*world.gathered(counts[:1], "the exchange of observations").flatten().tolist()}) > 1:
        raise ConfigError(
            "micro-batches: the loss couples the examples of a batch, and the workers have "
            "different numbers of micro-batches; give each the same number"
        )
    lengths = world.gathered(counts[1:], "the exchange of observations")
    longest = max(1, int(lengths.max())) if lengths.numel() else 1
    flat = [t.reshape(-1) for row in rows for t in row]
    everyone: list[list[Tensor]] = []
    for index, own in enumerate(flat):
        padded = pad(own, (0, longest - own.numel()))
        every = world.gathered(padded, "the exchange of observations")
        sizes = lengths[:, index].tolist()
        everyone.append([every[r, :n] for r, n in enumerate(sizes)])
    found: list[Any] = []
    for rank in range(world.size):
        parts = iter(each[rank] for each in everyone)
        found += [_rebuilt(each, parts) for each in observed]
    return found


def _tensors(record: Any) -> Iterator[Tensor]:
    if isinstance(record, Tensor):
        if record.ndim != 1:
            raise ConfigError(
                f"observation: a tensor of shape {list(record.shape)}; between workers an "
                "objective's observations are tensors [examples]"
            )
        yield record.detach()
    elif attrs.has(type(record)):
        for field in attrs.fields(type(record)):
            yield from _tensors(getattr(record, field.name))


def _rebuilt(record: Any, parts: Iterator[Tensor]) -> Any:
    """`record` with the next parts in the places of its tensors."""
    if isinstance(record, Tensor):
        return next(parts)
    if not attrs.has(type(record)):
        return record
    fields = [field for field in attrs.fields(type(record)) if field.init]
    changes = {field.alias: _rebuilt(getattr(record, field.name), parts) for field in fields}
    return attrs.evolve(record, **changes)
