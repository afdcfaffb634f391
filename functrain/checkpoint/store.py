"""Saving and loading: a temporary directory, fsync, the manifest last, one rename."""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from functrain.architecture import check_names
from functrain.checkpoint import format as safetensors
from functrain.checkpoint.environment import compare, numerics
from functrain.checkpoint.files import (
    Contents,
    hashed,
    read_file,
    side_by_side,
    verify_file,
    whole,
    write_file,
    written,
)
from functrain.checkpoint.filesystem import (
    OPERATING_SYSTEM,
    FileSystem,
    reading,
    remove_directory,
    sync_directory,
)
from functrain.checkpoint.layout import decode, encode, numbers, placed
from functrain.checkpoint.manifest import (
    MANIFEST,
    STATE,
    File,
    Manifest,
    checked_name,
    checkpoints,
    directory_name,
    latest,
    located,
    read_manifest,
    to_bytes,
)
from functrain.checkpoint.retention import Keep
from functrain.errors import ArchitectureError, CheckpointError, SaveWarning
from functrain.state import Leaf, TrainState, check_state, device_of
from functrain.trees import Tensors, select

PathLike = str | os.PathLike[str]
Found = TypeVar("Found")
_ATTEMPTS = 10


def save(
    directory: PathLike,
    state: TrainState,
    *,
    metrics: Mapping[str, float] | None = None,
    conditions: Mapping[str, Any] | None = None,
    beside: Mapping[str, str] | None = None,
    filesystem: FileSystem = OPERATING_SYSTEM,
) -> Path:
    """Write `state` to `directory/step-…`, durable when this returns; the path of it.

    A reader sees the whole checkpoint or none: the files go to a temporary directory, are fsynced,
    the manifest last, and one rename puts them in place. The step's checkpoint being there already
    is fine where it holds the same state, and raises `CheckpointError` where it does not; one that
    is damaged is put aside.

    `metrics` are written into the manifest, for `prune` to keep the best by. So are the numerics
    that the bits depend on, and `conditions`, the caller's own part of them (the number of
    micro-batches, say). `beside` are texts to lie with them, by their file names: with a
    `config.json` (`functrain.models.config_files`) transformers reads the directory as it is. Peak
    memory is the state's own: nothing is copied from the CPU.
    """
    check_state(state)
    under = {**numerics(device_of(state.params)), **(conditions or {})}
    return save_under(
        under, directory, state, metrics=metrics, beside=beside, filesystem=filesystem
    )


def save_under(
    under: Mapping[str, Any],
    directory: PathLike,
    state: TrainState,
    *,
    metrics: Mapping[str, float] | None = None,
    beside: Mapping[str, str] | None = None,
    filesystem: FileSystem = OPERATING_SYSTEM,
) -> Path:
    """`save` with numerics that were found before: another thread has its own number of threads."""
    root = Path(directory)
    found = {name: float(value) for name, value in (metrics or {}).items()}
    texts: dict[str, Contents] = {
        checked_name(name): [memoryview(text.encode())] for name, text in (beside or {}).items()
    }
    try:
        _make_root(filesystem, root)
        with _locked(filesystem, root):
            sweep(filesystem, root)
            return _placed(filesystem, root, state, found, under, texts)
    except OSError as error:
        raise CheckpointError(
            f"{root}: step {state.step} could not be saved ({error.strerror or error}); earlier "
            "checkpoints are as they were"
        ) from error


def _make_root(filesystem: FileSystem, root: Path) -> None:
    """Make the directory and those above it, all durable before a save is acknowledged."""
    missing = [directory for directory in (root, *root.parents) if not directory.is_dir()]
    for directory in reversed(missing):
        filesystem.mkdir(directory)
    if not checkpoints(root):
        # Also those that are there: a save that was killed here may have made them a moment ago.
        _sync_above(filesystem, root)


def _sync_above(filesystem: FileSystem, root: Path) -> None:
    for directory in (root, *root.parents):
        if directory.is_mount():
            return
        try:
            sync_directory(filesystem, directory.parent)
        except PermissionError:
            return  # What cannot be read was there before: nobody here has made it.


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
        if not _whole(filesystem, target):
            _put_aside(filesystem, target)
        elif _same(filesystem, target, files):
            # The save that put it there may have been killed before its rename was durable.
            sync_directory(filesystem, root)
            return target
        else:
            raise CheckpointError(
                f"{target}: exists and holds another state; save to a fresh directory, or remove it"
            )
    temporary = root / f".tmp-{name}"
    filesystem.mkdir(temporary)
    try:
        entries = written(filesystem, temporary, files)
        manifest = Manifest(step=state.step, files=entries, metrics=metrics, numerics=under)
        write_file(filesystem, temporary / MANIFEST, [memoryview(to_bytes(manifest))])
        sync_directory(filesystem, temporary)
        filesystem.rename(temporary, target)
    except BaseException:
        _discard(filesystem, temporary)
        raise
    try:
        sync_directory(filesystem, root)
    except OSError as error:
        # Not tried again: after a failed fsync a second one may succeed without having written.
        raise CheckpointError(
            f"{target}: written and in place, but whether it would survive a power cut is unknown "
            f"({error.strerror or error}); check the disk, and save the next step"
        ) from error
    return target


def _whole(filesystem: FileSystem, target: Path) -> bool:
    """Whether a checkpoint can be read: every file is there and has its hash."""
    try:
        entries = read_manifest(filesystem, target).files
        return all(verify_file(filesystem, target / n, entry) for n, entry in entries.items())
    except CheckpointError:
        return False


def _put_aside(filesystem: FileSystem, target: Path) -> None:
    """Give the name of a damaged checkpoint free; what is left of it is kept, and said."""
    taken = {path.name for path in target.parent.iterdir()}
    names = (f".damaged-{target.name}-{number}" for number in itertools.count(1))
    aside = target.parent / next(name for name in names if name not in taken)
    filesystem.rename(target, aside)
    sync_directory(filesystem, target.parent)
    warnings.warn(
        f"{target}: was damaged and is now {aside.name}; the same step is saved anew",
        SaveWarning,
        stacklevel=2,
    )


def _same(filesystem: FileSystem, target: Path, files: Mapping[str, Contents]) -> bool:
    """Whether a checkpoint holds these files, by the hashes of its manifest."""
    entries = read_manifest(filesystem, target).files
    return entries.keys() == files.keys() and all(
        hashed(contents) == entries[name] for name, contents in files.items()
    )


def _discard(filesystem: FileSystem, temporary: Path) -> None:
    """Give the space of a failed save back now; what stays, the next save sweeps away."""
    try:
        remove_directory(filesystem, temporary)
    except OSError:
        return


@contextmanager
def _locked(filesystem: FileSystem, root: Path) -> Iterator[None]:
    with ExitStack() as held:
        try:
            held.enter_context(filesystem.locked(root / ".lock"))
        except BlockingIOError as error:
            raise CheckpointError(
                f"{root}: another process is saving here; give each run its own directory"
            ) from error
        yield


def sweep(filesystem: FileSystem, root: Path) -> None:
    """Remove what a killed save or prune left behind; the lock is held."""
    names = [n for n in filesystem.list(root) if n.startswith((".tmp-step-", ".trash-step-"))]
    if names:
        # A rename to .trash-* that is not durable yet could be undone when its files are gone.
        sync_directory(filesystem, root)
    for name in names:
        remove_directory(filesystem, root / name)


def load(
    directory: PathLike,
    *,
    like: TrainState,
    strict: bool = False,
    conditions: Mapping[str, Any] | None = None,
    older: bool = False,
    filesystem: FileSystem = OPERATING_SYSTEM,
) -> TrainState:
    """The state in `directory`, a checkpoint or a directory of them (then the newest).

    `like` gives the form: names, shapes, dtypes and devices, as `step.init(params, buffers)` makes
    it; its values do not matter. Every file's size and sha256 are checked, over the very bytes
    that become tensors, in memory of their own. Raises `CheckpointError` for what is missing,
    altered, or of another architecture, optimizer or precision, naming the first difference.

    Where the numerics or the `conditions` are not those of the save, so that the bits will part,
    `NumericsWarning` says what differs; with `strict` it is an error. The newest checkpoint being
    invalid is an error too, unless `older` allows the newest valid one, with a warning.
    """
    check_state(like, "like")
    expected = {**numerics(device_of(like.params)), **(conditions or {})}

    def read(path: Path) -> TrainState:
        manifest, stored = read_leaves(filesystem, path)
        state = decode(stored, like, path)
        if state.step != manifest.step:
            raise CheckpointError(
                f"{path}: holds step {state.step}, and its manifest says {manifest.step}"
            )
        asked = {name: manifest.numerics.get(name) for name in expected}
        compare(asked, expected, path, strict=strict)
        return state

    if not older:
        return newest(directory, read)
    state, refused = newest(directory, lambda path: _newest_valid(Path(directory), path, read))
    for reason in refused:
        warnings.warn(f"passed over: {reason}", SaveWarning, stacklevel=2)
    return state


def newest(directory: PathLike, read: Callable[[Path], Found]) -> Found:
    """What `read` makes of a checkpoint or, of a directory of them, of the newest.

    Beside a run that prunes, the newest may go while it is read: then there is a newer one, and
    that is read instead. In the place of a checkpoint that was itself named no other is.
    """
    root = Path(directory)
    with reading(root):
        for _ in range(_ATTEMPTS):
            path = located(root)
            try:
                return read(path)
            except CheckpointError:
                if path == root or latest(root) in (None, path):
                    raise
        raise CheckpointError(f"{root}: its checkpoints vanish faster than they can be read")


def _newest_valid(root: Path, path: Path, read: Callable[[Path], Found]) -> tuple[Found, list[str]]:
    """What `read` makes of the newest valid checkpoint, and why those after it were refused."""
    if path == root:
        return read(path), []
    refused: list[str] = []
    for each in reversed(checkpoints(root)):
        try:
            return read(each), refused
        except CheckpointError as error:
            if latest(root) != path:
                raise  # It went, as there is a newer one: nothing is passed over.
            refused.append(str(error))
    raise CheckpointError("\n".join([f"{root}: holds no valid checkpoint", *refused]))


def read_leaves(filesystem: FileSystem, path: Path) -> tuple[Manifest, dict[str, Leaf]]:
    """A checkpoint's manifest and every leaf by its path, verified."""
    manifest = read_manifest(filesystem, path)
    names = [name for name in manifest.files if name != STATE]

    def read(name: str) -> dict[str, Leaf]:
        if not name.endswith(".safetensors"):
            read_file(filesystem, path / name, manifest.files[name], whole)
            return {}
        items = read_file(filesystem, path / name, manifest.files[name], safetensors.read)
        return placed(name.removesuffix(".safetensors"), items)

    size = sum(entry.size for entry in manifest.files.values())
    stored = read_file(filesystem, path / STATE, manifest.files[STATE], numbers)
    for leaves in side_by_side(read, names, size):
        twice = sorted(stored.keys() & leaves.keys())
        if twice:
            raise CheckpointError(f"{path / STATE}: {twice[0]} is a tensor of another file already")
        stored |= leaves
    return manifest, stored


def load_model(
    directory: PathLike,
    params: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    *,
    filesystem: FileSystem = OPERATING_SYSTEM,
) -> tuple[Tensors, Tensors]:
    """The params and buffers of a checkpoint, whatever optimizer and stage made it.

    `params` and `buffers` give the names, shapes, dtypes and devices, as `split` returns them: the
    values are converted to those.
    """

    def read(path: Path) -> tuple[Tensors, Tensors]:
        entries = read_manifest(filesystem, path).files
        model, other = path / "model.safetensors", path / "buffers.safetensors"
        return (
            _read_as(filesystem, model, entries[model.name], params),
            _read_as(filesystem, other, entries[other.name], buffers),
        )

    return newest(directory, read)


def _read_as(
    filesystem: FileSystem, path: Path, entry: File, like: Mapping[str, Tensor]
) -> Tensors:
    items = read_file(filesystem, path, entry, safetensors.read)
    try:
        check_names(items, like, path.name, "the checkpoint is of another architecture")
    except ArchitectureError as error:
        raise CheckpointError(f"{path.parent}: {error}") from error
    for key, tensor in items.items():
        if tensor.shape != like[key].shape:
            raise CheckpointError(
                f"{path}: {key} has shape {list(tensor.shape)}, expected "
                f"{list(like[key].shape)}; the checkpoint is of another architecture"
            )
    return Tensors({k: t.to(like[k].device, like[k].dtype) for k, t in items.items()})


def load_tensors(
    directory: PathLike, *patterns: str, filesystem: FileSystem = OPERATING_SYSTEM
) -> Tensors:
    """The tensors of a checkpoint whose paths match a shell pattern, `params/*` or `*/head.weight`.

    Paths are those of `functrain.fingerprints`. A pattern without a match raises `StateError`.
    """
    _, stored = newest(directory, lambda path: read_leaves(filesystem, path))
    return select({p: leaf for p, leaf in stored.items() if isinstance(leaf, Tensor)}, *patterns)


def prune(
    directory: PathLike,
    keep: int | Keep,
    *,
    filesystem: FileSystem = OPERATING_SYSTEM,
) -> None:
    """Remove the checkpoints that `keep` does not hold on to; a failure is a warning.

    Each is renamed first, so that a reader never finds a checkpoint with files missing.
    """
    root = Path(directory)
    policy = keep if isinstance(keep, Keep) else Keep(last=keep)
    try:
        with _locked(filesystem, root):
            expendable = policy.expendable(filesystem, root)
            if expendable:
                # The newest may be of a save that was killed before its rename was durable.
                sync_directory(filesystem, root)
            for old in expendable:
                trash = root / f".trash-{old.name}"
                filesystem.rename(old, trash)
                sync_directory(filesystem, root)
                remove_directory(filesystem, trash)
    except (OSError, CheckpointError) as error:
        warnings.warn(
            f"{root}: old checkpoints were not removed ({error})", SaveWarning, stacklevel=2
        )
