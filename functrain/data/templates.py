"""Dialogues in a tokenizer's own chat template, and which of their tokens the assistant says."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from functrain.data.dialogues import Dialogue, Message
from functrain.data.text import IGNORE_INDEX
from functrain.data.turns import Render, check_said, has_end, holds, turn_by_turn
from functrain.errors import DataError

Spans = list[tuple[int, int]]
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@runtime_checkable
class Templated(Protocol):
    """A tokenizer with a chat template: `functrain.data.PretrainedTokenizer` is one."""

    @property
    def template(self) -> str | None:
        """The template, or None."""
        ...

    def encode(self, text: str) -> list[int]:
        """The ids of a text."""
        ...

    def spell(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens as they are written."""
        ...

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        prompt: bool = False,
    ) -> str:
        """Messages as text."""
        ...

    def generated(
        self, messages: Sequence[Message], *, tools: Sequence[Mapping[str, Any]] | None = None
    ) -> tuple[list[int], list[int]]:
        """Ids, and for each whether it is within `{% generation %}`."""
        ...


def has_template(tokenizer: object) -> bool:
    """Whether a tokenizer says how dialogues look."""
    return isinstance(tokenizer, Templated) and tokenizer.template is not None


def laid_out(
    given: Dialogue, tokenizer: Templated, where: str
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids of a dialogue in the template, and labels: −100 but on what is learnt.

    By `{% generation %}` where the template marks what the assistant says. Otherwise by prefix
    difference: what a message adds to the text up to where the assistant would begin is its own,
    its end among it; that is exact where each beginning of the dialogue is rendered as the
    beginning of the whole. Where it is not, or where the template takes reasoning out of earlier
    turns, each turn stands as it is rendered when it is the last (`turn_by_turn`). The pieces are
    tokenised apart, as a model that is asked with the one goes on with the other.

    Raises `DataError` where a template leaves out a message or the tools, where it does not show
    what a turn is, and where nothing is marked.
    """
    tools = list(given.tools) or None

    def rendered(messages: Sequence[Message], *, prompt: bool = False) -> str:
        try:
            return tokenizer.render(messages, tools=tools, prompt=prompt)
        except DataError as error:
            if not messages:  # what comes before the first one
                raise DataError(_speaks_first(given)) from error
            raise DataError(f"{where}: {error}") from error

    whole = rendered(given.messages)
    if given.tools and whole == tokenizer.render(given.messages):
        raise DataError(f"{where}.tools: the chat template has no place for them")
    check_said(given, rendered)
    complete = all(holds(whole, each) for each in given.messages)
    if complete and _is_marked(tokenizer):
        ids, labels = _by_generation(given, tokenizer, tools, where)
    else:
        spans = _spans(given, whole, rendered) if complete else None
        first = given.learnt.index(True)
        if spans is None or not has_end(rendered, given.messages[: first + 1]):
            whole, spans = turn_by_turn(given, rendered)
        ids, labels = _by_spans(whole, spans, tokenizer, where)
    if all(label == IGNORE_INDEX for label in labels):
        raise DataError(
            f"{where}: the chat template marks no token as the assistant's, so there is nothing to "
            "learn; check where it has {% generation %}"
        )
    return tuple(ids), tuple(labels)


def _speaks_first(given: Dialogue) -> str:
    hint = ", or give it weight 0" if any(given.learnt[1:]) else ""
    return (
        f"{given.places[0]}: the assistant speaks first, and the chat template shows no place "
        f"before it; begin with the user{hint}"
    )


def _is_marked(tokenizer: Templated) -> bool:
    """Whether the template marks what the assistant says, and its tokens can be told by that.

    A tokenizer of transformers that is written in Python has no places of its tokens in the text.
    """
    fast = getattr(getattr(tokenizer, "inner", None), "is_fast", True)
    return fast and _GENERATION.search(tokenizer.template or "") is not None


def _by_generation(
    given: Dialogue, tokenizer: Templated, tools: Any, where: str
) -> tuple[list[int], list[int]]:
    ids, mask = tokenizer.generated(given.messages, tools=tools)
    starts = [n for n, said in enumerate(mask) if said and not (n and mask[n - 1])]
    spoken = [n for n, each in enumerate(given.messages) if each["role"] == "assistant"]
    learnt = [given.learnt[n] for n in spoken]
    if all(learnt):
        return ids, [i if said else IGNORE_INDEX for i, said in zip(ids, mask, strict=True)]
    if len(starts) != len(spoken):
        raise DataError(
            f"{where}: weights, and the chat template marks {len(starts)} stretches for "
            f"{len(spoken)} messages of the assistant; leave the weights out"
        )
    labels: list[int] = []
    turn = -1
    for n, (i, said) in enumerate(zip(ids, mask, strict=True)):
        turn += n in starts
        labels.append(i if said and learnt[turn] else IGNORE_INDEX)
    return ids, labels


def _spans(given: Dialogue, whole: str, rendered: Render) -> Spans | None:
    """Where in the text what is learnt begins and ends; None where prefixes do not show it."""
    found: Spans = []
    for number, learnt in enumerate(given.learnt):
        if not learnt:
            continue
        before = rendered(given.messages[:number], prompt=True)
        last = number + 1 == len(given.messages)
        after = whole if last else rendered(given.messages[: number + 1])
        if not (whole.startswith(after) and after.startswith(before) and len(after) > len(before)):
            return None
        found.append((len(before), len(before) + len(after[len(before) :].rstrip())))
    return found


def _by_spans(
    whole: str, spans: Spans, tokenizer: Templated, where: str
) -> tuple[list[int], list[int]]:
    ids: list[int] = []
    labels: list[int] = []
    at = 0
    for begin, end in [*spans, (len(whole), len(whole))]:
        between, said = tokenizer.encode(whole[at:begin]), tokenizer.encode(whole[begin:end])
        ids += [*between, *said]
        labels += [*([IGNORE_INDEX] * len(between)), *said]
        at = end
    if ids != tokenizer.encode(whole) and tokenizer.spell(ids) != whole:
        raise DataError(
            f"{where}: the tokenizer gives pieces of a text other tokens than the text (it adds "
            "spaces, say), so the assistant's cannot be told; give a template with "
            "{% generation %}"
        )
    return ids, labels
