"""The laws of preference-losses, for every loss, on two architectures, with and without chunks."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import attrs
import pytest
import torch
import zoo
from halves import half
from objectives import formulas
from objectives.formulas import CASES
from torch import Tensor

import functrain as ft
from functrain import testing
from functrain.objectives import chunks, logprobs, scores
from functrain.objectives.losses import LOSSES, Options
from functrain.objectives.pairs import sequence_labels
from functrain.objectives.preference import PreferenceOptimization

ROUNDING = 1e-12


def _llama(dtype: torch.dtype) -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=zoo.VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        use_cache=False,
    )
    with ft.keys.seeded(2):
        return ft.split(transformers.AutoModelForCausalLM.from_config(config).to(dtype))


MODELS: dict[str, Callable[[torch.dtype], Any]] = {
    "decoder": lambda dtype: ft.split(zoo.decoder(layers=1).to(dtype)),
    "llama": _llama,
}


@functools.cache
def _split(architecture: str, dtype: torch.dtype) -> Any:
    return MODELS[architecture](dtype)


ARCHITECTURES, HEADS = list(MODELS), ["whole", "chunks"]
WITH_REFERENCE = list(filter(formulas.referred, CASES))
EVERY = pytest.mark.parametrize("case", list(CASES))
REFERRED = pytest.mark.parametrize("case", WITH_REFERENCE)
EVERYWHERE = half("case, architecture", list(CASES), ARCHITECTURES)
EVERY_WAY = half("case, architecture, head", list(CASES), ARCHITECTURES, HEADS, indirect=["head"])


@pytest.fixture(params=HEADS)
def head(request: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """Logits as the model makes them, or 16 rows of them at a time."""
    if request.param == "chunks":
        monkeypatch.setattr(chunks, "BUDGET", 64)
    return str(request.param)


@functools.cache
def _started(
    case: str, architecture: str, dtype: torch.dtype = torch.float64
) -> tuple[ft.Step, ft.TrainState]:
    """A step, and a state whose policy is not the reference."""
    split, params, buffers = _split(architecture, dtype)
    step = formulas.step_of(case, split, formulas.elsewhere(params, 2, 0.2))
    return step, step.init(formulas.elsewhere(params, 1, 0.2), buffers)


def _evaluated(case: str, architecture: str, *batches: Any) -> dict[str, float]:
    return ft.evaluate(*_started(case, architecture), list(batches)).to_dict()


@functools.cache
def _whole(case: str, architecture: str, _head: str) -> dict[str, float]:
    """The evaluation of the batch as it is, which the laws compare with."""
    return _evaluated(case, architecture, formulas.batch_of(case))


def _permuted(batch: Any, order: list[int]) -> Any:
    return {
        key: _permuted(value, order) if isinstance(value, dict) else value[order]
        for key, value in batch.items()
    }


def _wider(batch: Any, columns: int, *, before: bool = False) -> Any:
    """Each side with columns of padding at its end, or before its prompts."""

    def padded(side: Any) -> Any:
        wider = testing._padded(side, columns)
        return {k: t.roll(columns, 1) for k, t in wider.items()} if before else wider

    return {
        key: padded(value) if isinstance(value, dict) else value for key, value in batch.items()
    }


def _assert_equal(one: dict[str, float], other: dict[str, float], tolerance: float) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value == pytest.approx(other[name], rel=tolerance, abs=tolerance), name


def test_logits_are_made_by_chunks_where_the_budget_is_small(
    head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the fixture promises, of policy and reference."""
    seen: list[int] = []
    original = logprobs.scored

    def spying(hidden: Tensor, targets: Tensor, projection: Any, **options: Any) -> Any:
        seen.append(len(list(projection.chunks(len(hidden)))))
        return original(hidden, targets, projection, **options)

    monkeypatch.setattr(logprobs, "scored", spying)
    _evaluated("sigmoid", "decoder", formulas.batch_of("sigmoid"))
    assert len(seen) == (2 if head == "chunks" else 0)
    assert all(each > 1 for each in seen)


@EVERYWHERE
def test_chunks_change_no_loss_and_no_gradient(
    case: str, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, state = _started(case, architecture)
    batch = formulas.batch_of(case)
    whole = step.value_and_grad(state.params, state.buffers, batch)
    monkeypatch.setattr(chunks, "BUDGET", 64)
    cut = step.value_and_grad(state.params, state.buffers, batch)
    _assert_equal(whole.metrics.to_dict(), cut.metrics.to_dict(), ROUNDING)
    size = max(float(grad.abs().max()) for grad in whole.grads.values())
    for name, grad in whole.grads.items():
        torch.testing.assert_close(grad, cut.grads[name], rtol=0, atol=ROUNDING * size, msg=name)


class _Indirect(PreferenceOptimization):
    """The same loss, differentiated in the backward pass alone."""

    @property
    def direct(self) -> bool:
        return False


@half(
    "case, architecture, budget, microbatches",
    formulas.PAIRED,
    ARCHITECTURES,
    [64, 1 << 12],
    [1, 2],
)
def test_gradients_taken_with_the_logits_are_those_of_a_backward_pass(
    case: str,
    architecture: str,
    budget: int,
    microbatches: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whether a pair's logits may stay or are made again; every pair of the batch is asked once."""
    monkeypatch.setattr(chunks, "BUDGET", budget)
    monkeypatch.setattr(chunks, "WORTH", 0)
    step, state = _started(case, architecture)
    step = attrs.evolve(step, microbatches=microbatches)
    asked: list[int] = []
    cut: list[int] = []
    original = logprobs.scored

    def spying(*given: Any, slopes: Any = None, **options: Any) -> Any:
        hidden, _, projection = given
        parts = scores._parts(len(hidden), projection, options["groups"])
        cut.append(max(map(len, parts)))

        def counted(index: int, found: Any) -> Tensor:
            asked.append(len(found.logps))
            return slopes(index, found)

        return original(*given, slopes=counted if slopes else None, **options)

    monkeypatch.setattr(logprobs, "scored", spying)
    objective: Any = step.objective
    fields = {
        field.name: getattr(objective, field.name)
        for field in attrs.fields(PreferenceOptimization)
        if not field.name.startswith("_")
    }
    batch = formulas.batch_of(case, time=16)  # a pair has more rows than the least chunk
    ahead = step.gradient(state.params, state.buffers, batch)
    assert (max(cut) > 1) is (budget == 64)
    scored = sum(asked)
    asked.clear()
    other = attrs.evolve(step, objective=_Indirect(**fields))
    later = other.gradient(state.params, state.buffers, batch)
    assert not asked
    whole = objective.batch_coupled and microbatches == 1
    sides = (batch["chosen"], batch["rejected"])
    targets = sum(int((side["labels"][:, 1:] != -100).sum()) for side in sides)
    if "sequence" in objective.likelihoods():
        targets -= int((batch["chosen"]["labels"][:, 1:] != -100).sum())
        targets += int((sequence_labels(batch["chosen"])[:, 1:] != -100).sum())
    assert scored == (0 if whole else targets)
    _assert_equal(ahead.metrics.to_dict(), later.metrics.to_dict(), ROUNDING)
    size = max(float(grad.abs().max()) for grad in later.grads.values())
    for name, grad in later.grads.items():
        torch.testing.assert_close(grad, ahead.grads[name], rtol=0, atol=ROUNDING * size, msg=name)


AT_LOG_TWO = ("sigmoid", "sigmoid_norm", "forward_kl", "alpha", "ld", "aot", "aot_unpaired")


@half(
    "case, architecture, dtype, head",
    WITH_REFERENCE,
    ARCHITECTURES,
    [torch.float32, torch.float64],
    HEADS,
    indirect=["head"],
)
def test_where_the_policy_is_the_reference_the_margin_is_exactly_zero(
    case: str, architecture: str, dtype: torch.dtype, head: str
) -> None:
    """Not merely small; `sigmoid` is exactly log 2, and every other loss its value at 0."""
    split, params, buffers = _split(architecture, dtype)
    step = formulas.step_of(case, split, ft.trees.clone(params))
    _, metrics = step(step.init(params, buffers), formulas.batch_of(case))
    for name in ("chosen", "rejected", *(() if case == "kto" else ("margins", "accuracies"))):
        assert float(metrics[f"rewards/{name}"]) == 0.0, name
    loss = float(metrics["loss"])
    if case in AT_LOG_TWO:
        assert loss == float(torch.tensor(2.0, dtype=dtype).log())
    elif case == "kto":
        assert float(metrics["kl"]) == 0.0
        assert loss == pytest.approx((3 * 1.5 + 0.7) / 2 / 4)
    elif isinstance(name := CASES[case]["loss"], str) and case not in ("wpo", "wpo_bco"):
        n = formulas.Numbers(epsilon=CASES[case].get("label_smoothing", 0.0))
        assert loss == pytest.approx(float(formulas.of_pair(name, formulas.Pair(0, 0), n)))


@EVERY_WAY
def test_padding_changes_no_loss(case: str, architecture: str, head: str) -> None:
    batch = _wider(formulas.batch_of(case), 5)
    _assert_equal(_evaluated(case, architecture, batch), _whole(case, architecture, head), ROUNDING)


@EVERY
def test_padding_before_the_prompts_changes_no_loss(case: str) -> None:
    """The decoder's positions are counted under the mask, so that the rounding is the same."""
    batch = _wider(formulas.batch_of(case), 3, before=True)
    _assert_equal(_evaluated(case, "decoder", batch), _whole(case, "decoder", "whole"), ROUNDING)


@EVERY
def test_without_a_mask_what_follows_the_completion_is_no_part_of_it(case: str) -> None:
    batch = formulas.batch_of(case)
    for side in ("chosen", "rejected", "completion", "mismatched"):
        if side in batch:
            batch[side] = {k: t for k, t in batch[side].items() if k != "attention_mask"}
    _assert_equal(_evaluated(case, "decoder", batch), _whole(case, "decoder", "whole"), ROUNDING)


def test_a_likelihood_of_whole_sequences_leaves_the_completions_what_they_are() -> None:
    """Labels that are not the tokens, and a target after a hole in the mask: as without it."""
    batch = formulas.batch_of("sigmoid")
    for side in batch.values():
        side["labels"] = side["labels"].where(side["labels"] == -100, (side["labels"] + 3) % 31)
        side["attention_mask"][:, 2] = 0
    step, state = _started("simpo", "decoder")
    mixed = attrs.evolve(step.objective, loss={"simpo": 1.0, "orpo": 1.0})
    one = ft.evaluate(step, state, [batch]).to_dict()
    other = ft.evaluate(attrs.evolve(step, objective=mixed), state, [batch]).to_dict()
    for name in ("logps/chosen", "logps/rejected", "entropy", "num_tokens", "perplexity"):
        assert one[f"eval_{name}"] == pytest.approx(other[f"eval_{name}"], rel=ROUNDING), name


@EVERY_WAY
def test_reordering_changes_no_loss(case: str, architecture: str, head: str) -> None:
    batch = _permuted(formulas.batch_of(case), [1, 3, 0, 2])
    _assert_equal(_evaluated(case, architecture, batch), _whole(case, architecture, head), ROUNDING)


@EVERY_WAY
def test_splitting_changes_no_loss(case: str, architecture: str, head: str) -> None:
    """An evaluation over any pieces is that of the whole, coupled losses too; and of a loss that
    is not coupled each pair's own knows nothing of the others."""
    whole = _whole(case, architecture, head)
    batch = formulas.batch_of(case)
    _assert_equal(_evaluated(case, architecture, *testing._cut(batch, [1, 3])), whole, ROUNDING)
    names = CASES[case].get("loss", ())
    alone = [names] if isinstance(names, str) else list(names)
    if formulas.coupled(case) or any(LOSSES[name].likelihood for name in alone):
        return
    singles = testing._cut(batch, [1, 1, 1, 1])
    losses = [_evaluated(case, architecture, each)["eval_loss"] for each in singles]
    assert sum(losses) / 4 == pytest.approx(whole["eval_loss"], rel=ROUNDING)


@EVERY_WAY
def test_swapping_the_sides_flips_the_margin(case: str, architecture: str, head: str) -> None:
    """What was said of the chosen is said of the rejected; of KTO, where the labels are flipped."""
    batch = formulas.batch_of(case)
    if case == "kto":
        swapped = {**batch, "desirable": ~batch["desirable"]}
    else:
        swapped = {"chosen": batch["rejected"], "rejected": batch["chosen"]}
    one, other = _whole(case, architecture, head), _evaluated(case, architecture, swapped)
    for chosen, rejected in (("chosen", "rejected"), ("rejected", "chosen")):
        for kind in ("rewards", "logps"):
            a, b = one[f"eval_{kind}/{chosen}"], other[f"eval_{kind}/{rejected}"]
            assert a == pytest.approx(b, rel=ROUNDING)
    if case != "kto":
        margin, opposite = (each["eval_rewards/margins"] for each in (one, other))
        assert abs(margin) > 1e-3
        assert margin == pytest.approx(-opposite, rel=10 * ROUNDING)


@REFERRED
@pytest.mark.parametrize("by_token", [False, True])
def test_log_probs_of_the_reference_online_and_ahead_are_the_same_bits(
    case: str, by_token: bool
) -> None:
    by_token = by_token or case == "ld"  # which takes no sums
    step, state = _started(case, "decoder", torch.float32)
    batch = formulas.batch_of(case)
    online, one = step(state, batch)
    ahead, other = step(state, _attached(step, state, batch, by_token))
    testing.assert_same(online, ahead, "online and ahead")
    assert one.to_dict() == other.to_dict()


def _attached(step: ft.Step, state: ft.TrainState, batch: Any, by_token: bool = False) -> Any:
    reference = step.objective.kept()
    assert reference is not None
    return ft.attach_reference(step.architecture, reference, state.buffers, by_token=by_token)(
        batch
    )


@REFERRED
def test_what_is_attached_outside_of_the_completions_is_not_read(case: str) -> None:
    """Log-probs by token of prompts and padding, as another program may well hand them over."""
    batch = formulas.batch_of(case)
    given = _attached(*_started(case, "decoder"), batch, by_token=True)
    noisy = {
        side: torch.where(batch[side]["labels"][:, 1:] == -100, -7.0, logps)
        for side, logps in given["reference_logps"].items()
    }
    other = _evaluated(case, "decoder", {**batch, "reference_logps": noisy})
    assert other == _evaluated(case, "decoder", given)


@half("case, architecture", WITH_REFERENCE, ARCHITECTURES)
def test_the_reference_receives_no_gradient_and_no_step_changes_it(
    case: str, architecture: str
) -> None:
    """Neither a pure nor a donated step of several micro-batches."""
    split, params, buffers = _split(architecture, torch.float32)
    reference = formulas.elsewhere(params)
    for tensor in reference.values():
        tensor.requires_grad_()
    step = formulas.step_of(case, split, reference, microbatches=2)
    kept = step.objective.kept()
    assert kept is not None
    assert all(kept[name] is tensor for name, tensor in reference.items()), "a copy hides a change"
    before = {name: ft.trees.digest(tensor) for name, tensor in reference.items()}
    state = step.init(ft.trees.clone(params), buffers)
    for seed in range(2):
        state, metrics = step(state, formulas.batch_of(case, seed), donate=bool(seed))
        assert not float(metrics["skipped"])
    assert all(tensor.grad is None for tensor in reference.values())
    assert {name: ft.trees.digest(tensor) for name, tensor in reference.items()} == before


@EVERY
def test_a_step_is_pure_and_donated_it_is_the_same(case: str) -> None:
    step, state = _started(case, "decoder", torch.float32)
    several = attrs.evolve(step, microbatches=2)
    testing.assert_pure(several, state, formulas.batch_of(case))
    testing.assert_donation_equal(several, state, formulas.batch_of(case))


@pytest.mark.parametrize("case", ["sigmoid", *filter(formulas.coupled, CASES)])
def test_an_evaluation_in_inference_mode_is_one_outside_of_it(case: str) -> None:
    """Batch-coupled losses in two passes too, in which slopes are taken."""
    pieces = list(testing._cut(formulas.batch_of(case), [1, 3]))
    outside = _evaluated(case, "decoder", *pieces)
    with torch.inference_mode():
        assert _evaluated(case, "decoder", *pieces) == outside


# What makes no sense is refused, in words.

NAN, INFINITE = float("nan"), float("inf")
POSITIVE = "expected a positive finite number"
NONE_OF_ITS_OWN = "loss has none; it has a meaning for sigmoid, sigmoid_norm, robust, exo_pair"
CONFIGS: list[tuple[dict[str, Any], str]] = [
    *(({"beta": bad}, f"beta: {bad}, {POSITIVE}") for bad in (0.0, -0.1, NAN, INFINITE, True)),
    *(
        ({"label_smoothing": bad}, rf"label_smoothing: {bad}, expected a number in \[0, 0.5\)")
        for bad in (-0.1, 0.5, 0.9, NAN)
    ),
    ({"loss": "exo_pair"}, "label_smoothing: the 'exo_pair' loss takes its logarithm"),
    ({"loss": {"sigmoid": 1, "exo_pair": 1}}, "the 'exo_pair' loss takes its logarithm"),
    *(
        ({"loss": name, "label_smoothing": 0.1}, f"label_smoothing: the {name!r} {NONE_OF_ITS_OWN}")
        for name, each in LOSSES.items()
        if not each.smoothing
    ),
    ({"loss": "sigmod"}, "loss: 'sigmod' is unknown; did you mean 'sigmoid'"),
    ({"loss": "ipo_sums"}, "loss: 'ipo_sums' is unknown; did you mean 'ipo_sum' or 'ipo'"),
    (
        {"loss": {"sigmoid": 1, "bco": 1}},
        r"loss: 'bco' is unknown; did you mean 'bco_pair'\?",
    ),
    ({"loss": "Sigmoid"}, r"loss: 'Sigmoid' is unknown; did you mean 'sigmoid'\?"),
    ({"loss": "apo"}, r"loss: 'apo' is unknown; did you mean 'apo_down' or 'apo_zero'\?"),
    ({"loss": "DPO"}, "loss: 'DPO' is unknown; it is 'sigmoid'"),
    ({"loss": "rpo"}, "loss: 'rpo' is unknown; it is a mix of 'sigmoid' and 'sft'"),
    ({"loss": "slic"}, "loss: 'slic' is unknown; it is 'hinge'"),
    ({"loss": "tr-dpo"}, "loss: 'tr-dpo' is unknown; it is any loss .* with reference_mixup"),
    ({"loss": {"kto": 1.0, "sft": 1.0}}, "loss: 'kto' is unknown; .* functrain.kto_step"),
    *(
        ({option: bad}, f"{option}: {bad!r}, expected True or False")
        for option in ("wpo", "length_normalized", "dropout", "donate")
        for bad in ("no", 1, None)
    ),
    ({"loss": {}}, "loss: {}, expected a name, or weights by name"),
    ({"loss": None}, "loss: None, expected a name, or weights by name"),
    *(
        (
            {"loss": {"sft": 1.0, "sigmoid": bad}},
            f"the weight of 'sigmoid' is {bad!r}, expected a f",
        )
        for bad in (-1.0, 0, NAN, INFINITE, "1", True)
    ),
    *(
        (
            {"loss": {"sigmoid": 1.0, name: 1.0}, "divergence": "forward_kl"},
            f"divergence: the {name!r} loss is defined for 'reverse_kl' alone",
        )
        for name in (
            *("nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down"),
        )
    ),
    ({"divergence": "foward_kl"}, "divergence: 'foward_kl' is unknown; did you mean 'forward_kl'"),
    *(
        ({"divergence": "alpha", "divergence_alpha": bad}, f"divergence_alpha: {bad}, expected a")
        for bad in (0.0, 1.0, -1.0, NAN)
    ),
    *(
        ({"loss": name, "length_normalized": True}, f"length_normalized: the {name!r} loss is no")
        for name in ("sigmoid_norm", "ipo", "aot", "bco_pair")
    ),
    (
        {"loss": "ipo_sum", "length_normalized": True},
        "length_normalized: the 'ipo_sum' loss is 'ipo' where it is by token; use 'ipo'",
    ),
    *(
        ({"loss": {"sigmoid": 1.0, name: 1.0}, **option}, f"{next(iter(option))}: the {name!r} los")
        for option, names in (
            ({"label_smoothing": 0.1}, ("hinge", "orpo", "bco_pair")),
            ({"length_normalized": True}, ("simpo", "cpo", "orpo", "ipo")),
            ({"divergence": "forward_kl"}, ("simpo", "cpo", "orpo")),
            ({"wpo": True}, ("aot",)),
            ({"ld_alpha": 0.5}, ("simpo", "ipo")),
        )
        for name in names
    ),
    *(
        ({"loss": name, "ld_alpha": 0.5}, f"ld_alpha: the {name!r} loss divides by the whole len")
        for name in ("sigmoid_norm", "ipo", "simpo", "orpo")
    ),
    ({"length_normalized": True, "ld_alpha": 0.5}, "ld_alpha: length_normalized would divide"),
    *(
        ({"loss": name, **option}, f"{next(iter(option))}: the {name!r} loss has no Δ to modify")
        for name in ("simpo", "cpo", "orpo", "sft")
        for option in ({"length_normalized": True}, {"divergence": "jensen_shannon"})
    ),
    *(
        ({"loss": name, "wpo": True}, f"wpo: the {name!r} loss sorts the batch")
        for name in ("aot", "aot_unpaired")
    ),
    ({"loss": "sft", "wpo": True}, "wpo: the 'sft' loss is the likelihood of the chosen alone"),
    ({"loss": "sft", "ld_alpha": 0.0}, "ld_alpha: the 'sft' loss is the likelihood of the chosen"),
    *(
        ({"loss": name, "reference": zoo.split("tied")[1]}, f"the {name!r} loss has no reference")
        for name in ("simpo", "cpo", "orpo", "sft")
    ),
    ({"loss": "simpo", "reference_mixup": 0.5}, "reference_mixup: the 'simpo' loss has no ref"),
    ({"reference_mixup": 0.5}, "reference_mixup: no reference to move; give reference=params"),
    *(
        ({"reference_mixup": bad}, rf"reference_mixup: {bad}, expected a number in \(0, 1\]")
        for bad in (0.0, 1.5, -0.5, NAN)
    ),
    *(
        ({"reference_sync": bad}, f"reference_sync: {bad}, expected an integer of at least 1")
        for bad in (0, -3, 1.5, True)
    ),
    *(
        ({"ld_alpha": bad}, rf"ld_alpha: {bad}, expected a number in \[0, 1\]")
        for bad in (-0.1, 1.1, NAN)
    ),
    ({"loss": "discopop", "discopop_tau": 0.0}, f"discopop_tau: 0.0, {POSITIVE}"),
    ({"loss": "orpo", "orpo_lambda": 0.0}, f"orpo_lambda: 0.0, {POSITIVE}"),
    ({"loss": "cpo", "cpo_alpha": -1.0}, "cpo_alpha: -1.0, expected a finite number of at least 0"),
    ({"loss": "simpo", "simpo_gamma": NAN}, "simpo_gamma: nan, expected a finite number"),
    *(
        ({"loss": {"sigmoid": 1.0, "sft": 0.1}, **option}, f"nothing reads it without {reader}")
        for option, reader in (
            ({"simpo_gamma": 0.6}, "the 'simpo' loss"),
            ({"cpo_alpha": 0.0}, "the 'cpo' loss"),
            ({"orpo_lambda": 1.0}, "the 'orpo' loss"),
            ({"discopop_tau": 0.1}, "the 'discopop' loss"),
            ({"divergence_alpha": 0.3}, "the divergence 'alpha'"),
            ({"reference_sync": 8}, "reference_mixup"),
        )
    ),
    ({"reference": [1]}, "reference: expected params, a mapping .* got list"),
    ({"head": "chunks"}, "head: 'chunks', expected 'auto' or 'full'"),
]


@pytest.mark.parametrize(("options", "message"), CONFIGS)
def test_an_option_that_makes_no_sense_is_named(options: dict[str, Any], message: str) -> None:
    architecture, _, _ = zoo.split("tied")
    with pytest.raises(ft.ConfigError, match=message):
        ft.dpo_step(architecture, ft.optim.adamw(), **options)


@pytest.mark.parametrize(
    "option",
    [
        {"label_smoothing": 0.1},
        {"length_normalized": True},
        {"divergence": "forward_kl"},
        {"wpo": True},
        {"ld_alpha": 0.5},
    ],
    ids=lambda option: next(iter(option)),
)
def test_a_likelihood_term_beside_is_not_modified(option: dict[str, Any]) -> None:
    """The loss of the mix is that of the modified loss alone and the plain −log-likelihood."""
    step, state = _started("sigmoid", "decoder")

    def loss(**changes: Any) -> float:
        changed = attrs.evolve(step, objective=attrs.evolve(step.objective, **changes))
        return ft.evaluate(changed, state, [formulas.batch_of("sigmoid")]).to_dict()["eval_loss"]

    plain = loss(loss={"sigmoid": 1.0, "sft": 0.5}) - loss()
    assert loss(**option) != loss()
    mixed = loss(loss={"sigmoid": 1.0, "sft": 0.5}, **option)
    assert mixed - loss(**option) == pytest.approx(plain, rel=1e-12)


def test_a_side_without_examples_is_not_among_the_metrics_of_kto() -> None:
    """And merged with batches that have some, it is their mean."""
    step, state = _started("kto", "decoder")
    batch = formulas.batch_of("kto")
    all_of, mixed = {**batch, "desirable": torch.ones(4, dtype=torch.bool)}, batch
    one, other = (step(state, each)[1] for each in (all_of, mixed))
    rejected = {"rewards/rejected", "logps/rejected"}
    assert other.to_dict().keys() - one.to_dict().keys() == rejected
    assert all(math.isfinite(value) for value in one.to_dict().values())
    for name in rejected:
        assert one.merge(other).to_dict()[name] == other.to_dict()[name]


def test_every_number_of_one_loss_is_an_option_of_it_alone() -> None:
    """Those that more than one loss reads are not among them."""
    own = {each.number: name for name, each in LOSSES.items() if each.number is not None}
    shared = {"beta", "label_smoothing"}
    assert own.keys() | shared == {field.name for field in attrs.fields(Options)}
    assert all(option.startswith(f"{name}_") for option, name in own.items())
    for option, name in own.items():
        assert getattr(PreferenceOptimization(loss=name, **{option: 0.7}), option) == 0.7
        default = getattr(Options(), option)
        assert getattr(PreferenceOptimization(**{option: default}), option) == default


@pytest.mark.parametrize("option", ["beta", "desirable_weight", "undesirable_weight"])
@pytest.mark.parametrize("bad", [0.0, -1.0, NAN, INFINITE, "1"])
def test_a_number_of_kto_that_makes_no_sense_is_named(option: str, bad: Any) -> None:
    architecture, _, _ = zoo.split("tied")
    with pytest.raises(ft.ConfigError, match=f"{option}: {bad!r}, {POSITIVE}"):
        ft.kto_step(architecture, ft.optim.adamw(), **{option: bad})


def test_a_boolean_of_kto_and_of_what_attaches_is_one() -> None:
    architecture, params, buffers = zoo.split("tied")
    with pytest.raises(ft.ConfigError, match="dropout: 'no', expected True or False"):
        ft.kto_step(architecture, ft.optim.adamw(), dropout="no")  # type: ignore[arg-type]
    with pytest.raises(ft.ConfigError, match="by_token: 'no', expected True or False"):
        ft.attach_reference(architecture, params, buffers, by_token="no")  # type: ignore[arg-type]


@pytest.mark.parametrize("case", ["sigmoid", "kto"])
def test_a_reference_of_another_architecture_is_named(case: str) -> None:
    architecture, _, _ = zoo.split("tied")
    _, other, _ = zoo.split("decoder")
    with pytest.raises(ft.ArchitectureError, match="reference: missing"):
        formulas.step_of(case, architecture, other)
    _, wider, _ = ft.split(zoo.Tied(width=8))
    with pytest.raises(ft.StateError, match=r"reference/.*shape .* another architecture"):
        formulas.step_of(case, architecture, wider)


def _with(batch: Any, side: str, **changes: Any) -> Any:
    return {**batch, side: {**batch[side], **changes}}


def _ahead(batch: Any, **logps: Any) -> Any:
    return {**batch, "reference_logps": logps}


def _same(columns: int) -> Any:
    """A pair whose sides are the same tokens, the rejected one with more padding."""
    pairs = formulas.batch_of("sigmoid")
    chosen = pairs["chosen"]
    rejected = {key: value.clone() for key, value in chosen.items()}
    rejected["input_ids"][:2, -4] = (rejected["input_ids"][:2, -4] + 1) % zoo.VOCABULARY
    rejected["labels"][:2] = rejected["input_ids"][:2]
    return {"chosen": chosen, "rejected": testing._padded(rejected, columns)}


PAIRS = formulas.batch_of("sigmoid")
EXAMPLES = formulas.batch_of("kto")
EMPTY = torch.full((4, 10), -100)
FOUR, SIX = torch.zeros(4), torch.zeros(4, 9)
IDENTICAL = "example 2: chosen and rejected are the same tokens, so nothing is preferred"
BATCHES: list[tuple[str, Any, str]] = [
    ("sigmoid", _same(0), IDENTICAL),
    ("orpo", _same(3), IDENTICAL),
    ("sigmoid", _with(PAIRS, "rejected", labels=EMPTY), "rejected.labels: example 0 has no compl"),
    ("simpo", _with(PAIRS, "rejected", labels=EMPTY), "rejected.labels: example 0 has no compl"),
    ("kto", _with(EXAMPLES, "mismatched", labels=EMPTY), "mismatched.labels: example 0 has no co"),
    ("kto", {k: v for k, v in EXAMPLES.items() if k != "mismatched"}, "mismatched: missing"),
    ("kto", {k: v for k, v in EXAMPLES.items() if k != "desirable"}, "desirable: expected a bool"),
    ("kto", {**EXAMPLES, "desirable": torch.ones(4)}, "desirable: expected a bool tensor"),
    ("kto", {**EXAMPLES, "desirable": EXAMPLES["desirable"][:3]}, r"desirable: shape \[3\], exp"),
    ("kto", {**EXAMPLES, "chosen": PAIRS["chosen"]}, "chosen: unknown key"),
    ("kto", PAIRS, "chosen: a batch of pairs, and KTO is for .* give it to dpo_step"),
    ("sigmoid", EXAMPLES, "completion: a batch without pairs, .* give it to kto_step"),
    (
        "sigmoid",
        _ahead(PAIRS, chosen=FOUR, rejected=FOUR, mismatched=FOUR),
        "reference_logps.mismatched: unknown side; expected chosen and rejected alone",
    ),
    (
        "kto",
        _ahead(EXAMPLES, completion=FOUR, mismatched=FOUR, chosen=FOUR),
        "reference_logps.chosen: unknown side; expected completion and mismatched alone",
    ),
    ("kto", {**EXAMPLES, "mismatched": formulas.side(0, 3, 8)}, "has 4 examples and mismatched 3"),
    ("kto", _ahead(EXAMPLES, completion=FOUR), r"reference_logps.mismatched: expected a floating"),
    ("sigmoid", {**PAIRS, "rejected": formulas.side(0, 3, 8)}, "chosen has 4 examples and rejec"),
    ("sigmoid", _ahead(PAIRS, chosen=FOUR), "reference_logps.rejected: expected a floating"),
    ("sigmoid", {**PAIRS, "reference_logps": FOUR}, "reference_logps.chosen: expected a floating"),
    (
        "sigmoid",
        _ahead(PAIRS, chosen=torch.zeros(3), rejected=FOUR),
        r"reference_logps.chosen: shape \[3\], expected \[4\], or by token \[4, 7\]",
    ),
    (
        "sigmoid",
        _ahead(PAIRS, chosen=torch.zeros(4, 7), rejected=torch.zeros(4, 7)),
        r"reference_logps.rejected: shape \[4, 7\], expected \[4\], or by token \[4, 9\]",
    ),
    (
        "sigmoid",
        _ahead(PAIRS, chosen=FOUR, rejected=SIX),
        r"chosen has shape \[4\] and rejected \[4, 9\]; expected sums of both, or both by token",
    ),
    (
        "ipo",
        _ahead(PAIRS, chosen=torch.zeros(4, 7), rejected=FOUR),
        r"chosen has shape \[4, 7\] and rejected \[4\]; expected sums of both",
    ),
    (
        "kto",
        _ahead(EXAMPLES, completion=torch.zeros(4, 7), mismatched=FOUR),
        r"completion has shape \[4, 7\] and mismatched \[4\]; expected sums of both",
    ),
    (
        "sigmoid",
        _ahead(PAIRS, chosen=FOUR, rejected=torch.full((4,), NAN)),
        "reference_logps.rejected: not finite",
    ),
    ("sigmoid", _ahead(PAIRS, chosen=FOUR.long(), rejected=FOUR), "chosen: expected a floating"),
    ("ld", _ahead(PAIRS, chosen=FOUR, rejected=FOUR), "sums over completions, and ld_alpha weighs"),
]


@pytest.mark.parametrize(("case", "batch", "message"), BATCHES)
def test_a_batch_that_makes_no_sense_is_refused_and_said_where(
    case: str, batch: Any, message: str
) -> None:
    """Before any compute; and by its number where it is one of several micro-batches."""
    step, state = _started(case, "decoder")
    with pytest.raises(ft.BatchError, match=message):
        step(state, batch)
    with pytest.raises(ft.BatchError, match=f"micro-batch 1: .*{message}"):
        step(state, [formulas.batch_of(case), batch])
    with pytest.raises(ft.BatchError, match=f"evaluation batch 1: .*{message}"):
        ft.evaluate(step, state, [formulas.batch_of(case), batch])


@pytest.mark.parametrize(("case", "name"), [("sigmoid", "dpo_step"), ("kto", "kto_step")])
def test_no_reference_at_all_is_named(case: str, name: str) -> None:
    architecture, params, buffers = zoo.split("decoder")
    step = formulas.step_of(case, architecture, None)
    with pytest.raises(ft.BatchError, match=f"missing, and the step has no reference; .*{name}"):
        step(step.init(params, buffers), formulas.batch_of(case))


def test_identical_texts_are_refused_by_the_data_and_dropped_where_asked() -> None:
    records = [
        {"prompt": "a", "chosen": "yes", "rejected": "no"},
        {"prompt": "b", "chosen": "so", "rejected": "so"},
    ]
    options: Any = {"time": 16, "batch_size": 1}
    tokenizer = ft.data.ByteTokenizer()
    with pytest.raises(ft.DataError, match="record 1: chosen and rejected are the same text"):
        ft.data.preference(records, tokenizer, **options)
    assert len(ft.data.preference(records, tokenizer, drop_identical=True, **options)) == 1
