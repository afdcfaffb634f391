"""Records on disk: JSON Lines, JSON, and plain text."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import orjson

from functrain.errors import DataError


class Records(list[dict[str, Any]]):
    """The objects of a file; `where(n)` is the file and line of one, for messages.

    `malformed`: what was wrong with each line that was passed over.
    """

    def __init__(
        self,
        items: Iterable[dict[str, Any]],
        path: str,
        lines: Sequence[int],
        malformed: Sequence[str] = (),
    ) -> None:
        super().__init__(items)
        self.path, self.lines, self.malformed = path, tuple(lines), tuple(malformed)

    def where(self, index: int) -> str:
        """The file and the line of a record."""
        return f"{self.path}:{self.lines[index]}"

    def first(self, count: int | None) -> Records:
        """So many of them, the first; all where it is None."""
        return Records(self[:count], self.path, self.lines[:count], self.malformed)


def records(path: str | os.PathLike[str], *, on_bad_record: str = "stop") -> Records:
    """The objects of a JSON Lines file, or of a list in a .json file; errors name file and line.

    Empty lines are skipped. With `on_bad_record="skip"` so are lines that are no object, which are
    then `malformed`; what the objects hold is checked by who reads them.
    """
    check_on_bad_record(on_bad_record)
    data = _read(path)
    if str(path).endswith(".json"):
        return Records(*_listed(data, str(path)))
    found: list[dict[str, Any]] = []
    lines: list[int] = []
    malformed: list[str] = []
    for number, line in enumerate(data.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            found.append(_object(line, f"{path}:{number}"))
            lines.append(number)
        except DataError as error:
            if on_bad_record == "stop":
                raise
            malformed.append(str(error))
    if not found:
        hint = f" ({malformed[0]})" if malformed else ""
        raise DataError(f"{path}: no records; expected one JSON object in each line{hint}")
    return Records(found, str(path), lines, malformed)


def check_on_bad_record(given: object) -> None:
    """Raise `DataError` for what is no way to treat a malformed record."""
    if given not in ("stop", "skip"):
        raise DataError(f"on_bad_record: {given!r}, expected 'stop' or 'skip'")


def _object(line: bytes, where: str) -> dict[str, Any]:
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected an object, got {type(value).__name__}")
    return value


def _listed(data: bytes, path: str) -> tuple[list[dict[str, Any]], str, list[int]]:
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        hint = "; one object in each line is a .jsonl file" if b"\n{" in data else ""
        raise DataError(f"{path}: not JSON ({error}){hint}") from error
    if not isinstance(value, list) or not value:
        raise DataError(f"{path}: expected a list of objects, got {type(value).__name__}")
    for number, each in enumerate(value):
        if not isinstance(each, dict):
            raise DataError(f"{path}:{number}: expected an object, got {type(each).__name__}")
    return value, path, list(range(len(value)))


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
