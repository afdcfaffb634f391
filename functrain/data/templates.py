"""Dialogues in a tokenizer's chat template, and which of the tokens are the assistant's."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from functrain.data.dialogues import Dialogue, Message
from functrain.data.text import IGNORE_INDEX
from functrain.data.tokenizers import ids_of
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
        """The token ids of a text."""
        ...

    def spell(self, ids: Sequence[int]) -> str:
        """The text of token ids, with special tokens spelled out."""
        ...

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        prompt: bool = False,
    ) -> str:
        """Messages as text; with `prompt`, up to where the assistant speaks next."""
        ...

    def generated(
        self, messages: Sequence[Message], *, tools: Sequence[Mapping[str, Any]] | None = None
    ) -> tuple[list[int], list[int]]:
        """Token ids, and for each whether it lies within `{% generation %}`."""
        ...


def has_template(tokenizer: object) -> bool:
    """Whether a tokenizer has a chat template."""
    return isinstance(tokenizer, Templated) and tokenizer.template is not None


def laid_out(
    given: Dialogue, tokenizer: Templated, where: str, record: str
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The token ids of a dialogue in the chat template, and labels: −100 where nothing is learnt.

    Learnt tokens are found by `{% generation %}`, if the template has it. Otherwise by prefix
    difference: a turn is what its message adds to the text that ends where the assistant would
    speak, its end token included; this is exact if each beginning of the dialogue renders as the
    beginning of the whole. If it does not, or if the template drops reasoning from earlier turns,
    each turn stands as it is rendered when it is the last (`turn_by_turn`). Pieces are tokenised
    separately, since a model is prompted with one piece and continues with the next. `where` names
    the dialogue in errors, and `record` its record, which has the tools.

    Raises `DataError` if the template leaves out a message or the tools, if the extent of a turn
    cannot be determined, or if no token is marked.
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
    if tools and not _shows_tools(given, tokenizer, whole):
        raise DataError(f"{record}.tools: the chat template has no place for them")
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


def _shows_tools(given: Dialogue, tokenizer: Templated, whole: str) -> bool:
    """Whether the text of a dialogue is another without its tools."""
    try:
        return whole != tokenizer.render(given.messages)
    except DataError:  # a template that cannot do without them
        return True


def _speaks_first(given: Dialogue) -> str:
    hint = ", or give it weight 0" if any(given.learnt[1:]) else ""
    return (
        f"{given.places[0]}: the assistant speaks first, and the chat template shows no place "
        f"before it; begin with the user{hint}"
    )


def _is_marked(tokenizer: Templated) -> bool:
    """Whether the template marks what the assistant says, and the tokenizer can find its tokens.

    A slow tokenizer of transformers, written in Python, gives no offsets of its tokens.
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
    """The spans of the text that are learnt; None if prefixes do not show them."""
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
        between = ids_of(whole[at:begin], tokenizer, where)
        said = ids_of(whole[begin:end], tokenizer, where)
        ids += [*between, *said]
        labels += [*([IGNORE_INDEX] * len(between)), *said]
        at = end
    if ids != ids_of(whole, tokenizer, where) and tokenizer.spell(ids) != whole:
        raise DataError(
            f"{where}: the tokenizer gives pieces of a text other tokens than the text (it adds "
            "spaces, say), so the assistant's cannot be told; give a template with "
            "{% generation %}"
        )
    return ids, labels
