"""A state as files, and files as a state: which leaf goes where, and under which name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import orjson
import safetensors
import safetensors.torch
from torch import Tensor

from functrain.checkpoint.manifest import FILES, FORMAT, STATE, parsed_json
from functrain.errors import CheckpointError, did_you_mean
from functrain.state import Leaf, TrainState, leaves
from functrain.trees import Tensors

_PREFIXES = {"params/": "model", "buffers/": "buffers", "optimizer/slots/": "optimizer"}
_HINTS = {
    "params": "the checkpoint is of another architecture",
    "buffers": "the checkpoint is of another architecture",
    "optimizer": "the checkpoint was made with another optimizer",
    "scaler": "the checkpoint was made with another precision",
    "scheduler": "the checkpoint was made with another schedule",
    "average": "the checkpoint was made with another ema_decay",
    "reference": "the checkpoint was made by another method",
}


def encode(state: TrainState) -> dict[str, bytes]:
    """The contents of every file but the manifest."""
    tensors: dict[str, dict[str, Tensor]] = {name: {} for name in FILES}
    numbers: dict[str, Any] = {}
    for path, leaf in leaves(state):
        if isinstance(leaf, Tensor):
            file, name = _place(path)
            tensors[file][name] = leaf.detach().cpu().contiguous()
        else:
            numbers[path] = _encoded(leaf)
    body = {"leaves": numbers, "slots": sorted(state.optimizer.slots), "version": FORMAT}
    files = {f"{name}.safetensors": _safetensors(items) for name, items in tensors.items()}
    options = orjson.OPT_SORT_KEYS | orjson.OPT_INDENT_2
    return {**files, STATE: orjson.dumps(body, option=options)}


def _place(path: str) -> tuple[str, str]:
    for prefix, file in _PREFIXES.items():
        if path.startswith(prefix):
            return file, path.removeprefix(prefix)
    return "extra", path


def _safetensors(items: Mapping[str, Tensor]) -> bytes:
    # safetensors refuses tensors over one storage; a flat buffer's views are such.
    shared: set[int] = set()
    own: dict[str, Tensor] = {}
    for name, tensor in items.items():
        address = tensor.untyped_storage().data_ptr()
        own[name] = tensor.clone() if address in shared else tensor
        shared.add(address)
    return safetensors.torch.save(own, metadata={"format": "pt"})


def _encoded(leaf: Leaf) -> Any:
    # JSON has no infinities, and orjson would write null.
    if isinstance(leaf, float) and not math.isfinite(leaf):
        return {"float": repr(leaf)}
    return leaf


def _decoded(value: Any) -> Any:
    return float(value["float"]) if isinstance(value, dict) and "float" in value else value


def decode(files: Mapping[str, bytes], like: TrainState, where: Path) -> TrainState:
    """The state that `files` hold, in the form, dtypes and devices of `like`.

    Optimizer slots that `like` does not have yet (some classes make them at the first update)
    are taken as they are, for known parameters only.
    """
    stored = decode_leaves(files, where)
    kind = stored.get("optimizer/kind")
    if kind != like.optimizer.kind:
        raise CheckpointError(
            f"{where}: the checkpoint was made with the optimizer {kind!r}, and `like` has "
            f"{like.optimizer.kind!r}; build `like` with the step that made the checkpoint"
        )
    template = attrs.evolve(
        like, optimizer=attrs.evolve(like.optimizer, slots=_slots(stored, like, where))
    )
    _check_paths(stored, dict(leaves(template)), where)
    rebuilt = _rebuild(template, stored, "", where)
    assert isinstance(rebuilt, TrainState)  # `_rebuild` keeps the template's form
    return rebuilt


def decode_leaves(files: Mapping[str, bytes], where: Path) -> dict[str, Leaf]:
    """Every leaf by its path; malformed files raise `CheckpointError`."""
    prefixes = {file: prefix for prefix, file in _PREFIXES.items()}
    stored: dict[str, Leaf] = {}
    for file in FILES:
        items = decode_tensors(files[f"{file}.safetensors"], where / f"{file}.safetensors")
        stored |= {prefixes.get(file, "") + name: tensor for name, tensor in items.items()}
    body = parsed_json(files[STATE], where / STATE)
    numbers = body.get("leaves")
    if not isinstance(numbers, dict):
        raise CheckpointError(f"{where / STATE}: no leaves; this is not a state of functrain's")
    return stored | {path: _decoded(value) for path, value in numbers.items()}


def decode_tensors(data: bytes, path: Path) -> Tensors:
    """The tensors of a safetensors file, sorted."""
    try:
        return Tensors(safetensors.torch.load(data))
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from error


def _slots(stored: Mapping[str, Leaf], like: TrainState, where: Path) -> dict[str, Tensors]:
    found: dict[str, dict[str, Tensor]] = {}
    for path, leaf in stored.items():
        if not path.startswith("optimizer/slots/") or not isinstance(leaf, Tensor):
            continue
        slot, name = path.removeprefix("optimizer/slots/").split("/", 1)
        if name not in like.params:
            raise CheckpointError(
                f"{where}: the optimizer's {slot} is for {name!r}, which is no parameter of "
                f"`like`; {_HINTS['params']}"
            )
        found.setdefault(slot, {})[name] = leaf
    untouched = int(_tensor(stored, "optimizer/count", where)) == 0
    for slot, items in like.optimizer.slots.items():
        if slot not in found and not untouched and items:
            raise CheckpointError(
                f"{where}: the optimizer's {slot!r} is missing; {_HINTS['optimizer']}"
            )
    kept = {slot: like.optimizer.slots.get(slot, Tensors(items)) for slot, items in found.items()}
    return dict(sorted(kept.items()))


def _tensor(stored: Mapping[str, Leaf], path: str, where: Path) -> Tensor:
    leaf = stored.get(path)
    if not isinstance(leaf, Tensor):
        raise CheckpointError(f"{where}: {path} is missing")
    return leaf


def _check_paths(stored: Mapping[str, Leaf], expected: Mapping[str, Leaf], where: Path) -> None:
    missing = sorted(expected.keys() - stored.keys())
    unknown = sorted(stored.keys() - expected.keys())
    if not missing and not unknown:
        return
    parts = [f"lacks {_some(missing)}"] if missing else []
    parts += [f"has {_some(unknown)}"] if unknown else []
    if missing and unknown:
        parts.append(did_you_mean(missing[0], unknown))
    field = (missing or unknown)[0].split("/", 1)[0]
    hint = _HINTS.get(field, "the checkpoint is of another version")
    raise CheckpointError(
        f"{where}: against `like` it {' and '.join(parts[:2])}; {hint}"
        + (f" ({parts[2]})" if len(parts) > 2 else "")
    )


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _rebuild(template: Any, stored: Mapping[str, Leaf], path: str, where: Path) -> Any:
    if isinstance(template, Mapping):
        items = {n: _rebuild(t, stored, f"{path}/{n}", where) for n, t in template.items()}
        return Tensors(items) if isinstance(template, Tensors) else items
    if attrs.has(type(template)):
        changes = {
            field.name: _rebuild(
                getattr(template, field.name), stored, _joined(path, field.name), where
            )
            for field in attrs.fields(type(template))
        }
        return attrs.evolve(template, **changes)
    if isinstance(template, Tensor):
        return _fitted(stored[path], template, path, where)
    return _number(stored[path], template, path, where)


def _joined(path: str, name: str) -> str:
    return f"{path}/{name}" if path else name


def _fitted(leaf: Leaf, template: Tensor, path: str, where: Path) -> Tensor:
    if not isinstance(leaf, Tensor):
        raise CheckpointError(f"{where}: {path} is {leaf!r}, expected a tensor")
    if leaf.shape != template.shape or leaf.dtype != template.dtype:
        hint = _HINTS.get(path.split("/", 1)[0], "the checkpoint does not fit")
        raise CheckpointError(
            f"{where}: {path} is {_kind(leaf)}, expected {_kind(template)}; {hint}"
        )
    return leaf.to(template.device)


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _number(leaf: Leaf, template: Leaf, path: str, where: Path) -> Leaf:
    # `cursor/loader` alone is optional: None before the first batch, a string after it.
    allowed = (type(None), str) if path == "cursor/loader" else (type(template),)
    if type(leaf) not in allowed:
        names = " or ".join(t.__name__ for t in allowed)
        raise CheckpointError(f"{where}: {path} is {leaf!r}, expected {names}")
    if isinstance(leaf, int) and leaf < 0:
        raise CheckpointError(f"{where}: {path} is {leaf}, expected at least 0")
    return leaf
