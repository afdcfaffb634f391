"""A step against an ordinary PyTorch loop: the same model, the same batches, the same bits.

The loop is what one writes by hand: `torch.optim.AdamW`, transformers' cosine (a `LambdaLR`),
gradient accumulation by `backward()` into `.grad`, `torch.autocast`, `torch.amp.GradScaler`. Its
loss is the summed cross entropy over the target tokens of the whole logical batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import pytest
import torch
import torch.nn.functional as F
import zoo
from halves import half
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grads_with_norm_
from transformers.optimization import get_cosine_schedule_with_warmup

import functrain as ft
from functrain import keys
from functrain.precision import POLICIES, Precision
from functrain.trees import global_norm

STEPS, PEAK, WARMUP, SEED = 100, 1e-2, 5, 17
FEW = 15
"""Steps where nothing has to build up over them: the warmup, and twice as many at the full rate."""
MAX_NORM = {"decoder": 1.0, "normed": 0.77, "tied": 2.8}
"""Near the median of each model's gradient norms, so that clipping acts in half of the steps."""
MODELS = sorted(zoo.MODELS)
EVERY = pytest.mark.parametrize("name", MODELS)
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
FP16 = Precision(
    name="fp16",
    autocast=torch.float16,
    loss_scale=True,
    initial_scale=2.0**24,
    growth_interval=4,
)
"""Begins far too high and grows soon, so that steps are skipped at first and again and again."""


def _model(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A fresh model of the zoo; its decoder with one layer, of which there are a hundred steps."""
    if name != "decoder":
        return zoo.model(name, dtype)
    return zoo.decoder(layers=1).to(dtype)


def _batches(steps: int = STEPS) -> list[dict[str, Any]]:
    return [zoo.batch(seed) for seed in range(steps)]


def _adamw(module: nn.Module, **options: Any) -> torch.optim.Optimizer:
    options = {"lr": PEAK, "fused": True, **options}
    return torch.optim.AdamW(module.parameters(), weight_decay=0.1, **options)


def _clip_by_our_norm(module: nn.Module, max_norm: float) -> Tensor:
    """torch's formula with the norm that a step clips by, over the names in order."""
    grads = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    norm = global_norm({name: grads[name] for name in sorted(grads)})
    clip_grads_with_norm_(module.parameters(), max_norm, norm)
    return norm


def _clip_by_torch(module: nn.Module, max_norm: float) -> Tensor:
    return clip_grad_norm_(module.parameters(), max_norm)


@attrs.frozen(kw_only=True)
class Run:
    """What a training run left: the module's values, and what each step measured."""

    values: dict[str, Tensor]
    norms: list[float] = attrs.field(factory=list)
    scales: list[float] = attrs.field(factory=list)
    skipped: list[bool] = attrs.field(factory=list)


def _by_hand(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    microbatches: int = 1,
    precision: str = "fp32",
    max_norm: float | None = None,
    clip: Callable[[nn.Module, float], Tensor] = _clip_by_our_norm,
    steps: int = STEPS,
    scaler: torch.amp.GradScaler | None = None,
) -> Run:
    """An ordinary training loop."""
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    scheduler = get_cosine_schedule_with_warmup(optimizer, WARMUP, STEPS)
    run = Run(values={})
    module.train()
    for step, batch in enumerate(_batches(steps)):
        optimizer.zero_grad()
        total = (batch["labels"][:, 1:] != -100).sum()
        ids = batch["input_ids"].chunk(microbatches)
        labels = batch["labels"].chunk(microbatches)
        for index, (inputs, targets) in enumerate(zip(ids, labels, strict=True)):
            # Dropout draws as a step's micro-batch does; models without it draw nothing.
            key = keys.derive(keys.derive(SEED, "step", step), "micro-batch", index)
            dtype, enabled = AUTOCAST.get(precision), precision in AUTOCAST
            with keys.seeded(key):
                with torch.autocast("cpu", dtype=dtype, enabled=enabled):
                    outputs = module(input_ids=inputs)
                logits = outputs["logits"] if isinstance(outputs, dict) else outputs
                loss = F.cross_entropy(
                    logits[:, :-1].float().flatten(0, 1),
                    targets[:, 1:].flatten(),
                    reduction="sum",
                )
                scaler.scale(loss / total).backward()
        scaler.unscale_(optimizer)
        if max_norm is not None:
            run.norms.append(float(clip(module, max_norm)))
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        skipped = scaler.get_scale() < scale
        if not skipped:
            scheduler.step()
        run.scales.append(scale)
        run.skipped.append(skipped)
    buffers = dict(module.named_buffers())
    run.values.update({n: p.detach() for n, p in module.named_parameters()} | buffers)
    return run


def _by_step(
    module: nn.Module,
    optimizer: Any = None,
    *,
    peak: float = PEAK,
    steps: int = STEPS,
    **options: Any,
) -> tuple[Any, Run]:
    """The same by a step: `(state, run)`."""
    architecture, params, buffers = ft.split(module)
    step = ft.pretrain_step(
        architecture,
        optimizer or ft.optim.adamw(PEAK, weight_decay=0.1),
        schedule=ft.schedules.cosine(peak, total=STEPS, warmup=WARMUP),
        **options,
    )
    state = step.init(params, buffers, seed=SEED)
    run = Run(values={})
    for batch in _batches(steps):
        state, metrics = step(state, batch)
        run.norms.append(float(metrics["grad_norm"]))
        run.scales.append(float(metrics["loss_scale"]))
        run.skipped.append(bool(metrics["skipped"]))
    run.values.update({**state.params, **state.buffers})
    return state, run


def _assert_same_bits(ours: Run, theirs: Run) -> None:
    assert ours.values.keys() == theirs.values.keys()
    apart = [n for n, value in ours.values.items() if not torch.equal(value, theirs.values[n])]
    assert not apart, f"other bits in {apart}"


@half("name, precision, microbatches", MODELS, ["fp32", "bf16"], [1, 4])
def test_a_hundred_steps_are_those_of_an_ordinary_loop(
    name: str, precision: str, microbatches: int
) -> None:
    """Params and buffers bit for bit, clipping now acting and now not."""
    hand = _model(name)
    options: Any = {"precision": precision, "microbatches": microbatches}
    limit = MAX_NORM[name]
    theirs = _by_hand(hand, _adamw(hand), max_norm=limit, **options)
    _, ours = _by_step(_model(name), max_grad_norm=limit, **options)
    assert ours.norms == theirs.norms
    assert 20 < sum(norm > limit for norm in ours.norms) < 80
    _assert_same_bits(ours, theirs)


def test_donated_steps_are_those_of_an_ordinary_loop() -> None:
    hand = _model("decoder")
    options: Any = {"microbatches": 2, "steps": FEW}
    theirs = _by_hand(hand, _adamw(hand), max_norm=1.0, **options)
    _, ours = _by_step(_model("decoder"), max_grad_norm=1.0, donate=True, **options)
    _assert_same_bits(ours, theirs)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("microbatches", [1, 2])
def test_large_logits_and_tables_too_where_the_head_is_full(tied: bool, microbatches: int) -> None:
    """From 1 MiB on they are the same to rounding by default, and other bits."""
    shape = ft.models.DecoderConfig(
        vocabulary=4096, width=64, layers=1, heads=2, hidden=64, tied=tied
    )
    # Of few tokens, so that gradients of a row are summed, in one order or another.
    generator = torch.Generator().manual_seed(1)
    batches = torch.randint(0, 40, (3, 2 * microbatches, 40), generator=generator)
    hand = ft.models.decoder(shape, seed=0)
    optimizer = torch.optim.AdamW(hand.parameters(), lr=1e-3, fused=True)
    for batch in batches:
        targets = batch[:, 1:].numel()
        for ids in batch.chunk(microbatches):
            logits = hand(ids)[:, :-1].flatten(0, 1)
            loss = F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum")
            (loss / targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    apart = {}
    for head in ("full", "auto"):
        architecture, params, buffers = ft.split(ft.models.decoder(shape, seed=0))
        step = ft.pretrain_step(
            architecture, ft.optim.adamw(1e-3), head=head, microbatches=microbatches
        )
        state = step.init(params, buffers)
        for batch in batches:
            state, _ = step(state, {"input_ids": batch, "labels": batch})
        theirs = dict(hand.named_parameters())
        apart[head] = [n for n, p in state.params.items() if not torch.equal(p, theirs[n])]
        for name, param in state.params.items():
            torch.testing.assert_close(param, theirs[name], rtol=1e-3, atol=1e-4)
    assert not apart["full"]
    assert apart["auto"]


def test_without_clipping() -> None:
    hand = _model("tied")
    theirs = _by_hand(hand, _adamw(hand), steps=FEW)
    _, ours = _by_step(_model("tied"), steps=FEW)
    _assert_same_bits(ours, theirs)


def test_the_kernel_that_is_not_fused() -> None:
    """`fused=False` is the for-loop of `torch.optim.AdamW(foreach=False)`: other bits, but its."""
    hand, fused = _model("decoder"), _model("decoder")
    options: Any = {"microbatches": 2, "steps": FEW}
    theirs = _by_hand(hand, _adamw(hand, fused=False, foreach=False), **options)
    optimizer = ft.optim.adamw(PEAK, weight_decay=0.1, fused=False)
    _, ours = _by_step(_model("decoder"), optimizer, **options)
    _assert_same_bits(ours, theirs)
    other = _by_hand(fused, _adamw(fused), **options)
    assert any(not torch.equal(v, other.values[n]) for n, v in ours.values.items())


@EVERY
def test_parameter_groups(name: str) -> None:
    """No decay on norms, biases and embeddings is two groups of the ordinary optimizer."""
    hand = _model(name)
    exempt = ft.optim.no_decay(hand)
    named = dict(hand.named_parameters())
    without = [p for n, p in named.items() if exempt.where(n, p)]
    decayed = [p for n, p in named.items() if not exempt.where(n, p)]
    assert without
    groups = [{"params": without, "weight_decay": 0.0}]
    if decayed:
        groups.append({"params": decayed})
    ordinary = torch.optim.AdamW(groups, lr=PEAK, weight_decay=0.1, fused=True)
    theirs = _by_hand(hand, ordinary, steps=FEW)
    module = _model(name)
    optimizer = ft.optim.adamw(PEAK, weight_decay=0.1, groups=[ft.optim.no_decay(module)])
    _, ours = _by_step(module, optimizer, steps=FEW)
    _assert_same_bits(ours, theirs)


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
        (torch.optim.Adafactor, {}),
        (torch.optim.NAdam, {"decoupled_weight_decay": True, "weight_decay": 0.1}),
    ],
)
def test_any_optimizer_class_in_a_step(cls: Any, options: dict[str, Any]) -> None:
    hand = _model("decoder")
    shape: Any = {"microbatches": 2, "steps": FEW}
    theirs = _by_hand(hand, cls(hand.parameters(), lr=PEAK, **options), **shape)
    optimizer = ft.optim.from_torch(cls, lr=PEAK, **options)
    _, ours = _by_step(_model("decoder"), optimizer, **shape)
    _assert_same_bits(ours, theirs)


@half("name, microbatches", MODELS, [1, 4])
def test_against_torchs_own_clipping_the_params_agree_to_a_millionth(
    name: str, microbatches: int
) -> None:
    """`clip_grad_norm_` sums in float32, so the factor is a rounding apart where it acts.

    At a learning rate of 1e-3. At 1e-2 Adam's division by nearly nothing lets the decoder's runs
    drift 7e-5 apart in a hundred steps, as it would two runs that begin a rounding apart.
    """
    hand, limit = _model(name), {"decoder": 1.19, "normed": 0.97, "tied": 4.2}[name]
    options: Any = {"microbatches": microbatches}
    ordinary = _adamw(hand, lr=1e-3)
    theirs = _by_hand(hand, ordinary, max_norm=limit, clip=_clip_by_torch, **options)
    state, ours = _by_step(_model(name), peak=1e-3, max_grad_norm=limit, **options)
    assert 20 < sum(norm > limit for norm in ours.norms) < 80
    for parameter, value in state.params.items():
        torch.testing.assert_close(value, theirs.values[parameter], rtol=1e-6, atol=1e-6)


@half("name, microbatches", MODELS, [1, 4], other=True)
def test_the_loss_scale_is_that_of_a_grad_scaler(name: str, microbatches: int) -> None:
    """The same scale at every step, the same steps skipped, and the same bits in the params.

    Both sides unscale before they clip: the loop by `scaler.unscale_`, the step by the same
    multiplication with the reciprocal. Where gradients overflowed the loop's clipping spreads NaN,
    which `scaler.step` then skips; its schedule stands still by hand, as a step's does by itself.
    """
    hand = _model(name)
    scaler = torch.amp.GradScaler(
        "cpu", init_scale=FP16.initial_scale, growth_interval=FP16.growth_interval
    )
    limit = MAX_NORM[name]
    steps = 60
    options: Any = {"microbatches": microbatches, "steps": steps}
    theirs = _by_hand(
        hand, _adamw(hand), precision="fp16", scaler=scaler, max_norm=limit, **options
    )
    state, ours = _by_step(_model(name), precision=FP16, max_grad_norm=limit, **options)
    assert ours.scales == theirs.scales
    assert ours.skipped == theirs.skipped
    assert float(state.scaler.scale) == scaler.get_scale()
    assert int(state.scaler.growth_count) == scaler._get_growth_tracker()
    grown = sum(b > a for a, b in zip(ours.scales, ours.scales[1:], strict=False))
    late = sum(ours.skipped[20:])
    assert grown >= 5, f"the scale grew {grown} times only; the test shows too little"
    assert late >= 5, f"{late} late steps were skipped only; the test shows too little"
    for parameter, value in state.params.items():
        assert torch.equal(value, theirs.values[parameter]), parameter
    applied = steps - sum(ours.skipped)
    assert state.step == steps
    assert int(state.optimizer.count) == int(state.scheduler.count) == applied
    assert all(int(count) == applied for count in state.optimizer.slots["step"].values())


def test_a_skipped_step_changes_nothing_but_the_scale_and_the_count_of_calls() -> None:
    architecture, params, buffers = zoo.split("normed")
    huge = attrs.evolve(POLICIES["fp16"], initial_scale=2.0**60)
    step = ft.pretrain_step(
        architecture, ft.optim.adamw(), precision=huge, max_grad_norm=1.0, ema_decay=0.9
    )
    state = step.init(params, buffers)
    after, metrics = step(state, zoo.batch())
    assert float(metrics["skipped"]) == 1
    assert float(metrics["loss_scale"]) == 2.0**60
    assert torch.isfinite(metrics["loss"])
    before = ft.fingerprints(state)
    changed = {path for path, leaf in ft.fingerprints(after).items() if leaf != before[path]}
    assert changed == {"step", "scaler/scale"}
    assert float(after.scaler.scale) == 2.0**59


def _completion_logps(module: nn.Module, side: dict[str, Tensor]) -> Tensor:
    outputs = module(input_ids=side["input_ids"])
    logits = outputs["logits"] if isinstance(outputs, dict) else outputs
    logps = logits[:, :-1].log_softmax(-1)
    targets = side["labels"][:, 1:]
    chosen = logps.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return (chosen * (targets != -100)).sum(-1)


@pytest.mark.parametrize("name", ["decoder", "tied"])
@pytest.mark.parametrize("microbatches", [1, 2])
def test_preference_steps_are_those_of_an_ordinary_loop(name: str, microbatches: int) -> None:
    """DPO with a second, frozen module for the reference, against the same module's own params.

    In float64 and to rounding: the loop passes chosen and rejected one after the other.
    """
    policy, reference = _model(name, torch.float64), _model(name, torch.float64)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=PEAK, weight_decay=0.1, fused=True)
    architecture, params, buffers = ft.split(_model(name, torch.float64))
    step = ft.dpo_step(
        architecture,
        ft.optim.adamw(weight_decay=0.1),
        reference=params,
        beta=0.3,
        schedule=PEAK,
        max_grad_norm=1.0,
        microbatches=microbatches,
    )
    state = step.init(params, buffers)
    for seed in range(10):
        batch = zoo.pairs(seed)
        optimizer.zero_grad()
        with torch.no_grad():
            theirs = [_completion_logps(reference, batch[s]) for s in ("chosen", "rejected")]
        ours = [_completion_logps(policy, batch[s]) for s in ("chosen", "rejected")]
        margins = 0.3 * ((ours[0] - theirs[0]) - (ours[1] - theirs[1]))
        loss = -F.logsigmoid(margins).mean()
        loss.backward()
        norm = clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        state, metrics = step(state, batch)
        assert float(metrics["loss"]) == pytest.approx(float(loss.detach()), rel=1e-9)
        assert float(metrics["rewards/margins"]) == pytest.approx(
            float(margins.detach().mean()), rel=1e-8, abs=1e-12
        )
        assert float(metrics["grad_norm"]) == pytest.approx(float(norm), rel=1e-8)
    for parameter, value in policy.named_parameters():
        torch.testing.assert_close(state.params[parameter], value.detach(), rtol=1e-8, atol=1e-9)
