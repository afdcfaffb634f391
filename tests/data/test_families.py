"""The chat templates of the common families, as TRL has collected them: what of a turn is learnt.

Against each template itself (what it makes of a turn that is the last one) and against TRL's own
training templates.
"""

from __future__ import annotations

import datetime
import functools
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import functrain as ft
from functrain.data import PretrainedTokenizer
from tests.data.test_dialogues import MARKED, tokenizer

# Found and not imported: that would take seconds.
_TRL = importlib.util.find_spec("trl")
if _TRL is None or _TRL.origin is None:
    pytest.skip("trl, whose wheel holds the templates, is not installed", allow_module_level=True)
TEMPLATES = Path(_TRL.origin).parent / "chat_templates"

FAMILIES = [
    "cohere",
    "cohere2",
    "gemma3",
    "gemma4",
    "glm4moe",
    "gptoss",
    "lfm2",
    "lfm2_2_5",
    "llama3",
    "llama3_1",
    "llama3_2",
    "phi3",
    "phi3_5",
    "qwen2_5",
    "qwen3",
    "qwen3_5_nothink",
    "qwen3_5_think",
    "qwen3_6",
    "qwen3_8",
    "qwen3_instruct_2507",
    "qwen3_vl",
]
TOOLS = [
    "gemma4",
    "glm4moe",
    "gptoss",
    "llama3_1",
    "qwen2_5",
    "qwen3",
    "qwen3_5_think",
    "qwen3_8",
    "qwen3_vl",
]
REASONING = [
    "deepseek_r1_distill",
    "deepseekv3",
    "glm4moe",
    "nemotron_3_nano",
    "qwen3",
    "qwen3_5_think",
    "qwen3_6",
]
FORGETFUL = ["gptoss", "phi3", "phi3_5", "qwen3", "qwen3_5_nothink", "qwen3_5_think", "qwen3_6"]
"""Those that render a turn otherwise once more follows, if only its end."""

ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "adds",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer", "description": "a number"}},
            "required": ["a"],
        },
    },
}


ENDS = {"gptoss": "<|return|>", "phi3": "<|im_end|>", "phi3_5": "<|im_end|>"}
"""What the last turn alone ends by."""
OPENS = {"glm4moe": "<|user|>"}
"""What opens the user's next turn, where that is all that a turn ends by."""


@functools.cache
def of(family: str, **options: Any) -> PretrainedTokenizer:
    """A tokenizer with the template of a family."""
    made = tokenizer((TEMPLATES / f"{family}.jinja").read_text(encoding="utf-8"))
    made.inner.bos_token = "<s>"
    return PretrainedTokenizer(made.inner, template_options=options)


def says(*texts: str) -> list[dict[str, Any]]:
    roles = ("user", "assistant")
    return [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]


def called() -> list[dict[str, Any]]:
    """A dialogue in which the assistant calls a tool."""
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    return [
        {"role": "user", "content": "What is it?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "add", "content": "6"},
        {"role": "assistant", "content": "It is six."},
    ]


def thought(key: str = "reasoning_content") -> list[dict[str, Any]]:
    """A dialogue whose assistant thinks, under a key of its own."""
    messages = says("a?", "bb", "c?", "dd")
    for n, text in ((1, "rr one"), (3, "rr two")):
        messages[n][key] = text
    return messages


def read(given: PretrainedTokenizer, record: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The whole row as text, and each stretch of it that is learnt."""
    source = ft.data.chat([record], given, time=4096, batch_size=1)
    ids, labels = source.examples[0]
    stretches: list[list[int]] = []
    for n, label in enumerate(labels):
        if label != -100 and (n == 0 or labels[n - 1] == -100):
            stretches.append([])
        if label != -100:
            stretches[-1].append(label)
    return given.spell(ids), [given.spell(each) for each in stretches]


def alone(given: PretrainedTokenizer, messages: Sequence[Any], n: int, tools: Any = None) -> str:
    """What the template adds for a turn that is the last: what a model is asked to say there."""
    before = given.render(messages[:n], tools=tools, prompt=True)
    after = given.render(messages[: n + 1], tools=tools)
    assert after.startswith(before)
    return after[len(before) :].rstrip()


SAID = st.text("abc .?", min_size=1, max_size=8).map(lambda text: f"x{text}y")
TURNS = st.lists(st.tuples(SAID, SAID), min_size=1, max_size=3).map(lambda pairs: sum(pairs, ()))


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=settings.default.max_examples // 2)
@given(turns=TURNS)
def test_each_turn_is_learnt_as_the_template_has_it_say_it(
    family: str, turns: tuple[str, ...]
) -> None:
    """Whatever the template makes of it once more follows; the last turn with its end."""
    model = of(family)
    messages = says(*turns)
    row, learnt = read(model, {"messages": messages})
    expected = [
        alone(model, messages, n) + OPENS.get(family, "") for n in range(1, len(messages), 2)
    ]
    learnt = [text.rstrip() for text in learnt]  # a template's own marks may hold a line break
    assert learnt[-1] == expected[-1]
    for one, other in zip(learnt, expected, strict=True):
        # By what only the last turn ends no earlier one goes on, so there it is not learnt.
        rest = other.removeprefix(one)
        assert rest == "" or (family in ENDS and rest.strip() == ENDS[family])
    if family not in FORGETFUL:
        assert row == model.render(messages) + OPENS.get(family, "")
    assert row.startswith(model.render(messages[:1], prompt=True))
    assert all(text in row for text in turns)


@pytest.mark.parametrize("family", FORGETFUL)
def test_these_render_the_past_otherwise(family: str) -> None:
    """Else the test above would try less than it says."""
    model, messages = of(family), says("a?", "bb", "c?", "dd")
    first = model.render(messages[:2])
    assert not model.render(messages).startswith(first)


@pytest.mark.parametrize("family", REASONING)
def test_reasoning_is_learnt_in_every_turn(family: str) -> None:
    """The templates take it out of earlier turns, and some of the prompt's beginning of it too."""
    model = of(family)
    one, other = "<think>\nhm\n</think>\n\nA thing.", "<think>\nwell\n</think>\n\nAnother."
    messages = says("What is it?", one, "And?", other)
    _, learnt = read(model, {"messages": messages})
    assert len(learnt) == 2
    for text, thought, answer in zip(learnt, ("hm", "well"), ("A thing.", "Another."), strict=True):
        assert thought in text
        assert text.index(thought) < text.index("</think>") < text.index(answer)
    asked = model.render(messages[:1], prompt=True)
    assert ("<think>" in learnt[0]) != asked.rstrip().endswith("<think>")


@pytest.mark.parametrize("family", ["qwen3", "glm4moe", "glm4moe_training", "qwen3_5_think"])
def test_reasoning_under_a_key_is_what_it_is_in_the_content(family: str) -> None:
    """Neither spelling teaches to leave it out, also where the template marks what is said."""
    inline = thought()
    for each in inline:
        if text := each.pop("reasoning_content", ""):
            each["content"] = f"<think>\n{text}\n</think>\n\n{each['content']}"
    row, learnt = read(of(family), {"messages": thought()})
    assert (row, learnt) == read(of(family), {"messages": inline})
    assert ["rr one" in learnt[0], "rr two" in learnt[1]] == [True, True]


@pytest.mark.parametrize("family", ["qwen3", "glm4moe", "qwen3_5_think"])
def test_what_is_not_learnt_stands_as_the_model_is_asked_with_it(family: str) -> None:
    """Without its reasoning, as the template has the past: in pairs, and by weights."""
    model = of(family)
    past = says("a?", "<think>\nrr\n</think>\n\nbb", "c?")
    asked = model.render(past, prompt=True)
    assert "rr" not in asked
    pair = {"prompt": past, "chosen": says("", "good")[1:], "rejected": says("", "bad")[1:]}
    source = ft.data.preference([pair], model, time=4096, batch_size=1)
    for ids, labels in source.examples[0]:
        begin = next(n for n, label in enumerate(labels) if label != -100)
        assert model.spell(ids[:begin]) == asked
    weighed = [*past, *says("", "dd")[1:]]
    weighed[1] = {**weighed[1], "weight": 0}
    row, learnt = read(model, {"messages": weighed})
    assert row.startswith(asked)
    assert len(learnt) == 1


@pytest.mark.parametrize("family", TOOLS)
def test_calls_of_tools_are_learnt_and_their_answers_are_not(family: str) -> None:
    model, messages = of(family), called()
    _, learnt = read(model, {"messages": messages, "tools": [ADD]})
    whole = "\n".join(learnt)
    assert "add" in learnt[0]
    assert "It is six." in learnt[-1]
    if family == "glm4moe":
        _, mere = read(model, {"messages": messages[:2], "tools": [ADD]})
        assert mere == learnt[:1]
        assert [text.rsplit("<", 1)[1] for text in learnt] == ["|observation|>", "|user|>"]
        return
    assert "What is it?" not in whole
    if family != "gemma4":  # one turn there, in which the answer of the tool stands apart
        assert learnt[-1] == alone(model, messages, 3, [ADD])


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize(
    "family", ["gptoss", "qwen3", "qwen3_5_nothink", "qwen3_5_think", "qwen3_6"]
)
def test_a_mere_call_is_what_the_template_has_it_be(family: str, thinking: bool) -> None:
    """Also where another turn follows, so that the template renders the call otherwise or not."""
    model, messages = of(family, enable_thinking=thinking), [*called(), *says("And?", "No more.")]
    if "<think>" in model.render(messages[:1], prompt=True)[-12:]:  # then it is to begin so
        messages[1]["content"] = messages[3]["content"] = "<think>\nhm\n</think>\n\n"
        messages[3]["content"] += "It is six."
    row, _ = read(model, {"messages": messages, "tools": [ADD]})
    assert row.startswith(model.render(messages[:2], tools=[ADD]).rstrip())


@pytest.mark.parametrize("family", ["qwen3", "phi3", "phi3_5", "qwen2_5", "llama3", "qwen3_vl"])
@given(turns=TURNS)
def test_the_same_as_trls_training_templates(family: str, turns: tuple[str, ...]) -> None:
    """Row and mask, but for line breaks around a turn, which no model is to say."""
    ours, theirs = of(family), of(f"{family}_training")
    messages = says(*turns)
    row, learnt = read(ours, {"messages": messages})
    their_row, their_learnt = read(theirs, {"messages": messages})
    assert row == their_row
    assert learnt == [text.strip() for text in their_learnt]


@pytest.mark.parametrize(
    ("family", "messages", "why"),
    [
        ("deepseek_r1_distill", says("a?", "b"), r"messages\[1\].*go on from.*<think>"),
        ("nemotron_3_nano", says("a?", "b"), r"messages\[1\].*enable_thinking"),
        ("nemotron_3_nano", says("a?", "\nb"), r"messages\[1\].*enable_thinking"),
        ("qwen3_5_nothink", says("a?", "<think>\nhm\n</think>\n\nb"), r"messages\[1\]"),
        ("deepseekv3", called(), "chat template: refuses the messages: can only concatenate"),
        ("smolvlm", says("a?", "b"), r"messages\[0\]: the chat template leaves out"),
        (
            "qwen3",
            says("a?", "</think> is it"),
            r"messages\[1\]: the chat template leaves",
        ),
        ("lfm2", called(), r"messages\[1\]\.tool_calls: the chat template has no place"),
        ("llama3", called(), r"messages\[1\]\.tool_calls: the chat template has no place"),
        ("qwen2_5", thought(), r"messages\[1\]\.reasoning_content: the chat template has no place"),
        ("gemma3", thought("thinking"), r"messages\[1\]\.thinking: the chat template has no place"),
        ("qwen2_5", [*thought(), *says("")], r"record 0\.messages\[1\]\.reasoning_content"),
    ],
)
def test_what_cannot_be_told_is_refused(
    family: str, messages: list[dict[str, Any]], why: str
) -> None:
    with pytest.raises(ft.DataError, match=why):
        read(of(family), {"messages": messages})


def test_a_template_is_given_options() -> None:
    """Without reasoning nemotron's prompt is what the turn begins with."""
    model, messages = of("nemotron_3_nano", enable_thinking=False), says("a?", "bb", "c?", "dd")
    _, learnt = read(model, {"messages": messages})
    assert learnt == ["bb<|im_end|>", "dd<|im_end|>"]


@pytest.mark.parametrize("family", ["llama3_2", "gptoss", "muse_glimmer"])
def test_the_day_is_the_one_that_is_given(family: str) -> None:
    """Else what a run reads would be other data when it is resumed on the next day."""
    model = attrs.evolve(of(family), today=datetime.date(1999, 12, 31))
    for text in (
        model.render(says("a?"), prompt=True),
        read(model, {"messages": says("a", "b")})[0],
    ):
        assert "1999" in text
        assert datetime.date.today().isoformat() not in text


def test_a_day_in_a_form_that_is_made_is_refused() -> None:
    made = tokenizer("{{ strftime_now('%Y' ~ '-%m') }}")
    with pytest.raises(ft.DataError, match="asks for the day in a form that is not a text"):
        attrs.evolve(made, today=datetime.date(1999, 12, 31)).render(says("a?"))


def test_marks_are_read_from_the_template_that_is_told() -> None:
    """Also where `{% generation %}` shows what is learnt."""
    made = tokenizer("{% if enable_thinking %}(on){% endif %}{{ strftime_now('%Y') }}" + MARKED)
    options = {"template_options": {"enable_thinking": True}, "today": datetime.date(1999, 1, 1)}
    row, learnt = read(attrs.evolve(made, **options), {"messages": says("a?", "b")})
    assert row.startswith("(on)1999<|im_start|>")
    assert learnt == ["b<|im_end|>"]
