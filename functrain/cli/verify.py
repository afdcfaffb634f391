"""`functrain verify` and `functrain diff`: are checkpoints intact, and where do two runs differ?"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import attrs

from functrain import checkpoint
from functrain.checkpoint.compare import Difference, compare_checkpoints, differences
from functrain.checkpoint.filesystem import OPERATING_SYSTEM
from functrain.checkpoint.loading import read_leaves
from functrain.checkpoint.manifest import checkpoints, read_manifest, step_of
from functrain.cli import toml
from functrain.cli.build import build
from functrain.cli.config import DPO, SFT, Pretrain
from functrain.cli.directory import lost_cache, started_from
from functrain.cli.facts import logged
from functrain.cli.origins import STAGE_ORDER, RunDirectory, stage_directory
from functrain.cli.run import check_data, digests, threads
from functrain.compilation import cache_directory
from functrain.errors import CheckpointError, ConfigError, DataError
from functrain.loop import train
from functrain.state import leaves, why_apart
from functrain.tracking import jsonl

_MOST_SHOWN = 20


def verified(given: str, replay: str | None) -> Iterator[str]:
    """Yields a line for each intact checkpoint; `CheckpointError` at one that is not intact.

    With `replay`, `A..B`, the steps from checkpoint A to B are repeated and must give B's exact
    bits. Raises `ConfigError` if the data or the starting model of the run have changed, or its
    cache of the reference is gone, and for fast sums of several workers, which one process cannot
    repeat.
    """
    for path in _every_run(Path(given)):
        try:
            manifest, stored = read_leaves(OPERATING_SYSTEM, path)
        except CheckpointError:
            if path == Path(given) or path.is_dir():
                raise
            continue  # pruned meanwhile by a run in progress
        size = sum(entry.size for entry in manifest.files.values())
        yield f"{path}: whole; {len(stored)} leaves, {size:,} bytes"
    if replay is not None:
        yield _replayed(Path(given), replay)


def _every_run(path: Path) -> list[Path]:
    """The checkpoints of a run, of all runs in a directory (a demo's, say), or a checkpoint."""
    runs = [path] if RunDirectory(path).config.is_file() else _runs_in(path) or [path]
    return [found for run in runs for found in _checkpoints(run)]


def _runs_in(path: Path) -> list[Path]:
    """The runs directly below a directory: the stages in their order, then others by name."""
    stages = tuple(reversed(STAGE_ORDER))
    below = sorted(each.parent for each in path.glob("*/config.toml"))
    found = [each for each in below if (each / "checkpoints").is_dir() or each.name in stages]
    place = {stage: number for number, stage in enumerate(stages)}
    return sorted(found, key=lambda each: place.get(each.name, len(place)))


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
    _check_alone(run, int(match[1]), int(match[2]))
    config: Any = toml.read_any(run.config)
    if not isinstance(config, Pretrain):
        started_from(config)
        _check_cache(config)
    with (
        threads(config.train.threads or 1),
        cache_directory(config.train.compile_cache),
        ExitStack() as stack,
    ):
        built = build(config)
        stack.callback(built.close)
        check_data(config, digests(built))
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
    assert end is not None  # `_at` refuses a step without a checkpoint, other than 0
    _, expected = read_leaves(OPERATING_SYSTEM, end)
    base = expected.get("base")
    if isinstance(base, str) and why_apart(base, state.base) is None:
        state = attrs.evolve(state, base=base)  # the first checkpoints lack the base's scale
    found = list(differences(dict(leaves(state)), expected))
    if found:
        raise CheckpointError(
            f"{end}: made again from step {match[1]}, it differs:\n" + "\n".join(_shown(found))
        )
    return f"steps {match[1]} to {match[2]}, made again: the same bits"


def _check_cache(config: SFT | DPO) -> None:
    """Refuse to replay without the reference's log-probs that the run has read.

    They would be made anew, from other batches, which may change their last bits.
    """
    cache = lost_cache(config)
    if cache is not None:
        raise ConfigError(
            f"preference.cache: {cache} is not there, or is empty (looked from {Path.cwd()}); the "
            "run has the reference's log-probs from it; put it back, or a link to where it is now"
        )


def _check_alone(run: RunDirectory, begin: int, end: int) -> None:
    """Refuse steps that several workers made with fast sums: one process has another order."""
    for path in checkpoints(run.checkpoints):
        step = step_of(path)
        if step is None or not begin < step <= end:
            continue  # the first checkpoint is only read, whoever made it
        # A condition recorded only for fast sums: see `functrain.loop.conditions`.
        workers = read_manifest(OPERATING_SYSTEM, path).numerics.get("workers")
        if workers is not None:
            raise ConfigError(
                f"--replay {begin}..{end}: {path} was made by {workers} workers with "
                "reduction='fast', whose sums have another order in one process; only steps of "
                "reduction='canonical' or of one worker can be made again so"
            )


def _at(run: RunDirectory, step: int) -> Path | None:
    found = {step_of(path): path for path in checkpoints(run.checkpoints)}
    if step in found or step == 0:
        return found.get(step)
    kept = ", ".join(str(each) for each in sorted(each for each in found if each is not None))
    raise ConfigError(f"--replay: {run.path} has no checkpoint of step {step}; kept are {kept}")


def compared(one: str, other: str) -> tuple[bool, list[str]]:
    """Whether two checkpoints or runs are the same, and what to say about it.

    For two runs, the steps that both have kept are compared, from the lowest to the first that
    differs, and whatever is reported as the same has been hashed. Raises `CheckpointError` for a
    damaged checkpoint.
    """
    pairs = _pairs(_checkpoints(Path(one)), _checkpoints(Path(other)))
    runs = _runs(Path(one), Path(other))
    lines = [] if runs is None else [*_configs(runs), *_logged(runs)]
    same = []
    for pair in pairs:
        try:
            found = _between(*pair)
        except CheckpointError:
            if len(pairs) == 1 or all(path.is_dir() for path in pair):
                raise
            continue  # pruned meanwhile by a run in progress
        if found:
            numerics = (read_manifest(OPERATING_SYSTEM, path).numerics for path in pair)
            lines += _apart("numerics", *numerics)
            lines.append(f"{pair[0]} and {pair[1]}: {len(found)} leaves differ")
            return False, [*lines, *(f"  {line}" for line in _shown(found))]
        same.append(pair)
    if not same:
        raise ConfigError("the two have kept no checkpoint of the same step; name one of each")
    if len(pairs) == 1:
        return True, [*lines, f"{pairs[0][0]} and {pairs[0][1]}: the same bits"]
    said = ", ".join(str(step_of(path)) for path, _ in same)
    return True, [*lines, f"the same bits at every step that both have kept: {said}"]


def _pairs(first: list[Path], second: list[Path]) -> list[tuple[Path, Path]]:
    """The pair of two single checkpoints, or the pairs of equal steps, sorted by step."""
    if len(first) == len(second) == 1:
        return [(first[0], second[0])]
    others = {step_of(path): path for path in second}
    return [(path, others[step_of(path)]) for path in first if step_of(path) in others]


def _between(one: Path, other: Path) -> list[Difference]:
    """The leaves in which two checkpoints differ, after both have been verified."""
    manifests = [read_manifest(OPERATING_SYSTEM, path) for path in (one, other)]
    if manifests[0].files != manifests[1].files:
        return list(compare_checkpoints(one, other))
    for path in {one, other}:  # equal hashes, which the files must have
        read_leaves(OPERATING_SYSTEM, path)
    return []


def _shown(found: list[Difference]) -> list[str]:
    shown = [str(each) for each in found[:_MOST_SHOWN]]
    more = len(found) - len(shown)
    return [*shown, f"… and {more} more"] if more else shown


def _configs(runs: Sequence[RunDirectory]) -> Iterator[str]:
    try:
        read = [toml.read_any(run.config) for run in runs]
    except ConfigError as error:  # the checkpoints are compared nevertheless
        yield f"configs not compared: {error}"
        return
    # Without the config's own hash, which covers what is compared.
    yield from _apart("config", *(toml.flat(attrs.evolve(each, sha256=None)) for each in read))


def _runs(one: Path, other: Path) -> list[RunDirectory] | None:
    """Both runs; None if a checkpoint is not in a run."""
    try:
        return [RunDirectory(stage_directory(path)) for path in (one, other)]
    except ConfigError:
        return None


def _logged(runs: Sequence[RunDirectory]) -> Iterator[str]:
    if not all(run.metrics.is_file() for run in runs):
        return
    try:
        records = [{record["step"]: record for record in logged(run)} for run in runs]
    except DataError as error:  # the checkpoints are compared nevertheless
        yield f"metrics not compared: {error}"
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
        first, second = one.get(name), other.get(name)
        if first is not second and first != second:  # NaN is not equal to itself
            yield f"{what} {name}: {first!r} and {second!r}".lstrip()
