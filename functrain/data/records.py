"""Records on disk: JSON Lines, JSON, Parquet and plain text; a file, a directory, a pattern."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import orjson

from functrain.data import columns
from functrain.data.files import RECORDS, TEXTS, PathLike, contents, files_of, lines, suffix_of
from functrain.errors import DataError

Place = tuple[str, int]
"""A file, and the line or the row of a record in it."""


class Records(list[dict[str, Any]]):
    """The objects of files; `where(n)` is the file and line of one, for messages.

    `malformed`: what was wrong with each line that was passed over. `files`: how many were read.
    """

    def __init__(
        self,
        items: Iterable[dict[str, Any]],
        places: Sequence[Place],
        malformed: Sequence[str] = (),
        files: int = 1,
    ) -> None:
        super().__init__(items)
        self.places, self.malformed, self.files = tuple(places), tuple(malformed), files

    def where(self, index: int) -> str:
        """The file and the line of a record."""
        path, line = self.places[index]
        return f"{path}:{line}"

    def first(self, count: int | None) -> Records:
        """So many of them, the first; all where it is None."""
        return Records(self[:count], self.places[:count], self.malformed, self.files)


def records(path: PathLike, *, on_bad_record: str = "stop") -> Records:
    """The objects of a JSON Lines file, a list in a .json file, or rows of a .parquet file.

    Of a directory those of all its files, sorted by name, or of those that a pattern
    (`data/*.jsonl.gz`) matches; see `functrain.data.files.files_of`. `.gz` is uncompressed. Of
    Parquet (with pyarrow, `functrain[data]`) nulls are left out: they are what a row does not have.

    Errors name file and line. Empty lines are skipped. With `on_bad_record="skip"` so are lines
    that are no object, and files that cannot be read, which are then `malformed`; what the objects
    hold is checked by who reads them.
    """
    check_on_bad_record(on_bad_record)
    paths = files_of(path, RECORDS)
    malformed: list[str] = []
    skipped = malformed if on_bad_record == "skip" else None
    read = [_records(each, skipped) for each in paths]
    found = [each for one in read for each in one]
    if not found:
        hint = f" ({malformed[0]})" if malformed else ""
        raise DataError(f"{path}: no records; expected one JSON object in each line{hint}")
    return Records(found, [place for one in read for place in one.places], malformed, len(paths))


def first_record(path: PathLike) -> dict[str, Any] | None:
    """The first record that is none of the malformed; of .jsonl no more is read, of .parquet a row
    group."""
    skipped: list[str] = []
    for file in files_of(path, RECORDS):
        try:
            for record, _ in _each(file, skipped):
                return record
        except DataError:  # of a file that cannot be read, as of a line, the next is looked at
            continue
    return None


def _records(path: Path, skipped: list[str] | None) -> Records:
    try:
        if suffix_of(path) == ".parquet":
            found = list(columns.rows(path))
            return Records(found, [(str(path), row) for row in range(len(found))])
        data = contents(path)
        if suffix_of(path) == ".json":
            return _listed(data, str(path))
        return _lines(data, str(path), skipped)
    except DataError as error:
        _passed_over(error, skipped)
        return Records((), ())


def _lines(data: bytes, path: str, skipped: list[str] | None) -> Records:
    found: list[dict[str, Any]] = []
    places: list[Place] = []
    for number, line in enumerate(data.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            found.append(_object(line, f"{path}:{number}"))
            places.append((path, number))
        except DataError as error:
            _passed_over(error, skipped)
    return Records(found, places)


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


def _listed(data: bytes, path: str) -> Records:
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
    return Records(value, [(path, number) for number in range(len(value))])


class Documents(list[str]):
    """Texts of files; `malformed`: what was wrong with each record that was passed over."""

    def __init__(self, items: Iterable[str], malformed: Sequence[str] = ()) -> None:
        super().__init__(items)
        self.malformed = tuple(malformed)

    def first(self, count: int | None) -> Documents:
        """So many of them, the first; all where it is None."""
        return Documents(self[:count], self.malformed)


def documents(path: PathLike, *, on_bad_record: str = "stop") -> Documents:
    """The texts of records (`{"text": …}` in .jsonl, .json, .parquet), or a file as one document.

    A directory or a pattern is read as by `records`, .txt and .md files among the others. With
    `on_bad_record="skip"` records without a text, and files that are none, are `malformed`.
    """
    check_on_bad_record(on_bad_record)
    malformed: list[str] = []
    skipped = malformed if on_bad_record == "skip" else None
    found = [text for file in document_files(path) for text in texts(file, skipped)]
    if not found:
        raise DataError(f"{path}: no documents{f' ({malformed[0]})' if malformed else ''}")
    return Documents(found, malformed)


def document_files(path: PathLike) -> list[Path]:
    """The files that `documents` reads."""
    return files_of(path, (*TEXTS, *RECORDS))


def texts(path: Path, skipped: list[str] | None = None) -> Iterator[str]:
    """The documents of one file as it is read: .jsonl by the line, .parquet by the row group.

    .json, .txt and .md files are read whole. What is malformed is an error, or goes to `skipped`:
    a record, or the rest of a file.
    """
    try:
        yield from _texts(path, skipped)
    except DataError as error:
        _passed_over(error, skipped)


def _texts(path: Path, skipped: list[str] | None) -> Iterator[str]:
    if suffix_of(path) not in RECORDS:
        try:
            yield contents(path).decode()
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8 text ({error})") from error
        return
    count, before = 0, len(skipped or ())
    for record, where in _each(path, skipped):
        count += 1
        if isinstance(record.get("text"), str):
            yield record["text"]
        else:
            lack = DataError(f"{path}: record {count} has no text under 'text' ({where})")
            _passed_over(lack, skipped)
    if not count and len(skipped or ()) == before:
        raise DataError(f"{path}: no records; expected one JSON object in each line")


def _passed_over(error: DataError, skipped: list[str] | None) -> None:
    if skipped is None:
        raise error
    skipped.append(str(error))


def _each(path: Path, skipped: list[str] | None) -> Iterator[tuple[dict[str, Any], str]]:
    """The records of one file with their places, one in memory at a time where the file allows."""
    if suffix_of(path) == ".jsonl":
        for number, line in enumerate(lines(path), start=1):
            where = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                record = _object(line, where)
            except DataError as error:
                _passed_over(error, skipped)
            else:
                yield record, where
        return
    found = columns.rows(path) if suffix_of(path) == ".parquet" else _records(path, skipped)
    for number, record in enumerate(found):
        yield record, f"{path}:{number}"
