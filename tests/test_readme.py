"""The README tells the truth: its loop runs, its commands are CI's, its links lead somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_loop_runs(tmp_path: Path) -> None:
    code = next(block for block in _blocks("python") if "ft.split" in block)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    first, *_, last, fingerprint = done.stdout.splitlines()
    assert float(last.split()[2]) < float(first.split()[2])
    assert re.fullmatch("[0-9a-f]{64}", fingerprint)


@pytest.mark.parametrize("code", _blocks("python"))
def test_what_it_shows_trips_no_linter(code: str) -> None:
    """In a reader's own project: bugbear's rules are widely on."""
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "B", "-"]
    done = subprocess.run(command, input=code, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_ci_runs_the_test_command() -> None:
    command = next(
        line for block in _blocks("sh") for line in block.splitlines() if "pytest" in line
    )
    script = (ROOT / ".ci/run").read_text().replace('"$venv/', "").replace('"', "")
    made, installed, tested = command.split(" && ")
    assert made == "python3 -m venv .venv"
    assert "$python -m venv $venv" in script
    assert installed == ".venv/bin/pip install -e '.[dev]'"
    assert re.search(r"bin/pip install .*--editable '\.\[dev\]'", script)
    assert tested == ".venv/bin/python -m pytest"
    assert re.search(r"^exec bin/python -m pytest \$@$", script, re.MULTILINE)


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#:]+)\)", README))))
def test_what_is_linked_to_is_there(target: str) -> None:
    assert (ROOT / target).is_file()


def test_the_laws_of_the_table_are_those_of_the_module() -> None:
    from functrain import testing

    named = set(re.findall(r"^\| `(assert_\w+)` \|", README, re.MULTILINE))
    laws = {name for name in vars(testing) if name.startswith("assert_")} - {"assert_same"}
    assert named == laws
