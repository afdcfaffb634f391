"""Prompts with completions: chats for fine-tuning, and pairs for preference optimisation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import attrs
import torch

from functrain.data.source import Batch, MapSource, at_least_one
from functrain.data.text import IGNORE_INDEX
from functrain.data.tokenizers import Tokenizer
from functrain.errors import DataError, did_you_mean

Record = Mapping[str, Any]
Example = tuple[tuple[int, ...], tuple[int, ...]]
"""Token ids, and labels aligned with them."""

ROLES = ("system", "user", "assistant")


@attrs.frozen(kw_only=True, eq=False)
class Chats(MapSource):
    """Completions to be learnt: labels on what the assistant says, −100 elsewhere.

    Rows are padded at the end to the batch's longest, rounded up to a multiple of 8.
    `truncated` counts the examples cut at `time`, `dropped` those of which no completion was left.
    """

    examples: tuple[Example, ...] = attrs.field(repr=False)
    truncated: int = 0
    dropped: int = 0

    def __len__(self) -> int:
        """The number of examples."""
        return len(self.examples)

    def collate(self, indices: list[int]) -> Batch:
        """`input_ids`, `labels`, `attention_mask`: int64 [n, time]."""
        return padded([self.examples[index] for index in indices])


@attrs.frozen(kw_only=True, eq=False)
class Pairs(MapSource):
    """Two completions of one prompt, the chosen and the rejected; else as `Chats`."""

    examples: tuple[tuple[Example, Example], ...] = attrs.field(repr=False)
    truncated: int = 0
    dropped: int = 0

    def __len__(self) -> int:
        """The number of pairs."""
        return len(self.examples)

    def collate(self, indices: list[int]) -> Batch:
        """`chosen` and `rejected`, each as `Chats` gives it."""
        pairs = [self.examples[index] for index in indices]
        return {
            "chosen": padded([chosen for chosen, _ in pairs]),
            "rejected": padded([rejected for _, rejected in pairs]),
        }


def padded(examples: Sequence[Example]) -> dict[str, torch.Tensor]:
    """Examples as one batch, padded at the end."""
    time = -(-max(len(ids) for ids, _ in examples) // 8) * 8
    input_ids = torch.zeros(len(examples), time, dtype=torch.int64)
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    mask = torch.zeros_like(input_ids)
    for row, (ids, targets) in enumerate(examples):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        labels[row, : len(ids)] = torch.tensor(targets)
        mask[row, : len(ids)] = 1
    return {"input_ids": input_ids, "labels": labels, "attention_mask": mask}


def chat(
    records: Iterable[Record],
    tokenizer: Tokenizer,
    *,
    time: int,
    batch_size: int,
    seed: int = 0,
    shuffle: bool = True,
) -> Chats:
    """`{"prompt", "completion"}` or `{"messages": [{"role", "content"}]}` for fine-tuning.

    A completion follows its prompt as it is, and the tokenizer's `end` closes it. Messages are laid
    out as lines `role: content`; what an assistant says, with its end, is a target. Prompt and
    completion are tokenised apart, so that the boundary is a boundary between tokens. Other keys of
    a record are ignored.

    Raises `DataError`, naming the record, for missing keys, both forms in one record, unknown
    roles, content that is not text, an empty completion, and where no example fits in `time`
    tokens.
    """
    _check_given(records, time)
    examples = [_read(each, tokenizer, f"record {n}") for n, each in enumerate(records)]
    cut = [_cut(example, time) for example in examples]
    kept = tuple(example for example in cut if _targets(example))
    _some_left(len(examples), len(kept), time)
    return Chats(
        examples=kept,
        truncated=sum(len(ids) > time for ids, _ in examples),
        dropped=len(examples) - len(kept),
        batch_size=batch_size,
        seed=seed,
        shuffle=shuffle,
    )


def preference(
    records: Iterable[Record],
    tokenizer: Tokenizer,
    *,
    time: int,
    batch_size: int,
    seed: int = 0,
    shuffle: bool = True,
) -> Pairs:
    """`{"prompt", "chosen", "rejected"}`, each a text, for preference optimisation.

    As `chat`; a pair is dropped when one of its completions has no token left.
    """
    _check_given(records, time)
    pairs = [_read_pair(each, tokenizer, f"record {n}") for n, each in enumerate(records)]
    cut = [(_cut(chosen, time), _cut(rejected, time)) for chosen, rejected in pairs]
    kept = tuple(pair for pair in cut if all(_targets(side) for side in pair))
    _some_left(len(pairs), len(kept), time)
    return Pairs(
        examples=kept,
        truncated=sum(max(len(c[0]), len(r[0])) > time for c, r in pairs),
        dropped=len(pairs) - len(kept),
        batch_size=batch_size,
        seed=seed,
        shuffle=shuffle,
    )


def _check_given(records: object, time: int) -> None:
    if isinstance(records, Mapping):
        raise DataError("records: one object, expected a list of them: [record]")
    if isinstance(records, str) or not isinstance(records, Iterable):
        raise DataError(f"records: expected a list of objects, got {type(records).__name__}")
    at_least_one("time", time)


def _some_left(given: int, kept: int, time: int) -> None:
    if not given:
        raise DataError("records: none; expected at least one example")
    if not kept:
        raise DataError(
            f"time: {time} tokens leave no completion token of any of {given} examples; give more"
        )


def _cut(example: Example, time: int) -> Example:
    ids, labels = example
    return ids[:time], labels[:time]


def _targets(example: Example) -> int:
    return sum(label != IGNORE_INDEX for label in example[1][1:])


def _read(record: Record, tokenizer: Tokenizer, where: str) -> Example:
    if isinstance(record, Mapping) and "messages" in record:
        for other in ("prompt", "completion"):
            if other in record:
                raise DataError(f"{where}: messages and {other}; give one form or the other")
        _check_keys(record, ("messages",), where)
        return _dialogue(record["messages"], tokenizer, where)
    _check_keys(record, ("prompt", "completion"), where)
    prompt = tokenizer.encode(_text(record, "prompt", where))
    return _completed(prompt, _text(record, "completion", where), tokenizer, f"{where}.completion")


def _read_pair(record: Record, tokenizer: Tokenizer, where: str) -> tuple[Example, Example]:
    _check_keys(record, ("prompt", "chosen", "rejected"), where)
    prompt = tokenizer.encode(_text(record, "prompt", where))
    chosen, rejected = (_text(record, side, where) for side in ("chosen", "rejected"))
    if chosen == rejected:
        raise DataError(f"{where}: chosen and rejected are the same text; nothing is preferred")
    return (
        _completed(prompt, chosen, tokenizer, f"{where}.chosen"),
        _completed(prompt, rejected, tokenizer, f"{where}.rejected"),
    )


def _completed(prompt: list[int], text: str, tokenizer: Tokenizer, where: str) -> Example:
    if not text:
        raise DataError(f"{where}: empty; a completion needs text to learn from")
    completion = [*tokenizer.encode(text), tokenizer.end]
    return (*prompt, *completion), (*(IGNORE_INDEX for _ in prompt), *completion)


def _dialogue(messages: object, tokenizer: Tokenizer, where: str) -> Example:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise DataError(f"{where}.messages: expected a list of messages with role and content")
    ids: list[int] = []
    labels: list[int] = []
    for number, message in enumerate(messages):
        at = f"{where}.messages[{number}]"
        role, content = _message(message, at)
        head, said = tokenizer.encode(f"{role}: "), tokenizer.encode(content)
        if role == "assistant":
            said = [*said, tokenizer.end]
        tail = tokenizer.encode("\n")
        ids += [*head, *said, *tail]
        spoken = said if role == "assistant" else [IGNORE_INDEX] * len(said)
        labels += [*([IGNORE_INDEX] * len(head)), *spoken, *([IGNORE_INDEX] * len(tail))]
    if all(label == IGNORE_INDEX for label in labels):
        raise DataError(f"{where}.messages: no assistant speaks, so there is nothing to learn")
    return tuple(ids), tuple(labels)


def _message(message: object, where: str) -> tuple[str, str]:
    if not isinstance(message, Mapping):
        raise DataError(f"{where}: expected role and content, got {type(message).__name__}")
    _check_keys(message, ("role", "content"), where)
    role = _text(message, "role", where)
    if role not in ROLES:
        raise DataError(f"{where}.role: {role!r} is unknown; {did_you_mean(role, ROLES)}")
    content = _text(message, "content", where)
    if role == "assistant" and not content:
        raise DataError(f"{where}.content: empty; an assistant's turn needs text to learn from")
    return role, content


def _check_keys(record: object, keys: Sequence[str], where: str) -> None:
    if not isinstance(record, Mapping):
        raise DataError(f"{where}: expected an object, got {type(record).__name__}")
    for key in keys:
        if key not in record:
            near = did_you_mean(key, record) if record else "it is empty"
            raise DataError(f"{where}: no {key!r}; {near}")


def _text(record: Record, key: str, where: str) -> str:
    value = record[key]
    if not isinstance(value, str):
        raise DataError(f"{where}.{key}: expected text, got {type(value).__name__}")
    return value
