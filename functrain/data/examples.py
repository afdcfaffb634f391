"""Records as token ids: a prompt, and the completions to learn."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, TypeVar

import attrs
import numpy as np

from functrain.data import columns, dialogues
from functrain.data.dialogues import Dialogue
from functrain.data.records import Records, check_on_bad_record
from functrain.data.templates import Templated, has_template, laid_out
from functrain.data.text import IGNORE_INDEX, ended
from functrain.data.tokenizers import Tokenizer, ids_of
from functrain.data.turns import REASONING
from functrain.errors import DataError, did_you_mean, in_its_place

Record = Mapping[str, Any]
TokenIds = tuple[int, ...]
Example = tuple[TokenIds, TokenIds]
"""Token ids, and labels aligned with them."""

Read = TypeVar("Read")

ROLES = ("system", "user", "assistant")
"""The roles in the plain format, lines of `role: content`."""
SIDES = ("chosen", "rejected")
_MEANT = ("role", "content", "name", "tool_calls", "tool_call_id", *REASONING)


@attrs.frozen
class Prompted:
    """A prompt, and one completion, or the chosen and the rejected one."""

    prompt: TokenIds
    completions: tuple[Example, ...]


def check_given(records: object) -> None:
    """Raise `DataError` unless `records` can be a sequence of records."""
    if isinstance(records, Mapping):
        raise DataError("records: one object, expected a list of them: [record]")
    if isinstance(records, str) or not isinstance(records, Iterable):
        raise DataError(f"records: expected a list of objects, got {type(records).__name__}")


def read_each(
    records: Iterable[Record], read: Callable[[Record, str], Read], on_bad_record: str
) -> tuple[list[tuple[str, Read]], tuple[str, ...]]:
    """The result of `read` for each record, with its place; and the errors of malformed ones.

    Records of files are named by file and line (`functrain.data.records.Records`); rows of a
    `datasets.Dataset` are converted by `functrain.data.columns.record`. With "stop" the first
    malformed record raises its `DataError`.
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
    """Read a dialogue in one of `functrain.data.dialogues.SHAPES`, or a prompt with a completion.

    Everything before the first learnt message is the prompt. `where` names the record in errors,
    here and in all of these functions.
    """
    if not isinstance(record, Mapping):
        return read_completions(record, ("completion",), tokenizer, where)
    if "completion" in record and isinstance(record.get("label"), bool):
        raise DataError(
            f"{where}.label: {record['label']}, as of a completion that is desirable or not, and "
            "here each is learnt; train on these with the kto loss, or leave label out"
        )
    record = dialogues.present(record)
    if "messages" in record and not has_template(tokenizer):
        for other in ("prompt", "completion"):
            if other in record:
                raise DataError(f"{where}: messages and {other}; give one form or the other")
    dialogue = {"messages", "conversations"} & record.keys()
    if dialogue or {"instruction", "output"} <= record.keys():
        return _read_dialogue(record, tokenizer, where)
    if not {"prompt", "completion"} & record.keys():
        dialogues.shape_of(record, where)
    return read_completions(record, ("completion",), tokenizer, where)


def _read_dialogue(record: Record, tokenizer: Tokenizer, where: str) -> Prompted:
    """A dialogue in the tokenizer's chat template, or as lines of `role: content` without one."""
    given = dialogues.dialogue(record, where)
    if isinstance(tokenizer, Templated) and has_template(tokenizer):
        ids, labels = laid_out(given, tokenizer, where, where)
        first = next(n for n, label in enumerate(labels) if label != IGNORE_INDEX)
        return Prompted(ids[:first], ((ids[first:], labels[first:]),))
    _check_plain(given, where)
    first = given.learnt.index(True)
    return Prompted(_lines(given, tokenizer, 0, first)[0], (_lines(given, tokenizer, first),))


def _check_plain(given: Dialogue, where: str) -> None:
    """Raise `DataError` for what the plain format, lines of `role: content`, cannot express."""
    for each, at in zip(given.messages, given.places, strict=True):
        if given.tools or each["role"] == "tool" or each.get("tool_calls"):
            raise DataError(
                f"{where}: tools, and the tokenizer has no chat template, which would say how they "
                "look"
            )
        if each["role"] not in ROLES:
            near = did_you_mean(each["role"], ROLES)
            raise DataError(f"{at}.role: {each['role']!r} is unknown without a template; {near}")
        for thought in REASONING:
            if each.get(thought):
                raise DataError(
                    f"{at}.{thought}: the tokenizer has no chat template, which would say how it "
                    "looks; put it into content, or take it out"
                )


def _parted(wholes: Mapping[str, Dialogue], end: int, tokenizer: Tokenizer, where: str) -> Prompted:
    """Dialogues whose first `end` messages are the prompt, the same for each."""
    learnt = {
        side: attrs.evolve(whole, learnt=(*[False] * end, *whole.learnt[end:]))
        for side, whole in wholes.items()
    }
    for side, whole in learnt.items():
        dialogues.check_learnt(whole, f"{where}.{side}")
    if isinstance(tokenizer, Templated) and has_template(tokenizer):
        return _templated(learnt, tokenizer, where)
    prompt, _ = _lines(next(iter(wholes.values())), tokenizer, 0, end)
    return Prompted(prompt, tuple(_lines(whole, tokenizer, end) for whole in learnt.values()))


def _templated(wholes: Mapping[str, Dialogue], tokenizer: Templated, where: str) -> Prompted:
    """Dialogues in the tokenizer's chat template; the prompt is all before what is learnt."""
    found = [laid_out(whole, tokenizer, f"{where}.{side}", where) for side, whole in wholes.items()]
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
    """Read a record's prompt, and each of `sides` after it: all texts, or all messages."""
    _check_keys(record, ("prompt", *sides), where)
    texts, said = _contents(record, ("prompt", *sides), tokenizer, where)
    if texts:
        asked = tuple(ids_of(texts["prompt"], tokenizer, f"{where}.prompt"))
        return Prompted(asked, tuple(_of_text(texts[s], tokenizer, f"{where}.{s}") for s in sides))
    prompt = said["prompt"]
    end, meant = len(prompt.messages), _meant(prompt)
    for side in sides:
        if prompt.messages and _meant(said[side])[:end] == meant:
            raise DataError(
                f"{where}.{side}: begins with the prompt's messages again; give only what follows "
                "the prompt"
            )
    wholes = {
        side: attrs.evolve(
            prompt,
            messages=(*prompt.messages, *said[side].messages),
            learnt=(*prompt.learnt, *said[side].learnt),
            places=(*prompt.places, *said[side].places),
        )
        for side in sides
    }
    return _parted(wholes, end, tokenizer, where)


def read_pair(record: Record, tokenizer: Tokenizer, where: str) -> Prompted:
    """Read `{"prompt", "chosen", "rejected"}`; without "prompt", it is the common beginning.

    An implicit prompt is the longest that leaves something of both sides. Of messages it is whole
    ones, with an assistant's message after them. Of texts it is one whose own tokens begin the
    tokens of both: what a model will be asked with, with no character split.
    """
    _check_keys(record, SIDES, where)
    if "prompt" in record:
        return read_completions(record, SIDES, tokenizer, where)
    near = difflib.get_close_matches("prompt", map(str, record), n=1, cutoff=0.82)
    if near:
        raise DataError(f"{where}: no 'prompt'; did you mean {near[0]!r}?")
    return _read_implicit(record, tokenizer, where)


def read_unpaired(record: Record, tokenizer: Tokenizer, where: str) -> tuple[Prompted, bool]:
    """Read `{"prompt", "completion", "label"}`: the example, and whether it is desirable."""
    _check_keys(record, ("prompt", "completion", "label"), where)
    label = record["label"]
    if not isinstance(label, (bool, np.bool_)):
        raise DataError(
            f"{where}.label: expected true (desirable) or false, got {type(label).__name__}"
            f"{_truth(label)}"
        )
    return read_completions(record, ("completion",), tokenizer, where), bool(label)


def _truth(label: object) -> str:
    """A hint at how to make a label a bool; `bool(...)` would be wrong for "false" and for -1."""
    if isinstance(label, str):
        return "; give label == 'true', say"
    return "; give label > 0, say" if isinstance(label, Real) else ""


def _read_implicit(record: Record, tokenizer: Tokenizer, where: str) -> Prompted:
    texts, said = _contents(record, SIDES, tokenizer, where)
    if said:
        chosen, rejected = (said[side] for side in SIDES)
        for side in SIDES:
            dialogues.check_learnt(said[side], f"{where}.{side}")
        alike = _common(_meant(chosen), _meant(rejected))
        if alike == len(chosen.messages) == len(rejected.messages):
            return _parted(said, 0, tokenizer, where)
        end = _prompted(alike, chosen, rejected)
        if not end:
            raise _no_prompt(where)
        return _parted(said, end, tokenizer, where)
    wholes = tuple(_of_text(texts[side], tokenizer, f"{where}.{side}") for side in SIDES)
    if texts["chosen"] == texts["rejected"]:
        return Prompted((), wholes)
    prompt = _shared_text(texts, [ids for ids, _ in wholes], tokenizer, where)
    if not prompt:
        raise _no_prompt(where)
    begin = len(prompt)
    return Prompted(prompt, tuple((ids[begin:], labels[begin:]) for ids, labels in wholes))


def _no_prompt(where: str) -> DataError:
    return DataError(
        f"{where}: no 'prompt', and chosen and rejected share no beginning that could be it and "
        "leaves a completion of both; give 'prompt' (empty for none)"
    )


def _contents(
    record: Record, names: Sequence[str], tokenizer: Tokenizer, where: str
) -> tuple[dict[str, str], dict[str, Dialogue]]:
    """The values under `names`: texts, or dialogues with the record's tools; the other is empty.

    Tools beside texts are ignored, as other keys are: a text contains what it says of them.
    """
    given = {name: _content(record[name], f"{where}.{name}") for name in names}
    texts = {name: value for name, value in given.items() if isinstance(value, str)}
    said = {name: value for name, value in given.items() if isinstance(value, Dialogue)}
    if texts and said:
        listed = ", ".join(f"{n} is {'text' if n in texts else 'messages'}" for n in names)
        hint = "; or leave 'prompt' out where both begin with it" if set(SIDES) < set(names) else ""
        raise DataError(f"{where}: {listed}; expected texts, or lists of messages, alone{hint}")
    if said:
        tools = dialogues.tools(record.get("tools"), f"{where}.tools")
        said = {name: attrs.evolve(each, tools=tools) for name, each in said.items()}
    if said and not has_template(tokenizer):
        for each in said.values():
            _check_plain(each, where)
    return texts, said


def _content(value: object, where: str) -> str | Dialogue:
    if isinstance(value, str):
        return value
    if not isinstance(value, Sequence) or isinstance(value, bytes):
        raise DataError(f"{where}: expected text or messages, got {type(value).__name__}")
    return dialogues.said(value, where)


def _of_text(text: str, tokenizer: Tokenizer, where: str) -> Example:
    if not text:
        raise DataError(f"{where}: empty; a completion needs text to learn from")
    ids = tuple(ended(text, tokenizer, where))
    return ids, ids


def _lines(given: Dialogue, tokenizer: Tokenizer, begin: int, end: int | None = None) -> Example:
    """Messages `begin` to `end` as lines of `role: content`, with labels for what is learnt."""
    ids: list[int] = []
    labels: list[int] = []
    some = slice(begin, end)
    parts = zip(given.messages[some], given.learnt[some], given.places[some], strict=True)
    for message, learnt, where in parts:
        role, content = str(message["role"]), str(message["content"])
        head, tail = ids_of(f"{role}: ", tokenizer, where), ids_of("\n", tokenizer, where)
        read = ended if role == "assistant" else ids_of
        said = read(content, tokenizer, where)
        ids += [*head, *said, *tail]
        spoken = said if learnt else [IGNORE_INDEX] * len(said)
        labels += [*([IGNORE_INDEX] * len(head)), *spoken, *([IGNORE_INDEX] * len(tail))]
    return tuple(ids), tuple(labels)


def _shared_text(
    texts: Mapping[str, str], wholes: Sequence[TokenIds], tokenizer: Tokenizer, where: str
) -> TokenIds:
    """The tokens of an implicit prompt; `wholes`: the tokens of both texts, with their ends."""
    for length in range(_common(texts["chosen"], texts["rejected"]), 0, -1):
        ids = tuple(ids_of(texts["chosen"][:length], tokenizer, where))
        if all(whole[: len(ids)] == ids and len(whole) - 1 > len(ids) for whole in wholes):
            return ids
    return ()


def _prompted(alike: int, chosen: Dialogue, rejected: Dialogue) -> int:
    """How many of the `alike` first messages can be the prompt and leave something to learn."""
    while alike and not (any(chosen.learnt[alike:]) and any(rejected.learnt[alike:])):
        alike -= 1
    return alike


def _meant(given: Dialogue) -> list[list[Any]]:
    """What messages mean: two that differ only in an id or a date, say, are the same."""
    return [[each.get(key) for key in _MEANT] for each in given.messages]


def _common(one: Sequence[object], other: Sequence[object]) -> int:
    """The length of the common beginning."""
    differ = (n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differ, min(len(one), len(other)))


def _check_keys(record: object, keys: Sequence[str], where: str) -> None:
    if not isinstance(record, Mapping):
        raise DataError(f"{where}: expected an object, got {type(record).__name__}")
    for key in keys:
        if key not in record:
            raise DataError(f"{where}: no {key!r}; {in_its_place(key, record, keys)}")
