"""What an architecture says of itself: what it computes, and how many token ids it knows."""

from __future__ import annotations

import re
from typing import Any

import attrs
import orjson
from torch import nn

from functrain.architecture import held_by


def vocabulary_of(architecture: nn.Module) -> int | None:
    """How many token ids the architecture's input embedding knows, where that can be told.

    It is the one that `get_input_embeddings` names; or the only one, those of positions apart; or
    the one that is as large as the output projection.
    """
    embedding = getattr(architecture, "get_input_embeddings", None)
    if callable(embedding):
        found = embedding()
        if isinstance(found, nn.Embedding):
            return found.num_embeddings
    sizes = {
        module.num_embeddings
        for name, module in architecture.named_modules()
        if isinstance(module, nn.Embedding) and not _of_positions(name)
    }
    heads = {m.out_features for m in architecture.modules() if isinstance(m, nn.Linear)}
    if len(sizes) > 1:
        sizes &= heads
    return next(iter(sizes)) if len(sizes) == 1 else None


def description(architecture: nn.Module) -> str:
    """What an architecture computes, beside its values: its class, and its config if it has one.

    A config is attrs', or transformers', without what says how and by whom it was made. Without
    one: the classes and the `repr` of the modules; a number that they do not show is not seen.
    """
    config = _config(getattr(architecture, "config", None))
    if config is None:
        shown = re.sub(r" at 0x[0-9a-f]+", "", repr(architecture))
        classes = [type(module).__qualname__ for module in architecture.modules()]
        config = {"modules": classes, "repr": shown}
    given: dict[str, Any] = {"class": type(architecture).__qualname__, "config": config}
    held, adapter = held_by(architecture), vars(architecture).get("functrain_adapter")
    if held is not None:
        given |= {
            "base": held.fingerprint,
            "adapter": attrs.asdict(adapter.lora) if adapter else None,
        }
    options = orjson.OPT_SORT_KEYS | orjson.OPT_NON_STR_KEYS
    return orjson.dumps(given, default=str, option=options).decode()


def _config(config: Any) -> dict[str, Any] | None:
    if attrs.has(type(config)):
        return _lasting(attrs.asdict(config))
    found = config.to_diff_dict() if callable(getattr(config, "to_diff_dict", None)) else None
    return _lasting(found) if isinstance(found, dict) else None


# Of how a model is made and run, which changes its logits by no more than rounding.
_PASSING = frozenset(
    {
        *("transformers_version", "_name_or_path", "name_or_path", "architectures"),
        *("dtype", "torch_dtype", "_attn_implementation", "attn_implementation"),
        *("_attn_implementation_internal", "_attn_implementation_autoset", "checkpointing"),
    }
)


def _lasting(config: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _lasting(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in _PASSING
    }


def _of_positions(name: str) -> bool:
    last = name.rsplit(".", 1)[-1]
    return "pos" in last or last in ("wpe", "wtt", "token_type_embeddings")
