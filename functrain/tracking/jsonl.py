"""metrics.jsonl: one line per logged step, flushed as it is written."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import orjson

from functrain.checks import PathLike, as_path
from functrain.errors import DataError
from functrain.writing import append, write

CLOCKS = ("data_seconds", "mfu", "peak_memory_gib", "tokens_per_second")
"""Metrics read off a clock or the system, which therefore differ between identical runs."""

_NAMES = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}

_BLOCK = 2**16


class Tracker(Protocol):
    """Where metrics go: a JSON lines file, or any service through an adapter with these methods."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take the metrics of a step."""
        ...

    def close(self) -> None:
        """End: no more metrics will come."""
        ...


class JSONLTracker:
    """A tracker that appends `{"step": …, name: value, …}` lines to a file.

    JSON has no NaN or infinities: they are written as "NaN", "Infinity" and "-Infinity". A last
    line without a newline, which a kill has torn and `read` ignores, is cut off when the first line
    is logged.
    """

    def __init__(self, path: PathLike) -> None:
        self._path = as_path("path", path)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("ab", buffering=0)
            self._whole = False
        except OSError as error:
            raise _unwritten(self._path, error) from error

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line, whole or not at all.

        Raises `DataError` if it cannot be written, for a step that is not a 64-bit integer, for a
        metric that is not a number, and for a metric named "step".
        """
        if self._file.closed:
            raise DataError(f"{self._path}: the tracker is closed; log before close()")
        line = _line(step, metrics, self._path)
        try:
            if not self._whole:
                _cut_torn(self._path)
                self._whole = True
            append(self._file, line)
        except OSError as error:
            raise _unwritten(self._path, error) from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _unwritten(path: Path, error: OSError) -> DataError:
    return DataError(f"{path}: cannot be written ({error.strerror})")


class Several:
    """Passes the same metrics to several trackers, in order."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = tuple(trackers)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log to each tracker."""
        for each in self._trackers:
            each.log(step, metrics)

    def close(self) -> None:
        """Close each tracker."""
        for each in self._trackers:
            each.close()


def read(path: PathLike) -> list[dict[str, Any]]:
    """The records of a file, with NaN and infinities as floats; empty if there is no file.

    A last line without a newline was torn by a kill and is left out; any other line that is not a
    record raises `DataError` with its number.
    """
    target = as_path("path", path)
    if not target.exists():
        return []
    *lines, _torn = target.read_bytes().split(b"\n")
    return [_record(line, f"{target}:{number}") for number, line in enumerate(lines, start=1)]


def truncate_after(path: PathLike, step: int) -> None:
    """Drop the records of later steps, so that a resumed run's file equals an uninterrupted one's.

    Raises `DataError` if the file cannot be written; its records are then as they were.
    """
    target = as_path("path", path)
    if not target.exists():
        return
    *lines, _torn = target.read_bytes().split(b"\n")
    kept = [
        line
        for number, line in enumerate(lines, start=1)
        if _record(line, f"{target}:{number}")["step"] <= step
    ]
    try:
        write(target, b"".join(line + b"\n" for line in kept))
    except OSError as error:
        raise _unwritten(target, error) from error


def _cut_torn(path: Path) -> None:
    """Cut off a last line without a newline: an appended line would continue it."""
    with path.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        begin = end
        while begin:
            begin = max(0, begin - _BLOCK)
            file.seek(begin)
            found = file.read(min(_BLOCK, end - begin)).rfind(b"\n")
            if found >= 0:
                begin += found + 1
                break
        if begin < end:
            file.truncate(begin)


def _line(step: object, metrics: Mapping[str, float], path: Path) -> bytes:
    """A line as `read` reads it."""
    number = _integer(step, path)
    if "step" in metrics:
        raise DataError(
            f"{path}: a metric of step {number} is named 'step', as is the step itself; give it "
            "another name"
        )
    values = {}
    for name, value in metrics.items():
        try:
            values[name] = _encoded(float(value))
        except (TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise DataError(
                f"{path}: {name!r} of step {number} is {value!r:.99}, expected a number"
            ) from error
    try:
        return orjson.dumps({"step": number, **values}, option=orjson.OPT_APPEND_NEWLINE)
    except orjson.JSONEncodeError as error:  # a name that is not a string, or a step over 64 bits
        raise DataError(f"{path}: step {number} cannot be written as JSON ({error})") from error


def _integer(step: Any, path: Path) -> int:
    with suppress(TypeError):
        if not isinstance(step, bool):
            return operator.index(step)
    raise DataError(f"{path}: step {step!r}, expected an integer")


def _encoded(value: float) -> float | str:
    if math.isnan(value):
        return "NaN"
    return value if math.isfinite(value) else ("Infinity" if value > 0 else "-Infinity")


def _record(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON ({error})") from error
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        raise DataError(f"{where}: expected an object with an integer step")
    return {n: _NAMES.get(v, v) if isinstance(v, str) else v for n, v in record.items()}
