"""Small models and batches that the tests share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import functrain as ft
from functrain import keys

VOCABULARY = 31


class Tied(nn.Module):
    """A causal model whose head is its embedding, and whose forward takes every keyword."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.mix = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.ones(1), persistent=False)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> dict[str, Tensor]:
        hidden = self.embedding(input_ids)
        if attention_mask is not None:
            hidden = hidden * attention_mask.unsqueeze(-1).to(hidden.dtype)
        hidden = hidden + F.silu(self.mix(hidden.cumsum(1) / 8))
        return {"logits": self.head(self.norm(hidden)) * self.scale}


class Normed(nn.Module):
    """BatchNorm over the channels, and dropout: buffers that move, and randomness."""

    def __init__(self, width: int = 16, p: float = 0.2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.norm = nn.BatchNorm1d(width)
        self.dropout = nn.Dropout(p)
        self.head = nn.Linear(width, VOCABULARY)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        hidden = self.norm(self.embedding(input_ids).transpose(1, 2)).transpose(1, 2)
        return self.head(self.dropout(hidden))


class Checkpointed(Tied):
    """`Tied` with its mixing recomputed in the backward pass."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> dict[str, Tensor]:
        hidden = self.embedding(input_ids)
        mixed = checkpoint(self._mixed, hidden, use_reentrant=False)
        return {"logits": self.head(self.norm(hidden + mixed))}

    def _mixed(self, hidden: Tensor) -> Tensor:
        return F.silu(self.mix(hidden.cumsum(1) / 8))


def decoder(*, biased: bool = False, **options: Any) -> nn.Module:
    """The built-in decoder, very small; with a bias of its head, where it is asked for."""
    from functrain import models

    config = {"width": 16, "layers": 2, "heads": 4, "kv_heads": 2, "hidden": 32, **options}
    made = models.decoder(models.DecoderConfig(vocabulary=VOCABULARY, **config), seed=3)
    if biased:
        made.lm_head.bias = nn.Parameter(torch.linspace(-0.5, 0.5, VOCABULARY))
    return made


MODELS: dict[str, Callable[[], nn.Module]] = {
    "decoder": decoder,
    "normed": Normed,
    "tied": Tied,
}
"""The models that every law is applied to."""


class Own(torch.optim.Optimizer):
    """An optimizer class of a user's own; `_update`, of a parameter, is what tells them apart."""

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update(group, param)

    def _update(self, group: dict[str, Any], param: Tensor) -> None:
        raise NotImplementedError


def model(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A fresh model of `MODELS` with the same weights each time."""
    with keys.seeded(7):
        return MODELS[name]().to(dtype)


def split(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Any, Any]:
    """`functrain.split` of a fresh model."""
    return ft.split(model(name, dtype))


def batch(seed: int = 0, examples: int = 4, time: int = 8, ignored: float = 0.2) -> dict[str, Any]:
    """A batch with some labels ignored; every example has a target."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (examples, time), generator=generator)
    drop = torch.rand(ids.shape, generator=generator) < ignored
    drop[:, -1] = False
    return {"input_ids": ids, "labels": ids.masked_fill(drop, -100)}


def pairs(seed: int = 0, examples: int = 4, time: int = 8) -> dict[str, Any]:
    """A preference batch; the rejected side is one token shorter."""
    chosen, rejected = batch(seed, examples, time), batch(seed + 1, examples, max(2, time - 1))
    return {"chosen": chosen, "rejected": rejected}


class Batches:
    """A source whose samples are a function of their position alone."""

    batch_size = 4

    def __init__(self, make: Callable[..., dict[str, Any]] = batch, length: int = 40) -> None:
        self._make, self._length = make, length

    def __len__(self) -> int:
        return self._length

    def at(self, position: int, n: int) -> dict[str, Any]:
        return self._make(seed=position, examples=n)


def concatenated(batches: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Several batches of the same time as one."""
    return {key: torch.cat([b[key] for b in batches]) for key in batches[0]}


class Heard(Tied):
    """Remembers what it was called with, in which mode, and whether history was kept."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[dict[str, Any]] = []

    def forward(self, **inputs: Any) -> Any:  # type: ignore[override]
        self.calls.append({**inputs, "training": self.training, "history": torch.is_grad_enabled()})
        return super().forward(**inputs)


def full(batch: dict[str, Any]) -> dict[str, Any]:
    ids = batch["input_ids"]
    places = torch.arange(ids.shape[1]).expand_as(ids)
    return {**batch, "attention_mask": (ids > 3).long(), "position_ids": places + 5}
