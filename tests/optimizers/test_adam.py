"""AdamW and Adam over torch's kernel: what they carry, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from functrain import optim
from functrain.errors import ConfigError, StateError
from functrain.trees import Tensors, clone

PARAMS = Tensors(b=torch.ones(2), a=torch.ones(3, 2), half=torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize(
    ("optimizer", "kind"),
    [
        (optim.adamw(), "adamw"),
        (optim.adamw(amsgrad=True), "adamw(amsgrad)"),
        (optim.adam(), "adam"),
        (optim.adam(amsgrad=True), "adam(amsgrad)"),
    ],
)
def test_the_state_begins_at_zero_under_torchs_names(optimizer: Any, kind: str) -> None:
    """Moments in the params' shapes and dtypes; a step count for each."""
    state = optimizer.init(PARAMS)
    moments = {"exp_avg", "exp_avg_sq"} | ({"max_exp_avg_sq"} if "amsgrad" in kind else set())
    assert state.kind == optimizer.kind == kind
    assert state.slots.keys() == moments | {"step"}
    assert state.count.dtype == torch.int64
    for slot, tensors in state.slots.items():
        assert list(tensors) == ["a", "b", "half"]
        for name, tensor in tensors.items():
            expected = (torch.float32, ()) if slot == "step" else (PARAMS[name].dtype,)
            assert (tensor.dtype, tensor.shape)[: len(expected)] == expected
            assert not tensor.any()


def test_the_learning_rate_may_be_a_number_or_a_tensor() -> None:
    optimizer = optim.adamw(weight_decay=0.1)
    grads = {name: torch.full_like(p, 0.3) for name, p in PARAMS.items()}
    results = [
        optimizer.update(grads, optimizer.init(PARAMS), PARAMS, rate)[0]
        for rate in (1e-3, torch.tensor(1e-3, dtype=torch.float64))
    ]
    assert all(torch.equal(results[0][name], results[1][name]) for name in PARAMS)


def test_a_group_may_have_its_own_betas_and_eps() -> None:
    """Over three updates of different gradients: Adam's first does not depend on the betas."""
    own = {"betas": (0.5, 0.6), "eps": 0.1}
    grouped = optim.adamw(groups=[optim.group(lambda n, _: n == "b", **own)])
    reached = []
    for optimizer in (grouped, optim.adamw(**own), optim.adamw(eps=0.1)):
        params, state = PARAMS, optimizer.init(PARAMS)
        for size in (0.3, -0.1, 0.7):
            grads = {name: torch.full_like(p, size) for name, p in PARAMS.items()}
            params, state = optimizer.update(grads, state, params, 1e-2)
        reached.append(params)
    new, alone, plain = reached
    assert torch.equal(new["b"], alone["b"])
    assert not torch.equal(new["a"], alone["a"])
    assert not torch.equal(alone["b"], plain["b"])


WRONG: list[tuple[Callable[[], Any], str]] = [
    (lambda: optim.adamw(-1.0), "adamw lr: -1.0, expected a finite number of at least 0"),
    (lambda: optim.adamw(eps=-1.0), "adamw eps: -1.0, expected a finite number"),
    (lambda: optim.adamw(betas=(1.0, 0.9)), "adamw betas: 1.0, expected a number in"),
    (lambda: optim.adam(weight_decay=-0.1), "adam weight_decay: -0.1, expected"),
    (
        lambda: optim.adamw(groups=[optim.group(optim.is_any, momentum=0.9)]),
        "group option 'momentum': an Adam group may set betas, eps, weight_decay and lr_scale",
    ),
    (
        lambda: optim.adamw(groups=[optim.group(optim.is_any, lr=0.9)]),
        "group option 'lr': an Adam group may set",
    ),
    (
        lambda: optim.adam(groups=[optim.group(optim.is_any, weight_decay=-1.0)]),
        "adam weight_decay: -1.0, expected",
    ),
]


@pytest.mark.parametrize(("make", "message"), WRONG, ids=[message for _, message in WRONG])
def test_what_is_out_of_range_is_named(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


NUMBERS = st.floats(-2.0, 2.0) | st.sampled_from([0.0, -0.0, 1.0, 1 - 1e-16, 5e-324])


@given(lr=NUMBERS, betas=st.tuples(NUMBERS, NUMBERS), eps=NUMBERS, weight_decay=NUMBERS)
def test_what_is_refused_is_what_torch_refuses(**options: Any) -> None:
    refused = False
    try:
        torch.optim.AdamW([torch.zeros(1)], **options)
    except ValueError:
        refused = True
    with pytest.raises(ConfigError) if refused else nullcontext():
        optim.adamw(**options)


def _state(**slots: Any) -> Any:
    state = optim.adamw().init(PARAMS)
    return attrs.evolve(state, slots={**state.slots, **slots})


STATES: list[tuple[Any, str]] = [
    (optim.adamw().init({"b": PARAMS["b"]}), r"state/exp_avg: no a; the state was made for other"),
    (_state(exp_avg_sq={}), "state/exp_avg_sq: no "),
    (
        _state(exp_avg={**PARAMS, "a": torch.zeros(1, 2)}),
        r"state/exp_avg/a: shape \[1, 2\], expected \[3, 2\]; the state was made for other params",
    ),
    (_state(step={**PARAMS}), r"state/step/.*: shape \[.*\], expected \[\]"),
    (
        _state(exp_avg={**PARAMS, "a": torch.zeros(2, 3).t()}),
        r"state/exp_avg/a: strides \(1, 3\), expected the parameter's \(2, 1\) for the fused",
    ),
    (
        _state(exp_avg={**PARAMS, "a": torch.zeros(3, 2, dtype=torch.float64)}),
        r"state/exp_avg/a: torch.float64, expected torch.float32 as the parameter is",
    ),
]


@pytest.mark.parametrize(("state", "message"), STATES, ids=[message for _, message in STATES])
@pytest.mark.parametrize("donate", [False, True])
def test_a_state_of_other_params_is_refused(state: Any, message: str, donate: bool) -> None:
    grads = {name: torch.full_like(p, 0.3) for name, p in PARAMS.items()}
    with pytest.raises(StateError, match=message):
        optim.adamw().update(grads, state, PARAMS, 1e-2, donate=donate)


CHANGES: dict[str, tuple[Callable[[Tensor], object], str]] = {
    "smaller": (lambda t: t.resize_(1, 2), r"shape \[1, 2\], expected \[3, 2\]"),
    "other memory": (lambda t: setattr(t, "data", torch.zeros(2, 2)), r"shape \[2, 2\]"),
    "in columns": (lambda t: setattr(t, "data", torch.zeros(2, 3).t()), r"strides \(1, 3\)"),
}


@pytest.mark.parametrize("change", sorted(CHANGES))
@pytest.mark.parametrize("donate", [False, True])
def test_what_did_fit_is_not_taken_for_granted(change: str, donate: bool) -> None:
    """After updates that fitted, a moment that is no longer what it was: the fused kernel takes
    sizes on trust, and would write past its end."""
    optimizer = optim.adamw()
    grads = {name: torch.full_like(p, 0.3) for name, p in PARAMS.items()}
    params = clone(PARAMS)
    state = optimizer.init(params)
    for _ in range(2):
        params, state = optimizer.update(grads, state, params, 1e-2, donate=donate)
    changed, message = CHANGES[change]
    changed(state.slots["exp_avg"]["a"])
    with pytest.raises(StateError, match=rf"state/exp_avg/a: {message}"):
        optimizer.update(grads, state, params, 1e-2, donate=donate)


def test_complex_params_are_for_another_kernel_than_the_fused_one() -> None:
    params = {"a": torch.ones(2), "c": torch.ones(2, dtype=torch.complex64)}
    with pytest.raises(ConfigError, match=r"adamw: params/c is .*complex64.*fused=False"):
        optim.adamw().init(params)
    optimizer = optim.adamw(fused=False)
    new, _ = optimizer.update(params, optimizer.init(params), params, 1e-2)
    assert new["c"].is_complex()


def test_a_parameter_without_a_gradient_may_lie_as_it_likes() -> None:
    """A slice of a larger tensor, whose moments have other strides."""
    optimizer = optim.adamw()
    params = Tensors(used=torch.ones(3), unused=torch.ones(3, 5)[:, :2])
    after, _ = optimizer.update({"used": torch.ones(3)}, optimizer.init(params), params, 1e-2)
    assert after["unused"] is params["unused"]


def test_params_in_columns_are_updated_as_those_in_rows() -> None:
    """Strides that leave no gap are kept; a slice of a larger tensor is not for `donate`."""
    optimizer = optim.adamw()
    grads = {"a": torch.randn(3, 2)}
    rows = Tensors(a=torch.randn(3, 2))
    expected, _ = optimizer.update(grads, optimizer.init(rows), rows, 1e-2)
    columns = Tensors(a=rows["a"].t().contiguous().t())
    gaps = Tensors(a=torch.zeros(6, 2)[::2].copy_(rows["a"]))
    for params in (columns, gaps):
        new, _ = optimizer.update(grads, optimizer.init(params), params, 1e-2)
        assert torch.equal(new["a"], expected["a"])
    with pytest.raises(StateError, match="or take fused=False"):
        optimizer.update(grads, optimizer.init(gaps), gaps, 1e-2, donate=True)


@pytest.mark.parametrize("rate", [np.float32(0.5), np.array(0.5), torch.tensor(0.5), 0.5])
def test_a_rate_is_a_number_of_any_library(rate: Any) -> None:
    optimizer = optim.adamw()
    grads = {name: torch.ones_like(tensor) for name, tensor in PARAMS.items()}
    found, _ = optimizer.update(grads, optimizer.init(PARAMS), PARAMS, rate)
    expected, _ = optimizer.update(grads, optimizer.init(PARAMS), PARAMS, 0.5)
    assert all(torch.equal(found[name], expected[name]) for name in PARAMS)
