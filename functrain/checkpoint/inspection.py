"""What a checkpoint holds, as plain data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
from torch import Tensor

from functrain.checkpoint.filesystem import OPERATING_SYSTEM, FileSystem
from functrain.checkpoint.layout import file_of
from functrain.checkpoint.loading import newest, read_leaves
from functrain.checkpoint.manifest import Manifest
from functrain.checks import PathLike
from functrain.state import Leaf


def inspect(directory: PathLike, *, filesystem: FileSystem = OPERATING_SYSTEM) -> dict[str, Any]:
    """A verified checkpoint as plain data.

    `path`; `leaves`: every number and text of the state by its path; `files`: each file's `size`,
    `sha256` and `tensors` (name to dtype and shape); `metrics` and `numerics` as they were saved.
    """

    def read(path: Path) -> tuple[Path, Manifest, dict[str, Leaf]]:
        return (path, *read_leaves(filesystem, path))

    path, manifest, stored = newest(directory, read)
    tensors: dict[str, dict[str, Any]] = {name: {} for name in manifest.files}
    for place, leaf in sorted(stored.items()):
        if isinstance(leaf, Tensor):
            file, name = file_of(place)
            dtype = str(leaf.dtype).removeprefix("torch.")
            tensors[f"{file}.safetensors"][name] = {"dtype": dtype, "shape": list(leaf.shape)}
    return {
        "path": str(path),
        "leaves": {p: leaf for p, leaf in stored.items() if not isinstance(leaf, Tensor)},
        "files": {
            name: {**attrs.asdict(entry), "tensors": tensors.get(name, {})}
            for name, entry in manifest.files.items()
        },
        "metrics": dict(manifest.metrics),
        "numerics": dict(manifest.numerics),
    }
