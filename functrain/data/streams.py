"""Streams: data read on from a state, where a source would be asked for a position."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import attrs

from functrain.data.loader_state import dumped, loaded
from functrain.data.source import Batch
from functrain.errors import DataError
from functrain.objectives.batches import examples_in


@attrs.frozen(kw_only=True, eq=False)
class Taken:
    """A batch, how many `samples` it has, and the stream's state after it."""

    batch: Batch
    samples: int
    loader: str


@runtime_checkable
class Stream(Protocol):
    """What `functrain.train` reads where another library's loader keeps the position.

    The state is a text in the cursor: what is saved is the state after the batch that was trained
    on, however many have been read ahead.
    """

    def after(self, loader: str | None) -> Taken:
        """The batch after a state, None for the beginning: the same batch for the same state."""
        ...


Collate = Callable[[Any], Batch]
"""Makes a batch of what a loader gave."""


class Door:
    """How one library's loaders are opened, read and asked for their state."""

    kind: str
    endless: str
    restarts = False

    def first(self) -> Any:
        """The state before the first batch."""
        raise NotImplementedError

    def opened(self, state: Any) -> Iterator[Any]:
        """An iterator that goes on from a state."""
        raise NotImplementedError

    def again(self) -> Iterator[Any]:
        """An iterator over the next epoch, where the loader has epochs."""
        raise NotImplementedError

    def state(self, batches: Any) -> Any:
        """The state after what the iterator gave last."""
        raise NotImplementedError

    def left_over(self) -> str:
        """What filled no batch at the stream's end, in words."""
        return ""


@attrs.frozen(kw_only=True)
class _Place:
    """What is in the cursor: the loader's kind and state, and how many samples came before it."""

    kind: str
    samples: int
    state: Any

    def text(self) -> str:
        return dumped(attrs.asdict(self, recurse=False), self.kind)


class LoaderStream:
    """A loader as a `Stream`; made by `torchdata_stream`, `grain_stream` and `iterable_stream`.

    As long as each state asked for is the one given last, the loader goes on; for any other (after
    a resume, or `run.send`) it is reopened there. From then on it belongs to this stream alone: one
    that is iterated elsewhere too moves on unseen.
    """

    def __init__(self, door: Door, collate: Collate) -> None:
        self._door, self._collate = door, collate
        self._batches: Iterator[Any] | None = None
        self._first: Any = None
        self._known = False
        self._place: _Place | None = None
        self._at: str | None = None

    def after(self, loader: str | None) -> Taken:
        """The batch after a state; see `Stream`.

        Raises `DataError` for the state of another kind of loader, for one that the loader does not
        take, and where the stream has ended.
        """
        if self._batches is None or loader != self._at:
            self._open(loader)
        try:
            taken = self._read()
        except BaseException:
            self._batches = None  # half read: the next call opens it anew
            raise
        self._at = taken.loader
        return taken

    def _read(self) -> Taken:
        assert self._place is not None  # opened
        batch: Any = self._collate(self._next(self._place))
        if not isinstance(batch, Mapping):
            raise DataError(
                f"loader: gave a {type(batch).__name__}, expected a batch, a mapping such as "
                "{'input_ids': …, 'labels': …}; give the stream a collate that makes one of it"
            )
        samples, state = examples_in(batch), self._door.state(self._batches)
        self._place = attrs.evolve(self._place, samples=self._place.samples + samples, state=state)
        return Taken(batch=batch, samples=samples, loader=self._place.text())

    def _open(self, loader: str | None) -> None:
        self._batches = None
        if not self._known:
            self._first, self._known = self._door.first(), True
        start = _Place(kind=self._door.kind, samples=0, state=self._first)
        place = start if loader is None else _place(loader, self._door.kind)
        self._batches = self._opened(place)
        self._place, self._at = place, loader

    def _opened(self, place: _Place) -> Iterator[Any]:
        try:
            return self._door.opened(place.state)
        except Exception as error:  # whatever a library makes of a state that is not its own
            raise DataError(
                f"loader: this {self._door.kind} loader does not take the state in the cursor "
                f"({type(error).__name__}: {error}); make it as it was made for the run: the same "
                "data, workers and version of the library"
            ) from error

    def _next(self, place: _Place) -> Any:
        assert self._batches is not None  # opened
        # Not by truth value: that of torchdata's is their length, and many have none.
        for found in self._batches:
            return found
        if self._door.restarts:
            self._restart(place)
            for found in self._batches:
                return found
        raise DataError(
            f"loader: the stream ended after {place.samples:,} samples{self._door.left_over()}; "
            f"{self._door.endless}, or ask for fewer steps"
        )

    def _restart(self, place: _Place) -> None:
        """By way of the state, so that a run resumed at an epoch's end has the same next epoch."""
        try:
            opened = self._opened(place)
        except DataError as error:  # from an iterable dataset without a state, say
            raise DataError(
                f"loader: ended after {place.samples:,} samples, and is not opened at its end for "
                f"the next epoch ({type(error.__cause__).__name__}); {self._door.endless}"
            ) from error
        for _ in opened:
            raise DataError(
                f"loader: ended after {place.samples:,} samples, and goes on when it is opened at "
                f"its end; give it data that stay the same; {self._door.endless}"
            )
        self._batches = self._door.again()


def is_stream_state(loader: str | None) -> bool:
    """Whether the text in a cursor was written by one of these streams."""
    try:
        return loader is not None and _is_place(loaded(loader))
    except DataError:
        return False


def _is_place(found: object) -> bool:
    return isinstance(found, dict) and found.keys() == {"kind", "samples", "state"}


def _place(text: str, kind: str) -> _Place:
    found = loaded(text)
    if not _is_place(found):
        raise DataError(
            "loader: the state in the cursor is not one that a functrain.data stream has written; "
            "a loader of your own goes into a loop of your own"
        )
    if found["kind"] != kind:
        raise DataError(
            f"loader: the state in the cursor is of a {found['kind']} loader, and this is a {kind} "
            "loader; go on with the kind that the run began with, or begin a stage with "
            "attrs.evolve(state, cursor=functrain.Cursor())"
        )
    return _Place(**found)
