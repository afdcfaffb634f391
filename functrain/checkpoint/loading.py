"""Loading: a state, a model, or tensors by name, each verified."""

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
"""Conditions of which checkpoints of before say nothing: whether they differ is not known."""
_ATTEMPTS = 100
"""Each finds a newer checkpoint; a fast writer on a busy machine wins ten times in a row."""


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
    """The state in `directory`, a checkpoint or a directory of them (then the newest).

    `like` gives the form: names, shapes, dtypes and devices, as `step.init(params, buffers)` makes
    it; its values do not matter. Every file's size and sha256 are checked, over the very bytes
    that become tensors, in memory of their own. Raises `CheckpointError` for what is missing,
    altered, or of another architecture, optimizer or precision, naming the first difference.

    Where the numerics or the `conditions` are not those of the save, so that the bits will part,
    `NumericsWarning` says what differs; with `strict` it is an error. The newest checkpoint being
    invalid is an error too, unless `older` allows the newest valid one, with a warning.

    Where `like` is in shards every worker of its `world` calls this: each keeps its rows alone, of
    the checkpoint that worker 0 has found, whatever number of workers has saved it.
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
    """More than the tensors of any state of this form take, so that no more need be read.

    Slots that `like` has not yet, their dtypes and the headers included, and generously; among them
    matrices for each dimension of a parameter, as Shampoo and SOAP keep them where it is not long.
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
    """The state in shards of a checkpoint, by all workers, or an error on each of them."""
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
    """What `read` makes of a checkpoint or, of a directory of them, of the newest.

    Beside a run that prunes, the newest may go while it is read: then there is a newer one, and
    that is read instead. In the place of a checkpoint that was itself named no other is.
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


def read_leaves(
    filesystem: FileSystem,
    path: Path,
    *,
    mapped: bool = False,
    rows: Rows = lambda *_: None,
    most: int | None = None,
) -> tuple[Manifest, dict[str, Leaf]]:
    """A checkpoint's manifest and every leaf by its path, verified; `mapped` as `load_tensors`.

    `rows`: which rows are kept of the tensor with this path. `most`: how many bytes of tensors are
    read at most; where there are more nothing is.
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
    """A parser of a file of tensors that keeps these rows."""
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
    """The params and buffers of a checkpoint, whatever optimizer and stage made it.

    `params` and `buffers` give the names, shapes, dtypes and devices, as `split` returns them: the
    values are converted to those. `base`: the fingerprint of the frozen params under adapters, as
    a state of theirs has it; adapters that were trained over another are refused.

    `world`: for a step that is `sharded`. Every worker calls this and keeps its rows of the params
    alone, on the world's device; `params` may be the architecture's own, without values, also in a
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
    # Rows of different models would be a mixture that no later comparison could see.
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
    """The tensors of a file, as `like` has them; or these rows, on this device."""
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

    Paths are those of `functrain.fingerprints`; "*" is all. No pattern is a `ConfigError`, and one
    without a match a `StateError`.

    With `mapped` the tensors are the files' own pages: verified once, by reading them through, and
    then in memory only as far as they are touched, for models that are larger than it. Writing
    into them changes no file. Where another program overwrites such a file they change with it,
    and where it is cut short the process ends with SIGBUS; functrain itself does neither (a prune
    removes files, which mapped ones outlive).
    """
    if not patterns:
        raise ConfigError("load_tensors: no pattern; give some, 'params/*', or '*' for all")
    check_boolean("mapped", mapped)
    _, stored = newest(directory, lambda path: read_leaves(filesystem, path, mapped=mapped))
    return select({p: leaf for p, leaf in stored.items() if isinstance(leaf, Tensor)}, *patterns)
