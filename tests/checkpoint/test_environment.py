"""Numerics: what the bits depend on is written down, and a difference is said before it shows."""

from __future__ import annotations

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


def test_the_loop_writes_its_conditions(tmp_path: Path) -> None:
    architecture, params, buffers = zoo.split("tied")
    step = ft.pretrain_step(architecture, ft.optim.adamw(1e-2), microbatches=2, precision="bf16")
    for _ in ft.train(step, step.init(params, buffers), zoo.Batches(), steps=1, directory=tmp_path):
        pass
    found = checkpoint.inspect(tmp_path)["numerics"]
    assert (found["microbatches"], found["batch_size"], found["precision"]) == (2, 4, "bf16")
