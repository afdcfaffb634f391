"""How the gradients of micro-batches become one: by a running sum, or by a fixed binary tree.

Floating-point sums depend on their order. A running sum over the micro-batches of one process has
another order than a sum on each worker and then over the workers; a binary tree over all
micro-batches of the logical batch is the same tree however its leaves are distributed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, Literal, Protocol, TypeVar

import attrs
import torch
from torch import Tensor

from functrain.errors import ConfigError, did_you_mean
from functrain.metrics import Metrics

Reduction = Literal["fast", "canonical"]
REDUCTIONS = ("fast", "canonical")
T = TypeVar("T")


def reduction_name(_record: object, _field: object, value: object) -> None:
    """An attrs validator: raise `ConfigError` for an unknown reduction."""
    if value not in REDUCTIONS:
        raise ConfigError(f"reduction: {value!r}, unknown; {did_you_mean(str(value), REDUCTIONS)}")


class Tree(Generic[T]):
    """A binary sum of what is pushed, in a fixed order, with O(log n) values in memory.

    Leaves 2k and 2k + 1 are added, then their sums, and so on; if the number of leaves is no power
    of two, the branches left over are added from the last to the first. `add` may write into its
    first argument.
    """

    def __init__(self, add: Callable[[T, T], T]) -> None:
        self._add = add
        self._waiting: list[tuple[int, T]] = []

    def push(self, value: T, leaves: int = 1) -> None:
        """Add the next leaf; or, with `leaves=2`, the sum of the leaf from `pop` and the next."""
        while self._waiting and self._waiting[-1][0] == leaves:
            value = self._add(self._waiting.pop()[1], value)
            leaves *= 2
        self._waiting.append((leaves, value))

    def pop(self) -> T | None:
        """Take out the leaf that waits for the next one, if any; push their sum as 2 leaves."""
        return self._waiting.pop()[1] if self._waiting and self._waiting[-1][0] == 1 else None

    def waiting(self) -> list[T]:
        """The branches that wait for their other half, the first one first."""
        return [value for _, value in self._waiting]

    def total(self) -> T | None:
        """The sum of all leaves, which empties the tree; None if there are none."""
        found: T | None = None
        while self._waiting:
            _, value = self._waiting.pop()
            found = value if found is None else self._add(value, found)
        return found


def tree_sum(values: Sequence[T], add: Callable[[T, T], T]) -> T:
    """The `Tree` sum of at least one value."""
    tree = Tree(add)
    for value in values:
        tree.push(value)
    total = tree.total()
    assert total is not None
    return total


def added(one: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add gradients into the memory of `one`; a name that only one of them has keeps its value."""
    both = [name for name in one if name in other]
    if both:
        torch._foreach_add_([one[n] for n in both], [other[n] for n in both])
    return {**other, **one}


def merged(measured: Sequence[Metrics], *, tree: bool) -> Metrics:
    """The merged metrics of several micro-batches."""
    if tree:
        return tree_sum(measured, Metrics.merge)
    return functools.reduce(Metrics.merge, measured)


class Workers(Protocol):
    """The workers that share a logical batch, as a gradient function sees them."""

    @property
    def size(self) -> int:
        """How many there are."""
        ...

    def part(self, prepared: Callable[[], tuple[int, Tensor]], *, tree: bool) -> Part:
        """This worker's part of the batch, agreed on with the others.

        `prepared` returns the number of this worker's micro-batches and their weight. If it raises
        on one worker, every worker raises.
        """
        ...

    def observations(self, observed: Sequence[Any]) -> list[Any]:
        """The observations of all workers, in the order of the whole batch's micro-batches."""
        ...

    def beside(self, like: Mapping[str, Tensor], *, tree: bool) -> Beside | None:
        """Sums that may start while gradients are still computed, or None.

        `like`: a tensor for each name that may have a gradient, in the order in which gradients
        arrive.
        """
        ...

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
        """The sums over all workers, on each of them; gradients in the memory of `grads`.

        `reached`: the names that have a gradient here. `measured`: the metrics of each micro-batch.
        `like`: a tensor for each name that may have a gradient. `moved`: buffers that the forward
        has written to, which is refused. `beside`: the sums that have started already.
        """
        ...


class Beside(Protocol):
    """Sums over the workers that start while other gradients are still computed."""

    def ready(self, name: str, grad: Tensor, *, own: bool) -> None:
        """Announce a final gradient; if its memory is its `own`, the sum may be written into it."""
        ...

    def finish(self, grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All sums, including those of `grads` that were not `ready` before."""
        ...


@attrs.frozen(kw_only=True, eq=False)
class Part:
    """The micro-batches of a logical batch that are computed here.

    They are number `first` and every `stride`-th after it, of `total`. `weight`: that of the whole
    logical batch. `tree`: whether they are summed as a `Tree`. `workers`: who has the others, if
    any.
    """

    first: int
    total: int
    weight: Tensor
    tree: bool = False
    workers: Workers | None = None
    stride: int = 1

    def place(self, index: int) -> int:
        """The number in the whole batch of the micro-batch that is number `index` here."""
        return self.first + index * self.stride
