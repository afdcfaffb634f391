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
    with _lock:
        yield from _seeded(key, device)


def _seeded(key: int, device: torch.device | None) -> Iterator[None]:
    cpu = torch.default_generator
    saved = cpu.get_state()
    saved_random, saved_numpy = random.getstate(), np.random.get_state()
    accelerator = device is not None and device.type == "cuda"
    saved_device = torch.cuda.get_rng_state(device) if accelerator and device is not None else None

    def restore() -> None:
        cpu.set_state(saved)
        random.setstate(saved_random)
        np.random.set_state(saved_numpy)
        if saved_device is not None and device is not None:
            torch.cuda.set_rng_state(saved_device, device)

    restored = False
    try:
        try:
            # Not torch.manual_seed: that would seed every accelerator of the process.
            cpu.manual_seed(key)
            random.seed(key)
            np.random.seed(key & 0xFFFFFFFF)
            if accelerator:
                index = device.index if device is not None and device.index is not None else 0
                torch.cuda.default_generators[index].manual_seed(key)
            yield
        finally:
            restore()
            restored = True
    finally:
        if not restored:  # Ctrl-C while restoring
            restore()
