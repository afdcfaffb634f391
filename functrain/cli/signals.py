"""Ctrl-C and SIGTERM as a request to stop, and a second one as an order."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Generator
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """Whether the process has been asked to stop, and how it exits then."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """130 after SIGINT, 143 after SIGTERM, 0 when not asked."""
        return 0 if self.signal is None else 128 + self.signal

    def handle(self, number: int, _frame: FrameType | None) -> None:
        """The first signal is a request; the second ends the process where it stands."""
        if self.signal is not None:
            # No clean-up: a checkpoint is put in place by one rename, so nothing can be torn.
            os._exit(128 + number)
        self.signal = number
        name = signal.Signals(number).name
        # Ctrl-C ends the reader of a pipe as well (`2>&1 | tee log`): then there is none to tell.
        with contextlib.suppress(OSError):
            # Not print(): the signal may have come while one held the lock of stderr's buffer.
            os.write(
                sys.__stderr__.fileno() if sys.__stderr__ else 2,
                f"\n{name}: finishing this step and saving; once more to abort at once\n".encode(),
            )


@contextlib.contextmanager
def stopping() -> Generator[Stop]:
    """Within it, SIGINT and SIGTERM set the `Stop` that is yielded; after it, as before."""
    stop = Stop()
    before = {number: signal.signal(number, stop.handle) for number in _SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
