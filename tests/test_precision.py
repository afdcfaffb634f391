"""Precision policies, and the loss scale against `torch.amp.GradScaler`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
import zoo
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import functrain as ft
from functrain import precision
from functrain.errors import ConfigError
from functrain.precision import LossScale, Precision

CPU = torch.device("cpu")


@given(
    finite=st.lists(st.sampled_from([True, True, True, False]), max_size=60),
    initial=st.sampled_from([1.0, 2.0**16, 2.0**127, 3e-38, 1e-45]),
    growth_factor=st.sampled_from([2.0, 1.5]),
    backoff_factor=st.sampled_from([0.5, 0.3]),
    growth_interval=st.integers(1, 5),
)
def test_the_trajectory_is_a_grad_scalers(
    finite: list[bool], initial: float, **options: Any
) -> None:
    """Scale and growth count after every step, at the ends of float32's range as well."""
    theirs = torch.amp.GradScaler("cpu", init_scale=initial, **options)
    parameter = nn.Parameter(torch.ones(()))
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    ours = ft.init_loss_scale(initial, **options)
    for good in finite:
        theirs.scale(torch.ones(()))  # makes its tensors
        parameter.grad = torch.tensor(1.0 if good else math.inf)
        theirs.step(optimizer)
        theirs.update()
        before = attrs.evolve(
            ours, scale=ours.scale.clone(), growth_count=ours.growth_count.clone()
        )
        after = ft.update_loss_scale(ours, torch.tensor(good))
        assert torch.equal(ours.scale, before.scale), "an update is pure"
        assert torch.equal(ours.growth_count, before.growth_count), "an update is pure"
        ours = after
        assert float(ours.scale) == theirs.get_scale()
        assert int(ours.growth_count) == theirs._get_growth_tracker()
    assert (ours.scale.dtype, ours.growth_count.dtype) == (torch.float32, torch.int32)


@given(
    seed=st.integers(0, 2**32 - 1),
    scale=st.sampled_from([1.0, 2.0**16, 3.0, 1e-3, 2.0**127]),
)
def test_unscaling_has_the_bits_of_a_grad_scalers(seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = {"a": torch.randn(4, 3, generator=generator) * scale, "b": torch.tensor(scale)}
    leaves = {name: nn.Parameter(torch.zeros_like(value)) for name, value in values.items()}
    for name, leaf in leaves.items():
        leaf.grad = values[name].clone()
    theirs = torch.amp.GradScaler("cpu", init_scale=scale)
    theirs.scale(torch.ones(()))
    theirs.unscale_(torch.optim.SGD(leaves.values(), lr=0.0))
    given_ = {name: value.clone() for name, value in values.items()}
    ours = ft.unscale(given_, ft.init_loss_scale(scale))
    for name, leaf in leaves.items():
        assert torch.equal(ours[name], leaf.grad)
        assert torch.equal(given_[name], values[name]), "unscaling is pure"
    ft.unscale(given_, ft.init_loss_scale(scale), donate=True)
    assert all(torch.equal(given_[name], ours[name]) for name in ours)


def test_a_scaled_loss_has_scaled_gradients() -> None:
    scaler = ft.init_loss_scale(1024.0)
    leaf = torch.tensor(3.0, requires_grad=True)
    (grad,) = torch.autograd.grad(ft.scale_loss(leaf**2, scaler), [leaf])
    assert float(grad) == 6 * 1024
    assert float(ft.unscale({"leaf": grad}, scaler)["leaf"]) == 6.0


def test_without_a_scaler_nothing_is_scaled() -> None:
    loss, grads = torch.tensor(3.0), {"a": torch.ones(2)}
    assert ft.scale_loss(loss, None) is loss
    assert ft.unscale(grads, None)["a"] is grads["a"]


def test_the_defaults_are_a_grad_scalers() -> None:
    theirs, ours = torch.amp.GradScaler("cpu"), ft.init_loss_scale()
    assert float(ours.scale) == theirs.get_scale() == precision.POLICIES["fp16"].initial_scale
    assert ours.growth_factor == theirs.get_growth_factor()
    assert ours.backoff_factor == theirs.get_backoff_factor()
    assert ours.growth_interval == theirs.get_growth_interval()
    assert precision.POLICIES["fp16"].growth_interval == theirs.get_growth_interval()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"initial": 1e39}, "initial loss scale: 1e.39 is not a positive finite number in float32"),
        ({"initial": 1e-46}, "initial loss scale: 1e-46 is not a positive finite number"),
        ({"initial": 0.0}, "initial loss scale: 0.0 is not a positive finite number"),
        ({"initial": math.inf}, "initial loss scale: inf"),
        ({"initial": math.nan}, "initial loss scale: nan"),
        ({"growth_factor": "2"}, "growth_factor='2', expected a number"),
        ({"backoff_factor": None}, "backoff_factor=None, expected a number"),
        ({"growth_factor": 1.0}, "growth_factor=1.0 must be above 1"),
        ({"backoff_factor": 1.0}, "backoff_factor=1.0 in"),
        ({"backoff_factor": 0.0}, "backoff_factor=0.0 in"),
        ({"growth_interval": 0}, "growth_interval=0 >= 1"),
    ],
)
def test_a_loss_scale_that_makes_no_sense_is_refused(options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ft.init_loss_scale(**options)


@pytest.mark.parametrize("name", sorted(precision.POLICIES))
def test_a_policy_is_known_by_its_name(name: str) -> None:
    policy = precision.policy(name)
    assert policy.name == name
    assert precision.policy(policy) is policy
    assert hash(policy) == hash(attrs.evolve(policy))


def test_an_unknown_policy_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="precision: 'bf61' is unknown; did you mean 'bf16'"):
        precision.policy("bf61")
    with pytest.raises(ConfigError, match="'int8' is unknown"):
        ft.pretrain_step(zoo.split("tied")[0], ft.optim.adamw(), precision="int8")


class Watched(zoo.Tied):
    """Remembers the dtypes of its weight, of a product, and of a norm."""

    def forward(self, input_ids: torch.Tensor, **_: Any) -> dict[str, torch.Tensor]:
        hidden = self.embedding(input_ids)
        product = self.mix(hidden)
        self.dtypes = [t.dtype for t in (self.mix.weight, product, self.norm(product))]
        return {"logits": self.head(hidden + product)}


@pytest.mark.parametrize(
    ("name", "weight", "product"),
    [
        ("fp32", torch.float32, torch.float32),
        ("bf16", torch.float32, torch.bfloat16),
        ("fp16", torch.float32, torch.float16),
        ("bf16_params", torch.bfloat16, torch.bfloat16),
    ],
)
def test_a_policy_decides_what_the_forward_computes_in(
    name: str, weight: torch.dtype, product: torch.dtype
) -> None:
    """In training and in evaluation; the state's params and the loss are float32 and more."""
    architecture, params, buffers = ft.split(Watched())
    step = ft.pretrain_step(architecture, ft.optim.adamw(), precision=name)
    state = step.init(params, buffers)
    after, metrics = step(state, zoo.batch())
    assert architecture.dtypes[:2] == [weight, product]
    architecture.dtypes = []
    evaluated = ft.evaluate(step, state, [zoo.batch()])
    assert architecture.dtypes[:2] == [weight, product]
    assert {p.dtype for p in after.params.values()} == {torch.float32}
    assert metrics["loss"].dtype == evaluated["eval_loss"].dtype == torch.float64
    assert float(evaluated["eval_loss"]) == pytest.approx(float(metrics["loss"]), rel=1e-6)
    assert (state.scaler is not None) is (name == "fp16")


def test_autocast_ends_with_the_forward() -> None:
    for name in ("bf16", "fp16"):
        context = precision.policy(name).context(CPU)
        with context:
            assert torch.is_autocast_enabled("cpu")
        assert not torch.is_autocast_enabled("cpu")
    with torch.autocast("cpu", torch.bfloat16), precision.policy("fp32").context(CPU):
        assert not torch.is_autocast_enabled("cpu")


def test_a_cast_leaves_integers_and_the_given_values_as_they_are() -> None:
    policy = precision.policy("bf16_params")
    whole, wide = torch.ones(2, dtype=torch.int64), torch.ones(2)
    assert policy.leaf(whole).dtype == torch.int64
    assert policy.leaf(wide).dtype == torch.bfloat16
    assert wide.dtype == torch.float32
    plain = precision.policy("fp32").leaf(wide.requires_grad_())
    assert plain.data_ptr() == wide.data_ptr()
    assert not plain.requires_grad


def test_batchnorm_goes_with_its_statistics_under_bf16_params() -> None:
    """Its weights stay float32, as its kernel wants them beside float32 statistics."""
    architecture, params, buffers = zoo.split("normed")
    step = ft.pretrain_step(architecture, ft.optim.adamw(1e-2), precision="bf16_params")
    seen = step.value_and_grad.values(params)
    assert {n for n, t in seen.items() if t.dtype == torch.float32} == {"norm.weight", "norm.bias"}
    after, metrics = step(step.init(params, buffers), zoo.batch())
    assert float(metrics["skipped"]) == 0
    assert after.buffers["norm.running_mean"].dtype == torch.float32


def test_a_policy_of_ones_own() -> None:
    """Float16 weights with a loss scale; everything is a field."""
    own = Precision(
        name="own", cast=torch.float16, loss_scale=True, initial_scale=8.0, growth_interval=1
    )
    architecture, params, buffers = zoo.split("tied")
    step = ft.pretrain_step(architecture, ft.optim.adamw(1e-2), precision=own)
    state = step.init(params, buffers)
    scales = []
    for seed in range(4):
        state, metrics = step(state, zoo.batch(seed))
        scales.append(float(metrics["loss_scale"]))
    assert scales == [8.0, 16.0, 32.0, 64.0]
    assert {p.dtype for p in state.params.values()} == {torch.float32}


def test_a_scaler_is_made_on_the_params_device() -> None:
    scaler = precision.policy("fp16").init_scaler(CPU)
    assert isinstance(scaler, LossScale)
    assert scaler.scale.device == scaler.growth_count.device == CPU
    assert precision.policy("bf16").init_scaler(CPU) is None


def test_factors_that_are_integers_and_a_scale_of_0_are_loaded(tmp_path: Path) -> None:
    """To 0 it comes as torch's does, where every step has overflowed."""
    architecture, params, buffers = zoo.split("tied")
    step = ft.pretrain_step(architecture, ft.optim.adamw(), precision="fp16")
    first = step.init(params, buffers)
    scaler = attrs.evolve(ft.init_loss_scale(growth_factor=3), scale=torch.zeros(()))
    state = attrs.evolve(first, scaler=scaler)
    ft.save(tmp_path, state)
    assert ft.fingerprint(ft.load(tmp_path, like=first)) == ft.fingerprint(state)
