"""Floating-point operations: the known count of a decoder, and of a head by chunks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import functrain as ft
from functrain.models import DecoderConfig, decoder
from functrain.objectives import chunks

ROWS, TIME = 3, 16


def _batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 40, (ROWS, TIME), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids.clone()}


def _step(layers: int, **options: Any) -> tuple[ft.Step, ft.TrainState]:
    config = DecoderConfig(vocabulary=40, width=16, layers=layers, heads=2, hidden=32, tied=False)
    architecture, params, buffers = ft.split(decoder(config))
    step = ft.pretrain_step(architecture, ft.optim.adamw(), **options)
    return step, step.init(params, buffers)


@pytest.mark.parametrize("microbatches", [1, 3])
def test_the_products_of_a_decoder(microbatches: int) -> None:
    """Six operations for each weight and token, and attention's two products beside."""
    found = []
    for layers in (1, 2):
        step, state = _step(layers, microbatches=microbatches)
        before = ft.fingerprint(state)
        found.append(ft.flops_of(step, state, _batch()))
        assert ft.fingerprint(state) == before
    weights = 4 * 16 * 16 + 3 * 16 * 32
    # Forward 2 and backward 5 products of [time, time, width]: flash attention makes one again.
    attention = 7 * 2 * ROWS * TIME * TIME * 16
    assert found[1] - found[0] == 6 * ROWS * TIME * weights + attention


def test_a_head_by_chunks_takes_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head's 6 operations; of rows that predict nothing it makes no logits at all."""
    step, state = _step(1)
    whole = ft.flops_of(step, state, _batch())
    monkeypatch.setattr(chunks, "BUDGET", 0)
    chunked = ft.flops_of(step, state, _batch())
    assert whole - chunked == 6 * ROWS * 40 * 16


def test_what_is_recomputed_counts_where_it_is_asked_for() -> None:
    plain, state = _step(2)
    recomputing, _ = _step(2, checkpoint="model.layers.*")
    alone = ft.flops_of(plain, state, _batch())
    assert ft.flops_of(plain, state, _batch(), recomputed=False) == alone
    assert ft.flops_of(recomputing, state, _batch(), recomputed=False) == alone
    # Of each block all but its last product, which nothing in its backward pass asks for.
    weights, attention = 4 * 16 * 16 + 2 * 16 * 32, 2 * 2 * ROWS * TIME * TIME * 16
    again = 2 * (2 * ROWS * TIME * weights + attention)
    assert ft.flops_of(recomputing, state, _batch()) == alone + again


def test_bad_input_is_the_steps() -> None:
    step, state = _step(1)
    with pytest.raises(ft.BatchError, match="labels: missing"):
        ft.flops_of(step, state, {"input_ids": _batch()["input_ids"]})
