"""Hostile checkpoints: what `save` would not write is refused, by `CheckpointError` alone.

The hashes find corruption. Whoever forges a checkpoint computes them anew, and so do these tests:
what then stands between a file and the state is the form, and the values that training can come to.
"""

from __future__ import annotations

import ast
import copy
import hashlib
import os
import pickle
import random
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import orjson
import pytest
import tally
import torch
from torch import Tensor, nn

import functrain as ft
from functrain import checkpoint
from functrain.checkpoint.format import DTYPES
from functrain.checkpoint.layout import encode
from functrain.errors import FunctrainWarning

NAME = "step-000000000003"
TENSORS = ("model", "buffers", "optimizer", "extra")
FILES = (*(f"{name}.safetensors" for name in TENSORS), "state.json")
OPTIONS = orjson.OPT_SORT_KEYS | orjson.OPT_INDENT_2
INDEX = {name: dtype.itemsize for name, dtype in DTYPES.items()}


class Model(nn.Module):
    """The smallest that has parameters and buffers of several shapes and dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 2)
        self.norm = nn.BatchNorm1d(2, affine=False)
        self.head = nn.Linear(2, 5)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.norm(self.embedding(input_ids).transpose(1, 2)).transpose(1, 2))


BATCH = {"input_ids": torch.tensor([[1, 2, 3]]), "labels": torch.tensor([[1, 2, 3]])}


def _trained() -> tuple[Any, ft.TrainState]:
    with ft.keys.seeded(2):
        architecture, params, buffers = ft.split(Model())
    step = ft.pretrain_step(
        architecture,
        ft.optim.adamw(1e-2),
        precision="fp16",
        ema_decay=0.9,
        schedule=ft.schedules.reduce_on_plateau(1e-2),
    )
    state = step.init(params, buffers, seed=9)
    for _ in range(3):
        state, _ = step(state, BATCH)
    return step, attrs.evolve(state, cursor=ft.Cursor(samples=3, tokens=6, loader='{"at":3}'))


STEP, STATE = _trained()
LIKE = STEP.init(STATE.params, STATE.buffers)


class Forgery:
    """A valid checkpoint in memory, to be altered and then written with hashes that fit."""

    def __init__(self, originals: dict[str, bytes]) -> None:
        self.files = {name: originals[name] for name in FILES}
        self.manifest = orjson.loads(originals["manifest.json"])
        self.final: bytes | None = None
        self.on_disk: list[Callable[[Path], None]] = []
        self.name = NAME

    @property
    def state(self) -> Any:
        return orjson.loads(self.files["state.json"])

    @state.setter
    def state(self, body: Any) -> None:
        self.files["state.json"] = orjson.dumps(body, option=OPTIONS)

    def leaf(self, path: str, value: Any) -> None:
        body = self.state
        body["leaves"][path] = value
        self.state = body

    def tensors(self, file: str) -> list[list[Any]]:
        """Its tensors, each [name, dtype, shape, data]."""
        data = self.files[f"{file}.safetensors"]
        end = 8 + int.from_bytes(data[:8], "little")
        header = orjson.loads(data[8:end])
        return [
            [n, e["dtype"], e["shape"], data[end:][slice(*e["data_offsets"])]]
            for n, e in header.items()
            if n != "__metadata__"
        ]

    def pack(self, file: str, entries: list[list[Any]]) -> None:
        """Put tensors into a file, in the order that the format has."""
        rank = list(DTYPES)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        position, parts = 0, []
        for name, dtype, shape, data in sorted(entries, key=lambda e: (rank.index(e[1]), e[0])):
            header[name] = {
                "dtype": dtype,
                "shape": shape,
                "data_offsets": [position, position + len(data)],
            }
            position += len(data)
            parts.append(data)
        self.files[f"{file}.safetensors"] = with_header(header, b"".join(parts))

    def tensor(self, file: str, name: str, **changes: Any) -> None:
        """Give a tensor another name, dtype, shape or data; add it where there is none."""
        fields = ("name", "dtype", "shape", "data")
        entries = self.tensors(file)
        found = [entry for entry in entries if entry[0] == name]
        entry = found[0] if found else [name, "F32", [1], b"\0" * 4]
        rest = [each for each in entries if each is not entry]
        self.pack(file, [*rest, [changes.get(f, e) for f, e in zip(fields, entry, strict=True)]])

    def without(self, file: str, name: str) -> None:
        self.pack(file, [entry for entry in self.tensors(file) if entry[0] != name])

    def rehash(self) -> None:
        """Sizes and hashes in the manifest as they are."""
        for name, data in self.files.items():
            self.manifest["files"][name] = {
                "sha256": hashlib.sha256(data).hexdigest(),
                "size": len(data),
            }

    def sealed(self) -> bytes:
        """The manifest, with its own hash where it can have one."""
        body = self.manifest
        if isinstance(body, dict):
            body = {key: value for key, value in body.items() if key != "sha256"}
            own = hashlib.sha256(orjson.dumps(body, option=OPTIONS)).hexdigest()
            body = {**body, "sha256": self.manifest.get("sha256#", own)}
            body.pop("sha256#", None)
        return orjson.dumps(body, option=OPTIONS)

    def write(self, root: Path) -> Path:
        """Write it all; the directory is made anew."""
        shutil.rmtree(root, ignore_errors=True)
        path = root / self.name
        path.mkdir(parents=True)
        for name, data in self.files.items():
            (path / name).write_bytes(data)
        (path / "manifest.json").write_bytes(self.sealed() if self.final is None else self.final)
        for change in self.on_disk:
            change(path)
        return path


def with_header(header: Any, data: bytes, *, pad: bool = True) -> bytes:
    text = header if isinstance(header, bytes) else orjson.dumps(header)
    text += b" " * (-len(text) % 8) if pad else b""
    return len(text).to_bytes(8, "little") + text + data


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    path = ft.save(tmp_path_factory.mktemp("original"), STATE)
    return {each.name: each.read_bytes() for each in path.iterdir()}


def load(path: Path, like: ft.TrainState = LIKE) -> ft.TrainState:
    """The state of a checkpoint; other numerics are not what is looked at here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FunctrainWarning)
        return ft.load(path, like=like)


def test_a_forgery_without_a_change_is_the_checkpoint(
    originals: dict[str, bytes], tmp_path: Path
) -> None:
    """The tests' own writer writes the very bytes of `save`: what is refused is the change."""
    forgery = Forgery(originals)
    for name in TENSORS:
        forgery.pack(name, forgery.tensors(name))
    forgery.state = forgery.state
    forgery.rehash()
    path = forgery.write(tmp_path / "x")
    assert {each.name: each.read_bytes() for each in path.iterdir()} == originals
    assert ft.fingerprint(load(path)) == ft.fingerprint(STATE)


# Corruption.


def _corrupted(original: bytes, bits: range) -> Iterator[bytes]:
    """A longer file, and at each byte a truncation and all of `bits` flipped.

    Without `bits` one of the two, in turn, but for both at the first bytes and the last.
    """
    yield from (original + b"\0", original + b" ", original + original)
    for place in range(len(original)):
        edge = place < 32 or place >= len(original) - 32
        if bits or edge or place % 2:
            yield original[:place]
        for bit in bits or ([place * 5 % 8] if edge or not place % 2 else []):
            flipped = bytearray(original)
            flipped[place] ^= 1 << bit
            yield bytes(flipped)


def _refuses_all(originals: dict[str, bytes], file: str, bits: range, root: Path) -> int:
    path = Forgery(originals).write(root)
    count = 0
    for count, altered in enumerate(_corrupted(originals[file], bits), 1):  # noqa: B007
        (path / file).write_bytes(altered)
        with pytest.raises(ft.CheckpointError):
            load(path)
    (path / file).write_bytes(originals[file])
    assert ft.fingerprint(load(path)) == ft.fingerprint(STATE)
    return count


@pytest.mark.parametrize("file", [*FILES, "manifest.json"])
def test_a_truncation_or_a_flipped_bit_at_every_byte_is_refused(
    file: str, originals: dict[str, bytes], tmp_path: Path
) -> None:
    count = _refuses_all(originals, file, range(0), tmp_path / "x")
    assert count == len(originals[file]) + 64 + 3
    tally.add("bits flipped and files cut", count, part=True, of="corruptions")


@pytest.mark.long
@pytest.mark.parametrize("file", [*FILES, "manifest.json"])
def test_every_truncation_and_every_flipped_bit_is_refused(
    file: str, originals: dict[str, bytes], tmp_path: Path
) -> None:
    count = _refuses_all(originals, file, range(8), tmp_path / "x")
    assert count == 9 * len(originals[file]) + 3
    tally.add("bits flipped and files cut", count, of="corruptions")


# Named forgeries.

Alter = Callable[[Forgery], object]


def _set(place: str, value: Any) -> Alter:
    """Put a value into the manifest; `files/state.json/size` is a path."""

    def alter(forgery: Forgery) -> None:
        forgery.rehash()
        *above, last = place.split("|")
        body = forgery.manifest
        for name in above:
            body = body[name]
        body[last] = value

    return alter


def _drop(place: str) -> Alter:
    def alter(forgery: Forgery) -> None:
        *above, last = place.split("|")
        body = forgery.manifest
        for name in above:
            body = body[name]
        del body[last]

    return alter


def _manifest_is(body: Any) -> Alter:
    return lambda forgery: setattr(forgery, "manifest", body)


def _manifest_text(change: Callable[[bytes], bytes]) -> Alter:
    return lambda forgery: setattr(forgery, "final", change(forgery.sealed()))


SHA = "0" * 64
MANIFESTS: dict[str, Alter] = {
    "nothing": _manifest_text(lambda _: b""),
    "blank": _manifest_text(lambda _: b" " * 100),
    "null": _manifest_is(None),
    "a list": _manifest_is([]),
    "a number": _manifest_is(7),
    "a text": _manifest_is("functrain"),
    "no keys": _manifest_is({}),
    "a leading blank": _manifest_text(lambda text: b" " + text),
    "a line more": _manifest_text(lambda text: text + b"\n"),
    "a byte order mark": _manifest_text(lambda text: b"\xef\xbb\xbf" + text),
    "UTF-16": _manifest_text(lambda text: text.decode().encode("utf-16")),
    "not UTF-8": _manifest_text(lambda text: text.replace(b"functrain", b"functr\xffin")),
    "a lone surrogate": _manifest_text(lambda text: text.replace(b"functrain", b"\\ud800")),
    "an escape": _manifest_text(lambda text: text.replace(b"functrain", b"\\u0066unctrain")),
    "one line": _manifest_text(lambda text: orjson.dumps(orjson.loads(text))),
    "a key twice": _manifest_text(lambda text: text.replace(b'"step": 3', b'"step": 3,"step": 3')),
    "a step twice": _manifest_text(lambda text: text.replace(b'"step": 3', b'"step": 9,"step": 3')),
    "NaN": _manifest_text(lambda text: text.replace(b'"step": 3', b'"step": NaN')),
    "a comment": _manifest_text(lambda text: text.replace(b'"step": 3', b'"step": 3 // three')),
    "nested 300 deep": _manifest_text(lambda _: b'{"a":' + b"[" * 300 + b"]" * 300 + b"}"),
    "nested 100,000 deep": _manifest_text(lambda _: b"[" * 100_000 + b"]" * 100_000),
    "a mebibyte of blanks": _manifest_text(lambda text: text + b" " * (1 << 20)),
    "no hash": lambda forgery: setattr(
        forgery, "final", orjson.dumps({**forgery.manifest, "sha256": None}, option=OPTIONS)
    ),
    "another's hash": _set("sha256#", SHA),
    "a hash of a list": _set("sha256#", [SHA]),
    "another format": _set("format", "safetensors"),
    "a format of null": _set("format", None),
    "version 0": _set("version", 0),
    "version 2": _set("version", 2),
    "version 1.0": _set("version", 1.0),
    "version true": _set("version", True),
    "version '1'": _set("version", "1"),
    "no version": _drop("version"),
    "a key more": _set("more", 1),
    "an empty key": _set("", 1),
    "no step": _drop("step"),
    "another step": _set("step", 4),
    "a step of true": _set("step", True),
    "a step of 3.0": _set("step", 3.0),
    "a step of '3'": _set("step", "3"),
    "a step of null": _set("step", None),
    "a step of -1": _set("step", -1),
    "a step of 10**12": _set("step", 10**12),
    "a step of 2**64 - 1": _set("step", 2**64 - 1),
    "no metrics": _drop("metrics"),
    "metrics of a list": _set("metrics", []),
    "a metric of null": _set("metrics", {"eval_loss": None}),
    "a metric of true": _set("metrics", {"eval_loss": True}),
    "a metric of a text": _set("metrics", {"eval_loss": "0"}),
    "a metric of a list": _set("metrics", {"eval_loss": [0]}),
    "no numerics": _drop("numerics"),
    "numerics of a list": _set("numerics", []),
    "numerics of null": _set("numerics", None),
    "no files": _drop("files"),
    "files of a list": _set("files", []),
    "files of nothing": _set("files", {}),
    "a file too few": _drop("files|state.json"),
    "a file too many": _set("files|more.safetensors", {"sha256": SHA, "size": 0}),
    "a file above": _set("files|../x.safetensors", {"sha256": SHA, "size": 0}),
    "a file from the root": _set("files|/etc/passwd", {"sha256": SHA, "size": 0}),
    "the manifest itself": _set("files|manifest.json", {"sha256": SHA, "size": 0}),
    "a file in another case": _set("files|State.json", {"sha256": SHA, "size": 0}),
    "a file of null": _set("files|state.json", None),
    "a file of a text": _set("files|state.json", SHA),
    "a file of a list": _set("files|state.json", [534, SHA]),
    "a file without a size": _drop("files|state.json|size"),
    "a file without a hash": _drop("files|state.json|sha256"),
    "a file with more": _set("files|state.json|more", 1),
    "a size of true": _set("files|state.json|size", True),
    "a size of a text": _set("files|state.json|size", "534"),
    "a size of a fraction": _set("files|state.json|size", 534.0),
    "a size of null": _set("files|state.json|size", None),
    "a size of -1": _set("files|state.json|size", -1),
    "a size of 0": _set("files|state.json|size", 0),
    "a size of 2**63": _set("files|state.json|size", 2**63),
    "a size of 2**60 - 1": _set("files|model.safetensors|size", 2**60 - 1),
    "a hash of null": _set("files|state.json|sha256", None),
    "a hash of a number": _set("files|state.json|sha256", 0),
    "a hash too short": _set("files|state.json|sha256", "0" * 63),
    "a hash too long": _set("files|state.json|sha256", "0" * 65),
    "a hash in capitals": _set("files|state.json|sha256", "A" * 64),
    "a hash with a line": _set("files|state.json|sha256", "0" * 64 + "\n"),
    "a hash of other digits": _set("files|state.json|sha256", "\u0660" * 64),
    "a hash of another file": _set("files|state.json|sha256", SHA),
}


def _leaf(path: str, value: Any) -> Alter:
    return lambda forgery: forgery.leaf(path, value)


def _body(key: str, value: Any) -> Alter:
    return lambda forgery: setattr(forgery, "state", {**forgery.state, key: value})


def _no_leaf(path: str) -> Alter:
    def alter(forgery: Forgery) -> None:
        body = forgery.state
        del body["leaves"][path]
        forgery.state = body

    return alter


def _text(change: Callable[[bytes], bytes]) -> Alter:
    return lambda forgery: forgery.files.update({"state.json": change(forgery.files["state.json"])})


STATES: dict[str, Alter] = {
    "nothing": _text(lambda _: b""),
    "null": _text(lambda _: b"null"),
    "a list": _text(lambda _: b"[]"),
    "no keys": _text(lambda _: b"{}"),
    "a line more": _text(lambda text: text + b"\n"),
    "a NUL more": _text(lambda text: text + b"\0"),
    "a byte order mark": _text(lambda text: b"\xef\xbb\xbf" + text),
    "one line": _text(lambda text: orjson.dumps(orjson.loads(text))),
    "keys in another order": _text(
        lambda text: orjson.dumps(
            dict(reversed(orjson.loads(text).items())), option=orjson.OPT_INDENT_2
        )
    ),
    "a key twice": _text(lambda text: text.replace(b'"step": 3', b'"step": 9,\n    "step": 3')),
    "NaN": _text(lambda text: text.replace(b'"key": 9', b'"key": NaN')),
    "Infinity": _text(lambda text: text.replace(b'"key": 9', b'"key": Infinity')),
    "1e999": _text(lambda text: text.replace(b'"key": 9', b'"key": 1e999')),
    "9.0e0": _text(lambda text: text.replace(b'"key": 9', b'"key": 9.0e0')),
    "2**64": _text(lambda text: text.replace(b'"key": 9', b'"key": 18446744073709551616')),
    "10**400": _text(lambda text: text.replace(b'"key": 9', b'"key": 1' + b"0" * 400)),
    "-0": _text(lambda text: text.replace(b'"key": 9', b'"key": -0')),
    "09": _text(lambda text: text.replace(b'"key": 9', b'"key": 09')),
    "not UTF-8": _text(lambda text: text.replace(b"adamw", b"adam\xff")),
    "nested 300 deep": _text(lambda _: b'{"leaves":' + b"[" * 300 + b"]" * 300 + b"}"),
    "nested 100,000 deep": _text(lambda _: b"{" * 100_000),
    "a mebibyte of blanks": _text(lambda text: text + b" " * (1 << 20)),
    "no version": lambda forgery: setattr(
        forgery, "state", {k: v for k, v in forgery.state.items() if k != "version"}
    ),
    "version 2": _body("version", 2),
    "version 1.0": _body("version", 1.0),
    "version true": _body("version", True),
    "version null": _body("version", None),
    "a key more": _body("more", {}),
    "leaves of null": _body("leaves", None),
    "leaves of a list": _body("leaves", []),
    "no leaves": _body("leaves", {}),
    "slots of null": _body("slots", None),
    "slots of numbers": _body("slots", [1, 2]),
    "slots of an object": _body("slots", {}),
    "a leaf more": _leaf("more", 1),
    "an empty path": _leaf("", 1),
    "a path above": _leaf("../step", 1),
    "a path of a slot": _leaf("optimizer/slots/exp_avg", 1),
    "a path of a slot's": _leaf("optimizer/slots/exp_avg/nobody", 1),
    "a path of a parameter's": _leaf("params/nobody", 1),
    "a path with NUL": _leaf("step\0", 3),
    "no step": _no_leaf("step"),
    "no kind": _no_leaf("optimizer/kind"),
    "no key": _no_leaf("key"),
    "no reference": _no_leaf("reference"),
    "another kind": _leaf("optimizer/kind", "sgd"),
    "a kind of null": _leaf("optimizer/kind", None),
    "a kind of a list": _leaf("optimizer/kind", ["adamw"]),
    "a step of true": _leaf("step", True),
    "a step of 3.0": _leaf("step", 3.0),
    "a step of '3'": _leaf("step", "3"),
    "a step of null": _leaf("step", None),
    "a step of infinity": _leaf("step", {"float": "inf"}),
    "a step of -3": _leaf("step", -3),
    "a step of 10**12": _leaf("step", 10**12),
    "another step than the manifest's": _leaf("step", 4),
    "a key of -1": _leaf("key", -1),
    "a key of 2**63": _leaf("key", 2**63),
    "a key of a text": _leaf("key", "9"),
    "a key of null": _leaf("key", None),
    "samples of -1": _leaf("cursor/samples", -1),
    "samples of a fraction": _leaf("cursor/samples", 0.5),
    "tokens of 2**64 - 1": _leaf("cursor/tokens", 2**64 - 1),
    "a loader of a number": _leaf("cursor/loader", 3),
    "a loader of an object": _leaf("cursor/loader", {"at": 3}),
    "a reference of a number": _leaf("reference", 0),
    "a growth factor of 0": _leaf("scaler/growth_factor", 0.0),
    "a growth factor of 1": _leaf("scaler/growth_factor", 1.0),
    "a growth factor of -2": _leaf("scaler/growth_factor", -2.0),
    "a growth factor of NaN": _leaf("scaler/growth_factor", {"float": "nan"}),
    "a growth factor of infinity": _leaf("scaler/growth_factor", {"float": "inf"}),
    "a growth factor of 2": _leaf("scaler/growth_factor", 2),
    "a backoff factor of 0": _leaf("scaler/backoff_factor", 0.0),
    "a backoff factor of 1": _leaf("scaler/backoff_factor", 1.0),
    "a backoff factor of 1e308": _leaf("scaler/backoff_factor", 1e308),
    "a growth interval of 0": _leaf("scaler/growth_interval", 0),
    "a growth interval of a fraction": _leaf("scaler/growth_interval", 0.5),
    "a learning rate of NaN": _leaf("scheduler/plateau/learning_rate", {"float": "nan"}),
    "a learning rate of infinity": _leaf("scheduler/plateau/learning_rate", {"float": "inf"}),
    "a learning rate of -1": _leaf("scheduler/plateau/learning_rate", -1.0),
    "bad of -1": _leaf("scheduler/plateau/bad", -1),
    "a cooldown of true": _leaf("scheduler/plateau/cooldown", True),
    "best of an integer": _leaf("scheduler/plateau/best", 3),
    "best of null": _leaf("scheduler/plateau/best", None),
    "a float of another spelling": _leaf("scheduler/plateau/best", {"float": "Infinity"}),
    "a float of 1.0": _leaf("scheduler/plateau/best", {"float": "1.0"}),
    "a float of a number": _leaf("scheduler/plateau/best", {"float": 1.0}),
    "a float of a list": _leaf("scheduler/plateau/best", {"float": ["inf"]}),
    "a float and more": _leaf("scheduler/plateau/best", {"float": "inf", "more": 1}),
    "a float within a float": _leaf("scheduler/plateau/best", {"float": {"float": "inf"}}),
}


def _tensor(file: str, name: str, **changes: Any) -> Alter:
    return lambda forgery: forgery.tensor(file, name, **changes)


def _cast(name: str, dtype: str, data: bytes, file: str = "extra", shape: Any = ()) -> Alter:
    return _tensor(file, name, dtype=dtype, shape=list(shape), data=data)


MINUS_ONE = (-1).to_bytes(8, "little", signed=True)
LEAVES: dict[str, Alter] = {
    "a count of -1": _cast("optimizer/count", "I64", MINUS_ONE),
    "a count of two": _cast("optimizer/count", "I64", MINUS_ONE * 2, shape=[2]),
    "a count of none": _cast("optimizer/count", "I64", b"", shape=[0]),
    "a count of a fraction": _cast("optimizer/count", "F32", b"\0\0\x80\x3f"),
    "a count of NaN": _cast("optimizer/count", "F32", b"\0\0\xc0\x7f"),
    "a count of infinity": _cast("optimizer/count", "F64", b"\0\0\0\0\0\0\xf0\x7f"),
    "a count of complex": _cast("optimizer/count", "C64", b"\0" * 8),
    "a count of truth": _cast("optimizer/count", "BOOL", b"\1"),
    "a count of 8 bits": _cast("optimizer/count", "F8_E4M3", b"\0"),
    "a count without a sign": _cast("optimizer/count", "U64", b"\xff" * 8),
    "no count": lambda forgery: forgery.without("extra", "optimizer/count"),
    "a schedule's count of -1": _cast("scheduler/count", "I64", MINUS_ONE),
    "a schedule's count of complex": _cast("scheduler/count", "C64", b"\0" * 8),
    "a schedule's count without a sign": _cast("scheduler/count", "U64", b"\0" * 8),
    "a scale of -1": _cast("scaler/scale", "F32", b"\0\0\x80\xbf"),
    "a scale of NaN": _cast("scaler/scale", "F32", b"\0\0\xc0\x7f"),
    "a scale of infinity": _cast("scaler/scale", "F32", b"\0\0\x80\x7f"),
    "a scale of two": _cast("scaler/scale", "F32", b"\0\0\x80\x3f" * 2, shape=[2]),
    "a scale of an integer": _cast("scaler/scale", "U64", b"\1" + b"\0" * 7),
    "a scale of complex": _cast("scaler/scale", "C64", b"\0\0\x80\x3f" * 2),
    "a scale of 8 bits": _cast("scaler/scale", "F8_E5M2", b"\x3c"),
    "a growth count of -1": _cast("scaler/growth_count", "I32", b"\xff" * 4),
    "a growth count of complex": _cast("scaler/growth_count", "C64", b"\0" * 8),
    "a negative second moment": _cast(
        "exp_avg_sq/head.bias", "F32", b"\0\0\x80\xbf" * 5, "optimizer", [5]
    ),
    "a second moment of complex": _cast(
        "exp_avg_sq/head.bias", "C64", b"\0" * 40, "optimizer", [5]
    ),
    "a second moment without a sign": _cast(
        "exp_avg_sq/head.bias", "U32", b"\0" * 20, "optimizer", [5]
    ),
    "a moment turned": _cast("exp_avg/head.weight", "F32", b"\0" * 40, "optimizer", [2, 5]),
    "a slot without a parameter": _tensor("optimizer", "exp_avg"),
    "a slot of nobody": _tensor("optimizer", "exp_avg/nobody"),
    "a slot without a name": _tensor("optimizer", "/head.bias"),
    "a slot with an empty parameter": _tensor("optimizer", "exp_avg/"),
    "no slots": lambda forgery: forgery.pack("optimizer", []),
    "a slot too few": lambda forgery: forgery.without("optimizer", "exp_avg/head.bias"),
    "a parameter more": _tensor("model", "more"),
    "a parameter too few": lambda forgery: forgery.without("model", "head.bias"),
    "a parameter of halves": _cast("head.bias", "F16", b"\0" * 10, "model", [5]),
    "a parameter turned": _cast("head.weight", "F32", b"\0" * 40, "model", [2, 5]),
    "a parameter of one more dimension": _cast("head.bias", "F32", b"\0" * 20, "model", [5, 1]),
    "a buffer of floats": _cast("norm.num_batches_tracked", "F64", b"\0" * 8, "buffers"),
    "a parameter among the rest": _cast("params/head.bias", "F32", b"\0" * 20, shape=[5]),
    "a buffer among the rest": _cast("buffers/norm.running_mean", "F32", b"\0" * 8, shape=[2]),
    "a slot among the rest": _cast(
        "optimizer/slots/exp_avg/head.bias", "F32", b"\0" * 20, shape=[5]
    ),
    "a number among the tensors": _cast("step", "I64", b"\3" + b"\0" * 7),
    "a name among the tensors": _cast("optimizer/kind", "U8", b"a"),
    "a text among the tensors": _cast("cursor/loader", "U8", b"a"),
    "an average too few": lambda forgery: forgery.without("extra", "average/head.bias"),
    "an average more": _tensor("extra", "average/nobody"),
    "a reference that is a tensor": _tensor("extra", "reference"),
    "a reference of tensors": _tensor("extra", "reference/head.bias"),
}


def _replaced(name: str, make: Callable[[Path], object]) -> Alter:
    def change(path: Path) -> None:
        (path / name).unlink()
        make(path / name)

    return lambda forgery: forgery.on_disk.append(change)


def _copied(name: str, target: Path) -> None:
    elsewhere = target.parent.parent / "elsewhere"
    elsewhere.write_bytes((target.parent / name).read_bytes())
    target.symlink_to(elsewhere)


ON_DISK: dict[str, Alter] = {
    f"{kind} for {name}": _replaced(name, make)
    for name in (*FILES, "manifest.json")
    for kind, make in {
        "nothing": lambda _: None,
        "a directory": Path.mkdir,
        "a pipe": os.mkfifo,
        "a link to nowhere": lambda path: path.symlink_to("nowhere"),
        "a link to itself": lambda path: path.symlink_to(path.name),
        "a link to /dev/zero": lambda path: path.symlink_to("/dev/zero"),
        "an empty file": Path.touch,
    }.items()
} | {
    "a link to the very file": lambda forgery: forgery.on_disk.append(
        lambda path: (
            (path / "state.json").rename(path.parent / "elsewhere")
            and (path / "state.json").symlink_to(path.parent / "elsewhere")
        )
    ),
    "the files in a directory below": lambda forgery: forgery.on_disk.append(
        lambda path: (path / "below").mkdir() or (path / FILES[0]).rename(path / "below" / FILES[0])
    ),
    "another directory's name": lambda forgery: setattr(forgery, "name", "step-000000000004"),
    "two files exchanged": lambda forgery: forgery.files.update(
        {FILES[0]: forgery.files[FILES[1]], FILES[1]: forgery.files[FILES[0]]}
    ),
    "a tensor file for the numbers": lambda forgery: forgery.files.update(
        {"state.json": forgery.files[FILES[0]]}
    ),
    "the numbers for a tensor file": lambda forgery: forgery.files.update(
        {FILES[0]: forgery.files["state.json"]}
    ),
}
NAMED = {
    f"{kind}: {name}": (kind, alter)
    for kind, cases in {
        "manifest": MANIFESTS,
        "state": STATES,
        "leaves": LEAVES,
        "disk": ON_DISK,
    }.items()
    for name, alter in cases.items()
}


@pytest.mark.parametrize("name", NAMED)
def test_a_named_forgery_is_refused(name: str, originals: dict[str, bytes], tmp_path: Path) -> None:
    """With fitting hashes, so that the form and the values alone speak against it."""
    kind, alter = NAMED[name]
    forgery = Forgery(originals)
    alter(forgery)
    if kind != "manifest":
        forgery.rehash()
    path = forgery.write(tmp_path / "x")
    with pytest.raises(ft.CheckpointError, match=r"\S{3}.* .*") as caught:
        load(path)
    assert len(str(caught.value)) < 20_000
    tally.add("named hostile checkpoints")


def test_there_are_more_than_two_hundred_named_forgeries() -> None:
    """Beside those of the format by itself, in test_format.py."""
    assert len(NAMED) > 200


# Forgeries by the thousand.

ODD: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    3,
    -1,
    2**31,
    2**53 + 1,
    2**63 - 1,
    2**63,
    2**64 - 1,
    -(2**63),
    0.0,
    -0.0,
    0.5,
    1.5,
    -2.5,
    5e-324,
    1e308,
    -1e308,
    {"float": "nan"},
    {"float": "inf"},
    {"float": "-inf"},
    {"float": 1},
    "",
    "adamw",
    "nan",
    "\0",
    "\u202e\u0301",
    "𝕬" * 30,
    "../../x",
    "x" * 2000,
    [],
    {},
    [[]],
    [0] * 100,
    {"": {}},
)
NAMES = (
    "",
    "x",
    "step",
    "params/head.bias",
    "head.bias",
    "optimizer/count",
    "exp_avg",
    "exp_avg/head.bias",
    "exp_avg//head.bias",
    "scaler/scale",
    "average/head.bias",
    "reference/head.bias",
    "__metadata__",
    "a\0b",
    "../x",
    "é",
    "e\u0301",
    "/",
    "x" * 1100,
)


class Dice(random.Random):
    """The alterations, drawn from a seed."""

    def alter(self, forgery: Forgery) -> None:
        """One to three alterations, and hashes that fit, nine times of ten."""
        before_hash = [self.of_state, self.of_header, self.of_tensors, self.of_data, self.of_files]
        for _ in range(self.choice((1, 1, 1, 2, 3))):
            self.choice(before_hash)(forgery)
        if self.random() < 0.9:
            forgery.rehash()
        if self.random() < 0.15:
            self.of_manifest(forgery)
        if self.random() < 0.1:
            self.of_disk(forgery)

    def value(self) -> Any:
        if self.random() < 0.05:
            deep: Any = 0
            for _ in range(self.choice((2, 33, 200, 253, 254, 255, 256))):
                deep = [deep] if self.random() < 0.5 else {"a": deep}
            return deep
        return copy.deepcopy(self.choice(ODD))

    def tree(self, tree: Any) -> Any:
        """JSON with a value somewhere replaced, removed, added, or under another name."""
        tree = copy.deepcopy(tree)
        node, above, key = tree, None, None
        while isinstance(node, dict | list) and node and (above is None or self.random() < 0.85):
            above = node
            key = self.choice(list(node) if isinstance(node, dict) else range(len(node)))
            node = node[key]
        if above is None:
            return self.value()
        kind = self.randrange(6)
        if kind == 0:
            del above[key]
        elif kind == 1 and isinstance(above, dict):
            above[self.choice(NAMES)] = self.value()
        elif kind == 2 and isinstance(above, dict):
            above[self.choice(NAMES)] = above.pop(key)
        elif kind == 3 and isinstance(above, list):
            above.insert(self.randrange(len(above) + 1), self.value())
        elif kind == 4 and isinstance(node, int) and not isinstance(node, bool):
            above[key] = max(-(2**63), min(2**64 - 1, node + self.choice((-1, 1, -8, 8, 2**32))))
        else:
            above[key] = self.value()
        return tree

    def text(self, data: bytes) -> bytes:
        """Bytes with some replaced, inserted, removed or doubled."""
        at, length = self.randrange(len(data) + 1), self.choice((1, 1, 2, 8, 40))
        new = self.choice((b"\0", b" ", b'"', b"{", b"}", b",", b"\xff", b"1", b"-", b"e9", b"[["))
        return self.choice(
            (
                data[:at] + new + data[at + length :],
                data[:at] + new + data[at:],
                data[:at] + data[at + length :],
                data[: at + length] + data[at:],
                data[:at],
            )
        )

    def dumped(self, tree: Any, option: int | None) -> bytes | None:
        try:
            return orjson.dumps(tree, option=option)
        except orjson.JSONEncodeError:
            return None  # nested too deeply for the attacker's own writer

    def of_state(self, forgery: Forgery) -> None:
        data = forgery.files["state.json"]
        if self.random() < 0.2:
            forgery.files["state.json"] = self.text(data)
            return
        try:
            tree = orjson.loads(data)
        except orjson.JSONDecodeError:
            return
        forgery.files["state.json"] = self.dumped(self.tree(tree), OPTIONS) or data

    def of_header(self, forgery: Forgery) -> None:
        file = f"{self.choice(TENSORS)}.safetensors"
        data = forgery.files[file]
        end = 8 + int.from_bytes(data[:8], "little")
        text = data[8:end].rstrip(b" ")
        if self.random() < 0.25:
            changed: bytes | None = self.text(text)
        else:
            try:
                changed = self.dumped(self.tree(orjson.loads(text)), None)
            except orjson.JSONDecodeError:
                return
        if changed is not None:
            forgery.files[file] = with_header(changed, data[end:], pad=self.random() < 0.95)
        if self.random() < 0.05:
            length = self.choice((0, 7, 8, 2**26, 2**32, 2**63, 2**64 - 1))
            forgery.files[file] = length.to_bytes(8, "little") + forgery.files[file][8:]

    def of_tensors(self, forgery: Forgery) -> None:
        """A file in perfect form whose tensors are others."""
        file = self.choice(TENSORS)
        try:
            entries = forgery.tensors(file)
            assert all(
                INDEX[dtype] and n in range(100) for _, dtype, shape, _ in entries for n in shape
            )
            assert all(INDEX[dtype] and len(shape) < 3 for _, dtype, shape, _ in entries)
        except (ValueError, KeyError, TypeError, AttributeError, AssertionError):
            return  # altered before
        entry = self.choice(entries) if entries else ["x", "F32", [], b"\0" * 4]
        kind = self.randrange(5)
        if kind == 0:
            entries = [each for each in entries if each is not entry]
        elif kind == 1:
            entry[0] = self.choice(NAMES)
        else:
            if kind == 2 or not entries:
                entry = [self.choice(NAMES), *entry[1:]]
                entries = [*(each for each in entries if each[0] != entry[0]), entry]
            if self.random() < 0.7:
                entry[1] = self.choice(list(DTYPES))
            if self.random() < 0.5:
                entry[2] = self.choice(
                    ([], [0], [1], [2], [5], [5, 2], [2, 5], [1] * 65, [0, 2**40])
                )
            size = INDEX[entry[1]]
            for n in entry[2]:
                size *= n
            entry[3] = self.randbytes(size) if self.random() < 0.5 else b"\0" * size
        names = [each[0] for each in entries]
        if len(set(names)) == len(names):
            forgery.pack(file, entries)

    def of_data(self, forgery: Forgery) -> None:
        """Other values in the tensors: NaN, infinities, negative ones."""
        file = f"{self.choice(TENSORS)}.safetensors"
        data = bytearray(forgery.files[file])
        begin = 8 + int.from_bytes(data[:8], "little")
        if begin >= len(data):
            return
        at = self.randrange(begin, len(data))
        word = self.choice(
            (b"\xff" * 8, b"\0" * 8, b"\0\0\x80\x7f", b"\0\0\xc0\xff", b"\0\0\x80\xbf")
        )
        length = min(len(word), len(data) - at)
        data[at : at + length] = word[:length]
        forgery.files[file] = bytes(data)

    def of_files(self, forgery: Forgery) -> None:
        if self.random() < 0.6:
            return
        one, other = self.sample(FILES, 2)
        data = forgery.files
        kind = self.randrange(3)
        if kind == 0:
            data[one], data[other] = data[other], data[one]
        elif kind == 1:
            data[one] = data[other]
        else:
            data[one] = self.choice((b"", b"{}", b"\0" * 16, self.randbytes(64)))

    def of_manifest(self, forgery: Forgery) -> None:
        if self.random() < 0.3:
            forgery.final = self.text(forgery.sealed())
            return
        before = forgery.manifest
        forgery.manifest = self.tree(before)
        try:
            forgery.sealed()
        except orjson.JSONEncodeError:
            forgery.manifest = before

    def of_disk(self, forgery: Forgery) -> None:
        name = self.choice((*FILES, "manifest.json"))
        makes: tuple[Callable[[Path], object], ...] = (
            lambda path: None,
            Path.mkdir,
            os.mkfifo,
            lambda path: path.symlink_to("nowhere"),
            lambda path: path.symlink_to(path.parent),
            lambda path: path.symlink_to("/dev/zero"),
            lambda path: path.with_name("extra.json").touch() or path.touch(),
            lambda path: path.with_name(f"{path.name}~").write_bytes(b"x") and path.touch(),
        )
        make = self.choice(makes)

        def change(path: Path) -> None:
            (path / name).unlink(missing_ok=True)
            make(path / name)

        forgery.on_disk.append(change)


def _survive(originals: dict[str, bytes], root: Path, seeds: range) -> tuple[int, int, float]:
    """Forge by each seed and load: how many were refused, and valid, and the longest time.

    Whatever is not refused must be what `save` would have written of the state that it gave, and
    a state that a step takes.
    """
    refused, valid, longest = 0, 0, 0.0
    for seed in seeds:
        forgery = Forgery(originals)
        Dice(seed).alter(forgery)
        path = forgery.write(root)
        begin = time.thread_time()
        try:
            state = load(path, LIKE if seed % 2 else STATE)
        except ft.CheckpointError:
            refused += 1
            continue
        except BaseException as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
        finally:
            longest = max(longest, time.thread_time() - begin)
        valid += 1
        _check_valid(state, forgery, seed)
    return refused, valid, longest


def _check_valid(state: ft.TrainState, forgery: Forgery, seed: int) -> None:
    again = {name: b"".join(parts) for name, parts in encode(state).items()}
    for name, data in again.items():
        same = data == forgery.files[name] or (
            name == "state.json" and _read(data, again) == _read(forgery.files[name], again)
        )
        assert same, f"seed {seed}: {name} is loaded as something else"
    try:
        following, _ = STEP(state, BATCH)
    except ft.FunctrainError:
        return  # a state, but not this step's: slots that an optimizer may make later are missing
    assert following.step == state.step + 1, f"seed {seed}"


def _read(data: bytes, files: dict[str, bytes]) -> Any:
    """What of state.json is read: the names of slots and of tensors are not, there."""
    header = files["extra.safetensors"].decode(errors="replace")
    leaves = orjson.loads(data)["leaves"]
    return {
        path: value
        for path, value in leaves.items()
        if f'"{path}"' not in header
        and not path.startswith(("params/", "buffers/", "optimizer/slots/"))
    }


def test_hundreds_of_forgeries_are_refused_or_valid(
    originals: dict[str, bytes], tmp_path: Path
) -> None:
    """Only CheckpointError, within a moment; or a state that is written back the same."""
    refused, valid, longest = _survive(originals, tmp_path / "x", range(500))
    assert refused + valid == 500
    assert refused > 300
    assert valid > 15
    assert longest < 1.0
    tally.add("mutated checkpoints", refused + valid)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("part", range(10))
def test_a_hundred_thousand_forgeries_are_refused_or_valid(
    part: int, originals: dict[str, bytes], tmp_path: Path
) -> None:
    """The same, 10,000 in each of ten parts, none of them among the 500."""
    seeds = range(1_000_000 + part * 10_000, 1_000_000 + (part + 1) * 10_000)
    refused, valid, longest = _survive(originals, tmp_path / "x", seeds)
    assert refused + valid == 10_000
    assert longest < 1.0
    tally.add("mutated checkpoints", refused + valid)


def test_what_reads_beside_load_refuses_alike(originals: dict[str, bytes], tmp_path: Path) -> None:
    """`inspect`, `load_model` and `load_tensors`, mapped too: CheckpointError, if anything."""
    readers: tuple[Callable[[Path], object], ...] = (
        checkpoint.inspect,
        lambda path: checkpoint.load_model(path, STATE.params, STATE.buffers),
        lambda path: checkpoint.load_tensors(path, "*"),
        lambda path: checkpoint.load_tensors(path, "*", mapped=True),
    )
    for seed in range(400):
        forgery = Forgery(originals)
        Dice(seed).alter(forgery)
        path = forgery.write(tmp_path / "x")
        try:
            readers[seed % len(readers)](path)
        except ft.CheckpointError:
            continue
        except BaseException as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error


# No pickle.

PACKAGE = Path(ft.__file__).parent
FORBIDDEN_MODULES = {
    "pickle",
    "_pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "joblib",
    "shelve",
    "marshal",
}
FORBIDDEN_CALLS = {("torch", "load"), ("torch", "save"), ("torch", "package"), ("torch", "jit")}


def _forbidden(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            names = [module, *(f"{module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            names = [f"{node.value.id}.{node.attr}"]
        elif isinstance(node, ast.Name) and node.id in ("eval", "exec"):
            names = [f"{node.id}()"]
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            given = node.value
            fine = isinstance(given, ast.Constant) and given.value is False
            names = [] if fine else ["allow_pickle"]
        else:
            continue
        for name in names:
            first, _, second = name.partition(".")
            called = (first, second.split(".")[0]) in FORBIDDEN_CALLS
            if first in FORBIDDEN_MODULES or called or name in ("eval()", "exec()", "allow_pickle"):
                yield name


def test_the_package_holds_no_pickle_and_no_eval() -> None:
    """Walked as syntax: no import, no attribute, no call of what can run a file as a program."""
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 40
    found = [
        f"{file.relative_to(PACKAGE)}: {name}"
        for file in files
        for name in _forbidden(ast.parse(file.read_text()))
    ]
    assert not found
    tally.add("modules searched for pickle", len(files))
    program = (
        "import pickle as p\ntorch.load(x)\neval('1')\nnp.load(x, allow_pickle=True)\nm.eval()"
    )
    assert sorted(_forbidden(ast.parse(program))) == [
        "allow_pickle",
        "eval()",
        "pickle",
        "torch.load",
    ]


def test_a_checkpoint_is_saved_and_loaded_with_pickle_out_of_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every way into pickle, and torch's own save and load, raising."""

    def refuse(*_args: object, **_kwargs: object) -> Any:
        raise AssertionError("pickle was used")

    for name in (
        "Unpickler",
        "Pickler",
        "_Unpickler",
        "_Pickler",
        "load",
        "loads",
        "dump",
        "dumps",
    ):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "save", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    ft.save(tmp_path, STATE)
    assert ft.fingerprint(ft.load(tmp_path, like=STATE)) == ft.fingerprint(STATE)
    checkpoint.inspect(tmp_path)
    with checkpoint.BackgroundWriter(tmp_path / "other") as writer:
        writer.save(STATE)
    assert ft.fingerprint(ft.load(tmp_path / "other", like=STATE)) == ft.fingerprint(STATE)
    tally.add("runs with pickle out of use")
