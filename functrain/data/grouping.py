"""Sources whose batches are padded: how much of them is padding, and batches of similar lengths."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable
from typing import Self

import attrs

from functrain import keys
from functrain.data.order import permuted
from functrain.data.source import MapSource, at_least_one, positive, true_or_false
from functrain.data.truncation import Counted
from functrain.errors import DataError

Window = tuple[int, list[int]]
"""A position, and the samples from there on."""

MULTIPLE = 8
"""Rows are padded to a multiple of this many tokens unless a source says otherwise."""

_BATCHES = 50  # as the length-grouped sampler of transformers has it


def width(lengths: Iterable[int], multiple: int) -> int:
    """The width of rows of these lengths: the longest, rounded up to a multiple of `multiple`."""
    return -(-max(lengths) // multiple) * multiple


@attrs.frozen(kw_only=True, eq=False)
class Padded(Counted):
    """A source whose rows are padded to the longest of their batch.

    That length is rounded up to a multiple of `pad_to_multiple_of`: a step is compiled once for
    each width, so there should be few.

    With `group_by_length` the shuffled samples are sorted by length within windows of 50 batches,
    and the batches of each window are shuffled: there is less padding, but samples that come
    together are less random. The order is still a function of the position, and each sample comes
    once in an epoch; the batches of similar lengths are those of `batch_size` samples that begin at
    a multiple of it.

    Raises `DataError` for `group_by_length` without `shuffle`, which keeps the given order.
    """

    group_by_length: bool = attrs.field(default=False, validator=true_or_false)
    pad_to_multiple_of: int = attrs.field(default=MULTIPLE, validator=positive)

    def __attrs_post_init__(self) -> None:
        if self.group_by_length and not self.shuffle:
            raise DataError(
                "group_by_length: it orders what is shuffled, and shuffle=False keeps the given "
                "order; leave one of them out"
            )

    def sequences(self, index: int) -> tuple[tuple[int, ...], ...]:
        """The lengths of a sample's sequences; those in one tuple are padded to the same width."""
        raise NotImplementedError

    def index(self, position: int) -> int:
        """The sample at a position."""
        if not self.group_by_length:
            return MapSource.index(self, position)
        begin, samples = self._window(position)
        return samples[position - begin]

    def ordered(self) -> Self:
        """The same source in the given order."""
        return attrs.evolve(self, shuffle=False, group_by_length=False)

    def widths(self) -> list[int]:
        """The widths that batches can have."""
        every = itertools.chain.from_iterable(self.sequences(n) for n in range(len(self)))
        return sorted({width(lengths, self.pad_to_multiple_of) for lengths in every})

    def padding(self, batches: int = 256) -> float:
        """The fraction of the tokens in the first `batches` (an epoch at most) that is padding.

        Computed from lengths; no batch is made.
        """
        at_least_one("batches", batches)
        end = min(len(self), batches * self.batch_size)
        real = made = 0
        for begin in range(0, end, self.batch_size):
            samples = self.indices(begin, min(self.batch_size, end - begin))
            for together in zip(*map(self.sequences, samples), strict=True):
                lengths = list(itertools.chain.from_iterable(together))
                real += sum(lengths)
                made += len(lengths) * width(lengths, self.pad_to_multiple_of)
        return 1 - real / made

    def _window(self, position: int) -> Window:
        """The window that a position is in, cached: its neighbours are asked for next."""
        known = _windows.get(self)
        if known is None or not 0 <= position - known[0] < len(known[1]):
            # Windows end with the epoch, and at multiples of the batch size counted across epochs.
            epoch, size = position // len(self), _BATCHES * self.batch_size
            begin = max(epoch * len(self), position // size * size)
            end = min((epoch + 1) * len(self), (position // size + 1) * size)
            known = begin, self._grouped(begin, end)
            _windows[self] = known
        return known

    def _grouped(self, begin: int, end: int) -> list[int]:
        """The samples of a window: whole batches of similar lengths, in a random order."""
        samples = [MapSource.index(self, position) for position in range(begin, end)]
        samples.sort(key=lambda index: max(itertools.chain(*self.sequences(index))))
        # The parts of batches that two epochs share get the shortest samples.
        head = min(-begin % self.batch_size, len(samples))
        tail = (len(samples) - head) % self.batch_size
        whole = range(head + tail, len(samples), self.batch_size)
        key = keys.derive(self.seed, "window", begin)
        order = [whole[permuted(n, len(whole), key)] for n in range(len(whole))]
        mixed = [samples[at : at + self.batch_size] for at in order]
        return [*samples[:head], *itertools.chain(*mixed), *samples[head : head + tail]]


# For each source the window that was asked for last: a cache of what can be computed again.
_windows: weakref.WeakKeyDictionary[Padded, Window] = weakref.WeakKeyDictionary()
