"""Sources: pure functions of the position, that lose nothing and say what they cannot read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from hypothesis import given
from hypothesis import strategies as st

import functrain as ft
from functrain import data
from functrain.objectives import LanguageModeling, PreferenceOptimization
from functrain.objectives.batches import count_padding

BYTES = data.ByteTokenizer()
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@given(length=st.integers(1, 600), key=st.integers(0, 2**63 - 1))
def test_the_order_of_an_epoch_is_a_permutation(length: int, key: int) -> None:
    order = [data.permuted(index, length, key) for index in range(length)]
    assert sorted(order) == list(range(length))


def test_orders_differ_by_key_and_look_shuffled() -> None:
    orders = {tuple(data.permuted(i, 100, key) for i in range(100)) for key in range(50)}
    assert len(orders) == 50
    firsts = np.bincount([data.permuted(0, 10, key) for key in range(2000)], minlength=10)
    assert firsts.min() > 120  # 200 expected, standard deviation 13
    assert firsts.max() < 280


def _rows(length: int = 100, **options: Any) -> data.TextRows:
    ids = np.arange(length, dtype=np.uint16)
    return data.tokens(ids, **{"time": 8, "batch_size": 4, **options})


@given(length=st.integers(2, 300), time=st.integers(2, 60))
def test_the_padding_of_rows_of_text_is_what_their_batch_has(length: int, time: int) -> None:
    rows = _rows(length, time=time, shuffle=False)
    padding, made = count_padding(rows.at(0, len(rows)))
    assert rows.padding == pytest.approx(int(padding) / made, abs=1e-12)
    assert rows.padding <= 0.5 or len(rows) == 1


SOURCES: dict[str, Any] = {
    "text": lambda **o: _rows(**o),
    "chat": lambda **o: data.chat(
        [{"prompt": f"{n}?", "completion": "x" * (n % 7 + 1)} for n in range(30)],
        BYTES,
        **{"time": 32, "batch_size": 4, **o},
    ),
    "grouped": lambda **o: data.chat(
        [{"prompt": f"{n}?", "completion": "x" * (n % 7 + 1)} for n in range(30)],
        BYTES,
        **{"time": 32, "batch_size": 4, "group_by_length": True, **o},
    ),
    "packed": lambda **o: data.packed(
        data.chat(
            [{"prompt": f"{n}?", "completion": "x" * (n % 7 + 1)} for n in range(90)],
            BYTES,
            **{"time": 32, "batch_size": 4, **o},
        ),
        time=32,
    ),
    "packed_text": lambda **o: data.packed_text(
        ["x" * (5 * n % 70 + 1) for n in range(30)], BYTES, **{"time": 32, "batch_size": 4, **o}
    ),
    "unpaired": lambda **o: data.unpaired(
        [
            {"prompt": f"{n}?", "completion": "x" * (n % 7 + 1), "label": n % 3 < 1}
            for n in range(30)
        ],
        BYTES,
        **{"time": 32, "batch_size": 4, **o},
    ),
    "pairs": lambda **o: data.preference(
        [{"prompt": f"{n}?", "chosen": "yes" * (n % 3 + 1), "rejected": "no"} for n in range(30)],
        BYTES,
        **{"time": 32, "batch_size": 4, **o},
    ),
}
EVERY = pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES)


def _digests(batch: Any) -> Any:
    return {
        key: _digests(value) if isinstance(value, dict) else ft.trees.digest(value)
        for key, value in batch.items()
    }


def _leaves(batch: Any) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for key, value in batch.items():
        nested = {"": value} if isinstance(value, torch.Tensor) else _leaves(value)
        found |= {f"{key}.{name}": leaf for name, leaf in nested.items()}
    return found


def _first(batch: Any) -> torch.Tensor:
    return next(iter(_leaves(batch).values()))


@EVERY
@given(position=st.integers(0, 10**9), n=st.integers(1, 9))
def test_a_batch_is_a_function_of_its_position(make: Any, position: int, n: int) -> None:
    source, twin = make(seed=3), make(seed=3)
    twin.at(position + 1, 2)
    assert _digests(source.at(position, n)) == _digests(twin.at(position, n))


@EVERY
@given(position=st.integers(0, 1000), n=st.integers(2, 9))
def test_a_batch_is_its_samples_one_by_one(make: Any, position: int, n: int) -> None:
    """Whatever a batch holds of a sample depends on that sample alone, but for the padding."""
    source = make(seed=3)
    whole = _leaves(source.at(position, n))
    for row in range(n):
        alone = _leaves(source.at(position + row, 1))
        assert alone.keys() == whole.keys()
        for name, leaf in alone.items():
            together = whole[name][row]
            if leaf.ndim == 1:
                assert torch.equal(together, leaf[0])
                continue
            width = min(leaf.shape[1], len(together))
            assert torch.equal(together[:width], leaf[0, :width])
            for rest in (together[width:], leaf[0, width:]):
                assert (rest == (-100 if "labels" in name else 0)).all()


@EVERY
def test_an_epoch_holds_every_sample_once_in_an_order_of_its_own(make: Any) -> None:
    source = make(seed=1)
    length = len(source)
    epochs = [[source.index(e * length + i) for i in range(length)] for e in range(3)]
    assert all(sorted(order) == list(range(length)) for order in epochs)
    assert len({tuple(order) for order in epochs}) == 3
    other = make(seed=2)
    assert [other.index(i) for i in range(length)] != epochs[0]
    ordered = source.ordered()
    assert [ordered.index(length + i) for i in range(length)] == list(range(length))


@EVERY
def test_every_batch_is_one_that_steps_take(make: Any) -> None:
    source = make()
    objective: Any = LanguageModeling()
    if "chosen" in source.at(0, 1):
        objective = PreferenceOptimization(reference={})
    for batch in [source.at(0, 4), *data.all_batches(source, 7)]:
        halves = [batch]
        if "desirable" in batch:
            assert batch["desirable"].dtype == torch.bool
            halves = [batch["completion"], batch["mismatched"]]
        for half in halves:
            objective.check(half, 257)
            assert int(objective.weight(half)) > 0


@EVERY
def test_all_batches_hold_everything_once(make: Any) -> None:
    source = make()
    sizes = [len(_first(batch)) for batch in data.all_batches(source, 7)]
    assert sum(sizes) == len(source)
    assert all(size == 7 for size in sizes[:-1])


def test_all_batches_of_a_source_of_ones_own() -> None:
    """What `functrain.evaluate` says to take for any source."""
    batches = data.all_batches(zoo.Batches(length=7), 3)
    assert [len(batch["labels"]) for batch in batches] == [3, 3, 1]
    assert torch.equal(batches[1]["input_ids"], zoo.batch(3, 3)["input_ids"])


@EVERY
@pytest.mark.parametrize("limit", [1, 3, 10**6])
def test_all_batches_up_to_a_limit_are_the_first_samples(make: Any, limit: int) -> None:
    source = make()
    batches = data.all_batches(source, 2, limit=limit)
    count = min(limit, len(source))
    assert sum(len(_first(batch)) for batch in batches) == count
    last = source.ordered().at(count - 1, 1)
    row, expected = _first(batches[-1])[-1], _first(last)[0]
    width = min(len(row), len(expected))
    assert torch.equal(row[:width], expected[:width])
    with pytest.raises(ft.DataError, match="limit: 0, expected an integer of at least 1"):
        data.all_batches(source, 2, limit=0)


@EVERY
@pytest.mark.parametrize(("position", "n"), [(-1, 1), (0, 0)])
def test_a_position_that_is_none_is_named(make: Any, position: int, n: int) -> None:
    with pytest.raises(ft.DataError, match="expected a position >= 0 and n >= 1"):
        make().at(position, n)


@given(texts=st.lists(TEXT, min_size=1, max_size=5), time=st.integers(2, 20))
def test_every_token_but_the_first_is_predicted_once(texts: list[str], time: int) -> None:
    stream = [i for each in texts for i in (*each.encode(), BYTES.end)]
    if len(stream) < 2:
        with pytest.raises(ft.DataError, match="expected at least 2"):
            data.text(texts, BYTES, time=time, batch_size=1)
        return
    source = data.text(texts, BYTES, time=time, batch_size=3, shuffle=False)
    targets: list[int] = []
    for batch in data.all_batches(source):
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            wanted = labels[1:]
            targets += wanted[wanted != -100].tolist()
            assert torch.equal(ids[labels != -100], labels[labels != -100])
    assert targets == stream[1:]


@given(text=TEXT)
def test_bytes_decode_to_what_was_encoded(text: str) -> None:
    ids = BYTES.encode(text)
    assert BYTES.decode([*ids, BYTES.end]) == text
    assert all(0 <= i < BYTES.vocabulary for i in ids)
    assert data.from_json(BYTES.to_json()) == BYTES


def test_what_leaves_nothing_is_named() -> None:
    with pytest.raises(ft.DataError, match="records: none"):
        data.chat([], BYTES, time=9, batch_size=1)
    long = {"prompt": "a" * 50, "completion": "b"}
    with pytest.raises(ft.DataError, match="time: 9 tokens leave no completion token of any of 1"):
        data.chat([long], BYTES, time=9, batch_size=1)
    with pytest.raises(ft.DataError, match="documents: one string"):
        data.text("abc", BYTES, time=9, batch_size=1)
    with pytest.raises(ft.DataError, match="batch_size: 0"):
        _rows(batch_size=0)
    with pytest.raises(ft.DataError, match="time: 1"):
        _rows(time=1)


def test_token_files_are_mapped_and_checked(tmp_path: Path) -> None:
    ids = np.arange(100, dtype=np.uint16)
    ids.tofile(tmp_path / "ids.bin")
    np.save(tmp_path / "ids.npy", ids)
    expected = _digests(_rows(seed=5).at(3, 4))
    (tmp_path / "ids.NPY").write_bytes((tmp_path / "ids.npy").read_bytes())
    for name in ("ids.bin", "ids.npy", "ids.NPY"):
        source = data.tokens(tmp_path / name, time=8, batch_size=4, seed=5)
        assert isinstance(source.ids, np.memmap)
        assert _digests(source.at(3, 4)) == expected
    (tmp_path / "odd.bin").write_bytes(b"abc")
    (tmp_path / "bad.npy").write_bytes(b"abc")
    for name, message in (
        ("nowhere.bin", "no such file"),
        ("odd.bin", "3 bytes are no whole number of uint16"),
        ("bad.npy", "bad.npy"),
    ):
        with pytest.raises(ft.DataError, match=message):
            data.tokens(tmp_path / name, time=8, batch_size=4)
    with pytest.raises(ft.DataError, match="expected integers"):
        data.tokens(np.zeros(9), time=8, batch_size=4)


@given(st.lists(st.dictionaries(TEXT, TEXT), min_size=1, max_size=5))
def test_json_lines_come_back(tmp_path_factory: pytest.TempPathFactory, objects: Any) -> None:
    path = tmp_path_factory.mktemp("data") / "records.jsonl"
    path.write_text("\n\n".join(json.dumps(each) for each in objects), encoding="utf-8")
    assert data.records(path) == objects


def test_a_bad_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    for text, message in (
        ('{"a": 1}\n{', r"records.jsonl:2: not JSON"),
        ('{"a": 1}\n[1]', r"records.jsonl:2: expected an object, got list"),
        ("\n", r"records.jsonl: no records"),
        ('{\n  "a": 1\n}\n', r"records.jsonl:1: not JSON .*; each record is one line of a .jsonl"),
        ('[{"a": 1},\n{"a": 2}]', r"records.jsonl:1: not JSON .*, and a list is in a .json file"),
        ('[{"a": 1}]', r"records.jsonl:1: expected an object, got list; each record is one line"),
    ):
        path.write_text(text)
        with pytest.raises(ft.DataError, match=message):
            data.records(path)
    with pytest.raises(ft.DataError, match="cannot be read"):
        data.records(tmp_path / "nowhere.jsonl")
    path.write_text('{"txt": "a"}')
    with pytest.raises(ft.DataError, match=r"records\.jsonl:1: no text under 'text'; did.*'txt'"):
        data.documents(path)
    for text, found in (
        ('{"text": 3}', "got int"),
        ('{"id": 3, "body": "a"}', "it has 'id'"),
    ):
        path.write_text(text)
        with pytest.raises(ft.DataError, match=f"no text under 'text'; {found}"):
            data.documents(path)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ft.DataError, match="not UTF-8"):
        data.documents(tmp_path / "latin.txt")


def test_all_batches_are_in_the_given_order_whatever_the_source_does() -> None:
    records = [{"prompt": f"{i} ", "completion": f"{i}!"} for i in range(9)]
    source = data.chat(records, BYTES, time=16, batch_size=4, shuffle=True)
    rows = [row for batch in data.all_batches(source) for row in batch["input_ids"].tolist()]
    assert [BYTES.decode(row).rstrip("\0") for row in rows] == [f"{i} {i}!" for i in range(9)]
