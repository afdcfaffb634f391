"""Adapters: at the start the base, in every law, small in a state, never a writer of the base."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
import zoo
from hypothesis import given
from hypothesis import strategies as st
from models import families
from torch.func import functional_call, vmap

import functrain as ft
from functrain import testing
from functrain.architecture import held_values, slots
from functrain.lora import LoRA
from functrain.objectives.head import Head, find_head

EVERY = pytest.mark.parametrize("name", ["decoder", "tied"])
FORMS = {
    "plain": LoRA(rank=2),
    "dropout": LoRA(rank=3, dropout=0.3, rslora=True),
    "dora": LoRA(rank=2, dora=True, dropout=0.2),
    "beside": LoRA(rank=2, train=("*norm*.weight",)),
}
FORM = pytest.mark.parametrize("form", sorted(FORMS))


def attached(name: str = "decoder", lora: LoRA | None = None) -> tuple[Any, Any, Any]:
    """An adapted model of the zoo: architecture, adapters, buffers."""
    architecture, params, buffers = zoo.split(name)
    adapted, adapters = ft.lora.attach(architecture, params, lora or LoRA(rank=2), seed=3)
    return adapted, adapters, buffers


def stirred(adapters: Any, scale: float = 0.3) -> Any:
    """Adapters as they may be after training: B is not 0."""
    generator = torch.Generator().manual_seed(0)
    return ft.trees.Tensors(
        {n: t + scale * torch.randn(t.shape, generator=generator) for n, t in adapters.items()}
    )


def logits(architecture: Any, params: Any, buffers: Any, mode: str = "eval") -> torch.Tensor:
    ids = zoo.batch()["input_ids"]
    with torch.no_grad(), ft.bound(architecture, params, buffers, mode) as model:
        out = model(ids)
    return out["logits"] if isinstance(out, dict) else out


def started(name: str, form: str, stage: str = "sft", **options: Any) -> tuple[Any, Any]:
    """A step over adapters, and a state two steps on."""
    adapted, adapters, buffers = attached(name, FORMS[form])
    if stage == "dpo":
        reference = ft.lora.reference(adapted, adapters)
        step = ft.dpo_step(
            adapted, ft.optim.adamw(1e-2), reference=reference, dropout=True, **options
        )
    else:
        step = ft.sft_step(adapted, ft.optim.adamw(1e-2), **options)
    state = step.init(adapters, buffers, seed=5)
    for seed in (1, 2):
        batch = zoo.pairs(seed) if stage == "dpo" else zoo.batch(seed)
        state, _ = step(state, batch, donate=False)
    return step, state


@EVERY
@FORM
def test_at_the_start_it_is_its_base_to_the_bit(name: str, form: str) -> None:
    architecture, params, buffers = zoo.split(name)
    adapted, adapters = ft.lora.attach(architecture, params, FORMS[form])
    assert torch.equal(logits(adapted, adapters, buffers), logits(architecture, params, buffers))
    trained = adapters | stirred(ft.trees.select(adapters, "*.lora_*"))
    assert not torch.equal(logits(adapted, trained, buffers), logits(adapted, adapters, buffers))
    reference = ft.lora.reference(adapted, trained)
    assert torch.equal(logits(adapted, reference, buffers), logits(architecture, params, buffers))


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
def test_adapters_are_float32_whatever_the_defaults(default: torch.dtype, tmp_path: Path) -> None:
    """Of the same bits, wherever else torch would make tensors, too."""
    architecture, params, buffers = zoo.split("decoder")
    lora = LoRA(rank=2, dora=True)
    _, expected = ft.lora.attach(architecture, params, lora)
    torch.set_default_dtype(default)
    try:
        with torch.device("meta"):
            adapted, adapters = ft.lora.attach(architecture, params, lora)
        reference = ft.lora.reference(adapted, adapters)
        ft.lora.save_adapter(tmp_path, adapted, adapters)
        _, loaded = ft.lora.load_adapter(tmp_path, architecture, params)
        ft.sft_step(adapted, ft.optim.adamw()).init(adapters, buffers)
    finally:
        torch.set_default_dtype(torch.float32)
    places = dict(adapted.named_parameters())
    for found in (adapters, reference, loaded):
        for name, tensor in expected.items():
            assert places[name].dtype == torch.float32
            assert ft.trees.digest(found[name]) == ft.trees.digest(tensor), name


def test_dora_over_rows_of_zeros_begins_as_its_base_and_is_trained() -> None:
    """They have no direction: peft's outputs would be NaN."""
    architecture, params, buffers = zoo.split("decoder")
    params = {name: tensor.clone() for name, tensor in params.items()}
    for name in ("model.layers.0.self_attn.o_proj.weight", "model.layers.1.mlp.down_proj.weight"):
        params[name][::2] = 0.0
    adapted, adapters = ft.lora.attach(architecture, params, LoRA(rank=2, dora=True))
    assert torch.equal(logits(adapted, adapters, buffers), logits(architecture, params, buffers))
    step = ft.sft_step(adapted, ft.optim.adamw(1e-2))
    state = step.init(adapters, buffers)
    for _ in range(4):
        base, merged = ft.lora.merged(adapted, state.params)
        found = logits(adapted, state.params, buffers)
        torch.testing.assert_close(logits(base, merged, buffers), found, rtol=1e-3, atol=1e-4)
        state, metrics = step(state, zoo.batch())
        assert float(metrics["skipped"]) == 0
    for name in ("model.layers.0.self_attn.o_proj", "model.layers.1.mlp.down_proj"):
        assert bool(state.params[f"{name}.lora_B"][::2].any(1).all())
        assert bool(state.params[f"{name}.lora_magnitude"].all())


def test_each_layer_begins_with_an_adapter_of_its_own() -> None:
    """By its name and the seed, whichever others there are; of the size of `nn.Linear`'s weight."""
    architecture, params, _ = zoo.split("decoder")

    def first(*targets: str, seed: int = 0) -> Any:
        lora = LoRA(rank=64, targets=targets)
        return ft.trees.select(ft.lora.attach(architecture, params, lora, seed=seed)[1], "*lora_A")

    every, some = first("all-linear"), first("q_proj", "o_proj")
    assert some.keys() < every.keys()
    assert all(torch.equal(every[name], some[name]) for name in some)
    assert len({ft.trees.digest(tensor) for tensor in every.values()}) == len(every)
    assert not any(torch.equal(t, every[n]) for n, t in first("all-linear", seed=1).items())
    for tensor in every.values():
        limit = tensor.shape[1] ** -0.5
        assert 0.9 * limit < float(tensor.abs().max()) <= limit


def _lawful() -> list[Any]:
    """Every form on both models and in both stages; all together in the long run."""
    ordinary = {
        (name, form, ("sft", "dpo")[(place + index) % 2])
        for place, name in enumerate(("decoder", "tied"))
        for index, form in enumerate(FORMS)
    }
    every = itertools.product(("decoder", "tied"), FORMS, ("sft", "dpo"))
    return [
        pytest.param(*case, marks=[] if case in ordinary else pytest.mark.long) for case in every
    ]


@pytest.mark.parametrize(("name", "form", "stage"), _lawful())
def test_its_steps_obey_the_laws(name: str, form: str, stage: str, tmp_path: Path) -> None:
    step, state = started(name, form, stage, microbatches=2, max_grad_norm=0.5, ema_decay=0.9)
    batch = zoo.pairs() if stage == "dpo" else zoo.batch()
    base = {n: t.clone() for n, t in held_values(step.architecture).items()}
    testing.assert_pure(step, state, batch)
    testing.assert_donation_equal(step, state, batch)
    testing.assert_evaluation_invariant(step, state, batch, [1, 3])
    source = zoo.Batches(zoo.pairs if stage == "dpo" else zoo.batch)
    testing.assert_resumable(step, state, source, state.step + 2, tmp_path)
    assert all(torch.equal(t, base[n]) for n, t in held_values(step.architecture).items())


_started = functools.cache(started)


@EVERY
@given(data=st.data())
def test_any_partition_gives_the_same_gradient(name: str, data: st.DataObject) -> None:
    batch = data.draw(testing.batches(zoo.VOCABULARY))
    parts = data.draw(testing.partitions(len(batch["input_ids"])))
    step, state = _started(name, "plain")
    testing.assert_accumulation_invariant(step, state, batch, parts)
    testing.assert_padding_invariant(step, state, batch)


def test_with_the_adapter_zeroed_preferences_begin_at_no_margin() -> None:
    """The reference has the adapters' size: there is no second copy of the base."""
    adapted, adapters, buffers = attached()
    reference = ft.trees.zero(adapters, "*lora_B*")
    step = ft.dpo_step(adapted, ft.optim.adamw(1e-2), reference=reference)
    state, metrics = step(step.init(adapters, buffers), zoo.pairs())
    assert float(metrics["rewards/margins"]) == 0.0
    assert float(metrics["loss"]) == pytest.approx(torch.log(torch.tensor(2.0)).item(), abs=1e-7)
    _, metrics = step(state, zoo.pairs())
    assert float(metrics["rewards/margins"]) > 0.0
    first = step.init(adapters, buffers)
    testing.assert_preference_laws(step, first, zoo.pairs())
    assert reference.keys() == adapters.keys()


@given(
    rank=st.integers(1, 6),
    alpha=st.floats(0.5, 64),
    rslora=st.booleans(),
    dora=st.booleans(),
    targets=st.sampled_from([("all-linear",), ("q_proj", "v_proj"), ("*.mlp.*",), ("model.*",)]),
)
def test_merged_it_computes_the_same(
    rank: int, alpha: float, rslora: bool, dora: bool, targets: tuple[str, ...]
) -> None:
    architecture, params, buffers = zoo.split("decoder")
    lora = LoRA(rank=rank, alpha=alpha, rslora=rslora, dora=dora, targets=targets)
    adapted, adapters = ft.lora.attach(architecture, params, lora)
    adapters = stirred(adapters, 0.1)
    before = {n: t.clone() for n, t in params.items()}
    base, merged = ft.lora.merged(adapted, adapters)
    assert base is architecture
    expected = logits(adapted, adapters, buffers)
    torch.testing.assert_close(logits(base, merged, buffers), expected, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(logits(base, params, buffers), expected, atol=1e-3)
    assert all(torch.equal(params[n], before[n]) for n in before)  # and so it can be unmerged


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_merged_untrained_the_base_keeps_its_bits(dtype: torch.dtype) -> None:
    """B is 0 at first; nothing of a base is narrowed on the way."""
    architecture, params, _ = zoo.split("decoder", dtype)
    _, merged = ft.lora.merged(*ft.lora.attach(architecture, params, LoRA(rank=2)))
    assert all(torch.equal(merged[name], tensor) for name, tensor in params.items())


def test_a_state_and_its_checkpoint_hold_adapters_only(tmp_path: Path) -> None:
    adapted, adapters, buffers = attached(lora=LoRA(rank=1, targets=("q_proj",)))
    step = ft.sft_step(adapted, ft.optim.adamw(1e-2))
    state, _ = step(step.init(adapters, buffers), zoo.batch())
    assert set(state.params) == {
        f"model.layers.{n}.self_attn.q_proj.lora_{m}" for n in (0, 1) for m in "AB"
    }
    path = ft.save(tmp_path, state, beside=ft.models.config_files(adapted))
    assert not (path / "config.json").exists()  # nobody takes it for a whole model
    assert state.base == slots(adapted).base
    elements = sum(t.numel() for t in state.params.values())
    assert (path / "model.safetensors").stat().st_size < elements * 4 + 1000
    assert ft.fingerprint(ft.load(tmp_path, like=state)) == ft.fingerprint(state)


def test_another_base_is_refused(tmp_path: Path) -> None:
    """By one bit of one weight: in a step, and when a checkpoint is loaded."""
    architecture, params, buffers = zoo.split("decoder")
    adapted, adapters = ft.lora.attach(architecture, params, LoRA(rank=2))
    step = ft.sft_step(adapted, ft.optim.adamw(1e-2))
    state, _ = step(step.init(adapters, buffers), zoo.batch())
    ft.save(tmp_path, state)
    moved = {n: t.clone() for n, t in params.items()}
    name = sorted(moved)[0]
    moved[name].view(torch.int32).flatten()[0] ^= 1
    other, theirs = ft.lora.attach(architecture, moved, LoRA(rank=2))
    over = ft.sft_step(other, ft.optim.adamw(1e-2))
    with pytest.raises(ft.StateError, match="was trained over the frozen params"):
        over(state, zoo.batch())
    with pytest.raises(ft.CheckpointError, match="was trained over the frozen params"):
        ft.load(tmp_path, like=over.init(theirs, buffers))
    for base in (slots(other).base, None):
        with pytest.raises(ft.CheckpointError, match="was trained over the frozen params"):
            ft.checkpoint.load_model(tmp_path, theirs, buffers, base=base)
    kept, _ = ft.checkpoint.load_model(tmp_path, adapters, buffers, base=state.base)
    assert all(torch.equal(kept[name], tensor) for name, tensor in state.params.items())
    plain = ft.sft_step(architecture, ft.optim.adamw(1e-2))
    strange = attrs.evolve(plain.init(params, buffers), base=state.base)
    with pytest.raises(ft.StateError, match="here are no frozen params"):
        plain(strange, zoo.batch())
    same, _ = ft.lora.attach(architecture, {n: t.clone() for n, t in params.items()}, LoRA(rank=2))
    ft.sft_step(same, ft.optim.adamw(1e-2))(state, zoo.batch())  # other memory, the same bits


def test_adapters_of_another_scale_are_refused(tmp_path: Path) -> None:
    """Names and shapes are the same, and the model another; a dropout changes nothing of it."""
    architecture, params, buffers = zoo.split("decoder")

    def made(**options: Any) -> tuple[ft.Step, ft.TrainState]:
        adapted, adapters = ft.lora.attach(architecture, params, LoRA(rank=4, **options))
        step = ft.sft_step(adapted, ft.optim.adamw(1e-2))
        return step, step.init(adapters, buffers)

    step, first = made(alpha=8.0)
    state, _ = step(first, zoo.batch())
    path = ft.save(tmp_path, state)
    for options in ({"alpha": 16.0}, {"alpha": 8.0, "rslora": True}):
        other, like = made(**options)
        reason = r"its adapters are scaled by 2\.0, and those here by 4\.0; attach them with"
        with pytest.raises(ft.StateError, match=reason):
            other(state, zoo.batch())
        with pytest.raises(ft.CheckpointError, match=reason):
            ft.load(path, like=like)
        with pytest.raises(ft.CheckpointError, match=reason):
            ft.checkpoint.load_model(path, like.params, like.buffers, base=like.base)
        with pytest.raises(ft.StateError, match=reason):
            other.adopt(state)
    whole = ft.sft_step(architecture, ft.optim.adamw(1e-2)).init(params, buffers)
    other.adopt(attrs.evolve(whole, params=like.params))  # adapters in the place of a whole model
    for scale in ({"alpha": 4.0, "rslora": True, "dropout": 0.1}, {"alpha": np.float64(8.0)}):
        same, like = made(**scale)
        same(ft.load(path, like=like), zoo.batch())


def test_a_checkpoint_that_does_not_say_the_scale_is_taken(tmp_path: Path) -> None:
    """The first ones did not."""
    adapted, adapters, buffers = attached(lora=LoRA(rank=2))
    step = ft.sft_step(adapted, ft.optim.adamw(1e-2))
    like = step.init(adapters, buffers)
    state, _ = step(like, zoo.batch())
    assert state.base is not None
    digits, _, scale = state.base.partition(" ")
    assert scale == "scale=8.0"
    first = attrs.evolve(state, base=digits)
    path = ft.save(tmp_path, first)
    found = ft.load(path, like=like)
    assert ft.fingerprint(found) == ft.fingerprint(first)
    ft.checkpoint.load_model(path, adapters, buffers, base=state.base)
    after, _ = step(found, zoo.batch(1))
    assert after.base == digits  # as it was told at its beginning
    assert ft.fingerprint(after) == ft.fingerprint(step(first, zoo.batch(1))[0])


def test_a_donating_step_never_writes_into_the_base() -> None:
    architecture, params, buffers = zoo.split("decoder")
    adapted, adapters = ft.lora.attach(architecture, params, LoRA(rank=2))
    before = logits(adapted, adapters, buffers)
    full = ft.sft_step(architecture, ft.optim.adamw(1e-2), donate=True)
    full(full.init(params, buffers), zoo.batch())
    assert torch.equal(logits(adapted, adapters, buffers), before)
    step = ft.sft_step(adapted, ft.optim.adamw(1e-2), donate=True)
    state, _ = step(step.init(adapters, buffers), zoo.batch())
    _, merged = ft.lora.merged(adapted, state.params)
    full(full.init(merged, buffers), zoo.batch())
    assert torch.equal(logits(adapted, attached()[1], buffers), before)


def test_several_adapters_train_in_turns_over_one_base() -> None:
    """Each ends with the bits that it has alone; the base is in memory once."""
    adapted, adapters, buffers = attached(lora=FORMS["dropout"])
    step = ft.sft_step(adapted, ft.optim.adamw(1e-2))
    states = [step.init(adapters, buffers, seed=seed) for seed in range(3)]
    alone = []
    for number, state in enumerate(states):
        for at in range(3):
            state, _ = step(state, zoo.batch(10 * number + at))
        alone.append(ft.fingerprint(state))
    for at in range(3):
        states = [step(s, zoo.batch(10 * n + at))[0] for n, s in enumerate(states)]
    assert [ft.fingerprint(state) for state in states] == alone
    assert len(set(alone)) == 3


def test_stacked_adapters_are_one_forward_of_vmap() -> None:
    adapted, adapters, buffers = attached("tied")
    several = [stirred(adapters, scale) for scale in (0.1, 0.2, 0.3)]
    stacked = {n: torch.stack([each[n] for each in several]) for n in adapters}
    ids = zoo.batch()["input_ids"]

    def forward(values: Any) -> torch.Tensor:
        out: torch.Tensor = functional_call(adapted, {**values, **buffers}, (ids,))["logits"]
        return out

    adapted.eval()
    found = vmap(forward)(stacked)
    for number, each in enumerate(several):
        torch.testing.assert_close(found[number], logits(adapted, each, buffers))


def test_a_target_is_found_by_name_or_by_its_end() -> None:
    def layers(*targets: str) -> set[str]:
        adapted, _, _ = attached(lora=LoRA(rank=1, targets=targets))
        return set(ft.lora.adapter_of(adapted).layers)

    assert layers("q_proj") == {f"model.layers.{n}.self_attn.q_proj" for n in (0, 1)}
    assert layers("model.layers.0.self_attn.[qv]_proj") == {
        f"model.layers.0.self_attn.{m}_proj" for m in "qv"
    }
    assert layers("layers.1.mlp.*") == {
        f"model.layers.1.mlp.{m}_proj" for m in ("gate", "up", "down")
    }
    assert not any("lm_head" in name for name in layers("all-linear"))
    assert len(layers("all-linear")) == 14
    architecture, params, _ = ft.split(zoo.decoder(tied=False))
    untied, _ = ft.lora.attach(architecture, params)
    assert len(ft.lora.adapter_of(untied).layers) == 14


class Attending(torch.nn.Module):
    """A model of torch's own attention, which reads its output projection's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(zoo.VOCABULARY, 8)
        self.attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = torch.nn.Linear(8, zoo.VOCABULARY)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(input_ids)
        mask = torch.nn.Transformer.generate_square_subsequent_mask(input_ids.shape[1])
        out, _ = self.attention(hidden, hidden, hidden, attn_mask=mask, need_weights=False)
        logits: torch.Tensor = self.head(hidden + out)
        return logits


def test_a_layer_that_is_never_called_is_no_target() -> None:
    architecture, params, _ = ft.split(Attending())
    adapted, _ = ft.lora.attach(architecture, params)
    assert ft.lora.adapter_of(adapted).layers == ("head",)
    for targets in ("out_proj", "attention.*"):
        with pytest.raises(ft.ConfigError, match=r"attention\.out_proj is never called"):
            ft.lora.attach(architecture, params, LoRA(targets=(targets,)))


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_a_layer_that_kernels_read_is_no_target(name: str) -> None:
    """Mamba's out_proj, whose weight the fast kernels of CUDA read; by name it is one."""
    architecture, params, _ = ft.split(families.made(name))
    adapted, _ = ft.lora.attach(architecture, params)
    assert not any("out_proj" in each for each in ft.lora.adapter_of(adapted).layers)
    adapted, _ = ft.lora.attach(architecture, params, LoRA(targets=("out_proj",)))
    assert any("out_proj" in each for each in ft.lora.adapter_of(adapted).layers)


def test_a_mixer_that_calls_its_out_proj_everywhere_keeps_its_adapter() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.JambaConfig(
        **families.GROUPED,
        attn_layer_period=2,
        attn_layer_offset=1,
        num_experts=1,
        mamba_d_state=4,
        mamba_dt_rank=2,
    )
    architecture, params, _ = families.stirred(config)
    _, adapters = ft.lora.attach(architecture, params, LoRA(rank=2))
    assert any(name.endswith("mamba.out_proj.lora_A") for name in adapters)
    assert not any("dt_proj" in name for name in adapters)


@pytest.mark.parametrize("name", ["falcon", "falcon_mamba", "mamba"])
def test_every_adapter_of_all_linear_is_trained(name: str) -> None:
    architecture, params, buffers = ft.split(families.made(name))
    adapted, adapters = ft.lora.attach(architecture, params, LoRA(rank=2))
    passed = ("dt_proj", "mixer.out_proj")
    assert not any(f".{each}." in name for each in passed for name in adapters)
    step = ft.sft_step(adapted, ft.optim.adamw(1e-2))
    state, _ = step(step.init(adapters, buffers), zoo.batch())
    assert all(bool(t.any()) for n, t in state.params.items() if n.endswith("lora_B"))


class Reading(torch.nn.Module):
    """A model that computes with the weight of a layer which it never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(zoo.VOCABULARY, 4)
        self.mix, self.head = torch.nn.Linear(4, 4), torch.nn.Linear(4, zoo.VOCABULARY)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden = torch.nn.functional.linear(self.embedding(input_ids), self.mix.weight)
        logits: torch.Tensor = self.head(hidden)
        return logits


def test_adapters_that_nothing_reaches_are_told_of_once() -> None:
    architecture, params, buffers = ft.split(Reading())
    adapted, adapters = ft.lora.attach(architecture, params, LoRA(rank=2))
    step = ft.sft_step(adapted, ft.optim.adamw(1e-2))
    state = step.init(adapters, buffers)
    with pytest.warns(ft.errors.FunctrainWarning, match=r"'mix' .*got no gradient"):
        state, _ = step(state, zoo.batch())
    step(state, zoo.batch())


class Own(torch.nn.Linear):
    """A linear layer with a forward of its own."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002
        return super().forward(input) + 1


def test_where_no_layer_can_be_adapted_it_says_why() -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(3, 4), Own(4, 4))
    architecture, params, _ = ft.split(model)
    with pytest.raises(ft.ConfigError, match=r"'all-linear': 1 is Own, which has a forward of its"):
        ft.lora.attach(architecture, params)


class Hooked(torch.nn.Module):
    """An embedding and two linear layers, the first as it is given."""

    def __init__(self, mix: torch.nn.Module) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(zoo.VOCABULARY, 8)
        self.mix, self.head = mix, torch.nn.Linear(8, zoo.VOCABULARY)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.mix(self.embedding(input_ids)))
        return logits


def test_hooks_of_a_layer_are_those_of_the_adapted_one() -> None:
    """Before and after, with keywords too: the adapter is within them, as when it is merged."""
    layer = torch.nn.Linear(8, 8)
    layer.register_forward_pre_hook(lambda _, given: (given[0] * 3,))
    layer.register_forward_pre_hook(lambda _, given, more: (given, more), with_kwargs=True)
    layer.register_forward_hook(lambda _, given, out: out.tanh())
    architecture, params, buffers = ft.split(Hooked(layer))
    adapted, adapters = ft.lora.attach(architecture, params, LoRA(rank=2, targets=("mix",)))
    expected = logits(architecture, params, buffers)
    assert torch.equal(logits(adapted, adapters, buffers), expected)
    trained = stirred(adapters)
    base, merged = ft.lora.merged(adapted, trained)
    found = logits(adapted, trained, buffers)
    assert not torch.allclose(found, expected, atol=1e-3)
    torch.testing.assert_close(found, logits(base, merged, buffers))


def _with_a_buffer() -> torch.nn.Linear:
    layer = torch.nn.Linear(8, 8)
    layer.register_buffer("gain", torch.ones(8))
    return layer


def _with_a_module() -> torch.nn.Linear:
    layer = torch.nn.Linear(8, 8)
    layer.add_module("inner", torch.nn.Identity())
    return layer


def _with_a_parameter() -> torch.nn.Linear:
    layer = torch.nn.Linear(8, 8)
    layer.register_parameter("gain", torch.nn.Parameter(torch.ones(8)))
    return layer


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(8, 8)),
            r"its weight is computed of other tensors",
        ),
        (
            lambda: torch.nn.utils.parametrizations.spectral_norm(torch.nn.Linear(8, 8)),
            r"its weight is computed of other tensors",
        ),
        (_with_a_buffer, "it holds 'gain' beside its weight and bias"),
        (_with_a_module, "it holds 'inner' beside its weight and bias"),
        (_with_a_parameter, "it holds 'gain' beside its weight and bias"),
    ],
)
def test_a_layer_that_is_more_than_linear_is_no_target(make: Any, message: str) -> None:
    architecture, params, buffers = ft.split(Hooked(make()))
    adapted, adapters = ft.lora.attach(architecture, params)
    assert ft.lora.adapter_of(adapted).layers == ("head",)
    assert torch.equal(logits(adapted, adapters, buffers), logits(architecture, params, buffers))
    with pytest.raises(ft.ConfigError, match=rf"mix cannot be adapted: {message}"):
        ft.lora.attach(architecture, params, LoRA(targets=("mix",)))
    with pytest.raises(ft.ConfigError, match=rf"mix cannot be adapted: {message}"):
        ft.lora.attach(architecture, params, LoRA(targets=("head", "m[ij]x")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ("q_porj",)}, r"matches 'q_porj'; did you mean 'q_proj'"),
        (
            {"targets": ("embed_tokens",)},
            r"matches 'embed_tokens': .*tokens is Embedding",
        ),
        ({"targets": ()}, "targets: none"),
        ({"targets": 3}, "lora: 3, expected patterns"),
        ({"train": ("nrom",)}, "no parameter's name matches 'nrom'"),
        ({"rank": 0}, "rank: 0, expected an integer of at least 1"),
        ({"rank": True}, "rank: True"),
        ({"alpha": 0}, "alpha: 0, expected a positive"),
        ({"alpha": float("nan")}, "alpha: nan"),
        ({"dropout": 1.0}, r"dropout: 1.0, expected a number in \[0, 1\)"),
        ({"dora": 1}, "dora: 1, expected True or False"),
    ],
)
def test_what_cannot_be_adapted_is_refused(options: Any, message: str) -> None:
    with pytest.raises(ft.ConfigError, match=message):
        attached(lora=LoRA(**options))


def test_a_tied_head_is_refused_and_a_second_adapter_too() -> None:
    architecture, params, buffers = zoo.split("tied")
    with pytest.raises(ft.ConfigError, match="head's weight is tied to another parameter"):
        ft.lora.attach(architecture, params, LoRA(targets=("head",)))
    adapted, adapters = ft.lora.attach(architecture, params)
    with pytest.raises(ft.ConfigError, match="has adapters already"):
        ft.lora.attach(adapted, adapters)
    with pytest.raises(ft.ConfigError, match="the architecture has no adapters"):
        ft.lora.merged(architecture, params)
    with pytest.raises(ft.ArchitectureError, match="params: missing"):
        ft.lora.attach(architecture, {})
    with pytest.raises(ft.ConfigError, match=r"expected functrain\.lora\.LoRA"):
        ft.lora.attach(architecture, params, {"rank": 2})  # type: ignore[arg-type]
    with pytest.raises(ft.ConfigError, match=r"'bf16_params' computes in torch\.bfloat16"):
        ft.sft_step(adapted, ft.optim.adamw(), precision="bf16_params")
    del buffers


def test_a_base_of_half_precision_stays_as_it_is() -> None:
    architecture, params, buffers = zoo.split("decoder", torch.bfloat16)
    adapted, adapters = ft.lora.attach(architecture, params, LoRA(rank=2))
    assert {t.dtype for t in adapters.values()} == {torch.float32}
    for precision in ("fp32", "bf16", "bf16_params"):
        step = ft.sft_step(adapted, ft.optim.adamw(1e-2), precision=precision)
        state, metrics = step(step.init(adapters, buffers), zoo.batch())
        assert float(metrics["skipped"]) == 0
        assert {t.dtype for t in held_values(adapted).values()} == {torch.bfloat16}
        assert {t.dtype for t in state.params.values()} == {torch.float32}
        assert {t.dtype for t in ft.lora.merged(adapted, state.params)[1].values()} == {
            torch.bfloat16
        }


def test_a_base_of_half_precision_is_merged_with_one_rounding() -> None:
    """Of the sum in float32: of an adapter that is rounded first, a part would be lost."""
    architecture, params, _ = zoo.split("decoder", torch.bfloat16)
    adapted, adapters = ft.lora.attach(architecture, params, LoRA(rank=2, alpha=3))
    adapters = stirred(adapters)
    _, merged = ft.lora.merged(adapted, adapters)
    names = [name.removesuffix(".lora_A") for name in ft.trees.select(adapters, "*.lora_A")]
    for name in names:
        delta = (adapters[f"{name}.lora_B"] @ adapters[f"{name}.lora_A"]) * 1.5
        expected = (params[f"{name}.weight"].float() + delta).bfloat16()
        assert torch.equal(merged[f"{name}.weight"], expected), name


def test_the_head_is_found_over_a_frozen_base(monkeypatch: Any) -> None:
    """The frozen head's rows are made a few at a time, for the policy and the reference alike."""
    adapted, adapters, buffers = attached()
    assert isinstance(find_head(adapted), str)  # without its adapters; asked again when it has them
    found = []
    for budget in (1 << 30, 256):
        monkeypatch.setattr("functrain.objectives.chunks.BUDGET", budget)
        reference = ft.lora.reference(adapted, adapters)
        step = ft.dpo_step(adapted, ft.optim.adamw(1e-2), reference=reference)
        state, _ = step(step.init(adapters, buffers), zoo.pairs())
        _, metrics = step(state, zoo.pairs(1))
        found.append(float(metrics["loss"]))
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert isinstance(find_head(adapted), Head)
    untied = zoo.decoder(tied=False)
    architecture, params, _ = ft.split(untied)
    other, _ = ft.lora.attach(architecture, params, LoRA(targets=("lm_head",)))
    assert find_head(other) == "its projection has a forward of its own"


def test_recomputed_activations_drop_the_same() -> None:
    """The dropout of adapters is drawn from the step's key, also where it is drawn again."""
    prints = []
    options: list[dict[str, Any]] = [{}, {"checkpoint": "model.layers.*"}]
    options.append({**options[1], "recompute": "selective"})
    for each in options:
        step, state = started("decoder", "dora", **each)
        prints.append(ft.fingerprint(step(state, zoo.batch())[0]))
    assert prints[0] == prints[1] == prints[2]
    _, other = started("decoder", "beside")
    assert ft.fingerprint(other) != prints[0]


def test_what_is_trained_beside_is_trained() -> None:
    adapted, adapters, buffers = attached(lora=FORMS["beside"])
    norms = [n for n in adapters if "norm" in n]
    assert norms
    step = ft.sft_step(adapted, ft.optim.adamw(1e-2))
    state, _ = step(step.init(adapters, buffers), zoo.batch())
    assert not any(torch.equal(state.params[n], adapters[n]) for n in norms)
    base, merged = ft.lora.merged(adapted, state.params)
    assert all(torch.equal(merged[n], state.params[n]) for n in norms)
    expected = logits(adapted, state.params, buffers)
    torch.testing.assert_close(logits(base, merged, buffers), expected)


def test_a_cached_reference_knows_its_base(tmp_path: Path) -> None:
    """The same adapters over another base are another reference."""

    def cached(scale: float, lora: LoRA) -> Any:
        architecture, params, buffers = zoo.split("decoder")
        params = ft.trees.map_leaves(lambda t: t * scale, params)
        adapted, adapters = ft.lora.attach(architecture, params, lora, seed=1)
        attach = ft.attach_reference(adapted, ft.trees.zero(adapters, "*lora_B*"), buffers)
        with ft.ReferenceCache(tmp_path / "cache", attach) as cache:
            return cache(zoo.pairs())["reference_logps"]["chosen"]

    found = cached(1.0, LoRA(rank=2))
    assert torch.equal(cached(1.0, LoRA(rank=2)), found)
    for scale, lora in ((1.1, LoRA(rank=2)), (1.0, LoRA(rank=2, alpha=3))):
        with pytest.raises(ft.DataError, match="of another reference"):
            cached(scale, lora)
