"""Adapters from the command line: trained, resumed, aligned further, spoken with, exported."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import functrain as ft
from functrain.cli import main, restoring
from functrain.cli.config import SFT, Adapters, Start
from functrain.cli.holding import hold
from functrain.cli.origins import Origin
from functrain.cli.restoring import restored, trained
from functrain.errors import ConfigError

COMMON = [
    *("--train.steps", "6", "--train.batch-size", "4", "--train.save-every", "2"),
    *("--train.threads", "1", "--train.device", "cpu", "--evaluation.every", "3"),
    *("--data.time", "32", "--train.keep", "9"),
]
LORA = ["--lora.rank", "2", "--lora.targets", "q_proj, mlp.*", "--lora.dropout", "0.2"]
CHATS = [{"prompt": f"{i} plus one?", "completion": f" {i + 1}"} for i in range(12)]
PAIRS = [
    {"prompt": f"{i} plus one?", "chosen": f" {i + 1}", "rejected": f" {i + 2}"} for i in range(12)
]


def _jsonl(path: Path, records: list[dict[str, str]]) -> list[str]:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return ["--data.train", str(path), "--data.held-out", str(path)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretrained run, adapters over it, and adapters over that."""
    path = tmp_path_factory.mktemp("lora")
    (path / "text.txt").write_text("one two three four " * 40)
    shape = ["--model.width", "16", "--model.layers", "1", "--model.heads", "2"]
    text = ["--data.train", str(path / "text.txt")]
    assert main(["pretrain", "--directory", str(path / "a"), *shape, *text, *COMMON]) == 0
    chats = _jsonl(path / "sft.jsonl", CHATS)
    start = ["--model.from", str(path / "a"), *LORA, "--lora.rslora"]
    assert main(["sft", "--directory", str(path / "b"), *start, *chats, *COMMON]) == 0
    pairs = _jsonl(path / "pairs.jsonl", PAIRS)
    start = ["--model.from", str(path / "b"), *LORA, "--lora.dora"]
    assert main(["dpo", "--directory", str(path / "c"), *start, *pairs, *COMMON]) == 0
    return path


def _print(run: Path, step: int = 6) -> str:
    return ft.fingerprint(restored(str(run / "checkpoints" / f"step-{step:012}")).state)


def _records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_muon_trains_adapters(runs: Path, tmp_path: Path) -> None:
    chats = _jsonl(tmp_path / "sft.jsonl", CHATS)
    start = ["--model.from", str(runs / "a"), *LORA, "--optimizer.name", "muon"]
    assert main(["sft", "--directory", str(tmp_path / "run"), *start, *chats, *COMMON]) == 0
    state = restored(str(tmp_path / "run")).state
    assert state.optimizer.slots["muon.momentum_buffer"].keys() == state.params.keys()


def test_checkpoints_hold_adapters_alone(runs: Path, capsys: Any) -> None:
    found = restored(str(runs / "b"))
    assert all(".lora_" in name for name in found.state.params)
    assert len(found.state.params) == 2 * 4  # q_proj, gate, up, down
    assert found.state.base is not None
    assert main(["inspect", str(runs / "b")]) == 0
    assert f"base        {found.state.base[:16]}" in capsys.readouterr().out


def test_what_is_there_is_inspected_where_the_base_is_gone(
    runs: Path, tmp_path: Path, capsys: Any
) -> None:
    run = tmp_path / "b"
    shutil.copytree(runs / "b", run)
    text = (run / "config.toml").read_text()
    (run / "config.toml").write_text(text.replace(str(runs / "a"), str(tmp_path / "gone")))
    assert main(["inspect", str(run)]) == 0
    out = capsys.readouterr().out
    assert "head        not known: " in out
    assert "the base of its adapters: " in out
    assert "every size and sha256 is as the manifest says" in out


def test_a_run_of_adapters_is_inspected_without_its_config(
    runs: Path, tmp_path: Path, capsys: Any
) -> None:
    shutil.copytree(runs / "b", tmp_path / "b")
    (tmp_path / "b" / "config.toml").write_text("[model")
    assert main(["inspect", str(tmp_path / "b")]) == 0
    assert "every size and sha256 is as the manifest says" in capsys.readouterr().out


@pytest.mark.parametrize("told", [True, False])
def test_a_run_that_goes_on_keeps_what_others_start_from(
    runs: Path, tmp_path: Path, capsys: Any, told: bool
) -> None:
    base, run = tmp_path / "base", tmp_path / "run"
    shutil.copytree(runs / "a", base, ignore=shutil.ignore_patterns("used"))
    if not told:
        (base / "used").write_text("in the way")
    chats = _jsonl(tmp_path / "sft.jsonl", CHATS)
    start = ["--directory", str(run), "--model.from", str(base), *LORA, *chats]
    for _ in range(2):
        assert main(["sft", *start, *COMMON, "--train.steps", "1", "--resume"]) == 0
        said = capsys.readouterr().err
        assert (f"{base / 'used'}: cannot" in said.replace("/step-000000000006", "")) is not told
        assert ("to use adapters, needs it" in said) is not told
    begun = base / "checkpoints" / "step-000000000006"
    if told:
        assert (base / "used" / begun.name).read_text() == f"{run}\n"
    more = ["--train.steps", "12", "--train.save-every", "2", "--train.keep", "1"]
    more += ["--directory", str(base), "--resume"]
    assert main(["pretrain", str(base / "config.toml"), *more]) == 0
    left = {each.name for each in (base / "checkpoints").glob("step-*")}
    assert left == {"step-000000000012", *([begun.name] if told else [])}
    assert main(["generate", str(run), "x", "--max-new-tokens", "1"]) == (0 if told else 2)


def _note() -> None:
    """Twice that two runs start from a checkpoint of here, whose names are no ASCII and no text."""
    for name in (b"\xc3\xbc", b"\xff") * 2:
        user = Path(os.fsdecode(name))
        assert hold(Path("checkpoints/step-000000000001").absolute(), user) is None


NOTED = f"""
import os
from pathlib import Path
from functrain.cli.holding import hold
{inspect.getsource(_note)}
_note()
"""


@pytest.mark.parametrize(
    "locale", ["POSIX", "as it is here", pytest.param("C.UTF-8", marks=pytest.mark.long)]
)
def test_a_run_of_any_name_is_noted_once(
    locale: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the locale makes of its bytes."""
    (tmp_path / "checkpoints").mkdir()
    if locale == "as it is here":
        monkeypatch.chdir(tmp_path)
        _note()
    else:
        env = {**os.environ, "LC_ALL": locale, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
        subprocess.run([sys.executable, "-c", NOTED], cwd=tmp_path, env=env, check=True, timeout=60)
    here = os.fsencode(tmp_path)
    noted = (tmp_path / "used" / "step-000000000001").read_bytes()
    assert noted == here + b"/\xc3\xbc\n" + here + b"/\xff\n"


@pytest.mark.parametrize("base", ["gone", "gone/checkpoints/step-000000000006"])
def test_a_checkpoint_alone_can_have_been_pruned(base: str, tmp_path: Path) -> None:
    """A model of transformers is there again when it is put back."""
    config = SFT(model=Start(from_=str(tmp_path / base)), lora=Adapters(rank=2))
    with pytest.raises(ConfigError, match=r"its adapters: .* is not there") as caught:
        restoring._below(Origin(checkpoint=tmp_path / "x", sha256="0", config=config), config)
    assert ("put it back: a run that goes on" in str(caught.value)) is ("step-" in base)


def test_preferences_begin_at_the_merged_start(runs: Path) -> None:
    """DPO over adapters over the SFT's: at step 0 the policy is the reference, to the bit."""
    first = next(record for record in _records(runs / "c") if record["step"] == 0)
    assert first["eval_rewards/margins"] == 0.0
    assert first["eval_loss"] == pytest.approx(0.6931472, abs=1e-6)
    last = _records(runs / "c")[-1]
    assert last["eval_rewards/margins"] != 0.0
    merged = trained(str(runs / "b"))
    expected = ft.lora.attach(merged.architecture, merged.params, ft.lora.LoRA(rank=2))[0]
    found = restored(str(runs / "c")).state.base
    assert found == ft.sft_step(expected, ft.optim.sgd()).value_and_grad.places.base


def test_a_resumed_run_has_the_same_bits(runs: Path, tmp_path: Path) -> None:
    run = tmp_path / "b"
    run.mkdir()
    shutil.copy(runs / "b" / "config.toml", run)
    text = (run / "config.toml").read_text().replace(str(runs / "b"), str(run))
    (run / "config.toml").write_text(text)
    command = ["sft", str(run / "config.toml"), "--resume"]
    assert main([*command, "--train.steps", "3"]) == 0
    assert main([*command, "--train.steps", "6"]) == 0
    assert _print(run) == _print(runs / "b")


def test_its_steps_can_be_made_again(runs: Path, capsys: Any) -> None:
    assert main(["verify", str(runs / "c"), "--replay", "2..6"]) == 0
    assert "same" in capsys.readouterr().out


def test_it_speaks_merged(runs: Path, capsys: Any) -> None:
    for run in ("b", "c"):
        assert main(["generate", str(runs / run), "1 plus", "--max-new-tokens", "4"]) == 0
    capsys.readouterr()


# What peft calls of transformers goes by another name there by now; only peft can mend that.
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_it_is_exported_merged_and_as_adapters(runs: Path, tmp_path: Path, capsys: Any) -> None:
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    assert main(["export", str(runs / "a"), str(tmp_path / "base")]) == 0
    assert main(["export", str(runs / "b"), str(tmp_path / "adapters")]) == 0
    assert main(["export", str(runs / "b"), str(tmp_path / "merged"), "--merge"]) == 0
    assert "as transformers reads it" in capsys.readouterr().out
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "rank = 2" in card
    assert "eval_loss" in card
    ids = torch.arange(8).unsqueeze(0)
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    with torch.no_grad():
        plain = base(input_ids=ids).logits
        over = peft.PeftModel.from_pretrained(base, tmp_path / "adapters").eval()
        found = over(input_ids=ids).logits
        torch.testing.assert_close(whole(input_ids=ids).logits, found, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(plain, found)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sft", "--lora.alpha", "8"], "lora.alpha: 8.0, and nothing has adapters without"),
        (["sft", "--lora.dora"], "lora.dora: True, and nothing has adapters without"),
        (["sft", "--lora.rank", "0"], "lora.rank: 0, expected an integer of at least 1"),
        (["sft", "--lora.rank", "2", "--lora.dropout", "1"], "lora.dropout: 1.0, expected"),
        (["sft", "--lora.rank", "2", "--lora.targets", "a,,b"], "expected names with commas"),
        (
            ["sft", "--model.from", "{runs}/a", "--lora.rank", "2", "--lora.targets", "q_prj"],
            "q_proj",
        ),
        (["export", "{runs}/a", "{tmp}/out", "--merge"], "has no adapters, its model is whole"),
        (["export", "{runs}/b", "{tmp}/out", "--dtype", "bfloat16"], "give it with --merge"),
        (["export", "{runs}/nowhere", "{tmp}/out"], "is not there"),
        (["export", "{runs}/a", "{runs}"], "is no export of functrain's"),
        (["export", "{runs}/a", "{tmp}/out", "--dtype", "int8"], "dtype: 'int8'"),
        (["export", "{runs}/a", "{tmp}/out", "--dtype", "float8_e4m3fn"], "dtype: 'float8_e4m3fn'"),
    ],
)
def test_what_cannot_be_is_said(
    arguments: list[str], message: str, runs: Path, tmp_path: Path, capsys: Any
) -> None:
    given = [each.format(runs=runs, tmp=tmp_path) for each in arguments]
    if given[0] == "sft":
        given += ["--directory", str(tmp_path / "run"), "--data.train", str(runs / "sft.jsonl")]
    assert main(given) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_base_that_is_another_or_gone_is_refused(runs: Path, tmp_path: Path, capsys: Any) -> None:
    """A run of adapters needs the checkpoint that it was trained over, as it was."""
    work = tmp_path / "work"
    shutil.copytree(runs, work)
    for config in work.glob("*/config.toml"):
        config.write_text(config.read_text().replace(str(runs), str(work)))
    speak = ["generate", str(work / "b"), "x", "--max-new-tokens", "1"]
    assert main(speak) == 0
    shutil.rmtree(work / "a" / "checkpoints")
    assert main(speak) == 2
    said = capsys.readouterr().err
    assert "the base of its adapters: " in said
    assert "put it back: a run that goes on removes its older checkpoints" in said
    config = work / "a" / "config.toml"
    other = config.read_text().replace("seed = 0", "seed = 1")
    config.unlink()
    shutil.rmtree(work / "a")
    (tmp_path / "other.toml").write_text(other)
    assert main(["pretrain", str(tmp_path / "other.toml")]) == 0
    assert main(speak) == 2
    assert "which is another checkpoint now" in capsys.readouterr().err
