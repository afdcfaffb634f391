"""safetensors files, written as a stream and read strictly.

The bytes written are those of `safetensors.torch.save`. A file to be read must be in that one
canonical form: the reference reader accepts duplicate keys, gaps, overflowing shapes and more, and
a file that two readers understand differently is no place for a model. `read` reads tensors into
memory that torch allocated and maps nothing: overwriting the file would change a mapped tensor,
truncating it would kill the process, and a kernel's bits may depend on memory alignment.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
import orjson
import torch
from torch import Tensor

from functrain import memory
from functrain.errors import CheckpointError
from functrain.trees import Tensors, data_of

DTYPES: Mapping[str, torch.dtype] = {
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F32": torch.float32,
    "U32": torch.uint32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Every dtype that a checkpoint can hold, in file order: widest first, so all are aligned."""

MOST_HEADER = 1 << 26
MOST_DIMENSIONS = 64
LONGEST_NAME = 1024
_METADATA = "__metadata__"
_FORMAT = {"format": "pt"}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_RANKS = {dtype: rank for rank, dtype in enumerate(DTYPES.values())}


@attrs.frozen
class Entry:
    """A tensor in a file; `begin` and `end` are byte offsets from the end of the header."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def contents(items: Mapping[str, Tensor]) -> list[memoryview]:
    """A safetensors file of `items`, in pieces: the header, then each tensor's own memory.

    Only tensors that are not contiguous or not on the CPU are copied.
    """
    text, begins = laid_out(items)
    return [text, *(data_of(items[name]) for name in begins)]


def laid_out(items: Mapping[str, Tensor]) -> tuple[memoryview, dict[str, int]]:
    """The header of a safetensors file, and each tensor's byte offset in the file, in order."""
    header: dict[str, Any] = {_METADATA: _FORMAT}
    begins: dict[str, int] = {}
    position = 0
    for name in _ordered(items):
        size = items[name].numel() * items[name].dtype.itemsize
        header[name] = {
            "dtype": _NAMES[items[name].dtype],
            "shape": list(items[name].shape),
            "data_offsets": [position, position + size],
        }
        begins[name] = position
        position += size
    text = memoryview(_prefixed(header))
    return text, {name: len(text) + begin for name, begin in begins.items()}


def _ordered(items: Mapping[str, Tensor]) -> list[str]:
    for name, tensor in items.items():
        if tensor.dtype not in _NAMES:
            raise CheckpointError(f"{name}: a checkpoint cannot hold {tensor.dtype}")
        if not _is_name(name):
            raise CheckpointError(f"{name!r}: not a name that a checkpoint can hold")
    return sorted(items, key=lambda name: (_RANKS[items[name].dtype], name))


def _is_name(name: str) -> bool:
    return 0 < len(name) <= LONGEST_NAME and name != _METADATA and name.isprintable()


def _prefixed(header: Mapping[str, Any]) -> bytes:
    """The header, preceded by its length and padded with spaces so that the tensors are aligned."""
    text = orjson.dumps(header)
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def read(
    fill: Callable[[memoryview], None],
    size: int,
    path: Path,
    rows: Callable[[Entry], tuple[int, int] | None] = lambda _: None,
) -> Tensors:
    """The tensors of a file of `size` bytes; `fill` reads its next bytes into a buffer.

    `rows` says which rows of a tensor to keep, as begin and end, or None for all. Anything that
    `contents` would not have written exactly so raises `CheckpointError`.
    """
    entries = header(fill, size, path)
    return Tensors({entry.name: _kept(entry, rows(entry), fill, path) for entry in entries})


_SKIPPED = 1 << 20


def _kept(
    entry: Entry, rows: tuple[int, int] | None, fill: Callable[[memoryview], None], path: Path
) -> Tensor:
    if rows is None:
        return _filled(entry, fill, path)
    begin, end = rows
    each = (entry.end - entry.begin) // max(1, entry.shape[0])
    skip(begin * each, fill)
    cut = attrs.evolve(entry, shape=(end - begin, *entry.shape[1:]))
    found = _filled(cut, fill, path)
    skip((entry.shape[0] - end) * each, fill)
    return found


def skip(size: int, fill: Callable[[memoryview], None]) -> None:
    """Read bytes that are not kept, so that they are hashed."""
    buffer = memoryview(bytearray(min(size, _SKIPPED)))
    while size:
        fill(buffer[: min(size, _SKIPPED)])
        size -= min(size, _SKIPPED)


def mapped(pages: mmap.mmap, path: Path) -> Tensors:
    """The tensors of a memory-mapped file, as views of its pages; otherwise like `read`."""
    rest = memoryview(pages)

    def fill(buffer: memoryview) -> None:
        nonlocal rest
        buffer[:] = rest[: len(buffer)]
        rest = rest[len(buffer) :]

    entries = header(fill, len(pages), path)
    begin = len(pages) - len(rest)
    return Tensors({entry.name: _view(entry, pages, begin, path) for entry in entries})


def _view(entry: Entry, pages: mmap.mmap, begin: int, path: Path) -> Tensor:
    if entry.begin == entry.end:
        return torch.empty(entry.shape, dtype=entry.dtype, device="cpu")
    size = entry.end - entry.begin
    # As bytes first: `frombuffer` does not know every dtype.
    raw = torch.frombuffer(pages, dtype=torch.uint8, count=size, offset=begin + entry.begin)
    _check_booleans(entry, data_of(raw), path)
    return raw.view(entry.dtype).view(entry.shape)


def _filled(entry: Entry, fill: Callable[[memoryview], None], path: Path) -> Tensor:
    try:
        tensor = memory.empty(entry.shape, entry.dtype)
    except RuntimeError as error:  # torch's, whose message is about its allocator
        size = f"{entry.end - entry.begin:,} bytes"
        raise MemoryError(f"{entry.name}, {list(entry.shape)}, {size}") from error
    data = data_of(tensor)
    fill(data)
    _check_booleans(entry, data, path)
    return tensor


def _check_booleans(entry: Entry, data: memoryview, path: Path) -> None:
    if entry.dtype == torch.bool and any(data.tobytes().strip(b"\0\1")):
        raise CheckpointError(f"{path}: {entry.name} holds booleans that are neither 0 nor 1")


def header(fill: Callable[[memoryview], None], size: int, path: Path) -> list[Entry]:
    """The entries of a file of `size` bytes, from its header alone, in the order of the data."""
    prefix = bytearray(8)
    if size < 8:
        raise CheckpointError(f"{path}: {size} bytes, which is no safetensors file")
    fill(memoryview(prefix))
    length = int.from_bytes(prefix, "little")
    if length > min(size - 8, MOST_HEADER):
        raise CheckpointError(f"{path}: its header would be {length} bytes long")
    text = bytearray(length)
    fill(memoryview(text))
    entries = list(_entries(_canonical(bytes(text), path), path))
    if entries != _in_order(entries):
        raise CheckpointError(f"{path}: its tensors are not in the order of their dtypes and names")
    position = 0
    for entry in entries:
        if entry.begin != position:
            raise CheckpointError(f"{path}: {entry.name} begins at {entry.begin}, not {position}")
        position = entry.end
    if position != size - 8 - length:
        raise CheckpointError(
            f"{path}: {size - 8 - length} bytes of tensors, and the header speaks of {position}"
        )
    return entries


def _in_order(entries: list[Entry]) -> list[Entry]:
    return sorted(entries, key=lambda entry: (_RANKS[entry.dtype], entry.name))


def _canonical(text: bytes, path: Path) -> dict[str, Any]:
    """The parsed header, provided that serializing it again gives the same bytes.

    This one check refuses duplicate keys, extra spaces, escapes and alternative spellings of
    numbers.
    """
    try:
        found = orjson.loads(text)
        again = orjson.dumps(found)
    except (orjson.JSONDecodeError, orjson.JSONEncodeError) as error:
        raise CheckpointError(f"{path}: its header is not JSON ({error})") from error
    if again + b" " * (-len(again) % 8) != text:
        raise CheckpointError(f"{path}: its header is not in canonical form")
    first = next(iter(found), None) if isinstance(found, dict) else None
    if first != _METADATA or found.pop(_METADATA) != _FORMAT:
        raise CheckpointError(f"{path}: its header is not one of functrain's")
    return dict(found)


def _entries(found: Mapping[str, Any], path: Path) -> Iterator[Entry]:
    for name, value in found.items():
        if not _is_name(name):
            raise CheckpointError(f"{path}: {name!r} is no name for a tensor")
        if not isinstance(value, dict) or list(value) != ["dtype", "shape", "data_offsets"]:
            raise CheckpointError(f"{path}: {name} lacks dtype, shape or data_offsets, or has more")
        dtype = DTYPES.get(value["dtype"]) if isinstance(value["dtype"], str) else None
        if dtype is None:
            raise CheckpointError(f"{path}: {name} has the unknown dtype {value['dtype']!r}")
        shape, offsets = value["shape"], value["data_offsets"]
        if not _counts(shape) or len(shape) > MOST_DIMENSIONS:
            raise CheckpointError(f"{path}: {name} has the shape {str(shape)[:99]}")
        if not _counts(offsets) or len(offsets) != 2:
            raise CheckpointError(f"{path}: {name} has the offsets {str(offsets)[:99]}")
        begin, end = offsets
        # The nonzero dimensions by themselves too: torch refuses 2**63 even beside a 0.
        if (
            end - begin != math.prod(shape) * dtype.itemsize
            or math.prod(filter(None, shape)) >= _MOST
        ):
            raise CheckpointError(
                f"{path}: {name}, {value['dtype']} {shape}, does not take {end - begin} bytes"
            )
        yield Entry(name, dtype, tuple(shape), begin, end)


_MOST = 2**60


def _counts(value: object) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < _MOST for n in value)
