"""Samples of a model: prompts from the held-out data, and their completions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import orjson

from functrain import models
from functrain.architecture import held_values
from functrain.cli.build import Built
from functrain.data import Tokenizer
from functrain.errors import StateError
from functrain.loop import world_of
from functrain.models.generate import continued
from functrain.objectives.batches import IGNORE_INDEX, Batch
from functrain.state import TrainState, device_of
from functrain.trees import clone, rows_here

GATHERED = 96 << 20
"""Bytes that may be gathered for each token of a sample; for all the tokens of three samples this
takes half a minute at 10 Gbit/s."""

TOKENS = 120
"""Tokens in a sample."""

_SAMPLES = 3

Prompt = tuple[int, ...]
"""The ids of a prompt, since some (a template's, say) cannot be recovered from its text."""


def prompts(batches: Sequence[Batch], tokenizer: Tokenizer | None) -> list[Prompt]:
    """The first held-out prompts, or the beginnings of held-out rows."""
    if tokenizer is None or not batches:
        return []
    sides = (batches[0].get(side) for side in ("chosen", "completion"))
    batch = next((side for side in sides if side is not None), batches[0])
    found = []
    for row in range(min(_SAMPLES, len(batch["input_ids"]))):
        ids, labels = batch["input_ids"][row], batch["labels"][row]
        targets = (labels != IGNORE_INDEX).nonzero()
        first = int(targets[0]) if len(targets) else 0
        if "position_ids" in batch:  # packed text: the beginning of the first document
            begins = (batch["position_ids"][row] == 0).nonzero()[1:2]
            ids, first = ids[: int(begins[0]) if len(begins) else None], 0
        found.append(tuple(ids[: first or min(64, len(ids) // 2)].tolist()))
    return found


def bytes_to_gather(built: Built) -> int:
    """Bytes that the workers send each other for one forward pass of a model in shards; else 0."""
    if not built.sharded:
        return 0
    items = [*built.state.params.values(), *held_values(built.step.architecture).values()]
    return sum(tensor.numel() * tensor.dtype.itemsize for tensor in items)


def spoken(
    built: Built, state: TrainState, given: Sequence[Prompt], *, ended: bool = False
) -> list[str]:
    """Complete each prompt greedily; empty without a tokenizer.

    Every worker must call this, and gets worker 0's completions. `ended`: the run is finished, so
    where no token can be chosen, the reason stands in place of the words.
    """
    tokenizer, world = built.tokenizer, world_of(built.step)
    if tokenizer is None:
        return []
    architecture = built.step.architecture
    ends = models.ends(architecture, tokenizer.end)
    asked = [prompt or [tokenizer.end] for prompt in given]
    wanted: dict[str, Any] = {"max_new_tokens": TOKENS, "end": ends}
    if not built.sharded:
        say = functools.partial(
            models.generate, architecture, state.params, state.buffers, **wanted
        )

        def said() -> str:
            # As ids: a text that ends within a character cannot be sent.
            return orjson.dumps(_told(say, asked, ended)).decode()

        words = orjson.loads(world.from_first(said, "samples"))
        return [_worded(tokenizer, each) for each in words]

    def agreed(token: int) -> int:
        return int(world.numbers([token])[0])

    rows = {n: rows_here(t) for n, t in state.params.items()}
    with built.step.value_and_grad.bound(rows, clone(state.buffers), "eval") as model:
        say = functools.partial(
            continued,
            model,
            device=device_of(rows),
            agreed=agreed,
            **wanted,
        )
        return [_worded(tokenizer, each) for each in _told(say, asked, ended)]


def _told(
    say: Callable[[Sequence[int]], list[int]], asked: Sequence[Sequence[int]], ended: bool
) -> list[list[int] | str]:
    """The ids that follow each prompt; of a finished run, or why there are none."""
    told: list[list[int] | str] = []
    for prompt in asked:
        try:
            told.append(say(prompt))
        except StateError as error:
            if not ended:
                raise
            told.append(f"(nothing: {error})")
    return told


def _worded(tokenizer: Tokenizer, told: list[int] | str) -> str:
    return told if isinstance(told, str) else tokenizer.decode(told)
