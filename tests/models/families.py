"""Every family of causal models of transformers that a tiny config builds."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
import zoo

import functrain as ft

HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
ENDS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
PLAIN: dict[str, Any] = {
    "vocab_size": zoo.VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    **ENDS,
}
GROUPED: dict[str, Any] = {**PLAIN, "num_key_value_heads": 2}
NARROW: dict[str, Any] = {**GROUPED, "head_dim": 4}
OLD: dict[str, Any] = {
    "vocab_size": zoo.VOCABULARY,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "attn_pdrop": 0.0,
    **ENDS,
}
STATES: dict[str, Any] = {
    "vocab_size": zoo.VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "state_size": 4,
    **ENDS,
}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2}
LATENT: dict[str, Any] = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 8,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 4,
    "num_key_value_heads": 4,
}
SIMPLE: dict[str, Any] = {"vocab_size": zoo.VOCABULARY, "hidden_size": 16}

CONFIGS: dict[str, Callable[[], Any]] = {
    "bamba": lambda: tf.BambaConfig(
        **GROUPED, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=4, attn_layer_indices=[1]
    ),
    "bloom": lambda: tf.BloomConfig(**SIMPLE, n_layer=2, n_head=4),
    "codegen": lambda: tf.CodeGenConfig(**OLD, rotary_dim=4),
    "cohere": lambda: tf.CohereConfig(**GROUPED),
    "deepseek_v3": lambda: tf.DeepseekV3Config(**{**PLAIN, **LATENT}),
    "ernie": lambda: tf.Ernie4_5Config(**NARROW),
    "exaone4": lambda: tf.Exaone4Config(**GROUPED),
    "falcon": lambda: tf.FalconConfig(**SIMPLE, num_hidden_layers=2, num_attention_heads=4),
    "falcon_mamba": lambda: tf.FalconMambaConfig(**STATES),
    "gemma": lambda: tf.GemmaConfig(**NARROW),
    "gemma2": lambda: tf.Gemma2Config(**NARROW),
    "gemma3": lambda: tf.Gemma3TextConfig(**NARROW),
    "glm": lambda: tf.GlmConfig(**NARROW),
    "gpt2": lambda: tf.GPT2Config(**OLD),
    "gpt_bigcode": lambda: tf.GPTBigCodeConfig(**OLD),
    "gpt_j": lambda: tf.GPTJConfig(**OLD, rotary_dim=4),
    "gpt_neo": lambda: tf.GPTNeoConfig(
        **SIMPLE, **ENDS, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]
    ),
    "gpt_neox": lambda: tf.GPTNeoXConfig(**PLAIN),
    "gpt_oss": lambda: tf.GptOssConfig(**NARROW, num_local_experts=4, num_experts_per_tok=2),
    "granite": lambda: tf.GraniteConfig(**GROUPED, logits_scaling=2.0),
    "helium": lambda: tf.HeliumConfig(**NARROW),
    "lfm2": lambda: tf.Lfm2Config(
        **GROUPED, layer_types=["conv", "full_attention"], block_ff_dim=24
    ),
    "llama": lambda: tf.LlamaConfig(**GROUPED),
    "mamba": lambda: tf.MambaConfig(**STATES),
    "mamba2": lambda: tf.Mamba2Config(
        **STATES, num_heads=4, head_dim=8, expand=2, n_groups=1, chunk_size=4
    ),
    "mistral": lambda: tf.MistralConfig(**GROUPED),
    "mixtral": lambda: tf.MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2),
    "mpt": lambda: tf.MptConfig(
        vocab_size=zoo.VOCABULARY, d_model=16, n_layers=2, n_heads=4, max_seq_len=64
    ),
    "nemotron": lambda: tf.NemotronConfig(**GROUPED),
    "olmo": lambda: tf.OlmoConfig(**GROUPED),
    "olmo2": lambda: tf.Olmo2Config(**GROUPED),
    "olmo3": lambda: tf.Olmo3Config(**GROUPED),
    "olmoe": lambda: tf.OlmoeConfig(**GROUPED, **EXPERTS),
    "opt": lambda: tf.OPTConfig(
        **{**PLAIN, "ffn_dim": 24, "word_embed_proj_dim": 16, "intermediate_size": None}
    ),
    "persimmon": lambda: tf.PersimmonConfig(**PLAIN),
    "phi": lambda: tf.PhiConfig(**GROUPED),
    "phi3": lambda: tf.Phi3Config(**GROUPED),
    "qwen2": lambda: tf.Qwen2Config(**GROUPED, tie_word_embeddings=True),
    "qwen3": lambda: tf.Qwen3Config(**NARROW),
    "qwen3_moe": lambda: tf.Qwen3MoeConfig(**NARROW, **EXPERTS, moe_intermediate_size=8),
    "recurrent_gemma": lambda: tf.RecurrentGemmaConfig(
        **{**NARROW, "num_hidden_layers": 3}, lru_width=16, attention_window_size=16
    ),
    "rwkv": lambda: tf.RwkvConfig(
        **SIMPLE,
        **ENDS,
        num_hidden_layers=2,
        attention_hidden_size=16,
        context_length=64,
        rescale_every=0,  # it would write into its weights, which a binding refuses
    ),
    "seed_oss": lambda: tf.SeedOssConfig(**NARROW, attention_dropout=0.0, residual_dropout=0.0),
    "smollm3": lambda: tf.SmolLM3Config(**GROUPED),
    "stablelm": lambda: tf.StableLmConfig(**GROUPED),
    "starcoder2": lambda: tf.Starcoder2Config(**GROUPED),
    "xglm": lambda: tf.XGLMConfig(
        vocab_size=zoo.VOCABULARY,
        d_model=16,
        ffn_dim=24,
        num_layers=2,
        attention_heads=4,
        max_position_embeddings=64,
        **ENDS,
    ),
}


def longrope() -> Any:
    """A Phi-3 whose rotary frequencies are others from 9 tokens on."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0, 1.1],
        "long_factor": [4.0, 8.0],
        "original_max_position_embeddings": 8,
    }
    return tf.Phi3Config(
        **{**GROUPED, "max_position_embeddings": 32},
        original_max_position_embeddings=8,
        rope_parameters=rope,
    )


def made(name: str, seed: int = 0) -> Any:
    """A fresh model of a family, with the same weights each time, in float32."""
    return copy.deepcopy(_made(name, seed))


@functools.cache
def _made(name: str, seed: int) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = tf.AutoModelForCausalLM.from_config(CONFIGS[name]()).float()
        # What a family begins with at 0 or 1 would hide a weight that is in the wrong place.
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter) * 0.02)
        kept = model.state_dict()
        for each, buffer in model.named_buffers():
            if each in kept:
                buffer.add_(torch.rand_like(buffer))
    return model.eval()


def without_dropout(model: Any) -> Any:
    """Draws are keyed by functrain and global elsewhere, so that two sides can be compared."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for key in ("attention_dropout", "dropout", "activation_dropout", "layerdrop"):
            if isinstance(getattr(module, key, None), float):
                setattr(module, key, 0.0)
    return model


def stirred(config: Any, **options: Any) -> tuple[Any, Any, Any]:
    """A model of a config, split, whose tokens differ by more than a fresh one's."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = tf.AutoModelForCausalLM.from_config(config, **options).float()
        for parameter in model.parameters():
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    return ft.split(model)
