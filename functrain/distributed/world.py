"""The world: which of how many workers this is, and its part of a logical batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import attrs
import torch
from torch import Tensor

from functrain.distributed import exchange, group
from functrain.distributed.observations import gathered_observations
from functrain.distributed.speaking import Speaking
from functrain.errors import BatchError, ConfigError
from functrain.metrics import Metrics
from functrain.reductions import Beside, Part, merged, tree_sum

_WEIGHTS = 4


@attrs.frozen(kw_only=True, eq=False)
class World(Speaking):
    """A group of `size` workers, of which this is `rank`; a world of 1 has no process group.

    `device`: where this worker computes. `timeout`: how many seconds a worker waits for another
    before it raises `WorkerError`. Use a world as a context manager: leaving it waits for the
    others or, after an error, ends the process group, which tells them that this worker has failed.
    """

    def part(
        self, prepared: Callable[[], tuple[int, Tensor]], *, tree: bool, even: str | None = None
    ) -> Part:
        """See `functrain.reductions.Workers`; also refuses micro-batches that cannot form a tree.

        `even`: why all workers must have the same number of micro-batches, if they must.
        """
        failure: Exception | None = None
        count, weight, row = 0, torch.zeros(0, dtype=torch.int64), list[int]()
        try:
            count, weight = prepared()
            row = _numbers_of(weight)
        except Exception as error:
            failure = error
        # Of fixed width, since a worker that failed does not know its weight.
        row = [failure is not None, count, *self._origin(), *row, *[0] * (_WEIGHTS - len(row))]
        rows = self.numbers(row, "the sharing out of a batch")
        if bool(rows[:, 0].any()):
            self._refused(failure)
        self._same_origin(rows[:, 2:4])
        counts = rows[:, 1].tolist()
        if tree and self.size > 1 and (len(set(counts)) > 1 or count & (count - 1)):
            raise ConfigError(
                f"reduction='canonical': the workers have {counts} micro-batches, expected the "
                "same power of two on each; then a worker's sum is a branch of one binary tree"
            )
        if even is not None and len(set(counts)) > 1:
            raise ConfigError(
                f"{even} by all workers together, and they have {counts} micro-batches; expected "
                "the same number on each"
            )
        whole = rows[:, 4:].sum(0)[: weight.numel()].view(weight.shape).to(weight.device)
        return Part(
            first=sum(counts[: self.rank]),
            total=sum(counts),
            weight=whole,
            tree=tree,
            workers=self if self.size > 1 else None,
        )

    def observations(self, observed: Sequence[Any]) -> list[Any]:
        """See `functrain.reductions.Workers`."""
        return gathered_observations(self, observed)

    def reduced(
        self,
        grads: dict[str, Tensor],
        reached: frozenset[str],
        measured: Sequence[Metrics],
        like: Mapping[str, Tensor],
        moved: Sequence[str],
        *,
        tree: bool,
        beside: Beside | None,
    ) -> tuple[dict[str, Tensor], Metrics]:
        """See `functrain.reductions.Workers`."""
        assert beside is not None
        # First of all: how much was sent during the computation may differ between workers.
        summed = beside.finish(grads)
        metrics = merged(measured, tree=tree)
        names = sorted(like)
        form = exchange.hashed(exchange.form_of(metrics))
        told = torch.tensor([len(moved), form, *(int(name in reached) for name in names)])
        rows = self.gathered(told, "the exchange of counts")
        exchange.refuse_moved(rows[:, 0], moved)
        if len(set(rows[:, 1].tolist())) > 1:
            raise BatchError(exchange.OTHER_METRICS)
        anywhere = rows[:, 2:].any(0).tolist()
        found = {n: summed[n] for n, some in zip(names, anywhere, strict=True) if some}
        return found, self.merged(metrics)

    def beside(self, like: Mapping[str, Tensor], *, tree: bool) -> Beside:
        """See `functrain.reductions.Workers`."""
        return exchange.Beside(like, self.meeting, self.size, tree=tree)

    def merged(self, metrics: Metrics) -> Metrics:
        """The metrics of all workers, which must have the same names, merged."""
        rows = self.gathered(exchange.values_of(metrics), "the exchange of metrics")
        return exchange.metrics_of(tree_sum(list(rows), lambda a, b: a + b), metrics)

    def read(
        self,
        source: Any,
        position: int,
        n: int,
        *,
        microbatches: int,
        tree: bool = False,
        strided: bool = False,
    ) -> Any:
        """This worker's part of the `n` samples at a position of a source.

        It is one batch or, for a `tree`, a list of micro-batches. These are each read by itself, so
        that they are the same on any number of workers: the padding of a joint batch would affect
        their bits. They are consecutive or, if `strided`, every `size`-th, as a sharded tree takes
        them.
        """
        if n % (microbatches if tree else self.size):
            what = f"{microbatches} micro-batches" if tree else f"{self.size} workers"
            raise ConfigError(f"batch_size: {n} samples cannot be shared out to {what} equally")
        own = n // self.size
        first = position + self.rank * own
        if not tree:
            return source.at(first, own)
        each = n // microbatches
        if strided:
            first = position + self.rank * each
            return [source.at(at, each) for at in range(first, position + n, each * self.size)]
        return [source.at(at, each) for at in range(first, first + own, each)]

    def close(self) -> None:
        """Wait for the others a last time and leave; nothing to do in a world of 1 or if closed."""
        if self.size > 1 and not self.closed:
            try:
                self.numbers([], "the end of the world")
            finally:
                self._leave()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
        elif self.size > 1 and not self.closed:
            self._leave()  # without a barrier, which the others may never reach

    def _leave(self) -> None:
        self._diary.closed = True
        group.leave(self)


ALONE = World()
"""A world of one process, whatever the environment says."""


def _numbers_of(weight: Tensor) -> list[int]:
    """The integers of a weight: their sums over the workers are exact."""
    if weight.is_floating_point() or weight.is_complex():
        raise ConfigError(
            f"objective: a weight of {weight.dtype}, expected integers (int64) where there are "
            "several workers; they count target tokens, pairs or examples, and constant factors "
            "belong in the loss"
        )
    row: list[int] = weight.reshape(-1).tolist()
    if len(row) > _WEIGHTS:
        raise ConfigError(
            f"objective: a weight of {len(row)} numbers, expected at most {_WEIGHTS} where "
            "there are several workers"
        )
    return row
