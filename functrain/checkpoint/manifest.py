"""A checkpoint's manifest, and the name of its directory."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import orjson

from functrain.checkpoint.filesystem import FileSystem, read_exactly, regular
from functrain.checks import PathLike, as_path
from functrain.errors import CheckpointError

MANIFEST = "manifest.json"
STATE = "state.json"
FILES = ("model", "buffers", "optimizer", "extra")
FORMAT = 1
MOST_STEPS = 10**12 - 1
LONGEST_JSON = 1 << 26
"""Bytes; easily enough for a manifest, or a loader's state that lists what it has shuffled."""

LONGEST_TEXT = 1 << 30
_NAME = re.compile(r"step-([0-9]{12})")
_BESIDE = re.compile(r"[A-Za-z0-9_]{1,64}\.(json|txt|md|jinja)")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_KEYS = {"files", "format", "metrics", "numerics", "sha256", "step", "version"}


@attrs.frozen
class File:
    """A file's entry in the manifest: its size in bytes and its sha256 in hexadecimal."""

    size: int
    sha256: str


@attrs.frozen(kw_only=True)
class Manifest:
    """What a checkpoint consists of.

    `metrics`: what was measured of the state, for retention and for the reader. `numerics`: the
    conditions that the bits depend on (`functrain.checkpoint.environment`).
    """

    step: int
    files: Mapping[str, File]
    metrics: Mapping[str, float]
    numerics: Mapping[str, Any]


def directory_name(step: int) -> str:
    """`step-000000001000`."""
    return f"step-{step:012d}"


def step_of(path: Path) -> int | None:
    """The step in a checkpoint directory's name; None for any other name."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else None


def checkpoints(directory: Path) -> list[Path]:
    """The checkpoint directories in `directory`, oldest first."""
    try:
        if not directory.is_dir():
            return []
        named = {step: p for p in directory.iterdir() if (step := step_of(p)) is not None}
        found = {step: path for step, path in named.items() if not path.is_file()}
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be read ({error.strerror})") from error
    return [found[step] for step in sorted(found)]


def latest(directory: PathLike) -> Path | None:
    """The checkpoint of the highest step in `directory`, judged by the names alone, or None."""
    found = checkpoints(as_path("directory", directory))
    return found[-1] if found else None


def located(path: PathLike) -> Path:
    """`path` itself if it is a checkpoint, else the newest checkpoint in it."""
    given = as_path("path", path)
    if not given.is_dir():
        what = "is a file" if given.exists() else "does not exist"
        raise CheckpointError(
            f"{given}: {what}; expected a directory of checkpoints or one of them"
        )
    if step_of(given) is not None or (given / MANIFEST).exists():
        return given
    newest = latest(given)
    if newest is None:
        raise CheckpointError(
            f"{given}: holds no checkpoint; expected step-* directories as functrain.save makes"
        )
    return newest


def to_bytes(manifest: Manifest) -> bytes:
    """The manifest as written to the file, with its own hash."""
    metrics = {name: encoded(value) for name, value in manifest.metrics.items()}
    body = attrs.asdict(manifest) | {"format": "functrain", "metrics": metrics, "version": FORMAT}
    return bounded(as_json({**body, "sha256": _own_hash(body)}), f"{MANIFEST}, with conditions")


def _own_hash(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(as_json(body)).hexdigest()


def as_json(value: object) -> bytes:
    """Canonical JSON: sorted keys, two spaces of indentation."""
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS | orjson.OPT_INDENT_2)


def bounded(data: bytes, what: str, most: int | None = None) -> bytes:
    """`data` unchanged; raises `CheckpointError` if it is longer than a load would accept."""
    limit = LONGEST_JSON if most is None else most
    if len(data) > limit:
        raise CheckpointError(
            f"{what}: {len(data):,} bytes, and a checkpoint holds {limit:,} at most; keep the rest "
            "in a file of your own"
        )
    return data


def plain(values: Mapping[str, Any], what: str) -> dict[str, Any]:
    """The values after a round trip through JSON: tuples become lists, infinities are `encoded`.

    Raises `CheckpointError` for values that JSON cannot hold.
    """
    try:
        found: dict[str, Any] = orjson.loads(as_json(_encoded_within(values)))
    except orjson.JSONEncodeError as error:
        raise CheckpointError(
            f"{what}: {error}; expected numbers, texts, and lists and objects of them"
        ) from error
    return found


def _encoded_within(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _encoded_within(each) for name, each in value.items()}
    if type(value) in (list, tuple):
        return [_encoded_within(each) for each in value]
    return encoded(value)


def is_text(value: object) -> bool:
    """Whether a value is a string that UTF-8 can hold, without half of a surrogate pair."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def checked_name(name: object, where: str = "beside") -> str:
    """`name`, if a text beside the state may have it; otherwise raises `CheckpointError`."""
    if not isinstance(name, str) or not _BESIDE.fullmatch(name) or name in (MANIFEST, STATE):
        shown = name[:99] if isinstance(name, str) else name
        raise CheckpointError(
            f"{where}: {shown!r}, expected a plain name that ends in .json, .txt, .md or .jinja"
        )
    return name


def checked_texts(given: Mapping[str, str] | None) -> dict[str, bytes]:
    """The texts to be saved beside a state, as bytes; raises `CheckpointError` for other values."""
    if given is not None and not isinstance(given, Mapping):
        raise CheckpointError(f"beside: {given!r}, expected a mapping of file names to texts")
    texts: dict[str, bytes] = {}
    for name, text in (given or {}).items():
        checked_name(name)
        if not isinstance(text, str):
            raise CheckpointError(f"beside: {name} is {text!r:.99}, expected a text")
        if not is_text(text):
            raise CheckpointError(f"beside: {name} is no text that UTF-8 can hold")
        texts[name] = bounded(text.encode(), f"beside: {name}", LONGEST_TEXT)
    return texts


def is_beside(name: str) -> bool:
    """Whether a checkpoint's file is a text beside the state rather than a part of it."""
    return name not in {STATE, *(f"{file}.safetensors" for file in FILES)}


def checked_metrics(given: Mapping[str, float] | None) -> dict[str, float]:
    """The metrics as floats; raises `CheckpointError` for values that are not numbers."""
    if given is not None and not isinstance(given, Mapping):
        raise CheckpointError(f"metrics: {given!r}, expected a mapping of names to numbers")
    metrics: dict[str, float] = {}
    for name, value in (given or {}).items():
        if not is_text(name):
            raise CheckpointError(f"metrics: {name!r}, expected a name")
        try:
            if getattr(value, "numel", lambda: 1)() != 1:
                raise ValueError("several numbers")
            metrics[name] = float(value)
        except (TypeError, ValueError, OverflowError) as error:
            raise CheckpointError(
                f"metrics: {name!r} is {value!r:.99}, expected a number"
            ) from error
    return metrics


def encoded(value: Any) -> Any:
    """A number in a form that JSON can hold: it has no inf or NaN, for which orjson writes null."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    return value


def decoded(value: Any, name: str, path: Path) -> Any:
    """The inverse of `encoded`: a number, text or None; anything else raises `CheckpointError`."""
    if isinstance(value, dict):
        text = value.get("float")
        if value.keys() == {"float"} and text in ("inf", "-inf", "nan"):
            return float(text)
    elif value is None or isinstance(value, int | float | str):
        return value
    raise CheckpointError(f"{path}: {name} is {str(value)[:99]}, expected a number or a text")


def parsed_json(data: bytes, path: Path) -> dict[str, Any]:
    """A JSON object in canonical form; anything else raises `CheckpointError`.

    Requiring canonical form refuses duplicate keys, and numbers that parsing would silently change.
    """
    try:
        value = orjson.loads(data)
        again = as_json(value)
    except (orjson.JSONDecodeError, orjson.JSONEncodeError) as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(value).__name__}")
    if again != data:
        raise CheckpointError(f"{path}: not in canonical form; functrain has not written it so")
    return value


def is_format(version: object) -> bool:
    """Whether this is the version that is read here; true and 1.0 do not count as 1."""
    return type(version) is int and version == FORMAT


class OtherFormatError(CheckpointError):
    """The checkpoint is intact, but in a format that this version does not read."""


def read_manifest(filesystem: FileSystem, directory: Path) -> Manifest:
    """The manifest of a checkpoint, after checking its own hash and its structure."""
    path = directory / MANIFEST
    with regular(filesystem, path) as (descriptor, size):
        if size > LONGEST_JSON:
            raise CheckpointError(f"{path}: {size} bytes, which no manifest is")
        data = bytearray(size)
        read_exactly(filesystem, descriptor, memoryview(data), path)
    body = parsed_json(bytes(data), path)
    own = body.pop("sha256", None)
    if own != _own_hash(body):
        raise CheckpointError(f"{path}: altered: its own sha256 does not match")
    if body.get("format") != "functrain" or not is_format(body.get("version")):
        raise OtherFormatError(
            f"{path}: format {body.get('format')!r} version {body.get('version')!r}; this "
            f"functrain reads 'functrain' version {FORMAT}"
        )
    return _checked(body, path)


def _checked(body: Mapping[str, Any], path: Path) -> Manifest:
    if body.keys() != _KEYS - {"sha256"}:
        raise CheckpointError(f"{path}: has the keys {sorted(body)}, expected {sorted(_KEYS)}")
    step, named = body["step"], step_of(path.parent)
    if type(step) is not int or not 0 <= step <= MOST_STEPS:
        raise CheckpointError(f"{path}: step {step!r}, expected 0 to {MOST_STEPS}")
    if named not in (None, step):
        raise CheckpointError(f"{path}: is of step {step}, and its directory says {named}")
    for name in ("files", "metrics", "numerics"):
        if not isinstance(body[name], dict):
            raise CheckpointError(f"{path}: {name} is {body[name]!r}, expected an object")
    metrics = {n: decoded(v, f"metrics/{n}", path) for n, v in body["metrics"].items()}
    for name, value in metrics.items():
        if type(value) not in (int, float):
            raise CheckpointError(f"{path}: metrics/{name} is {value!r}, expected a number")
    expected = {STATE, *(f"{name}.safetensors" for name in FILES)}
    if not expected <= body["files"].keys():
        raise CheckpointError(f"{path}: lists {sorted(body['files'])}, expected {sorted(expected)}")
    files = {name: _file(name, entry, path) for name, entry in body["files"].items()}
    for name in body["files"].keys() - expected:
        checked_name(name, str(path))
        if files[name].size > LONGEST_TEXT:
            raise CheckpointError(f"{path}: {name} has {files[name].size} bytes, which no text has")
    return Manifest(step=step, files=files, metrics=metrics, numerics=body["numerics"])


def _file(name: str, entry: object, path: Path) -> File:
    if not isinstance(entry, dict) or entry.keys() != {"size", "sha256"}:
        raise CheckpointError(f"{path}: {name} lacks size or sha256, or has more")
    size, sha256 = entry["size"], entry["sha256"]
    if type(size) is not int or not 0 <= size < 2**60:
        raise CheckpointError(f"{path}: {name} has the size {size!r}")
    if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
        raise CheckpointError(f"{path}: {name} has the sha256 {sha256!r}")
    return File(size, sha256)
