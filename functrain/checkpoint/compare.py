"""Comparing two checkpoints, leaf by leaf."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import attrs
import numpy as np
import torch
from torch import Tensor

from functrain.checkpoint.filesystem import OPERATING_SYSTEM, FileSystem
from functrain.checkpoint.loading import read_leaves
from functrain.state import Leaf
from functrain.trees import data_of


@attrs.frozen(kw_only=True)
class Difference:
    """A leaf that differs between two checkpoints; `one` and `other` describe it in each.

    For tensors of equal dtype and shape, also how many `elements` and `bits` differ, and the
    `largest` absolute difference (NaN where either tensor holds a NaN).
    """

    path: str
    one: str
    other: str
    elements: int | None = None
    bits: int | None = None
    largest: float | None = None

    def __str__(self) -> str:
        if self.elements is None:
            return f"{self.path}: {self.one} and {self.other}"
        return (
            f"{self.path}: {self.one}, {self.elements:,} elements differ in {self.bits:,} bits, "
            f"by {self.largest:.3g} at most"
        )


def differences(one: Mapping[str, Leaf], other: Mapping[str, Leaf]) -> Iterator[Difference]:
    """Every leaf whose bits differ: the params first, then the others, each sorted by path."""
    for path in sorted(one.keys() | other.keys(), key=lambda p: (not p.startswith("params/"), p)):
        if path not in one or path not in other:
            forms = [_form(each[path]) if path in each else "not there" for each in (one, other)]
            yield Difference(path=path, one=forms[0], other=forms[1])
            continue
        found = _difference(path, one[path], other[path])
        if found is not None:
            yield found


def _difference(path: str, one: Leaf, other: Leaf) -> Difference | None:
    forms = _form(one), _form(other)
    tensors = isinstance(one, Tensor) and isinstance(other, Tensor)
    if not tensors or forms[0] != forms[1]:
        same = not tensors and type(one) is type(other) and repr(one) == repr(other)
        return None if same else Difference(path=path, one=forms[0], other=forms[1])
    assert isinstance(one, Tensor)
    assert isinstance(other, Tensor)
    # Bits are compared, not values: equal NaNs are the same, and 0.0 differs from -0.0.
    apart = np.frombuffer(data_of(one), np.uint8) ^ np.frombuffer(data_of(other), np.uint8)
    if not apart.any():
        return None
    return Difference(
        path=path,
        one=forms[0],
        other=forms[1],
        elements=int(apart.reshape(-1, one.element_size()).any(axis=1).sum()),
        bits=int(np.bitwise_count(apart).sum()),
        largest=_largest(one, other),
    )


def _largest(one: Tensor, other: Tensor) -> float:
    wide = torch.complex128 if one.is_complex() else torch.float64
    return float((one.to(wide) - other.to(wide)).abs().max())


def _form(leaf: Leaf) -> str:
    if isinstance(leaf, Tensor):
        return f"{str(leaf.dtype).removeprefix('torch.')} {list(leaf.shape)}"
    return repr(leaf)


def compare_checkpoints(
    one: Path, other: Path, *, filesystem: FileSystem = OPERATING_SYSTEM
) -> Iterator[Difference]:
    """Every leaf in which two checkpoints differ, after both have been verified."""
    _, first = read_leaves(filesystem, one)
    _, second = read_leaves(filesystem, other)
    yield from differences(first, second)
