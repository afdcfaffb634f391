"""Packing: nothing lost, nothing over `time`, as few rows as best-fit decreasing promises."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import functrain as ft
from functrain import data
from functrain.objectives.batches import count_padding

BYTES = data.ByteTokenizer()
TEXT = st.text("abcdefgh ", max_size=40)


def _best_fit(lengths: list[int], time: int) -> list[int]:
    """What is in each bin of the plain, quadratic best-fit decreasing."""
    bins: list[int] = []
    for length in sorted(lengths, reverse=True):
        fits = [b for b in range(len(bins)) if bins[b] + length <= time]
        if fits:
            bins[max(fits, key=lambda b: bins[b])] += length
        else:
            bins.append(length)
    return bins


def _first_fit(lengths: list[int], time: int) -> int:
    bins: list[int] = []
    for length in lengths:
        fits = next((b for b in range(len(bins)) if bins[b] + length <= time), None)
        if fits is None:
            bins.append(length)
        else:
            bins[fits] += length
    return len(bins)


@st.composite
def lengths(draw: st.DrawFn) -> tuple[list[int], int]:
    time = draw(st.integers(1, 70))
    return draw(st.lists(st.integers(1, time), max_size=60)), time


@given(given=lengths())
def test_it_is_best_fit_decreasing(given: tuple[list[int], int]) -> None:
    """Each index once, and the bins are as full as those of the quadratic algorithm."""
    sizes, time = given
    bins = data.pack(sizes, time)
    assert sorted(index for each in bins for index in each) == list(range(len(sizes)))
    filled = [sum(sizes[index] for index in each) for each in bins]
    assert all(0 < each <= time for each in filled)
    assert sorted(filled) == sorted(_best_fit(sizes, time))


@given(given=lengths())
def test_it_is_a_function_of_the_lengths(given: tuple[list[int], int]) -> None:
    sizes, time = given
    assert data.pack(sizes, time) == data.pack(np.array(sizes, dtype=np.int32), time)


@given(
    cuts=st.lists(st.sets(st.integers(1, 59), max_size=12), min_size=1, max_size=20),
    seed=st.integers(0, 2**32 - 1),
)
def test_it_is_within_the_bound_of_the_fewest_bins(cuts: list[set[int]], seed: int) -> None:
    """Pieces of full bins, whose fewest bins are known (Johnson et al. 1974)."""
    bounds = [[0, *sorted(cut), 60] for cut in cuts]
    pieces = [b - a for each in bounds for a, b in itertools.pairwise(each)]
    np.random.default_rng(seed).shuffle(pieces)
    assert len(cuts) <= len(data.pack(pieces, 60)) <= 11 / 9 * len(cuts) + 4


@given(
    seed=st.integers(0, 2**32 - 1), time=st.integers(20, 3000), shape=st.sampled_from([0.3, 1, 3])
)
def test_it_takes_no_more_bins_than_first_fit_on_random_lengths(
    seed: int, time: int, shape: float
) -> None:
    drawn = np.random.default_rng(seed).gamma(shape, time / 6, size=400)
    sizes = drawn.astype(int).clip(1, time).tolist()
    assert len(data.pack(sizes, time)) <= _first_fit(sizes, time)


@pytest.mark.parametrize(
    ("sizes", "time", "message"),
    [
        ([3, 0], 4, r"lengths: 0 at 1, expected \[1, 4\]"),
        ([5], 4, r"lengths: 5 at 0, expected \[1, 4\]; cut what is longer than time=4"),
        ([1.5], 4, r"lengths: float64\[1\], expected integers \[documents\]"),
        ([[1], [2]], 4, r"lengths: int64\[2, 1\], expected integers"),
        ([1], 0, "time: 0, expected an integer of at least 1"),
    ],
)
def test_lengths_that_cannot_be_packed_are_named(sizes: Any, time: int, message: str) -> None:
    with pytest.raises(ft.DataError, match=message):
        data.pack(sizes, time)


# Rows.


def _documents(row: Any) -> list[tuple[list[int], list[int]]]:
    """Ids and labels of the documents of a row, where positions begin anew; without the padding."""
    positions = row["position_ids"]
    begins = [*(positions == 0).nonzero().flatten().tolist(), len(positions)]
    spans = itertools.pairwise(begins)
    found = [(row["input_ids"][a:b].tolist(), row["labels"][a:b].tolist()) for a, b in spans]
    for a, b in itertools.pairwise(begins):
        assert positions[a:b].tolist() == list(range(b - a))
    return [each for each in found if len(each[0]) > 1]


def _rows(source: data.Packed) -> list[Any]:
    (batch,) = data.all_batches(source, len(source))
    assert batch.keys() == {"input_ids", "labels", "position_ids"}
    return [{key: value[row] for key, value in batch.items()} for row in range(len(source))]


RECORDS = st.lists(
    st.fixed_dictionaries({"prompt": TEXT, "completion": TEXT.filter(lambda text: len(text) > 1)}),
    min_size=1,
    max_size=12,
)


@given(records=RECORDS, time=st.integers(48, 100))
def test_every_example_is_whole_in_one_row(records: Any, time: int) -> None:
    source = data.chat(records, BYTES, time=time, batch_size=2)
    packed = data.packed(source, time=time)
    found = [each for row in _rows(packed) for each in _documents(row)]
    expected = [(list(ids), [-100, *labels[1:]]) for ids, labels in source.examples]
    assert sorted(found) == sorted(expected)
    assert packed.counts == source.counts
    tokens = sum(len(ids) for ids, _ in source.examples)
    assert packed.packing.tokens == tokens
    padding, made = count_padding(packed.ordered().at(0, len(packed)))
    assert (int(padding), made) == (len(packed) * time - tokens, len(packed) * time)
    assert packed.packing.padding == pytest.approx(int(padding) / made)


@given(texts=st.lists(TEXT, min_size=1, max_size=8), time=st.integers(2, 30))
def test_every_token_of_a_text_but_its_first_is_predicted_once(texts: list[str], time: int) -> None:
    """In its own document; pieces of a long one overlap by one token."""
    whole = [[*text.encode(), BYTES.end] for text in texts]
    learnt = [ids for ids in whole if len(ids) > 1]
    if not learnt:
        with pytest.raises(ft.DataError, match="none of at least 2 tokens"):
            data.packed_text(texts, BYTES, time=time, batch_size=1)
        return
    source = data.packed_text(texts, BYTES, time=time, batch_size=1)
    found = [ids for row in _rows(source) for ids, _ in _documents(row)]
    step = time - 1
    pieces = [ids[at : at + time] for ids in learnt for at in range(0, len(ids) - 1, step)]
    assert sorted(found) == sorted(pieces)
    targets = [t for row in _rows(source) for t in row["labels"].tolist() if t != -100]
    assert sorted(targets) == sorted(t for ids in learnt for t in ids[1:])
    packing = source.packing
    long = [ids for ids in learnt if len(ids) > time]
    assert (packing.documents, packing.empty) == (len(learnt), len(whole) - len(learnt))
    assert packing.cut == len(long)
    assert packing.pieces == len(pieces) - (len(learnt) - len(long))
    assert packing.tokens == sum(map(len, pieces))


def test_a_row_by_example() -> None:
    source = data.packed_text(["abc", "d", ""], BYTES, time=8, batch_size=1)
    batch = source.at(0, 1)
    assert batch["input_ids"].tolist() == [[97, 98, 99, 256, 100, 256, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 98, 99, 256, -100, 256, -100, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 0, 0]]
    assert str(source.packing) == (
        "2 documents in 1 packs of 8 tokens, 75.0% filled; 1 without a target left out"
    )
    long = data.packed_text(["abcdefg", "hi"], BYTES, time=4, batch_size=1)
    assert "2 documents (1 longer than 4 tokens, in 3 pieces) in 4 packs" in str(long.packing)


def test_what_cannot_be_packed_is_named() -> None:
    chats = data.chat([{"prompt": "abc", "completion": "de"}], BYTES, time=9, batch_size=1)
    with pytest.raises(ft.DataError, match=r"time: 5, and example 0 has 6 tokens; .*time=5"):
        data.packed(chats, time=5)
    with pytest.raises(ft.DataError, match="time: 0, expected an integer"):
        data.packed(chats, time=0)
    pairs = data.preference(
        [{"prompt": "a", "chosen": "b", "rejected": "c"}], BYTES, time=9, batch_size=1
    )
    with pytest.raises(ft.DataError, match=r"packed: a Pairs, expected what functrain\.data\.chat"):
        data.packed(pairs, time=9)  # type: ignore[arg-type]
    grouped = data.chat(
        [{"prompt": "abc", "completion": "de"}], BYTES, time=9, batch_size=1, group_by_length=True
    )
    with pytest.raises(ft.DataError, match="group_by_length: packs are all of one length"):
        data.packed(grouped, time=9)
    with pytest.raises(ft.DataError, match="a source without examples"):
        data.packed(data.Chats(examples=(), batch_size=1), time=9)
    with pytest.raises(ft.DataError, match="time: 1, expected an integer of at least 2"):
        data.packed_text(["abc"], BYTES, time=1, batch_size=1)
    with pytest.raises(ft.DataError, match="documents: one string"):
        data.packed_text("abc", BYTES, time=4, batch_size=1)


def test_ids_out_of_range_are_named() -> None:
    """Below 0 by the source, above the vocabulary by the step."""
    options: dict[str, Any] = {
        "begins": np.array([0]),
        "lengths": np.array([3]),
        "packs": ((0,),),
        "packing": data.Packing(documents=1, packs=1, tokens=3, time=4),
        "batch_size": 1,
    }
    ids = np.array([1, -2, 3])
    with pytest.raises(ft.DataError, match="tokens: -2 at 1, expected ids of at least 0"):
        data.Packed(ids=ids, labels=ids, **options).at(0, 1)
    ids = np.array([1, 300, 3])
    batch = data.Packed(ids=ids, labels=ids, **options).at(0, 1)
    with pytest.raises(ft.BatchError, match=r"input_ids: 300 at \[0, 1\] is out of range"):
        ft.objectives.LanguageModeling().check(batch, 257)


@given(seed=st.integers(0, 1000))
def test_the_rows_are_the_same_in_each_epoch_and_their_order_is_not(seed: int) -> None:
    source = data.packed_text(
        ["x" * n for n in range(2, 60)], BYTES, time=64, batch_size=4, seed=seed
    )
    rows = len(source)
    epochs = [source.at(rows * epoch, rows)["input_ids"].tolist() for epoch in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert epochs[0] != epochs[1]
    assert torch.equal(source.at(0, 1)["position_ids"], source.at(0, 1)["position_ids"])
