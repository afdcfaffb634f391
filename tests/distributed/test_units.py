"""What is on its way while a block computes, in which order, and that nothing else is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import functrain as ft
from functrain.architecture import bound, slots
from functrain.distributed.units import Binding, Values, find_units

BLOCKS = 4


class Block(nn.Linear):
    """A block that tells when it computes."""

    def __init__(self, number: int, told: list[str]) -> None:
        super().__init__(3, 3)
        self.number, self.told = number, told

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        self.told.append(f"call {self.number}")
        found = torch.tanh(super().forward(x))
        self.told.append(f"done {self.number}")
        return found


class Model(nn.Module):
    """Blocks that are called in an order of the model's own."""

    def __init__(self, order: Sequence[int]) -> None:
        super().__init__()
        self.order, self.told = order, list[str]()
        self.first = nn.Linear(3, 3)
        self.layers = nn.ModuleList(Block(n, self.told) for n in range(BLOCKS))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for number in self.order:
            x = self.layers[number](x)
        return x


class Whole:
    """One worker, which has all rows; what is asked of it is noted."""

    def __init__(self, told: list[str]) -> None:
        self.told = told

    def note(self, what: str, names: Sequence[str]) -> None:
        del what, names

    def gather(self, names: Sequence[str], shards: Sequence[Tensor]) -> Any:
        name = _number(names)
        self.told.append(f"send {name}")
        outer, found = self, [shard.detach().clone() for shard in shards]

        class Coming:
            def whole(self) -> list[Tensor]:
                outer.told.append(f"there {name}")
                return found

        return Coming()


class Sums:
    """Sums over one worker."""

    def __init__(self, told: list[str]) -> None:
        self.told, self.found = told, dict[str, Tensor]()
        self.under_way: list[tuple[str, Tensor | None]] = []

    def begin(self, names: Sequence[str], grads: Sequence[Tensor | None]) -> None:
        self._wait()
        self.told.append(f"sum {_number(names)}")
        self.under_way = list(zip(names, grads, strict=True))

    def finish(self) -> None:
        self._wait()
        self.told.append("finish")

    def _wait(self) -> None:
        for name, grad in self.under_way:
            if grad is not None:
                self.found[name] = self.found.get(name, torch.zeros(())) + grad
        self.under_way = []


def _number(names: Sequence[str]) -> str:
    return names[0].split(".")[1] if names[0].startswith("layers.") else "root"


def _run(order: Sequence[int], passes: int = 1) -> tuple[list[str], dict[str, Tensor], Any]:
    """What was told, the gradients in shards, and those of the whole model."""
    torch.manual_seed(0)
    module, x = Model(order), torch.randn(2, 3)
    for _ in range(passes):
        module(x).sum().backward()
    expected = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    told = module.told
    told.clear()
    architecture, params, buffers = ft.split(module)
    places = slots(architecture)
    units = find_units(architecture, places)
    sums = Sums(told)
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in params.items()}
    values = Values(units, leaves, Whole(told), sums)
    binding = Binding(units, places, values)
    empty = binding.empty(params, {name: tensor.shape for name, tensor in params.items()})
    with bound(architecture, empty, buffers, places=places) as model, binding.bound(()):
        for _ in range(passes):
            model(x).sum().backward(inputs=list(leaves.values()))
            told.append("end")
    return told, sums.found, expected


def test_the_next_block_is_on_its_way_while_one_computes() -> None:
    told, _, _ = _run(range(BLOCKS))

    def at(what: str, which: int = 0) -> int:
        return [n for n, each in enumerate(told) if each == what][which]

    for number in range(BLOCKS - 1):
        assert at(f"send {number + 1}") < at(f"call {number}")
        assert at(f"there {number + 1}") > at(f"done {number}")
    for number in range(1, BLOCKS):
        # Backward: sent for before the block behind it has ended, and there when it is needed.
        assert at(f"send {number - 1}", 1) < at(f"sum {number}") < at(f"there {number - 1}", 1)
    assert told[-2:] == ["finish", "end"]
    assert sum(each.startswith("send") for each in told) == 1 + 2 * BLOCKS


@given(order=st.lists(st.integers(0, BLOCKS - 1), max_size=6), passes=st.integers(1, 3))
def test_in_any_order_the_gradients_are_right_and_one_guess_at_most_is_wrong(
    order: list[int], passes: int
) -> None:
    told, found, expected = _run(order, passes)
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad)
    sent = [each.split()[1] for each in told if each.startswith("send")]
    there = [each.split()[1] for each in told if each.startswith("there")]
    assert sorted(sent) == sorted(there)  # nothing is left under way
    assert len(sent) <= 1 + 2 * passes * len(order) + 1


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0], [0, 0, 2]])
def test_sums_are_there_when_a_backward_pass_ends(order: list[int]) -> None:
    told, _, _ = _run(order, passes=2)
    ends = [n for n, each in enumerate(told) if each == "end"]
    assert [told[n - 1] for n in ends] == ["finish", "finish"]
