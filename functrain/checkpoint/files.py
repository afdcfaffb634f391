"""The files of a checkpoint: hashed as they are written, and verified as they are read."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from functrain.checkpoint import format as safetensors
from functrain.checkpoint.filesystem import (
    FileSystem,
    pieces,
    read_exactly,
    reading,
    regular,
    write_all,
)
from functrain.checkpoint.manifest import File
from functrain.errors import CheckpointError
from functrain.trees import Tensors

Contents = Sequence[memoryview]
"""The bytes of a file, in pieces."""

In = TypeVar("In")
Out = TypeVar("Out")
Fill = Callable[[memoryview], None]

_WORTH_THREADS = 1 << 25
_THREADS = 4


def side_by_side(function: Callable[[In], Out], items: Iterable[In], size: int) -> list[Out]:
    """`function` of every item, in threads where `size` (bytes in all) is worth it.

    Hashing, writing and reading release the GIL, so several files are processed in parallel.
    """
    if size < _WORTH_THREADS:
        return [function(item) for item in items]
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(function, items))


def written(
    filesystem: FileSystem, directory: Path, files: Mapping[str, Contents]
) -> dict[str, File]:
    """Write the files into a directory, each durable; returns their sizes and hashes."""
    total = sum(size_of(contents) for contents in files.values())
    entries = side_by_side(
        lambda name: write_file(filesystem, directory / name, files[name]), files, total
    )
    return dict(zip(files, entries, strict=True))


def write_file(filesystem: FileSystem, path: Path, contents: Contents) -> File:
    """Write a new file, hashing it on the way; durable when this returns."""
    descriptor = filesystem.create(path)
    try:
        with _Hasher(size_of(contents)) as hasher:
            for content in contents:
                for piece in pieces(content):
                    hasher.update(piece)
                    write_all(filesystem, descriptor, piece)
            filesystem.sync(descriptor)
            return File(size_of(contents), hasher.hexdigest())
    finally:
        filesystem.close(descriptor)


class _Hasher:
    """sha256 of a stream; a large one is hashed in a thread while it is written or read.

    sha256, because every machine and language has it: `sha256sum` checks a file. With the
    processor's sha256 instructions it runs at 1.6 GB/s on one core, so a save does not wait for it.
    """

    def __init__(self, size: int) -> None:
        self._sha256 = hashlib.sha256()
        self._pool = ThreadPoolExecutor(1) if size >= _WORTH_THREADS else None
        self._pending: Future[None] | None = None

    def __enter__(self) -> _Hasher:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown()

    def update(self, piece: memoryview) -> None:
        """Hash the next bytes, which must not change until the next call."""
        if self._pool is None:
            self._sha256.update(piece)
            return
        self._wait()
        self._pending = self._pool.submit(self._sha256.update, piece)

    def hexdigest(self) -> str:
        """The hash of everything so far."""
        self._wait()
        return self._sha256.hexdigest()

    def _wait(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()


def hashed(contents: Contents) -> File:
    """The size and hash that a file of these contents would have."""
    hasher = hashlib.sha256()
    for content in contents:
        hasher.update(content)
    return File(size_of(contents), hasher.hexdigest())


def size_of(contents: Contents) -> int:
    """The bytes of a file."""
    return sum(len(content) for content in contents)


def read_file(
    filesystem: FileSystem, path: Path, entry: File, parse: Callable[[Fill, int, Path], Out]
) -> Out:
    """What `parse` makes of a file, verified: the hash is of the very bytes that were parsed.

    `parse` receives a function that fills a buffer with the file's next bytes, the file's size and
    its path; it must consume the whole file.
    """
    with regular(filesystem, path) as (descriptor, size), _Hasher(size) as hasher:
        _check_size(path, size, entry)

        def fill(buffer: memoryview) -> None:
            for piece in pieces(buffer):
                read_exactly(filesystem, descriptor, piece, path)
                hasher.update(piece)

        try:
            found = parse(fill, size, path)
        except CheckpointError as error:
            raise _altered(filesystem, path, entry) or error from error
        except MemoryError as error:
            raise CheckpointError(
                f"{path}: {size:,} bytes, and there is no memory for what it holds ({error})"
            ) from error
        if hasher.hexdigest() != entry.sha256:
            raise _mismatch(path)
    return found


def map_file(filesystem: FileSystem, path: Path, entry: File) -> Tensors:
    """The tensors of a file, memory-mapped, after all of its pages have been verified."""
    with regular(filesystem, path) as (descriptor, size):
        _check_size(path, size, entry)
        if not size:
            raise CheckpointError(f"{path}: 0 bytes, which is no safetensors file")
        with reading(path):
            pages = filesystem.map(descriptor, size)
    if hashlib.sha256(pages).hexdigest() != entry.sha256:
        raise _mismatch(path)
    return safetensors.mapped(pages, path)


def check_sizes(filesystem: FileSystem, directory: Path, entries: Mapping[str, File]) -> None:
    """Raise `CheckpointError` unless every file exists with its size; no contents are read."""
    for name, entry in entries.items():
        with regular(filesystem, directory / name) as (_, size):
            _check_size(directory / name, size, entry)


def _check_size(path: Path, size: int, entry: File) -> None:
    if size != entry.size:
        raise CheckpointError(
            f"{path}: {size} bytes, and the manifest says {entry.size}; the file was truncated or "
            "altered after the save"
        )


def _altered(filesystem: FileSystem, path: Path, entry: File) -> CheckpointError | None:
    """The error for a file that cannot be parsed because it was altered, the usual reason."""
    return None if verify_file(filesystem, path, entry) else _mismatch(path)


def verify_file(filesystem: FileSystem, path: Path, entry: File) -> bool:
    """Whether a file has the size and the hash of its entry."""
    with regular(filesystem, path) as (descriptor, size):
        return size == entry.size and _hash(filesystem, descriptor, size, path) == entry.sha256


def hash_file(filesystem: FileSystem, path: Path) -> File:
    """The size and hash of an existing file."""
    with regular(filesystem, path) as (descriptor, size):
        return File(size, _hash(filesystem, descriptor, size, path))


def _hash(filesystem: FileSystem, descriptor: int, size: int, path: Path) -> str:
    hasher = hashlib.sha256()
    buffer = memoryview(bytearray(min(size, 1 << 22)))
    while size:
        piece = buffer[: min(size, len(buffer))]
        read_exactly(filesystem, descriptor, piece, path)
        hasher.update(piece)
        size -= len(piece)
    return hasher.hexdigest()


def _mismatch(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path}: its sha256 does not match the manifest; the file was altered after the save"
    )


def passed(fill: Fill, size: int, _path: Path) -> None:
    """A parser that keeps nothing, for a file that need only be verified."""
    safetensors.skip(size, fill)
