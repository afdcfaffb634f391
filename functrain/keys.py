"""Derived randomness: every draw is a function of (root key, step, micro-batch, purpose).

The state carries no generator, and no global generator is disturbed: a step makes the same draws
whatever ran before it, and on whichever worker it runs.
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
# The memory of NumPy's generator after the last seed.
_after_seed: bytes | None = None
# The generator that NumPy's functions draw from within `kept`.
_STAND_IN = np.random.MT19937(0)


def derive(key: int, *path: int | str) -> int:
    """A key for one purpose: blake2b over `key` and `path`, in [0, 2**63).

    The parts are typed and length-prefixed, so `("a", "bc")` and `("ab", "c")`, or `1` and `"1"`,
    are different purposes.
    """
    hasher = hashlib.blake2b(digest_size=8)
    for part in (_plain(key), *map(_plain, path)):
        kind = b"i" if isinstance(part, int) else b"s"
        data = str(part).encode()
        hasher.update(kind + len(data).to_bytes(4, "little") + data)
    return int.from_bytes(hasher.digest(), "little") & MAX_KEY


def _plain(part: int | str) -> int | str:
    """NumPy integers and 0-d integer tensors as Python integers."""
    given: Any = part
    plain = isinstance(given, int | str) or not hasattr(given, "__index__")
    return part if plain else operator.index(given)


@contextmanager
def seeded(key: int, device: torch.device | None = None) -> Generator[None]:
    """A context in which the global generators draw from `key`; afterwards they are as before.

    It covers torch's CPU generator, that of `device` if it is a CUDA device, Python's `random` and
    NumPy's global one, so a model that draws from any of them is a function of the key. CPU seeding
    keeps 32 bits of the key; enter this outside of compiled regions. The generators belong to the
    process, so one thread at a time is inside, and others wait.

    With a binding (`functrain.bound`, where threads wait too), enter this inside of it: two threads
    that take the two in different orders would deadlock.
    """
    with kept(device):
        seed(key, device)
        yield


@contextmanager
def kept(device: torch.device | None = None) -> Generator[None]:
    """A context in which `seed` may be called repeatedly; afterwards the generators are as before.

    Saving and restoring NumPy's generator alone takes 70 µs; around several seeds it is done once.
    Other threads wait meanwhile, in a step for all its micro-batches. Enter it inside of a binding,
    as `seeded`.
    """
    with _lock:
        yield from _kept(device)


def seed(key: int, device: torch.device | None = None) -> None:
    """Seed the generators that `seeded` covers with `key`; call it within `kept`."""
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
    """The positions of Python's and NumPy's global generators; see `place`.

    `numpy`: the generator's memory if nothing was drawn since a seed, else `np.random.get_state`.
    """

    python: Any
    numpy: Any


def place() -> Place:
    """The positions of Python's and NumPy's generators, which torch does not restore itself.

    Reading NumPy's takes 70 µs, or 1 µs if nothing was drawn from it since the last `seed`.
    Python's takes 14 µs, so that recomputing a module costs 45 µs more.
    """
    memory = _memory()
    fresh = memory is not None and memory == _after_seed
    return Place(random.getstate(), memory if fresh else np.random.get_state(legacy=False))


@contextmanager
def again(begun: Place) -> Generator[None]:
    """A context in which Python's and NumPy's generators start at `begun`; restored afterwards."""
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
    """The memory of NumPy's generator, 624 words and a position; None unless it is an MT19937.

    A cached second normal number is kept elsewhere, but after a seed there is none.
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
    # Writing a generator's state takes 75 µs, swapping generators 2 µs. The state is written only
    # if the swap loses something: a cached second normal number, or, within another `kept`, the
    # position of the stand-in itself.
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
