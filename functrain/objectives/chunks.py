"""The logits of a head, a few rows at a time.

Logits [rows, vocabulary] are most of the memory of a language model's step, and the kernel's time
to find fresh memory for them much of its time. Here they exist for as many rows as a byte budget
has room for, in one buffer that every chunk uses again. What is taken of them (`cross_entropy`,
`scores`), and its gradient (`head_gradients`), is taken while they are there, as Liger's fused
kernel does it (2410.10989). A chunk is several hundred rows: fewer, and reading and writing the
weight's gradient once for each would cost more than is saved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import attrs
import torch
from torch import Tensor

from functrain import memory
from functrain.objectives.batches import IGNORE_INDEX

BUDGET = 1 << 26
"""Bytes of logits that may exist at once, float32; what a finish makes of them comes on top, and so
do details of scores, on the CPU a quarter."""

WORTH = 1 << 20
"""Of so many bytes of logits on one chunk or more is worth it: an ordinary cross entropy goes over
them about three times more often."""

KEPT = 2
"""Of so many budgets logits may be there as a whole, where that spares the product that makes them
again: all of a batch's until the backward pass, or one pair's until its gradient has been taken."""

COLUMNS, NARROW = 384, 1024
"""On the CPU logits are made so many columns at a time where hidden states are narrower than this.

A single product is then little but packing and writing: with a width of 512 and a vocabulary of
50,257 it did 48 GFLOP/s on a core, and in such blocks 72; from a width of 1,024 on there was no
difference. The bits are the same.
"""

Finish = Callable[[Tensor], Tensor]


def are_worth(rows: int, vocabulary: int, budget: int = BUDGET) -> bool:
    """Whether so many rows of logits are worth chunks: more than `WORTH`, or than the budget."""
    return exceeds(rows, vocabulary, min(budget, WORTH))


def exceeds(rows: int, vocabulary: int, budget: int) -> bool:
    """Whether so many rows of logits are more than so many bytes."""
    return rows * vocabulary * 4 > budget


@attrs.frozen(kw_only=True, eq=False)
class Projection:
    """The values of a head: weight [vocabulary, width], bias [vocabulary] or None.

    `finish`: what the model makes of the projected rows (a soft cap, a scale), or None. `dtype`: in
    which they are projected; None: in that of `computed_in`, where the loss is taken.
    """

    weight: Tensor
    bias: Tensor | None
    finish: Finish | None = None
    budget: int = BUDGET
    dtype: torch.dtype | None = None

    def computed_in(self, hidden: Tensor) -> torch.dtype:
        """The dtype in which these hidden states are projected here."""
        return computed_in(hidden) if self.dtype is None else self.dtype

    def chunks(self, rows: int, share: int = 1) -> Iterator[slice]:
        """The rows in as few parts as that share of the budget has room for, in multiples of 16.

        Alike in size as far as that goes, so that no more is taken than so many parts need.
        """
        parts = max(1, -(-rows // self._most(share)))
        size = max(16, -(-rows // (16 * parts)) * 16)
        return (slice(at, min(at + size, rows)) for at in range(0, rows, size))

    def _most(self, share: int) -> int:
        """How many rows a share of the budget has room for."""
        return max(16, self.budget // (4 * self.weight.shape[0] * share) // 16 * 16)

    def fits(self, rows: int) -> bool:
        """Whether a chunk has room for so many rows."""
        return rows <= self._most(1)

    def may_stay(self, rows: int) -> bool:
        """Whether the log-probs of so many rows may stay until their gradient has been taken."""
        return not exceeds(rows, len(self.weight), KEPT * self.budget)


def grouped(sizes: Sequence[int], projection: Projection) -> list[int]:
    """How many of the neighbours that have so many rows a group takes: what a chunk has room for.

    One that has more is a group of its own.
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
    """The logits of one chunk after another, in one buffer; `kept`: each in a place of its own."""

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
        self._buffer = buffer((size, len(weight)), hidden, hidden.dtype, make)
        self.kept = self._buffer if kept else None
        self._widened: Tensor | None = None
        self._raw: Tensor | None = None

    def of(self, hidden: Tensor, at: slice, *, graded: bool) -> Tensor:
        """The logits of the rows `at`, in float32 or more; unless kept, the next overwrite them.

        `graded`: `before_finish` will be asked for, so what goes into a finish is kept.
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
        """The gradient with respect to what the projection returned, of that of the logits."""
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


def buffer(
    shape: tuple[int, int],
    like: Tensor,
    dtype: torch.dtype,
    make: Callable[[tuple[int, int], torch.dtype], Tensor] = memory.empty,
) -> Tensor:
    """Memory on the device of `like`; `make`: whose on the CPU."""
    if like.device.type == "cpu":
        return make(shape, dtype)
    return like.new_empty(shape, dtype=dtype)


def widened(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.itemsize < 4 else dtype


def columns(targets: Tensor) -> tuple[Tensor, Tensor]:
    """The targets as a column, 0 where there is none, and where there is one."""
    column = targets.unsqueeze(1)
    valid = column != IGNORE_INDEX
    return column.masked_fill(~valid, 0), valid


def check_targets(targets: Tensor, vocabulary: int) -> None:
    """Raise `IndexError` as `F.cross_entropy` does; on an accelerator it would be a wait."""
    if targets.device.type != "cpu" or not len(targets):
        return
    most = int(targets.max())
    if most >= vocabulary:
        raise IndexError(f"Target {most} is out of bounds.")


def applied(function: type[torch.autograd.Function], *arguments: object) -> tuple[Tensor, ...]:
    """What a function gives that has several results; its `apply` has no types."""
    found: tuple[Tensor, ...] = function.apply(*arguments)  # type: ignore[no-untyped-call]
    return found
