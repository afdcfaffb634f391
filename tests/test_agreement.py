"""What workers compare of a step: each difference has a name, and the same is the same."""

from __future__ import annotations

import dataclasses
import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from functrain.agreement import code, described
from functrain.distributed import World

SIMPLE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda values: st.lists(values) | st.tuples(values) | st.dictionaries(st.text(), values),
    max_leaves=5,
)


def _scaled(count: int, factor: Any = 1) -> Any:
    return count * factor


def _enclosing(factor: Any) -> Callable[[int], Any]:
    return lambda count: count * factor


def _defaulting(factor: Any) -> Callable[[int], Any]:
    def scaled(count: int, factor: Any = factor) -> Any:
        return count * factor

    return scaled


def _naming(factor: Any) -> Callable[[int], Any]:
    def scaled(count: int, *, factor: Any = factor) -> Any:
        return count * factor

    return scaled


HOLDING: list[Callable[[Any], Any]] = [
    _enclosing,
    _defaulting,
    _naming,
    lambda factor: functools.partial(_scaled, factor),
    lambda factor: functools.partial(_scaled, factor=factor),
    lambda factor: functools.partial(_enclosing(factor), 1),
]


@pytest.mark.parametrize("holding", HOLDING)
@given(one=SIMPLE, other=SIMPLE)
def test_functions_are_the_same_where_what_they_hold_is(
    holding: Callable[[Any], Any], one: Any, other: Any
) -> None:
    first, second = (described(holding(each), "step.schedule") for each in (one, other))
    assert (first == second) == (repr(one) == repr(other))
    assert first == described(holding(one), "step.schedule")
    assert len(str(first)) < 1000


def test_a_tensor_that_a_function_holds_is_compared() -> None:
    one, other = (described(_enclosing(torch.tensor([1.0, n])), "f") for n in (2.0, 3.0))
    assert one != other
    assert one == described(_enclosing(torch.tensor([1.0, 2.0])), "f")


def test_other_code_is_another_function() -> None:
    functions: list[Any] = [lambda n: n + 1, lambda n: n + 2, lambda n: n * 1, lambda n: abs(n)]
    seen = {described(each, "f")["f"] for each in functions}
    assert len(seen) == 4


def test_what_may_be_another_on_each_worker_is_compared_by_its_type() -> None:
    def held(rank: int) -> dict[str, str]:
        device = torch.device("cuda", rank)
        world = World(rank=rank, size=2, device=device)
        rows = {"weight": torch.full((2,), float(rank))}
        return described(lambda: (device, world, rows, open), "f")

    assert held(0) == held(1)
    assert "World" in held(0).values()


def test_functions_that_hold_each_other_have_an_end() -> None:
    def even(count: int) -> bool:
        return count == 0 or odd(count - 1)

    def odd(count: int) -> bool:
        return count > 0 and even(count - 1)

    assert described(even, "f")["f.odd.even"] == "function"


@dataclasses.dataclass(frozen=True)
class _Standard:
    names: Any


def _unhashed() -> dict[str, str]:
    names = {"a", "b", "c", "d", "e"}
    function = described(lambda n: n in names or HOLDING, "f")
    nested = [_Standard(names), _Record({"within": {frozenset(names)}})]
    return {**function, **described(_Standard((names, nested)), "record")}


def test_another_process_describes_what_it_has_the_same() -> None:
    """Neither addresses nor the order of sets, which is another in each."""
    program = "import test_agreement; print(test_agreement._unhashed())"
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent)])
    output = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "1"},
        capture_output=True,
        check=True,
    )
    assert output.stdout.decode().strip() == str(_unhashed())


@attrs.frozen
class _Record:
    schedule: Any


def test_a_difference_within_a_record_has_its_path() -> None:
    one, other = (described(_Record(_enclosing(n)), "step") for n in (1, 2))
    assert {name for name in one if one[name] != other[name]} == {"step.schedule.factor"}
    one, other = (described(_Standard({"some": (each, 1)}), "step") for each in (0, -1))
    assert {name for name in one if one[name] != other[name]} == {"step.names.some"}


def test_what_changes_the_bits_is_compared() -> None:
    before = code()
    try:
        torch.use_deterministic_algorithms(True)
        torch.set_float32_matmul_precision("medium")
        torch.backends.mkldnn.enabled = False
        flushes = torch.set_flush_denormal(True)
        after = code()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_float32_matmul_precision("highest")
        torch.backends.mkldnn.enabled = True
        torch.set_flush_denormal(False)
    found = {name for name in before if before[name] != after[name]}
    assert found == {"deterministic", "matmul precision", "mkldnn", *["denormals"] * flushes}
    assert code() == before
