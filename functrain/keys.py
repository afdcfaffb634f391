"""Derived randomness: every draw is a function of (root key, step, micro-batch, purpose).

Nothing is carried and nothing global is disturbed: there is no generator in the state, and a
step gives the same draws whatever ran before it, on whatever worker it runs.
"""

from __future__ import annotations

import hashlib
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeGuard

import numpy as np
import torch

MAX_KEY = 2**63 - 1
_lock = threading.RLock()


def derive(key: int, *path: int | str) -> int:
    """A key for one purpose: blake2b over `key` and `path`, in [0, 2**63).

    The parts are typed and length-prefixed, so that `("a", "bc")` and `("ab", "c")`, or `1` and
    `"1"`, are different purposes.
    """
    hasher = hashlib.blake2b(digest_size=8)
    for part in (key, *path):
        kind = b"i" if isinstance(part, int) else b"s"
        data = str(part).encode()
        hasher.update(kind + len(data).to_bytes(4, "little") + data)
    return int.from_bytes(hasher.digest(), "little") & MAX_KEY


@contextmanager
def seeded(key: int, device: torch.device | None = None) -> Iterator[None]:
    """Within it, the global generators draw from `key`; after it, they are as they were before.

    Covers torch's CPU generator, that of `device` if it is an accelerator, Python's `random` and
    NumPy's global one, so that a model which draws from any of them is a function of the key.
    CPU seeding keeps 32 bits of the key; enter this outside of compiled regions. The generators
    are the process's, so one thread at a time is within it, and others wait.
    """
    with kept(device):
        seed(key, device)
        yield


@contextmanager
def kept(device: torch.device | None = None) -> Iterator[None]:
    """Within it, `seed` may be called, once or often; after it, the generators are as before.

    To read and write NumPy's alone takes 70 µs: around several seeds it is done once. Other threads
    wait for as long, in a step for all its micro-batches.
    """
    with _lock:
        yield from _kept(device)


def seed(key: int, device: torch.device | None = None) -> None:
    """Have the generators that `seeded` covers draw from `key`; call it within `kept`."""
    # Not torch.manual_seed: that would seed every accelerator of the process.
    torch.default_generator.manual_seed(key)
    random.seed(key)
    np.random.seed(key & 0xFFFFFFFF)
    if _is_accelerator(device):
        torch.cuda.default_generators[device.index or 0].manual_seed(key)


def _is_accelerator(device: torch.device | None) -> TypeGuard[torch.device]:
    return device is not None and device.type == "cuda"


def _kept(device: torch.device | None) -> Iterator[None]:
    cpu = torch.default_generator
    saved = cpu.get_state()
    saved_random, saved_numpy = random.getstate(), np.random.get_state()
    saved_device = torch.cuda.get_rng_state(device) if _is_accelerator(device) else None

    def restore() -> None:
        cpu.set_state(saved)
        random.setstate(saved_random)
        np.random.set_state(saved_numpy)
        if saved_device is not None and device is not None:
            torch.cuda.set_rng_state(saved_device, device)

    restored = False
    try:
        try:
            yield
        finally:
            restore()
            restored = True
    finally:
        if not restored:  # Ctrl-C while restoring
            restore()
