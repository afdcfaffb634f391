"""A tracker in the background: it never stops or delays training, and reports a failure once.

Services depend on networks, keys and disks of their own. Metrics pass through a queue to a thread,
so that no step waits for a service; its first failure is reported, and it is sent nothing more.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping

from functrain.errors import ConfigError
from functrain.tracking.jsonl import Tracker

PATIENCE = 60.0
"""Seconds that the end of a run waits for a service to take what is in its queue."""


class Beside:
    """A tracker that is opened, fed and closed in a thread of its own.

    `open_` makes the tracker. What it raises counts as a failure too, except that a `ConfigError`,
    which the user can fix, is raised by `ready`. `say` is called once, in the caller's thread, with
    what went wrong.
    """

    def __init__(
        self,
        name: str,
        open_: Callable[[], Tracker],
        say: Callable[[str], None],
        *,
        patience: float = PATIENCE,
    ) -> None:
        self._name, self._open, self._say, self._patience = name, open_, say, patience
        self._told: queue.SimpleQueue[tuple[int, dict[str, float]] | None] = queue.SimpleQueue()
        self._opened = threading.Event()
        self._failure: BaseException | None = None
        self._said = False
        self._thread = threading.Thread(target=self._run, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def ready(self) -> None:
        """Wait until the service is open, `patience` seconds at most; raise its `ConfigError`."""
        self._opened.wait(self._patience)
        if isinstance(self._failure, ConfigError):
            raise self._failure
        self._complain()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Hand the metrics over; they are copied."""
        self._complain()
        if self._failure is None:
            self._told.put((step, dict(metrics)))

    def close(self) -> None:
        """Wait for the service to take the rest, `patience` seconds at most."""
        self._told.put(None)
        self._thread.join(self._patience)
        if self._thread.is_alive() and not self._said:
            self._said = True
            self._say(
                f"tracker {self._name}: has not taken everything in {self._patience:g} s, and is "
                "left alone; metrics.jsonl has it all"
            )
        self._complain()

    def _complain(self) -> None:
        if self._failure is not None and not self._said:
            self._said = True
            self._say(
                f"tracker {self._name}: {type(self._failure).__name__}: {self._failure}; it is "
                "told no more, the training goes on, and metrics.jsonl has everything"
            )

    def _run(self) -> None:
        try:
            tracker = self._open()
            self._opened.set()
            while (told := self._told.get()) is not None:
                tracker.log(*told)
            tracker.close()
        except BaseException as error:  # even a service's SystemExit must not stop the training
            self._failure = error
        finally:
            self._opened.set()
