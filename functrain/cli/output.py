"""Printing: results on stdout, messages on stderr; a failing stream does not end a run."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Generator
from pathlib import Path
from typing import TextIO

from functrain.errors import ConfigError

UNREAD = 141
"""The exit code if the reader of stdout is gone, like that of a program killed by SIGPIPE."""


def open_streams() -> None:
    """Make stdout and stderr accept whatever is printed, however they were passed in."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            # Closed by the caller (`2>&-`). Its descriptor is occupied as well: otherwise the next
            # file to be opened would get it, and a library's messages would go there.
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            # A table has characters that the encoding (ASCII, say) may lack.
            stream.reconfigure(errors="replace")


def close_streams() -> None:
    """Flush the streams at the end; what a broken stream still holds is dropped."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            _drop(stream)


@contextlib.contextmanager
def printing() -> Generator[None]:
    """Wraps the printing of results.

    Raises `ConfigError` if stdout cannot be written to, `BrokenPipeError` if its reader is gone.
    """
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        _drop(sys.stdout)
        raise
    except OSError as error:
        raise ConfigError(
            f"stdout: cannot be written ({error.strerror}); print it to another place"
        ) from error


def print_result(text: str) -> None:
    """Print a result; raises as `printing` does."""
    with printing():
        print(text)


def say(line: str) -> None:
    """Print a message to stderr, apart from the results on stdout; never raises `OSError`."""
    try:
        print(line, file=sys.stderr, flush=True)
    except BrokenPipeError:
        _drop(sys.stderr)
    except OSError:
        pass  # a full disk may have room for the next line


def _drop(stream: TextIO) -> None:
    """Redirect a stream to nowhere, since the interpreter flushes what it holds at exit."""
    with contextlib.suppress(OSError), Path(os.devnull).open("wb") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())
