"""Sampling as a pure function of (params, prompt, seed)."""

from __future__ import annotations

import inspect
import math
import operator
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from functrain import keys
from functrain.architecture import bound
from functrain.checks import check_integer, check_not_negative, check_tensors, is_integer, is_number
from functrain.descriptions import vocabulary_of
from functrain.errors import BatchError, ConfigError, StateError
from functrain.models.decoder import Cache, Decoder
from functrain.objectives.base import logits_in
from functrain.state import device_of
from functrain.trees import clone


def ends(architecture: nn.Module, end: int) -> frozenset[int]:
    """The ids that stop a model: `end`, and those in a chat model's own `generation_config`.

    A turn may end with another token than a document.
    """
    config = getattr(architecture, "generation_config", None)
    more = getattr(config, "eos_token_id", None)
    return frozenset({end, *([more] if isinstance(more, int) else more or ())})


def positions(architecture: nn.Module) -> int | None:
    """How many tokens a model can see where its positions are learnt; None where they are not.

    Rotary positions have no last one, though quality may fall beyond the lengths trained on.
    """
    config = getattr(architecture, "config", None)
    for name, module in architecture.named_modules():
        if isinstance(module, nn.Embedding) and _LEARNT.search(name):
            known = getattr(config, "max_position_embeddings", None)
            return known if isinstance(known, int) else module.num_embeddings
    return None


_LEARNT = re.compile(r"(^|\.)(wpe|embed_positions|position_embeddings?)$")


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
    end: int | Collection[int] | None = None,
    stop: Callable[[Sequence[int]], bool] | None = None,
    seed: int = 0,
) -> list[int]:
    """The new token ids that a model gives after `input_ids`.

    Greedy at `temperature` 0, else sampled from the `top_k` likeliest tokens, or from the smallest
    set of probability `top_p` (1904.09751). `end`: the id or ids that stop it (`ends`), which are
    not returned. `stop`: called with the new ids after each, it says whether to stop there.

    The same arguments give the same tokens, and no global generator moves. The built-in decoder and
    models of transformers keep their keys and values; others run the whole sequence for each token.

    A model whose positions are learnt (`positions`) stops at the last one. Raises `BatchError` for
    a prompt that is empty, out of range, or longer than that, `StateError` where logits are not
    finite, and `ConfigError` for options that make no sense.
    """
    check_tensors("buffers", buffers)
    # Clones, since some models write into their rotary frequencies.
    with bound(architecture, params, clone(buffers), "eval") as model:
        return continued(
            model,
            input_ids,
            device=device_of(params),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            end=end,
            stop=stop,
            seed=seed,
        )


@torch.no_grad()
def continued(
    model: nn.Module,
    input_ids: Sequence[int],
    *,
    device: torch.device,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    end: int | Collection[int] | None = None,
    stop: Callable[[Sequence[int]], bool] | None = None,
    seed: int = 0,
    agreed: Callable[[int], int] = int,
) -> list[int]:
    """`generate` by a model that is bound already; `agreed` maps a token to the one to take.

    Workers who compute together must take the same, even where their machines round differently.
    """
    _check_options(max_new_tokens, temperature, top_k, top_p)
    if stop is not None and not callable(stop):
        raise ConfigError(
            f"stop: {stop!r}, expected a function of the new ids, or None; stop at a text with "
            "stop=lambda new: text in tokenizer.decode(new)"
        )
    if temperature > 0 and (isinstance(seed, bool) or not hasattr(seed, "__index__")):
        raise ConfigError(f"seed: {seed!r}, expected an integer")
    most = positions(model)
    _check_prompt(input_ids, vocabulary_of(model), most)
    ids, new = list(input_ids), list[int]()
    stops = _ids(end)
    past = _Past()
    while len(new) < max_new_tokens and (most is None or len(ids) <= most):
        logits = _next_logits(model, ids, past, device)
        with keys.seeded(keys.derive(seed, "generate", len(new)), device):
            token = agreed(_sampled(logits, temperature, top_k, top_p))
        if token in stops:
            break
        new.append(token)
        ids.append(token)
        if stop is not None and stop(new):
            break
    return new


def _ids(end: int | Collection[int] | None) -> set[int]:
    """The ids that end a text; `ConfigError` for a token's text, which would never be met."""
    if end is None:
        return set()
    with suppress(TypeError):
        return {operator.index(end)}  # type: ignore[arg-type]
    try:
        return {operator.index(each) for each in end}  # type: ignore[union-attr]
    except TypeError as error:
        message = f"end: {end!r}, expected the id of a token, or several ids"
        raise ConfigError(message) from error


class _Past:
    """What a model keeps of the tokens that it has seen: its cache."""

    def __init__(self) -> None:
        self.own: Cache = []  # the built-in decoder's
        self.theirs: Any = None  # transformers' cache, where the model has one
        self.seen = 0


def _next_logits(model: nn.Module, ids: Sequence[int], past: _Past, device: torch.device) -> Tensor:
    if isinstance(model, Decoder):
        given = torch.tensor([ids[past.seen :]], device=device)
        past.seen = len(ids)
        logits: Tensor = model(given, cache=past.own)
        return logits[0, -1].float()
    known = inspect.signature(model.forward).parameters
    name = _cache_name(model, known)
    if past.seen <= _short(model) < len(ids):
        past.seen, past.theirs = 0, None  # it was made with the frequencies of short sequences
    options: dict[str, Any] = {name: past.theirs, "use_cache": True} if name else {}
    given = torch.tensor([ids[past.seen :]], device=device)
    if past.seen and "position_ids" in known:
        # A model whose first layers keep no keys may take its cache for empty.
        options["position_ids"] = torch.arange(past.seen, len(ids), device=device).unsqueeze(0)
    outputs = model(input_ids=given, **options)
    past.theirs = getattr(outputs, name, None) if name else None
    past.seen = 0 if past.theirs is None else len(ids)
    logits = logits_in(outputs)
    return logits[0, -1].float()


def _cache_name(model: nn.Module, known: Collection[str]) -> str | None:
    """What a model of transformers calls its cache; None where it has none."""
    if not hasattr(model, "generation_config"):
        return None
    # The second is its name before transformers 5.24.
    return next((name for name in ("cache", "past_key_values") if name in known), None)


def _short(model: nn.Module) -> float:
    """The length beyond which a model has other rotary frequencies throughout, as Phi-3 does."""
    rope = getattr(getattr(model, "config", None), "rope_parameters", None) or {}
    longrope = rope.get("rope_type") == "longrope"
    return float(rope["original_max_position_embeddings"]) if longrope else math.inf


def _sampled(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> int:
    most = float(logits.max())  # NaN where any is
    if not math.isfinite(most):
        raise StateError(
            f"params: the largest logit of the next token is {most}, so that no token can be "
            "chosen; the params are not finite, or too large for the dtype"
        )
    if temperature == 0:
        return int(logits.argmax())
    ordered, tokens = logits.sort(descending=True, stable=True)
    # Less the largest, or a low temperature would divide to infinity.
    scaled = (ordered[:top_k] - most) / max(temperature, _LOWEST)
    probs = scaled.softmax(-1)
    if top_p is not None:
        # A token is kept while those before it hold less than top_p; the first always is.
        before = probs.cumsum(-1) - probs
        probs = probs.masked_fill(before >= top_p, 0.0)
    return int(tokens[torch.multinomial(probs, 1)])


# The smallest normal float32: no two logits are that near unless they are equal.
_LOWEST = torch.finfo(torch.float32).tiny


def _check_options(
    max_new_tokens: object, temperature: object, top_k: object, top_p: object
) -> None:
    check_integer("max_new_tokens", max_new_tokens)
    check_not_negative("temperature", temperature)
    if top_k is not None and not is_integer(top_k):
        raise ConfigError(f"top_k: {top_k!r}, expected an integer of at least 1, or None")
    if top_p is not None and not (is_number(top_p) and 0 < top_p <= 1):
        raise ConfigError(f"top_p: {top_p!r}, expected a number in (0, 1], or None")


def _check_prompt(input_ids: Sequence[int], vocabulary: int | None, most: int | None) -> None:
    if not isinstance(input_ids, Sequence) or not all(isinstance(t, Integral) for t in input_ids):
        raise BatchError(
            f"input_ids: a {type(input_ids).__name__}, expected the token ids of one prompt as a "
            "sequence of integers; of a tensor, ids.tolist()"
        )
    if not input_ids:
        raise BatchError("input_ids: an empty prompt; give at least one token")
    if most is not None and len(input_ids) > most:
        raise BatchError(
            f"input_ids: {len(input_ids)} tokens, and the model has learnt {most} positions; give "
            "a shorter prompt"
        )
    for position, token in enumerate(input_ids):
        if token < 0 or (vocabulary is not None and token >= vocabulary):
            raise BatchError(
                f"input_ids: {token} at {position} is out of range, expected [0, {vocabulary})"
            )
