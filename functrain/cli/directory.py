"""Run directories: checking files, beginning and resuming runs, and what may change between."""

from __future__ import annotations

import datetime
import glob
import hashlib
import importlib.util
import itertools
import os
import shlex
import shutil
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import attrs

from functrain import writing
from functrain.cli import toml
from functrain.cli.config import (
    DPO,
    SFT,
    Config,
    Data,
    Pretrain,
    Start,
    Text,
)
from functrain.cli.known import EMBEDDED, SCHEDULES, TOKEN_FILES
from functrain.cli.origins import Origin, RunDirectory, origin
from functrain.errors import ConfigError, DataError
from functrain.tracking import jsonl

C = TypeVar("C", Pretrain, SFT, DPO)
SUFFIXES = {
    "pretrain": (".txt", ".md", ".jsonl", ".ndjson", ".json", ".parquet", *TOKEN_FILES),
    "sft": (".jsonl", ".ndjson", ".json", ".parquet"),
    "dpo": (".jsonl", ".ndjson", ".json", ".parquet"),
}
# Keys that may change between two sittings of a run, since no bit of the params depends on them.
FREE = (
    "directory",
    "sha256",  # the hash of the other keys
    "data.cache",
    "train.steps",
    "train.save_every",
    "train.keep",
    "train.keep_every",
    "train.keep_best",
    "train.on_save_error",
    "train.log_every",
    "train.compile_cache",
    "train.keep_pages",
    "train.return_pages",
    "train.peak_tflops",
    "tracking.services",
    "tracking.project",
    "tracking.name",
    "train.timeout",
)
FREE_UNLESS_PLATEAU = ("evaluation.every", "evaluation.batch_size", "evaluation.limit")


def check_files(config: Config) -> None:
    """Raise `ConfigError` for missing data files and runs; no data are read."""
    for key, given in (("data.train", config.data.train), ("data.held_out", config.data.held_out)):
        if given is None or (given == EMBEDDED and key == "data.train"):
            continue
        known = SUFFIXES[config.stage]
        begun, there = config.data.sha256 is not None, Path(given).exists()
        if Path(given).is_dir() or (not there and glob.has_magic(given)):
            if next(iter(_named(given)), None) is None:
                raise _absent(key, given, begun=begun)
            continue  # the files inside are checked when they are read
        if begun and not there:  # a file of any name, or a directory
            raise _absent(key, given, begun=True)
        plain = given[: -len(".gz")] if given.lower().endswith(".gz") else given
        # Ids are memory-mapped, so they cannot be compressed; read as text they would be nonsense.
        if Path(plain).suffix.lower() not in known or (plain != given and is_tokens(plain)):
            raise ConfigError(
                f"{key}: {given!r}, expected a file that ends in {' or '.join(known)}, or "
                f"{EMBEDDED!r} as data.train"
            )
        if not Path(given).is_file():
            raise _absent(key, given, begun=begun)
    data = config.data
    held_out = data.held_out if isinstance(data, Text) else None
    if held_out is not None and is_tokens(held_out) and not is_tokens(data.train):
        raise ConfigError(
            f"data.held_out: {held_out} holds token ids, and data.train is text, which this "
            "run has a tokenizer for; hold out text, or train on ids too"
        )
    if isinstance(data, Text) and data.vocabulary and not is_tokens(data.train):
        raise ConfigError(
            f"data.vocabulary: {data.train} is text, or holds some, whose tokenizer is the "
            "built-in one; give vocabulary with token ids (.bin, .npy) only"
        )
    if isinstance(data, Text) and data.packing and is_tokens(data.train):
        raise ConfigError(
            f"data.packing: {data.train} is one stream of ids, whose rows are full, and says "
            "nothing of documents; leave it out"
        )
    if isinstance(data, Text) and data.on_bad_record != "stop" and is_tokens(data.train):
        raise ConfigError(f"data.on_bad_record: {data.train} has no records; leave it out")
    for service in config.tracking.services:
        if importlib.util.find_spec(service) is None:
            raise ConfigError(
                f"tracking.services: the package {service} is not installed; pip install {service}"
            )
    cache = _cache_of(config)
    if cache is not None and Path(cache).is_dir():
        raise ConfigError(
            f"preference.cache: {cache} is a directory; name a file in it: "
            f"{Path(cache) / 'reference.jsonl'}"
        )
    if not isinstance(config, Pretrain):
        start = config.model
        if start.sha256 is not None and not Path(start.from_).exists():
            raise _absent("model.from", start.from_, begun=True)
        origin(start.from_)


def _absent(key: str, given: str, *, begun: bool) -> ConfigError:
    """`begun`: whether the config is a run's, which knows the file by its hash, wherever it is."""
    option = f"--{key.replace('_', '-')}"
    moved = f"; where it was moved, give {option} with its place now" if begun else ""
    return ConfigError(f"{key}: {given} is not there (looked from {Path.cwd()}){moved}")


def is_tokens(path: str) -> bool:
    """Whether a data file, or every file of a directory or a pattern, holds token ids.

    For a run that has begun, `data.vocabulary` tells: its data may be elsewhere by now.
    """
    if path == EMBEDDED:
        return False
    found = iter(_named(path))
    first = next(found, Path(path))  # a pattern without matches yet may still tell by its suffix
    if os.path.isdir(first):  # noqa: PTH112  an empty one
        return False
    return all(each.suffix.lower() in TOKEN_FILES for each in itertools.chain([first], found))


def _named(path: str) -> Iterable[Path]:
    """The files that a path names: itself, those of a directory at any depth, or of a pattern."""
    # Not by Path, whose methods raise for a text that is too long.
    found: Iterable[Path] = (Path(path),)
    if os.path.isdir(path):  # noqa: PTH112
        found = Path(path).rglob("*")
    elif not os.path.exists(path) and glob.has_magic(path):  # noqa: PTH110
        found = map(Path, glob.iglob(path, recursive=True))  # noqa: PTH207  absolute ones too
    else:
        return found
    return (each for each in found if not each.is_dir())


def resolved(config: C, *, threads: int, device: str) -> C:
    """The config with every key filled in that the bits depend on."""
    schedule = config.schedule
    if schedule.total is None and "total" in SCHEDULES[schedule.name]:
        schedule = attrs.evolve(schedule, total=config.train.steps, total_filled=True)
    train = attrs.evolve(
        config.train,
        threads=config.train.threads or threads,
        device=config.train.device or device,
    )
    config = attrs.evolve(config, schedule=schedule, train=train)
    if isinstance(config, Pretrain):
        return config
    start = started_from(config)
    model = attrs.evolve(
        config.model, from_=str(start.checkpoint), sha256=start.sha256, shape=start.shape
    )
    return attrs.evolve(config, model=model, data=_told(config.data, start))


def started_from(config: SFT | DPO) -> Origin:
    """What a run starts from; `ConfigError` if the run was begun from something else."""
    start = origin(config.model.from_)
    if config.model.sha256 not in (None, start.sha256):
        raise ConfigError(
            f"model.from: {start.checkpoint} is not what this run started from (another hash); "
            "put the old checkpoint back, or start a new run"
        )
    return start


def _told(data: Data, start: Origin) -> Data:
    """The data with what its chat template is told, by default as the starting run was told."""
    if start.shape is not None:
        return data  # the built-in tokenizer has none
    before = None if start.config is None else start.config.data
    changes: dict[str, Any] = {}
    if data.today is None:
        changes["today"] = (before and before.today) or datetime.date.today().isoformat()
    if data.enable_thinking is None and before is not None:
        changes["enable_thinking"] = before.enable_thinking
    return attrs.evolve(data, **changes)


def begun(config: C, *, threads: int, device: str, resume: bool = False) -> C:
    """The resolved config of a new run; `ConfigError` if its directory is not empty.

    What a failed beginning has left there does not count.
    """
    run = RunDirectory(config.directory)
    if run.path.exists() and (not run.path.is_dir() or _holds_something(run)):
        way = (
            f"with no {run.config.name} in it there is no run to go on with; put that back"
            if resume
            else "go on with --resume"
        )
        raise ConfigError(
            f"{run.path}: is there already and not empty; {way}, or give another --directory"
        )
    # A run's config may be reused for a new run, with another start and other data; what its chat
    # template was told belonged to its start, if that had a template.
    anothers = config.data.sha256 is not None
    given = attrs.evolve(config.data, sha256=None, held_out_sha256=None, templated=None)
    config = attrs.evolve(config, data=given)
    if not isinstance(config, Pretrain):
        config = attrs.evolve(config, model=Start(from_=config.model.from_))
    schedule = attrs.evolve(config.schedule, total_filled=False)  # unless `resolved` fills it in
    config = attrs.evolve(config, schedule=schedule)
    config = resolved(config, threads=threads, device=device)
    if anothers and _is_built_in(config):
        untold = attrs.evolve(config.data, enable_thinking=None, today=None)
        config = attrs.evolve(config, data=untold)
    _check_read(config)
    return config


def _is_built_in(config: Config) -> bool:
    """Whether the model is functrain's own decoder, whose tokenizer has no chat template."""
    return isinstance(config, Pretrain) or config.model.shape is not None


def _check_read(config: Config) -> None:
    """Raise `ConfigError` for options that a new run would ignore."""
    data, best = config.data, config.train.keep_best
    evaluated = data.held_out is not None or data.train == EMBEDDED
    if not evaluated and config.schedule.name == "reduce_on_plateau":
        raise ConfigError(
            "schedule.name: 'reduce_on_plateau' follows the held-out loss, and nothing is held "
            "out; give data.held_out, or another schedule"
        )
    if not evaluated and best is not None:
        raise ConfigError(
            f"train.keep_best: {best}, and nothing is held out by whose loss the best would be "
            "known; give data.held_out, or leave it out"
        )
    for name, usual in (("truncation", "keep_start"), ("min_prompt", 1)):
        if isinstance(data, Text) and getattr(data, name) != usual:
            raise ConfigError(
                f"data.{name}: running text is not cut, but goes on in the next row; leave it out"
            )
    for name in ("enable_thinking", "today"):
        if _is_built_in(config) and getattr(data, name) is not None:
            raise ConfigError(
                f"data.{name}: the tokenizer has no chat template to tell it; leave it out"
            )


LOCK = ".lock"
"""The file that a process training in a run's directory holds; see `functrain.cli.lock`."""


def _holds_something(run: RunDirectory) -> bool:
    # A config that was still being written when the process was killed does not count.
    nothing = {f".{run.config.name}.tmp", LOCK}
    return any(path.name not in nothing for path in run.path.iterdir()) and not failed(run)


def failed(run: RunDirectory) -> bool:
    """Whether a directory holds only a failed beginning: no step has been logged or saved."""
    files = _first(run)
    written = {run.checkpoints.name, LOCK, *(path.name for path in files)}
    written |= {f".{path.name}.tmp" for path in files}
    found = {path.name for path in run.path.iterdir()} if run.path.is_dir() else set()
    if run.config.name not in found or not found <= written:
        return False
    if run.checkpoints.exists() and any(run.checkpoints.iterdir()):
        return False
    try:
        # A config that a user put there has no hashes; a run records them.
        begun = toml.read_any(run.config).data.sha256 is not None
        return begun and not any(record["step"] for record in jsonl.read(run.metrics))
    except (ConfigError, DataError):
        return False


def cleared(run: RunDirectory) -> None:
    """Remove what a failed beginning has left; `ConfigError` if that cannot be done."""
    try:
        shutil.rmtree(run.tokenizer_files, ignore_errors=True)
        for path in _first(run):
            if path != run.tokenizer_files:
                path.unlink(missing_ok=True)
    except OSError as error:
        raise unwritten(run.path, error) from error


def _first(run: RunDirectory) -> tuple[Path, ...]:
    """What a run writes before its first step; last its config, which identifies the rest."""
    tokenizers = (run.tokenizer, run.tokenizer_files)
    return (*tokenizers, run.metrics, run.notes, run.environment, run.config)


def resumed(config: C, *, threads: int, device: str) -> C:
    """The config to resume with: the run's own, with changes to keys that may change.

    Raises `ConfigError`, naming the keys, if the config would change the bits.
    """
    run = RunDirectory(config.directory)
    _check_stage(run, config)
    before: C = toml.read(run.config, type(config))
    _check_unedited(run, before)
    merged = resolved(_inherited(config, before), threads=threads, device=device)
    old, new = toml.flat(before), toml.flat(merged)
    free = free_keys(before) | _known_by_hash(before, merged)
    changed = [key for key in old if old[key] != new.get(key) and key not in free]
    if changed:
        lines = [f"  {key}: {new.get(key)!r}, and the run has {old[key]!r}" for key in changed]
        anew = "nothing has been trained there, so without --resume it is begun anew; or "
        raise ConfigError(
            f"{run.path}: --resume with another config would not be the same run:\n"
            + "\n".join(lines)
            + f"\n{anew if failed(run) else ''}resume with `functrain {config.stage} "
            f"{shlex.quote(str(run.config))} --resume`, or begin another --directory"
        )
    if not failed(run):
        _check_cache(run, merged)
    return merged


def _cache_of(config: Config) -> str | None:
    return config.preference.cache if isinstance(config, DPO) else None


def lost_cache(config: Config) -> str | None:
    """The cache of the reference that a begun run has filled, if it is not there or is empty."""
    cache = _cache_of(config)
    if cache is None or (Path(cache).is_file() and Path(cache).stat().st_size):
        return None
    return cache


def _check_cache(run: RunDirectory, config: Config) -> None:
    """Raise `ConfigError` if the cache of the reference that a run has filled is not there.

    It would be made anew, from other batches: what they score may differ in its last bits.
    """
    cache = lost_cache(config)
    if cache is not None:
        raise ConfigError(
            f"{_absent('preference.cache', cache, begun=True)}; where it is lost, "
            f"`functrain reference {shlex.quote(str(run.config))}` makes another, of the same "
            "log-probs but for rounding"
        )


def sealed(config: C) -> C:
    """A resolved config with the hash of its keys that may not change during the run."""
    return attrs.evolve(config, sha256=_hash(_fixed(config)))


def _fixed(config: Config) -> dict[str, Any]:
    """The keys that may not change in a run, except those covered by a hash of their own."""
    # A key that becomes free has to stay here: it is part of the hashes of older runs.
    free = {*free_keys(config), "data.sha256", "data.held_out_sha256", "model.sha256"}
    if config.data.sha256 is not None:
        free.add("data.train")
    if config.data.held_out_sha256 is not None:
        free.add("data.held_out")
    if isinstance(config, SFT | DPO) and config.model.sha256 is not None:
        free.add("model.from")
    return {key: value for key, value in toml.flat(config).items() if key not in free}


def _hash(fixed: Mapping[str, Any]) -> str:
    # As `toml.dumps` writes them, however a user has spelt 0.001; None is not written.
    lines = [f"{k} = {toml.literal(v)}\n" for k, v in sorted(fixed.items()) if v is not None]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _check_unedited(run: RunDirectory, before: Config) -> None:
    """Raise `ConfigError` if a run's own config has been edited.

    It would claim to hold for all steps, but only those to come would follow it.
    """
    # Only the keys in the file, so that a newer version may add options and change defaults.
    there = toml.keys(run.config)
    fixed = {key: value for key, value in _fixed(before).items() if key in there}
    if before.sha256 in (None, _hash(fixed)) or failed(run):
        return
    # The changed key can be found if its old value was the default.
    usual = toml.flat(type(before)())
    was = [key for key in fixed if _hash({**fixed, key: usual.get(key)}) == before.sha256]
    named = "".join(f": {key} is {fixed[key]!r}, and was {usual.get(key)!r}" for key in was)
    raise ConfigError(
        f"{run.config}: was changed after the run had begun{named}; put back what it was, or begin "
        f"another run with it: functrain {before.stage} {shlex.quote(str(run.config))} --directory "
        "OTHER"
    )


def free_keys(before: Config) -> set[str]:
    """The keys that may change in this run, since no bit of the params depends on them."""
    plateau = before.schedule.name == "reduce_on_plateau"
    free = {*FREE} if plateau else {*FREE, *FREE_UNLESS_PLATEAU}
    if not before.train.compile:
        free |= {"train.checkpoint", "train.recompute"}  # the same bits
    if before.train.reduction == "canonical":
        free.add("train.sharded")  # the same bits
    return free


def _known_by_hash(before: Config, now: Config) -> set[str]:
    """Keys of paths that may change: a hash shows, on reading, whether the content is the same.

    Of a cache it shows the reference only: another cache of it may differ in the last bits.
    """
    found: set[str] = set()
    old, new = before.data, now.data
    # Embedded data have no path, and ids have no tokenizer, which text would bring.
    if (
        old.sha256 is not None
        and EMBEDDED not in (old.train, new.train)
        and (getattr(old, "vocabulary", None) is not None) == is_tokens(new.train)
    ):
        found.add("data.train")
    if old.held_out is not None and old.held_out_sha256 is not None:
        found.add("data.held_out")
    if isinstance(before, SFT | DPO) and before.model.sha256 is not None:
        found.add("model.from")
    if isinstance(before, DPO) and isinstance(now, DPO):
        caches = before.preference.cache, now.preference.cache
        if None not in caches:  # the file begins with the hash of the reference
            found.add("preference.cache")
    return found


def _check_stage(run: RunDirectory, config: Config) -> None:
    stage = toml.read_any(run.config).stage
    if stage != config.stage:
        raise ConfigError(
            f"{run.path}: is a run of {stage}; go on with functrain {stage} "
            f"{shlex.quote(str(run.config))} --resume, or give another --directory"
        )


def _inherited(config: C, before: C) -> C:
    """`config`, with keys that it leaves open taken from `before`."""

    def filled(given: Any, old: Any) -> Any:
        if given is None:
            return old
        if not attrs.has(type(given)) or type(given) is not type(old):
            return given
        fields = [field.name for field in attrs.fields(type(given))]
        changes = {n: filled(getattr(given, n), getattr(old, n)) for n in fields}
        return attrs.evolve(given, **changes)

    config = filled(config, before)
    if isinstance(config, SFT | DPO) and isinstance(before, SFT | DPO):
        start = _begun_from(config.model.from_, Path(before.model.from_))
        config = attrs.evolve(config, model=attrs.evolve(config.model, from_=start))
    return config


def _begun_from(given: str, was: Path) -> str:
    """The checkpoint that a run began from, if it is in the given run or demo; else `given`.

    A start such as `runs/pretrain` was resolved to a checkpoint in it, by now perhaps not the
    newest; the given directory may also have been moved.
    """
    path = Path(given)
    if path in (was.parent.parent, was.parent.parent.parent):
        return str(was)
    if was.parent.name != "checkpoints":
        return given
    inside = (path.joinpath(*was.parts[-depth:]) for depth in (2, 3))
    return next((str(each) for each in inside if each.is_dir()), given)


@contextmanager
def placed(path: Path) -> Generator[Path]:
    """A temporary directory to write into, renamed at the end to `path`, which must not exist."""
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        temporary.rename(path)
    except OSError as error:
        raise unwritten(path, error) from error


def write(path: Path, text: str) -> None:
    """Write a small file, whole or not at all; `ConfigError` if it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        writing.write(path, text.encode(), durable=True)
    except OSError as error:
        raise unwritten(path, error) from error


def unwritten(path: Path, error: OSError) -> ConfigError:
    """The error for a file of a run that cannot be written."""
    return ConfigError(f"{path}: cannot be written ({error.strerror})")
