"""Checkpoints of states in shards: every worker writes and reads its own rows of the same files.

A worker's rows are one contiguous range of each tensor's bytes, so the workers write into one file,
each at its offsets, and the result is the file that a single process would write: there is one
format, which any number of workers, a single process, or transformers can read.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import attrs
import orjson
from torch import Tensor

from functrain.checkpoint import format as safetensors
from functrain.checkpoint.files import Contents, hash_file, write_file
from functrain.checkpoint.filesystem import (
    FileSystem,
    pieces,
    sync_directory,
    write_all,
    write_all_at,
)
from functrain.checkpoint.layout import numbers_of, tensors_of
from functrain.checkpoint.manifest import (
    MANIFEST,
    STATE,
    File,
    Manifest,
    directory_name,
    read_manifest,
    to_bytes,
)
from functrain.checkpoint.store import (
    check_same,
    discard,
    durable,
    locked,
    make_root,
    put_aside,
    saving,
    sweep,
    whole,
)
from functrain.distributed import World
from functrain.distributed.shards import rows_of
from functrain.errors import CheckpointError
from functrain.state import TrainState
from functrain.trees import data_of, rows_here

_SHARED = "do all workers see the same directory? A checkpoint in shards needs a shared one"


@attrs.frozen(kw_only=True)
class _Written:
    """A file of tensors: its header and size, and the bytes that this worker writes, by offset."""

    header: memoryview
    size: int
    own: list[tuple[int, memoryview]]


def save_shards(
    root: Path,
    state: TrainState,
    world: World,
    *,
    metrics: Mapping[str, float],
    under: Mapping[str, Any],
    texts: Mapping[str, Contents],
    filesystem: FileSystem,
) -> Path:
    """`functrain.save` of a state in shards, by all workers: the path, or an error on each of them.

    Worker 0 creates the directory and the files, every worker writes, fsyncs and hashes its share,
    and when all have done so, worker 0 puts the manifest and the directory in place.
    """
    name = directory_name(state.step)
    # A fresh name each time: a worker left behind must not write into a later save's files.
    suffix = world.from_first(lambda: secrets.token_hex(4), "the name of a save")
    temporary, target = root / f".tmp-{name}-{suffix}", root / name
    files = {f"{n}.safetensors": _written(items, world) for n, items in tensors_of(state).items()}
    plain = {**texts, STATE: numbers_of(state)}
    with ExitStack() as held:

        def begun() -> str:
            with saving(root, state.step):
                make_root(filesystem, root)
                held.enter_context(locked(filesystem, root))
                sweep(filesystem, root)
                filesystem.mkdir(temporary)
                held.callback(discard, filesystem, temporary)
                for file, written in files.items():
                    _make(filesystem, temporary / file, written)
                entries = {n: write_file(filesystem, temporary / n, c) for n, c in plain.items()}
            return orjson.dumps({n: attrs.astuple(e) for n, e in entries.items()}).decode()

        entries = orjson.loads(world.from_first(begun, "the beginning of a save"))

        def wrote() -> None:
            with saving(root, state.step):
                for file, written in files.items():
                    _write(filesystem, temporary / file, written)

        world.for_all(wrote)
        entries |= _hashed(filesystem, temporary, files, world)

        def ended() -> str:
            found = {file: File(*entry) for file, entry in entries.items()}
            manifest = Manifest(step=state.step, files=found, metrics=metrics, numerics=under)
            with saving(root, state.step):
                _place(filesystem, temporary, target, manifest)
            return ""

        world.from_first(ended, "the end of a save")
    return target


def _written(items: Mapping[str, Tensor], world: World) -> _Written:
    header, begins = safetensors.laid_out(items)
    size, own = len(header), list[tuple[int, memoryview]]()
    for name, begin in begins.items():
        tensor = items[name]
        size = begin + tensor.numel() * tensor.dtype.itemsize
        data = data_of(rows_here(tensor))
        if rows_here(tensor) is tensor:
            own += [(begin, data)] if world.speaks else []
            continue
        most = -(-len(tensor) // world.size) * (tensor.numel() // max(1, len(tensor)))
        own.append((begin + world.rank * most * tensor.dtype.itemsize, data))
    return _Written(header=header, size=size, own=own)


def _make(filesystem: FileSystem, path: Path, written: _Written) -> None:
    descriptor = filesystem.create(path)
    try:
        write_all(filesystem, descriptor, written.header)
        filesystem.sync(descriptor)
    finally:
        filesystem.close(descriptor)


def _write(filesystem: FileSystem, path: Path, written: _Written) -> None:
    if not any(len(data) for _, data in written.own):
        return
    try:
        descriptor = filesystem.open_to_write(path)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path}: worker 0 has made it, and it is not here; {_SHARED}"
        ) from error
    try:
        for begin, data in written.own:
            for piece in pieces(data):
                write_all_at(filesystem, descriptor, piece, begin)
                begin += len(piece)
        filesystem.sync(descriptor)
    finally:
        filesystem.close(descriptor)


def _hashed(
    filesystem: FileSystem, directory: Path, files: Mapping[str, _Written], world: World
) -> dict[str, Any]:
    """The size and hash of every file; each file is read by one of the workers."""
    largest = sorted(files, key=lambda file: -files[file].size)
    mine = [file for turn, file in enumerate(largest) if turn % world.size == world.rank]

    def hashes() -> dict[str, Any]:
        found = {}
        for file in mine:
            entry = hash_file(filesystem, directory / file)
            if entry.size != files[file].size:
                raise CheckpointError(
                    f"{directory / file}: {entry.size} bytes, expected {files[file].size}; "
                    + _SHARED
                )
            found[file] = attrs.astuple(entry)
        return found

    own = orjson.dumps(world.for_all(hashes))
    every: dict[str, Any] = {}
    for told in world.payloads(own, "the exchange of hashes"):
        every |= orjson.loads(told)
    return every


def _place(filesystem: FileSystem, temporary: Path, target: Path, manifest: Manifest) -> None:
    """Write the manifest and rename the directory into place.

    An existing checkpoint is treated as by `functrain.save`: it stays if it holds the same, is put
    aside if it is damaged, and is an error if it holds another state.
    """
    if target.exists():
        if not whole(filesystem, target):
            put_aside(filesystem, target)
        else:
            check_same(target, read_manifest(filesystem, target), manifest.files, manifest.metrics)
            sync_directory(filesystem, target.parent)
            return
    write_file(filesystem, temporary / MANIFEST, [memoryview(to_bytes(manifest))])
    sync_directory(filesystem, temporary)
    filesystem.rename(temporary, target)
    durable(filesystem, target)


def rows_in(like: TrainState, world: World) -> Callable[[str, safetensors.Entry, Path], Any]:
    """Which rows this worker keeps of the tensor at a path: begin and end, or None for all."""
    params = like.params

    def rows(place: str, entry: safetensors.Entry, where: Path) -> tuple[int, int] | None:
        name = _parameter(place)
        if name not in params or (place.startswith("optimizer/") and not entry.shape):
            return None
        if entry.shape != tuple(params[name].shape):
            raise CheckpointError(
                f"{where}: {place} has shape {list(entry.shape)}, expected "
                f"{list(params[name].shape)}; the checkpoint is of another architecture"
            )
        return part_of(entry.shape[0], world)

    return rows


def part_of(count: int, world: World) -> tuple[int, int]:
    """Which of `count` rows this worker keeps: begin and end."""
    rows = rows_of(count, world.rank, world.size)
    return rows.begin, rows.end


def _parameter(place: str) -> str:
    """The name of the param that the tensor at this path belongs to, or one that no param has."""
    prefix, _, name = place.partition("/")
    if prefix == "optimizer":
        return name.removeprefix("slots/").partition("/")[2]
    return name if prefix in ("params", "average", "reference") else ""
