"""`functrain init`: a config with every key, what it means, and its default; it runs as it is."""

from __future__ import annotations

import ast
import inspect
import shlex
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs

from functrain.cli import toml
from functrain.cli.config import STAGES, Start
from functrain.errors import ConfigError, did_you_mean

_BEFORE = {"sft": "functrain pretrain", "dpo": "functrain sft"}


def written(stage: str, path: Path) -> str:
    """Write the config of a stage to `path`; says what to type next. Never overwrites a file."""
    text = template(stage)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise ConfigError(f"{path}: is there already; remove it, or name another file") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror})") from error
    return f"{path}: written; run it with: functrain {stage} {shlex.quote(str(path))}"


def template(stage: str) -> str:
    """The config of a stage as commented TOML; `ConfigError` for an unknown stage."""
    if stage not in STAGES:
        raise ConfigError(f"stage: {stage!r} is unknown; {did_you_mean(stage, STAGES)}")
    config = STAGES[stage]()
    first = ""
    if isinstance(config.model, Start):
        first = f"it starts from {config.model.from_}, which `{_BEFORE[stage]}` makes; "
    head = (
        f"{(type(config).__doc__ or '').splitlines()[0]} Run it with `functrain {stage} FILE`: "
        f"{first}every value is the default, and a key that is commented out is left open."
    )
    return "\n".join([*_comment(head), *_section(config, ())]) + "\n"


def _section(record: Any, path: tuple[str, ...]) -> Iterator[str]:
    notes = _documented(type(record))
    fields = [(field.name, getattr(record, field.name)) for field in attrs.fields(type(record))]
    if path:
        yield ""
        yield from _comment((type(record).__doc__ or "").splitlines()[0])
        yield f"[{'.'.join(path)}]"
    for name, value in fields:
        if attrs.has(type(value)) or name in _RESOLVED.get(path, ()):
            continue
        key = name.rstrip("_")
        yield from _comment(notes.get(name, ""))
        yield f"# {key} =" if value is None else f"{key} = {toml.literal(value)}"
    for name, value in fields:
        if attrs.has(type(value)):
            yield from _section(value, (*path, name))


# Keys that a run fills in by itself.
_RESOLVED: Mapping[tuple[str, ...], tuple[str, ...]] = {
    (): ("sha256",),
    ("model",): ("sha256", "shape"),
    ("data",): ("sha256", "held_out_sha256", "templated"),
    ("schedule",): ("total_filled",),
}


def _comment(text: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(text, 92)]


def _documented(cls: type) -> dict[str, str]:
    """The docstring below each field of a record class and of the classes that it extends."""
    found: dict[str, str] = {}
    for each in reversed(cls.__mro__):
        if attrs.has(each):
            found |= _own(each)
    return found


def _own(cls: type) -> dict[str, str]:
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(tree, ast.ClassDef)
    found: dict[str, str] = {}
    for field, after in zip(tree.body, tree.body[1:], strict=False):
        if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
            continue
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            found[field.target.id] = " ".join(str(after.value.value).split())
    return found
