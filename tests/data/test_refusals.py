"""What no source can be made of or asked for is refused with a `DataError`, never with nonsense."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import functrain as ft
from functrain import data
from functrain.data.pretrained import pretrained_tokenizer
from functrain.errors import DataError

BYTES = data.ByteTokenizer()
GOOD = {"prompt": "a", "completion": "b"}
SIZES: dict[str, Any] = {"time": 16, "batch_size": 1}


def _chat(*records: Any, **options: Any) -> data.Chats:
    return data.chat(records or [GOOD], BYTES, **{**SIZES, **options})


def _pairs(*records: Any, **options: Any) -> data.Pairs:
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    return data.preference(records or [pair], BYTES, **{**SIZES, **options})


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "all_batches of 0": (lambda: data.all_batches(_chat(), 0), "batch_size: 0, expected"),
    "all_batches of -1": (lambda: data.all_batches(_chat(), -1), "batch_size: -1, expected"),
    "a fraction of a position": (lambda: _chat().at(0.5, 1), "expected integers"),  # type: ignore[arg-type]
    "a boolean count": (lambda: _chat().at(0, True), "expected integers"),
    "a seed that is text": (lambda: _chat(seed="x"), "seed: 'x', expected an integer"),
    "nothing in it": (lambda: data.Chats(examples=(), batch_size=1).at(0, 1), "empty"),
    "chat time below 1": (lambda: _chat(time=-1), "time: -1, expected"),
    "pairs time below 1": (lambda: _pairs(time=-1), "time: -1, expected"),
    "a record that is a number": (lambda: _chat(GOOD, 3), "record 1: expected an object, got int"),
    "a record that is None": (lambda: _chat(None), "record 0: expected an object, got NoneType"),
    "one record for a list": (
        lambda: data.chat(GOOD, BYTES, **SIZES),  # type: ignore[arg-type]
        "records: one object, expected a list",
    ),
    "both forms at once": (
        lambda: _chat({**GOOD, "messages": [{"role": "assistant", "content": "x"}]}),
        "record 0: messages and prompt",
    ),
    "no text to decode": (lambda: BYTES.decode([-1]), "ids: -1, expected"),
    "a foreign id": (lambda: BYTES.decode([97, 300]), "ids: 300, expected"),
    "a document that is no text": (
        lambda: data.text(["a", 3], BYTES, **SIZES),  # type: ignore[list-item]
        "document 1: expected text, got int",
    ),
    "an index out of range": (lambda: data.permuted(7, 3, 0), "index 7 of 3"),
    "negative token ids": (
        lambda: data.tokens(np.array([1, -1, 3]), **SIZES).at(0, 1),
        r"tokens: -1 at 1, expected ids of at least 0",
    ),
    "a list of token ids": (
        lambda: data.tokens([1, 2, 3], **SIZES),  # type: ignore[arg-type]
        r"tokens: expected a path or a numpy array of ids, got list; give numpy.array\(ids\)",
    ),
    "a tensor of token ids": (
        lambda: data.tokens(torch.arange(9), **SIZES),  # type: ignore[arg-type]
        r"tokens: expected a path or a numpy array of ids, got Tensor; give ids.numpy\(\)",
    ),
    "no token ids": (
        lambda: data.tokens(None, **SIZES),  # type: ignore[arg-type]
        "tokens: expected a path or a numpy array of ids, got NoneType",
    ),
    "no chats": (
        lambda: data.chat(None, BYTES, **SIZES),  # type: ignore[arg-type]
        "records: expected a list of objects, got NoneType",
    ),
    "no pairs": (
        lambda: data.preference(3, BYTES, **SIZES),  # type: ignore[arg-type]
        "records: expected a list of objects, got int",
    ),
    "chats that are text": (
        lambda: data.chat("hello", BYTES, **SIZES),  # type: ignore[arg-type]
        "records: expected a list of objects, got str",
    ),
    "no documents": (
        lambda: data.text(None, BYTES, **SIZES),  # type: ignore[arg-type]
        "documents: expected a list of texts, got NoneType",
    ),
    "rows of a time that is text": (
        lambda: data.text(["some text"], BYTES, time="8", batch_size=1),  # type: ignore[arg-type]
        "time: '8', expected an integer of at least 2",
    ),
    "rows of no time": (
        lambda: data.tokens(np.arange(9), time=None, batch_size=1),  # type: ignore[arg-type]
        "time: None, expected an integer of at least 2",
    ),
    "rows of one token": (
        lambda: data.tokens(np.arange(9), time=1, batch_size=1),
        "time: 1, expected an integer of at least 2",
    ),
    "records of no path": (
        lambda: data.records(None),  # type: ignore[arg-type]
        "path: expected a path, got NoneType",
    ),
    "documents of no path": (
        lambda: data.documents(3),  # type: ignore[arg-type]
        "path: expected a path, got int",
    ),
    "token ids beyond int64": (
        lambda: data.tokens(np.array([1, 2**63, 3], dtype=np.uint64), **SIZES).at(0, 1),
        r"tokens: 9223372036854775808 at 1",
    ),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ft.DataError, match=message):
        make()


PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
JUDGED = [{"prompt": "a", "completion": c, "label": True} for c in "bc"]
MAKERS: dict[str, Callable[[Any], Any]] = {
    "chat": lambda tokenizer: data.chat([GOOD], tokenizer, **SIZES),
    "preference": lambda tokenizer: data.preference([PAIR], tokenizer, **SIZES),
    "unpaired": lambda tokenizer: data.unpaired(JUDGED, tokenizer, **SIZES),
    "text": lambda tokenizer: data.text(["some text"], tokenizer, **SIZES),
    "packed_text": lambda tokenizer: data.packed_text(["some text"], tokenizer, **SIZES),
}


class _Special:
    """As a tokenizer of transformers is by default: a token before every text."""

    vocabulary, end = 257, 256

    def encode(self, text: str) -> list[int]:
        return [1, *BYTES.encode(text)]

    def decode(self, ids: Any) -> str:
        return BYTES.decode(ids)


@pytest.mark.parametrize("name", ["chat", "preference", "unpaired"])
def test_a_tokenizer_that_adds_special_tokens_is_refused_where_texts_are_joined(name: str) -> None:
    """Documents are encoded whole, so that there a token before each is where it should be."""
    message = r"encode\(''\) is \[1\], expected \[\].*add_special_tokens=False"
    with pytest.raises(ft.DataError, match=message):
        MAKERS[name](_Special())
    assert data.text(["ab"], _Special(), **SIZES).ids.tolist() == [1, 97, 98, 256]


@pytest.mark.parametrize("given", [-1, 257, 70_000, 2**70])
def test_an_id_outside_the_vocabulary_is_named_by_its_document(given: int) -> None:
    class Wrong(_Special):
        def encode(self, text: str) -> list[int]:
            return [given if each == "!" else ord(each) for each in text]

    message = rf"^document 1: .* ids up to .*{given}.*, and says that its vocabulary is 257"
    for make in (data.text, data.packed_text):
        made: Any = make
        with pytest.raises(ft.DataError, match=message if given > 0 else "down to -1"):
            made(["a", "b!", "!"], Wrong(), **SIZES)


class _Endless:
    def encode(self, text: str) -> list[int]:
        return [ord(each) for each in text]


@pytest.mark.parametrize("name", MAKERS)
def test_what_is_no_tokenizer_is_told_what_it_lacks(name: str) -> None:
    for given, message in (
        (_Endless(), "tokenizer: _Endless has no 'decode' and no 'end'"),
        (None, "tokenizer: NoneType has no 'encode'"),
        (data.ByteTokenizer, "tokenizer: ByteTokenizer .*expected an object with encode"),
    ):
        with pytest.raises(ft.DataError, match=message):
            MAKERS[name](given)


class _Arrays(_Special):
    """As libraries give ids."""

    vocabulary, end, fingerprint = np.int64(257), np.int64(256), "arrays"

    def encode(self, text: str) -> Any:
        return np.array(BYTES.encode(text), dtype=np.uint64)


class _Tensors(_Arrays):
    """As tensors."""

    end = torch.tensor(256)

    def encode(self, text: str) -> Any:
        return torch.tensor(BYTES.encode(text), dtype=torch.int64)


class _List(_Tensors):
    """As a list of integers of some kind."""

    def __init__(self, kind: Callable[[int], Any]) -> None:
        self.kind = kind

    def encode(self, text: str) -> Any:
        return list(map(self.kind, BYTES.encode(text)))


_LISTS = [_List(kind) for kind in (torch.tensor, np.array, np.uint16, np.int64)]


@pytest.mark.parametrize("tokenizer", [_Arrays(), _Tensors(), *_LISTS])
def test_a_tokenizer_may_give_arrays(tokenizer: Any, tmp_path: Path) -> None:
    """And lists of tensors, or of NumPy's integers, for each kind of data."""
    for name, make in MAKERS.items():
        assert repr(make(tokenizer).at(0, 1)) == repr(make(BYTES).at(0, 1)), name
    texts = ["ab", "", "a"]
    made = data.text(texts, tokenizer, **SIZES)
    assert made.ids.tolist() == data.text(texts, BYTES, **SIZES).ids.tolist()
    (tmp_path / "a.txt").write_text("ab")
    cached = data.tokenized(tmp_path / "a.txt", tokenizer, tmp_path / "cache")
    assert cached.text(**SIZES).ids.tolist() == [97, 98, 256]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("end", None, "NoneType, expected an integer"),
        ("end", lambda _: 256, "method, expected .*; make it a property"),
        ("end", True, "bool, expected an integer"),
        ("vocabulary", lambda _: 257, "method, expected .*; make it a property"),
        ("vocabulary", "257", "str, expected an integer"),
        ("fingerprint", 5, "int, expected a text"),
    ],
)
def test_the_parts_of_a_tokenizer_are_of_their_kinds(
    name: str, value: Any, message: str, tmp_path: Path
) -> None:
    own = type("Own", (_Special,), {"encode": BYTES.encode, "fingerprint": "own", name: value})()
    (tmp_path / "a.txt").write_text("some text")
    makers = [lambda: data.tokenized(tmp_path / "a.txt", own, tmp_path / "cache")]
    if name != "fingerprint":
        makers.append(lambda: MAKERS["text"](own))
    if name == "end":
        makers.append(lambda: MAKERS["chat"](own))
    for make in makers:
        with pytest.raises(ft.DataError, match=rf"^tokenizer\.{name}: {message}"):
            make()


_NO_IDS = [1.0, "a", None, [1], True, np.float32(1), np.True_, torch.tensor(1.0), torch.ones(1)]


@pytest.mark.parametrize("given", _NO_IDS, ids=repr)
def test_ids_that_are_no_integers_are_named_by_their_document(given: Any, tmp_path: Path) -> None:
    """A float was cut to an integer."""

    class Wrong(_Special):
        fingerprint = "wrong"

        def encode(self, text: str) -> Any:
            return [given if each == "!" else ord(each) for each in text]

    message = rf"^document 1: the tokenizer gives {re.escape(repr(given))}, expected integers"
    with pytest.raises(ft.DataError, match=message):
        data.text(["a", "b!"], Wrong(), **SIZES)
    (tmp_path / "a.txt").write_text("b!")
    with pytest.raises(ft.DataError, match=r"a\.txt: the tokenizer gives .*, expected integers"):
        data.tokenized(tmp_path / "a.txt", Wrong(), tmp_path / "cache")
    message = rf"the tokenizer gives {re.escape(repr(given))}, expected integers"
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b!"}]
    for record, where in (
        ({"prompt": "a!", "completion": "b"}, "prompt"),
        ({"prompt": "a", "completion": "b!"}, "completion"),
        ({"messages": said}, "messages[1]"),
    ):
        with pytest.raises(ft.DataError, match=rf"^record 0\.{re.escape(where)}: {message}"):
            data.chat([record], Wrong(), **SIZES)


@pytest.mark.parametrize("name", ["preference", "unpaired"])
def test_texts_are_no_answer_to_whether_identical_pairs_are_dropped(name: str) -> None:
    make: Any = getattr(data, name)
    with pytest.raises(ft.DataError, match="drop_identical: 'no', expected True or False"):
        make([PAIR], BYTES, drop_identical="no", **SIZES)


@pytest.mark.parametrize("dtype", ["S0", "S4", "float32", "O", "bool", "unit16", None])
def test_a_dtype_that_is_none_of_ids_is_refused(dtype: Any, tmp_path: Path) -> None:
    path = tmp_path / "ids.bin"
    path.write_bytes(bytes(32))
    message = f"dtype: {dtype!r}, expected an integer dtype such as 'uint16'"
    with pytest.raises(ft.DataError, match=message):
        data.tokens(path, dtype=dtype, **SIZES)


def test_a_file_that_is_no_array_is_refused_without_advice_to_unpickle_it(tmp_path: Path) -> None:
    path = tmp_path / "junk.npy"
    objects = tmp_path / "objects.npy"
    np.save(objects, np.array([{}, None], dtype=object), allow_pickle=True)
    archive = tmp_path / "archive.npz"
    np.savez(archive, ids=np.arange(9))
    whole = tmp_path / "whole.npy"
    np.save(whole, np.arange(99, dtype=np.uint16))
    for junk in (
        b"junk",
        b"",
        b"\x93NUMPY\x01\x00\x06\x00junk((",
        objects.read_bytes(),
        archive.read_bytes(),
        whole.read_bytes()[:-8],
    ):
        path.write_bytes(junk)
        with pytest.raises(
            ft.DataError, match=r"junk.npy: no .npy file of integers .*numpy.save"
        ) as e:
            data.tokens(path, **SIZES)
        assert "pickle" not in str(e.value)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 16, 17, 63, 64, 65, 1000, 4097])
def test_the_order_is_a_permutation_around_powers_of_two(length: int) -> None:
    for key in (0, 1, 2**63 - 1):
        assert {data.permuted(i, length, key) for i in range(length)} == set(range(length))


@pytest.mark.parametrize("label", [True, False])
def test_a_completion_that_is_judged_is_not_learnt_as_any_other(label: bool) -> None:
    with pytest.raises(ft.DataError, match=rf"record 0.label: {label}, .* with the kto loss"):
        _chat({**GOOD, "label": label})


def test_other_columns_of_a_record_are_ignored() -> None:
    assert (
        _chat({**GOOD, "id": 7, "source": "web", "label": "good"}).examples == _chat(GOOD).examples
    )


def test_a_tokenizer_without_transformers_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(DataError, match=r"not installed: pip install 'functrain\[hf\]'"):
        pretrained_tokenizer(tmp_path)
