"""Products of parameters, of which the ordinary run takes half and the long one the rest."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest


def half(
    names: str, *axes: Sequence[Any], other: bool = False, **options: Any
) -> pytest.MarkDecorator:
    """All combinations of the values of some parameters, every other one of them `long`.

    Those that are not have places along the axes whose sum is even, or odd with `other`: together
    they have every combination of the values of all axes but any one of at least two values.
    """
    chosen = []
    for places in itertools.product(*(range(len(axis)) for axis in axes)):
        values = [axis[place] for axis, place in zip(axes, places, strict=True)]
        long = sum(places) % 2 != other
        chosen.append(pytest.param(*values, marks=pytest.mark.long if long else ()))
    return pytest.mark.parametrize(tuple(names.split(", ")), chosen, **options)
