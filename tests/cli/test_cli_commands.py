"""The command line itself: help, exit codes, overrides, and what is imported when."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from functrain.cli import commands, main
from functrain.errors import ConfigError

TOML = """
directory = "from-file"
[schedule]
peak = 0.5
[train]
steps = 7
"""
LONG = "prompt " * 100


@pytest.fixture
def run_toml(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(TOML)
    return path


def test_overrides_beat_the_file_and_the_file_beats_the_defaults(run_toml: Path) -> None:
    given = [str(run_toml), "--schedule.peak", "0.25", "--train.batch-size", "4"]
    arguments = commands.stage_arguments("pretrain", given)
    assert arguments.config.schedule.peak == 0.25  # the command line
    assert arguments.config.train.steps == 7  # the file
    assert arguments.config.train.batch_size == 4  # the command line
    assert arguments.config.train.keep == 2  # the default
    assert not arguments.resume


def test_a_run_needs_no_file() -> None:
    arguments = commands.stage_arguments("sft", ["--model.from", "runs/x", "--resume"])
    assert arguments.config.model.from_ == "runs/x"
    assert arguments.resume


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--train.peak", "3"], "train.peak: unknown option; it is --schedule.peak"),
        (["--model.batch-size=3"], "--train.batch-size or --evaluation.batch-size"),
        (["--train.directory", "x"], "train.directory: unknown option; it is --directory"),
    ],
)
def test_an_option_of_the_wrong_section_is_told_the_right_one(
    given: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pretrain", *given]) == 2
    assert message in capsys.readouterr().err


def test_every_option_is_of_its_own_section() -> None:
    """Also one that turns something off, and one whose name is there in two sections."""
    given = ["--train.no-compile", "--evaluation.batch-size", "3", "--train.batch-size=4"]
    config = commands.stage_arguments("pretrain", given).config
    assert (config.evaluation.batch_size, config.train.batch_size) == (3, 4)


def test_one_file_is_given(run_toml: Path) -> None:
    other = run_toml.with_name("other.toml")
    with pytest.raises(ConfigError, match=r"other.toml: a second config file, after .*run.toml"):
        commands.stage_arguments("pretrain", [str(run_toml), str(other)])


def test_a_tokenizer_that_is_not_there_is_not_looked_for_elsewhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n')
    assert main(["data", "show", str(path), "--model", "no/where"]) == 2
    assert "model: no/where is not there" in capsys.readouterr().err


def test_the_file_comes_first(run_toml: Path) -> None:
    for before in (["--train.steps", "3"], ["--train.steps=3"], ["--resume"], ["--train.compile"]):
        with pytest.raises(ConfigError, match="give the config file first"):
            commands.stage_arguments("pretrain", [*before, str(run_toml)])


@pytest.mark.parametrize("option", [["--directory", "x.toml"], ["--directory=x.toml"]])
def test_the_value_of_an_option_is_no_config_file(run_toml: Path, option: list[str]) -> None:
    for given in (option, [str(run_toml), *option]):
        assert commands.stage_arguments("pretrain", given).config.directory == "x.toml"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--help"], 0, "functrain COMMAND"),
        (["--version"], 0, "functrain 0."),
        ([], 2, "usage: functrain COMMAND"),
        (
            ["pretrian"],
            2,
            "no command 'pretrian'; did you mean 'pretrain' or 'completion' or 'plan'?",
        ),
        (["pretrain", "--help"], 0, "--schedule.peak"),
        (["pretrain", "no.toml"], 2, "no.toml: cannot be read"),
        (["pretrain", "--schedule.pek", "1"], 2, "--schedule.peak"),
        (["pretrain", "--train.steps", "0"], 2, "expected an integer of at least 1"),
        (["pretrain", "--train.precision", "fp17"], 2, "did you mean 'fp16'"),
        (["pretrain", "--data.train", "no.txt"], 2, "data.train: no.txt is not there"),
        (["pretrain", "--data.train", "no.csv"], 2, "expected a file that ends in .txt"),
        (["pretrain", "--data.train", "no.bin.gz"], 2, "expected a file that ends in .txt"),
        (["pretrain", "--data.train", "no.BIN.GZ"], 2, "expected a file that ends in .txt"),
        (["pretrain", "--data.train", "no.TXT.GZ"], 2, "no.TXT.GZ is not there"),
        (["sft", "--data.train", "no.jsonl.GZ"], 2, "no.jsonl.GZ is not there"),
        (["sft", "--data.train", "no.txt"], 2, "expected a file that ends in .jsonl"),
        (["pretrain", "--data.train", "no.NDJSON"], 2, "no.NDJSON is not there"),
        (["sft", "--model.from", "no/run"], 2, "model.from: no/run is not there"),
        (["dpo", "--preference.loss", "sigmoyd"], 2, "did you mean 'sigmoid'"),
        (["demo", "--scale", "huge"], 2, "scale: 'huge' is unknown; known: 'full', 'tiny'"),
        (["generate"], 2, "RUN"),
        (["generate", "no/run", "hello"], 2, "no/run is not there"),
        (["inspect", "no/run"], 2, "no/run: does not exist"),
        (["generate", LONG, "runs/p0"], 2, f"run: '{LONG[:50]}'…: File name too long"),
        (["evaluate", "no/run", LONG], 2, "files: 'prompt prompt"),
        (["verify", LONG], 2, "File name too long; expected a path"),
        (["inspect", LONG], 2, "File name too long; expected a path"),
        (["generate", "no/run", LONG], 2, "no/run is not there"),
    ],
)
def test_exit_codes_and_messages(
    arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == code
    out = capsys.readouterr()
    said = " ".join((out.out + out.err).replace("│", " ").split())
    assert message in said
    assert "Traceback" not in said


def test_an_interrupted_command_exits_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "inspect", interrupted)
    assert main(["inspect", "x"]) == 130
    assert capsys.readouterr().err == "functrain: interrupted\n"


LIGHT = """
import sys
from functrain.cli import main
heavy = ("torch", "numpy", "transformers", "jinja2")
def check(*arguments):
    code = main(list(arguments))
    loaded = [name for name in heavy if name in sys.modules]
    assert not loaded, (arguments, loaded)
    return code
assert check("--help") == 0
assert check("pretrain", "--help") == 0
assert check("pretrain", {bad!r}) == 2
assert check("pretrain", "--data.train", "no.txt") == 2
assert check("sft", "--model.from", "no/run") == 2
assert check("demo", "--scale", "huge") == 2
"""


def test_help_and_config_checks_import_no_torch(tmp_path: Path) -> None:
    bad = tmp_path / "bad.toml"
    bad.write_text("[train]\nstepps = 3")
    subprocess.run([sys.executable, "-c", LIGHT.format(bad=str(bad))], check=True, timeout=60)


MISSING = """
import sys
sys.modules[{name!r}] = None
from functrain.cli import main
sys.exit(main({arguments!r}))
"""


@pytest.mark.parametrize("name", ["jinja2", "rich"])
def test_what_the_end_of_a_run_needs_is_missed_before_it_begins(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.chdir(tmp_path)
    for command in (["pretrain"], ["demo", "--scale", "tiny"]):
        assert main(command) == 2
        assert f"needs {name} for its report: pip install" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["tyro", "cattrs"])
def test_a_missing_extra_is_answered_with_how_to_install_it(name: str) -> None:
    code = MISSING.format(name=name, arguments=["pretrain", "--help"])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert f"needs {name}, which is not installed: pip install 'functrain[cli]'" in done.stderr
    assert "Traceback" not in done.stderr
