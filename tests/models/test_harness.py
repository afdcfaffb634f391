"""Tasks of lm-evaluation-harness over live values: the real library, beside its own model class."""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
import transformers
from tokenizers import processors
from torch.utils import collect_env

import functrain as ft
from functrain.cli import main
from tests.cli.test_cli_transformers import save_model
from tests.data.test_dialogues import CHATML, tokenizer

lm_eval = pytest.importorskip("lm_eval")
# Of lm_eval and of what it imports; none is of functrain's calls.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
"""
CHOICES = """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
TEXT = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}]
"""
SPOKEN = """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{said}}"
generation_kwargs: {until: ["e"], max_gen_toks: 6}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory with three tasks over a file, and a cache of data sets that is nobody else's."""
    import datasets

    tmp_path = tmp_path_factory.mktemp("tasks")
    given = [
        {
            "question": f"What is {n} and {n}? " * (1 + 3 * (n == 2)),
            "choices": [f" {n + 1}", f" It is {2 * n}", " none"],
            "answer": n % 3,
            "said": "x",
        }
        for n in range(7)
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(each) + "\n" for each in given))
    found = tmp_path / "tasks"
    found.mkdir()
    for name, text in (("choices", CHOICES), ("running", TEXT), ("spoken", SPOKEN)):
        (found / f"{name}.yaml").write_text(TASK.format(name=name, path=data) + text)
    # Of every evaluation lm_eval notes what is installed, by pip: a second each time.
    listed = functools.cache(collect_env.get_pretty_env_info)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
        patch.setattr(collect_env, "get_pretty_env_info", listed)
        yield found


def decoder() -> tuple[Any, Any, Any]:
    """The built-in decoder over bytes."""
    config = ft.models.DecoderConfig(vocabulary=257, width=16, layers=1, heads=2)
    return ft.split(ft.models.decoder(config).double())


def asked(model: Any, tasks: Path, **options: Any) -> Any:
    from lm_eval.tasks import TaskManager

    found = lm_eval.simple_evaluate(
        model=model,
        tasks=["choices", "running", "spoken"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
        **options,
    )
    samples = {
        name: [(each["resps"], each["arguments"]) for each in rows]
        for name, rows in found["samples"].items()
    }
    return found["results"], samples


def close(one: Any, other: Any) -> bool:
    """The same, but for rounding of numbers."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(close(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(close, one, other))
    if isinstance(one, float):
        return one == pytest.approx(other, rel=1e-4, abs=1e-5)
    return bool(one == other)


def with_begin(path: Path) -> None:
    """Have the tokenizer there put a token before every text, as those of Llama and Gemma do."""
    fast = transformers.AutoTokenizer.from_pretrained(path)
    fast.bos_token = "<|im_start|>"
    begin = fast.convert_tokens_to_ids(fast.bos_token)
    fast.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", begin)]
    )
    fast.save_pretrained(path)


@pytest.mark.parametrize(
    ("time", "begins"), [(1024, False), (48, False), (48, True)], ids=["whole", "cut", "bos"]
)
def test_the_same_as_its_own_model_class(
    time: int, begins: bool, tmp_path: Path, tasks: Path
) -> None:
    """Of each request: log-probs, whether they are greedy, text in windows, what is said."""
    from lm_eval.models.huggingface import HFLM

    path = save_model(tmp_path / "model")
    if begins:
        with_begin(path)
    architecture, params, buffers, found = ft.models.from_pretrained(path)
    assert found is not None
    assert (len(found.inner.encode("a")) == 2) == begins
    ours = ft.models.harness(architecture, params, buffers, found, time=time, batch_size=3)
    theirs = HFLM(
        pretrained=transformers.AutoModelForCausalLM.from_pretrained(path),
        tokenizer=transformers.AutoTokenizer.from_pretrained(path),
        max_length=time,
        device="cpu",
    )
    results, samples = asked(ours, tasks)
    expected, said = asked(theirs, tasks)
    assert samples.keys() == {"choices", "running", "spoken"}
    for task in samples:
        assert close(samples[task], said[task]), task
    assert close(results, expected)


def test_neither_batches_nor_generators_matter(tmp_path: Path, tasks: Path) -> None:
    given = (*decoder(), ft.data.ByteTokenizer())
    before = torch.get_rng_state()
    one = ft.models.harness(*given, batch_size=1)
    pairs = [([1, 2, 3], [4, 5]), ([1], [2, 3, 4, 5, 6]), ([9] * 20, [3])]
    found = one._scored(pairs)
    assert close(found, ft.models.harness(*given, batch_size=3)._scored(pairs))
    assert torch.equal(before, torch.get_rng_state())
    results, _ = asked(one, tasks)
    assert set(results) == {"choices", "running", "spoken"}


def test_a_chat_template_is_applied(tmp_path: Path, tasks: Path) -> None:
    architecture, params, buffers, found = ft.models.from_pretrained(
        save_model(tmp_path / "model", template=CHATML)
    )
    assert found is not None
    live = ft.models.harness(architecture, params, buffers, found)
    _, samples = asked(live, tasks, apply_chat_template=True)
    (prompt, _), *_ = samples["choices"][0][1]
    assert prompt.startswith("<|im_start|>user\nWhat is 0 and 0?")
    assert prompt.endswith("<|im_start|>assistant\n")


def test_from_the_command_line(tmp_path: Path, tasks: Path, capsys: Any) -> None:
    model = str(save_model(tmp_path / "model"))
    include = ["--include", str(tasks)]
    assert main(["evaluate", model, *include, "--tasks", "choices", "running", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["task"], row["metric"], row["examples"]) for row in rows] == [
        ("choices", "acc", 7),
        ("choices", "acc_norm", 7),
        ("running", "word_perplexity", 7),
        ("running", "byte_perplexity", 7),
    ]
    assert main(["evaluate", model, *include, "--tasks", "choices", "--chat", "--limit", "2"]) == 0
    assert "acc_norm" in capsys.readouterr().out


@pytest.mark.long
def test_a_task_that_is_not_known_is_answered_with_the_nearest(
    tmp_path: Path, tasks: Path, capsys: Any
) -> None:
    """After lm-eval's own thousands have been listed, which takes seconds."""
    model = str(save_model(tmp_path / "model"))
    assert main(["evaluate", model, "--include", str(tasks), "--tasks", "choises"]) == 2
    assert "tasks: 'choises' is unknown; did you mean 'choices'" in capsys.readouterr().err


def test_bad_arguments_are_answered(tmp_path: Path) -> None:
    given = (*decoder(), ft.data.ByteTokenizer())
    for options in ({"time": 1}, {"batch_size": 0}):
        with pytest.raises(ft.ConfigError, match="expected at least 2 and 1"):
            ft.models.harness(*given, **options)
    live = ft.models.harness(*given, time=4)
    with pytest.raises(ft.DataError, match="5 tokens after 1, expected 1 to 4"):
        live._scored([([1], [1, 2, 3, 4, 5])])
    with pytest.raises(ft.ConfigError, match="no chat template"):
        live.apply_chat_template([{"role": "user", "content": "a"}])


@attrs.frozen
class Request:
    """What lm_eval hands over."""

    args: tuple[Any, ...]


def test_generation_heeds_what_a_task_asks(tmp_path: Path) -> None:
    """Another name for the number of tokens; repeats of a sampled request, which differ."""
    live = ft.models.harness(*decoder(), ft.data.ByteTokenizer())
    (said,) = live.generate_until([Request(("abc", {"max_new_tokens": 3}))])
    assert len(said.encode(errors="replace")) <= 9
    sampled = Request(("abc", {"max_tokens": 9, "temperature": 1.5}))
    found = live.generate_until([sampled] * 3)
    assert len(set(found)) == 3
    assert found == live.generate_until([sampled] * 3)


def test_what_generation_does_not_heed_is_refused() -> None:
    """Greedy text would be taken for that of a beam search."""
    live = ft.models.harness(*decoder(), ft.data.ByteTokenizer())
    plain, neutral = {"max_gen_toks": 3}, {"num_beams": 1, "repetition_penalty": 1.0}
    found = live.generate_until([Request(("abc", plain)), Request(("abc", plain | neutral))])
    assert found[0] == found[1]
    with pytest.raises(ft.ConfigError, match=r"a task asks for \{'num_beams': 10\}, which generat"):
        live.generate_until([Request(("abc", plain | {"num_beams": 10}))])


def test_a_stop_may_be_a_special_token() -> None:
    given = tokenizer()
    live = ft.models.harness(*decoder(), given)
    ids = given.encode("foo<|im_start|>user\nbar")
    assert live._until(ids, ["<|im_start|>"]) == "foo"
    assert live._until(ids, ["oo"]) == "f"
    assert live._until(ids, ["er\nb", "us"]) == "foo"
    assert live._until(ids, []) == "foouser\nbar"
    assert live._until([], ["a"]) == ""


def test_a_template_is_told_what_the_run_told_it(tmp_path: Path) -> None:
    template = "{% if enable_thinking %}(think){% endif %}{{ strftime_now('%Y') }}"
    given = attrs.evolve(
        tokenizer(template),
        template_options={"enable_thinking": True},
        today=datetime.date(1999, 1, 1),
    )
    live = ft.models.harness(*decoder(), given)
    assert live.apply_chat_template([{"role": "user", "content": "a"}]) == "(think)1999"


def test_the_model_says_how_much_it_sees(tmp_path: Path) -> None:
    config = transformers.GPT2Config(n_positions=24, n_embd=8, n_layer=1, n_head=1, vocab_size=257)
    parts = ft.split(transformers.GPT2LMHeadModel(config))
    live = ft.models.harness(*parts, ft.data.ByteTokenizer())
    assert live.time == 24
    assert len(live.loglikelihood_rolling([Request(("x" * 99,))])) == 1
    assert ft.models.positions(parts[0]) == 24
    assert len(ft.models.generate(*parts, [1] * 20, max_new_tokens=99)) == 5
    with pytest.raises(ft.BatchError, match="25 tokens, and the model has learnt 24 positions"):
        ft.models.generate(*parts, [1] * 25, max_new_tokens=1)
    assert ft.models.positions(decoder()[0]) is None
