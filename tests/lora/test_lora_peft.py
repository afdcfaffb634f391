"""Adapters beside peft's own: the same files, the same outputs, the same step, the same merge."""

from __future__ import annotations

import copy
import functools
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zoo
from hypothesis import given
from hypothesis import strategies as st
from models import families
from safetensors.torch import load_file, save_file

import functrain as ft
from functrain.lora import LoRA

peft = pytest.importorskip("peft")
# What peft calls of transformers goes by another name there by now; only peft can mend that.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

LAYERS = {
    "falcon": ("query_key_value", "dense_4h_to_h"),
    "gpt2": ("c_attn", "c_fc"),
    "gpt_neox": ("query_key_value",),
    "llama": ("q_proj", "down_proj"),
    "mamba": ("in_proj",),
    "mixtral": ("q_proj", "v_proj"),
    "qwen2": ("k_proj",),  # with a bias
}
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"rslora": True},
    "dora": {"dora": True},
}
FORM = pytest.mark.parametrize("form", sorted(FORMS))
# A scale alone is the same whatever the layers are.
EVERY_FORM = pytest.mark.parametrize(
    ("name", "form"),
    [
        pytest.param(
            name,
            form,
            marks=pytest.mark.long if form == "rslora" and name not in ("gpt2", "llama") else [],
        )
        for name in sorted(LAYERS)
        for form in sorted(FORMS)
    ],
)


def based(name: str) -> tuple[Any, Any, Any, Any]:
    """An ordinary frozen model, and the same one as architecture, params and buffers."""
    ordinary = families.without_dropout(families.made(name)).requires_grad_(False)
    return (ordinary, *ft.split(copy.deepcopy(ordinary)))


@functools.cache
def ours(name: str, form: str, **options: Any) -> tuple[Any, Any, Any]:
    """An adapted model whose adapters are those of two steps."""
    _, architecture, params, buffers = based(name)
    lora = LoRA(rank=3, alpha=5, targets=LAYERS[name], **FORMS[form], **options)
    adapted, adapters = ft.lora.attach(architecture, params, lora)
    step = ft.sft_step(adapted, ft.optim.adamw(1e-1))
    state = step.init(adapters, buffers)
    for seed in (0, 1):
        state, _ = step(state, zoo.batch(seed))
    return adapted, state.params, buffers


def theirs(name: str, form: str, **options: Any) -> Any:
    """A model of peft's whose adapters are random."""
    config = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=list(LAYERS[name]),
        use_rslora=form == "rslora",
        use_dora=form == "dora",
        init_lora_weights=False,
        fan_in_fan_out=name == "gpt2",
        task_type="CAUSAL_LM",
        **options,
    )
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = peft.get_peft_model(based(name)[0], config)
    for parameter, value in model.named_parameters():
        if "magnitude" in parameter:  # at the norm of W + sBA it would hide what it multiplies
            value.data.mul_(1.5)
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=zoo.batch()["input_ids"]).logits
    return found


def bound_logits(architecture: Any, params: Any, buffers: Any) -> torch.Tensor:
    with ft.bound(architecture, params, buffers, "eval") as model:
        return logits(model)


def assert_outputs(found: torch.Tensor, expected: torch.Tensor, form: str) -> None:
    """Bit for bit; with DoRA, where peft takes the product B·A another way, to rounding."""
    if form == "dora":
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(found, expected)


@EVERY_FORM
def test_peft_reads_what_we_write(name: str, form: str, tmp_path: Path) -> None:
    adapted, adapters, buffers = ours(name, form)
    ft.lora.save_adapter(tmp_path, adapted, adapters, base="the/base")
    ordinary = based(name)[0]
    before = logits(ordinary)
    model = peft.PeftModel.from_pretrained(ordinary, tmp_path).eval()
    assert model.peft_config["default"].base_model_name_or_path == "the/base"
    expected = bound_logits(adapted, adapters, buffers)
    assert not torch.allclose(before, expected, atol=1e-3)
    assert_outputs(logits(model), expected, form)


@EVERY_FORM
def test_we_read_what_peft_writes(name: str, form: str, tmp_path: Path) -> None:
    model = theirs(name, form).eval()
    model.save_pretrained(tmp_path)
    _, architecture, params, buffers = based(name)
    adapted, adapters = ft.lora.load_adapter(tmp_path, architecture, params)
    assert_outputs(bound_logits(adapted, adapters, buffers), logits(model), form)
    again = ft.lora.save_adapter(tmp_path / "again", adapted, adapters)
    given, written = (load_file(d / "adapter_model.safetensors") for d in (tmp_path, again))
    assert given.keys() == written.keys()
    assert all(torch.equal(given[n], written[n]) for n in given)
    back, same = ft.lora.load_adapter(again, architecture, params)
    assert all(torch.equal(adapters[n], same[n]) for n in adapters)
    assert ft.lora.adapter_of(back).lora == ft.lora.adapter_of(adapted).lora


@EVERY_FORM
def test_merged_it_is_what_peft_merges(name: str, form: str, tmp_path: Path) -> None:
    adapted, adapters, _ = ours(name, form)
    ft.lora.save_adapter(tmp_path, adapted, adapters)
    model = peft.PeftModel.from_pretrained(based(name)[0], tmp_path).eval()
    expected = dict(model.merge_and_unload().named_parameters())
    _, merged = ft.lora.merged(adapted, adapters)
    assert merged.keys() == expected.keys()
    for parameter, value in expected.items():
        torch.testing.assert_close(merged[parameter], value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@FORM
def test_a_step_is_that_of_an_ordinary_loop_over_peft(name: str, form: str, tmp_path: Path) -> None:
    model = theirs(name, form).train()
    model.save_pretrained(tmp_path)
    _, architecture, params, buffers = based(name)
    adapted, adapters = ft.lora.load_adapter(tmp_path, architecture, params)
    step = ft.sft_step(adapted, ft.optim.adamw(1e-2))
    batch = zoo.batch()
    state, _ = step(step.init(adapters, buffers), batch)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, fused=True)
    rows = model(input_ids=batch["input_ids"]).logits[:, :-1].flatten(0, 1)
    targets = batch["labels"][:, 1:].flatten()
    (F.cross_entropy(rows, targets, reduction="sum") / (targets != -100).sum()).backward()
    optimizer.step()
    model.save_pretrained(tmp_path / "after")
    _, expected = ft.lora.load_adapter(tmp_path / "after", architecture, params)
    assert expected.keys() == state.params.keys()
    for parameter, value in expected.items():
        if form == "dora":
            torch.testing.assert_close(state.params[parameter], value, rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(state.params[parameter], value), parameter


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@FORM
def test_dropout_drops_what_it_does_in_peft(name: str, form: str, tmp_path: Path) -> None:
    """In train mode, from the same draws; DoRA's plain output is then of what is left."""
    model = theirs(name, form, lora_dropout=0.4).train()
    model.save_pretrained(tmp_path)
    _, architecture, params, buffers = based(name)
    adapted, adapters = ft.lora.load_adapter(tmp_path, architecture, params)
    with torch.random.fork_rng():
        torch.manual_seed(9)
        expected = logits(model)
        torch.manual_seed(9)
        with ft.bound(adapted, adapters, buffers, "train") as bound:
            found = logits(bound)
    assert_outputs(found, expected, form)
    assert not torch.allclose(found, bound_logits(adapted, adapters, buffers))


@given(rank=st.integers(1, 5), alpha=st.floats(0.5, 40), rslora=st.booleans(), dora=st.booleans())
def test_any_adapter_comes_back_with_its_bits(
    tmp_path_factory: Any, rank: int, alpha: float, rslora: bool, dora: bool
) -> None:
    _, architecture, params, _ = based("llama")
    lora = LoRA(rank=rank, alpha=alpha, rslora=rslora, dora=dora, targets=("mlp.*", "o_proj"))
    adapted, adapters = ft.lora.attach(architecture, params, lora, seed=rank)
    directory = tmp_path_factory.mktemp("adapter")
    ft.lora.save_adapter(directory, adapted, adapters)
    back, same = ft.lora.load_adapter(directory, architecture, params)
    assert same.keys() == adapters.keys()
    assert all(torch.equal(adapters[n], same[n]) for n in adapters)
    found, layers = ft.lora.adapter_of(back), ft.lora.adapter_of(adapted).layers
    assert set(found.layers) == set(layers)
    assert found.lora.scaling == pytest.approx(lora.scaling)


def _config(directory: Path, **changes: Any) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _weights(directory: Path, change: Any) -> None:
    path = directory / "adapter_model.safetensors"
    save_file(change(load_file(path)), path, {"format": "pt"})


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: (d / "adapter_config.json").unlink(), "cannot be read"),
        (lambda d: (d / "adapter_config.json").write_text("{"), "not JSON"),
        (lambda d: (d / "adapter_config.json").write_text("[]"), "expected an object"),
        (lambda d: (d / "adapter_model.safetensors").unlink(), "cannot be read"),
        (lambda d: (d / "adapter_model.safetensors").write_bytes(b"1"), "not a safetensors file"),
        (lambda d: _config(d, peft_type="IA3"), "peft_type is IA3, which is not supported"),
        (lambda d: _config(d, bias="all"), "bias is all"),
        (lambda d: _config(d, modules_to_save=["lm_head"]), "modules_to_save is"),
        (lambda d: _config(d, rank_pattern={"q_proj": 4}), "rank_pattern is"),
        (lambda d: _config(d, alpha_pattern={"q_proj": 4}), "alpha_pattern is"),
        (lambda d: _config(d, init_lora_weights="pissa_niter_4"), "which moves the base too"),
        (lambda d: _config(d, init_lora_weights="OLoRA"), "which moves the base too"),
        (lambda d: _config(d, init_lora_weights="lora_ga"), "which moves the base too"),
        (lambda d: _config(d, init_lora_weights="of tomorrow"), "as far as is known"),
        (lambda d: _config(d, r=4), "shape .* expected"),
        (lambda d: _config(d, r=0), "does not fit this model: lora rank: 0"),
        (lambda d: _config(d, use_dora=True), "lora_magnitude is missing"),
        (lambda d: _weights(d, lambda w: {}), "holds no adapters"),
        (lambda d: _weights(d, lambda w: {**w, "x": w[FIRST].clone()}), "x is no adapter"),
        (
            lambda d: _weights(d, lambda w: {**w, FIRST: w[FIRST].int()}),
            "expected a floating dtype",
        ),
        (
            lambda d: _weights(d, lambda w: {n: t for n, t in w.items() if n != FIRST}),
            r"q_proj\.lora_A is missing",
        ),
        (
            lambda d: _weights(d, lambda w: {n.replace("q_proj", "s"): t for n, t in w.items()}),
            "does not fit this model: lora targets: no linear layer's name matches",
        ),
    ],
)
def test_what_is_no_adapter_of_this_model_is_refused(
    spoil: Any, message: str, tmp_path: Path
) -> None:
    adapted, adapters, _ = ours("llama", "plain")
    ft.lora.save_adapter(tmp_path, adapted, adapters)
    spoil(tmp_path)
    _, architecture, params, _ = based("llama")
    with pytest.raises(ft.CheckpointError, match=message):
        ft.lora.load_adapter(tmp_path, architecture, params)


def test_a_config_without_a_rank_is_refused(tmp_path: Path) -> None:
    adapted, adapters, _ = ours("llama", "plain")
    ft.lora.save_adapter(tmp_path, adapted, adapters)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    del config["r"]
    path.write_text(json.dumps(config))
    _, architecture, params, _ = based("llama")
    with pytest.raises(ft.CheckpointError, match="no 'r', which LoRA's config has"):
        ft.lora.load_adapter(tmp_path, architecture, params)


def test_adapters_without_effect_in_peft_are_left_out(tmp_path: Path) -> None:
    """Of Mamba's dt_proj, whose weight its mixer reads."""
    architecture, params, buffers = based("mamba")[1:]
    config = peft.LoraConfig(
        r=3, target_modules=["in_proj", "dt_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(based("mamba")[0], config).eval()
    model.save_pretrained(tmp_path)
    adapted, adapters = ft.lora.load_adapter(tmp_path, architecture, params)
    assert {name.split(".")[-2] for name in adapters} == {"in_proj"}
    assert torch.equal(bound_logits(adapted, adapters, buffers), logits(model))


@pytest.mark.parametrize("name", ["falcon_mamba", "mamba", "mamba2"])
def test_peft_reads_all_linear_of_a_mamba(name: str, tmp_path: Path) -> None:
    """It refuses an adapter of the out_proj, whose weight the mixer's kernels read."""
    ordinary, architecture, params, buffers = based(name)
    adapted, adapters = ft.lora.attach(architecture, params, LoRA(rank=2))
    adapters = ft.trees.Tensors({n: t + 0.1 for n, t in adapters.items()})
    ft.lora.save_adapter(tmp_path, adapted, adapters)
    model = peft.PeftModel.from_pretrained(ordinary, tmp_path).eval()
    assert torch.equal(logits(model), bound_logits(adapted, adapters, buffers))


def test_an_adapter_of_a_layer_that_kernels_read_is_read(tmp_path: Path) -> None:
    """And not dropped, as one without effect is: on a CPU it has one."""
    _, architecture, params, _ = based("mamba")
    adapted, adapters = ft.lora.attach(architecture, params, LoRA(targets=("out_proj",)))
    ft.lora.save_adapter(tmp_path, adapted, adapters)
    again, read = ft.lora.load_adapter(tmp_path, architecture, params)
    assert ft.lora.adapter_of(again).layers == ft.lora.adapter_of(adapted).layers
    assert all(torch.equal(read[name], tensor) for name, tensor in adapters.items())


def test_what_peft_has_no_place_for_is_not_written(tmp_path: Path) -> None:
    adapted, adapters, _ = ours("llama", "plain", train=("norm.weight",))
    with pytest.raises(ft.ConfigError, match="are trained beside the adapters"):
        ft.lora.save_adapter(tmp_path, adapted, adapters)


@pytest.mark.parametrize("call", range(1, 5))
def test_an_adapter_that_cannot_be_written_is_never_half_of_another(
    call: int, tmp_path: Path, monkeypatch: Any
) -> None:
    """Old, or refused, or new: wherever the disk fails, no weights lie under another's config."""
    _, architecture, params, _ = based("llama")

    def saved(alpha: float) -> Any:
        adapted, adapters = ft.lora.attach(architecture, params, LoRA(rank=2, alpha=alpha))
        adapters = ft.trees.Tensors({n: t + alpha for n, t in adapters.items()})
        ft.lora.save_adapter(tmp_path, adapted, adapters)
        return adapters

    old = saved(1.0)
    calls = iter(range(1, 5))

    def failing(act: Any) -> Any:
        def acted(*given: Any) -> Any:
            if next(calls) == call:
                raise OSError(5, "Input/output error")
            return act(*given)

        return acted

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", failing(os.fsync))
        patch.setattr(Path, "replace", failing(Path.replace))
        with pytest.raises(ft.CheckpointError, match="could not be written"):
            saved(4.0)
    assert not list(tmp_path.glob(".*"))
    if call > 2:  # the files have been written, and are put in place
        with pytest.raises(ft.CheckpointError, match=r"adapter_config\.json: cannot be read"):
            ft.lora.load_adapter(tmp_path, architecture, params)
    else:
        adapted, adapters = ft.lora.load_adapter(tmp_path, architecture, params)
        assert ft.lora.adapter_of(adapted).lora.alpha == 1.0
        assert all(torch.equal(adapters[n], old[n]) for n in old)


def test_the_base_of_adapters_may_be_a_path(tmp_path: Path) -> None:
    adapted, adapters, _ = ours("llama", "plain")
    path = ft.lora.save_adapter(tmp_path, adapted, adapters, base=Path("the/base"))
    config = json.loads((path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "the/base"


def test_adapters_are_not_written_beside_a_model(tmp_path: Path) -> None:
    """transformers would apply them to it, which is not their base where they are merged."""
    adapted, adapters, _ = ours("llama", "plain")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ft.CheckpointError, match=r"holds a model \(config\.json\).*of their own"):
        ft.lora.save_adapter(tmp_path, adapted, adapters)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_an_adapted_model_is_exported_merged(tmp_path: Path) -> None:
    import transformers

    _, architecture, params, buffers = based("llama")
    adapted, adapters = ft.lora.attach(architecture, params, LoRA(rank=2))
    step = ft.sft_step(adapted, ft.optim.adamw(1e-1))
    state, _ = step(step.init(adapters, buffers), zoo.batch())
    out = ft.export(state, adapted, tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    expected = bound_logits(adapted, state.params, buffers)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
