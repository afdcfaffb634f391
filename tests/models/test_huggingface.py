"""Models of transformers, as they are: the same logits, the same stages, no bit changed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo

import functrain as ft

transformers = pytest.importorskip("transformers")

SHAPE: dict[str, Any] = {
    "vocab_size": zoo.VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "use_cache": False,
}
GPT2: dict[str, Any] = {
    "vocab_size": zoo.VOCABULARY,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 32,
    "use_cache": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
CONFIGS: dict[str, Any] = {
    "llama": lambda: transformers.LlamaConfig(**SHAPE),
    "qwen2": lambda: transformers.Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen3": lambda: transformers.Qwen3Config(**SHAPE, head_dim=4),
    "gpt2": lambda: transformers.GPT2Config(**GPT2),
}
EVERY = pytest.mark.parametrize("name", sorted(CONFIGS))


def _model(name: str, checkpointing: bool = False) -> Any:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]())
    if checkpointing:
        # Renamed during the 5.x versions; the old name warns.
        new, old = "activation_checkpointing_enable", "gradient_checkpointing_enable"
        getattr(model, new if hasattr(model, new) else old)({"use_reentrant": False})
    return model


@EVERY
def test_bound_it_computes_what_it_computed(name: str) -> None:
    model = _model(name).eval()
    untouched = copy.deepcopy(model)
    batch = zoo.batch()
    architecture, params, buffers = ft.split(model)
    with ft.bound(architecture, params, buffers, "eval") as bound, torch.no_grad():
        seen = bound(input_ids=batch["input_ids"]).logits
    assert torch.equal(seen, untouched(input_ids=batch["input_ids"]).logits)


@EVERY
def test_a_step_is_that_of_an_ordinary_loop(name: str) -> None:
    model = _model(name)
    ordinary = copy.deepcopy(model).train()
    optimizer = torch.optim.AdamW(ordinary.parameters(), lr=1e-2, fused=True)
    architecture, params, buffers = ft.split(model)
    step = ft.pretrain_step(architecture, ft.optim.adamw(1e-2))
    # Dropout draws are keyed by us and global there, so it is off on both sides.
    for module in (architecture, ordinary):
        for each in module.modules():
            if isinstance(each, torch.nn.Dropout):
                each.p = 0.0
    state = step.init(params, buffers)
    for seed in range(3):
        batch = zoo.batch(seed)
        state, _ = step(state, batch)
        logits = ordinary(input_ids=batch["input_ids"]).logits[:, :-1].flatten(0, 1)
        targets = batch["labels"][:, 1:].flatten()
        loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
        (loss / (targets != -100).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = dict(ordinary.named_parameters())
    for parameter, value in state.params.items():
        assert torch.equal(value, trained[parameter]), parameter


@EVERY
@pytest.mark.parametrize("stage", ["pretrain", "dpo"])
def test_gradient_checkpointing_changes_no_bit(name: str, stage: str) -> None:
    reached = []
    for checkpointing in (False, True):
        architecture, params, buffers = ft.split(_model(name, checkpointing))
        optimizer = ft.optim.adamw(1e-2)
        if stage == "dpo":
            reference = ft.trees.clone(params)
            # Checkpointing acts in train mode only.
            step = ft.dpo_step(architecture, optimizer, reference=reference, dropout=True)
        else:
            step = ft.pretrain_step(architecture, optimizer)
        state = step.init(params, buffers)
        for seed in range(2):
            batch = zoo.pairs(seed) if stage == "dpo" else zoo.batch(seed)
            state, metrics = step(state, batch)
            assert float(metrics["skipped"]) == 0
        reached.append(ft.fingerprint(state))
    assert reached[0] == reached[1]


@EVERY
def test_preferences_begin_at_no_margin(name: str) -> None:
    architecture, params, buffers = ft.split(_model(name))
    step = ft.dpo_step(architecture, ft.optim.adamw(1e-2), reference=ft.trees.clone(params))
    state, metrics = step(step.init(params, buffers), zoo.pairs())
    assert float(metrics["rewards/margins"]) == 0.0
    _, metrics = step(state, zoo.pairs())
    assert float(metrics["rewards/margins"]) > 0.0


@EVERY
def test_a_checkpoint_is_read_by_transformers_as_it_is(name: str, tmp_path: Path) -> None:
    """Trained, saved with its config beside, and loaded from the checkpoint's own directory."""
    architecture, params, buffers = ft.split(_model(name))
    step = ft.pretrain_step(architecture, ft.optim.adamw(1e-2))
    state, _ = step(step.init(params, buffers), zoo.batch())
    path = ft.save(tmp_path, state, beside=ft.models.config_files(architecture))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    assert type(theirs).__name__ == type(architecture).__name__
    ids = zoo.batch()["input_ids"]
    with torch.no_grad(), ft.bound(architecture, state.params, state.buffers, "eval") as model:
        assert torch.equal(theirs(input_ids=ids).logits, model(input_ids=ids).logits)
    assert ft.fingerprint(ft.load(tmp_path, like=state)) == ft.fingerprint(state)


@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_of_the_built_in_decoder_is_a_llamas(tied: bool, tmp_path: Path) -> None:
    config = ft.models.DecoderConfig(
        vocabulary=31, width=16, layers=2, heads=4, kv_heads=2, theta=500.0, eps=1e-5, tied=tied
    )
    architecture, params, buffers = ft.split(ft.models.decoder(config, seed=1))
    step = ft.pretrain_step(architecture, ft.optim.adamw(1e-2))
    state, _ = step(step.init(params, buffers), zoo.batch())
    path = ft.save(tmp_path, state, beside=ft.models.config_files(architecture))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    ids = zoo.batch()["input_ids"]
    with torch.no_grad(), ft.bound(architecture, state.params, state.buffers, "eval") as model:
        torch.testing.assert_close(theirs(input_ids=ids).logits, model(ids), rtol=1e-4, atol=1e-5)
