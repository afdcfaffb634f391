"""Child processes of tests: how they end, in a limited time, and that none outlives its test."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator


def exit_code(process: int, limit: float = 0) -> int | None:
    """The exit code of a child that is not reaped yet, negative where a signal has killed it.

    None, if it still runs after so many seconds.
    """
    deadline, pause = time.monotonic() + limit, 0.0001
    while True:
        found = os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if found is not None:
            return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status
        if time.monotonic() >= deadline:
            return None
        time.sleep(pause)
        pause = min(2 * pause, 0.005)


@contextlib.contextmanager
def reaped(process: int) -> Iterator[int]:
    """A child: at the end it is killed, if it still runs, and reaped."""
    try:
        yield process
    finally:
        os.kill(process, signal.SIGKILL)  # of one that has ended it changes nothing
        os.waitpid(process, 0)


def ended(process: int, limit: float = 120) -> int:
    """The exit code of a child, which is reaped; an error if it still runs after `limit` seconds.

    Without a limit, a child that hangs would hold up all tests, and outlive them.
    """
    with reaped(process):
        code = exit_code(process, limit)
    assert code is not None, f"a child still ran after {limit:g} s, and was killed"
    return code
