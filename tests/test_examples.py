"""The examples run, and say what they promise."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
PROMISES = {
    "loop.py": "the ready-made step gives the same bits: True",
    "mixed_stages.py": "accuracy 1.00",
    "equivalence.py": "with BatchNorm it has not",
    "torchrun.py": "workers 1, fingerprint ",
}


ELSEWHERE = {"smollm2_lora.py", "smollm2_dpo.py"}
"""What fetches a model, and has a test of its own."""


def test_every_example_has_a_test() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == PROMISES.keys() | ELSEWHERE


@pytest.mark.parametrize("name", sorted(PROMISES))
def test_the_example_runs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert PROMISES[name] in capsys.readouterr().out
