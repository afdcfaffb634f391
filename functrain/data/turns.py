"""Dialogues turn by turn, for chat templates that render the past otherwise than the present.

Templates of reasoning models take the reasoning out of earlier turns, others end the last turn by
another token than those before it. A row of a whole dialogue then holds what no model is ever asked
to say. Here each turn of the assistant stands as the template renders it when it is the last one,
which is what the model is to say there; what others say in between is as the template has it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from itertools import takewhile
from typing import Any, NamedTuple, Protocol

from functrain.data.dialogues import Dialogue, Message
from functrain.errors import DataError

_STANDIN = "Qz7kPhnW3xvJ"  # in place of what was said, to see what the template puts after it
_SHOWN = 24
_REASONING = re.compile(r"</?think>")
_TOKEN = re.compile(r"(<[^<>]*>)")


class Rendering(Protocol):
    """`render(messages, prompt=…)`: the text of messages."""

    def __call__(self, messages: Sequence[Message], *, prompt: bool = False) -> str:
        """With `prompt` up to where the assistant would speak."""
        ...


class Turn(NamedTuple):
    """What the assistant says, up to its end, and what follows; `ends`: how far that is its end."""

    said: str
    follows: str
    ends: int


def turn_by_turn(
    given: Dialogue, render: Any, tools: Any, where: str
) -> tuple[str, list[tuple[int, int]]]:
    """The text of a dialogue, and where in it what is learnt begins and ends.

    `render`: a tokenizer's. Where a turn ends by another token once more follows, its end is not
    learnt there; the last turn's always is. Raises `DataError` with the message whose place in the
    template cannot be told exactly.
    """
    rendered: Rendering = partial(render, tools=tools)
    messages = given.messages
    spoken = [n for n, each in enumerate(messages) if each["role"] == "assistant"]
    text = rendered(messages[: spoken[0]], prompt=True)
    _check_there(messages, range(spoken[0]), text, where)
    if tools and text == render(messages[: spoken[0]], prompt=True):
        raise DataError(f"{where}.tools: the chat template has no place for them")
    spans = []
    for n, following in zip(spoken, [*spoken[1:], None], strict=True):
        turn = _turn(messages, n, following, rendered, where)
        _check_there(messages, range(n + 1, following or len(messages)), turn.follows, where)
        begin, text = len(text), text + turn.said + turn.follows
        if given.learnt[n]:
            learnt = turn.said + turn.follows[: turn.ends]
            spans.append((begin, begin + len(learnt.rstrip())))
    return text, spans


def _turn(
    messages: Sequence[Message], n: int, following: int | None, rendered: Rendering, where: str
) -> Turn:
    before, now = rendered(messages[:n], prompt=True), rendered(messages[: n + 1])
    kept = {key: value for key, value in messages[n].items() if key != "reasoning_content"}
    past = [*messages[:n], {**kept, "content": _STANDIN}]
    _, found, end = rendered(past).rpartition(_STANDIN)
    after = rendered([*past, *messages[n + 1 : following]], prompt=following is not None)
    _, found_later, follows = after.rpartition(_STANDIN)
    if not (found and found_later and now.endswith(end)):
        if not _holds(now, messages[n]):
            raise DataError(_lost(n, messages[n], where))
        raise DataError(
            f"{where}.messages[{n}]: the chat template does not show where this turn ends; give "
            "the tokenizer a template with {% generation %}"
        )
    said = now[len(before) : len(now) - len(end)]
    opening = before[_common(before, now) :]
    content = str(messages[n]["content"])
    if opening:  # the prompt holds the beginning, which the template leaves out afterwards
        if not (opening.startswith("<") and content.startswith(opening)):
            raise DataError(
                f"{where}.messages[{n}]: the chat template has the assistant go on from "
                f"{before[-_SHOWN:]!r}, and renders this turn as "
                f"{now[max(len(before) - _SHOWN, 0) :][: 2 * _SHOWN]!r}; begin its content so, "
                "give the tokenizer template_options such as {'enable_thinking': False}, or a "
                "template with {% generation %}"
            )
        said = content[len(opening) :]
    if not _holds(opening + said, messages[n]):
        raise DataError(_lost(n, messages[n], where))
    return Turn(said, follows, _common(end, follows))


def _common(one: str, other: str) -> int:
    """How far two texts are the same, in whole tokens of the form <…>."""
    length = 0
    for a, b in zip(_TOKEN.split(one), _TOKEN.split(other), strict=False):
        if a == b:
            length += len(a)
            continue
        if not (a.startswith("<") or b.startswith("<")):
            length += sum(
                1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))
            )
        break
    return length


def _check_there(messages: Sequence[Message], which: range, text: str, where: str) -> None:
    for number in which:
        if not _holds(text, messages[number]):
            raise DataError(_lost(number, messages[number], where))


def _holds(text: str, message: Message) -> bool:
    """Whether a message is in a text; of its reasoning the spaces around it may be others."""
    parts = _REASONING.split(str(message["content"]))
    return all(part.strip() in text for part in parts)


def _lost(number: int, message: Message, where: str) -> str:
    return (
        f"{where}.messages[{number}].content: the chat template leaves it out, or changes it "
        f"({message['role']}); take it out, or give the tokenizer a template that has it"
    )
