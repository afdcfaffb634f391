"""The tokenizer of a run, and what the config tells its chat template."""

from __future__ import annotations

import datetime
from typing import Any

import attrs

from functrain import data, models
from functrain.cli.config import DPO, Config, Pretrain
from functrain.cli.directory import is_tokens
from functrain.cli.known import EMBEDDED
from functrain.cli.origins import Origin
from functrain.data import ByteTokenizer, PretrainedTokenizer, Tokenizer
from functrain.data.dialogues import SHAPES
from functrain.data.examples import read_chat, read_pair
from functrain.data.pretrained import pretrained_tokenizer
from functrain.data.records import readable
from functrain.data.templates import has_template
from functrain.data.unpaired import read_judged
from functrain.errors import ConfigError, DataError


def tokenizer_for(config: Config, start: Origin | None) -> Tokenizer | None:
    """The tokenizer of a run's data; None if they are ids of a foreign tokenizer."""
    if start is not None:
        found = tokenizer_of(start)
        if found is None and start.config is None:
            raise ConfigError(
                f"model.from: {start.checkpoint} has no tokenizer beside its weights "
                "(tokenizer.json), which prompts and completions need"
            )
        if found is None:
            raise ConfigError(
                f"{start.run.tokenizer} is missing: {start.checkpoint} was trained on ids of a "
                "tokenizer of your own, which prompts and completions would need"
            )
        return _told(found, config)
    assert isinstance(config, Pretrain)  # the other stages have a start
    given = config.data.vocabulary is not None or is_tokens(config.data.train)
    return None if given else ByteTokenizer()


def _told(tokenizer: Tokenizer, config: Config) -> Tokenizer:
    """The tokenizer with what the config tells its chat template."""
    given, day = config.data.enable_thinking, config.data.today
    if not isinstance(tokenizer, PretrainedTokenizer) or not has_template(tokenizer):
        if given is not None:
            raise ConfigError(
                "data.enable_thinking: the tokenizer has no chat template to tell it; leave it out"
            )
        return tokenizer
    return attrs.evolve(
        tokenizer,
        template_options={} if given is None else {"enable_thinking": given},
        today=None if day is None else datetime.date.fromisoformat(day),
    )


def tokenizer_of(found: Origin) -> Tokenizer | None:
    """The tokenizer of a model or of a run; None if the run had ids of a foreign tokenizer."""
    if found.config is None:
        return models.tokenizer_of(found.checkpoint)
    if found.shape is None:
        if not found.run.tokenizer_files.is_dir():
            raise ConfigError(f"{found.run.tokenizer_files} is missing; put it back")
        return pretrained_tokenizer(found.run.tokenizer_files)
    if not found.run.tokenizer.is_file():
        if isinstance(found.config, Pretrain) and found.config.data.vocabulary is not None:
            return None
        raise ConfigError(
            f"{found.run.tokenizer} is missing, with which this run on text was begun; put it back"
        )
    return data.from_json(found.run.tokenizer.read_text(encoding="utf-8"))


def asked_with(found: Origin) -> Tokenizer | None:
    """The tokenizer of a model, with what its run told the chat template."""
    tokenizer = tokenizer_of(found)
    return (
        tokenizer if tokenizer is None or found.config is None else _told(tokenizer, found.config)
    )


def vocabulary_for(config: Config, tokenizer: Tokenizer | None) -> int:
    """The vocabulary size of a run's model."""
    if tokenizer is not None:
        return tokenizer.vocabulary
    given = config.data.vocabulary if isinstance(config, Pretrain) else None
    if given is None:
        raise ConfigError(
            f"data.vocabulary: missing; {config.data.train} holds token ids, so say how many there "
            "are"
        )
    return given


def templated(config: Config, tokenizer: Tokenizer | None) -> bool | None:
    """Whether a run's data are dialogues in a chat template; None if there is no template."""
    if tokenizer is None or not has_template(tokenizer):
        return None
    if isinstance(config, Pretrain) or config.data.train == EMBEDDED:
        return False
    records = (each for each in readable(config.data.train) if _takes(config, tokenizer, each))
    record = next(records, dict[str, Any]())
    keys = ("prompt", "completion", "chosen", "rejected")
    dialogues = [known for shape, known in SHAPES.items() if shape != "prompt-completion"]
    return any(all(key in record for key in known) for known in dialogues) or any(
        isinstance(record.get(key), list) for key in keys
    )


def _takes(config: Config, tokenizer: Tokenizer, record: dict[str, Any]) -> bool:
    """Whether a run trains on a record: one that it skips says nothing about the others."""
    read: Any = {"sft": read_chat, "dpo": read_pair}[config.stage]
    if isinstance(config, DPO) and config.preference.unpaired:
        read = read_judged
    try:
        read(record, tokenizer, "")
    except DataError:
        return False
    return True
