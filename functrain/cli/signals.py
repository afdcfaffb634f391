"""Ctrl-C and SIGTERM: the first is a request to stop, the second aborts."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Generator
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """Whether the process has been asked to stop, and its exit code then."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """130 after SIGINT, 143 after SIGTERM, 0 if not asked to stop."""
        return 0 if self.signal is None else 128 + self.signal

    def handle(self, number: int, _frame: FrameType | None) -> None:
        """Record the first signal as a request; end the process at once on the second."""
        if self.signal is not None:
            # Without clean-up: one rename puts a checkpoint in place, so nothing can be torn.
            os._exit(128 + number)
        self.signal = number
        name = signal.Signals(number).name
        # Ctrl-C also ends the reader of a pipe (`2>&1 | tee log`): then nobody can be told.
        with contextlib.suppress(OSError):
            # Not print(): the signal may have interrupted one that holds stderr's buffer lock.
            os.write(
                sys.__stderr__.fileno() if sys.__stderr__ else 2,
                f"\n{name}: finishing this step and saving; once more to abort at once\n".encode(),
            )


@contextlib.contextmanager
def stopping() -> Generator[Stop]:
    """Within, SIGINT and SIGTERM set the `Stop` that is yielded; the old handlers come back."""
    stop = Stop()
    before = {number: signal.signal(number, stop.handle) for number in _SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
