"""Loaders of other libraries as streams: torchdata, grain, and Hugging Face's iterable datasets.

None of them is imported here: a loader is known by the methods that give and take its state.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import attrs
import numpy as np
import torch
from torch.utils.data import BatchSampler, DistributedSampler, IterableDataset, SequentialSampler

from functrain.data.source import Batch, at_least_one
from functrain.data.streams import Collate, Door, LoaderStream
from functrain.errors import DataError, NumericsWarning


@attrs.frozen(eq=False)
class _Torchdata(Door):
    loader: Any
    kind = "torchdata"
    endless = (
        "give it more samples than batch_size, and let an iterable dataset go on for ever with "
        ".repeat(None)"
    )
    restarts = True

    def first(self) -> Any:
        state = self.loader.state_dict()
        _warn_of_samplers(self.loader)
        return state

    def opened(self, state: Any) -> Iterator[Any]:
        self.loader.load_state_dict(state)
        return iter(self.loader)

    def again(self) -> Iterator[Any]:
        return iter(self.loader)

    def state(self, batches: Any) -> Any:
        return self.loader.state_dict()


@attrs.frozen(eq=False)
class _Grain(Door):
    dataset: Any
    kind = "grain"
    endless = "let it go on for ever with .repeat()"

    def first(self) -> Any:
        return None

    def opened(self, state: Any) -> Iterator[Any]:
        batches: Any = iter(self.dataset)
        _check_methods(batches, ("get_state", "set_state"), "grain's DataLoader or IterDataset")
        if state is not None:
            batches.set_state(state)
        return iter(batches)

    def state(self, batches: Any) -> Any:
        return batches.get_state()


@attrs.define(eq=False)
class _Iterable(Door):
    dataset: Any
    batch_size: int
    left: int = 0
    kind = "iterable"
    endless = "let it go on for ever with .repeat(None)"

    def first(self) -> Any:
        return self.dataset.state_dict()

    def opened(self, state: Any) -> Iterator[Any]:
        self.dataset.load_state_dict(state)
        return self._groups(iter(self.dataset))

    def _groups(self, examples: Iterator[Any]) -> Iterator[Any]:
        while True:
            group = list(itertools.islice(examples, self.batch_size))
            if len(group) < self.batch_size:
                self.left = len(group)
                return
            yield group

    def state(self, batches: Any) -> Any:
        return self.dataset.state_dict()

    def left_over(self) -> str:
        return f" and {self.left} that fill no batch of {self.batch_size}" if self.left else ""


def torchdata_stream(loader: Any, collate: Collate | None = None) -> LoaderStream:
    """A `StatefulDataLoader` of torchdata as a stream: its batches, made in its own processes.

    A batch is what its `collate_fn` makes, or what `collate` makes of that.

    At the end of a dataset with an index the loader begins its next epoch, in the next order, with
    new processes. It does so too with an iterable dataset that has nothing left when it is opened
    at its state there, and then begins anew; any other (Hugging Face's, or one without a state once
    the run has been resumed) has to go on for ever, `.repeat(None)`.

    Resume is exact if that of the data is, as with an index or with an exact `state_dict`, and if
    that of their order is, as with `shuffle=True`. A sampler of your own, or of torch's
    (`WeightedRandomSampler`, `RandomSampler`), that has no state is advanced by counting within its
    epoch, and later epochs of a resumed run may have another order than they had without the
    resume, as `NumericsWarning` says at the first batch; torchdata's `RandomSampler` has a state.
    What a dataset draws from a generator of its own is in no state. With worker processes a resumed
    run draws the seeds of its later epochs anew: the samples are the same, but the text in the
    cursor, and a fingerprint with it, is not.

    Raises `DataError` for a loader without state, such as torch's own `DataLoader`; and, when
    batches are read, at the end of data that do not begin anew.
    """
    _check_methods(
        loader, ("state_dict", "load_state_dict", "__iter__"), "torchdata's StatefulDataLoader"
    )
    _warn_of_buffers(getattr(loader, "dataset", None))
    return LoaderStream(_Torchdata(loader), _as_tensors if collate is None else collate)


def grain_stream(dataset: Any, collate: Collate | None = None) -> LoaderStream:
    """A `DataLoader` or `IterDataset` of grain as a stream; its elements are batches (`.batch(n)`).

    A batch is an element with its arrays as tensors, or what `collate` makes of it. The state is
    grain's own, for the version that wrote it. Resume is exact.

    Raises `DataError` for what cannot be iterated anew, such as an iterator.
    """
    if hasattr(dataset, "__next__") or not hasattr(dataset, "__iter__"):
        raise DataError(
            f"loader: a {type(dataset).__name__}, expected grain's DataLoader or IterDataset "
            "(dataset.to_iter_dataset().batch(n)), not an iterator of one"
        )
    return LoaderStream(_Grain(dataset), _as_tensors if collate is None else collate)


def iterable_stream(
    dataset: Any, collate: Callable[[Sequence[Any]], Batch], *, batch_size: int
) -> LoaderStream:
    """An iterable dataset with `state_dict` and `load_state_dict`: `datasets.IterableDataset`.

    `collate` makes a batch of `batch_size` examples. Resume is exact (though the text of the state
    may differ from that of an uninterrupted run: `datasets` counts from where it began), except for
    a shuffle buffer (`dataset.shuffle(buffer_size=…)`): it is not part of the dataset's state, so a
    resumed run never sees what was in it, or sees some of it twice, as `NumericsWarning` says.
    Shuffling by shards alone (`dataset.shuffle(buffer_size=1)`), or ahead on disk, loses nothing.

    Raises `DataError` for a dataset without state.
    """
    at_least_one("batch_size", batch_size)
    _check_methods(
        dataset, ("state_dict", "load_state_dict", "__iter__"), "datasets.IterableDataset"
    )
    _warn_of_buffers(dataset)
    return LoaderStream(_Iterable(dataset, batch_size), collate)


def _check_methods(loader: Any, needed: Sequence[str], expected: str) -> None:
    missing = [name for name in needed if not hasattr(loader, name)]
    if missing:
        raise DataError(
            f"loader: a {type(loader).__name__} has no {' and no '.join(missing)}, so a run could "
            f"not be resumed where it was; expected {expected}"
        )


def _warn_of_samplers(loader: Any) -> None:
    """Warn where nothing says in which order a resumed run goes on.

    An iterator is asked only if the loader has made it: making one may draw from the sampler's
    generator.
    """
    if isinstance(getattr(loader, "dataset", None), IterableDataset):
        return
    batches = getattr(loader, "batch_sampler", None)  # its truth is its length; few have one
    sampler = getattr(loader, "sampler", None) if batches is None else batches
    drawing = getattr(getattr(loader, "_iterator", None), "_sampler_iter", None)
    within = getattr(drawing, "sampler_iter", None)
    if within is not None:  # torchdata's own batches, whose state is that of the sampler
        sampler, drawing = getattr(sampler, "sampler", None), within
    if not (sampler is None or _in_one_order(sampler) or _stateful(sampler) or _stateful(drawing)):
        warnings.warn(
            f"loader: its {type(sampler).__name__} keeps no state: in a run that is "
            "resumed, the order from the next epoch on, or from there on, may be another than in "
            "one left alone. Use shuffle=True, torchdata's RandomSampler, or a sampler whose "
            "state_dict and load_state_dict say where it is",
            NumericsWarning,
            stacklevel=3,
        )


def _stateful(part: Any) -> bool:
    return hasattr(part, "state_dict") and hasattr(part, "load_state_dict")


def _in_one_order(sampler: Any) -> bool:
    """Whether each epoch has the first one's order; a `DistributedSampler`'s goes by its epoch."""
    if type(sampler) is BatchSampler:
        return _in_one_order(sampler.sampler)
    return type(sampler) in (SequentialSampler, DistributedSampler)


def _warn_of_buffers(dataset: Any) -> None:
    sizes = list(_buffers(getattr(dataset, "_ex_iterable", None)))
    if sizes:
        warnings.warn(
            f"loader: the dataset's shuffle buffer ({max(sizes):,} examples) is no part of its "
            "state: each time the run is resumed, examples that were in it are lost, or come "
            "twice. Shuffle on disk ahead, or by shards alone (buffer_size=1)",
            NumericsWarning,
            stacklevel=3,
        )


def _buffers(examples: Any) -> Iterator[int]:
    """The sizes of the shuffle buffers in a dataset of Hugging Face's."""
    if examples is None:
        return
    size = getattr(examples, "buffer_size", None)
    if isinstance(size, int) and size > 1:
        yield size
    yield from _buffers(getattr(examples, "ex_iterable", None))
    for each in getattr(examples, "ex_iterables", None) or ():
        yield from _buffers(each)


def _as_tensors(found: Any) -> Any:
    if isinstance(found, np.ndarray):
        return torch.from_numpy(np.array(found))
    if isinstance(found, Mapping):
        return {name: _as_tensors(each) for name, each in found.items()}
    return found
