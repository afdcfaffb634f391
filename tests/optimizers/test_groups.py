"""Parameter groups by predicate."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from torch import nn

import functrain as ft
from functrain import optim
from functrain.errors import ConfigError
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


ONE = optim.group(optim.is_any, weight_decay=0.0)
WRONG: list[tuple[Callable[[Any], Any], str]] = [
    (lambda make: make(groups=ONE), "groups: one Group, expected a sequence of them: groups=[gr"),
    (lambda make: make(groups=[{"lr": 1.0}]), "groups[0]: expected optim.group(where, …), got di"),
    (lambda make: make(groups=[ONE, 3]), "groups[1]: expected optim.group(where, …), got int"),
    (lambda make: make(groups="bias"), "groups: 'bias', expected a sequence of optim.group(whe"),
    (lambda make: make(groups=None), "groups: None, expected a sequence of optim.group(where, …)"),
    (lambda make: make(groups={"b": ONE}), "groups[0]: expected optim.group(where, …), got str"),
    (lambda _: optim.group("bias", eps=1.0), "group: 'bias', expected a predicate: lambda name, "),  # type: ignore[arg-type]
    (lambda _: optim.Group(where=None, options={}), "group: None, expected a predicate"),  # type: ignore[arg-type]
    (lambda _: optim.Group(where=optim.is_any, options=3), "group options: 3, expected a mapping"),  # type: ignore[arg-type]
    *(
        (
            lambda _, scale=scale: optim.group(optim.is_any, lr_scale=scale),  # type: ignore[misc]
            f"group lr_scale: {scale!r}, expected a finite number of at least 0",
        )
        for scale in ("x", None, True, -1.0, float("nan"), float("inf"))
    ),
]


@pytest.mark.parametrize(("make", "message"), WRONG, ids=[message for _, message in WRONG])
@pytest.mark.parametrize("optimizer", [optim.adamw, optim.adam, optim.sgd, optim.adafactor])
def test_what_is_no_group_is_refused(
    optimizer: Any, make: Callable[..., Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        make(optimizer)


def test_groups_may_be_any_iterable() -> None:
    assert optim.adamw(groups=iter([ONE])).groups == optim.sgd(groups=[ONE]).groups == (ONE,)
    assert (
        optim.sgd(groups=[optim.group(optim.is_any, lr_scale=0)]).groups[0].options["lr_scale"] == 0
    )


def test_a_vector_of_any_name_is_not_decayed() -> None:
    class Gated(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = torch.nn.Parameter(torch.ones(3))
            self.matrix = torch.nn.Parameter(torch.ones(3, 3))

    module = Gated()
    where = ft.optim.no_decay(module).where
    assert [n for n, p in module.named_parameters() if where(n, p)] == ["gate"]
