"""Files of token ids, memory-mapped: raw, .npy, llm.c's, and many of them as one stream."""

from __future__ import annotations

import bisect
import itertools
import tokenize
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import numpy.typing as npt
import torch

from functrain.checks import PathLike
from functrain.data.files import RECORDS, TEXTS, UnreadableError, files_of, is_compressed, suffix_of
from functrain.errors import DataError

Ids = npt.NDArray[Any]
SUFFIXES = (".bin", ".npy")
# By their names these are something else, whose bytes would be read as ids without a complaint.
_OTHERS = (*TEXTS, *RECORDS, ".npz", ".pt", ".pth", ".safetensors", ".arrow", ".csv", ".zip")
# llm.c's data files: the header, its first two numbers, and the dtype of what follows it.
_HEADER = np.dtype("<i4"), 256
_MAGIC = {20240520: (1, "<u2"), 20240801: (7, "<u4")}
_LEAST, _MOST = 64, 1 << 12
"""From how many ids on their width can be told, and how many are read at each of two places."""

_SMALL = 4
"""Few vocabularies have more than this many times 65,536 tokens."""


@attrs.frozen(eq=False)
class JoinedIds:
    """Arrays of ids of one dtype, one after the other; a slice is an ordinary array.

    `paths`: the file that each was read from.
    """

    arrays: tuple[Ids, ...]
    paths: tuple[Path, ...]
    _ends: list[int] = attrs.field(init=False)

    @_ends.default
    def _found_ends(self) -> list[int]:
        return list(itertools.accumulate(map(len, self.arrays)))

    def __len__(self) -> int:
        """Ids in all."""
        return self._ends[-1]

    @property
    def shape(self) -> tuple[int]:
        """The shape of an array of them all."""
        return (len(self),)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of each array."""
        return self.arrays[0].dtype

    def __getitem__(self, where: slice) -> Ids:
        """A run of ids; copied where it lies in several arrays. `IndexError` for anything else."""
        if not isinstance(where, slice) or where.step not in (None, 1):
            raise IndexError(f"{where!r}, expected a slice without a step")
        begin, end, _ = where.indices(len(self))
        found: list[Ids] = []
        for place in range(bisect.bisect_right(self._ends, begin), len(self.arrays)):
            first = self._ends[place] - len(self.arrays[place])
            if first >= end:
                break
            found.append(self.arrays[place][max(0, begin - first) : end - first])
        return found[0] if len(found) == 1 else np.concatenate(found or [self.arrays[0][:0]])

    def first(self, count: int) -> JoinedIds:
        """The first `count` ids, still mapped."""
        kept: list[Ids] = []
        for array, end in zip(self.arrays, self._ends, strict=True):
            before = end - len(array)
            if kept and before >= count:
                break
            kept.append(array[: max(0, count - before)])
        return JoinedIds(tuple(kept), self.paths[: len(kept)])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Ids:
        """All of them, in memory."""
        if copy is False:
            raise ValueError("ids of several files, of which one array is a copy")
        return np.concatenate(self.arrays).astype(dtype or self.dtype, copy=False)


def mapped(path: PathLike, dtype: str) -> Ids | JoinedIds:
    """The ids of a file, or of a directory's or a pattern's files in the order of their names."""
    if not (isinstance(path, str) or hasattr(path, "__fspath__")):
        hint = "ids.numpy()" if isinstance(path, torch.Tensor) else "numpy.array(ids)"
        raise DataError(
            f"tokens: expected a path or a numpy array of ids, got {type(path).__name__}; give "
            f"{hint}"
        )
    files = files_of(path, SUFFIXES)
    if len(files) == 1:
        return _one(files[0], dtype)
    arrays = [(each, _unheld(_one(each, dtype))) for each in files]
    first, ids = arrays[0]
    for each, others in arrays:
        if others.ndim != 1 or others.dtype != ids.dtype:
            beside = "" if each is first else f", and {first} is {ids.dtype}{list(ids.shape)}"
            raise DataError(
                f"{each}: {others.dtype}{list(others.shape)}{beside}; expected integers [tokens] "
                "of one dtype"
            )
    paths, own = zip(*arrays, strict=True)
    return JoinedIds(own, paths)


def _unheld(ids: Ids) -> Ids:
    """The same ids, mapped without the descriptor that NumPy keeps: a process has few of those."""
    if not isinstance(ids, np.memmap) or not ids.nbytes:
        return ids
    # A private mapping: nothing that is written to it reaches the file.
    size = ids.offset + ids.nbytes
    pages = torch.from_file(str(ids.filename), shared=False, size=size, dtype=torch.uint8)
    return pages.numpy()[ids.offset :].view(ids.dtype).reshape(ids.shape)


def _one(path: Path, dtype: str) -> Ids:
    try:
        return _mapped(path, dtype)
    except OSError as error:
        raise UnreadableError(f"{path}: cannot be read ({error.strerror or error})") from error


def _mapped(path: Path, dtype: str) -> Ids:
    if not path.is_file():
        raise DataError(f"{path}: no such file; expected token ids as raw {dtype}, or .npy")
    if is_compressed(path):
        raise DataError(f"{path}: compressed, and ids are mapped as they are; unpack it")
    if path.suffix.lower() == ".npy":
        return _npy(path)
    if suffix_of(path) in _OTHERS:
        raise DataError(
            f"{path}: by its name no file of token ids; expected raw {dtype} (.bin), or .npy, by "
            "numpy.save(path, ids); text and records are for functrain.data.documents and records"
        )
    with_header = _llm_c(path)
    if with_header is not None:
        return with_header
    size, bytes_ = _itemsize(dtype), path.stat().st_size
    if not bytes_ or bytes_ % size:
        raise DataError(
            f"{path}: {bytes_} bytes are no whole number of {dtype} ids; was it written with "
            "another dtype?"
        )
    ids = np.memmap(path, dtype=dtype, mode="r")
    wider = _wider(ids)
    if wider is not None:
        raise DataError(
            f"{path}: read as {dtype}, every second id is 0 or nearly, as the upper parts of wider "
            f"ids are; it seems to be {wider}: give dtype={wider!r}, or the ids as .npy, by "
            "numpy.save(path, ids)"
        )
    return ids


def _wider(ids: Ids) -> str | None:
    """The type that ids of 2 or 4 bytes seem to have been written as, if it is a wider one."""
    size, middle = ids.dtype.itemsize, len(ids) // 2 // 4 * 4
    if size not in (2, 4) or len(ids) < _LEAST:
        return None
    found = (ids[:_MOST], ids[middle : middle + _MOST])
    words = np.concatenate([each[: len(each) // 4 * 4].reshape(-1, 4) for each in found])
    if size == 2 and not words[:, 2:].any() and _are_parts(words[:, 0], words[:, 1]):
        return "int64"
    if _are_parts(words[:, ::2], words[:, 1::2]):
        return "uint32" if size == 2 else "int64"
    return None


def _are_parts(lower: Ids, upper: Ids) -> bool:
    """Whether these are the lower and the upper halves of wider ids.

    The upper halves are then 0 or, with a vocabulary of 128,256, 0 and 1, while many of the lower
    are neither.
    """
    if not upper.any():
        least = 1
    elif lower.dtype.itemsize == 2 and upper.max() < _SMALL:
        least = _SMALL
    else:
        return False
    return 4 * int(np.count_nonzero(lower >= least)) > lower.size


def _llm_c(path: Path) -> Ids | None:
    """The ids of an llm.c file; None for one that does not begin with such a header."""
    kind, numbers = _HEADER
    if path.stat().st_size < numbers * kind.itemsize:
        return None
    magic, version, count, *_ = np.fromfile(path, kind, numbers).tolist()
    if magic not in _MAGIC:
        return None
    expected, name = _MAGIC[magic]
    if version != expected:
        raise DataError(
            f"{path}: a file of llm.c's of version {version}, expected {expected}; give its ids as "
            ".npy, by numpy.save(path, ids)"
        )
    dtype, begin = np.dtype(name), numbers * kind.itemsize
    if path.stat().st_size != begin + count * dtype.itemsize:
        raise DataError(
            f"{path}: its header says {count} ids of {dtype.itemsize} bytes, and "
            f"{path.stat().st_size - begin} bytes follow it; is it whole?"
        )
    return np.memmap(path, dtype=dtype, mode="r", offset=begin)


def _npy(path: Path) -> Ids:
    try:
        # Not `numpy.load`, which reads other kinds of files too, and advises unpickling the rest.
        array: Ids = np.lib.format.open_memmap(path, mode="r")
    except (ValueError, SyntaxError, tokenize.TokenError) as error:
        raise DataError(
            f"{path}: no .npy file of integers (is it whole?); write one with numpy.save(path, ids)"
        ) from error
    return array


def _itemsize(dtype: str) -> int:
    try:
        known = np.dtype(dtype)
    except TypeError:
        known = None
    if known is None or known.kind not in "iu":
        raise DataError(f"dtype: {dtype!r}, expected an integer dtype such as 'uint16'")
    return known.itemsize
