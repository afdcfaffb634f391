"""Completions in the shells themselves."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from functrain.cli import _COMMANDS, main
from functrain.cli.commands import ARGUMENTS, SHELLS

# Each is told what has been typed, and prints what could stand in the place of the last word.
ASK = {
    "bash": (
        'source "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=(); '
        '_tyro_functrain; printf "%s\\n" "${COMPREPLY[@]}"'
    ),
    "zsh": (
        "_describe() { for each in $completion_array; do print -r -- ${each%%:*}; done }; "
        'file=$1; shift; words=("$@"); CURRENT=$#; source $file "$@"'
    ),
    "fish": 'source $argv[1]; complete -C (string join -- " " $argv[2..]) | string split -f1 \\t',
}


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    import contextlib
    import io

    path, found = tmp_path_factory.mktemp("completion"), {}
    for shell in SHELLS:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            assert main(["completion", shell]) == 0
        found[shell] = path / shell
        found[shell].write_text(out.getvalue())
    return found


def test_every_command_has_its_arguments() -> None:
    assert ARGUMENTS.keys() == _COMMANDS.keys()
    assert ASK.keys() == set(SHELLS)


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (["functrain", "pre"], ["pretrain"]),
        (["functrain", "pretrain", "--train.ste"], ["--train.steps"]),
        (["functrain", "sft", "run.toml", "--lora.ra"], ["--lora.rank"]),
        (["functrain", "generate", "runs/a", "--top"], ["--top-k", "--top-p"]),
    ],
    ids=" ".join,
)
def test_a_shell_completes(
    shell: str, typed: list[str], expected: list[str], scripts: dict[str, Path]
) -> None:
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"no {shell} is installed")
    done = subprocess.run(
        [program, "-c", ASK[shell], *([] if shell == "fish" else [shell]), scripts[shell], *typed],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert sorted(done.stdout.split()) == expected, done.stderr


def test_a_shell_that_is_not_known(capsys: Any) -> None:
    assert main(["completion", "zhs"]) == 2
    assert "shell: 'zhs' is unknown; did you mean 'zsh'" in capsys.readouterr().err
