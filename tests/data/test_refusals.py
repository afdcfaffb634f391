"""What no source can be made of or asked for is refused with a `DataError`, never with nonsense."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import functrain as ft
from functrain import data

BYTES = data.ByteTokenizer()
GOOD = {"prompt": "a", "completion": "b"}
SIZES: dict[str, Any] = {"time": 16, "batch_size": 1}


def _chat(*records: Any, **options: Any) -> data.Chats:
    return data.chat(records or [GOOD], BYTES, **{**SIZES, **options})


def _pairs(*records: Any, **options: Any) -> data.Pairs:
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    return data.preference(records or [pair], BYTES, **{**SIZES, **options})


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "all_batches of 0": (lambda: data.all_batches(_chat(), 0), "batch_size: 0, expected"),
    "all_batches of -1": (lambda: data.all_batches(_chat(), -1), "batch_size: -1, expected"),
    "a fraction of a position": (lambda: _chat().at(0.5, 1), "expected integers"),  # type: ignore[arg-type]
    "a boolean count": (lambda: _chat().at(0, True), "expected integers"),
    "a seed that is text": (lambda: _chat(seed="x"), "seed: 'x', expected an integer"),
    "nothing in it": (lambda: data.Chats(examples=(), batch_size=1).at(0, 1), "empty"),
    "chat time below 1": (lambda: _chat(time=-1), "time: -1, expected"),
    "pairs time below 1": (lambda: _pairs(time=-1), "time: -1, expected"),
    "a record that is a number": (lambda: _chat(GOOD, 3), "record 1: expected an object, got int"),
    "a record that is None": (lambda: _chat(None), "record 0: expected an object, got NoneType"),
    "one record for a list": (
        lambda: data.chat(GOOD, BYTES, **SIZES),  # type: ignore[arg-type]
        "records: one object, expected a list",
    ),
    "both forms at once": (
        lambda: _chat({**GOOD, "messages": [{"role": "assistant", "content": "x"}]}),
        "record 0: messages and prompt",
    ),
    "no text to decode": (lambda: BYTES.decode([-1]), "ids: -1, expected"),
    "a foreign id": (lambda: BYTES.decode([97, 300]), "ids: 300, expected"),
    "a document that is no text": (
        lambda: data.text(["a", 3], BYTES, **SIZES),  # type: ignore[list-item]
        "document 1: expected text, got int",
    ),
    "an index out of range": (lambda: data.permuted(7, 3, 0), "index 7 of 3"),
    "negative token ids": (
        lambda: data.tokens(np.array([1, -1, 3]), **SIZES).at(0, 1),
        r"tokens: -1 at 1, expected ids of at least 0",
    ),
    "token ids beyond int64": (
        lambda: data.tokens(np.array([1, 2**63, 3], dtype=np.uint64), **SIZES).at(0, 1),
        r"tokens: 9223372036854775808 at 1",
    ),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ft.DataError, match=message):
        make()


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 16, 17, 63, 64, 65, 1000, 4097])
def test_the_order_is_a_permutation_around_powers_of_two(length: int) -> None:
    for key in (0, 1, 2**63 - 1):
        assert {data.permuted(i, length, key) for i in range(length)} == set(range(length))


def test_other_columns_of_a_record_are_ignored() -> None:
    assert _chat({**GOOD, "id": 7, "source": "web"}).examples == _chat(GOOD).examples
