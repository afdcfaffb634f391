"""The promises of reliability, with the counts that were really executed.

    python -m tests.reliability [--long]

Runs the tests of the promises, the long forms too with `--long` (about an hour on two cores), and
prints a table: each promise, what was done for it, how often, and how often was promised. A count
is what the tests themselves have counted (`tests/tally.py`) after they had checked it; what a long
form does again after the ordinary one counts once. A line holds where no test of its promise has
failed and nothing fell short; the exit status is 0 where all hold.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.etree import ElementTree

import attrs

if __package__:
    from tests import tally
else:
    import tally

ROOT = Path(__file__).parents[1]


@attrs.frozen
class Promise:
    """A promise, the files of tests that show it, and how often each thing is done at least."""

    number: int
    text: str
    tests: Sequence[str]
    counts: dict[str, int]


PROMISES = (
    Promise(
        1,
        "resume is exact to the bit",
        ["checkpoint/test_resume.py", "checkpoint/test_environment.py"],
        {"split points resumed in a new process": 120, "in a fresh interpreter": 2},
    ),
    Promise(
        2, "every state field matters", ["checkpoint/test_resume.py"], {"state fields ablated": 24}
    ),
    Promise(
        3,
        "no order of a mapping matters",
        ["checkpoint/test_resume.py"],
        {"orders of every mapping": 200},
    ),
    Promise(
        4,
        "kill -9 at any instant loses nothing",
        [
            "checkpoint/test_kills.py",
            "checkpoint/test_syscall_kills.py",
            "checkpoint/test_random_kills.py",
        ],
        {
            "kills at an operation": 300,
            "kills at a system call": 300,
            "random kills of training runs": 500,
        },
    ),
    Promise(
        5,
        "power loss loses no acknowledged checkpoint",
        ["checkpoint/test_power_loss.py"],
        {"power-loss states": 3_000, "protocol mutants caught": 6},
    ),
    Promise(
        6,
        "a full disk or an I/O error loses nothing",
        ["checkpoint/test_faults.py"],
        {"faults injected": 3_000, "disks really full or read-only": 3},
    ),
    Promise(
        7,
        "corruption is refused",
        ["checkpoint/test_hostile.py"],
        {"bits flipped and files cut": 5_000},
    ),
    Promise(
        8,
        "hostile files are refused",
        ["checkpoint/test_hostile.py"],
        {"named hostile checkpoints": 100, "mutated checkpoints": 100_000},
    ),
    Promise(
        9,
        "nothing is pickled",
        ["checkpoint/test_hostile.py", "test_layers.py"],
        {"modules searched for pickle": 80, "runs with pickle out of use": 1},
    ),
    Promise(
        10,
        "a step is a transaction",
        ["checkpoint/test_resume.py"],
        {"interrupts of a step": 5_000},
    ),
    Promise(
        11,
        "a signal finishes the step and saves",
        ["cli/test_cli_signals.py", "cli/test_cli_run.py"],
        {"launches stopped by a signal": 150, "launches aborted by a second signal": 10},
    ),
    Promise(
        12,
        "the store does what its model says",
        ["checkpoint/test_store_machine.py", "checkpoint/test_readers.py"],
        {"sequences of the store machine": 10_000, "loads beside a pruning writer": 300},
    ),
)


@attrs.frozen
class Line:
    """A line of the table."""

    promise: Promise
    what: str
    done: int
    promised: int
    failed: bool

    @property
    def verdict(self) -> str:
        """`holds`, or why not."""
        if self.failed:
            return "FAILED"
        return "holds" if self.done >= self.promised else "too few: run --long"


def executed(long: bool, extra: Sequence[str]) -> tuple[dict[str, int], set[str]]:
    """What the tests have counted, and the files with a test that failed or could not be run."""
    files = sorted({name for promise in PROMISES for name in promise.tests})
    with tempfile.TemporaryDirectory() as directory:
        counts, junit = Path(directory) / "counts", Path(directory) / "junit.xml"
        counts.touch()
        selected = ["-m", "long or not long"] if long else []
        subprocess.run(
            [
                *(sys.executable, "-m", "pytest", "-q", f"--junit-xml={junit}"),
                *selected,
                *(str(ROOT / "tests" / name) for name in files),
                *extra,
            ],
            cwd=ROOT,
            env={**os.environ, tally.VARIABLE: str(counts)},
            check=False,
        )
        return tally.totals(counts), set(_failed(junit, files))


def _failed(junit: Path, files: Sequence[str]) -> Iterator[str]:
    if not junit.is_file():
        yield from files
        return
    seen = set()
    for case in ElementTree.parse(junit).iter("testcase"):
        name = case.get("classname", "").removeprefix("tests.").replace(".", "/") + ".py"
        seen.add(name)
        if case.find("failure") is not None or case.find("error") is not None:
            yield name
    yield from set(files) - seen  # a file that was not collected shows nothing


def lines(counts: dict[str, int], failed: set[str]) -> list[Line]:
    """The table."""
    return [
        Line(promise, what, counts.get(what, 0), least, not failed.isdisjoint(promise.tests))
        for promise in PROMISES
        for what, least in promise.counts.items()
    ]


def shown(table: Sequence[Line]) -> str:
    """The table in Markdown."""
    rows = ["| # | promise | executed | times | promised | |", "|---|---|---|--:|--:|---|"]
    before = 0
    for line in table:
        first = line.promise.number != before
        before = line.promise.number
        number, text = (str(before), line.promise.text) if first else ("", "")
        rows.append(
            f"| {number} | {text} | {line.what} | {line.done:,} | {line.promised:,} "
            f"| {line.verdict} |"
        )
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--long", action="store_true", help="run the long forms too")
    options, extra = parser.parse_known_args()
    table = lines(*executed(options.long, extra))
    print(f"\n{shown(table)}")
    return int(any(line.verdict != "holds" for line in table))


if __name__ == "__main__":
    sys.exit(main())
