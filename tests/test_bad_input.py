"""Bad input is answered before any compute, and the answer names what, where and what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attrs
import numpy as np
import pytest
import torch
import zoo

import functrain as ft
from functrain.objectives import batches


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
    ({"max_grad_norm": "1"}, "max_grad_norm: '1'"),
    ({"ema_decay": "x"}, "ema_decay: 'x'"),
    ({"precision": None}, "precision: None is unknown"),
    ({"precision": torch.bfloat16}, "precision: torch.bfloat16 is unknown"),
    ({"max_grad_nrm": 1.0}, "max_grad_nrm: unknown option; did you mean 'max_grad_norm'"),
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
    ({"label_smoothing": None}, "label_smoothing: None"),
    ({"beta": "0.1"}, "beta: '0.1'"),
    ({"refrence": {}}, "refrence: unknown option; did you mean 'reference'"),
    ({"reference_mixups": 1.0}, "reference_mixups: unknown option; did you mean 'reference_mixup'"),
    ({"max_grad_nrm": 1.0}, "max_grad_nrm: unknown option; did you mean 'max_grad_norm'"),
    ({"running": {}}, "running: unknown option"),
    ({"reference": 3}, "reference: expected params, .* got int"),
    ({"reference": torch.nn.Linear(2, 2)}, "reference: expected params, .* got Linear"),
    ({"loss": "hinge", "label_smoothing": 0.1}, "'hinge' loss has none"),
]


@pytest.mark.parametrize(("options", "message"), PREFERENCES)
def test_a_bad_preference_option_is_named(options: dict[str, Any], message: str) -> None:
    architecture, _, _ = zoo.split("tied")
    with pytest.raises(ft.ConfigError, match=message):
        ft.dpo_step(architecture, ft.optim.adamw(), **options)


def test_a_hint_is_of_the_step_and_of_its_objective() -> None:
    architecture, _, _ = zoo.split("tied")
    with pytest.raises(ft.ConfigError, match=r"undesirable_wight: .* 'undesirable_weight'"):
        ft.kto_step(architecture, ft.optim.adamw(), undesirable_wight=1.0)  # type: ignore[call-arg]
    with pytest.raises(ft.ConfigError, match="haed: unknown option; did you mean 'head'"):
        ft.sft_step(architecture, ft.optim.adamw(), haed="full")  # type: ignore[call-arg]
    with pytest.raises(ft.ConfigError, match=r"give it to UnpairedOptimization\(beta=…\)"):
        ft.make_step(
            ft.objectives.UnpairedOptimization(),
            ft.optim.adamw(),
            architecture=architecture,
            beta=0.2,  # type: ignore[call-arg]
        )


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
    with pytest.raises(ft.StateError, match=r"state: expected a TrainState, .* got dict"):
        step({}, zoo.batch())


def test_nothing_to_evaluate_is_named() -> None:
    step, state = _step()
    with pytest.raises(ft.BatchError, match="nothing to evaluate"):
        ft.evaluate(step, state, [])


def test_a_module_that_was_split_before_is_named() -> None:
    architecture, _, _ = zoo.split("tied")
    with pytest.raises(ft.ArchitectureError, match="on the meta device"):
        ft.split(architecture)


ROWS = {
    "labels of more rows": (_changed(labels=torch.zeros(8, 8, dtype=torch.int64)), "labels"),
    "a mask of more rows": (
        _changed(attention_mask=torch.ones(7, 8, dtype=torch.int64)),
        "attention_mask",
    ),
    "no mask": ({**zoo.batch(), "attention_mask": None}, "attention_mask: expected a tensor"),
    "a number": (_changed(idx=3), "idx: unknown key"),
    "labels of fewer rows": (_changed(labels=torch.zeros(2, 8, dtype=torch.int64)), "labels"),
    "ids of three dimensions": (_changed(input_ids=torch.zeros(1, 4, 8).long()), r"\[1, 4, 8\]"),
    "nothing": (None, "expected a mapping or a sequence of micro-batches, got NoneType"),
    "a number alone": (3, "expected a mapping or a sequence of micro-batches, got int"),
}


@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize("name", ROWS)
def test_what_does_not_fit_together_is_named_before_it_is_sliced(
    name: str, microbatches: int
) -> None:
    batch, message = ROWS[name]
    step, state = _step(microbatches=microbatches)
    with pytest.raises(ft.BatchError, match=message):
        step(state, batch)


@pytest.mark.parametrize("microbatches", [1, 2])
def test_pairs_that_are_none_are_named(microbatches: int) -> None:
    architecture, params, buffers = zoo.split("tied")
    step = ft.dpo_step(architecture, ft.optim.adamw(), reference=params, microbatches=microbatches)
    state = step.init(ft.trees.clone(params), buffers)
    uneven = {"chosen": zoo.batch(), "rejected": zoo.batch(examples=6)}
    logps = {"chosen": torch.zeros(6), "rejected": torch.zeros(9)}
    for bad in (uneven, {**zoo.pairs(), "reference_logps": logps}, {"chosen": None}):
        with pytest.raises(ft.BatchError):
            step(state, bad)
    with pytest.raises(ft.BatchError):
        step(state, {**zoo.pairs(), "reference_logps": None})


def test_slicing_refuses_what_a_gradient_of_ones_own_would_be_given() -> None:
    from functrain.objectives.batches import split_batch

    with pytest.raises(ft.BatchError, match=r"labels: 8 rows, and the batch has 4 examples"):
        split_batch(_changed(labels=torch.zeros(8, 8)), 2)


class Wider(zoo.Tied):
    def __init__(self) -> None:
        super().__init__(width=20)


def test_values_of_another_shape_are_named() -> None:
    """The names fit; without a look at the shapes both would compute something."""
    architecture, params, buffers = zoo.split("tied")
    _, other, others = ft.split(Wider())
    with pytest.raises(ft.StateError, match=r"reference/embedding.weight: shape \[31, 20\]"):
        ft.dpo_step(architecture, ft.optim.adamw(), reference=other)
    step = ft.pretrain_step(architecture, ft.optim.adamw())
    wide, _, _ = ft.split(Wider())
    foreign = ft.pretrain_step(wide, ft.optim.adamw()).init(other, others)
    with pytest.raises(ft.StateError, match=r"params/embedding.weight: shape \[31, 20\]"):
        step(foreign, zoo.batch())
    with pytest.raises(ft.StateError, match=r"params/embedding.weight: shape \[31, 20\]"):
        ft.evaluate(step, foreign, [zoo.batch()])
    arrays = {name: tensor.numpy() for name, tensor in params.items()}
    with pytest.raises(ft.StateError, match=r"params/embedding.weight: expected a tensor, got nd"):
        step.init(arrays, buffers)  # type: ignore[arg-type]
    with pytest.raises(ft.StateError, match=r"buffers: expected a mapping.*got NoneType"):
        step.init(params, None)  # type: ignore[arg-type]


class Learned(torch.nn.Module):
    """Tokens and positions in two tables, of which nothing says which is which."""

    def __init__(self, head: int = 31) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Embedding(31, 8), torch.nn.Embedding(9, 8)
        self.out = torch.nn.Linear(8, head)

    def forward(self, input_ids: Any) -> Any:
        places = torch.arange(input_ids.shape[1])
        return self.out(self.first(input_ids) + self.second(places))


@pytest.mark.parametrize(
    ("head", "time", "change"),
    [(30, 8, {"input_ids": 31}), (30, 8, {"labels": 30}), (31, 10, {})],
    ids=["an id", "a label", "a position"],
)
def test_an_index_that_only_the_model_can_judge_is_a_bad_batch(
    head: int, time: int, change: dict[str, int]
) -> None:
    architecture, params, buffers = ft.split(Learned(head))
    step = ft.pretrain_step(architecture, ft.optim.adamw())
    state = step.init(params, buffers)
    batch = zoo.batch(time=time)
    batch["labels"] = batch["labels"].clamp(max=head - 1)
    for key, value in change.items():
        batch[key] = batch[key].clone()
        batch[key][1, 2] = value
    for run in (lambda: step(state, batch), lambda: ft.evaluate(step, state, [batch])):
        with pytest.raises(ft.BatchError, match="the model has no place for one of its indices"):
            run()


def test_a_whole_number_cannot_be_trained() -> None:
    architecture, params, buffers = zoo.split("tied")
    step = ft.pretrain_step(architecture, ft.optim.adamw())
    with pytest.raises(ft.StateError, match=r"params/mix.bias: dtype torch.int64, which cannot"):
        step.init({**params, "mix.bias": torch.zeros(16, dtype=torch.int64)}, buffers)


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (ft.optim.adamw, r"has not been called: adamw\(\)"),
        (torch.optim.AdamW, r"from_torch\(AdamW, …\)"),
        (torch.optim.AdamW([torch.zeros(1)]), r"from_torch\(torch.optim.AdamW, …\)"),
        ("adamw", "optimizer: str, expected one of functrain.optim"),
        (SimpleNamespace(init=1, update=2, lr=3), "optimizer: SimpleNamespace, .* a `kind` too"),
    ],
    ids=["not called", "a class of torch's", "an optimizer of torch's", "a name", "no kind"],
)
def test_what_is_no_optimizer_is_named(optimizer: Any, message: str) -> None:
    architecture, _, _ = zoo.split("tied")
    for schedule in (None, 1e-3):
        with pytest.raises(ft.ConfigError, match=message):
            ft.pretrain_step(architecture, optimizer, schedule=schedule)


def test_what_is_no_architecture_is_named() -> None:
    with pytest.raises(ft.ConfigError, match=r"architecture: expected the nn.Module"):
        ft.pretrain_step({}, ft.optim.adamw())  # type: ignore[arg-type]
    with pytest.raises(ft.ArchitectureError, match=r"expected an nn.Module, got dict"):
        ft.split({})  # type: ignore[arg-type]
    architecture, _, _ = ft.split(zoo.Tied().requires_grad_(False))
    with pytest.raises(ft.ConfigError, match="every parameter is frozen"):
        ft.pretrain_step(architecture, ft.optim.adamw())


def test_what_is_no_state_is_named(tmp_path: Any) -> None:
    step, state = _step()
    for use in (
        ft.fingerprint,
        ft.clone,
        step.adopt,
        lambda s: ft.evaluate(step, s, [zoo.batch()]),
    ):
        with pytest.raises(ft.StateError, match=r"expected a TrainState, .* got int"):
            use(3)
    with pytest.raises(ft.StateError, match=r"expected a TrainState, .* got Tensors"):
        ft.save(tmp_path, state.params)
    ft.save(tmp_path, state)
    for like in (step, None):
        with pytest.raises(ft.StateError, match="like: expected a TrainState"):
            ft.load(tmp_path, like=like)


def test_a_sparse_gradient_is_named() -> None:
    module = zoo.Tied()
    module.embedding.sparse = True
    module.head.weight = torch.nn.Parameter(torch.randn(31, 16))
    architecture, params, buffers = ft.split(module)
    step = ft.pretrain_step(architecture, ft.optim.adamw())
    with pytest.raises(ft.ArchitectureError, match=r"embedding.weight: its gradient is sparse"):
        step(step.init(params, buffers), zoo.batch())


def _objective(**members: Any) -> Any:
    """The language modelling objective as a user's own class, with other members."""
    made = ft.objectives.LanguageModeling()
    names = ("name", "mode", "batch_coupled", "check", "weight", "check_weight", "kept")
    found = {name: getattr(made, name) for name in names}
    call = staticmethod(made.__call__)
    kept = {n: each for n, each in {**found, "__call__": call, **members}.items() if each != "none"}
    return type("Own", (), {n: staticmethod(e) if callable(e) else e for n, e in kept.items()})()


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (lambda model, batch: model(**batch), r"<lambda> has no name, mode, .*kept; expected one"),
        (torch.nn.CrossEntropyLoss(), "CrossEntropyLoss has no name, mode"),
        (ft.objectives.LanguageModeling, r"it has not been made: LanguageModeling\(\)"),
        (_objective(kept="none"), "Own has no kept; expected one"),
        (_objective(mode="training"), "mode: 'training', expected 'train' or 'eval'"),
        (_objective(mode=True), "mode: True, expected 'train' or 'eval'"),
    ],
)
def test_what_is_no_objective_is_named(objective: Any, message: str) -> None:
    """Another mode than these two was eval, so that a model with dropout trained without it."""
    architecture, params, buffers = zoo.split("tied")
    with pytest.raises(ft.ConfigError, match=message):
        ft.make_step(objective, ft.optim.adamw(), architecture=architecture)
    step = ft.make_step(_objective(), ft.optim.adamw(), architecture=architecture)
    step(step.init(params, buffers), zoo.batch())


def test_arguments_in_another_order_are_answered_with_theirs() -> None:
    step, state = _step()
    given: Any = (state, step)
    with pytest.raises(ft.ConfigError, match=r"step: TrainState; expected evaluate\(step, state"):
        ft.evaluate(*given, [zoo.batch()])


@pytest.mark.parametrize(
    "clip",
    [
        lambda given: ft.clip_by_global_norm(given, 1.0),
        lambda given: ft.clip_by_value(given, 1.0),
        lambda given: ft.adaptive_clip(given, {}),
        lambda given: ft.adaptive_clip({}, given),
    ],
)
def test_parameters_of_a_module_are_no_gradients(clip: Any) -> None:
    """What torch's clipping takes."""
    with pytest.raises(ft.ConfigError, match=r"(grads|params): generator, expected a mapping"):
        clip(torch.nn.Linear(2, 2).parameters())


@pytest.mark.parametrize(
    ("grad", "message"),
    [
        (None, "^grads/a: NoneType, expected a tensor; leave out"),
        (torch.eye(2).to_sparse(), r"^grads/a: torch.sparse_coo, expected a dense tensor; a.to_de"),
    ],
)
def test_gradients_that_are_not_dense_are_named(grad: Any, message: str) -> None:
    for clip in (
        lambda: ft.clip_by_global_norm({"a": grad}, 1.0),
        lambda: ft.clip_by_value({"a": grad}, 1.0),
        lambda: ft.adaptive_clip({"a": grad}, {"a": torch.ones(2, 2)}),
    ):
        with pytest.raises(ft.ConfigError, match=message):
            clip()


def test_what_is_no_module_or_has_no_params_is_named() -> None:
    architecture, params, buffers = zoo.split("tied")
    given: Any = "tied"
    for call in (
        lambda: ft.value_and_grad(_objective(), given),
        lambda: ft.lora.attach(given, params),
        lambda: ft.bound(given, params, buffers, "eval").__enter__(),
    ):
        with pytest.raises(ft.ArchitectureError, match=r"expected the nn\.Module .*, got str"):
            call()
    with pytest.raises(ft.StateError, match=r"params: expected a mapping .*, got NoneType"):
        ft.lora.attach(architecture, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("key", ["input_ids", "labels"])
@pytest.mark.parametrize("made", [lambda t: t.to("meta"), lambda t: t.to_sparse()])
def test_a_batch_without_dense_values_is_named(key: str, made: Any) -> None:
    step, state = _step()
    batch = {**zoo.batch(), key: made(zoo.batch()[key])}
    for call in (lambda: step(state, batch), lambda: ft.evaluate(step, state, [batch])):
        with pytest.raises(ft.BatchError, match=f"{key}: .*, expected a dense tensor with values"):
            call()


@pytest.mark.parametrize("betas", [(0.9,), (), (0.9, 0.99, 0.999), 0.9, np.float64(0.9), {}, None])
def test_betas_are_two(betas: Any) -> None:
    for made in (ft.optim.adamw, ft.optim.adam):
        with pytest.raises(ft.ConfigError, match=r"betas: .*, expected two numbers"):
            made(betas=betas)
    with pytest.raises(ft.ConfigError, match=r"betas: .*, expected two numbers"):
        ft.optim.adamw(groups=[ft.optim.group(lambda *_: True, betas=betas)])


@pytest.mark.parametrize("end", ["</s>", ["</s>"], [1.5], [None]])
def test_an_end_is_the_id_of_a_token(end: Any) -> None:
    """The text of one would never be met."""
    architecture, params, buffers = zoo.split("tied")
    with pytest.raises(ft.ConfigError, match=r"^end: .*, expected the id of a token"):
        ft.models.generate(architecture, params, buffers, [1], max_new_tokens=2, end=end)
    plain = ft.models.generate(architecture, params, buffers, [1], max_new_tokens=2)
    one = plain[0]
    for ends in (one, [np.int64(one)], np.array(one), torch.tensor(one), torch.tensor([one])):
        given: Any = {"max_new_tokens": 2, "end": ends}
        assert ft.models.generate(architecture, params, buffers, [1], **given) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"autocast": "bf16"}, r"precision: autocast='bf16', expected torch\.bfloat16, say"),
        ({"autocast": torch.int32}, r"precision: autocast=torch\.int32"),
        ({"cast": torch.int64}, r"precision: cast=torch\.int64, expected"),
        ({"loss_scale": "yes"}, "loss_scale: 'yes', expected True or False"),
        ({"loss_scale": True, "growth_interval": 2.5}, "growth_interval=2.5, expected an integer"),
        ({"loss_scale": True, "initial_scale": "x"}, "initial loss scale: 'x' is not a positive f"),
        ({"loss_scale": True, "initial_scale": 10**400}, "initial loss scale: 1000.* positive fin"),
    ],
)
def test_a_precision_is_checked_where_it_is_made(options: Any, message: str) -> None:
    with pytest.raises(ft.ConfigError, match=message):
        ft.precision.Precision(name="own", **options)


@pytest.mark.parametrize("name", ["shuffle", "group_by_length"])
def test_texts_are_neither_true_nor_false(name: str) -> None:
    pairs = [{"prompt": "a", "completion": "b"}] * 2
    options: Any = {"time": 8, "batch_size": 1, name: "false"}
    with pytest.raises(ft.DataError, match=f"{name}: 'false', expected True or False"):
        ft.data.chat(pairs, ft.data.ByteTokenizer(), **options)


def test_padding_by_no_column_proves_nothing() -> None:
    step, state = _step()
    with pytest.raises(ft.ConfigError, match="columns: 0, expected at least 1"):
        ft.testing.assert_padding_invariant(step, state, zoo.batch(), columns=0)


def test_slots_may_be_plain_mappings() -> None:
    """As params may be: moments that are begun anew by hand."""
    step, state = _step()
    state, _ = step(state, zoo.batch())
    zeros = {
        slot: {name: torch.zeros_like(tensor) for name, tensor in items.items()}
        for slot, items in state.optimizer.slots.items()
    }
    anew = attrs.evolve(state, optimizer=attrs.evolve(state.optimizer, slots=zeros))
    for donate in (False, True):
        after, _ = step(ft.clone(anew), zoo.batch(1), donate=donate)
        assert after.step == 2


def test_complex_gradients_are_not_clamped() -> None:
    with pytest.raises(ft.ConfigError, match=r"^grads/a: torch\.complex64, which has no order"):
        ft.clip_by_value({"a": torch.ones(2, dtype=torch.complex64)}, 1.0)


@pytest.mark.parametrize("rate", [np.float32(1e-3), torch.tensor(1e-3)])
def test_a_learning_rate_of_another_library_is_named(rate: Any) -> None:
    kind = type(rate).__name__
    with pytest.raises(ft.ConfigError, match=rf"adamw: lr is a {kind}, .*; float\(0\.001.*\), say"):
        ft.optim.adamw(rate)


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("average", {"ema_decay": 0.9}),
        ("reference", {"reference_mixup": 0.5, "reference_sync": 1}),
    ],
)
def test_what_moves_towards_the_params_has_their_shapes(
    field: str, options: dict[str, Any]
) -> None:
    """Another would be broadcast."""
    architecture, params, buffers = zoo.split("tied")
    optimizer = ft.optim.adamw()
    if field == "average":
        step = ft.pretrain_step(architecture, optimizer, **options)
        batch: Any = zoo.batch()
    else:
        step = ft.dpo_step(architecture, optimizer, reference=ft.trees.clone(params), **options)
        batch = {side: zoo.batch(n) for n, side in enumerate(("chosen", "rejected"))}
    state = step.init(params, buffers)
    values = getattr(state, field)
    short = {name: tensor[:1] for name, tensor in values.items()}
    with pytest.raises(ft.FunctrainError, match=rf"{field}/.*: shape \[1"):
        step(attrs.evolve(state, **{field: ft.trees.Tensors(short)}), batch)
    some = {name: tensor for name, tensor in values.items() if name != min(values)}
    with pytest.raises(ft.FunctrainError, match=f"{field}: missing '{min(values)}'"):
        step(attrs.evolve(state, **{field: ft.trees.Tensors(some)}), batch)


@pytest.mark.parametrize("value", [["a"], 0.5, None, np.zeros(2)])
def test_what_is_no_tensor_in_a_batch_of_ones_own_is_named(value: Any) -> None:
    for batch in ({"x": torch.ones(2), "y": value}, {"side": {"y": value}}):
        with pytest.raises(
            ft.BatchError, match=f"y: expected a tensor, got {type(value).__name__}"
        ):
            batches.to_device(batch, torch.device("cpu"))


def test_a_number_in_a_batch_that_is_cut_is_named() -> None:
    with pytest.raises(
        ft.BatchError, match="y: expected a tensor, got a 0-d one, which has no row"
    ):
        batches.split_batch({"x": torch.ones(2), "y": torch.tensor(0.5)}, 2)


ARCHITECTURE, PARAMS, BUFFERS = zoo.split("tied")
ADAPTED, _ = ft.lora.attach(ARCHITECTURE, PARAMS, ft.lora.LoRA(rank=2, targets=("mix",)))
STEP = ft.pretrain_step(ARCHITECTURE, ft.optim.adamw())
OPTIMIZER = ft.optim.adamw()
BEGUN = OPTIMIZER.init(PARAMS)
ARGUMENTS: list[tuple[str, Callable[[], object], str]] = [
    ("no_decay", lambda: ft.optim.no_decay(PARAMS), "architecture: expected the nn.Module"),
    ("hidden", lambda: ft.optim.hidden_matrices(PARAMS), "architecture: expected the nn.Module"),
    ("init", lambda: OPTIMIZER.init(None), "params: NoneType, expected a mapping"),
    ("init of a module", lambda: OPTIMIZER.init(ARCHITECTURE), "params: .*expected a mapping"),
    ("sgd", lambda: ft.optim.sgd().init(None), "params: NoneType, expected a mapping"),
    ("muon", lambda: ft.optim.muon().init(None), "params: NoneType, expected a mapping"),
    ("grads", lambda: OPTIMIZER.update(None, BEGUN, PARAMS, 1.0), "grads: NoneType, expected"),
    ("no params", lambda: OPTIMIZER.update({}, BEGUN, None, 1.0), "params: NoneType, expected"),
    (
        "a rate",
        lambda: OPTIMIZER.update(PARAMS, BEGUN, PARAMS, None),
        "learning_rate: None, expected a number",
    ),
    ("pattern", lambda: ft.trees.select(PARAMS, ["*"]), r"pattern: \['\*'\], expected a text"),
    ("zeros", lambda: ft.trees.zero(PARAMS, ["*"]), r"pattern: \['\*'\], expected a text"),
    ("nothing", lambda: ft.trees.select(None, "*"), "items: NoneType, expected a mapping"),
    ("schedule", lambda: ft.schedules.named(["cosine"], 1.0), r"schedule: \['cosine'\] is unknown"),
    ("decoder", lambda: ft.models.decoder({}), "config: dict, expected .*DecoderConfig"),
    (
        "width",
        lambda: ft.models.DecoderConfig(vocabulary=8, width=None),
        "width: None, expected an integer of at least 1",
    ),
    (
        "theta",
        lambda: ft.models.DecoderConfig(vocabulary=8, theta="1e4"),
        "theta: '1e4', expected a positive finite number",
    ),
    (
        "tied",
        lambda: ft.models.DecoderConfig(vocabulary=8, tied="no"),
        "tied: 'no', expected True or False",
    ),
    (
        "norm",
        lambda: ft.clip_by_global_norm(PARAMS, 1.0, norm=2.0),
        r"norm: 2\.0, expected a 0-d tensor",
    ),
    (
        "norms",
        lambda: ft.clip_by_global_norm(PARAMS, 1.0, norm=torch.ones(3)),
        r"norm: tensor\(\[1\., 1\., 1\.\]\), expected a 0-d tensor",
    ),
    (
        "weight",
        lambda: ft.value_and_grad(ft.objectives.LanguageModeling(), ARCHITECTURE)(
            PARAMS, BUFFERS, zoo.batch(), weight=2.0
        ),
        r"weight: 2\.0, expected a tensor",
    ),
    (
        "gradients of a state",
        lambda: ft.value_and_grad(ft.objectives.LanguageModeling(), ARCHITECTURE)(
            STEP.init(PARAMS, BUFFERS), BUFFERS, zoo.batch()
        ),
        "params: TrainState, expected a mapping",
    ),
    (
        "bound to a state",
        lambda: ft.bound(ARCHITECTURE, STEP.init(PARAMS, BUFFERS), BUFFERS).__enter__(),
        "params: TrainState, expected a mapping",
    ),
    (
        "generated of a state",
        lambda: ft.models.generate(ARCHITECTURE, PARAMS, None, [1], max_new_tokens=1),
        "buffers: NoneType, expected a mapping",
    ),
    (
        "donated in words",
        lambda: STEP(STEP.init(PARAMS, BUFFERS), zoo.batch(), donate="no"),
        "donate: 'no', expected True, False, or None",
    ),
    ("cached", lambda: ft.ReferenceCache("a.jsonl", PARAMS), "attach: Tensors, expected what"),
    (
        "no pattern",
        lambda: ft.checkpoint.load_tensors("nowhere"),
        "load_tensors: no pattern; give some",
    ),
    (
        "mapped in words",
        lambda: ft.checkpoint.load_tensors("nowhere", "*", mapped="no"),
        "mapped: 'no', expected True or False",
    ),
    (
        "older in words",
        lambda: ft.load("nowhere", like=STEP.init(PARAMS, BUFFERS), older="no"),
        "older: 'no', expected True or False",
    ),
    (
        "strict in words",
        lambda: ft.load("nowhere", like=STEP.init(PARAMS, BUFFERS), strict="no"),
        "strict: 'no', expected True or False",
    ),
    (
        "stop in words",
        lambda: ft.models.generate(ARCHITECTURE, PARAMS, BUFFERS, [1], max_new_tokens=1, stop="x"),
        "stop: 'x', expected a function of the new ids",
    ),
    (
        "no seed",
        lambda: ft.models.generate(
            ARCHITECTURE, PARAMS, BUFFERS, [1], max_new_tokens=1, temperature=1.0, seed=None
        ),
        "seed: None, expected an integer",
    ),
    (
        "finite in words",
        lambda: ft.update_loss_scale(ft.init_loss_scale(), False),
        r"finite: False, expected a tensor \(bool, 0-d\)",
    ),
    (
        "finite as a number",
        lambda: ft.update_loss_scale(ft.init_loss_scale(), torch.tensor(1)),
        r"finite: tensor\(1\), expected a tensor \(bool, 0-d\)",
    ),
    (
        "planned for a number",
        lambda: ft.planning.Job(
            architecture=ARCHITECTURE, params=PARAMS, buffers=BUFFERS, optimizer=3, rows=1, time=8
        ),
        "optimizer: int, expected one of functrain.optim",
    ),
    (
        "exported with a text that was measured",
        lambda: ft.export(
            STEP.init(PARAMS, BUFFERS), ARCHITECTURE, "nowhere", metrics={"loss": "low"}
        ),
        "metrics: 'loss' is 'low', expected a number",
    ),
    (
        "exported of numbers",
        lambda: ft.export(STEP.init(PARAMS, BUFFERS), ARCHITECTURE, "nowhere", data=5),
        "data: 5, expected a text, or None",
    ),
    (
        "a reference of the base's params",
        lambda: ft.lora.reference(ADAPTED, PARAMS),
        "params: missing .*lora_A",
    ),
]


@pytest.mark.parametrize(
    ("call", "message"), [a[1:] for a in ARGUMENTS], ids=[a[0] for a in ARGUMENTS]
)
def test_an_argument_of_another_kind_is_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ft.FunctrainError, match=message):
        call()


def test_a_count_is_a_tensor() -> None:
    step, state = _step()
    counted = attrs.evolve(state, scheduler=attrs.evolve(state.scheduler, count=5))
    with pytest.raises(ft.StateError, match=r"scheduler\.count: 5, expected a tensor"):
        step(counted, zoo.batch())


@pytest.mark.parametrize("value", [None, "low", [1.0, 2.0]])
def test_a_plateau_observes_numbers(value: Any) -> None:
    step, state = _step(schedule=ft.schedules.reduce_on_plateau(1e-3))
    with pytest.raises(ft.ConfigError, match=r"value: .*expected a number"):
        step.observe(state, value)
    with pytest.raises(ft.StateError, match="expected a TrainState"):
        step.observe(None, 1.0)


@pytest.mark.parametrize("path", [None, "", b"run", 5])
def test_what_is_no_path_is_named(path: Any) -> None:
    _, state = _step()
    for call in (
        lambda: ft.save(path, state),
        lambda: ft.load(path, like=state),
        lambda: ft.checkpoint.latest(path),
        lambda: ft.checkpoint.inspect(path),
        lambda: ft.checkpoint.load_tensors(path, "*"),
        lambda: ft.checkpoint.load_model(path, PARAMS, BUFFERS),
        lambda: ft.checkpoint.prune(path, 1),
        lambda: ft.checkpoint.BackgroundWriter(path),
        lambda: ft.models.from_pretrained(path),
        lambda: ft.models.export(state, ARCHITECTURE, path),
        lambda: ft.lora.load_adapter(path, ARCHITECTURE, PARAMS),
    ):
        with pytest.raises(ft.ConfigError, match="expected a path"):
            call()


def test_conditions_are_named(tmp_path: Path) -> None:
    _, state = _step()
    with pytest.raises(ft.ConfigError, match="conditions: 'fast', expected a mapping"):
        ft.save(tmp_path / "run", state, conditions="fast")  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()


def test_an_evaluation_names_it_as_a_step_does() -> None:
    class Own(ft.objectives.LanguageModeling):
        def check(self, batch: Any, vocabulary: int | None) -> None:
            pass

    architecture, params, buffers = zoo.split("tied")
    step = ft.make_step(Own(), ft.optim.adamw(), architecture=architecture)
    state = step.init(params, buffers)
    batch = {**zoo.batch(), "names": ["one", "other"]}
    for run in (lambda: step(state, batch), lambda: ft.evaluate(step, state, [batch])):
        with pytest.raises(ft.BatchError, match="names: "):
            run()


def test_numbers_that_no_float_holds_are_refused() -> None:
    architecture, params, buffers = zoo.split("tied")
    step = ft.pretrain_step(
        architecture, ft.optim.adamw(), schedule=ft.schedules.reduce_on_plateau(1e-3)
    )
    state = step.init(params, buffers)
    with pytest.raises(ft.ConfigError, match=r"value: 1000.*, expected a number"):
        step.observe(state, 10**400)
    huge = attrs.evolve(step, schedule=lambda _count: 10**400)
    with pytest.raises(ft.ConfigError, match="expected a finite learning rate"):
        huge(huge.init(params, buffers), zoo.batch())


# torch's own, of its scripts (2.13).
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_script_of_torch_is_refused() -> None:
    with pytest.raises(ft.ArchitectureError, match=r"split: a module of torch\.jit"):
        ft.split(torch.jit.script(torch.nn.Linear(2, 2)))


def test_a_reference_that_is_not_there_is_not_moved() -> None:
    """By an objective of one's own, which has not refused it itself."""

    class Own(ft.objectives.LanguageModeling):
        reference = None
        reference_mixup = 0.5
        reference_sync = 1

        def carrying(self, reference: Any, running: Any) -> Any:
            return self

        def init_running(self, device: Any) -> Any:
            return None

        def advance(self, running: Any, metrics: Any) -> Any:
            return running

    architecture, params, buffers = zoo.split("tied")
    step = ft.make_step(Own(), ft.optim.adamw(), architecture=architecture)
    with pytest.raises(ft.ConfigError, match=r"reference_mixup: 0\.5, and the objective has no"):
        step.init(params, buffers)


class Carries(ft.objectives.LanguageModeling):
    """Carries the sum of its losses and a number of steps; a test replaces `after`."""

    reference = None
    reference_mixup = None
    reference_sync = 1

    def __init__(self, after: Any) -> None:
        super().__init__()
        object.__setattr__(self, "after", after)

    def carrying(self, reference: Any, running: Any) -> Any:
        return self

    def init_running(self, device: Any) -> Any:
        zero = torch.zeros((), dtype=torch.float64, device=device)
        return ft.trees.Tensors(total=zero, steps=zero.long())

    def advance(self, running: Any, metrics: Any) -> Any:
        return self.after(dict(running), metrics.metric("loss").sum.double())  # type: ignore[attr-defined]


def _carried(running: Any, loss: Any) -> Any:
    return {"total": running["total"] + loss, "steps": running["steps"] + 1}


CARRIED_OTHERWISE: Any = {
    "dtype": (
        lambda r, _: r | {"steps": r["steps"] + 0.5},
        r"running/steps as float32\[\] on cpu, expected int64\[\] on cpu as it was given",
    ),
    "shape": (
        lambda r, loss: r | {"total": (r["total"] + loss).reshape(1)},
        r"running/total as float64\[1\] on cpu, expected float64\[\] on cpu",
    ),
    "number": (lambda r, _: r | {"steps": 1}, "running/steps as int, expected int64"),
    "more": (
        lambda r, loss: r | {"last": loss},
        "returned last, steps, total, expected steps, total, as init_running made",
    ),
    "fewer": (lambda r, _: {"steps": r["steps"]}, "returned steps, expected steps, total"),
    "none": (lambda r, _: None, "returned a NoneType, expected tensors by name"),
    "in place": (
        lambda r, loss: r | {"total": r["total"].add_(loss)},
        "has written into the tensors that it was given",
    ),
}


@pytest.mark.parametrize("case", CARRIED_OTHERWISE)
def test_what_an_objective_carries_keeps_its_form(case: str) -> None:
    """By an objective of one's own; else a resume would fail, or the step after."""
    architecture, params, buffers = zoo.split("tied")
    step = ft.make_step(Carries(_carried), ft.optim.adamw(), architecture=architecture)
    state, metrics = step(step.init(params, buffers), zoo.batch())
    assert type(state.running) is ft.trees.Tensors
    assert float(state.running["total"]) == float(metrics.metric("loss").sum)
    after, message = CARRIED_OTHERWISE[case]
    changed = attrs.evolve(step, objective=Carries(after))
    with pytest.raises(ft.ConfigError, match=f"^objective Carries: its advance .*{message}"):
        changed(state, zoo.batch())


def _fails(running: Any, loss: Any) -> Any:
    raise KeyError("an error of one's own")


@pytest.mark.parametrize(
    "case", [*(each for each in CARRIED_OTHERWISE if each != "in place"), "an error"]
)
def test_nothing_is_lost_where_an_objective_cannot_carry_on(case: str) -> None:
    """A donated state is whole, and goes on as if that step had not been tried."""
    architecture, params, buffers = zoo.split("tied")
    step = ft.make_step(Carries(_carried), ft.optim.adamw(), architecture=architecture)
    state, _ = step(step.init(params, buffers), zoo.batch())
    expected, _ = step(state, zoo.batch())
    after, _ = CARRIED_OTHERWISE.get(case, (_fails, ""))
    with pytest.raises((ft.ConfigError, KeyError)):
        attrs.evolve(step, objective=Carries(after))(state, zoo.batch(), donate=True)
    found, _ = step(state, zoo.batch(), donate=True)
    assert ft.fingerprint(found) == ft.fingerprint(expected)
