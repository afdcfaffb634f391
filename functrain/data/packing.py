"""Packing: documents side by side in rows of `time` tokens, so that little is padding."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Sequence

import attrs
import numpy as np
import numpy.typing as npt
import torch

from functrain.data.sequences import Chats
from functrain.data.source import Batch, at_least_one
from functrain.data.text import IGNORE_INDEX, check_time, checked_ids, encoded
from functrain.data.token_files import Ids
from functrain.data.tokenizers import Tokenizer
from functrain.data.truncation import Counted
from functrain.errors import DataError

Lengths = npt.NDArray[np.int64]


def pack(lengths: Sequence[int] | Ids, time: int) -> list[list[int]]:
    """Bins of indices whose lengths sum to at most `time`: best-fit decreasing.

    The longest first, each into the bin that it leaves the least room in, or into a new one (Ding
    et al., 2404.10830). A function of its arguments, in O(n log n + n log time); it takes at most
    11/9 of the fewest possible bins, plus 4 (Johnson et al. 1974).

    Raises `DataError` for a length that is not an integer in [1, `time`].
    """
    at_least_one("time", time)
    sizes = _checked(lengths, time)
    rooms = _Rooms(time)
    bins: list[list[int]] = []
    for index in np.argsort(-sizes, kind="stable").tolist():
        length = int(sizes[index])
        room, number = rooms.take(length) or (time, len(bins))
        if number == len(bins):
            bins.append([])
        bins[number].append(index)
        rooms.put(room - length, number)
    return bins


def _checked(lengths: Sequence[int] | Ids, time: int) -> Lengths:
    sizes = np.asarray(lengths)
    if sizes.ndim != 1 or (sizes.size and sizes.dtype.kind not in "iu"):
        raise DataError(f"lengths: {sizes.dtype}{list(sizes.shape)}, expected integers [documents]")
    bad = np.flatnonzero((sizes < 1) | (sizes > time))
    if len(bad):
        at = int(bad[0])
        raise DataError(
            f"lengths: {sizes[at]} at {at}, expected [1, {time}]; cut what is longer than "
            f"time={time}, and leave out what is empty"
        )
    return sizes.astype(np.int64)


class _Rooms:
    """Bins by the room that is left in them; the tightest that fits is found in O(log time)."""

    def __init__(self, time: int) -> None:
        self._bins: defaultdict[int, list[int]] = defaultdict(list)
        # A tree over all rooms, in an array like a heap: whether a bin is at or under each node.
        self._leaves = 1 << time.bit_length()
        self._any = bytearray(2 * self._leaves)

    def put(self, room: int, number: int) -> None:
        self._bins[room].append(number)
        self._mark(room)

    def take(self, length: int) -> tuple[int, int] | None:
        """Take the tightest bin with room for `length`: its room and number; None if none has."""
        room = self._tightest(length)
        if room is None:
            return None
        number = self._bins[room].pop()
        self._mark(room)
        return room, number

    def _tightest(self, length: int) -> int | None:
        node = self._leaves + length
        while not self._any[node]:
            while node % 2:  # nothing under this parent is to the right of it
                node //= 2
            if not node:
                return None
            node += 1
        while node < self._leaves:
            node = 2 * node + (not self._any[2 * node])
        return node - self._leaves

    def _mark(self, room: int) -> None:
        node, found = self._leaves + room, bool(self._bins[room])
        while node and self._any[node] != found:
            self._any[node] = found
            node //= 2
            found = found or bool(node and (self._any[2 * node] or self._any[2 * node + 1]))


@attrs.frozen(kw_only=True)
class Packing:
    """What became of the documents that were packed; `str()` says it in one line.

    `documents` fill `packs` rows of `time` with `tokens` in all. `cut` of them are longer than a
    row and come in `pieces`, each beginning with the last token of the one before. `empty` others,
    without anything to predict, are left out.
    """

    documents: int
    cut: int = 0
    pieces: int = 0
    empty: int = 0
    packs: int
    tokens: int
    time: int

    @property
    def padding(self) -> float:
        """The fraction of the rows that is padding."""
        return 1 - self.tokens / (self.packs * self.time)

    def __str__(self) -> str:
        text = f"{self.documents:,} documents"
        if self.cut:
            text += f" ({self.cut:,} longer than {self.time} tokens, in {self.pieces:,} pieces)"
        text += f" in {self.packs:,} packs of {self.time} tokens, {1 - self.padding:.1%} filled"
        return f"{text}; {self.empty:,} without a target left out" if self.empty else text


@attrs.frozen(kw_only=True, eq=False)
class Packed(Counted):
    """Rows of `time` tokens with several documents in each, told apart by `position_ids`.

    A sample is a row. Rows are packed once: every epoch has the same ones, in another order. So the
    epochs are equally long, and any position is found without packing what comes before it; as the
    documents of a row do not see each other, it matters little which of them share one.

    `ids`, `labels`: integers [tokens], in which document d is the `lengths[d]` tokens from
    `begins[d]` on. `packs`: the documents of each row. `packing` says how full the rows are, and
    `origin` what they were read from, where that is known.
    """

    ids: Ids = attrs.field(repr=False)
    labels: Ids = attrs.field(repr=False)
    begins: Lengths = attrs.field(repr=False)
    lengths: Lengths = attrs.field(repr=False)
    packs: tuple[tuple[int, ...], ...] = attrs.field(repr=False)
    packing: Packing
    origin: tuple[str, ...] = attrs.field(default=(), repr=False)

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.packs)

    def collate(self, indices: list[int]) -> Batch:
        """`input_ids`, `labels`, `position_ids`: int64 [n, time], and no mask.

        Positions restart with each document, and the first label of each is −100: it would be
        predicted from another document. The end of a row that is not full is padding, with labels
        of −100 and position 0 throughout, so that each of its tokens is a sequence of its own.
        """
        input_ids = torch.zeros(len(indices), self.packing.time, dtype=torch.int64)
        labels = torch.full_like(input_ids, IGNORE_INDEX)
        position_ids = torch.zeros_like(input_ids)
        for row, index in enumerate(indices):
            end = 0
            for document in self.packs[index]:
                begin, length = int(self.begins[document]), int(self.lengths[document])
                given, place = slice(begin, begin + length), slice(end, end + length)
                input_ids[row, place] = torch.from_numpy(checked_ids(self.ids[given], begin))
                labels[row, place] = torch.from_numpy(self.labels[given].astype(np.int64))
                labels[row, end] = IGNORE_INDEX
                position_ids[row, place] = torch.arange(length)
                end += length
        return {"input_ids": input_ids, "labels": labels, "position_ids": position_ids}


def packed(source: Chats, *, time: int) -> Packed:
    """Pack the examples of a source into rows of `time` tokens; `batch_size` then counts rows.

    The loss of each example is what it is alone. Order, seed and `counts` are the source's.

    Raises `DataError` for an example of more than `time` tokens: cut them where they are read.
    """
    if not isinstance(source, Chats):
        raise DataError(
            f"packed: a {type(source).__name__}, expected what functrain.data.chat returns; texts "
            "are packed by functrain.data.packed_text"
        )
    if source.group_by_length:
        raise DataError("group_by_length: packs are all of one length; leave it out")
    at_least_one("time", time)
    if not len(source):
        raise DataError("packed: a source without examples; expected at least one")
    lengths = np.array([len(ids) for ids, _ in source.examples], dtype=np.int64)
    longest = int(lengths.argmax())
    if lengths[longest] > time:
        raise DataError(
            f"time: {time}, and example {longest} has {lengths[longest]} tokens; cut examples "
            f"where they are read: chat(..., time={time})"
        )
    packs = pack(lengths, time)
    return Packed(
        ids=_joined([ids for ids, _ in source.examples]),
        labels=_joined([labels for _, labels in source.examples]),
        begins=lengths.cumsum() - lengths,
        lengths=lengths,
        packs=tuple(map(tuple, packs)),
        packing=Packing(
            documents=len(lengths), packs=len(packs), tokens=int(lengths.sum()), time=time
        ),
        counts=source.counts,
        batch_size=source.batch_size,
        seed=source.seed,
        shuffle=source.shuffle,
    )


def packed_text(
    documents: Iterable[str],
    tokenizer: Tokenizer,
    *,
    time: int,
    batch_size: int,
    seed: int = 0,
    shuffle: bool = True,
) -> Packed:
    """Pack documents, each closed by the tokenizer's `end`, into rows of `time` tokens.

    Unlike in the rows of `text`, no document sees another. One of more than `time` tokens is cut
    into pieces that overlap by one token, so that every token but a document's first is predicted
    exactly once. Documents without a second token are left out, and counted.

    Raises `DataError` as `text` does.
    """
    check_time(time)
    ids, ends = encoded(documents, tokenizer)
    return packed_ids(ids, ends, time=time, batch_size=batch_size, seed=seed, shuffle=shuffle)


def packed_ids(
    ids: Ids, ends: Lengths, *, time: int, batch_size: int, seed: int = 0, shuffle: bool = True
) -> Packed:
    """Pack documents that are encoded: `ids`, integers [tokens], and where each one ends."""
    check_time(time)
    sizes = np.diff(ends, prepend=0)
    kept = np.flatnonzero(sizes > 1)
    if not len(kept):
        raise DataError(
            f"documents: {len(sizes)}, and none of at least 2 tokens; expected text to learn from"
        )
    spans = [(int(ends[d] - sizes[d]), int(sizes[d])) for d in kept]
    pieces = [piece for begin, size in spans for piece in _pieces(begin, size, time)]
    begins, lengths = np.array(pieces, dtype=np.int64).T
    packs = pack(lengths, time)
    cut = sizes[kept] > time
    return Packed(
        ids=ids,
        labels=ids,
        begins=begins,
        lengths=lengths,
        packs=tuple(map(tuple, packs)),
        packing=Packing(
            documents=len(kept),
            cut=int(cut.sum()),
            pieces=len(pieces) - int((~cut).sum()),
            empty=len(sizes) - len(kept),
            packs=len(packs),
            tokens=int(lengths.sum()),
            time=time,
        ),
        batch_size=batch_size,
        seed=seed,
        shuffle=shuffle,
    )


def _pieces(begin: int, size: int, time: int) -> list[tuple[int, int]]:
    """The begin and the length of each piece of a document."""
    return [(begin + at, min(time, size - at)) for at in range(0, size - 1, time - 1)]


def _joined(sequences: Sequence[Sequence[int]]) -> Lengths:
    total = sum(map(len, sequences))
    return np.fromiter(itertools.chain.from_iterable(sequences), dtype=np.int64, count=total)
