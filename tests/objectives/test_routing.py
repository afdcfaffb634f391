"""The loss that balances the routers of a mixture of experts."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers")
import transformers
from models import families

import functrain as ft
from functrain import testing
from functrain.objectives.head import find_head
from functrain.objectives.routing import RoutedLanguageModeling

MIXTURES = ("gpt_oss", "mixtral", "olmoe", "qwen3_moe")
EVERY = pytest.mark.parametrize("name", MIXTURES)


def masked(seed: int = 0, examples: int = 4) -> dict[str, Any]:
    """A batch whose rows have ends of padding, of other lengths."""
    batch = zoo.batch(seed, examples)
    mask = (torch.arange(8) < torch.tensor([8, 5, 7, 3])[:examples].unsqueeze(1)).long()
    return {**batch, "labels": batch["labels"].masked_fill(mask == 0, -100), "attention_mask": mask}


def started(name: str, **options: Any) -> tuple[Any, Any]:
    architecture, params, buffers = ft.split(families.made(name))
    step = ft.pretrain_step(architecture, ft.optim.adamw(1e-2), router=0.1, **options)
    return step, step.init(params, buffers)


kept = functools.cache(started)  # a state is a value: every example begins at the same one


@EVERY
@pytest.mark.parametrize("make", [zoo.batch, masked])
def test_a_step_is_that_of_an_ordinary_loop(name: str, make: Any) -> None:
    ordinary = families.made(name).train()
    step, state = started(name)
    batch = make()
    state, metrics = step(state, batch)
    optimizer = torch.optim.AdamW(ordinary.parameters(), lr=1e-2, fused=True)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask") if key in batch}
    outputs = ordinary(**inputs, output_router_logits=True)
    logits, targets = outputs.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    loss = F.cross_entropy(logits, targets, reduction="sum") / (targets != -100).sum()
    (loss + 0.1 * outputs.aux_loss).backward()
    optimizer.step()
    assert float(metrics["loss"]) == pytest.approx(loss.item(), rel=1e-6)
    assert float(metrics["aux_loss"]) == pytest.approx(outputs.aux_loss.item(), rel=1e-6)
    for parameter, value in ordinary.named_parameters():
        torch.testing.assert_close(state.params[parameter], value.detach(), rtol=1e-3, atol=2e-5)


@settings(max_examples=settings().max_examples // 2)
@given(data=st.data())
def test_micro_batches_balance_as_the_whole_batch(data: st.DataObject) -> None:
    """The counts are of the whole, so that the gradient is; each its own would not be."""
    step, state = kept("mixtral")
    batch = masked(data.draw(st.integers(0, 99)))
    parts = data.draw(testing.partitions(4))
    testing.assert_accumulation_invariant(step, state, batch, parts)
    testing.assert_evaluation_invariant(step, state, batch, parts)


@given(first=st.integers(2, 7), padding=st.integers(0, 4))
def test_packed_documents_are_balanced_as_padded_ones(first: int, padding: int) -> None:
    """Padding, told by a mask or by positions, is no token of the balance."""
    ids = zoo.batch()["input_ids"]
    mask = (torch.arange(8) < torch.tensor([[first], [8]])).long()
    padded = {
        "input_ids": ids[:2],
        "labels": ids[:2].masked_fill(mask == 0, -100),
        "attention_mask": mask,
    }
    ids = torch.cat([ids[0, :first], ids[1], ids[2, :padding]])
    places = torch.cat([torch.arange(first), torch.arange(8), torch.zeros(padding).long()])
    packed = {
        "input_ids": ids[None],
        "labels": ids.masked_fill(places == 0, -100)[None],
        "position_ids": places[None],
    }
    step, state = started("qwen3_moe")
    one, two = (step.value_and_grad(state.params, state.buffers, each) for each in (padded, packed))
    for name in ("loss", "aux_loss"):
        assert float(two.metrics[name]) == pytest.approx(float(one.metrics[name]), rel=1e-5)
    for name, grad in one.grads.items():
        torch.testing.assert_close(two.grads[name], grad, rtol=1e-4, atol=1e-6)


def test_it_moves_the_routers_and_obeys_the_laws() -> None:
    step, state = started("mixtral", microbatches=2)
    testing.assert_pure(step, state, masked())
    testing.assert_donation_equal(step, state, masked())
    plain = ft.pretrain_step(step.architecture, ft.optim.adamw(1e-2))
    router = "model.layers.0.mlp.gate.weight"
    ours, theirs = (
        each.value_and_grad(state.params, state.buffers, masked()).grads[router]
        for each in (step, plain)
    )
    assert not torch.allclose(ours, theirs, rtol=1e-2)


def test_the_head_by_chunks_gives_the_same(monkeypatch: Any) -> None:
    found = []
    for budget in (1 << 30, 256):
        monkeypatch.setattr("functrain.objectives.chunks.BUDGET", budget)
        step, state = started("mixtral")
        found.append(step.value_and_grad(state.params, state.buffers, masked()))
    for name, grad in found[0].grads.items():
        torch.testing.assert_close(found[1].grads[name], grad, rtol=1e-4, atol=1e-6)


def test_what_has_no_routers_is_refused() -> None:
    for architecture, params, buffers in (zoo.split("tied"), ft.split(families.made("llama"))):
        step = ft.sft_step(architecture, ft.optim.sgd(), router=0.1)
        with pytest.raises(ft.ArchitectureError, match="has no routers to balance"):
            step(step.init(params, buffers), zoo.batch())
    architecture, _, _ = zoo.split("tied")
    for wrong in (-1.0, float("inf"), True):
        with pytest.raises(ft.ConfigError, match=r"router: .*, expected a positive finite number"):
            ft.sft_step(architecture, ft.optim.sgd(), router=wrong)
    step = ft.pretrain_step(copy.deepcopy(architecture), ft.optim.sgd(), router=0.0)
    assert type(step.objective) is ft.objectives.LanguageModeling


@pytest.mark.parametrize("name", ["deepseek_v3", "lfm2_moe"])
def test_routers_that_choose_in_another_way_are_refused(name: str) -> None:
    """By sigmoid scores, groups and biases: the counts would not be of the model's choices."""
    config: Any = families.CONFIGS.get(name, _lfm2)()
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    architecture, params, buffers = ft.split(model)
    step = ft.pretrain_step(architecture, ft.optim.sgd(1e-2), router=0.1)
    with pytest.raises(ft.ArchitectureError, match="has no aux_loss in transformers, since its"):
        step(step.init(params, buffers), zoo.batch())


def _lfm2() -> Any:
    return transformers.Lfm2MoeConfig(
        **families.GROUPED,
        **families.EXPERTS,
        moe_intermediate_size=8,
        num_dense_layers=1,
        layer_types=["full_attention", "conv"],
    )


def test_as_many_choices_are_counted_as_the_model_makes(monkeypatch: Any) -> None:
    """Aria, whose config calls their number by another name."""
    config = transformers.AriaTextConfig(
        **families.GROUPED, moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1
    )
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    parts = ft.split(model)
    with ft.bound(*parts, "eval") as bound, torch.no_grad():
        routed = RoutedLanguageModeling(router=0.1).observe(bound, zoo.batch())
        monkeypatch.setattr("functrain.objectives.routing._TOP", ("num_experts_per_tok",))
        with pytest.raises(ft.ArchitectureError, match="does not say how many experts"):
            RoutedLanguageModeling(router=0.1).observe(bound, zoo.batch())
    assert routed.counts.sum() == 2 * routed.rows


def test_counting_makes_no_logits(monkeypatch: Any) -> None:
    architecture, params, buffers = ft.split(families.made("mixtral"))
    usual, shapes = torch.nn.Linear.forward, list[torch.Size]()

    def recorded(self: torch.nn.Linear, input: torch.Tensor) -> torch.Tensor:  # noqa: A002
        if self is architecture.lm_head:
            shapes.append(input.shape)
        return usual(self, input)

    with ft.bound(architecture, params, buffers, "eval") as bound, torch.no_grad():
        find_head(bound)
        monkeypatch.setattr(torch.nn.Linear, "forward", recorded)
        RoutedLanguageModeling(router=0.1).observe(bound, zoo.batch())
    assert [shape.numel() for shape in shapes] == [0]
