"""Runs from a model of transformers: trained, resumed, aligned, spoken with, exported."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import functrain as ft
from functrain.cli import main, toml
from functrain.cli.config import DPO, SFT, Config, Data, Preference, Pretrain, Text
from functrain.cli.restoring import restored, trained
from functrain.cli.summary import bits_per_byte
from functrain.cli.tokenizers import templated
from tests.data.test_dialogues import CHATML, tokenizer

COMMON = [
    *("--train.steps", "6", "--train.batch-size", "4", "--train.save-every", "2"),
    *("--train.threads", "1", "--train.device", "cpu", "--evaluation.every", "3"),
    *("--data.time", "64", "--train.keep", "9"),
]
CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"{i} plus one?"},
            {"role": "assistant", "content": f"{i + 1}"},
        ]
    }
    for i in range(12)
]
PAIRS = [
    {
        "prompt": CHATS[i]["messages"][:1],
        "chosen": CHATS[i]["messages"][1:],
        "rejected": [{"role": "assistant", "content": f"{i + 2}"}],
    }
    for i in range(12)
]

SMALL_EXPERTS: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "moe_intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 4,
}


def jsonl(path: Path, records: list[Any]) -> list[str]:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return ["--data.train", str(path), "--data.held-out", str(path)]


def save_model(path: Path, *, template: str | None = CHATML, seed: int = 0) -> Path:
    """A small Llama of transformers with a byte-level tokenizer."""
    given = tokenizer(template)
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=given.vocabulary,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        eos_token_id=given.end,
        tie_word_embeddings=True,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    given.save(path)
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a run of all its params, adapters over the model, and preferences after that run."""
    path = tmp_path_factory.mktemp("transformers")
    save_model(path / "model")
    chats = jsonl(path / "sft.jsonl", CHATS)
    start = ["--model.from", str(path / "model")]
    assert main(["sft", "--directory", str(path / "whole"), *start, *chats, *COMMON]) == 0
    lora = ["--lora.rank", "2", *COMMON]
    assert main(["sft", "--directory", str(path / "adapters"), *start, *chats, *lora]) == 0
    pairs = jsonl(path / "pairs.jsonl", PAIRS)
    start = ["--model.from", str(path / "whole")]
    assert main(["dpo", "--directory", str(path / "dpo"), *start, *pairs, *COMMON]) == 0
    return path


RUNS = pytest.mark.parametrize("run", ["whole", "adapters", "dpo"])


def logits(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.tensor([ids])).logits
    return found


def test_the_first_step_is_the_models_own(runs: Path) -> None:
    """The first loss is that of transformers over what the assistant says."""
    first = json.loads((runs / "whole" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["step"] == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(runs / "model").eval()
    given = tokenizer()
    total, count = 0.0, 0
    for chat in CHATS:
        asked = given.encode(given.render(chat["messages"][:1], prompt=True))
        said = given.encode(f"{chat['messages'][1]['content']}<|im_end|>")
        scores = logits(model, [*asked, *said])[0].log_softmax(-1)
        at = range(len(asked) - 1, len(asked) + len(said) - 1)
        total -= sum(float(scores[n, i]) for n, i in zip(at, said, strict=True))
        count += len(said)
    assert first["eval_loss"] == pytest.approx(total / count, rel=1e-5)
    assert first["eval_num_tokens"] == count


def test_preferences_begin_at_the_run_before(runs: Path) -> None:
    first = json.loads((runs / "dpo" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["eval_rewards/margins"] == 0.0
    params = restored(str(runs / "dpo")).state.params
    assert params.keys() == restored(str(runs / "whole")).state.params.keys()


@RUNS
def test_a_resumed_run_has_the_same_bits(run: str, runs: Path, tmp_path: Path) -> None:
    text = (runs / run / "config.toml").read_text().replace(str(runs / run), str(tmp_path / "run"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text(text)
    stage = toml.read_any(runs / run / "config.toml").stage
    command = [stage, str(tmp_path / "run" / "config.toml"), "--resume"]
    assert main([*command, "--train.steps", "3"]) == 0
    assert main([*command, "--train.steps", "6"]) == 0
    ends = [restored(str(path / "checkpoints" / f"step-{6:012}")) for path in (tmp_path / "run",)]
    ends.append(restored(str(runs / run)))
    assert ft.fingerprint(ends[0].state) == ft.fingerprint(ends[1].state)


@RUNS
def test_its_steps_can_be_made_again(run: str, runs: Path, capsys: Any) -> None:
    assert main(["verify", str(runs / run), "--replay", "2..6"]) == 0
    assert "same" in capsys.readouterr().out


def test_a_checkpoint_is_a_model_with_its_tokenizer(runs: Path) -> None:
    checkpoint = runs / "whole" / "checkpoints" / f"step-{6:012}"
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    theirs = transformers.AutoTokenizer.from_pretrained(checkpoint)
    assert theirs.chat_template == CHATML
    state = restored(str(runs / "whole")).state
    for name, value in model.named_parameters():
        assert torch.equal(state.params[name], value), name


def test_a_run_of_a_model_with_persistent_buffers_is_found_again(tmp_path: Path) -> None:
    """Its checkpoints are none of transformers' (`functrain.models.config_files`)."""
    given = tokenizer()
    torch.manual_seed(0)
    config = transformers.DeepseekV3Config(
        vocab_size=given.vocabulary,
        first_k_dense_replace=0,
        **SMALL_EXPERTS,
        eos_token_id=given.end,
    )
    model: Any = transformers.AutoModelForCausalLM.from_config(config)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.add_(torch.rand_like(buffer))
    model.save_pretrained(tmp_path / "model")
    given.save(tmp_path / "model")
    chats = jsonl(tmp_path / "sft.jsonl", CHATS)
    start = ["--model.from", str(tmp_path / "model"), "--directory", str(tmp_path / "run")]
    assert main(["sft", *start, *chats, *COMMON, "--train.steps", "1"]) == 0
    found = trained(str(tmp_path / "run"))
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "export")]) == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "export").state_dict()
    biases = {n: t for n, t in found.buffers.items() if n.endswith("e_score_correction_bias")}
    assert biases
    for name, value in {**found.params, **biases}.items():
        assert torch.equal(theirs[name], value), name
        assert value.any(), name


@RUNS
def test_it_is_exported_with_its_tokenizer_and_speaks(
    run: str, runs: Path, tmp_path: Path, capsys: Any
) -> None:
    merge = ["--merge"] if run == "adapters" else []
    assert main(["export", str(runs / run), str(tmp_path / "out"), *merge]) == 0
    capsys.readouterr()
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    messages = CHATS[3]["messages"][:1]
    asked = theirs.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    said = model.generate(**asked, max_new_tokens=8, do_sample=False)[0]
    expected = theirs.decode(said[asked["input_ids"].shape[1] :], skip_special_tokens=True)
    question = messages[0]["content"]
    for given in (runs / run, tmp_path / "out"):
        assert main(["generate", str(given), question, "--max-new-tokens", "8"]) == 0
        assert capsys.readouterr().out == f"{expected}\n"


def test_a_prompt_can_be_plain(runs: Path) -> None:
    from functrain.cli.show import generated

    options: dict[str, Any] = {"max_new_tokens": 9, "temperature": 0.0, "top_k": None, "seed": 0}
    found = generated(str(runs / "model"), "3 plus", plain=True, top_p=None, **options)
    model = trained(str(runs / "model"))
    assert model.tokenizer is not None
    ids = ft.models.generate(
        model.architecture,
        model.params,
        model.buffers,
        model.tokenizer.encode("3 plus"),
        max_new_tokens=9,
        end=model.tokenizer.end,
    )
    assert found == model.tokenizer.decode(ids)


def test_it_is_measured_before_any_run(runs: Path, capsys: Any) -> None:
    files = [str(runs / "sft.jsonl"), str(runs / "pairs.jsonl")]
    assert main(["evaluate", str(runs / "model"), *files, "--json"]) == 0
    chats, pairs = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    first = json.loads((runs / "whole" / "metrics.jsonl").read_text().splitlines()[0])
    assert chats["loss"] == pytest.approx(first["eval_loss"], rel=1e-6)
    # What is predicted is "1<|im_end|>", of which a byte is text.
    count = sum(len(chat["messages"][1]["content"]) for chat in CHATS)
    bits = chats["loss"] * chats["tokens"] / 0.6931471805599453 / count
    assert chats["bits_per_byte"] == pytest.approx(bits)
    assert (pairs["kind"], pairs["examples"]) == ("pairs", 12)


def test_bits_per_byte_go_by_the_text_wherever_rows_end() -> None:
    """Between the bytes of a character too."""
    given, documents = tokenizer(), ["每个字是三个字节", "каждая буква два", "and one"]
    size = sum(len(text.encode()) for text in documents) - 1  # the first token is not predicted
    for time in (5, 8, 99):
        batches = ft.data.all_batches(ft.data.text(documents, given, time=time, batch_size=2))
        tokens = sum(int((batch["labels"][:, 1:] >= 0).sum()) for batch in batches)
        record = {"eval_loss": math.log(2), "eval_num_tokens": tokens}
        assert bits_per_byte(record, batches, given) == pytest.approx(tokens / size)


def test_what_was_begun_over_another_model_is_not_resumed(
    runs: Path, tmp_path: Path, capsys: Any
) -> None:
    model = tmp_path / "model"
    shutil.copytree(runs / "model", model)
    run = ["sft", "--directory", str(tmp_path / "run"), "--model.from", str(model), *COMMON]
    run += ["--data.train", str(runs / "sft.jsonl")]
    assert main([*run, "--train.steps", "2"]) == 0
    save_model(model, seed=1)
    assert main([*run, "--train.steps", "4", "--resume"]) == 2
    assert "is not what this run started from (another hash)" in capsys.readouterr().err


def _without(name: str) -> Any:
    def change(path: Path) -> None:
        for each in path.glob(name):
            each.unlink()

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without("tokenizer*"), "has no tokenizer beside its weights"),
        (_without("*.safetensors"), "neither model.safetensors nor"),
        (_without("config.json"), "no run's directory (it has no config.toml)"),
        (_without("*"), "or a model of transformers"),
        (shutil.rmtree, "is not there (looked from"),
    ],
    ids=["no tokenizer", "no weights", "no config", "nothing", "not there"],
)
def test_what_is_no_model_is_refused(
    change: Any, message: str, runs: Path, tmp_path: Path, capsys: Any
) -> None:
    model = tmp_path / "model"
    shutil.copytree(runs / "model", model)
    change(model)
    run = ["sft", "--directory", str(tmp_path / "run"), "--model.from", str(model), *COMMON]
    assert main([*run, "--data.train", str(runs / "sft.jsonl")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_commands_over_a_state_ask_for_a_run(runs: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(["export", str(runs / "model"), str(tmp_path / "x")]) == 2
    assert "a model of transformers and no run" in capsys.readouterr().err


def test_a_template_is_told_of_reasoning(runs: Path, tmp_path: Path, capsys: Any) -> None:
    """`data.enable_thinking` is written down, and asked with afterwards."""
    thinking = CHATML.replace(
        "<|im_start|>assistant\n{% endif %}",
        "<|im_start|>assistant\n{% if not enable_thinking %}(no){% endif %}{% endif %}",
    ).replace(
        "{{ m['content'] }}",
        "{% if m['role'] == 'assistant' and not enable_thinking %}(no){% endif %}"
        "{{ m['content'] }}",
    )
    model = save_model(tmp_path / "model", template=thinking)
    run = ["sft", "--model.from", str(model), *COMMON, "--data.train", str(runs / "sft.jsonl")]
    for given in ("True", "False"):
        options = ["--directory", str(tmp_path / given), "--data.enable-thinking", given]
        assert main([*run, *options]) == 0
        found = trained(str(tmp_path / given)).tokenizer
        assert isinstance(found, ft.data.PretrainedTokenizer)
        prompt = found.render(CHATS[0]["messages"][:1], prompt=True)
        assert prompt.endswith("(no)") == (given == "False")
    pairs = [*jsonl(tmp_path / "pairs.jsonl", PAIRS), *COMMON, "--directory", str(tmp_path / "dpo")]
    assert main(["dpo", "--model.from", str(tmp_path / "True"), *pairs]) == 0
    found = toml.read_any(tmp_path / "dpo" / "config.toml")
    assert found.data.enable_thinking is True, "as the run before was told"
    capsys.readouterr()
    bare = save_model(tmp_path / "bare", template=None)
    text = [{"prompt": "a", "completion": "b"}] * 8
    run = ["sft", "--model.from", str(bare), *COMMON, *jsonl(tmp_path / "x.jsonl", text)]
    run += ["--directory", str(tmp_path / "run")]
    assert main([*run, "--data.enable-thinking", "True"]) == 2
    assert "data.enable_thinking: the tokenizer has no chat template" in capsys.readouterr().err
    assert main(run) == 0


def test_a_run_is_resumed_on_another_day(runs: Path, tmp_path: Path) -> None:
    """What a template says of the day is that of the run's beginning."""
    model = save_model(tmp_path / "model", template="{{ strftime_now('%Y-%m-%d') }}" + CHATML)
    run = ["sft", "--model.from", str(model), *COMMON, "--data.train", str(runs / "sft.jsonl")]
    run += ["--directory", str(tmp_path / "run")]
    assert main([*run, "--train.steps", "2", "--data.today", "1999-12-31"]) == 0
    assert main([*run, "--train.steps", "4", "--resume"]) == 0
    found = trained(str(tmp_path / "run")).tokenizer
    assert isinstance(found, ft.data.PretrainedTokenizer)
    assert found.render(CHATS[0]["messages"]).startswith("1999-12-31<|im_start|>")
    assert main(["verify", str(tmp_path / "run"), "--replay", "0..4"]) == 0
    assert toml.read_any(runs / "whole" / "config.toml").data.today is not None
    with pytest.raises(ft.ConfigError, match=r"data.today: '31.12.1999', expected a day: 2026-11"):
        Data(today="31.12.1999")


def test_a_run_over_texts_is_asked_with_texts(runs: Path, tmp_path: Path, capsys: Any) -> None:
    """A template that was not trained in is not asked in."""
    records = [{"prompt": f"{n} plus one:", "completion": f" {n + 1}"} for n in range(12)]
    run = ["sft", "--model.from", str(runs / "model"), *jsonl(tmp_path / "x.jsonl", records)]
    assert main([*run, *COMMON, "--directory", str(tmp_path / "run")]) == 0
    for path, wanted in (
        (tmp_path / "run", False),
        (runs / "whole", True),
        (runs / "dpo", True),
    ):
        assert toml.read_any(path / "config.toml").data.templated is wanted
    capsys.readouterr()
    said = []
    for more in ([], ["--plain"]):
        ask = ["generate", str(tmp_path / "run"), "3 plus one:", "--max-new-tokens", "5", *more]
        assert main(ask) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]


PAIR: Any = {"prompt": "a", "chosen": "b", "rejected": "c"}
JUDGED: Any = {"prompt": "a", "completion": "b", "label": True}


@pytest.mark.parametrize(
    ("stage", "bad", "good"),
    [
        ("sft", [{"foo": 1}, JUDGED, {"prompt": "a", "completion": ""}], CHATS),
        ("sft", [{"messages": []}], [{"prompt": "a", "completion": "b"}]),
        ("dpo", [{"foo": 1}, JUDGED, {**PAIR, "rejected": ""}], PAIRS),
        ("kto", [{"foo": 1}, {**JUDGED, "label": 1}, {**JUDGED, **PAIR}], PAIRS),
        ("kto", [{**JUDGED, "prompt": CHATS[0]["messages"][:1]}], [JUDGED]),
    ],
)
def test_a_record_that_is_skipped_does_not_say_how_a_run_is_asked(
    stage: str, bad: list[Any], good: list[Any], tmp_path: Path
) -> None:
    jsonl(tmp_path / "data.jsonl", [*bad, *good])
    found = Data(train=str(tmp_path / "data.jsonl"), on_bad_record="skip")
    loss = Preference(loss="kto" if stage == "kto" else "sigmoid")
    config: Config = SFT(data=found) if stage == "sft" else DPO(data=found, preference=loss)
    assert templated(config, tokenizer()) is isinstance(good[0].get("prompt", []), list)


def test_nor_does_text_for_pretraining(tmp_path: Path) -> None:
    jsonl(tmp_path / "data.jsonl", [{"text": "ab"}, *CHATS])
    config = Pretrain(data=Text(train=str(tmp_path / "data.jsonl")))
    assert templated(config, tokenizer()) is False


def test_learnt_positions_are_not_exceeded(tmp_path: Path, capsys: Any) -> None:
    """Neither by the samples of a run whose data fill them, nor by the data."""
    _save_with_positions(tmp_path / "model", 48)
    texts = [{"prompt": "a" * 40, "completion": "bcd"} for _ in range(8)]
    run = ["sft", "--model.from", str(tmp_path / "model"), *jsonl(tmp_path / "x.jsonl", texts)]
    run += [*COMMON, "--directory", str(tmp_path / "run")]
    assert main([*run, "--data.time", "64"]) == 2
    assert "data.time: 64, and the model has learnt 48 positions" in capsys.readouterr().err
    assert main([*run, "--data.time", "48", "--data.pad-to-multiple-of", "32"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "32 pads rows of data.time 48 to as many as 64 tokens" in said
    assert main([*run, "--data.time", "48"]) == 0


def _save_with_positions(path: Path, count: int) -> None:
    """A model that has learnt so many positions, with a tokenizer of bytes."""
    given = tokenizer(None)
    config = transformers.GPT2Config(
        n_positions=count, n_embd=8, n_layer=1, n_head=1, vocab_size=given.vocabulary
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(path)
    given.save(path)


def test_learnt_positions_are_not_exceeded_by_what_is_measured(tmp_path: Path, capsys: Any) -> None:
    """By default; more are refused. Rows of as many are not padded beyond them."""
    model, text = str(tmp_path / "model"), tmp_path / "x.txt"
    _save_with_positions(tmp_path / "model", 44)
    text.write_text("abc " * 50)
    record = {"prompt": "a" * 20, "completion": "b" * 40}
    files = [str(text), jsonl(tmp_path / "x.jsonl", [record] * 2)[1]]
    assert main(["evaluate", model, *files, "--json"]) == 0
    default = capsys.readouterr().out
    assert [json.loads(line)["tokens"] for line in default.splitlines()] == [200, 2 * 24]
    assert main(["evaluate", model, *files, "--json", "--time", "44"]) == 0
    assert capsys.readouterr().out == default
    assert main(["evaluate", model, *files, "--time", "45"]) == 2
    assert "time: 45, and the model has learnt 44 positions" in capsys.readouterr().err


def test_files_beside_a_model_are_no_part_of_it(runs: Path, tmp_path: Path) -> None:
    """Directories of transformers' are named step-100 at times, and hold notes."""
    model = tmp_path / "step-100"
    shutil.copytree(runs / "model", model)
    run = ["sft", "--model.from", str(model), *COMMON, "--directory", str(tmp_path / "run")]
    run += ["--data.train", str(runs / "sft.jsonl")]
    assert main([*run, "--train.steps", "2"]) == 0
    (model / "results.json").write_text("{}")
    (model / "README.md").write_text("good")
    assert main([*run, "--train.steps", "4", "--resume"]) == 0


def test_what_is_asked_of_a_run_without_its_tokenizer(
    runs: Path, tmp_path: Path, capsys: Any
) -> None:
    shutil.copytree(runs / "whole", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "tokenizer")
    for command in (
        ["generate", str(tmp_path / "run"), "a"],
        ["export", str(tmp_path / "run"), "x"],
    ):
        assert main(command) == 2
        assert "tokenizer is missing; put it back" in capsys.readouterr().err
    (runs / "whole" / "environment.json").rename(tmp_path / "kept")
    (runs / "whole" / "environment.json").write_text("{")
    assert main(["report", str(runs / "whole"), "--to", str(tmp_path / "page.html")]) == 0
    (tmp_path / "kept").rename(runs / "whole" / "environment.json")
    assert "damaged" in (tmp_path / "page.html").read_text()


def test_a_record_is_shown_as_a_run_reads_it(runs: Path, capsys: Any) -> None:
    for model in (runs / "whole", runs / "model"):
        show = ["data", "show", str(runs / "sft.jsonl"), "--model", str(model), "--color", "never"]
        assert main(show) == 0
        assert "<|im_start|>assistant\n⟦1<|im_end|>⟧" in capsys.readouterr().out


def test_special_tokens_alone_have_no_bytes(runs: Path, tmp_path: Path, capsys: Any) -> None:
    file = jsonl(tmp_path / "x.jsonl", [{"prompt": "a", "completion": "<|im_start|>"}])[1]
    assert main(["evaluate", str(runs / "model"), file, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["tokens"], found["bits_per_byte"]) == (2, None)
