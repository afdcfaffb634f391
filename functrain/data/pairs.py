"""Pairs for preference optimisation: two completions of one prompt."""

from __future__ import annotations

from collections.abc import Iterable

import attrs

from functrain.data.examples import Example, Prompted, Record, check_given, read_each, read_pair
from functrain.data.grouping import MULTIPLE, Padded
from functrain.data.sequences import padded
from functrain.data.source import Batch, check_boolean
from functrain.data.tokenizers import Tokenizer, check_joinable
from functrain.data.truncation import Truncation, fitted
from functrain.errors import DataError


@attrs.frozen(kw_only=True, eq=False)
class Pairs(Padded):
    """Two completions of one prompt, the chosen and the rejected; otherwise as `Chats`.

    Both sides of a pair have the same prompt, cut or not, and each has a target.
    """

    examples: tuple[tuple[Example, Example], ...] = attrs.field(repr=False)

    def __len__(self) -> int:
        """The number of pairs."""
        return len(self.examples)

    def sequences(self, index: int) -> tuple[tuple[int, ...], ...]:
        """The lengths of both sides, which a step pads to one width."""
        return (tuple(len(ids) for ids, _ in self.examples[index]),)

    def collate(self, indices: list[int]) -> Batch:
        """`chosen` and `rejected`, each as `Chats` gives it."""
        pairs = [self.examples[index] for index in indices]
        return {
            "chosen": padded([chosen for chosen, _ in pairs], self.pad_to_multiple_of),
            "rejected": padded([rejected for _, rejected in pairs], self.pad_to_multiple_of),
        }


def preference(
    records: Iterable[Record],
    tokenizer: Tokenizer,
    *,
    time: int,
    batch_size: int,
    seed: int = 0,
    shuffle: bool = True,
    truncation: str = "keep_start",
    min_prompt: int = 1,
    drop_identical: bool = False,
    group_by_length: bool = False,
    pad_to_multiple_of: int = MULTIPLE,
    on_bad_record: str = "stop",
) -> Pairs:
    """Pairs from `{"prompt", "chosen", "rejected"}`: texts or messages, read as `chat` does.

    Without "prompt", the prompt is what chosen and rejected both begin with: of messages, whole
    ones; of texts, as far as it has the same tokens when it is tokenised alone.

    `truncation`, `min_prompt`, `group_by_length`, `pad_to_multiple_of` and `on_bad_record` are
    those of `chat`; the prompt is cut alike for both sides, by what the longer completion needs. A
    pair is dropped, and counted, when a side has no completion token left, or when the sides differ
    only in what was cut.

    Raises `DataError` as `chat` does; for a record without a prompt whose chosen and rejected share
    none; and for chosen and rejected that are the same, unless `drop_identical` drops and counts
    them.
    """
    check_given(records)
    check_joinable(tokenizer)
    check_boolean("drop_identical", drop_identical)
    how = Truncation(time=time, mode=truncation, min_prompt=min_prompt)
    read, malformed = read_each(
        records, lambda each, where: _read(each, tokenizer, where, drop_identical), on_bad_record
    )
    distinct = [pair for _, pair in read if pair is not None]
    kept, counts = fitted(distinct, how, identical=len(read) - len(distinct))
    return Pairs(
        examples=tuple((chosen, rejected) for chosen, rejected in kept.values()),
        counts=counts.with_malformed(malformed),
        batch_size=batch_size,
        seed=seed,
        shuffle=shuffle,
        group_by_length=group_by_length,
        pad_to_multiple_of=pad_to_multiple_of,
    )


def _read(
    record: Record, tokenizer: Tokenizer, where: str, drop_identical: bool
) -> Prompted | None:
    """A pair, or None where both sides are the same and are to be dropped."""
    pair = read_pair(record, tokenizer, where)
    return pair if differ(pair, where, drop_identical) else None


def differ(pair: Prompted, where: str, drop_identical: bool) -> bool:
    """Whether chosen and rejected differ; `DataError` if not, unless such pairs are to be dropped.

    Texts that a tokenizer does not tell apart are the same too.
    """
    chosen, rejected = pair.completions
    if chosen == rejected and not drop_identical:
        raise DataError(
            f"{where}: chosen and rejected are the same text; nothing is preferred; take it out, "
            "or on_bad_record='skip' (in Python drop_identical=True too)"
        )
    return chosen != rejected
