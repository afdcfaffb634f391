"""The step: what it counts, what it skips, what it carries over, what it reports."""

from __future__ import annotations

import copy
import gc
import inspect
import itertools
import random
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
import torch.nn.functional as F
import zoo

import functrain as ft
from functrain import metrics as m
from functrain import testing
from functrain.errors import ArchitectureError, BatchError, StateError
from functrain.objectives import LanguageModeling, PreferenceOptimization
from functrain.stages import PreferenceOptions, StepOptions


def _made(name: str = "tied", **options: Any) -> tuple[Any, Any]:
    architecture, params, buffers = zoo.split(name)
    options = {"schedule": ft.schedules.linear(1e-2, total=20, warmup=4), **options}
    step = ft.pretrain_step(architecture, ft.optim.adamw(weight_decay=0.1), **options)
    return step, step.init(params, buffers, seed=1)


def test_the_metrics_have_the_names_that_dashboards_know() -> None:
    step, state = _made()
    _, metrics = step(state, zoo.batch())
    assert set(metrics) == {
        "loss",
        "perplexity",
        "mean_token_accuracy",
        "num_tokens",
        "padding",
        "grad_norm",
        "learning_rate",
        "loss_scale",
        "skipped",
    }
    assert all(value.ndim == 0 for value in metrics.values())
    assert float(metrics["perplexity"]) == pytest.approx(float(metrics["loss"].exp()))
    targets = (zoo.batch()["labels"][:, 1:] != -100).sum()
    assert float(metrics["num_tokens"]) == int(targets)


@pytest.mark.parametrize("by_chunks", [False, True])
@pytest.mark.parametrize("microbatches", [1, 2])
def test_the_metrics_of_a_batch_are_their_formulas(by_chunks: bool, microbatches: int) -> None:
    """Of targets of which some are the mode, and of a mode that is often token 0: what stands for
    no target while it is looked for."""
    module = zoo.decoder(biased=True)
    with torch.no_grad():
        module.lm_head.bias.neg_()
    ids, labels = zoo.batch()["input_ids"], zoo.batch()["labels"]
    logits = module(ids)[:, :-1].detach().double()
    modes, targets = logits.argmax(-1), labels[:, 1:]
    targets[:, ::2] = torch.where(targets == -100, -100, modes)[:, ::2]
    nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    count, right = int((targets != -100).sum()), int((targets == modes).sum())
    assert 0 < right < count
    assert bool((modes[targets == -100] == 0).any())
    architecture, params, buffers = ft.split(module)
    step = ft.pretrain_step(architecture, ft.optim.adamw(), microbatches=microbatches)
    with pytest.MonkeyPatch.context() as patch:
        if by_chunks:
            patch.setattr("functrain.objectives.chunks.BUDGET", 0)
        _, metrics = step(step.init(params, buffers), {"input_ids": ids, "labels": labels})
    assert float(metrics["loss"]) == pytest.approx(float(nll), rel=1e-5)
    assert float(metrics["perplexity"]) == pytest.approx(float(nll.exp()), rel=1e-5)
    assert float(metrics["mean_token_accuracy"]) == pytest.approx(right / count)
    assert float(metrics["num_tokens"]) == count


def _options(record: type) -> set[str]:
    fields = attrs.fields(record)
    return {field.name for field in fields if field.init and not field.name.startswith("_")}


def test_type_checkers_know_every_option_of_a_step() -> None:
    parts = {"objective", "architecture", "optimizer", "schedule"}
    assert set(StepOptions.__annotations__) == _options(ft.Step) - parts


def test_type_checkers_know_every_option_of_a_preference_step() -> None:
    known = {*inspect.signature(ft.dpo_step).parameters, *PreferenceOptions.__annotations__}
    assert _options(PreferenceOptimization) - {"name"} <= known


def test_learning_rate_and_norm_are_those_of_this_update() -> None:
    step, state = _made(max_grad_norm=0.01)
    for count in range(6):
        expected = step.schedule(count)
        gradient = step.value_and_grad(state.params, state.buffers, zoo.batch(count))
        state, metrics = step(state, zoo.batch(count))
        assert float(metrics["learning_rate"]) == expected
        norm = ft.trees.global_norm(gradient.grads)
        assert float(metrics["grad_norm"]) == float(norm) > 0.01


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a wait is one for CUDA alone")
@pytest.mark.parametrize("donate", [False, True])
def test_a_step_on_cuda_waits_for_nothing(donate: bool) -> None:
    """Nor does reading what it returns, but for the numbers themselves."""
    architecture, params, buffers = zoo.split("decoder")
    step = ft.pretrain_step(
        architecture,
        ft.optim.adamw(weight_decay=0.1),
        schedule=ft.schedules.linear(1e-2, total=20, warmup=4),
        microbatches=2,
        max_grad_norm=0.1,
        donate=donate,
    )
    there = ft.trees.Tensors({name: param.cuda() for name, param in params.items()})
    state = step.init(there, {name: buffer.cuda() for name, buffer in buffers.items()})
    batch = {key: value.cuda() for key, value in zoo.batch().items()}
    state, _ = step(state, batch)  # which finds the head, and makes the schedule's table
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            state, metrics = step(state, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert float(metrics["loss"]) > 0


def test_evolving_a_step_rebuilds_what_depends_on_it() -> None:
    step, state = _made("normed")
    for changes in ({"microbatches": 2}, {"precision": "bf16"}, {"max_grad_norm": 0.1}):
        changed = attrs.evolve(step, **changes)
        fresh, _ = _made("normed", **changes)
        one, _ = changed(state, zoo.batch())
        other, _ = fresh(state, zoo.batch())
        assert ft.fingerprint(one) == ft.fingerprint(other)
        assert ft.fingerprint(one) != ft.fingerprint(step(state, zoo.batch())[0])


class Overflowing(zoo.Tied):
    """Gradients that are infinite, or not numbers, where a certain token is seen."""

    def forward(self, input_ids: Any, **rest: Any) -> Any:  # type: ignore[override]
        out = super().forward(input_ids, **rest)
        bad = (input_ids == 30).any()
        return {"logits": out["logits"] * torch.where(bad, torch.inf, 1.0)}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "bf16_params"])
@pytest.mark.parametrize("donate", [False, True])
def test_a_step_that_is_not_finite_applies_nothing(precision: str, donate: bool) -> None:
    good = zoo.batch()
    good["input_ids"] = good["input_ids"].clamp(max=29)
    good["labels"] = good["labels"].clamp(max=29)
    bad = {**good, "input_ids": good["input_ids"].clone()}
    bad["input_ids"][0, 0] = 30
    architecture, params, buffers = ft.split(Overflowing())
    step = ft.pretrain_step(
        architecture, ft.optim.adamw(1e-2), precision=precision, max_grad_norm=1.0, ema_decay=0.9
    )
    state, _ = step(step.init(ft.trees.clone(params), buffers), good)
    before = ft.fingerprints(state)
    scale = None if state.scaler is None else float(state.scaler.scale)
    after, metrics = step(state, bad, donate=donate)
    assert float(metrics["skipped"]) == 1
    assert after.step == 2
    changed = {path for path, leaf in ft.fingerprints(after).items() if leaf != before[path]}
    assert changed <= {"step", "scaler/scale", "scaler/growth_count"}
    if scale is not None and after.scaler is not None:
        assert float(after.scaler.scale) == scale / 2
    again, metrics = step(after, good)
    assert float(metrics["skipped"]) == 0
    assert int(again.optimizer.count) == int(again.scheduler.count) == 2
    assert all(bool(p.isfinite().all()) for p in again.params.values())


def test_a_skipped_step_leaves_batchnorms_statistics() -> None:
    step, state = _made("normed")
    poisoned = attrs.evolve(
        state, params=ft.trees.map_leaves(lambda p: p * torch.nan, state.params)
    )
    after, metrics = step(poisoned, zoo.batch())
    assert float(metrics["skipped"]) == 1
    for name, buffer in state.buffers.items():
        assert torch.equal(after.buffers[name], buffer), name
    trained, _ = step(state, zoo.batch())
    assert not torch.equal(trained.buffers["norm.running_mean"], state.buffers["norm.running_mean"])
    assert int(trained.buffers["norm.num_batches_tracked"]) == 1


def test_the_average_is_an_exponential_moving_average() -> None:
    step, state = _made(ema_decay=0.75)
    expected = {name: p.clone() for name, p in state.params.items()}
    for seed in range(4):
        state, _ = step(state, zoo.batch(seed))
        for name, param in state.params.items():
            expected[name] = 0.75 * expected[name] + 0.25 * param
    for name, average in state.average.items():
        torch.testing.assert_close(average, expected[name], rtol=1e-5, atol=1e-7)


def test_adopting_takes_the_params_and_begins_the_rest() -> None:
    step, state = _made("normed")
    for seed in range(3):
        state, _ = step(state, zoo.batch(seed))
    tuning = ft.sft_step(step.architecture, ft.optim.sgd(), precision="fp16")
    adopted = tuning.adopt(state)
    assert all(torch.equal(adopted.params[n], p) for n, p in state.params.items())
    assert all(torch.equal(adopted.buffers[n], b) for n, b in state.buffers.items())
    assert adopted.step == 0
    assert int(adopted.scheduler.count) == 0
    assert adopted.cursor == ft.Cursor()
    assert adopted.scaler is not None
    assert adopted.key != state.key
    assert adopted.key == tuning.adopt(state).key
    tuned, _ = tuning(adopted, zoo.batch())
    assert tuned.step == 1


def test_the_order_of_the_names_changes_no_bit() -> None:
    step, state = _made(max_grad_norm=0.1)
    reached = set()
    for seed in range(10):
        names = list(state.params)
        random.Random(seed).shuffle(names)
        other = step.init({name: state.params[name] for name in names}, state.buffers, seed=1)
        for count in range(3):
            other, _ = step(other, zoo.batch(count))
        reached.add(ft.fingerprint(other))
    assert len(reached) == 1


def test_a_parameter_that_is_frozen_stays() -> None:
    module = zoo.model("tied")
    module.mix.weight.requires_grad_(False)  # type: ignore[union-attr]
    architecture, params, buffers = ft.split(module)
    step = ft.pretrain_step(architecture, ft.optim.adamw(1e-1, weight_decay=0.5))
    state = step.init(params, buffers)
    assert "mix.weight" not in state.optimizer.slots["exp_avg"]
    after, _ = step(state, zoo.batch())
    assert torch.equal(after.params["mix.weight"], params["mix.weight"])
    assert not torch.equal(after.params["mix.bias"], params["mix.bias"])


def test_a_transform_acts_before_the_clipping() -> None:
    """SGD, and a rate above 0 at the first update, so that the size of a gradient shows."""
    architecture, params, buffers = zoo.split("tied")
    step = ft.pretrain_step(
        architecture, ft.optim.sgd(0.1), transform=ft.adaptive_clip, max_grad_norm=0.05
    )
    state = step.init(params, buffers)
    gradient = step.value_and_grad(state.params, state.buffers, zoo.batch(), key=0)
    clipped = ft.adaptive_clip(gradient.grads, state.params)
    expected, norm = ft.clip_by_global_norm(clipped, 0.05)
    assert 0.05 < float(norm) < float(ft.trees.global_norm(gradient.grads))
    params, _ = step.optimizer.update(expected, state.optimizer, state.params, 0.1)
    after, metrics = step(state, zoo.batch())
    assert all(torch.equal(after.params[n], p) for n, p in params.items())
    assert any(not torch.equal(after.params[n], p) for n, p in state.params.items())
    assert float(metrics["grad_norm"]) == float(ft.trees.global_norm(gradient.grads))


def test_an_objective_of_ones_own_is_a_step_like_any_other() -> None:
    @attrs.frozen
    class Focused:
        """Language modelling that counts every target twice: a larger sum, the same weight."""

        inner: Any = attrs.field(factory=LanguageModeling)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

        def __call__(self, model: Any, batch: Any) -> Any:
            total, metrics = self.inner(model, batch)
            return 2 * total, metrics

    architecture, params, buffers = zoo.split("tied")
    step = ft.make_step(Focused(), ft.optim.sgd(0.1), architecture=architecture)
    plain = ft.pretrain_step(architecture, ft.optim.sgd(0.2))
    one, _ = step(step.init(params, buffers), zoo.batch())
    other, _ = plain(plain.init(params, buffers), zoo.batch())
    for name, param in one.params.items():
        torch.testing.assert_close(param, other.params[name])


def test_models_may_answer_with_logits_a_mapping_or_an_object() -> None:
    class Answer:
        def __init__(self, logits: Any) -> None:
            self.logits = logits

    answers: list[Any] = [lambda x: x, lambda x: {"logits": x}, Answer]
    reached = set()
    for wrap in answers:

        class Model(zoo.Tied):
            def forward(self, *args: Any, **rest: Any) -> Any:
                return wrap(super().forward(*args, **rest)["logits"])  # noqa: B023

        torch.manual_seed(0)
        architecture, params, buffers = ft.split(Model())
        step = ft.pretrain_step(architecture, ft.optim.adamw(1e-2))
        state, _ = step(step.init(params, buffers), zoo.batch())
        reached.add(ft.fingerprint(state))
    assert len(reached) == 1

    class Wrong(zoo.Tied):
        def forward(self, *args: Any, **rest: Any) -> Any:
            return 3

    architecture, params, buffers = ft.split(Wrong())
    step = ft.pretrain_step(architecture, ft.optim.adamw(1e-2))
    with pytest.raises(ft.ArchitectureError, match="returned a int without logits"):
        step(step.init(params, buffers), zoo.batch())


def test_evaluation_is_in_eval_mode_and_of_every_stage() -> None:
    step, state = _made("normed")
    one = ft.evaluate(step, state, [zoo.batch()])
    assert one.to_dict() == ft.evaluate(step, state, [zoo.batch()]).to_dict()
    assert {"eval_loss", "eval_perplexity", "eval_mean_token_accuracy"} <= set(one)
    preferring = ft.dpo_step(
        step.architecture, ft.optim.adamw(), reference=ft.trees.clone(state.params)
    )
    measured = ft.evaluate(preferring, preferring.adopt(state), [zoo.pairs()])
    assert {"eval_loss", "eval_rewards/margins", "eval_rewards/accuracies"} <= set(measured)


def test_what_is_drawn_in_an_evaluation_is_of_the_states_key() -> None:
    """Of a model that drops in eval mode too; the global generators are as before."""

    class Dropping(zoo.Tied):
        def forward(self, *args: Any, **rest: Any) -> Any:
            out = super().forward(*args, **rest)
            return {"logits": torch.nn.functional.dropout(out["logits"], 0.5)}

    architecture, params, buffers = ft.split(Dropping())
    step = ft.pretrain_step(architecture, ft.optim.adamw())
    before = torch.get_rng_state()
    one, again, other = (
        ft.evaluate(step, step.init(params, buffers, seed=seed), [zoo.batch()]).to_dict()
        for seed in (1, 1, 2)
    )
    assert one == again != other
    assert torch.equal(torch.get_rng_state(), before)


def test_after_an_evaluation_a_donated_step_copies_nothing() -> None:
    """A state's memory is its own as before."""
    step, state = _made()
    state, _ = step(state, zoo.batch())
    own = state.params.own
    ft.evaluate(step, state, [zoo.batch()])
    assert own == state.params.own == state.params.keys()
    assert ft.trees.clone(state.params).own == state.params.own == own


@pytest.mark.parametrize(
    "taken",
    [
        lambda params: ft.trees.select(params, "*"),
        lambda params: ft.trees.zero(params, "mix.*"),
        lambda params: params.copy(),
        lambda params: ft.trees.Tensors(params),
        copy.copy,
        lambda params: ft.trees.map_leaves(lambda leaf: leaf.cpu(), params),
        lambda params: ft.trees.map_leaves(lambda leaf: leaf.flatten()[1:], params),
    ],
    ids=["select", "zero", "copy", "Tensors", "copy.copy", "mapped to itself", "mapped to a view"],
)
def test_what_was_taken_of_a_states_params_is_not_written_by_a_donation(taken: Any) -> None:
    step, state = _made()
    state, _ = step(state, zoo.batch())
    kept = taken(state.params)
    before = {name: ft.trees.digest(tensor) for name, tensor in kept.items()}
    step(state, zoo.batch(1), donate=True)
    assert {name: ft.trees.digest(tensor) for name, tensor in kept.items()} == before


class Routed(zoo.Tied):
    """A parameter that the loss reaches only where the batch has a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = torch.nn.Linear(16, 16)

    def forward(self, input_ids: Any, attention_mask: Any = None, position_ids: Any = None) -> Any:
        hidden = self.embedding(input_ids)
        if attention_mask is not None:
            hidden = hidden + self.extra(hidden)
        return self.head(self.norm(hidden))


def test_a_parameter_has_the_gradient_of_the_micro_batches_that_reach_it() -> None:
    """Whichever they are, and in whatever order the gradients are summed."""
    architecture, params, buffers = ft.split(Routed())
    gradient = ft.value_and_grad(LanguageModeling(), architecture)
    for routed in itertools.product([False, True], repeat=4):
        parts = [zoo.batch(seed) for seed in range(4)]
        for part, yes in zip(parts, routed, strict=True):
            if yes:
                part["attention_mask"] = torch.ones_like(part["input_ids"])
        fast, tree = (
            dict(ft.accumulate(gradient, 1, tree=tree)(params, buffers, parts).grads)
            for tree in (False, True)
        )
        assert ("extra.weight" in fast) is any(routed)
        torch.testing.assert_close(tree, fast, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("optimizer", [ft.optim.adamw(1e-2), ft.optim.sgd(1e-1, momentum=0.9)])
def test_a_donated_step_leaves_the_states_before_its_own_alone(optimizer: Any) -> None:
    """What a pure step did not touch, its result shares with the state that it was given."""
    architecture, params, buffers = ft.split(Routed())
    step = ft.pretrain_step(architecture, optimizer)
    first = step.init(ft.trees.clone(params), buffers)
    routed = zoo.batch() | {"attention_mask": torch.ones(4, 8, dtype=torch.int64)}
    first, _ = step(first, routed)
    before = ft.fingerprint(first)
    second, _ = step(first, zoo.batch())
    assert second.params["extra.weight"] is first.params["extra.weight"]
    expected, _ = step(second, routed)
    third, _ = step(second, routed, donate=True)
    assert ft.fingerprint(first) == before
    assert ft.fingerprint(third) == ft.fingerprint(expected)
    # And the other way round: the older of the two is donated, the younger lives.
    younger, _ = step(third, zoo.batch())
    kept = ft.fingerprint(younger)
    step(third, routed, donate=True)
    assert ft.fingerprint(younger) == kept


def test_a_skipped_step_shares_nothing_that_a_donation_would_consume() -> None:
    step, state = _made(transform=_not_a_number)
    skipped, metrics = step(state, zoo.batch())
    assert metrics["skipped"] == 1
    attrs.evolve(step, transform=None)(skipped, zoo.batch(), donate=True)
    assert ft.fingerprint(state)


def test_a_mapping_of_ones_own_is_not_overwritten() -> None:
    architecture, params, buffers = zoo.split("tied")
    own = dict(params)
    digests = {name: ft.trees.digest(tensor) for name, tensor in own.items()}
    copied = params.copy()
    step = ft.pretrain_step(architecture, ft.optim.adamw(1e-2))
    for given in (own, params):
        state = step.init(given, buffers)
        step(state, zoo.batch(), donate=True)
        assert {name: ft.trees.digest(tensor) for name, tensor in own.items()} == digests
        assert {name: ft.trees.digest(tensor) for name, tensor in copied.items()} == digests


@pytest.mark.parametrize("donate", [False, True])
def test_params_that_did_fit_are_not_taken_for_granted(donate: bool) -> None:
    """After steps that fitted: params of another shape, of another name, and no tensor."""
    step, state = _made()
    for _ in range(2):
        state, _ = step(state, zoo.batch(), donate=donate)
    name = "mix.weight"
    wrongs: list[tuple[dict[str, Any], str]] = [
        ({**state.params, name: torch.zeros(1, 2)}, rf"params/{name}: shape \[1, 2\], expected"),
        ({**state.params, "other": torch.zeros(1)}, "unexpected 'other'"),
        ({**state.params, name: torch.zeros_like(state.params[name], device="meta")}, "meta"),
        ({**state.params, name: None}, f"params/{name}: expected a tensor, got NoneType"),
    ]
    for wrong, message in wrongs:
        for given in (wrong, ft.trees.tensors(wrong)):
            with pytest.raises((ft.StateError, ft.ArchitectureError), match=message):
                step(attrs.evolve(state, params=given), zoo.batch(), donate=donate)  # type: ignore[arg-type]
    step(state, zoo.batch(), donate=donate)


@pytest.mark.parametrize("donate", [False, True])
def test_a_state_evolved_with_a_plain_mapping_is_a_state(donate: bool) -> None:
    """In whatever order; and a donated step leaves the mapping's tensors to who gave them."""
    step, state = _made()
    given = {name: state.params[name] * 2 for name in reversed(state.params)}
    before = {name: ft.trees.digest(tensor) for name, tensor in given.items()}
    expected, _ = step(attrs.evolve(state, params=ft.trees.tensors(given)), zoo.batch())
    evolved = attrs.evolve(state, params=given)  # type: ignore[arg-type]
    found, _ = step(evolved, zoo.batch(), donate=donate)
    assert ft.fingerprint(found) == ft.fingerprint(expected)
    assert {name: ft.trees.digest(tensor) for name, tensor in given.items()} == before


def test_a_donated_step_copies_nothing_that_is_its_own() -> None:
    step, state = _made()
    addresses = [tensor.data_ptr() for tensor in state.params.values()]
    for _ in range(3):
        state, _ = step(state, zoo.batch(), donate=True)
        assert [tensor.data_ptr() for tensor in state.params.values()] == addresses


def _not_a_number(grads: Any, params: Any) -> Any:
    del params
    return {name: grad * float("nan") for name, grad in grads.items()}


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda grad: None, "NoneType, expected a tensor; leave out what has none"),
        (lambda grad: grad.to_sparse(), "torch.sparse_coo, expected a dense tensor"),
    ],
)
@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_what_a_transform_gives_is_looked_at(
    made: Any, message: str, max_grad_norm: float | None
) -> None:
    step, state = _made(
        max_grad_norm=max_grad_norm,
        transform=lambda grads, _: {**grads, "mix.bias": made(grads["mix.bias"])},
    )
    with pytest.raises(ft.ConfigError, match=f"transform/mix.bias: {message}"):
        step(state, zoo.batch())


@pytest.mark.parametrize("donate", [False, True])
def test_a_transform_that_writes_into_the_params_is_refused(donate: bool) -> None:
    def zeroing(grads: Any, params: Any) -> Any:
        params["mix.bias"].zero_()
        return grads

    step, state = _made(transform=zeroing, donate=donate)
    with pytest.raises(ft.ConfigError, match="transform: it has written into the params"):
        step(state, zoo.batch())


def test_a_transform_that_makes_nan_is_a_skipped_step() -> None:
    step, state = _made(transform=_not_a_number, max_grad_norm=1.0)
    after, metrics = step(state, zoo.batch())
    assert metrics["skipped"] == 1
    assert ft.trees.digest(after.params["mix.weight"]) == ft.trees.digest(
        state.params["mix.weight"]
    )


def test_the_callers_contexts_change_no_bit() -> None:
    step, state = _made()
    expected = ft.fingerprint(step(state, zoo.batch())[0])
    contexts = (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16))
    batch = zoo.batch()
    for context in contexts:
        with context:
            after, _ = step(state, batch)
        assert ft.fingerprint(after) == expected
        step(after, zoo.batch())


def test_gradients_by_themselves_are_the_same_in_every_context() -> None:
    step, state = _made(microbatches=2)
    given = (state.params, state.buffers, zoo.batch())
    for gradient in (step.value_and_grad, step.gradient):
        plain = gradient(*given, key=1).grads
        for context in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu")):
            with context:
                found = gradient(*given, key=1).grads
            assert all(torch.equal(found[name], grad) for name, grad in plain.items())
    with torch.inference_mode():
        params = ft.trees.Tensors({n: p.clone() for n, p in state.params.items()})
    with pytest.raises(StateError, match=r"params/.* made in torch\.inference_mode give a clone"):
        step.value_and_grad(params, *given[1:])


@pytest.mark.parametrize(
    "options",
    [
        {"schedule": ft.schedules.constant(1e-2), "microbatches": 2, "max_grad_norm": 0.5},
        {"schedule": ft.schedules.reduce_on_plateau(1e-2), "precision": "fp16"},
        {"loss": {"sigmoid": 1.0, "discopop": 0.5}, "guard": ft.SpikeGuard(window=8)},
        {"layout": "padding_free", "ema_decay": 0.9},
        {"reference_mixup": 0.5, "reference_sync": 1, "loss": "bco_pair"},
    ],
)
def test_another_default_device_changes_nothing(options: Any, tmp_path: Path) -> None:
    """Also in the first step of an architecture, and in what is saved and loaded."""
    ended = []
    for device in ("cpu", "meta"):
        architecture, params, buffers = zoo.split("decoder")
        if {"schedule"} & options.keys():
            step, batch = ft.pretrain_step(architecture, ft.optim.adamw(), **options), zoo.batch()
        else:
            reference = ft.trees.clone(params)
            step = ft.dpo_step(architecture, ft.optim.adamw(), reference=reference, **options)
            batch = zoo.pairs()
        with torch.device(device):
            state, metrics = step(step.init(params, buffers), batch)
            measured = ft.evaluate(step, state, [batch])
            loaded = ft.load(ft.save(tmp_path / device, state), like=state)
            read = metrics.to_dict() | measured.to_dict()
        ended.append((ft.fingerprint(state), ft.fingerprint(loaded), read))
    assert ended[0] == ended[1]
    assert ended[0][0] == ended[0][1]


def test_in_inference_mode_a_state_is_made_and_cloned_that_can_be_trained() -> None:
    architecture, params, buffers = zoo.split("tied")
    step = ft.pretrain_step(architecture, ft.optim.adamw(), ema_decay=0.9)
    expected = ft.fingerprint(step(step.init(params, buffers), zoo.batch())[0])
    with torch.inference_mode():
        state = step.init(params, buffers)
        branch, adopted = ft.clone(state), step.adopt(state)
        made_there = step.init(ft.trees.map_leaves(torch.clone, params), buffers)
        batch = zoo.batch()
        taken = attrs.evolve(state, params=ft.trees.map_leaves(torch.clone, params))
    step(adopted, batch)
    for each in (state, branch, made_there):
        assert ft.fingerprint(step(each, batch)[0]) == expected
    step(branch, batch, donate=True)
    expected_loss = ft.evaluate(step, state, [batch]).to_dict()
    assert ft.evaluate(step, taken, [batch]).to_dict() == expected_loss  # which trains nothing
    with pytest.raises(StateError, match=r"params: made under torch.inference_mode\(\)"):
        step(taken, batch)
    assert ft.fingerprint(step(ft.clone(taken), batch)[0]) == expected


def test_within_autocast_a_step_keeps_no_casts_of_its_own() -> None:
    """They would stay until it ends, each with a leaf and its gradient."""
    step, state = _made(precision="bf16")
    step(state, zoo.batch())
    counts = []
    gc.freeze()  # what is there already need not be looked through three times
    try:
        with torch.autocast("cpu", torch.bfloat16):
            for _ in range(3):
                step(state, zoo.batch())
                gc.collect()
                kinds = map(type, gc.get_objects())
                counts.append(sum(issubclass(each, torch.Tensor) for each in kinds))
    finally:
        gc.unfreeze()
    assert counts[0] == counts[1] == counts[2]


class Writing(zoo.Tied):
    """Masks tokens in the memory of its batch."""

    def forward(self, input_ids: torch.Tensor, **given: Any) -> Any:
        input_ids[:, 0] = 0
        return super().forward(input_ids, **given)


@pytest.mark.parametrize("microbatches", [1, 2])
def test_a_model_that_writes_into_its_batch_is_told(microbatches: int) -> None:
    architecture, params, buffers = ft.split(Writing())
    step = ft.pretrain_step(architecture, ft.optim.adamw(), microbatches=microbatches)
    message = r"its forward has written into the batch \(input_ids\).*; write into a clone of it"
    with pytest.raises(ArchitectureError, match=message):
        step(step.init(params, buffers), zoo.batch())


class Counting(Writing):
    """Writes what the backward pass has need of."""

    def forward(self, input_ids: torch.Tensor, **given: Any) -> Any:
        logits = zoo.Tied.forward(self, input_ids, **given)
        input_ids.add_(1).remainder_(zoo.VOCABULARY)
        return logits


@pytest.mark.parametrize("model", [Writing, Counting])
def test_what_is_written_into_a_batch_is_told_before_torch_does_and_in_evaluations(
    model: type[Writing],
) -> None:
    architecture, params, buffers = ft.split(model())
    step = ft.pretrain_step(architecture, ft.optim.adamw())
    state = step.init(params, buffers)
    for run in (step, partial(ft.evaluate, step)):
        with pytest.raises(ArchitectureError, match=r"has written into the batch \(input_ids\)"):
            run(state, zoo.batch() if run is step else [zoo.batch()])


@pytest.mark.parametrize("loss", ["sigmoid", "bco_pair", "aot"])
def test_an_evaluation_of_nothing_is_refused(loss: Any) -> None:
    """Coupled losses, which look at all of the batches first, among them."""
    architecture, params, buffers = zoo.split("tied")
    step = ft.dpo_step(architecture, ft.optim.adamw(), reference=params, loss=loss)
    with pytest.raises(BatchError, match="batches: none, so there is nothing to evaluate"):
        ft.evaluate(step, step.init(params, buffers), [])


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_a_transform_that_returns_the_params_has_the_same_bits_in_place(decay: float) -> None:
    """An optimizer decays the params before it reads the gradients, which are these."""
    found = []
    for donate in (False, True):
        architecture, params, buffers = zoo.split("tied")
        step = ft.pretrain_step(
            architecture,
            ft.optim.adamw(1e-2, weight_decay=decay, fused=False),
            transform=lambda grads, params: {name: params[name] for name in grads},
            donate=donate,
        )
        state = step.init(params, buffers)
        for seed in range(3):
            state, _ = step(state, zoo.batch(seed))
        found.append(ft.fingerprint(state))
    assert found[0] == found[1]


class Growing(zoo.Tied):
    """Leaves its buffer in another form."""

    left: Any

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1, dtype=torch.int64))

    def forward(self, input_ids: torch.Tensor, **given: Any) -> Any:
        self.seen = type(self).left(self.seen)
        return super().forward(input_ids, **given)


class Remembering(zoo.Tied):
    """Assigns a parameter, and the batch, to its buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(16))
        self.register_buffer("ids", torch.zeros(4, 6, dtype=torch.int64))

    def forward(self, input_ids: torch.Tensor, **given: Any) -> Any:
        if self.how == "assigned":
            self.weight, self.ids = self.norm.weight.detach(), input_ids
        elif self.how == "data":
            self.weight.data, self.ids.data = self.norm.weight.detach(), input_ids
        else:
            self.weight.set_(self.norm.weight.detach())
            self.ids.set_(input_ids)
        return super().forward(input_ids, **given)


@pytest.mark.parametrize("how", ["assigned", "data", "set"])
def test_buffers_have_memory_of_their_own(how: str) -> None:
    """Else the next donated step would write into them, and so would who fills the batch again."""
    module, batch = Remembering(), zoo.batch()
    module.how = how
    module.ids = torch.zeros_like(batch["input_ids"])
    architecture, params, buffers = ft.split(module)
    step = ft.pretrain_step(architecture, ft.optim.adamw(1e-2))
    state = step.init(params, buffers)
    testing.assert_donation_equal(step, state, batch)
    after, _ = step(state, batch)
    before = ft.fingerprint(after)
    step(ft.clone(state), batch, donate=True)
    step(state, batch, donate=True)
    batch["input_ids"].zero_()
    assert ft.fingerprint(after) == before


class Heated(zoo.Tied):
    """Has a temperature, and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.heat = torch.nn.Parameter(torch.tensor(2.0))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, input_ids: torch.Tensor, **given: Any) -> Any:
        self.calls += 1
        return {"logits": super().forward(input_ids, **given)["logits"] * self.heat}


class Measuring(LanguageModeling):
    """Reports both."""

    def __call__(self, model: Any, batch: Any) -> Any:
        total, found = super().__call__(model, batch)
        own = {"heat": m.mean(model.heat), "calls": m.total(model.calls)}
        return total, found | m.Metrics(own)


def test_metrics_are_what_was_measured_and_not_the_memory_of_it() -> None:
    """In float64 a parameter, or a buffer that moves, has the dtype of metrics already."""
    architecture, params, buffers = ft.split(Heated().double())
    step = ft.make_step(Measuring(name="own"), ft.optim.adamw(0.1), architecture=architecture)
    state = step.init(params, buffers)
    _, metrics = step(state, [zoo.batch(0), zoo.batch(1)])
    assert float(metrics["calls"]) == 1 + 2
    measured = ft.evaluate(step, state, [zoo.batch()])
    _, metrics = step(ft.clone(state), zoo.batch(), donate=True)
    step(state, zoo.batch(), donate=True)
    assert float(metrics["heat"]) == float(measured["eval_heat"]) == 2.0


def test_an_embedding_that_scales_its_weight_is_refused() -> None:
    """With `max_norm` it writes into the state that is given, into references and frozen bases."""
    module = zoo.Tied()
    module.embedding.max_norm = 0.5
    with pytest.raises(ArchitectureError, match=r"^embedding: .* with max_norm writes"):
        ft.split(module)
    module.embedding.max_norm = None
    architecture, _, _ = ft.split(module)
    module.embedding.max_norm = 0.5
    with pytest.raises(ArchitectureError, match=r"^embedding: .* with max_norm writes"):
        ft.pretrain_step(architecture, ft.optim.sgd(1e-2))


@pytest.mark.parametrize(
    ("left", "message"),
    [
        (lambda seen: torch.cat([seen, seen]), r"it with shape \[2\], expected \[1\] as before"),
        (
            lambda seen: seen * 0.5,
            "it as torch.float32, expected torch.int64 .*, which would cut it",
        ),
        (lambda seen: None, "none, expected a tensor"),
        (lambda seen: seen + 1, None),
        (lambda seen: (seen + 1).int(), None),
    ],
    ids=["longer", "rounded", "gone", "counted", "narrower"],
)
def test_a_buffer_keeps_its_form(
    left: Any, message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By which a checkpoint is loaded again; what the old form holds is taken."""
    monkeypatch.setattr(Growing, "left", left, raising=False)
    architecture, params, buffers = ft.split(Growing())
    step = ft.pretrain_step(architecture, ft.optim.adamw())
    state = step.init(params, buffers)
    if message is None:
        state, _ = step(state, zoo.batch())
        assert state.buffers["seen"].tolist() == [1]
        assert state.buffers["seen"].dtype == torch.int64
        return
    with pytest.raises(ArchitectureError, match=f"buffers/seen: the forward left {message}"):
        step(state, zoo.batch())


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        (torch.bfloat16, "dtype torch.bfloat16, in which small updates are lost"),
        (torch.int32, "dtype torch.int32, which cannot be trained"),
    ],
)
def test_params_that_are_evolved_are_looked_at_as_those_of_init(
    dtype: torch.dtype, message: str
) -> None:
    step, state = _made()
    narrow = {name: tensor.to(dtype) for name, tensor in state.params.items()}
    with pytest.raises(StateError, match=message):
        step(attrs.evolve(state, params=narrow), zoo.batch())


def test_threads_with_models_of_their_own_have_the_bits_of_one() -> None:
    made = [_made("normed") for _ in range(4)]
    expected = [ft.fingerprint(step(state, zoo.batch())[0]) for step, state in made]
    before = torch.default_generator.get_state()
    with ThreadPoolExecutor(4) as pool:
        for _ in range(10):
            found = list(pool.map(lambda one: ft.fingerprint(one[0](one[1], zoo.batch())[0]), made))
            assert found == expected
    assert torch.equal(torch.default_generator.get_state(), before)


class Positions(zoo.Tied):
    """A classic table of positions: a persistent floating-point buffer in the main path."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(8, 16))
        self.own = torch.nn.Parameter(torch.randn(16))

    def forward(self, input_ids: Any, attention_mask: Any = None, position_ids: Any = None) -> Any:
        hidden = self.embedding(input_ids) + self.table[: input_ids.shape[1]] + self.own
        return self.head(self.norm(self.mix(hidden)))


def test_bf16_params_cast_a_models_buffers_as_the_module_would_be() -> None:
    module = Positions()
    plain = copy.deepcopy(module).bfloat16()
    architecture, params, buffers = ft.split(module)
    step = ft.pretrain_step(architecture, ft.optim.adamw(1e-2), precision="bf16_params")
    state, metrics = step(step.init(params, buffers), zoo.batch())
    batch = zoo.batch()
    logits = plain(batch["input_ids"])[:, :-1].float().flatten(0, 1)
    loss = F.cross_entropy(logits, batch["labels"][:, 1:].flatten())
    assert float(metrics["loss"]) == pytest.approx(float(loss.detach()), rel=1e-6)
    assert state.buffers["table"].dtype == torch.float32
    assert torch.equal(state.buffers["table"], buffers["table"])


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_half_precision_params_are_refused_where_updates_would_be_lost(precision: str) -> None:
    architecture, params, buffers = ft.split(zoo.Tied().bfloat16())
    step = ft.pretrain_step(architecture, ft.optim.adamw(1e-2), precision=precision)
    with pytest.raises(ft.StateError, match=r"params/embedding.weight: dtype .*bfloat16"):
        step.init(params, buffers)


def test_bf16_params_keep_a_float32_master_of_a_bfloat16_model() -> None:
    architecture, params, buffers = ft.split(zoo.Tied().bfloat16())
    step = ft.pretrain_step(architecture, ft.optim.adamw(1e-2), precision="bf16_params")
    state, _ = step(step.init(params, buffers), zoo.batch())
    assert {tensor.dtype for tensor in state.params.values()} == {torch.float32}


def test_the_average_begins_as_a_copy_in_memory_of_its_own() -> None:
    """So that the very first step may donate."""
    step, state = _made(ema_decay=0.9, donate=True, schedule=1e-2)
    began = {name: p.clone() for name, p in state.params.items()}
    assert all(torch.equal(state.average[n], p) for n, p in began.items())
    assert not ft.trees.storages(state.average).keys() & ft.trees.storages(state.params).keys()
    after, _ = step(state, zoo.batch())
    for name, average in after.average.items():
        expected = 0.9 * began[name] + 0.1 * after.params[name]
        torch.testing.assert_close(average, expected, rtol=1e-5, atol=1e-7)


class Certain(zoo.Tied):
    """Gives token 30 no chance at all: as a target its loss is infinite, its gradient is not."""

    def forward(self, *args: Any, **rest: Any) -> Any:
        logits = super().forward(*args, **rest)["logits"]
        never = torch.zeros(zoo.VOCABULARY).index_fill(0, torch.tensor(30), -torch.inf)
        return {"logits": logits + never}


def test_an_infinite_loss_is_skipped_though_the_gradient_is_finite() -> None:
    architecture, params, buffers = ft.split(Certain())
    step = ft.pretrain_step(architecture, ft.optim.adamw(1e-2))
    state = step.init(params, buffers)
    batch = zoo.batch()
    batch["labels"][0, -1] = 30
    after, metrics = step(state, batch)
    assert torch.isfinite(metrics["grad_norm"])
    assert float(metrics["loss"]) == torch.inf
    assert float(metrics["skipped"]) == 1
    assert all(torch.equal(after.params[n], p) for n, p in state.params.items())


class Rooted(zoo.Tied):
    """The derivative of a square root at 0 is infinite, its value is not."""

    def forward(self, *args: Any, **rest: Any) -> Any:
        out = super().forward(*args, **rest)
        return {"logits": out["logits"] + (self.mix.bias * 0.0).abs().sqrt().sum()}


def test_an_infinite_gradient_is_skipped_though_the_loss_is_finite() -> None:
    architecture, params, buffers = ft.split(Rooted())
    step = ft.pretrain_step(architecture, ft.optim.adamw(1e-2))
    state = step.init(params, buffers)
    after, metrics = step(state, zoo.batch())
    assert torch.isfinite(metrics["loss"])
    assert not torch.isfinite(metrics["grad_norm"])
    assert float(metrics["skipped"]) == 1
    assert all(torch.equal(after.params[n], p) for n, p in state.params.items())


def test_an_adopted_states_key_is_of_its_stage_and_of_when_it_was_adopted() -> None:
    step, state = _made()
    later, _ = step(state, zoo.batch())
    tuning = ft.sft_step(step.architecture, ft.optim.adamw())
    again = ft.pretrain_step(step.architecture, ft.optim.adamw())
    stages = [s.adopt(now).key for s in (tuning, again) for now in (state, later)]
    assert len({state.key, *stages}) == 5


def test_adopting_takes_the_params_and_not_their_average() -> None:
    step, state = _made(ema_decay=0.9, schedule=1e-1)
    state, _ = step(state, zoo.batch())
    adopted = attrs.evolve(step, ema_decay=0.5).adopt(state)
    for name, param in state.params.items():
        assert torch.equal(adopted.params[name], param)
        assert torch.equal(adopted.average[name], param)
    assert not torch.equal(state.average["mix.weight"], state.params["mix.weight"])


def test_the_learning_rate_stands_still_while_steps_are_skipped() -> None:
    step, state = _made("normed")
    bad = attrs.evolve(state, params=ft.trees.map_leaves(lambda p: p * torch.nan, state.params))
    for _ in range(3):
        bad, metrics = step(bad, zoo.batch())
        assert float(metrics["learning_rate"]) == step.schedule(0)
    assert (bad.step, int(bad.scheduler.count)) == (3, 0)
    _, metrics = step(attrs.evolve(bad, params=state.params), zoo.batch())
    assert float(metrics["learning_rate"]) == step.schedule(0)


def test_an_evaluation_checks_every_batch_and_that_there_is_a_target() -> None:
    step, state = _made()
    far = {**zoo.batch(), "input_ids": zoo.batch()["input_ids"] + zoo.VOCABULARY}
    with pytest.raises(ft.BatchError, match=r"input_ids: \d+ at .* is out of range"):
        ft.evaluate(step, state, [zoo.batch(), far])
    none = {**zoo.batch(), "labels": torch.full_like(zoo.batch()["labels"], -100)}
    with pytest.raises(ft.BatchError, match="no target token"):
        ft.evaluate(step, state, [none])
    one = ft.evaluate(step, state, [zoo.batch()])
    assert ft.evaluate(step, state, [none, zoo.batch()]).to_dict() == one.to_dict()


def test_an_evaluation_is_of_the_params_and_keeps_no_history() -> None:
    class Watched(zoo.Tied):
        grads: Any = ()

        def forward(self, *args: Any, **rest: Any) -> Any:
            self.grads = (*self.grads, torch.is_grad_enabled())
            return super().forward(*args, **rest)

    architecture, params, buffers = ft.split(Watched())
    step = ft.pretrain_step(architecture, ft.optim.adamw(1e-1), ema_decay=0.9)
    state, _ = step(step.init(params, buffers), zoo.batch())
    architecture.grads = ()
    measured = ft.evaluate(step, state, [zoo.batch()])
    assert architecture.grads == (False,)
    plain = attrs.evolve(step, ema_decay=None)
    without = ft.evaluate(plain, attrs.evolve(state, average=None), [zoo.batch()])
    assert measured.to_dict() == without.to_dict()
    averaged = attrs.evolve(state, params=state.average, average=None)
    of_average = ft.evaluate(plain, averaged, [zoo.batch()])
    assert measured["eval_loss"] != of_average["eval_loss"]


@pytest.mark.parametrize("field", ["average", "reference"])
def test_donating_what_the_state_keeps_beside_the_params_is_refused(field: str) -> None:
    architecture, params, buffers = zoo.split("tied")
    step = ft.dpo_step(
        architecture,
        ft.optim.adamw(1e-1),
        reference=ft.trees.clone(params),
        reference_mixup=0.5,
        ema_decay=0.9,
    )
    state = step.init(params, buffers)
    shared = attrs.evolve(state, **{field: state.params})
    with pytest.raises(ft.AliasError, match="shares storage"):
        step(shared, zoo.pairs(), donate=True)
    assert step(shared, zoo.pairs())[0].step == 1


@pytest.mark.parametrize("of_params", [True, False])
def test_one_mapping_in_two_places_of_a_state_is_not_overwritten_twice(of_params: bool) -> None:
    """A state evolved by hand: a slot that is the params, or two slots that are one of zeros."""
    step, state = _made()
    ended = []
    for donate in (False, True):
        own = ft.trees.clone(state.params)
        begun = own if of_params else ft.trees.clone(ft.trees.zero(own, "*"))
        slots = {**state.optimizer.slots, "exp_avg": begun}
        if not of_params:
            slots["exp_avg_sq"] = begun
        now = attrs.evolve(state, params=own, optimizer=attrs.evolve(state.optimizer, slots=slots))
        for _ in range(2):
            now, _ = step(now, zoo.batch(), donate=donate)
        ended.append(ft.fingerprint(now))
    assert ended[0] == ended[1]


def test_a_donated_step_writes_into_the_old_states_memory_and_names_it_consumed() -> None:
    step, state = _made()
    state, _ = step(state, zoo.batch())
    params, slots = state.params, dict(state.optimizer.slots)
    memory = {**ft.trees.storages(params), **ft.trees.storages(slots["exp_avg"])}
    after, _ = step(state, zoo.batch(1), donate=True)
    moments = after.optimizer.slots["exp_avg"]
    reused = {**ft.trees.storages(after.params), **ft.trees.storages(moments)}
    assert memory.keys() == reused.keys()
    for held in (params, *slots.values()):
        with pytest.raises(ft.ConsumedStateError, match="donated to the step that made step 2"):
            list(held.items())


def test_a_donating_step_leaves_a_plain_mapping_of_params_alone() -> None:
    step, state = _made(donate=True, schedule=1e-1)
    own = {name: p.clone() for name, p in state.params.items()}
    before = {name: ft.trees.digest(p) for name, p in own.items()}
    step(step.init(own, state.buffers), zoo.batch())
    assert {name: ft.trees.digest(p) for name, p in own.items()} == before


def test_an_evaluation_is_that_of_the_plain_module_in_eval_mode() -> None:
    """Whatever mode the stage trains in: no dropout, BatchNorm by its running statistics."""
    step, state = _made("normed", schedule=1e-2)
    state, _ = step(state, zoo.batch(1))
    module = zoo.model("normed").eval()
    module.load_state_dict({**state.params, **state.buffers})
    labels = zoo.batch()["labels"][:, 1:].flatten()
    with torch.no_grad():
        logits = module(zoo.batch()["input_ids"])[:, :-1].flatten(0, 1)
        expected = torch.nn.functional.cross_entropy(logits, labels)
    measured = ft.evaluate(step, state, [zoo.batch()])
    assert float(measured["eval_loss"]) == pytest.approx(float(expected), rel=1e-6)


def test_an_evaluation_leaves_buffers_that_the_forward_writes() -> None:
    class Counting(zoo.Tied):
        def forward(self, *args: Any, **rest: Any) -> Any:
            self.scale.add_(1)
            return super().forward(*args, **rest)

    architecture, params, buffers = ft.split(Counting())
    step = ft.pretrain_step(architecture, ft.optim.adamw(1e-2))
    state = step.init(params, buffers)
    before = ft.fingerprint(state)
    ft.evaluate(step, state, [zoo.batch(), zoo.batch(1)])
    assert ft.fingerprint(state) == before


def test_micro_batches_of_a_loss_that_couples_its_examples_are_refused() -> None:
    from functrain.objectives import LanguageModeling

    @attrs.frozen
    class Coupled:
        inner: Any = attrs.field(factory=LanguageModeling)
        batch_coupled: bool = True

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

        def __call__(self, model: Any, batch: Any) -> Any:
            return self.inner(model, batch)

    architecture, _, _ = zoo.split("tied")
    step = ft.make_step(Coupled(), ft.optim.adamw(), architecture=architecture)
    with pytest.raises(ft.ConfigError, match="microbatches=2: the 'pretrain' loss couples"):
        attrs.evolve(step, microbatches=2)


def test_skipped_steps_and_tokens_add_up_when_metrics_are_merged() -> None:
    step, state = _made()
    bad = attrs.evolve(state, params=ft.trees.map_leaves(lambda p: p * torch.nan, state.params))
    seen = [step(s, zoo.batch())[1] for s in (state, bad, bad)]
    merged = seen[0].merge(seen[1]).merge(seen[2])
    assert float(merged["skipped"]) == 2
    assert float(merged["num_tokens"]) == 3 * float(seen[0]["num_tokens"])


def test_a_call_decides_over_the_records_own_donation() -> None:
    step, state = _made(donate=True)
    before = ft.fingerprint(state)
    step(state, zoo.batch(), donate=False)
    assert ft.fingerprint(state) == before
    step(state, zoo.batch())
    with pytest.raises(ft.ConsumedStateError):
        _ = state.params


class _Noise(torch.autograd.Function):
    """Draws in its backward, as stochastic rounding does."""

    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:  # type: ignore[override]
        return grad * torch.rand(())


def test_what_the_backward_draws_is_a_function_of_the_key_too() -> None:
    class Noisy(zoo.Tied):
        def forward(self, *args: Any, **rest: Any) -> Any:
            return {"logits": _Noise.apply(super().forward(*args, **rest)["logits"])}

    architecture, params, buffers = ft.split(Noisy())
    step = ft.pretrain_step(architecture, ft.optim.sgd(0.1), microbatches=2)
    testing.assert_pure(step, step.init(params, buffers), zoo.batch())


def test_the_names_of_the_leaves_are_in_the_fingerprint() -> None:
    _, state = _made()
    renamed = {f"other.{name}": tensor for name, tensor in state.params.items()}
    other = attrs.evolve(state, params=ft.trees.tensors(renamed))
    assert ft.fingerprint(other) != ft.fingerprint(state)


def test_a_clone_shares_no_memory() -> None:
    step, state = _made("normed", ema_decay=0.9)
    state, _ = step(state, zoo.batch())
    state = attrs.evolve(state, reference=ft.trees.clone(state.params))
    other = ft.clone(state)

    def addresses(state: Any) -> set[int]:
        slots = state.optimizer.slots.values()
        held = (state.params, state.buffers, state.average, state.reference, *slots)
        return {address for items in held for address in ft.trees.storages(items)}

    assert ft.fingerprint(other) == ft.fingerprint(state)
    assert len(addresses(state)) >= 6 * len(state.params)
    assert not addresses(state) & addresses(other)


def test_a_transform_may_take_gradients_of_its_own() -> None:
    """A penalty on the params, say; what it returns has no history in the step."""

    def penalised(grads: Any, params: Any) -> Any:
        found = {}
        for name, grad in grads.items():
            param = params[name].detach().requires_grad_()
            found[name] = grad + torch.autograd.grad(param.square().sum(), param)[0] + 0 * param
        return found

    step, state = _made(transform=penalised)
    after, metrics = step(state, zoo.batch())
    assert not metrics["grad_norm"].requires_grad
    assert not any(tensor.requires_grad for tensor in after.params.values())
    step, state = _made(transform=lambda g, p: {n: grad + 2 * p[n] for n, grad in g.items()})
    assert ft.fingerprint(step(state, zoo.batch())[0]) == ft.fingerprint(after)


def test_what_a_transform_returns_is_not_written_to() -> None:
    def params_themselves(grads: Any, params: Any) -> Any:
        del grads
        return params

    step, state = _made(transform=params_themselves, max_grad_norm=0.1)
    testing.assert_pure(step, state, zoo.batch())


def test_an_optimizer_that_writes_into_gradients_does_not_write_into_a_transforms() -> None:
    """Donated or not; SGD adds Nesterov's momentum in the gradients' memory."""
    kept: dict[str, Any] = {}

    def the_first(grads: Any, params: Any) -> Any:
        del params
        return kept or (kept.update(ft.trees.clone(grads)) or kept)

    optimizer = ft.optim.sgd(1e-2, momentum=0.9, nesterov=True, foreach=True)
    architecture, params, buffers = zoo.split("tied")
    step = ft.pretrain_step(architecture, optimizer, transform=the_first)
    state, _ = step(step.init(params, buffers), zoo.batch())
    before = ft.trees.clone(kept)
    pure, _ = step(state, zoo.batch())
    donated, _ = step(state, zoo.batch(), donate=True)
    assert ft.fingerprint(pure) == ft.fingerprint(donated)
    assert all(torch.equal(kept[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("donate", [False, True])
def test_what_a_step_makes_of_a_modules_own_parameters_has_no_history(donate: bool) -> None:
    """Nor its average, nor what a transform with weights of its own tells of the gradients."""
    module = zoo.model("tied")
    module.unused = torch.nn.Parameter(torch.ones(2))
    architecture, params, buffers = ft.split(module)
    own = {name: torch.nn.Parameter(tensor) for name, tensor in params.items()}
    scale = torch.nn.Parameter(torch.tensor(0.5))
    step = ft.pretrain_step(
        architecture,
        ft.optim.adamw(),
        ema_decay=0.9,
        transform=lambda grads, params: {n: scale * (g + params[n]) for n, g in grads.items()},
    )
    state = step.init(own, buffers)
    for seed in range(2):
        state, metrics = step(state, zoo.batch(seed), donate=donate)
        assert not any(value.requires_grad for value in metrics.values())
    assert state.average is not None
    for tensor in (*state.params.values(), *state.average.values()):
        assert not tensor.requires_grad
    assert all(param.grad is None for param in own.values())
    state, _ = step(attrs.evolve(state, params=own), zoo.batch())
    assert state.average is not None
    assert not any(tensor.requires_grad for tensor in state.average.values())


def test_a_donated_step_interrupted_before_the_update_leaves_the_state(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupt(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    step, state = _made(schedule=1e-2)
    before = ft.fingerprint(state)
    monkeypatch.setattr(torch.autograd, "backward", interrupt)
    with pytest.raises(KeyboardInterrupt):
        step(state, zoo.batch(), donate=True)
    assert ft.fingerprint(state) == before


def test_a_donated_step_interrupted_in_the_update_leaves_no_torn_state(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    step, state = _made(schedule=1e-2)
    params = state.params
    monkeypatch.setattr(step.optimizer.__class__, "update", _half_an_update)
    with pytest.raises(KeyboardInterrupt):
        step(state, zoo.batch(), donate=True)
    for read in (lambda: state.params, lambda: list(params.items())):
        with pytest.raises(ft.ConsumedStateError):
            read()


def test_a_donated_step_that_fails_after_the_update_leaves_no_torn_state(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever it fails with; what the optimizer refuses, it refuses before it writes."""

    def fail(*_: Any, **__: Any) -> Any:
        raise ft.ConfigError("the guard has no place for it")

    step, state = _made(schedule=1e-2)
    monkeypatch.setattr(step.__class__, "_successor", fail)
    with pytest.raises(ft.ConfigError, match="no place"):
        step(state, zoo.batch(), donate=True)
    with pytest.raises(ft.ConsumedStateError):
        len(state.params)
    step, state = _made(schedule=1e-2)
    before = ft.fingerprint(state)
    monkeypatch.setattr(step.optimizer.__class__, "update", fail)
    with pytest.raises(ft.ConfigError, match="no place"):
        step(state, zoo.batch(), donate=True)
    assert ft.fingerprint(state) == before


def test_an_optimizer_that_refuses_when_it_has_written_leaves_no_torn_state(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def late(self: Any, grads: Any, state: Any, params: Any, *_: Any, **__: Any) -> Any:
        del self, state
        params[next(iter(grads))].add_(1)
        raise ft.ConfigError("it keeps text")

    step, state = _made(schedule=1e-2)
    monkeypatch.setattr(step.optimizer.__class__, "update", late)
    with pytest.raises(ft.ConfigError, match="it keeps text"):
        step(state, zoo.batch(), donate=True)
    with pytest.raises(ft.ConsumedStateError):
        len(state.params)


def _half_an_update(self: Any, grads: Any, state: Any, params: Any, *_: Any, **__: Any) -> Any:
    del self, state
    for name in list(grads)[:2]:
        params[name].add_(1)
    raise KeyboardInterrupt


def test_a_donated_step_on_a_bad_batch_leaves_the_state() -> None:
    step, state = _made()
    before = ft.fingerprint(state)
    with pytest.raises(ft.BatchError):
        step(state, {"input_ids": 3}, donate=True)
    assert ft.fingerprint(state) == before


def test_an_objective_without_a_loss_among_its_metrics_is_named() -> None:
    class Nameless(LanguageModeling):
        def __call__(self, model: Any, batch: Any) -> Any:
            total, _ = super().__call__(model, batch)
            return total, ft.Metrics({})

    architecture, params, buffers = zoo.split("tied")
    step = ft.make_step(Nameless(), ft.optim.adamw(), architecture=architecture)
    with pytest.raises(ft.ConfigError, match=r"objective 'pretrain': its metrics have no 'loss'"):
        step(step.init(params, buffers), zoo.batch())


def test_an_objective_is_looked_at_when_a_step_is_evolved_too() -> None:
    """By another word than `eval` or `train` dropout would be off, silently."""
    architecture, _, _ = zoo.split("normed")
    step = ft.pretrain_step(architecture, ft.optim.adamw())
    with pytest.raises(ft.ConfigError, match="'pretrain': mode: 'training', expected 'train' or"):
        attrs.evolve(step, objective=LanguageModeling(mode="training"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda total, _found: total, "objective 'own': it returned Tensor, expected"),
        (
            lambda total, found: (total, dict(found)),
            "objective 'own': it returned Tensor and dict, expected",
        ),
        (
            lambda total, found: (float(total.detach()), found),
            "objective 'own': it returned float and Metrics, expected",
        ),
        (
            lambda total, found: (total, m.Metrics({"loss": found["loss"]})),
            "metrics/loss: a Tensor, expected a sum with its weight",
        ),
    ],
)
def test_what_an_objective_of_ones_own_gives_is_looked_at(returned: Any, message: str) -> None:
    class Own(LanguageModeling):
        def __call__(self, model: Any, batch: Any) -> Any:
            return returned(*super().__call__(model, batch))

    architecture, params, buffers = zoo.split("tied")
    step = ft.make_step(Own(name="own"), ft.optim.adamw(), architecture=architecture)
    with pytest.raises(ft.ConfigError, match=message):
        step(step.init(params, buffers), zoo.batch())


def test_a_weight_that_is_no_tensor_is_named() -> None:
    class Own(LanguageModeling):
        def weight(self, batch: Any) -> Any:
            return int(super().weight(batch))

    architecture, params, buffers = zoo.split("tied")
    step = ft.make_step(Own(name="own"), ft.optim.adamw(), architecture=architecture)
    with pytest.raises(ft.ConfigError, match="objective 'own': its weight is a int, expected"):
        step(step.init(params, buffers), zoo.batch())


@pytest.mark.parametrize("donate", [False, True])
def test_params_that_do_not_come_of_split_are_put_in_order(donate: bool) -> None:
    """As a checkpoint reads them: a state by columns could go on with other bits than loaded."""
    architecture, params, buffers = zoo.split("tied")
    columns = {n: p.t().contiguous().t() if p.ndim == 2 else p for n, p in params.items()}
    assert not all(p.is_contiguous() for p in columns.values())
    step = ft.pretrain_step(architecture, ft.optim.adamw(), donate=donate)
    state = step.init(columns, buffers)
    assert all(p.is_contiguous() for p in state.params.values())
    assert ft.fingerprint(state) == ft.fingerprint(step.init(params, buffers))


def test_what_a_state_is_evolved_with_is_put_in_order() -> None:
    step, state = _made()
    turned = {n: p.t().contiguous().t() if p.ndim == 2 else p for n, p in state.params.items()}
    evolved = attrs.evolve(state, params=turned)
    assert all(p.is_contiguous() for p in evolved.params.values())
    assert ft.fingerprint(evolved) == ft.fingerprint(state)
    whole = ft.trees.Tensors(state.params)
    assert attrs.evolve(state, params=whole).params is whole
    bad = attrs.evolve(state, params={**state.params, "mix.bias": [1.0]})
    with pytest.raises(StateError, match=r"params/mix\.bias: expected a tensor, got list"):
        step(bad, zoo.batch())


def test_a_reference_of_some_of_the_params_is_refused_at_every_level() -> None:
    architecture, params, _ = zoo.split("tied")
    some = ft.trees.Tensors({"mix.bias": params["mix.bias"]})
    objective = PreferenceOptimization(reference=some)
    with pytest.raises(ft.ArchitectureError, match="reference: missing"):
        ft.value_and_grad(objective, architecture)


@pytest.mark.parametrize(
    "bad", ["cosine", ft.schedules.cosine, True, float("nan"), -1.0, None.__class__], ids=repr
)
def test_what_is_no_schedule_is_refused(bad: Any) -> None:
    architecture, _, _ = zoo.split("tied")
    with pytest.raises(ft.ConfigError, match="schedule"):
        ft.pretrain_step(architecture, ft.optim.adamw(), schedule=bad)


class Masked(torch.nn.Module):
    """A model with frozen parameters that no mean of two can be taken of."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(zoo.VOCABULARY, 8)
        self.head = torch.nn.Linear(8, zoo.VOCABULARY)
        frozen = {"codes": torch.tensor([3, 4]), "mask": torch.full((2,), -torch.inf)}
        for name, value in frozen.items():
            self.register_parameter(name, torch.nn.Parameter(value, requires_grad=False))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.embedding(input_ids)) / self.codes[0]
        return logits


def test_what_is_frozen_is_neither_averaged_nor_mixed() -> None:
    """Integers and infinities stay what they are; the rest is the mean that it was."""
    architecture, params, buffers = ft.split(Masked())
    moved = ft.trees.clone(params)
    averaging = ft.pretrain_step(architecture, ft.optim.sgd(1e-1), ema_decay=0.75)
    mixing = ft.dpo_step(
        architecture, ft.optim.sgd(1e-1), reference=moved, reference_mixup=0.25, reference_sync=1
    )
    for step, batch, where in (
        (averaging, zoo.batch(), "average"),
        (mixing, zoo.pairs(), "reference"),
    ):
        state, _ = step(step.init(params, buffers), batch)
        found = getattr(state, where)
        assert all(torch.equal(found[name], params[name]) for name in ("codes", "mask"))
        for name in ("embedding.weight", "head.bias"):
            assert not torch.equal(found[name], params[name])
            expected = torch.lerp(params[name], state.params[name], 0.25)
            assert torch.equal(found[name], expected)
