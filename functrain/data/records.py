"""Records on disk: JSON Lines, and plain text."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import orjson

from functrain.errors import DataError


def records(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file; empty lines are skipped, errors name file and line."""
    found: list[dict[str, Any]] = []
    for number, line in enumerate(_read(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            value = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            raise DataError(f"{path}:{number}: not JSON ({error})") from error
        if not isinstance(value, dict):
            raise DataError(f"{path}:{number}: expected an object, got {type(value).__name__}")
        found.append(value)
    if not found:
        raise DataError(f"{path}: no records; expected one JSON object in each line")
    return found


def documents(path: str | os.PathLike[str]) -> list[str]:
    """The texts of a .jsonl file (`{"text": …}`), or a .txt file as one document."""
    if not str(path).endswith(".jsonl"):
        try:
            return [_read(path).decode()]
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8 text ({error})") from error
    found = records(path)
    for number, record in enumerate(found, start=1):
        if not isinstance(record.get("text"), str):
            raise DataError(f"{path}: record {number} has no text under 'text'")
    return [record["text"] for record in found]


def _read(path: str | os.PathLike[str]) -> bytes:
    if not (isinstance(path, str) or hasattr(path, "__fspath__")):
        raise DataError(f"path: expected a path, got {type(path).__name__}")
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
