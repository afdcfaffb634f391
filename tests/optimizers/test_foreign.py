"""Optimizers of one's own in a step: what they return is taken, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import pytest
import torch
import zoo

import functrain as ft
from functrain.optimizers import OptimizerState
from functrain.trees import Tensors


def _state(**slots: Any) -> OptimizerState:
    return OptimizerState(kind="own", count=torch.zeros((), dtype=torch.int64), slots=slots)


@attrs.frozen
class Anchored:
    """SGD towards the params that it began with, which its state holds as they were given."""

    lr: float = 0.1
    kind: str = "own"

    def init(self, params: Any) -> OptimizerState:
        return _state(anchor=Tensors(params))

    def update(
        self, grads: Any, state: Any, params: Any, lr: Any, *, applied: Any = None, donate: bool
    ) -> Any:
        del applied
        new = {}
        for name, param in params.items():
            change = float(lr) * (grads[name] + 0.5 * (param - state.slots["anchor"][name]))
            new[name] = param.sub_(change) if donate else param - change
        return Tensors(new), state


@attrs.frozen
class Looking(Anchored):
    """SGD away from the params before, which its state holds as they were."""

    def init(self, params: Any) -> OptimizerState:
        return _state(before=ft.trees.clone(params))

    def update(
        self, grads: Any, state: Any, params: Any, lr: Any, *, applied: Any = None, donate: bool
    ) -> Any:
        del applied
        before = state.slots["before"]
        new = {n: p - float(lr) * grads[n] + 0.5 * (p - before[n]) for n, p in params.items()}
        if not donate:
            return Tensors(new), attrs.evolve(state, slots={"before": params})
        for name, param in params.items():
            before[name].copy_(param)
            param.copy_(new[name])
        return params, state


@attrs.frozen
class Doubled(Anchored):
    """SGD whose state holds the new params once more."""

    def update(
        self, grads: Any, state: Any, params: Any, lr: Any, *, applied: Any = None, donate: bool
    ) -> Any:
        del applied
        anchor = state.slots["anchor"]
        new = {n: p - float(lr) * grads[n] - 0.1 * anchor[n] for n, p in params.items()}
        if donate:
            for name, param in params.items():
                new[name] = param.copy_(new[name])
        return Tensors(new), attrs.evolve(state, slots={"anchor": Tensors(new)})


def _begun(optimizer: Any, **options: Any) -> tuple[Any, Any]:
    architecture, params, buffers = zoo.split("tied")
    step = ft.pretrain_step(architecture, optimizer, **options)
    return step, step.init(params, buffers)


@pytest.mark.parametrize("optimizer", [Anchored(), Looking()])
def test_a_state_that_holds_params_has_donated_the_bits_of_pure(optimizer: Any) -> None:
    found = []
    for donate in (False, True):
        step, state = _begun(optimizer, donate=donate)
        for index in range(3):
            state, _ = step(state, zoo.batch(index))
        found.append(ft.fingerprint(state))
    assert found[0] == found[1]


@pytest.mark.parametrize("optimizer", [Anchored(), Looking(), Doubled()])
@pytest.mark.parametrize("older", [0, 1])
def test_donating_writes_into_no_state_that_holds_the_same(optimizer: Any, older: int) -> None:
    """Neither the younger into the older, nor the other way round."""
    step, first = _begun(optimizer)
    first, _ = step(first, zoo.batch(0))
    second, _ = step(first, zoo.batch(1))
    expected, _ = step(second if older == 0 else first, zoo.batch(2))
    donated, kept = (second, first) if older == 0 else (first, second)
    before = ft.fingerprint(kept)
    found, _ = step(donated, zoo.batch(2), donate=True)
    assert ft.fingerprint(kept) == before
    assert ft.fingerprint(found) == ft.fingerprint(expected)


@attrs.frozen
class Giving(Anchored):
    """SGD that returns whatever `made` makes of the new params and the state."""

    made: Callable[[Any, Any], Any] = lambda params, state: (params, state)
    slots: Any = attrs.Factory(dict)

    def init(self, params: Any) -> Any:
        return self.slots(params) if callable(self.slots) else _state(**self.slots)

    def update(
        self, grads: Any, state: Any, params: Any, lr: Any, *, applied: Any = None, donate: bool
    ) -> Any:
        del applied, donate
        return self.made({n: p - float(lr) * grads[n] for n, p in params.items()}, state)


@pytest.mark.parametrize("donate", [False, True])
def test_plain_mappings_are_taken(donate: bool) -> None:
    def slots(params: Any) -> Any:
        return _state(m={name: torch.zeros_like(param) for name, param in params.items()})

    step, state = _begun(Giving(slots=slots), donate=donate)
    for _ in range(2):
        state, _ = step(state, zoo.batch())
    assert isinstance(state.params, Tensors)
    assert isinstance(state.optimizer.slots["m"], Tensors)


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda p, s: (dict(list(p.items())[1:]), s), "optimizer 'own': .* no params/.*; return"),
        (lambda p, s: ({**p, "more": torch.ones(1)}, s), "params/more, which it was not given"),
        (lambda p, s: ({n: t.double() for n, t in p.items()}, s), r"float64\[.*expected float32"),
        (lambda p, s: ({n: t[None] for n, t in p.items()}, s), r"float32\[1, .*expected float32"),
        (lambda p, s: ({**p, min(p): None}, s), "is a NoneType, expected a tensor"),
        (lambda p, s: p, "returned a dict, expected"),
        (lambda p, s: (list(p), s), "returned list and OptimizerState, expected"),
        (lambda p, s: (p, {}), "returned dict and dict, expected"),
        (lambda p, s: (p, attrs.evolve(s, slots={"m": 1})), "slot 'm' is a int, expected"),
        (lambda p, s: (p, attrs.evolve(s, slots={"m": {"a": 1}})), "'m' has a int of 'a', exp"),
    ],
)
def test_what_is_no_update_is_refused_by_name(made: Any, message: str, donate: bool) -> None:
    step, state = _begun(Giving(made=made))
    with pytest.raises(ft.ConfigError, match=message):
        step(state, zoo.batch(), donate=donate)
    assert ft.fingerprint(state)  # nothing was written, so that it lives


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        (lambda p: {"m": 1}, "init returned a dict, expected an OptimizerState"),
        (lambda p: _state(m=1), "slot 'm' is a int, expected"),
    ],
)
def test_what_is_no_state_is_refused_by_init(slots: Any, message: str) -> None:
    with pytest.raises(ft.ConfigError, match=message):
        _begun(Giving(slots=slots))


@attrs.frozen
class Turned(Anchored):
    """What it returns lies by columns."""

    def init(self, params: Any) -> OptimizerState:
        return _state(anchor={name: _by_columns(param) for name, param in params.items()})

    def update(self, *given: Any, **options: Any) -> Any:
        params, state = super().update(*given, **options)
        return {name: _by_columns(param) for name, param in params.items()}, state


def _by_columns(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.t().contiguous().t() if tensor.ndim == 2 else tensor


@pytest.mark.parametrize("donate", [False, True])
def test_what_lies_by_columns_is_put_in_order(donate: bool) -> None:
    """As a checkpoint gives it back."""
    architecture, params, buffers = zoo.split("tied")
    step = ft.pretrain_step(architecture, Turned(), donate=donate)
    state, _ = step(step.init(params, buffers), zoo.batch())
    for items in (state.params, *state.optimizer.slots.values()):
        assert all(tensor.is_contiguous() for tensor in items.values())


def test_a_slot_that_no_checkpoint_would_give_back_is_refused() -> None:
    """Its name and a parameter's are parted by a slash there."""

    class Slashed(Anchored):
        def init(self, params: Any) -> OptimizerState:
            return _state(**{"a/b": Tensors(params)})

    architecture, params, buffers = zoo.split("tied")
    step = ft.pretrain_step(architecture, Slashed())
    with pytest.raises(ft.ConfigError, match="slot 'a/b', expected a name without a slash"):
        step.init(params, buffers)


@attrs.frozen
class Careless(Anchored):
    """Writes in place, whether it may or not."""

    into: str = "params"

    def update(self, *given: Any, donate: bool, **options: Any) -> Any:
        if self.into == "slots":
            for anchor in given[1].slots["anchor"].values():
                anchor.mul_(0.5)
            return super().update(*given, donate=donate, **options)
        return super().update(*given, donate=True, **options)


@pytest.mark.parametrize("into", ["params", "slots"])
def test_an_update_that_writes_into_the_old_state_is_refused(into: str) -> None:
    """Where it is not donated: the old state would be another, and a reference with it."""
    step, state = _begun(Careless(into=into))
    with pytest.raises(ft.ConfigError, match="has written into the params or slots that it was"):
        step(state, zoo.batch())
    step, state = _begun(Careless(into=into), donate=True)
    step(state, zoo.batch())
