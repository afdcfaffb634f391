"""The model card of an export: what it was made of, how, and what was measured."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import Any

import orjson
import torch
from torch import Tensor, nn

from functrain.models.decoder import Decoder
from functrain.state import TrainState, fingerprint


def card(
    *,
    name: str,
    architecture: nn.Module,
    params: Mapping[str, Tensor],
    state: TrainState,
    data: str | None,
    config: str | Mapping[str, Any] | None,
    metrics: Mapping[str, float],
    tokenizer: bool,
    chat: bool,
) -> str:
    """The card as Markdown under a YAML header, which the hub reads."""
    count = sum(tensor.numel() for tensor in params.values())
    made = "LlamaForCausalLM" if isinstance(architecture, Decoder) else type(architecture).__name__
    parts = [
        f"# {name}",
        f"A {made} of {count:,} parameters, trained with functrain{' on ' + data if data else ''}.",
        _use(name, tokenizer),
        "## Training",
        _table(
            {
                "steps": f"{state.step:,}",
                "applied updates": f"{int(state.optimizer.count):,}",
                "samples": f"{state.cursor.samples:,}",
                "target tokens": f"{state.cursor.tokens:,}",
                "optimizer": state.optimizer.kind,
                "data": data or "not given",
                "fingerprint of the state": f"`{fingerprint(state)}`",
                "torch": torch.__version__,
                "Python": platform.python_version(),
            }
        ),
    ]
    if metrics:
        shown = {key: f"{value:.6g}" for key, value in sorted(metrics.items())}
        parts += ["## Measured", _table(shown)]
    if config is not None:
        text = config if isinstance(config, str) else _json(config)
        parts += [
            "## Configuration",
            f"```{'toml' if isinstance(config, str) else 'json'}\n{text.strip()}\n```",
        ]
    return _headed("\n\n".join(parts) + "\n", chat)


def _use(name: str, tokenizer: bool) -> str:
    """How to load it with transformers; a tokenizer only where one is exported with the model."""
    loaded = {"model": "AutoModelForCausalLM"} | (
        {"tokenizer": "AutoTokenizer"} if tokenizer else {}
    )
    lines = [f'{what} = {cls}.from_pretrained("{name}")' for what, cls in loaded.items()]
    imported = f"from transformers import {', '.join(loaded.values())}"
    return "\n".join(["```python", imported, "", *lines, "```"])


def _table(rows: Mapping[str, str]) -> str:
    lines = ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())]
    return "\n".join(lines)


def _json(config: Mapping[str, Any]) -> str:
    options = orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS
    return orjson.dumps(config, default=str, option=options).decode()


def _headed(body: str, chat: bool) -> str:
    tags = "".join(f"- {tag}\n" for tag in ("functrain", *(["conversational"] if chat else [])))
    header = f"library_name: transformers\npipeline_tag: text-generation\ntags:\n{tags}"
    return f"---\n{header}---\n\n{body}"
