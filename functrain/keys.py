"""Derived randomness: every draw is a function of (root key, step, micro-batch, purpose).

Nothing is carried and nothing global is disturbed: there is no generator in the state, and a
step gives the same draws whatever ran before it, on whatever worker it runs.
"""

from __future__ import annotations

import ctypes
import hashlib
import operator
import random
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any, TypeGuard

import attrs
import numpy as np
import torch
from numpy.random import mtrand

MAX_KEY = 2**63 - 1
_lock = threading.RLock()
# What NumPy's generator was in memory after the last seed.
_after_seed: bytes | None = None
# What NumPy's functions draw from within `kept`.
_STAND_IN = np.random.MT19937(0)


def derive(key: int, *path: int | str) -> int:
    """A key for one purpose: blake2b over `key` and `path`, in [0, 2**63).

    The parts are typed and length-prefixed, so that `("a", "bc")` and `("ab", "c")`, or `1` and
    `"1"`, are different purposes.
    """
    hasher = hashlib.blake2b(digest_size=8)
    for part in (_plain(key), *map(_plain, path)):
        kind = b"i" if isinstance(part, int) else b"s"
        data = str(part).encode()
        hasher.update(kind + len(data).to_bytes(4, "little") + data)
    return int.from_bytes(hasher.digest(), "little") & MAX_KEY


def _plain(part: int | str) -> int | str:
    """NumPy's integers, and 0-d tensors of integers, as the numbers that they are."""
    given: Any = part
    plain = isinstance(given, int | str) or not hasattr(given, "__index__")
    return part if plain else operator.index(given)


@contextmanager
def seeded(key: int, device: torch.device | None = None) -> Generator[None]:
    """Within it, the global generators draw from `key`; after it, they are as they were before.

    Covers torch's CPU generator, that of `device` if it is of CUDA, Python's `random` and NumPy's
    global one, so that a model which draws from any of them is a function of the key.
    CPU seeding keeps 32 bits of the key; enter this outside of compiled regions. The generators
    are the process's, so one thread at a time is within it, and others wait.

    Who binds an architecture as well (`functrain.bound`, where others wait too) does that first,
    and enters this inside: two threads in different orders would wait for each other for ever.
    """
    with kept(device):
        seed(key, device)
        yield


@contextmanager
def kept(device: torch.device | None = None) -> Generator[None]:
    """Within it, `seed` may be called, once or often; after it, the generators are as before.

    To read and write NumPy's alone takes 70 µs: around several seeds it is done once. Other threads
    wait for as long, in a step for all its micro-batches; the order with a binding is `seeded`'s.
    """
    with _lock:
        yield from _kept(device)


def seed(key: int, device: torch.device | None = None) -> None:
    """Have the generators that `seeded` covers draw from `key`; call it within `kept`."""
    global _after_seed
    # Not torch.manual_seed: that would seed every accelerator of the process.
    torch.default_generator.manual_seed(key)
    random.seed(key)
    np.random.seed(key & 0xFFFFFFFF)
    _after_seed = _memory()
    if _is_cuda(device):
        torch.cuda.default_generators[device.index or 0].manual_seed(key)


@attrs.frozen(eq=False)
class Place:
    """Where Python's and NumPy's global generators are; see `place`.

    `numpy`: as in memory, if it was there after a seed; otherwise as `np.random.get_state` says.
    """

    python: Any
    numpy: Any


def place() -> Place:
    """Where Python's and NumPy's generators are: those that torch does not put back itself.

    To read NumPy's takes 70 µs; where nothing has been drawn from it since the last `seed`, 1 µs.
    Python's takes 14, so that a module that is recomputed costs 45 µs more.
    """
    memory = _memory()
    fresh = memory is not None and memory == _after_seed
    return Place(random.getstate(), memory if fresh else np.random.get_state(legacy=False))


@contextmanager
def again(begun: Place) -> Generator[None]:
    """Within it, Python's and NumPy's generators draw as from `begun`; after it, as before."""
    before = place()
    try:
        _go(begun)
        yield
    finally:
        _go(before)


def _go(there: Place) -> None:
    random.setstate(there.python)
    if not isinstance(there.numpy, bytes):
        np.random.set_state(there.numpy)
    elif there.numpy != _memory():
        words = np.frombuffer(there.numpy, np.uint32)
        np.random.set_state(("MT19937", words[:-1], int(words[-1]), 0, 0.0))


def _memory() -> bytes | None:
    """NumPy's generator in memory: 624 words and a position; None for another than its usual one.

    The second of a pair of normal numbers, which is kept beside it, is none after a seed.
    """
    generator = mtrand.get_bit_generator()
    if type(generator) is not np.random.MT19937:
        return None
    return ctypes.string_at(generator.ctypes.state_address, 625 * 4)


def _is_cuda(device: torch.device | None) -> TypeGuard[torch.device]:
    return device is not None and device.type == "cuda"


def _kept(device: torch.device | None) -> Iterator[None]:
    cpu = torch.default_generator
    saved = cpu.get_state()
    saved_random = random.getstate()
    numpy, saved_numpy = mtrand.get_bit_generator(), np.random.get_state(legacy=False)
    # To write a generator's state takes 75 µs, to change generators 2. A change forgets the second
    # of a pair of normal numbers; and within another `kept` the stand-in is what is saved.
    written = numpy is _STAND_IN or saved_numpy["has_gauss"]
    saved_device = torch.cuda.get_rng_state(device) if _is_cuda(device) else None

    def restore() -> None:
        cpu.set_state(saved)
        random.setstate(saved_random)
        mtrand.set_bit_generator(numpy)
        if written:
            np.random.set_state(saved_numpy)
        if saved_device is not None and device is not None:
            torch.cuda.set_rng_state(saved_device, device)

    restored = False
    try:
        try:
            mtrand.set_bit_generator(_STAND_IN)
            yield
        finally:
            restore()
            restored = True
    finally:
        if not restored:  # Ctrl-C while restoring
            restore()
