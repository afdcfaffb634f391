"""kill -9 at any system call of a save, a prune or a recovery loses nothing.

`test_kills` kills where the store says that it calls the system. Here strace says so, from outside:
it lists the calls that touch files, whoever makes them, and then kills the same work anew at the
entry of each that finds files of its own (in the long form, of each), one kill for every run.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import signal
import socket
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import attrs
import pytest
import tally
from checkpoint import faults
from checkpoint import test_kills as kills
from processes import ended

from functrain.checkpoint.filesystem import OPERATING_SYSTEM

PLACED = re.compile(r'\.tmp-step-[0-9]{12}", .*/step-([0-9]{12})"')
"""In the call that renames a checkpoint into place: its step."""

FILES = "trace=%file,%desc"
MEMORY = "mmap"
"""What strace counts among the calls of descriptors, and which gets memory, now or then."""

UNCHANGING = re.compile(
    r"(openat\((?!.*(O_CREAT|O_TRUNC))|read|readv|pread64|close|lseek|fcntl|ioctl|flock|fsync|getdents64"
    r"|fstat|newfstatat|stat|lstat|statx|access|faccessat2?|readlink|readlinkat|getcwd|dup|poll)\b"
)
"""The calls after which the files are for the living as they were before."""

LIBC = ctypes.CDLL(None)
PR_SET_PTRACER = 0x59616D61
ANYONE = ctypes.c_ulong(-1)


@attrs.frozen
class Call:
    """A system call: the `number`-th of its name in its thread, from 1; `text` as far as known."""

    name: str
    number: int
    text: str


def calls(trace: Path) -> list[Call]:
    """The calls in what strace has written, in the order of their beginnings."""
    found: list[Call] = []
    counts: Counter[tuple[str, str]] = Counter()
    for thread, name, rest in re.findall(r"^(\d+) +(\w+)(\(.*)$", trace.read_text(), re.MULTILINE):
        if name != MEMORY:
            counts[thread, name] += 1
            text = re.sub(r" *(<unfinished \.\.\.>|\) += \?)+$", "", name + rest)
            found.append(Call(name, counts[thread, name], text))
    return found


def traced(work: Callable[[], object], trace: Path, *options: str) -> int:
    """How a forked process ends that does some work, and nothing else, under the eyes of strace."""
    here, there = socket.socketpair()

    def child() -> None:
        # Where only its ancestors may trace a process, it must allow it to a brother.
        LIBC.prctl(PR_SET_PTRACER, ANYONE, 0, 0, 0)
        there.send(b"r")
        there.recv(1)
        work()

    with here, there:
        process = faults.forked(child)
        here.recv(1)
        command = ["strace", "-f", "-p", str(process), "-o", str(trace), *options]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as strace:
            assert strace.stderr is not None
            said = strace.stderr.readline()
            if "attached" in said:
                here.send(b"g")
            else:
                os.kill(process, signal.SIGKILL)
            code = ended(process)
            said += strace.stderr.read()
    if "attached" not in said:
        raise PermissionError(said.strip())
    return code


@pytest.fixture
def base() -> Iterator[Path]:
    with faults.scratch() as directory:
        yield directory


@pytest.fixture(autouse=True, scope="module")
def usable(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Skips where there is no strace, and where it may not trace: which is tried."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    try:
        assert traced(lambda: None, tmp_path_factory.mktemp("usable") / "trace") == 0
    except PermissionError as error:
        pytest.skip(f"strace may not trace here: {error}")


@kills.EXTENT
@pytest.mark.parametrize("name", kills.WORKS)
def test_a_kill_at_every_system_call_loses_nothing(name: str, every: bool, base: Path) -> None:
    """The newest acknowledged loads, a new save works, and nothing is left over."""
    work, run, trace = kills.WORKS[name], base / "run", base / "trace"
    work.begin(run)
    operations = faults.operations(lambda files: work.do(faults.copy_of(run), files))

    def do(*options: str) -> int:
        copy = faults.copy_of(run)
        return traced(lambda: work.do(copy, OPERATING_SYSTEM), trace, *options)

    assert do("-e", FILES) == 0
    found = calls(trace)
    assert len(found) >= len(operations) > 0, "an operation of the store is a call at least"
    # Counted for each thread: were there two that touch files, a kill could come too early.
    assert len({(call.name, call.number) for call in found}) == len(found)
    names = [call.name for call in found]
    changes = [every or UNCHANGING.match(call.text) is None for call in found]
    places, acknowledged = faults.telling(names, changes), work.acknowledged
    assert len(places) == len(found) if every else set(names) == {names[at] for at in places}
    for at, call in enumerate(found):
        before, placed = acknowledged, PLACED.search(call.text)
        if placed is not None:  # and is not lost by a kill at a later call
            acknowledged = int(placed[1])
        if at not in places:
            continue
        inject = f"inject={call.name}:signal=KILL:when={call.number}"
        code = do("-e", f"trace={call.name}", "-e", inject)
        assert faults.was_killed(code), f"{call}: not killed"
        struck = calls(trace)[-1]
        assert (struck.name, struck.number) == (call.name, call.number)
        assert call.text.startswith(struck.text), f"{call}: killed at {struck}"
        kills.check(base / "copy", before)
    tally.add("kills at a system call", len(places), part=not every)
