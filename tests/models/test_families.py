"""Every family of causal models: read, trained, and written as the ordinary library would."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
import zoo
from models import families

import functrain as ft
from functrain.architecture import values_of
from functrain.deferred import recording
from functrain.models.skeletons import skeleton
from functrain.objectives.head import Head, find_head

EVERY = pytest.mark.parametrize("name", sorted(families.CONFIGS))
# Those that do more with the logits than their projection: it is done to a few rows at a time.
FINISHED = {"cohere", "gemma2", "granite", "recurrent_gemma"}
KEEPS_NOTHING = {"recurrent_gemma", "rwkv"}


def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids).logits
    return logits


@EVERY
def test_it_is_read_exported_and_read_again_with_the_same_bits(name: str, tmp_path: Path) -> None:
    """transformers -> file -> functrain -> file -> transformers: no bit changes on the way."""
    # Torch chooses other kernels for weights that ask for gradients, even where none are taken.
    ordinary = families.made(name).requires_grad_(False)
    ordinary.save_pretrained(tmp_path / "theirs", max_shard_size="6KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists()  # sharded
    ids = zoo.batch()["input_ids"]
    expected = _logits(ordinary, ids)

    architecture, params, buffers, tokenizer = ft.models.from_pretrained(tmp_path / "theirs")
    assert tokenizer is None
    assert {p.device.type for p in architecture.parameters()} == {"meta"}
    given = dict(ordinary.named_parameters())
    assert params.keys() == given.keys()
    assert all(torch.equal(params[n], given[n]) for n in given)
    assert all(torch.equal(buffers[n], b) for n, b in ordinary.named_buffers())
    with ft.bound(architecture, params, buffers, "eval") as model:
        assert torch.equal(_logits(model, ids), expected)

    step = ft.pretrain_step(architecture, ft.optim.sgd(1e-2))
    state = step.init(params, buffers)
    ft.export(state, architecture, tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto")
    assert type(again) is type(ordinary)
    assert torch.equal(_logits(again.eval().requires_grad_(False), ids), expected)


@pytest.mark.parametrize("name", ["deepseek_v3", "llama"])
def test_what_transformers_reads_of_a_checkpoint_is_the_whole_model(
    name: str, tmp_path: Path
) -> None:
    """Or nothing: persistent buffers lie in a file that it would pass by."""
    architecture, params, buffers = ft.split(families.made(name))
    kept = [each for each in buffers if each in architecture.state_dict()]
    assert bool(kept) == (name == "deepseek_v3")
    state = ft.pretrain_step(architecture, ft.optim.sgd(1e-2)).init(params, buffers)
    path = ft.save(tmp_path, state, beside=ft.models.config_files(architecture))
    if kept:
        with pytest.raises((OSError, ValueError), match=r"config\.json"):
            transformers.AutoModelForCausalLM.from_pretrained(path)
        with pytest.raises(ft.ArchitectureError, match=r"no config\.json"):
            ft.models.from_pretrained(path)
        assert repr(skeleton(path, torch.float32)) == repr(architecture)  # as the commands make it
        path = ft.export(state, architecture, tmp_path / "export")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path).state_dict()
    for each, value in {**params, **{n: buffers[n] for n in kept}}.items():
        assert torch.equal(theirs[each], value), each


@EVERY
def test_without_weights_it_is_the_same_model(name: str, tmp_path: Path) -> None:
    """Made of its description alone, and its tensors read row by row where that can be."""
    ordinary = families.made(name)
    ordinary.save_pretrained(tmp_path, max_shard_size="6KB")
    with recording(draws=False) as recorded:
        module = skeleton(tmp_path, torch.float32)
    params, buffers = values_of(module)
    # Routers are made of zeros, which is no memory that could wait.
    real = {n for n, p in params.items() if p.ndim > 1 and not recorded.defers(p)}
    assert all("router" in n or "gate.weight" in n for n in real)
    given = dict(ordinary.named_parameters())
    assert {n: p.shape for n, p in params.items()} == {n: p.shape for n, p in given.items()}
    computed = {n: b for n, b in ordinary.named_buffers() if n not in ordinary.state_dict()}
    assert all(torch.equal(recorded.made(buffers[n]), b) for n, b in computed.items())


@EVERY
def test_a_step_is_that_of_an_ordinary_loop(name: str) -> None:
    ordinary = families.without_dropout(families.made(name)).train()
    architecture, params, buffers = ft.split(copy.deepcopy(ordinary))
    step = ft.pretrain_step(architecture, ft.optim.adamw(1e-2))
    state, batch = step.init(params, buffers), zoo.batch()
    state, metrics = step(state, batch)
    optimizer = torch.optim.AdamW(ordinary.parameters(), lr=1e-2, fused=True)
    logits = ordinary(input_ids=batch["input_ids"]).logits[:, :-1].flatten(0, 1)
    targets = batch["labels"][:, 1:].flatten()
    (F.cross_entropy(logits, targets, reduction="sum") / (targets != -100).sum()).backward()
    optimizer.step()
    assert float(metrics["skipped"]) == 0
    for parameter, value in ordinary.named_parameters():
        assert torch.equal(state.params[parameter], value), parameter


@EVERY
def test_its_head_is_found_and_gives_the_same_loss(name: str, monkeypatch: Any) -> None:
    architecture, params, buffers = ft.split(families.made(name))
    with ft.bound(architecture, params, buffers, "eval") as model:
        head = find_head(model)
    assert isinstance(head, Head), head
    assert (head.trunk is not None) == (name in FINISHED)
    losses = []
    for budget in (1 << 30, 256):  # bytes of logits: whole, then a few rows at a time
        monkeypatch.setattr("functrain.objectives.chunks.BUDGET", budget)
        step = ft.pretrain_step(architecture, ft.optim.sgd(1e-2))
        losses.append(ft.evaluate(step, step.init(params, buffers), [zoo.batch()])["eval_loss"])
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)


def _generated(parts: Any, prompt: list[int], count: int) -> list[int]:
    """So many new tokens, with the logits of the whole sequence; how long each call's input was."""
    lengths: list[int] = []
    logits: list[torch.Tensor] = []

    def called(_module: Any, _args: Any, options: Any, outputs: Any) -> None:
        lengths.append(options["input_ids"].shape[1])
        logits.append(outputs.logits[0, -1])

    handle = parts[0].register_forward_hook(called, with_kwargs=True)
    ids = [*prompt, *ft.models.generate(*parts, prompt, max_new_tokens=count)]
    handle.remove()
    assert len(ids) == len(prompt) + count
    with ft.bound(*parts, "eval") as model:
        for end, kept in enumerate(logits, start=len(prompt)):
            whole = _logits(model, torch.tensor([ids[:end]]))[0, -1]
            torch.testing.assert_close(kept, whole, rtol=1e-3, atol=1e-4)
    return lengths


@EVERY
def test_what_it_keeps_changes_no_token(name: str) -> None:
    """Generated with its keys and values kept, and over the whole sequence for each token."""
    parts = families.stirred(families.CONFIGS[name]())
    lengths = _generated(parts, [1, 2, 3], 8)
    assert lengths == ([*range(3, 11)] if name in KEEPS_NOTHING else [3] + [1] * 7)


def test_a_model_whose_first_layers_keep_no_keys_is_told_where_it_is() -> None:
    config = transformers.MiniMaxConfig(
        **families.GROUPED,
        num_local_experts=4,
        num_experts_per_tok=2,
        block_size=4,
        layer_types=["linear_attention", "full_attention"],
    )
    assert _generated(families.stirred(config), [1, 2, 3], 8) == [3] + [1] * 7


def test_what_was_kept_of_a_short_sequence_is_made_again_for_a_long_one() -> None:
    """All frequencies of Phi-3's positions are others after a length."""
    lengths = _generated(families.stirred(families.longrope()), [1, 2, 3], 12)
    assert lengths == [3, *[1] * 5, 9, *[1] * 5]
