"""Bad input is answered before any compute, and the answer names what, where and what to do."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
import torch
import zoo

import functrain as ft


def _step(**options: Any) -> tuple[Any, Any]:
    architecture, params, buffers = zoo.split("tied")
    step = ft.pretrain_step(architecture, ft.optim.adamw(1e-2), **options)
    return step, step.init(params, buffers)


def _changed(**changes: Any) -> dict[str, Any]:
    return {k: v for k, v in {**zoo.batch(), **changes}.items() if v is not None}


IDS = zoo.batch()["input_ids"]
BATCHES: list[tuple[str, Any, str]] = [
    ("float ids", _changed(input_ids=IDS.float()), r"input_ids: dtype float32, expected int64"),
    ("bool labels", _changed(labels=IDS > 3), r"labels: dtype bool, expected int64"),
    ("uint8 ids", _changed(input_ids=IDS.to(torch.uint8)), r"input_ids: dtype uint8"),
    ("a list", _changed(input_ids=IDS.tolist()), r"input_ids: expected a tensor, got list"),
    ("one row", _changed(input_ids=IDS[0], labels=IDS[0]), r"input_ids: shape \[8\], expected"),
    ("other shape", _changed(labels=IDS[:, :5]), r"labels: shape \[4, 5\] differs .* \[4, 8\]"),
    ("id too large", _changed(input_ids=IDS + 40), r"input_ids: \d+ at \[\d, \d\] is out of range"),
    ("id negative", _changed(input_ids=IDS - 40), r"input_ids: -\d+ at .*expected \[0, 31\)"),
    ("label too large", _changed(labels=IDS + 40), r"labels: \d+ at .* or -100 for no target"),
    ("label negative", _changed(labels=IDS - 40), r"labels: -\d+ at .* or -100 for no target"),
    ("no target", _changed(labels=IDS * 0 - 100), r"labels: every position is -100"),
    ("empty", _changed(input_ids=IDS[:0], labels=IDS[:0]), r"input_ids: shape \[0, 8\]"),
    ("no labels", _changed(labels=None), r"labels: missing"),
    ("no ids", _changed(input_ids=None), r"input_ids: missing"),
    ("a typo", _changed(label=IDS), r"label: unknown key; did you mean 'labels'"),
    ("mask of 2", _changed(attention_mask=IDS * 0 + 2), r"attention_mask: 2 at"),
    ("positions", _changed(position_ids=IDS * 0 - 1), r"position_ids: -1 at"),
    ("not a mapping", IDS, r"expected a mapping with input_ids and labels|micro-batch"),
    ("no micro-batch", [], r"empty sequence of micro-batches"),
    ("a bad one of two", [zoo.batch(), _changed(labels=None)], r"micro-batch 1: labels: missing"),
]


@pytest.mark.parametrize(
    ("batch", "message"), [b[1:] for b in BATCHES], ids=[b[0] for b in BATCHES]
)
def test_a_bad_batch_is_refused_and_the_state_is_as_it_was(batch: Any, message: str) -> None:
    step, state = _step()
    before = ft.fingerprint(state)
    for donate in (False, True):
        with pytest.raises(ft.BatchError, match=message):
            step(state, batch, donate=donate)
    assert ft.fingerprint(state) == before


PAIRS: list[tuple[str, Any, str]] = [
    ("no rejected", {"chosen": zoo.batch()}, "rejected: missing"),
    ("other count", {"chosen": zoo.batch(), "rejected": zoo.batch(examples=3)}, "chosen has 4"),
    (
        "no completion",
        {"chosen": zoo.batch(), "rejected": _changed(labels=IDS * 0 - 100)},
        r"rejected.labels: example 0 has no completion token",
    ),
    (
        "a typo",
        {**zoo.pairs(), "reference_logp": {}},
        "unknown key; did you mean 'reference_logps'",
    ),
    (
        "logps of another shape",
        {**zoo.pairs(), "reference_logps": {"chosen": torch.zeros(3), "rejected": torch.zeros(4)}},
        r"reference_logps.chosen: shape \[3\], expected \[4\]",
    ),
    (
        "integer logps",
        {**zoo.pairs(), "reference_logps": {"chosen": IDS[:, 0], "rejected": IDS[:, 0]}},
        "reference_logps.chosen: expected a floating tensor",
    ),
    (
        "logps not finite",
        {
            **zoo.pairs(),
            "reference_logps": {"chosen": torch.zeros(4), "rejected": torch.full((4,), torch.nan)},
        },
        "reference_logps.rejected: not finite",
    ),
    ("ids", {**zoo.pairs(), "chosen": _changed(input_ids=IDS + 99)}, "chosen.input_ids: .* range"),
]


@pytest.mark.parametrize(("batch", "message"), [b[1:] for b in PAIRS], ids=[b[0] for b in PAIRS])
def test_a_bad_preference_batch_is_refused(batch: Any, message: str) -> None:
    architecture, params, buffers = zoo.split("tied")
    step = ft.dpo_step(architecture, ft.optim.adamw(), reference=ft.trees.clone(params))
    with pytest.raises(ft.BatchError, match=message):
        step(step.init(params, buffers), batch)


def test_a_missing_reference_is_named() -> None:
    architecture, params, buffers = zoo.split("tied")
    step = ft.dpo_step(architecture, ft.optim.adamw())
    with pytest.raises(ft.BatchError, match=r"reference_logps: missing, and the step has no"):
        step(step.init(params, buffers), zoo.pairs())


def test_micro_batches_that_do_not_divide_are_named() -> None:
    step, state = _step(microbatches=3)
    with pytest.raises(ft.BatchError, match="microbatches=3 does not divide the batch's 4"):
        step(state, zoo.batch())


OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"precision": "bf61"}, "precision: 'bf61' is unknown; did you mean 'bf16'"),
    ({"microbatches": 0}, "microbatches: 0"),
    ({"microbatches": 2.0}, "microbatches: 2.0"),
    ({"max_grad_norm": 0.0}, "max_grad_norm: 0.0"),
    ({"max_grad_norm": float("nan")}, "max_grad_norm: nan"),
    ({"ema_decay": 1.0}, "ema_decay: 1.0"),
]


@pytest.mark.parametrize(("options", "message"), OPTIONS)
def test_a_bad_option_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ft.ConfigError, match=message):
        _step(**options)


PREFERENCES: list[tuple[dict[str, Any], str]] = [
    ({"loss": "sigmod"}, "loss: 'sigmod' is unknown; did you mean 'sigmoid'"),
    ({"beta": 0.0}, "beta: 0.0"),
    ({"beta": float("inf")}, "beta: inf"),
    ({"label_smoothing": 0.5}, "label_smoothing: 0.5"),
    ({"loss": "hinge", "label_smoothing": 0.1}, "'hinge' loss has none"),
]


@pytest.mark.parametrize(("options", "message"), PREFERENCES)
def test_a_bad_preference_option_is_named(options: dict[str, Any], message: str) -> None:
    architecture, _, _ = zoo.split("tied")
    with pytest.raises(ft.ConfigError, match=message):
        ft.dpo_step(architecture, ft.optim.adamw(), **options)


@pytest.mark.parametrize("seed", [-1, 2**63, 1.5, True, "0"])
def test_a_bad_seed_is_named(seed: Any) -> None:
    architecture, params, buffers = zoo.split("tied")
    step = ft.pretrain_step(architecture, ft.optim.adamw())
    with pytest.raises(ft.ConfigError, match="seed: expected an integer"):
        step.init(params, buffers, seed=seed)


def test_a_reference_of_another_architecture_is_named() -> None:
    architecture, _, _ = zoo.split("tied")
    _, other, _ = zoo.split("normed")
    with pytest.raises(ft.ArchitectureError, match="reference: missing"):
        ft.dpo_step(architecture, ft.optim.adamw(), reference=other)


def test_params_of_another_architecture_are_named() -> None:
    architecture, params, buffers = zoo.split("tied")
    step = ft.pretrain_step(architecture, ft.optim.adamw())
    renamed = {("mix.wieght" if n == "mix.weight" else n): t for n, t in params.items()}
    with pytest.raises(ft.ArchitectureError, match=r"missing 'mix.weight'.*did you mean"):
        step.init(renamed, buffers)
    cut = {**params, "mix.bias": params["mix.bias"][:3]}
    with pytest.raises(ft.StateError, match=r"params/mix.bias: shape \[3\], expected \[16\]"):
        step.init(cut, buffers)


def test_a_consumed_state_is_refused_by_name() -> None:
    step, state = _step(donate=True)
    params = state.params
    new, _ = step(state, zoo.batch())
    for read in (
        lambda: step(state, zoo.batch()),
        lambda: state.params,
        lambda: state.step,
        lambda: params["mix.bias"],
        lambda: list(params),
        lambda: len(params),
        lambda: dict(params),
        lambda: ft.fingerprint(state),
        lambda: attrs.evolve(state, step=3),
    ):
        with pytest.raises(ft.ConsumedStateError, match="donated to the step that made step 1"):
            read()
    assert "consumed" in repr(state)
    assert new.step == 1


def test_donating_what_the_reference_needs_is_refused() -> None:
    architecture, params, buffers = zoo.split("tied")
    step = ft.dpo_step(architecture, ft.optim.adamw(), reference=params)
    state = step.init(params, buffers)
    before = ft.fingerprint(state)
    with pytest.raises(ft.AliasError, match="shares storage with"):
        step(state, zoo.pairs(), donate=True)
    assert ft.fingerprint(state) == before
    # A step that always donates takes a copy at `init` instead.
    always = attrs.evolve(step, donate=True)
    always(always.init(params, buffers), zoo.pairs())
    assert ft.fingerprint(state) == before


def test_a_state_of_another_step_is_named() -> None:
    step, state = _step()
    other = attrs.evolve(step, optimizer=ft.optim.sgd())
    with pytest.raises(ft.StateError, match=r"this state is adamw's .* optimizer is SGD"):
        other(state, zoo.batch())
    scaled = attrs.evolve(step, precision="fp16")
    with pytest.raises(ft.StateError, match=r"scaler: .*step.adopt"):
        scaled(state, zoo.batch())
    averaged = attrs.evolve(step, ema_decay=0.9)
    with pytest.raises(ft.StateError, match=r"average: .*step.adopt"):
        averaged(state, zoo.batch())
    with pytest.raises(ft.StateError, match=r"expected a TrainState from step.init, got dict"):
        step({}, zoo.batch())


def test_nothing_to_evaluate_is_named() -> None:
    step, state = _step()
    with pytest.raises(ft.BatchError, match="nothing to evaluate"):
        ft.evaluate(step, state, [])


def test_a_module_that_was_split_before_is_named() -> None:
    architecture, _, _ = zoo.split("tied")
    with pytest.raises(ft.ArchitectureError, match="on the meta device"):
        ft.split(architecture)
