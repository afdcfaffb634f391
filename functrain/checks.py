"""Checks of arguments, in one place and in the same words.

Each raises `ConfigError` with the argument's name, what was given and what was expected. Those that
take a record and a field are attrs validators.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

from functrain.errors import ConfigError

PathLike = str | os.PathLike[str]


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether a value is an int or a float; True and False are neither."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_integer(value: object, least: int = 1) -> TypeGuard[int]:
    """Whether a value is an int of at least `least`; True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def check_integer(name: str, value: object, least: int = 1) -> None:
    """Require an int of at least `least`."""
    if not is_integer(value, least):
        raise ConfigError(f"{name}: {value!r}, expected an integer of at least {least}")


def check_positive(name: str, value: object) -> None:
    """Require a finite number above 0."""
    if not is_number(value) or not 0 < value < math.inf:
        raise ConfigError(f"{name}: {value!r}, expected a positive finite number")


def check_not_negative(name: str, value: object) -> None:
    """Require a finite number of at least 0."""
    if not is_number(value) or not 0 <= value < math.inf:
        raise ConfigError(f"{name}: {value!r}, expected a finite number of at least 0")


def check_fraction(name: str, value: object) -> None:
    """Require a number in [0, 1)."""
    if not is_number(value) or not 0 <= value < 1:
        raise ConfigError(f"{name}: {value!r}, expected a number in [0, 1)")


def check_tensors(name: str, given: object) -> None:
    """Require a mapping; a module or None, which users may give instead, is refused."""
    if not isinstance(given, Mapping):
        raise ConfigError(
            f"{name}: {type(given).__name__}, expected a mapping of names to tensors; "
            "functrain.split gives params and buffers, functrain.value_and_grad gives grads"
        )


def check_boolean(name: str, value: object) -> None:
    """Require True or False, since a text such as "false" would count as true."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name}: {value!r}, expected True or False")


def as_path(name: str, given: object) -> Path:
    """The given path; an empty text is refused, as it would mean the working directory."""
    if not isinstance(given, str | os.PathLike) or not os.fspath(given):  # pyrefly: ignore[implicit-any-type-argument]
        raise ConfigError(f"{name}: {given!r}, expected a path")
    path = os.fspath(given)
    if not isinstance(path, str):
        raise ConfigError(f"{name}: {given!r}, expected a path as a text, not as bytes")
    return Path(path)


def boolean(_record: object, field: Any, value: Any) -> None:
    """Require True or False."""
    check_boolean(field.name, value)


def at_least_one(_record: object, field: Any, value: Any) -> None:
    """Require an int of at least 1."""
    check_integer(field.name, value)


def positive(_record: object, field: Any, value: Any) -> None:
    """Require a finite number above 0."""
    check_positive(field.name, value)


def fraction(_record: object, field: Any, value: Any) -> None:
    """Require a number in [0, 1)."""
    check_fraction(field.name, value)
