"""Unpaired completions: their judgements, and what each is set against for KTO's KL term."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import functrain as ft
from functrain import data
from functrain.data.examples import Prompted
from functrain.data.truncation import Truncation
from functrain.data.unpaired import _next, _ring

BYTES = data.ByteTokenizer()
END = BYTES.end
kto = sys.modules[data.Unpaired.__module__]  # `data.unpaired` is the function
RECORDS = st.lists(
    st.fixed_dictionaries(
        {
            "prompt": st.sampled_from(["", "a", "é?", "what?"]),
            "completion": st.sampled_from(["x", "y", "éé", "long enough to be cut"]),
            "label": st.booleans(),
        }
    ),
    min_size=1,
    max_size=9,
)
MODES = st.sampled_from(["keep_start", "keep_end", "prompt_first"])


def _unpaired(*records: Any, **options: Any) -> data.Unpaired:
    return data.unpaired(records, BYTES, **{"time": 32, "batch_size": 2, **options})


def _texts(source: data.Unpaired, name: str) -> list[tuple[str, str]]:
    """Prompts and completions of an epoch in the given order, without their ends."""
    found = []
    for batch in data.all_batches(source, 3):
        half = batch[name]
        for ids, labels, mask in zip(
            half["input_ids"], half["labels"], half["attention_mask"].bool(), strict=True
        ):
            prompt = ids[mask & (labels == -100)].tolist()
            found.append((BYTES.decode(prompt), BYTES.decode(labels[labels != -100].tolist())))
    return found


def _other(records: list[dict[str, Any]], index: int) -> dict[str, Any] | None:
    """The mismatched record, looked for one by one."""
    own = records[index]
    after = records[index + 1 :] + records[:index]
    different = [each for each in after if each["completion"] != own["completion"]]
    elsewhere = [each for each in different if each["prompt"] != own["prompt"]]
    return next(iter(elsewhere + different), None)


@given(records=RECORDS)
def test_the_mismatched_completion_is_the_next_other_one_of_another_prompt(
    records: list[dict[str, Any]],
) -> None:
    others = [_other(records, index) for index in range(len(records))]
    if not any(others):
        with pytest.raises(ft.DataError, match=r"^record 0: no other completion to set against"):
            _unpaired(*records)
        return
    assert all(others)  # of whole texts each has another, or none has
    source = _unpaired(*records)
    assert source.counts == data.Counts(kept=len(records))
    assert _texts(source, "completion") == [(r["prompt"], r["completion"]) for r in records]
    assert _texts(source, "mismatched") == [
        (record["prompt"], other["completion"])
        for record, other in zip(records, others, strict=True)
        if other is not None
    ]
    desirable = torch.cat([batch["desirable"] for batch in data.all_batches(source, 3)])
    assert desirable.tolist() == [record["label"] for record in records]


@given(records=RECORDS, time=st.integers(2, 12), mode=MODES)
def test_cut_or_not_a_mismatched_completion_is_never_its_own_and_has_a_target(
    records: list[dict[str, Any]], time: int, mode: str
) -> None:
    fillers = [{"prompt": "", "completion": c, "label": True} for c in ("pp", "qq")]
    source = _unpaired(*records, *fillers, time=time, truncation=mode)
    assert source.counts.read == len(records) + 2
    assert source.counts.kept == len(source) == source.counts.read - source.dropped
    for own, mismatched, _ in source.examples:
        assert own != mismatched
        for ids, labels in (own, mismatched):
            assert len(ids) == len(labels) <= time
            assert any(label != -100 for label in labels[1:])


@given(records=RECORDS, more=RECORDS, size=st.integers(1, 5))
def test_a_mismatched_completion_depends_on_the_data_set_not_on_the_batch(
    records: list[dict[str, Any]], more: list[dict[str, Any]], size: int
) -> None:
    every = [
        {"prompt": "a", "completion": "b", "label": True},
        *records,
        {"prompt": "c", "completion": "d", "label": False},
        *more,
    ]
    source = _unpaired(*every, seed=1, batch_size=size)
    for position in range(0, 2 * len(every), size):
        batch = source.at(position, size)
        for row in range(size):
            _, (ids, _), desirable = source.examples[source.index(position + row)]
            assert batch["mismatched"]["input_ids"][row, : len(ids)].tolist() == list(ids)
            assert bool(batch["desirable"][row]) == desirable


def test_a_pair_is_a_desirable_and_an_undesirable_example() -> None:
    said = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    asked = [{"role": "user", "content": "Hi"}]
    source = _unpaired(
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"prompt": "d", "completion": "e", "label": False},
        {side: f"what? {side}" for side in said},
        {side: asked + said[side] for side in said},
        time=64,
        shuffle=False,
    )
    assert [desirable for *_, desirable in source.examples] == [
        *(True, False),
        False,
        *(True, False),
        *(True, False),
    ]
    assert _texts(source, "completion")[:5] == [
        ("a", "b"),
        ("a", "c"),
        ("d", "e"),
        ("what? ", "chosen"),
        ("what? ", "rejected"),
    ]
    assert _texts(source, "completion")[5:] == [
        ("user: Hi\nassistant: \n", "chosen"),
        ("user: Hi\nassistant: \n", "rejected"),
    ]
    mismatched = [said for _, said in _texts(source, "mismatched")]
    assert mismatched == ["e", "e", "chosen", "chosen", "chosen", "b", "b"]


def test_sides_of_a_pair_are_cut_and_dropped_one_by_one() -> None:
    """Nothing compares them, so that one does not lose of its prompt what the other needs."""
    pair = {"prompt": "abcdef", "chosen": "g", "rejected": "hijklmn"}
    source = _unpaired(pair, time=8, truncation="keep_end")
    assert _texts(source, "completion") == [("abcdef", "g"), ("", "hijklmn")]
    assert source.counts == data.Counts(kept=2, truncated=1, tokens_cut=6)
    same = {"prompt": "a", "chosen": "b", "rejected": "b"}
    with pytest.raises(ft.DataError, match=r"^record 1: chosen and rejected are the same text"):
        _unpaired(pair, same)
    source = _unpaired(pair, same, drop_identical=True)
    assert str(source.counts) == "read 4, kept 2, dropped 2 (2 identical)"


@pytest.mark.parametrize(("prompt", "expected"), [("c", "yes"), ("c" * 8, "b")])
def test_a_completion_of_which_no_target_fits_is_passed_over(prompt: str, expected: str) -> None:
    """A user speaks first in the third record's, which after 8 bytes leaves no room for more."""
    later = [{"role": "user", "content": "x" * 20}, {"role": "assistant", "content": "yes"}]
    source = _unpaired(
        {"prompt": "a", "completion": "b", "label": True},
        {"prompt": prompt, "completion": "d", "label": True},
        {"prompt": [], "completion": later, "label": False},
        time=44,
    )
    assert source.dropped == 0
    assert _texts(source, "mismatched")[1][1] == expected


GOOD = {"prompt": "a", "completion": "b", "label": True}


def test_a_label_may_be_numpys() -> None:
    """As a column of a data frame has them."""
    records = [{**GOOD, "label": np.bool_(n)} | {"completion": f"b{n}"} for n in (True, False)]
    batch = _unpaired(*records, shuffle=False).at(0, 2)
    assert batch["desirable"].tolist() == [True, False]


def test_the_sides_of_another_kind_may_be_null() -> None:
    """As in JSON that was written from columns, with pairs and labelled completions."""
    nulls = dict.fromkeys(["completion", "label", "chosen", "rejected"])
    labelled = [{**GOOD, "completion": text} for text in ("x", "y")]
    records = [*labelled, {"prompt": "p", "chosen": "c", "rejected": "d"}]
    options: dict[str, Any] = {"time": 16, "batch_size": 1}
    alone = data.unpaired(records, BYTES, **options)
    beside = data.unpaired([nulls | each for each in records], BYTES, **options)
    assert beside.examples == alone.examples


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no label": (
        {"prompt": "a", "completion": "b"},
        {},
        "^record 1: no 'label'; it has 'prompt'",
    ),
    "a label misspelt": (
        {"prompt": "a", "completion": "b", "lable": True},
        {},
        "^record 1: no 'label'; did you mean 'lable'",
    ),
    "a number for a label": (
        {**GOOD, "label": -1},
        {},
        r"^record 1.label: expected true \(desirable\) or false, got int; give label > 0, say$",
    ),
    "a text for a label": (
        {**GOOD, "label": "false"},
        {},
        r"^record 1.label: .*, got str; give label == 'true', say$",
    ),
    "None for a label": ({**GOOD, "label": None}, {}, r"^record 1.label: .*, got NoneType$"),
    "no completion": ({"prompt": "a", "label": True}, {}, "^record 1: no 'completion'"),
    "an empty completion": ({**GOOD, "completion": ""}, {}, r"^record 1.completion: empty"),
    "no record": (7, {}, "^record 1: expected an object, got int"),
    "two forms": (
        {"chosen": "c", "rejected": "d", **GOOD},
        {},
        "^record 1: completion beside chosen or rejected; give one form",
    ),
    "half a pair": ({"prompt": "a", "chosen": "b"}, {}, "^record 1: no 'rejected'"),
    "a labelled pair": (
        {"prompt": "a", "chosen": "c", "rejected": "d", "label": True},
        {},
        "^record 1: label beside chosen or rejected; give one form",
    ),
    "one completion in all": (
        {"prompt": "c", "completion": "b", "label": False},
        {},
        r"^record 0: no other completion to set against this prompt, nor against any \(all are the "
        r"same text, or the same when cut at time=32\); KTO's KL term needs one, so give more "
        "completions or more time$",
    ),
    "one completion when cut": (
        {"prompt": "c", "completion": "bc", "label": False},
        {"time": 2},
        r"^record 0: no other completion to set against this prompt, .* cut at time=2\)",
    ),
    "no room for any": (
        {**GOOD, "prompt": "ab"},
        {"time": 1},
        "^time: 1 tokens leave no completion token of any of 2 examples",
    ),
}


@pytest.mark.parametrize(("record", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_judged_is_named(record: Any, options: Any, message: str) -> None:
    with pytest.raises(ft.DataError, match=message):
        _unpaired(GOOD, record, **options)


def test_records_that_are_none_are_named() -> None:
    with pytest.raises(ft.DataError, match=r"^records: one object, expected a list"):
        data.unpaired(GOOD, BYTES, time=9, batch_size=1)  # type: ignore[arg-type]
    with pytest.raises(ft.DataError, match=r"^records: none; expected at least one example"):
        _unpaired()


@given(pairs=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=12))
def test_stepping_over_runs_finds_what_looking_at_each_one_does(
    pairs: list[tuple[int, int]],
) -> None:
    rings = [_ring([pair[which] for pair in pairs]) for which in (0, 1)]
    size = len(pairs)
    for index, own in enumerate(pairs):
        after = [at % size for at in range(index + 1, index + size)]
        differ = [at for at in after if all(a != b for a, b in zip(pairs[at], own, strict=True))]
        assert list(_next(index, *rings)) == differ


def test_sorted_data_is_stepped_over_in_runs() -> None:
    """As 50,000 answers "no" before 50,000 "yes" are: looked at one by one, it took minutes."""
    looks = 0

    class Counting(list[int]):
        def __getitem__(self, index: Any) -> Any:
            nonlocal looks
            looks += 1
            return super().__getitem__(index)

    ring = _ring([0] * 500 + [1] * 500)
    counted = type(ring)(Counting(ring.keys), ring.run)
    for index in range(1000):
        assert next(_next(index, counted)) == (500 if index < 500 else 0)
    assert looks < 10 * 1000


@given(records=RECORDS, time=st.integers(2, 12), mode=MODES, few=st.integers(0, 2))
def test_stepping_over_what_is_left_alike_finds_what_looking_at_each_one_does(
    records: list[dict[str, Any]], time: int, mode: str, few: int
) -> None:
    fillers = [{"prompt": "", "completion": c, "label": True} for c in ("pp", "qq")]
    found = []
    for looked_at in (10**9, few):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kto, "_FEW", looked_at)
            found.append(_unpaired(*records, *fillers, time=time, truncation=mode).examples)
    assert found[0] == found[1]


def test_completions_of_which_the_cut_leaves_the_same_are_stepped_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fits = 0
    real = Truncation.fit

    def counted(self: Truncation, given: Prompted) -> Any:
        nonlocal fits
        fits += 1
        return real(self, given)

    monkeypatch.setattr(Truncation, "fit", counted)
    records = [
        {"prompt": f"{n:09}", "completion": f"The answer is {n}", "label": True} for n in range(300)
    ]
    other = {"prompt": "", "completion": "Another", "label": False}
    source = _unpaired(*records, other, time=10)
    assert (len(source), source.dropped) == (301, 0)
    assert {tuple(mismatched[0][9:]) for _, mismatched, _ in source.examples[:-1]} == {(65,)}
    assert fits < 30 * len(source)


def test_what_is_left_is_looked_at_once_for_all_prompts_that_fill_the_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks = 0
    real = kto._left

    def counted(*given: Any) -> Any:
        nonlocal looks
        looks += 1
        return real(*given)

    monkeypatch.setattr(kto, "_left", counted)
    records = [
        {"prompt": "p" * (20 + n), "completion": f"The answer is {n}", "label": True}
        for n in range(100)
    ]
    other = {"prompt": "", "completion": "Another", "label": False}
    source = _unpaired(*records, other, time=10, truncation="prompt_first")
    assert len(source) == 101
    assert looks == len(source)


def test_an_example_beside_which_the_cut_leaves_nothing_else_is_dropped_and_counted() -> None:
    """Its prompt takes all but one token, which begins every completion."""
    long = {"prompt": "p" * 30, "completion": "xa", "label": True}
    short = [{"prompt": "q", "completion": f"x{n}", "label": False} for n in range(3)]
    source = _unpaired(long, *short, time=31)
    assert source.counts == data.Counts(kept=3, no_other_completion=1)
    assert str(source.counts) == "read 4, kept 3, dropped 1 (1 no other completion)"
    assert len(source) == 3
