"""Files as records: every form of the same objects is read the same, and nothing is passed over."""

from __future__ import annotations

import bz2
import errno
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import functrain as ft
from functrain import data
from functrain.data import columns, files

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
TURN = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "system"]), "content": TEXT},
    optional={"weight": st.integers(0, 1)},
)
OBJECTS = st.lists(
    st.fixed_dictionaries({"messages": st.lists(TURN, min_size=1, max_size=4), "id": TEXT}),
    min_size=1,
    max_size=4,
)
TALK = [
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "two", "weight": 0},
    {"role": "user", "content": "three?"},
    {"role": "assistant", "content": "four"},
]
BYTES = data.ByteTokenizer()
SIZES: dict[str, Any] = {"time": 99, "batch_size": 1}


def _jsonl(objects: list[Any]) -> bytes:
    return b"".join(json.dumps(each).encode() + b"\n" for each in objects)


def _parquet(path: Path, objects: list[Any]) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(objects), path)


def test_a_map_in_parquet_is_an_object(tmp_path: Path) -> None:
    """At any depth, and an empty one too: a tool's arguments may be written as one."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    kind = pyarrow.map_(pyarrow.string(), pyarrow.string())
    values = [[("k", "v"), ("n", None)], []]
    table = {
        "meta": pyarrow.array(values, kind),
        "deep": pyarrow.array(
            [[{"arguments": each}] for each in values],
            pyarrow.list_(pyarrow.struct([("arguments", kind)])),
        ),
    }
    parquet.write_table(pyarrow.table(table), tmp_path / "a.parquet")
    assert data.records(tmp_path / "a.parquet") == [
        {"meta": {"k": "v"}, "deep": [{"arguments": {"k": "v"}}]},
        {"meta": {}, "deep": [{"arguments": {}}]},
    ]


def test_a_map_whose_keys_are_objects_or_lists_stays_a_list_of_pairs(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    text = pyarrow.string()
    for kind, key in ((pyarrow.struct([("x", text)]), {"x": "a"}), (pyarrow.list_(text), ["a"])):
        column = pyarrow.array([[(key, "v")]], pyarrow.map_(kind, text))
        parquet.write_table(pyarrow.table({"meta": column}), tmp_path / "a.parquet")
        assert data.records(tmp_path / "a.parquet") == [{"meta": [(key, "v")]}]


@given(objects=OBJECTS)
def test_every_form_of_the_same_objects_is_read_the_same(
    tmp_path_factory: pytest.TempPathFactory, objects: list[Any]
) -> None:
    """Fields that only some messages have are null in Parquet's columns, and absent again here."""
    path = tmp_path_factory.mktemp("forms")
    (path / "a.jsonl").write_bytes(_jsonl(objects))
    (path / "a.jsonl.gz").write_bytes(gzip.compress(_jsonl(objects)))
    (path / "b.JSONL.GZ").write_bytes(gzip.compress(_jsonl(objects)))
    (path / "a.json").write_text(json.dumps(objects))
    (path / "a.json.gz").write_bytes(gzip.compress(json.dumps(objects).encode()))
    _parquet(path / "a.parquet", objects)
    forms = sorted(path.iterdir())
    assert [data.records(form) for form in forms] == [objects] * 6
    assert data.records(path) == objects * 6
    assert data.records(path / "*.gz") == objects * 2


def test_a_directory_is_read_in_the_order_of_names_and_says_where(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for name, ids in (("c.jsonl", [3]), ("b/2.jsonl", [2]), ("a.jsonl", [0, 1]), ("b.jsonl", [4])):
        (tmp_path / name).write_bytes(_jsonl([{"n": n} for n in ids]))
    found = data.records(tmp_path)
    assert [each["n"] for each in found] == [0, 1, 2, 4, 3]
    assert found.where(1) == f"{tmp_path / 'a.jsonl'}:2"
    assert found.where(2) == f"{tmp_path / 'b/2.jsonl'}:1"
    assert found.files == 4
    assert found.first(3).where(2) == found.where(2)
    assert data.records(tmp_path / "**" / "2.*") == [{"n": 2}]


@pytest.mark.parametrize("what", ["no UTF-8", "a year", "a time zone"])
def test_a_value_of_parquet_that_python_has_none_for_is_malformed(
    what: str, tmp_path: Path
) -> None:
    """The rest of its file is left out with it; other files are read."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    offsets, text = (pyarrow.py_buffer(each) for each in (bytes(4) + b"\2\0\0\0", b"\xff\xfe"))
    values = {
        "no UTF-8": lambda: pyarrow.StringArray.from_buffers(1, offsets, text),
        "a year": lambda: pyarrow.array([2**60], pyarrow.timestamp("us")),
        "a time zone": lambda: pyarrow.array([1], pyarrow.timestamp("us", "Mars/Olympus")),
    }
    parquet.write_table(pyarrow.table({"text": ["a"], "x": values[what]()}), tmp_path / "a.parquet")
    _parquet(tmp_path / "b.parquet", [{"text": "b"}])
    with pytest.raises(ft.DataError, match=r"a\.parquet: holds a value that cannot be read"):
        data.documents(tmp_path)
    found = data.documents(tmp_path, on_bad_record="skip")
    assert (list(found), len(found.malformed)) == (["b"], 1)


def test_records_keep_their_places_in_a_list_that_is_changed(tmp_path: Path) -> None:
    """Also where another equals them; what is put in is known by its number."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(_jsonl([{"prompt": "q", "completion": text} for text in ("a", "b", "", "a")]))
    found = data.records(path)
    found.reverse()
    assert [found.where(n) for n in range(4)] == [f"{path}:{n}" for n in (4, 3, 2, 1)]
    assert found.first(2).where(1) == f"{path}:3"
    with pytest.raises(ft.DataError, match=r"a\.jsonl:3\.completion: empty"):
        data.chat(found, data.ByteTokenizer(), time=9, batch_size=1)
    del found[1]
    found.append({"prompt": "q", "completion": ""})
    assert [found.where(n) for n in (1, 2, -2, 3)] == [f"{path}:{n}" for n in (2, 1, 1)] + [
        "record 3"
    ]
    with pytest.raises(ft.DataError, match=r"^record 3\.completion: empty"):
        data.chat(found, data.ByteTokenizer(), time=9, batch_size=1)


@pytest.mark.parametrize("name", ["notes.csv", ".hidden", "sub/x.bin", "x.gz", "text.txt"])
def test_a_file_of_no_known_kind_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.jsonl").write_bytes(_jsonl([{"n": 1}]))
    (tmp_path / name).write_text("x")
    with pytest.raises(ft.DataError, match=rf"{Path(name).name}: expected a file that ends in"):
        data.records(tmp_path)


def test_a_text_is_told_that_records_are_expected(tmp_path: Path) -> None:
    """A file of lines may have any name; one that holds none is probably another kind."""
    path = tmp_path / "notes.txt"
    path.write_bytes(_jsonl([{"n": 1}]))
    assert data.records(path) == [{"n": 1}]
    path.write_text("It was a dark night.")
    wanted = (
        r"notes\.txt:1: not JSON .*; expected records, in a file that ends in \.jsonl or \.json"
    )
    with pytest.raises(ft.DataError, match=wanted):
        data.records(path)


def test_a_link_to_a_directory_is_named_not_passed_over(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "in/a.jsonl").write_bytes(_jsonl([{"n": 1}]))
    (tmp_path / "in/link").symlink_to(tmp_path / "out")
    with pytest.raises(ft.DataError, match="link: expected a file that ends in"):
        data.records(tmp_path / "in")


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}\n' * 99)[:-9])
    (tmp_path / "no.jsonl.gz").write_bytes(b'{"a": 1}')
    (tmp_path / "torn.parquet").write_bytes(b"PAR1xxxx")
    for name, message in (
        ("empty", "a directory without files"),
        ("*.csv", "no file matches"),
        ("torn.jsonl.gz", "no whole gzip file"),
        ("no.jsonl.gz", "no whole gzip file"),
    ):
        with pytest.raises(ft.DataError, match=message):
            data.records(tmp_path / name)
    pytest.importorskip("pyarrow")
    with pytest.raises(ft.DataError, match=r"torn\.parquet: no Parquet file that can be read"):
        data.records(tmp_path / "torn.parquet")


def test_documents_are_the_texts_of_every_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.md").write_text("two")
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"three"))
    (tmp_path / "d.jsonl").write_bytes(_jsonl([{"text": "four"}, {"text": "five"}]))
    (tmp_path / "e.json").write_text(json.dumps([{"text": "six"}]))
    texts = ["one", "two", "three", "four", "five", "six"]
    assert data.documents(tmp_path) == texts
    _parquet(tmp_path / "f.parquet", [{"text": "seven"}, {"text": None}])
    with pytest.raises(ft.DataError, match=r"f\.parquet: row 2: no text under 'text'"):
        data.documents(tmp_path)
    _parquet(tmp_path / "f.parquet", [{"text": "seven"}])
    assert data.documents(tmp_path) == [*texts, "seven"]


@given(talk=st.lists(TURN, min_size=1, max_size=5))
def test_messages_as_columns_are_messages(talk: list[Any]) -> None:
    names = sorted({name for each in talk for name in each})
    apart = {name: [each.get(name) for each in talk] for name in names}
    assert columns.record({"messages": apart})["messages"] == talk


def test_a_dataset_is_read_as_its_records_are() -> None:
    datasets = pytest.importorskip("datasets")
    talks: list[Any] = [{"messages": TALK}, {"messages": TALK[:2] + TALK[3:]}]
    given = datasets.Dataset.from_list(talks)
    assert given[0]["messages"][0]["weight"] is None  # what makes a dataset other than its records
    found, wanted = (data.chat(each, BYTES, **SIZES) for each in (given, talks))
    assert found.examples == wanted.examples
    for make, records in (
        (data.preference, [{"prompt": "p", "chosen": "a", "rejected": "b"}]),
        (
            data.unpaired,
            [{"prompt": f"{n}", "completion": "c" * n, "label": n < 2} for n in (1, 2)],
        ),
    ):
        rows: Any = datasets.Dataset.from_list(records)
        first, second = (make(each, BYTES, **SIZES).at(0, 2) for each in (rows, records))
        assert repr(first) == repr(second)
    texts = datasets.Dataset.from_list([{"text": "one"}, {"text": "two"}])
    source = data.text(texts, BYTES, time=4, batch_size=1)
    assert source.ids.tolist() == [*b"one", 256, *b"two", 256]


def test_a_gzip_file_with_a_damaged_body_is_named(tmp_path: Path) -> None:
    raw = bytearray(gzip.compress(_jsonl([{"text": "one"}] * 9)))
    raw[12:16] = b"\xff\xff\xff\xff"
    (tmp_path / "a.jsonl.gz").write_bytes(raw)
    for read in (data.records, data.documents):
        with pytest.raises(ft.DataError, match=r"a\.jsonl\.gz: no whole gzip file"):
            read(tmp_path / "a.jsonl.gz")


def test_of_a_list_with_a_bad_element_the_others_are_read(tmp_path: Path) -> None:
    """As of lines; and each is known by its own place."""
    (tmp_path / "a.json").write_text(json.dumps([{"text": "0"}, None, {"text": "2"}, [3]]))
    with pytest.raises(ft.DataError, match=r"a\.json: element 2: expected an object, got No"):
        data.records(tmp_path)
    found = data.records(tmp_path, on_bad_record="skip")
    assert found == [{"text": "0"}, {"text": "2"}]
    assert found.where(1) == f"{tmp_path / 'a.json'}: element 3"
    assert [each.split("/")[-1] for each in found.malformed] == [
        "a.json: element 2: expected an object, got NoneType",
        "a.json: element 4: expected an object, got list",
    ]
    texts = data.documents(tmp_path, on_bad_record="skip")
    assert (texts, texts.malformed) == (["0", "2"], found.malformed)


def test_a_file_without_records_is_the_same_to_every_reader(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(_jsonl([{"text": "one"}]))
    (tmp_path / "b.jsonl").write_text("\n")
    (tmp_path / "c.jsonl.gz").write_bytes(b"")
    (tmp_path / "d.json").write_text("[]")
    readers: tuple[Callable[..., Any], ...] = (data.records, data.documents)
    for read in readers:
        with pytest.raises(ft.DataError, match=r"b\.jsonl: no records; expected one JSON object"):
            read(tmp_path)
        with pytest.raises(ft.DataError, match=r"d\.json: no records; expected a list .* empty"):
            read(tmp_path / "d.json")
    found, texts = (read(tmp_path, on_bad_record="skip") for read in readers)
    assert (len(found), len(texts), len(found.malformed)) == (1, 1, 3)
    assert found.malformed == texts.malformed


@given(text=TEXT, objects=OBJECTS)
def test_a_byte_order_mark_is_no_part_of_what_a_file_says(
    tmp_path_factory: pytest.TempPathFactory, text: str, objects: list[Any]
) -> None:
    path, mark = tmp_path_factory.mktemp("marked"), "\ufeff".encode()
    for name, content in (
        ("a.txt", text.encode()),
        ("b.jsonl", _jsonl(objects)),
        ("c.json", json.dumps(objects).encode()),
    ):
        (path / name).write_bytes(mark + content)
        (path / f"{name}.gz").write_bytes(gzip.compress(mark + content))
        assert files.is_marked(path / name)
        assert files.is_marked(path / f"{name}.gz")
    assert data.documents(path / "a.txt*") == [text] * 2
    assert data.records(path / "[bc].*") == objects * 4


def test_a_pattern_names_a_file_once(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/a.jsonl").write_bytes(_jsonl([{"n": 1}]))
    assert len(data.records(tmp_path / "**" / "**" / "*.jsonl")) == 1
    (tmp_path / "sub/loop").symlink_to(tmp_path / "sub")
    found = data.records(tmp_path / "**" / "*.jsonl")
    assert (len(found), found.where(0)) == (1, f"{tmp_path / 'sub/a.jsonl'}:1")
    (tmp_path / "sub/b.jsonl").symlink_to(tmp_path / "sub/a.jsonl")  # twice, as somebody wants it
    assert len(data.records(tmp_path / "sub" / "*.jsonl")) == 2


@pytest.mark.parametrize("name", ["a.csv", "a.jsonlines", "a.jsonl.bz2", "a"])
def test_a_file_of_another_kind_is_no_document(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(_jsonl([{"text": "one"}]))
    for read in (data.documents, lambda path: data.tokenized(path, BYTES, tmp_path / "cache")):
        with pytest.raises(ft.DataError, match=f"{name}: expected a file that ends in .txt or .md"):
            read(tmp_path / name)


@pytest.mark.parametrize("name", ["a.JSONL", "a.ndjson", "a.NDJSON.gz"])
def test_names_of_the_same_kind_are_read_the_same(tmp_path: Path, name: str) -> None:
    raw = _jsonl([{"text": "one"}, {"text": "two"}])
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    (tmp_path / "A.JSON").write_text(json.dumps([{"text": "three"}]))
    assert data.documents(tmp_path / name) == ["one", "two"]
    assert data.documents(tmp_path) == ["three", "one", "two"]
    assert data.records(tmp_path)[0] == {"text": "three"}
    found = data.tokenized(tmp_path / name, BYTES, tmp_path / "cache")
    assert len(found.ends) == 2


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_what_is_not_utf_8_is_told_so(tmp_path: Path, encoding: str) -> None:
    text = '{"text": "café"}'
    for name, content in (("a.jsonl", text), ("b.json", f"[{text}]"), ("c.txt", "café")):
        (tmp_path / name).write_bytes(content.encode(encoding))
        with pytest.raises(ft.DataError, match=rf"{name}.*: not UTF-8 text .*convert it to UTF-8"):
            data.documents(tmp_path / name)


PACKED = {
    "gzip: end its name in .gz": gzip.compress(b'{"text": "a"}\n'),
    "xz: unpack it": lzma.compress(b'{"text": "a"}\n'),
    "bzip2: unpack it": bz2.compress(b'{"text": "a"}\n'),
    "zstd: unpack it": bytes.fromhex("28b52ffd040071000068690a") + b"\xff",
    "Parquet file: end its name in .parquet": b"PAR1\x15\x04\x15",
    "zip archive: unpack it": b"PK\x03\x04\x14\x00\x00",
}


@pytest.mark.parametrize("what", sorted(PACKED))
@pytest.mark.parametrize("name", ["a.jsonl", "b.json"])
def test_a_file_of_another_kind_is_told_by_how_it_begins(
    name: str, what: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(PACKED[what])
    with pytest.raises(ft.DataError, match=rf"{name}.*: not (UTF-8|JSON).*{what}"):
        data.records(tmp_path / name)


@pytest.mark.parametrize("path", ["a\0b", "a" * 5000, "x/" * 5000])
def test_what_can_be_no_path_is_refused(path: str) -> None:
    for read in (data.records, data.documents):
        with pytest.raises(ft.DataError, match=r"^path: .{1,100} cannot be looked at") as caught:
            read(path)
        assert len(str(caught.value)) < 200


def test_a_file_that_the_disk_does_not_give_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another time there would be other records; one that is torn always is."""
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_bytes(_jsonl([{"text": name}]))
    (tmp_path / "torn.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}\n' * 99)[:-9])
    assert len(data.records(tmp_path, on_bad_record="skip").malformed) == 1
    real = Path.open

    def broken(path: Path, *args: Any, **options: Any) -> Any:
        if path.name == "b.jsonl":
            raise OSError(errno.EIO, "Input/output error")
        return real(path, *args, **options)

    monkeypatch.setattr(Path, "open", broken)
    for read in (data.records, data.documents):
        with pytest.raises(ft.DataError, match=r"b\.jsonl: cannot be read \(Input/output error\)"):
            read(tmp_path, on_bad_record="skip")
