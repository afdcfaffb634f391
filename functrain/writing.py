"""Writing files: lines at their end, contents that appear at once, what outlasts a power cut.

Checkpoints, which are tried against every fault of a disk, go through
`functrain.checkpoint.filesystem` instead.
"""

from __future__ import annotations

import io
import os
from contextlib import suppress
from pathlib import Path


def append(file: io.RawIOBase, data: bytes) -> None:
    """Write all of it at the end, or nothing: half a line would spoil those after it.

    `file` has no buffer, in which what a full disk has refused would wait, to be written later.
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
    """Put a file in the place of the one that is there; `OSError` where it cannot be written.

    Then the old one stays, and nothing of the new one. `durable`: the data is on the disk before
    the file has its name.
    """
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
    """Make a file's data durable, or the names in a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
