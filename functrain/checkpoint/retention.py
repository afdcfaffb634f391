"""Which checkpoints to keep."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import attrs
from attrs.validators import optional

from functrain.checkpoint.files import check_sizes
from functrain.checkpoint.filesystem import FileSystem
from functrain.checkpoint.manifest import checkpoints, read_manifest, step_of
from functrain.checks import is_integer
from functrain.errors import CheckpointError, SaveWarning


def _at_least_one(_record: object, field: attrs.Attribute[int], value: object) -> None:
    if not is_integer(value):
        raise CheckpointError(f"keep: {field.name}={value!r}, expected an integer of at least 1")


def _steps(given: Any) -> tuple[int, ...]:
    several = isinstance(given, Iterable) and not isinstance(given, str | bytes)
    steps = tuple(given) if several else None
    if steps is None or not all(type(step) is int and step >= 0 for step in steps):
        raise CheckpointError(f"keep: steps={given!r}, expected integers of at least 0")
    return steps


def _of(kind: type, expected: str) -> Callable[[object, attrs.Attribute[Any], object], None]:
    def check(_record: object, field: attrs.Attribute[Any], value: object) -> None:
        if not isinstance(value, kind):
            raise CheckpointError(f"keep: {field.name}={value!r}, expected {expected}")

    return check


@attrs.frozen(kw_only=True)
class Keep:
    """Keeps the newest `last`, multiples of `every`, the `best` by `metric`, and those of `steps`.

    What none of these four rules keeps may be removed, but nothing is while one of the newest is
    damaged: an older checkpoint may be the only good one.

    `metric` is one that `save` was given; with `lower`, less of it is better. A checkpoint without
    it, or with NaN, is never among the best. Where `best` is set, two kinds are kept with a
    warning: a checkpoint whose manifest is damaged and, if none has `metric`, all that have other
    metrics, since its name may be misspelt.
    """

    last: int = attrs.field(default=2, validator=_at_least_one)
    every: int | None = attrs.field(default=None, validator=optional(_at_least_one))
    best: int | None = attrs.field(default=None, validator=optional(_at_least_one))
    metric: str = attrs.field(default="eval_loss", validator=_of(str, "a name"))
    lower: bool = attrs.field(default=True, validator=_of(bool, "True or False"))
    steps: tuple[int, ...] = attrs.field(default=(), converter=_steps)

    def expendable(self, filesystem: FileSystem, root: Path, last: int | None) -> list[Path]:
        """What may be removed, oldest first; `CheckpointError` if one of the newest is incomplete.

        `last` is the step that was saved last: checkpoints of higher steps neither count nor go.

        Checkpoints are judged by their manifests and file sizes, not their hashes: reading
        everything again would make each save as slow as a save and a load.
        """
        found = [p for p in checkpoints(root) if last is None or (step_of(p) or 0) <= last]
        newest = found[-self.last :]
        kept = {*newest, *self._best(filesystem, found)}
        if self.every is not None:
            kept |= {path for path in found if (step_of(path) or 0) % self.every == 0}
        kept |= {path for path in found if step_of(path) in self.steps}
        expendable = [path for path in found if path not in kept]
        for path in newest if expendable else ():
            check_sizes(filesystem, path, read_manifest(filesystem, path).files)
        return expendable

    def _best(self, filesystem: FileSystem, found: list[Path]) -> list[Path]:
        if self.best is None:
            return []
        metrics: dict[Path, Mapping[str, float]] = {}
        unknown: list[Path] = []
        for path in found:
            try:
                metrics[path] = read_manifest(filesystem, path).metrics
            except CheckpointError as error:
                unknown.append(path)
                message = f"{error}; whether it is one of the best is unknown, so it is not removed"
                warnings.warn(message, SaveWarning, stacklevel=4)
        if not any(self.metric in each for each in metrics.values()):
            return [*unknown, *self._otherwise_measured(metrics, found)]
        values = [
            # Among equal values the newer checkpoint wins.
            (value if self.lower else -value, -(step_of(path) or 0), path)
            for path, each in metrics.items()
            if not math.isnan(value := each.get(self.metric, math.nan))
        ]
        return [*unknown, *(path for *_, path in sorted(values)[: self.best])]

    def _otherwise_measured(
        self, metrics: Mapping[Path, Mapping[str, float]], found: list[Path]
    ) -> list[Path]:
        """The checkpoints that have metrics, where none has `self.metric`; warns of them."""
        others = [path for path, each in metrics.items() if each]
        if set(others) - set(found[-self.last :]):
            has = ", ".join(sorted({name for each in metrics.values() for name in each}))
            warnings.warn(
                f"keep: the best by {self.metric} are asked for, and no checkpoint has it; they "
                f"have {has}. Those of them are not removed; give Keep(metric=…) one of these",
                SaveWarning,
                stacklevel=5,
            )
        return others


def as_keep(given: int | Keep) -> Keep:
    """A `Keep`; an integer means that many of the newest."""
    return given if isinstance(given, Keep) else Keep(last=given)
