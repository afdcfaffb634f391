"""The logits of a head, a few rows at a time.

Logits [rows, vocabulary] take most of the memory of a language model's step, and the operating
system's search for fresh memory for them takes much of its time. Here only as many rows exist at
once as fit into a byte budget, in one buffer that every chunk reuses. What is computed from them
(`cross_entropy`, `scores`) and its gradient (`head_gradients`) are computed while they are there,
as in Liger's fused kernel (2410.10989). A chunk is several hundred rows: with fewer, reading and
writing the weight's gradient once for each would cost more than is saved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import attrs
import torch
from torch import Tensor

from functrain import memory
from functrain.objectives.batches import IGNORE_INDEX

BUDGET = 1 << 26
"""Bytes of float32 logits that may exist at once; what a finish makes of them comes on top, and so
do, on an accelerator, details of scores."""

WORTH = 1 << 20
"""From this many bytes of logits on, even a single chunk is worth it: an ordinary cross entropy
goes over them about three times more often."""

KEPT = 2
"""Logits of up to this many budgets may be kept whole where that saves the product that makes them
again: all of a batch's until the backward pass, or one pair's until its gradient has been taken."""

COLUMNS, NARROW = 384, 1024
"""On the CPU, hidden states narrower than `NARROW` are projected to `COLUMNS` logits at a time.

A single product is then little but packing and writing: at a width of 512 and a vocabulary of
50,257 it ran at 48 GFLOP/s on a core, and in such blocks at 72; from a width of 1,024 on there was
no difference. The bits are the same.
"""

_LINE = 64
"""Bytes of a cache line, at which rows of logits on the CPU begin.

With rows of 50,257 numbers one after another the products and passes of a cross entropy took 1.02
to 1.07 times as long. The bits are the same.
"""

Finish = Callable[[Tensor], Tensor]


def are_worth(rows: int, vocabulary: int, budget: int = BUDGET) -> bool:
    """Whether this many rows of logits are worth chunks: more bytes than `WORTH`, or the budget."""
    return exceeds(rows, vocabulary, min(budget, WORTH))


def exceeds(rows: int, vocabulary: int, budget: int) -> bool:
    """Whether this many rows of logits take more than `budget` bytes in float32."""
    return rows * vocabulary * 4 > budget


@attrs.frozen(kw_only=True, eq=False)
class Projection:
    """The values of a head: weight [vocabulary, width], bias [vocabulary] or None.

    `finish`: what the model makes of the projected rows (a soft cap, a scale), or None. `dtype`:
    that in which they are projected; None: what `computed_in` says where the loss is taken.
    """

    weight: Tensor
    bias: Tensor | None
    finish: Finish | None = None
    budget: int = BUDGET
    dtype: torch.dtype | None = None

    def computed_in(self, hidden: Tensor) -> torch.dtype:
        """The dtype in which these hidden states are projected."""
        return computed_in(hidden) if self.dtype is None else self.dtype

    def chunks(self, rows: int) -> Iterator[slice]:
        """The rows in as few slices as the budget has room for, in multiples of 16.

        They are as equal in size as that allows, so that no more memory is taken than needed.
        """
        parts = max(1, -(-rows // self._most))
        size = max(16, -(-rows // (16 * parts)) * 16)
        return (slice(at, min(at + size, rows)) for at in range(0, rows, size))

    @property
    def _most(self) -> int:
        """How many rows the budget has room for."""
        return max(16, self.budget // (4 * self.weight.shape[0]) // 16 * 16)

    def fits(self, rows: int) -> bool:
        """Whether a chunk has room for this many rows."""
        return rows <= self._most

    def may_stay(self, rows: int) -> bool:
        """Whether probabilities of this many rows may stay until their gradient has been taken."""
        return not exceeds(rows, len(self.weight), KEPT * self.budget)


def grouped(sizes: Sequence[int], projection: Projection) -> list[int]:
    """How many neighbouring `sizes` (in rows) each group takes, so that it fits in a chunk.

    A size that no chunk has room for is a group of its own.
    """
    counts: list[int] = []
    rows = 0
    for size in sizes:
        if counts and projection.fits(rows + size):
            counts[-1] += 1
            rows += size
        else:
            counts.append(1)
            rows = size
    return counts


def computed_in(hidden: Tensor) -> torch.dtype:
    """The dtype in which a projection of hidden states is computed here, under autocast or not."""
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64:  # which it leaves alone
        return torch.get_autocast_dtype(kind)
    return hidden.dtype


def in_dtype(hidden: Tensor, projection: Projection) -> tuple[Tensor, Tensor, Tensor | None]:
    """Hidden states and values in the dtype in which the projection is computed."""
    dtype, bias = projection.computed_in(hidden), projection.bias
    return (
        hidden.to(dtype),
        projection.weight.to(dtype),
        None if bias is None else bias.to(dtype),
    )


class Rows:
    """The logits of one chunk after another, in one buffer; `kept`: all chunks are kept there."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        projection: Projection,
        chunks: list[slice],
        *,
        kept: bool = False,
    ) -> None:
        self._weight, self._bias, self._finish = weight, bias, projection.finish
        self.chunks = chunks
        most = max((each.stop - each.start for each in self.chunks), default=0)
        size = len(hidden) if kept else most
        make = memory.empty if kept else memory.scratch
        self._buffer = _rows_of_lines((size, len(weight)), hidden, make)
        self.kept = self._buffer if kept else None
        self._widened: Tensor | None = None
        self._raw: Tensor | None = None

    def of(self, hidden: Tensor, at: slice, *, graded: bool) -> Tensor:
        """The logits of the rows `at`, in float32 or more; the next overwrite them unless kept.

        `graded`: `before_finish` will be called, so what goes into a finish is kept.
        """
        hidden = hidden[at]
        rows = self._buffer[: len(hidden)] if self.kept is None else self.kept[at]
        _project(hidden, self._weight, rows)
        if self._bias is not None:
            rows.add_(self._bias)
        if self._finish is not None:
            if graded:  # a finish may write in place
                self._raw, rows = rows, rows.clone()
            rows = self._finish(rows)
        if rows.dtype.itemsize >= 4:
            return rows
        if self._widened is None:
            self._widened = buffer((len(self._buffer), rows.shape[1]), rows, torch.float32)
        return self._widened[: len(rows)].copy_(rows)

    def before_finish(self, grad: Tensor) -> Tensor:
        """The gradient with respect to the projection's output, given that of the last logits."""
        if self._finish is None:
            return grad
        assert self._raw is not None
        with torch.enable_grad():
            raw = self._raw.detach().requires_grad_()
            finished = self._finish(raw.clone())  # no leaf may be written to
            (grad,) = torch.autograd.grad(finished, raw, grad.to(finished.dtype))
        return grad


def _project(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    """hidden · weightᵀ into `out` [rows, vocabulary]."""
    narrow = hidden.device.type == "cpu" and hidden.shape[1] < NARROW
    size = COLUMNS if narrow else len(weight)
    for at in range(0, len(weight), size):
        torch.mm(hidden, weight[at : at + size].t(), out=out[:, at : at + size])


def _rows_of_lines(
    shape: tuple[int, int], like: Tensor, make: Callable[[tuple[int, int], torch.dtype], Tensor]
) -> Tensor:
    """`buffer` in the dtype of `like`, whose rows begin at a cache line on the CPU."""
    rows, length = shape
    unit = _LINE // like.dtype.itemsize if like.device.type == "cpu" else 1
    whole = buffer((rows, -(-length // unit) * unit), like, like.dtype, make)
    return whole[:, :length]


def buffer(
    shape: tuple[int, int],
    like: Tensor,
    dtype: torch.dtype,
    make: Callable[[tuple[int, int], torch.dtype], Tensor] = memory.empty,
) -> Tensor:
    """Memory on the device of `like`; on the CPU `make` provides it, once the heap is trimmed."""
    if like.device.type == "cpu":
        if math.prod(shape) * dtype.itemsize >= memory.LARGE:
            memory.trim()
        return make(shape, dtype)
    return like.new_empty(shape, dtype=dtype)


def widened(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.itemsize < 4 else dtype


def columns(targets: Tensor) -> tuple[Tensor, Tensor]:
    """The targets as a column, 0 where there is none, and a mask of where there is one."""
    column = targets.unsqueeze(1)
    valid = column != IGNORE_INDEX
    return column.masked_fill(~valid, 0), valid


def check_targets(targets: Tensor, vocabulary: int) -> None:
    """Raise `IndexError` as `F.cross_entropy` does; skipped on an accelerator, to avoid a sync."""
    if targets.device.type != "cpu" or not len(targets):
        return
    most = int(targets.max())
    if most >= vocabulary:
        raise IndexError(f"Target {most} is out of bounds.")


def applied(function: type[torch.autograd.Function], *arguments: object) -> tuple[Tensor, ...]:
    """The results of a `Function` that has several; its `apply` has no types."""
    found: tuple[Tensor, ...] = function.apply(*arguments)  # type: ignore[no-untyped-call]
    return found
