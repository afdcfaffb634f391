"""Norms of the rows of many tensors, in a few kernel calls.

A global norm is taken over each row and then over the rows, so that it is the same for tensors
sharded by rows.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor

_PIECE = 1 << 16
"""How many numbers are copied to float64 at a time: as many as stay in a core's cache."""

_SMALL = 1 << 14
"""The most numbers of a tensor that is joined to others, to save a kernel call of its own."""


def row_norms(leaves: Sequence[Tensor]) -> Sequence[Tensor]:
    """The Euclidean norms of each tensor's rows, float64 [rows]; of a vector, its magnitudes."""
    if not leaves:
        return ()
    counts = [_form(leaf.shape, leaf.dtype)[0] for leaf in leaves]
    return torch.split_with_sizes(all_row_norms(leaves), counts)


def all_row_norms(leaves: Sequence[Tensor]) -> Tensor:
    """`row_norms` of all tensors, one after the other: float64 [rows]."""
    shapes, dtypes = [leaf.shape for leaf in leaves], [leaf.dtype for leaf in leaves]
    laid = _laid_together(tuple(shapes), tuple(dtypes), _SMALL)
    norms = torch.cat([_row_norms(each.rows(leaves)) for each in laid.several])
    if laid.places is None:
        return norms
    if norms.device.type == "cpu":
        return norms.index_select(0, torch.from_numpy(laid.places))
    # Sending the places to the accelerator would make the host wait.
    parts = zip(laid.taken, torch.split_with_sizes(norms, laid.counts), strict=True)
    return torch.cat([part for _, part in sorted(parts, key=operator.itemgetter(0))])


@attrs.frozen(eq=False)
class _Several:
    """Tensors that are joined; `plain`: whether each is a real matrix or vector."""

    places: list[int]
    plain: bool

    def rows(self, leaves: Sequence[Tensor]) -> Tensor:
        """Their rows, of one length, as one matrix; for vectors, a vector."""
        several = [leaves[at] for at in self.places]
        if not self.plain:
            several = [_as_rows(leaf) for leaf in several]
        return several[0] if len(several) == 1 else torch.cat(several)


@attrs.frozen(eq=False)
class _Laid:
    """How tensors are joined.

    `taken`: the tensors in the order in which they are joined, with their `counts` of rows.
    `places`: where the rows of each are then; None if they are in order.
    """

    several: list[_Several]
    taken: list[int]
    counts: list[int]
    places: np.ndarray[Any, Any] | None


@functools.lru_cache(maxsize=64)
def _laid_together(
    shapes: tuple[torch.Size, ...], dtypes: tuple[torch.dtype, ...], small: int
) -> _Laid:
    """Join tensors of up to `small` numbers whose dtype and row length are the same.

    A model has hundreds of them, and calling kernels for each takes longer than the kernels do.
    """
    alike: dict[tuple[object, ...], list[int]] = {}
    forms = [_form(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    for at, (shape, dtype, form) in enumerate(zip(shapes, dtypes, forms, strict=True)):
        kind = (*form[1:], dtype) if shape.numel() <= small else (at,)
        alike.setdefault(kind, []).append(at)
    several = [
        _Several(
            places, all(len(shapes[at]) in (1, 2) and not dtypes[at].is_complex for at in places)
        )
        for places in alike.values()
    ]
    taken = [at for each in several for at in each.places]
    counts = [forms[at][0] for at in taken]
    if taken == sorted(taken):
        return _Laid(several, taken, counts, None)
    ends = np.cumsum(counts)
    rows = {at: np.arange(end - n, end) for at, end, n in zip(taken, ends, counts, strict=True)}
    places = np.concatenate([rows[at] for at in range(len(shapes))])
    return _Laid(several, taken, counts, places)


def _form(shape: torch.Size, dtype: torch.dtype) -> tuple[int, ...]:
    """The shape of a tensor as rows, [rows, length]; [numbers] below two dimensions."""
    count, *width = (*shape, 2) if dtype.is_complex else shape or (1,)
    return (count, math.prod(width)) if width else (count,)


def _as_rows(leaf: Tensor) -> Tensor:
    return (torch.view_as_real(leaf.resolve_conj()) if leaf.is_complex() else leaf).reshape(
        _form(leaf.shape, leaf.dtype)
    )


def _row_norms(rows: Tensor) -> Tensor:
    if rows.ndim < 2:
        return rows.to(torch.float64).abs()
    if rows.device.type != "cpu":
        return _norms(rows)
    # In pieces, since the CPU's kernel copies its argument to float64; by itself it would do so to
    # fresh memory for each, and where the system has to find that, it takes five times as long.
    count = max(2, _PIECE // max(1, rows.shape[1]))
    if rows.shape[0] <= count:
        return _norms(rows)
    pieces = torch.split(rows, count)
    wide = rows.new_empty(pieces[0].shape, dtype=torch.float64)
    return torch.cat([_norms(wide[: len(piece)].copy_(piece)) for piece in pieces])


def _norms(rows: Tensor) -> Tensor:
    if rows.shape[0] == 1:
        # A single row would be split among threads, and summed in another order.
        return _norms(rows.expand(2, -1))[:1]
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    return norms
