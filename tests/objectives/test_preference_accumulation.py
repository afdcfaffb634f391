"""Every loss is the same loss whatever the micro-batches: batch-coupled ones in two passes."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import attrs
import pytest
import torch
import zoo
from objectives import formulas
from objectives.formulas import CASES

import functrain as ft
from functrain import testing
from functrain.objectives.preference import Observed, PreferenceOptimization
from functrain.objectives.unpaired import UnpairedOptimization

STEPS, PAIRS = 5, 8  # each cut once, and the first again
EVERY = pytest.mark.parametrize("case", list(CASES))
COUPLED = pytest.mark.parametrize("case", list(filter(formulas.coupled, CASES)))
MOVING: dict[str, Any] = {"reference_mixup": 0.3, "reference_sync": 2}


def _started(case: str, **options: Any) -> tuple[ft.Step, ft.TrainState]:
    """In float64; an epsilon of Adam's beside which a gradient of rounding alone is nothing.

    Small params, so that no token is unlikely and WPO's weights are no zeros; and a reference far
    enough for its order of the pairs to be another.
    """
    architecture, params, buffers = zoo.split("tied", torch.float64)
    params = ft.trees.map_leaves(lambda tensor: 0.3 * tensor, params)
    optimizer = ft.optim.adamw(1e-2, eps=1e-4)
    reference = formulas.elsewhere(params, size=1.0)
    step = formulas.step_of(case, architecture, reference, optimizer=optimizer, **options)
    return step, step.init(params, buffers)


CUTS: Sequence[int | list[int]] = (2, 4, 8, [3, 1, 4])
"""Equal slices, and ready micro-batches of so many pairs each."""


def _trained(
    step: ft.Step, state: ft.TrainState, case: str, *cuts: int | list[int], steps: int = STEPS
) -> tuple[ft.TrainState, list[dict[str, float]]]:
    """Steps, their batches cut in one of these ways after the other."""
    seen = []
    for seed, cut in zip(range(steps), itertools.cycle(cuts)):
        batch: Any = formulas.batch_of(case, seed, PAIRS)
        if isinstance(cut, int):
            state, metrics = _several(step, cut)(state, batch)
        else:
            state, metrics = step(state, list(testing._cut(batch, cut)))
        seen.append(metrics.to_dict())
    return state, seen


@functools.cache
def _several(step: ft.Step, microbatches: int) -> ft.Step:
    return attrs.evolve(step, microbatches=microbatches)


def _assert_close(one: Any, other: Any, what: str) -> None:
    (state, seen), (cut, measured) = one, other
    assert not any(each["skipped"] for each in seen)
    for name, param in state.params.items():
        size = float(param.abs().max())
        torch.testing.assert_close(
            cut.params[name], param, rtol=1e-9, atol=1e-9 * size, msg=f"{what}: {name}"
        )
    for name, value in (state.running or {}).items():
        torch.testing.assert_close(cut.running[name], value, rtol=1e-9, atol=1e-9)
    for before, after in zip(seen, measured, strict=True):
        assert before.keys() == after.keys()
        for name, value in before.items():
            assert after[name] == pytest.approx(value, rel=1e-8, abs=1e-8), f"{what}: {name}"


@EVERY
def test_steps_are_the_same_whatever_the_micro_batches(case: str) -> None:
    """1 against 2, 4 and 8 equal slices and micro-batches of 3, 1 and 4 pairs, taking turns; of
    some losses each of these for all steps."""
    step, state = _started(case)
    whole = _trained(step, state, case, 1)
    moved = max(
        float((whole[0].params[name] - param).abs().max()) for name, param in state.params.items()
    )
    assert moved > 3e-3, "the steps go somewhere"
    _assert_close(whole, _trained(step, state, case, *CUTS), "cut in turns")
    if case in ("bco_pair", "kto"):
        for cut in CUTS:
            _assert_close(whole, _trained(step, state, case, cut), f"cut in {cut}")


@functools.cache
def _whole(case: str) -> tuple[ft.Step, ft.TrainState, Any]:
    step, state = _started(case)
    return step, state, _trained(step, state, case, 1, steps=20)


@pytest.mark.long
@EVERY
@pytest.mark.parametrize("cut", [*CUTS, [1, 7], [5, 2, 1]], ids=str)
def test_twenty_steps_of_every_loss_are_the_same_in_every_cut(
    case: str, cut: int | list[int]
) -> None:
    """The whole grid: each loss and modifier with each partition for all of the steps."""
    step, state, whole = _whole(case)
    _assert_close(whole, _trained(step, state, case, cut, steps=20), f"cut in {cut}")


@pytest.mark.parametrize("case", ["sigmoid", "bco_pair", "mpo"])
def test_steps_against_a_moving_reference_are_too(case: str) -> None:
    step, state = _started(case, **MOVING)
    steps = 2 * MOVING["reference_sync"] + 1
    whole = _trained(step, state, case, 1, steps=steps)
    cut = _trained(step, state, case, *CUTS, steps=steps)
    _assert_close(whole, cut, "cut in turns")
    for name, tensor in whole[0].reference.items():
        torch.testing.assert_close(cut[0].reference[name], tensor, rtol=1e-9, atol=1e-9)


@COUPLED
def test_micro_batches_on_their_own_would_be_another_loss(case: str) -> None:
    """Nothing above is true for the reason that it does not matter."""
    step, state = _started(case)
    batch = formulas.batch_of(case, 77, PAIRS)
    parts = list(testing._cut(batch, [4, 4]))
    whole = float(step.value_and_grad(state.params, state.buffers, batch).metrics["loss"])
    alone = [step.value_and_grad(state.params, state.buffers, part) for part in parts]
    mean = sum(float(each.metrics["loss"]) for each in alone) / 2
    assert abs(mean - whole) > 1e-6


@pytest.mark.parametrize("loss", ["aot", "aot_unpaired", "bco_pair"])
def test_the_first_of_two_passes_leaves_no_trace_in_the_buffers(loss: str) -> None:
    """BatchNorm has seen as much as where one pass is all that there is."""
    architecture, params, buffers = zoo.split("normed")
    left = []
    for name in ("sigmoid", loss):
        step = ft.dpo_step(
            architecture,
            ft.optim.adamw(),
            reference=ft.trees.clone(params),
            loss=name,
            dropout=True,
            microbatches=2,
        )
        state, _ = step(step.init(params, buffers), zoo.pairs())
        left.append({key: ft.trees.digest(tensor) for key, tensor in state.buffers.items()})
        assert int(state.buffers["norm.num_batches_tracked"]) == 2
    assert left[0] == left[1]


@EVERY
def test_an_evaluation_is_independent_of_the_batch_size(case: str) -> None:
    """Of the order too, and it disturbs nothing; a coupled loss is that of all batches together."""
    step, state = _started(case)
    state, _ = step(state, formulas.batch_of(case, 0, PAIRS))
    for parts in ([1, 1, 1, 1], [3, 1]):
        testing.assert_evaluation_invariant(step, state, formulas.batch_of(case, 9), parts)


class Dropped(zoo.Tied):
    """`Tied` with dropout before its head."""

    def forward(self, *args: Any, **inputs: Any) -> Any:
        logits = super().forward(*args, **inputs)["logits"]
        return {"logits": torch.nn.functional.dropout(logits, 0.3, self.training)}


def _dropped(case: str, **options: Any) -> tuple[ft.Step, ft.TrainState]:
    with ft.keys.seeded(7):
        architecture, params, buffers = ft.split(Dropped().double())
    reference = formulas.elsewhere(params)
    step = formulas.step_of(case, architecture, reference, dropout=True, **options)
    return step, step.init(params, buffers)


@pytest.fixture
def observed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What the first pass of a step saw."""
    seen: list[Any] = []
    for objective in (PreferenceOptimization, UnpairedOptimization):
        couple = objective.couple

        def spying(self: Any, given: Sequence[Any], couple: Any = couple) -> Any:
            seen.extend(given)
            return couple(self, given)

        monkeypatch.setattr(objective, "couple", spying)
    return seen


@pytest.mark.parametrize("case", ["aot", "aot_unpaired", "bco_pair", "wpo_bco"])
def test_with_dropout_the_second_pass_drops_what_the_first_did(
    case: str, observed: list[Any]
) -> None:
    """The loss is that of the formula on the log-probs of the first pass; those of the second,
    which the metrics are of, are the same; and dropout acts."""
    step, state = _dropped(case, microbatches=4)
    _, metrics = step(state, formulas.batch_of(case, 3, PAIRS))
    assert len(observed) == 4
    assert all(isinstance(each, Observed) for each in observed)
    columns = [
        torch.cat([getattr(each.logps, field.name) for each in observed]).tolist()
        for field in attrs.fields(type(observed[0].logps))
        if field.name not in ("divergence", "normalized", "offset")
    ]
    chosen, rejected, length, other, reference_chosen, reference_rejected = columns
    pairs = [
        formulas.Pair(*each)
        for each in zip(
            chosen, rejected, reference_chosen, reference_rejected, length, other, strict=True
        )
    ]
    n = formulas.Numbers(delta=formulas.running_mean(pairs, 0.1))
    name = CASES[case]["loss"]
    weights = None if case != "wpo_bco" else torch.cat([e.weights for e in observed]).tolist()
    expected = formulas.total({name: 1.0}, pairs, n, weights) / PAIRS
    assert float(metrics["loss"]) == pytest.approx(float(expected), rel=1e-12)
    for side, logps in (("chosen", chosen), ("rejected", rejected)):
        assert float(metrics[f"logps/{side}"]) == pytest.approx(sum(logps) / PAIRS, rel=1e-14)
    calm, calm_state = _started(case)
    undropped = attrs.evolve(calm_state, params=state.params)
    _, other_metrics = calm(undropped, formulas.batch_of(case, 3, PAIRS))
    assert float(other_metrics["logps/chosen"]) != pytest.approx(sum(chosen) / PAIRS, rel=1e-3)


def test_with_dropout_the_slopes_are_of_what_was_observed() -> None:
    """Another share of the value would be a scale; here each pair's gradient is its slope times
    that of its own log-probs, as they fell in the second pass."""
    step, state = _dropped("bco_pair")
    batch = formulas.batch_of("bco_pair", 3, PAIRS)
    parts = list(testing._cut(batch, [3, 5]))
    key = 12
    both = step.value_and_grad(state.params, state.buffers, parts, key=key)
    gradient = step.value_and_grad
    device = torch.device("cpu")
    leaves = {name: p.clone().requires_grad_() for name, p in state.params.items()}
    with ft.bound(step.architecture, leaves, state.buffers, "train") as model:
        couplings = gradient.couplings(model, parts, step.objective, key, device)
        total = torch.zeros((), dtype=torch.float64)
        for index, (part, coupling) in enumerate(zip(parts, couplings, strict=True)):
            with ft.keys.seeded(ft.keys.derive(key, "micro-batch", index), device):
                joined = ft.objectives.preference.concatenated(part["chosen"], part["rejected"])
                sums, _ = ft.objectives.sequence_logps(model, joined)
            chosen, rejected = sums.chunk(2)
            total = total + (coupling.chosen * chosen + coupling.rejected * rejected).sum()
    expected = torch.autograd.grad(total / PAIRS, list(leaves.values()))
    for name, grad in zip(leaves, expected, strict=True):
        torch.testing.assert_close(both.grads[name], grad, rtol=1e-9, atol=1e-12)


def test_with_dropout_kto_measures_its_reference_point_on_the_whole_batch(
    observed: list[Any],
) -> None:
    step, state = _dropped("kto", microbatches=4)
    _, metrics = step(state, formulas.batch_of("kto", 3, PAIRS))
    seen = torch.cat(observed)
    assert len(seen) == PAIRS
    assert float(metrics["kl"]) == pytest.approx(max(0.0, float(seen.mean())), rel=1e-14)


class Alone:
    """A coupled objective of one's own, without `observe` and `couple`."""

    name, mode, batch_coupled = "alone", "eval", True

    def __init__(self, of: Any) -> None:
        self._of = of
        self.check, self.weight = of.check, of.weight
        self.check_weight, self.kept = of.check_weight, of.kept

    def __call__(self, model: Any, batch: Any) -> Any:
        return self._of(model, batch)


REFUSED = "the 'alone' loss couples the examples of a batch"


@pytest.mark.parametrize("case", ["aot", "kto"])
def test_what_cannot_be_coupled_is_taken_in_one_piece_alone(case: str) -> None:
    step, state = _started(case)
    alone = attrs.evolve(step, objective=Alone(step.objective))
    one, _ = step(state, formulas.batch_of(case))
    other, _ = alone(state, formulas.batch_of(case))
    testing.assert_same(one, other, "in one piece")
    with pytest.raises(ft.ConfigError, match=REFUSED):
        attrs.evolve(alone, microbatches=2)


@pytest.mark.parametrize("case", ["aot", "kto"])
def test_what_cannot_be_coupled_is_not_taken_by_ready_micro_batches(case: str) -> None:
    """Neither by a step nor by an evaluation: each would be another loss."""
    step, state = _started(case)
    alone = attrs.evolve(step, objective=Alone(step.objective))
    ready = list(testing._cut(formulas.batch_of(case), [2, 2]))
    with pytest.raises(ft.FunctrainError, match=REFUSED):
        alone(state, ready)
    with pytest.raises(ft.FunctrainError, match=REFUSED):
        ft.evaluate(alone, state, ready)
