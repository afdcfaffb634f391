"""The manifest of a checkpoint, its directory's name, and reading its files verified."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson

from functrain.errors import CheckpointError

MANIFEST = "manifest.json"
STATE = "state.json"
FILES = ("model", "buffers", "optimizer", "extra")
FORMAT = 1
_NAME = re.compile(r"step-(\d{12})")


def directory_name(step: int) -> str:
    """`step-000000001000`."""
    return f"step-{step:012d}"


def step_of(path: Path) -> int | None:
    """The step that a checkpoint directory's name says; None for any other name."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else None


def checkpoints(directory: Path) -> list[Path]:
    """The checkpoint directories in `directory`, oldest first."""
    if not directory.is_dir():
        return []
    found = {step: p for p in directory.iterdir() if (step := step_of(p)) is not None}
    return [found[step] for step in sorted(found)]


def latest(directory: str | os.PathLike[str]) -> Path | None:
    """The checkpoint of the highest step in `directory`, or None; the names are the truth."""
    found = checkpoints(Path(directory))
    return found[-1] if found else None


def located(path: str | os.PathLike[str]) -> Path:
    """The checkpoint directory that `path` is or, as its newest, holds."""
    given = Path(path)
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


def manifest_bytes(files: Mapping[str, bytes]) -> bytes:
    """The manifest of files with these contents."""
    entries = {
        name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in sorted(files.items())
    }
    body = {"files": entries, "format": "functrain", "version": FORMAT}
    return _json({**body, "sha256": _own_hash(body)})


def _own_hash(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(_json(body)).hexdigest()


def _json(value: object) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS | orjson.OPT_INDENT_2)


def read_manifest(directory: Path) -> dict[str, dict[str, Any]]:
    """The manifest's files with size and sha256, after its own hash has been checked."""
    manifest = parsed_json(read_file(directory / MANIFEST), directory / MANIFEST)
    own = manifest.pop("sha256", None)
    if own != _own_hash(manifest):
        raise CheckpointError(f"{directory / MANIFEST}: altered: its own sha256 does not match")
    if manifest.get("format") != "functrain" or manifest.get("version") != FORMAT:
        raise CheckpointError(
            f"{directory / MANIFEST}: format {manifest.get('format')!r} version "
            f"{manifest.get('version')!r}; this functrain reads 'functrain' version {FORMAT}"
        )
    files: dict[str, dict[str, Any]] = manifest["files"]
    expected = {STATE, *(f"{name}.safetensors" for name in FILES)}
    if files.keys() != expected:
        raise CheckpointError(
            f"{directory / MANIFEST}: lists {sorted(files)}, expected {sorted(expected)}"
        )
    return files


def read_verified(directory: Path, name: str, entry: Mapping[str, Any]) -> bytes:
    """The bytes of a file, which have the manifest's size and sha256."""
    path = directory / name
    data = read_file(path)
    if len(data) != entry["size"]:
        raise CheckpointError(
            f"{path}: {len(data)} bytes, and the manifest says {entry['size']}; the file was "
            "truncated or altered after the save"
        )
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise CheckpointError(
            f"{path}: its sha256 does not match the manifest; the file was altered after the save"
        )
    return data


def read_file(path: Path) -> bytes:
    """The bytes of a regular file, in memory of our own.

    No memory map: overwriting the file would change a loaded tensor, truncating it would kill
    the process. Symbolic links, pipes and missing files raise `CheckpointError`.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror}); the checkpoint is incomplete"
        ) from error
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise CheckpointError(f"{path}: not a regular file")
        return file.read()


def parsed_json(data: bytes, path: Path) -> dict[str, Any]:
    """A JSON object; anything else raises `CheckpointError`."""
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value
