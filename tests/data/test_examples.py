"""Implicit prompts: what both completions begin with, up to where it is safe to part them."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Sequence
from pydoc_data.topics import topics
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

import functrain as ft
from functrain import data
from functrain.data.dialogues import Message
from functrain.data.examples import Prompted, read_pair

BYTES = data.ByteTokenizer()
FEW = st.text("ab éè€₭😀\n", max_size=6)
"""Characters of one to four bytes; é and è share their first byte, € and ₭ their first two."""


@attrs.frozen
class Trained:
    """A tokenizer of the tokenizers package."""

    inner: Any

    @property
    def vocabulary(self) -> int:
        return int(self.inner.get_vocab_size()) + 1

    @property
    def end(self) -> int:
        return self.vocabulary - 1

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.inner.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        text: str = self.inner.decode([i for i in ids if i != self.end])
        return text


@functools.cache
def _trained(kind: str) -> Trained:
    """Byte-level BPE as GPT-2's, and Unigram with a blank put before every text, as Llama 2's."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizers = pytest.importorskip("tokenizers")
    texts = [topics[name] for name in sorted(topics)[:12]]
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    if kind == "bpe":
        inner = tokenizers.Tokenizer(tokenizers.models.BPE())
        inner.pre_tokenizer = byte_level(add_prefix_space=False)
        inner.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=600, show_progress=False, initial_alphabet=byte_level.alphabet()
        )
    else:
        inner = tokenizers.Tokenizer(tokenizers.models.Unigram())
        inner.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="always")
        inner.decoder = tokenizers.decoders.Metaspace(prepend_scheme="always")
        trainer = tokenizers.trainers.UnigramTrainer(
            vocab_size=600, show_progress=False, unk_token="<unk>", special_tokens=["<unk>"]
        )
    inner.train_from_iterator(texts, trainer)
    return Trained(inner)


WORDS = st.lists(
    st.sampled_from(["the", "class", "it's", "don't", "1234", "  ", "\n\n", "naïve", "😀", "."]),
    min_size=1,
    max_size=8,
).map(" ".join)


def _read(chosen: Any, rejected: Any, tokenizer: Any = BYTES) -> Prompted:
    return read_pair({"chosen": chosen, "rejected": rejected}, tokenizer, "record 0")


@given(shared=FEW, chosen=FEW.filter(bool), rejected=FEW.filter(bool))
def test_of_bytes_the_implicit_prompt_is_the_longest_shared_beginning_in_whole_characters(
    shared: str, chosen: str, rejected: str
) -> None:
    wholes = shared + chosen, shared + rejected
    if wholes[0] == wholes[1]:
        return
    shortest = min(len(whole) for whole in wholes)
    longest = max(n for n in range(shortest) if wholes[0][:n] == wholes[1][:n])
    if not longest:
        with pytest.raises(ft.DataError, match="share no beginning"):
            _read(*wholes)
        return
    pair = _read(*wholes)
    assert BYTES.decode(pair.prompt) == wholes[0][:longest]
    for whole, (ids, labels) in zip(wholes, pair.completions, strict=True):
        assert (*pair.prompt, *ids) == (*whole.encode(), BYTES.end)
        assert labels == ids
        assert len(ids) > 1
        bytes(ids[:-1]).decode()  # raises for a torn character


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@given(shared=WORDS, chosen=WORDS, rejected=WORDS)
def test_an_implicit_prompt_is_tokenised_as_a_model_will_be_asked_with_it(
    kind: str, shared: str, chosen: str, rejected: str
) -> None:
    """Its tokens are those of its text alone, and the whole's tokens are what they were."""
    tokenizer = _trained(kind)
    wholes = f"the {shared} {chosen}", f"the {shared} {rejected}"
    ids = [(*tokenizer.encode(whole), tokenizer.end) for whole in wholes]
    if ids[0] == ids[1]:
        return
    pair = _read(*wholes, tokenizer)
    for whole, (completion, labels) in zip(ids, pair.completions, strict=True):
        assert (*pair.prompt, *completion) == whole
        assert labels == completion
        assert len(completion) > 1
    texts = (wholes[0][:end] for end in range(len(wholes[0])))
    assert pair.prompt in {tuple(tokenizer.encode(text)) for text in texts}
    if kind == "bpe":
        prompt = tokenizer.decode(pair.prompt)
        rests = [whole.removeprefix(prompt) for whole in wholes]
        explicit = {"prompt": prompt, "chosen": rests[0], "rejected": rests[1]}
        assert read_pair(explicit, tokenizer, "record 0") == pair


@pytest.mark.parametrize("kind", ["bytes", "bpe", "unigram"])
def test_an_implicit_prompt_ends_before_the_answers_part(kind: str) -> None:
    tokenizer = BYTES if kind == "bytes" else _trained(kind)
    pair = _read("Is it the class: yes", "Is it the class: no", tokenizer)
    assert tokenizer.decode(pair.prompt).rstrip() == "Is it the class:"
    said = [tokenizer.decode(ids).strip() for ids, _ in pair.completions]
    assert said == ["yes", "no"]


def test_a_token_that_reaches_over_the_boundary_is_not_parted() -> None:
    """The texts begin alike; whatever the tokens are, the prompt ends between two."""
    tokenizer = _trained("bpe")
    pair = _read("the value", "the values", tokenizer)
    whole = tokenizer.encode("the values")
    assert list(pair.prompt) == whole[: len(pair.prompt)]
    assert (*pair.prompt, *pair.completions[0][0][:-1]) == tuple(tokenizer.encode("the value"))


ROLES = ("system", "user", "assistant")
MESSAGES = st.lists(
    st.builds(
        lambda role, content: {"role": role, "content": content},
        st.sampled_from(ROLES),
        st.sampled_from(["x", "y"]),
    ),
    max_size=3,
)
ASSISTANT = {"role": "assistant", "content": "z"}


def _laid_out(messages: list[dict[str, str]]) -> list[int]:
    ids: list[int] = []
    for message in messages:
        end = [BYTES.end] if message["role"] == "assistant" else []
        ids += [*f"{message['role']}: {message['content']}".encode(), *end, *b"\n"]
    return ids


def _speaks(messages: list[dict[str, str]]) -> bool:
    return any(message["role"] == "assistant" for message in messages)


@given(shared=MESSAGES, chosen=MESSAGES, rejected=MESSAGES, ends=st.booleans())
def test_of_messages_the_implicit_prompt_is_the_longest_shared_beginning_in_whole_ones(
    shared: list[Any], chosen: list[Any], rejected: list[Any], ends: bool
) -> None:
    sides = [[*shared, *side, *([ASSISTANT] * ends)] for side in (chosen, rejected)]
    if sides[0] == sides[1] or not all(_speaks(side) for side in sides):
        return
    possible = [
        end
        for end in range(1, min(len(side) for side in sides) + 1)
        if sides[0][:end] == sides[1][:end] and all(_speaks(side[end:]) for side in sides)
    ]
    if not possible:
        with pytest.raises(ft.DataError, match="share no beginning"):
            _read(*sides)
        return
    pair = _read(*sides)
    prompt = sides[0][: max(possible)]
    assert list(pair.prompt) == _laid_out(prompt)
    for side, (ids, _) in zip(sides, pair.completions, strict=True):
        assert [*pair.prompt, *ids] == _laid_out(side)
    rests = [side[len(prompt) :] for side in sides]
    if not any(rest[: len(prompt)] == prompt for rest in rests):  # else refused as said twice
        explicit = {"prompt": prompt, "chosen": rests[0], "rejected": rests[1]}
        assert read_pair(explicit, BYTES, "record 0") == pair


@attrs.frozen
class _Lines:
    """A chat template that has the messages as the lines that they are without one."""

    template: str = "lines"
    end: int = BYTES.end
    vocabulary: int = BYTES.vocabulary

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for n, part in enumerate(text.split("¶")):
            ids += [*([self.end] if n else []), *part.encode()]
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        return self.spell(list(ids))

    def spell(self, ids: Sequence[int]) -> str:
        return "".join("¶" if i == self.end else chr(i) for i in ids)

    def render(
        self, messages: Sequence[Message], *, tools: Any = None, prompt: bool = False
    ) -> str:
        ends = {"assistant": "¶"}
        lines = [f"{m['role']}: {m['content']}{ends.get(m['role'], '')}\n" for m in messages]
        return "".join(lines) + "assistant: " * prompt

    def generated(
        self, messages: Sequence[Message], *, tools: Any = None
    ) -> tuple[list[int], list[int]]:
        raise NotImplementedError


@given(chosen=MESSAGES, rejected=MESSAGES, shared=MESSAGES)
def test_with_a_template_or_without_a_pair_is_read_or_refused_alike(
    chosen: list[Any], rejected: list[Any], shared: list[Any]
) -> None:
    """Also where nobody speaks on a side, or nothing is there: no pair is looked at for ever."""

    def outcome(tokenizer: Any) -> Any:
        try:
            pair = _read([*shared, *chosen], [*shared, *rejected], tokenizer)
        except ft.DataError as error:
            return str(error)
        return [(*pair.prompt, *ids) for ids, _ in pair.completions], [
            [i for i in labels if i != -100] for _, labels in pair.completions
        ]

    found = outcome(_Lines())
    if "renders the prompt otherwise" in found:  # what is asked after the shared part differs
        return
    assert found == outcome(BYTES)
    for side, messages in (("chosen", chosen), ("rejected", rejected)):
        if not _speaks([*shared, *messages]):
            assert found == f"record 0.{side}: no assistant speaks, so there is nothing to learn"
            break


@pytest.mark.parametrize("longer", ["chosen", "rejected"])
def test_a_dialogue_that_the_other_goes_on_with_keeps_what_its_assistant_says(longer: str) -> None:
    asked = [{"role": "user", "content": "x"}]
    sides = {"chosen": [*asked, ASSISTANT], "rejected": [*asked, ASSISTANT]}
    sides[longer] = sides[longer] * 2
    assert list(_read(sides["chosen"], sides["rejected"]).prompt) == _laid_out(asked)


USER = {"role": "user", "content": "x"}
RECORDS: dict[str, tuple[dict[Any, Any], str]] = {
    "nothing shared": (
        {"chosen": "yes", "rejected": "no"},
        "no 'prompt', and chosen and rejected share no beginning that could be it and leaves a "
        r"completion of both; give 'prompt' \(empty for none\)$",
    ),
    "nothing but the first byte of a character": (
        {"chosen": "éa", "rejected": "èa"},
        "no 'prompt'",
    ),
    "nothing left of one": ({"chosen": "a", "rejected": "ab"}, "no 'prompt', and chosen"),
    "no shared message": (
        {"chosen": [USER, ASSISTANT], "rejected": [{**USER, "content": "y"}, ASSISTANT]},
        "no 'prompt', and chosen",
    ),
    "a misspelt prompt": (
        {"promt": "ab", "chosen": "ab", "rejected": "ac"},
        "no 'prompt'; did you mean 'promt'",
    ),
    "an empty side": ({"chosen": "", "rejected": "b"}, r"^record 0.chosen: empty; a completion"),
    "a prompt of nothing": (
        {"prompt": None, "chosen": "a", "rejected": "b"},
        "^record 0.prompt: expected text or messages, got NoneType",
    ),
    "no rejected": ({"chosen": "b"}, "^record 0: no 'rejected'; it has 'chosen'"),
    "nothing": ({}, "^record 0: no 'chosen'; it is empty"),
    "keys that are no text": ({1: "a", "reject": "b", "chosen": "c"}, "did you mean 'reject'"),
    "a text and messages": (
        {"chosen": "a", "rejected": [ASSISTANT]},
        "^record 0: chosen is text, rejected is messages; expected texts, or lists of messages, "
        "alone$",
    ),
    "a prompt beside dialogues that have it": (
        {"prompt": "x", "chosen": [USER, ASSISTANT], "rejected": [USER, ASSISTANT]},
        "prompt is text, chosen is messages, rejected is messages; expected .*; or leave 'prompt' "
        "out where both begin with it$",
    ),
    "a prompt that is in the dialogues again": (
        {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [USER, ASSISTANT]},
        r"^record 0.rejected: begins with the prompt's messages again",
    ),
    "no assistant": (
        {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [{**USER, "content": "y"}]},
        "^record 0.rejected: no assistant speaks, so there is nothing to learn",
    ),
    "an assistant that says nothing": (
        {"chosen": [USER, ASSISTANT], "rejected": [USER, {**ASSISTANT, "content": ""}]},
        r"^record 0.rejected\[1\].content: empty; an assistant's turn",
    ),
    "an unknown role": (
        {"chosen": [USER, ASSISTANT], "rejected": [{**USER, "role": "usr"}]},
        r"^record 0.rejected\[0\].role: 'usr' is unknown; did you mean 'user'",
    ),
    "a message for messages": (
        {"prompt": "a", "chosen": ASSISTANT, "rejected": ASSISTANT},
        "^record 0.chosen: expected text or messages, got dict",
    ),
}


@pytest.mark.parametrize(("record", "message"), RECORDS.values(), ids=RECORDS)
def test_a_bad_pair_is_named(record: dict[Any, Any], message: str) -> None:
    with pytest.raises(ft.DataError, match=message):
        data.preference([record], BYTES, time=16, batch_size=1)


def test_an_id_of_a_prompt_is_not_a_prompt_misspelt() -> None:
    record = {"prompt_id": "7", "chosen": "ab", "rejected": "ac"}
    assert read_pair(record, BYTES, "record 0").prompt == tuple(b"a")
