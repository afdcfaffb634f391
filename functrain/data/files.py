"""The files that a path names: one, those of a directory, or those that match a pattern."""

from __future__ import annotations

import codecs
import functools
import glob
import gzip
import os
import stat
import zlib
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

from functrain.checks import PathLike
from functrain.errors import DataError

TEXTS = (".txt", ".md")
RECORDS = (".jsonl", ".json", ".parquet")


_SHOWN = 80
_OTHERWISE = {".ndjson": ".jsonl"}


class UnreadableError(DataError):
    """A file that cannot be read now, whatever it holds; another time it may be."""


def suffix_of(path: PathLike) -> str:
    """The suffix of a file's name in lower case, without `.gz`; .ndjson is .jsonl."""
    suffix = Path(Path(path).name.lower().removesuffix(".gz")).suffix
    return _OTHERWISE.get(suffix, suffix)


def files_of(path: PathLike, known: tuple[str, ...]) -> list[Path]:
    """The files that a path names, sorted by name: the file itself, a directory's or a pattern's.

    Every file in a directory, at any depth, must end in one of `known`, with or without `.gz` after
    it: nothing is passed over. A path with `*`, `?` or `[` is a pattern, with `**` for any depth,
    unless a file has that very name. Raises `DataError` for what is not a path, for a directory or
    a pattern without files, and for a file among theirs that is not of a known kind.
    """
    if not (isinstance(path, str) or hasattr(path, "__fspath__")):
        raise DataError(f"path: expected a path, got {type(path).__name__}")
    if path == "":  # it would be the working directory
        raise DataError("path: '', expected a path")
    given = Path(path)
    is_directory, exists = _looked_at(given)
    if is_directory:
        found = _inside(given)
        what = f"{path}: a directory without files"
    elif not exists and glob.has_magic(str(given)):
        found = _matching(given)
        what = f"{path}: no file matches"
    else:
        return [given]
    if not found:
        raise DataError(f"{what}; expected files that end in {' or '.join(known)}")
    for each in found:
        if suffix_of(each) not in known or not each.is_file():
            raise DataError(
                f"{each}: expected a file that ends in {' or '.join(known)}; name those that are "
                f"meant by a pattern: {given if is_directory else given.parent}/*{known[0]}"
            )
    return found


def _looked_at(path: Path) -> tuple[bool, bool]:
    """Whether it is a directory, and whether it exists."""
    try:
        return stat.S_ISDIR(path.stat().st_mode), True
    except (FileNotFoundError, NotADirectoryError):
        return False, False
    except (OSError, ValueError) as error:
        shown = str(path) if len(str(path)) <= _SHOWN else f"{str(path)[:_SHOWN]}…"
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"path: {shown!r} cannot be looked at ({reason})") from error


def _matching(pattern: Path) -> list[Path]:
    """The files that a pattern names, each once.

    A second `**` names a file again, and a link to a directory names what is in it again. A link to
    a file is a file: whoever made it means it.
    """
    # `Path.glob` takes no absolute patterns.
    found = map(Path, glob.glob(str(pattern), recursive=True))  # noqa: PTH207
    resolved = functools.cache(Path.resolve)
    once: dict[Path, Path] = {}
    for each in sorted(each for each in found if not each.is_dir()):
        once.setdefault(resolved(each.parent) / each.name, each)
    return list(once.values())


def _inside(directory: Path) -> list[Path]:
    """Every entry below a directory but directories; a link to one counts, and is not followed."""
    found: list[Path] = []

    def failed(error: OSError) -> None:
        raise UnreadableError(f"{error.filename}: cannot be read ({error.strerror})") from error

    for root, directories, names in os.walk(directory, onerror=failed):
        links = [name for name in directories if (Path(root) / name).is_symlink()]
        found += [Path(root) / name for name in (*names, *links)]
    return sorted(found, key=lambda each: each.relative_to(directory).parts)


def contents(path: PathLike) -> bytes:
    """A file's bytes, uncompressed where its name ends in `.gz`, without a byte order mark."""
    with _reading(path):
        read = Path(path).read_bytes()
        read = gzip.decompress(read) if is_compressed(path) else read
        return read.removeprefix(codecs.BOM_UTF8)


def lines(path: PathLike) -> Iterator[bytes]:
    """The lines of a file, those of `contents(path).splitlines()`, one in memory at a time."""
    with _reading(path), _opened(path) as file:
        for number, line in enumerate(file):
            yield from (line if number else line.removeprefix(codecs.BOM_UTF8)).splitlines()


def is_marked(path: PathLike) -> bool:
    """Whether a file begins with a byte order mark; False for a gzip file that is not whole."""
    try:
        with _reading(path), _opened(path) as file:
            return file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8
    except UnreadableError:
        raise
    except DataError:
        return False


def is_compressed(path: PathLike) -> bool:
    """Whether a file's name ends in `.gz`."""
    return str(path).lower().endswith(".gz")


def _opened(path: PathLike) -> IO[bytes]:
    return cast("IO[bytes]", gzip.open(path)) if is_compressed(path) else Path(path).open("rb")


@contextmanager
def _reading(path: PathLike) -> Generator[None]:
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: no whole gzip file ({error})") from error
    except OSError as error:
        raise UnreadableError(f"{path}: cannot be read ({error.strerror})") from error
