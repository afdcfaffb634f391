"""`functrain plan`: from configs of every stage, before anything of a run is there."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import attrs
import pytest
from models import families

from functrain.cli import main
from functrain.models import decoder
from functrain.planning import measuring

SIZES = {
    "data.vocabulary": 32_000,
    "data.time": 2_048,
    "model.width": 2_048,
    "model.layers": 2,
    "model.heads": 16,
    "train.batch-size": 64,
    "train.microbatches": 64,
    "train.precision": "bf16_params",
}
LARGE = [each for name, value in SIZES.items() for each in (f"--{name}", str(value))]


def _rows(out: str) -> dict[str, list[str]]:
    lines = [re.split(r"\s{2,}", line.strip()) for line in out.splitlines()]
    return {line[0]: line[1:] for line in lines if len(line) == 3}


def test_a_pretraining_run_that_is_not_there_yet(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.toml"
    path.write_text('[data]\ntrain = "not-there-yet/*.bin"\n')
    given = ["plan", "pretrain", str(path), "--workers", "64", "--device", "h100", *LARGE]
    assert main(given) == 0
    out = capsys.readouterr().out
    assert "64 workers (h100, 8 to a node), bf16_params, fast" in out
    rows = _rows(out)
    whole, part = (float(each) for each in rows["moments, GiB"])
    assert whole == pytest.approx(64 * part, rel=0.1)
    replicated, sharded = (float(each) for each in rows["a step, s"])
    assert 0 < replicated < 1
    assert 0 < sharded < 1
    assert list(tmp_path.iterdir()) == [path]


def test_what_does_not_fit_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "pretrain", "--workers", "2", "--memory", "0.5", *LARGE]) == 0
    assert "does not fit" in capsys.readouterr().out


def test_pairs_over_a_model_of_transformers_without_its_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    families.made("llama").config.save_pretrained(tmp_path)
    options = ["--model.from", str(tmp_path), "--workers", "4", "--train.microbatches", "4"]
    assert main(["plan", "dpo", *options]) == 0
    pairs = _rows(capsys.readouterr().out)
    assert main(["plan", "sft", *options]) == 0
    rows = _rows(capsys.readouterr().out)
    assert pairs["average, reference, GiB"] == pairs["params, GiB"]
    assert float(pairs["computing, s"][0]) > 2 * float(rows["computing, s"][0])


def test_this_machine(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Measured with less than a plan takes, whose numbers the tests of planning look at."""
    monkeypatch.setattr(measuring, "_NUMBERS", 1 << 16)
    small = functools.partial(attrs.evolve, vocabulary=256, width=48)
    monkeypatch.setattr(measuring, "decoder", lambda shape: decoder(small(shape)))
    assert main(["plan", "pretrain", "--device", "here", "--train.threads", "1"]) == 0
    out = capsys.readouterr().out
    assert "1 workers (this machine" in out
    assert re.search(r"a worker: [0-9.e+-]+ TFLOP/s", out)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["plan", "pretrian"], "plan: 'pretrian'; did you mean 'pretrain'"),
        (["plan"], "functrain plan pretrain|sft|dpo [run.toml] --workers 8"),
        (["plan", "pretrain", "--device", "v100"], "device: 'v100' is unknown; did you mean"),
        (["plan", "pretrain", "--device", "foo"], "'a100', 'b200', 'h100', 'h200', 'here'"),
        (["plan", "pretrain", "--tflops", "-1"], "tflops: -1.0, expected a positive finite number"),
        (["plan", "pretrain", "--memory", "nan"], "memory: nan, expected a positive finite number"),
        (["plan", "pretrain", "--latency", "-1"], "latency: -1.0, expected a positive finite num"),
        (["plan", "pretrain", "--workers", "0"], "workers: 0, expected an integer of at least 1"),
        (["plan", "sft", "--train.stepps", "3"], "run functrain plan sft --help"),
        (["plan", "pretrain", "--workers", "3"], "cannot be shared out to 3 workers"),
        (["plan", "pretrain", "--workers", "8"], "--train.microbatches 8 --train.batch-size 16"),
        (["plan", "pretrain", "--workers", "24"], "--train.microbatches 24 --train.batch-size 24"),
        (["plan", "pretrain", "--data.train", "x.bin"], "data.vocabulary: missing"),
        (["plan", "sft", "--model.from", "nowhere"], "model.from: nowhere is not there"),
        (["plan", "sft", "--lora.rank", "8"], "lora.rank: a plan is for models that are trained"),
        (["plan", "pretrain", "--utilisation", "0"], "utilisation: 0.0, expected a number"),
        (
            ["plan", "pretrain", "--utilisation", "0.5", "--tflops", "9"],
            "is given by tflops; leave",
        ),
        (["plan", "pretrain", "--utilisation", "7", "--device", "here"], "is measured; leave it"),
        (["plan", "pretrain", "--model.layers", "5000"], "model.layers: 5000, expected an integer"),
        (["plan", "pretrain", "--model.width", "2147483640"], "torch counts up to 8,589,934,592"),
    ],
)
def test_bad_input_is_answered(
    given: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(given) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "name"), [(["plan", "sft"], "plan sft"), (["reference"], "reference")]
)
def test_help_is_of_the_command_that_was_given(
    given: list[str], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*given, "--help"]) == 0
    out = capsys.readouterr().out
    assert f"usage: functrain {name} [-h]" in out
    assert f"functrain {name} [run.toml] [options]" in out
    assert "--resume" not in out  # it begins nothing that could be gone on with


def test_a_file_of_blocks_has_no_shapes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    assert main(["plan", "sft", "--model.from", str(path)]) == 2
    assert "a GGUF file, of which a plan knows no shapes" in capsys.readouterr().err
