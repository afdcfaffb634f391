"""Sampling as a pure function of (params, prompt, seed)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from functrain import keys
from functrain.architecture import bound, vocabulary_of
from functrain.errors import BatchError, ConfigError
from functrain.models.decoder import Cache, Decoder


@torch.no_grad()
def generate(
    architecture: nn.Module,
    params: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    input_ids: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    end: int | None = None,
    seed: int = 0,
) -> list[int]:
    """The new token ids after `input_ids`; without `end`, which stops it.

    Greedy at `temperature` 0, else sampled from the `top_k` likeliest tokens, or from the smallest
    set of probability `top_p` (1904.09751). The same arguments give the same tokens, and no global
    generator moves. The built-in decoder keeps its keys and values; other models run the whole
    sequence for each token.

    Raises `BatchError` for a prompt that is empty or out of range, `ConfigError` for the rest.
    """
    _check_options(max_new_tokens, temperature, top_k, top_p)
    _check_prompt(input_ids, vocabulary_of(architecture))
    device = next((p.device for p in params.values()), torch.device("cpu"))
    ids, new = list(input_ids), list[int]()
    cache: Cache = []
    with bound(architecture, params, buffers, "eval") as model:
        while len(new) < max_new_tokens:
            logits = _next_logits(model, ids, cache, device)
            with keys.seeded(keys.derive(seed, "generate", len(new)), device):
                token = _sampled(logits, temperature, top_k, top_p)
            if token == end:
                break
            new.append(token)
            ids.append(token)
    return new


def _next_logits(
    model: nn.Module, ids: Sequence[int], cache: Cache, device: torch.device
) -> Tensor:
    if isinstance(model, Decoder):
        seen = cache[0][0].shape[2] if cache else 0
        logits: Tensor = model(torch.tensor([ids[seen:]], device=device), cache=cache)
    else:
        outputs = model(input_ids=torch.tensor([ids], device=device))
        outputs = outputs["logits"] if isinstance(outputs, Mapping) else outputs
        logits = outputs if isinstance(outputs, Tensor) else outputs.logits
    return logits[0, -1].float()


def _sampled(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> int:
    if temperature == 0:
        return int(logits.argmax())
    ordered, tokens = (logits / temperature).sort(descending=True, stable=True)
    probs = ordered[:top_k].softmax(-1)
    if top_p is not None:
        # A token is in while those before it hold less than top_p; the first always is.
        before = probs.cumsum(-1) - probs
        probs = probs.masked_fill(before >= top_p, 0.0)
    return int(tokens[torch.multinomial(probs, 1)])


def _check_options(
    max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None
) -> None:
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens: {max_new_tokens}, expected at least 1")
    if not 0 <= temperature < float("inf"):
        raise ConfigError(f"temperature: {temperature}, expected a finite number of at least 0")
    if top_k is not None and top_k < 1:
        raise ConfigError(f"top_k: {top_k}, expected at least 1, or None")
    if top_p is not None and not 0 < top_p <= 1:
        raise ConfigError(f"top_p: {top_p}, expected (0, 1], or None")


def _check_prompt(input_ids: Sequence[int], vocabulary: int | None) -> None:
    if not input_ids:
        raise BatchError("input_ids: an empty prompt; give at least one token")
    for position, token in enumerate(input_ids):
        if token < 0 or (vocabulary is not None and token >= vocabulary):
            raise BatchError(
                f"input_ids: {token} at {position} is out of range, expected [0, {vocabulary})"
            )
