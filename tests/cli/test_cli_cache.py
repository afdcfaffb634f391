"""`data.cache`: the text of a run tokenised once, and the same run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest

import functrain as ft
from functrain import checkpoint
from functrain.cli import build, directory, main, sources, toml
from functrain.cli.config import Pretrain, Text
from functrain.data import ByteTokenizer, Packed, TextRows

CONFIG = """
directory = {directory}
[model]
width = 8
layers = 1
heads = 1
[data]
train = {train}
held_out = {train}
time = 16
limit = 30
[schedule]
name = "constant_with_warmup"
warmup = 1
[train]
steps = 4
batch_size = 2
save_every = 2
threads = 1
device = "cpu"
"""


def _config(tmp_path: Path, name: str) -> str:
    train = tmp_path / "train.jsonl"
    train.write_text("".join(json.dumps({"text": f"text {n * n}"}) + "\n" for n in range(40)))
    values = {"directory": tmp_path / name, "train": train}
    path = tmp_path / f"{name}.toml"
    path.write_text(CONFIG.format(**{key: json.dumps(str(v)) for key, v in values.items()}))
    return str(path)


def _fingerprint(run: Path) -> str:
    newest = checkpoint.latest(run / "checkpoints")
    assert newest is not None
    return (newest / "manifest.json").read_text()


@pytest.mark.long
def test_a_cache_may_come_on_resume_and_changes_no_bit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = ["--data.cache", str(tmp_path / "cache")]
    assert main(["pretrain", _config(tmp_path, "one")]) == 0
    two = _config(tmp_path, "two")
    assert main(["pretrain", two, "--train.steps", "2"]) == 0
    assert main(["pretrain", two, *cache, "--resume"]) == 0
    said = capsys.readouterr().err
    assert "training text: the first 30 of 40 documents in 1 file of" in said
    assert _fingerprint(tmp_path / "two") == _fingerprint(tmp_path / "one")
    assert len(list((tmp_path / "cache").iterdir())) == 1  # what is held out is the same file


def test_a_cache_is_no_other_run(tmp_path: Path) -> None:
    config = toml.read(Path(_config(tmp_path, "run")), Pretrain)
    begun = directory.begun(config, threads=1, device="cpu")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text(toml.dumps(begun))
    kept = attrs.evolve(config, data=attrs.evolve(config.data, cache=str(tmp_path / "cache")))
    assert directory.resumed(kept, threads=1, device="cpu").data.cache == str(tmp_path / "cache")
    built = build.build(kept)
    assert built.notes[0].startswith("training text: the first 30 of 40 documents in 1 file of")


@pytest.mark.parametrize("packing", [False, True])
def test_the_data_are_the_same_with_a_cache(tmp_path: Path, packing: bool) -> None:
    config = toml.read(Path(_config(tmp_path, "run")), Pretrain)
    plain = attrs.evolve(config.data, packing=packing)
    kept = attrs.evolve(plain, cache=str(tmp_path / "cache"))
    one, other = (
        sources.sources(attrs.evolve(config, data=each), ByteTokenizer())[0]
        for each in (plain, kept)
    )
    assert type(one) is type(other) is (Packed if packing else TextRows)
    assert sources.digest(one) == sources.digest(other)


def test_what_needs_no_cache_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given, cache = _config(tmp_path, "run"), ["--data.cache", str(tmp_path / "cache")]
    assert main(["pretrain", given, *cache, "--data.train", "embedded"]) == 2
    assert "data.cache: the embedded data are in memory anyway" in capsys.readouterr().err
    np.arange(100, dtype=np.uint16).tofile(tmp_path / "ids.bin")
    ids = ["--data.train", str(tmp_path / "ids.bin"), "--data.vocabulary", "100"]
    assert main(["pretrain", given, *cache, *ids]) == 2
    assert "holds token ids, which are mapped as they are" in capsys.readouterr().err


@pytest.mark.parametrize("cached", [False, True])
def test_what_was_passed_over_is_said_of_both_texts(tmp_path: Path, cached: bool) -> None:
    config = toml.read(Path(_config(tmp_path, "run")), Pretrain)
    (tmp_path / "held.jsonl").write_text('{"text": "some text"}\n{}\n{"text": 3}\n')
    (tmp_path / "train.jsonl").write_text('{"text": "some text"}\n{\n')
    more: dict[str, Any] = {"held_out": str(tmp_path / "held.jsonl"), "on_bad_record": "skip"}
    more["cache"] = str(tmp_path / "cache") if cached else None
    said = build.build(attrs.evolve(config, data=attrs.evolve(config.data, **more))).notes
    assert "training text: 1 malformed, passed over" in said
    assert "held-out text: 2 malformed, passed over" in said
    assert f"held-out text: {tmp_path / 'held.jsonl'}:2: no text under 'text'; it is empty" in said


def test_what_has_no_records_has_none_that_are_passed_over(tmp_path: Path, capsys: Any) -> None:
    """Token ids and the embedded text: the option would be read by nothing."""
    with pytest.raises(ft.ConfigError, match=r"data\.on_bad_record: the embedded text has no"):
        Text(on_bad_record="skip")
    (tmp_path / "ids.bin").write_bytes(bytes(200))
    run = ["pretrain", "--directory", str(tmp_path / "run"), "--data.on-bad-record", "skip"]
    assert main([*run, "--data.train", str(tmp_path / "ids.bin"), "--data.vocabulary", "9"]) == 2
    assert "data.on_bad_record: " in capsys.readouterr().err


@pytest.mark.parametrize("command", ["dpo", "reference"])
def test_a_directory_in_the_place_of_a_cache_is_told_before_anything_is_read(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "--preference.cache", str(tmp_path)]) == 2
    said = f"preference.cache: {tmp_path} is a directory; name a file in it: {tmp_path}/reference"
    assert said in capsys.readouterr().err
