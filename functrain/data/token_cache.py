"""Pretraining text tokenised once, into files that are memory-mapped from then on."""

from __future__ import annotations

import fcntl
import hashlib
import itertools
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import numpy.typing as npt

from functrain.checks import PathLike, as_path
from functrain.data.files import UnreadableError, is_compressed, is_marked, suffix_of
from functrain.data.packing import Packed, packed_ids
from functrain.data.records import check_on_bad_record, document_files, texts
from functrain.data.text import TextRows, ended, id_type, known_ids
from functrain.data.token_files import Ids
from functrain.data.token_parts import (
    END_TYPE,
    ENDS,
    IDS,
    MANIFEST,
    Parts,
    parts_of,
    read,
    whole,
    writing,
)
from functrain.data.tokenizers import Tokenizer, check_tokenizer
from functrain.errors import DataError
from functrain.writing import sync

_FORMAT = "functrain tokens 1"
_SAID = 20
_NAME = "\0"  # stands for a file's name
PART_TOKENS = 1 << 20
"""Tokens after which a part is made durable: the most that a kill can lose."""


@attrs.frozen(kw_only=True)
class TokenizedFile:
    """How much was read of a file; `size` is in bytes on disk."""

    path: Path
    size: int
    documents: int
    tokens: int

    def __str__(self) -> str:
        what = f"{self.size:,} bytes, {self.documents:,} documents, {self.tokens:,} tokens"
        return f"{self.path}: {what}"


@attrs.frozen(kw_only=True, eq=False)
class Tokenized:
    """Documents as ids, memory-mapped: document d is `ids[ends[d - 1] : ends[d]]`, with its end.

    `files` says what was read of each; `malformed`, what was wrong with each record that was passed
    over; `made`, whether it was tokenised just now, in part at least. `str()` says that in words.
    """

    directory: Path
    ids: Ids = attrs.field(repr=False)
    ends: npt.NDArray[np.int64] = attrs.field(repr=False)
    files: tuple[TokenizedFile, ...]
    made: bool
    malformed: tuple[str, ...] = ()

    def text(self, *, time: int, batch_size: int, seed: int = 0, shuffle: bool = True) -> TextRows:
        """The source that `functrain.data.text` makes of the same documents, bit for bit."""
        return TextRows(
            ids=self.ids,
            time=time,
            batch_size=batch_size,
            seed=seed,
            shuffle=shuffle,
            origin=self.lines(),
        )

    def packed_text(
        self, *, time: int, batch_size: int, seed: int = 0, shuffle: bool = True
    ) -> Packed:
        """The source that `functrain.data.packed_text` makes of the same documents."""
        made = packed_ids(
            self.ids, self.ends, time=time, batch_size=batch_size, seed=seed, shuffle=shuffle
        )
        return attrs.evolve(made, origin=self.lines())

    def first(self, count: int | None) -> Tokenized:
        """The first `count` documents; all where it is None. `files` still lists all."""
        ends = self.ends[:count]
        return attrs.evolve(self, ids=self.ids[: ends[-1] if len(ends) else 0], ends=ends)

    def lines(self) -> tuple[str, ...]:
        """What was read, in words: in all, and of the first few files where there are several."""
        each = () if len(self.files) == 1 else tuple(map(str, self.files[:_SAID]))
        more = len(self.files) - _SAID
        bad = passed_over(self.malformed)
        return (str(self), *each, *((f"… and {more:,} more files",) if more > 0 else ()), *bad)

    def __str__(self) -> str:
        known = sum(each.documents for each in self.files)
        taken = "" if known == len(self.ends) else f"the first {len(self.ends):,} of "
        size, count = sum(each.size for each in self.files), len(self.files)
        return (
            f"{taken}{known:,} documents in {count:,} file{'s' * (count != 1)} of {size:,} bytes, "
            f"{len(self.ids):,} tokens, "
            f"{'tokenised into' if self.made else 'as tokenised in'} {self.directory}"
        )


def passed_over(malformed: Sequence[str]) -> tuple[str, ...]:
    """What was passed over, in words: how many records, and the first of them."""
    if not malformed:
        return ()
    more = len(malformed) - _SAID
    return (
        f"{len(malformed):,} malformed, passed over",
        *malformed[:_SAID],
        *((f"… and {more:,} more",) if more > 0 else ()),
    )


@attrs.frozen
class _Content:
    """A file as it was when its content was hashed."""

    path: Path
    digest: str
    stat: tuple[int, ...]
    marked: bool

    @property
    def kind(self) -> str:
        """How the file is read; this is part of the key, its name is not.

        A file with a byte order mark is of another kind, since the mark was once read as text.
        """
        compressed = ".gz" if is_compressed(self.path) else ""
        return suffix_of(self.path) + compressed + (" marked" if self.marked else "")

    def check(self) -> None:
        """Raise `DataError` if the file has changed since: its tokens would be of other content."""
        if _stat(self.path) != self.stat:
            raise DataError(
                f"{self.path}: changed while it was tokenised; run again when it is done"
            )


def tokenized(
    path: PathLike, tokenizer: Tokenizer, directory: PathLike, *, on_bad_record: str = "stop"
) -> Tokenized:
    """The documents of files, tokenised once: a later call for the same content maps the result.

    `path` and `on_bad_record` are those of `functrain.data.documents`. The result lies in
    `directory` under a key: the hash of the files' contents in their order, and of the tokenizer,
    which needs a `fingerprint`, a text that differs where its ids do. A call that is killed loses
    at most the last million tokens; the next one goes on after what is whole. Of several calls at
    once, one works and the others wait for it. A .jsonl is read a line at a time, a .parquet a row
    group; .txt, .md and .json files are read whole, since not every tokenizer gives a text the ids
    of its pieces.

    Raises `DataError` for a `directory` within that of the texts; for what cannot be read (a file
    that the disk fails to give is never passed over, as a record may be); for a file that changes
    meanwhile; and for a finished cache that is not as it was written: it is never repaired in
    place, as others may have it mapped.
    """
    check_tokenizer(tokenizer, "vocabulary", "fingerprint")
    check_on_bad_record(on_bad_record)
    cache = as_path("directory", directory)
    _check_apart(path, cache)
    contents = [_content(file) for file in document_files(path)]
    home = cache / _key(contents, tokenizer, on_bad_record)
    made = False
    if not (home / MANIFEST).exists():
        with _locked(home):
            if not (home / MANIFEST).exists():
                _make(home, contents, tokenizer, on_bad_record)
                made = True
    return _opened(home, contents, made)


def _check_apart(path: PathLike, cache: Path) -> None:
    """Raise `DataError` for a cache within a directory of texts: the next call would find it there.

    A pattern may leave it out.
    """
    if not path or not (isinstance(path, str) or hasattr(path, "__fspath__")):
        return  # `document_files` refuses these
    texts = Path(path)
    if texts.is_dir() and cache.resolve().is_relative_to(texts.resolve()):
        raise DataError(
            f"directory: {cache} lies in {path}, where each file is a text to tokenise, so that "
            "the next call would find the cache's own files; give a directory outside of it"
        )


def _content(path: Path) -> _Content:
    stat = _stat(path)
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UnreadableError(f"{path}: cannot be read ({error.strerror})") from error
    return _Content(path, digest, stat, is_marked(path))


def _stat(path: Path) -> tuple[int, ...]:
    try:
        found = path.stat()
    except OSError as error:
        raise UnreadableError(f"{path}: cannot be read ({error.strerror})") from error
    return found.st_size, found.st_mtime_ns, found.st_ino


def _key(contents: Sequence[_Content], tokenizer: Any, on_bad_record: str) -> str:
    told = [_FORMAT, tokenizer.fingerprint, str(tokenizer.end), str(tokenizer.vocabulary)]
    told += [f"{each.kind} {each.digest}" for each in contents]
    # 2: the first way of passing over also left out files that a disk had once not given.
    told += [] if on_bad_record == "stop" else [f"{on_bad_record} 2"]
    return hashlib.sha256("\0".join(told).encode()).hexdigest()[:32]


@contextmanager
def _locked(home: Path) -> Generator[None]:
    """Hold the lock while the files are made; whoever comes later waits here."""
    with writing(home):
        home.mkdir(parents=True, exist_ok=True)
        lock = (home / "lock").open("ab")
    with lock:
        with writing(home):
            fcntl.flock(lock, fcntl.LOCK_EX)
            sync(home.parent)
        yield


def _make(
    home: Path, contents: Sequence[_Content], tokenizer: Tokenizer, on_bad_record: str
) -> None:
    with Parts(home, id_type(tokenizer)) as parts:
        # From the beginning even where some parts are there, so that all that is skipped is known.
        bad = [None if on_bad_record == "stop" else list[str]() for _ in contents]
        documents = (
            (n, text) for n, each in enumerate(contents) for text in texts(each.path, bad[n])
        )
        pending = _Pending()
        for number, text in itertools.islice(documents, parts.documents, None):
            pending.add(number, _ids(text, tokenizer, contents[number].path))
            if pending.tokens >= PART_TOKENS:
                pending = pending.into(parts, contents)
        if pending.tokens:
            pending.into(parts, contents)
        # By the file's number: its name is not part of the key, and may be another next time.
        known = [
            (n, text.replace(str(contents[n].path), _NAME))
            for n, found in enumerate(bad)
            for text in found or ()
        ]
        if not parts.documents:
            hint = f" ({_named(known[0], contents)})" if known else ""
            raise DataError(f"{home}: no documents{hint}")
        # Also those that gave no document, or were read before another file's part: what is sealed
        # here is found for good.
        for each in contents:
            each.check()
        parts.seal({"format": _FORMAT, "dtype": parts.dtype.str, "malformed": known})


def _named(bad: tuple[int, str], contents: Sequence[_Content]) -> str:
    number, text = bad
    return text.replace(_NAME, str(contents[number].path))


def _ids(text: str, tokenizer: Tokenizer, path: Path) -> Ids:
    return known_ids(ended(text, tokenizer, str(path)), tokenizer, lambda _: str(path))


class _Pending:
    """Documents that will be the next part."""

    def __init__(self) -> None:
        self.tokens = 0
        self._ids: list[Ids] = []
        self._files: list[int] = []

    def add(self, number: int, ids: Ids) -> None:
        self.tokens += len(ids)
        self._ids.append(ids)
        self._files.append(number)

    def into(self, parts: Parts, contents: Sequence[_Content]) -> _Pending:
        """Append these documents as a part; returns an empty `_Pending` for the next."""
        documents, tokens = Counter(self._files), Counter[int]()
        for number, ids in zip(self._files, self._ids, strict=True):
            tokens[number] += len(ids)
        for number in documents:
            contents[number].check()
        lengths = np.array([len(ids) for ids in self._ids], dtype=np.int64)
        files = tuple((n, documents[n], tokens[n]) for n in sorted(documents))
        parts.append(np.concatenate(self._ids), lengths, files)
        return _Pending()


def _opened(home: Path, contents: Sequence[_Content], made: bool) -> Tokenized:
    manifest = read((home / MANIFEST).read_bytes())
    if manifest is None:
        raise _damaged(home, "its manifest")
    parts, dtype = parts_of(manifest), np.dtype(manifest["dtype"])
    good = whole(home, parts, dtype)
    if good < len(parts):
        raise _damaged(home, f"part {good + 1} of {len(parts)}")
    documents, tokens = Counter[int](), Counter[int]()
    for number, some, many in (each for part in parts for each in part.files):
        documents[number] += some
        tokens[number] += many
    return Tokenized(
        directory=home,
        ids=np.memmap(home / IDS, dtype=dtype, mode="r", shape=(tokens.total(),)),
        ends=np.memmap(home / ENDS, dtype=END_TYPE, mode="r", shape=(documents.total(),)),
        files=tuple(
            TokenizedFile(
                path=each.path, size=each.stat[0], documents=documents[n], tokens=tokens[n]
            )
            for n, each in enumerate(contents)
        ),
        made=made,
        malformed=tuple(_named(each, contents) for each in manifest.get("malformed", ())),
    )


def _damaged(home: Path, what: str) -> DataError:
    return DataError(
        f"{home}: {what} is not as it was written, so the disk or somebody has altered it; remove "
        "the directory, once nothing reads it, and it is made anew"
    )
