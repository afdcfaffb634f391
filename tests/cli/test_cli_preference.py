"""`functrain dpo` with every loss, its cache of the reference, and what it refuses."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import math
from pathlib import Path
from typing import Any

import attrs
import pytest

import functrain as ft
from functrain import checkpoint
from functrain.cli import main, toml
from functrain.cli.config import Preference
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


@functools.cache
def _two_steps(loss: str, start: Path) -> tuple[Path, str]:
    """A run of two steps in micro-batches, and what it says."""
    options = ["--preference.loss", loss, "--train.microbatches", "2", *OPTIONS.get(loss, [])]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        code, run = _dpo(start, loss.replace(" ", ""), *options, "--train.steps", "2")
    assert code == 0
    return run, said.getvalue()


@pytest.mark.parametrize("loss", [*LOSSES, KTO, "sigmoid + 0.2*sft"])
def test_every_loss_trains_in_micro_batches(loss: str, start: Path) -> None:
    run, shown = _two_steps(loss, start)
    assert ("kl" if loss == KTO else "margin of the rewards") in shown
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [0, 1, 2]
    assert all(math.isfinite(record.get("loss", 0.0)) for record in records)


@pytest.mark.parametrize("loss", ["bco_pair", "aot", KTO, "sigmoid + 0.2*sft"])
def test_a_run_is_resumed_to_the_bit(loss: str, start: Path) -> None:
    """A step, then one more by --resume, end where two at once do."""
    run, _ = _two_steps(loss, start)
    name = f"resumed-{loss.replace(' ', '')}"
    options = ["--preference.loss", loss, "--train.microbatches", "2"]
    code, other = _dpo(start, name, *options, "--train.steps", "1", "--schedule.total", "2")
    assert code == 0
    assert _newest(other) != _newest(run)
    assert main(["dpo", str(other / "config.toml"), "--train.steps", "2", "--resume"]) == 0
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


def test_a_cache_that_nobody_has_filled_is_filled_while_it_trains(start: Path) -> None:
    """The training overwrites its params, and the reference stays what they were."""
    options = ("--train.microbatches", "2")
    code, filling = _dpo(start, "filling", "--preference.cache", f"{start}/late.jsonl", *options)
    assert code == 0
    code, online = _dpo(start, "beside", *options)
    assert code == 0
    assert _newest(filling) == _newest(online)


def test_a_cache_that_was_moved_is_asked_for(
    start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On resuming it was made anew, silently, and what is scored anew may differ in its last bits;
    and its place now was refused as another config."""
    cache, moved = tmp_path / "cache.jsonl", tmp_path / "moved.jsonl"
    options = ["--preference.cache", str(cache)]
    code, run = _dpo(start, "moved", *options, "--train.steps", "2", "--schedule.total", "4")
    assert code == 0
    written = cache.rename(moved).read_bytes()
    again = ["dpo", str(run / "config.toml"), "--train.steps", "4", "--resume"]
    capsys.readouterr()
    assert main(again) == 2
    told = capsys.readouterr().err
    assert f"preference.cache: {cache} is not there" in told
    assert "where it was moved, give --preference.cache with its place now" in told
    assert f"functrain reference {run}/config.toml" in told
    assert not cache.exists()
    assert main([*again, "--preference.cache", str(moved)]) == 0
    assert moved.read_bytes().startswith(written)
    code, alone = _dpo(start, "unmoved", *options)
    assert code == 0  # a new run makes its own
    assert _newest(run) == _newest(alone)
    away = moved.rename(cache)  # the run knows it as moved.jsonl now
    assert main(["verify", str(run), "--replay", "2..4"]) == 2
    assert f"preference.cache: {moved} is not there" in capsys.readouterr().err
    assert not moved.exists()
    moved.symlink_to(away)  # what that error advises
    assert main(["verify", str(run), "--replay", "2..4"]) == 0
    moved.unlink()
    away.rename(moved)
    other = ["--preference.cache", str(tmp_path / "another.jsonl")]
    assert main([*again, *other, "--train.steps", "5"]) == 2
    assert "another.jsonl is not there" in capsys.readouterr().err
    moved.unlink()
    assert main([*again, "--train.steps", "5"]) == 2
    assert main(["reference", str(run / "config.toml")]) == 0  # what that error advises
    assert main([*again, "--train.steps", "5"]) == 0


def test_a_cache_for_ld_alpha_is_by_token_and_changes_no_bit(
    start: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--preference.ld-alpha", "0.5", "--train.microbatches", "2"]
    cache = ["--preference.cache", str(start / "by-token.jsonl")]
    assert main(["reference", str(start / "dpo.toml"), *cache, *options]) == 0
    assert "32 completions, 32 of them new" in capsys.readouterr().out
    code, ahead = _dpo(start, "ld-ahead", *cache, *options)
    assert code == 0
    code, online = _dpo(start, "ld-online", *options)
    assert code == 0
    assert "chosen is the likelier" in capsys.readouterr().out
    assert _newest(ahead) == _newest(online)


def test_data_named_as_the_cache_are_left_as_they_are(
    start: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their last line has no newline, as a torn one of a cache."""
    before = (start / "pairs.jsonl").read_bytes()
    given = ["--preference.cache", str(start / "pairs.jsonl")]
    assert main(["reference", str(start / "dpo.toml"), *given]) == 2
    assert "pairs.jsonl: no cache of functrain" in capsys.readouterr().err
    assert (start / "pairs.jsonl").read_bytes() == before


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
        (["loss", "0*sft"], "preference.loss: the weight of 'sft' is '0', expected a finite"),
        (["loss", "sft + x*ipo"], "the weight of 'ipo' is 'x', expected a finite number above 0"),
        (["loss", "1e999*sft"], "the weight of 'sft' is '1e999', expected a finite number above"),
        (["loss", "sigmoid +"], "'' is unknown"),
        (["loss", "exo_pair"], "preference.label_smoothing: the 'exo_pair' loss"),
        (["loss", "kto", "label-smoothing", "0.1"], "label_smoothing: the kto loss has none"),
        (["loss", "ipo", "length-normalized"], "preference.length_normalized: the 'ipo' loss"),
        (["loss", "sigmoid + hinge", "label-smoothing", "0.1"], "the hinge loss has none"),
        (["loss", "sigmoid + simpo", "length-normalized"], "the 'simpo' loss has no Δ to modify"),
        (["loss", "sft + ipo", "ld-alpha", "0.5"], "preference.ld_alpha: the 'ipo' loss divides"),
        (["loss", "nca_pair", "divergence", "alpha"], "preference.divergence: the 'nca_pair'"),
        (["loss", "simpo", "reference-mixup", "0.5"], "preference.reference_mixup: the 'simpo'"),
        (["beta", "0"], "preference.beta: 0.0, expected a positive finite number"),
        (["layout", "packed"], "preference.layout: 'packed' is unknown"),
        (["loss", "kto", "layout", "shared_prompt"], "preference.layout: 'shared_prompt' is for"),
        (["divergence", "kl"], "preference.divergence: 'kl' is unknown"),
        (["ld-alpha", "1.5"], "preference.ld_alpha: 1.5, expected a number in [0, 1]"),
        (
            ["cache", "c.jsonl", "reference-mixup", "0.5"],
            "leave out preference.cache, or preference.reference_mixup",
        ),
        (["loss", "simpo", "cache", "c.jsonl"], "preference.cache: the simpo loss reads no ref"),
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


BAD = [
    ("loss = 3", "loss: expected a text in quotes, got 3"),
    ("loss = 'nan*sft'", "loss: the weight of 'sft' is 'nan', expected a finite number above 0"),
    ("beta = nan", "beta: nan, expected a positive finite number"),
    ("label_smoothing = 0.5", "label_smoothing: 0.5, expected a number in [0, 0.5)"),
    ("loss = 'hinge'\nlabel_smoothing = 0.1", "label_smoothing: the hinge loss has none"),
    ("loss = 'simpo'\nsimpo_gamma = -1", "simpo_gamma: -1.0, expected a finite number"),
    ("simpo_gamma = 1.5", "simpo_gamma: 1.5, and nothing reads it without the 'simpo' loss"),
    ("loss = 'cpo'\ncpo_alpha = inf", "cpo_alpha: inf, expected a finite number of at least 0"),
    ("cpo_alpha = 0", "cpo_alpha: 0.0, and nothing reads it without the 'cpo' loss"),
    ("loss = 'orpo'\norpo_lambda = 0", "orpo_lambda: 0.0, expected a positive finite number"),
    ("orpo_lambda = 1.0", "orpo_lambda: 1.0, and nothing reads it without the 'orpo' loss"),
    ("loss = 'discopop'\ndiscopop_tau = 0", "discopop_tau: 0.0, expected a positive"),
    ("discopop_tau = 0.1", "discopop_tau: 0.1, and nothing reads it without the 'discopop' loss"),
    ("divergence = 'kl'", "divergence: 'kl' is unknown; known: 'alpha', 'forward_kl'"),
    (
        "loss = 'aot'\ndivergence = 'alpha'",
        "divergence: the 'aot' loss is defined for",
    ),
    (
        "divergence = 'alpha'\ndivergence_alpha = 1",
        "divergence_alpha: 1.0, expected a number",
    ),
    (
        "divergence_alpha = 0.3",
        "divergence_alpha: 0.3, and nothing reads it without the",
    ),
    ("length_normalized = 1", "length_normalized: expected true or false, got 1"),
    ("loss = 'ipo'\nlength_normalized = true", "length_normalized: the 'ipo' loss is no function"),
    ("ld_alpha = -0.1", "ld_alpha: -0.1, expected a number in [0, 1]"),
    ("loss = 'sft'\nld_alpha = 0.5", "ld_alpha: the 'sft' loss is the likelihood of the chosen"),
    ("wpo = 'yes'", "wpo: expected true or false, got 'yes'"),
    ("loss = 'aot'\nwpo = true", "wpo: the 'aot' loss sorts the batch"),
    ("reference_mixup = 0", "reference_mixup: 0.0, expected a number in (0, 1]"),
    ("loss = 'orpo'\nreference_mixup = 0.5", "reference_mixup: the 'orpo' loss has no reference"),
    ("reference_sync = 1.5", "reference_sync: expected an integer, got 1.5"),
    ("reference_sync = 8", "reference_sync: 8, and nothing reads it without reference_mixup"),
    (
        "loss = 'kto'\ndesirable_weight = 0",
        "desirable_weight: 0.0, expected a positive",
    ),
    ("undesirable_weight = 2.0", "undesirable_weight: 2.0, and the sigmoid loss does not read it"),
    ("loss = 'kto'\nwpo = true", "wpo: True, and the kto loss does not read it; leave it out"),
    ("loss = 'kto'\nld_alpha = 0.5", "ld_alpha: 0.5, and the kto loss does not read it"),
    ("cache = ''", "cache: empty; expected a path"),
    ("cache = 'c'\nreference_mixup = 0.5", "cache: 'c' would keep log-probs of a reference that"),
    ("reference_mixups = 0.5", "reference_mixups: unknown key; did you mean 'reference_mixup'"),
]


@pytest.mark.parametrize(("lines", "message"), BAD)
def test_what_makes_no_sense_in_a_file_is_named_by_its_key(
    lines: str, message: str, start: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = start / "bad.toml"
    config = (start / "dpo.toml").read_text().replace(f"{start}/dpo'", f"{start}/bad'")
    file.write_text(f"{config}[preference]\n{lines}\n")
    assert main(["dpo", str(file)]) == 2
    assert f"preference.{message}" in capsys.readouterr().err
    assert not (start / "bad").exists()


def test_every_key_of_a_preference_has_a_bad_example() -> None:
    named = {message.split(":")[0] for _, message in BAD}
    assert {field.name for field in attrs.fields(Preference)} - {"layout"} <= named


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


@functools.cache
def _losses_of(layout: str, start: Path) -> list[float]:
    """Of a run in a layout, which is one from the cache to the bit."""
    options = ["--preference.layout", layout, "--train.microbatches", "2"]
    code, online = _dpo(start, f"online-{layout}", *options)
    assert code == 0
    cache = ["--preference.cache", str(start / f"cache-{layout}.jsonl")]
    assert main(["reference", str(start / "dpo.toml"), *options, *cache]) == 0
    code, ahead = _dpo(start, f"ahead-{layout}", *options, *cache)
    assert code == 0
    assert _newest(ahead) == _newest(online)
    assert toml.read_any(online / "config.toml").preference.layout == layout
    lines = (online / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line).get("loss", 0.0) for line in lines]


@pytest.mark.parametrize("layout", ["padding_free", "shared_prompt"])
def test_a_layout_trains_from_the_cache_to_the_same_bits(layout: str, start: Path) -> None:
    """And to rounding it is the run that is padded."""
    assert _losses_of(layout, start) == pytest.approx(_losses_of("padded", start), rel=1e-4)


def test_a_long_prompt_is_cut_before_its_completion(
    start: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _ = _dpo(start, "cut", "--data.time", "20")
    assert code == 0
    assert "truncated by" in capsys.readouterr().err
    code, _ = _dpo(start, "first", "--data.time", "20", "--data.truncation", "prompt_first")
    assert code == 0
    assert "kept 16" in capsys.readouterr().err
