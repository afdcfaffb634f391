"""Sources: data as a function of position, the same whoever asks and however often."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, Self

import attrs

from functrain import keys
from functrain.data.order import permuted
from functrain.errors import DataError

Batch = Mapping[str, Any]


class Source(Protocol):
    """What `functrain.train` reads: `at(position, n)` is a pure function."""

    @property
    def batch_size(self) -> int:
        """Samples in a batch unless the caller says otherwise."""
        ...

    def __len__(self) -> int:
        """Samples in an epoch."""
        ...

    def at(self, position: int, n: int) -> Batch:
        """Samples `position` to `position + n − 1`, counted over epochs without end."""
        ...


def at_least_one(name: str, value: object) -> None:
    """Raise `DataError` unless `value` is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise DataError(f"{name}: {value!r}, expected an integer of at least 1")


def positive(_: object, field: attrs.Attribute[int], value: int) -> None:
    """Raise `DataError` unless a field is an integer of at least 1."""
    at_least_one(field.name, value)


def check_boolean(name: str, value: object) -> None:
    """Raise `DataError` unless `value` is True or False: the text "false" would be true."""
    if not isinstance(value, bool):
        raise DataError(f"{name}: {value!r}, expected True or False")


def true_or_false(_: object, field: attrs.Attribute[bool], value: bool) -> None:
    """Raise `DataError` unless a field is True or False."""
    check_boolean(field.name, value)


def _integer(_: object, field: attrs.Attribute[int], value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise DataError(f"{field.name}: {value!r}, expected an integer")


@attrs.frozen(kw_only=True, eq=False)
class MapSource:
    """A source over samples with an index: subclasses give `__len__` and `collate`.

    Each epoch has an order of its own, a function of (`seed`, epoch); `shuffle=False` keeps the
    given one. Positions run on across the end of an epoch, so that no sample is lost there.
    """

    batch_size: int = attrs.field(validator=positive)
    seed: int = attrs.field(default=0, validator=_integer)
    shuffle: bool = attrs.field(default=True, validator=true_or_false)

    def __len__(self) -> int:
        """Samples in an epoch."""
        raise NotImplementedError

    def collate(self, indices: list[int]) -> Batch:
        """The batch of these samples."""
        raise NotImplementedError

    def index(self, position: int) -> int:
        """The sample at a position."""
        epoch, offset = divmod(position, len(self))
        if not self.shuffle:
            return offset
        return permuted(offset, len(self), keys.derive(self.seed, "epoch", epoch))

    def indices(self, position: int, n: int) -> list[int]:
        """The samples at `n` positions from `position` on."""
        return [self.index(p) for p in range(position, position + n)]

    def ordered(self) -> Self:
        """The same source in the given order."""
        return attrs.evolve(self, shuffle=False)

    def at(self, position: int, n: int) -> Batch:
        """The batch of `n` samples from `position` on; see `Source`.

        Raises `DataError` for an invalid position or count, and for an empty source.
        """
        if any(isinstance(x, bool) or not hasattr(x, "__index__") for x in (position, n)):
            raise DataError(f"at({position!r}, {n!r}): expected integers")
        if position < 0 or n < 1:
            raise DataError(f"at({position}, {n}): expected a position >= 0 and n >= 1")
        if not len(self):
            raise DataError("source: empty; give it at least one sample")
        return self.collate(self.indices(position, n))


def all_batches(
    source: Source, batch_size: int | None = None, *, limit: int | None = None
) -> list[Batch]:
    """The batches of a whole source once, in the given order, or of its first `limit` samples.

    For evaluation; the last batch may be shorter. A source of your own that is not a `MapSource` is
    read as it is, from position 0 on.
    """
    size = source.batch_size if batch_size is None else batch_size
    at_least_one("batch_size", size)
    if limit is not None:
        at_least_one("limit", limit)
    ordered = source.ordered() if isinstance(source, MapSource) else source
    total = len(source) if limit is None else min(limit, len(source))
    return [ordered.at(begin, min(size, total - begin)) for begin in range(0, total, size)]
