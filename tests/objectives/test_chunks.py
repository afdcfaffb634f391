"""Losses and log-probs by chunks, against plain PyTorch on whole logits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import attrs
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from functrain.accumulators import Accumulating, accumulating
from functrain.errors import ConfigError
from functrain.objectives import chunks, measures, scores
from functrain.objectives.chunks import Projection
from functrain.objectives.cross_entropy import summed_cross_entropy
from functrain.objectives.head_gradients import Gradients
from functrain.objectives.measures import Measures
from functrain.objectives.scores import Scores, scored

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
"""How far rounding may take a result, relative to its norm."""


def _capped(rows: Tensor) -> Tensor:
    """Gemma 2's soft cap."""
    return torch.tanh(rows / 2.0) * 2.0


def _capped_in_place(rows: Tensor) -> Tensor:
    return rows.div_(2.0).tanh() * 2.0


def _scaled(rows: Tensor) -> Tensor:
    """Cohere's logit_scale."""
    return rows * 0.7


FINISHES: dict[str, Callable[[Tensor], Tensor] | None] = {
    "none": None,
    "cap": _capped,
    "cap in place": _capped_in_place,
    "scale": _scaled,
}


@attrs.frozen(kw_only=True, eq=False)
class Case:
    """Random inputs of a shape; `rows_at_once`: how many rows the budget has room for."""

    rows: int
    width: int
    vocabulary: int
    rows_at_once: int
    seed: int = 0
    ignored: float = 0.3
    biased: bool = True
    finish: str = "none"
    dtype: torch.dtype = torch.float64
    size: float = 1.0

    def _draw(self, *shape: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 10 + seed)
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def hidden(self) -> Tensor:
        return (self._draw(self.rows, self.width, seed=1) * self.size).to(self.dtype)

    def weight(self) -> Tensor:
        return self._draw(self.vocabulary, self.width, seed=2).to(self.dtype)

    def bias(self) -> Tensor | None:
        return self._draw(self.vocabulary, seed=3).to(self.dtype) if self.biased else None

    def targets(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        targets = torch.randint(0, self.vocabulary, (self.rows,), generator=generator)
        drop = torch.rand(self.rows, generator=generator) < self.ignored
        return targets.masked_fill(drop, -100)

    def upstream(self) -> Tensor:
        """A gradient of the log-probs that is no constant."""
        return self._draw(self.rows, seed=4).to(self.dtype)

    def leaves(self) -> list[Tensor]:
        """Hidden states, weight and, if there is one, bias, all of which want a gradient."""
        every = (self.hidden(), self.weight(), self.bias())
        return [each.requires_grad_() for each in every if each is not None]

    def projection(self, leaves: list[Tensor]) -> Projection:
        return Projection(
            weight=leaves[1],
            bias=leaves[2] if self.biased else None,
            finish=FINISHES[self.finish],
            budget=self.rows_at_once * self.vocabulary * 4,
        )

    def logits(self, leaves: list[Tensor]) -> Tensor:
        """Of plain PyTorch, whole, in float32 or more."""
        logits = F.linear(leaves[0], leaves[1], leaves[2] if self.biased else None)
        finish = FINISHES[self.finish]
        logits = logits if finish is None else finish(logits)
        return logits.float() if logits.dtype.itemsize < 4 else logits


CASES = st.builds(
    Case,
    rows=st.integers(0, 70),
    width=st.integers(1, 9),
    vocabulary=st.integers(2, 40),
    # From less than one row, of which 16 are taken all the same, to all of them at once; where
    # there are no more than twice as many, their log-probs stay for the backward pass.
    rows_at_once=st.sampled_from([0, 16, 31, 32, 48, 1000]),
    seed=st.integers(0, 1000),
    ignored=st.sampled_from([0.0, 0.4, 1.0]),
    biased=st.booleans(),
    finish=st.sampled_from(sorted(FINISHES)),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)


def _assert_near(ours: Tensor, theirs: Tensor, tolerance: float, what: str) -> None:
    assert ours.shape == theirs.shape, what
    assert ours.dtype == theirs.dtype, what
    apart = float((ours - theirs).detach().double().norm())
    limit = tolerance * max(1.0, float(theirs.detach().double().norm()))
    assert apart <= limit, f"{what}: {apart:.3g} apart"


def _error(ours: Tensor, exact: Tensor) -> float:
    return float((ours.double() - exact).norm() / exact.norm())


def _ordinary_loss(case: Case, leaves: list[Tensor]) -> Tensor:
    return F.cross_entropy(case.logits(leaves), case.targets(), reduction="sum")


@contextmanager
def _taking(
    leaves: list[Tensor], *, direct: bool, factor: float = 1.0
) -> Generator[Callable[[Tensor, Tensor], list[Tensor]]]:
    """Within it, what takes gradients; the weight's summed where it is made, if `direct`.

    As in a step, whose loss is what is summed times `factor`.
    """
    if not direct:
        yield lambda value, upstream: list(torch.autograd.grad(value, leaves, upstream))
        return
    weight, into = leaves[1], torch.zeros_like(leaves[1])

    def taken(value: Tensor, upstream: Tensor) -> list[Tensor]:
        found = list(torch.autograd.grad(value, leaves, upstream, allow_unused=True))
        assert found[1] is None
        found[1] = into
        return found

    given = Accumulating(
        lambda leaf: leaf is weight,
        lambda leaf: into if leaf is weight else None,
        torch.tensor(factor, dtype=torch.float64),
    )
    with accumulating((), given):
        yield taken


@example(
    case=Case(rows=40, width=3, vocabulary=7, rows_at_once=16), scale=-3.7, direct=True, cached=1
)
@example(
    case=Case(rows=40, width=3, vocabulary=7, rows_at_once=16, finish="cap"),
    scale=-3.7,
    direct=False,
    cached=1 << 20,
)
@given(
    case=CASES,
    scale=st.sampled_from([1.0, -3.7]),
    direct=st.booleans(),
    cached=st.sampled_from([1, 400, 1 << 20]),
)
def test_the_summed_loss_and_its_gradients_are_cross_entropys(
    case: Case, scale: float, direct: bool, cached: int
) -> None:
    """For every shape, budget, finish, cache and upstream gradient, to rounding."""
    ours, theirs = case.leaves(), case.leaves()
    with (
        pytest.MonkeyPatch.context() as patch,
        _taking(ours, direct=direct, factor=scale) as taken,
    ):
        patch.setattr(measures, "CACHED", cached)
        total, correct = summed_cross_entropy(ours[0], case.targets(), case.projection(ours))
        gradients = taken(total, torch.full_like(total, scale))
    expected = _ordinary_loss(case, theirs)
    tolerance = TOLERANCE[case.dtype]
    _assert_near(total, expected, tolerance, "loss")
    assert int(correct) == int((case.logits(theirs).argmax(-1) == case.targets()).sum())
    for mine, plain in zip(gradients, torch.autograd.grad(scale * expected, theirs), strict=True):
        _assert_near(mine, plain, tolerance, "gradient")


def test_a_few_rows_at_a_time_are_nearer_to_the_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Than `log_softmax`; how many they are is of no matter, nor what else is asked for."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(64, 20_000, generator=generator)
    logits[1, ::2] = -torch.inf
    column = logits[:, :9_999].argmax(-1, keepdim=True)
    column[:3] = torch.tensor([[0], [3], [19_999]])
    exact = logits.double().log_softmax(-1)
    found = []
    sizes = [1 << 20, 1 << 20, 1 << 20, 1, logits.nbytes]
    kinds = [(True, False), (False, False), (True, True), (True, False), (True, False)]
    for cached, (graded, detailed) in zip(sizes, kinds, strict=True):
        monkeypatch.setattr(measures, "CACHED", cached)
        given = logits.clone()
        measured = Measures(graded=graded, detailed=detailed).of(given, column)
        assert torch.equal(measured.correct, logits.argmax(-1, keepdim=True) == column)
        if graded:
            torch.testing.assert_close(given, exact.exp().float(), rtol=1e-4, atol=1e-9)
        found.append(measured.logps)
    ours, *others, whole = found
    assert all(torch.equal(ours, other) for other in others)
    right = exact.gather(1, column)
    assert float((ours - right).abs().max()) < 3e-6
    assert _error(ours, right) < _error(whole, right)


@pytest.mark.parametrize("detailed", [False, True])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_logits_that_are_no_numbers_give_none(
    value: float, detailed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for `log_softmax`: a step whose loss is not finite is skipped."""
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    logits[1] = value
    logits[2, 7] = value
    column = torch.tensor([[4], [4], [9]])
    expected = logits.log_softmax(-1)
    found = []
    for cached in (1, logits.nbytes):
        monkeypatch.setattr(measures, "CACHED", cached)
        probabilities = logits.clone()
        measured = Measures(graded=True, detailed=detailed).of(probabilities, column)
        torch.testing.assert_close(measured.logps, expected.gather(1, column), equal_nan=True)
        torch.testing.assert_close(probabilities, expected.exp(), equal_nan=True)
        found.append(measured.details)
    torch.testing.assert_close(*found, equal_nan=True)


@example(
    case=Case(rows=40, width=3, vocabulary=7, rows_at_once=1000),
    detailed=True,
    direct=True,
    cached=1,
)
@example(
    case=Case(rows=40, width=3, vocabulary=7, rows_at_once=16),
    detailed=True,
    direct=True,
    cached=400,
)
@example(
    case=Case(rows=40, width=3, vocabulary=7, rows_at_once=16, finish="cap"),
    detailed=True,
    direct=False,
    cached=1 << 20,
)
@given(
    case=CASES,
    detailed=st.booleans(),
    direct=st.booleans(),
    cached=st.sampled_from([1, 400, 1 << 20]),
)
def test_scores_and_their_gradients_are_those_of_whole_logits(
    case: Case, detailed: bool, direct: bool, cached: int
) -> None:
    """Log-probs with their gradients; entropy, mode, mean logit and log Σ p² without."""
    ours, theirs = case.leaves(), case.leaves()
    targets = case.targets()
    with pytest.MonkeyPatch.context() as patch, _taking(ours, direct=direct) as taken:
        patch.setattr(measures, "CACHED", cached)
        found = scored(ours[0], targets, case.projection(ours), detailed=detailed)
        gradients = taken(found.logps, case.upstream())
    logits = case.logits(theirs)
    normed, valid = logits.log_softmax(-1), targets != -100
    chosen = normed.gather(1, targets.clamp(min=0).unsqueeze(1)).squeeze(1)
    logps = torch.where(valid, chosen, 0.0)
    nothing = torch.zeros_like(logps)
    details = {
        "entropy": torch.special.entr(normed.exp()).sum(-1),
        "level": logits.mean(-1),
        "collision": (2 * normed).logsumexp(-1),
    }
    tolerance = TOLERANCE[case.dtype]
    _assert_near(found.logps, logps, tolerance, "logps")
    assert torch.equal(found.correct, (logits.argmax(-1) == targets) & valid)
    for name, expected in details.items():
        value = getattr(found, name)
        assert not value.requires_grad
        wanted = torch.where(valid, expected, 0.0) if detailed else nothing
        _assert_near(value, wanted.detach(), tolerance, name)
    plain = torch.autograd.grad(logps, theirs, case.upstream())
    for one, other in zip(gradients, plain, strict=True):
        _assert_near(one, other, tolerance, "gradient")


GROUPS = st.lists(st.integers(0, 40), max_size=5)


def _grouped(case: Case, sizes: list[int]) -> list[int]:
    """These groups, as far as there are rows, and one of the rest."""
    found: list[int] = []
    for size in sizes:
        found.append(min(size, case.rows - sum(found)))
    return [*found, case.rows - sum(found)]


@example(
    case=Case(rows=70, width=3, vocabulary=7, rows_at_once=16),
    sizes=[40, 20],
    detailed=True,
    direct=True,
)
@example(
    case=Case(rows=70, width=3, vocabulary=7, rows_at_once=16, finish="cap in place"),
    sizes=[40, 20],
    detailed=True,
    direct=False,
)
@given(case=CASES, sizes=GROUPS, detailed=st.booleans(), direct=st.booleans())
def test_slopes_that_are_known_have_the_gradients_of_whole_logits(
    case: Case, sizes: list[int], detailed: bool, direct: bool
) -> None:
    """And the scores of a pass without a gradient, to the bit; each group is asked once."""
    ours, theirs, targets = case.leaves(), case.leaves(), case.targets()
    groups = _grouped(case, sizes)
    with torch.no_grad():
        alone = scored(ours[0], targets, case.projection(ours), detailed=detailed, groups=groups)
    asked: list[int] = []

    def slopes(index: int, scores: Scores) -> Tensor:
        here = slice(sum(groups[:index]), sum(groups[: index + 1]))
        for name in ("logps", "entropy", "correct", "level", "collision"):
            assert getattr(scores, name).equal(getattr(alone, name)[here]), name
        asked.append(index)
        return case.upstream()[here]

    with _taking(ours, direct=direct) as taken:
        found = scored(
            ours[0],
            targets,
            case.projection(ours),
            detailed=detailed,
            groups=groups,
            slopes=slopes,
        )
        gradients = taken(found.logps, case.upstream())
    assert asked == list(range(len(groups)))
    for name in ("logps", "entropy", "correct", "level", "collision"):
        assert getattr(found, name).equal(getattr(alone, name)), name
    normed = case.logits(theirs).log_softmax(-1)
    chosen = normed.gather(1, targets.clamp(min=0).unsqueeze(1)).squeeze(1)
    logps = torch.where(targets != -100, chosen, 0.0)
    tolerance = TOLERANCE[case.dtype]
    _assert_near(found.logps, logps, tolerance, "logps")
    plain = torch.autograd.grad(logps, theirs, case.upstream())
    for one, other in zip(gradients, plain, strict=True):
        _assert_near(one, other, tolerance, "gradient")


@given(sizes=st.lists(st.integers(0, 60), max_size=12), rows_at_once=st.sampled_from([16, 48]))
def test_neighbours_share_a_chunk_as_far_as_it_has_room(
    sizes: list[int], rows_at_once: int
) -> None:
    case = Case(rows=1, width=1, vocabulary=9, rows_at_once=rows_at_once)
    counts = chunks.grouped(sizes, case.projection(case.leaves()))
    assert sum(counts) == len(sizes)
    assert all(counts)
    begins = [sum(counts[:at]) for at in range(len(counts) + 1)]
    rows = [sum(sizes[one:other]) for one, other in pairwise(begins)]
    for count, size, after in zip(counts, rows, begins[1:], strict=True):
        assert count == 1 or size <= rows_at_once
        assert after == len(sizes) or size + sizes[after] > rows_at_once


def _known(case: Case, leaves: list[Tensor], slope: Tensor) -> Tensor:
    def slopes(index: int, _scores: Scores) -> Tensor:
        return slope[20 * index : 20 * (index + 1)]

    found = scored(
        leaves[0], case.targets(), case.projection(leaves), groups=[20, 20], slopes=slopes
    )
    return found.logps


@pytest.mark.parametrize("factor", [0.99, -1.0, 0.0, torch.nan, torch.inf])
def test_another_slope_than_was_known_is_refused(factor: float) -> None:
    """A gradient that was taken for another loss is never given."""
    case = Case(rows=40, width=4, vocabulary=7, rows_at_once=16, ignored=0.0)
    slope = case.upstream()
    given = slope.clone()
    given[slope.abs().argmax()] *= factor
    with pytest.raises(ConfigError, match=r"objective: the slope of one of its log-probs.*direct"):
        _known(case, case.leaves(), slope).backward(given)


@pytest.mark.parametrize("size", [1.0, 1e-30, 1e-300, 0.0])
def test_what_rounding_does_to_a_slope_is_not_refused(size: float) -> None:
    case = Case(rows=40, width=4, vocabulary=7, rows_at_once=16, ignored=0.0)
    slope = case.upstream() * size
    leaves = case.leaves()
    _known(case, leaves, slope).backward(slope * 1.0005)
    assert leaves[0].grad is not None
    single = attrs.evolve(case, dtype=torch.float32)
    small = single.upstream() * 1e-43
    _known(single, single.leaves(), small).backward(small + 1e-45)


def test_of_slopes_on_an_accelerator_others_make_the_gradients_nan() -> None:
    """Where to refuse them would be a wait; what is held back is what all others come of."""
    slope = torch.tensor([1.0, torch.nan, torch.inf, 0.0], device="meta")
    factor = scores._check_slopes(slope, slope)
    assert factor is not None
    assert factor.device.type == "meta"
    case = Case(rows=40, width=4, vocabulary=7, rows_at_once=16, ignored=0.0)
    for needed in range(1, 8):
        leaves = case.leaves()
        wanted = tuple(bool(needed >> index & 1) for index in range(3))
        grads = Gradients(leaves[0], leaves[1], leaves[2], wanted, None)
        grads.hold(torch.tensor(torch.nan))
        first = next(grad for grad in grads.found() if grad is not None)
        assert bool(first.isnan().all())


def test_a_gradient_of_known_slopes_is_given_once() -> None:
    case = Case(rows=40, width=4, vocabulary=7, rows_at_once=16)
    logps = _known(case, case.leaves(), case.upstream())
    logps.backward(case.upstream(), retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        logps.backward(case.upstream())


def test_slopes_are_asked_where_a_gradient_is_wanted_and_not_in_half_precision() -> None:
    """In fp16 a gradient waits for its loss scale."""
    case = Case(rows=40, width=4, vocabulary=7, rows_at_once=16, dtype=torch.float32)

    def forbidden(_index: int, _scores: Scores) -> Tensor:
        raise AssertionError

    leaves = case.leaves()
    options: dict[str, Any] = {"groups": [40], "slopes": forbidden}
    with torch.no_grad():
        scored(leaves[0], case.targets(), case.projection(leaves), **options)
    bare = [leaf.detach() for leaf in leaves]
    scored(bare[0], case.targets(), case.projection(bare), **options)
    with torch.autocast("cpu", dtype=torch.float16):
        found = scored(leaves[0], case.targets(), case.projection(leaves), **options)
    found.logps.sum().backward()
    assert leaves[0].grad is not None


@pytest.mark.parametrize("finish", sorted(FINISHES))
@pytest.mark.parametrize("biased", [False, True])
def test_gradients_are_those_of_finite_differences(finish: str, biased: bool) -> None:
    case = Case(rows=18, width=2, vocabulary=5, rows_at_once=16, biased=biased, finish=finish)

    def logps(*leaves: Tensor) -> Tensor:
        return scored(leaves[0], case.targets(), case.projection(list(leaves))).logps

    # A second backward pass is the same to rounding where the first has found the logits kept.
    assert torch.autograd.gradcheck(logps, case.leaves(), nondet_tol=1e-12)


@pytest.mark.parametrize("needed", range(8))
@pytest.mark.parametrize("by_scores", [False, True])
def test_a_gradient_is_computed_where_one_is_needed(needed: int, by_scores: bool) -> None:
    """Of any subset of hidden states, weight and bias, and none of the rest."""
    case = Case(rows=40, width=4, vocabulary=7, rows_at_once=16)
    whole, some = case.leaves(), case.leaves()
    for index, leaf in enumerate(some):
        leaf.requires_grad_(bool(needed >> index & 1))

    def total(leaves: list[Tensor]) -> Tensor:
        if by_scores:
            return scored(leaves[0], case.targets(), case.projection(leaves)).logps.sum()
        return summed_cross_entropy(leaves[0], case.targets(), case.projection(leaves))[0]

    total(whole).backward()
    loss = total(some)
    assert loss.requires_grad is (needed > 0)
    if needed:
        loss.backward()
    for index, (leaf, full) in enumerate(zip(some, whole, strict=True)):
        if needed >> index & 1:
            assert torch.equal(leaf.grad, full.grad)  # type: ignore[arg-type]
        else:
            assert leaf.grad is None


@given(case=CASES)
def test_inputs_are_not_written_to_and_the_bits_are_the_same_twice(case: Case) -> None:
    leaves, targets = case.leaves(), case.targets()
    before = [leaf.detach().clone() for leaf in leaves]
    versions = [leaf._version for leaf in (*leaves, targets)]
    runs = []
    for _ in range(2):
        total, correct = summed_cross_entropy(leaves[0], targets, case.projection(leaves))
        found = scored(leaves[0], targets, case.projection(leaves))
        gradients = torch.autograd.grad(total, leaves)
        gradients += torch.autograd.grad(found.logps, leaves, case.upstream())
        runs.append([total, correct, *attrs.astuple(found, recurse=False), *gradients])
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))
    assert [leaf._version for leaf in (*leaves, targets)] == versions
    assert all(torch.equal(leaf, old) for leaf, old in zip(leaves, before, strict=True))
    assert torch.equal(targets, case.targets())


def test_what_it_returns_is_not_written_to_later() -> None:
    """Scores and gradients own their memory: the buffer of the logits is none of it."""
    case = Case(rows=40, width=4, vocabulary=7, rows_at_once=16)
    leaves = case.leaves()
    first = scored(leaves[0], case.targets(), case.projection(leaves))
    kept = [each.detach().clone() for each in attrs.astuple(first, recurse=False)]
    scored(leaves[0] * 2, case.targets(), case.projection(leaves)).logps.sum().backward()
    first.logps.sum().backward()
    for value, copy in zip(attrs.astuple(first, recurse=False), kept, strict=True):
        assert torch.equal(value, copy)


@pytest.mark.parametrize("rows", [0, 1, 15, 16, 17, 95, 96, 97])
@pytest.mark.parametrize("budget", [0, 1, 16 * 4 * 10, 50 * 4 * 10, 1 << 30])
def test_chunks_are_every_row_once(rows: int, budget: int) -> None:
    """In order, in multiples of 16, within the budget but for 16 rows, which are always taken."""
    projection = Projection(weight=torch.empty(10, 2), bias=None, budget=budget)
    cut = list(projection.chunks(rows))
    assert [row for each in cut for row in range(each.start, each.stop)] == list(range(rows))
    sizes = [each.stop - each.start for each in cut]
    assert all(size % 16 == 0 for size in sizes[:-1])
    assert all(size <= 16 or size * 10 * 4 <= budget for size in sizes)
    assert len(cut) == -(-rows // max(16, budget // (4 * 10) // 16 * 16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("vocabulary", [7, 16, 301, 320])
def test_rows_of_logits_begin_at_cache_lines(
    dtype: torch.dtype, kept: bool, vocabulary: int
) -> None:
    """On the CPU; they are the products of each row."""
    generator = torch.Generator().manual_seed(vocabulary)
    hidden = torch.randn(40, 8, generator=generator).to(dtype)
    weight = torch.randn(vocabulary, 8, generator=generator).to(dtype)
    projection = Projection(weight=weight, bias=None, budget=16 * vocabulary * 4)
    rows = chunks.Rows(hidden, weight, None, projection, list(projection.chunks(40)), kept=kept)
    assert len(rows.chunks) == 3
    assert rows._buffer.shape == (40 if kept else 16, vocabulary)
    assert rows._buffer.stride(0) * dtype.itemsize % 64 == rows._buffer.data_ptr() % 64 == 0
    for at in rows.chunks:
        logits = rows.of(hidden, at, graded=False)
        expected = (hidden[at] @ weight.T).to(logits.dtype)
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6)


@given(
    rows=st.integers(1, 40),
    length=st.integers(1, 70),
    apart=st.integers(0, 3),
    cached=st.sampled_from([0, 1 << 10, 1 << 20]),
)
def test_probabilities_are_the_softmax_in_the_memory_of_the_logits(
    rows: int, length: int, apart: int, cached: int
) -> None:
    """With gaps between the rows or without."""
    generator = torch.Generator().manual_seed(rows * length)
    whole = 10 * torch.randn(rows, length + apart, generator=generator)
    beyond = whole[:, length:].clone()
    logits = whole[:, :length]
    expected = logits.double().softmax(-1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measures, "CACHED", cached)
        found = measures.probabilities(logits)
    assert found is logits
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-12)
    assert whole[:, length:].equal(beyond)


def test_chunks_are_worth_it_above_a_size_and_above_the_budget() -> None:
    assert chunks.are_worth(chunks.WORTH // 40 + 1, 10)
    assert not chunks.are_worth(chunks.WORTH // 40, 10)
    assert chunks.are_worth(11, 10, budget=10 * 10 * 4)
    assert not chunks.are_worth(10, 10, budget=10 * 10 * 4)


class _Multiplied(TorchDispatchMode):
    """Counts the multiplications of matrix products, and keeps the shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.shapes: list[tuple[int, int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        matrices = {"aten::mm": args[:2], "aten::addmm": args[1:3], "aten::addmm_": args[1:3]}
        name = func._schema.name
        if name in matrices:
            (n, k), (_, m) = (each.shape for each in matrices[name])
            self.count += n * k * m
            self.shapes.append((n, k, m))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("rows_at_once", "finish", "again"),
    [(16, "none", 1), (35, "none", 1), (36, "none", 0), (1000, "none", 0), (36, "scale", 1)],
)
def test_no_row_is_projected_twice_but_by_the_scores_backward_pass(
    rows_at_once: int, finish: str, again: int
) -> None:
    """Three products in the loss; one for scores, and two more for their gradients.

    `again`: and a third, where more than two budgets of log-probs would have to stay for it.
    """
    case = Case(
        rows=72, width=4, vocabulary=7, rows_at_once=rows_at_once, biased=False, finish=finish
    )
    each = 72 * 4 * 7
    leaves = case.leaves()
    with _Multiplied() as forward:
        total, _ = summed_cross_entropy(leaves[0], case.targets(), case.projection(leaves))
    with _Multiplied() as backward:
        total.backward()
    assert (forward.count, backward.count) == (3 * each, 0)
    with _Multiplied() as forward:
        logps = scored(leaves[0], case.targets(), case.projection(leaves)).logps
    with _Multiplied() as backward:
        logps.sum().backward(retain_graph=True)
    assert (forward.count, backward.count) == (each, (2 + again) * each)
    with _Multiplied() as backward:
        logps.sum().backward()
    assert backward.count == 3 * each


@pytest.mark.parametrize("rows_at_once", [0, 16, 40, 1000])
@pytest.mark.parametrize("detailed", [False, True])
def test_the_products_are_the_same_with_and_without_history(
    rows_at_once: int, detailed: bool
) -> None:
    """Of the same rows at a time, so that policy and reference have the same bits anywhere."""
    case = Case(rows=72, width=4, vocabulary=7, rows_at_once=rows_at_once)
    leaves = case.leaves()
    with _Multiplied() as policy:
        logps = scored(leaves[0], case.targets(), case.projection(leaves), detailed=detailed).logps
    with torch.no_grad(), _Multiplied() as reference:
        given = scored(leaves[0], case.targets(), case.projection(leaves), detailed=False).logps
    assert policy.shapes == reference.shapes
    assert torch.equal(logps, given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_no_grad_no_gradient_is_computed(dtype: torch.dtype) -> None:
    """The same values, from one product, whatever wants a gradient."""
    case = Case(rows=72, width=4, vocabulary=7, rows_at_once=16, dtype=dtype)
    leaves = case.leaves()
    expected, right = summed_cross_entropy(leaves[0], case.targets(), case.projection(leaves))
    scores = scored(leaves[0], case.targets(), case.projection(leaves))
    with torch.no_grad(), _Multiplied() as products:
        total, correct = summed_cross_entropy(leaves[0], case.targets(), case.projection(leaves))
    assert products.count == 72 * 4 * 7
    with torch.no_grad():
        found = scored(leaves[0], case.targets(), case.projection(leaves))
    assert torch.equal(total, expected)
    assert torch.equal(correct, right)
    assert torch.equal(found.logps, scores.logps)
    assert not total.requires_grad
    assert not found.logps.requires_grad


def test_the_loss_gives_its_gradient_once() -> None:
    case = Case(rows=20, width=4, vocabulary=7, rows_at_once=16)
    leaves = case.leaves()
    total, _ = summed_cross_entropy(leaves[0], case.targets(), case.projection(leaves))
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        total.backward()


@pytest.mark.parametrize("rows_at_once", [16, 1000])
@pytest.mark.parametrize("finish", ["none", "cap"])
def test_scores_give_their_gradient_again_and_again(rows_at_once: int, finish: str) -> None:
    """To rounding, where the first pass has used up what stayed for it."""
    case = Case(rows=40, width=4, vocabulary=7, rows_at_once=rows_at_once, finish=finish)
    leaves = case.leaves()
    logps = scored(leaves[0], case.targets(), case.projection(leaves)).logps
    once, *others = (torch.autograd.grad(logps.sum(), leaves, retain_graph=True) for _ in range(3))
    for again in others:
        for one, other in zip(once, again, strict=True):
            _assert_near(one, other, 1e-12, "gradient")


@pytest.mark.parametrize("by_scores", [False, True])
def test_a_target_outside_the_vocabulary_is_an_index_error(by_scores: bool) -> None:
    """As it is for `F.cross_entropy`: a step makes a `BatchError` of it."""
    case = Case(rows=20, width=4, vocabulary=7, rows_at_once=16)
    targets = case.targets()
    targets[11] = 7
    leaves = case.leaves()
    with pytest.raises(IndexError, match="Target 7 is out of bounds"):
        F.cross_entropy(case.logits(leaves), targets)
    function = scored if by_scores else summed_cross_entropy
    with pytest.raises(IndexError, match="Target 7 is out of bounds"):
        function(leaves[0], targets, case.projection(leaves))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ignored", [0.0, 1.0])
def test_without_a_target_there_is_nothing_but_a_gradient_of_zeros(
    dtype: torch.dtype, ignored: float
) -> None:
    """No rows, or none with a target: in the dtypes of an ordinary batch, with their history."""
    case = Case(
        rows=0 if not ignored else 20,
        width=3,
        vocabulary=5,
        rows_at_once=16,
        ignored=ignored,
        dtype=dtype,
    )
    ours, theirs = case.leaves(), case.leaves()
    total, correct = summed_cross_entropy(ours[0], case.targets(), case.projection(ours))
    expected = _ordinary_loss(case, theirs)
    assert (total.dtype, float(total.detach()), int(correct)) == (expected.dtype, 0.0, 0)
    found = scored(ours[0], case.targets(), case.projection(ours))
    assert found.correct.dtype == torch.bool
    for value in (found.logps, found.entropy, found.level, found.collision):
        assert value.dtype == expected.dtype
        assert not value.any()
    (total + found.logps.sum()).backward()
    for leaf in ours:
        assert leaf.grad is not None
        assert leaf.grad.dtype == dtype
        assert not leaf.grad.any()


@pytest.mark.parametrize("finish", ["none", "cap", "scale"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_extreme_logits_are_finite(finish: str, dtype: torch.dtype) -> None:
    """Of ±1e4 and beyond: as whole logits have it, without an inf or a NaN."""
    case = Case(
        rows=40,
        width=4,
        vocabulary=9,
        rows_at_once=16,
        ignored=0.2,
        finish=finish,
        dtype=dtype,
        size=1e4,
    )
    ours, theirs = case.leaves(), case.leaves()
    total, _ = summed_cross_entropy(ours[0], case.targets(), case.projection(ours))
    found = scored(ours[0], case.targets(), case.projection(ours))
    expected = _ordinary_loss(case, theirs)
    _assert_near(total, expected, TOLERANCE[dtype], "loss")
    _assert_near(-found.logps.sum(), expected, TOLERANCE[dtype], "logps")
    gradients = torch.autograd.grad(total, ours)
    again = torch.autograd.grad(-found.logps.sum(), ours)
    plain = torch.autograd.grad(expected, theirs)
    for one, two, other in zip(gradients, again, plain, strict=True):
        _assert_near(one, other, TOLERANCE[dtype], "gradient")
        _assert_near(two, other, TOLERANCE[dtype], "gradient of the scores")
    for value in attrs.astuple(found, recurse=False):
        assert value.isfinite().all()


def test_words_that_cannot_be_have_no_entropy() -> None:
    """Of a logit of −inf (a padded vocabulary): p·log p is 0, not NaN."""
    case = Case(rows=40, width=4, vocabulary=9, rows_at_once=16, ignored=0.0)
    leaves = case.leaves()
    targets = case.targets() % 6
    with torch.no_grad():
        leaves[2][6:] = -torch.inf
    found = scored(leaves[0], targets, case.projection(leaves))
    normed = case.logits(leaves).log_softmax(-1)
    entropy = torch.special.entr(normed.exp()).sum(-1)
    _assert_near(found.entropy, entropy.detach(), 1e-12, "entropy")
    plain = torch.autograd.grad(normed.gather(1, targets.unsqueeze(1)).sum(), leaves)
    for ours, theirs in zip(torch.autograd.grad(found.logps.sum(), leaves), plain, strict=True):
        _assert_near(ours, theirs, 1e-12, "gradient")


LOSSES: dict[str, Callable[[Case, list[Tensor]], Tensor]] = {
    "summed": lambda case, leaves: summed_cross_entropy(
        leaves[0], case.targets(), case.projection(leaves)
    )[0],
    "scored": lambda case, leaves: (
        -scored(leaves[0], case.targets(), case.projection(leaves)).logps.sum()
    ),
}


def _exact(case: Case) -> tuple[Tensor, ...]:
    """The gradients of the same numbers in float64."""
    leaves = [leaf.detach().double().requires_grad_() for leaf in case.leaves()]
    return torch.autograd.grad(_ordinary_loss(case, leaves), leaves)


@pytest.mark.parametrize("name", sorted(LOSSES))
@pytest.mark.parametrize("finish", ["none", "cap"])
@pytest.mark.parametrize("cast", [False, True])
def test_in_bf16_it_is_as_near_to_the_truth_as_whole_logits(
    name: str, finish: str, cast: bool
) -> None:
    """Under autocast, and with values in bf16: over 64 chunks, at most 1.5 times the error.

    A sum over chunks that was kept in bf16 would be 5 times as far off as whole logits.
    """
    case = Case(
        rows=1024,
        width=32,
        vocabulary=128,
        rows_at_once=16,
        finish=finish,
        ignored=0.0,
        dtype=torch.bfloat16 if cast else torch.float32,
        size=0.3,
    )
    exact, found = _exact(case), []
    for loss in (LOSSES[name], _ordinary_loss):
        leaves = case.leaves()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not cast):
            total = loss(case, leaves)
        assert total.dtype == torch.float32
        found.append((total, torch.autograd.grad(0.37 * total, leaves)))
    (ours, mine), (theirs, plain) = found
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=0.0)
    for one, other, truth in zip(mine, plain, exact, strict=True):
        assert one.dtype == other.dtype == case.dtype
        assert _error(one / 0.37, truth) <= 1.5 * _error(other / 0.37, truth) + 1e-4


@pytest.mark.parametrize("name", sorted(LOSSES))
@pytest.mark.parametrize("finish", ["none", "cap", "scale"])
def test_a_loss_scale_keeps_small_gradients_from_underflow(name: str, finish: str) -> None:
    """In fp16: what the scale saves in whole logits, it saves by chunks.

    Every target is nearly certain (p above 0.999) and the rest of the vocabulary as good as
    impossible: d loss/d logits of 1e-8 to 1e-4, below fp16's smallest number where it is unscaled.
    """
    case = Case(rows=48, width=8, vocabulary=8, rows_at_once=16, finish=finish, dtype=torch.float32)
    sharp = torch.eye(8) * 13.0
    hidden = torch.eye(8)[case.targets().clamp(min=0)] + 0.01 * case.hidden()
    scale = 2.0**10 if finish == "cap" else 2.0**16  # as much as fp16 bears
    gradients = []
    for loss in (LOSSES[name], _ordinary_loss):
        leaves = [each.clone().requires_grad_() for each in (hidden, sharp, torch.zeros(8))]
        with torch.autocast("cpu", dtype=torch.float16):
            total = loss(case, leaves)
        gradients.append(torch.autograd.grad(total * scale, leaves))
    doubles = [each.double().requires_grad_() for each in (hidden, sharp, torch.zeros(8))]
    exact = torch.autograd.grad(_ordinary_loss(case, doubles) * scale, doubles)
    for ours, theirs, truth in zip(*gradients, exact, strict=True):
        assert ours.dtype == torch.float32
        assert _error(ours, truth) <= 1.1 * _error(theirs, truth) + 1e-4
        assert int((ours == 0).sum()) <= int((theirs == 0).sum())


def test_autocast_leaves_float64_alone() -> None:
    """As it does in `F.linear`."""
    case = Case(rows=40, width=4, vocabulary=7, rows_at_once=16)
    leaves = case.leaves()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, _ = summed_cross_entropy(leaves[0], case.targets(), case.projection(leaves))
        logps = scored(leaves[0], case.targets(), case.projection(leaves)).logps
    expected = _ordinary_loss(case, leaves)
    _assert_near(total, expected, 1e-12, "loss")
    _assert_near(-logps.sum(), expected, 1e-12, "logps")


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_a_finish_is_computed_under_the_autocast_of_the_forward(name: str) -> None:
    """Also in the backward pass, outside of it: here it is a product that autocast makes fit."""
    mixing = torch.randn(7, 7, generator=torch.Generator().manual_seed(1))
    case = Case(rows=40, width=4, vocabulary=7, rows_at_once=16, dtype=torch.float32)
    leaves = case.leaves()
    given = attrs.evolve(case.projection(leaves), finish=lambda rows: rows @ mixing)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        if name == "summed":
            total, _ = summed_cross_entropy(leaves[0], case.targets(), given)
        else:
            total = -scored(leaves[0], case.targets(), given).logps.sum()
        logits = F.linear(leaves[0], leaves[1], leaves[2]) @ mixing
        expected = F.cross_entropy(logits.float(), case.targets(), reduction="sum")
    plain = torch.autograd.grad(expected, leaves)
    for ours, theirs in zip(torch.autograd.grad(total, leaves), plain, strict=True):
        assert _error(ours, theirs.double()) < 2e-2


def _peak(function: Callable[[], object]) -> int:
    """The most bytes that a call holds at once beyond what was there, by torch's allocator."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        function()
    assert seen.profiler is not None
    assert seen.profiler.kineto_results is not None
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.mark.parametrize("finish", ["none", "cap"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_stays_within_a_few_budgets_beside_the_gradients(
    finish: str, dtype: torch.dtype
) -> None:
    """Of 15 MB of logits only a chunk exists at a time.

    In float32 one budget of logits; the details of scores are made beside them in a second, and a
    finish makes copies: what it was given, and what it and its gradient make of it.
    """
    case = Case(rows=480, width=8, vocabulary=8_000, rows_at_once=64, finish=finish, dtype=dtype)
    budget = 64 * 8_000 * 4
    leaves = case.leaves()
    # The logits in half precision, widened, and narrowed again: (2 + 4 + 2) / 4 budgets.
    copies = {"none": 1, "cap": 6}[finish] + (1 if dtype == torch.bfloat16 else 0)
    values = sum(leaf.numel() for leaf in leaves)
    small = 480 * 200 + (1 << 17)  # a few numbers for each row
    # Half precision is summed in float32, beside one product, and narrowed at the end. Where the
    # CPU multiplies it itself (AMX), oneDNN lays the weight out anew for each product.
    gradients = values * (4 if dtype == torch.float32 else 10) + small
    kept: list[Tensor] = []

    def score(detailed: bool) -> None:
        projection = case.projection(leaves)
        found = scored(leaves[0], case.targets(), projection, detailed=detailed)
        kept.append(found.logps)

    def loss() -> None:
        total, _ = summed_cross_entropy(leaves[0], case.targets(), case.projection(leaves))
        total.backward()

    peaks = {
        "loss": (_peak(loss), copies * budget + gradients),
        "scores": (_peak(lambda: score(False)), copies * budget + small),
        "details": (_peak(lambda: score(True)), (copies + 1) * budget + small),
        "scores, backward": (
            _peak(lambda: kept[0].sum().backward()),
            copies * budget + gradients,
        ),
    }
    over = {name: sizes for name, sizes in peaks.items() if sizes[0] > sizes[1]}
    assert not over, f"bytes beyond those allowed: {over}"
    whole = _peak(lambda: _ordinary_loss(case, case.leaves()).backward())
    assert whole > 4 * max(measured for measured, _ in peaks.values())


@pytest.fixture
def few_cached(monkeypatch: pytest.MonkeyPatch) -> int:
    """How many bytes of logits are measured at once, and at most twice as many."""
    monkeypatch.setattr(measures, "CACHED", 1 << 17)
    return measures.CACHED


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_stays_for_the_backward_pass_is_two_budgets_at_most(
    dtype: torch.dtype, few_cached: int
) -> None:
    """Beside it a forward pass needs a few rows, a backward pass none. Twice in float64."""
    case = Case(rows=120, width=8, vocabulary=8_000, rows_at_once=64, dtype=dtype)
    budget = 64 * 8_000 * 4
    wide = dtype.itemsize // 4
    leaves = case.leaves()
    small = 120 * 200 + (1 << 17)
    gradients = sum(leaf.numel() for leaf in leaves) * dtype.itemsize + small
    kept: list[Tensor] = []

    def score() -> None:
        kept.append(scored(leaves[0], case.targets(), case.projection(leaves)).logps)

    assert _peak(score) <= wide * chunks.KEPT * budget + 2 * few_cached + small
    assert _peak(lambda: kept[0].sum().backward()) <= gradients


def test_of_known_slopes_one_group_is_there_at_a_time(few_cached: int) -> None:
    """Beside its logits a few rows, however many there are; and nothing stays."""
    case = Case(rows=640, width=8, vocabulary=8_000, rows_at_once=64, dtype=torch.float32)
    budget = 64 * 8_000 * 4
    leaves = case.leaves()
    gradients = sum(leaf.numel() for leaf in leaves) * 4
    small = 640 * 200 + (1 << 17)
    ones = torch.ones(640)
    kept: list[Tensor] = []

    def score() -> None:
        given = case.projection(leaves)
        found = scored(
            leaves[0],
            case.targets(),
            given,
            groups=[80] * 8,
            slopes=lambda index, _: ones[80 * index : 80 * (index + 1)],
        )
        kept.append(found.logps)

    assert _peak(score) <= 80 / 64 * budget + 2 * few_cached + gradients + small
    assert _peak(lambda: kept[0].sum().backward()) <= gradients + small


def test_the_buffer_of_the_logits_is_made_once() -> None:
    """Every chunk is projected into the same memory."""
    places: Counter[int] = Counter()

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = (kwargs or {}).get("out")
            if func._schema.name == "aten::mm" and out is not None and out.shape[-1] == 7:
                places[out.data_ptr()] += 1
            return func(*args, **(kwargs or {}))

    case = Case(rows=72, width=4, vocabulary=7, rows_at_once=16)
    leaves = case.leaves()
    with Seen():
        summed_cross_entropy(leaves[0], case.targets(), case.projection(leaves))
    assert list(places.values()) == [5]


def test_in_fp16_no_sum_is_asked_for_that_stays_empty() -> None:
    asked: list[Tensor] = []

    def sum_of(leaf: Tensor) -> Tensor:
        asked.append(leaf)
        return torch.zeros_like(leaf, dtype=torch.float32)

    for dtype in (torch.float16, torch.bfloat16):
        hidden, weight = torch.ones(4, 3, dtype=dtype), torch.ones(5, 3, dtype=dtype)
        targets = torch.tensor([1, 2, -100, 4])
        given = Accumulating(lambda _: True, sum_of, torch.ones(()))
        with accumulating((), given):
            total, _ = summed_cross_entropy(
                hidden, targets, Projection(weight=weight.requires_grad_(), bias=None)
            )
        assert total.dtype == torch.float32
        assert len(asked) == (dtype == torch.bfloat16)
