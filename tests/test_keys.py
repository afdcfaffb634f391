"""Derived randomness: keys are functions of their path, and nothing global is disturbed."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.random import mtrand

from functrain import keys

KEYS = st.integers(0, keys.MAX_KEY)
PART = st.integers(-(2**70), 2**70) | st.text(max_size=8)
PATHS = st.lists(PART, max_size=4).map(tuple)


@given(key=KEYS, path=PATHS)
def test_a_key_is_a_function_of_its_path(key: int, path: tuple[Any, ...]) -> None:
    """And lies in [0, 2**63)."""
    derived = keys.derive(key, *path)
    assert derived == keys.derive(key, *path)
    assert 0 <= derived <= keys.MAX_KEY


@given(one=st.tuples(KEYS, PATHS), other=st.tuples(KEYS, PATHS))
def test_another_path_is_another_key(one: Any, other: Any) -> None:
    if one != other:
        assert keys.derive(one[0], *one[1]) != keys.derive(other[0], *other[1])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((1, "a", "bc"), (1, "ab", "c")),
        ((1, 1), (1, "1")),
        ((1, "ab"), (1, "a", "b")),
        ((1, 12), (1, 1, 2)),
        ((1,), (1, "")),
        ((12, 3), (1, 23)),
        ((1, "step", 0), (1, "step", 1)),
        ((1, -1), (1, 1)),
    ],
)
def test_parts_do_not_run_into_one_another(one: tuple[Any, ...], other: tuple[Any, ...]) -> None:
    assert keys.derive(*one) != keys.derive(*other)


@given(number=st.integers(0, 2**31 - 1))
def test_an_integer_of_numpys_is_that_number(number: int) -> None:
    for kind in (np.int32, np.int64, np.uint64):
        assert keys.derive(kind(number), "step", kind(number)) == keys.derive(
            number, "step", number
        )
    assert keys.derive(0, True) != keys.derive(0, 1)


def test_a_hundred_thousand_keys_are_distinct() -> None:
    derived = {keys.derive(seed, "step", step) for seed in range(100) for step in range(1000)}
    assert len(derived) == 100_000


def test_keys_are_the_same_for_ever() -> None:
    """Pinned: another derivation would be another run for every seed that anybody has used."""
    assert keys.derive(0) == 7538044597449281119
    assert keys.derive(17, "step", 3) == 6102716238356188798


def _draws() -> tuple[float, float, float]:
    return float(torch.rand(())), random.random(), float(np.random.rand())


def _generators() -> tuple[Any, ...]:
    kind, state, *rest = np.random.get_state()
    return torch.get_rng_state().tolist(), random.getstate(), kind, state.tolist(), rest


@given(key=KEYS)
def test_draws_are_a_function_of_the_key(key: int) -> None:
    """torch's, Python's and NumPy's, whatever was drawn before."""
    with keys.seeded(key):
        first = _draws()
    _draws()
    with keys.seeded(key):
        assert _draws() == first
    with keys.seeded(keys.derive(key, "other")):
        other = _draws()
    assert all(a != b for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("fails", [False, True])
def test_the_global_generators_are_as_they_were(fails: bool) -> None:
    """After draws inside, nested ones too, and after an error."""
    before = _generators()
    try:
        with keys.seeded(1):
            _draws()
            with keys.seeded(2):
                _draws()
                if fails:
                    raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    assert _generators() == before


@pytest.mark.parametrize("made", [np.random.MT19937, np.random.PCG64])
@pytest.mark.parametrize("drawn", [0, 1, 2, 3])
def test_numpys_generator_goes_on_with_the_second_of_a_pair(made: Any, drawn: int) -> None:
    """Normal numbers are drawn by twos; the generator is the one that was there, of any kind."""
    own = mtrand.get_bit_generator()
    found = []
    try:
        for inside in (False, True):
            there = made(3)
            mtrand.set_bit_generator(there)
            np.random.randn(drawn)
            if inside:
                with keys.seeded(1):
                    np.random.randn(drawn + 1)
                    with keys.seeded(2):
                        np.random.randn()
                assert mtrand.get_bit_generator() is there
            found.append(np.random.randn(3).tolist())
    finally:
        mtrand.set_bit_generator(own)
    assert found[0] == found[1]


def test_an_inner_seed_leaves_the_outer_draws_as_they_are() -> None:
    with keys.seeded(1):
        _draws()
        expected = _draws()
    with keys.seeded(1):
        _draws()
        with keys.seeded(2):
            _draws()
        assert _draws() == expected


def _drawn(count: int) -> list[float]:
    """Python's and NumPy's; each normal number but the first of a pair moves nothing in memory."""
    draws = (random.random, np.random.rand, lambda: random.gauss(0, 1), np.random.randn)
    return [float(draw()) for _ in range(count) for draw in draws]


@pytest.mark.parametrize("before", [0, 1, 2, 3])
@pytest.mark.parametrize("between", [0, 1, 2])
@pytest.mark.parametrize("seeded", [False, True])
def test_from_a_place_the_same_is_drawn_again(before: int, between: int, seeded: bool) -> None:
    """Behind a seed and elsewhere, whatever was drawn since; afterwards all is as it was."""
    with keys.kept():
        if seeded:
            keys.seed(3)
        _drawn(before)
        there = keys.place()
        expected = _drawn(1)
        _drawn(between)
        generators = _generators()
        for _ in range(2):
            with keys.again(there):
                assert _drawn(1) == expected
            assert _generators() == generators
        with pytest.raises(ZeroDivisionError), keys.again(there):
            raise ZeroDivisionError
        assert _generators() == generators


def test_a_place_behind_a_seed_is_read_from_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which costs a fiftieth; where nothing was drawn nothing is set either."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("NumPy's generator was read or set as a whole")

    with keys.seeded(3), monkeypatch.context() as patch:
        patch.setattr(np.random, "get_state", refuse)
        patch.setattr(np.random, "set_state", refuse)
        with keys.again(keys.place()):
            random.random()


def test_a_place_of_another_kind_of_numpys_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose memory is laid out in another way, and is not looked at."""
    monkeypatch.delattr(keys.ctypes, "string_at")
    own = np.random.get_bit_generator()
    try:
        np.random.set_bit_generator(np.random.PCG64(3))
        there = keys.place()
        expected = _drawn(2)
        with keys.again(there):
            assert _drawn(2) == expected
    finally:
        np.random.set_bit_generator(own)


def test_torchs_own_seed_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.manual_seed` would seed every accelerator of the process as well."""

    def refuse(_seed: int) -> None:
        raise AssertionError("torch.manual_seed was called")

    monkeypatch.setattr(torch, "manual_seed", refuse)
    with keys.seeded(1, torch.device("cpu")):
        _draws()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_an_accelerators_generator_is_seeded_and_put_back() -> None:
    device = torch.device("cuda")
    before = torch.cuda.get_rng_state(device)
    with keys.seeded(5, device):
        first = torch.rand(3, device=device)
    with keys.seeded(5, device):
        assert torch.equal(torch.rand(3, device=device), first)
    assert torch.equal(torch.cuda.get_rng_state(device), before)
