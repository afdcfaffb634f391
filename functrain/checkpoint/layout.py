"""How a state maps to files and back: which leaf is in which file, and under which name."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import NoneType
from typing import Any

import attrs
from torch import Tensor

from functrain.checkpoint import format as safetensors
from functrain.checkpoint.files import Contents, Fill
from functrain.checkpoint.manifest import (
    FILES,
    FORMAT,
    LONGEST_JSON,
    MOST_STEPS,
    STATE,
    as_json,
    bounded,
    decoded,
    encoded,
    is_format,
    is_text,
    parsed_json,
)
from functrain.errors import CheckpointError, StateError, did_you_mean
from functrain.keys import MAX_KEY
from functrain.optimizers import OptimizerState
from functrain.schedules import PlateauState
from functrain.state import Cursor, Leaf, SchedulerState, TrainState, leaves, why_apart
from functrain.trees import Tensors, dtype_and_shape, owning

_PREFIXES = {"params/": "model", "buffers/": "buffers", "optimizer/slots/": "optimizer"}
_COUNTS = ("optimizer/count", "scheduler/count", "guard/count", "scaler/growth_count")
_NEVER_NEGATIVE = ("exp_avg_sq", "max_exp_avg_sq", "step")
_INTEGERS = ("step", "key", "cursor/samples", "cursor/tokens")
_LARGEST = {"step": MOST_STEPS}
_SOUND: Mapping[str, Callable[[Any], bool]] = {
    "scaler/growth_factor": lambda factor: 1 < factor < math.inf,
    "scaler/backoff_factor": lambda factor: 0 < factor < 1,
    "scaler/growth_interval": lambda steps: steps >= 1,
    "scheduler/plateau/learning_rate": lambda rate: 0 <= rate < math.inf,
}
_HINTS = {
    "params": "the checkpoint is of another architecture",
    "buffers": "the checkpoint is of another architecture",
    "optimizer": "the checkpoint was made with another optimizer",
    "scaler": "the checkpoint was made with another precision",
    "scheduler": "the checkpoint was made with another schedule",
    "guard": "the checkpoint was made with another guard",
    "average": "the checkpoint was made with another ema_decay",
    "reference": "the checkpoint was made by another method",
}


def encode(state: TrainState) -> dict[str, Contents]:
    """The contents of every file but the manifest, as views of the state's memory."""
    files: dict[str, Contents] = {
        f"{name}.safetensors": safetensors.contents(items)
        for name, items in tensors_of(state).items()
    }
    return {**files, STATE: numbers_of(state)}


def tensors_of(state: TrainState) -> dict[str, dict[str, Tensor]]:
    """The tensors of each file, by their names in it."""
    tensors: dict[str, dict[str, Tensor]] = {name: {} for name in FILES}
    for path, leaf in leaves(state):
        if isinstance(leaf, Tensor):
            file, name = file_of(path)
            tensors[file][name] = leaf
    return tensors


def numbers_of(state: TrainState) -> Contents:
    """The contents of `state.json`: every leaf that is not a tensor."""
    numbers = {path: encoded(leaf) for path, leaf in leaves(state) if not isinstance(leaf, Tensor)}
    body = {"leaves": numbers, "slots": sorted(state.optimizer.slots), "version": FORMAT}
    return [memoryview(bounded(as_json(body), f"{STATE}, with the loader's state"))]


def file_of(path: str) -> tuple[str, str]:
    """The file that holds the tensor at this path of the state, and its name there."""
    for prefix, file in _PREFIXES.items():
        if path.startswith(prefix):
            return file, path.removeprefix(prefix)
    return "extra", path


def numbers(fill: Fill, size: int, where: Path) -> dict[str, Leaf]:
    """The leaves in `state.json` by their paths: every leaf that is not a tensor."""
    if size > LONGEST_JSON:
        raise CheckpointError(f"{where}: {size} bytes, which no state's numbers are")
    data = bytearray(size)
    fill(memoryview(data))
    body = parsed_json(bytes(data), where)
    found, slots = body.get("leaves"), body.get("slots")
    if body.keys() != {"leaves", "slots", "version"} or not is_format(body["version"]):
        raise CheckpointError(f"{where}: not a state of functrain's, format {FORMAT}")
    if not isinstance(found, dict):
        raise CheckpointError(f"{where}: leaves is {str(found)[:99]}, expected an object")
    if not isinstance(slots, list) or not all(isinstance(slot, str) for slot in slots):
        raise CheckpointError(f"{where}: slots is {str(slots)[:99]}, expected names")
    return {path: decoded(value, path, where) for path, value in found.items()}


def placed(file: str, items: Mapping[str, Tensor]) -> dict[str, Leaf]:
    """The tensors of a file by their paths in the state."""
    found: dict[str, Leaf] = {}
    for name, tensor in items.items():
        path = path_of(file, name)
        if file_of(path)[0] != file:
            raise CheckpointError(
                f"{file}.safetensors: {name} belongs into {file_of(path)[0]}.safetensors"
            )
        found[path] = tensor
    return found


def path_of(file: str, name: str) -> str:
    """The path in the state of the tensor with this name in a file; the inverse of `file_of`."""
    return next((prefix for prefix, own in _PREFIXES.items() if own == file), "") + name


def decode(stored: Mapping[str, Leaf], like: TrainState, where: Path) -> TrainState:
    """The state whose leaves are `stored`, with the structure, dtypes and devices of `like`.

    Optimizer slots that `like` does not have yet (some classes create them at the first update)
    are accepted as they are, for known params only. So is the record of `reduce_on_plateau`, which
    a step evolved to another schedule leaves in its states; a checkpoint of a step with that
    schedule thus loads into one with another, as with all other schedules.
    """
    kind = stored.get("optimizer/kind")
    if kind != like.optimizer.kind:
        raise CheckpointError(
            f"{where}: the checkpoint was made with the optimizer {kind!r}, and `like` has "
            f"{like.optimizer.kind!r}; build `like` with the step that made the checkpoint"
        )
    if "base" in stored:
        check_base(stored["base"], like.base, where)
    template = attrs.evolve(
        like,
        optimizer=attrs.evolve(like.optimizer, slots=_slots(stored, like, where)),
        scheduler=_scheduler(stored, like.scheduler),
    )
    _check_paths(stored, dict(leaves(template)), where)
    rebuilt = _rebuild(template, stored, "", where)
    assert isinstance(rebuilt, TrainState)  # `_rebuild` keeps the template's form
    # Only now: not every dtype can be compared, and by now each dtype is the template's.
    _check_values(stored, where)
    return rebuilt


def check_base(made: Leaf, here: str | None, where: Path) -> None:
    """Raise `CheckpointError` where the checkpoint was trained over another base."""
    if not isinstance(made, str | None):
        raise CheckpointError(f"{where}: base is {made!r}, expected a fingerprint, or null")
    if (reason := why_apart(made, here)) is not None:
        raise CheckpointError(f"{where}: of another architecture: {reason}")


def _check_values(stored: Mapping[str, Leaf], where: Path) -> None:
    """Refuse values that no training can reach: a file whose hashes match may still be forged."""
    for path, leaf in stored.items():
        if isinstance(leaf, Tensor):
            slot = path.split("/")[2] if path.startswith("optimizer/slots/") else ""
            if (path in _COUNTS or slot in _NEVER_NEGATIVE) and _negative(leaf):
                raise CheckpointError(f"{where}: {path} is negative, which it cannot become")
            # 0 is allowed: where every step overflows, the scale reaches it, as torch's does.
            if path == "scaler/scale" and not bool(((leaf >= 0) & leaf.isfinite()).all()):
                raise CheckpointError(f"{where}: {path} is {leaf.tolist()}, no loss scale")
        elif (fault := _fault(path, leaf)) is not None:
            raise CheckpointError(f"{where}: {path} is {fault}")


def _fault(path: str, leaf: Leaf) -> str | None:
    """What is wrong with a number of a state, or None."""
    most = _LARGEST.get(path, MAX_KEY)
    if isinstance(leaf, int) and not 0 <= leaf <= most:
        return f"{leaf}, expected 0 to {most}"
    if path in _SOUND and not _SOUND[path](leaf):
        return f"{leaf}, which no training comes to"
    return None


def check_loadable(state: TrainState) -> None:
    """Raise `StateError`, before anything is saved, for values that no load would accept.

    A state evolved by hand may have them, or the cursor of a user's own stream.
    """
    for field, kind in _RECORDS.items():
        _check_kind(field, getattr(state, field), kind)
    _check_kind("cursor/loader", state.cursor.loader, (str, NoneType))
    _check_kind("optimizer/kind", state.optimizer.kind, str)
    _check_kind("base", state.base, (str, NoneType))
    for path, leaf in leaves(state):
        if isinstance(leaf, Tensor):
            continue
        fault = _fault(path, leaf)
        if path in _INTEGERS and type(leaf) is not int:
            fault = f"{leaf!r}, expected an integer"
        elif isinstance(leaf, str) and not is_text(leaf):
            fault = "no text that UTF-8 can hold"
        if fault is not None:
            raise StateError(f"state: {path} is {fault}; no load would take it")


_RECORDS = {"cursor": Cursor, "optimizer": OptimizerState, "scheduler": SchedulerState}


def _check_kind(path: str, given: object, kinds: type | tuple[type, ...]) -> None:
    if isinstance(given, kinds):
        return
    several = kinds if isinstance(kinds, tuple) else (kinds,)
    expected = " or ".join("None" if each is NoneType else each.__name__ for each in several)
    hint = "; json.dumps of it, say" if path == "cursor/loader" else ""
    raise StateError(
        f"state: {path} is a {type(given).__name__}, expected {expected}{hint}; no load would take "
        "it"
    )


def _negative(tensor: Tensor) -> bool:
    if tensor.dtype.is_complex or not tensor.dtype.is_signed:
        return False
    # 8-bit floats have no comparison.
    comparable = tensor.float() if tensor.dtype.itemsize == 1 else tensor
    return bool((comparable < 0).any())


def _slots(stored: Mapping[str, Leaf], like: TrainState, where: Path) -> dict[str, Tensors]:
    found: dict[str, dict[str, Tensor]] = {}
    for path, leaf in stored.items():
        if not path.startswith("optimizer/slots/") or not isinstance(leaf, Tensor):
            continue
        slot, _, name = path.removeprefix("optimizer/slots/").partition("/")
        if not slot or name not in like.params:
            raise CheckpointError(
                f"{where}: the optimizer's {slot!r} is for {name!r}, which is no parameter of "
                f"`like`; {_HINTS['params']}"
            )
        found.setdefault(slot, {})[name] = leaf
    path = "optimizer/count"
    if path not in stored:
        raise CheckpointError(f"{where}: {path} is missing")
    untouched = int(_fitted(stored[path], like.optimizer.count, path, where)) == 0
    for slot, items in like.optimizer.slots.items():
        if slot not in found and not untouched and items:
            raise CheckpointError(
                f"{where}: the optimizer's {slot!r} is missing; {_HINTS['optimizer']}"
            )
    fresh = int(like.optimizer.count) == 0
    return {
        slot: _expected_slot(items, like.optimizer.slots.get(slot), fresh)
        for slot, items in sorted(found.items())
    }


def _scheduler(stored: Mapping[str, Leaf], like: SchedulerState) -> SchedulerState:
    if like.plateau is not None or "scheduler/plateau/best" not in stored:
        return like
    return attrs.evolve(like, plateau=PlateauState(best=0.0, learning_rate=0.0))


def _expected_slot(stored: Mapping[str, Tensor], like: Tensors | None, fresh: bool) -> Tensors:
    """The tensors that a slot should hold: those of `like` if `like` is fresh.

    Some classes create a param's tensor at its first gradient, so a trained `like` may have more of
    them, or fewer, than the checkpoint: then the stored names decide.
    """
    if like is None:
        return Tensors(stored)
    return like if fresh else Tensors({name: like.get(name, t) for name, t in stored.items()})


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
        # Tensors that have just been read are not shared with anyone.
        return owning(Tensors(items)) if isinstance(template, Tensors) else items
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
        found, wanted = dtype_and_shape(leaf), dtype_and_shape(template)
        raise CheckpointError(f"{where}: {path} is {found}, expected {wanted}; {hint}")
    return leaf.to(template.device)


def _number(leaf: Leaf, template: Leaf, path: str, where: Path) -> Leaf:
    # Only `cursor/loader` is optional: None before the first batch, a string after it.
    allowed = (type(None), str) if path == "cursor/loader" else (type(template),)
    if type(leaf) not in allowed:
        names = " or ".join(t.__name__ for t in allowed)
        raise CheckpointError(f"{where}: {path} is {leaf!r}, expected {names}")
    return leaf
