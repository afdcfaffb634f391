"""Lines at the end of a file: the whole of them, or nothing."""

from __future__ import annotations

import io
import os
from contextlib import suppress


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
