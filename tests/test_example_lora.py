"""The example of adapters, on a tiny model: stopped in each stage it ends as if left alone."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import test_example_smollm2

import functrain as ft

transformers = pytest.importorskip("transformers")
tiny = test_example_smollm2.tiny

PAIRS = [(f"What is {n} plus one?", f"It is {n + 1}.") for n in range(80)]


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "examples"))
    sys.modules.pop("smollm2_lora", None)
    import smollm2_lora

    module: ModuleType = smollm2_lora
    monkeypatch.setattr(module, "dialogues", lambda _cache: PAIRS)
    monkeypatch.setattr(module, "HELD_OUT", 38)
    return module


def _fingerprint(said: str) -> str:
    (found,) = [x.split()[1] for x in said.splitlines() if x.startswith("fingerprint")]
    return found


@pytest.mark.filterwarnings("ignore:.*generation flags are not valid.*")
def test_stopped_in_both_stages_it_ends_as_one_left_alone(
    example: ModuleType,
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["--model", str(tiny), "--steps", "7", "--directory"]
    example.main([*arguments, str(tmp_path / "alone")])
    said = capsys.readouterr().out
    alone = _fingerprint(said)
    assert "goes on" not in said
    assert said.count("asked ") == 3
    train = ft.train

    def cut(*args: Any, **options: Any) -> Iterator[Any]:
        for state, metrics in train(*args, **options):
            if state.step == 6:
                raise KeyboardInterrupt
            yield state, metrics

    for _ in range(2):  # in the first stage, and then in the second
        monkeypatch.setattr(example.ft, "train", cut)
        with pytest.raises(KeyboardInterrupt):
            example.main([*arguments, str(tmp_path / "stopped")])
        monkeypatch.setattr(example.ft, "train", train)
        if not (tmp_path / "stopped" / "dpo").exists():
            _finish_the_first(example, arguments, tmp_path, monkeypatch)
    capsys.readouterr()
    example.main([*arguments, str(tmp_path / "stopped")])
    said = capsys.readouterr().out
    assert "goes on from step 5" in said
    assert _fingerprint(said) == alone
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "stopped" / "export")
    assert type(model).__name__ == "LlamaForCausalLM"


def _finish_the_first(
    example: ModuleType, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SFT to its end, and no DPO."""

    def refuse(*_args: Any, **_options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(example.ft, "dpo_step", refuse)
    with pytest.raises(KeyboardInterrupt):
        example.main([*arguments, str(tmp_path / "stopped")])
    monkeypatch.undo()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "examples"))
    monkeypatch.setattr(example, "dialogues", lambda _cache: PAIRS)
    monkeypatch.setattr(example, "HELD_OUT", 38)
