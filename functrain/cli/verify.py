"""`functrain verify` and `functrain diff`: is it what it says, and where do two runs part?"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from functrain import checkpoint
from functrain.checkpoint.compare import Difference, compare_checkpoints, differences
from functrain.checkpoint.filesystem import OPERATING_SYSTEM
from functrain.checkpoint.loading import read_leaves
from functrain.checkpoint.manifest import checkpoints, read_manifest, step_of
from functrain.cli import toml
from functrain.cli.build import build
from functrain.cli.origins import STAGE_ORDER, RunDirectory, stage_directory
from functrain.cli.run import threads
from functrain.compilation import cache_directory
from functrain.errors import CheckpointError, ConfigError
from functrain.loop import train
from functrain.state import leaves
from functrain.tracking import jsonl

_MOST_SHOWN = 20


def verified(given: str, replay: str | None) -> Iterator[str]:
    """A line for each checkpoint that is as it was saved; `CheckpointError` at one that is not.

    With `replay`, `A..B`, the steps from checkpoint A to B are made again, and must come to B's
    very bits.
    """
    for path in _every_stages(Path(given)):
        try:
            manifest, stored = read_leaves(OPERATING_SYSTEM, path)
        except CheckpointError:
            if path == Path(given) or path.is_dir():
                raise
            continue  # of a run that goes on, which has pruned it
        size = sum(entry.size for entry in manifest.files.values())
        yield f"{path}: whole; {len(stored)} leaves, {size:,} bytes"
    if replay is not None:
        yield _replayed(Path(given), replay)


def _every_stages(path: Path) -> list[Path]:
    """The checkpoints of a demo's three runs, or of what else it is."""
    stages = [path / name for name in reversed(STAGE_ORDER)]
    runs = [stage for stage in stages if RunDirectory(stage).config.is_file()] or [path]
    return [found for run in runs for found in _checkpoints(run)]


def _checkpoints(path: Path) -> list[Path]:
    if step_of(path) is not None or (path / "manifest.json").exists():
        return [path]
    found = checkpoints(path) or checkpoints(RunDirectory(stage_directory(path)).checkpoints)
    if not found:
        raise ConfigError(f"{path}: has no checkpoint yet")
    return found


def _replayed(path: Path, replay: str) -> str:
    match = re.fullmatch(r"(\d+)\.\.(\d+)", replay)
    if match is None or not int(match[1]) < int(match[2]):
        raise ConfigError(f"--replay {replay}: expected two steps, the lower first: 200..400")
    run = RunDirectory(stage_directory(path))
    begin, end = (_at(run, int(step)) for step in match.groups())
    config: Any = toml.read_any(run.config)
    with (
        threads(config.train.threads or 1),
        cache_directory(config.train.compile_cache),
        ExitStack() as stack,
    ):
        built = build(config)
        stack.callback(built.close)
        state = built.state
        if begin is not None:
            state = checkpoint.load(begin, like=built.state, strict=True)
        plateau = config.schedule.name == "reduce_on_plateau"
        for now, _ in train(
            built.step,
            state,
            built.data,
            steps=int(match[2]),
            evaluation=built.evaluation if plateau else None,
            evaluate_every=config.evaluation.every if plateau else None,
        ):
            state = now
    assert end is not None  # `_at` has refused a step without a checkpoint, but for 0
    _, expected = read_leaves(OPERATING_SYSTEM, end)
    found = list(differences(dict(leaves(state)), expected))
    if found:
        raise CheckpointError(
            f"{end}: made again from step {match[1]}, it differs:\n" + "\n".join(_shown(found))
        )
    return f"steps {match[1]} to {match[2]}, made again: the same bits"


def _at(run: RunDirectory, step: int) -> Path | None:
    found = {step_of(path): path for path in checkpoints(run.checkpoints)}
    if step in found or step == 0:
        return found.get(step)
    kept = ", ".join(str(each) for each in sorted(each for each in found if each is not None))
    raise ConfigError(f"--replay: {run.path} has no checkpoint of step {step}; kept are {kept}")


def compared(one: str, other: str) -> tuple[bool, list[str]]:
    """Whether two checkpoints or runs are the same, and what to say of it."""
    first, second = _checkpoints(Path(one)), _checkpoints(Path(other))
    lines = [*_configs(Path(one), Path(other)), *_logged(Path(one), Path(other))]
    pair = _first_apart(first, second)
    if pair is None:
        common = sorted({step_of(p) for p in first} & {step_of(p) for p in second}, key=str)
        said = ", ".join(map(str, common))
        return True, [*lines, f"the same bits at every step that both have kept: {said}"]
    one_under, other_under = (read_manifest(OPERATING_SYSTEM, path).numerics for path in pair)
    lines += _apart("numerics", one_under, other_under)
    found = list(compare_checkpoints(*pair))
    if not found:
        return True, [*lines, f"{pair[0]} and {pair[1]}: the same bits"]
    lines.append(f"{pair[0]} and {pair[1]}: {len(found)} leaves differ")
    return False, [*lines, *(f"  {line}" for line in _shown(found))]


def _first_apart(first: list[Path], second: list[Path]) -> tuple[Path, Path] | None:
    """The first pair of one step that differs; of single checkpoints the pair itself."""
    if len(first) == len(second) == 1:
        return first[0], second[0]
    others = {step_of(path): path for path in second}
    common = [(path, others[step_of(path)]) for path in first if step_of(path) in others]
    if not common:
        raise ConfigError("the two have kept no checkpoint of the same step; name one of each")
    for pair in common:
        one, other = (read_manifest(OPERATING_SYSTEM, path).files for path in pair)
        if one != other:
            return pair
    return None


def _shown(found: list[Difference]) -> list[str]:
    shown = [str(each) for each in found[:_MOST_SHOWN]]
    more = len(found) - len(shown)
    return [*shown, f"… and {more} more"] if more else shown


def _configs(one: Path, other: Path) -> Iterator[str]:
    configs = []
    for path in (one, other):
        try:
            configs.append(toml.flat(toml.read_any(RunDirectory(stage_directory(path)).config)))
        except ConfigError:  # a checkpoint that lies outside of a run
            return
    yield from _apart("config", *configs)


def _logged(one: Path, other: Path) -> Iterator[str]:
    try:
        files = [RunDirectory(stage_directory(path)).metrics for path in (one, other)]
    except ConfigError:
        return
    records = [{r["step"]: r for r in jsonl.read(file)} for file in files if file.is_file()]
    if len(records) < 2:
        return
    for step in sorted(records[0].keys() & records[1].keys()):
        first, second = (
            {n: v for n, v in each[step].items() if n not in jsonl.CLOCKS} for each in records
        )
        if first != second:
            yield f"metrics part at step {step}:"
            yield from (f"  {line}" for line in _apart("", first, second))
            return


def _apart(what: str, one: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[str]:
    for name in sorted(one.keys() | other.keys()):
        if one.get(name) != other.get(name):
            yield f"{what} {name}: {one.get(name)!r} and {other.get(name)!r}".lstrip()
