"""What a checkpoint holds, as plain data."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import orjson

from functrain.checkpoint.manifest import (
    STATE,
    located,
    parsed_json,
    read_manifest,
    read_verified,
)
from functrain.errors import CheckpointError


def inspect(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """A verified checkpoint as plain data.

    `path`; `leaves`: every number of the state by its path; `files`: for each file its `size`,
    `sha256` and `tensors` (name to dtype and shape).
    """
    path = located(directory)
    files: dict[str, Any] = {}
    numbers: dict[str, Any] = {}
    for name, entry in read_manifest(path).items():
        data = read_verified(path, name, entry)
        if name == STATE:
            numbers = parsed_json(data, path / name)["leaves"]
        tensors = None if name == STATE else _header(data, path / name)
        files[name] = {**entry, "tensors": tensors or dict[str, Any]()}
    return {"path": str(path), "leaves": numbers, "files": files}


def _header(data: bytes, path: Path) -> dict[str, dict[str, Any]]:
    length = int.from_bytes(data[:8], "little")
    try:
        header = orjson.loads(data[8 : 8 + length])
    except orjson.JSONDecodeError as error:
        raise CheckpointError(f"{path}: not a safetensors file ({error})") from error
    return {
        name: {"dtype": tensor["dtype"], "shape": tensor["shape"]}
        for name, tensor in sorted(header.items())
        if name != "__metadata__"
    }
