"""Counts of what the tests of reliability have really executed, for `python -m tests.reliability`.

A test says `tally.add("kills at an operation", 331)`; where the environment names a file, the
count is appended to it, one line of JSON for each, whichever process the test runs in.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

VARIABLE = "FUNCTRAIN_TALLY"


def add(what: str, count: int = 1) -> None:
    """Count `what`, as often as it has been done."""
    path = os.environ.get(VARIABLE)
    if path:
        # One write of one line in append mode: the workers' lines do not mix.
        with Path(path).open("a") as file:
            file.write(json.dumps([what, count]) + "\n")


def totals(path: Path) -> dict[str, int]:
    """What was counted in a file, summed by name."""
    found: dict[str, int] = {}
    for line in path.read_text().splitlines():
        what, count = json.loads(line)
        found[what] = found.get(what, 0) + count
    return found
