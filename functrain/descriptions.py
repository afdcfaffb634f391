"""What an architecture tells about itself: what it computes, and how many token ids it knows."""

from __future__ import annotations

import re
from typing import Any

import attrs
import orjson
from torch import Tensor, nn

from functrain.architecture import held_by


def vocabulary_of(architecture: nn.Module) -> int | None:
    """The number of token ids of the architecture's input embedding, or None if it is unknown.

    The input embedding is the one that `get_input_embeddings` returns; else the one that shares its
    weight with a projection, or is as large as what `get_output_embeddings` returns; else, by their
    names, the only one besides those of positions and of token types; else of these the one that is
    as large as a projection. A wrong number would refuse good batches, so that where these leave a
    doubt there is none.
    """
    found = _said(architecture, "get_input_embeddings")
    if isinstance(found, nn.Embedding):
        return found.num_embeddings
    tables = {n: m for n, m in architecture.named_modules() if isinstance(m, nn.Embedding)}
    linears = [module for module in architecture.modules() if isinstance(module, nn.Linear)]
    output = _said(architecture, "get_output_embeddings")
    shown = output.out_features if isinstance(output, nn.Linear) else None
    tied = {id(weight) for linear in linears for weight in _weight(linear)}
    sizes = {
        table.num_embeddings
        for table in tables.values()
        if table.num_embeddings == shown or any(id(weight) in tied for weight in _weight(table))
    }
    if len(sizes) != 1:
        sizes = {m.num_embeddings for name, m in tables.items() if not _of_others(name)}
    if len(sizes) > 1:
        sizes &= {linear.out_features for linear in linears}
    return next(iter(sizes)) if len(sizes) == 1 else None


def _weight(layer: nn.Module) -> list[Tensor]:
    """The weight that a layer holds, if it holds one: some compute theirs, anew at each look."""
    return [t for name, t in layer.named_parameters(recurse=False) if name == "weight"]


def _said(architecture: nn.Module, getter: str) -> object:
    """What a getter of transformers' returns, or None; some models have it and return nothing."""
    method = getattr(architecture, getter, None)
    try:
        return method() if callable(method) else None
    except NotImplementedError:
        return None


def description(architecture: nn.Module) -> str:
    """What an architecture computes, apart from its values: JSON of its class and its config.

    The config is an attrs record or a transformers config, without the fields that say how the
    model was made and is run. Without one, the classes and the `repr` of the modules stand in; a
    number that these do not show is missed.
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


# Fields on how a model is made and run, which change its logits by no more than rounding.
_PASSING = frozenset(
    {
        *("transformers_version", "_name_or_path", "name_or_path", "architectures"),
        *("dtype", "torch_dtype", "_attn_implementation", "attn_implementation"),
        *("_attn_implementation_internal", "_attn_implementation_autoset", "checkpointing"),
        "use_cache",
    }
)


def _lasting(config: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _lasting(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in _PASSING
    }


def _of_others(name: str) -> bool:
    """Whether an embedding is, by its name, one of positions, distances or token types.

    Where tokens are embedded otherwise (by a parameter, or one-hot), it may be the only one, and
    good token ids would be out of its range.
    """
    *parents, last = name.lower().split(".")
    if "pos" in last or last in ("wtt", "distance_embedding") or _OTHERS.search(last):
        return True
    return not _TOKENS.search(last) and any(_OTHERS.search(part) for part in parents)


# As words of a name, and of the names of the modules that it is in: `positions.table`, but not
# `segments.tokens`.
_OTHERS = re.compile(
    r"(^|_)(pos|rel)(ition|ative|_|$)|^w?pe$|(^|_)((token_?)?types?|seg(ment)?s?)(_|$)"
)
_TOKENS = re.compile(r"(^|_)(tok(en)?s?|words?|wte)(_|$)")
