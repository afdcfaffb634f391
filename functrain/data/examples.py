"""Records as token ids: a prompt, and the completions to learn after it."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import attrs

from functrain.data import columns, dialogues
from functrain.data.dialogues import Dialogue
from functrain.data.records import Records, check_on_bad_record
from functrain.data.templates import Templated, has_template, laid_out
from functrain.data.text import IGNORE_INDEX
from functrain.data.tokenizers import Tokenizer
from functrain.errors import DataError, did_you_mean

Record = Mapping[str, Any]
TokenIds = tuple[int, ...]
Example = tuple[TokenIds, TokenIds]
"""Token ids, and labels aligned with them."""
Message = tuple[str, str]
"""Role and content."""

Read = TypeVar("Read")

ROLES = ("system", "user", "assistant")
SIDES = ("chosen", "rejected")


@attrs.frozen
class Prompted:
    """A prompt, and what follows it: one completion, or the chosen and the rejected one."""

    prompt: TokenIds
    completions: tuple[Example, ...]


def check_given(records: object) -> None:
    """Raise `DataError` unless these may be records."""
    if isinstance(records, Mapping):
        raise DataError("records: one object, expected a list of them: [record]")
    if isinstance(records, str) or not isinstance(records, Iterable):
        raise DataError(f"records: expected a list of objects, got {type(records).__name__}")


def read_each(
    records: Iterable[Record], read: Callable[[Record, str], Read], on_bad_record: str
) -> tuple[list[tuple[str, Read]], tuple[str, ...]]:
    """What `read` makes of each record, with where it was; and what was wrong with the others.

    Those of files are known by their lines, `functrain.data.records.Records`; rows of a
    `datasets.Dataset` are read as `functrain.data.columns.record` has them. With "stop" the first
    malformed one raises its `DataError`.
    """
    check_on_bad_record(on_bad_record)
    file = records if isinstance(records, Records) else None
    found: list[tuple[str, Read]] = []
    malformed = [] if file is None else list(file.malformed)
    tabular = columns.are_columns(records)
    for number, record in enumerate(records):
        where = f"record {number}" if file is None else file.where(number)
        try:
            found.append((where, read(columns.record(record) if tabular else record, where)))
        except DataError as error:
            if on_bad_record == "stop":
                raise
            malformed.append(str(error))
    if malformed and not found:
        raise DataError(f"records: all {len(malformed)} are malformed; the first: {malformed[0]}")
    return found, tuple(malformed)


def read_chat(record: Record, tokenizer: Tokenizer, where: str) -> Prompted:
    """A dialogue of one of `functrain.data.dialogues.SHAPES`, or a prompt with its completion.

    What comes before the first message that is learnt is the prompt. `where` names the record in
    errors, as in all of these functions.
    """
    if not isinstance(record, Mapping):
        return read_completions(record, ("completion",), tokenizer, where)
    others = "conversations" in record or {"instruction", "output"} <= record.keys()
    if others or ("messages" in record and has_template(tokenizer)):
        return _read_dialogue(dialogues.dialogue(record, where), tokenizer, where)
    if "messages" not in record:
        return read_completions(record, ("completion",), tokenizer, where)
    for other in ("prompt", "completion"):
        if other in record:
            raise DataError(f"{where}: messages and {other}; give one form or the other")
    _refuse_tools(record, where)
    messages = _content(record["messages"], f"{where}.messages")
    if isinstance(messages, str) or not messages:
        raise DataError(f"{where}.messages: expected a list of messages with role and content")
    if not _speaks(messages):
        raise DataError(f"{where}.messages: no assistant speaks, so there is nothing to learn")
    return _read_dialogue(dialogues.dialogue(record, where), tokenizer, where)


def _read_dialogue(given: Dialogue, tokenizer: Tokenizer, where: str) -> Prompted:
    """A dialogue in the tokenizer's template; as lines where it has none."""
    if isinstance(tokenizer, Templated) and has_template(tokenizer):
        ids, labels = laid_out(given, tokenizer, where)
        first = next(n for n, label in enumerate(labels) if label != IGNORE_INDEX)
        return Prompted(ids[:first], ((ids[first:], labels[first:]),))
    first = given.learnt.index(True)
    said = [(str(m["role"]), str(m["content"])) for m in given.messages]
    prompt, _ = _laid_out(said[:first], tokenizer)
    return Prompted(prompt, (_laid_out(said[first:], tokenizer, given.learnt[first:]),))


def _refuse_tools(record: Record, where: str) -> None:
    given = record["messages"]
    messages = given if isinstance(given, Sequence) and not isinstance(given, str) else ()
    named = [m for m in messages if isinstance(m, Mapping)]
    if record.get("tools") or any(m.get("role") == "tool" or m.get("tool_calls") for m in named):
        raise DataError(
            f"{where}: tools, and the tokenizer has no chat template, which would say how they look"
        )


def _templated(
    record: Record,
    prompt: Sequence[Any],
    sides: Mapping[str, Sequence[Any]],
    tokenizer: Templated,
    where: str,
) -> Prompted:
    """A prompt of messages with completions of messages, in the tokenizer's template."""
    asked = [dialogues.message(m, f"{where}.prompt[{n}]") for n, m in enumerate(prompt)]
    tools = dialogues.tools(record.get("tools"), f"{where}.tools")
    found: list[Example] = []
    for side, given in sides.items():
        said = [dialogues.message(m, f"{where}.{side}[{n}]") for n, m in enumerate(given)]
        if not any(m["role"] == "assistant" for m in said):
            raise DataError(f"{where}.{side}: no assistant speaks, so there is nothing to learn")
        learnt = [False] * len(asked) + [m["role"] == "assistant" for m in said]
        whole = Dialogue((*asked, *said), tuple(learnt), tools)
        found.append(laid_out(whole, tokenizer, f"{where}.{side}"))
    firsts = [next(n for n, i in enumerate(labels) if i != IGNORE_INDEX) for _, labels in found]
    begin = min(firsts)
    if any(ids[:begin] != found[0][0][:begin] for ids, _ in found):
        raise DataError(f"{where}: the chat template renders the prompt otherwise on each side")
    return Prompted(
        found[0][0][:begin], tuple((ids[begin:], labels[begin:]) for ids, labels in found)
    )


def read_completions(
    record: Record, sides: Sequence[str], tokenizer: Tokenizer, where: str
) -> Prompted:
    """A record's prompt with each of `sides` after it: all of them texts, or all messages."""
    _check_keys(record, ("prompt", *sides), where)
    given = _contents(record, ("prompt", *sides), where)
    prompt = given["prompt"]
    for side in sides:
        if isinstance(prompt, list) and prompt and given[side][: len(prompt)] == prompt:
            raise DataError(
                f"{where}.{side}: begins with the prompt's messages again; give only what follows "
                "the prompt"
            )
    if isinstance(prompt, str):
        asked = tuple(tokenizer.encode(prompt))
    elif isinstance(tokenizer, Templated) and has_template(tokenizer):
        rest = {side: record[side] for side in sides}
        return _templated(record, record["prompt"], rest, tokenizer, where)
    else:
        asked, _ = _laid_out(prompt, tokenizer)
    completions = (_completion(given[side], tokenizer, f"{where}.{side}") for side in sides)
    return Prompted(asked, tuple(completions))


def read_pair(record: Record, tokenizer: Tokenizer, where: str) -> Prompted:
    """`{"prompt", "chosen", "rejected"}`; without "prompt", what both begin with is the prompt.

    An implicit prompt is the longest one that leaves something of both: of messages, whole ones
    with an assistant's after them; of texts, one whose tokens, when it is tokenised alone, begin
    the tokens of both, so that it is what a model will be asked with, and no character is split.
    """
    _check_keys(record, SIDES, where)
    if "prompt" in record:
        return read_completions(record, SIDES, tokenizer, where)
    near = difflib.get_close_matches("prompt", map(str, record), n=1, cutoff=0.82)
    if near:
        raise DataError(f"{where}: no 'prompt'; did you mean {near[0]!r}?")
    return _read_implicit(record, tokenizer, where)


def read_unpaired(record: Record, tokenizer: Tokenizer, where: str) -> tuple[Prompted, bool]:
    """`{"prompt", "completion", "label"}`, and whether the completion is desirable."""
    _check_keys(record, ("prompt", "completion", "label"), where)
    label = record["label"]
    if not isinstance(label, bool):
        raise DataError(
            f"{where}.label: expected true (desirable) or false, got {type(label).__name__}; give "
            "bool(label)"
        )
    return read_completions(record, ("completion",), tokenizer, where), label


def _read_implicit(record: Record, tokenizer: Tokenizer, where: str) -> Prompted:
    given = _contents(record, SIDES, where)
    chosen, rejected = (given[side] for side in SIDES)
    if isinstance(chosen, list) and isinstance(tokenizer, Templated) and has_template(tokenizer):
        assert isinstance(rejected, list)  # `_contents` refuses a text beside messages
        end = 0 if chosen == rejected else len(_shared_messages(chosen, rejected))
        if not end and chosen != rejected:
            raise _no_prompt(where)
        rest = {side: record[side][end:] for side in SIDES}
        return _templated(record, record["chosen"][:end], rest, tokenizer, where)
    wholes = tuple(_completion(given[side], tokenizer, f"{where}.{side}") for side in SIDES)
    if chosen == rejected:
        return Prompted((), wholes)
    if isinstance(chosen, str) and isinstance(rejected, str):
        prompt = _shared_text(chosen, rejected, [ids for ids, _ in wholes], tokenizer)
    else:
        assert isinstance(chosen, list)
        assert isinstance(rejected, list)  # `_contents` refuses a text beside messages
        prompt, _ = _laid_out(_shared_messages(chosen, rejected), tokenizer)
    if not prompt:
        raise _no_prompt(where)
    begin = len(prompt)
    return Prompted(prompt, tuple((ids[begin:], labels[begin:]) for ids, labels in wholes))


def _no_prompt(where: str) -> DataError:
    return DataError(
        f"{where}: no 'prompt', and chosen and rejected share no beginning that could be it and "
        "leaves a completion of both; give 'prompt' (empty for none)"
    )


def _contents(record: Record, names: Sequence[str], where: str) -> dict[str, str | list[Message]]:
    given = {name: _content(record[name], f"{where}.{name}") for name in names}
    forms = {
        name: "text" if isinstance(value, str) else "messages" for name, value in given.items()
    }
    if len(set(forms.values())) > 1:
        listed = ", ".join(f"{name} is {form}" for name, form in forms.items())
        hint = "; or leave 'prompt' out where both begin with it" if set(SIDES) < set(names) else ""
        raise DataError(f"{where}: {listed}; expected texts, or lists of messages, alone{hint}")
    return given


def _content(value: object, where: str) -> str | list[Message]:
    if isinstance(value, str):
        return value
    if not isinstance(value, Sequence) or isinstance(value, bytes):
        raise DataError(f"{where}: expected text or messages, got {type(value).__name__}")
    return [_message(message, f"{where}[{number}]") for number, message in enumerate(value)]


def _message(message: object, where: str) -> Message:
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


def _completion(content: str | list[Message], tokenizer: Tokenizer, where: str) -> Example:
    if isinstance(content, str):
        if not content:
            raise DataError(f"{where}: empty; a completion needs text to learn from")
        ids = (*tokenizer.encode(content), tokenizer.end)
        return ids, ids
    if not _speaks(content):
        raise DataError(f"{where}: no assistant speaks, so there is nothing to learn")
    return _laid_out(content, tokenizer)


def _speaks(messages: Sequence[Message]) -> bool:
    return any(role == "assistant" for role, _ in messages)


def _laid_out(
    messages: Sequence[Message], tokenizer: Tokenizer, learnt: Sequence[bool] | None = None
) -> Example:
    """Lines `role: content`; the labels are what the assistant says, or what is `learnt` of it."""
    ids: list[int] = []
    labels: list[int] = []
    for number, (role, content) in enumerate(messages):
        head, said = tokenizer.encode(f"{role}: "), tokenizer.encode(content)
        if role == "assistant":
            said = [*said, tokenizer.end]
        tail = tokenizer.encode("\n")
        ids += [*head, *said, *tail]
        counts = role == "assistant" if learnt is None else learnt[number]
        spoken = said if counts else [IGNORE_INDEX] * len(said)
        labels += [*([IGNORE_INDEX] * len(head)), *spoken, *([IGNORE_INDEX] * len(tail))]
    return tuple(ids), tuple(labels)


def _shared_text(
    chosen: str, rejected: str, wholes: Sequence[TokenIds], tokenizer: Tokenizer
) -> TokenIds:
    """`wholes`: the tokens of the two, with their ends."""
    for length in range(_common(chosen, rejected), 0, -1):
        ids = tuple(tokenizer.encode(chosen[:length]))
        if all(whole[: len(ids)] == ids and len(whole) - 1 > len(ids) for whole in wholes):
            return ids
    return ()


def _shared_messages(chosen: list[Message], rejected: list[Message]) -> list[Message]:
    end = _common(chosen, rejected)
    while not (_speaks(chosen[end:]) and _speaks(rejected[end:])):
        end -= 1
    return chosen[:end]


def _common(one: Sequence[object], other: Sequence[object]) -> int:
    """How many of the first elements are the same in both."""
    differ = (n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differ, min(len(one), len(other)))


def _check_keys(record: object, keys: Sequence[str], where: str) -> None:
    if not isinstance(record, Mapping):
        raise DataError(f"{where}: expected an object, got {type(record).__name__}")
    for key in keys:
        if key not in record:
            near = did_you_mean(key, map(str, record)) if record else "it is empty"
            raise DataError(f"{where}: no {key!r}; {near}")


def _text(record: Record, key: str, where: str) -> str:
    value = record[key]
    if not isinstance(value, str):
        raise DataError(f"{where}.{key}: expected text, got {type(value).__name__}")
    return value
