"""Gradients: taken inside the binding, those of the plain module, and clipped as they say."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zoo
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import clip_grad_value_, clip_grads_with_norm_

import functrain as ft
from functrain import accumulators, keys, trees
from functrain import architecture as binding
from functrain.errors import ArchitectureError, BatchError, ConfigError
from functrain.forward import OwnBuffers
from functrain.gradients import Gradients
from functrain.objectives import chunks
from functrain.objectives.language import LanguageModeling
from functrain.precision import policy
from functrain.trees import Tensors, digest, global_norm

EVERY = pytest.mark.parametrize("name", sorted(zoo.MODELS))


def _summed_loss(module: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    outputs = module(input_ids=batch["input_ids"])
    logits = outputs["logits"] if isinstance(outputs, dict) else outputs
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum"
    )


def _targets(batch: Mapping[str, Tensor]) -> Tensor:
    return (batch["labels"][:, 1:] != -100).sum()


def _gradients(
    module: nn.Module, batch: Any, *, precision: Any = "fp32", **options: Any
) -> Gradients:
    architecture, params, buffers = ft.split(module)
    gradient = ft.value_and_grad(LanguageModeling(), architecture, precision=precision)
    return gradient(params, buffers, batch, **options)


def _same_bits(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return {n: digest(t) for n, t in one.items()} == {n: digest(t) for n, t in other.items()}


# What the gradient is.


def test_gradients_are_known_to_be_like_their_params_and_no_others() -> None:
    """An optimizer looks at every tensor of any other mapping, one of the same tensors too."""
    architecture, params, buffers = ft.split(zoo.decoder())
    gradient = ft.value_and_grad(LanguageModeling(), architecture)
    grads = gradient(params, buffers, zoo.batch()).grads
    assert trees.are_like(grads, params)
    clipped, _ = ft.clip_by_global_norm(grads, 1e-3, donate=True)
    assert trees.are_like(clipped, params)
    for others in (Tensors(grads), dict(grads), ft.clip_by_value(grads, 1.0)):
        assert not trees.are_like(others, params)
    assert not trees.are_like(grads, params.copy())
    assert not trees.are_like(params, params)


@pytest.mark.parametrize("changed", [lambda g: g[:1], lambda g: g.double(), lambda g: g.to("meta")])
def test_a_models_hook_cannot_change_what_a_gradient_is(changed: Any) -> None:
    """By which the fused kernel, which takes sizes on trust, would read past its end."""

    class Hooked(nn.Sequential):
        def forward(self, input_ids: Tensor) -> Any:
            self[1].weight.register_hook(changed)
            return super().forward(input_ids)

    architecture, params, buffers = ft.split(Hooked(nn.Embedding(7, 4), nn.Linear(4, 7)))
    step = ft.pretrain_step(architecture, ft.optim.adamw(), head="full")
    state = step.init(params, buffers)
    before = ft.fingerprint(state)
    ids = torch.arange(6).view(2, 3)
    with pytest.raises(RuntimeError, match=r"hook .* has changed the"):
        step(state, {"input_ids": ids, "labels": ids}, donate=True)
    assert ft.fingerprint(state) == before


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_those_of_the_plain_module(name: str, dtype: torch.dtype) -> None:
    """`torch.autograd`'s on the module itself, bit for bit; the loss, and the buffers after."""
    module, batch = zoo.model(name, dtype), zoo.batch(3)
    with keys.seeded(keys.derive(0, "micro-batch", 0)):
        loss = _summed_loss(module.train(), batch)
        expected = dict(
            zip(
                dict(module.named_parameters()),
                torch.autograd.grad(loss / _targets(batch), list(module.parameters())),
                strict=True,
            )
        )
    ours = _gradients(zoo.model(name, dtype), batch)
    assert _same_bits(ours.grads, expected)
    assert float(ours.metrics["loss"]) == float(loss.detach().double() / _targets(batch))
    assert _same_bits(ours.buffers, dict(module.named_buffers()))


@EVERY
def test_micro_batches_add_up_as_backward_does(name: str) -> None:
    """`.grad` after a `backward()` for each micro-batch, each divided by the weight of all."""
    module, parts = zoo.model(name), [zoo.batch(1, 2, 5), zoo.batch(2, 3, 9), zoo.batch(3, 1, 2)]
    total = torch.stack([_targets(each) for each in parts]).sum()
    module.train()
    for index, each in enumerate(parts):
        with keys.seeded(keys.derive(5, "micro-batch", index)):
            (_summed_loss(module, each) / total).backward()
    ours = _gradients(zoo.model(name), parts, key=5)
    assert _same_bits(ours.grads, {n: p.grad for n, p in module.named_parameters()})


def test_equal_slices_are_the_sequence_of_them() -> None:
    architecture, params, buffers = zoo.split("normed")
    gradient = ft.value_and_grad(LanguageModeling(), architecture)
    whole = zoo.batch(0, 6)
    parts = [{key: t[i : i + 2] for key, t in whole.items()} for i in (0, 2, 4)]
    sliced = ft.accumulate(gradient, 3)(params, buffers, whole, key=2)
    ready = ft.accumulate(gradient, 7)(params, buffers, parts, key=2)
    assert _same_bits(sliced.grads, ready.grads)
    assert sliced.metrics.to_dict() == ready.metrics.to_dict()


@pytest.mark.parametrize("count", [0, -1, 1.5, True, "2"])
def test_a_number_of_micro_batches_is_a_positive_integer(count: Any) -> None:
    gradient = ft.value_and_grad(LanguageModeling(), zoo.split("tied")[0])
    with pytest.raises(ConfigError, match="microbatches"):
        ft.accumulate(gradient, count)


def test_a_gradient_function_of_ones_own_has_no_workers_and_no_tree() -> None:
    def own(params: Any, buffers: Any, batch: Any, **_: Any) -> Gradients:
        return Gradients(grads=Tensors(params), buffers=Tensors(buffers), metrics=ft.Metrics({}))

    ft.accumulate(own, 2)
    with pytest.raises(ConfigError, match=r"gradient: function is none of .*value_and_grad"):
        ft.accumulate(own, 2, tree=True)


class MetricsAlone(LanguageModeling):
    """Another loss, of whole logits; the metrics are its parent's."""

    def __call__(self, model: Any, batch: Any) -> Any:
        total, metrics = super().__call__(model, batch)
        return 0.5 * _summed_loss(model, batch) + 0.25 * total, metrics


class Bare(LanguageModeling):
    """The same, with logits as they are."""

    def __call__(self, model: Any, batch: Any) -> Any:
        total, metrics = super().__call__(model, batch)
        return 0.75 * total, metrics


def test_a_subclass_with_another_loss_has_the_gradient_of_that_loss(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its parent's says of its own loss alone that gradients may be summed where they are made."""
    monkeypatch.setattr(chunks, "BUDGET", 0)
    monkeypatch.setattr(accumulators, "TABLE", 0)
    architecture, params, buffers = ft.split(zoo.decoder(dropout=0.0).double())
    found = []
    for objective in (MetricsAlone(), Bare(head="full")):
        gradient = ft.value_and_grad(objective, architecture)
        assert not gradient.direct
        found.append(gradient(params, buffers, zoo.batch()).grads)
    assert ft.value_and_grad(LanguageModeling(), architecture).direct
    for name, grad in found[0].items():
        torch.testing.assert_close(grad, found[1][name], rtol=1e-10, atol=1e-13)


class Offset(nn.Module):
    """Buffers that bf16 rounds, one of them without a number."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("offset", torch.tensor([0.1, 0.7, float("nan")]))


def test_a_buffer_that_was_rounded_has_not_been_written_to() -> None:
    architecture, _, buffers = ft.split(Offset())
    own = OwnBuffers.of(buffers, binding.slots(architecture), policy("bf16_params"))
    assert own.values["offset"].dtype == torch.bfloat16
    assert own.moved(own.values) == []
    assert own.left(own.values)["offset"] is buffers["offset"]
    own.values["offset"].data[1] = 0.9  # as BatchNorm's kernel writes
    assert own.moved(own.values) == ["offset"]
    left, given = own.left(own.values)["offset"], buffers["offset"]
    assert left.tolist()[:2] == [given[0].item(), torch.tensor(0.9).bfloat16().item()]
    assert left.dtype == given.dtype
    assert left.isnan().tolist() == given.isnan().tolist()


def _clamp(weight: nn.Parameter) -> None:
    weight.data.clamp_(-0.1, 0.1)


def _move(weight: nn.Parameter) -> None:
    weight.data = weight.data.clone()  # as a momentum encoder that begins as a copy


def _pass(weight: nn.Parameter) -> None:
    weight.data.mul_(1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_clamp, r"^head\.weight: the model's forward wrote into this parameter"),
        (_move, r"^head\.weight: the model's forward gave this parameter other values"),
        (_pass, None),
    ],
)
def test_a_forward_that_moves_a_parameter_by_data_is_refused(
    change: Callable[[nn.Parameter], None], message: str | None
) -> None:
    """It would go into the given state, or be lost; where nothing changes there is nothing."""
    module = zoo.model("normed")
    module.register_forward_pre_hook(lambda m, _: change(m.head.weight) if m.training else None)
    architecture, params, buffers = ft.split(module)
    gradient = ft.value_and_grad(LanguageModeling(), architecture)
    if message is None:
        gradient(params, buffers, zoo.batch())
    else:
        with pytest.raises(ArchitectureError, match=message):
            gradient(params, buffers, zoo.batch())


def test_a_weight_of_the_callers_own_divides_instead() -> None:
    batch = zoo.batch()
    plain = _gradients(zoo.model("tied", torch.float64), batch)
    twice = 2 * _targets(batch)
    halved = _gradients(zoo.model("tied", torch.float64), batch, weight=twice)
    for name, grad in plain.grads.items():
        torch.testing.assert_close(halved.grads[name], grad / 2, rtol=1e-12, atol=1e-15)


class Weighed(LanguageModeling):
    """A loss whose weight is of another form than 0-d."""

    def __init__(self, weight: Any, *, apart: bool = False, kept: Any = None) -> None:
        super().__init__()
        object.__setattr__(self, "_given", (weight, apart, kept))

    def weight(self, batch: Any) -> Any:
        return self._given[0](batch)  # type: ignore[attr-defined]

    def check_weight(self, weight: Tensor) -> None:
        pass

    def __call__(self, model: Any, batch: Any) -> Any:
        total, metrics = super().__call__(model, batch)
        return (total.expand(4) / 4 if self._given[1] else total), metrics  # type: ignore[attr-defined]

    def kept(self) -> Any:
        return self._given[2]  # type: ignore[attr-defined]


def _each(batch: Any) -> Tensor:
    return torch.ones(len(batch["input_ids"]))


def test_a_weight_of_another_form_than_the_loss_is_refused() -> None:
    architecture, params, buffers = zoo.split("tied")
    plain = LanguageModeling().weight(zoo.batch())
    wanted = ft.value_and_grad(LanguageModeling(), architecture)(params, buffers, zoo.batch())
    for fits in (
        Weighed(lambda _: plain[None]),
        Weighed(lambda _: plain, apart=True),
        Weighed(lambda _: plain.expand(4), apart=True),
    ):
        found = ft.value_and_grad(fits, architecture)(params, buffers, zoo.batch())
        torch.testing.assert_close(dict(found.grads), dict(wanted.grads))
    for wrong in (Weighed(_each), Weighed(lambda _: plain.expand(3), apart=True)):
        with pytest.raises(ConfigError, match=r"its weight has shape \[\d\] and its loss \["):
            ft.value_and_grad(wrong, architecture)(params, buffers, zoo.batch())
    several = [zoo.batch(), {k: v[:2] for k, v in zoo.batch().items()}]
    with pytest.raises(ConfigError, match=r"weights have shapes \[4\] and \[2\]"):
        ft.value_and_grad(Weighed(_each), architecture)(params, buffers, several)


def test_what_an_objective_of_ones_own_keeps_need_be_no_reference() -> None:
    architecture, params, buffers = zoo.split("tied")
    kept = Weighed(LanguageModeling().weight, kept={"class_weights": torch.ones(3)})
    step = ft.make_step(kept, ft.optim.adamw(), architecture=architecture, donate=True)
    step(step.init(params, buffers), zoo.batch())


def test_a_loss_scale_multiplies() -> None:
    scaler = ft.init_loss_scale(1024.0)
    plain = _gradients(zoo.model("tied"), zoo.batch())
    scaled = _gradients(zoo.model("tied"), zoo.batch(), scaler=scaler)
    assert _same_bits(ft.unscale(scaled.grads, scaler), plain.grads)
    assert not _same_bits(scaled.grads, plain.grads)
    assert float(scaled.metrics["loss"]) == float(plain.metrics["loss"])


# The silent-gradient regression: activation checkpointing runs the forward again in the backward.


def _plain_and_checkpointed() -> Iterator[tuple[nn.Module, nn.Module]]:
    with keys.seeded(7):
        plain = zoo.Tied()
    recomputed = zoo.Checkpointed()
    recomputed.load_state_dict(plain.state_dict())
    yield plain, recomputed
    yield zoo.model("decoder"), zoo.decoder(checkpointing=True)


@pytest.mark.parametrize("which", [0, 1], ids=["tied", "decoder"])
def test_activation_checkpointing_changes_no_bit_of_the_gradient(which: int) -> None:
    plain, recomputed = list(_plain_and_checkpointed())[which]
    if which == 1:
        recomputed.load_state_dict(plain.state_dict())
    batches = [zoo.batch(1), zoo.batch(2)]
    assert _same_bits(_gradients(plain, batches).grads, _gradients(recomputed, batches).grads)


@pytest.mark.parametrize("which", [0, 1], ids=["tied", "decoder"])
def test_activation_checkpointing_changes_no_bit_of_a_run(which: int) -> None:
    """Ten steps with clipping and two micro-batches end with the same params."""
    ends = []
    for module in list(_plain_and_checkpointed())[which]:
        architecture, params, buffers = ft.split(module)
        step = ft.pretrain_step(
            architecture, ft.optim.adamw(1e-2), microbatches=2, max_grad_norm=0.5
        )
        state = step.init(params, buffers)
        for seed in range(10):
            state, _ = step(state, zoo.batch(seed))
        ends.append(state.params)
    assert _same_bits(*ends)


def test_outside_of_the_binding_the_gradient_would_be_silently_wrong() -> None:
    """Why the gradient is taken inside: this is the mistake, its loss right, its gradient not."""
    with keys.seeded(7):
        module = zoo.Checkpointed()
    batch = zoo.batch()
    inside = _gradients(module, batch)
    with keys.seeded(8):  # what stale weights an architecture would have, were it not on meta
        stale = zoo.Checkpointed()
    with keys.seeded(7):
        params = {n: p.detach() for n, p in zoo.Checkpointed().named_parameters()}
    leaves = {n: p.clone().requires_grad_() for n, p in params.items()}
    with binding.bound(stale, leaves, dict(stale.named_buffers())) as bound_module:
        loss = _summed_loss(bound_module, batch) / _targets(batch)
    (outside,) = torch.autograd.grad(loss, [leaves["embedding.weight"]])
    assert float(loss.detach()) == float(inside.metrics["loss"].float())
    assert not torch.allclose(outside, inside.grads["embedding.weight"], rtol=0.1)


# Which parameters have a gradient, and in which dtype.


class Partial(zoo.Tied):
    """`Tied` with a parameter that the loss does not reach, and one that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(3, 3)
        self.norm.weight.requires_grad_(False)


def test_what_the_loss_does_not_reach_has_no_gradient() -> None:
    """Nor has a frozen parameter; the others have those of the plain module."""
    with keys.seeded(7):
        module = Partial()
    batch = zoo.batch()
    (_summed_loss(module, batch) / _targets(batch)).backward()
    expected = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    with keys.seeded(7):
        ours = _gradients(Partial(), batch)
    assert set(expected) == {"embedding.weight", "mix.weight", "mix.bias", "norm.bias"}
    assert _same_bits(ours.grads, expected)


@pytest.mark.parametrize("optimizer", [ft.optim.adamw(1e-2), ft.optim.sgd(momentum=0.9)])
def test_frozen_and_unused_parameters_stay_as_they_are(optimizer: Any) -> None:
    """Weight decay included; and the frozen one has no moments."""
    architecture, params, buffers = ft.split(Partial())
    step = ft.pretrain_step(architecture, optimizer, max_grad_norm=1.0)
    state = first = step.init(params, buffers)
    for seed in range(3):
        state, _ = step(state, zoo.batch(seed))
    still = {n for n in params if torch.equal(state.params[n], first.params[n])}
    assert still == {"norm.weight", "spare.weight", "spare.bias"}
    assert all("norm.weight" not in slot for slot in state.optimizer.slots.values())


def test_a_frozen_parameter_is_frozen_in_the_objectives_eyes() -> None:
    """`requires_grad` is as the module has it, within the binding and after."""
    architecture, params, buffers = ft.split(Partial())
    seen: dict[str, bool] = {}
    architecture.register_forward_pre_hook(
        lambda module, _: seen.update({n: p.requires_grad for n, p in module.named_parameters()})
    )
    gradient = ft.value_and_grad(LanguageModeling(), architecture)
    gradient(params, buffers, zoo.batch())
    assert {name for name, trained in seen.items() if not trained} == {"norm.weight"}
    assert not any(p.requires_grad for p in params.values())


@EVERY
@pytest.mark.parametrize("precision", ["bf16", "fp16", "bf16_params"])
def test_gradients_and_master_params_are_float32(name: str, precision: str) -> None:
    """Whatever the forward computes in."""
    architecture, params, buffers = zoo.split(name)
    step = ft.pretrain_step(architecture, ft.optim.adamw(), precision=precision, microbatches=2)
    state = step.init(params, buffers)
    result = step.gradient(state.params, state.buffers, zoo.batch(), scaler=state.scaler)
    after, _ = step(state, zoo.batch())
    for tensors in (result.grads, after.params, *after.optimizer.slots.values()):
        assert {t.dtype for t in tensors.values()} == {torch.float32}
    plain = _gradients(zoo.model(name), [_half(0), _half(1)])
    scaled = ft.unscale(result.grads, state.scaler)
    apart = global_norm({n: scaled[n] - g for n, g in plain.grads.items()})
    assert 0 < float(apart) < 0.1 * float(global_norm(plain.grads))


def _half(which: int) -> dict[str, Tensor]:
    return {key: t[2 * which : 2 * which + 2] for key, t in zoo.batch().items()}


class Twins(nn.Module):
    """Two parameters that autograd hands one memory for their gradients; `second` comes late."""

    def __init__(self) -> None:
        super().__init__()
        with keys.seeded(2):
            self.embedding = nn.Embedding(9, 4)
            self.first, self.second = nn.Parameter(torch.ones(5, 4)), nn.Parameter(torch.ones(5, 4))
            self.head = nn.Linear(4, 9)

    def forward(self, input_ids: Tensor) -> Tensor:
        twins = self.first[None] + self.second[None]
        if input_ids[0, 0] == 0:
            twins = self.first[None]
        logits: Tensor = self.head((self.embedding(input_ids) + twins).tanh())
        return logits


@pytest.mark.parametrize("late", [False, True])
def test_gradients_that_share_their_memory_are_summed_apart(late: bool) -> None:
    """In an ordinary loop the second micro-batch of such is added for both of them."""
    ids = torch.randint(1, 9, (3, 5), generator=torch.Generator().manual_seed(4))
    ids[0, 0] = 0 if late else 1
    batches = [{"input_ids": row[None], "labels": row[None]} for row in ids]
    module = Twins()
    expected = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
    for batch in batches:
        loss = _summed_loss(module, batch) / 12
        found = torch.autograd.grad(loss, list(module.parameters()), allow_unused=True)
        for total, grad in zip(expected.values(), found, strict=True):
            total += 0 if grad is None else grad
    ours = _gradients(Twins(), batches)
    for name, total in expected.items():
        torch.testing.assert_close(ours.grads[name], total, rtol=1e-5, atol=1e-7)


def test_bf16_params_are_the_plain_module_in_bfloat16() -> None:
    """The forward and the backward of `module.bfloat16()`, with sums over micro-batches wide."""
    module = zoo.model("decoder").bfloat16()
    parts = [_half(0), _half(1)]
    total = sum(int(_targets(each)) for each in parts)
    expected: dict[str, Tensor] = {}
    for each in parts:
        logits = module(input_ids=each["input_ids"])[:, :-1].float().flatten(0, 1)
        loss = F.cross_entropy(logits, each["labels"][:, 1:].flatten(), reduction="sum")
        grads = torch.autograd.grad(loss / total, list(module.parameters()))
        for (name, _), grad in zip(module.named_parameters(), grads, strict=True):
            assert grad.dtype == torch.bfloat16
            expected[name] = expected.get(name, 0) + grad.float()
    ours = _gradients(zoo.model("decoder"), parts, precision="bf16_params")
    assert _same_bits(ours.grads, expected)


def test_under_bf16_params_an_update_smaller_than_a_bf16_rounding_is_kept() -> None:
    """Which is what the master params are for."""
    architecture, params, buffers = zoo.split("tied")
    step = ft.pretrain_step(architecture, ft.optim.sgd(1e-7), precision="bf16_params")
    state, name = step.init(params, buffers), "mix.weight"
    for seed in range(3):
        before = state.params[name]
        state, _ = step(state, zoo.batch(seed))
        assert not torch.equal(state.params[name], before)
        assert torch.equal(state.params[name].bfloat16(), before.bfloat16())


# The binding's manners.


class Failing(zoo.Normed):
    """Raises in its forward, on demand."""

    fails = True

    def forward(self, input_ids: Tensor, **_: Any) -> Tensor:
        if self.fails:
            raise RuntimeError("the forward failed")
        return super().forward(input_ids)


def _slots_and_modes(architecture: nn.Module) -> list[Any]:
    tensors = [*architecture.parameters(), *architecture.buffers()]
    return [*map(id, tensors), *(module.training for module in architecture.modules())]


@pytest.mark.parametrize("training", [True, False])
def test_after_an_error_in_the_forward_everything_is_as_it_was(training: bool) -> None:
    """Slots, modes and generators; and the next step works."""
    architecture, params, buffers = ft.split(Failing().train(training))
    architecture.norm.eval()  # modes need not be all alike
    step = ft.pretrain_step(architecture, ft.optim.adamw())
    state = step.init(params, buffers)
    before = _slots_and_modes(architecture)
    generator, prints = torch.get_rng_state(), ft.fingerprints(state)
    with pytest.raises(RuntimeError, match="the forward failed"):
        step(state, zoo.batch())
    with pytest.raises(RuntimeError, match="the forward failed"):
        ft.evaluate(step, state, [zoo.batch()])
    assert _slots_and_modes(architecture) == before
    assert torch.equal(torch.get_rng_state(), generator)
    assert ft.fingerprints(state) == prints
    assert all(p.device.type == "meta" for p in architecture.parameters())
    architecture.fails = False
    assert step(state, zoo.batch())[0].step == 1


def test_a_bad_micro_batch_is_named_before_any_compute() -> None:
    architecture, params, buffers = ft.split(Failing())
    gradient = ft.value_and_grad(LanguageModeling(), architecture)
    with pytest.raises(BatchError, match=r"micro-batch 1: input_ids: 31 at \[0, 0\] is out of"):
        gradient(
            params,
            buffers,
            [zoo.batch(), {**zoo.batch(), "input_ids": zoo.batch()["input_ids"] * 0 + 31}],
        )
    with pytest.raises(BatchError, match="an empty sequence of micro-batches"):
        gradient(params, buffers, [])


class Meeting(zoo.Tied):
    """Waits in its forward, so that another thread has all the time to bind."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = 0
        self.most = 0

    def forward(self, input_ids: Tensor, **others: Any) -> dict[str, Tensor]:
        self.inside += 1
        self.most = max(self.most, self.inside)
        threading.Event().wait(0.02)
        self.inside -= 1
        return super().forward(input_ids, **others)


def test_two_threads_bind_one_after_the_other() -> None:
    """Each gets the gradient of its own params, though the architecture is one."""
    architecture, params, buffers = ft.split(Meeting())
    gradient = ft.value_and_grad(LanguageModeling(mode="eval"), architecture)
    values = [Tensors({n: p * (1 + i) for n, p in params.items()}) for i in range(4)]
    batches = [zoo.batch(i) for i in range(4)]
    alone = [gradient(v, buffers, b) for v, b in zip(values, batches, strict=True)]
    together: dict[int, Gradients] = {}

    def work(i: int) -> None:
        for _ in range(2):
            together[i] = gradient(values[i], buffers, batches[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert architecture.most == 1
    assert all(_same_bits(alone[i].grads, together[i].grads) for i in range(4))


# Clipping, against what it says it is.

SIZES = st.sampled_from([1e-8, 1e-3, 0.1, 1.0, 30.0, 1e4, 1e15])
LIMITS = st.floats(1e-3, 1e3)


@st.composite
def gradients(draw: st.DrawFn) -> dict[str, Tensor]:
    """A few tensors of several shapes and sizes, some of them zero, some empty."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    shapes = draw(
        st.lists(st.sampled_from([(), (1,), (5,), (3, 4), (2, 3, 2), (0,)]), min_size=1, max_size=4)
    )
    size = draw(SIZES)
    return {
        f"p{i}": torch.randn(shape, generator=generator, dtype=dtype)
        * (size * draw(st.sampled_from([0.0, 1.0, 1.0])))
        for i, shape in enumerate(shapes)
    }


def _norm(grads: Mapping[str, Tensor]) -> float:
    """The plain reference: every element, summed exactly."""
    return math.sqrt(math.fsum(x * x for g in grads.values() for x in g.flatten().tolist()))


@given(grads=gradients())
def test_the_global_norm_is_that_of_all_elements(grads: dict[str, Tensor]) -> None:
    norm = global_norm(grads)
    assert (norm.dtype, norm.shape) == (torch.float64, ())
    assert float(norm) == pytest.approx(_norm(grads), rel=1e-12)


@given(grads=gradients(), limit=LIMITS)
def test_clipping_by_the_global_norm(grads: dict[str, Tensor], limit: float) -> None:
    """No longer than the limit, the direction kept, idempotent, and nothing below the limit."""
    before = {name: grad.clone() for name, grad in grads.items()}
    clipped, measured = ft.clip_by_global_norm(grads, limit)
    norm, after = _norm(grads), _norm(clipped)
    assert _same_bits(grads, before)
    assert float(measured) == pytest.approx(norm, rel=1e-12)
    assert after <= limit * (1 + 1e-6)
    if norm + 1e-6 <= limit:
        assert _same_bits(clipped, grads)
    else:
        assert after >= limit * (1 - 1e-6) * norm / (norm + 1e-6)
    factor = min(1.0, limit / (norm + 1e-6))
    for name, grad in grads.items():
        assert clipped[name].dtype == grad.dtype
        torch.testing.assert_close(clipped[name], grad * factor, rtol=1e-6, atol=0.0)
    twice, _ = ft.clip_by_global_norm(clipped, limit)
    for name, grad in clipped.items():
        torch.testing.assert_close(twice[name], grad, rtol=1e-6 + 2e-6 / limit, atol=0.0)


@given(grads=gradients(), limit=LIMITS)
def test_clipping_is_torchs_with_this_norm(grads: dict[str, Tensor], limit: float) -> None:
    """`clip_grads_with_norm_`, bit for bit; donated as well, in the memory of what was given."""
    leaves = {name: nn.Parameter(torch.zeros_like(grad)) for name, grad in grads.items()}
    for name, leaf in leaves.items():
        leaf.grad = grads[name].clone()
    clip_grads_with_norm_(leaves.values(), limit, global_norm(grads))
    expected = {name: leaf.grad for name, leaf in leaves.items()}
    pure, _ = ft.clip_by_global_norm(grads, limit)
    assert _same_bits(pure, expected)
    given_away = {name: grad.clone() for name, grad in grads.items()}
    norm = global_norm(grads)
    donated, reported = ft.clip_by_global_norm(given_away, limit, norm=norm, donate=True)
    assert _same_bits(donated, expected)
    assert reported is norm
    assert all(donated[name] is given_away[name] for name in grads)


def test_the_norm_of_large_float32_gradients_does_not_overflow() -> None:
    """In float32 the sum of squares would, from 1.8e19 on, and clipping would zero everything."""
    grads = {"a": torch.full((4,), 1e30), "b": torch.full((2,), -2e30)}
    expected = math.sqrt(4 * 1e60 + 2 * 4e60)
    assert float(global_norm(grads)) == pytest.approx(expected, rel=1e-6)
    clipped, _ = ft.clip_by_global_norm(grads, 1.0)
    assert _norm(clipped) == pytest.approx(1.0, rel=1e-6)
    huge = {"a": torch.full((4,), torch.finfo(torch.float32).max)}
    assert torch.isfinite(global_norm(huge))


def test_the_norm_does_not_depend_on_how_the_leaves_are_cut() -> None:
    """To float64's rounding, or runs that shard the same leaves differently would part."""
    whole = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    for parts in (2, 7, 100):
        cut = {str(i): part for i, part in enumerate(whole.chunk(parts))}
        assert float(global_norm(cut)) == pytest.approx(float(global_norm({"w": whole})), rel=1e-12)


def test_no_gradients_have_the_norm_zero() -> None:
    assert float(global_norm({})) == 0.0
    clipped, norm = ft.clip_by_global_norm({}, 1.0)
    assert (dict(clipped), float(norm)) == ({}, 0.0)


@given(grads=gradients(), limit=LIMITS)
def test_clipping_by_value(grads: dict[str, Tensor], limit: float) -> None:
    """`torch.nn.utils.clip_grad_value_`'s bits: no element beyond the limit, the others as is."""
    leaves = {name: nn.Parameter(torch.zeros_like(grad)) for name, grad in grads.items()}
    for name, leaf in leaves.items():
        leaf.grad = grads[name].clone()
    clip_grad_value_(leaves.values(), limit)
    clipped = ft.clip_by_value(grads, limit)
    assert _same_bits(clipped, {name: leaf.grad for name, leaf in leaves.items()})
    assert _same_bits(ft.clip_by_value(clipped, limit), clipped)
    for name, grad in grads.items():
        inside = grad.abs() <= limit
        assert torch.equal(clipped[name][inside], grad[inside])


def _adaptively(grad: Tensor, param: Tensor, factor: float, eps: float) -> Tensor:
    """The plain reference: unit by unit, in Python."""
    units = zip(grad, param, strict=True) if grad.ndim > 1 else [(grad, param)]
    clipped = []
    for of_grad, of_param in units:
        norm = math.sqrt(math.fsum(x * x for x in of_grad.flatten().tolist()))
        weight = math.sqrt(math.fsum(x * x for x in of_param.flatten().tolist()))
        limit = factor * max(weight, eps)
        clipped.append(of_grad * (limit / norm) if norm > limit else of_grad)
    return torch.stack(clipped) if grad.ndim > 1 else clipped[0]


@given(
    grads=gradients(),
    seed=st.integers(0, 2**32 - 1),
    factor=st.sampled_from([1e-3, 0.01, 0.5]),
    eps=st.sampled_from([1e-3, 0.1]),
    size=st.sampled_from([0.0, 1e-5, 1.0]),
)
def test_adaptive_clipping(
    grads: dict[str, Tensor], seed: int, factor: float, eps: float, size: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    params = {
        name: torch.randn(g.shape, generator=generator, dtype=g.dtype) * size
        for name, g in grads.items()
    }
    clipped = ft.adaptive_clip(grads, params, factor=factor, eps=eps)
    for name, grad in grads.items():
        expected = _adaptively(grad, params[name], factor, eps)
        assert clipped[name].dtype == grad.dtype
        torch.testing.assert_close(clipped[name], expected, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adaptive_clipping_of_what_overflows_when_squared(dtype: torch.dtype) -> None:
    grad = torch.tensor([[3e30, 4e30], [3e-30, 4e-30]], dtype=dtype)
    params = {"weight": torch.full((2, 2), 1e25, dtype=dtype), "bias": torch.ones(2, dtype=dtype)}
    grads = {"weight": grad, "bias": grad[0]}
    clipped = ft.adaptive_clip(grads, params, factor=0.5)
    limit = 0.5 * math.sqrt(2) * 1e25
    expected = torch.tensor([[0.6 * limit, 0.8 * limit], [3e-30, 4e-30]], dtype=dtype)
    torch.testing.assert_close(clipped["weight"], expected)
    bias = torch.tensor([0.6, 0.8], dtype=dtype) * (0.5 * math.sqrt(2))
    torch.testing.assert_close(clipped["bias"], bias, rtol=1e-2, atol=0)


def test_a_conjugate_gradient_is_clipped() -> None:
    """As autograd gives them."""
    weight = torch.tensor([3 + 4j, 1j], requires_grad=True)
    (weight.conj() * torch.tensor([1 + 2j, 2.0])).real.sum().backward()
    assert weight.grad is not None
    grad = weight.grad.conj().resolve_conj().conj()
    assert grad.is_conj()
    plain = {"a": grad.resolve_conj()}
    clipped = ft.adaptive_clip({"a": grad}, {"a": weight.detach()})
    assert _same_bits(clipped, ft.adaptive_clip(plain, {"a": weight.detach()}))
    assert _same_bits(
        ft.clip_by_global_norm({"a": grad}, 0.1)[0], ft.clip_by_global_norm(plain, 0.1)[0]
    )


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({}, r"params/a: missing, expected \[2, 2\] as its gradient"),
        ({"a": torch.ones(2)}, r"params/a: of shape \[2\], expected \[2, 2\]"),
        ({"a": None}, "params/a: NoneType, expected a tensor"),
    ],
)
def test_adaptive_clipping_is_by_weights_of_the_gradients_form(params: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ft.adaptive_clip({"a": torch.ones(2, 2)}, params)


def test_adaptive_clipping_is_a_transform_of_a_step() -> None:
    architecture, params, buffers = zoo.split("tied")
    plain = ft.pretrain_step(architecture, ft.optim.sgd(1.0))
    clipping = ft.pretrain_step(architecture, ft.optim.sgd(1.0), transform=ft.adaptive_clip)
    state = plain.init(params, buffers)
    grads = plain.gradient(params, buffers, zoo.batch(), key=keys.derive(0, "step", 0)).grads
    after, _ = clipping(state, zoo.batch())
    expected = ft.adaptive_clip(grads, params)
    for name, value in params.items():
        torch.testing.assert_close(after.params[name], value - expected[name], rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.inf, math.nan, "1.0", None, True, [1.0]])
def test_limits_are_positive_and_finite(bad: Any) -> None:
    grads = {"a": torch.ones(2)}
    with pytest.raises(ConfigError, match=r"max_norm: .*expected a positive finite number"):
        ft.clip_by_global_norm(grads, bad)
    with pytest.raises(ConfigError, match="limit: "):
        ft.clip_by_value(grads, bad)
    with pytest.raises(ConfigError, match="factor: "):
        ft.adaptive_clip(grads, grads, factor=bad)
    with pytest.raises(ConfigError, match="eps: "):
        ft.adaptive_clip(grads, grads, eps=bad)


def test_the_model_is_called_with_every_keyword_of_the_batch_and_no_labels() -> None:
    architecture, params, buffers = ft.split(zoo.Heard())
    batch = zoo.full(zoo.batch())
    ft.value_and_grad(LanguageModeling(), architecture)(params, buffers, batch)
    ft.value_and_grad(LanguageModeling(), architecture)(params, buffers, zoo.batch())
    keys = {"input_ids", "attention_mask", "position_ids"}
    full, plain = (call for call in architecture.calls if call["training"])
    assert full.keys() - {"training", "history"} == keys
    assert all(torch.equal(full[key], batch[key]) for key in keys)
    assert plain.keys() - {"training", "history"} == {"input_ids"}


def test_backward_is_outside_of_autocast() -> None:
    seen: list[bool] = []

    class Spy(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any) -> Any:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Any) -> Any:  # type: ignore[override]
            seen.append(torch.is_autocast_enabled("cpu"))
            return grad

    class Spied(zoo.Tied):
        def forward(self, *args: Any, **rest: Any) -> Any:
            return {"logits": Spy.apply(super().forward(*args, **rest)["logits"])}

    architecture, params, buffers = ft.split(Spied())
    ft.value_and_grad(LanguageModeling(), architecture, precision="bf16")(
        params, buffers, zoo.batch()
    )
    assert seen == [False]


def test_a_tensor_that_is_no_parameter_receives_no_gradient() -> None:
    beside = torch.ones((), requires_grad=True)

    class Beside(zoo.Tied):
        def forward(self, *args: Any, **rest: Any) -> Any:
            return {"logits": super().forward(*args, **rest)["logits"] * beside}

    architecture, params, buffers = ft.split(Beside())
    ft.value_and_grad(LanguageModeling(), architecture)(params, buffers, zoo.batch())
    assert beside.grad is None


def test_a_buffer_that_is_assigned_anew_is_in_the_result() -> None:
    class Assigning(zoo.Tied):
        def forward(self, *args: Any, **rest: Any) -> Any:
            out = super().forward(*args, **rest)
            self.scale = self.scale + 1
            return out

    architecture, params, buffers = ft.split(Assigning())
    gradient = ft.value_and_grad(LanguageModeling(), architecture)
    after = gradient(params, buffers, [zoo.batch(), zoo.batch(1)]).buffers
    assert (float(buffers["scale"]), float(after["scale"])) == (1.0, 3.0)


def test_an_evaluation_in_another_thread_disturbs_no_step() -> None:
    inside, go_on = threading.Event(), threading.Event()

    class Waiting(zoo.Normed):
        def forward(self, *args: Any, **rest: Any) -> Any:
            if self.training:
                inside.set()
                go_on.wait(0.3)
            return super().forward(*args, **rest)

    architecture, params, buffers = ft.split(Waiting(p=0.5))
    step = ft.pretrain_step(architecture, ft.optim.adamw())
    state = step.init(params, buffers)
    generator = torch.get_rng_state()
    alone = ft.fingerprint(step(state, zoo.batch())[0])
    inside.clear()
    measured: list[Any] = []
    other = threading.Thread(
        target=lambda: (inside.wait(), measured.append(ft.evaluate(step, state, [zoo.batch()])))
    )
    other.start()
    together = ft.fingerprint(step(state, zoo.batch())[0])
    other.join()
    assert together == alone
    assert torch.equal(torch.get_rng_state(), generator)


class Frozen(torch.nn.Module):
    """A model of which the forward uses frozen parameters alone."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(zoo.VOCABULARY, 4).requires_grad_(False)
        self.head = torch.nn.Linear(4, zoo.VOCABULARY).requires_grad_(False)
        self.unused = torch.nn.Linear(2, 2)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.embedding(input_ids))
        return logits


def test_a_loss_that_reaches_nothing_that_trains_is_told() -> None:
    architecture, params, buffers = ft.split(Frozen())
    step = ft.pretrain_step(architecture, ft.optim.sgd(1e-2))
    with pytest.raises(ft.ArchitectureError, match="does not depend on any parameter that is"):
        step(step.init(params, buffers), zoo.batch())
