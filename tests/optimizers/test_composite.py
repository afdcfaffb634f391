"""Optimizer state that wraps tensors is carried as its parts: pure, donated, saved, resumed."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor

import functrain as ft
from functrain import optim
from functrain.errors import StateError
from functrain.trees import Tensors, clone


class Halves(Tensor):
    """A float32 tensor kept as a bf16 part and the bf16 rest of it; `scale` is its context."""

    high: Tensor
    low: Tensor
    scale: float

    @staticmethod
    def __new__(cls, high: Tensor, low: Tensor, scale: float) -> Halves:
        made = Tensor._make_wrapper_subclass(cls, high.shape, dtype=torch.float32)
        made.high, made.low, made.scale = high, low, scale
        return made

    def __tensor_flatten__(self) -> tuple[list[str], float]:
        return ["high", "low"], self.scale

    @staticmethod
    def __tensor_unflatten__(
        inner: Mapping[str, Tensor], context: float, size: Any, stride: Any
    ) -> Halves:
        assert all(each.shape == size and each.stride() == stride for each in inner.values())
        return Halves(inner["high"], inner["low"], context)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(f"{func} of a wrapper: only its parts are to be touched")

    def value(self) -> Tensor:
        return (self.high.float() + self.low.float()) * self.scale

    def set(self, value: Tensor) -> None:
        value = value / self.scale
        self.high.copy_(value)
        self.low.copy_(value - self.high.float())


class Wrapping(torch.optim.Optimizer):
    """Momentum in wrapped tensors for matrices; as torchao's, it insists on its own rate tensor."""

    def __init__(self, params: Any, lr: float = 1e-3, scale: float = 4.0) -> None:
        super().__init__(params, {"lr": torch.tensor(lr), "scale": scale})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            assert isinstance(group["lr"], Tensor)
            for param in group["params"]:
                state = self.state[param]
                if not state:
                    zero = torch.zeros_like(param, dtype=torch.bfloat16)
                    wrapped = Halves(zero, zero.clone(), group["scale"])
                    state["momentum"] = wrapped if param.ndim > 1 else torch.zeros_like(param)
                old = state["momentum"]
                new = 0.9 * (old.value() if isinstance(old, Halves) else old) + param.grad
                old.set(new) if isinstance(old, Halves) else old.copy_(new)
                param.sub_(new * group["lr"])


def params(rows: int = 3) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (rows, 4), "b": (4,), "c": (rows, 4)}
    return Tensors({n: torch.randn(s, generator=generator) for n, s in shapes.items()})


def gradients(number: int, rows: int = 3) -> Tensors:
    generator = torch.Generator().manual_seed(number + 1)
    shapes = {name: param.shape for name, param in params(rows).items()}
    return Tensors({n: torch.randn(s, generator=generator) for n, s in shapes.items()})


def run(
    optimizer: Any, steps: int, *, donate: bool = False, renew: bool = False, rows: int = 3
) -> Any:
    values = clone(params(rows))
    state = optimizer.init(values)
    for number in range(steps):
        if renew:  # as a process does that has just been started
            optimizer = attrs.evolve(optimizer)
        values, state = optimizer.update(gradients(number, rows), state, values, 0.1, donate=donate)
    return values, state


def same(left: Any, right: Any) -> bool:
    slots = left[1].slots.keys() == right[1].slots.keys()
    trees = [(left[0], right[0]), *((left[1].slots[s], right[1].slots[s]) for s in left[1].slots)]
    return slots and all(torch.equal(a[n], b[n]) for a, b in trees for n in a)


def own(lr: float = 1e-3, **options: Any) -> Any:
    return optim.from_torch(Wrapping, lr=lr, **options)


def test_a_wrapped_state_is_kept_as_its_parts() -> None:
    _, state = run(own(), 2)
    assert set(state.slots) == {"momentum", "momentum:high", "momentum:low"}
    assert set(state.slots["momentum"]) == {"b"}
    assert all(type(t) is Tensor for items in state.slots.values() for t in items.values())


def test_it_equals_the_class_itself() -> None:
    theirs = {n: torch.nn.Parameter(p) for n, p in params().items()}
    optimizer = Wrapping(theirs.values(), lr=0.1)
    for number in range(4):
        for name, grad in gradients(number).items():
            theirs[name].grad = grad
        optimizer.step()
    ours, _ = run(own(), 4)
    assert all(torch.equal(ours[n], theirs[n]) for n in theirs)


def test_a_fresh_record_and_a_donated_one_give_the_same() -> None:
    plain = run(own(), 4)
    assert same(plain, run(own(), 4, renew=True))
    assert same(plain, run(own(), 4, donate=True))


def test_one_record_serves_models_of_several_sizes() -> None:
    """What it has found out of a parameter's state is of that parameter's shape."""
    optimizer = own()
    for rows in (3, 5, 3):
        assert same(run(optimizer, 3, rows=rows), run(own(), 3, rows=rows))


def test_a_context_that_differs_by_group_comes_back_to_its_parameter() -> None:
    groups = [optim.group(lambda name, _: name == "c", scale=0.5)]
    optimizer = own(groups=groups)
    assert same(run(optimizer, 4), run(optimizer, 4, renew=True))
    assert not torch.equal(
        run(optimizer, 2)[1].slots["momentum:high"]["c"],
        run(own(), 2)[1].slots["momentum:high"]["c"],
    )


def test_parts_that_the_class_does_not_know_are_refused() -> None:
    values, state = run(own(), 1)
    slots = {slot.replace(":high", ":upper"): items for slot, items in state.slots.items()}
    with pytest.raises(StateError, match=r"Wrapping has no place for .*upper"):
        own().update(gradients(1), attrs.evolve(state, slots=slots), values, 0.1)


REAL = {
    "bitsandbytes": ("bitsandbytes.optim", "AdamW8bit"),
    "torchao-8bit": ("torchao.optim", "AdamW8bit"),
    "torchao-4bit": ("torchao.optim", "AdamW4bit"),
}


@pytest.mark.filterwarnings("ignore")  # of libraries that warn as they are imported and compiled
@pytest.mark.parametrize(
    "name",
    # torchao compiles its update, half a minute each.
    ["bitsandbytes", *(pytest.param(n, marks=pytest.mark.long) for n in REAL if "torchao" in n)],
)
def test_moments_in_8_bits_are_resumed_to_the_bit(name: str, tmp_path: Path) -> None:
    module, cls = REAL[name]
    pytest.importorskip(module.partition(".")[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = optim.from_torch(getattr(importlib.import_module(module), cls), lr=1e-2)
    config = ft.models.DecoderConfig(vocabulary=257, width=128, layers=2, heads=4)
    architecture, values, buffers = ft.split(ft.models.decoder(config))
    step = ft.pretrain_step(architecture, optimizer, max_grad_norm=1.0)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(0, 257, (4, 16), generator=generator) for _ in range(4)]

    def after(state: Any, some: list[Tensor], *, donate: bool = False) -> Any:
        for ids in some:
            state, _ = step(state, {"input_ids": ids, "labels": ids}, donate=donate)
        return state

    whole = after(step.init(values, buffers), batches)
    half = after(step.init(values, buffers), batches[:2])
    ft.save(tmp_path, half)
    resumed = after(ft.load(tmp_path, like=step.init(values, buffers)), batches[2:])
    donated = after(step.init(clone(values), buffers), batches, donate=True)
    assert ft.fingerprint(whole) == ft.fingerprint(resumed) == ft.fingerprint(donated)
    moments = sum(t.nbytes for items in whole.optimizer.slots.values() for t in items.values())
    assert moments < 0.75 * sum(p.nbytes for p in values.values())  # in float32 it is 2
