"""Token ids appended to files part by part, so that a kill at any moment loses one part at most.

`ids.bin` and `ends.bin` only grow. A part exists once its line is in the journal, which is
written when its bytes are durable; the manifest, renamed into place last, says that the files
are whole, and from then on none of them is written again.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import attrs
import numpy as np
import numpy.typing as npt
import orjson

from functrain.data.token_files import Ids
from functrain.errors import DataError
from functrain.writing import sync

IDS, ENDS, JOURNAL, MANIFEST = "ids.bin", "ends.bin", "journal", "manifest"
END_TYPE = np.dtype("<i8")


@attrs.frozen(kw_only=True)
class Part:
    """A line of the journal: how much was appended, its hashes, and from which files.

    `files`: for each, its number, and how many documents and tokens the part has of it.
    """

    documents: int
    tokens: int
    ids: str
    ends: str
    files: tuple[tuple[int, int, int], ...]


@contextmanager
def writing(directory: Path) -> Generator[None]:
    """Within it, an error of the disk becomes a `DataError`: the directory cannot be written."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{directory}: cannot be written ({error})") from error


class Parts:
    """Files in the making, opened where the last whole part ends; what follows it is cut off.

    Only for the holder of the lock. Nobody else has the files mapped: there is no manifest yet.
    """

    def __init__(self, directory: Path, dtype: npt.DTypeLike) -> None:
        self.directory, self.dtype = directory, np.dtype(dtype)
        with writing(directory):
            self.parts = self._recovered()
            self._files = [self._opened(name) for name in (IDS, ENDS, JOURNAL)]
            sync(directory)

    @property
    def documents(self) -> int:
        """How many documents are there."""
        return sum(part.documents for part in self.parts)

    @property
    def tokens(self) -> int:
        """How many tokens are there."""
        return sum(part.tokens for part in self.parts)

    def append(
        self, ids: Ids, lengths: npt.NDArray[np.int64], files: tuple[tuple[int, int, int], ...]
    ) -> None:
        """Append a part, durable when this returns: ids, and the length of each document."""
        raw = ids.astype(self.dtype).tobytes()
        ends = (self.tokens + lengths.cumsum()).astype(END_TYPE).tobytes()
        part = Part(
            documents=len(lengths), tokens=len(ids), ids=_hash(raw), ends=_hash(ends), files=files
        )
        # Each durable before the next: a line in the journal is a promise about the other two.
        with writing(self.directory):
            for file, data in zip(self._files, (raw, ends, line(attrs.asdict(part))), strict=True):
                _append(file, data)
        self.parts.append(part)

    def seal(self, record: Mapping[str, Any]) -> None:
        """Declare the files whole: `record` and the parts are written under the manifest's name."""
        aside = self.directory / f"{MANIFEST}.part"
        text = line({**record, "parts": [attrs.asdict(part) for part in self.parts]})
        with writing(self.directory):
            with aside.open("wb") as file:
                _append(file, text)
            _rename(aside, self.directory / MANIFEST)
            sync(self.directory)

    def close(self) -> None:
        """Close the files."""
        with writing(self.directory):  # what a full disk did not take is tried once more here
            for file in self._files:
                file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _opened(self, name: str) -> IO[bytes]:
        file = (self.directory / name).open("ab")
        file.truncate(self._size(name))
        return file

    def _size(self, name: str) -> int:
        sizes = {
            IDS: self.tokens * self.dtype.itemsize,
            ENDS: self.documents * END_TYPE.itemsize,
            JOURNAL: sum(len(line(attrs.asdict(part))) for part in self.parts),
        }
        return sizes[name]

    def _recovered(self) -> list[Part]:
        """The parts of the journal up to the first that is torn or that the files do not match."""
        journal = self.directory / JOURNAL
        lines = journal.read_bytes().splitlines(keepends=True) if journal.exists() else []
        records = itertools.takewhile(lambda record: record is not None, map(read, lines))
        parts = [_part(record) for record in records if record is not None]
        return parts[: whole(self.directory, parts, self.dtype)]


def whole(directory: Path, parts: list[Part], dtype: npt.DTypeLike) -> int:
    """How many parts match their hashes in the files, up to the first that does not."""
    size = np.dtype(dtype).itemsize
    if not parts or not all((directory / name).is_file() for name in (IDS, ENDS)):
        return 0
    with (directory / IDS).open("rb") as ids, (directory / ENDS).open("rb") as ends:
        for number, part in enumerate(parts):
            found = _hash(ids.read(part.tokens * size)), _hash(ends.read(part.documents * 8))
            if found != (part.ids, part.ends):
                return number
    return len(parts)


def _part(record: Mapping[str, Any]) -> Part:
    return Part(
        documents=record["documents"],
        tokens=record["tokens"],
        ids=record["ids"],
        ends=record["ends"],
        files=tuple((n, documents, tokens) for n, documents, tokens in record["files"]),
    )


def parts_of(manifest: Mapping[str, Any]) -> list[Part]:
    """The parts that a manifest lists."""
    return [_part(record) for record in manifest["parts"]]


def line(record: Mapping[str, Any]) -> bytes:
    """A record as a line that begins with its own hash."""
    text = orjson.dumps(record)
    return _hash(text).encode() + b" " + text + b"\n"


def read(given: bytes) -> dict[str, Any] | None:
    """The record of a line, or None where the line is torn."""
    said, _, text = given.removesuffix(b"\n").partition(b" ")
    if not given.endswith(b"\n") or said.decode(errors="replace") != _hash(text):
        return None
    found = orjson.loads(text)
    return found if isinstance(found, dict) else None


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _append(file: IO[bytes], data: bytes) -> None:
    file.write(data)
    file.flush()
    os.fsync(file.fileno())


def _rename(old: Path, new: Path) -> None:
    old.replace(new)
