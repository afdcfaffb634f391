"""The embedded data: real, the same each time, and honestly split."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from functrain import keys
from functrain.data import ByteTokenizer, embedded


@pytest.fixture(scope="module")
def data() -> embedded.Embedded:
    return embedded.load()


def test_there_is_enough_of_everything(data: embedded.Embedded) -> None:
    assert sum(map(len, data.train)) > 500_000
    assert sum(map(len, data.held_out)) > 50_000
    assert len(data.sft_train) > 1000
    assert len(data.sft_held_out) > 100
    assert len(data.preference_train) > 1000
    assert len(data.preference_held_out) > 80


def test_no_held_out_text_is_trained_on(data: embedded.Embedded) -> None:
    trained = {" ".join(text.split()) for text in data.train}
    trained |= {record["completion"] for record in data.sft_train}
    trained |= {r[side] for r in data.preference_train for side in ("chosen", "rejected")}
    assert not trained & {" ".join(text.split()) for text in data.held_out}
    assert not trained & {record["completion"] for record in data.sft_held_out}
    for side in ("chosen", "rejected"):
        assert not trained & {record[side] for record in data.preference_held_out}
    prompts = {r["prompt"] for r in (*data.sft_train, *data.preference_train)}
    assert not prompts & {r["prompt"] for r in (*data.sft_held_out, *data.preference_held_out)}


def _docs(document: str) -> list[str]:
    """The docstrings of a page, which are indented under their names; a topic is one text."""
    if not document.startswith("Help on "):
        return [document]
    blocks = re.split(r"^\S.*$", document, flags=re.MULTILINE)
    return [block for block in blocks if block.strip()]


def test_near_duplicates_are_removed(data: embedded.Embedded) -> None:
    """No held-out docstring shares more than a fifth of its five-word phrases with training."""
    known = {phrase for text in data.train for phrase in embedded._phrases(text)}
    assert data.removed > 0
    docs = [doc for document in data.held_out for doc in _docs(document)]
    assert len(docs) > 300
    for doc in docs:
        phrases = list(embedded._phrases(doc))
        assert sum(p in known for p in phrases) <= 0.2 * len(phrases)


def test_a_wrong_answer_is_the_right_one_of_another_question(data: embedded.Embedded) -> None:
    for records, answers in (
        (data.preference_train, {r["completion"] for r in data.sft_train}),
        (data.preference_held_out, {r["completion"] for r in data.sft_held_out}),
    ):
        for record in records:
            assert record["chosen"] != record["rejected"]
            assert {record["chosen"], record["rejected"]} <= answers


@given(st.lists(st.sampled_from("abcd"), min_size=2, max_size=20).filter(lambda m: len({*m}) > 1))
def test_a_wrong_answer_is_drawn_from_all_entries_of_other_modules(modules: list[str]) -> None:
    """In whatever order entries of the modules come: the definition, which is quadratic."""
    entries = [
        embedded.Entry(module=module, name=str(n), kind="class", signature="", doc="A doc.")
        for n, module in enumerate(modules)
    ]
    for entry, record in zip(entries, embedded._preferences(entries), strict=True):
        others = [each for each in entries if each.module != entry.module]
        drawn = keys.derive(0, "wrong", entry.full_name) % len(others)
        assert record["chosen"] == embedded._answer(entry)
        assert record["rejected"] == embedded._answer(others[drawn])


def test_it_is_the_same_each_time() -> None:
    assert embedded.load(limit=100) == embedded.load(limit=100)


@given(
    train=st.lists(st.text("abc", max_size=8), min_size=1, max_size=4),
    held_out=st.lists(st.text("abcd", min_size=1, max_size=5), min_size=1, max_size=2),
)
def test_the_trigram_is_its_definition(train: list[str], held_out: list[str]) -> None:
    end = ByteTokenizer().end
    pad = [end, end]
    seen = [*pad, *(i for text in train for i in (*text.encode(), end))]
    asked = [*pad, *(i for text in held_out for i in (*text.encode(), end))]
    # The two symbols of padding are context only, so they are not counted as followers.
    bits = 0.0
    for at in range(2, len(asked)):
        bits -= math.log2(_counted(seen, (asked[at - 2], asked[at - 1]), asked[at]))
    expected = bits / sum(len(text) for text in held_out)
    assert embedded.trigram_bits_per_byte(train, held_out) == pytest.approx(expected, rel=1e-9)


def _counted(seen: list[int], context: tuple[int, ...], symbol: int) -> float:
    n = len(context)
    followers = Counter(seen[i] for i in range(2, len(seen)) if tuple(seen[i - n : i]) == context)
    lower = _counted(seen, context[1:], symbol) if n else 1 / 257
    total, kinds = sum(followers.values()), len(followers)
    return (followers[symbol] + kinds * lower) / (total + kinds) if total else lower


def test_the_trigrams_probabilities_add_up_to_one() -> None:
    seen = embedded._stream(["abracadabra", "cab"])
    for context in ([256, 256], [97, 98], [98, 97], [1, 2]):
        asked = np.array([[*context, symbol] for symbol in range(257)])
        total = 0.0
        for row in asked:
            probability = np.full(1, 1 / 257)
            for order in (1, 2, 3):
                probability = embedded._witten_bell(seen, row, order, probability)
            total += float(probability[0])
        assert total == pytest.approx(1.0, rel=1e-9)


def _summary(record: dict[str, str]) -> str:
    return record["completion"].split("Summary: ", 1)[1]


def _shingles(text: str) -> set[tuple[str, ...]]:
    return set(embedded._phrases(text, 3))


def test_held_out_summaries_are_new(data: embedded.Embedded) -> None:
    """The answers alone too, not only the docstrings they begin; and none too short to tell."""
    known = {phrase for text in data.train for phrase in embedded._phrases(text)}
    trained = "\n".join(" ".join(embedded._words(text)) for text in data.train)
    for record in data.sft_held_out:
        phrases = list(embedded._phrases(_summary(record)))
        assert phrases
        assert sum(p in known for p in phrases) <= 0.2 * len(phrases)
        assert " ".join(embedded._words(_summary(record))) not in trained


def test_no_held_out_summary_resembles_another(data: embedded.Embedded) -> None:
    """Under half of the three-word phrases in common: with training, and with each other."""
    held_out = [_shingles(_summary(record)) for record in data.sft_held_out]
    others = [_shingles(_summary(record)) for record in data.sft_train]
    where: defaultdict[tuple[str, ...], list[set[tuple[str, ...]]]] = defaultdict(list)
    for shingles in others:
        for shingle in shingles:
            where[shingle].append(shingles)
    for shingles in held_out:
        assert shingles
        # Those with no phrase in common cannot have half of them.
        for other in (other for shingle in shingles for other in where[shingle]):
            assert 2 * len(shingles & other) < len(shingles | other)
        for shingle in shingles:
            where[shingle].append(shingles)


def test_a_text_too_short_to_tell_is_not_new() -> None:
    assert not embedded._is_new("basic message object", set())
    assert embedded._is_new("a message object with five words", set())
