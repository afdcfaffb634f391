"""Text tokenised once: the batches of the text itself, whatever was killed, torn or at once."""

from __future__ import annotations

import errno
import gzip
import itertools
import json
import os
import shutil
import signal
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from processes import ended

import functrain as ft
from functrain import data
from functrain.data import token_cache, token_parts

BYTES = data.ByteTokenizer()
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
TEXTS = [f"document no {n:02}" for n in range(12)]


@attrs.frozen
class _Counting:
    """A tokenizer that notes each text, in a file since several processes do, and may fail."""

    notes: Path
    fail_at: int = 10**9
    fingerprint: str = "counting"
    vocabulary: int = 257
    end: int = 256

    def encode(self, text: str) -> list[int]:
        with self.notes.open("a") as file:
            file.write("x\n")
        if self.count() > self.fail_at:
            raise RuntimeError("interrupted")
        return list(text.encode())

    def decode(self, ids: Any) -> str:
        return bytes(ids).decode()

    def count(self) -> int:
        return len(self.notes.read_text().split()) if self.notes.exists() else 0


def _write(path: Path, texts: Sequence[str]) -> None:
    """As many documents in a file of the kind that its name says."""
    records = [{"text": each} for each in texts]
    lines = b"".join(json.dumps(each).encode() + b"\n" for each in records)
    if path.suffix == ".txt":
        path.write_bytes("".join(texts).encode())
    elif path.suffix == ".json":
        path.write_text(json.dumps(records))
    elif path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(records), path, row_group_size=2)
    else:
        path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    _write(tmp_path / "a.jsonl", TEXTS)
    return tmp_path / "a.jsonl"


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_cache, "PART_TOKENS", 40)  # three documents


def _check(found: Any, texts: Sequence[str]) -> None:
    wanted = data.text(texts, BYTES, time=9, batch_size=2)
    assert np.array_equal(found.ids, wanted.ids)
    assert found.ids.dtype == wanted.ids.dtype
    lengths = [len(each.encode()) + 1 for each in texts]
    assert found.ends.tolist() == np.cumsum(lengths).tolist()


def _digests(batch: Any) -> dict[str, str]:
    return {name: ft.trees.digest(each) for name, each in batch.items()}


@given(
    files=st.lists(
        st.tuples(
            st.sampled_from(["txt", "jsonl", "jsonl.gz", "json", "parquet"]),
            st.lists(TEXT, min_size=1, max_size=4),
        ),
        min_size=1,
        max_size=3,
    ),
    part=st.integers(1, 60),
    position=st.integers(0, 100),
    width=st.integers(2, 12),
    seed=st.integers(0, 9),
)
def test_the_batches_are_those_of_the_text_itself(
    tmp_path_factory: pytest.TempPathFactory,
    files: Any,
    part: int,
    position: int,
    width: int,
    seed: int,
) -> None:
    path = tmp_path_factory.mktemp("files")
    for number, (kind, texts) in enumerate([("txt", ["ab"]), *files]):
        _write(path / f"{number}.{kind}", texts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_cache, "PART_TOKENS", part)
        made, found = (data.tokenized(path, BYTES, path.parent / f"{path.name}-c") for _ in "12")
    assert (made.made, found.made) == (True, False)
    texts = data.documents(path)
    _check(found, texts)
    options: Any = {"time": width, "batch_size": 2, "seed": seed}
    for own, of in ((found.text, data.text), (found.packed_text, data.packed_text)):
        one, other = own(**options), of(texts, BYTES, **options)
        assert len(one) == len(other)
        assert _digests(one.at(position, 3)) == _digests(other.at(position, 3))
    assert sum(each.documents for each in found.files) == len(texts)
    assert sum(each.tokens for each in found.files) == len(found.ids)


def _started(act: Callable[[], object]) -> int:
    """A child that acts; its process id."""
    child = os.fork()
    if not child:
        code = 1
        try:
            act()
            code = 0
        finally:
            os._exit(code)
    return child


def _forked(act: Callable[[], object]) -> int:
    """The exit code of a child that has acted, as of `processes.ended`."""
    return ended(_started(act))


def _killed_at(operation: int, torn: bool) -> None:
    """This process, from now on: killed before an operation on files, or in the middle of it."""
    left = [operation]
    append, rename = token_parts._append, token_parts._rename

    def _append(file: Any, given: bytes) -> None:
        left[0] -= 1
        if left[0] < 0:
            if torn:
                file.write(given[: len(given) // 2])
                file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        append(file, given)

    def _rename(old: Path, new: Path) -> None:
        left[0] -= 1
        if left[0] < 0:
            if torn:
                rename(old, new)
            os.kill(os.getpid(), signal.SIGKILL)
        rename(old, new)

    token_parts._append, token_parts._rename = _append, _rename


@pytest.mark.parametrize("torn", [False, True])
def test_a_kill_at_any_operation_loses_one_part_at_most(
    source: Path, tmp_path: Path, torn: bool
) -> None:
    operation = 0
    while True:
        cache, notes = tmp_path / f"cache-{operation}", tmp_path / f"notes-{operation}"

        def act(cache: Path = cache, operation: int = operation) -> None:
            _killed_at(operation, torn)
            data.tokenized(source, _Counting(tmp_path / "first"), cache)

        code = _forked(act)
        found = data.tokenized(source, _Counting(notes), cache)
        _check(found, TEXTS)
        if code != -signal.SIGKILL:
            assert code == 0
            break
        whole = operation // 3  # parts: each is three appends, to ids, ends and journal
        assert _Counting(notes).count() == max(0, len(TEXTS) - 3 * whole)
        operation += 1
    assert operation == 3 * 4 + 2


class _Disk:
    """What a power cut leaves of a cache, after each sync: what was synced, and nothing else.

    A file as it was at its last sync, under the names that its directory had at that one's.
    """

    def __init__(self, cache: Path, patch: pytest.MonkeyPatch) -> None:
        self._cache, self._fsync = cache, os.fsync
        self._files: dict[int, bytes] = {}
        self._names: dict[int, dict[str, int]] = {}
        self.moments: list[dict[str, dict[str, bytes]]] = [{}]
        patch.setattr(os, "fsync", self._synced)

    def _synced(self, handle: int) -> None:
        self._fsync(handle)
        number = os.fstat(handle).st_ino
        for path in (self._cache, *self._cache.rglob("*")):
            if path.stat().st_ino != number:
                continue
            if path.is_dir():
                self._names[number] = {e.name: e.stat().st_ino for e in path.iterdir()}
            else:
                self._files[number] = path.read_bytes()
        homes = self._names.get(self._cache.stat().st_ino, {})
        self.moments.append(
            {
                home: {
                    name: self._files.get(file, b"")
                    for name, file in self._names.get(number, {}).items()
                }
                for home, number in homes.items()
            }
        )


def test_a_power_cut_at_any_moment_loses_nothing_that_was_said_to_be_there(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        disk = _Disk(tmp_path / "cache", patch)
        data.tokenized(source, BYTES, tmp_path / "cache")
    counts = []
    for moment, homes in enumerate(disk.moments):
        cache = tmp_path / f"cache-{moment}"
        counting = _Counting(tmp_path / f"notes-{moment}", fingerprint=BYTES.fingerprint)
        for home, files in homes.items():
            (cache / home).mkdir(parents=True)
            for name, content in files.items():
                (cache / home / name).write_bytes(content)
        found = data.tokenized(source, counting, cache)
        _check(found, TEXTS)
        counts.append(counting.count())
    # Each part of three documents is there once its line of the journal is.
    assert counts == sorted(counts, reverse=True)
    assert set(counts) == {12, 9, 6, 3, 0}
    assert not found.made


def test_kills_one_after_another_come_to_an_end(source: Path, tmp_path: Path) -> None:
    """Each in its second part, or as it puts the manifest in place, and the next goes on."""
    cache = tmp_path / "cache"

    def act() -> None:
        _killed_at(4, True)
        data.tokenized(source, BYTES, cache)

    codes = [_forked(act) for _ in range(5)]
    assert codes == [-signal.SIGKILL] * 4 + [0]
    found = data.tokenized(source, BYTES, cache)
    assert not found.made
    _check(found, TEXTS)


@pytest.mark.parametrize("place", ["", "cache", "deep/cache", "../texts/cache"])
def test_a_cache_in_the_directory_of_its_texts_is_refused_at_once(
    place: str, tmp_path: Path
) -> None:
    """The second call refused the files of the first; a pattern may leave them out."""
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text("some text")
    (tmp_path / "link").symlink_to(texts)
    for path in (texts, tmp_path / "link"):
        with pytest.raises(ft.DataError, match=r"^directory: .* lies in .*outside of it"):
            data.tokenized(path, BYTES, texts / place)
    assert [each.name for each in texts.iterdir()] == ["a.txt"]
    made, found = (data.tokenized(texts / "*.txt", BYTES, texts / place) for _ in "12")
    assert (made.made, found.made) == (True, False)


def test_of_several_at_once_one_works_and_the_others_wait(source: Path, tmp_path: Path) -> None:
    class Slow(_Counting):
        def encode(self, text: str) -> list[int]:
            time.sleep(0.03)
            return super().encode(text)

    tokenizer = Slow(tmp_path / "notes")

    def act() -> None:
        found = data.tokenized(source, tokenizer, tmp_path / "cache")
        _check(found, TEXTS)
        (tmp_path / f"{'made' if found.made else 'found'}-{os.getpid()}").touch()

    children = [_started(act) for _ in range(3)]
    assert [ended(child) for child in children] == [0, 0, 0]
    assert tokenizer.count() == len(TEXTS)
    assert len(list(tmp_path.glob("made-*"))) == 1


def _interrupted(source: Path, tmp_path: Path, fail_at: int = 8) -> Path:
    """A cache whose making was interrupted after two whole parts; its directory."""
    with pytest.raises(RuntimeError, match="interrupted"):
        data.tokenized(source, _Counting(tmp_path / "broken", fail_at), tmp_path / "cache")
    (home,) = (tmp_path / "cache").iterdir()
    return home


@given(cut=st.integers(0, 700), flip=st.booleans())
def test_a_torn_journal_is_read_up_to_its_last_whole_line(
    tmp_path_factory: pytest.TempPathFactory, cut: int, flip: bool
) -> None:
    tmp_path = tmp_path_factory.mktemp("torn")
    source = tmp_path / "a.jsonl"
    _write(source, TEXTS)
    journal = _interrupted(source, tmp_path) / "journal"
    raw = journal.read_bytes()
    cut = min(cut, len(raw) - 1)
    rest = bytes([raw[cut] ^ 1]) + raw[cut + 1 :] if flip else b""
    journal.write_bytes(raw[:cut] + rest)
    whole = raw[:cut].count(b"\n")
    counting = _Counting(tmp_path / "notes")
    _check(data.tokenized(source, counting, tmp_path / "cache"), TEXTS)
    assert counting.count() == len(TEXTS) - 3 * whole


@pytest.mark.parametrize("name", ["ids.bin", "ends.bin"])
def test_a_part_that_is_not_what_the_journal_says_is_made_again(
    source: Path, tmp_path: Path, name: str
) -> None:
    file = _interrupted(source, tmp_path) / name
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    counting = _Counting(tmp_path / "notes")
    _check(data.tokenized(source, counting, tmp_path / "cache"), TEXTS)
    assert counting.count() == len(TEXTS) - 3


@pytest.mark.parametrize(
    ("name", "damage"),
    [*itertools.product(("ids.bin", "ends.bin"), ("flip", "cut", "gone")), ("manifest", "flip")],
)
def test_a_finished_cache_that_is_damaged_is_refused_and_left(
    source: Path, tmp_path: Path, name: str, damage: str
) -> None:
    home = data.tokenized(source, BYTES, tmp_path / "cache").directory
    raw = bytearray((home / name).read_bytes())
    raw[len(raw) // 2] ^= 1
    if damage == "gone":
        (home / name).unlink()
    else:
        (home / name).write_bytes(raw if damage == "flip" else raw[: len(raw) // 2])
    before = {each.name: each.read_bytes() for each in home.iterdir()}
    with pytest.raises(ft.DataError, match=r"is not as it was written.*remove the directory"):
        data.tokenized(source, BYTES, tmp_path / "cache")
    assert {each.name: each.read_bytes() for each in home.iterdir()} == before


def test_the_key_is_content_and_tokenizer_not_names(source: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = data.tokenized(source, BYTES, cache)
    moved = shutil.copy(source, tmp_path / "b.jsonl")
    assert not data.tokenized(moved, BYTES, cache).made
    counting = _Counting(tmp_path / "notes")
    assert data.tokenized(source, counting, cache).made
    for other in ({"end": 0}, {"vocabulary": 300}, {"fingerprint": "another"}):
        assert data.tokenized(source, attrs.evolve(counting, **other), cache).made
    shutil.copy(source, tmp_path / "c.txt")  # the same bytes, read as another thing
    assert data.tokenized(tmp_path / "c.txt", BYTES, cache).made
    _write(source, TEXTS[:-1])
    changed = data.tokenized(source, BYTES, cache)
    assert changed.made
    _check(changed, TEXTS[:-1])
    _check(first, TEXTS)  # still mapped


_LONG = [each * 1000 for each in TEXTS]  # more than is read ahead


@pytest.mark.parametrize(
    ("texts", "others"), [(TEXTS, ["another"]), (_LONG, [each.upper() for each in _LONG])]
)
def test_a_file_that_changes_meanwhile_is_refused(
    source: Path, tmp_path: Path, texts: Sequence[str], others: Sequence[str]
) -> None:
    """Also where it keeps its size; and no part of it is kept for when it is what it was."""
    _write(source, texts)

    class Changing(_Counting):
        def encode(self, text: str) -> list[int]:
            if self.count() == 7:
                _write(source, others)
            return super().encode(text)

    with pytest.raises(ft.DataError, match=r"a\.jsonl: changed while it was tokenised"):
        data.tokenized(source, Changing(tmp_path / "notes"), tmp_path / "cache")
    _write(source, texts)
    _check(data.tokenized(source, _Counting(tmp_path / "notes"), tmp_path / "cache"), texts)


def _directory(path: Path) -> Path:
    path.mkdir()
    for name in ("a", "b", "c"):
        _write(path / f"{name}.jsonl", [name])
    return path


def _meanwhile(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Once, when the files have been hashed and the lock is held."""
    made = token_cache._make

    def wrapped(*args: Any) -> None:
        monkeypatch.setattr(token_cache, "_make", made)
        act()
        made(*args)

    monkeypatch.setattr(token_cache, "_make", wrapped)


def test_a_file_that_is_away_for_a_moment_is_never_sealed_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, options = _directory(tmp_path / "in"), {"on_bad_record": "skip"}
    away = source / "b.jsonl"
    _meanwhile(monkeypatch, lambda: away.rename(tmp_path / "away"))
    with pytest.raises(ft.DataError, match=r"b\.jsonl: cannot be read \(No such file"):
        data.tokenized(source, BYTES, tmp_path / "cache", **options)
    (tmp_path / "away").rename(away)
    found = data.tokenized(source, BYTES, tmp_path / "cache", **options)
    assert (found.made, found.malformed) == (True, ())
    _check(found, ["a", "b", "c"])


def test_a_disk_that_fails_in_the_middle_of_a_file_is_no_bad_record(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.open

    class Failing:
        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> Any:
            return itertools.chain(itertools.islice(self.file, 4), self.fail())

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def fail(self) -> Any:
            raise OSError(errno.EIO, "Input/output error")
            yield

    def open_(path: Path, *args: Any, **options: Any) -> Any:
        file = real(path, *args, **options)
        return Failing(file) if path == source else file

    _meanwhile(monkeypatch, lambda: monkeypatch.setattr(Path, "open", open_))
    with pytest.raises(ft.DataError, match=r"a\.jsonl: cannot be read \(Input/output error\)"):
        data.tokenized(source, BYTES, tmp_path / "cache", on_bad_record="skip")
    monkeypatch.setattr(Path, "open", real)
    _check(data.tokenized(source, BYTES, tmp_path / "cache", on_bad_record="skip"), TEXTS)


def test_a_file_that_gave_nothing_is_looked_at_before_the_cache_is_sealed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has no document in any part, so that no part was checked against it."""
    source = _directory(tmp_path / "in")
    (source / "b.jsonl").write_text("{\n")
    _meanwhile(monkeypatch, lambda: (source / "b.jsonl").write_text("{!\n"))
    with pytest.raises(ft.DataError, match=r"b\.jsonl: changed while it was tokenised"):
        data.tokenized(source, BYTES, tmp_path / "cache", on_bad_record="skip")
    assert not list((tmp_path / "cache").glob("*/manifest"))


def test_a_file_with_a_byte_order_mark_has_a_key_of_its_own(tmp_path: Path) -> None:
    """The mark was once a part of the text, and a cache of it may be there."""
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone")
    (content,) = (token_cache._content(tmp_path / "a.txt"),)
    assert content.kind != attrs.evolve(content, marked=False).kind == ".txt"
    _check(data.tokenized(tmp_path / "a.txt", BYTES, tmp_path / "cache"), ["one"])


def test_an_error_of_another_is_not_said_to_be_of_the_cache(source: Path, tmp_path: Path) -> None:
    class Lacking(_Counting):
        def encode(self, text: str) -> list[int]:
            raise FileNotFoundError(errno.ENOENT, "No such file", "/models/merges.txt")

    with pytest.raises(FileNotFoundError, match=r"merges\.txt"):
        data.tokenized(source, Lacking(tmp_path / "notes"), tmp_path / "cache")

    class Removing(_Counting):
        def encode(self, text: str) -> list[int]:
            source.unlink(missing_ok=True)
            return super().encode(text)

    with pytest.raises(ft.DataError, match=r"a\.jsonl: cannot be read"):
        data.tokenized(source, Removing(tmp_path / "notes"), tmp_path / "cache")


def test_a_full_disk_is_named(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = token_parts._append

    def full(file: Any, given: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(token_parts, "_append", full)
    with pytest.raises(ft.DataError, match=r"cache/\w+: cannot be written .*No space left"):
        data.tokenized(source, BYTES, tmp_path / "cache")
    monkeypatch.setattr(token_parts, "_append", real)
    _check(data.tokenized(source, BYTES, tmp_path / "cache"), TEXTS)


def test_what_cannot_be_cached_is_named(source: Path, tmp_path: Path) -> None:
    class Bare:
        encode = decode = BYTES.encode
        end, vocabulary = 256, 257

    bare: Any = Bare()
    with pytest.raises(ft.DataError, match="Bare has no 'fingerprint'"):
        data.tokenized(source, bare, tmp_path / "cache")
    (tmp_path / "file").touch()
    with pytest.raises(ft.DataError, match=r"file.*cannot be written"):
        data.tokenized(source, BYTES, tmp_path / "file")
    wide = attrs.evolve(_Counting(tmp_path / "notes"), vocabulary=10, end=2**16)
    with pytest.raises(ft.DataError, match=r"gives ids up to 65536 .* its vocabulary is 10"):
        data.tokenized(source, wide, tmp_path / "cache")


def test_a_cache_is_read_where_nothing_can_be_written(source: Path, tmp_path: Path) -> None:
    home = data.tokenized(source, BYTES, tmp_path / "cache").directory
    (home / "lock").unlink()
    _check(data.tokenized(source, BYTES, tmp_path / "cache"), TEXTS)
    assert not (home / "lock").exists()


def test_documents_are_not_in_memory_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_cache, "PART_TOKENS", 1 << 15)
    texts = ["x" * 10_000] * 200
    for name in ("a.jsonl", "b.jsonl.gz"):
        _write(tmp_path / name, texts)
    tracemalloc.start()
    found = data.tokenized(tmp_path / "*.jsonl*", BYTES, tmp_path / "cache")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(found.ids) == 2 * 10_001 * 200
    assert peak < 1_000_000  # of four million characters


def test_what_was_read_is_said_by_file(tmp_path: Path) -> None:
    _write(tmp_path / "a.jsonl", TEXTS)
    _write(tmp_path / "b.txt", ["one"])
    found = data.tokenized(tmp_path / "*.*", BYTES, tmp_path / "cache")
    assert [(each.documents, each.tokens) for each in found.files] == [
        (12, sum(len(each) + 1 for each in TEXTS)),
        (1, 4),
    ]
    assert found.files[1].size == 3
    lines = found.text(time=9, batch_size=1).origin
    assert lines == found.packed_text(time=9, batch_size=1).origin
    total = sum(each.size for each in found.files)
    made = f", {len(found.ids)} tokens, tokenised into {found.directory}"
    assert lines[0] == f"13 documents in 2 files of {total} bytes{made}"
    assert lines[2] == f"{tmp_path / 'b.txt'}: 3 bytes, 1 documents, 4 tokens"
    again = data.tokenized(tmp_path / "*.*", BYTES, tmp_path / "cache")
    assert f"as tokenised in {found.directory}" in str(again)
    some = found.first(3)
    assert str(some).startswith("the first 3 of 13 documents in 2 files")
    _check(some, TEXTS[:3])
    assert found.first(None).ids is not None


def _flawed(path: Path) -> list[str]:
    """Two files, in which three records are malformed; the texts that are left."""
    path.mkdir()
    rows = [json.dumps({"text": text}) for text in TEXTS]
    (path / "a.jsonl").write_text("\n".join([*rows[:5], "{", *rows[5:], '{"text": 3}']) + "\n")
    (path / "b.jsonl").write_text(rows[0] + "\n[1]\n")
    return [*TEXTS, TEXTS[0]]


def test_malformed_records_stop_it_or_are_passed_over(tmp_path: Path) -> None:
    left = _flawed(tmp_path / "in")
    with pytest.raises(ft.DataError, match=r"a\.jsonl:6: not JSON"):
        data.documents(tmp_path / "in")
    with pytest.raises(ft.DataError, match=r"a\.jsonl:6: not JSON"):
        data.tokenized(tmp_path / "in", BYTES, tmp_path / "cache")
    found = data.documents(tmp_path / "in", on_bad_record="skip")
    assert found == left
    assert [text.split(": ")[0].split("/")[-1] for text in found.malformed] == [
        "a.jsonl:6",
        "a.jsonl:14",
        "b.jsonl:2",
    ]
    for _ in range(2):  # made, and mapped
        kept = data.tokenized(tmp_path / "in", BYTES, tmp_path / "cache", on_bad_record="skip")
        assert kept.malformed == found.malformed
        assert len(kept.ends) == len(left)
        assert "3 malformed, passed over" in kept.lines()
    with pytest.raises(ft.DataError, match=r"a\.jsonl:6: not JSON"):
        data.tokenized(tmp_path / "in", BYTES, tmp_path / "cache")  # another key
    with pytest.raises(ft.DataError, match="on_bad_record: 'drop', expected 'stop' or 'skip'"):
        data.tokenized(tmp_path / "in", BYTES, tmp_path / "cache", on_bad_record="drop")


def test_what_was_passed_over_is_known_after_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what lay before the parts that were whole."""
    _flawed(tmp_path / "in")
    monkeypatch.setattr(token_cache, "PART_TOKENS", 40)
    failing = _Counting(tmp_path / "notes", fail_at=12)
    options: Any = {"on_bad_record": "skip"}
    with pytest.raises(RuntimeError, match="interrupted"):
        data.tokenized(tmp_path / "in", failing, tmp_path / "cache", **options)
    whole = attrs.evolve(failing, notes=tmp_path / "others", fail_at=10**9)
    kept = data.tokenized(tmp_path / "in", whole, tmp_path / "cache", **options)
    assert whole.count() < 13, "it has gone on after what was there"
    assert len(kept.malformed) == 3


def test_nothing_but_malformed_records_is_refused(tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.jsonl").write_text("{\n")
    for read in (
        lambda: data.documents(texts, on_bad_record="skip"),
        lambda: data.tokenized(texts, BYTES, tmp_path / "c", on_bad_record="skip"),
    ):
        with pytest.raises(ft.DataError, match=r"no documents \(.*a\.jsonl:1: not JSON"):
            read()


def test_the_first_record_is_the_first_that_can_be_read(tmp_path: Path) -> None:
    """Past lines and whole files that cannot be."""
    (tmp_path / "a.json").write_text("{")
    (tmp_path / "b.jsonl").write_text('{\n{"n": 1}\n{"n": 2}\n')
    assert data.first_record(tmp_path) == {"n": 1}
    found = data.records(tmp_path, on_bad_record="skip")
    assert (list(found), len(found.malformed), found.files) == ([{"n": 1}, {"n": 2}], 2, 2)
    assert data.first_record(tmp_path / "a.json") is None
