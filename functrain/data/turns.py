"""Dialogues turn by turn, for chat templates that render the past otherwise than the present.

Templates of reasoning models drop the reasoning from earlier turns; others end the last turn by
another token than the turns before it. A row of a whole dialogue would then hold what no model is
ever asked to say. Here each learnt turn stands as the template renders it when it is the last one,
which is what the model is to say there; all else is as the template renders it before that turn.
Where several turns are learnt, later ones follow the learnt form of earlier ones, not the form that
the template gives the past: one row cannot hold both, and training templates choose the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

from functrain.data.dialogues import Dialogue, Message
from functrain.errors import DataError

_STANDIN = "Qz7kPhnW3xvJ"  # replaces content, to see what the template puts after it
_SHOWN = 24
_TOKEN = re.compile(r"(<[^<>]*>)")
_THOUGHT = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)
REASONING = ("reasoning_content", "reasoning", "thinking")
"""The keys under which a message may have its reasoning."""

Render = Callable[..., str]
"""`render(messages, prompt=…)`: their text; with `prompt`, up to the assistant's next turn."""


class Turn(NamedTuple):
    """What the assistant says, and what follows it, of which the first `ends` characters end it."""

    said: str
    follows: str
    ends: int


def turn_by_turn(given: Dialogue, rendered: Render) -> tuple[str, list[tuple[int, int]]]:
    """The text of a dialogue, and the spans of it that are learnt.

    Where the template ends a turn differently once another follows, its end is learnt for the last
    turn only. Where it ends turns by no token, the token that opens what follows (or would follow:
    the user's next turn, or the tool's after a call) is taken as the end. Raises `DataError` naming
    the message whose place in the rendered text cannot be found exactly.
    """
    messages = given.messages
    learnt = [n for n, each in enumerate(given.learnt) if each]
    text = rendered(messages[: learnt[0]], prompt=True)
    ended = has_end(rendered, messages[: learnt[0] + 1])
    _check_there(given, range(learnt[0]), text)
    spans = []
    for n, following in zip(learnt, [*learnt[1:], None], strict=True):
        turn = _turn(given, n, following, rendered, ended=ended)
        _check_there(given, range(n + 1, following or len(messages)), turn.follows)
        begin, text = len(text), text + turn.said + turn.follows
        whole = turn.said + turn.follows[: turn.ends]
        spans.append((begin, begin + len(whole.rstrip())))
    return text, spans


def _turn(given: Dialogue, n: int, following: int | None, rendered: Render, *, ended: bool) -> Turn:
    """One learnt turn; `ended`: whether the template ends turns by a token."""
    messages, place = given.messages, given.places[n]
    before, now = rendered(messages[:n], prompt=True), rendered(messages[: n + 1])
    kept = {key: value for key, value in messages[n].items() if key not in REASONING}
    past = [*messages[:n], {**kept, "content": _STANDIN}]
    end, found = _after(rendered(past))
    follows, found_later = _after(
        rendered([*past, *messages[n + 1 : following]], prompt=following is not None)
    )
    # In a turn that is only a call, what the template puts between content and call may be the end
    # of the prompt, and is there already.
    overlap = max(0, len(before) + len(end) - len(now)) if now.startswith(before) else 0
    shown = found and found_later and now.endswith(end) and follows.startswith(end[:overlap])
    if not shown:
        if not holds(now, messages[n]):
            raise DataError(_lost(place, messages[n]))
        raise DataError(
            f"{place}: the chat template does not show where this turn ends; give "
            "the tokenizer a template with {% generation %}"
        )
    end, follows = end[overlap:], follows[overlap:]
    said = now[len(before) : len(now) - len(end)]
    opening = before[_common(before, now) :]
    content = str(messages[n]["content"])
    if opening:  # the prompt holds the beginning, which the template leaves out afterwards
        if not (opening.startswith("<") and content.startswith(opening)):
            raise DataError(_otherwise(place, before, now))
        said = content[len(opening) :]
    if not holds(opening + said, messages[n]):
        raise DataError(_lost(place, messages[n]))
    ends = _common(end, follows)
    if ended:
        return Turn(said, follows, ends)
    if not follows[ends:].strip():
        follows += _opened(rendered, past)
    return Turn(said, follows, ends + _opening(follows[ends:]))


def _after(text: str) -> tuple[str, bool]:
    """What follows the stand-in, and whether that was found."""
    _, found, rest = text.rpartition(_STANDIN)
    return rest, bool(found)


def _opening(text: str) -> int:
    """The length of the token that a text opens with; 0 if there is none."""
    first = _TOKEN.match(text.lstrip())
    return 0 if first is None else len(text) - len(text.lstrip()) + first.end()


def _opened(rendered: Render, past: Sequence[Message]) -> str:
    """The token that would open the user's next turn, or that of the tool that was called."""
    end, _ = _after(rendered(past))
    role = "tool" if past[-1].get("tool_calls") else "user"
    try:
        more, _ = _after(rendered([*past, {"role": role, "content": "x"}]))
    except DataError:  # a template that has no place for it
        return ""
    more = more.removeprefix(end)
    return more[: _opening(more)]


def _otherwise(place: str, before: str, now: str) -> str:
    shown = now[max(len(before) - _SHOWN, 0) :][: 2 * _SHOWN]
    hint = ""
    if "<think>" in before[-_SHOWN:]:
        hint = "begin its content so, give the tokenizer {'enable_thinking': False} "
        hint += "(template_options; data.enable_thinking), or "
    return (
        f"{place}: the chat template has the assistant go on from "
        f"{before[-_SHOWN:]!r}, and renders this turn as {shown!r}; {hint}give a template with "
        "{% generation %}"
    )


def _common(one: str, other: str) -> int:
    """The length of the common beginning of two texts; tokens of the form <…> count whole."""
    length = 0
    for a, b in zip(_TOKEN.split(one), _TOKEN.split(other), strict=False):
        if a == b:
            length += len(a)
            continue
        if not (a.startswith("<") or b.startswith("<")):
            same = takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))
            length += sum(1 for _ in same)
        break
    return length


def _check_there(given: Dialogue, which: range, text: str) -> None:
    for number in which:
        if not holds(text, given.messages[number], past=True):
            raise DataError(_lost(given.places[number], given.messages[number]))


def holds(text: str, message: Message, *, past: bool = False) -> bool:
    """Whether a text holds a message's content and reasoning, whitespace around them aside.

    `past`: the reasoning of the assistant may be missing.
    """
    content = str(message["content"])
    thought = [str(message[key]) for key in REASONING if isinstance(message.get(key), str)]
    inline = _THOUGHT.fullmatch(content) if message["role"] == "assistant" else None
    if inline is not None:
        thought, content = [*thought, inline[1]], inline[2]
    parts = [content] if past and message["role"] == "assistant" else [*thought, content]
    return all(part.strip() in text for part in parts)


def _lost(place: str, message: Message) -> str:
    return (
        f"{place}: the chat template leaves out what is said there, or changes it "
        f"({message['role']}); take it out, or give the tokenizer a template that has it"
    )


def check_said(given: Dialogue, rendered: Render) -> None:
    """Raise `DataError` for tool calls and reasoning that the template drops.

    They stand beside a message's content, so dropping them would change only what is learnt, and
    nothing else would show it.
    """
    keys = ("tool_calls", *REASONING)
    shown = {key: _shown(given.messages, key, rendered) for key in keys}
    for n, each in enumerate(given.messages):
        for key in keys:
            if not each.get(key) or n in shown[key]:
                continue
            less = {name: value for name, value in each.items() if name != key}
            upto = [*given.messages[:n], each]
            try:
                without = rendered([*given.messages[:n], less])
            except DataError:  # then it is read
                continue
            if rendered(upto) == without:
                raise DataError(
                    f"{given.places[n]}.{key}: the chat template has no place for it; put it "
                    "into content, take it out, or give the tokenizer a template that has it"
                )


def _shown(messages: Sequence[Message], key: str, rendered: Render) -> set[int]:
    """The messages whose value under `key` shows in the text of the whole dialogue.

    One rendering, with a mark for each message, tells all of them: one by one, a dialogue of a
    hundred calls spent most of its time here. A value that does not show may still do so when its
    message is the last one, as reasoning does.
    """
    marks = {n: f"x{n}{_STANDIN}" for n, each in enumerate(messages) if each.get(key)}
    if not marks:
        return set()
    try:
        text = rendered(
            [_marked(m, key, marks[n]) if n in marks else m for n, m in enumerate(messages)]
        )
    except DataError:  # a template that does not take the mark
        return set()
    return {n for n, mark in marks.items() if mark in text}


def _marked(message: Message, key: str, mark: str) -> Message:
    """A message with a mark in its reasoning, or in the arguments of its calls."""
    if key != "tool_calls":
        return {**message, key: mark} if isinstance(message[key], str) else message
    return {**message, key: [_marked_call(call, mark) for call in message[key]]}


def _marked_call(call: Mapping[str, Any], mark: str) -> Mapping[str, Any]:
    """Arguments are told from all else: a tool's answer may name the tool, as the call does."""
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _marked_call(call["function"], mark)}
    arguments = call.get("arguments")
    if isinstance(arguments, Mapping):
        return {**call, "arguments": {**arguments, mark: 1}}
    return {**call, "arguments": f'{{"{mark}": 1}}'} if isinstance(arguments, str) else call


def has_end(rendered: Render, messages: Sequence[Message]) -> bool:
    """Whether the last of these, an assistant's, ends by something where it calls no tool."""
    *before, last = messages
    kept = {key: value for key, value in last.items() if key != "tool_calls"}
    end, _ = _after(rendered([*before, {**kept, "content": _STANDIN}]))
    return bool(end.strip())
