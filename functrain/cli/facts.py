"""What a report says about a run besides its metrics: data, environment, checkpoints."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from collections.abc import Mapping
from typing import Any

import orjson

from functrain import __version__, checkpoint
from functrain.checkpoint.filesystem import OPERATING_SYSTEM
from functrain.checkpoint.manifest import checkpoints, read_manifest
from functrain.checks import is_number
from functrain.cli import directory as directories
from functrain.cli import toml
from functrain.cli.build import Built
from functrain.cli.origins import RunDirectory
from functrain.distributed import World
from functrain.errors import CheckpointError, DataError
from functrain.state import device_of
from functrain.tracking import jsonl
from functrain.tracking.report import CheckpointRow, StageRecord

_PACKAGES = ("numpy", "transformers", "tokenizers")


def written(run: RunDirectory, built: Built, world: World) -> None:
    """Record what was read and where this sitting computes, for later reports."""
    directories.write(run.notes, "".join(f"{note}\n" for note in built.notes))
    found = {"functrain": __version__, "python": platform.python_version()}
    found |= {"system": platform.platform(), "workers": str(world.size)}
    numerics = checkpoint.numerics(device_of(built.state.params))
    found |= {name: str(value) for name, value in numerics.items()}
    # Only loaded packages: looking for others takes time.
    loaded = [name for name in _PACKAGES if name in sys.modules]
    found |= {name: importlib.metadata.version(name) for name in loaded}
    text = orjson.dumps(found, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
    directories.write(run.environment, text.decode())


def recorded(run: RunDirectory, name: str) -> StageRecord:
    """A run as recorded in its directory."""
    return StageRecord(
        name=name,
        metrics=logged(run),
        config=toml.dumps(toml.read_any(run.config)),
        notes=_lines(run),
        environment=_environment(run),
        checkpoints=_kept(run),
    )


def logged(run: RunDirectory) -> list[dict[str, Any]]:
    """The records of a run's metrics; `DataError`, with a way out, at the first invalid one."""
    way_out = "remove that line, and the others are read"
    try:
        records = jsonl.read(run.metrics)
    except DataError as error:
        raise DataError(f"{error}; {way_out}") from error
    for number, record in enumerate(records, start=1):
        for name, value in record.items():
            if not is_number(value):
                raise DataError(
                    f"{run.metrics}:{number}: {name} is {value!r}, expected a number; {way_out}"
                )
    return records


def _lines(run: RunDirectory) -> list[str]:
    return run.notes.read_text(encoding="utf-8").splitlines() if run.notes.is_file() else []


def _environment(run: RunDirectory) -> Mapping[str, str]:
    if not run.environment.is_file():
        return {}
    try:
        found = orjson.loads(run.environment.read_bytes())
    except orjson.JSONDecodeError:
        found = None
    if not isinstance(found, dict):
        return {run.environment.name: "damaged"}
    return {str(name): str(value) for name, value in found.items()}


def _kept(run: RunDirectory) -> list[CheckpointRow]:
    found = []
    for path in checkpoints(run.checkpoints):
        try:
            manifest = read_manifest(OPERATING_SYSTEM, path)
        except (OSError, CheckpointError):
            continue  # pruned meanwhile by a run in progress
        found.append(
            CheckpointRow(
                step=manifest.step,
                size=sum(file.size for file in manifest.files.values()),
                sha256={name: file.sha256 for name, file in manifest.files.items()},
                loss=manifest.metrics.get("eval_loss"),
            )
        )
    return found
