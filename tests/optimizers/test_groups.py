"""Parameter groups by predicate."""

from __future__ import annotations

import pytest
import torch
import zoo
from torch import nn

import functrain as ft
from functrain import optim
from functrain.optimizers.base import grouped

NO_DECAY = {
    "decoder": {"norm", "embed"},
    "normed": {"norm", "embedding", "bias"},
    "tied": {"norm", "embedding", "bias"},
}


@pytest.mark.parametrize("name", sorted(zoo.MODELS))
@pytest.mark.parametrize("after_split", [False, True])
def test_biases_norms_and_embeddings_are_not_decayed(name: str, after_split: bool) -> None:
    """A tied head is its embedding; the architecture serves as well as the module."""
    module = zoo.model(name)
    params = {n: p.detach() for n, p in module.named_parameters()}
    exempt = optim.no_decay(ft.split(module)[0] if after_split else module)
    assert exempt.options == {"weight_decay": 0.0}
    for parameter, tensor in params.items():
        expected = any(part in parameter for part in NO_DECAY[name])
        assert exempt.where(parameter, tensor) is expected, parameter


def test_a_norm_over_two_dimensions_is_a_norm() -> None:
    exempt = optim.no_decay(nn.ModuleDict({"n": nn.LayerNorm((3, 4)), "l": nn.Linear(3, 4)}))
    assert exempt.where("n.weight", torch.ones(3, 4))
    assert not exempt.where("l.weight", torch.ones(4, 3))


def test_the_first_match_counts_and_the_rest_has_the_defaults() -> None:
    params = {name: torch.zeros(1) for name in ("a", "b", "c", "unused")}
    groups = [
        optim.group(lambda n, _: n == "b", eps=1.0),
        optim.group(lambda n, _: n in "ab", eps=2.0),
        optim.group(lambda n, _: n == "z", eps=3.0),
    ]
    grads = {name: tensor for name, tensor in params.items() if name != "unused"}
    found = list(grouped(groups, params, grads))
    assert found == [({"eps": 1.0}, ["b"]), ({"eps": 2.0}, ["a"]), ({}, ["c"])]


def test_a_predicate_sees_the_tensor() -> None:
    params = {"matrix": torch.zeros(2, 2), "vector": torch.zeros(2)}
    found = list(grouped([optim.group(lambda _, t: t.ndim < 2)], params, params))
    assert found == [({}, ["vector"]), ({}, ["matrix"])]
