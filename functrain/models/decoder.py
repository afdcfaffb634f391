"""The built-in decoder: the Llama architecture, small enough to read in one sitting.

Parameters have the names of Hugging Face's `LlamaForCausalLM`, so a checkpoint's
`model.safetensors` loads there as it is.
"""

from __future__ import annotations

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from functrain import keys
from functrain.checks import at_least_one, boolean, fraction, positive
from functrain.errors import ConfigError

Cache = list[tuple[Tensor, Tensor]]
"""Keys and values [batch, kv_heads, time, head] of each layer, for the tokens seen so far."""


_or_none = attrs.validators.optional(at_least_one)


@attrs.frozen(kw_only=True)
class DecoderConfig:
    """The shape of a decoder.

    `kv_heads`: key-value heads; fewer than query heads is grouped-query attention (2305.13245),
    None is as many. `hidden`: width inside the feed-forward; None is 8/3 of `width`, rounded up to
    a multiple of 32. `theta`: the base of the rotary frequencies. `tied`: the head is the
    embedding. `checkpointing`: blocks are recomputed in the backward pass, which takes less memory
    for a third more compute.

    Raises `ConfigError` for numbers that do not fit together.
    """

    vocabulary: int = attrs.field(validator=at_least_one)
    width: int = attrs.field(default=256, validator=at_least_one)
    layers: int = attrs.field(default=4, validator=at_least_one)
    heads: int = attrs.field(default=4, validator=at_least_one)
    kv_heads: int | None = attrs.field(default=None, validator=_or_none)
    hidden: int | None = attrs.field(default=None, validator=_or_none)
    theta: float = attrs.field(default=10_000.0, validator=positive)
    eps: float = attrs.field(default=1e-6, validator=positive)
    tied: bool = attrs.field(default=True, validator=boolean)
    dropout: float = attrs.field(default=0.0, validator=fraction)
    checkpointing: bool = attrs.field(default=False, validator=boolean)

    def __attrs_post_init__(self) -> None:
        if self.width % self.heads or self.head_width % 2:
            raise ConfigError(
                f"width: {self.width} over {self.heads} heads; expected heads of an even width"
            )
        if self.heads % self.groups:
            raise ConfigError(f"kv_heads: {self.kv_heads} does not divide {self.heads} heads")

    @property
    def head_width(self) -> int:
        """The width of one head."""
        return self.width // self.heads

    @property
    def groups(self) -> int:
        """The number of key-value heads."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def feed_forward(self) -> int:
        """The width inside the feed-forward."""
        return -(-8 * self.width // 96) * 32 if self.hidden is None else self.hidden

    @property
    def parameters(self) -> int:
        """The number of parameters; those of a tied head count once."""
        attention = 2 * self.width * (self.heads + self.groups) * self.head_width
        block = attention + 3 * self.width * self.feed_forward + 2 * self.width
        tables = self.vocabulary * self.width * (1 if self.tied else 2)
        return tables + self.layers * block + self.width


def decoder(config: DecoderConfig, *, seed: int = 0) -> Decoder:
    """A decoder whose weights are a function of `seed`; the global generators are left alone."""
    if not isinstance(config, DecoderConfig):
        raise ConfigError(
            f"config: {type(config).__name__}, expected a functrain.models.DecoderConfig(…)"
        )
    with keys.seeded(keys.derive(seed, "decoder")):
        return Decoder(config)


class Decoder(nn.Module):
    """Logits for the next token: RMSNorm, rotary attention, SwiGLU.

    `forward(input_ids, attention_mask, position_ids)`: int64 [batch, time], the mask 1 where there
    is a token; returns logits [batch, time, vocabulary]. Without `position_ids` the unmasked tokens
    are counted, so that padding on either side changes nothing.

    Packed: without a mask and a cache, a position that is not one more than the last begins another
    sequence, and no sequence of a row sees another, as in transformers. A boolean mask of shape
    [batch, 1, time, time] is used as it is, True where a query (first) may look at a key; positions
    are then `position_ids`, or indices in the row.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        self.lm_head = nn.Linear(config.width, config.vocabulary, bias=False)
        if config.tied:
            self.lm_head.weight = self.model.embed_tokens.weight
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                # Residual branches add up over the depth (GPT-2, Radford et al. 2019).
                deep = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * config.layers) ** (0.5 * deep))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Logits [batch, time, vocabulary]."""
        logits: Tensor = self.lm_head(self.model(input_ids, attention_mask, position_ids, cache))
        return logits

    def get_input_embeddings(self) -> nn.Embedding:
        """The embedding of `input_ids`."""
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Linear:
        """The projection from hidden states to logits."""
        return self.lm_head


class Trunk(nn.Module):
    """Embedding, blocks and the last norm."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocabulary, config.width)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=config.eps)
        self.dropout = nn.Dropout(config.dropout)
        pairs = torch.arange(0, config.head_width, 2).float() / config.head_width
        self.register_buffer("inv_freq", config.theta**-pairs, persistent=False)
        self.inv_freq: Tensor

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Cache | None,
    ) -> Tensor:
        """The last hidden state, normed."""
        positions = _positions(input_ids, attention_mask, position_ids, cache)
        hidden: Tensor = self.dropout(self.embed_tokens(input_ids))
        mask = _allowed(attention_mask, position_ids if cache is None else None)
        rotation = self._rotation(positions, hidden)
        for index, block in enumerate(self.layers):
            past = None if cache is None else (cache, index)
            if self.config.checkpointing and torch.is_grad_enabled():
                hidden = checkpoint(block, hidden, rotation, mask, past, use_reentrant=False)
            else:
                hidden = block(hidden, rotation, mask, past)
        normed: Tensor = self.norm(hidden)
        return normed

    def _rotation(self, positions: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        # Angles in the buffer's own float32: at position 10,000 bfloat16 is off by whole turns.
        angles = positions.to(self.inv_freq.dtype).unsqueeze(-1) * self.inv_freq
        angles = torch.cat([angles, angles], dim=-1).unsqueeze(1)
        return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


class Block(nn.Module):
    """Attention, then the feed-forward, each on the normed input and added to it."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = FeedForward(config)
        self.input_layernorm = nn.RMSNorm(config.width, eps=config.eps)
        self.post_attention_layernorm = nn.RMSNorm(config.width, eps=config.eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        hidden: Tensor,
        rotation: tuple[Tensor, Tensor],
        mask: Tensor | None,
        past: tuple[Cache, int] | None,
    ) -> Tensor:
        """[batch, time, width] to the same."""
        attended = self.self_attn(self.input_layernorm(hidden), rotation, mask, past)
        hidden = hidden + self.dropout(attended)
        fed = self.mlp(self.post_attention_layernorm(hidden))
        added: Tensor = hidden + self.dropout(fed)
        return added


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions (RoFormer, 2104.09864)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        size = config.head_width
        self.q_proj = nn.Linear(config.width, config.heads * size, bias=False)
        self.k_proj = nn.Linear(config.width, config.groups * size, bias=False)
        self.v_proj = nn.Linear(config.width, config.groups * size, bias=False)
        self.o_proj = nn.Linear(config.heads * size, config.width, bias=False)

    def forward(
        self,
        hidden: Tensor,
        rotation: tuple[Tensor, Tensor],
        mask: Tensor | None,
        past: tuple[Cache, int] | None,
    ) -> Tensor:
        """[batch, time, width] to the same."""
        query = _rotated(self._heads(self.q_proj(hidden)), rotation)
        key = _rotated(self._heads(self.k_proj(hidden)), rotation)
        value = self._heads(self.v_proj(hidden))
        if past is not None:
            key, value = _extended(*past, key, value)
        attended = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=_causal_after(query, key) if mask is None else mask,
            is_causal=mask is None and query.shape[2] == key.shape[2],
            enable_gqa=self.config.groups < self.config.heads,
        )
        out: Tensor = self.o_proj(attended.transpose(1, 2).flatten(2))
        return out

    def _heads(self, projected: Tensor) -> Tensor:
        batch, time, _ = projected.shape
        return projected.view(batch, time, -1, self.config.head_width).transpose(1, 2)


class FeedForward(nn.Module):
    """SwiGLU (2002.05202)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.width, config.feed_forward, bias=False)
        self.up_proj = nn.Linear(config.width, config.feed_forward, bias=False)
        self.down_proj = nn.Linear(config.feed_forward, config.width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """[…, width] to the same."""
        fed: Tensor = self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))
        return fed


def _positions(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cache: Cache | None,
) -> Tensor:
    if position_ids is not None:
        return position_ids
    if attention_mask is not None and attention_mask.ndim == 2:
        return (attention_mask.long().cumsum(1) - 1).clamp(min=0)
    begin = cache[0][0].shape[2] if cache else 0
    return torch.arange(begin, begin + input_ids.shape[1], device=input_ids.device).unsqueeze(0)


def _allowed(attention_mask: Tensor | None, position_ids: Tensor | None) -> Tensor | None:
    """Where a query may look, [batch, 1, time, time]; None where SDPA's own causal mask will do."""
    if attention_mask is not None:
        return _causal(attention_mask) if attention_mask.ndim == 2 else attention_mask
    return None if position_ids is None else _within(position_ids)


def _within(position_ids: Tensor) -> Tensor | None:
    """The causal mask within each sequence of a row; None where each row is known to be one.

    On an accelerator, and in a compiled region, that is not asked: it would synchronise.
    """
    begins = F.pad(position_ids.diff(dim=1) != 1, (1, 0))
    free = position_ids.device.type == "cpu" and not torch.compiler.is_compiling()
    if free and not bool(begins.any()):
        return None
    sequence = begins.cumsum(1)
    return (sequence.unsqueeze(2) == sequence.unsqueeze(1)).tril().unsqueeze(1)


def _causal(attention_mask: Tensor) -> Tensor:
    """[batch, 1, time, time], True where a query may look.

    Padding may look at itself: a row that may look nowhere would be NaN in the math backend.
    """
    time = attention_mask.shape[1]
    causal = torch.ones(time, time, dtype=torch.bool, device=attention_mask.device).tril()
    itself = torch.eye(time, dtype=torch.bool, device=attention_mask.device)
    return ((causal & attention_mask.bool().unsqueeze(1)) | itself).unsqueeze(1)


def _causal_after(query: Tensor, key: Tensor) -> Tensor | None:
    """The mask of several new positions after cached ones; None where SDPA's own will do."""
    new, time = query.shape[2], key.shape[2]
    if new in (1, time):
        return None
    allowed = torch.ones(new, time, dtype=torch.bool, device=query.device)
    return allowed.tril(diagonal=time - new)


def _rotated(heads: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = rotation
    first, second = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat([-second, first], dim=-1) * sin


def _extended(cache: Cache, index: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    if index == len(cache):
        cache.append((key, value))
    else:
        keys_before, values_before = cache[index]
        cache[index] = torch.cat([keys_before, key], 2), torch.cat([values_before, value], 2)
    return cache[index]
