"""`functrain report`: several runs on one page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from functrain.cli.facts import recorded
from functrain.cli.origins import RunDirectory, stage_directory
from functrain.errors import ConfigError
from functrain.tracking import report


def compared(given: Sequence[str], to: Path) -> str:
    """Write a page over runs: each metric of all runs in one chart, then each run by itself.

    Returns what was written. Raises `ConfigError` for anything that is not a run.
    """
    if not given:
        raise ConfigError("report: no run; give run directories")
    if to.is_dir():
        raise ConfigError(f"to: {to} is a directory; name a file in it: {to / 'report.html'}")
    runs = [RunDirectory(stage_directory(Path(each))) for each in given]
    names = _names([run.path for run in runs])
    stages = [recorded(run, name) for name, run in zip(names, runs, strict=True)]
    place = to.resolve() if to.is_file() else to  # a link stays, such as /dev/stdout
    try:
        report.write_report(place, title=", ".join(names), stages=stages, together=len(stages) > 1)
    except OSError as error:
        raise ConfigError(f"{to}: cannot be written ({error.strerror})") from error
    return f"{to}: {len(runs)} run{'s' if len(runs) > 1 else ''}"


def _names(paths: Sequence[Path]) -> list[str]:
    """Names for the runs, as short as distinguishes them; `ConfigError` for one given twice."""
    seen: dict[Path, Path] = {}
    for path in paths:
        first = seen.setdefault(path.resolve(), path)
        if first is not path:
            other = "" if first == path else f", also as {path}"
            raise ConfigError(f"report: {first} is given twice{other}; name each run once")
    whole = [path.absolute().parts for path in paths]
    lengths = range(1, max(len(parts) for parts in whole) + 1)
    every = (["/".join(parts[-length:]) for parts in whole] for length in lengths)
    return next(names for names in every if len(set(names)) == len(names))
