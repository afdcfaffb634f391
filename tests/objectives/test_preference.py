"""DPO against the formulas written out, on log-probs computed by hand in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import zoo
from hypothesis import given
from hypothesis import strategies as st

import functrain as ft


def _logsigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > -30 else x


def _expected(loss: str, beta: float, eps: float, w: float, r: float, nw: int, nr: int) -> float:
    m = w - r
    if loss == "sigmoid":
        return -(1 - eps) * _logsigmoid(beta * m) - eps * _logsigmoid(-beta * m)
    if loss == "robust":
        top = -(1 - eps) * _logsigmoid(beta * m) + eps * _logsigmoid(-beta * m)
        return top / (1 - 2 * eps)
    if loss == "hinge":
        return max(0.0, 1 - beta * m)
    return (w / nw - r / nr - 1 / (2 * beta)) ** 2


def _by_hand(model: Any, side: dict[str, Any]) -> list[tuple[float, int]]:
    """Summed log-prob and length of each example, one at a time."""
    found = []
    for ids, labels in zip(side["input_ids"], side["labels"], strict=True):
        with torch.no_grad():
            logps = model(ids.unsqueeze(0))["logits"][0].log_softmax(-1)
        terms = [
            float(logps[t, int(labels[t + 1])])
            for t in range(len(ids) - 1)
            if int(labels[t + 1]) != -100
        ]
        found.append((sum(terms), len(terms)))
    return found


@given(
    batch=ft.testing.pairs(zoo.VOCABULARY),
    loss=st.sampled_from(["sigmoid", "robust", "hinge", "ipo"]),
    beta=st.floats(0.01, 2),
    eps=st.floats(0, 0.45),
)
def test_each_loss_and_metric_is_its_formula(
    batch: Any, loss: str, beta: float, eps: float
) -> None:
    eps = eps if loss in ("sigmoid", "robust") else 0.0
    policy = zoo.model("tied", torch.float64).eval()
    reference = zoo.Tied().double().eval()
    by_hand = {
        side: list(
            zip(_by_hand(policy, batch[side]), _by_hand(reference, batch[side]), strict=True)
        )
        for side in ("chosen", "rejected")
    }
    chosen = [p[0] - r[0] for p, r in by_hand["chosen"]]
    rejected = [p[0] - r[0] for p, r in by_hand["rejected"]]
    lengths = [
        (c[0][1], r[0][1]) for c, r in zip(by_hand["chosen"], by_hand["rejected"], strict=True)
    ]
    losses = [
        _expected(loss, beta, eps, w, r, *n)
        for w, r, n in zip(chosen, rejected, lengths, strict=True)
    ]
    pairs = len(losses)
    expected = {
        "loss": sum(losses) / pairs,
        "rewards/chosen": beta * sum(chosen) / pairs,
        "rewards/rejected": beta * sum(rejected) / pairs,
        "rewards/margins": beta * (sum(chosen) - sum(rejected)) / pairs,
        "rewards/accuracies": sum(w > r for w, r in zip(chosen, rejected, strict=True)) / pairs,
        "logps/chosen": sum(p[0] for p, _ in by_hand["chosen"]) / pairs,
        "logps/rejected": sum(p[0] for p, _ in by_hand["rejected"]) / pairs,
        "num_tokens": sum(a + b for a, b in lengths),
        "perplexity": math.exp(
            -sum(float(p[0]) for p, _ in by_hand["chosen"]) / sum(a for a, _ in lengths)
        ),
    }
    _, reference_params, _ = ft.split(reference)
    architecture, params, buffers = ft.split(policy)
    step = ft.dpo_step(
        architecture,
        ft.optim.adamw(),
        reference=reference_params,
        beta=beta,
        loss=loss,
        label_smoothing=eps,
    )
    _, metrics = step(step.init(params, buffers), batch)
    for name, value in expected.items():
        assert float(metrics[name]) == pytest.approx(value, rel=1e-9, abs=1e-9), name


def _reference_step(name: str = "decoder", **options: Any) -> tuple[Any, Any]:
    architecture, params, buffers = zoo.split(name)
    step = ft.dpo_step(
        architecture, ft.optim.adamw(1e-2), reference=ft.trees.clone(params), **options
    )
    return step, step.init(params, buffers)


@pytest.mark.parametrize("name", sorted(zoo.MODELS))
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "bf16_params"])
def test_at_the_reference_the_margin_is_exactly_zero(name: str, precision: str) -> None:
    step, state = _reference_step(name, precision=precision)
    _, metrics = step(state, zoo.pairs())
    assert float(metrics["rewards/margins"]) == 0.0
    assert float(metrics["rewards/accuracies"]) == 0.0
    assert float(metrics["loss"]) == pytest.approx(math.log(2), abs=1e-7)


def test_log_probs_given_ahead_are_the_bits_of_those_computed_online() -> None:
    from functrain.objectives.preference import concatenated
    from functrain.objectives.reference import reference_logps

    step, state = _reference_step()
    state, _ = step(state, zoo.pairs(3))
    batch = zoo.pairs()
    joined = concatenated(batch["chosen"], batch["rejected"])
    with ft.bound(step.architecture, state.params, state.buffers, "eval") as model:
        logps, _ = reference_logps(model, step.objective.reference, joined)
    chosen, rejected = logps.chunk(2)
    given_ahead = {**batch, "reference_logps": {"chosen": chosen, "rejected": rejected}}
    online, one = step(state, batch)
    cached, other = step(state, given_ahead)
    assert ft.fingerprint(online) == ft.fingerprint(cached)
    assert one.to_dict() == other.to_dict()


def test_the_reference_receives_no_gradient_and_no_change() -> None:
    architecture, params, buffers = zoo.split("tied")
    reference = ft.trees.clone(params)
    for tensor in reference.values():
        tensor.requires_grad_()
    before = {name: ft.trees.digest(tensor) for name, tensor in reference.items()}
    step = ft.dpo_step(architecture, ft.optim.adamw(1e-2), reference=reference, donate=True)
    state = step.init(params, buffers)
    for seed in range(3):
        state, _ = step(state, zoo.pairs(seed))
    assert all(tensor.grad is None for tensor in reference.values())
    assert {name: ft.trees.digest(tensor) for name, tensor in reference.items()} == before


def test_training_moves_the_margin_the_right_way() -> None:
    step, state = _reference_step()
    margins = []
    for _ in range(20):
        state, metrics = step(state, zoo.pairs())
        margins.append(float(metrics["rewards/margins"]))
    assert margins[0] == 0
    assert margins[-1] > 0.5
    assert float(metrics["rewards/accuracies"]) == 1.0


def test_token_metrics_are_over_the_completions() -> None:
    """Some targets of both sides are the mode."""
    step, state = _reference_step("tied")
    batch = zoo.pairs()
    model = zoo.model("tied").eval()
    entropy, targets, correct = 0.0, 0, {"chosen": 0, "rejected": 0}
    level, counts = {"chosen": 0.0, "rejected": 0.0}, {"chosen": 0, "rejected": 0}
    for side in level:
        logits = model(batch[side]["input_ids"])["logits"].detach()[:, :-1].double()
        labels = batch[side]["labels"][:, 1:]
        mask = labels != -100
        modes = logits.argmax(-1)
        labels[:, ::2] = torch.where(mask, modes, labels)[:, ::2]
        p = logits.softmax(-1)
        entropy += float((-(p * p.log()).sum(-1) * mask).sum())
        counts[side] = int(mask.sum())
        targets += counts[side]
        level[side] = float((logits.mean(-1) * mask).sum()) / counts[side]
        correct[side] = int(((modes == labels) & mask).sum())
        assert 0 < correct[side] < counts[side]
    _, metrics = step(state, batch)
    assert float(metrics["entropy"]) == pytest.approx(entropy / targets, rel=1e-5)
    accuracy = correct["chosen"] / counts["chosen"]
    assert float(metrics["mean_token_accuracy"]) == pytest.approx(accuracy)
    for side, value in level.items():
        assert float(metrics[f"logits/{side}"]) == pytest.approx(value, rel=1e-4, abs=1e-6)
    assert float(metrics["num_tokens"]) == targets


def _heard(**options: Any) -> tuple[Any, Any, Any]:
    architecture, params, buffers = ft.split(zoo.Heard())
    step = ft.dpo_step(
        architecture, ft.optim.adamw(1e-2), reference=ft.trees.clone(params), **options
    )
    return architecture, step, step.init(params, buffers)


def test_masks_and_positions_reach_policy_and_reference_over_both_sides() -> None:
    """Chosen above rejected, the shorter side padded at the end by what is masked."""
    architecture, step, state = _heard()
    pairs = {side: zoo.full(batch) for side, batch in zoo.pairs().items()}
    step(state, pairs)  # what is found once is found
    architecture.calls.clear()
    step(state, pairs)
    policy, reference = architecture.calls
    for call in (policy, reference):
        for key in ("input_ids", "attention_mask", "position_ids"):
            assert torch.equal(call[key][:4], pairs["chosen"][key]), key
            assert torch.equal(call[key][4:, :7], pairs["rejected"][key]), key
        assert int(call["attention_mask"][4:, 7:].sum()) == 0


@pytest.mark.parametrize("dropout", [False, True])
def test_the_reference_is_in_eval_mode_without_history_whatever_the_policy_is(
    dropout: bool,
) -> None:
    architecture, step, state = _heard(dropout=dropout, microbatches=2)
    step(state, zoo.pairs())  # what is found once is found
    architecture.calls.clear()
    step(state, zoo.pairs())
    modes = [(call["training"], call["history"]) for call in architecture.calls]
    assert modes == 2 * [(False, False), (dropout, True)]


def test_log_probs_given_ahead_are_used_where_there_is_a_reference_too() -> None:
    _, step, state = _heard(beta=0.5)
    given = {"chosen": torch.full((4,), -3.0), "rejected": torch.full((4,), -5.0)}
    _, plain = step(state, zoo.pairs())
    _, metrics = step(state, {**zoo.pairs(), "reference_logps": given})
    for side, value in (("chosen", -3.0), ("rejected", -5.0)):
        expected = 0.5 * (float(plain[f"logps/{side}"]) - value)
        assert float(metrics[f"rewards/{side}"]) == pytest.approx(expected, rel=1e-5)


def test_a_pair_whose_only_label_is_never_a_target_is_refused() -> None:
    _, step, state = _heard()
    pairs = zoo.pairs()
    pairs["rejected"]["labels"][2, 1:] = -100
    pairs["rejected"]["labels"][2, 0] = 3
    with pytest.raises(ft.BatchError, match=r"rejected.labels: example 2 has no completion token"):
        step(state, pairs)


def test_sides_with_different_keys_are_refused() -> None:
    _, step, state = _heard()
    pairs = {**zoo.pairs(), "chosen": zoo.full(zoo.batch())}
    with pytest.raises(ft.BatchError, match="expected the same keys"):
        step(state, pairs)


@pytest.mark.parametrize("longer", ["chosen", "rejected"])
def test_a_pair_of_the_same_tokens_is_refused_however_it_is_padded(longer: str) -> None:
    _, step, state = _heard()
    one = zoo.full(zoo.batch(seed=5))
    padded = {key: torch.nn.functional.pad(t, (3, 2)) for key, t in one.items()}
    padded["labels"][:, :3] = padded["labels"][:, -2:] = -100
    sides = {"chosen": one, "rejected": one, longer: padded}
    with pytest.raises(ft.BatchError, match="example 0: chosen and rejected are the same tokens"):
        step(state, sides)
    # The same ids, of which one side's mask hides one that is no target: other tokens.
    padded["attention_mask"][:, 3] = 0
    padded["labels"][:, 3] = -100
    step(state, sides)
