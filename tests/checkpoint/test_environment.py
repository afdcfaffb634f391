"""Numerics: what the bits depend on is written down, and a difference is said before it shows."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo

import functrain as ft
from functrain import checkpoint
from functrain.checkpoint import environment as module
from functrain.errors import NumericsWarning


@pytest.fixture
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def _state(**options: Any) -> ft.TrainState:
    architecture, params, buffers = zoo.split("tied")
    return ft.pretrain_step(architecture, ft.optim.adamw(), **options).init(params, buffers)


def test_they_are_plain_and_repeatable_and_disturb_nothing() -> None:
    before = torch.default_generator.get_state()
    first = checkpoint.numerics()
    module._cached.clear()
    assert checkpoint.numerics() == first
    assert torch.equal(torch.default_generator.get_state(), before)
    assert {"torch", "capability", "threads", "deterministic", "canary"} <= first.keys()
    assert all(isinstance(value, str | int | bool) for value in first.values())


@pytest.mark.parametrize("index", range(len(module._OPERATIONS)))
def test_the_canary_hears_every_operation(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A last bit that is another in any of them is another hash."""
    heard = module.canary(torch.device("cpu"))
    operation = module._OPERATIONS[index]

    def off_by_a_bit(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        out = operation(x, weight).clone().reshape(-1)
        out.view(torch.uint8)[0] ^= 1
        return out

    operations = list(module._OPERATIONS)
    operations[index] = off_by_a_bit
    monkeypatch.setattr(module, "_OPERATIONS", tuple(operations))
    assert module.canary(torch.device("cpu")) != heard


def test_the_canary_is_heard_anew_under_settings_that_have_no_name() -> None:
    heard, keys = checkpoint.numerics()["canary"], set(module._cached)
    try:
        torch.backends.mkldnn.enabled = False
        assert checkpoint.numerics()["canary"] == module.canary(torch.device("cpu"))
        assert set(module._cached) - keys
        if torch.set_flush_denormal(True):
            assert checkpoint.numerics()["canary"] != heard
    finally:
        torch.set_flush_denormal(False)
        torch.backends.mkldnn.enabled = True
    assert checkpoint.numerics()["canary"] == heard


@pytest.mark.usefixtures("two_threads")
def test_another_number_of_threads_is_named(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    state = _state()
    ft.save(tmp_path, state)
    torch.set_num_threads(2)
    with pytest.warns(NumericsWarning, match="not with the same bits: .*threads 1 then, 2 now"):
        loaded = ft.load(tmp_path, like=state)
    assert ft.fingerprint(loaded) == ft.fingerprint(state)
    with pytest.raises(ft.CheckpointError, match="threads 1 then, 2 now; put them back, or load"):
        ft.load(tmp_path, like=state, strict=True)


def test_conditions_of_the_callers_own_are_compared(tmp_path: Path) -> None:
    state = _state()
    ft.save(tmp_path, state, conditions={"microbatches": 4})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ft.load(tmp_path, like=state, strict=True)
        ft.load(tmp_path, like=state, conditions={"microbatches": 4}, strict=True)
    with pytest.raises(ft.CheckpointError, match="microbatches 4 then, 2 now"):
        ft.load(tmp_path, like=state, conditions={"microbatches": 2}, strict=True)


@pytest.mark.parametrize(
    ("given", "other", "shown"),
    [
        ((0.9, 0.95), [0.9, 0.99], r"\[0.9, 0.95\] then"),
        (math.inf, -math.inf, "'inf'} then, {'float': '-inf'} now"),
        (math.nan, 0.0, "'nan'} then, 0.0 now"),
        ({"a": (1, {"b": math.inf})}, None, "now"),
    ],
)
def test_conditions_are_compared_as_a_manifest_holds_them(
    given: Any, other: Any, shown: str, tmp_path: Path
) -> None:
    """It has no tuples and no infinities: the same value is the same again all the same."""
    state = _state()
    ft.save(tmp_path, state, conditions={"value": given})
    ft.load(tmp_path, like=state, conditions={"value": given}, strict=True)
    with pytest.raises(ft.CheckpointError, match=rf"value .*{shown}"):
        ft.load(tmp_path, like=state, conditions={"value": other}, strict=True)


@pytest.mark.parametrize("bad", [Path("x"), {1: 2}, 2**64, torch.ones(1), {3}], ids=repr)
def test_a_condition_that_json_cannot_hold_is_named(bad: Any, tmp_path: Path) -> None:
    state = _state()
    with pytest.raises(ft.CheckpointError, match=r"conditions: .*expected numbers, texts"):
        ft.save(tmp_path, state, conditions={"value": bad})
    writer = checkpoint.BackgroundWriter(tmp_path)
    with pytest.raises(ft.CheckpointError, match="conditions: "):
        writer.save(state, conditions={"value": bad})
    writer.close()
    assert ft.latest(tmp_path) is None
    ft.save(tmp_path, state)
    with pytest.raises(ft.CheckpointError, match="conditions: "):
        ft.load(tmp_path, like=state, conditions={"value": bad})


def test_the_loop_writes_its_conditions(tmp_path: Path) -> None:
    architecture, params, buffers = zoo.split("tied")
    step = ft.pretrain_step(architecture, ft.optim.adamw(1e-2), microbatches=2, precision="bf16")
    for _ in ft.train(step, step.init(params, buffers), zoo.Batches(), steps=1, directory=tmp_path):
        pass
    found = checkpoint.inspect(tmp_path)["numerics"]
    assert (found["microbatches"], found["batch_size"], found["precision"]) == (2, 4, "bf16")


def test_the_canary_is_the_same_in_every_context_in_which_a_step_is() -> None:
    cpu = torch.device("cpu")
    expected = module.canary(cpu)
    for context in (torch.inference_mode(), torch.autocast("cpu"), torch.device("meta")):
        with context:
            assert module.canary(cpu) == expected
    torch.set_default_dtype(torch.float64)
    try:
        assert module.canary(cpu) == expected
    finally:
        torch.set_default_dtype(torch.float32)
