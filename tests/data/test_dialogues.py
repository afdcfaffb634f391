"""Dialogues in a tokenizer's template: exactly what the assistant says is learnt, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

import functrain as ft
from functrain import data
from functrain.cli import main
from functrain.data import PretrainedTokenizer
from functrain.data.pretrained import pretrained_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}\n"
    "{% else %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOLED = (
    "{% if tools %}<|im_start|>tools\n{% for t in tools %}{{ t['name'] }} {% endfor %}<|im_end|>\n"
    "{% endif %}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "{% for c in m.get('tool_calls') or [] %}CALL {{ c['name'] }}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As some families do: what the assistant thought is left out of all but the last turn.
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}(thinking){% endif %}{{ m['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As some families do: a line break stands between content and calls; the last turn ends otherwise.
CALLING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "{% for c in m.get('tool_calls') or [] %}{{ '\n' if m['content'] }}CALL {{ c['name'] }}"
    "{% endfor %}<|im_{{ 'stop' if loop.last and m['role'] == 'assistant' else 'end' }}|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As some families do: what opens the next turn is all that a turn ends by.
ENDLESS = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'].replace('</think>', '</think>\n') }}"
    "{% for c in m.get('tool_calls') or [] %}<call>{{ c['name'] }}</call>{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
NO_SYSTEM = CHATML.replace(
    "{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}"
)


def tokenizer(template: str | None = CHATML) -> PretrainedTokenizer:
    """A byte-level BPE of transformers with merges across words, and ChatML's special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {each: n for n, each in enumerate(alphabet)}
    merges = [("Ċ", "Ċ"), ("h", "e"), ("he", "l"), ("Ġ", "t")]
    for one, other in merges:
        vocabulary[one + other] = len(vocabulary)
    inner = Tokenizer(models.BPE(vocabulary, merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(t) for t in ("<|im_start|>", "<|im_end|>")])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>")
    fast.chat_template = template
    return PretrainedTokenizer(fast)


def said(*turns: str, **more: Any) -> dict[str, Any]:
    """A record of messages whose speakers take turns, the user first."""
    roles = ("user", "assistant")
    messages = [{"role": roles[n % 2], "content": text} for n, text in enumerate(turns)]
    return {"messages": messages, **more}


def read(record: Any, template: str | None = CHATML, **options: Any) -> Any:
    given = tokenizer(template)
    return ft.data.chat([record], given, time=512, batch_size=1, **options).examples[0]


def trained(record: Any, template: str | None = CHATML) -> list[str]:
    """Each stretch that is learnt, as text."""
    spell = tokenizer(template).spell
    ids, labels = read(record, template)
    found: list[list[int]] = []
    for n, (i, label) in enumerate(zip(ids, labels, strict=True)):
        if label == -100:
            continue
        assert label == i
        if n and labels[n - 1] != -100:
            found[-1].append(i)
        else:
            found.append([i])
    return [spell(each) for each in found]


NO = {"content": "no"}
TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1).filter(
    lambda text: text.strip() == text and "<" not in text
)


@pytest.mark.parametrize("template", [CHATML, MARKED])
@given(turns=st.lists(TEXTS, min_size=2, max_size=7))
def test_what_the_assistant_says_is_learnt_and_nothing_else(
    template: str, turns: list[str]
) -> None:
    """By prefix difference and by `{% generation %}` alike; the ids are those of the whole text."""
    record = said(*turns)
    given = tokenizer(template)
    ids, _ = read(record, template)
    assert given.spell(ids) == given.render(record["messages"])
    assert list(ids) == given.encode(given.render(record["messages"]))
    assert trained(record, template) == [f"{text}<|im_end|>" for text in turns[1::2]]


def test_a_completion_begins_where_a_model_would_go_on() -> None:
    """A line break at its start is not one token with the line break before it."""
    given = tokenizer()
    ids, labels = read(said("a", "\nb"))
    begin = next(n for n, label in enumerate(labels) if label != -100)
    asked = given.render([{"role": "user", "content": "a"}], prompt=True)
    assert list(ids[:begin]) == given.encode(asked)
    assert given.spell(ids[begin:]) == "\nb<|im_end|>\n"


@pytest.mark.parametrize("template", [CHATML, MARKED, None])
def test_a_message_of_weight_0_is_not_learnt(template: str | None) -> None:
    record = said("a", "b", "c", "d")
    record["messages"][1]["weight"] = 0
    record["messages"][3]["weight"] = 1
    if template is None:
        ids, labels = ft.data.chat(
            [record], ft.data.ByteTokenizer(), time=99, batch_size=1
        ).examples[0]
        assert [i for i in labels if i != -100] == [ord("d"), 256]
        assert bytes(i for i in ids if i < 256) == b"user: a\nassistant: b\nuser: c\nassistant: d\n"
    else:
        assert trained(record, template) == ["d<|im_end|>"]


@pytest.mark.parametrize("template", [CHATML, MARKED, None])
def test_a_last_message_of_weight_0_is_not_learnt(template: str | None) -> None:
    """Also what comes after the first message that is."""
    record = said("a", "b", "c", "d")
    record["messages"][3]["weight"] = 0
    given: Any = ft.data.ByteTokenizer() if template is None else tokenizer(template)
    _, labels = ft.data.chat([record], given, time=512, batch_size=1).examples[0]
    assert given.decode([i for i in labels if i != -100]) == "b"


@pytest.mark.parametrize("template", [CHATML, MARKED, None])
def test_a_weight_means_the_same_in_every_form(template: str | None) -> None:
    """As `prompt` and `completion`, as a pair's sides, and as ShareGPT has them."""
    turns = said("a", "b", "c", "d")["messages"]
    turns[1]["weight"] = 0
    given: Any = ft.data.ByteTokenizer() if template is None else tokenizer(template)
    options: dict[str, Any] = {"time": 512, "batch_size": 1}
    names = {"user": "human", "assistant": "gpt"}
    shared = [
        {**{k: v for k, v in each.items() if k == "weight"}, "from": names[each["role"]]}
        | {"value": each["content"]}
        for each in turns
    ]
    whole, *others = (
        ft.data.chat([each], given, **options).examples[0]
        for each in (
            {"messages": turns},
            {"prompt": turns[:1], "completion": turns[1:]},
            {"conversations": shared},
        )
    )
    assert others == [whole] * 2
    assert given.decode([i for i in whole[1] if i != -100]) == "d"
    pair = {"prompt": turns[:1], "chosen": turns[1:], "rejected": [*turns[1:3], turns[3] | NO]}
    for record in (pair, {side: [turns[0], *pair[side]] for side in ("chosen", "rejected")}):
        chosen, rejected = ft.data.preference([record], given, **options).examples[0]
        assert chosen == whole
        assert given.decode([i for i in rejected[1] if i != -100]) == "no"
    for weight in (0, "1", 2):
        bad = {"prompt": turns[:1], "completion": [{**turns[3], "weight": weight}]}
        with pytest.raises(ft.DataError, match=r"completion(\[0\]\.weight: .*expected 0|: every)"):
            ft.data.chat([bad], given, **options)


def test_the_shapes_are_one_dialogue() -> None:
    expected = read(said("Add\n\n1 2", "3"))
    turns = [{"from": "human", "value": "Add\n\n1 2"}, {"from": "gpt", "value": "3"}]
    assert read({"conversations": turns}) == expected
    assert read({"instruction": "Add", "input": "1 2", "output": "3"}) == expected
    assert read({"instruction": "Add\n\n1 2", "input": "", "output": "3"}) == expected
    messages = said("Add\n\n1 2", "3")["messages"]
    assert read({"prompt": messages[:1], "completion": messages[1:]}) == expected
    system = {"role": "system", "content": "Short."}
    whole = {"messages": [system, *messages]}
    assert read({"conversations": turns, "system": "Short."}) == read(whole)
    assert read({"instruction": "Add\n\n1 2", "output": "3", "system": "Short."}) == read(whole)


def test_preferences_are_laid_out_by_the_template() -> None:
    given = tokenizer()
    turns = said("a", "b", "c", "good")["messages"]
    bad = [*turns[:3], {"role": "assistant", "content": "bad"}]
    explicit = {"prompt": turns[:3], "chosen": turns[3:], "rejected": bad[3:]}
    implicit = {"chosen": turns, "rejected": bad}
    found = [
        ft.data.preference([each], given, time=99, batch_size=1).examples[0]
        for each in (explicit, implicit)
    ]
    assert found[0] == found[1]
    for (ids, labels), text in zip(found[0], ("good", "bad"), strict=True):
        begin = next(n for n, label in enumerate(labels) if label != -100)
        assert given.spell(ids[:begin]) == given.render(turns[:3], prompt=True)
        assert given.spell([i for i in labels if i != -100]) == f"{text}<|im_end|>"
    other = said("z", "b", "c", "bad")["messages"]
    with pytest.raises(ft.DataError, match="share no beginning that could be it"):
        ft.data.preference([{"chosen": turns, "rejected": other}], given, time=99, batch_size=1)


def test_tools_and_their_calls_are_in_the_template() -> None:
    tools = [{"name": "clock"}]
    messages = [
        {"role": "user", "content": "time?"},
        {"role": "assistant", "tool_calls": [{"name": "clock"}]},
        {"role": "tool", "content": "9:00"},
        {"role": "assistant", "content": "Nine."},
    ]
    record = {"messages": messages, "tools": tools}
    assert trained(record, TOOLED) == ["CALL clock<|im_end|>", "Nine.<|im_end|>"]
    assert read({**record, "tools": json.dumps(tools)}, TOOLED) == read(record, TOOLED)
    spelt = {**messages[1], "tool_calls": json.dumps([{"name": "clock"}])}
    spelt = {**record, "messages": [messages[0], spelt, *messages[2:]]}
    assert read(spelt, TOOLED) == read(record, TOOLED)
    with pytest.raises(ft.DataError, match=r"tools: the chat template has no place for them"):
        read(said("a", "b", tools=tools))
    with pytest.raises(ft.DataError, match="the tokenizer has no chat template"):
        ft.data.chat([record], ft.data.ByteTokenizer(), time=99, batch_size=1)


CALLED = [
    {"role": "user", "content": "time?"},
    {"role": "assistant", "content": None, "tool_calls": [{"name": "clock"}]},
    {"role": "tool", "content": "9:00"},
    {"role": "assistant", "content": "Nine."},
]


def calling(count: int) -> list[dict[str, Any]]:
    """So many calls with arguments, each with its answer."""
    return [
        message
        for n in range(count)
        for message in (
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"name": "add", "arguments": {"a": n}}],
            },
            {"role": "tool", "content": f"{n}"},
        )
    ]


TOOLED_ARGUMENTS, CALLING_ARGUMENTS = (
    each.replace("{{ c['name'] }}", "{{ c['name'] }}{{ c['arguments'] }}")
    for each in (TOOLED, CALLING)
)
MARKED_ARGUMENTS = MARKED.replace("<|im_end|>{% endg", "{{ m.tool_calls }}<|im_end|>{% endg")


def test_a_turn_that_is_a_mere_call_stands_as_the_template_has_it() -> None:
    """Where each turn stands as it is when it is the last: without what parts content and call."""
    given = tokenizer(CALLING)
    messages = [*CALLED, *said("And now?", "Ten.")["messages"]]
    ids, _ = read({"messages": messages}, CALLING)
    asked = given.render(messages[:1], prompt=True)
    assert given.spell(ids).startswith(f"{asked}CALL clock<|im_end|>\n<|im_start|>tool\n9:00")
    assert trained({"messages": messages}, CALLING) == ["CALL clock", "Nine.", "Ten.<|im_stop|>"]
    spoken = [messages[0], {**messages[1], "content": "I look."}, *messages[2:]]
    assert trained({"messages": spoken}, CALLING)[0] == "I look.\nCALL clock"


@pytest.mark.parametrize(
    ("template", "for_each"), [(TOOLED_ARGUMENTS, 2), (MARKED_ARGUMENTS, 0), (CALLING_ARGUMENTS, 4)]
)
def test_a_dialogue_of_many_calls_is_rendered_a_few_times_for_each(
    template: str, for_each: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By how much a call more is rendered more often; each time is one of the whole before it."""
    counted: list[int] = []
    render = PretrainedTokenizer.render

    def counting(self: PretrainedTokenizer, *given: Any, **options: Any) -> str:
        counted.append(1)
        return render(self, *given, **options)

    monkeypatch.setattr(PretrainedTokenizer, "render", counting)
    times = []
    for calls in (3, 8):
        counted.clear()
        read({"messages": [CALLED[0], *calling(calls), CALLED[3]]}, template)
        times.append(len(counted))
    assert times[1] - times[0] == 5 * for_each


def test_a_call_that_the_template_leaves_out_is_refused_among_others() -> None:
    """It has a place for calls, but none beside content; and the answers name the tool."""
    named = "{{ messages[loop.index0 - 1].tool_calls[0].name if m['role'] == 'tool' }}"
    template = TOOLED_ARGUMENTS.replace("or [] %}", "or [] if not m['content'] %}")
    template = template.replace("{{ m['content'] }}", named + "{{ m['content'] }}", 1)
    messages = [CALLED[0], *calling(3), CALLED[3]]
    messages[3] = {**messages[3], "content": "Again."}
    with pytest.raises(ft.DataError, match=r"messages\[3\]\.tool_calls: the chat template has no"):
        read({"messages": messages}, template)


def test_a_mere_call_that_is_parted_otherwise_in_the_past_is_refused() -> None:
    parted = CALLING.replace("{{ '\n' if", "{{ ('\n' if m == messages[-1] else ' ') if")
    messages = [*CALLED, *said("And now?", "Ten.")["messages"]]
    with pytest.raises(ft.DataError, match=r"messages\[1\]: the chat template does not show where"):
        read({"messages": messages}, parted)


@pytest.mark.parametrize(
    ("turns", "learnt"),
    [
        (said("a", "b")["messages"], ["b<|user|>"]),
        (said("a", "<think>t</think>b")["messages"], ["<think>t</think>\nb<|user|>"]),
        (CALLED[:2], ["<call>clock</call><|tool|>"]),
        (CALLED, ["<call>clock</call><|tool|>", "Nine.<|user|>"]),
        ([*said("a", "b")["messages"], *CALLED[:2]], ["b<|user|>", "<call>clock</call><|tool|>"]),
    ],
)
def test_what_opens_the_next_turn_is_learnt_where_none_ends_by_itself(
    turns: list[Any], learnt: list[str]
) -> None:
    """That of the tool after a call, also where what is said is not its content to the letter."""
    assert trained({"messages": turns}, ENDLESS) == learnt


def test_tools_are_in_the_template_in_every_form() -> None:
    given, tools = tokenizer(TOOLED), [{"name": "clock"}]
    options: dict[str, Any] = {"time": 512, "batch_size": 1}
    whole = read({"messages": CALLED, "tools": tools}, TOOLED)
    for at in (1, 3):
        record = {"prompt": CALLED[:at], "completion": CALLED[at:], "tools": tools}
        ids, labels = read(record, TOOLED)
        assert ids == whole[0]
        assert given.spell([i for i in labels if i != -100]).endswith("Nine.<|im_end|>")
        assert ("CALL" in given.spell([i for i in labels if i != -100])) == (at == 1)
    bad = [*CALLED[:3], {"role": "assistant", "content": "Ten."}]
    explicit = {"prompt": CALLED[:3], "chosen": CALLED[3:], "rejected": bad[3:], "tools": tools}
    implicit = {"chosen": CALLED, "rejected": bad, "tools": tools}
    one, other = (
        ft.data.preference([each], given, **options).examples[0] for each in (explicit, implicit)
    )
    assert one == other
    assert given.spell(one[0][0]) == given.render(CALLED, tools=tools)
    asked = {"instruction": "time?", "output": "Nine.", "tools": tools}
    assert given.spell(read(asked, TOOLED)[0]).startswith("<|im_start|>tools\nclock")


def test_messages_that_call_otherwise_are_no_shared_prompt() -> None:
    """The same content, and another call: each side learns its own."""
    sides = [
        [*CALLED[:1], {**CALLED[1], "tool_calls": [{"name": name}]}, *CALLED[2:]]
        for name in ("clock", "calendar")
    ]
    given = tokenizer(TOOLED)
    pair = {"chosen": sides[0], "rejected": sides[1]}
    for side, (ids, labels) in zip(
        sides, ft.data.preference([pair], given, time=512, batch_size=1).examples[0], strict=True
    ):
        assert given.spell(ids) == given.render(side)
        learnt = given.spell([i for i in labels if i != -100])
        assert learnt.startswith(f"CALL {side[1]['tool_calls'][0]['name']}")  # type: ignore[index]
    dated = [[{**each, "id": n} for each in CALLED[:3]] + CALLED[3:] for n in (0, 1)]
    dated[1][3] = {"role": "assistant", "content": "Ten."}
    pair = {"chosen": dated[0], "rejected": dated[1]}
    (_, labels), _ = ft.data.preference([pair], given, time=512, batch_size=1).examples[0]
    assert given.spell([i for i in labels if i != -100]) == "Nine.<|im_end|>"


ASKED = [{"role": "user", "content": "q"}]
SPOKEN = {"role": "assistant", "content": "a"}
CALL, THOUGHT = {"tool_calls": [{"name": "clock"}]}, {"reasoning_content": "because"}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": [*ASKED, SPOKEN | CALL]}, "^record 0: tools"),
        ({"messages": [*ASKED, SPOKEN], "tools": [{"name": "f"}]}, "^record 0: tools"),
        ({"messages": [*ASKED, SPOKEN | THOUGHT]}, r"^record 0\.messages\[1\]\.reasoning_content"),
        (
            {"messages": [{"role": "developer", "content": "x"}, SPOKEN]},
            r"\[0\]\.role: 'developer'",
        ),
        ({"prompt": ASKED, "completion": [SPOKEN | CALL]}, "^record 0: tools"),
        ({"prompt": CALLED[:3], "completion": [SPOKEN]}, "^record 0: tools"),
        (
            {"prompt": ASKED, "completion": [SPOKEN], "tools": '[{"name": "f"}]'},
            "^record 0: tools",
        ),
        (
            {"prompt": ASKED, "completion": [SPOKEN | THOUGHT]},
            r"^record 0\.completion\[0\]\.reasoning_content: the tokenizer has no chat template",
        ),
        ({"prompt": ASKED, "chosen": [SPOKEN | CALL], "rejected": [SPOKEN]}, "^record 0: tools"),
        (
            {"chosen": [*ASKED, SPOKEN | THOUGHT], "rejected": [*ASKED, SPOKEN]},
            r"^record 0\.chosen\[1\]\.reasoning_content",
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "q"},
                    {"from": "function_response", "value": "42"},
                    {"from": "gpt", "value": "a"},
                ]
            },
            "^record 0: tools",
        ),
        (
            {
                "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
                "tools": '[{"name": "f"}]',
            },
            "^record 0: tools",
        ),
        ({"instruction": "q", "output": "a", "tools": [{"name": "f"}]}, "^record 0: tools"),
    ],
)
def test_what_lines_have_no_place_for_is_refused_in_every_form(record: Any, message: str) -> None:
    read: Any = ft.data.preference if "chosen" in record else ft.data.chat
    with pytest.raises(ft.DataError, match=message):
        read([record], ft.data.ByteTokenizer(), time=99, batch_size=1)


def test_a_turn_is_learnt_as_it_is_when_it_is_the_last() -> None:
    """The template takes what the assistant thought out of all but the last turn."""
    record = said("a", "b", "c", "d")
    assert trained(record, FORGETFUL) == ["(thinking)b<|im_end|>", "(thinking)d<|im_end|>"]
    ids, _ = read(record, FORGETFUL)
    assert "(thinking)b<|im_end|>\n<|im_start|>user\nc" in tokenizer().spell(ids)
    record["messages"][1]["weight"] = 0
    assert trained(record, FORGETFUL) == ["(thinking)d<|im_end|>"]


def _changed(number: int, **changes: Any) -> dict[str, Any]:
    record = said("a", "b", "c", "d")
    record["messages"][number] = {**record["messages"][number], **changes}
    return record


@pytest.mark.parametrize(
    ("record", "template", "message"),
    [
        (
            said("ab", "bcd"),
            CHATML.replace("m['content']", "m['content'][::-1]"),
            r"messages\[0\]: .* changes it",
        ),
        (
            said("a", "b", "cc", "d"),
            FORGETFUL.replace("m['content'] }}", "m['content'] if m['content'] != 'cc' }}"),
            r"messages\[2\]: the chat template leaves out",
        ),
        (
            said("a", "b", "c", "d"),
            FORGETFUL.replace("m['content'] }}", "m['content'][:9] }}"),
            r"messages\[1\]: the chat template does not show where this turn ends",
        ),
        (
            {"messages": [{"role": "system", "content": "Be good"}, *said("a", "b")["messages"]]},
            NO_SYSTEM,
            r"messages\[0\]: the chat template leaves out",
        ),
        (
            {
                "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
                "system": "Be good",
            },
            NO_SYSTEM,
            r"^record 0\.system: the chat template leaves out",
        ),
        (
            {"conversations": [{"from": "human", "value": "cd"}, {"from": "gpt", "value": "a"}]},
            CHATML.replace("m['content']", "m['content'][::-1]"),
            r"^record 0\.conversations\[0\]: .* changes it",
        ),
        (
            {"instruction": "cd", "output": "a"},
            CHATML.replace("m['content']", "m['content'][::-1]"),
            r"^record 0\.instruction: .* changes it",
        ),
        (
            {"prompt": said("a", "b", "cd")["messages"], "completion": [SPOKEN]},
            FORGETFUL.replace("m['content'] }}", "m['content'] if m['content'] != 'cd' }}"),
            r"^record 0\.prompt\[2\]: the chat template leaves out",
        ),
        (
            {"prompt": said("a", "b", "c")["messages"], "completion": [SPOKEN | THOUGHT]},
            CHATML,
            r"^record 0\.completion\[0\]\.reasoning_content: the chat template has no place",
        ),
        (
            {"prompt": said("a")["messages"], "completion": [SPOKEN], "tools": [{"name": "clock"}]},
            CHATML,
            r"^record 0\.tools: the chat template has no place for them",
        ),
        (
            said("a", "b"),
            MARKED.replace("generation %}{{", "generation %}{# {{").replace(
                "<|im_end|>{% end", "#}{% end"
            ),
            "messages.*leaves out|marks no token",
        ),
        (
            said("a", "b"),
            CHATML.replace("{{ m['role'] }}", "{{ raise_exception('no') }}"),
            "refuses",
        ),
        (said("a"), CHATML, "no assistant speaks"),
        (_changed(1, weight=0.5), CHATML, r"messages\[1\]\.weight: 0.5, expected 0"),
        (_changed(1, weight="1"), CHATML, r"weight: '1', expected 0"),
        (_changed(1, role="asistant"), CHATML, r"role: 'asistant' is unknown; did you mean 'ass"),
        (_changed(1, content=3), CHATML, r"messages\[1\]\.content: expected text, got int"),
        (_changed(1, content=""), CHATML, r"messages\[1\]\.content: empty"),
        (_changed(1, tool_calls=3), CHATML, r"messages\[1\]\.tool_calls: expected a list of obj"),
        (_changed(1, tool_calls=["f"]), CHATML, r"\]\.tool_calls: expected a list of objects$"),
        (_changed(1, tool_calls='["f"]'), CHATML, r"\]\.tool_calls: expected a list of objects$"),
        (_changed(1, tool_calls="f()"), CHATML, r"\]\.tool_calls: text that is not JSON"),
        ({"messages": [3]}, CHATML, r"messages\[0\]: expected role and content, got int"),
        ({"messages": [{"content": "a"}]}, CHATML, r"messages\[0\]: no 'role'"),
        ({"messages": [{"role": "user"}]}, CHATML, r"messages\[0\]: no 'content'"),
        ({"messages": "a"}, CHATML, "messages: expected a list"),
        ({"messages": []}, CHATML, "messages: expected a list"),
        (said("a", "b", conversations=[]), CHATML, "messages and conversations; give one form"),
        (said("a", "b", tools="{"), CHATML, "tools: text that is not JSON"),
        (said("a", "b", tools=[3]), CHATML, "tools: expected a list of objects"),
        ({"conversations": [{"from": "humna", "value": "a"}]}, CHATML, "did you mean 'human'"),
        ({"conversations": [{"value": "a"}]}, CHATML, "expected an object with 'from' and 'value'"),
        (
            {"conversations": [{"from": "gpt", "value": ""}]},
            CHATML,
            r"conversations\[0\]\.value: empty",
        ),
        (
            {"conversations": [{"from": "human", "value": 3}]},
            CHATML,
            r"conversations\[0\]\.value: expected text, got int",
        ),
        (
            {"messages": said("a", "b")["messages"][1:]},
            CHATML,
            r"\.messages\[0\]: the assistant speaks first, .* begin with the user$",
        ),
        (
            {
                "prompt": [],
                **dict.fromkeys(("chosen", "completion"), said("a", "b")["messages"][1:]),
            },
            CHATML,
            r"record 0\.completion\[0\]: the assistant speaks first",
        ),
        ({"instruction": "", "output": "b"}, CHATML, "instruction: empty, expected text"),
        ({"instruction": "a", "output": 3}, CHATML, "output: expected text, got int"),
        ({"instruction": "a", "input": 0, "output": "b"}, CHATML, "input: expected text, got int"),
        ({"instruction": "a", "input": [], "output": "b"}, CHATML, "input: expected text, got li"),
        (
            {
                "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
                "system": ["Be good"],
            },
            CHATML,
            "system: expected text, got list",
        ),
        (
            {"prompt": said("a")["messages"], "completion": said("a")["messages"]},
            CHATML,
            r"completion: begins with the prompt's messages again",
        ),
    ],
)
def test_what_cannot_be_told_is_refused(record: Any, template: str, message: str) -> None:
    with pytest.raises(ft.DataError, match=message) as caught:
        read(record, template)
    assert "record 0" in str(caught.value) or "chat template" in str(caught.value)


@pytest.mark.parametrize("template", [CHATML, FORGETFUL])
def test_what_the_assistant_says_first_is_learnt_where_its_place_is_shown(template: str) -> None:
    """Without a mark there is no text before it; with one, or not learnt, it needs none."""
    turns = said("a", "b", "c", "d")["messages"][1:]
    for record in (
        {"messages": turns},
        {"conversations": [{"from": "gpt", "value": "b"}, *_shared("c", "d")]},
    ):
        with pytest.raises(ft.DataError, match=r"begin with the user, or give it weight 0$"):
            read(record, template)
    assert trained({"messages": turns}, MARKED) == ["b<|im_end|>", "d<|im_end|>"]
    last = trained({"messages": turns[1:]}, template)
    assert trained({"messages": [{**turns[0], "weight": 0}, *turns[1:]]}, template) == last


def _shared(*turns: str) -> list[dict[str, Any]]:
    """Turns as ShareGPT has them, the user first."""
    return [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(turns)]


def test_an_all_zero_mask_is_refused() -> None:
    empty = MARKED.replace(
        "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}",
        "{{ m['content'] }}<|im_end|>{% generation %}{% endgeneration %}",
    )
    with pytest.raises(ft.DataError, match="marks no token as the assistant's"):
        read(said("a", "b"), empty)


def test_a_tokenizer_in_python_learns_by_prefixes_what_a_template_marks() -> None:
    """It does not tell where its tokens are in the text, so that the marks are of no use."""
    given = PretrainedTokenizer(transformers.ByT5Tokenizer())
    given.inner.chat_template = MARKED
    ids, labels = ft.data.chat([said("a", "b", "c", "d")], given, time=512, batch_size=1).examples[
        0
    ]
    assert given.spell(ids) == given.render(said("a", "b", "c", "d")["messages"])
    assert given.spell([i for i in labels if i != -100]) == "b<|im_end|>d<|im_end|>"


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_a_lone_surrogate_is_a_malformed_record(template: str) -> None:
    given, bad = tokenizer(template), said("a", "b\ud800")
    options: dict[str, Any] = {"time": 512, "batch_size": 1}
    for record in (bad, {"prompt": "a", "completion": "b\ud800"}):
        with pytest.raises(ft.DataError, match=r"record 0.*: text: not encodable as UTF-8"):
            ft.data.chat([record], given, **options)
    kept = ft.data.chat([bad, said("a", "b")], given, on_bad_record="skip", **options).counts
    assert (kept.kept, kept.malformed) == (1, 1)


def test_weights_need_a_stretch_for_each_message() -> None:
    joined = MARKED.replace("\n{% else %}", "{% else %}").replace(
        "<|im_start|>assistant\n{% gen", "{% gen"
    )
    record = said("a", "b", "c", "d")
    twice = [*record["messages"][:2], *record["messages"][1:2], *record["messages"][2:]]
    assert trained({"messages": twice}, joined) == ["b<|im_end|>b<|im_end|>", "d<|im_end|>"]
    twice[1] = {**twice[1], "weight": 0}
    with pytest.raises(ft.DataError, match="marks 2 stretches for 3 messages"):
        read({"messages": twice}, joined)


LINES = [
    json.dumps(said("a", "b")),
    "{not json",
    json.dumps(said("a")),
    "",
    json.dumps({"instruction": "a", "output": "b"}),
    "[1]",
    json.dumps({"conversations": [{"from": "nobody", "value": "x"}]}),
]


def test_malformed_records_stop_or_are_skipped_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(LINES))
    options: dict[str, Any] = {"time": 99, "batch_size": 1}
    with pytest.raises(ft.DataError, match=r"data\.jsonl:2: not JSON"):
        ft.data.records(path)
    found = ft.data.records(path, on_bad_record="skip")
    assert (len(found), found.where(1), len(found.malformed)) == (4, f"{path}:3", 2)
    with pytest.raises(ft.DataError, match=r"data\.jsonl:3\.messages: no assistant speaks"):
        ft.data.chat(found, ft.data.ByteTokenizer(), **options)
    chats = ft.data.chat(found, ft.data.ByteTokenizer(), on_bad_record="skip", **options)
    assert (chats.counts.kept, chats.counts.malformed, chats.counts.read) == (2, 4, 6)
    assert "4 malformed" in str(chats.counts)
    assert chats.counts.complaints[0].startswith(f"{path}:2: not JSON")
    with pytest.raises(ft.DataError, match=r"all 1 are malformed; the first: record 0"):
        ft.data.chat([{"x": 1}], ft.data.ByteTokenizer(), on_bad_record="skip", **options)
    with pytest.raises(ft.DataError, match="on_bad_record: 'ignore', expected 'stop' or 'skip'"):
        ft.data.chat([said("a", "b")], ft.data.ByteTokenizer(), on_bad_record="ignore", **options)


def test_malformed_preferences_are_counted_too() -> None:
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    options: dict[str, Any] = {"time": 9, "batch_size": 1, "on_bad_record": "skip"}
    found = ft.data.preference([pair, {"prompt": 3}], ft.data.ByteTokenizer(), **options)
    assert (found.counts.kept, found.counts.malformed) == (1, 1)
    judged = {"prompt": "p", "completion": "a", "label": True}
    others = [judged, {**judged, "completion": "b", "label": 1}, {**judged, "completion": "c"}]
    kto = ft.data.unpaired(others, ft.data.ByteTokenizer(), **options)
    assert (kto.counts.kept, kto.counts.malformed) == (2, 1)


def test_a_json_file_is_a_list_of_records(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps([said("a", "b"), {"instruction": "a", "output": "b"}]))
    assert len(ft.data.records(path)) == 2
    for text, message in (
        ("{}", "expected a list of objects, got dict"),
        ("[]", "expected a list of objects"),
        ("[1]", r"data\.json: element 1: expected an object, got int"),
        ('{"a": 1}\n{"a": 2}', r"one object in each line is a \.jsonl file"),
    ):
        path.write_text(text)
        with pytest.raises(ft.DataError, match=message):
            ft.data.records(path)


FORMS: dict[str, dict[str, Any]] = {
    "messages": said("a", "b"),
    "ShareGPT": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    "Alpaca": {"instruction": "a", "output": "b"},
    "prompt-completion": {"prompt": "a", "completion": "b"},
}


@pytest.mark.parametrize("template", [None, CHATML])
@pytest.mark.parametrize("name", FORMS)
def test_a_form_whose_fields_are_null_is_absent(
    name: str, template: str | None, tmp_path: Path, capsys: Any
) -> None:
    """As in JSON that was written from columns, with a record of each form."""
    given = ft.data.ByteTokenizer() if template is None else tokenizer(template)
    nulls = {key: None for form in FORMS.values() for key in form}
    nulls |= {"chosen": None, "rejected": None, "label": None}
    options: dict[str, Any] = {"time": 512, "batch_size": 1}
    alone = ft.data.chat([FORMS[name]], given, **options)
    assert ft.data.chat([nulls | FORMS[name]], given, **options).examples == alone.examples
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(nulls | FORMS[name]))
    assert main(["data", "show", str(path)]) == 0
    assert capsys.readouterr().out.startswith(f"{path}:1: {name}\n")


def test_data_show_shows_control_characters_and_does_not_send_them(
    tmp_path: Path, capsys: Any
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": "a\x1b[31m\tb\x9b", "completion": "c\r\n\x00\x7f"}))
    assert main(["data", "show", str(path)]) == 0
    assert "a␛[31m\tb\ufffd⟦c␍\n␀␡¶⟧\n" in capsys.readouterr().out


def test_data_show_marks_what_is_trained(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "data.jsonl"
    pair = {"prompt": "p", "chosen": "good", "rejected": "bad"}
    path.write_text(json.dumps(said("a", "b", "c", "d")) + "\n" + json.dumps(pair) + "\n")
    tokenizer().inner.save_pretrained(tmp_path / "model")
    notes, half = tmp_path / "notes.txt", tmp_path / "half.jsonl"
    notes.write_text("It was a dark night.")
    half.write_text(json.dumps({"prompt": "p", "chosen": "good"}))
    assert main(["data", "show", str(path), "--model", str(tmp_path / "model")]) == 0
    out = capsys.readouterr().out
    assert f"{path}:1: messages" in out
    assert "<|im_start|>assistant\n⟦b<|im_end|>⟧\n<|im_start|>user\nc" in out
    assert main(["data", "show", str(path), "--color", "always", "--index", "1"]) == 0
    out = capsys.readouterr().out
    assert "p\x1b[1;32mgood¶\x1b[0m" in out
    assert "rejected: 5 tokens, 4 of them trained" in out
    for wrong, message in (
        (["data", "show", str(path), "--index", "2"], "index: 2, and"),
        (["data", "sow", str(path)], "'sow' is unknown"),
        (["data", "show", str(path), "--color", "red"], "color: 'red'"),
        (["data", "show", str(half)], f"{half}:1: no 'rejected'"),
        (["data", "show", str(notes)], "expected records, in a file that ends in .jsonl or .json"),
        (["data", "show", str(path), "--model", str(tmp_path)], "no tokenizer that transformers"),
    ):
        assert main(wrong) == 2
        assert message in capsys.readouterr().err


def test_a_fingerprint_is_of_what_gives_the_ids(tmp_path: Path) -> None:
    """The same for the same tokenizer, used or not, saved and read; another for other ids."""
    first, other = tokenizer(), tokenizer()
    print_of = first.fingerprint
    first.encode("hello there")
    assert first.fingerprint == other.fingerprint == print_of
    for name in ("one", "two"):
        first.save(tmp_path / name)
    one, two = (pretrained_tokenizer(tmp_path / name) for name in ("one", "two"))
    assert one.fingerprint == two.fingerprint
    other.inner.add_tokens(["there"])
    assert other.fingerprint != print_of
    source = data.tokenized(_texts(tmp_path), one, tmp_path / "cache")
    assert source.ids.tolist() == [*one.encode("hello there"), one.end]
    assert not data.tokenized(_texts(tmp_path), two, tmp_path / "cache").made


def test_a_fingerprint_is_without_truncation_and_padding() -> None:
    """A tokenizer.json may ask for both; they are gone once something has been encoded."""
    plain, other = tokenizer(), tokenizer()
    other.inner.backend_tokenizer.enable_truncation(4)
    other.inner.backend_tokenizer.enable_padding()
    found = other.fingerprint
    assert found == plain.fingerprint
    assert other.inner.backend_tokenizer.truncation is not None  # it is not changed by being asked
    other.encode("hello there")
    assert other.fingerprint == found


def test_a_fingerprint_tells_whether_special_tokens_are_split() -> None:
    plain, other = tokenizer(), tokenizer()
    other.inner.split_special_tokens = True
    assert other.encode("<|im_end|>") != plain.encode("<|im_end|>")
    assert other.fingerprint != plain.fingerprint


def _texts(tmp_path: Path) -> Path:
    path = tmp_path / "a.txt"
    path.write_text("hello there")
    return path


@given(text=st.text(st.characters(codec="utf-8", exclude_characters="<")), cut=st.integers(0, 99))
def test_bytes_are_counted_wherever_ids_are_cut(text: str, cut: int) -> None:
    """Within a character too; special tokens are no text, and others that were added are."""
    given = tokenizer()
    given.inner.add_tokens(["<think>"])
    ids = given.encode(f"{text}<think><|im_end|>{text}")
    assert given.inner.convert_tokens_to_ids("<think>") in ids
    assert given.end in ids
    found = [given.count_bytes(each) for each in (ids[:cut], ids[cut:])]
    assert sum(found) == 2 * len(text.encode()) + len("<think>")


def test_bytes_of_other_tokenizers_are_those_of_their_text() -> None:
    words = {"a": 0, "bc": 1, "<end>": 2}
    inner = Tokenizer(models.WordLevel(words, unk_token="a"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>")
    assert PretrainedTokenizer(fast).count_bytes([0, 1, 2]) == len("a bc")
    own = data.ByteTokenizer()
    assert own.count_bytes([*own.encode("é")[1:], own.end]) == 1
