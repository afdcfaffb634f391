"""Rows of tensors: an optimizer gives each element the bits that it has in the whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import functrain as ft
from functrain.distributed.sharding import sharding
from functrain.distributed.shards import rows_of
from functrain.distributed.world import World
from functrain.trees import Tensors

OPTIMIZERS = {
    "adamw": ft.optim.adamw(1e-2, weight_decay=0.1),
    "adam": ft.optim.adam(1e-2),
    "sgd": ft.optim.sgd(1e-2, momentum=0.9),
}


class _One(nn.Module):
    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))


def _updated(update: Any, params: Tensors, grads: list[Tensors], begun: Any) -> list[Tensors]:
    seen = []
    for each in grads:
        params, begun = update(each, begun, params, 1e-2)
        seen += [params, *begun.slots.values()]
    return seen


@pytest.mark.parametrize("name", OPTIMIZERS)
@given(data=st.data())
def test_rows_are_updated_to_the_bits_of_the_whole(name: str, data: st.DataObject) -> None:
    """In vectors, and among the last elements that fill none, whichever worker has them."""
    rows = data.draw(st.integers(1, 70))
    shape = data.draw(st.sampled_from([(rows,), (rows, 1), (rows, 3), (rows, 18), (rows, 16)]))
    size = data.draw(st.sampled_from([2, 4, 8]))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    architecture, params, _ = ft.split(_One(shape))
    grads = [Tensors({"weight": torch.randn(shape)}) for _ in range(3)]
    optimizer = OPTIMIZERS[name]
    whole = _updated(optimizer.update, params, grads, optimizer.init(params))
    for rank in range(size):
        at = rows_of(rows, rank, size)

        def own(items: Tensors, begin: int = at.begin, end: int = at.end) -> Tensors:
            return Tensors({"weight": items["weight"][begin:end].clone()})

        shared = sharding(architecture, World(rank=rank, size=size), tree=True)
        mine, given_here = own(params), [own(each) for each in grads]
        found = _updated(shared.placed(optimizer.update), mine, given_here, optimizer.init(mine))
        for ours, theirs in zip(found, whole, strict=True):
            if theirs["weight"].ndim:
                assert torch.equal(ours["weight"], own(theirs)["weight"])
