"""`functrain verify` and `functrain diff`: whole or not, the same or not, and where they part."""

from __future__ import annotations

import math
import shutil
from contextlib import closing
from pathlib import Path

import attrs
import pytest

from functrain.checkpoint.filesystem import FileSystem
from functrain.checkpoint.manifest import Manifest
from functrain.cli import main, verify
from functrain.cli.origins import RunDirectory
from functrain.tracking.jsonl import JSONLTracker


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    for name, seed in (("one", "0"), ("other", "1")):
        given = ["demo", "--scale", "tiny", "--directory", str(root / name), "--seed", seed]
        assert main(given) == 0
    return root


def test_every_checkpoint_of_every_stage_is_verified(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(runs / "one")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert all("whole; " in line for line in lines)


def test_every_run_beside_the_stages_is_verified(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, run in (("adapters", "dpo"), ("sft", "sft")):
        shutil.copytree(runs / "one" / run, tmp_path / name)
    assert main(["verify", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [Path(line.split(":")[0]).parent.parent.name for line in lines] == [
        *("sft", "sft"),
        *("adapters", "adapters"),
    ]


@pytest.mark.parametrize("replay", ["9..12", "0..9"])
@pytest.mark.parametrize("stage", ["pretrain", "sft", "dpo"])
def test_steps_that_are_made_again_are_the_same(
    stage: str, replay: str, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(runs / "one" / stage), "--replay", replay]) == 0
    assert "made again: the same bits" in capsys.readouterr().out


def test_a_step_that_was_not_made_so_is_found(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint of another run in the place of this one's: whole, but not of these steps."""
    shutil.copytree(runs / "one" / "pretrain", tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "step-000000000012"
    shutil.rmtree(path)
    shutil.copytree(runs / "other" / "pretrain" / "checkpoints" / path.name, path)
    assert main(["verify", str(tmp_path / "run")]) == 0
    assert main(["verify", str(tmp_path / "run"), "--replay", "9..12"]) == 2
    said = capsys.readouterr().err
    assert "made again from step 9, it differs" in said
    assert "params/model.embed_tokens.weight: float32 [257, 16], " in said


def test_an_altered_checkpoint_is_named(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(runs / "one" / "sft", tmp_path / "run")
    file = _altered(tmp_path / "run" / "checkpoints" / "step-000000000009")
    assert main(["verify", str(tmp_path / "run")]) == 2
    assert f"{file}: its sha256 does not match" in capsys.readouterr().err


def test_fast_sums_of_several_workers_are_not_made_again_by_one(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """But on from there, by one worker, they are."""
    shutil.copytree(runs / "one" / "pretrain", tmp_path / "run")
    read = verify.read_manifest

    def by_two(filesystem: FileSystem, path: Path) -> Manifest:
        found = read(filesystem, path)
        more = {"workers": 2} if found.step == 9 else {}
        return attrs.evolve(found, numerics={**found.numerics, **more})

    monkeypatch.setattr(verify, "read_manifest", by_two)
    assert main(["verify", str(tmp_path / "run"), "--replay", "0..12"]) == 2
    assert "step-000000000009 was made by 2 workers" in capsys.readouterr().err
    assert main(["verify", str(tmp_path / "run"), "--replay", "9..12"]) == 0


@pytest.mark.parametrize(
    ("replay", "message"),
    [
        ("12..9", "expected two steps, the lower first"),
        ("a..b", "expected two steps"),
        ("6..12", "has no checkpoint of step 6; kept are 9, 12"),
    ],
)
def test_a_replay_that_cannot_be_made_is_named(
    replay: str, message: str, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(runs / "one" / "dpo"), "--replay", replay]) == 2
    assert message in capsys.readouterr().err


def test_the_same_run_differs_in_nothing(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in ("one/dpo", "one/dpo/checkpoints/step-000000000009"):
        assert main(["diff", str(runs / path), str(runs / path)]) == 0
        assert "the same bits" in capsys.readouterr().out


def test_runs_that_part_are_told_apart(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", str(runs / "one" / "sft"), str(runs / "other" / "sft")]) == 1
    said = capsys.readouterr().out
    for part in (
        "config train.seed: 0 and 1",
        "metrics part at step 0:",
        "step-000000000009: ",  # the first of the steps that both have kept
        "params/model.embed_tokens.weight: float32 [257, 16], ",
    ):
        assert part in said
    assert "step-000000000012" not in said.split("metrics part")[1]
    assert "config sha256" not in said


def _altered(checkpoint: Path) -> Path:
    """One bit of its params is another, as a disk may have it."""
    file = checkpoint / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    return file


@pytest.mark.parametrize("step", ["step-000000000009", "step-000000000012"])
@pytest.mark.parametrize("side", [0, 1])
def test_what_is_said_to_be_the_same_has_been_hashed(
    side: int, step: str, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(runs / "one" / "sft", tmp_path / "copy")
    file = _altered(tmp_path / "copy" / "checkpoints" / step)
    given = [str(runs / "one" / "sft"), str(tmp_path / "copy")]
    assert main(["diff", given[side], given[1 - side]]) == 2
    assert f"{file}: its sha256 does not match" in capsys.readouterr().err


def test_a_config_that_cannot_be_read_is_said(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(runs / "one" / "sft", tmp_path / "copy")
    with (tmp_path / "copy" / "config.toml").open("a") as file:
        file.write("[nothing]\n")
    assert main(["diff", str(runs / "one" / "sft"), str(tmp_path / "copy")]) == 0
    out = capsys.readouterr().out
    assert "configs not compared: " in out
    assert "nothing" in out
    assert "the same bits at every step" in out


def test_steps_that_are_the_same_are_named_in_their_order(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(runs / "one" / "sft")
    assert main(["diff", run, run]) == 0
    assert "the same bits at every step that both have kept: 9, 12" in capsys.readouterr().out


def test_a_checkpoint_that_is_pruned_meanwhile_is_passed_over(
    runs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(runs / "one" / "sft", tmp_path / "copy")
    real = verify.read_manifest

    def pruned(filesystem: FileSystem, path: Path) -> Manifest:
        if path.name == "step-000000000009":
            shutil.rmtree(tmp_path / "copy" / "checkpoints" / path.name, ignore_errors=True)
        return real(filesystem, path)

    monkeypatch.setattr(verify, "read_manifest", pruned)
    assert main(["diff", str(runs / "one" / "sft"), str(tmp_path / "copy")]) == 0
    assert "that both have kept: 12\n" in capsys.readouterr().out


def test_what_is_no_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["verify", str(tmp_path)], ["diff", str(tmp_path), str(tmp_path)]):
        assert main(command) == 2
        assert f"{tmp_path}: no run's directory" in capsys.readouterr().err


def test_what_is_not_there_is_no_run_though_it_would_lie_in_one(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs / "one" / "sft"
    for path in (run / "checkpoints" / "step-99", run / "nothing", run / "nothing" / "deeper"):
        for command in (
            ["verify", str(path)],
            ["diff", str(path), str(run)],
            ["report", str(path)],
        ):
            assert main(command) == 2
            assert f"{path}: not there; expected a run" in capsys.readouterr().err
    pruned = run / "checkpoints" / "step-000000000003"
    assert main(["verify", str(pruned)]) == 2
    assert f"{pruned}/manifest.json: cannot be read" in capsys.readouterr().err


def test_a_metric_that_is_no_number_in_both_runs_does_not_part_them(tmp_path: Path) -> None:
    runs = [tmp_path / name for name in ("one", "other")]
    for run, norm in zip(runs, (1.0, 2.0), strict=True):
        run.mkdir()
        (run / "config.toml").write_text("")
        with closing(JSONLTracker(run / "metrics.jsonl")) as tracker:
            tracker.log(1, {"loss": math.nan})
            tracker.log(2, {"loss": math.nan, "grad_norm": norm})
    told = list(verify._logged([RunDirectory(run) for run in runs]))
    assert told == ["metrics part at step 2:", "  grad_norm: 1.0 and 2.0"]
