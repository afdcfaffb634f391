"""Whether targets are modes: what argmax says, of ties too, and nothing is left changed."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from functrain.objectives import modes
from functrain.objectives.modes import are_modes, are_modes_of

WAYS = pytest.mark.parametrize("many", [0, modes._MANY], ids=["many", "few"])
NUMBERS = st.sampled_from([-math.inf, -1.5, -0.0, 0.0, 2.0, 2.0, 7.25])


@WAYS
@given(data=st.data())
def test_they_are_what_argmax_says(many: int, data: st.DataObject) -> None:
    rows, vocabulary = data.draw(st.integers(0, 6)), data.draw(st.integers(1, 9))
    drawn = st.lists(NUMBERS, min_size=vocabulary, max_size=vocabulary)
    logits = torch.tensor([data.draw(drawn) for _ in range(rows)]).view(rows, vocabulary)
    targets = st.integers(0, vocabulary - 1)
    column = torch.tensor([data.draw(targets) for _ in range(rows)], dtype=torch.int64).view(-1, 1)
    expected = logits.argmax(-1, keepdim=True) == column
    before = logits.view(torch.int32).clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modes, "_MANY", many)
        assert are_modes(logits, column).equal(expected)
        assert are_modes_of(logits, column).equal(expected)
    assert logits.view(torch.int32).equal(before)


@given(seed=st.integers(0, 1000), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_of_many_numbers_too(seed: int, dtype: torch.dtype) -> None:
    """In bf16 several of 2,000 numbers are often the largest."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(20, 2000, generator=generator).to(dtype)
    assert logits.numel() >= modes._MANY
    column = torch.randint(0, 2000, (20, 1), generator=generator)
    column[:15] = logits[:15].argmax(-1, keepdim=True)
    expected = logits.argmax(-1, keepdim=True) == column
    assert expected.sum() >= 15
    assert are_modes(logits, column).equal(expected)
    assert are_modes_of(logits, column).equal(expected)


@WAYS
def test_rows_that_are_no_numbers_have_no_mode_and_nothing_fails(
    many: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modes, "_MANY", many)
    logits = torch.full((2, 4), math.nan)
    column = torch.zeros(2, 1, dtype=torch.int64)
    assert not are_modes(logits, column).any()
    assert not are_modes_of(logits, column).any()
