"""Loading a state, a model, or tensors by name, each verified."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from functrain.architecture import check_names
from functrain.checkpoint import format as safetensors
from functrain.checkpoint.environment import compare, conditioned
from functrain.checkpoint.files import Fill, map_file, passed, read_file, side_by_side
from functrain.checkpoint.filesystem import OPERATING_SYSTEM, FileSystem, reading
from functrain.checkpoint.layout import check_base, decode, numbers, path_of, placed
from functrain.checkpoint.manifest import (
    STATE,
    File,
    Manifest,
    checkpoints,
    latest,
    located,
    read_manifest,
)
from functrain.checkpoint.store import world_for
from functrain.checks import PathLike, as_path, check_boolean
from functrain.distributed import World
from functrain.errors import ArchitectureError, CheckpointError, ConfigError, SaveWarning
from functrain.state import Leaf, TrainState, check_state, device_of, leaves
from functrain.trees import Tensors, is_sharded, owning, select

Found = TypeVar("Found")
_LATER = frozenset({"head", "layout"})
"""Conditions that older checkpoints do not record; where absent, they are not compared."""
_ATTEMPTS = 100
"""Reads of a newest checkpoint that may each be pruned: a fast writer wins ten times in a row."""


def load(
    directory: PathLike,
    *,
    like: TrainState,
    strict: bool = False,
    conditions: Mapping[str, Any] | None = None,
    older: bool = False,
    world: World | None = None,
    filesystem: FileSystem = OPERATING_SYSTEM,
) -> TrainState:
    """Load the state in `directory`: a checkpoint, or a directory of them (then the newest).

    `like` gives the structure: names, shapes, dtypes and devices, as `step.init(params, buffers)`
    makes it; its values do not matter. Every file's size and sha256 are checked, over the very
    bytes that become tensors, in memory of their own. Raises `CheckpointError` for what is missing,
    altered, or of another architecture, optimizer or precision, naming the first difference.

    If the numerics or the `conditions` differ from those of the save, so that the run will not
    continue with the same bits, a `NumericsWarning` says what differs; with `strict` it is a
    `CheckpointError`. An invalid newest checkpoint is an error too, unless `older` permits the
    newest valid one, with a warning.

    If `like` is in shards, every worker of its `world` calls this: worker 0 chooses the checkpoint,
    and each worker keeps only its rows, whatever number of workers saved it. `older` is then a
    `ConfigError`.
    """
    check_state(like, "like")
    check_boolean("strict", strict)
    check_boolean("older", older)
    options: dict[str, Any] = {"strict": strict, "conditions": conditions, "older": older}
    options["most"] = _most_bytes(like)
    if is_sharded(like.params):
        own = world_for(world, "load")
        return _load_rows(directory, like, own, filesystem, options)
    return _load(directory, like, filesystem=filesystem, **options)


def _most_bytes(like: TrainState) -> int:
    """An upper bound on the bytes of tensors of any state like this one; more need not be read.

    It is generous: it allows for headers, for wider dtypes, and for slots that `like` does not have
    yet, among them a matrix per dimension of a param, as Shampoo and SOAP keep for short ones.
    """
    tensors = [leaf for _, leaf in leaves(like) if isinstance(leaf, Tensor)]
    sides = [min(side, _LONG) ** 2 for param in like.params.values() for side in param.shape]
    numbers = sum(tensor.numel() for tensor in tensors)
    return 4 * safetensors.MOST_HEADER + 64 * numbers + 32 * sum(sides)


_LONG = 1 << 14


Rows = Callable[[str, safetensors.Entry, Path], tuple[int, int] | None]


def _load(
    directory: PathLike,
    like: TrainState,
    *,
    strict: bool,
    conditions: Mapping[str, Any] | None,
    older: bool,
    filesystem: FileSystem,
    most: int,
    rows: Rows = lambda *_: None,
) -> TrainState:
    expected = conditioned(device_of(like.params), conditions)

    def read(path: Path) -> TrainState:
        manifest, stored = read_leaves(filesystem, path, rows=rows, most=most)
        state = decode(stored, like, path)
        if state.step != manifest.step:
            raise CheckpointError(
                f"{path}: holds step {state.step}, and its manifest says {manifest.step}"
            )
        untold = _LATER - manifest.numerics.keys()
        known = {name: value for name, value in expected.items() if name not in untold}
        compare(manifest.numerics, known, path, strict=strict)
        return state

    if not older:
        return newest(directory, read)
    root = as_path("directory", directory)
    state, refused = newest(root, lambda path: _newest_valid(root, path, read))
    for reason in refused:
        warnings.warn(f"passed over: {reason}", SaveWarning, stacklevel=2)
    return state


def _load_rows(
    directory: PathLike,
    like: TrainState,
    world: World,
    filesystem: FileSystem,
    options: Mapping[str, Any],
) -> TrainState:
    """A checkpoint's state in shards, loaded by all workers, or an error on each of them."""
    # Here, since DTensor takes a second to import.
    from functrain.checkpoint.sharded import rows_in
    from functrain.distributed.shards import local_state, whole_state

    if options["older"]:
        raise ConfigError("load: older=True is not for a state in shards; name the checkpoint")
    path = world.from_first(lambda: str(located(directory)), "the choice of a checkpoint")
    rows = world.for_all(
        lambda: _load(
            path,
            local_state(like),
            filesystem=filesystem,
            rows=rows_in(like, world),
            **options,
        )
    )
    shapes = {name: tensor.shape for name, tensor in like.params.items()}
    return whole_state(rows, shapes, world)


def newest(directory: PathLike, read: Callable[[Path], Found]) -> Found:
    """What `read` makes of a checkpoint or, in a directory of them, of the newest.

    A run that prunes may remove the newest while it is being read; by then there is a newer one,
    which is read instead. A checkpoint named directly is never replaced by another.
    """
    root = as_path("directory", directory)
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
    """What `read` makes of the newest valid checkpoint, and why newer ones were refused."""
    if path == root:
        return read(path), []
    refused: list[str] = []
    for each in reversed(checkpoints(root)):
        try:
            return read(each), refused
        except CheckpointError as error:
            if latest(root) != path:
                raise  # Pruned, since there is a newer one: it is not passed over.
            refused.append(str(error))
    raise CheckpointError("\n".join([f"{root}: holds no valid checkpoint", *refused]))


def read_leaves(
    filesystem: FileSystem,
    path: Path,
    *,
    mapped: bool = False,
    rows: Rows = lambda *_: None,
    most: int | None = None,
) -> tuple[Manifest, dict[str, Leaf]]:
    """A checkpoint's manifest and every leaf by its path, verified.

    `mapped`: as in `load_tensors`. `rows`: which rows to keep of the tensor at a path. `most`: the
    limit on the bytes of tensors; a larger checkpoint is refused before any are read.
    """
    manifest = read_manifest(filesystem, path)
    tensors = sum(e.size for name, e in manifest.files.items() if name.endswith(".safetensors"))
    if most is not None and tensors > most:
        raise CheckpointError(
            f"{path}: {tensors:,} bytes of tensors, far more than a state as `like` has; the "
            "checkpoint is of another architecture"
        )
    names = [name for name in manifest.files if name != STATE]

    def read(name: str) -> dict[str, Leaf]:
        if not name.endswith(".safetensors"):
            read_file(filesystem, path / name, manifest.files[name], passed)
            return {}
        if mapped:
            items = map_file(filesystem, path / name, manifest.files[name])
        else:
            items = read_file(filesystem, path / name, manifest.files[name], _reading(name, rows))
        return placed(name.removesuffix(".safetensors"), items)

    size = sum(entry.size for entry in manifest.files.values())
    stored = read_file(filesystem, path / STATE, manifest.files[STATE], numbers)
    for found in side_by_side(read, names, size):
        twice = sorted(stored.keys() & found.keys())
        if twice:
            raise CheckpointError(f"{path / STATE}: {twice[0]} is a tensor of another file already")
        stored |= found
    return manifest, stored


def _reading(name: str, rows: Rows) -> Callable[[Fill, int, Path], Tensors]:
    """A parser of a file of tensors that keeps only these rows."""
    file = name.removesuffix(".safetensors")

    def read(fill: Fill, size: int, path: Path) -> Tensors:
        return safetensors.read(
            fill, size, path, lambda entry: rows(path_of(file, entry.name), entry, path)
        )

    return read


def load_model(
    directory: PathLike,
    params: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    *,
    base: str | None = None,
    world: World | None = None,
    filesystem: FileSystem = OPERATING_SYSTEM,
) -> tuple[Tensors, Tensors]:
    """Load the params and buffers of a checkpoint, whatever optimizer and stage made it.

    `params` and `buffers` give the names, shapes, dtypes and devices, as `split` returns them; the
    values are converted to these. `base`, for adapters, is the fingerprint of the frozen params
    under them (`state.base`); adapters trained over another base are refused.

    `world`: for a step with `sharded=True`. Every worker calls this and keeps only its rows of the
    params, on the world's device; `params` may be the architecture's own, without values, even in a
    world of 1.
    """
    if world is not None and world.size > 1:
        return _load_model_rows(directory, params, buffers, base, world, filesystem)
    device = None if world is None else world.device
    return _load_model(directory, params, buffers, base, filesystem, device=device)


def _load_model_rows(
    directory: PathLike,
    params: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    base: str | None,
    world: World,
    filesystem: FileSystem,
) -> tuple[Tensors, Tensors]:
    # Here, since DTensor takes a second to import.
    from functrain.checkpoint.sharded import part_of
    from functrain.distributed.shards import sharded

    def rows(_place: str, entry: safetensors.Entry, _where: Path) -> tuple[int, int] | None:
        return part_of(entry.shape[0], world) if entry.shape else None

    path = world.from_first(lambda: str(located(directory)), "the choice of a checkpoint")
    manifest = world.for_all(lambda: read_manifest(filesystem, Path(path)))
    # Rows of different models would make a mixture that no later comparison could detect.
    world.agree({n: f"{e.size} {e.sha256}" for n, e in manifest.files.items()}, "about the files")
    found, kept = world.for_all(
        lambda: _load_model(path, params, buffers, base, filesystem, rows, world.device)
    )
    shards = {name: sharded(own, params[name].shape, world) for name, own in found.items()}
    return owning(Tensors(shards)), kept


def _load_model(
    directory: PathLike,
    params: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    base: str | None,
    filesystem: FileSystem,
    rows: Rows = lambda *_: None,
    device: torch.device | None = None,
) -> tuple[Tensors, Tensors]:
    def read(path: Path) -> tuple[Tensors, Tensors]:
        entries = read_manifest(filesystem, path).files
        stored = read_file(filesystem, path / STATE, entries[STATE], numbers)
        check_base(stored.get("base"), base, path)
        model, other = path / "model.safetensors", path / "buffers.safetensors"
        return (
            _read_as(filesystem, model, entries[model.name], params, rows, device),
            _read_as(filesystem, other, entries[other.name], buffers, device=device),
        )

    return newest(directory, read)


def _read_as(
    filesystem: FileSystem,
    path: Path,
    entry: File,
    like: Mapping[str, Tensor],
    rows: Rows = lambda *_: None,
    device: torch.device | None = None,
) -> Tensors:
    """The tensors of a file, or these rows of them, in the dtypes and on the devices of `like`.

    `device`: the device to use instead, if any.
    """
    shapes: dict[str, tuple[int, ...]] = {}

    def parts(place: str, item: safetensors.Entry, where: Path) -> tuple[int, int] | None:
        shapes[item.name] = item.shape
        return rows(place, item, where)

    items = read_file(filesystem, path, entry, _reading(path.name, parts))
    try:
        check_names(items, like, path.name, "the checkpoint is of another architecture")
    except ArchitectureError as error:
        raise CheckpointError(f"{path.parent}: {error}") from error
    for key, tensor in items.items():
        if shapes[key] != tuple(like[key].shape):
            raise CheckpointError(
                f"{path}: {key} has shape {list(shapes[key])}, expected "
                f"{list(like[key].shape)}; the checkpoint is of another architecture"
            )
        if tensor.is_complex() and not like[key].is_complex():
            raise CheckpointError(
                f"{path}: {key} is {tensor.dtype}, expected {like[key].dtype}; the checkpoint is "
                "of another architecture"
            )
    return Tensors({k: t.to(device or like[k].device, like[k].dtype) for k, t in items.items()})


def load_tensors(
    directory: PathLike,
    *patterns: str,
    mapped: bool = False,
    filesystem: FileSystem = OPERATING_SYSTEM,
) -> Tensors:
    """The tensors of a checkpoint whose paths match a shell pattern, `params/*` or `*/head.weight`.

    Paths are those of `functrain.fingerprints`; "*" matches all. No pattern is a `ConfigError`, one
    without a match a `StateError`.

    With `mapped` the tensors are memory-mapped, for models larger than memory: the files are read
    through once to verify them, and then only the pages that are touched are in memory. Writing to
    the tensors changes no file. If another program overwrites a file, they change with it, and if
    it truncates one, the process dies of SIGBUS; functrain itself does neither (it removes files
    when pruning, which mapped tensors outlive).
    """
    if not patterns:
        raise ConfigError("load_tensors: no pattern; give some, 'params/*', or '*' for all")
    check_boolean("mapped", mapped)
    _, stored = newest(directory, lambda path: read_leaves(filesystem, path, mapped=mapped))
    return select({p: leaf for p, leaf in stored.items() if isinstance(leaf, Tensor)}, *patterns)
