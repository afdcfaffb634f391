"""Writing files: appending, replacing at once, and surviving a power cut.

Checkpoints, which are tested against every fault of a disk, go through
`functrain.checkpoint.filesystem` instead.
"""

from __future__ import annotations

import io
import os
from contextlib import suppress
from pathlib import Path


def append(file: io.RawIOBase, data: bytes) -> None:
    """Append all of `data`, or nothing: half a line would spoil the lines after it.

    `file` is unbuffered: a buffer would keep what a full disk has refused, and write it later.
    """
    end, rest = file.seek(0, os.SEEK_END), memoryview(data)
    try:
        while rest:
            rest = rest[file.write(rest) or 0 :]
    except BaseException:
        with suppress(OSError):
            file.truncate(end)
        raise


def write(path: Path, data: bytes, *, durable: bool = False) -> None:
    """Write a file, replacing an old one at once.

    Raises `OSError` if it cannot be written; then the old file stays, and nothing of the new one.
    `durable`: the data is on the disk before the file has its name. A device or a pipe is written
    to: replaced, /dev/null would be a file from then on, for the whole machine.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        with path.open("wb") as stream:
            stream.write(data)
        return
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Make durable a file's data, or the names in a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
