"""Several optimizers at once: each trains its own parameters as it would alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from torch import nn

import functrain as ft
from functrain import optim
from functrain.errors import ConfigError, StateError
from functrain.trees import Tensors, digest


def _grads(params: Tensors, step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(p.shape, generator=generator) for name, p in params.items()}


def _run(optimizer: Any, params: Tensors, grads_of: Tensors, **options: Any) -> Any:
    state = optimizer.init(params)
    for step in range(10):
        grads = {n: g for n, g in _grads(grads_of, step).items() if n in params}
        params, state = optimizer.update(grads, state, params, 1e-2 / (step + 1), **options)
    return params, state


@pytest.mark.parametrize("donate", [False, True])
def test_muon_is_torchs_for_hidden_matrices_and_adamw_for_the_rest(donate: bool) -> None:
    module = zoo.model("decoder")
    hidden = {n for n, p in module.named_parameters() if optim.is_hidden_matrix(n, p)}
    params = ft.split(zoo.model("decoder"))[1]
    assert hidden
    assert hidden != set(params)
    named = dict(module.named_parameters())
    theirs = [
        torch.optim.Muon(
            [p for n, p in named.items() if n in hidden],
            weight_decay=0.1,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(
            [p for n, p in named.items() if n not in hidden], weight_decay=0.1, fused=True
        ),
    ]
    for step in range(10):
        for name, grad in _grads(params, step).items():
            named[name].grad = grad
        for each in theirs:
            each.param_groups[0]["lr"] = 1e-2 / (step + 1)
            each.step()
    ours, state = _run(optim.muon(), ft.trees.clone(params), params, donate=donate)
    assert all(torch.equal(ours[name], leaf) for name, leaf in named.items())
    assert state.kind == optim.muon().kind == "muon=Muon,others=adamw"
    assert state.slots.keys() == {
        "muon.momentum_buffer",
        "others.exp_avg",
        "others.exp_avg_sq",
        "others.step",
    }
    assert int(state.count) == 10


def test_a_part_does_as_it_would_alone() -> None:
    params = zoo.split("tied")[1]
    parts = [("slow", lambda n, _: n == "mix.weight", optim.sgd(momentum=0.9))]
    both, _ = _run(optim.partition([*parts, ("rest", optim.is_any, optim.adam())]), params, params)
    alone, _ = _run(optim.sgd(momentum=0.9), Tensors({"mix.weight": params["mix.weight"]}), params)
    others = Tensors({n: p for n, p in params.items() if n != "mix.weight"})
    rest, _ = _run(optim.adam(), others, params)
    for name, tensor in both.items():
        assert torch.equal(tensor, alone[name] if name == "mix.weight" else rest[name]), name


def test_nothing_is_applied_where_nothing_is_to_be() -> None:
    params = zoo.split("tied")[1]
    optimizer = optim.muon()
    params, state = _run(optimizer, params, params)
    before = [digest(t) for own in (params, *state.slots.values()) for t in own.values()]
    new, after = optimizer.update(
        _grads(params, 3), state, params, 1e-2, applied=torch.tensor(False)
    )
    assert [digest(t) for own in (new, *after.slots.values()) for t in own.values()] == before
    assert int(after.count) == int(state.count)


def test_a_part_without_a_gradient_stands_still() -> None:
    """All matrices frozen, say: the others are trained."""
    params = zoo.split("tied")[1]
    optimizer = optim.muon()
    grads = {n: g for n, g in _grads(params, 0).items() if n.startswith("norm.")}
    new, _ = optimizer.update(grads, optimizer.init(params), params, 1e-2)
    moved = {name for name, tensor in new.items() if not torch.equal(tensor, params[name])}
    assert moved == {"norm.weight", "norm.bias"}


@pytest.mark.parametrize(
    ("name", "hidden"),
    [
        ("model.layers.0.mlp.up_proj.weight", True),
        ("mix.weight", True),
        ("lm_head.weight", False),
        ("head.weight", False),
        ("transformer.wte.weight", False),
        ("transformer.wpe.weight", False),
        ("model.embed_tokens.weight", False),
        ("embedding.weight", False),
        ("output.weight", False),
    ],
)
def test_hidden_matrices_are_known_by_their_names(name: str, hidden: bool) -> None:
    assert optim.is_hidden_matrix(name, torch.zeros(2, 2)) is hidden
    assert not optim.is_hidden_matrix(name, torch.zeros(2))


def test_a_partition_that_leaves_a_parameter_out_is_refused() -> None:
    part = optim.partition([("matrices", optim.is_hidden_matrix, optim.adamw())])
    with pytest.raises(ConfigError, match=r"0.bias: no part of the partition takes it"):
        part.init(ft.split(nn.Sequential(nn.Linear(2, 2)))[1])


def test_what_no_part_could_take_is_refused_before_any_part_is_updated() -> None:
    """The parts see their own gradients only, so the whole is looked at first."""
    params = ft.trees.clone(zoo.split("tied")[1])
    optimizer = optim.muon()
    state = optimizer.init(params)
    before = [digest(t) for t in params.values()]
    for name, shape in (("norm.weight", (1,)), ("mix.weight", (1, 16)), ("mix.wieght", (16, 16))):
        grads = {**_grads(params, 0), name: torch.ones(shape)}
        with pytest.raises(StateError, match=f"grads/{name}"):
            optimizer.update(grads, state, params, 1e-2, donate=True)
    assert [digest(t) for t in params.values()] == before
    with pytest.raises(StateError, match="made by adamw and given to muon=Muon,others=adamw"):
        optimizer.update({}, optim.adamw().init(params), params, 1e-2)


@pytest.mark.parametrize("labels", [[], ["a", "a"], ["a.b"]])
def test_labels_are_distinct_and_without_dots(labels: list[str]) -> None:
    parts = [(label, optim.is_any, optim.adamw()) for label in labels]
    with pytest.raises(ConfigError, match="labels must be distinct and without dots"):
        optim.partition(parts)
