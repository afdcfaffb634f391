"""How the gradients of micro-batches become one: as a running sum, or as a fixed binary tree.

Floating-point sums depend on their order. A running sum over the micro-batches of one process is
another order than one sum for each worker and then a sum of those; a binary tree over all
micro-batches of the logical batch is the same tree however its leaves are shared out.
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
    """An attrs validator: raise `ConfigError` for what is no reduction."""
    if value not in REDUCTIONS:
        raise ConfigError(f"reduction: {value!r}, unknown; {did_you_mean(str(value), REDUCTIONS)}")


class Tree(Generic[T]):
    """A binary sum of what is pushed, in a fixed order, with O(log n) of it in memory.

    The leaves 2k and 2k + 1 are added, then their sums, and so on; what is left over when the
    number of leaves is no power of two is added from the last to the first. `add` may write into
    its first argument.
    """

    def __init__(self, add: Callable[[T, T], T]) -> None:
        self._add = add
        self._waiting: list[tuple[int, T]] = []

    def push(self, value: T, leaves: int = 1) -> None:
        """The next leaf; or the sum of the last one, which `pop` gave, and the next."""
        while self._waiting and self._waiting[-1][0] == leaves:
            value = self._add(self._waiting.pop()[1], value)
            leaves *= 2
        self._waiting.append((leaves, value))

    def pop(self) -> T | None:
        """The leaf that the next one is added to, if one waits: its sum is to be pushed as 2."""
        return self._waiting.pop()[1] if self._waiting and self._waiting[-1][0] == 1 else None

    def waiting(self) -> list[T]:
        """The branches that have no other beside them yet, the first one first."""
        return [value for _, value in self._waiting]

    def total(self) -> T | None:
        """The sum of all leaves, once; None where there was none."""
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
    """Gradients summed into the memory of `one`; a name that only one has keeps its value."""
    both = [name for name in one if name in other]
    if both:
        torch._foreach_add_([one[n] for n in both], [other[n] for n in both])
    return {**other, **one}


def merged(measured: Sequence[Metrics], *, tree: bool) -> Metrics:
    """The metrics of several micro-batches as one."""
    if tree:
        return tree_sum(measured, Metrics.merge)
    return functools.reduce(Metrics.merge, measured)


class Workers(Protocol):
    """The workers that a logical batch is shared out to, as a gradient function sees them."""

    @property
    def size(self) -> int:
        """How many there are."""
        ...

    def part(self, prepared: Callable[[], tuple[int, Tensor]], *, tree: bool) -> Part:
        """This worker's part of the batch, agreed with all.

        `prepared` gives the number of its micro-batches and their weight, or raises; then every
        worker raises.
        """
        ...

    def observations(self, observed: Sequence[Any]) -> list[Any]:
        """What every worker has observed, in the order of the micro-batches of the whole."""
        ...

    def beside(self, like: Mapping[str, Tensor], *, tree: bool) -> Beside | None:
        """Sums that may begin while gradients are computed, if any.

        `like`: a tensor for each name that may have a gradient, in the order in which they come.
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
        """The sums over all workers, on each of them; in the memory of `grads`.

        `reached`: what has a gradient here. `measured`: the metrics of each micro-batch. `like`: a
        tensor for each name that may have a gradient. `moved`: the buffers that the forward has
        written to, which is refused. `beside`: the sums that have begun.
        """
        ...


class Beside(Protocol):
    """Sums over the workers that begin while other gradients are still computed."""

    def ready(self, name: str, grad: Tensor, *, own: bool) -> None:
        """A gradient is what it will be; where its memory is its `own`, it may be the sum's."""
        ...

    def finish(self, grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All sums, with those of `grads` that were not `ready` before."""
        ...


@attrs.frozen(kw_only=True, eq=False)
class Part:
    """The micro-batches of a logical batch that are computed here.

    They are the `first` and each `stride`-th after it, of `total`; `weight` is that of all of them.
    `tree`: whether they are summed as a `Tree`. `workers`: who has the others, if anybody.
    """

    first: int
    total: int
    weight: Tensor
    tree: bool = False
    workers: Workers | None = None
    stride: int = 1

    def place(self, index: int) -> int:
        """Which micro-batch of the whole one of those here is."""
        return self.first + index * self.stride
