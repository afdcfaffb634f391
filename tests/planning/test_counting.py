"""What a plan counts without values is what a step takes with them."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
import torch
from models import families
from torch import Tensor, nn

import functrain as ft
from functrain.cli import known, steps
from functrain.cli.config import Optimizer
from functrain.errors import ConfigError
from functrain.models import DecoderConfig, bare, decoder
from functrain.objectives import chunks, measures
from functrain.planning import Job, count
from functrain.planning.counting import _head_bytes, total

ROWS, TIME = 4, 64
SHAPE = DecoderConfig(vocabulary=300, width=128, layers=2, heads=4, tied=False)
LOW = attrs.evolve(SHAPE, layers=1)
SGD = ft.optim.sgd(1e-3)  # where moments are not what is counted: they take as long as a layer
OPTIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"precision": "bf16"},
    "bf16 params": {"precision": "bf16_params"},
    "recomputed": {"checkpoint": "model.layers.*"},
    "recomputed in part": {"checkpoint": "model.layers.*.mlp", "precision": "bf16"},
    "recomputed selectively": {"checkpoint": "model.layers.*", "recompute": "selective"},
    "micro-batches": {"microbatches": 2},
}


def job(make: Any, **options: Any) -> Job:
    architecture, params, buffers = bare(make)
    given = {"optimizer": ft.optim.adamw(), "rows": ROWS, "time": TIME, **options}
    return Job(architecture=architecture, params=params, buffers=buffers, **given)


def batch(vocabulary: int) -> dict[str, Tensor]:
    ids = torch.arange(ROWS * TIME).view(ROWS, TIME) % vocabulary
    return {"input_ids": ids, "labels": ids}


def _taken(step: ft.Step, state: ft.TrainState, given: Any) -> int:
    """The most bytes that torch has at once for a gradient, beside what is there."""
    with torch.profiler.profile(profile_memory=True) as profile:
        result = step.gradient(state.params, state.buffers, given)
    assert result.grads
    most = held = 0
    for event in profile.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


WHOLE, CHUNKED = chunks.BUDGET, 1 << 16
ORDINARY = {
    ("fp32", WHOLE),
    ("fp32", CHUNKED),
    ("bf16", CHUNKED),
    ("bf16 params", WHOLE),
    ("recomputed", WHOLE),
    ("recomputed in part", CHUNKED),
    ("recomputed selectively", WHOLE),
    ("micro-batches", CHUNKED),
}
CASES = [
    pytest.param(
        name,
        budget,
        marks=[] if (name, budget) in ORDINARY else pytest.mark.long,
        id=f"{name}-{'whole' if budget == WHOLE else 'chunks'}",
    )
    for name in OPTIONS
    for budget in (WHOLE, CHUNKED)
]


@pytest.mark.parametrize(("name", "budget"), CASES)
def test_bytes_and_operations_are_those_of_a_gradient(
    name: str, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = OPTIONS[name]
    monkeypatch.setattr(chunks, "BUDGET", budget)
    architecture, params, buffers = ft.split(decoder(SHAPE))
    step = ft.pretrain_step(architecture, SGD, **options)
    state = step.init(params, buffers)
    work = count(job(lambda: decoder(SHAPE), optimizer=SGD, **options))
    parts = options.get("microbatches", 1)
    counted = parts * work.flops
    # The last token of a row predicts nothing, so a head by chunks makes no logits of it.
    last = 6 * ROWS * 128 * 300 if budget == CHUNKED else 0
    assert counted - last == ft.flops_of(step, state, batch(300))
    planned = total(work.gradients) + work.beside(parts) + total(work.cast) + work.buffers
    taken = _taken(step, state, batch(300))
    assert 0.9 * taken < planned < 1.25 * taken


SHORT = 8  # mamba goes token by token
TRANSFORMERS = [
    "llama",
    "gpt2",
    "gemma2",
    "qwen2",
    pytest.param("mistral", marks=pytest.mark.long),  # as small as this, a llama
    "mixtral",
    "deepseek_v3",
    "mamba",
]


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_models_of_transformers_are_counted(name: str) -> None:
    module = families.made(name)
    count_of = sum(p.numel() for p in module.parameters())
    architecture, params, buffers = ft.split(module)
    step = ft.pretrain_step(architecture, SGD)
    given = {key: value[:, :SHORT] for key, value in batch(31).items()}
    found = ft.flops_of(step, step.init(params, buffers), given)
    work = count(
        Job(
            architecture=architecture,
            params={n: p.to("meta") for n, p in params.items()},
            buffers=buffers,
            optimizer=SGD,
            rows=ROWS,
            time=SHORT,
        )
    )
    assert work.numbers == count_of
    assert work.flops == pytest.approx(found, rel=0.02)


def test_moments_and_more_are_those_of_the_state() -> None:
    work = count(job(lambda: decoder(SHAPE), average=True, reference=True, sides=2))
    params = total(work.params)
    assert params == 4 * work.numbers == total(work.gradients)
    assert 2 * params < total(work.moments) < 2 * params + 1000  # and a count for each
    assert total(work.extra) == 2 * params
    assert work.tokens == 2 * ROWS * TIME
    assert sum(gathered for gathered, _ in work.units) == params
    assert len(work.units) == 1 + SHAPE.layers


NAMED: dict[str, dict[str, Any]] = {name: {"name": name} for name in known.OPTIMIZERS}
NAMED["sgd with momentum"] = {"name": "sgd", "momentum": 0.9}


@pytest.mark.filterwarnings("ignore")  # of libraries that warn as they are imported
@pytest.mark.parametrize("name", NAMED)
def test_moments_are_those_that_a_state_has_after_a_step(name: str) -> None:
    """Of every optimizer that a config may name, as a config makes it."""
    if name == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    architecture, params, buffers = ft.split(decoder(LOW))
    optimizer = steps.optimizer(Optimizer(**NAMED[name]), 1e-3, architecture)
    work = count(job(lambda: decoder(LOW), optimizer=optimizer))
    step = ft.pretrain_step(architecture, optimizer)
    state, _ = step(step.init(params, buffers), batch(300))
    assert total(work.moments) == _bytes(state.optimizer)
    assert (total(work.moments) == 0) is (name == "sgd")


OTHERS = [
    "torch.optim.ASGD",
    "torch.optim.Adadelta",
    "torch.optim.Adagrad",
    "torch.optim.NAdam",
    "torch.optim.RAdam",
    "torch.optim.Rprop",
    pytest.param("torchao.optim.AdamW4bit", marks=pytest.mark.long),  # compiles for each shape
]


@pytest.mark.filterwarnings("ignore")  # of libraries that warn as they are imported and compiled
@pytest.mark.parametrize("name", OTHERS)
def test_so_it_is_for_other_classes(name: str) -> None:
    module, _, cls = name.rpartition(".")
    optimizer = ft.optim.from_torch(getattr(pytest.importorskip(module), cls))
    work = count(job(lambda: decoder(LOW), optimizer=optimizer))
    values = {n: torch.ones(p.shape) for n, p in bare(lambda: decoder(LOW))[1].items()}
    _, state = optimizer.update(values, optimizer.init(values), values, 1e-3)
    assert total(work.moments) == _bytes(state)


def _bytes(state: ft.optim.OptimizerState) -> int:
    return sum(tensor.nbytes for slot in state.slots.values() for tensor in slot.values())


class _Foreign(torch.optim.SGD):
    """A class whose kernel takes the addresses of its tensors."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                self.state[param]["codes"] = torch.from_numpy(param.detach().numpy())


@pytest.mark.parametrize("inside", [False, True])
def test_an_optimizer_that_needs_memory_is_named(inside: bool) -> None:
    """And never taken for one without moments."""
    optimizer: Any = ft.optim.from_torch(_Foreign)
    if inside:
        optimizer = ft.optim.muon(others=optimizer)
    with pytest.raises(
        ConfigError, match=r"plan: .*_Foreign makes its moments in an update.*adamw"
    ):
        count(job(lambda: decoder(LOW), optimizer=optimizer))


@pytest.mark.parametrize(
    ("stays", "microbatches"),
    [
        (True, 1),
        (False, 2),
        pytest.param(True, 2, marks=pytest.mark.long),
        pytest.param(False, 1, marks=pytest.mark.long),
    ],
)
def test_operations_and_bytes_of_pairs_are_those_of_a_gradient(
    stays: bool, microbatches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With their reference: one product more of the head, two where a pair is too large to stay."""
    pair = 2 * (TIME if stays else TIME - 2) * 300 * 4
    monkeypatch.setattr(chunks, "BUDGET", pair // chunks.KEPT)
    monkeypatch.setattr(chunks, "WORTH", 0)
    monkeypatch.setattr(measures, "CACHED", 1 << 12)
    architecture, params, buffers = ft.split(decoder(SHAPE))
    options: dict[str, Any] = {"microbatches": microbatches}
    step = ft.dpo_step(architecture, SGD, reference=ft.trees.clone(params), **options)
    sides = batch(300)
    given = {"chosen": sides, "rejected": {k: t.flip(0) for k, t in sides.items()}}
    options |= {"sides": 2, "paired": True, "reference": True}
    work = count(job(lambda: decoder(SHAPE), optimizer=SGD, **options))
    state = step.init(params, buffers)
    logits = 2 * TIME * 300 * 4 if stays else chunks.BUDGET
    hidden = 2 * ROWS * TIME // microbatches * 128 * 4
    assert work.head == logits + 2 * measures.CACHED + hidden
    # The last token of a row predicts nothing, so no logits are made of it.
    products = 4 if stays else 5
    last = products * 2 * 2 * ROWS * 128 * 300
    assert microbatches * work.flops - last == ft.flops_of(step, state, given)
    planned = total(work.gradients) + work.beside(microbatches) + work.buffers
    taken = _taken(step, state, given)
    assert 0.9 * taken < planned < 1.25 * taken


@pytest.mark.parametrize("why", ["fp16", "canonical", "coupled", "kto"])
def test_log_probs_whose_gradient_waits_make_their_logits_again(
    why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a step does, of pairs that could stay."""
    monkeypatch.setattr(chunks, "BUDGET", 2 * TIME * 300 * 4 // chunks.KEPT)
    monkeypatch.setattr(chunks, "WORTH", 0)
    architecture, params, buffers = ft.split(decoder(LOW))
    options: dict[str, Any] = {"reference": ft.trees.clone(params)}
    sides = batch(300)
    given: dict[str, Any] = {"chosen": sides, "rejected": {k: t.flip(0) for k, t in sides.items()}}
    make = ft.dpo_step
    if why == "kto":
        make = ft.kto_step  # type: ignore[assignment]
        desirable = torch.arange(ROWS) % 2 == 0
        given = {"completion": sides, "mismatched": given["rejected"], "desirable": desirable}
    elif why == "coupled":
        options["loss"] = "aot"
    else:
        options |= {"precision": "fp16"} if why == "fp16" else {"reduction": "canonical"}
    step = make(architecture, SGD, **options)
    precision = options.get("precision", "fp32")
    paired = why == "fp16"
    work = count(
        job(
            lambda: decoder(LOW),
            optimizer=SGD,
            sides=2,
            paired=paired,
            reference=True,
            precision=precision,
        )
    )
    found = ft.flops_of(step, step.init(params, buffers), given)
    product = 2 * 2 * ROWS * 128 * 300
    if why == "kto":
        # What is only scored has no backward pass.
        assert found < work.flops
    else:
        assert work.flops - 5 * product == found


def test_a_reference_is_a_third_more() -> None:
    alone, beside = (
        count(job(lambda: decoder(LOW), reference=r, sides=2)).flops for r in (False, True)
    )
    # The head's products are made four times, and attention's scores again in the backward pass.
    assert 1.25 < beside / alone < 1.34


def test_rows_are_cut_as_shards_are() -> None:
    work = count(job(lambda: decoder(LOW)))
    for workers in (1, 2, 3, 4, 300, 1000):
        own = sum(
            -(-p.shape[0] // workers) * p[0].nbytes for p in bare(lambda: decoder(LOW))[1].values()
        )
        assert total(work.params, workers) == own


def test_a_model_of_seventy_billion_takes_no_memory() -> None:
    shape = DecoderConfig(
        vocabulary=128_256, width=8_192, layers=2, heads=64, kv_heads=8, hidden=28_672, tied=False
    )
    with torch.profiler.profile(profile_memory=True) as profile:
        work = count(job(lambda: decoder(shape), time=8_192, precision="bf16_params"))
    assert work.numbers > 3.5e9
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    assert sum(max(0, e.nbytes()) for e in events if e.name() == "[memory]") < 50e6


class _Asking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.head = nn.Linear(4, 10)

    def forward(self, input_ids: Tensor) -> Tensor:
        scale = 2.0 if bool(input_ids.sum() > 3) else 1.0
        logits: Tensor = self.head(self.embedding(input_ids)) * scale
        return logits


def test_a_model_that_asks_for_values_is_named() -> None:
    with pytest.raises(ConfigError, match=r"plan: _Asking asks for values on its way"):
        count(job(_Asking))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": 0}, "rows: 0, expected an integer of at least 1"),
        ({"time": True}, "time: True, expected an integer"),
        ({"microbatches": 3}, "rows: 4 cannot be cut into 3 equal micro-batches"),
        ({"precision": "fp8"}, "precision: 'fp8' is unknown"),
    ],
)
def test_bad_jobs_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        job(lambda: decoder(SHAPE), **options)


def test_scratch_for_details_of_scores_is_counted_for_each_thread() -> None:
    rows, weight = 20_000, torch.empty(2048, 8)
    torch.set_num_threads(4)
    try:
        plain, detailed = (_head_bytes(rows, weight, 0, each) for each in (False, True))
        measured = measures.Measures(detailed=True, graded=False)
        measured.of(torch.zeros(3000, 2048), torch.zeros(3000, 1, dtype=torch.int64))
    finally:
        torch.set_num_threads(1)
    assert measured._scratch is not None
    assert 2 * measures.CACHED < measured._scratch.nbytes <= detailed - plain
