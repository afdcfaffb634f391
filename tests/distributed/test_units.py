"""What is on its way while a block computes, in which order, and that nothing else is."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import example, given
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
        self.now, self.most = 0, 0  # units that are whole

    def note(self, what: str, names: Sequence[str]) -> None:
        del what, names

    def gather(self, names: Sequence[str], shards: Sequence[Tensor]) -> Any:
        name = _number(names)
        self.told.append(f"send {name}")
        return Coming(self, name, [shard.detach().clone() for shard in shards])

    def gone(self) -> None:
        """A unit is whole no more."""
        self.now -= 1


class Coming:
    """What `Whole` gives."""

    def __init__(self, exchange: Whole, name: str, found: list[Tensor]) -> None:
        self.exchange, self.name, self.found = exchange, name, found

    def whole(self) -> list[Tensor]:
        exchange = self.exchange
        exchange.told.append(f"there {self.name}")
        exchange.now += 1
        exchange.most = max(exchange.most, exchange.now)
        found, self.found = self.found, []
        weakref.finalize(found[0].untyped_storage(), exchange.gone)
        return found


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


class Ran(NamedTuple):
    """What was told, the gradients in shards, those of the whole model, and the exchange."""

    told: list[str]
    found: dict[str, Tensor]
    expected: dict[str, Tensor]
    exchange: Whole


def _run(order: Sequence[int], passes: int = 1, frozen: Collection[str] = ()) -> Ran:
    torch.manual_seed(0)
    module, x = Model(order), torch.randn(2, 3)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(_number([name]) not in frozen)
    for _ in range(passes):
        module(x).sum().backward()
    expected = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    told = module.told
    told.clear()
    architecture, params, buffers = ft.split(module)
    places = slots(architecture)
    units = find_units(architecture, places)
    sums, exchange = Sums(told), Whole(told)
    leaves = {n: t.detach().requires_grad_(n in places.trainable) for n, t in params.items()}
    trained = [leaf for leaf in leaves.values() if leaf.requires_grad]
    values = Values(units, leaves, exchange, sums)
    binding = Binding(units, places, values)
    empty = binding.empty(params, {name: tensor.shape for name, tensor in params.items()})
    with bound(architecture, empty, buffers, places=places) as model, binding.bound(()):
        for _ in range(passes):
            model(x).sum().backward(inputs=trained)
            told.append("end")
    return Ran(told, sums.found, expected, exchange)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_the_next_block_is_on_its_way_while_one_computes(number: int) -> None:
    """In every pass: of many micro-batches, too."""
    told = _run(range(BLOCKS), passes=3).told
    begin = [0, *(n for n, each in enumerate(told) if each == "end")][number]
    told = told[begin:]

    def at(what: str, which: int = 0) -> int:
        return [n for n, each in enumerate(told) if each == what][which]

    for block in range(BLOCKS - 1):
        assert at(f"send {block + 1}") < at(f"call {block}")
        assert at(f"there {block + 1}") > at(f"done {block}")
    for block in range(1, BLOCKS):
        # Backward: sent for before the block behind it has ended, and there when it is needed.
        assert at(f"send {block - 1}", 1) < at(f"sum {block}") < at(f"there {block - 1}", 1)
    assert told[at("end", bool(number)) - 1] == "finish"


@given(
    order=st.lists(st.integers(0, BLOCKS - 1), min_size=1, max_size=6),
    passes=st.integers(1, 3),
    frozen=st.sets(st.sampled_from(["root", "0", "1", "2", "3"]), max_size=4),
)
@example(order=[0, 1, 2, 3], passes=2, frozen={"1", "2"})
@example(order=[0, 1, 2, 3, 3, 3], passes=2, frozen=set())
def test_in_any_order_the_gradients_are_right_and_nothing_is_sent_for_in_vain(
    order: list[int], passes: int, frozen: set[str]
) -> None:
    """But one guess: a model that calls its blocks as they lie is guessed right."""
    trains = [str(block) not in frozen for block in order]
    if "root" in frozen and not any(trains):
        return  # there is nothing to train
    told, found, expected, exchange = _run(order, passes, frozen)
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad)
    sent = [each.split()[1] for each in told if each.startswith("send")]
    there = [each.split()[1] for each in told if each.startswith("there")]
    assert sorted(sent) == sorted(there)  # nothing is left under way
    # Backward those are made again through which a gradient flows on.
    again = sum("root" not in frozen or any(trains[:at]) for at in range(len(order)))
    in_vain = len(sent) - 1 - passes * (len(order) + again)
    # One that trains nothing may be there still when an earlier call of it is come to.
    held = 0 if all(trains) else len(order) - len(set(order))
    guessed = all(
        after == before + 1 or before + 1 == BLOCKS
        for before, after in itertools.pairwise([-1, *order, -1])
    )
    assert -passes * held <= in_vain <= (not guessed)
    # The root, the one that computes, the one before it, and the one that comes.
    assert exchange.most <= 4


def test_sums_are_there_when_a_backward_pass_ends() -> None:
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [0, 0, 2]):
        told = _run(order, passes=2).told
        ends = [n for n, each in enumerate(told) if each == "end"]
        assert [told[n - 1] for n in ends] == ["finish", "finish"]


def test_what_other_values_have_sent_for_is_waited_for() -> None:
    """A reference whose forward ends early, say."""
    architecture, params, buffers = ft.split(Model([0]))
    places, told = slots(architecture), list[str]()
    units = find_units(architecture, places)
    binding = Binding(units, places, Values(units, params, Whole([])))
    empty = binding.empty(params, {name: tensor.shape for name, tensor in params.items()})
    with (
        bound(architecture, empty, buffers, places=places) as model,
        binding.bound(()),
        torch.no_grad(),
        binding.other(Values(units, params, Whole(told))),
    ):
        model(torch.ones(1, 3))
    assert told == ["send root", "there root", "send 0", "there 0", "send 1", "there 1"]
