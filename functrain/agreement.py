"""The agreement of workers before the first step: on code, step, numerics and state."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import platform
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import suppress
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor, nn

from functrain.distributed import World
from functrain.state import TrainState, fingerprint
from functrain.trees import digest

_ELSEWHERE = ("world", "value_and_grad", "gradient")
_DENORMAL = 1e-40
_SIMPLE = (bool, int, float, complex, str, bytes, type(None))
_COLLECTIONS = (tuple, list, set, frozenset, dict)
_FUNCTIONS = (functools.partial, FunctionType)
_LONG = 100  # characters


def agree(world: World, step: Any, state: TrainState) -> None:
    """Raise `WorkerError`, naming each difference, unless all workers are about to do the same."""
    with world.meeting("the fingerprint of a state"):  # it gathers sharded tensors
        found = fingerprint(state)
    world.agree({**code(), **described(step, "step"), "state": found})


def code() -> dict[str, str]:
    """The versions and settings of what computes, and a hash of this package's own source."""
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
        "deterministic": str(torch.are_deterministic_algorithms_enabled()),
        "matmul precision": torch.get_float32_matmul_precision(),
        "mkldnn": str(torch.backends.mkldnn.enabled),
        "denormals": "kept" if keeps_denormals() else "flushed",
    }


def keeps_denormals() -> bool:
    """Whether this process computes with denormals; torch does not tell its setting."""
    return float(torch.tensor(_DENORMAL, dtype=torch.float32, device="cpu") * 1) != 0


def described(record: Any, name: str) -> dict[str, str]:
    """Each leaf of nested records by its path, as text that is the same in every process."""
    return dict(_leaves(record, name))


def _leaves(record: Any, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(record, Tensor):
        yield name, digest(record)[:16]
    elif isinstance(record, nn.Module):
        yield name, _hash(repr(record))
    elif isinstance(record, Mapping):
        for key in sorted(record):
            yield from _leaves(record[key], f"{name}.{key}")
    elif attrs.has(type(record)) or dataclasses.is_dataclass(type(record)):
        yield name, type(record).__name__
        found = attrs.fields if attrs.has(type(record)) else dataclasses.fields
        for field in found(type(record)):
            hidden = not field.init and field.name[0] == "_"
            if isinstance(field, dataclasses.Field):  # compare=False: a worker's own path, say
                hidden = hidden or not field.compare
            if field.name not in _ELSEWHERE and not hidden:
                yield from _leaves(getattr(record, field.name), f"{name}.{field.name}")
    elif isinstance(record, _FUNCTIONS):
        yield from _function(record, name, ())
    elif isinstance(record, Sequence) and not isinstance(record, str | bytes):
        yield name, str([dict(_leaves(each, "")) for each in record])
    elif isinstance(record, Set):
        yield name, _text(record) or str(sorted(map(str, record)))
    else:
        text = repr(record)
        # A repr with an address differs between processes.
        known = getattr(record, "__qualname__", type(record).__qualname__)
        yield name, known if " at 0x" in text else text


def _function(given: Any, name: str, within: tuple[Any, ...]) -> Iterator[tuple[str, str]]:
    """What a function does: its code, and what it holds. `within`: the functions that hold it."""
    if isinstance(given, functools.partial):
        yield name, "partial"
        held = [("func", given.func), *enumerate(given.args), *given.keywords.items()]
    else:
        yield name, f"{given.__qualname__} {_code(given.__code__)}"
        defaults = enumerate(given.__defaults__ or ())
        held = [*defaults, *(given.__kwdefaults__ or {}).items(), *_enclosed(given)]
    for key, value in held:
        yield from _held(value, f"{name}.{key}", (*within, given))


def _enclosed(given: FunctionType) -> Iterator[tuple[str, Any]]:
    """The variables that a function closes over, by name."""
    for name, cell in zip(given.__code__.co_freevars, given.__closure__ or (), strict=True):
        with suppress(ValueError):  # not assigned yet
            yield name, cell.cell_contents


def _held(value: Any, name: str, within: tuple[Any, ...]) -> Iterator[tuple[str, str]]:
    """A value that a function holds: simple values, tensors and other functions in full.

    Anything else is described by its type, since its fields may differ between workers (a world, a
    device, a worker's rows of the params).
    """
    text = _text(value)
    if text is not None:
        yield name, text if len(text) <= _LONG else _hash(text)
    elif type(value) in (Tensor, nn.Parameter) and not value.is_meta:
        yield name, digest(value)[:16]
    elif isinstance(value, _FUNCTIONS) and not any(value is each for each in within):
        yield from _function(value, name, within)
    else:
        yield name, type(value).__qualname__


def _code(code: CodeType) -> str:
    """A hash of what the code does, without addresses and line numbers."""
    constants = [_code(c) if isinstance(c, CodeType) else _text(c) for c in code.co_consts]
    return _hash(repr((code.co_code, code.co_names, constants)))


def _text(value: Any) -> str | None:
    """A simple value or a collection of them, as text that is the same in every process."""
    if isinstance(value, _SIMPLE):
        return repr(value)
    if type(value) not in _COLLECTIONS:
        return None
    parts = [_text(each) for each in (value.items() if type(value) is dict else value)]
    known = [part for part in parts if part is not None]
    ordered = sorted(known) if type(value) in (set, frozenset) else known
    return f"{type(value).__name__} {ordered}" if len(known) == len(parts) else None


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
