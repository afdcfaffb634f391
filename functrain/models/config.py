"""What transformers needs besides a checkpoint's `model.safetensors` to load it as it is."""

from __future__ import annotations

import json
from typing import Any

from torch import nn

from functrain import lora
from functrain.models.decoder import Decoder, DecoderConfig
from functrain.models.layouts import further_names

# The rotary embedding of the built-in decoder has no last position; transformers wants a number.
_POSITIONS = 131_072

CONFIG = "config.json"
ARCHITECTURE = "architecture.json"
"""Stands for `config.json` where transformers must not find one; `skeleton` reads either."""


def config_files(architecture: nn.Module) -> dict[str, str]:
    """`config.json` and, where there is one, `generation_config.json`: texts by file name.

    For a model of transformers they are its own; for the built-in decoder a Llama's, which it is;
    for any other module there are none. Given to `functrain.save(…, beside=…)`, they make each
    checkpoint a directory that `AutoModelForCausalLM.from_pretrained` reads. For adapters there are
    none: their checkpoints hold no model, and one that looked like it would be read as random
    weights. So would tensors that modules share without the config saying so: a checkpoint has them
    under one name, an export under all.

    For a model with persistent buffers (the `e_score_correction_bias` of DeepSeek-V3) the first is
    named `architecture.json`, which only functrain's commands find: a checkpoint keeps buffers in a
    file that transformers ignores, so that it would read them with their initial values.
    `functrain.export` writes such a model for transformers.
    """
    known = isinstance(architecture, Decoder) or _is_described(architecture)
    if not known or lora.is_adapted(architecture) or further_names(architecture):
        return {}
    if isinstance(architecture, Decoder):
        return {CONFIG: json.dumps(_llama(architecture.config), indent=2) + "\n"}
    found: dict[str, str] = {}
    for name in ("config", "generation_config"):
        config: Any = getattr(architecture, name, None)
        if hasattr(config, "to_diff_dict") and hasattr(config, "to_json_string"):
            found[f"{name}.json"] = _text(config, type(architecture).__name__)
    if CONFIG in found and _has_persistent_buffers(architecture):
        found[ARCHITECTURE] = found.pop(CONFIG)
    return found


def _is_described(architecture: nn.Module) -> bool:
    """Whether it has a config of transformers'."""
    return hasattr(getattr(architecture, "config", None), "to_diff_dict")


def _has_persistent_buffers(architecture: nn.Module) -> bool:
    return any(
        buffer is not None and name not in module._non_persistent_buffers_set
        for module in architecture.modules()
        for name, buffer in module._buffers.items()
    )


def _text(config: Any, architecture: str) -> str:
    values: dict[str, Any] = json.loads(config.to_json_string())
    if "model_type" in values:
        values["architectures"] = [architecture]
    return json.dumps(values, indent=2, sort_keys=True) + "\n"


def _llama(config: DecoderConfig) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocabulary,
        "hidden_size": config.width,
        "intermediate_size": config.feed_forward,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.groups,
        "head_dim": config.head_width,
        "hidden_act": "silu",
        "max_position_embeddings": _POSITIONS,
        "rms_norm_eps": config.eps,
        "rope_theta": config.theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.theta},
        "tie_word_embeddings": config.tied,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": None,
        "eos_token_id": None,
    }
