"""Saving and loading: a temporary directory, fsync, the manifest last, one rename."""

from __future__ import annotations

import fcntl
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from functrain.architecture import check_names
from functrain.checkpoint.layout import decode, decode_tensors, encode
from functrain.checkpoint.manifest import (
    MANIFEST,
    checkpoints,
    directory_name,
    located,
    manifest_bytes,
    read_manifest,
    read_verified,
    step_of,
)
from functrain.errors import ArchitectureError, CheckpointError
from functrain.state import TrainState, check_state
from functrain.trees import Tensors


def save(directory: str | os.PathLike[str], state: TrainState) -> Path:
    """Write `state` to `directory/step-…`, durable when this returns; the path of it.

    A reader sees the whole checkpoint or none: the files go to a temporary directory, are fsynced,
    the manifest last, and one rename puts them in place. The step's checkpoint being there already
    is fine where it holds the same state, and raises `CheckpointError` where it does not.
    """
    check_state(state)
    root = Path(directory)
    try:
        root.mkdir(parents=True, exist_ok=True)
        files = encode(state)
        files[MANIFEST] = manifest_bytes(files)
        with _locked(root):
            _sweep(root)
            return _placed(root, directory_name(state.step), files)
    except OSError as error:
        raise CheckpointError(
            f"{root}: step {state.step} could not be saved ({error.strerror or error}); earlier "
            "checkpoints are as they were"
        ) from error


def _placed(root: Path, name: str, files: Mapping[str, bytes]) -> Path:
    target = root / name
    if target.exists():
        manifest = target / MANIFEST
        if manifest.is_file() and manifest.read_bytes() == files[MANIFEST]:
            return target
        raise CheckpointError(
            f"{target}: exists and holds another state; save to a fresh directory, or remove it"
        )
    temporary = root / f".tmp-{name}"
    temporary.mkdir()
    for file, data in files.items():
        _write(temporary / file, data)
    _sync_directory(temporary)
    temporary.rename(target)
    _sync_directory(root)
    return target


def _write(path: Path, data: bytes) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    with os.fdopen(os.open(path, flags, 0o644), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    with (root / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(
                f"{root}: another process is saving here; give each run its own directory"
            ) from error
        yield


def _sweep(root: Path) -> None:
    """Remove what a killed save or prune left behind; the lock is held."""
    for leftover in (*root.glob(".tmp-step-*"), *root.glob(".trash-step-*")):
        shutil.rmtree(leftover)


def load(directory: str | os.PathLike[str], *, like: TrainState) -> TrainState:
    """The state in `directory`, a checkpoint or a directory of them (then the newest).

    `like` gives the form: names, shapes, dtypes and devices, as `step.init(params, buffers)` makes
    it; its values do not matter. Every file's size and sha256 are checked. Raises
    `CheckpointError` for what is missing, altered, or of another architecture, optimizer or
    precision, naming the first difference.
    """
    check_state(like, "like")
    path = located(directory)
    entries = read_manifest(path)
    files = {name: read_verified(path, name, entry) for name, entry in entries.items()}
    state = decode(files, like, path)
    named = step_of(path)
    if named is not None and named != state.step:
        raise CheckpointError(f"{path}: holds step {state.step}, and its name says {named}")
    return state


def load_model(
    directory: str | os.PathLike[str], params: Mapping[str, Tensor], buffers: Mapping[str, Tensor]
) -> tuple[Tensors, Tensors]:
    """The params and buffers of a checkpoint, whatever optimizer and stage made it.

    `params` and `buffers` give the names, shapes, dtypes and devices, as `split` returns them.
    """
    path = located(directory)
    entries = read_manifest(path)

    def read(name: str, like: Mapping[str, Tensor]) -> Tensors:
        file = f"{name}.safetensors"
        items = decode_tensors(read_verified(path, file, entries[file]), path / file)
        try:
            check_names(items, like, file, "the checkpoint is of another architecture")
        except ArchitectureError as error:
            raise CheckpointError(f"{path}: {error}") from error
        for key, tensor in items.items():
            if tensor.shape != like[key].shape:
                raise CheckpointError(
                    f"{path / file}: {key} has shape {list(tensor.shape)}, expected "
                    f"{list(like[key].shape)}; the checkpoint is of another architecture"
                )
        return Tensors({k: t.to(like[k].device, like[k].dtype) for k, t in items.items()})

    return read("model", params), read("buffers", buffers)


def prune(directory: str | os.PathLike[str], keep: int) -> None:
    """Remove all but the newest `keep` checkpoints; a failure is a warning, never an error.

    Each is renamed first, so that a reader never finds a checkpoint with files missing.
    """
    if keep < 1:
        raise CheckpointError(f"keep: {keep}, expected at least 1")
    root = Path(directory)
    try:
        with _locked(root):
            for old in checkpoints(root)[:-keep]:
                trash = root / f".trash-{old.name}"
                old.rename(trash)
                _sync_directory(root)
                shutil.rmtree(trash)
    except OSError as error:
        warnings.warn(f"{root}: old checkpoints were not removed ({error})", stacklevel=2)
