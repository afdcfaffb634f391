"""The next batches, made by a thread while the last one is trained on."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

from functrain.data.source import Batch, Source, at_least_one
from functrain.errors import DataError


class Prefetched:
    """A source that makes the `ahead` batches after the one it gave in a thread of its own.

        with ft.data.Prefetched(source) as ahead:
            run = ft.train(step, state, ahead, steps=10_000)

    Same batches: what is at a position is a function of the position, whoever asks. Nothing of it
    is in a state, whose cursor counts what was trained on; another position than the next (after
    `run.send`, say) is made at once. What fails in the thread is raised where its batch is asked
    for. `waited`: seconds that callers have waited for batches so far. A source that binds the
    architecture (`ReferenceCache`) gains nothing, since one binding at a time is allowed.
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
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._pending: dict[tuple[int, int], Future[Batch]] = {}

    @property
    def batch_size(self) -> int:
        """Samples in a batch unless the caller says otherwise."""
        return self._source.batch_size

    def __len__(self) -> int:
        """Samples in an epoch."""
        return len(self._source)

    def at(self, position: int, n: int) -> Batch:
        """Samples `position` to `position + n − 1`; those after them are on their way."""
        begun = time.perf_counter()
        given = self._pending.pop((position, n), None)
        batch = self._source.at(position, n) if given is None else given.result()
        self.waited += time.perf_counter() - begun
        wanted = [(position + n * later, n) for later in range(1, self._ahead + 1)]
        self._pending = {
            place: self._pending.get(place) or self._pool.submit(self._source.at, *place)
            for place in wanted
        }
        return batch

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
