"""Running text for pretraining: documents, or files of token ids, cut into rows."""

from __future__ import annotations

import bisect
import contextlib
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import attrs
import numpy as np
import numpy.typing as npt
import torch

from functrain.checks import PathLike
from functrain.data.source import Batch, MapSource
from functrain.data.token_files import Ids, JoinedIds, mapped
from functrain.data.tokenizers import Tokenizer, check_tokenizer, ids_of
from functrain.errors import DataError

IGNORE_INDEX = -100


@attrs.frozen(kw_only=True, eq=False)
class TextRows(MapSource):
    """One stream of tokens in rows of `time`.

    Rows overlap by one token, so that every token but the first is predicted exactly once; the
    last row is filled up without targets. `input_ids`, `labels`: int64 [n, time]. `origin`: lines
    that say what it was read from, where that is known.
    """

    ids: Ids | JoinedIds = attrs.field(repr=False)
    time: int
    origin: tuple[str, ...] = attrs.field(default=(), repr=False)

    def __attrs_post_init__(self) -> None:
        check_time(self.time)
        if len(self.ids) < 2:
            raise DataError(f"tokens: {len(self.ids)} in all, expected at least 2")

    def __len__(self) -> int:
        """Rows in the stream."""
        return -(-(len(self.ids) - 1) // (self.time - 1))

    @property
    def padding(self) -> float:
        """The fraction of the rows that is padding, all of it at the end of the last one."""
        overlaps = len(self) - 1
        return 1 - (len(self.ids) + overlaps) / (len(self) * self.time)

    def first(self, limit: int | None) -> TextRows:
        """The same source over the first `limit` tokens, or over all."""
        if limit is None:
            return self
        ids = self.ids
        return attrs.evolve(
            self, ids=ids.first(limit) if isinstance(ids, JoinedIds) else ids[:limit]
        )

    def collate(self, indices: list[int]) -> Batch:
        """The rows at these indices."""
        ids = torch.zeros(len(indices), self.time, dtype=torch.int64)
        labels = torch.full_like(ids, IGNORE_INDEX)
        for row, index in enumerate(indices):
            begin = index * (self.time - 1)
            piece = torch.from_numpy(checked_ids(self.ids[begin : begin + self.time], begin))
            ids[row, : len(piece)] = piece
            labels[row, : len(piece)] = piece
        return {"input_ids": ids, "labels": labels}


def check_time(time: object) -> None:
    """Raise `DataError` unless rows of `time` tokens have a token and its target."""
    if isinstance(time, bool) or not isinstance(time, int) or time < 2:
        raise DataError(
            f"time: {time!r}, expected an integer of at least 2 (a token and its target)"
        )


def text(
    documents: Iterable[str],
    tokenizer: Tokenizer,
    *,
    time: int,
    batch_size: int,
    seed: int = 0,
    shuffle: bool = True,
) -> TextRows:
    """Documents as one stream, each closed by the tokenizer's `end`, in rows of `time` tokens."""
    ids, _ = encoded(documents, tokenizer)
    return TextRows(ids=ids, time=time, batch_size=batch_size, seed=seed, shuffle=shuffle)


def encoded(documents: Iterable[str], tokenizer: Tokenizer) -> tuple[Ids, npt.NDArray[np.int64]]:
    """Documents one after another, each closed by `end`: their ids, and where each one ends."""
    if isinstance(documents, str):
        raise DataError("documents: one string; expected several: [text]")
    if not isinstance(documents, Iterable):
        raise DataError(f"documents: expected a list of texts, got {type(documents).__name__}")
    check_tokenizer(tokenizer, "vocabulary")
    stream: list[int] = []
    ends: list[int] = []
    for number, given in enumerate(documents):
        # A dataset of texts gives records.
        document = given.get("text", given) if isinstance(given, Mapping) else given
        if not isinstance(document, str):
            raise DataError(
                f"document {number}: expected text, got {type(document).__name__}; give the "
                "records' text"
            )
        stream.extend(ended(document, tokenizer, f"document {number}"))
        ends.append(len(stream))
    ids = known_ids(stream, tokenizer, lambda at: f"document {bisect.bisect_right(ends, at)}")
    return ids, np.array(ends, dtype=np.int64)


def ended(text: str, tokenizer: Tokenizer, where: str) -> list[int]:
    """The ids of a text, and `end`; `DataError`, naming `where`, if they are no integers."""
    return [*ids_of(text, tokenizer, where), operator.index(tokenizer.end)]


def known_ids(ids: list[int], tokenizer: Tokenizer, where: Callable[[int], str]) -> Ids:
    """Ids in `id_type`; `DataError` for one beyond the vocabulary, placed by `where(its index)`."""
    vocabulary = tokenizer.vocabulary
    with contextlib.suppress(OverflowError):  # for ids beyond int64
        found = np.array(ids, dtype=np.int64)
        if not ids or (found.min() >= 0 and found.max() < vocabulary):
            return found.astype(id_type(tokenizer))
    at = next(n for n, each in enumerate(ids) if not 0 <= each < vocabulary)
    raise DataError(
        f"{where(at)}: the tokenizer gives ids up to {max(ids)} and down to {min(ids)}, and says "
        f"that its vocabulary is {vocabulary}"
    )


def id_type(tokenizer: Tokenizer) -> np.dtype[Any]:
    """The narrowest dtype that holds the ids of a tokenizer."""
    return np.dtype(np.uint16 if tokenizer.vocabulary <= 2**16 else np.uint32)


def tokens(
    ids: PathLike | Ids,
    *,
    time: int,
    batch_size: int,
    seed: int = 0,
    shuffle: bool = True,
    dtype: str = "uint16",
) -> TextRows:
    """Rows from token ids: files, which are memory-mapped, or an array.

    A file is raw `dtype`, .npy, or a .bin of llm.c's, which says its dtype; the files of a
    directory or of a pattern, `tokens/*.bin`, are one stream in the order of their names. Raises
    `DataError` for anything else, and for raw ids that look like the parts of wider ones.
    """
    array = ids if isinstance(ids, np.ndarray) else mapped(ids, dtype)
    if len(array.shape) != 1 or array.dtype.kind not in "iu":
        raise DataError(f"tokens: {array.dtype}{list(array.shape)}, expected integers [tokens]")
    return TextRows(ids=array, time=time, batch_size=batch_size, seed=seed, shuffle=shuffle)


def checked_ids(ids: Ids, begin: int) -> npt.NDArray[np.int64]:
    """Ids as int64, checked where they are read: a mapped file may be larger than memory."""
    signed = ids.astype(np.int64)
    if signed.min() < 0:  # an id beyond int64 has become negative too
        at = int(signed.argmin())
        raise DataError(
            f"tokens: {ids[at]} at {begin + at}, expected ids of at least 0; was the file written "
            "with another dtype?"
        )
    return signed
