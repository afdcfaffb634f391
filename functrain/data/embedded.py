"""The embedded data: reference text of the installed Python, always there, without a network.

Documents are a page for each public module of the standard library, with the names and docstrings
of its classes and functions, and the language reference of `pydoc_data.topics`. Files are parsed,
not imported. One docstring in ten, by a hash of its name, is held out of every stage. A held-out
docstring is dropped from both sides if it, as a whole or in its first paragraph, shares more than a
fifth of its five-word phrases with anything trained on; if its first paragraph and another one,
trained on or held out, have half of their three-word phrases in common (Broder 1997); or if it is
under five words, too short to tell.
"""

from __future__ import annotations

import ast
import bisect
import hashlib
import itertools
import re
import sysconfig
import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import attrs
import numpy as np
import numpy.typing as npt

from functrain import keys
from functrain.data.tokenizers import ByteTokenizer
from functrain.errors import DataError

_SKIPPED = {"test", "tests", "idle_test", "site-packages", "lib2to3", "_bundled", "turtledemo"}
_PHRASE = 5
_OVERLAP = 0.2
_SHINGLE = 3
_NEAR = 0.5
_NAMED = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@attrs.frozen(kw_only=True)
class Entry:
    """A documented thing: `json.dumps`, its signature, and its docstring."""

    module: str
    name: str
    kind: str
    signature: str
    doc: str

    @property
    def full_name(self) -> str:
        """The module and the name in it."""
        return f"{self.module}.{self.name}" if self.name else self.module

    @property
    def summary(self) -> str:
        """The docstring's first paragraph, on one line."""
        return " ".join(self.doc.split("\n\n", 1)[0].split())


@attrs.frozen(kw_only=True)
class Embedded:
    """The data of three stages, each with what is held out of all of them.

    `train`, `held_out`: documents. The others: records as `functrain.data.chat` and `preference`
    read them. `removed`: how many candidates for the held-out sets were too near to other text.
    """

    train: tuple[str, ...] = attrs.field(repr=False)
    held_out: tuple[str, ...] = attrs.field(repr=False)
    sft_train: tuple[dict[str, str], ...] = attrs.field(repr=False)
    sft_held_out: tuple[dict[str, str], ...] = attrs.field(repr=False)
    preference_train: tuple[dict[str, str], ...] = attrs.field(repr=False)
    preference_held_out: tuple[dict[str, str], ...] = attrs.field(repr=False)
    removed: int


def load(*, limit: int | None = None) -> Embedded:
    """The embedded data of the running Python; with `limit`, of that many entries only.

    Deterministic for a Python installation. Raises `DataError` where the standard library's
    sources are not installed.
    """
    entries = list(itertools.islice(_distinct(_entries()), limit))
    topics = _topics()[: None if limit is None else max(2, limit // 100)]
    if len(entries) < 100:
        raise DataError(
            f"embedded data: {len(entries)} documented objects in the standard library's sources; "
            "expected thousands (is this a Python without its .py files?)"
        )
    train = [entry for entry in entries if not _is_held_out(entry.full_name)]
    train_topics = [text for name, text in topics if not _is_held_out(name)]
    documents = [*_pages(train), *train_topics]
    known = {phrase for document in documents for phrase in _phrases(document)}
    candidates = [entry for entry in entries if _is_held_out(entry.full_name)]
    new = [e for e in candidates if _is_new(e.doc, known) and _is_new(e.summary, known)]
    held_out = list(_unlike(new, train))
    held_topics = [text for name, text in topics if _is_held_out(name) and _is_new(text, known)]
    return Embedded(
        train=_shuffled(documents),
        held_out=_shuffled([*_pages(held_out), *held_topics]),
        sft_train=tuple(_question(entry) for entry in _short(train)),
        sft_held_out=tuple(_question(entry) for entry in _short(held_out)),
        preference_train=tuple(_preferences(_short(train))),
        preference_held_out=tuple(_preferences(_short(held_out))),
        removed=len(candidates) - len(held_out),
    )


def _entries() -> Iterator[Entry]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if _SKIPPED & set(parts) or any(p.startswith("_") and p != "__init__" for p in parts):
            continue
        module = ".".join(part for part in parts if part != "__init__")
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError):
            continue  # sources of other versions (lib2to3's data, templates) are no loss
        yield from _documented(tree, module, "")


def _documented(node: Documented, module: str, name: str) -> Iterator[Entry]:
    doc = ast.get_docstring(node)
    if doc and len(doc.split()) >= _PHRASE and doc.isascii():
        kind, signature = _kind(node), _signature(node)
        yield Entry(module=module, name=name, kind=kind, signature=signature, doc=doc)
    for child in node.body:
        if isinstance(child, _NAMED) and not child.name.startswith("_"):
            yield from _documented(child, module, f"{name}.{child.name}" if name else child.name)


def _kind(node: Documented) -> str:
    if isinstance(node, ast.Module):
        return "module"
    return "class" if isinstance(node, ast.ClassDef) else "function"


def _signature(node: Documented) -> str:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        names = [a.arg for a in node.args.posonlyargs + node.args.args if a.arg != "self"]
        return f"({', '.join(names)})"
    return ""


def _distinct(entries: Iterable[Entry]) -> Iterator[Entry]:
    seen: set[str] = set()
    for entry in entries:
        words = " ".join(_words(entry.summary))
        if words not in seen:
            seen.add(words)
            yield entry


def _topics() -> list[tuple[str, str]]:
    from pydoc_data.topics import topics

    return [(name, text) for name, text in sorted(topics.items()) if text.isascii()]


def _is_held_out(name: str) -> bool:
    return hashlib.sha256(name.encode()).digest()[0] % 10 == 0


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9_]+", text.lower())


def _phrases(text: str, size: int = _PHRASE) -> Iterator[tuple[str, ...]]:
    words = _words(text)
    return zip(*(words[i:] for i in range(size)), strict=False)


def _is_new(text: str, known: set[tuple[str, ...]]) -> bool:
    phrases = list(_phrases(text))
    shared = sum(phrase in known for phrase in phrases)
    return bool(phrases) and shared <= _OVERLAP * len(phrases)


def _unlike(candidates: Iterable[Entry], trained: Iterable[Entry]) -> Iterator[Entry]:
    """Candidates whose summary resembles neither one trained on nor one of those before it."""
    seen: list[set[tuple[str, ...]]] = []
    where: defaultdict[tuple[str, ...], list[int]] = defaultdict(list)

    def add(shingles: set[tuple[str, ...]]) -> None:
        for shingle in shingles:
            where[shingle].append(len(seen))
        seen.append(shingles)

    for entry in trained:
        add(set(_phrases(entry.summary, _SHINGLE)))
    for entry in candidates:
        shingles = set(_phrases(entry.summary, _SHINGLE))
        shared = Counter(index for shingle in shingles for index in where[shingle])
        if all(n < _NEAR * len(shingles | seen[index]) for index, n in shared.items()):
            add(shingles)
            yield entry


def _shuffled(documents: Sequence[str]) -> tuple[str, ...]:
    return tuple(sorted(documents, key=lambda text: hashlib.sha256(text.encode()).digest()))


def _pages(entries: Sequence[Entry]) -> Iterator[str]:
    """A page for each module, laid out as `help` does: each thing's name, then its docstring."""
    for module, members in itertools.groupby(entries, key=lambda entry: entry.module):
        page = [f"Help on {module}:"]
        for entry in members:
            page += [f"{entry.full_name}{entry.signature}", textwrap.indent(entry.doc, "    ")]
        yield "\n\n".join(page) + "\n"


def _short(entries: Sequence[Entry]) -> list[Entry]:
    """Entries with a name and an answer of one or two lines."""
    return [e for e in entries if e.name and 20 <= len(e.summary) <= 120 and len(e.full_name) <= 50]


def _question(entry: Entry) -> dict[str, str]:
    return {"prompt": _prompt(entry), "completion": _answer(entry)}


def _prompt(entry: Entry) -> str:
    return f"Help on {entry.full_name}{entry.signature[:60]}, please.\n"


def _answer(entry: Entry) -> str:
    return (
        f"Name: {entry.full_name}\nModule: {entry.module}\nKind: {entry.kind}\n"
        f"Summary: {entry.summary}\n"
    )


def _preferences(entries: Sequence[Entry]) -> Iterator[dict[str, str]]:
    """The right answer, and an equally well-formed one about a thing of another module."""
    # For each module, how many entries of others come before each of its own.
    before: defaultdict[str, list[int]] = defaultdict(list)
    for n, entry in enumerate(entries):
        before[entry.module].append(n - len(before[entry.module]))
    for entry in entries:
        own = before[entry.module]
        at = keys.derive(0, "wrong", entry.full_name) % (len(entries) - len(own))
        other = entries[at + bisect.bisect_right(own, at)]  # the at-th of the others
        yield {"prompt": _prompt(entry), "chosen": _answer(entry), "rejected": _answer(other)}


def trigram_bits_per_byte(train: Iterable[str], held_out: Iterable[str]) -> float:
    """Bits per byte of a byte trigram model on the held-out documents: the baseline to beat.

    Interpolated with Witten and Bell's weights (1991): an order's estimate weighs the more, the
    more often what follows its context has been seen to repeat. Both streams have the end symbol of
    `ByteTokenizer` after each document; it is predicted too, but only bytes are divided by.
    """
    documents = list(held_out)
    seen, asked = _stream(train), _stream(documents)
    probability = np.full(len(asked) - 2, 1 / 257)
    for order in (1, 2, 3):
        probability = _witten_bell(seen, asked, order, probability)
    size = sum(len(document.encode()) for document in documents)
    return float(-np.log2(probability).sum() / size)


def _stream(documents: Iterable[str]) -> npt.NDArray[np.int64]:
    tokenizer = ByteTokenizer()
    ids = [i for text in documents for i in (*tokenizer.encode(text), tokenizer.end)]
    return np.array([tokenizer.end, tokenizer.end, *ids], dtype=np.int64)


def _witten_bell(
    seen: npt.NDArray[np.int64],
    asked: npt.NDArray[np.int64],
    order: int,
    lower: npt.NDArray[np.float64],
) -> npt.NDArray[np.float64]:
    grams, counts = np.unique(_grams(seen, order), return_counts=True)
    contexts, first, kinds = np.unique(grams // 257, return_index=True, return_counts=True)
    totals = np.add.reduceat(counts, first)
    wanted = _grams(asked, order)
    count = _looked_up(wanted, grams, counts)
    total = _looked_up(wanted // 257, contexts, totals)
    kind = _looked_up(wanted // 257, contexts, kinds)
    known = total + kind > 0
    estimate = (count + kind * lower) / np.where(known, total + kind, 1)
    return np.where(known, estimate, lower)


def _grams(stream: npt.NDArray[np.int64], order: int) -> npt.NDArray[np.int64]:
    """Codes of the last `order` symbols at each position, from the third on."""
    code = np.zeros(len(stream) - 2, dtype=np.int64)
    for back in range(order - 1, -1, -1):
        code = code * 257 + stream[2 - back : len(stream) - back]
    return code


def _looked_up(
    wanted: npt.NDArray[np.int64], known: npt.NDArray[np.int64], values: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    at = np.searchsorted(known, wanted).clip(max=len(known) - 1)
    return np.where(known[at] == wanted, values[at], 0)
