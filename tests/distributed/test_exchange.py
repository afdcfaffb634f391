"""Sums beside the computation: the same exchanges on every worker, whatever is ready first."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from workers import Group

from functrain import metrics as m
from functrain.distributed import exchange
from functrain.errors import ArchitectureError
from functrain.metrics import Metric, Metrics
from functrain.trees import digest

SIZES = (3, 40, 1, 12, 100, 7, 0, 25)


class _Wire:
    """Sums over two workers that have the same, which are there when they are waited for."""

    def __init__(self) -> None:
        self.sent: list[int] = []
        self.under_way = self.most = 0
        self.first = torch.empty(0)
        self.whole: list[Tensor] = []

    def all_reduce(self, flat: Tensor, async_op: bool) -> Any:
        assert async_op
        self.sent.append(flat.numel())
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        taken, wire = flat.clone(), self
        flat.fill_(torch.nan)  # nobody may look at it now

        class Work:
            def wait(self) -> None:
                wire.under_way -= 1
                flat.copy_(2 * taken)

        return Work()

    def all_to_all_single(self, received: Tensor, sent: Tensor, async_op: bool) -> Any:
        assert async_op
        self.sent.append(sent.numel())
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        received.fill_(torch.nan)
        wire, own = self, sent.chunk(2)[0].clone()  # of the other the same; this is rank 0

        class Work:
            def wait(self) -> None:
                wire.under_way -= 1
                received.copy_(torch.cat([own, own]))
                wire.first = 2 * own
                wire.whole.append(2 * sent)

        return Work()

    def all_gather_single(self, flat: Tensor, total: Tensor) -> None:
        assert torch.equal(total, self.first)
        flat.copy_(self.whole.pop(0))


def _grads(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    kinds = (torch.float32, torch.float32, torch.float64)
    return {
        f"p{n}": torch.randn(size, generator=generator).to(kinds[n % 3])
        for n, size in enumerate(SIZES)
    }


@given(
    st.permutations(range(len(SIZES))),
    st.integers(0, len(SIZES)),
    st.sampled_from([1, 64, 200, 10_000]),
    st.sampled_from([1, 100, 10_000]),
    st.booleans(),
    st.booleans(),
)
def test_exchanges_do_not_depend_on_what_is_ready_first(
    order: list[int], early: int, bucket: int, alone: int, tree: bool, own: bool
) -> None:
    wires = []
    for names in ([f"p{n}" for n in order[:early]], []):
        with pytest.MonkeyPatch.context() as patch:
            wire = _Wire()
            patch.setattr(exchange, "dist", wire)
            patch.setattr(exchange, "BUCKET", bucket)
            patch.setattr(exchange, "ALONE", alone)
            grads, expected = _grads(), _grads()
            missing = "p3" if "p3" not in names else None
            beside = exchange.Beside(expected, lambda _what: nullcontext(), 2, tree=tree)
            read: list[tuple[Tensor, Tensor, bool]] = []
            for name in names:
                beside.ready(name, grads[name], own=bool(own))
                read.append((grads[name], expected[name], own))
            if missing:
                grads.pop(missing)
            found = beside.finish(grads)
        wires.append(wire)
        for name, grad in expected.items():
            if name == missing:
                assert not found[name].any()
                assert found[name].signbit().all()  # what adds nothing
            else:
                assert torch.equal(found[name], 2 * grad)
                assert found[name].stride() == grad.stride()
        for grad, before, theirs in read:
            assert theirs or torch.equal(grad, before)  # somebody may still read it
        assert wire.most <= exchange.IN_FLIGHT
    assert wires[0].sent == wires[1].sent


def test_a_gradient_that_ends_twice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "dist", _Wire())
    beside = exchange.Beside({"a": torch.ones(2)}, lambda _: nullcontext(), 2, tree=False)
    beside.ready("a", torch.ones(2), own=True)
    with pytest.raises(ArchitectureError, match="a: its gradient has come to its end twice"):
        beside.ready("a", torch.ones(2), own=True)


@pytest.mark.parametrize("reduction", ["fast", "canonical"])
@pytest.mark.parametrize("microbatches", [2, 4])
def test_gradients_that_are_views_of_others_are_summed_as_any(
    group: Group, reduction: str, microbatches: int
) -> None:
    """Autograd hands out an activation's gradient, and the same one to two parameters."""
    step = {"reduction": reduction, "microbatches": microbatches, "max_grad_norm": 0.01}
    options = {"partial": "twins", "step": step, "alone": 1, "bucket": 64, "examples": 4}
    alone = group.alone({**options, "step": {**step, "microbatches": 4}})
    plain = group.alone({**options, "partial": "no twins", "step": {**step, "microbatches": 4}})
    assert alone["norm"] == pytest.approx(plain["norm"], rel=1e-5)
    for each in group.values("steps", 2, options):
        assert each["norm"] == pytest.approx(alone["norm"], rel=1e-5)
        for ours, theirs in zip(each["metrics"], alone["metrics"], strict=True):
            norm, expected = (float.fromhex(m["grad_norm"]) for m in (ours, theirs))
            assert norm == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("reduction", ["fast", "canonical"])
@pytest.mark.parametrize("precision", ["fp32", "bf16_params"])
def test_most_is_sent_before_the_backward_pass_has_ended(
    group: Group, precision: str, reduction: str
) -> None:
    options = {"step": {"reduction": reduction, "precision": precision}, "bucket": 4000}
    for sent, of in group.values("beside", 2, options):
        assert of > 4
        assert sent >= of - 1  # the last has the embedding's


class _Told:
    """A world whose workers are asked one after another; the last one hears of all."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._told: list[bytes] = []

    def payloads(self, given: bytes, what: str = "") -> list[bytes]:
        self._told.append(given)
        return self._told


def _leaves(metrics: Metrics) -> list[tuple[str, str, str, str]]:
    every = [(name, metrics.metric(name)) for name in metrics]
    return [(name, each.reading, digest(each.sum), digest(each.weight)) for name, each in every]


VALUES = st.one_of(st.floats(), st.lists(st.floats(), min_size=1, max_size=3))
MADE = st.fixed_dictionaries(
    {}, optional={"a": st.tuples(VALUES, st.sampled_from(["mean", "total", "exp"])), "b": st.none()}
)


@given(turns=st.lists(MADE, max_size=9), size=st.integers(1, 4))
@example(turns=[{"a": (-math.nan, "mean")}, {"a": ([-0.0, math.inf], "total")}], size=2)
def test_metrics_come_back_in_the_order_of_the_turns_with_their_bits(
    turns: list[dict[str, Any]], size: int
) -> None:
    """Whoever has made which: turn i is worker i's modulo their number."""
    made = [
        Metrics(
            {
                name: m.total(index)
                if given is None
                else Metric(*[torch.tensor(given[0], dtype=torch.float64)] * 2, given[1])
                for name, given in each.items()
            }
        )
        for index, each in enumerate(turns)
    ]
    world = _Told(size)
    found = [exchange.gathered_metrics(world, made[rank::size]) for rank in range(size)][-1]
    assert [_leaves(each) for each in found] == [_leaves(each) for each in made]
