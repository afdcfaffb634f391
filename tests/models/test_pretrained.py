"""Models read from disk and written to it: what is refused, whose memory it is, what is whole."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import zoo
from huggingface_hub import ModelCard
from models import families
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import functrain as ft

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tokenizer() -> Any:
    """A tokenizer of transformers over single characters, with a chat template."""
    letters = {c: n for n, c in enumerate(["</s>", *"abcdefghijklmnopqrstuvwxyz <>"])}
    inner = Tokenizer(models.WordLevel(letters, unk_token=" "))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")
    fast.chat_template = TEMPLATE
    return fast


def saved(directory: Path, name: str = "llama", **options: Any) -> Any:
    """A model of transformers on disk."""
    model = families.made(name)
    model.save_pretrained(directory, **options)
    return model


def trained(directory: Path) -> tuple[Any, Any]:
    architecture, params, buffers, _ = ft.models.from_pretrained(directory)
    step = ft.pretrain_step(architecture, ft.optim.adamw(1e-2))
    state, _ = step(step.init(params, buffers), zoo.batch())
    return architecture, state


def test_its_weights_are_nobody_elses(tmp_path: Path) -> None:
    """Neither pages of the file, which change with it, nor at the file's odd addresses."""
    saved(tmp_path)
    params = ft.models.from_pretrained(tmp_path).params
    before = {name: tensor.clone() for name, tensor in params.items()}
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\0" * path.stat().st_size)
    assert all(torch.equal(params[name], tensor) for name, tensor in before.items())
    assert all(tensor.data_ptr() % 64 == 0 for tensor in params.values())
    assert params.own == params.keys()


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16, "float64"])
def test_its_params_have_the_dtype_that_was_asked_for(dtype: Any, tmp_path: Path) -> None:
    ordinary = saved(tmp_path)
    params = ft.models.from_pretrained(tmp_path, dtype=dtype).params
    kind = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    for name, tensor in ordinary.named_parameters():
        assert torch.equal(params[name], tensor.to(kind))


def test_the_tokenizer_comes_along(tmp_path: Path) -> None:
    saved(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    found = ft.models.from_pretrained(tmp_path).tokenizer
    assert found is not None
    assert found.decode(found.encode("abc")) == "abc"
    assert (found.end, found.vocabulary) == (0, 30)
    assert found.render([{"role": "user", "content": "a"}], prompt=True) == "<user>a</s><assistant>"
    assert {"tokenizer.json", "tokenizer_config.json"} <= found.files().keys()


def _edited(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _without_a_weight(directory: Path) -> None:
    weights = load_file(directory / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, directory / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: (d / "config.json").unlink(), "no config.json; expected a model"),
        (lambda d: (d / "config.json").write_text("{"), "not JSON"),
        (lambda d: (d / "config.json").write_text("[]"), "expected an object, got list"),
        (lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"), "neither model.safe"),
        (lambda d: (d / "model.safetensors").write_bytes(b"123"), "cannot load it"),
        (lambda d: _edited(d / "config.json", model_type="lama"), "cannot load it"),
        (lambda d: _edited(d / "config.json", hidden_size=32), "cannot load it"),
        (lambda d: _edited(d / "config.json", num_hidden_layers=3), "lacks model.layers.2"),
        (
            lambda d: _edited(d / "config.json", rms_norm_eps="1e-5"),
            "'rms_norm_eps' expected float",
        ),
        (lambda d: _edited(d / "config.json", hidden_size=17), "17.* is not a multiple of"),
        (lambda d: _edited(d / "config.json", num_hidden_layers=[2]), "expected int"),
        (lambda d: _edited(d / "config.json", num_attention_heads=0), "by zero"),
        (
            lambda d: _edited(d / "config.json", quantization_config={"quant_method": "gptq"}),
            "gptq",
        ),
        (_without_a_weight, "lacks model.norm.weight, which would be random"),
        (
            lambda d: (d / "adapter_config.json").write_text("{}"),
            "adapter_config.json lies beside config.json; .*functrain.lora.load_adapter",
        ),
    ],
)
def test_what_is_no_whole_model_is_refused(spoil: Any, message: str, tmp_path: Path) -> None:
    saved(tmp_path)
    spoil(tmp_path)
    with pytest.raises(ft.ArchitectureError, match=message):
        ft.models.from_pretrained(tmp_path)


def test_a_description_that_transformers_refuses_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    for changes in ({"rms_norm_eps": "1e-5"}, {"hidden_size": 17}, {"dtype": "x"}):
        _edited(tmp_path / "config.json", **changes)
        with pytest.raises(ft.ArchitectureError, match="transformers cannot make it"):
            ft.models.skeleton(tmp_path, torch.float32)


@pytest.mark.parametrize("shards", [False, True])
def test_files_that_are_not_of_the_weights_are_not_opened(shards: bool, tmp_path: Path) -> None:
    """A pointer of git-lfs, say, for weights in another layout."""
    model = saved(tmp_path, max_shard_size="6KB" if shards else "5GB")
    (tmp_path / "consolidated.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    params = ft.models.from_pretrained(tmp_path).params
    assert all(torch.equal(params[name], p) for name, p in model.named_parameters())


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool])
@pytest.mark.parametrize(("family", "part"), [("llama", "norm"), ("mixtral", "experts.1")])
def test_weights_that_are_not_floating_are_refused(
    family: str, part: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """They are codes of numbers; cast they would be another model's."""
    saved(tmp_path, family)
    weights = load_file(tmp_path / "model.safetensors")
    name = next(name for name in sorted(weights) if part in name)
    weights[name] = weights[name].to(dtype)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    said = str(dtype).removeprefix("torch.")
    with pytest.raises(ft.ArchitectureError, match=rf"{name} is {said}, expected a floating dtype"):
        ft.models.from_pretrained(tmp_path)


def test_integers_that_are_none_of_its_weights_are_read(tmp_path: Path) -> None:
    """Buffers of integers, and what the model has no place for."""
    saved(tmp_path, "bloom")
    weights = load_file(tmp_path / "model.safetensors")
    save_file({**weights, "codes": torch.ones(2, dtype=torch.int8)}, tmp_path / "model.safetensors")
    with pytest.warns(ft.errors.WeightsWarning, match="no place for codes"):
        ft.models.from_pretrained(tmp_path)


def test_a_path_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ft.ArchitectureError, match=r"not there .*fetch it first"):
        ft.models.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(ft.ArchitectureError, match=r"expected a directory, or a file that ends"):
        ft.models.from_pretrained(tmp_path / "file")
    (tmp_path / "model.gguf").write_bytes(b"no")
    with pytest.raises(ft.ArchitectureError, match=r"give the file: .*model\.gguf"):
        ft.models.from_pretrained(tmp_path)
    with pytest.raises(ft.ArchitectureError, match="cannot be read as a GGUF file: ends after 2"):
        ft.models.from_pretrained(tmp_path / "model.gguf")
    (tmp_path / "model.gguf").write_bytes(b"GGML" + bytes(20))
    with pytest.raises(ft.ArchitectureError, match="begins with b'GGML'"):
        ft.models.from_pretrained(tmp_path / "model.gguf")
    with pytest.raises(ft.ArchitectureError, match="dtype: 'int8', expected a floating one"):
        ft.models.from_pretrained(tmp_path, dtype="int8")


def gguf_file(path: Path, scaling: str = "", **tensors: int) -> None:
    """A tiny Llama with a byte-level tokenizer, as llama.cpp's files have it.

    `scaling`: that of its rotary frequencies. `tensors`: further ones of ones, with their sizes.
    """
    gguf = pytest.importorskip("gguf")
    rng = np.random.default_rng(0)
    tokens = ["<|end|>", *map(chr, range(33, 94)), "Ġ", "Ċ", "AB"]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * (len(tokens) - 1))
    writer.add_token_merges(["A B"])
    writer.add_eos_token_id(0)
    square, up, down = (32, 32), (48, 32), (32, 48)
    shapes = {
        "token_embd": (len(tokens), 32),
        "output_norm": (32,),
        "output": (len(tokens), 32),
        **{f"blk.0.{n}": square for n in ("attn_q", "attn_output")},
        **{f"blk.0.{n}": (16, 32) for n in ("attn_k", "attn_v")},
        **{f"blk.0.{n}": up for n in ("ffn_gate", "ffn_up")},
        "blk.0.ffn_down": down,
        **{f"blk.0.{n}": (32,) for n in ("attn_norm", "ffn_norm")},
    }
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", rng.standard_normal(shape).astype(np.float32) * 0.1)
    for name, size in tensors.items():
        writer.add_tensor(name, np.ones(size, np.float32))
    if scaling:
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_that_was_cut_is_refused(tmp_path: Path) -> None:
    """By an interrupted download, in its header or in its weights."""
    gguf_file(tmp_path / "tiny.gguf")
    whole = (tmp_path / "tiny.gguf").read_bytes()
    for size in (4, 30, 400, len(whole) // 2):
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        with pytest.raises(ft.ArchitectureError, match=r"cut\.gguf: .*(within its header|load it)"):
            ft.models.from_pretrained(tmp_path / "cut.gguf")


def test_a_gguf_file_is_read_and_exported(tmp_path: Path, capfd: Any) -> None:
    gguf_file(tmp_path / "tiny.gguf")
    architecture, params, buffers, found = ft.models.from_pretrained(tmp_path / "tiny.gguf")
    assert capfd.readouterr() == ("", ""), "no bar"
    assert found is not None
    assert found.decode(found.encode("AB C")) == "AB C"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf")
    given = dict(theirs.named_parameters())
    assert params.keys() == given.keys()
    assert all(torch.equal(params[n], given[n]) for n in given)
    state = ft.pretrain_step(architecture, ft.optim.sgd()).init(params, buffers)
    out = ft.export(state, architecture, tmp_path / "out", tokenizer=found)
    again = transformers.AutoModelForCausalLM.from_pretrained(out)
    ids = zoo.batch()["input_ids"]
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, theirs(input_ids=ids).logits)
    assert transformers.AutoTokenizer.from_pretrained(out).encode("AB") == found.encode("AB")


@pytest.mark.parametrize(
    ("scaling", "tensors", "message"),
    [
        ("", {"rope_freqs.weight": 4}, r"\(rope_freqs\.weight\)"),
        ("", {"rope_factors_long.weight": 4}, r"\(rope_factors_long\.weight\)"),
        ("yarn", {}, r"\(llama\.rope\.scaling\.type = yarn\)"),
    ],
)
def test_a_gguf_file_of_scaled_frequencies_is_refused(
    scaling: str, tensors: dict[str, int], message: str, tmp_path: Path
) -> None:
    """llama.cpp writes them so for Llama 3.1 and Phi-3; transformers passes over them."""
    gguf_file(tmp_path / "tiny.gguf", scaling, **tensors)
    with pytest.raises(ft.ArchitectureError, match=rf"are scaled {message}.*give the directory"):
        ft.models.from_pretrained(tmp_path / "tiny.gguf")


def test_tensors_of_a_gguf_file_without_a_place_are_said(tmp_path: Path) -> None:
    gguf_file(tmp_path / "tiny.gguf", "none", **{"blk.0.attn_q.bias": 32, "other.weight": 2})
    with pytest.warns(ft.errors.WeightsWarning, match=r"for blk\.0\.attn_q\.bias, other\.weight;"):
        ft.models.from_pretrained(tmp_path / "tiny.gguf")


def test_weights_without_a_place_are_said(tmp_path: Path) -> None:
    saved(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({**weights, "extra.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.warns(ft.errors.WeightsWarning, match=r"no place for extra\.weight"):
        ft.models.from_pretrained(tmp_path)


def test_an_export_is_what_transformers_loads(tmp_path: Path) -> None:
    saved(tmp_path / "theirs", "qwen2")
    tokenizer().save_pretrained(tmp_path / "theirs")
    architecture, params, buffers, found = ft.models.from_pretrained(tmp_path / "theirs")
    step = ft.pretrain_step(architecture, ft.optim.adamw(1e-2))
    state, metrics = step(step.init(params, buffers), zoo.batch())
    out = ft.export(
        state,
        architecture,
        tmp_path / "ours",
        tokenizer=found,
        data="letters",
        config={"lr": 0.01},
        metrics=metrics.to_dict(),
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert all(torch.equal(state.params[n], p) for n, p in model.named_parameters())
    assert model.config.use_cache
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    assert theirs.chat_template == TEMPLATE
    ids = theirs.apply_chat_template([{"role": "user", "content": "a"}], return_tensors="pt")
    ids = ids if isinstance(ids, torch.Tensor) else ids["input_ids"]
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] <= ids.shape[1] + 3
    card = ModelCard.load(out / "README.md")
    assert card.data.library_name == "transformers"
    for text in (ft.fingerprint(state), "letters", '"lr": 0.01', "mean_token_accuracy"):
        assert text in card.content
    again = ft.models.from_pretrained(out)
    assert all(torch.equal(state.params[n], p) for n, p in again.params.items())


def test_every_chat_template_goes_along(tmp_path: Path) -> None:
    """Into an export, and beside a checkpoint, where names are those of files alone."""
    templates = {"default": TEMPLATE, "tool_use": "{{ messages }}{{ tools }}"}
    saved(tmp_path / "theirs")
    several = tokenizer()
    several.chat_template = templates
    several.save_pretrained(tmp_path / "theirs")
    architecture, params, buffers, found = ft.models.from_pretrained(tmp_path / "theirs")
    assert found is not None
    state = ft.pretrain_step(architecture, ft.optim.sgd()).init(params, buffers)
    for path in (
        ft.save(tmp_path / "run", state, beside=found.files()),
        ft.export(state, architecture, tmp_path / "ours", tokenizer=found),
        ft.export(state, architecture, tmp_path / "too", tokenizer=found.inner),
    ):
        assert transformers.AutoTokenizer.from_pretrained(path).chat_template == templates
        again = ft.models.tokenizer_of(path)
        assert again is not None
        assert again.fingerprint == found.fingerprint


def test_a_model_that_an_older_checkpoint_describes_is_exported_with_its_cache(
    tmp_path: Path,
) -> None:
    """Its config says that the cache is off, because training turned it off."""
    architecture, params, buffers = families.stirred(families.CONFIGS["llama"]())
    state = ft.pretrain_step(architecture, ft.optim.sgd(1e-2)).init(params, buffers)
    architecture.config.use_cache = False
    out = ft.export(state, architecture, tmp_path / "out")
    assert transformers.AutoConfig.from_pretrained(out).use_cache


def test_an_export_is_written_in_the_dtype_that_was_asked_for(tmp_path: Path) -> None:
    saved(tmp_path / "theirs")
    architecture, state = trained(tmp_path / "theirs")
    out = ft.export(state, architecture, tmp_path / "ours", dtype="bfloat16")
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    for name, param in model.named_parameters():
        assert torch.equal(param, state.params[name].bfloat16())
    assert architecture.config.dtype != torch.bfloat16  # the architecture is as it was


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss", "rwkv"])
def test_an_export_keeps_wide_what_transformers_does(name: str, dtype: str, tmp_path: Path) -> None:
    """Routers, their biases (buffers), norms: what it loads is what it makes of the original."""
    model = families.made(name)
    for key, buffer in model.named_buffers():
        if key.endswith("e_score_correction_bias"):
            buffer.add_(30 + 0.05 * torch.randn_like(buffer))
    model.save_pretrained(tmp_path / "theirs")
    architecture, params, buffers, _ = ft.models.from_pretrained(tmp_path / "theirs")
    state = ft.pretrain_step(architecture, ft.optim.sgd()).init(params, buffers)
    out = ft.export(state, architecture, tmp_path / "ours", dtype=dtype)
    load = transformers.AutoModelForCausalLM.from_pretrained
    found = load(out, dtype="auto").state_dict()
    expected = load(tmp_path / "theirs", dtype=getattr(torch, dtype)).state_dict()
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype, key
        assert torch.equal(found[key], tensor), key


@pytest.mark.parametrize("tied", [False, True])
def test_the_built_in_decoder_is_exported_as_a_llama(tied: bool, tmp_path: Path) -> None:
    architecture, params, buffers = ft.split(zoo.decoder(tied=tied))
    step = ft.pretrain_step(architecture, ft.optim.adamw(1e-2))
    state, _ = step(step.init(params, buffers), zoo.batch())
    out = ft.export(state, architecture, tmp_path / "ours")
    again, params, buffers, _ = ft.models.from_pretrained(out)
    ids = zoo.batch()["input_ids"]
    with torch.no_grad(), ft.bound(again, params, buffers, "eval") as model:
        theirs = model(input_ids=ids).logits
    with torch.no_grad(), ft.bound(architecture, state.params, state.buffers, "eval") as model:
        torch.testing.assert_close(theirs, model(ids), rtol=1e-4, atol=1e-5)


def _head_is_embedding(model: Any) -> None:
    model.lm_head.weight = model.model.embed_tokens.weight


def _one_feed_forward(model: Any) -> None:
    model.model.layers[1].mlp = model.model.layers[0].mlp


@pytest.mark.parametrize("name", ["llama", "mixtral"])
@pytest.mark.parametrize("tie", [_head_is_embedding, _one_feed_forward])
def test_what_the_config_does_not_tie_is_written_by_every_name(
    name: str, tie: Any, tmp_path: Path
) -> None:
    """transformers would draw the others at random: of an export, and of a checkpoint."""
    model = families.made(name)
    tie(model)
    architecture, params, buffers = ft.split(model)
    step = ft.pretrain_step(architecture, ft.optim.adamw(1e-2))
    state, _ = step(step.init(params, buffers), zoo.batch())
    out = ft.export(state, architecture, tmp_path / "ours", dtype="float64")
    ids = zoo.batch()["input_ids"]
    with ft.bound(architecture, state.params, state.buffers, "eval") as bound, torch.no_grad():
        expected = bound(input_ids=ids).logits
    found = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(found(input_ids=ids).logits, expected)
    assert ft.models.config_files(architecture) == {}


def test_an_export_replaces_an_export_and_nothing_else(tmp_path: Path) -> None:
    saved(tmp_path / "theirs")
    architecture, state = trained(tmp_path / "theirs")
    mine = tmp_path / "mine"
    mine.mkdir()
    ft.export(state, architecture, mine)  # an empty one is fine
    (mine / "config.json").write_text("")
    ft.export(state, architecture, mine)
    assert (mine / "config.json").read_text()
    with pytest.raises(ft.CheckpointError, match=r"is no export of functrain's"):
        ft.export(state, architecture, tmp_path / "theirs")
    (tmp_path / "file").write_text("")
    with pytest.raises(ft.CheckpointError, match="is there and no directory"):
        ft.export(state, architecture, tmp_path / "file")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "mine", "theirs"]


def test_what_others_have_put_beside_an_export_is_not_deleted(tmp_path: Path) -> None:
    saved(tmp_path / "theirs")
    architecture, state = trained(tmp_path / "theirs")
    out = ft.export(state, architecture, tmp_path / "ours")
    (out / "notes.md").write_text("mine")
    (out / ".git").mkdir()
    for name in (".git", "notes.md"):  # in the order of names
        with pytest.raises(ft.CheckpointError, match=rf"holds '{name}', which is not"):
            ft.export(state, architecture, out)
        (out / name).rename(tmp_path / name)
    spoilt = {"{": "expected the list", "[]": "no files", '{"files": ["config.json"]}': "no files"}
    for text, message in spoilt.items():
        (out / "functrain.json").write_text(text)
        with pytest.raises(ft.CheckpointError, match=rf"functrain\.json: .*{message}"):
            ft.export(state, architecture, out)
    assert (out / "config.json").exists()


@pytest.mark.parametrize("directory", [".", "..", "here/.."])
def test_an_export_does_not_replace_the_directory_it_is_called_from(
    directory: str, tmp_path: Path, monkeypatch: Any
) -> None:
    """Where the process would then be in one that is deleted."""
    saved(tmp_path / "theirs")
    architecture, state = trained(tmp_path / "theirs")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ft.CheckpointError, match=r"has no name .* export to a directory below it"):
        ft.export(state, architecture, directory)
    assert ft.export(state, architecture, "below") == Path("below")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["here", "theirs"]


def test_an_export_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: Any) -> None:
    saved(tmp_path / "theirs")
    architecture, state = trained(tmp_path / "theirs")
    out = ft.export(state, architecture, tmp_path / "ours")
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ft.CheckpointError, match="No space left"):
        ft.export(state, architecture, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ours", "theirs"]


@contextmanager
def small_files(size: int) -> Generator[None]:
    """No file of this process becomes longer: a disk that is full, for whoever writes one."""
    limit, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))


def test_a_full_disk_is_said_whoever_writes(tmp_path: Path) -> None:
    """safetensors and tokenizers have errors of their own for it."""
    saved(tmp_path / "theirs")
    architecture, state = trained(tmp_path / "theirs")
    large = tokenizer()
    large.add_tokens([f"word {n}" for n in range(2000)])
    for size in (4_000, 100_000):  # bytes: the weights do not fit, then the tokenizer
        with small_files(size), pytest.raises(ft.CheckpointError, match=r"File too large.*as it"):
            ft.export(state, architecture, tmp_path / "ours", tokenizer=large)
        assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_what_nothing_would_load_is_not_exported(tmp_path: Path) -> None:
    architecture, params, buffers = zoo.split("tied")
    state = ft.pretrain_step(architecture, ft.optim.sgd()).init(params, buffers)
    with pytest.raises(ft.ConfigError, match="Tied is no model of transformers"):
        ft.export(state, architecture, tmp_path / "out")
    with pytest.raises(ft.ConfigError, match="dtype: 'int8', expected a floating one"):
        ft.export(state, architecture, tmp_path / "out", dtype="int8")
    with pytest.raises(ft.ConfigError, match="dtype: 'half4' is unknown"):
        ft.export(state, architecture, tmp_path / "out", dtype="half4")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_without_an_end_or_a_template_says_so() -> None:
    inner = tokenizer()
    inner.eos_token = inner.chat_template = None
    bare = ft.data.PretrainedTokenizer(inner)
    with pytest.raises(ft.DataError, match="has no eos_token"):
        _ = bare.end
    with pytest.raises(ft.DataError, match="has no chat template"):
        bare.render([{"role": "user", "content": "a"}])
