"""The files that a path names: one, those of a directory, or those that match a pattern."""

from __future__ import annotations

import glob
import gzip
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from functrain.errors import DataError

PathLike = str | os.PathLike[str]
TEXTS = (".txt", ".md")
RECORDS = (".jsonl", ".json", ".parquet")


def suffix_of(path: PathLike) -> str:
    """How a file's name ends, without `.gz`."""
    name = Path(path).name.removesuffix(".gz")
    return Path(name).suffix


def files_of(path: PathLike, known: tuple[str, ...]) -> list[Path]:
    """The files of a path, in the order of their names: itself, a directory's, or a pattern's.

    Every file in a directory, at any depth, must end in one of `known` (and then `.gz`, perhaps):
    nothing is passed over. A path with `*`, `?` or `[` is a pattern, `**` being any depth, unless
    a file has that very name. Raises `DataError` for what is no path, not there, or unknown.
    """
    if not (isinstance(path, str) or hasattr(path, "__fspath__")):
        raise DataError(f"path: expected a path, got {type(path).__name__}")
    given = Path(path)
    if given.is_dir():
        found = _inside(given)
        what = f"{path}: a directory without files"
    elif not given.exists() and glob.has_magic(str(given)):
        # `Path.glob` takes no absolute patterns.
        found = sorted(map(Path, glob.glob(str(given), recursive=True)))  # noqa: PTH207
        found = [each for each in found if not each.is_dir()]
        what = f"{path}: no file matches"
    else:
        return [given]
    if not found:
        raise DataError(f"{what}; expected files that end in {' or '.join(known)}")
    for each in found:
        if suffix_of(each) not in known or not each.is_file():
            raise DataError(
                f"{each}: expected a file that ends in {' or '.join(known)}; name those that are "
                f"meant by a pattern: {given if given.is_dir() else given.parent}/*{known[0]}"
            )
    return found


def _inside(directory: Path) -> list[Path]:
    """Every entry below a directory that is none itself; a link to one is not followed."""
    found: list[Path] = []

    def failed(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror})") from error

    for root, directories, names in os.walk(directory, onerror=failed):
        links = [name for name in directories if (Path(root) / name).is_symlink()]
        found += [Path(root) / name for name in (*names, *links)]
    return sorted(found, key=lambda each: each.relative_to(directory).parts)


def contents(path: PathLike) -> bytes:
    """All of a file, uncompressed where its name ends in `.gz`."""
    with _reading(path):
        read = Path(path).read_bytes()
        return gzip.decompress(read) if str(path).endswith(".gz") else read


def lines(path: PathLike) -> Iterator[bytes]:
    """The lines of a file as `contents(path).splitlines()` has them, one in memory at a time."""
    compressed = str(path).endswith(".gz")
    with _reading(path), gzip.open(path) if compressed else Path(path).open("rb") as file:
        for line in file:
            yield from line.splitlines()


@contextmanager
def _reading(path: PathLike) -> Iterator[None]:
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: no whole gzip file ({error})") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
