"""Truncation: what goes, that both sides of a pair lose the same of the prompt, and the counts."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import functrain as ft
from functrain import data
from functrain.data.examples import Prompted
from functrain.data.truncation import MODES, Counts, Truncation, fitted

BYTES = data.ByteTokenizer()
EVERY_MODE = pytest.mark.parametrize("mode", MODES)


def _prompted(prompt: int, *completions: tuple[int, int]) -> Prompted:
    """Ids that tell where they stood; of a completion some begin and end without a target."""
    sides = []
    for side, (length, ignored) in enumerate(completions, start=1):
        ids = tuple(range(1000 * side, 1000 * side + length))
        labels = tuple(
            -100 if not ignored <= n <= length - ignored else i for n, i in enumerate(ids)
        )
        sides.append((ids, labels))
    return Prompted(tuple(range(prompt)), tuple(sides))


LENGTHS = st.tuples(st.integers(1, 12), st.integers(0, 3))
PROMPTED = st.builds(
    lambda prompt, sides: _prompted(prompt, *sides),
    st.integers(0, 12),
    st.lists(LENGTHS, min_size=1, max_size=2),
)


def _whole(given: Prompted, side: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    ids, labels = given.completions[side]
    return (*given.prompt, *ids), (*(-100 for _ in given.prompt), *labels)


def _parts(ids: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    prompt = tuple(i for i in ids if i < 1000)
    assert ids[: len(prompt)] == prompt
    return prompt, ids[len(prompt) :]


@EVERY_MODE
@given(each=PROMPTED, time=st.integers(2, 26))
def test_what_is_left_fits_is_one_stretch_and_no_shorter_than_it_must(
    mode: str, each: Prompted, time: int
) -> None:
    sides = Truncation(time=time, mode=mode).fit(each)
    for side, (ids, labels) in enumerate(sides):
        whole, targets = _whole(each, side)
        assert len(ids) == len(labels) <= time
        begin = whole.index(ids[0]) if ids else 0
        assert (whole[begin:][: len(ids)], targets[begin:][: len(ids)]) == (ids, labels)
    longest = max(len(_whole(each, side)[0]) for side in range(len(sides)))
    assert max(len(ids) for ids, _ in sides) == min(longest, time)
    if longest <= time:
        assert sides == tuple(_whole(each, side) for side in range(len(sides)))


@EVERY_MODE
@given(each=PROMPTED, time=st.integers(2, 26))
def test_every_side_has_the_same_rest_of_the_prompt(mode: str, each: Prompted, time: int) -> None:
    sides = Truncation(time=time, mode=mode).fit(each)
    prompts = {_parts(ids)[0] for ids, _ in sides}
    assert len(prompts) == 1


@given(each=PROMPTED, time=st.integers(1, 26))
def test_keep_start_keeps_a_beginning(each: Prompted, time: int) -> None:
    for side, example in enumerate(Truncation(time=time).fit(each)):
        ids, labels = _whole(each, side)
        assert example == (ids[:time], labels[:time])


@given(each=PROMPTED, time=st.integers(1, 26))
def test_keep_end_keeps_an_end_and_no_completion_loses_a_token_that_fits(
    each: Prompted, time: int
) -> None:
    sides = Truncation(time=time, mode="keep_end").fit(each)
    for side, (ids, _) in enumerate(sides):
        whole, _ = _whole(each, side)
        assert whole[len(whole) - len(ids) :] == ids
        assert _parts(ids)[1] == each.completions[side][0][-time:]


@given(each=PROMPTED, time=st.integers(2, 26), data_=st.data())
def test_prompt_first_keeps_a_completion_whole_where_it_fits_with_the_least_of_the_prompt(
    each: Prompted, time: int, data_: st.DataObject
) -> None:
    least = data_.draw(st.integers(1, time - 1), label="min_prompt")
    sides = Truncation(time=time, mode="prompt_first", min_prompt=least).fit(each)
    for side, (ids, _) in enumerate(sides):
        completion = each.completions[side][0]
        prompt, said = _parts(ids)
        assert each.prompt[len(each.prompt) - len(prompt) :] == prompt
        assert len(prompt) >= min(least, len(each.prompt))
        assert completion[: len(said)] == said
        if len(completion) + min(least, len(each.prompt)) <= time:
            assert said == completion


@EVERY_MODE
@given(every=st.lists(PROMPTED, min_size=1, max_size=6), time=st.integers(2, 26))
def test_whatever_is_read_is_kept_or_counted_as_dropped(
    mode: str, every: list[Prompted], time: int
) -> None:
    how = Truncation(time=time, mode=mode)
    reasons = [_why(how.fit(each)) for each in every]
    if not any(reason == "kept" for reason in reasons):
        with pytest.raises(ft.DataError):
            fitted(every, how)
        return
    kept, counts = fitted(every, how, identical=3)
    assert kept == {n: how.fit(every[n]) for n, why in enumerate(reasons) if why == "kept"}
    assert counts.read == len(every) + 3
    assert (counts.kept, counts.dropped) == (len(kept), len(every) - len(kept) + 3)
    assert counts.no_completion_left == reasons.count("nothing left")
    assert (counts.identical, counts.identical_when_cut) == (3, 0)
    cut = [
        sum(len(_whole(every[n], side)[0]) - len(ids) for side, (ids, _) in enumerate(sides))
        for n, sides in kept.items()
    ]
    assert counts.truncated == sum(tokens > 0 for tokens in cut)
    assert counts.tokens_cut == sum(cut)


def _why(sides: tuple[Any, ...]) -> str:
    left = [[label for label in labels[1:] if label != -100] for _, labels in sides]
    return "kept" if all(left) else "nothing left"


@given(
    record=st.fixed_dictionaries({name: st.text("abé", min_size=1) for name in ("p", "c", "r")}),
    time=st.integers(2, 12),
)
def test_prompt_first_drops_no_text_but_pairs_that_differ_only_in_what_is_cut(
    record: dict[str, str], time: int
) -> None:
    chosen, rejected = f"{record['c']}y", f"{record['r']}n"
    pair = {"prompt": record["p"], "chosen": chosen, "rejected": rejected}
    filler = {"prompt": "", "chosen": "a", "rejected": "b"}
    source = data.preference(
        [pair, filler], BYTES, time=time, batch_size=1, truncation="prompt_first"
    )
    same = chosen.encode()[: time - 1] == rejected.encode()[: time - 1]
    assert source.counts.no_completion_left == 0
    assert source.counts.identical_when_cut == same
    assert len(source) == 2 - same


def test_a_pair_that_differs_only_in_what_is_cut_is_dropped_and_counted() -> None:
    """Its margin would be zero whatever the model says."""
    alike = {"prompt": "a", "chosen": "same yes", "rejected": "same no"}
    other = {"prompt": "a", "chosen": "b", "rejected": "c"}
    for time, dropped in ((6, 1), (7, 0)):
        source = data.preference([alike, other], BYTES, time=time, batch_size=1)
        assert (source.dropped, source.counts.identical_when_cut) == (dropped, dropped)
    source = data.preference(
        [{**alike, "chosen": "yes, it is", "rejected": "no, it is"}, other],
        BYTES,
        time=8,
        batch_size=1,
        truncation="keep_end",
    )
    assert source.counts.identical_when_cut == 1
    with pytest.raises(ft.DataError, match=r"records: none to learn from: read 1, kept 0, dropped"):
        data.preference([alike], BYTES, time=6, batch_size=1)


LINES: dict[str, Counts] = {
    "read 3, kept 3": Counts(kept=3),
    "read 3, kept 3 (2 truncated by 70 tokens in all)": Counts(kept=3, truncated=2, tokens_cut=70),
    "read 6, kept 3, dropped 3 (2 no completion left, 1 identical)": Counts(
        kept=3, no_completion_left=2, identical=1
    ),
    "read 2, kept 1 (1 truncated by 4 tokens in all), dropped 1 (1 identical when cut)": Counts(
        kept=1, truncated=1, tokens_cut=4, identical_when_cut=1
    ),
}


@pytest.mark.parametrize(("line", "counts"), LINES.items())
def test_the_counts_are_one_line(line: str, counts: Counts) -> None:
    assert str(counts) == line


SOURCES: dict[str, Any] = {
    "chat": lambda **o: data.chat([{"prompt": "ab", "completion": "c"}], BYTES, **o),
    "preference": lambda **o: data.preference(
        [{"prompt": "ab", "chosen": "c", "rejected": "d"}], BYTES, **o
    ),
    "unpaired": lambda **o: data.unpaired(
        [{"prompt": "ab", "chosen": "c", "rejected": "d"}], BYTES, **o
    ),
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no time": ({"time": 0}, "time: 0, expected an integer of at least 1"),
    "a time that is text": ({"time": "9"}, "time: '9', expected an integer of at least 1"),
    "a time that is true": ({"time": True}, "time: True, expected an integer of at least 1"),
    "a mode misspelt": (
        {"truncation": "keepend"},
        "truncation: 'keepend' is unknown; did you mean 'keep_end'",
    ),
    "a mode that is none": (
        {"truncation": None},
        "truncation: None is unknown; known: 'keep_end', 'keep_start', 'prompt_first'",
    ),
    "modes": ({"truncation": ["keep_end"]}, r"truncation: \['keep_end'\] is unknown; did you"),
    "no prompt": (
        {"truncation": "prompt_first", "min_prompt": 0},
        "min_prompt: 0, expected an integer of at least 1",
    ),
    "a least prompt for no mode that has one": (
        {"min_prompt": 4},
        "min_prompt: 4 has a meaning for truncation='prompt_first' alone, not for 'keep_start'",
    ),
    "a least prompt that is all": (
        {"truncation": "prompt_first", "min_prompt": 9},
        "min_prompt: 9 of time=9 tokens leave none for a completion; expected less than time",
    ),
    "too little for a completion": (
        {"time": 2},
        "time: 2 tokens leave no completion token of any of . examples; give more, or "
        "truncation='prompt_first'$",
    ),
    "too little for anything": (
        {"time": 1, "truncation": "keep_end"},
        "time: 1 tokens leave no completion token of any of . examples; give more, or",
    ),
}


@pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES)
@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_an_option_that_cannot_be_is_refused(
    make: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ft.DataError, match=f"^{message}"):
        make(**{"time": 9, "batch_size": 1, **options})
