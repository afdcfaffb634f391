"""What a model says: prompts from the held-out data, and completions of them."""

from __future__ import annotations

from collections.abc import Sequence

from functrain import models
from functrain.cli.build import Built
from functrain.data import Tokenizer
from functrain.objectives.batches import IGNORE_INDEX, Batch
from functrain.state import TrainState

Prompt = tuple[int, ...]
"""The ids of a prompt: not all of them could be made of its text, those of a template, say."""


def prompts(batches: Sequence[Batch], tokenizer: Tokenizer | None, count: int = 3) -> list[Prompt]:
    """The first held-out prompts, or the beginnings of held-out rows."""
    if tokenizer is None or not batches:
        return []
    sides = (batches[0].get(side) for side in ("chosen", "completion"))
    batch = next((side for side in sides if side is not None), batches[0])
    found = []
    for row in range(min(count, len(batch["input_ids"]))):
        ids, labels = batch["input_ids"][row], batch["labels"][row]
        targets = (labels != IGNORE_INDEX).nonzero()
        first = int(targets[0]) if len(targets) else 0
        if "position_ids" in batch:  # packed text: the beginning of the first document
            begins = (batch["position_ids"][row] == 0).nonzero()[1:2]
            ids, first = ids[: int(begins[0]) if len(begins) else None], 0
        found.append(tuple(ids[: first or min(64, len(ids) // 2)].tolist()))
    return found


def spoken(
    built: Built, state: TrainState, given: Sequence[Prompt], *, tokens: int = 120
) -> list[str]:
    """What the model says after each prompt, greedily; nothing without a tokenizer."""
    tokenizer = built.tokenizer
    if tokenizer is None:
        return []
    completed = (
        models.generate(
            built.step.architecture,
            state.params,
            state.buffers,
            prompt or [tokenizer.end],
            max_new_tokens=tokens,
            end=models.ends(built.step.architecture, tokenizer.end),
        )
        for prompt in given
    )
    return [tokenizer.decode(ids) for ids in completed]
