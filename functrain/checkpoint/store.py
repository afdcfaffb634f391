"""Saving and pruning: a temporary directory, fsync, the manifest last, one rename."""

from __future__ import annotations

import errno
import itertools
import warnings
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from functrain.checkpoint.environment import conditioned
from functrain.checkpoint.files import (
    Contents,
    hashed,
    verify_file,
    write_file,
    written,
)
from functrain.checkpoint.filesystem import (
    OPERATING_SYSTEM,
    FileSystem,
    remove_directory,
    sync_directory,
)
from functrain.checkpoint.layout import check_loadable, encode
from functrain.checkpoint.manifest import (
    MANIFEST,
    File,
    Manifest,
    OtherFormatError,
    checked_metrics,
    checked_texts,
    checkpoints,
    directory_name,
    is_beside,
    read_manifest,
    step_of,
    to_bytes,
)
from functrain.checkpoint.retention import Keep, as_keep
from functrain.checks import PathLike, as_path
from functrain.distributed import World
from functrain.errors import CheckpointError, ConfigError, SaveWarning
from functrain.state import TrainState, check_state, device_of
from functrain.trees import is_sharded


def save(
    directory: PathLike,
    state: TrainState,
    *,
    metrics: Mapping[str, float] | None = None,
    conditions: Mapping[str, Any] | None = None,
    beside: Mapping[str, str] | None = None,
    world: World | None = None,
    filesystem: FileSystem = OPERATING_SYSTEM,
) -> Path:
    """Save `state` to `directory/step-…`, durable when this returns, and return the path.

    A reader sees the whole checkpoint or none: the files go to a temporary directory and are
    fsynced, the manifest last, and one rename puts them in place. If the step has a checkpoint
    already, that is fine where it holds the same state and texts: it stays with its manifest, and a
    `SaveWarning` names the metrics if they differ. Where it holds others, `CheckpointError` is
    raised; a damaged one is put aside.

    `metrics` are written into the manifest, for `prune` to find the best by. So are the numerics
    that the bits depend on, and `conditions`, the caller's own additions to them (the number of
    micro-batches, say). `beside` are texts to save in the directory, by file name: with a
    `config.json` (`functrain.models.config_files`, which says for which models) transformers reads
    the directory as it is. Peak memory is the state's own: tensors on the CPU are not copied.

    Before anything is written, raises `StateError` for numbers that no load would accept (a step of
    more than twelve digits), and `CheckpointError` for invalid metrics and texts.

    A state in shards is saved by every worker of its `world`, in a directory that all of them see:
    each writes its rows into the very files that a single process would have written.
    """
    check_state(state)
    under = conditioned(device_of(state.params), conditions)
    return save_under(
        under, directory, state, metrics=metrics, beside=beside, world=world, filesystem=filesystem
    )


def save_under(
    under: Mapping[str, Any],
    directory: PathLike,
    state: TrainState,
    *,
    metrics: Mapping[str, float] | None,
    beside: Mapping[str, str] | None,
    world: World | None = None,
    filesystem: FileSystem,
) -> Path:
    """`save` under numerics determined before: in another thread they would differ."""
    root = as_path("directory", directory)
    check_loadable(state)
    found = checked_metrics(metrics)
    texts: dict[str, Contents] = {
        name: [memoryview(text)] for name, text in checked_texts(beside).items()
    }
    if is_sharded(state.params):
        # Imported here, since it imports this module.
        from functrain.checkpoint.sharded import save_shards

        return save_shards(
            root,
            state,
            world_for(world, "save"),
            metrics=found,
            under=under,
            texts=texts,
            filesystem=filesystem,
        )
    with saving(root, state.step):
        make_root(filesystem, root)
        with locked(filesystem, root):
            sweep(filesystem, root)
            return _placed(filesystem, root, state, found, under, texts)


@contextmanager
def saving(root: Path, step: int) -> Generator[None]:
    """Turn an `OSError` raised within into a `CheckpointError`."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{root}: step {step} could not be saved ({error.strerror or error}); earlier "
            "checkpoints are as they were"
        ) from error


def world_for(world: World | None, what: str) -> World:
    """The world of a state in shards; raises `ConfigError` if it was not given."""
    if world is None or world.size == 1:
        raise ConfigError(
            f"{what}: the state is in shards, and its world is not given; every worker calls "
            f"functrain.{what}(…, world=world)"
        )
    return world


def make_root(filesystem: FileSystem, root: Path) -> None:
    """Make the directory and its parents, all durable before a save is acknowledged."""
    missing = [directory for directory in (root, *root.parents) if not directory.is_dir()]
    for directory in reversed(missing):
        try:
            filesystem.mkdir(directory)
        except FileExistsError:
            # A concurrent run has just made it.
            if not directory.is_dir():
                raise
    if not checkpoints(root):
        # Existing parents too: a save killed just now may have made them without a sync.
        _sync_above(filesystem, root)


def _sync_above(filesystem: FileSystem, root: Path) -> None:
    for directory in (root, *root.parents):
        if directory.is_mount():
            return
        try:
            sync_directory(filesystem, directory.parent)
        except PermissionError:
            return  # A directory that we cannot read was not made by a save of ours.


def _placed(
    filesystem: FileSystem,
    root: Path,
    state: TrainState,
    metrics: Mapping[str, float],
    under: Mapping[str, Any],
    texts: Mapping[str, Contents],
) -> Path:
    name, files = directory_name(state.step), {**encode(state), **texts}
    target = root / name
    if target.exists():
        if not whole(filesystem, target):
            put_aside(filesystem, target)
        else:
            hashes = {name: hashed(contents) for name, contents in files.items()}
            check_same(target, read_manifest(filesystem, target), hashes, metrics)
            # The save that wrote it may have been killed before its rename was durable.
            sync_directory(filesystem, root)
            return target
    temporary = root / f".tmp-{name}"
    filesystem.mkdir(temporary)
    try:
        entries = written(filesystem, temporary, files)
        manifest = Manifest(step=state.step, files=entries, metrics=metrics, numerics=under)
        write_file(filesystem, temporary / MANIFEST, [memoryview(to_bytes(manifest))])
        sync_directory(filesystem, temporary)
        filesystem.rename(temporary, target)
    except BaseException:
        discard(filesystem, temporary)
        raise
    durable(filesystem, target)
    return target


def durable(filesystem: FileSystem, target: Path) -> None:
    """Make the rename that has put a checkpoint in place durable."""
    try:
        sync_directory(filesystem, target.parent)
    except OSError as error:
        # Not retried: after a failed fsync, a second one may succeed without having written.
        raise CheckpointError(
            f"{target}: written and in place, but whether it would survive a power cut is unknown "
            f"({error.strerror or error}); check the disk, and save the next step"
        ) from error


_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO)
"""No file of that name, or not a regular file: a link, or a pipe that nobody reads."""


def whole(filesystem: FileSystem, target: Path) -> bool:
    """Whether every file of a checkpoint is there and matches its hash.

    Raises `CheckpointError` where that cannot be determined: in the format of another version, or
    where the system refuses a read (too many open files, say). Either may well be whole.
    """
    try:
        entries = read_manifest(filesystem, target).files
        return all(verify_file(filesystem, target / n, entry) for n, entry in entries.items())
    except OtherFormatError:
        raise
    except CheckpointError as error:
        refused = error.__cause__
        if isinstance(refused, OSError) and refused.errno not in _NOT_THERE:
            raise
        return False


def put_aside(filesystem: FileSystem, target: Path) -> None:
    """Rename a damaged checkpoint to free its name, with a warning; what is left of it is kept."""
    aside = _numbered(target.parent, f".damaged-{target.name}")
    filesystem.rename(target, aside)
    sync_directory(filesystem, target.parent)
    warnings.warn(
        f"{target}: was damaged and is now {aside.name}; the same step is saved anew",
        SaveWarning,
        stacklevel=2,
    )


def _numbered(directory: Path, name: str) -> Path:
    """An unused path in a directory: `name` with a number appended."""
    taken = {path.name for path in directory.iterdir()}
    names = (f"{name}-{number}" for number in itertools.count(1))
    return directory / next(each for each in names if each not in taken)


def check_same(
    target: Path, there: Manifest, files: Mapping[str, File], metrics: Mapping[str, float]
) -> None:
    """Raise `CheckpointError` if an existing checkpoint does not hold these files.

    Its manifest stays as it is, since replacing it would write where someone may be reading; if the
    metrics differ, a `SaveWarning` says so.
    """
    other = {n for n in {*there.files, *files} if there.files.get(n) != files.get(n)}
    if other and all(is_beside(name) for name in other):
        raise CheckpointError(
            f"{target}: exists and holds this state beside other texts "
            f"({', '.join(sorted(other))}); give the same texts, save to a fresh directory, or "
            "remove it"
        )
    if other:
        raise CheckpointError(
            f"{target}: exists and holds another state; save to a fresh directory, or remove it"
        )
    # Compared as strings, so that NaN equals NaN.
    if metrics and {n: repr(v) for n, v in metrics.items()} != {
        n: repr(v) for n, v in there.metrics.items()
    }:
        warnings.warn(
            f"{target}: exists and holds this state; its metrics stay {dict(there.metrics)}, not "
            f"{dict(metrics)}, so the best are found by those. Save to a fresh directory, or "
            "remove it, to have the others",
            SaveWarning,
            stacklevel=4,
        )


def discard(filesystem: FileSystem, temporary: Path) -> None:
    """Free the space of an unfinished save; the next save sweeps away what could not be removed."""
    try:
        if temporary.exists():
            remove_directory(filesystem, temporary)
    except OSError:
        return


@contextmanager
def locked(filesystem: FileSystem, root: Path) -> Generator[None]:
    with ExitStack() as held:
        try:
            held.enter_context(filesystem.locked(root / ".lock"))
        except BlockingIOError as error:
            raise CheckpointError(
                f"{root}: another process is saving here; give each run its own directory"
            ) from error
        yield


def sweep(filesystem: FileSystem, root: Path) -> None:
    """Remove what a killed save or prune left behind, as far as possible; the lock is held."""
    names = [n for n in filesystem.list(root) if n.startswith((".tmp-step-", ".trash-step-"))]
    if names:
        # A power cut could undo a rename to .trash-* that is not durable, with its files gone.
        sync_directory(filesystem, root)
    for name in names:
        _remove(filesystem, root / name)


def _remove(filesystem: FileSystem, path: Path) -> None:
    """Remove what nobody reads any more; a failure is only a warning, since it blocks nothing."""
    try:
        remove_directory(filesystem, path)
    except OSError as error:
        warnings.warn(
            f"{path}: not removed, though it is no checkpoint any more ({error.strerror or error}: "
            f"{error.filename or path}); remove it by hand",
            SaveWarning,
            stacklevel=3,
        )


def prune(
    directory: PathLike,
    keep: int | Keep,
    *,
    saved: PathLike | None = None,
    filesystem: FileSystem = OPERATING_SYSTEM,
) -> None:
    """Remove the checkpoints that `keep` does not retain; a failure is a `SaveWarning`.

    Each is renamed first, so that a reader never finds a checkpoint with files missing.

    `saved` is the checkpoint that the run saved last. Checkpoints of higher steps remain from
    before this run went back to an earlier step: they are neither counted nor removed, and a
    warning names them. Without `saved` they would count as the newest, and the run's own
    checkpoints would be removed at once.
    """
    root = as_path("directory", directory)
    newest = None if saved is None else as_path("saved", saved)
    policy = as_keep(keep)
    try:
        with locked(filesystem, root):
            last = None if newest is None else step_of(newest)
            expendable = policy.expendable(filesystem, root, last)
            if newest is not None:
                warn_of_newer(newest)
            if expendable:
                # The newest may come from a save that was killed before its rename was durable.
                sync_directory(filesystem, root)
            for old in expendable:
                trash = root / f".trash-{old.name}"
                if trash.exists():  # left over from the same step, where removal failed
                    trash = _numbered(root, trash.name)
                filesystem.rename(old, trash)
                sync_directory(filesystem, root)
                _remove(filesystem, trash)
    except (OSError, CheckpointError) as error:
        warnings.warn(
            f"{root}: old checkpoints were not removed ({error})", SaveWarning, stacklevel=2
        )


def warn_of_newer(saved: Path) -> None:
    """Warn of checkpoints of higher steps than the one saved last: a load would take them."""
    root, last = saved.parent, step_of(saved) or 0
    newer = [path.name for path in checkpoints(root) if (step_of(path) or 0) > last]
    if newer:
        warnings.warn(
            f"{root}: {', '.join(newer)} would be loaded as the newest, and this run has gone back "
            "to before; they are left as they are: move them away, or save to another directory",
            SaveWarning,
            stacklevel=3,
        )
