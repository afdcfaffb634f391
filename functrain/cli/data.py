"""`functrain data show`: an example as a model sees it, with the trained tokens in colour."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from functrain import data
from functrain.data.dialogues import shape_of, shapes_in
from functrain.data.examples import Prompted, read_chat, read_pair, read_unpaired
from functrain.data.text import IGNORE_INDEX
from functrain.errors import ConfigError

_TRAINED, _PLAIN = "\x1b[1;32m", "\x1b[0m"
_BEGIN, _END = "⟦", "⟧"
# A terminal would obey control characters (move back, take another colour): their pictures, `␛`,
# but for the tab and the newline.
_VISIBLE = {n: 0x2400 + n for n in range(32) if chr(n) not in "\t\n"} | {127: 0x2421}
_VISIBLE |= dict.fromkeys(range(128, 160), 0xFFFD)


def shown(path: str, *, model: str | None, index: int, color: bool | None) -> str:
    """An example of a file of records as text; trained tokens are green, or between ⟦ and ⟧."""
    records = data.records(path)
    if not 0 <= index < len(records):
        raise ConfigError(f"index: {index}, and {path} has records 0 to {len(records) - 1}")
    tokenizer: Any = data.ByteTokenizer() if model is None else _tokenizer(Path(model))
    record, where = records[index], records.where(index)
    shape, read = _read(record, tokenizer, where)
    colored = sys.stdout.isatty() and "NO_COLOR" not in os.environ if color is None else color
    return "\n".join(_lines(where, shape, read, tokenizer, colored))


def _tokenizer(path: Path) -> Any:
    from functrain.cli.origins import is_model, origin, stage_directory
    from functrain.cli.tokenizers import asked_with
    from functrain.data.pretrained import pretrained_tokenizer

    if not path.exists():
        raise ConfigError(
            f"model: {path} is not there (looked from {Path.cwd()}); tokenizers are read from the "
            "disk"
        )
    if is_model(path):
        return pretrained_tokenizer(path)
    try:
        stage_directory(path)
    except ConfigError:  # not a run: a directory may hold a tokenizer without a model
        return pretrained_tokenizer(path)
    found = asked_with(origin(str(path), "model"))
    if found is None:
        raise ConfigError(f"model: {path} has no tokenizer beside it")
    return found


def _read(record: Any, tokenizer: Any, where: str) -> tuple[str, Prompted]:
    there = {key for key, value in record.items() if value is not None}
    if {"chosen", "rejected"} <= there:
        return "preference", read_pair(record, tokenizer, where)
    if {"prompt", "completion", "label"} <= there:
        return "unpaired", read_unpaired(record, tokenizer, where)[0]
    if not shapes_in(record) and {"chosen", "rejected"} & record.keys():
        return "preference", read_pair(record, tokenizer, where)  # which says what is missing
    return shape_of(record, where), read_chat(record, tokenizer, where)


def _lines(where: str, shape: str, read: Prompted, tokenizer: Any, colored: bool) -> Iterator[str]:
    sides = ("chosen", "rejected") if len(read.completions) == 2 else ("",)
    yield f"{where}: {shape}"
    for side, (ids, labels) in zip(sides, read.completions, strict=True):
        whole = (*read.prompt, *ids)
        targets = (*([IGNORE_INDEX] * len(read.prompt)), *labels)
        trained = sum(label != IGNORE_INDEX for label in targets)
        name = f"{side}: " if side else ""
        yield f"{name}{len(whole)} tokens, {trained} of them trained"
        yield "".join(_marked(whole, targets, tokenizer, colored))


def _marked(
    ids: Sequence[int], labels: Sequence[int], tokenizer: Any, colored: bool
) -> Iterator[str]:
    """The text, in stretches of equal marking; an end token without a text of its own becomes ¶."""
    spell = getattr(tokenizer, "spell", None)
    begin = 0
    for at in range(1, len(ids) + 1):
        trained = labels[begin] != IGNORE_INDEX
        if at < len(ids) and (labels[at] != IGNORE_INDEX) == trained:
            continue
        stretch = list(ids[begin:at])
        if spell is not None:
            text = spell(stretch).translate(_VISIBLE)
        else:
            ended = stretch[-1] == tokenizer.end
            text = tokenizer.decode(stretch).translate(_VISIBLE) + ("¶" if ended else "")
        marks = (_TRAINED, _PLAIN) if colored else (_BEGIN, _END)
        yield f"{marks[0]}{text}{marks[1]}" if trained else text
        begin = at
