"""What is printed: results on stdout, words for the reader on stderr; no display ends a run."""

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
"""The exit code where the reader of stdout has gone, as of a program that SIGPIPE ends."""


def open_streams() -> None:
    """Make stdout and stderr take whatever is printed, however they were handed over."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            # Closed by the caller (`2>&-`). Its descriptor is taken as well: else it would be that
            # of the next file, into which a library's messages would go.
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            # A table has characters that an encoding (ASCII) may not have.
            stream.reconfigure(errors="replace")


def close_streams() -> None:
    """Nothing more is printed; what a broken stream still holds is dropped."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            _drop(stream)


@contextlib.contextmanager
def printing() -> Generator[None]:
    """Within it results are printed.

    Raises `ConfigError` where stdout cannot be written, `BrokenPipeError` where nobody reads it any
    more.
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
    """Print a result, as `printing` says."""
    with printing():
        print(text)


def say(line: str) -> None:
    """A line for the reader, beside the results on stdout; unless there is none any more."""
    try:
        print(line, file=sys.stderr, flush=True)
    except BrokenPipeError:
        _drop(sys.stderr)
    except OSError:
        pass  # a full disk may have room for the next line


def _drop(stream: TextIO) -> None:
    """Send what a stream holds and will be given to nowhere: the interpreter flushes it at last."""
    with contextlib.suppress(OSError), Path(os.devnull).open("wb") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())
