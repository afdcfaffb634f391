"""Validators of config fields, whose messages name the key and what was expected."""

from __future__ import annotations

import datetime
import errno
import math
import os
import re
from collections.abc import Callable
from typing import Any

import attrs

from functrain.cli.known import CALLED, KTO, LOSSES
from functrain.errors import ConfigError, did_you_mean

Validator = Callable[[Any, "attrs.Attribute[Any]", Any], None]


def key(record: Any, field: attrs.Attribute[Any]) -> str:
    """The path of a field: the `SECTION` of its record, and its name."""
    section = getattr(record, "SECTION", "")
    name = field.name.rstrip("_")
    return f"{section}.{name}" if section else name


def at_least(least: int, most: int = 2**63 - 1) -> Validator:
    """An integer from `least` to `most`, which by default is the largest of 64 bits; or None."""

    def check(record: Any, field: attrs.Attribute[Any], value: Any) -> None:
        if value is not None and (type(value) is not int or not least <= value <= most):
            beyond = type(value) is int and value > most
            bound = f"at most {most}" if beyond else f"at least {least}"
            raise ConfigError(f"{key(record, field)}: {value!r}, expected an integer of {bound}")

    return check


def number(expected: str, holds: Callable[[float], bool]) -> Validator:
    """A number for which `holds`, or None."""

    def check(record: Any, field: attrs.Attribute[Any], value: Any) -> None:
        if value is not None and not holds(value):
            raise ConfigError(f"{key(record, field)}: {value!r}, expected {expected}")

    return check


def one_of(known: tuple[str, ...]) -> Validator:
    """One of the known names, or None."""

    def check(record: Any, field: attrs.Attribute[Any], value: Any) -> None:
        if value is not None and value not in known:
            raise ConfigError(
                f"{key(record, field)}: {value!r} is unknown; {did_you_mean(str(value), known)}"
            )

    return check


def a_day(record: Any, field: attrs.Attribute[Any], value: Any) -> None:
    """A day in ISO 8601, or None."""
    try:
        datetime.date.fromisoformat("2000-01-01" if value is None else value)
    except (TypeError, ValueError):
        raise ConfigError(f"{key(record, field)}: {value!r}, expected a day: 2026-11-25") from None


def not_empty(expected: str) -> Validator:
    """A text that is not empty and that a config can hold (UTF-8), or None."""

    def check(record: Any, field: attrs.Attribute[Any], value: Any) -> None:
        if value == "":
            raise ConfigError(f"{key(record, field)}: empty; expected {expected}")
        try:
            str(value).encode()
        except UnicodeEncodeError:
            raise ConfigError(
                f"{key(record, field)}: {value!a} is not UTF-8, as a config is; expected "
                f"{expected} that is: rename it, or give a link to it"
            ) from None

    return check


def check_path(name: str, path: str) -> None:
    """Raise `ConfigError` for a text that cannot be a path: too long, or with a NUL."""
    try:
        os.lstat(path)
    except ValueError as error:  # also raised for names that the system's encoding cannot hold
        raise ConfigError(f"{name}: {path!a}: {error}; expected a path") from error
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise ConfigError(
                f"{name}: {path[:50]!r}…: {error.strerror}; expected a path"
            ) from error


def given(record: Any, field: attrs.Attribute[Any], value: Any) -> None:
    """A path that the system accepts and a config can hold, or None."""
    not_empty("a path")(record, field, value)
    if value is not None:
        check_path(key(record, field), value)


def at_home(path: str) -> str:
    """A path with a leading `~` expanded to the home directory, as by a shell."""
    # Path.expanduser raises for a `~name` without such a user.
    return os.path.expanduser(path)  # noqa: PTH111


named = not_empty("a name")
count = at_least(1)
size = at_least(1, 2**31 - 1)  # of tensors; torch cannot make larger ones
positive = number("a positive finite number", lambda value: 0 < value < math.inf)
not_negative = number("a finite number of at least 0", lambda value: 0 <= value < math.inf)
fraction = number("a number in [0, 1)", lambda value: 0 <= value < 1)
fraction_or_one = number("a number in [0, 1]", lambda value: 0 <= value <= 1)
fraction_to_one = number("a number in (0, 1]", lambda value: 0 < value <= 1)


def mixed(text: str) -> dict[str, float]:
    """The weights of "sigmoid + 0.2*sft" by name; `ConfigError` unless it is a mix of losses."""
    found: dict[str, float] = {}
    # The sign of an exponent, as in 1e+1, does not end a term.
    for term in re.split(r"(?<![\d.][eE])\+", text):
        factor, star, name = (part.strip() for part in term.rpartition("*"))
        try:
            weight = float(factor) if star else 1.0
        except ValueError:
            weight = math.nan
        if not 0 < weight < math.inf:
            raise ConfigError(
                f"the weight of {name!r} is {factor!r}, expected a finite number above 0"
            )
        if name not in LOSSES:
            if name == KTO:
                raise ConfigError(f"{KTO!r} is a loss without pairs, so it stands alone")
            near = CALLED.get(name.casefold().replace("-", "_"))
            near = near or did_you_mean(name, (*LOSSES, KTO))
            raise ConfigError(f"{name!r} is unknown; {near}")
        if name in found:
            raise ConfigError(f"{name!r} is there twice; give it once, with one weight")
        found[name] = weight
    return found


def a_mix(record: Any, field: attrs.Attribute[Any], value: Any) -> None:
    """The name of a loss, or a mix of losses over pairs."""
    if value == KTO:
        return
    try:
        mixed(str(value))
    except ConfigError as error:
        raise ConfigError(f"{key(record, field)}: {error}") from error
