"""Configs as TOML and back; every error names the file, the key and the remedy."""

from __future__ import annotations

import functools
import json
import math
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import attrs
import cattrs
from cattrs.errors import ClassValidationError, ForbiddenExtraKeysError
from cattrs.gen import make_dict_structure_fn, make_dict_unstructure_fn, override

from functrain.cli.config import DPO, SFT, STAGES, Config, Pretrain, Start
from functrain.errors import ConfigError, did_you_mean, nearest

C = TypeVar("C", Pretrain, SFT, DPO)
_KINDS: dict[type, tuple[tuple[type, ...], str]] = {
    int: ((int,), "an integer"),
    float: ((int, float), "a number"),
    str: ((str,), "a text in quotes"),
    bool: ((bool,), "true or false"),
}


@functools.cache  # generating the code of its hooks takes time
def _converter() -> cattrs.Converter:
    converter = cattrs.Converter(forbid_extra_keys=True)
    for kind in _KINDS:
        converter.register_structure_hook(kind, _strict)
    converter.register_structure_hook_func(_is_tuple, _items)
    renamed = override(rename="from")
    structure = make_dict_structure_fn(
        Start, converter, _cattrs_forbid_extra_keys=True, from_=renamed
    )
    converter.register_structure_hook(Start, structure)
    unstructure = make_dict_unstructure_fn(Start, converter, from_=renamed)
    converter.register_unstructure_hook(Start, unstructure)
    return converter


def _strict(value: Any, kind: Any) -> Any:
    """A value of exactly this type: cattrs would accept 2.7 as an int and "no" as a bool."""
    allowed, expected = _KINDS[kind]
    if type(value) not in allowed:
        raise TypeError(f"expected {expected}, got {_shown(value)}")
    try:
        return kind(value)
    except OverflowError as error:  # an integer beyond the largest float
        raise TypeError(f"expected {expected} of at most 1.8e308, got one beyond") from error


def _is_tuple(kind: Any) -> bool:
    return get_origin(kind) is tuple


def _items(value: Any, kind: Any) -> tuple[Any, ...]:
    """A tuple from a list alone: cattrs would take letters of a text, and keys of a section."""
    items = get_args(kind)
    if type(value) is not list or (Ellipsis not in items and len(value) != len(items)):
        raise TypeError(f"expected {_listed(kind)}, got {_shown(value)}")
    return tuple(_strict(each, items[0]) for each in value)


def _shown(value: Any) -> str:
    return "a section" if isinstance(value, Mapping) else repr(value)


def read(path: Path, cls: type[C]) -> C:
    """The config in a TOML file; one `ConfigError` lists every unknown key and wrong value."""
    return structured(_tables(path), cls, str(path))


def loads(text: str, cls: type[C]) -> C:
    """The config in a text written by `dumps`."""
    return structured(tomllib.loads(text), cls, "config")


def read_any(path: Path) -> Config:
    """The config that a run has written, of the stage that its `stage` names."""
    tables = _tables(path)
    if "stage" not in tables:
        raise ConfigError(f"{path}: stage: missing; expected one of {', '.join(STAGES)}")
    return read_as(path, str(tables["stage"]))


def read_as(path: Path, stage: str) -> Config:
    """The config of a stage in a TOML file; an unknown stage raises `ConfigError`."""
    if stage not in STAGES:
        raise ConfigError(f"{path}: stage: {stage!r}; {did_you_mean(stage, STAGES)}")
    if stage == "pretrain":
        return read(path, Pretrain)
    return read(path, SFT) if stage == "sft" else read(path, DPO)


def _tables(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except IsADirectoryError as error:
        inside = path / "config.toml"
        way = f"give {inside}" if inside.is_file() else "expected a file"
        raise ConfigError(f"{path}: a directory; {way}") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text ({error.reason})") from error
    # TOML's own error, and those of integers with thousands of digits and arrays nested as deep.
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not TOML: {error}") from error


def structured(tables: Mapping[str, Any], cls: type[C], where: str) -> C:
    """The config in `tables`; `where` begins each line of the `ConfigError` if they are invalid."""
    try:
        return _converter().structure(tables, cls)
    except ClassValidationError as error:
        lines = [f"{where}: {line}" for line in dict.fromkeys(_complaints(error, (), cls))]
        raise ConfigError("\n".join(lines)) from error


def _complaints(error: BaseException, path: tuple[str, ...], cls: type) -> Iterator[str]:
    """A line for each thing that is wrong in a section of `cls`, or at `path` in it."""
    if isinstance(error, ClassValidationError):
        named, others = error.group_exceptions()
        for inner, note in named:
            yield from _complaints(inner, (*path, note.name.rstrip("_")), cls)
        for each in others:
            yield from _complaints(each, path, cls)
    elif isinstance(error, ForbiddenExtraKeysError):
        for extra in sorted(error.extra_fields):
            way = _way(extra, _keys(error.cl), path, cls)
            yield f"{'.'.join((*path, extra))}: unknown key; {way}"
    elif isinstance(error, ConfigError):
        yield str(error)
    elif isinstance(error, TypeError) and str(error).startswith("expected "):
        yield f"{'.'.join(path)}: {error}"
    else:
        yield f"{'.'.join(path)}: {_expected(path) or error}"


def _way(key: str, own: list[str], path: tuple[str, ...], cls: type) -> str:
    """What to do about an unknown key at `path`: it may be known in another section of `cls`."""
    hints = get_type_hints(cls)
    sections = {name: _keys(hints[name]) for name in _keys(cls) if attrs.has(hints[name])}
    if path and key in sections:
        return f"it is a section by itself, [{key}]"
    if path and key in _keys(cls):
        return "it is of no section, and belongs above all of them"
    others = {name: keys for name, keys in sections.items() if (name,) != path}
    homes = [f"[{name}]" for name, keys in others.items() if key in keys]
    if homes:
        return f"it is of {' or '.join(homes)}"
    begun = any(name.startswith(key) for name in own)
    best = nearest(key, {*own, *(name for keys in others.values() for name in keys)})[:1]
    if begun or not best or best[0] in own:
        return did_you_mean(key, own)
    found = [f"{best[0]!r} of [{name}]" for name, keys in others.items() if best[0] in keys]
    return f"did you mean {' or '.join(found)}?"


def _keys(cls: type) -> list[str]:
    return [field.name.rstrip("_") for field in attrs.fields(cls)]


def _expected(path: tuple[str, ...]) -> str:
    """What belongs at a path whose value is not even of the right form."""
    for cls in STAGES.values():
        kind: Any = cls
        for part in path:
            hints = get_type_hints(kind) if attrs.has(kind) else {}
            kind = hints.get(part, hints.get(f"{part}_"))
        if kind is not None and attrs.has(kind):
            return f"expected a section with {', '.join(_keys(kind))}"
    return ""


def _listed(kind: Any) -> str:
    """The kind of list that a tuple is made from: `tuple[float, float]` or `tuple[int, ...]`."""
    items = get_args(kind)
    what = "texts" if str in items else "numbers"
    return f"a list of {what}" if Ellipsis in items else f"a list of {len(items)} {what}"


def flat(config: Config) -> dict[str, Any]:
    """Every key of a config by its path, `schedule.peak`; keys that are not given are None."""
    return _flat(_converter().unstructure(config))


def keys(path: Path) -> set[str]:
    """The paths of all keys in a TOML file."""
    return {*_flat(_tables(path))}


def _flat(tables: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}

    def walk(value: Any, path: str) -> None:
        if isinstance(value, Mapping):
            for name, inner in value.items():
                walk(inner, f"{path}.{name}" if path else name)
        else:
            found[path] = value

    walk(tables, "")
    return found


def dumps(config: Config) -> str:
    """A config as TOML that reads back as the same config; keys that are None are left out."""
    return "\n".join(_lines(_converter().unstructure(config), ())) + "\n"


def _lines(table: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[str]:
    if path:
        yield f"\n[{'.'.join(path)}]"
    for name, value in table.items():
        if value is not None and not isinstance(value, Mapping):
            yield f"{name} = {literal(value)}"
    for name, value in table.items():
        if isinstance(value, Mapping):
            yield from _lines(value, (*path, name))


def literal(value: Any) -> str:
    """A value as TOML writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # TOML's escapes are JSON's, except that the delete character must be escaped too.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else ("inf" if value > 0 else "-inf")
    if isinstance(value, int):
        return str(value)
    return f"[{', '.join(literal(each) for each in value)}]"
