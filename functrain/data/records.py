"""Records on disk: JSON Lines, JSON, Parquet and plain text; a file, a directory, a pattern."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from functrain.checks import PathLike
from functrain.data import columns
from functrain.data.files import (
    RECORDS,
    TEXTS,
    UnreadableError,
    contents,
    files_of,
    lines,
    suffix_of,
)
from functrain.errors import DataError, in_its_place

Place = tuple[str, int]
"""A file, and the number from 1 of the line, element or row in it that a record is."""


class Records(list[dict[str, Any]]):
    """The objects of files; `where(n)` is the place of one, for messages.

    It is a list, which may be shuffled, cut and added to: a record keeps its place, and one that
    was added has none. `malformed`: what was wrong with each line that was passed over. `files`:
    how many were read.
    """

    def __init__(
        self,
        items: Iterable[dict[str, Any]],
        places: Sequence[Place | None],
        malformed: Sequence[str] = (),
        files: int = 1,
    ) -> None:
        super().__init__(items)
        self.places, self.malformed, self.files = tuple(places), tuple(malformed), files
        self._placed = tuple(self)

    def where(self, index: int) -> str:
        """The file and the line, element or row of a record; `record n` where it has none."""
        place = self._place(index)
        return f"record {index}" if place is None else _at(*place)

    def first(self, count: int | None) -> Records:
        """The first `count` of them; all where it is None."""
        found = self[:count]
        return Records(
            found, [self._place(n) for n in range(len(found))], self.malformed, self.files
        )

    def _place(self, index: int) -> Place | None:
        record = self[index]
        if 0 <= index < len(self._placed) and self._placed[index] is record:
            return self.places[index]
        number = self._numbers.get(id(record))
        # In a copy the ids may be those of the original's records.
        if number is None or self._placed[number] is not record:
            return None
        return self.places[number]

    @functools.cached_property
    def _numbers(self) -> dict[int, int]:
        """The number of each record by its identity: an equal one may be of another line."""
        return {id(record): number for number, record in enumerate(self._placed)}


def records(path: PathLike, *, on_bad_record: str = "stop") -> Records:
    """The objects of a JSON Lines file, of a list in a .json file, or the rows of a .parquet file.

    A directory gives those of all its files, sorted by name; a pattern (`data/*.jsonl.gz`) those of
    the files that match; see `functrain.data.files.files_of`. `.gz` is uncompressed. In Parquet
    (with pyarrow, `functrain[data]`) nulls are left out: they stand for absent fields.

    Errors name file and line. Empty lines are skipped. With `on_bad_record="skip"` so are lines and
    elements that are not objects, files without any, and the rest of a torn file; they are listed
    in `malformed`. What the objects hold is checked by whoever reads them. A file that cannot be
    read from the disk is always an error: another time there would be other records.
    """
    check_on_bad_record(on_bad_record)
    paths = files_of(path, RECORDS)
    malformed: list[str] = []
    skipped = malformed if on_bad_record == "skip" else None
    found: list[dict[str, Any]] = []
    places: list[Place] = []
    for file in paths:
        for record, number in _each(file, skipped):
            found.append(record)
            places.append((str(file), number))
    if not found:
        hint = f" ({malformed[0]})" if malformed else ""
        raise DataError(f"{path}: no records; expected one JSON object in each line{hint}")
    return Records(found, places, malformed, len(paths))


def first_record(path: PathLike) -> dict[str, Any] | None:
    """The first record that is not malformed, or None.

    No more of a .jsonl is read than that, and of a .parquet a row group.
    """
    return next(readable(path), None)


def readable(path: PathLike) -> Iterator[dict[str, Any]]:
    """The records that are not malformed, as they are read."""
    for file in files_of(path, RECORDS):
        try:
            for record, _ in _each(file, []):
                yield record
        except DataError:  # a file that cannot be read is passed over as a line is
            continue


def check_on_bad_record(given: object) -> None:
    """Raise `DataError` for an unknown way to treat malformed records."""
    if given not in ("stop", "skip"):
        raise DataError(f"on_bad_record: {given!r}, expected 'stop' or 'skip'")


class Documents(list[str]):
    """Texts of files; `malformed`: what was wrong with each record that was passed over."""

    def __init__(self, items: Iterable[str], malformed: Sequence[str] = ()) -> None:
        super().__init__(items)
        self.malformed = tuple(malformed)

    def first(self, count: int | None) -> Documents:
        """The first `count` of them; all where it is None."""
        return Documents(self[:count], self.malformed)


def documents(path: PathLike, *, on_bad_record: str = "stop") -> Documents:
    """The texts of records (`{"text": …}` in .jsonl, .json, .parquet), or each file as a document.

    A directory or a pattern is read as by `records`, .txt and .md files included; a file of another
    kind is refused. With `on_bad_record="skip"`, records without a text and files that are not text
    are `malformed`.
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
    known = (*TEXTS, *RECORDS)
    found = files_of(path, known)
    for each in found:
        if suffix_of(each) not in known and each.exists():
            raise DataError(
                f"{each}: expected a file that ends in {' or '.join(known)}; name it so, as what "
                "it is: of another kind it is not known what its documents are"
            )
    return found


def texts(path: Path, skipped: list[str] | None = None) -> Iterator[str]:
    """The documents of one file as it is read: .jsonl by line, .parquet by row group.

    .json, .txt and .md files are read whole. A malformed record, or the rest of a torn file, is an
    error or goes to `skipped`.
    """
    if suffix_of(path) in RECORDS:
        for record, number in _each(path, skipped):
            if isinstance(record.get("text"), str):
                yield record["text"]
            else:
                _passed_over(_no_text(record, _at(path, number)), skipped)
        return
    try:
        yield _decoded(contents(path), str(path))
    except DataError as error:
        _passed_over(error, skipped)


def _no_text(record: Mapping[str, Any], where: str) -> DataError:
    if "text" in record:
        found = f"got {type(record['text']).__name__}"
    else:
        found = in_its_place("text", record)
    return DataError(f"{where}: no text under 'text'; {found}")


def _at(path: PathLike, number: int) -> str:
    """The place of a record in words; of a line, as editors write it."""
    which = {".json": " element ", ".parquet": " row "}.get(suffix_of(path), "")
    return f"{path}:{which}{number}"


def _passed_over(error: DataError, skipped: list[str] | None) -> None:
    if skipped is None or isinstance(error, UnreadableError):
        raise error
    skipped.append(str(error))


def _each(path: Path, skipped: list[str] | None) -> Iterator[tuple[dict[str, Any], int]]:
    """The records of one file, each with its number from 1.

    A malformed record, or the rest of a torn file, is an error or goes to `skipped`.
    """
    count, before = 0, len(skipped or ())
    try:
        for found in _objects(path, skipped):
            count += 1
            yield found
        if not count and len(skipped or ()) == before:
            what = "a row" if suffix_of(path) == ".parquet" else "one JSON object in each line"
            raise DataError(f"{path}: no records; expected {what}")
    except DataError as error:
        _passed_over(error, skipped)


def _objects(path: Path, skipped: list[str] | None) -> Iterator[tuple[dict[str, Any], int]]:
    """As `_each`, but a torn file is an error; one in memory at a time where the file allows."""
    if suffix_of(path) == ".parquet":
        yield from ((record, row) for row, record in enumerate(columns.rows(path), start=1))
        return
    is_list = suffix_of(path) == ".json"
    hint = f"; expected records, in a file that ends in {' or '.join(RECORDS)}"
    hint = "" if suffix_of(path) in RECORDS else hint
    for number, value in enumerate(_listed(path) if is_list else lines(path), start=1):
        where = _at(path, number)
        if not is_list and not value.strip():
            continue
        try:
            record = value if is_list else _parsed(value, where, hint or _layout(value))
            if not isinstance(record, dict):
                way = _LAID_OUT if not is_list and isinstance(record, list) else ""
                raise DataError(f"{where}: expected an object, got {type(record).__name__}{way}")
        except DataError as error:
            _passed_over(error, skipped)
        else:
            yield record, number


def _listed(path: Path) -> list[Any]:
    data = contents(path)
    hint = "; one object in each line is a .jsonl file" if b"\n{" in data else ""
    value = _parsed(data, str(path), hint)
    if not isinstance(value, list):
        raise DataError(f"{path}: expected a list of objects, got {type(value).__name__}")
    if not value:
        raise DataError(f"{path}: no records; expected a list of objects, and it is empty")
    return value


_LAID_OUT = "; each record is one line of a .jsonl file, and a list is in a .json file"


def _layout(line: bytes) -> str:
    """A hint, where a line begins what is laid out over several, or a list."""
    return _LAID_OUT if line.startswith(b"[") or line.strip() == b"{" else ""


_SIGNS = {
    b"\x1f\x8b": "it is compressed with gzip: end its name in .gz",
    b"\x28\xb5\x2f\xfd": "it is compressed with zstd: unpack it",
    b"\xfd7zXZ": "it is compressed with xz: unpack it",
    b"BZh": "it is compressed with bzip2: unpack it",
    b"PK\x03\x04": "it is a zip archive: unpack it",
    b"PAR1": "it is a Parquet file: end its name in .parquet",
    b"\xff\xfe": "it seems to be UTF-16; convert it to UTF-8",
    b"\xfe\xff": "it seems to be UTF-16; convert it to UTF-8",
}
"""What files of other kinds begin with, and what to do about them."""


def _sign(data: bytes) -> str | None:
    return next((way for sign, way in _SIGNS.items() if data.startswith(sign)), None)


def _parsed(data: bytes, where: str, hint: str = "") -> Any:
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError as error:
        _decoded(data, where)
        sign = _sign(data)
        if sign is not None:
            hint = f"; {sign}"
        raise DataError(f"{where}: not JSON ({error}){hint}") from error


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        way = _sign(data) or "convert it to UTF-8"
        raise DataError(f"{where}: not UTF-8 text ({error}); {way}") from error
