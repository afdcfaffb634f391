"""`functrain dpo` with every loss, its cache of the reference, and what it refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

import functrain as ft
from functrain import checkpoint
from functrain.cli import main, toml
from functrain.cli.known import KTO, LOSSES

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]
PAIRS = [
    {"prompt": f"{a} and {b}:", "chosen": f" {a} {b}", "rejected": f" {b} {a}"}
    for a in WORDS[:4]
    for b in WORDS[4:]
]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a pretrained run, pairs, and a config for `functrain dpo`."""
    root = tmp_path_factory.mktemp("preference")
    (root / "text.txt").write_text(" ".join(WORDS * 20))
    (root / "pairs.jsonl").write_text("\n".join(json.dumps(pair) for pair in PAIRS))
    train = "[train]\nsteps = 4\nbatch_size = 4\nsave_every = 2\nthreads = 1\ndevice = 'cpu'\n"
    (root / "pretrain.toml").write_text(
        f"directory = '{root}/pretrain'\n[model]\nwidth = 16\nlayers = 1\nheads = 2\n"
        f"[data]\ntrain = '{root}/text.txt'\ntime = 32\n{train}"
    )
    (root / "dpo.toml").write_text(
        f"stage = 'dpo'\ndirectory = '{root}/dpo'\n[model]\nfrom = '{root}/pretrain'\n"
        f"[data]\ntrain = '{root}/pairs.jsonl'\nheld_out = '{root}/pairs.jsonl'\ntime = 48\n"
        f"{train}[evaluation]\nlimit = 4\n"
    )
    assert main(["pretrain", str(root / "pretrain.toml")]) == 0
    return root


def _dpo(start: Path, name: str, *options: str) -> tuple[int, Path]:
    run = start / name
    return main(["dpo", str(start / "dpo.toml"), "--directory", str(run), *options]), run


def _newest(run: Path) -> dict[str, Any]:
    """The hashes of every file of the newest checkpoint, and its leaves."""
    found = checkpoint.latest(run / "checkpoints")
    assert found is not None
    files: dict[str, Any] = json.loads((found / "manifest.json").read_text())["files"]
    return files


OPTIONS = {"exo_pair": ["--preference.label-smoothing", "0.001"]}


@pytest.mark.parametrize("loss", [*LOSSES, KTO, "sigmoid + 0.2*sft"])
def test_every_loss_trains_in_micro_batches(
    loss: str, start: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--preference.loss", loss, "--train.microbatches", "2", *OPTIONS.get(loss, [])]
    code, run = _dpo(start, loss.replace(" ", ""), *options)
    assert code == 0
    shown = capsys.readouterr().out
    assert ("kl" if loss == KTO else "margin of the rewards") in shown
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [0, 1, 2, 3, 4]
    assert all(math.isfinite(record.get("loss", 0.0)) for record in records)


@pytest.mark.parametrize("loss", ["bco_pair", "aot", KTO, "sigmoid + 0.2*sft"])
def test_a_run_is_resumed_to_the_bit(loss: str, start: Path) -> None:
    """Two steps, then two more by --resume, end where four at once do."""
    name = f"resumed-{loss.replace(' ', '')}"
    options = ["--preference.loss", loss, "--train.microbatches", "2"]
    code, run = _dpo(start, name, *options)
    assert code == 0
    code, other = _dpo(start, f"{name}-2", *options, "--train.steps", "2", "--schedule.total", "4")
    assert code == 0
    assert _newest(other) != _newest(run)
    assert main(["dpo", str(other / "config.toml"), "--train.steps", "4", "--resume"]) == 0
    assert _newest(other) == _newest(run)


def test_a_cache_filled_ahead_changes_no_bit(
    start: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = ["--preference.cache", str(start / "cache.jsonl")]
    split = ["--train.microbatches", "2"]
    command = ["reference", str(start / "dpo.toml"), *cache, *split]
    assert main(command) == 0
    assert f"{start}/cache.jsonl: 32 completions, 32 of them new" in capsys.readouterr().out
    assert main(command) == 0
    assert "32 completions, 0 of them new" in capsys.readouterr().out
    assert not (start / "dpo").exists()
    code, ahead = _dpo(start, "ahead", *cache, *split)
    assert code == 0
    code, online = _dpo(start, "online", *split)
    assert code == 0
    assert _newest(ahead) == _newest(online)
    assert main(["verify", str(ahead), "--replay", "2..4"]) == 0
    # The cache of another reference is refused.
    other = ["--model.from", str(online)]
    code, _ = _dpo(start, "other", *cache, *other)
    assert code == 2
    assert "of another reference" in capsys.readouterr().err


def test_a_reference_without_a_cache_is_answered(
    start: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["reference", str(start / "dpo.toml")]) == 2
    assert "preference.cache: missing; name a file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["loss", "sigmod"], "preference.loss: 'sigmod' is unknown; did you mean 'sigmoid'"),
        (["loss", "kto + sft"], "'kto' is a loss without pairs, so it stands alone"),
        (["loss", "0*sft"], "expected a loss, or a weight above 0, * and a loss"),
        (["loss", "x*sft"], "expected a loss, or a weight above 0, * and a loss"),
        (["loss", "sigmoid +"], "'' is unknown"),
        (["loss", "exo_pair"], "preference.label_smoothing: the 'exo_pair' loss"),
        (["loss", "kto", "label-smoothing", "0.1"], "label_smoothing: the kto loss has none"),
        (["loss", "ipo", "length-normalized"], "preference.length_normalized: the 'ipo' loss"),
        (["loss", "nca_pair", "divergence", "alpha"], "preference.divergence: the 'nca_pair'"),
        (["loss", "simpo", "reference-mixup", "0.5"], "preference.reference_mixup: the 'simpo'"),
        (["beta", "0"], "preference.beta: 0.0, expected a positive finite number"),
        (["divergence", "kl"], "preference.divergence: 'kl' is unknown"),
        (["ld-alpha", "1.5"], "preference.ld_alpha: 1.5, expected a number in [0, 1]"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_made(
    options: list[str], message: str, start: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [
        f"--preference.{each}" if number % 2 == 0 else each for number, each in enumerate(options)
    ]
    code, run = _dpo(start, "refused", *given)
    assert code == 2
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert message in said
    assert not run.exists()


def test_a_moving_reference_is_in_the_checkpoint(start: Path) -> None:
    code, run = _dpo(
        start, "moving", "--preference.reference-mixup", "0.5", "--preference.reference-sync", "2"
    )
    assert code == 0
    found = checkpoint.load_tensors(run / "checkpoints", "reference/*", "params/*")
    moved = {
        name: found[f"reference/{name.removeprefix('params/')}"]
        for name in found
        if name.startswith("params/")
    }
    assert moved
    assert any(ft.trees.digest(found[n]) != ft.trees.digest(r) for n, r in moved.items())
    assert toml.read_any(run / "config.toml").preference.reference_sync == 2


def test_a_long_prompt_is_cut_before_its_completion(
    start: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _ = _dpo(start, "cut", "--data.time", "20")
    assert code == 0
    assert "truncated by" in capsys.readouterr().err
    code, _ = _dpo(start, "first", "--data.time", "20", "--data.truncation", "prompt_first")
    assert code == 0
    assert "kept 16" in capsys.readouterr().err
