"""Models that see what they are to predict are told, whatever their loss is."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn

import functrain as ft
from functrain.errors import FunctrainWarning
from functrain.objectives.support import check_causal

STAGES = ("pretrain", "dpo")
AHEAD = r"logits depend on tokens that come after them"


class Encoder(zoo.Tied):
    """Every token is told the mean of all, those after it too, and `noise`."""

    def __init__(self, noise: float = 0.0) -> None:
        super().__init__()
        self.noise = noise

    def forward(self, *args: Any, **inputs: Any) -> dict[str, Tensor]:
        logits = super().forward(*args, **inputs)["logits"]
        told = logits.mean(1, keepdim=True)
        return {"logits": logits + told + self.noise * torch.rand_like(logits)}


def _run(model: nn.Module, stage: str) -> None:
    """Two steps, of a step record each."""
    architecture, params, buffers = ft.split(model)
    for _ in range(2):
        if stage == "pretrain":
            step: Any = ft.pretrain_step(architecture, ft.optim.adamw(1e-2))
            step(step.init(params, buffers), zoo.batch())
        else:
            reference = ft.trees.clone(params)
            step = ft.dpo_step(architecture, ft.optim.adamw(1e-2), reference=reference)
            step(step.init(params, buffers), zoo.pairs())


@pytest.mark.parametrize("stage", STAGES)
def test_a_model_that_sees_later_tokens_is_warned_of_once(stage: str) -> None:
    with pytest.warns(FunctrainWarning, match=f"^Encoder: its {AHEAD}") as told:
        _run(Encoder(), stage)
    assert len(told) == 1


@pytest.mark.parametrize("gate", [0.0, 1e-9])
def test_so_is_one_that_would_only_learn_to_see_them(gate: float) -> None:
    class Gated(zoo.Tied):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Parameter(torch.tensor(gate))

        def forward(self, *args: Any, **inputs: Any) -> dict[str, Tensor]:
            logits = super().forward(*args, **inputs)["logits"]
            return {"logits": logits + self.gate * logits.mean(1, keepdim=True)}

    with pytest.warns(FunctrainWarning, match=f"^Gated: its {AHEAD}"):
        _run(Gated(), "pretrain")


@pytest.mark.parametrize("stage", STAGES)
def test_what_predicts_from_the_tokens_before_is_not(stage: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for model in (zoo.decoder(), zoo.model("tied"), zoo.model("normed")):
            _run(model, stage)


def test_where_logits_are_never_the_same_nothing_is_said() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _run(Encoder(noise=1.0), "pretrain")


def test_without_weights_nothing_is_decided() -> None:
    architecture, params, buffers = ft.split(Encoder())
    check_causal(architecture)
    with (
        ft.bound(architecture, params, buffers, "eval") as model,
        pytest.warns(FunctrainWarning, match=AHEAD),
    ):
        check_causal(model)


SMALL: dict[str, Any] = {
    "vocab_size": zoo.VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}


def test_encoders_of_transformers_are_told_how_to_be_decoders() -> None:
    """`AutoModelForCausalLM` makes one of them, where its config does not say otherwise."""
    transformers = pytest.importorskip("transformers")
    auto = transformers.AutoModelForCausalLM
    with pytest.warns(FunctrainWarning, match=rf"{AHEAD}.*is_decoder=True"):
        _run(auto.from_config(transformers.BertConfig(**SMALL)), "pretrain")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _run(auto.from_config(transformers.BertConfig(**SMALL, is_decoder=True)), "pretrain")


@pytest.mark.parametrize("stage", STAGES)
def test_an_encoder_decoder_is_refused(stage: str) -> None:
    """Bart takes `input_ids` for both sides, and would learn to copy."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BartConfig(
        vocab_size=zoo.VOCABULARY,
        d_model=16,
        **{f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in _BART.items()},
        max_position_embeddings=16,
    )
    with pytest.raises(ft.ArchitectureError, match=r"^BartForConditionalGeneration: an encoder-d"):
        _run(transformers.BartForConditionalGeneration(config), stage)


_BART = {"layers": 1, "attention_heads": 2, "ffn_dim": 16}
