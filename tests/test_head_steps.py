"""Whole steps with logits by chunks: what they are with whole logits, and every law as before."""

from __future__ import annotations

import copy
import functools
import itertools
from typing import Any

import attrs
import pytest
import torch
import zoo
from halves import half
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import functrain as ft
from functrain import accumulators, keys, testing
from functrain.objectives import chunks, head
from functrain.objectives.head import Head
from functrain.objectives.language import LanguageModeling
from functrain.objectives.logprobs import hidden_rows
from functrain.precision import POLICIES

transformers = pytest.importorskip("transformers")

ROW = zoo.VOCABULARY * 4
SHAPE: dict[str, Any] = {
    "vocab_size": zoo.VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 32,
    "use_cache": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def _theirs(config: str, checkpointing: bool = False) -> nn.Module:
    with keys.seeded(3):
        built = transformers.AutoModelForCausalLM.from_config(
            getattr(transformers, config)(**SHAPE)
        )
    if checkpointing:
        # Renamed during the 5.x versions; the old name warns.
        new, old = "activation_checkpointing_enable", "gradient_checkpointing_enable"
        getattr(built, new if hasattr(built, new) else old)({"use_reentrant": False})
    return built


class Body(nn.Module):
    """The trunk of the built-in decoder, as transformers would hand out its hidden states."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, *inputs: Tensor | None) -> dict[str, Tensor]:
        return {"last_hidden_state": self.trunk(*inputs, None)}


class Capped(nn.Module):
    """A decoder that caps its logits; in float64 wherever its params are, as Gemma is not."""

    base_model_prefix = "body"

    def __init__(self) -> None:
        super().__init__()
        decoder = zoo.decoder()
        self.body = Body(decoder.model)  # type: ignore[arg-type]
        self.lm_head = decoder.lm_head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> dict[str, Tensor]:
        hidden = self.body(input_ids, attention_mask, position_ids)["last_hidden_state"]
        return {"logits": torch.tanh(self.lm_head(hidden) / 0.3) * 0.3}

    def get_output_embeddings(self) -> Any:
        return self.lm_head


def _built(name: str) -> nn.Module:
    """A model that shows its head: plain, tied, biased, checkpointed, or with capped logits."""
    if name == "capped":
        return Capped()
    if name in ("decoder", "biased", "tied, biased"):
        return zoo.decoder(tied="tied" in name, biased="biased" in name)
    if name == "tied, checkpointed":
        return zoo.decoder(tied=True, checkpointing=True)
    return _theirs("Gemma2Config" if name == "gemma2" else "LlamaConfig", "checkpointed" in name)


SOME_NAMES = ["capped", "tied, checkpointed"]
BIASED_NAMES = ["biased", "tied, biased"]
NAMES = [*SOME_NAMES, *BIASED_NAMES, "decoder", "gemma2", "llama", "llama, checkpointed"]
EVERY = pytest.mark.parametrize("name", NAMES)
SOME = pytest.mark.parametrize("name", SOME_NAMES)
SOME_AND_BIASED = pytest.mark.parametrize("name", [*SOME_NAMES, *BIASED_NAMES])
STAGES = ["pretrain", "sft", "dpo", "dpo mix", "bco", "kto"]


@pytest.fixture(autouse=True)
def _always_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A budget that nothing fits into: 16 rows at a time, of every batch; every table is large."""
    monkeypatch.setattr(chunks, "BUDGET", 0)
    monkeypatch.setattr(accumulators, "TABLE", 0)


def _batch(stage: str, seed: int = 0, examples: int = 4) -> dict[str, Any]:
    if stage in ("dpo", "dpo mix", "bco"):
        return zoo.pairs(seed, examples)
    if stage == "kto":
        sides = {
            "completion": zoo.batch(seed, examples),
            "mismatched": zoo.batch(seed + 1, examples),
        }
        return {**sides, "desirable": torch.arange(examples) % 2 == 0}
    batch = zoo.batch(seed, examples)
    if stage == "sft":
        batch["labels"][:, :5] = -100
    return batch


def _step(architecture: nn.Module, stage: str, params: Any, **options: Any) -> Any:
    optimizer = options.pop("optimizer", ft.optim.adamw(1e-2, weight_decay=0.1))
    if stage in ("pretrain", "sft"):
        make = ft.pretrain_step if stage == "pretrain" else ft.sft_step
        return make(architecture, optimizer, **options)
    options = {"reference": ft.trees.clone(params), "dropout": True, **options}
    if stage == "kto":
        return ft.kto_step(architecture, optimizer, **options)
    mixes: dict[str, dict[str, Any]] = {
        "dpo": {},
        "dpo mix": {"loss": {"sigmoid": 1.0, "sft": 0.2}, "wpo": True},
        "bco": {"loss": "bco_pair"},
    }
    return ft.dpo_step(architecture, optimizer, **mixes[stage], **options)


def _begun(
    name: str, stage: str, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[Any, Any]:
    """A step of a fresh architecture, and its first state."""
    return _begun_with(ft.split(_built(name).to(dtype)), stage, **options)


def _begun_with(parts: Any, stage: str, **options: Any) -> tuple[Any, Any]:
    architecture, params, buffers = parts
    step = _step(architecture, stage, params, **options)
    return step, step.init(params, buffers, seed=5)


@functools.cache  # values, and an architecture that no step changes
def _split(name: str, dtype: torch.dtype = torch.float32) -> Any:
    return ft.split(_built(name).to(dtype))


def _trained(
    steps: int, name: str, stage: str, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[Any, list[dict[str, float]]]:
    step, state = _begun_with(_split(name, dtype), stage, **options)
    measured = []
    for seed in range(steps):
        state, metrics = step(state, _batch(stage, seed))
        measured.append(metrics.to_dict())
    return state, measured


def _norm(values: Any) -> float:
    return float(torch.stack([value.double().norm() for value in values]).norm())


@half("name, stage", NAMES, STAGES)
def test_steps_by_chunks_end_where_those_with_whole_logits_do(name: str, stage: str) -> None:
    """In float64, two clipped steps of two micro-batches: the same params, the same metrics."""
    options: dict[str, Any] = {"dtype": torch.float64, "max_grad_norm": 0.5, "microbatches": 2}
    ours, measured = _trained(2, name, stage, **options)
    theirs, expected = _trained(2, name, stage, head="full", **options)
    for parameter, value in ours.params.items():
        torch.testing.assert_close(value, theirs.params[parameter], rtol=1e-7, atol=1e-9)
    for one, other in zip(measured, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-8, abs=1e-10)


class _Projected(TorchDispatchMode):
    """How many rows of logits are made, by chunks and whole."""

    def __init__(self) -> None:
        super().__init__()
        self.by_chunks = self.whole = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        products = ("aten::mm", "aten::addmm")
        if func._schema.name in products and out.shape[-1] == zoo.VOCABULARY:
            if kwargs and "out" in kwargs:
                self.by_chunks += len(out)
            else:
                self.whole += len(out)
        return out


@EVERY
def test_only_rows_with_a_target_are_projected(name: str) -> None:
    """Once each in a step of fine-tuning and in an evaluation; prompts and padding never."""
    step, state = _begun(name, "sft")
    step(state, _batch("sft"))  # the head is found
    batch = _batch("sft", 1)
    targets = int((batch["labels"][:, 1:] != -100).sum())
    assert 0 < targets < 16
    with _Projected() as training:
        step(state, batch)
    with _Projected() as evaluation:
        ft.evaluate(step, state, [batch])
    for seen in (training, evaluation):
        assert (seen.by_chunks, seen.whole) == (targets, 0)
    whole = attrs.evolve(step, objective=LanguageModeling(head="full"))
    with _Projected() as full:
        whole(state, batch)
    assert (full.by_chunks, full.whole) == (0, 32)


def test_a_preference_step_projects_each_completion_token_of_policy_and_reference() -> None:
    """Once each; as a tree over micro-batches the policy's once more, for its backward pass."""
    step, state = _begun("llama", "dpo")
    step(state, _batch("dpo"))
    batch = _batch("dpo", 1)
    sides = (batch["chosen"]["labels"], batch["rejected"]["labels"])
    targets = sum(int((labels[:, 1:] != -100).sum()) for labels in sides)
    with _Projected() as seen:
        step(state, batch)
    assert (seen.by_chunks, seen.whole) == (2 * targets, 0)
    tree = attrs.evolve(step, reduction="canonical")
    with _Projected() as seen:
        tree(state, batch)
    assert (seen.by_chunks, seen.whole) == (3 * targets, 0)


@half(
    "name, stage",
    ["decoder", "llama, checkpointed", *BIASED_NAMES],
    ["dpo", "dpo mix", "bco", "kto"],
)
def test_where_log_probs_may_stay_it_is_the_same(
    name: str, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a budget of half of the rows: policy and reference project each of them once, and obey."""
    monkeypatch.setattr(chunks, "BUDGET", (16 if stage == "kto" else 28) * ROW)
    ours, measured = _trained(2, name, stage, torch.float64)
    theirs, expected = _trained(2, name, stage, torch.float64, head="full")
    for parameter, value in ours.params.items():
        torch.testing.assert_close(value, theirs.params[parameter], rtol=1e-7, atol=1e-9)
    for one, other in zip(measured, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-8, abs=1e-10)
    step, state = _begun(name, stage, ema_decay=0.9)
    testing.assert_pure(step, state, _batch(stage))
    testing.assert_donation_equal(step, state, _batch(stage))
    with _Projected() as seen:
        _, metrics = step(state, _batch(stage))
    tokens = sum(
        int((side["labels"][:, 1:] != -100).sum())
        for side in _batch(stage).values()
        if isinstance(side, dict)
    )
    assert (seen.by_chunks, seen.whole) == (2 * tokens, 0)
    if stage == "dpo":
        assert float(metrics["rewards/margins"]) == 0.0


@half("name, stage, precision", SOME_NAMES, STAGES, ["fp32", "bf16", "fp16", "bf16_params"])
def test_a_step_is_pure(name: str, stage: str, precision: str) -> None:
    """Also the first of an architecture, in which the head is searched for."""
    step, state = _begun(name, stage, precision=precision, microbatches=2)
    testing.assert_pure(step, state, _batch(stage))
    assert isinstance(head._found.of(step.architecture)[head._KEY], Head)


@half("name, stage, precision", SOME_NAMES, STAGES, ["fp32", "bf16", "fp16"], other=True)
def test_donation_equals_pure(name: str, stage: str, precision: str) -> None:
    step, state = _begun(name, stage, precision=precision, microbatches=2, ema_decay=0.9)
    testing.assert_donation_equal(step, state, _batch(stage))


@functools.cache  # a state is a value: every example begins at the same one
def _in_eval_mode(name: str, stage: str) -> tuple[Any, Any]:
    architecture, params, buffers = ft.split(_built(name).double())
    if stage == "dpo":
        step = ft.dpo_step(architecture, ft.optim.adamw(), reference=ft.trees.clone(params))
    else:
        objective = LanguageModeling(mode="eval")
        step = ft.make_step(objective, ft.optim.adamw(), architecture=architecture)
    state, _ = step(step.init(params, buffers), _batch(stage))
    return step, state


@functools.cache
def _at_its_reference(name: str) -> tuple[Any, Any]:
    return _begun(name, "dpo", beta=0.3)


BUDGETS = st.sampled_from([0, 16 * ROW])
"""Always by chunks; and those parts of a batch whole that are small enough, or pairs at once."""


@SOME_AND_BIASED
@given(data=st.data())
def test_any_partition_gives_the_same_gradient(
    name: str, data: st.DataObject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "BUDGET", data.draw(BUDGETS))
    stage = data.draw(st.sampled_from(["pretrain", "dpo"]))
    strategy: Any = testing.pairs if stage == "dpo" else testing.batches
    batch = data.draw(strategy(zoo.VOCABULARY))
    examples = len(batch["chosen"]["input_ids"] if stage == "dpo" else batch["input_ids"])
    step, state = _in_eval_mode(name, stage)
    parts = data.draw(testing.partitions(examples))
    testing.assert_accumulation_invariant(step, state, batch, parts)


@SOME
@given(data=st.data())
def test_padding_changes_nothing(
    name: str, data: st.DataObject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "BUDGET", data.draw(BUDGETS))
    stage = data.draw(st.sampled_from(["pretrain", "dpo"]))
    strategy: Any = testing.pairs if stage == "dpo" else testing.batches
    step, state = _in_eval_mode(name, stage)
    batch = data.draw(strategy(zoo.VOCABULARY))
    testing.assert_padding_invariant(step, state, batch, data.draw(st.integers(1, 5)))


@SOME
@given(data=st.data())
def test_an_evaluation_is_the_same_over_any_partition(
    name: str, data: st.DataObject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "BUDGET", data.draw(BUDGETS))
    batch = data.draw(testing.batches(zoo.VOCABULARY))
    step, state = _in_eval_mode(name, "pretrain")
    parts = data.draw(testing.partitions(len(batch["input_ids"])))
    testing.assert_evaluation_invariant(step, state, batch, parts)


@SOME
@settings(max_examples=settings().max_examples // 2)
@given(batch=testing.pairs(zoo.VOCABULARY))
def test_preference_laws(name: str, batch: Any) -> None:
    step, state = _at_its_reference(name)
    testing.assert_preference_laws(step, state, batch)


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_run_resumed_anywhere_ends_with_the_same_bits(stage: str, tmp_path: Any) -> None:
    """Each loaded state goes on with an architecture whose head was found before, and not."""
    step, state = _begun("tied, checkpointed", stage, precision="fp16", max_grad_norm=0.5)
    source = zoo.Batches(lambda seed, examples: _batch(stage, seed, examples), length=12)
    testing.assert_resumable(step, state, source, 3, tmp_path)
    fresh, _ = _begun("tied, checkpointed", stage, precision="fp16", max_grad_norm=0.5)
    one, _ = step(state, _batch(stage))
    other, _ = fresh(state, _batch(stage))
    testing.assert_same(one, other, "a fresh architecture")


@half("name, stage", NAMES, STAGES, other=True)
def test_an_evaluation_is_that_of_whole_logits(name: str, stage: str) -> None:
    step, state = _begun_with(_split(name, torch.float64), stage)
    state, _ = step(state, _batch(stage))
    batches = [_batch(stage, seed) for seed in (1, 2)]
    ours = ft.evaluate(step, state, batches).to_dict()
    whole = attrs.evolve(step, objective=attrs.evolve(step.objective, head="full"))
    assert ours == pytest.approx(ft.evaluate(whole, state, batches).to_dict(), rel=1e-10)


@SOME
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "bf16_params"])
def test_at_the_reference_the_margin_is_exactly_zero(name: str, precision: str) -> None:
    """Policy and reference take the same path: no rounding parts them."""
    step, state = _begun(name, "dpo", precision=precision, dropout=False)
    _, metrics = step(state, _batch("dpo"))
    assert float(metrics["rewards/margins"]) == 0.0
    assert float(metrics["rewards/accuracies"]) == 0.0


@half(
    "name, stage, precision",
    [*SOME_NAMES, *BIASED_NAMES],
    ["pretrain", "dpo"],
    ["bf16", "fp16", "bf16_params"],
)
def test_in_half_precision_steps_go_where_whole_logits_go(
    name: str, stage: str, precision: str
) -> None:
    """Three steps of SGD: as far from each other as half precision's rounding, 2 in 100 at most."""
    options: dict[str, Any] = {"precision": precision, "optimizer": ft.optim.sgd(0.1)}
    _, begun, _ = _split(name)
    ours, measured = _trained(3, name, stage, **options)
    theirs, expected = _trained(3, name, stage, head="full", **options)
    moved = _norm(theirs.params[n] - old for n, old in begun.items())
    apart = _norm(theirs.params[n] - value for n, value in ours.params.items())
    assert apart <= 2e-2 * moved
    for one, other in zip(measured, expected, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)
        assert one["skipped"] == other["skipped"]
        assert one["loss_scale"] == other["loss_scale"]


@SOME
@pytest.mark.parametrize("stage", ["pretrain", "dpo"])
def test_the_loss_scale_is_that_of_whole_logits(name: str, stage: str) -> None:
    """A scale far too high backs off in the same steps, and grows in the same."""
    policy = attrs.evolve(POLICIES["fp16"], initial_scale=2.0**21, growth_interval=2)
    _, ours = _trained(8, name, stage, precision=policy)
    _, theirs = _trained(8, name, stage, precision=policy, head="full")
    scales = [each["loss_scale"] for each in ours]
    assert scales == [each["loss_scale"] for each in theirs]
    assert [each["skipped"] for each in ours] == [each["skipped"] for each in theirs]
    assert 0 < sum(each["skipped"] for each in ours) < 8
    assert any(later > earlier for earlier, later in itertools.pairwise(scales))


@SOME_AND_BIASED
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_micro_batch_without_a_target_adds_nothing(name: str, precision: str) -> None:
    """None of its rows is projected, and the step is that of the other micro-batch."""
    step, state = _begun(name, "sft", precision=precision)
    batch, empty = _batch("sft"), _batch("sft", 1)
    empty["labels"][:] = -100
    alone = step.value_and_grad(state.params, state.buffers, batch)
    both = step.value_and_grad(state.params, state.buffers, [batch, empty])
    assert both.grads.keys() == alone.grads.keys()
    for parameter, grad in alone.grads.items():
        torch.testing.assert_close(both.grads[parameter], grad, rtol=1e-6, atol=1e-7)
    seen, expected = both.metrics.to_dict(), alone.metrics.to_dict()
    assert (expected.pop("padding"), seen.pop("padding")) == (0, 0.5)
    assert seen == pytest.approx(expected)


@SOME
@pytest.mark.parametrize("frozen", ["head", "trunk"])
def test_what_is_frozen_stays(name: str, frozen: str) -> None:
    """The rest gets the gradient that it gets of whole logits."""
    found = []
    for mode in ("auto", "full"):
        model = _built(name).double()
        output: Any = model.get_output_embeddings()  # type: ignore[operator]
        model.requires_grad_(frozen == "head")
        output.requires_grad_(frozen == "trunk")
        architecture, params, buffers = ft.split(model)
        step = ft.pretrain_step(architecture, ft.optim.adamw(), head=mode)  # type: ignore[arg-type]
        found.append(step.value_and_grad(params, buffers, zoo.batch()).grads)
    assert found[0].keys() == found[1].keys()
    assert 0 < len(found[0]) < len(params)
    for parameter, grad in found[1].items():
        torch.testing.assert_close(found[0][parameter], grad, rtol=1e-9, atol=1e-12)


class Wide(nn.Module):
    """A model that embeds more words than it predicts."""

    def __init__(self) -> None:
        super().__init__()
        with keys.seeded(3):
            self.embedding = nn.Embedding(zoo.VOCABULARY + 5, 8)
            self.head = nn.Linear(8, zoo.VOCABULARY)

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.embedding(input_ids))
        return logits

    def get_output_embeddings(self) -> nn.Linear:
        return self.head


@pytest.mark.parametrize("mode", ["auto", "full"])
def test_a_label_that_the_head_does_not_know_is_a_batch_error(mode: Any) -> None:
    architecture, params, buffers = ft.split(Wide())
    step = ft.pretrain_step(architecture, ft.optim.adamw(), head=mode)
    batch = zoo.batch()
    batch["labels"][1, 3] = zoo.VOCABULARY + 2
    with pytest.raises(ft.BatchError, match="no place for one of its indices"):
        step(step.init(params, buffers), batch)


@EVERY
def test_the_architecture_is_left_as_it_was(name: str) -> None:
    """After steps and evaluations of every stage: no weights, no hooks, the same modules."""
    architecture, params, buffers = ft.split(_built(name))
    before = _seen(architecture)
    for stage in STAGES:
        step = _step(architecture, stage, params)
        state = step.init(params, buffers)
        batch = _batch(stage)
        given = copy.deepcopy(batch)
        step(state, batch)
        ft.evaluate(step, state, [batch])
        assert _seen(step.architecture) == before
        assert all(p.device.type == "meta" for p in step.architecture.parameters())
        assert testing._digests(batch) == testing._digests(given)


def _seen(architecture: nn.Module) -> list[tuple[object, ...]]:
    return [
        (name, id(module), module.training, *module._forward_hooks, *module._forward_pre_hooks)
        for name, module in architecture.named_modules()
    ]


def test_chunks_are_used_where_they_are_due(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the true budget a small batch is taken whole; the tests here would show nothing."""
    step, state = _begun("llama", "pretrain")
    values, buffers = step.value_and_grad.values(state.params), state.buffers
    with ft.bound(step.architecture, values, buffers) as model:
        assert hidden_rows(model, zoo.batch()) is not None
        monkeypatch.undo()
        assert hidden_rows(model, zoo.batch()) is None


@pytest.mark.parametrize("budget", [0, chunks.BUDGET], ids=["chunks", "whole"])
@pytest.mark.parametrize("head", ["auto", "full"])
def test_of_equal_logits_the_first_is_the_mode_however_they_are_made(
    head: Any, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a head of zeros all are equal: right are the targets of 0, of either objective."""
    monkeypatch.setattr(chunks, "WORTH", budget)
    monkeypatch.setattr(chunks, "BUDGET", budget)
    architecture, params, buffers = zoo.split("decoder")
    head_name = "model.embed_tokens.weight"
    zeros = {n: torch.zeros_like(t) if n == head_name else t for n, t in params.items()}
    ids = torch.arange(16).reshape(2, 8) % 3
    batch = {"input_ids": ids, "labels": ids}
    pairs = {"chosen": batch, "rejected": {"input_ids": ids + 1, "labels": ids + 1}}
    expected = float((ids[:, 1:] == 0).float().mean())
    for step, each in (
        (ft.pretrain_step(architecture, ft.optim.adamw(), head=head), batch),
        (ft.dpo_step(architecture, ft.optim.adamw(), loss="simpo", head=head), pairs),
    ):
        metrics = step(step.init(zeros, buffers), each)[1].to_dict()
        assert metrics["mean_token_accuracy"] == pytest.approx(expected)
