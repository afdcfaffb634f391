"""The file-system operations that checkpoints are made of, all methods of one object.

Tests substitute another object to count operations, make them fail, tear writes, and replay them up
to any crash; the protocol above does not see the difference.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from functrain.errors import CheckpointError

PIECE = 1 << 24
"""Bytes written or read at a time: large enough to be fast, small enough to hash from the cache."""


class FileSystem:
    """The operating system's; each method is one system call and raises its `OSError`."""

    def mkdir(self, path: Path) -> None:
        """Make a new directory."""
        path.mkdir()

    def create(self, path: Path) -> int:
        """A descriptor to write a new file; symbolic links are not followed."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(path, flags, 0o644)

    def write(self, descriptor: int, data: memoryview) -> int:
        """Write as much as one call can, and return the number of bytes written."""
        return os.write(descriptor, data)

    def open_to_write(self, path: Path) -> int:
        """A descriptor to write into an existing file."""
        return os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)

    def write_at(self, descriptor: int, data: memoryview, offset: int) -> int:
        """Like `write`, at an offset in the file."""
        return os.pwrite(descriptor, data, offset)

    def sync(self, descriptor: int) -> None:
        """Make a file's data, or a directory's entries, durable."""
        os.fsync(descriptor)

    def close(self, descriptor: int) -> None:
        """Close a descriptor."""
        os.close(descriptor)

    def open_directory(self, path: Path) -> int:
        """A descriptor of a directory, to sync it."""
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def rename(self, source: Path, target: Path) -> None:
        """Rename a directory atomically."""
        source.rename(target)

    def unlink(self, path: Path) -> None:
        """Remove a file."""
        path.unlink()

    def rmdir(self, path: Path) -> None:
        """Remove an empty directory."""
        path.rmdir()

    def list(self, path: Path) -> Sequence[str]:
        """The names in a directory, sorted."""
        return sorted(entry.name for entry in path.iterdir())

    def open(self, path: Path) -> int:
        """A descriptor to read a file; symbolic links are not followed, pipes are not waited for.

        Without O_NOFOLLOW a checkpoint could lead outside its directory, and without O_NONBLOCK a
        pipe in place of a file would hang the load.
        """
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)

    def stat(self, descriptor: int) -> os.stat_result:
        """The kind and the size of a descriptor's file."""
        return os.fstat(descriptor)

    def read(self, descriptor: int, into: memoryview) -> int:
        """Read as much as one call can, and return the number of bytes read, 0 at the end."""
        return os.readv(descriptor, [into])

    def map(self, descriptor: int, size: int) -> mmap.mmap:
        """A file's pages, readable and writable; writes are private and never reach the file."""
        return mmap.mmap(
            descriptor, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE
        )

    @contextmanager
    def locked(self, path: Path) -> Generator[None]:
        """Hold the lock of this file; raises `BlockingIOError` if another process holds it."""
        # Mode 0o666: the umask decides who may save here, so a group can share a directory.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            try:
                yield
            finally:
                # Closing alone would leave the lock with a process forked in the meantime.
                fcntl.flock(descriptor, fcntl.LOCK_UN)
        finally:
            os.close(descriptor)


OPERATING_SYSTEM = FileSystem()


def sync_directory(files: FileSystem, path: Path) -> None:
    """Make the entries of a directory durable."""
    descriptor = files.open_directory(path)
    try:
        files.sync(descriptor)
    finally:
        files.close(descriptor)


def remove_directory(files: FileSystem, path: Path) -> None:
    """Remove a directory of files, or a file in its place.

    A subdirectory, which someone else must have made, stays: its `OSError` is raised after
    everything else has been removed.
    """
    if not path.is_dir() or path.is_symlink():
        files.unlink(path)
        return
    refused: OSError | None = None
    for name in files.list(path):
        try:
            files.unlink(path / name)
        except OSError as error:
            refused = refused or error
    if refused is not None:
        raise refused
    files.rmdir(path)


def pieces(data: memoryview) -> Iterator[memoryview]:
    """`data` in pieces of at most `PIECE` bytes."""
    for begin in range(0, len(data), PIECE):
        yield data[begin : begin + PIECE]


def write_all(files: FileSystem, descriptor: int, data: memoryview) -> None:
    """Write all of `data`; a single call may write less, on a signal or a nearly full disk."""
    while data:
        written = files.write(descriptor, data)
        if written <= 0:
            raise OSError(errno.EIO, "nothing could be written")
        data = data[written:]


def write_all_at(files: FileSystem, descriptor: int, data: memoryview, offset: int) -> None:
    """Write all of `data` at an offset in the file."""
    while data:
        written = files.write_at(descriptor, data, offset)
        if written <= 0:
            raise OSError(errno.EIO, "nothing could be written")
        data, offset = data[written:], offset + written


@contextmanager
def reading(path: Path) -> Generator[None]:
    """Turn an `OSError` raised within into a `CheckpointError` that names the path."""
    try:
        yield
    except OSError as error:
        missing = "; the checkpoint is incomplete" if isinstance(error, FileNotFoundError) else ""
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror or error}){missing}"
        ) from error


@contextmanager
def regular(files: FileSystem, path: Path) -> Generator[tuple[int, int]]:
    """A descriptor of a regular file, and its size; anything else raises `CheckpointError`."""
    with reading(path):
        descriptor = files.open(path)
        try:
            status = files.stat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(f"{path}: not a regular file")
            yield descriptor, status.st_size
        finally:
            files.close(descriptor)


def read_exactly(files: FileSystem, descriptor: int, into: memoryview, path: Path) -> None:
    """Fill `into`; a file that ends too early raises `CheckpointError`."""
    while into:
        try:
            count = files.read(descriptor, into)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
        if count <= 0:
            raise CheckpointError(f"{path}: ends too early; it was altered while being read")
        into = into[count:]
