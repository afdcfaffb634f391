"""Weights of files, tensor by tensor: what transformers makes of the whole, in every family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import families

import functrain as ft
from functrain.models.layouts import Files, Layout, further_names, layout_of
from functrain.models.skeletons import bare, skeleton

CONVERTED = ("deepseek_v3", "mixtral", "olmoe", "qwen3_moe")


def _layout(path: Path, dtype: torch.dtype) -> tuple[Layout | None, dict[str, torch.Tensor]]:
    module, params, _ = bare(lambda: skeleton(path, dtype))
    return layout_of(Files.of(path), module, params, dtype), params


@pytest.mark.parametrize("name", sorted(families.CONFIGS))
def test_every_family_is_read_tensor_by_tensor(name: str, tmp_path: Path) -> None:
    ordinary = families.made(name)
    assert further_names(ordinary) == {}, "the config ties all that is shared"
    ordinary.save_pretrained(tmp_path)
    dtype = torch.float32 if name in CONVERTED[::2] else torch.bfloat16
    layout, params = _layout(tmp_path, dtype)
    assert layout is not None
    assert bool(layout.made) == (name in CONVERTED)
    _, expected, _, _ = ft.models.from_pretrained(tmp_path, dtype=dtype)
    found = {n: t.to(layout.kind(n, t)) for n, t in layout.each(params)}
    assert found.keys() == expected.keys()
    for each, tensor in expected.items():
        assert found[each].dtype == tensor.dtype, each
        assert found[each].equal(tensor), each


@pytest.mark.parametrize("damage", ["more", "fewer", "other shape", "an expert is missing"])
def test_what_transformers_would_complain_of_is_left_to_it(tmp_path: Path, damage: str) -> None:
    from safetensors.torch import load_file, save_file

    families.made("mixtral").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    items = load_file(path)
    last = max(name for name in items if ".experts." in name)
    if damage == "more":
        items["model.layers.0.other"] = torch.ones(2)
    elif damage == "fewer":
        items = {name: tensor for name, tensor in items.items() if ".experts." not in name}
    elif damage == "other shape":
        items[last] = torch.ones(3, 3)
    else:
        del items[last]
    save_file(items, path, {"format": "pt"})
    assert _layout(tmp_path, torch.float32)[0] is None
