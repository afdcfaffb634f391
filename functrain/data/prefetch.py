"""The next batches, made by a thread while the last one is trained on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

from functrain.data.source import Batch, Source, at_least_one
from functrain.errors import DataError

Reading = Callable[[Source, int, int], Any]
"""How samples of a source are read, as by a worker that reads its part of a batch; hashable."""


class Prefetched:
    """A source that, in a thread of its own, makes the `ahead` batches after the one it gave.

        with ft.data.Prefetched(source) as ahead:
            run = ft.train(step, state, ahead, steps=10_000)

    The batches are the same: what is at a position depends on the position alone, whoever asks.
    Nothing of it is in a state, whose cursor counts what was trained on. A position other than the
    next (after `run.send`, say) is made at once, or as soon as the batch in the making is done: the
    source, which may have a file or a connection, is never asked by two threads together. An error
    in the thread is raised where its batch is asked for, with its samples in a note. `waited`: the
    seconds that callers have waited for batches so far. With several workers each makes its own
    part ahead. A source that binds the architecture (`ReferenceCache`) gains nothing, since only
    one binding at a time is allowed.
    """

    def __init__(self, source: Source, ahead: int = 1) -> None:
        at_least_one("ahead", ahead)
        if not hasattr(source, "at"):
            raise DataError(
                f"Prefetched: {type(source).__name__} has no at(position, n), so what comes next "
                "is not known ahead; a stream's own loader makes batches ahead (num_workers, say)"
            )
        self.waited = 0.0
        self._source, self._ahead = source, ahead
        self._reading = threading.Lock()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._pending: dict[tuple[Reading, int, int], Future[Any]] = {}

    @property
    def batch_size(self) -> int:
        """Samples in a batch unless the caller says otherwise."""
        return self._source.batch_size

    def __len__(self) -> int:
        """Samples in an epoch."""
        return len(self._source)

    def at(self, position: int, n: int) -> Batch:
        """Samples `position` to `position + n − 1`; those after them are on their way."""
        batch: Batch = self.read(_at, position, n)
        return batch

    def read(self, reading: Reading, position: int, n: int) -> Any:
        """`reading(source, position, n)`; the reads that would come next are on their way."""
        begun = time.perf_counter()
        given = self._pending.pop((reading, position, n), None)
        wanted = [(reading, position + n * later, n) for later in range(1, self._ahead + 1)]
        for unwanted in self._pending.keys() - wanted:
            self._pending.pop(unwanted).cancel()
        found = self._read(reading, position, n) if given is None else given.result()
        self.waited += time.perf_counter() - begun
        for place in wanted:
            if place not in self._pending:
                self._pending[place] = self._pool.submit(self._read, *place)
        return found

    def _read(self, reading: Reading, position: int, n: int) -> Any:
        try:
            with self._reading:
                return reading(self._source, position, n)
        except Exception as error:
            error.add_note(f"samples {position} to {position + n - 1}")
            raise

    def close(self) -> None:
        """End the thread; batches can still be asked for, and are made at once."""
        self._ahead = 0
        self._pending.clear()
        self._pool.shutdown(cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _at(source: Source, position: int, n: int) -> Batch:
    return source.at(position, n)
