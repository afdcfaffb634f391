"""safetensors files: the reference's bytes, and nothing but those is read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import orjson
import pytest
import safetensors.torch
import torch
import zoo
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import functrain as ft
from functrain.checkpoint import format as ours

PATH = Path("x.safetensors")
NAMES = st.text(min_size=1, max_size=12).filter(lambda n: n.isprintable() and n != "__metadata__")


@st.composite
def mappings(draw: st.DrawFn) -> dict[str, Tensor]:
    """A few tensors of any dtype and shape, with any bytes."""
    found = {}
    for name in draw(st.lists(NAMES, max_size=6, unique=True)):
        dtype = draw(st.sampled_from(sorted(ours.DTYPES.values(), key=str)))
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        size = dtype.itemsize
        for n in shape:
            size *= n
        data = torch.tensor(list(draw(st.binary(min_size=size, max_size=size))), dtype=torch.uint8)
        data = data % 2 if dtype == torch.bool else data
        found[name] = data.view(dtype).reshape(shape)
    return found


def written(items: dict[str, Tensor]) -> bytes:
    return b"".join(ours.contents(items))


def read(data: bytes) -> ft.trees.Tensors:
    return ours.read(filler(data), len(data), PATH)


def filler(data: bytes) -> Callable[[memoryview], None]:
    left = memoryview(data)

    def fill(buffer: memoryview) -> None:
        nonlocal left
        if len(left) < len(buffer):
            raise ft.CheckpointError("ends too early")
        buffer[:] = left[: len(buffer)]
        left = left[len(buffer) :]

    return fill


@given(mappings())
def test_the_bytes_are_those_of_the_reference(items: dict[str, Tensor]) -> None:
    assert written(items) == safetensors.torch.save(items, metadata={"format": "pt"})


@given(mappings())
def test_reading_gives_what_was_written(items: dict[str, Tensor]) -> None:
    found = read(written(items))
    assert list(found) == sorted(items)
    for name, tensor in found.items():
        assert ft.trees.digest(tensor) == ft.trees.digest(items[name])
        assert tensor.data_ptr() % 64 == 0 or tensor.numel() == 0


def test_what_is_not_contiguous_or_shares_memory_is_written_by_value() -> None:
    base = torch.arange(12.0).reshape(3, 4)
    found = read(written({"turned": base.T, "part": base[1:, ::2], "base": base}))
    assert torch.equal(found["turned"], base.T)
    assert torch.equal(found["part"], base[1:, ::2])


def file(header: bytes | dict[str, object], data: bytes = b"", pad: bool = True) -> bytes:
    text = orjson.dumps(header) if isinstance(header, dict) else header
    text += b" " * (-len(text) % 8) if pad else b""
    return len(text).to_bytes(8, "little") + text + data


META = {"__metadata__": {"format": "pt"}}


def one(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HEAD = b'{"__metadata__":{"format":"pt"},'
HOSTILE = {
    "nothing": b"",
    "seven bytes": b"\0" * 7,
    "a length and nothing": (64).to_bytes(8, "little"),
    "a huge length": (2**63).to_bytes(8, "little") + b"{}",
    "a length of 0": (0).to_bytes(8, "little"),
    "no JSON": file(b"{{{{{{{{"),
    "a list": file(b"[]      "),
    "a number": file(b"12345678"),
    "null": file(b"null    "),
    "nested deeply": file(b"[" * 4000 + b"]" * 4000),
    "not UTF-8": file(
        HEAD + b'"\xff":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', b"\0" * 8
    ),
    "a leading blank": file(b' {"__metadata__":{"format":"pt"}}'),
    "a blank within": file(b'{"__metadata__": {"format":"pt"}}'),
    "padding of NUL": file(b'{"__metadata__":{"format":"pt"}}' + b"\0" * 8),
    "padding of a tab": file(b'{"__metadata__":{"format":"pt"}}' + b"\t" * 8),
    "more padding than needed": file(b'{"__metadata__":{"format":"pt"}}' + b" " * 8),
    "no padding": file({**META, "x": one()}, b"\0" * 8, pad=False),
    "an escape": file(
        HEAD + b'"\\u0061":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', b"\0" * 8
    ),
    "a name twice": file(
        HEAD + b'"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
        b'"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        b"\0" * 8,
    ),
    "a name twice, other dtype": file(
        HEAD + b'"x":{"dtype":"I32","shape":[2],"data_offsets":[0,8]},'
        b'"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        b"\0" * 8,
    ),
    "a key twice": file(
        HEAD + b'"x":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', b"\0" * 8
    ),
    "1e0": file(HEAD + b'"x":{"dtype":"U8","shape":[1e0],"data_offsets":[0,1]}}', b"\0"),
    "-0": file(HEAD + b'"x":{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}'),
    "2**64": file(
        HEAD + b'"x":{"dtype":"U8","shape":[18446744073709551616],"data_offsets":[0,0]}}'
    ),
    "no metadata": file({"x": one()}, b"\0" * 8),
    "metadata of another kind": file({"__metadata__": {"format": "np"}}),
    "metadata with more": file({"__metadata__": {"format": "pt", "more": "1"}}),
    "metadata that is a list": file({"__metadata__": []}),
    "metadata at the end": file({"x": one(), **META}, b"\0" * 8),
    "a tensor of null": file({**META, "x": None}),
    "a tensor of a list": file({**META, "x": []}),
    "a tensor without a shape": file(
        {**META, "x": {"dtype": "F32", "data_offsets": [0, 8]}}, b"\0" * 8
    ),
    "a tensor with more": file({**META, "x": {**one(), "more": 1}}, b"\0" * 8),
    "keys in another order": file(
        {**META, "x": {"shape": [2], "dtype": "F32", "data_offsets": [0, 8]}}, b"\0" * 8
    ),
    "an unknown dtype": file({**META, "x": one("F31")}, b"\0" * 8),
    "a dtype in lower case": file({**META, "x": one("f32")}, b"\0" * 8),
    "a dtype that is a number": file({**META, "x": one(32)}, b"\0" * 8),
    "a dtype that is a list": file({**META, "x": one(["F32"])}, b"\0" * 8),
    "a dtype that is null": file({**META, "x": one(None)}, b"\0" * 8),
    "a shape that is a number": file({**META, "x": one(shape=2)}, b"\0" * 8),
    "a shape of texts": file({**META, "x": one(shape=["2"])}, b"\0" * 8),
    "a shape of truths": file({**META, "x": one("F64", shape=[True])}, b"\0" * 8),
    "a shape of fractions": file({**META, "x": one(shape=[2.0])}, b"\0" * 8),
    "a shape of null": file({**META, "x": one(shape=[None])}, b"\0" * 8),
    "a negative shape": file({**META, "x": one(shape=[-2])}, b"\0" * 8),
    "two negative dimensions": file({**META, "x": one(shape=[-1, -2])}, b"\0" * 8),
    "a shape within a shape": file({**META, "x": one(shape=[[2]])}, b"\0" * 8),
    "2**62 beside 0": file({**META, "x": one(shape=[2**62, 0], offsets=[0, 0])}),
    "2**40 thrice beside 0": file({**META, "x": one(shape=[2**40] * 3 + [0], offsets=[0, 0])}),
    "a product beyond 64 bits": file(
        {**META, "x": one(shape=[2**32, 2**32, 2], offsets=[0, 8])}, b"\0" * 8
    ),
    "10,000 dimensions": file({**META, "x": one(shape=[1] * 10_000, offsets=[0, 4])}, b"\0" * 4),
    "offsets that are a number": file({**META, "x": one(offsets=8)}, b"\0" * 8),
    "one offset": file({**META, "x": one(offsets=[8])}, b"\0" * 8),
    "three offsets": file({**META, "x": one(offsets=[0, 8, 8])}, b"\0" * 8),
    "offsets of truths": file({**META, "x": one("U8", [1], [False, True])}, b"\0"),
    "offsets of fractions": file({**META, "x": one(offsets=[0.0, 8.0])}, b"\0" * 8),
    "a negative offset": file({**META, "x": one(offsets=[-8, 0])}, b"\0" * 8),
    "offsets backwards": file({**META, "x": one(offsets=[8, 0])}, b"\0" * 8),
    "offsets beyond the end": file({**META, "x": one(offsets=[8, 16])}, b"\0" * 8),
    "offsets into the header": file({**META, "x": one(offsets=[2**59, 2**59 + 8])}, b"\0" * 8),
    "too few bytes for the shape": file({**META, "x": one(offsets=[0, 4])}, b"\0" * 4),
    "too many bytes for the shape": file({**META, "x": one(offsets=[0, 12])}, b"\0" * 12),
    "data cut": file({**META, "x": one()}, b"\0" * 7),
    "data with more": file({**META, "x": one()}, b"\0" * 9),
    "data of nobody": file({**META}, b"\0"),
    "a gap": file({**META, "x": one(offsets=[0, 8]), "y": one(offsets=[12, 20])}, b"\0" * 20),
    "an overlap": file({**META, "x": one(offsets=[0, 8]), "y": one(offsets=[4, 12])}, b"\0" * 12),
    "the same bytes twice": file({**META, "x": one(), "y": one()}, b"\0" * 8),
    "names out of order": file({**META, "y": one(), "x": one(offsets=[8, 16])}, b"\0" * 16),
    "dtypes out of order": file(
        {**META, "x": one("U8", [1], [0, 1]), "y": one(offsets=[1, 9])}, b"\0" * 9
    ),
    "an empty name": file({**META, "": one()}, b"\0" * 8),
    "a name with NUL": file({**META, "a\0b": one()}, b"\0" * 8),
    "a name of a line": file({**META, "a\nb": one()}, b"\0" * 8),
    "a name that is long": file({**META, "a" * 2000: one()}, b"\0" * 8),
    "a name that turns around": file({**META, "a\u202eb": one()}, b"\0" * 8),
    "a truth of 7": file({**META, "x": one("BOOL", [2], [0, 2])}, b"\1\7"),
    "a truth of 255": file({**META, "x": one("BOOL", [2], [0, 2])}, b"\xff\0"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused(name: str) -> None:
    with pytest.raises(ft.CheckpointError):
        read(HOSTILE[name])


@given(mappings(), st.data())
def test_no_changed_file_is_anything_but_refused_or_canonical(
    items: dict[str, Tensor], data: st.DataObject
) -> None:
    """Bytes changed at random: an error of ours, or a file that is written back the same."""
    changed = bytearray(written(items))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(changed) - 1))
        changed[place] = data.draw(st.integers(0, 255))
    try:
        found = read(bytes(changed))
    except ft.CheckpointError:
        return
    assert written(dict(found)) == bytes(changed)


def test_a_reader_that_knows_the_documented_format_alone_reads_a_checkpoint(tmp_path: Path) -> None:
    """Written from the text in `functrain.checkpoint`, with the standard library and NumPy."""
    architecture, params, buffers = zoo.split("normed")
    step = ft.pretrain_step(architecture, ft.optim.adamw(1e-2), ema_decay=0.9)
    state, _ = step(step.init(params, buffers), zoo.batch())
    path = ft.save(tmp_path, state, metrics={"eval_loss": float("inf")})
    manifest = json.loads((path / "manifest.json").read_bytes())
    own = manifest.pop("sha256")
    text = json.dumps(manifest, indent=2, sort_keys=True, ensure_ascii=False)
    assert hashlib.sha256(text.encode()).hexdigest() == own
    assert (manifest["format"], manifest["version"], manifest["step"]) == ("functrain", 1, 1)
    assert manifest["metrics"] == {"eval_loss": {"float": "inf"}}
    assert manifest["files"].keys() == {p.name for p in path.iterdir()} - {"manifest.json"}
    for name, entry in manifest["files"].items():
        data = (path / name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (entry["size"], entry["sha256"])
    for file, prefix, expected in (
        ("model", "", state.params),
        ("buffers", "", state.buffers),
        ("optimizer", "exp_avg/", state.optimizer.slots["exp_avg"]),
        ("extra", "average/", state.average),
    ):
        data = (path / f"{file}.safetensors").read_bytes()
        begin = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:begin])
        assert header.pop("__metadata__") == {"format": "pt"}
        for name, tensor in expected.items():
            entry = header[prefix + name]
            first, last = entry["data_offsets"]
            kind = {"F32": "<f4", "I64": "<i8"}[entry["dtype"]]
            values = np.frombuffer(data[begin + first : begin + last], kind)
            assert np.array_equal(values.reshape(entry["shape"]), tensor.numpy())
    leaves = json.loads((path / "state.json").read_bytes())["leaves"]
    assert (leaves["step"], leaves["optimizer/kind"], leaves["guard"]) == (1, "adamw", None)
