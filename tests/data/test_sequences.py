"""Chats: what is a target, what is cut, and which records are refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import functrain as ft
from functrain import data

BYTES = data.ByteTokenizer()
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@given(prompt=TEXT, completion=TEXT.filter(bool), time=st.integers(4, 60))
def test_the_prompt_is_no_target_and_the_completion_with_its_end_is(
    prompt: str, completion: str, time: int
) -> None:
    whole = [*prompt.encode(), *completion.encode(), BYTES.end]
    expected = whole[len(prompt.encode()) : time]
    record = {"prompt": prompt, "completion": completion}
    filler = {"prompt": "", "completion": "abc"}
    source = data.chat([record, filler], BYTES, time=time, batch_size=1, shuffle=False)
    fits = len(expected) >= (2 if not prompt else 1)
    assert source.dropped == (0 if fits else 1)
    assert source.truncated == (fits and len(whole) > time)
    if fits:
        batch = source.at(0, 1)
        labels, mask = batch["labels"][0], batch["attention_mask"][0]
        assert labels[labels != -100].tolist() == expected
        assert batch["input_ids"][0][mask.bool()].tolist() == whole[:time]


def test_only_what_the_assistant_says_is_a_target() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yo"},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "So long"},
    ]
    source = data.chat([{"messages": messages}], BYTES, time=256, batch_size=1)
    batch = source.at(0, 1)
    labels = batch["labels"][0]
    said = labels[labels != -100].tolist()
    assert said == [*b"Yo", BYTES.end, *b"So long", BYTES.end]
    text = BYTES.decode(batch["input_ids"][0][batch["attention_mask"][0].bool()].tolist())
    assert text.startswith("system: Be brief.\nuser: Hi\nassistant: Yo\n")


USER = {"role": "user", "content": "x"}
RECORDS: list[tuple[dict[Any, Any], str]] = [
    ({"prompt": "a"}, r"record 1: no 'completion'; it has 'prompt'$"),
    ({"prompt": "a", "complete": "b"}, r"record 1: no 'completion'; did you mean 'complete'\?"),
    ({"prompt": "a", "answer": "b"}, r"record 1: no 'completion'; it has 'prompt', 'answer'$"),
    ({"promt": "a", "completion": "b"}, r"record 1: no 'prompt'; did you mean 'promt'"),
    ({"prompt": 3, "completion": "b"}, r"record 1.prompt: expected text or messages, got int"),
    ({"prompt": "a", "completion": ""}, r"record 1.completion: empty"),
    ({"prompt": "a", "completion": b"b"}, r"record 1.completion: expected text or .*, got bytes"),
    (
        {"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]},
        r"record 1: prompt is text, completion is messages; expected texts, or lists of messages, "
        r"alone$",
    ),
    (
        {"prompt": [USER], "completion": [USER, {"role": "assistant", "content": "b"}]},
        r"record 1.completion: begins with the prompt's messages again; give only what follows",
    ),
    ({3: "a", "propmt": "b"}, r"record 1: of no known shape; did you mean 'prompt'\? expected mes"),
    ({"message": "a"}, r"record 1: of no known shape; did you mean 'messages'\? expected messages"),
    ({"instruction": "a"}, r"record 1: of no known shape; expected .*instruction and output \(Alp"),
    ({}, r"record 1: of no known shape; it is empty; expected messages \(messages\);"),
    ({"messages": "hello"}, r"record 1.messages: expected a list"),
    ({"messages": []}, r"record 1.messages: expected a list"),
    ({"messages": [USER]}, "no assistant speaks"),
    ({"messages": [{"role": "asistant", "content": "x"}]}, "did you mean 'assistant'"),
    ({"messages": [{"role": "assistant", "content": ""}]}, r"messages\[0\].content: empty"),
    ({"messages": [{"content": "x"}]}, r"messages\[0\]: no 'role'"),
    ({"messages": ["x"]}, r"messages\[0\]: expected role and content, got str"),
]


@pytest.mark.parametrize(("record", "message"), RECORDS)
def test_a_bad_record_is_named(record: dict[str, Any], message: str) -> None:
    good = {"prompt": "a", "completion": "b"}
    with pytest.raises(ft.DataError, match=message):
        data.chat([good, record], BYTES, time=16, batch_size=1)


def _dialogue(*said: str) -> list[dict[str, str]]:
    roles = ("system", "user", "assistant", "user", "assistant")
    return [{"role": r, "content": s} for r, s in zip(roles, said, strict=False)]


def test_a_prompt_and_a_completion_may_be_messages() -> None:
    """Laid out as one dialogue is, but what the assistant said in the prompt is no target."""
    messages = _dialogue("Be brief.", "Hi", "Yo", "Bye", "So long")
    whole = data.chat([{"messages": messages}], BYTES, time=256, batch_size=1).at(0, 1)
    record = {"prompt": messages[:4], "completion": messages[4:]}
    parted = data.chat([record], BYTES, time=256, batch_size=1).at(0, 1)
    assert parted["input_ids"].tolist() == whole["input_ids"].tolist()
    labels = parted["labels"][0]
    assert labels[labels != -100].tolist() == [*b"So long", BYTES.end]


@pytest.mark.parametrize("time", range(2, 60))
@pytest.mark.parametrize("truncation", ["keep_start", "keep_end", "prompt_first"])
def test_of_a_dialogue_the_prompt_is_what_comes_before_the_assistant(
    truncation: str, time: int
) -> None:
    """So `prompt_first` takes the system's and the user's words from the left, then the end."""
    record = {"messages": _dialogue("Be brief.", "Hi", "Yo", "Bye")}
    prompt, rest = b"system: Be brief.\nuser: Hi\n", [*b"assistant: Yo", 256, *b"\nuser: Bye\n"]
    whole = [*prompt, *rest]
    begin = {
        "keep_start": 0,
        "keep_end": max(0, len(whole) - time),
        "prompt_first": len(prompt) - min(len(prompt), max(1, time - len(rest))),
    }[truncation]
    said = range(whole.index(ord("Y")), whole.index(256) + 1)
    filler = {"prompt": "a", "completion": "b"}
    source = data.chat(
        [filler, record], BYTES, time=time, batch_size=1, shuffle=False, truncation=truncation
    )
    if not any(begin < at < begin + time for at in said):
        assert source.dropped == 1
        return
    batch = source.at(1, 1)
    mask = batch["attention_mask"][0].bool()
    assert batch["input_ids"][0][mask].tolist() == whole[begin : begin + time]
    labels = [i if at in said else -100 for at, i in enumerate(whole)][begin : begin + time]
    assert batch["labels"][0][mask].tolist() == labels
