"""The state of a loader as JSON text and back; what JSON cannot express is tagged."""

from __future__ import annotations

import base64
import math
from typing import Any

import numpy as np
import orjson
import torch

from functrain.errors import DataError

_TAG = "~"
_PLAIN = 2**63


def dumped(state: Any, where: str = "state") -> str:
    """A state as text: mappings, lists, tuples, numbers, text, bytes, arrays and tensors.

    Raises `DataError`, naming the place, for anything else: another process would have to guess its
    meaning.
    """
    return orjson.dumps(_plain(state, where)).decode()


def loaded(text: str) -> Any:
    """What `dumped` was given, with types, dtypes and bits; raises `DataError` for another text."""
    try:
        return _meant(orjson.loads(text))
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"loader: no state that functrain wrote ({error})") from error


def _plain(value: Any, where: str) -> Any:
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, dict):
        return _mapping(value, where)
    if isinstance(value, list):
        return [_plain(each, f"{where}[{n}]") for n, each in enumerate(value)]
    tag = _tagged(value, where)
    if tag is None:
        raise DataError(
            f"{where}: a {type(value).__name__}, expected what can be written down: mappings, "
            "lists, numbers, text, bytes, arrays, tensors"
        )
    return tag


def _mapping(value: dict[Any, Any], where: str) -> Any:
    if all(isinstance(key, str) for key in value) and _TAG not in value:
        return {key: _plain(each, f"{where}.{key}") for key, each in value.items()}
    items = [[_plain(k, where), _plain(each, f"{where}.{k}")] for k, each in value.items()]
    return {_TAG: "mapping", "items": items}


def _tagged(value: Any, where: str) -> Any:
    """A value as JSON: a number that JSON keeps exactly, or its tagged form; None if unknown."""
    kind = type(value)
    if kind is int:
        return value if abs(value) < _PLAIN else {_TAG: "int", "text": str(value)}
    if kind is float:
        return value if math.isfinite(value) else {_TAG: "float", "text": repr(value)}
    if kind is tuple:
        return {_TAG: "tuple", "items": [_plain(each, where) for each in value]}
    if kind is bytes:
        return {_TAG: "bytes", "data": _encoded(value)}
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biufc":
        array = np.asarray(value)
        name = "array" if isinstance(value, np.ndarray) else "scalar"
        return _sized(name, array.dtype.str, array.shape, array.tobytes())
    if isinstance(value, torch.Tensor):
        raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return _sized("tensor", str(value.dtype).removeprefix("torch."), value.shape, raw)
    return None


def _sized(name: str, dtype: str, shape: tuple[int, ...], raw: bytes) -> dict[str, Any]:
    return {_TAG: name, "dtype": dtype, "shape": list(shape), "data": _encoded(raw)}


def _encoded(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def _meant(value: Any) -> Any:
    if isinstance(value, list):
        return [_meant(each) for each in value]
    if not isinstance(value, dict):
        return value
    if _TAG not in value:
        return {key: _meant(each) for key, each in value.items()}
    return _untagged(value)


def _untagged(value: dict[str, Any]) -> Any:
    kind = value[_TAG]
    if kind in ("int", "float"):
        return int(value["text"]) if kind == "int" else float(value["text"])
    if kind == "mapping":
        return {_meant(key): _meant(each) for key, each in value["items"]}
    if kind == "tuple":
        return tuple(_meant(each) for each in value["items"])
    raw = base64.b64decode(value["data"], validate=True)
    if kind == "bytes":
        return raw
    if kind == "tensor":
        return _tensor(raw, getattr(torch, value["dtype"]), value["shape"])
    if kind not in ("array", "scalar"):
        raise ValueError(f"the tag {kind!r} is unknown")
    array = np.frombuffer(raw, dtype=value["dtype"]).reshape(value["shape"]).copy()
    return array if kind == "array" else array[()]


def _tensor(raw: bytes, dtype: torch.dtype, shape: list[int]) -> torch.Tensor:
    if not raw:  # `frombuffer` takes no empty buffer
        return torch.empty(shape, dtype=dtype, device="cpu")
    return torch.frombuffer(bytearray(raw), dtype=dtype).reshape(shape)
