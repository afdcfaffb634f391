"""Prompts with completions, and dialogues, for fine-tuning."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import attrs
import torch

from functrain.data.examples import Example, Record, check_given, read_chat, read_each
from functrain.data.grouping import MULTIPLE, Padded, width
from functrain.data.source import Batch
from functrain.data.text import IGNORE_INDEX
from functrain.data.tokenizers import Tokenizer, check_joinable
from functrain.data.truncation import Truncation, fitted


@attrs.frozen(kw_only=True, eq=False)
class Chats(Padded):
    """Completions to learn: labels on what the assistant says, −100 elsewhere.

    Rows are padded at the end to the batch's longest (see `Padded`). `counts` says how many
    examples were cut at `time`, and how many dropped since nothing of a completion was left.
    """

    examples: tuple[Example, ...] = attrs.field(repr=False)

    def __len__(self) -> int:
        """The number of examples."""
        return len(self.examples)

    def sequences(self, index: int) -> tuple[tuple[int, ...], ...]:
        """The length of an example."""
        return ((len(self.examples[index][0]),),)

    def collate(self, indices: list[int]) -> Batch:
        """`input_ids`, `labels`, `attention_mask`: int64 [n, time]."""
        return padded([self.examples[index] for index in indices], self.pad_to_multiple_of)


def padded(examples: Sequence[Example], multiple: int) -> dict[str, torch.Tensor]:
    """Examples as one batch, padded at the end to a multiple of `multiple` tokens."""
    time = width((len(ids) for ids, _ in examples), multiple)
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
    truncation: str = "keep_start",
    min_prompt: int = 1,
    group_by_length: bool = False,
    pad_to_multiple_of: int = MULTIPLE,
    on_bad_record: str = "stop",
) -> Chats:
    """Examples from `{"prompt", "completion"}` or `{"messages": [{"role", "content"}]}` records.

    `{"conversations": [{"from", "value"}]}` (ShareGPT) and `{"instruction", "input", "output"}`
    (Alpaca) are read too. A completion follows its prompt as it is, closed by the tokenizer's
    `end`. Messages, which prompt and completion may be too, are laid out with their tools by the
    tokenizer's chat template (`functrain.data.templates`), or as lines `role: content` where it has
    none; tools and reasoning, which such lines do not show, are refused there. What an assistant
    says, with its end, is a target unless it is in the prompt or the message's `weight` is 0.
    Prompt and completion are tokenised separately, so that the boundary falls between tokens. Other
    keys of a record are ignored.

    An example of more than `time` tokens loses its end (`truncation="keep_start"`), its start
    (`"keep_end"`), or the start of its prompt, down to `min_prompt` tokens, and only then its end
    (`"prompt_first"`); a dialogue's prompt is what comes before the assistant's first message.

    `on_bad_record="skip"` passes over malformed records, which `counts` counts. `group_by_length`:
    batches of similar lengths; `pad_to_multiple_of`: few widths, for a compiled step; see
    `functrain.data.grouping.Padded`.

    Raises `DataError`, naming the record, for missing keys, two forms in one record, unknown roles,
    content that is not text, an empty completion; for impossible options, and where no example fits
    in `time` tokens; and for a tokenizer that adds special tokens to every text.
    """
    check_given(records)
    check_joinable(tokenizer)
    how = Truncation(time=time, mode=truncation, min_prompt=min_prompt)
    read, malformed = read_each(
        records, lambda record, where: read_chat(record, tokenizer, where), on_bad_record
    )
    kept, counts = fitted([each for _, each in read], how)
    return Chats(
        examples=tuple(example for (example,) in kept.values()),
        counts=counts.with_malformed(malformed),
        batch_size=batch_size,
        seed=seed,
        shuffle=shuffle,
        group_by_length=group_by_length,
        pad_to_multiple_of=pad_to_multiple_of,
    )
