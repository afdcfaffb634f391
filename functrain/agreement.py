"""What the workers of a run must agree on before its first step: code, step, numerics and state."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor, nn

from functrain.distributed import World
from functrain.state import TrainState, fingerprint
from functrain.trees import digest

_ELSEWHERE = ("world", "value_and_grad", "gradient")


def agree(world: World, step: Any, state: TrainState) -> None:
    """Raise `WorkerError`, naming each difference, unless all workers are about to do the same."""
    world.agree({**code(), **described(step, "step"), "state": fingerprint(state)})


def code() -> dict[str, str]:
    """The versions of what computes, and a hash of this package's own source."""
    hasher = hashlib.sha256()
    root = Path(__file__).parent
    for path in sorted(root.rglob("*.py")):
        hasher.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "functrain": hasher.hexdigest()[:16],
        "threads": str(torch.get_num_threads()),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def described(record: Any, name: str) -> dict[str, str]:
    """Each leaf of nested records by its path, as a text that is the same in every process."""
    return dict(_leaves(record, name))


def _leaves(record: Any, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(record, Tensor):
        yield name, digest(record)[:16]
    elif isinstance(record, nn.Module):
        yield name, hashlib.sha256(repr(record).encode()).hexdigest()[:16]
    elif isinstance(record, Mapping):
        for key in sorted(record):
            yield from _leaves(record[key], f"{name}.{key}")
    elif attrs.has(type(record)):
        yield name, type(record).__name__
        for field in attrs.fields(type(record)):
            if field.name not in _ELSEWHERE and not (not field.init and field.name[0] == "_"):
                yield from _leaves(getattr(record, field.name), f"{name}.{field.name}")
    elif isinstance(record, Sequence) and not isinstance(record, str | bytes):
        yield name, str([dict(_leaves(each, "")) for each in record])
    elif isinstance(record, Set):
        yield name, str(sorted(map(str, record)))
    else:
        text = repr(record)
        # An address is another in every process.
        known = getattr(record, "__qualname__", type(record).__qualname__)
        yield name, known if " at 0x" in text else text
