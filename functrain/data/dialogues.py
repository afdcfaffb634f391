"""Records as dialogues: the formats that are common on disk, recognised and made into one."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import orjson

from functrain.errors import DataError, did_you_mean, in_its_place

Message = Mapping[str, Any]
SHAPES: Mapping[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "ShareGPT": ("conversations",),
    "Alpaca": ("instruction", "output"),
    "prompt-completion": ("prompt", "completion"),
}
"""The formats, each with the keys by which it is recognised."""
ROLES = ("system", "developer", "user", "assistant", "tool")
_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "function_response": "tool",
    "observation": "tool",
}


@attrs.frozen
class Dialogue:
    """Messages as a chat template takes them, the tools that may be called, and what is learnt.

    `learnt`: for each message, whether its tokens are targets; only the assistant's can be.
    `places`: for each message, its place in its record, for error messages.
    """

    messages: tuple[Message, ...]
    learnt: tuple[bool, ...]
    places: tuple[str, ...]
    tools: tuple[Mapping[str, Any], ...] = ()


def present(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """A record without those fields of other formats that are null, where it has one of its own.

    JSON that was written from columns has a field for whatever any record has.
    """
    known = (key for keys in SHAPES.values() for key in keys)
    absent = {key for key in known if key in record and record[key] is None}
    found = record.keys() - absent
    if not absent or not any(found.issuperset(keys) for keys in SHAPES.values()):
        return record
    return {key: value for key, value in record.items() if key in found}


def shapes_in(record: Mapping[str, Any]) -> list[str]:
    """The formats whose fields a record has."""
    return [name for name, keys in SHAPES.items() if record.keys() >= set(keys)]


def shape_of(record: object, where: str) -> str:
    """The format of a record; `DataError` if it has none, or two."""
    if not isinstance(record, Mapping):
        raise DataError(f"{where}: expected an object, got {type(record).__name__}")
    record = present(record)
    found = shapes_in(record)
    if len(found) == 1:
        return found[0]
    if found:
        keys = " and ".join(SHAPES[name][0] for name in found)
        raise DataError(f"{where}: {keys}; give one form or the other")
    known = {key for keys in SHAPES.values() for key in keys}
    others = [key for key in map(str, record) if key not in known]
    near = [key for key in others if difflib.get_close_matches(key, known)]
    hint = f"{did_you_mean(near[0], known)} " if near else "" if record else "it is empty; "
    listed = "; ".join(f"{' and '.join(keys)} ({name})" for name, keys in SHAPES.items())
    raise DataError(f"{where}: of no known shape; {hint}expected {listed}")


def dialogue(record: Mapping[str, Any], where: str) -> Dialogue:
    """A record of messages, in ShareGPT's format or in Alpaca's, as a dialogue.

    A message's `weight` is 0 (not learnt) or 1. `tools` may be JSON as text. Raises `DataError`
    with the field and what was expected there.
    """
    shape = shape_of(record, where)
    called = tools(record.get("tools"), f"{where}.tools")
    if shape == "Alpaca":
        return attrs.evolve(_alpaca(record, where), tools=called)
    key = "conversations" if shape == "ShareGPT" else "messages"
    given = record[key]
    if not isinstance(given, Sequence) or isinstance(given, str | bytes) or not given:
        raise DataError(f"{where}.{key}: expected a list of messages with role and content")
    found = said(given, f"{where}.{key}", _turn if shape == "ShareGPT" else message)
    check_learnt(found, f"{where}.{key}")
    asked = _text(record, "system", where) if shape == "ShareGPT" else ""
    if asked:
        system = {"role": "system", "content": asked}
        found = Dialogue(
            (system, *found.messages), (False, *found.learnt), (f"{where}.system", *found.places)
        )
    return attrs.evolve(found, tools=called)


_KEYS = ("role", "content", "tool_calls", "weight")


def message(given: object, where: str, content_key: str = "content") -> Message:
    """A message, which must have a known role, and content or tool calls.

    `tool_calls` may be JSON as text. `content_key`: the key of the content in the record.
    """
    if not isinstance(given, Mapping):
        raise DataError(f"{where}: expected role and content, got {type(given).__name__}")
    if "role" not in given:
        raise DataError(f"{where}: no 'role'; {in_its_place('role', given, _KEYS)}")
    role = given["role"]
    if not isinstance(role, str):
        raise DataError(f"{where}.role: expected text, got {type(role).__name__}")
    if role not in ROLES:
        raise DataError(f"{where}.role: {role!r} is unknown; {did_you_mean(role, ROLES)}")
    calls = given.get("tool_calls")
    if calls is not None:
        calls = list(_objects(calls, f"{where}.tool_calls", "expected a list of objects"))
        given = {**given, "tool_calls": calls}
    content = given.get("content")
    if "content" not in given and not calls:
        raise DataError(f"{where}: no 'content'; {in_its_place('content', given, _KEYS)}")
    if not (isinstance(content, str) or (content is None and calls)):
        raise DataError(f"{where}.{content_key}: expected text, got {type(content).__name__}")
    if role == "assistant" and not content and not calls:
        raise DataError(
            f"{where}.{content_key}: empty; an assistant's turn needs text to learn from"
        )
    kept = {k: v for k, v in given.items() if k != "weight" and v is not None}
    return {**kept, "content": content or ""}


def said(
    given: Sequence[object], where: str, read: Callable[[object, str], Message] = message
) -> Dialogue:
    """Messages as a dialogue; the assistant's are learnt unless their weight is 0."""
    places = [f"{where}[{n}]" for n in range(len(given))]
    messages = [read(each, place) for each, place in zip(given, places, strict=True)]
    weights = [_weight(each, place) for each, place in zip(given, places, strict=True)]
    learnt = [m["role"] == "assistant" and w for m, w in zip(messages, weights, strict=True)]
    return Dialogue(tuple(messages), tuple(learnt), tuple(places))


def _weight(given: Any, where: str) -> bool:
    weight = given.get("weight")
    if isinstance(weight, str) or weight not in (None, 0, 1):  # None: as in a column
        raise DataError(f"{where}.weight: {weight!r}, expected 0 (not learnt) or 1")
    return bool(weight != 0)


def check_learnt(given: Dialogue, where: str) -> None:
    """Raise `DataError` if no message is learnt."""
    if any(given.learnt):
        return
    spoken = any(each["role"] == "assistant" for each in given.messages)
    why = "every assistant's message is of weight 0" if spoken else "no assistant speaks"
    raise DataError(f"{where}: {why}, so there is nothing to learn")


def _turn(given: object, where: str) -> Message:
    """A message in ShareGPT's format: `from` and `value`."""
    if not isinstance(given, Mapping) or not {"from", "value"} <= given.keys():
        raise DataError(f"{where}: expected an object with 'from' and 'value'")
    speaker = given["from"]
    if not isinstance(speaker, str) or speaker not in _SPEAKERS:
        near = did_you_mean(str(speaker), _SPEAKERS)
        raise DataError(f"{where}.from: {speaker!r} is unknown; {near}")
    return message({"role": _SPEAKERS[speaker], "content": given["value"]}, where, "value")


def _alpaca(record: Mapping[str, Any], where: str) -> Dialogue:
    """The user asks: instruction, blank line, input; the assistant answers with the output."""
    keys = ("instruction", "input", "output", "system")
    texts = {key: _text(record, key, where) for key in keys}
    for key in ("instruction", "output"):
        if not texts[key]:
            raise DataError(f"{where}.{key}: empty, expected text")
    asked = "\n\n".join(text for text in (texts["instruction"], texts["input"]) if text)
    said = [("user", asked, "instruction"), ("assistant", texts["output"], "output")]
    if texts["system"]:
        said.insert(0, ("system", texts["system"], "system"))
    messages = tuple({"role": role, "content": text} for role, text, _ in said)
    learnt = tuple(role == "assistant" for role, *_ in said)
    return Dialogue(messages, learnt, tuple(f"{where}.{key}" for *_, key in said))


def _text(record: Mapping[str, Any], key: str, where: str) -> str:
    """A text field; empty if it is missing or null, as in a table."""
    text = record.get(key)
    if text is not None and not isinstance(text, str):
        raise DataError(f"{where}.{key}: expected text, got {type(text).__name__}")
    return text or ""


def tools(given: object, where: str) -> tuple[Mapping[str, Any], ...]:
    """Descriptions of functions, or none; they may be JSON as text."""
    return _objects(given, where, "expected a list of objects that describe functions")


def _objects(given: object, where: str, expected: str) -> tuple[Mapping[str, Any], ...]:
    """A list of objects, or such a list as JSON text; empty for an empty value."""
    if isinstance(given, str) and given.strip():
        try:
            given = orjson.loads(given)
        except orjson.JSONDecodeError as error:
            raise DataError(f"{where}: text that is not JSON ({error})") from error
    if not given:
        return ()
    if not isinstance(given, Sequence) or not all(isinstance(each, Mapping) for each in given):
        raise DataError(f"{where}: {expected}")
    return tuple(given)
