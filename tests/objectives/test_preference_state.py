"""What a preference method carries from step to step is in the state: a reference that moves
(TR-DPO), and the mean of all rewards (`bco_pair`)."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
import zoo
from objectives import formulas

import functrain as ft
from functrain import testing

STEPS = 5  # the reference moves twice, and once more is all but due
MIXUP, SYNC = 0.3, 2
OPTIONS: dict[str, dict[str, Any]] = {
    "tr_dpo": {"loss": "sigmoid", "reference_mixup": MIXUP, "reference_sync": SYNC},
    "bco": {"loss": "bco_pair"},
    "both": {
        "loss": {"bco_pair": 1.0, "ipo": 0.01, "sft": 0.1},
        "reference_mixup": MIXUP,
        "reference_sync": SYNC,
        "wpo": True,
    },
}
EVERY = pytest.mark.parametrize("method", list(OPTIONS))


def _made(
    method: str, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[ft.Step, Callable[[], ft.TrainState]]:
    """A step, and what makes its first state."""
    architecture, params, buffers = ft.split(zoo.decoder(layers=1, dropout=0.1).to(dtype))
    reference = formulas.elsewhere(params)
    chosen = {"beta": 0.5, "microbatches": 2, "dropout": True, **OPTIONS[method], **options}
    step = ft.dpo_step(architecture, ft.optim.adamw(2e-2), reference=reference, **chosen)
    return step, lambda: step.init(ft.trees.clone(params), buffers, seed=4)


def _batch(step: int) -> Any:
    return formulas.batch_of("sigmoid", seed=step)


def _run(step: ft.Step, state: ft.TrainState, steps: int = STEPS) -> list[ft.TrainState]:
    """The states after each further step, up to a total; the batch is a function of the step."""
    states = []
    while state.step < steps:
        state, metrics = step(state, _batch(state.step))
        assert not float(metrics["skipped"])
        states.append(state)
    return states


@EVERY
@pytest.mark.parametrize("donate", [False, True], ids=["pure", "donated"])
def test_a_run_resumed_from_every_step_ends_with_the_same_bits(
    method: str, donate: bool, tmp_path: Path
) -> None:
    """Loaded into a state made afresh, by a step made afresh."""
    step, begin = _made(method)
    states = [begin()]
    states += _run(step, states[0])
    for at, state in enumerate(states):
        ft.save(tmp_path / str(at), state)
    for at in range(STEPS):
        other, fresh = _made(method, donate=donate)
        loaded = ft.load(tmp_path / str(at), like=fresh(), strict=True)
        testing.assert_same(states[at], loaded, f"saved and loaded at step {at}")
        testing.assert_same(states[-1], _run(other, loaded)[-1], f"resumed at step {at}")


@EVERY
def test_donated_and_pure_are_equal_and_neither_changes_what_it_was_given(method: str) -> None:
    """At a step that moves the reference and at one that does not."""
    step, begin = _made(method)
    for state in [begin(), *_run(step, begin(), SYNC)]:
        testing.assert_pure(step, state, _batch(state.step))
        testing.assert_donation_equal(step, state, _batch(state.step))


CARRIED = [("tr_dpo", "reference"), ("bco", "running"), ("both", "reference"), ("both", "running")]


@pytest.mark.parametrize(("method", "field"), CARRIED)
def test_a_field_that_was_not_saved_would_be_missed(method: str, field: str) -> None:
    """Reset to its first value at a save, the run ends with other params."""
    step, begin = _made(method)
    first = begin()
    states = _run(step, first)
    for state in (states[SYNC - 1], states[-2]):
        reset = attrs.evolve(state, **{field: getattr(first, field)})
        end = _run(step, reset)[-1]
        same = [torch.equal(end.params[name], p) for name, p in states[-1].params.items()]
        assert not any(same), f"without {field} of step {state.step}"


@pytest.mark.parametrize("method", list(OPTIONS))
def test_nothing_is_carried_that_is_not_needed(method: str) -> None:
    _, begin = _made(method)
    state = begin()
    assert (state.reference is not None) is ((method, "reference") in CARRIED)
    assert (state.running is not None) is ((method, "running") in CARRIED)
    _, begin = _made("bco", loss={"sigmoid": 1.0})
    assert begin().reference is begin().running is None


def test_the_reference_moves_at_multiples_of_its_interval_and_only_then() -> None:
    """To α·π + (1−α)·ref, with the params that the step has just made."""
    step, begin = _made("tr_dpo", torch.float64)
    before = begin()
    expected = dict(step.objective.reference)
    for state in _run(step, before):
        if state.step % SYNC == 0:
            expected = {
                name: MIXUP * state.params[name] + (1 - MIXUP) * tensor
                for name, tensor in expected.items()
            }
            for name, tensor in state.reference.items():
                torch.testing.assert_close(tensor, expected[name], rtol=1e-14, atol=1e-15)
            assert testing.first_difference(before, state) is not None
        else:
            assert state.reference is before.reference, "the very mapping"
        before = state


def test_a_frozen_part_of_another_model_moves_too() -> None:
    """Where it is the policy's it stays as it is, whatever numbers it has."""
    module = zoo.decoder(layers=1).double()
    frozen = [name for name, _ in module.named_parameters() if "norm" in name]
    for name in frozen:
        module.get_parameter(name).requires_grad_(False)
    infinite, *others = frozen
    module.get_parameter(infinite).data[0] = torch.inf
    architecture, params, buffers = ft.split(module)
    reference = {**formulas.elsewhere(params), infinite: params[infinite].clone()}
    options = OPTIONS["tr_dpo"] | {"beta": 0.5}
    step = ft.dpo_step(architecture, ft.optim.adamw(1e-2), reference=reference, **options)
    first = step.init(params, buffers)
    # The move alone: of an infinite number no step is finite.
    moved = step._moved_reference(
        attrs.evolve(first, step=SYNC - 1), first.params, torch.tensor(True)
    )
    assert moved is not None
    assert moved[infinite] is first.reference[infinite], "no second copy of what moves nowhere"
    assert torch.equal(moved[infinite], params[infinite])
    for name in others:
        expected = MIXUP * params[name] + (1 - MIXUP) * reference[name]
        assert not torch.equal(reference[name], params[name])
        torch.testing.assert_close(moved[name], expected, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_reference_in_half_precision_moves_in_the_dtype_of_the_params(dtype: torch.dtype) -> None:
    """In its own a small mixup would be rounded away, and it would never move."""
    step, begin = _made("tr_dpo", reference_mixup=1e-4, reference_sync=1)
    half = ft.trees.map_leaves(lambda tensor: tensor.to(dtype), step.objective.reference)
    step = attrs.evolve(step, objective=attrs.evolve(step.objective, reference=half))
    state = begin()
    first = step.init(state.params, state.buffers)
    after, _ = step(first, _batch(0))
    for name, tensor in after.reference.items():
        assert tensor.dtype == first.reference[name].dtype == torch.float32
        assert torch.equal(first.reference[name], half[name].float())
        moved = first.reference[name] + 1e-4 * (after.params[name] - first.reference[name])
        torch.testing.assert_close(tensor, moved, rtol=1e-6, atol=1e-9)
        assert not torch.equal(tensor, first.reference[name])


@pytest.mark.parametrize("sync", [1, 512])
def test_a_mixup_of_one_is_the_policy_itself(sync: int) -> None:
    step, begin = _made("tr_dpo", reference_mixup=1.0, reference_sync=sync)
    for state in _run(step, begin(), 3):
        for name, tensor in state.reference.items():
            assert torch.equal(tensor, state.params[name]) is (sync == 1)
            assert tensor.data_ptr() != state.params[name].data_ptr()


def test_the_moving_reference_is_the_one_that_is_read() -> None:
    """By the step and by an evaluation; the step's own reference stays as it was given."""
    step, begin = _made("tr_dpo", torch.float64, dropout=False)
    given = {name: ft.trees.digest(tensor) for name, tensor in step.objective.reference.items()}
    state = _run(step, begin(), SYNC)[-1]
    reference = ft.trees.clone(state.reference)
    still = {"reference": reference, "reference_mixup": None, "reference_sync": 512}
    fixed = attrs.evolve(step, objective=attrs.evolve(step.objective, **still))
    bare = attrs.evolve(state, reference=None)
    assert ft.evaluate(step, state, [_batch(9)]).to_dict() == (
        ft.evaluate(fixed, bare, [_batch(9)]).to_dict()
    )
    _, moving = step(state, _batch(9))
    _, fixed_metrics = fixed(bare, _batch(9))
    assert moving.to_dict() == fixed_metrics.to_dict()
    assert given == {n: ft.trees.digest(t) for n, t in step.objective.reference.items()}


def test_log_probs_of_a_reference_that_has_moved_since_are_refused() -> None:
    """They would be read in its place, and it would move for nobody."""
    step, begin = _made("tr_dpo")
    given = {side: torch.zeros(4) for side in ("chosen", "rejected")}
    with pytest.raises(ft.BatchError, match="computed ahead, and the reference moves"):
        step(begin(), {**_batch(0), "reference_logps": given})


def test_two_runs_of_one_step_have_a_reference_each() -> None:
    step, begin = _made("tr_dpo", donate=True)
    one = begin()
    for name, tensor in one.reference.items():
        assert tensor.data_ptr() != step.objective.reference[name].data_ptr()
    end = ft.fingerprint(_run(step, one)[-1])
    assert ft.fingerprint(_run(step, begin())[-1]) == end


def _breaking(step: ft.Step) -> ft.Step:
    """The step where its gradients are no numbers, whatever the batch."""

    def broken(grads: Any, _params: Any) -> Any:
        return ft.trees.map_leaves(lambda grad: grad * torch.nan, grads)

    return attrs.evolve(step, transform=broken)


@EVERY
@pytest.mark.parametrize("donate", [False, True], ids=["pure", "donated"])
def test_a_step_that_is_not_applied_moves_nothing(method: str, donate: bool) -> None:
    """A step at a multiple of the interval that is not finite: neither moves, then or later."""
    step, begin = _made(method)
    state = _run(step, begin(), SYNC - 1)[-1]
    before = ft.fingerprints(state)
    after, metrics = _breaking(step)(state, _batch(0), donate=donate)
    assert float(metrics["skipped"]) == 1
    assert after.step == SYNC
    kept = {path: value for path, value in ft.fingerprints(after).items() if path != "step"}
    assert kept == {path: value for path, value in before.items() if path != "step"}
    (later,) = _run(step, after, SYNC + 1)
    if later.reference is not None:
        moved = ft.fingerprints(later)
        assert all(moved[p] == before[p] for p in before if p.startswith("reference/"))


def _rewards(step: ft.Step, state: ft.TrainState, batch: Any) -> list[formulas.Pair]:
    """The log-probs of a batch's pairs, under the policy and under the reference of a state."""
    joined = ft.objectives.preference.concatenated(batch["chosen"], batch["rejected"])
    columns: list[list[float]] = []
    with torch.no_grad():
        for params in (state.params, state.reference or step.objective.kept()):
            assert params is not None
            with ft.bound(step.architecture, params, state.buffers, "eval") as model:
                sums, _ = ft.objectives.sequence_logps(model, joined)
            columns += [side.tolist() for side in sums.chunk(2)]
    return [formulas.Pair(*logps) for logps in zip(*columns, strict=True)]


@pytest.mark.parametrize("method", ["bco", "both"])
def test_what_is_carried_is_the_mean_of_all_rewards_seen(method: str) -> None:
    """By hand, of both sides under each step's own policy and reference; a skipped step has seen
    none. δ is that mean with the step's own batch in it."""
    step, begin = _made(method, torch.float64, dropout=False)
    state, seen = begin(), (0.0, 0)
    for number in range(6):
        batch = _batch(state.step)
        if number == 3:
            state, metrics = _breaking(step)(state, batch)
            assert float(metrics["skipped"]) == 1
            continue
        pairs = _rewards(step, state, batch)
        rewards = [
            0.5 * each
            for p in pairs
            for each in (p.chosen - p.reference_chosen, p.rejected - p.reference_rejected)
        ]
        mean = formulas.running_mean(pairs, 0.5, seen)
        seen = seen[0] + sum(rewards), seen[1] + len(rewards)
        state, metrics = step(state, batch)
        assert float(state.running["reward_count"]) == seen[1]
        assert float(state.running["reward_sum"]) == pytest.approx(seen[0], rel=1e-12)
        if method == "bco":
            n = formulas.Numbers(beta=0.5, delta=mean)
            expected = formulas.total({"bco_pair": 1.0}, pairs, n) / len(pairs)
            assert float(metrics["loss"]) == pytest.approx(float(expected), rel=1e-12)


REFUSALS = [
    ("tr_dpo", "plain", "reference: this step and this state disagree about a moving reference"),
    ("plain", "tr_dpo", "reference: this step and this state disagree about a moving reference"),
    ("bco", "plain", "running: this step and this state disagree about what the objective carries"),
    ("plain", "bco", "running: this step and this state disagree about what the objective carries"),
    ("both", "tr_dpo", "running: this step and this state disagree"),
    ("bco", "both", "reference: this step and this state disagree"),
]


@pytest.mark.parametrize(("of", "given", "message"), REFUSALS)
def test_a_state_of_another_objective_is_refused_by_name(of: str, given: str, message: str) -> None:
    """And adopted it is taken, with a reference and a mean that begin anew."""
    options = {"plain": {"loss": "sigmoid"}, **OPTIONS}
    step, _ = _made("bco", **{"reference_mixup": None, **options[of]})
    _, begin = _made("bco", **{"reference_mixup": None, **options[given]})
    state = begin()
    for refusing in (
        lambda: step.check(state),
        lambda: step(state, _batch(0)),
        lambda: ft.evaluate(step, state, [_batch(0)]),
    ):
        with pytest.raises(ft.StateError, match=f"{message}.*step.adopt"):
            refusing()
    adopted = step.adopt(state)
    step.check(adopted)
    if adopted.reference is not None:
        for name, tensor in adopted.reference.items():
            assert torch.equal(tensor, step.objective.reference[name])


def test_a_checkpoint_of_another_objective_is_refused_by_name(tmp_path: Path) -> None:
    """What is saved without a moving reference is not loaded as if it had one, nor without it."""
    _, plain = _made("bco", loss="sigmoid")
    for method, field in CARRIED[:2]:
        _, begin = _made(method)
        ft.save(tmp_path / method, begin())
        ft.save(tmp_path / f"no {method}", plain())
        with pytest.raises(ft.CheckpointError, match=field):
            ft.load(tmp_path / method, like=plain(), strict=True)
        with pytest.raises(ft.CheckpointError, match=field):
            ft.load(tmp_path / f"no {method}", like=begin(), strict=True)


def test_what_a_state_carries_is_no_option_and_survives_another() -> None:
    step, begin = _made("bco", dropout=False)
    state = _run(step, begin(), 2)[-1]
    signature = inspect.signature(ft.objectives.PreferenceOptimization)
    assert "running" not in signature.parameters
    with pytest.raises(TypeError, match="running"):
        attrs.evolve(step.objective, running=state.running)

    def loss(objective: Any) -> float:
        found = step.value_and_grad(state.params, state.buffers, _batch(2), objective=objective)
        return float(found.metrics["loss"])

    other = attrs.evolve(step.objective, beta=0.7)
    evolved = attrs.evolve(step.objective.carrying(None, state.running), beta=0.7)
    assert loss(evolved) == loss(other.carrying(None, state.running)) != loss(other)
