"""Loaders of other libraries: a run resumed at any step has the bits of one left alone."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
import torch.utils.data as tud
import zoo

import functrain as ft
from functrain import data

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
LENGTH, SIZE = 11, 3


def _example(n: int) -> dict[str, torch.Tensor]:
    """Whose first token says which one it is."""
    ids = torch.arange(n, n + 5) % zoo.VOCABULARY
    return {"input_ids": ids, "labels": ids}


class _Indexed(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: int) -> Any:
        return _example(index)


def _collate(examples: Any) -> dict[str, torch.Tensor]:
    return torch.utils.data.default_collate([_example(each["n"]) for each in examples])


def _torchdata(**options: Any) -> Any:
    module = pytest.importorskip("torchdata.stateful_dataloader")
    options = {"shuffle": True, "generator": torch.Generator().manual_seed(3), **options}
    loader = module.StatefulDataLoader(_Indexed(), batch_size=SIZE, drop_last=True, **options)
    return data.torchdata_stream(loader)


def _grain_dataset() -> Any:
    grain = pytest.importorskip("grain")

    def arrays(n: int) -> Any:
        return {name: each.numpy() for name, each in _example(n).items()}

    source = grain.MapDataset.source(range(LENGTH)).seed(1).shuffle().repeat().map(arrays)
    # Ahead by as much as two batches; its default of 16 threads takes long to begin.
    ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2 * SIZE)
    return data.grain_stream(source.to_iter_dataset(ahead).batch(SIZE))


def _grain_loader() -> Any:
    grain = pytest.importorskip("grain")
    sampler = grain.samplers.IndexSampler(LENGTH, shuffle=True, seed=1)
    loader = grain.DataLoader(
        data_source=range(LENGTH),
        sampler=sampler,
        operations=[grain.transforms.Batch(SIZE)],
        read_options=grain.ReadOptions(num_threads=1, prefetch_buffer_size=2 * SIZE),
    )
    return data.grain_stream(loader, lambda found: _collate([{"n": int(n)} for n in found]))


def _examples() -> Iterator[Any]:
    for n in range(LENGTH):
        yield {"n": n}


def _hugging_face(buffer_size: int | None = None) -> Any:
    datasets = pytest.importorskip("datasets")
    given = datasets.Dataset.from_dict({"n": list(range(LENGTH))})
    given = given.to_iterable_dataset(num_shards=2)
    if buffer_size is not None:
        given = given.shuffle(seed=1, buffer_size=buffer_size)
    return data.iterable_stream(given.repeat(None), _collate, batch_size=SIZE)


STREAMS: dict[str, Callable[[], Any]] = {
    "torchdata": _torchdata,
    "torchdata in order": lambda: _torchdata(shuffle=False),
    "grain dataset": _grain_dataset,
    "grain loader": _grain_loader,
    "datasets": _hugging_face,
    "datasets shuffled by shards": lambda: _hugging_face(buffer_size=1),
}
EVERY = pytest.mark.parametrize("make", STREAMS.values(), ids=STREAMS)


def _run() -> tuple[Any, Any]:
    architecture, params, buffers = zoo.split("tied")
    step = ft.pretrain_step(architecture, ft.optim.adamw(1e-2))
    return step, step.init(params, buffers, seed=1)


def _taken(stream: Any, loader: str | None = None) -> Iterator[tuple[list[int], str]]:
    """The first tokens of each batch from a state on, and the state after it."""
    while True:
        taken = stream.after(loader)
        loader = taken.loader
        assert taken.samples == len(taken.batch["input_ids"]) == SIZE
        yield taken.batch["input_ids"][:, 0].tolist(), loader


def _resumed_everywhere(make: Callable[[], Any], steps: int, directory: Path) -> None:
    step, state = _run()
    states = [now for now, _ in ft.train(step, state, make(), steps=steps)]
    assert states[-1].cursor.samples == steps * SIZE
    for saved in states[:-1]:
        loaded = ft.load(ft.save(directory, saved), like=state)
        *_, (last, _) = ft.train(step, loaded, make(), steps=steps)
        assert ft.testing.first_difference(*map(_spelt, (states[-1], last))) is None, saved.step


def _spelt(state: Any) -> Any:
    """`datasets` counts from where it was opened: the same place may be spelt otherwise."""
    spelt = state.cursor.loader.replace("Rebatched", "")
    loader = None if spelt != state.cursor.loader else spelt
    return attrs.evolve(state, cursor=attrs.evolve(state.cursor, loader=loader))


@EVERY
def test_a_run_resumed_at_any_step_has_the_bits_of_one_left_alone(
    make: Callable[[], Any], tmp_path: Path
) -> None:
    """Across the ends of epochs too, after the last batch of one and after the first of the next.

    The loader is made anew for each, as another process does.
    """
    _resumed_everywhere(make, 9, tmp_path)


@pytest.mark.long
@EVERY
def test_a_run_resumed_at_any_step_of_three_epochs_has_the_same_bits(
    make: Callable[[], Any], tmp_path: Path
) -> None:
    _resumed_everywhere(make, 20, tmp_path)


@EVERY
def test_nothing_is_lost_or_repeated_on_resume(make: Callable[[], Any]) -> None:
    whole = list(itertools.islice(_taken(make()), 8))
    for at in range(len(whole)):
        rest = list(itertools.islice(_taken(make(), whole[at][1]), 7 - at))
        assert [ids for ids, _ in rest] == [ids for ids, _ in whole[at + 1 :]]
    first = [n for ids, _ in whole[: LENGTH // SIZE] for n in ids]
    assert len(set(first)) == len(first) == LENGTH // SIZE * SIZE


@EVERY
def test_a_batch_is_a_function_of_the_state(make: Callable[[], Any]) -> None:
    """Going back, and to the beginning, as `run.send` does."""
    stream = make()
    whole = list(itertools.islice(_taken(stream), 8))
    for at in (3, 6, 0, 3):
        assert next(_taken(stream, whole[at][1]))[0] == whole[at + 1][0]
    assert next(_taken(stream)) == whole[0]


class _Watched(_Indexed):
    """Leaves a file for each example that a worker has read."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def __getitem__(self, index: int) -> Any:
        (self.directory / f"{index}").touch()
        return _example(index)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_what_workers_have_prefetched_is_not_in_the_state(tmp_path: Path) -> None:
    module = pytest.importorskip("torchdata.stateful_dataloader")

    def make() -> Any:
        loader = module.StatefulDataLoader(
            _Watched(tmp_path), batch_size=SIZE, num_workers=1, prefetch_factor=4, drop_last=True
        )
        return data.torchdata_stream(loader)

    stream = make()
    taken = stream.after(None)
    while len(os.listdir(tmp_path)) < 3 * SIZE:  # noqa: PTH208
        pass
    second, third = itertools.islice(_taken(make(), taken.loader), 2)
    assert second[0] == [3, 4, 5]
    assert third[0] == [6, 7, 8]
    assert stream.after(taken.loader).batch["input_ids"][:, 0].tolist() == [3, 4, 5]


class _Iterable(torch.utils.data.IterableDataset[Any]):
    """Whose iterators have a state, and no length, as few iterable datasets have one."""

    def __iter__(self) -> Any:
        return _Iterator()


class _Iterator:
    def __init__(self) -> None:
        self.examples = _Counting()

    def __iter__(self) -> Any:
        return self

    def __next__(self) -> Any:
        return _example(next(iter(self.examples))["n"])

    def state_dict(self) -> dict[str, int]:
        return self.examples.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.examples.load_state_dict(state)


class _Sampler(torch.utils.data.Sampler[int]):
    """Without a length."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(LENGTH - 1, -1, -1))


def _loader_of(dataset: Any, **options: Any) -> Any:
    module = pytest.importorskip("torchdata.stateful_dataloader")
    return data.torchdata_stream(module.StatefulDataLoader(dataset, batch_size=SIZE, **options))


@pytest.mark.filterwarnings("ignore:.*its _Sampler keeps no state:functrain.errors.NumericsWarning")
@pytest.mark.parametrize(
    ("make", "first"),
    [
        (lambda: _loader_of(_Iterable(), drop_last=True), 0),
        (lambda: _loader_of(_Indexed(), sampler=_Sampler(), drop_last=True), LENGTH - 1),
    ],
    ids=["dataset", "sampler"],
)
def test_what_has_no_length_is_read_over_epochs(make: Callable[[], Any], first: int) -> None:
    whole = list(itertools.islice(_taken(make()), 8))
    assert [ids[0] for ids, _ in whole[:: LENGTH // SIZE]] == [first] * 3
    for at in range(len(whole)):
        rest = list(itertools.islice(_taken(make(), whole[at][1]), 7 - at))
        assert [ids for ids, _ in rest] == [ids for ids, _ in whole[at + 1 :]]


class _Epochs(_Sampler):
    """Another order in each epoch, which it counts."""

    def __init__(self) -> None:
        self.epoch = 0

    def __iter__(self) -> Iterator[int]:
        self.epoch += 1
        return iter(torch.randperm(LENGTH, generator=_generator(self.epoch)).tolist())


class _StatefulIterators(_Sampler):
    def __iter__(self) -> Any:
        return _Indices()


class _Indices:
    def __init__(self) -> None:
        self.next = 0

    def __iter__(self) -> Any:
        return self

    def __next__(self) -> int:
        if self.next == LENGTH:
            raise StopIteration
        self.next += 1
        return self.next - 1

    def state_dict(self) -> dict[str, int]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next = state["next"]


def _generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _sampled(**options: Any) -> Any:
    module = pytest.importorskip("torchdata.stateful_dataloader")
    return data.torchdata_stream(module.StatefulDataLoader(_Indexed(), **options))


def _torchdatas(name: str, *arguments: Any, **options: Any) -> Any:
    module = pytest.importorskip("torchdata.stateful_dataloader.sampler")
    return getattr(module, name)(_Indexed(), *arguments, **options)


def _torchs(kind: str) -> Any:
    return {
        "random": lambda: tud.RandomSampler(range(LENGTH), generator=_generator()),
        "subset": lambda: tud.SubsetRandomSampler(range(LENGTH), generator=_generator()),
        "weighted": lambda: tud.WeightedRandomSampler(
            [1.0] * LENGTH, LENGTH, generator=_generator()
        ),
        "own": _Epochs,
    }[kind]()


@pytest.mark.parametrize("batches", [False, True])
@pytest.mark.parametrize("kind", ["random", "subset", "weighted", "own"])
def test_a_sampler_without_a_state_loses_its_order_and_says_so(kind: str, batches: bool) -> None:
    """The library's own limit: from the second epoch on, a resumed run has other data."""

    def make() -> Any:
        sampler = _torchs(kind)
        if batches:
            return _sampled(batch_sampler=tud.BatchSampler(sampler, SIZE, drop_last=True))
        return _sampled(sampler=sampler, batch_size=SIZE, drop_last=True)

    name = "BatchSampler" if batches else type(_torchs(kind)).__name__
    with pytest.warns(ft.errors.NumericsWarning, match=f"its {name} keeps no state"):
        whole = list(itertools.islice(_taken(make()), 8))
    with pytest.warns(ft.errors.NumericsWarning, match=f"its {name} keeps no state"):
        rest = list(itertools.islice(_taken(make(), whole[4][1]), 3))
    assert [ids for ids, _ in rest] != [ids for ids, _ in whole[5:]]


@pytest.mark.parametrize(
    "options",
    [
        lambda: {"sampler": _torchdatas("RandomSampler", generator=_generator())},
        lambda: {"sampler": _torchdatas("StatefulDistributedSampler", 1, 0, seed=3)},
        lambda: {"sampler": _StatefulIterators()},
        lambda: {"sampler": tud.SequentialSampler(_Indexed())},
        lambda: {"batch_sampler": tud.BatchSampler(tud.SequentialSampler(_Indexed()), SIZE, True)},
        # Whose epoch nobody sets is in the same order in each.
        lambda: {"sampler": tud.DistributedSampler(_Indexed(), 1, 0, seed=3)},
    ],
    ids=["torchdata", "torchdata distributed", "iterator", "sequential", "batches", "distributed"],
)
def test_a_sampler_with_a_state_or_one_order_is_resumed_without_a_warning(options: Any) -> None:
    def make() -> Any:
        given = options()
        batches = {} if "batch_sampler" in given else {"batch_size": SIZE, "drop_last": True}
        return _sampled(**given, **batches)

    whole = list(itertools.islice(_taken(make()), 8))
    for at in range(len(whole)):
        rest = list(itertools.islice(_taken(make(), whole[at][1]), 7 - at))
        assert [ids for ids, _ in rest] == [ids for ids, _ in whole[at + 1 :]]


class _Stateless(torch.utils.data.IterableDataset[Any]):
    def __iter__(self) -> Any:
        for n in range(LENGTH):
            yield _example(n)


def test_data_that_do_not_begin_anew_end_with_what_to_do() -> None:
    """Without a state of their own, after a resume: torchdata then counts twice what it passed."""
    first = _loader_of(_Stateless(), drop_last=True).after(None)
    resumed = _taken(_loader_of(_Stateless(), drop_last=True), first.loader)
    message = r"ended after 9 samples, and is not opened .*\.repeat\(None\)"
    with pytest.raises(ft.DataError, match=message):
        list(itertools.islice(resumed, 9))


def test_a_shuffle_buffer_loses_examples_and_says_so() -> None:
    """The library's own limit: should it ever keep its buffer, the warning is to go."""
    datasets = pytest.importorskip("datasets")
    torchdata = pytest.importorskip("torchdata.stateful_dataloader")

    def make() -> Any:
        given = datasets.IterableDataset.from_generator(_examples)
        given = given.shuffle(seed=1, buffer_size=6)
        with pytest.warns(ft.errors.NumericsWarning, match=r"shuffle buffer \(6 examples\)"):
            data.torchdata_stream(torchdata.StatefulDataLoader(given, batch_size=1))
        with pytest.warns(ft.errors.NumericsWarning, match=r"shuffle buffer \(6 examples\)"):
            return data.iterable_stream(given, _collate, batch_size=1)

    stream = make()
    first = [stream.after(None)]
    first += [stream.after(first[-1].loader)]
    left = _left(stream, first[-1].loader)
    assert len(left) == LENGTH - 2
    lost = left - _left(make(), first[-1].loader)
    assert len(lost) == 4  # of the six that were in it


def _left(stream: Any, loader: str) -> set[int]:
    """What is still to come of a stream that ends."""
    found = set()
    with contextlib.suppress(ft.DataError):
        while True:
            taken = stream.after(loader)
            loader = taken.loader
            found.add(int(taken.batch["input_ids"][0, 0]))
    return found


class _Counting:
    """A loader with a state, in a few lines."""

    def __init__(self, length: int = LENGTH) -> None:
        self.length, self.next = length, 0

    def __iter__(self) -> Iterator[Any]:
        while self.next < self.length:
            self.next += 1
            yield {"n": self.next - 1}

    def state_dict(self) -> dict[str, int]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next = state["next"]


def _counting(length: int = LENGTH) -> Any:
    return data.iterable_stream(_Counting(length), _collate, batch_size=SIZE)


def test_a_stream_that_ends_says_how_many_samples_it_had() -> None:
    step, state = _run()
    run = ft.train(step, state, _counting(), steps=9)
    with pytest.raises(ft.DataError, match="ended after 9 samples and 2 that fill no batch of 3"):
        list(run)
    resumed = _counting()
    loader = _counting().after(None).loader
    with pytest.raises(ft.DataError, match="ended after 9 samples"):
        list(_taken(resumed, loader))


def test_a_batch_that_fails_is_asked_for_again() -> None:
    failing = iter([False, True, False, False])

    def collate(examples: Any) -> Any:
        if next(failing):
            raise OSError("a disk")
        return _collate(examples)

    stream = data.iterable_stream(_Counting(), collate, batch_size=SIZE)
    first = stream.after(None)
    with pytest.raises(OSError, match="a disk"):
        stream.after(first.loader)
    assert stream.after(first.loader).batch["input_ids"][:, 0].tolist() == [3, 4, 5]


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ("{}", "not one that a functrain.data stream has written"),
        ("[", "no state that functrain wrote"),
        ('{"kind":"grain","samples":3,"state":{}}', "is of a grain loader, and this is a iterable"),
        ('{"kind":"iterable","samples":3,"state":{}}', r"does not take the state .*KeyError"),
        ('{"kind":"iterable","samples":3,"state":{"~":"x"}}', "no state that functrain wrote"),
    ],
)
def test_another_loaders_state_is_refused(loader: str, message: str) -> None:
    with pytest.raises(ft.DataError, match=message):
        _counting().after(loader)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 1, "steps": 1}, "epochs: 1, and the data are a stream"),
        ({"batch_size": 2, "steps": 1}, "batch_size: 2, and the data are a stream"),
    ],
)
def test_what_a_stream_cannot_know_is_refused(options: Any, message: str) -> None:
    step, state = _run()
    with pytest.raises(ft.ConfigError, match=message):
        ft.train(step, state, _counting(), **options)


def test_a_state_of_a_source_is_refused() -> None:
    step, state = _run()
    state = attrs.evolve(state, cursor=ft.Cursor(samples=4))
    with pytest.raises(ft.ConfigError, match=r"train: .* consumed 4 samples of a source"):
        ft.train(step, state, _counting(), steps=1)
    run = ft.train(step, attrs.evolve(state, cursor=ft.Cursor()), _counting(), steps=3)
    next(run)
    with pytest.raises(ft.ConfigError, match=r"send: .* consumed 4 samples of a source"):
        run.send(state)


def test_several_workers_are_refused() -> None:
    class Two:
        size, rank, speaks = 2, 0, True

    step, state = _run()
    object.__setattr__(step, "world", Two())
    with pytest.raises(ft.ConfigError, match="a stream is read by one worker, and there are 2"):
        ft.train(step, state, _counting(), steps=1)


def test_a_loader_without_a_state_is_refused() -> None:
    plain: Any = torch.utils.data.DataLoader(_Indexed(), batch_size=SIZE)
    with pytest.raises(ft.DataError, match="DataLoader has no state_dict and no load_state_dict"):
        data.torchdata_stream(plain)
    with pytest.raises(ft.DataError, match="list has no state_dict"):
        data.iterable_stream([{"n": 1}], _collate, batch_size=1)
    with pytest.raises(ft.DataError, match="list_iterator, expected grain's"):
        data.grain_stream(iter([1]))
    with pytest.raises(ft.DataError, match="list_iterator has no get_state"):
        data.grain_stream([1]).after(None)


def test_what_is_no_batch_is_named() -> None:
    stream = data.iterable_stream(_Counting(), lambda examples: examples, batch_size=SIZE)
    with pytest.raises(ft.DataError, match="loader: gave a list, expected a batch, a mapping"):
        stream.after(None)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
@pytest.mark.parametrize("persistent", [False, True])
def test_a_loader_with_workers_is_resumed_across_epochs(persistent: bool) -> None:
    def make() -> Any:
        return _torchdata(num_workers=2, persistent_workers=persistent)

    whole = list(itertools.islice(_taken(make()), 10))
    for at in range(len(whole) - 1):
        rest = list(itertools.islice(_taken(make(), whole[at][1]), 9 - at))
        assert [ids for ids, _ in rest] == [ids for ids, _ in whole[at + 1 :]]


def test_arrays_become_tensors() -> None:
    pytest.importorskip("grain")
    batch = _grain_dataset().after(None).batch
    assert all(isinstance(each, torch.Tensor) for each in batch.values())
    assert batch["input_ids"].dtype == torch.int64


@attrs.frozen
class Given:
    """A stream of one's own, which gives what it is told to."""

    taken: Any

    def after(self, loader: str | None) -> Any:
        del loader
        if self.taken is None:
            raise StopIteration
        return self.taken


@pytest.mark.parametrize(
    ("taken", "message"),
    [
        (None, "Given: the data have ended after 0 samples"),
        ({}, r"stream: it gave a dict, expected functrain\.data\.Taken"),
        (
            data.Taken(batch=zoo.batch(), samples=4, loader={"i": 4}),  # type: ignore[arg-type]
            "stream: it gave a loader that is a dict, expected a text",
        ),
        (
            data.Taken(batch=zoo.batch(), samples=4.0, loader=""),  # type: ignore[arg-type]
            r"stream: samples=4\.0, expected an integer",
        ),
    ],
)
def test_what_a_stream_of_ones_own_gives_is_looked_at(taken: Any, message: str) -> None:
    """No load would take such a state."""
    step, state = _run()
    with pytest.raises(ft.DataError, match=message):
        next(ft.train(step, state, Given(taken), steps=1))
