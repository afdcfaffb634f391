"""Files as records: every form of the same objects is read the same, and nothing is passed over."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import functrain as ft
from functrain import data
from functrain.data import columns

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


@given(objects=OBJECTS)
def test_every_form_of_the_same_objects_is_read_the_same(
    tmp_path_factory: pytest.TempPathFactory, objects: list[Any]
) -> None:
    """Fields that only some messages have are null in Parquet's columns, and absent again here."""
    path = tmp_path_factory.mktemp("forms")
    (path / "a.jsonl").write_bytes(_jsonl(objects))
    (path / "a.jsonl.gz").write_bytes(gzip.compress(_jsonl(objects)))
    (path / "a.json").write_text(json.dumps(objects))
    (path / "a.json.gz").write_bytes(gzip.compress(json.dumps(objects).encode()))
    _parquet(path / "a.parquet", objects)
    forms = sorted(path.iterdir())
    assert [data.records(form) for form in forms] == [objects] * 5
    assert data.records(path) == objects * 5
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


@pytest.mark.parametrize("name", ["notes.csv", ".hidden", "sub/x.bin", "x.gz", "text.txt"])
def test_a_file_of_no_known_kind_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.jsonl").write_bytes(_jsonl([{"n": 1}]))
    (tmp_path / name).write_text("x")
    with pytest.raises(ft.DataError, match=rf"{Path(name).name}: expected a file that ends in"):
        data.records(tmp_path)


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
    with pytest.raises(ft.DataError, match=r"f\.parquet: record 2 has no text under 'text'"):
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
