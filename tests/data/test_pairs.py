"""Pairs: one prompt for both sides, a completion left of both, and nothing dropped in silence."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import functrain as ft
from functrain import data

BYTES = data.ByteTokenizer()
END = BYTES.end
TEXT = st.text("abé€😀", max_size=5)
RECORDS = st.lists(
    st.fixed_dictionaries(
        {"prompt": TEXT, "chosen": TEXT.filter(bool), "rejected": TEXT.filter(bool)}
    ).filter(lambda record: record["chosen"] != record["rejected"]),
    min_size=1,
    max_size=6,
)
MODES = st.sampled_from(["keep_start", "keep_end", "prompt_first"])
FILLER = {"prompt": "", "chosen": "yes", "rejected": "no"}

Row = tuple[list[int], list[int]]


def _cut(record: dict[str, str], time: int, mode: str) -> list[Row]:
    """What a pair should be, said in other words than the code's: ids and labels of both sides."""
    prompt = list(record["prompt"].encode())
    sides = [[*record[side].encode(), END] for side in ("chosen", "rejected")]
    if mode == "keep_start":
        return [((prompt + side)[:time], ([-100] * len(prompt) + side)[:time]) for side in sides]
    over = max(0, len(prompt) + max(len(side) for side in sides) - time)
    while over and len(prompt) > (1 if mode == "prompt_first" else 0):
        prompt, over = prompt[1:], over - 1
    if mode == "prompt_first":
        sides = [side[: time - len(prompt)] for side in sides]
    else:
        sides = [side[max(0, len(side) - time) :] for side in sides]
    return [(prompt + side, [-100] * len(prompt) + side) for side in sides]


def _rows(source: data.Pairs, side: str) -> list[Row]:
    rows = []
    for batch in data.all_batches(source):
        half = batch[side]
        for ids, labels, mask in zip(
            half["input_ids"], half["labels"], half["attention_mask"].bool(), strict=True
        ):
            rows.append((ids[mask].tolist(), labels[mask].tolist()))
            assert labels[~mask].eq(-100).all()
    return rows


@given(records=RECORDS, time=st.integers(3, 24), mode=MODES)
def test_every_pair_read_is_kept_as_it_should_be_or_counted_as_dropped(
    records: list[dict[str, str]], time: int, mode: str
) -> None:
    given_ = [*records, FILLER]
    source = data.preference(given_, BYTES, time=time, batch_size=3, truncation=mode)
    expected = [_cut(record, time, mode) for record in given_]
    left = [
        all(any(label != -100 for label in labels[1:]) for _, labels in rows) for rows in expected
    ]
    kept = [rows for rows, some in zip(expected, left, strict=True) if some and rows[0] != rows[1]]
    for index, side in enumerate(("chosen", "rejected")):
        assert _rows(source, side) == [rows[index] for rows in kept]
    counts = source.counts
    assert (counts.read, counts.kept, len(source)) == (len(given_), len(kept), len(kept))
    assert counts.no_completion_left == left.count(False)
    assert counts.identical_when_cut == len(given_) - len(kept) - left.count(False)
    assert (source.truncated, source.dropped) == (counts.truncated, len(given_) - len(kept))


@given(records=RECORDS, time=st.integers(3, 24), mode=MODES, implicit=st.booleans())
def test_every_pair_kept_has_one_prompt_targets_on_both_sides_and_fits(
    records: list[dict[str, str]], time: int, mode: str, implicit: bool
) -> None:
    if implicit:
        records = [
            {side: f"x{r['prompt']}{r[side]}{side[0]}" for side in ("chosen", "rejected")}
            for r in records
        ]
    source = data.preference([*records, FILLER], BYTES, time=time, batch_size=3, truncation=mode)
    assert source.counts.read == len(records) + 1
    for chosen, rejected in zip(*(_rows(source, s) for s in ("chosen", "rejected")), strict=True):
        prompts = []
        for ids, labels in (chosen, rejected):
            targets = [label != -100 for label in labels]
            assert len(ids) <= time
            assert any(targets[1:])
            prompt = targets.index(True)
            assert all(targets[prompt:])
            prompts.append(ids[:prompt])
        assert prompts[0] == prompts[1]
        assert chosen != rejected


def test_the_chosen_is_the_chosen_and_the_rejected_the_rejected() -> None:
    record = {"prompt": "2+2=", "chosen": "4", "rejected": "five"}
    batch = data.preference([record], BYTES, time=32, batch_size=1).at(0, 1)
    for side, said in (("chosen", "4"), ("rejected", "five")):
        ids, labels = batch[side]["input_ids"][0], batch[side]["labels"][0]
        assert BYTES.decode(ids[batch[side]["attention_mask"][0].bool()].tolist()) == f"2+2={said}"
        assert BYTES.decode(labels[labels != -100].tolist()) == said


def test_of_messages_only_what_the_assistant_says_after_the_prompt_is_a_target() -> None:
    asked = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yo"},
        {"role": "user", "content": "Sure?"},
    ]
    said = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    implicit = {side: [*asked, *said[side]] for side in said}
    explicit = {"prompt": asked, **said}
    for record in (implicit, explicit):
        batch = data.preference([record], BYTES, time=128, batch_size=1).at(0, 1)
        for side in ("chosen", "rejected"):
            ids, labels = batch[side]["input_ids"][0], batch[side]["labels"][0]
            assert labels[labels != -100].tolist() == [*side.encode(), END]
            text = BYTES.decode(ids[batch[side]["attention_mask"][0].bool()].tolist())
            assert text == f"user: Hi\nassistant: Yo\nuser: Sure?\nassistant: {side}\n"


def test_a_pair_of_which_one_completion_is_cut_away_is_dropped_and_counted() -> None:
    """The completion of a long prompt begins after `time`; of one text, so does the other's."""
    short = {"prompt": "a", "chosen": "b", "rejected": "c"}
    long = {"prompt": "a" * 8, "chosen": "b", "rejected": "c"}
    some = {"prompt": "a", "chosen": "b" * 7, "rejected": "c"}
    source = data.preference([short, long, some], BYTES, time=8, batch_size=1)
    assert (len(source), source.truncated, source.dropped) == (2, 1, 1)
    assert str(source.counts) == (
        "read 3, kept 2 (1 truncated by 1 tokens in all), dropped 1 (1 no completion left)"
    )
    chats = data.chat(
        [{"prompt": r["prompt"], "completion": "b" * n} for r, n in ((short, 7), (long, 1))],
        BYTES,
        time=8,
        batch_size=1,
    )
    assert (len(chats), chats.truncated, chats.dropped) == (1, 1, 1)


ONE = {"role": "assistant", "content": "b"}
IDENTICAL: dict[str, dict[str, Any]] = {
    "after a prompt": {"prompt": "a", "chosen": "b", "rejected": "b"},
    "without one": {"chosen": "b", "rejected": "b"},
    "in messages": {"prompt": [], "chosen": [ONE], "rejected": [{**ONE, "id": 7}]},
    "in messages without a prompt": {"chosen": [ONE], "rejected": [ONE]},
}


@pytest.mark.parametrize("record", IDENTICAL.values(), ids=IDENTICAL)
def test_identical_sides_are_refused_or_dropped_and_counted(record: dict[str, Any]) -> None:
    options: dict[str, Any] = {"time": 16, "batch_size": 1}
    message = (
        "^record 1: chosen and rejected are the same text; nothing is preferred; take it out, or "
        r"on_bad_record='skip' \(in Python drop_identical=True too\)$"
    )
    with pytest.raises(ft.DataError, match=message):
        data.preference([FILLER, record], BYTES, **options)
    source = data.preference([FILLER, record], BYTES, **options, on_bad_record="skip")
    assert str(source.counts) == "read 2, kept 1, dropped 1 (1 malformed)"
    source = data.preference([FILLER, record], BYTES, **options, drop_identical=True)
    assert str(source.counts) == "read 2, kept 1, dropped 1 (1 identical)"
    with pytest.raises(ft.DataError, match=r"none to learn from: read 1, kept 0, dropped 1 \(1 id"):
        data.preference([record], BYTES, **options, drop_identical=True)


def test_texts_that_a_tokenizer_does_not_tell_apart_are_identical() -> None:
    class Lower(data.ByteTokenizer):
        def encode(self, text: str) -> list[int]:
            return super().encode(text.lower())

    with pytest.raises(ft.DataError, match="the same text; nothing is preferred"):
        data.preference(
            [{"prompt": "a", "chosen": "Yes", "rejected": "yes"}], Lower(), time=9, batch_size=1
        )
