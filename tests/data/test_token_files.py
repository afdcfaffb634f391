"""Files of token ids: many of them are one stream, and what they are is never guessed wrongly."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import functrain as ft
from functrain import data
from functrain.data.token_files import JoinedIds

SIZES: dict[str, Any] = {"time": 8, "batch_size": 4, "seed": 5}


def _same(one: data.TextRows, other: data.TextRows) -> None:
    assert len(one) == len(other)
    first, second = (source.at(0, len(source)) for source in (one, other))
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name])


CUTS = st.lists(st.integers(0, 60), max_size=5).map(sorted)


@given(CUTS, st.integers(-70, 70), st.integers(-70, 70), st.integers(2, 60))
def test_joined_ids_are_the_whole(cuts: list[int], begin: int, end: int, limit: int) -> None:
    whole = np.arange(60, dtype=np.uint16)
    parts = np.split(whole, cuts)
    joined = JoinedIds(tuple(parts), tuple(map(Path, map(str, range(len(parts))))))
    assert (len(joined), joined.shape, joined.dtype) == (60, whole.shape, whole.dtype)
    assert np.array_equal(joined[begin:end], whole[begin:end])
    assert np.array_equal(joined.first(limit)[:], whole[:limit])
    assert np.array_equal(np.asarray(joined), whole)
    assert len(joined.first(limit).arrays) == len(joined.first(limit).paths)
    rows, some = data.TextRows(ids=joined, **SIZES), data.TextRows(ids=whole, **SIZES)
    _same(rows, some)
    _same(rows.first(limit), some.first(limit))


@pytest.mark.parametrize("where", [0, slice(None, None, 2), slice(9, 3, -1)])
def test_joined_ids_are_asked_for_in_runs(where: Any) -> None:
    joined = JoinedIds((np.arange(5), np.arange(5)), (Path("a"), Path("b")))
    with pytest.raises(IndexError, match="expected a slice without a step"):
        joined[where]


@pytest.mark.parametrize("suffix", [".bin", ".npy"])
@pytest.mark.parametrize("named", ["", "*{}", "**/*{}"])
def test_files_are_one_stream_in_the_order_of_their_names(
    named: str, suffix: str, tmp_path: Path
) -> None:
    whole = np.arange(1, 101, dtype=np.uint16)
    parts = dict(zip("abc", np.split(whole, [30, 64]), strict=True))
    for name in "cab":  # not in the order in which they are found
        path = tmp_path / f"{name}{suffix}"
        np.save(path, parts[name]) if suffix == ".npy" else parts[name].tofile(path)
    found = data.tokens(tmp_path / named.format(suffix), **SIZES)
    _same(found, data.tokens(whole, **SIZES))


def test_files_that_are_no_one_stream_are_named(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(9, dtype=np.uint16))
    np.save(tmp_path / "b.npy", np.arange(9, dtype=np.int64))
    with pytest.raises(ft.DataError, match=r"b\.npy: int64\[9\], and .*a\.npy is uint16\[9\]"):
        data.tokens(tmp_path, **SIZES)
    with pytest.raises(ft.DataError, match=r"no file matches; expected .* \.bin or \.npy"):
        data.tokens(tmp_path / "*.bin", **SIZES)
    (tmp_path / "note.txt").write_text("hello")
    with pytest.raises(ft.DataError, match=r"note\.txt: expected a file that ends in \.bin"):
        data.tokens(tmp_path, **SIZES)

    np.save(tmp_path / "0.npy", np.zeros((3, 3), dtype=np.int64))
    (tmp_path / "note.txt").unlink()
    with pytest.raises(ft.DataError, match=r"0\.npy: int64\[3, 3\]; expected integers"):
        data.tokens(tmp_path, **SIZES)
    with pytest.raises(ft.DataError, match="path: '', expected a path"):
        data.tokens("", **SIZES)


LLM_C = [(20240520, 1, "<u2"), (20240801, 7, "<u4")]


@pytest.mark.parametrize(("magic", "version", "dtype"), LLM_C)
def test_a_header_of_llm_c_says_what_follows(
    magic: int, version: int, dtype: str, tmp_path: Path
) -> None:
    ids, path = np.arange(100, dtype=dtype), tmp_path / "shard.bin"
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(ids)
    path.write_bytes(header.tobytes() + ids.tobytes())
    found = data.tokens(path, **SIZES)
    assert isinstance(found.ids, np.memmap)
    assert found.ids.dtype == np.dtype(dtype)
    _same(found, data.tokens(ids, **SIZES))
    path.write_bytes(header.tobytes() + ids.tobytes()[:-4])
    with pytest.raises(ft.DataError, match=r"its header says 100 ids of \d bytes, and"):
        data.tokens(path, **SIZES)
    header[1] = 9
    path.write_bytes(header.tobytes() + ids.tobytes())
    with pytest.raises(ft.DataError, match=rf"of version 9, expected {version}; give its ids as"):
        data.tokens(path, **SIZES)


@pytest.mark.parametrize("vocabulary", [50, 50_257, 128_256, 262_144])
@pytest.mark.parametrize(
    ("written", "read", "told"),
    [
        ("uint32", "uint16", "uint32"),
        ("int32", "uint16", "uint32"),
        ("int64", "uint16", "int64"),
        ("int64", "uint32", "int64"),
        ("int64", "int32", "int64"),
    ],
)
def test_ids_are_not_read_as_narrower_ones(
    written: str, read: str, told: str, vocabulary: int, tmp_path: Path
) -> None:
    ids, path = np.random.default_rng(0).integers(0, vocabulary, 500), tmp_path / "ids.bin"
    ids.astype(written).tofile(path)
    with pytest.raises(ft.DataError, match=rf"ids\.bin: read as {read}, .* give dtype='{told}'"):
        data.tokens(path, dtype=read, **SIZES)
    _same(data.tokens(path, dtype=written, **SIZES), data.tokens(ids, **SIZES))


@pytest.mark.parametrize("count", [501, 20_001])
def test_ids_after_padding_are_not_read_as_narrower_ones(count: int, tmp_path: Path) -> None:
    ids, path = np.random.default_rng(0).integers(0, 50_257, count), tmp_path / "ids.bin"
    ids[: min(len(ids) // 3, 5000)] = 0
    ids.astype("uint32").tofile(path)
    with pytest.raises(ft.DataError, match=r"ids\.bin: read as uint16, .* give dtype='uint32'"):
        data.tokens(path, **SIZES)


def test_there_may_be_more_files_than_descriptors(tmp_path: Path) -> None:
    whole = np.arange(3000, dtype=np.uint16)
    for number, part in enumerate(np.split(whole, 300)):
        part.tofile(tmp_path / f"{number:03}.bin") if number % 2 else np.save(
            tmp_path / f"{number:03}.npy", part
        )
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
    try:
        _same(data.tokens(tmp_path, **SIZES), data.tokens(whole, **SIZES))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("name", ["a.npz", "a.PT", "a.txt", "a.jsonl", "a.ndjson", "a.parquet"])
def test_a_file_of_something_else_is_not_read_as_ids(name: str, tmp_path: Path) -> None:
    """Any bytes are raw ids; a name tells that they are meant as something else."""
    (tmp_path / name).write_bytes(bytes(range(200)))
    with pytest.raises(ft.DataError, match=rf"{name}: by its name no file of token ids; expected"):
        data.tokens(tmp_path / name, **SIZES)
    (tmp_path / name).rename(tmp_path / "ids")
    assert len(data.tokens(tmp_path / "ids", **SIZES).ids) == 100


@pytest.mark.parametrize("name", ["a.bin", "a.npy"])
def test_a_file_that_cannot_be_read_is_named(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any, **_options: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    (tmp_path / name).write_bytes(bytes(200))
    monkeypatch.setattr(np, "memmap", refused)
    monkeypatch.setattr(np.lib.format, "open_memmap", refused)
    with pytest.raises(ft.DataError, match=rf"{name}: cannot be read \(Permission denied\)"):
        data.tokens(tmp_path / name, **SIZES)


PLAIN = {
    "nothing": np.zeros(100),
    "one, and padding": np.array([50_256, *[0] * 99]),
    "few tokens": np.random.default_rng(0).integers(0, 4, 5000),
    "many": np.random.default_rng(0).integers(0, 50_257, 5000),
    "few ids": np.array([900, 0] * 20),
    "pairs": np.stack([np.arange(20, 1020) % 88, np.arange(1000) % 8], 1).flatten(),
}


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("dtype", ["uint16", "uint32", "int64"])
def test_ids_of_their_own_type_are_taken(name: str, dtype: str, tmp_path: Path) -> None:
    path, ids = tmp_path / "ids.bin", PLAIN[name].astype(dtype)
    ids.tofile(path)
    _same(data.tokens(path, dtype=dtype, **SIZES), data.tokens(ids, **SIZES))


def test_a_compressed_file_is_not_mapped(tmp_path: Path) -> None:
    (tmp_path / "ids.bin.gz").write_bytes(bytes(100))
    for path in (tmp_path, tmp_path / "ids.bin.gz"):
        with pytest.raises(ft.DataError, match=r"ids\.bin\.gz: compressed"):
            data.tokens(path, **SIZES)
