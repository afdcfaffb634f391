"""Batches of similar lengths: less padding, and still every sample once, by position alone."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import functrain as ft
from functrain import data
from functrain.data import grouping
from functrain.objectives.batches import count_padding
from functrain.objectives.pairs import concatenated

BYTES = data.ByteTokenizer()


def _chats(sizes: list[int], **options: Any) -> data.Chats:
    records = [{"prompt": "?", "completion": "x" * size} for size in sizes]
    return data.chat(records, BYTES, **{"time": 400, "batch_size": 4, **options})


SIZES = st.lists(st.integers(1, 100), min_size=1, max_size=60)


@given(sizes=SIZES, batch=st.integers(1, 7), batches=st.integers(1, 5), seed=st.integers(0, 99))
def test_every_sample_comes_once_in_an_epoch(
    sizes: list[int], batch: int, batches: int, seed: int
) -> None:
    """Whatever the window, over epochs that are no whole number of batches."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouping, "_BATCHES", batches)
        source = _chats(sizes, batch_size=batch, seed=seed, group_by_length=True)
        total = len(source)
        for epoch in range(3):
            order = source.indices(epoch * total, total)
            assert sorted(order) == list(range(total))
            assert (
                order == [source.index(epoch * total + at) for at in reversed(range(total))][::-1]
            )


@given(sizes=SIZES, batch=st.integers(1, 7), seed=st.integers(0, 99))
def test_a_window_is_cut_into_batches_of_neighbouring_lengths(
    sizes: list[int], batch: int, seed: int
) -> None:
    """No two whole batches of an epoch that is one window overlap in length."""
    source = _chats(sizes, batch_size=batch, seed=seed, group_by_length=True)
    total = len(source)
    for epoch in range(3):
        begin, end = epoch * total, (epoch + 1) * total
        first = -(-begin // batch) * batch
        lengths = [
            sorted(len(source.examples[i][0]) for i in source.indices(at, batch))
            for at in range(first, end - batch + 1, batch)
        ]
        for one, other in zip(sorted(lengths), sorted(lengths)[1:], strict=False):
            assert one[-1] <= other[0]


def test_it_pads_less_and_is_shuffled_still() -> None:
    sizes = [1 + 37 * n % 300 for n in range(400)]
    plain, grouped = _chats(sizes), _chats(sizes, group_by_length=True)
    assert grouped.padding() < 0.05 < 0.2 < plain.padding()
    orders = [grouped.indices(epoch * 400, 400) for epoch in range(2)]
    assert orders[0] != orders[1] != sorted(orders[1])
    assert _chats(sizes, group_by_length=True, seed=1).indices(0, 400) != orders[0]
    widths = [
        max(len(grouped.examples[i][0]) for i in orders[0][at : at + 4]) for at in range(0, 400, 4)
    ]
    # The batches of each window are shuffled by themselves.
    ranks = [sorted(range(50), key=widths[at : at + 50].__getitem__) for at in (0, 50)]
    assert ranks[0] != ranks[1]
    widths = widths[:50]
    assert widths != sorted(widths)
    assert widths != sorted(widths, reverse=True)


SOURCES: dict[str, Any] = {
    "chat": lambda **o: _chats([1 + 7 * n % 40 for n in range(30)], **o),
    "pairs": lambda **o: data.preference(
        [{"prompt": "?", "chosen": "y" * (n + 1), "rejected": "n" * (31 - n)} for n in range(30)],
        BYTES,
        **{"time": 64, "batch_size": 4, **o},
    ),
    "unpaired": lambda **o: data.unpaired(
        [{"prompt": f"{n}?", "completion": "x" * (n + 1), "label": n % 3 < 1} for n in range(30)],
        BYTES,
        **{"time": 64, "batch_size": 4, **o},
    ),
}


@pytest.mark.parametrize("multiple", [1, 8, 48])
@pytest.mark.parametrize("group", [False, True])
@pytest.mark.parametrize("name", SOURCES)
def test_the_padding_of_a_source_is_what_its_batches_have(
    name: str, group: bool, multiple: int
) -> None:
    """As a step counts it: both sides of pairs are one batch, those of KTO are two."""
    source = SOURCES[name](group_by_length=group, pad_to_multiple_of=multiple)
    padding = made = 0
    for begin in range(0, 30, 4):
        batch = source.at(begin, min(4, 30 - begin))
        if name == "pairs":
            parts = [concatenated(batch["chosen"], batch["rejected"])]
        else:
            parts = [batch] if name == "chat" else [batch["completion"], batch["mismatched"]]
        for part in parts:
            count, tokens = count_padding(part)
            padding, made = padding + int(count), made + tokens
            width = part["input_ids"].shape[1]
            assert width % multiple == 0
            assert width in source.widths()
            real = int(part["attention_mask"].sum(1).max())
            assert real <= width < real + multiple
    assert source.padding() == pytest.approx(padding / made)
    assert 0 < source.padding(2) < 1


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ft.DataError, match="group_by_length: it orders what is shuffled"):
        _chats([1, 2], shuffle=False, group_by_length=True)
    with pytest.raises(ft.DataError, match="pad_to_multiple_of: 0, expected an integer"):
        _chats([1, 2], pad_to_multiple_of=0)
    with pytest.raises(ft.DataError, match="batches: 0, expected an integer"):
        _chats([1, 2]).padding(0)


def test_an_evaluation_is_in_the_given_order() -> None:
    sizes = [9, 2, 7, 4, 1, 8]
    batches = data.all_batches(_chats(sizes, group_by_length=True), 2)
    lengths = [int(row.sum()) for batch in batches for row in batch["attention_mask"]]
    assert lengths == [size + 2 for size in sizes]
