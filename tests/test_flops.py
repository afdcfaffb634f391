"""Floating-point operations: the known count of a decoder, and of a head by chunks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from models import families
from torch import nn

import functrain as ft
from functrain.flops import counter
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
    keeping, _ = _step(2, checkpoint="model.layers.*", recompute="selective")
    assert ft.flops_of(keeping, state, _batch()) == alone


@pytest.mark.parametrize("kind", ["padding_free", "shared_prompt", "packed"])
def test_what_is_tried_once_is_not_counted(kind: str) -> None:
    """Whether a model keeps sequences apart is found in its first step alone."""
    config = DecoderConfig(vocabulary=40, width=16, layers=1, heads=2, hidden=32, tied=False)
    architecture, params, buffers = ft.split(decoder(config))
    batch: Any = _batch()
    if kind == "packed":
        places = torch.arange(8).repeat(ROWS, 2)
        labels = batch["labels"].masked_fill(places == 0, -100)
        step = ft.pretrain_step(architecture, ft.optim.adamw())
        batch = {**batch, "labels": labels, "position_ids": places}
    else:
        reference = ft.trees.clone(params)
        step = ft.dpo_step(architecture, ft.optim.adamw(), reference=reference, layout=kind)  # type: ignore[arg-type]
        batch = {"chosen": batch, "rejected": {k: v.roll(1, 0) for k, v in batch.items()}}
    state = step.init(params, buffers)
    first = ft.flops_of(step, state, batch)
    assert ft.flops_of(step, state, batch) == first


def _of(config: Any) -> int:
    architecture, params, buffers = families.stirred(config)
    step = ft.pretrain_step(architecture, ft.optim.adamw())
    ids = _batch()["input_ids"] % 31
    return ft.flops_of(step, step.init(params, buffers), {"input_ids": ids, "labels": ids})


def test_a_mixture_takes_what_the_experts_of_a_token_take() -> None:
    """Two of 24 are a layer of 48; and a router of 4 in each of 2 layers."""
    dense = transformers.LlamaConfig(**{**families.GROUPED, "intermediate_size": 48})
    routers = 2 * 6 * ROWS * TIME * 16 * 4
    assert _of(families.CONFIGS["mixtral"]()) == _of(dense) + routers


@pytest.mark.parametrize("shapes", [((8, 4), (2, 4, 12)), ((2, 8, 4), (4, 12))])
def test_each_row_or_column_is_multiplied_with_its_own_group(shapes: Any) -> None:
    """In the products of experts and in those of their gradients."""
    given = [torch.ones(shape, requires_grad=True) for shape in shapes]
    ends = torch.tensor([4, 8 if len(shapes[0]) == 2 else 12], dtype=torch.int32)
    with counter() as counted:
        torch._grouped_mm(*given, offs=ends).square().sum().backward()
    assert counted.get_total_flops() == 3 * 2 * 8 * 4 * 12


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("make", [nn.Conv1d, nn.ConvTranspose1d])
def test_each_gradient_of_a_convolution_takes_what_it_takes(make: Any, groups: int) -> None:
    """Also where channels are convolved by themselves."""
    convolution = make(8, 8, 4, groups=groups)
    with counter() as counted:
        out = convolution(torch.ones(2, 8, 32, requires_grad=True))
        forward = counted.get_total_flops()
        out.sum().backward()
    places = 32 if convolution.transposed else 29
    assert forward == 2 * 2 * places * 4 * 8 * 8 // groups
    assert counted.get_total_flops() == 3 * forward


def test_bad_input_is_the_steps() -> None:
    step, state = _step(1)
    with pytest.raises(ft.BatchError, match="labels: missing"):
        ft.flops_of(step, state, {"input_ids": _batch()["input_ids"]})
