"""The state of a loader as text: back come the types, the dtypes and the bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import functrain as ft
from functrain.data.loader_state import dumped, loaded

DTYPES = [torch.uint8, torch.int64, torch.bfloat16, torch.float32, torch.float64, torch.bool]
TENSORS = st.builds(
    lambda dtype, shape: torch.arange(12).reshape(-1)[: shape[0] * shape[1]].to(dtype),
    st.sampled_from(DTYPES),
    st.tuples(st.integers(0, 3), st.integers(0, 4)),
)
ARRAYS = st.builds(
    lambda dtype, n: np.arange(n).astype(dtype),
    st.sampled_from(["<i8", "<f4", "|b1", ">u2"]),
    st.integers(0, 4),
)
SCALARS = st.sampled_from([np.float32(0.1), np.int64(-3), np.bool_(True), torch.tensor(7)])
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=4)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | TEXT | st.binary(max_size=4)
KEYS = TEXT | st.just("~") | st.integers() | st.tuples(st.integers())
STATES: Any = st.recursive(
    LEAVES | TENSORS | ARRAYS | SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(KEYS, inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
    ),
    max_leaves=8,
)


def _same(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, np.ndarray | np.generic):
        return one.dtype == other.dtype and np.array_equal(one, other)
    return repr(one) == repr(other)


@given(state=STATES)
def test_a_state_comes_back_as_it_was(state: Any) -> None:
    text = dumped(state)
    found = loaded(text)
    assert _same(state, found)
    assert dumped(found) == text


@pytest.mark.parametrize(
    "value", [object(), {1, 2}, np.array([None]), [{"a": 1j}]], ids=lambda v: type(v).__name__
)
def test_what_cannot_be_written_down_is_named(value: Any) -> None:
    with pytest.raises(ft.DataError, match=r"worker\.x.*expected what can be written down"):
        dumped({"x": value}, "worker")
