"""Models that no worker has whole: made, read from transformers' files and from checkpoints."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import families
from torch import nn
from workers import Group

import functrain as ft
from functrain.deferred import recording

IMPORTED = (
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.models.deepseek_v3.modeling_deepseek_v3",
    "transformers.models.codegen.modeling_codegen",
)


def _digests(*items: Any) -> dict[str, str]:
    return {name: ft.trees.digest(tensor) for each in items for name, tensor in each.items()}


@pytest.mark.parametrize(
    ("name", "size", "dtype"),
    [
        ("llama", 2, "float32"),
        pytest.param("qwen2", 3, "bfloat16", marks=pytest.mark.long),
        ("deepseek_v3", 3, "bfloat16"),
        ("codegen", 2, "bfloat16"),
    ],
)
def test_a_model_of_transformers_in_shards_is_the_whole(
    group: Group, tmp_path: Path, name: str, size: int, dtype: str
) -> None:
    """Row by row: with a tied head, fused experts, what stays wide, and computed buffers."""
    families.made(name).save_pretrained(tmp_path, max_shard_size="6KB")
    _, params, buffers, _ = ft.models.from_pretrained(tmp_path, dtype=dtype)
    options = {"path": str(tmp_path), "dtype": dtype}
    for each in group.values("model_in_shards", size, options):
        assert each == _digests(params, buffers)


def test_files_of_another_width_than_their_dtype_are_cast_row_by_row(
    group: Group, tmp_path: Path
) -> None:
    families.made("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    _, params, buffers, _ = ft.models.from_pretrained(tmp_path)
    assert {p.dtype for p in params.values()} == {torch.float32}
    for each in group.values("model_in_shards", 2, {"path": str(tmp_path)}):
        assert each == _digests(params, buffers)


def test_rows_of_two_models_are_no_model(group: Group, tmp_path: Path) -> None:
    """Workers on two machines, with other files at one place."""
    for number, name in enumerate(("one", "two")):
        model = families.made("llama")
        model.get_parameter("model.norm.weight").data += number
        model.save_pretrained(tmp_path / name)
    options = {"path": str(tmp_path / "one"), "others": {"1": str(tmp_path / "two")}}
    for each in group.run("model_in_shards", 2, options):
        assert each["error"][0] == "WorkerError"
        assert "disagree before the model is sharded" in each["error"][1]


def test_tied_tensors_that_are_not_the_same_are_left_to_transformers(
    group: Group, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    families.made("qwen2").save_pretrained(tmp_path)
    items = load_file(tmp_path / "model.safetensors")
    items["lm_head.weight"] = items["model.embed_tokens.weight"] + 1
    save_file(items, tmp_path / "model.safetensors", {"format": "pt"})
    _, params, buffers, _ = ft.models.from_pretrained(tmp_path)
    for each in group.values("model_in_shards", 2, {"path": str(tmp_path)}):
        assert each == _digests(params, buffers)


@pytest.mark.parametrize("damage", ["missing", "shape", "config"])
def test_a_model_that_is_not_as_described_is_refused_by_all(
    group: Group, tmp_path: Path, damage: str
) -> None:
    families.made("llama").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    from safetensors.torch import load_file, save_file

    items = load_file(path)
    if damage == "config":
        (tmp_path / "config.json").write_text('{"model_type": "nothing"}')
    elif damage == "missing":
        items.pop("model.norm.weight")
    else:
        items["model.norm.weight"] = torch.ones(3)
    save_file(items, path, {"format": "pt"})
    for each in group.run("model_in_shards", 2, {"path": str(tmp_path)}):
        assert each["error"][0] == "ArchitectureError"
        assert str(tmp_path) in each["error"][1]
        assert damage == "config" or "model.norm.weight" in each["error"][1]


def test_a_checkpoint_is_read_in_shards_without_values_beside_it(
    group: Group, tmp_path: Path
) -> None:
    options = {"directory": str(tmp_path), "odd": True, "steps": 2}
    group.values("training", 1, options)
    newest = ft.latest(tmp_path)
    items = ft.checkpoint.load_tensors(tmp_path, "params/*", "buffers/*")
    expected = {name.partition("/")[2]: digest for name, digest in _digests(items).items()}
    given = {"path": str(tmp_path), "checkpoint": True, "odd": True}
    for each in group.values("model_in_shards", 4, given):
        assert each == expected
    for each in group.run("model_in_shards", 2, {**given, "odd": False}):
        assert "the checkpoint is of another architecture" in each["error"][1]
    assert newest is not None
    file = newest / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    for each in group.run("model_in_shards", 2, given):
        assert "model.safetensors: its sha256 does not match" in each["error"][1]


def test_workers_that_make_other_models_are_refused(group: Group) -> None:
    options = {
        "apart": True,
        "partial": "own",
        "step": {"sharded": True},
        "ranks": {"1": {"seed": 1}},
    }
    for each in group.run("parts", 2, options):
        assert each["error"][0] == "WorkerError"
        assert "disagree before they are sharded" in each["error"][1]


class _Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50_000, 64)
        self.layers = nn.ModuleList(nn.Linear(64, 50_000, bias=False) for _ in range(5))
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)


def test_no_more_than_two_tensors_are_whole_at_once() -> None:
    """Bytes that torch takes: while it is made one draw at a time, then one tensor and its like."""
    one = 50_000 * 64 * 4
    with torch.profiler.profile(profile_memory=True) as profile:
        with recording() as recorded:
            module = _Wide()
        digests = [ft.trees.digest(recorded.made(p)) for p in module.parameters()]
    most = held = 0
    for event in profile.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    assert one <= most < 1.5 * one
    assert len(set(digests)) == 6


def test_transformers_own_models_are_made_from_their_description_alone() -> None:
    config = transformers.LlamaConfig(hidden_size=32768, num_hidden_layers=8)
    with recording(draws=False) as recorded:
        model = transformers.LlamaForCausalLM(config)
    assert sum(p.numel() for p in model.parameters()) > 40e9
    assert all(recorded.defers(p) or p.ndim == 1 for p in model.parameters())


EXPORTED: dict[str, Any] = {
    "params": {"layers": 1},
    "adapters": {"layers": 1, "lora": {"rank": 2}},
}
EXPORTED["base"] = {**EXPORTED["adapters"], "base": "sharded"}


@pytest.fixture(scope="module")
def exported(group: Group, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Where one process has exported params or adapters."""

    @functools.cache
    def one(what: str) -> Path:
        folder = tmp_path_factory.mktemp(what)
        group.values("exporting", 1, {**EXPORTED[what], "folder": str(folder)})
        return folder

    return one


@pytest.mark.parametrize("how", EXPORTED)
def test_shards_are_exported_whole_by_one_worker_as_the_refusals_say(
    group: Group, tmp_path: Path, exported: Callable[[str], Path], how: str
) -> None:
    one = exported("params" if how == "params" else "adapters")
    options = {**EXPORTED[how], "folder": str(tmp_path), "step": {"sharded": True}}
    for each in group.values("exporting", 2, options):
        kinds, texts = zip(*each["refused"], strict=True)
        assert set(kinds) == {"ConfigError"}
        assert len(texts) == (1 if how == "params" else 2)
        assert all("functrain.distributed.gathered(" in text for text in texts)
        assert (how == "base") == ("functrain.lora.merged(" in texts[0])
    files = sorted(path.relative_to(one) for path in one.rglob("*.safe*"))
    assert len(files) == (1 if how == "params" else 2)
    for file in files:
        assert (tmp_path / file).read_bytes() == (one / file).read_bytes()
