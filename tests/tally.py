"""Counts of what the tests of reliability have really executed, for `python -m tests.reliability`.

A test says `tally.add("kills at an operation", 331)`; where the environment names a file, the
count is appended to it, one line of JSON for each, whichever process the test runs in. A test that
does less in an ordinary run than in its long form says of the less `part=True`: that does not count
where the whole has been done too.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

VARIABLE = "FUNCTRAIN_TALLY"


def add(what: str, count: int = 1, *, part: bool = False, of: str | None = None) -> None:
    """Count `what`, as often as it has been done; `part` of the whole `of` that name.

    The name is that of the test's function, with whatever parameters, unless another is given.
    """
    path = os.environ.get(VARIABLE)
    if path:
        of = of or os.environ.get("PYTEST_CURRENT_TEST", "").partition(" ")[0].partition("[")[0]
        # One write of one line in append mode: the workers' lines do not mix.
        with Path(path).open("a") as file:
            file.write(json.dumps([what, count, part, of]) + "\n")


def totals(path: Path) -> dict[str, int]:
    """What was counted in a file, summed by name, without the parts of what was done whole."""
    counts = [json.loads(line) for line in path.read_text().splitlines()]
    wholes = {(what, of) for what, _, part, of in counts if not part}
    found: dict[str, int] = {}
    for what, count, part, of in counts:
        if not part or (what, of) not in wholes:
            found[what] = found.get(what, 0) + count
    return found
