"""Tokenizers: what `encode` and `decode` must do, and one that needs no training."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any, Protocol

import attrs
import orjson

from functrain.errors import DataError


class Tokenizer(Protocol):
    """Text to token ids and back; `vocabulary` ids in all, `end` closes a document."""

    @property
    def vocabulary(self) -> int:
        """The number of token ids."""
        ...

    @property
    def end(self) -> int:
        """The id that ends a document or a completion."""
        ...

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without `end`; of an empty text, none."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids."""
        ...


def check_tokenizer(tokenizer: object, *more: str) -> None:
    """Raise `DataError` for what lacks a part of `Tokenizer` that data are made with.

    `more`: what is needed besides `encode`, `decode` and `end`.
    """
    needed = ("encode", "decode", "end", *more)
    found: dict[str, object] = {}
    for name in needed:
        with suppress(AttributeError):  # each is asked once: a fingerprint may take a while
            found[name] = getattr(tokenizer, name)
    missing = [name for name in needed if name not in found]
    if missing or isinstance(tokenizer, type):
        name = tokenizer.__name__ if isinstance(tokenizer, type) else type(tokenizer).__name__
        lack = f"has no {' and no '.join(map(repr, missing))}" if missing else "is a class"
        raise DataError(
            f"tokenizer: {name} {lack}; expected an object with {', '.join(needed)} "
            "(functrain.data.Tokenizer); write a small class around yours that has them"
        )
    for name, expected in _EXPECTED.items():
        given = found.get(name)
        fits = isinstance(given, str) if name == "fingerprint" else _is_integer(given)
        if name in found and not fits:
            hint = "; make it a property" if callable(given) else ""
            raise DataError(f"tokenizer.{name}: {type(given).__name__}, expected {expected}{hint}")


_EXPECTED: Mapping[str, str] = {
    "end": "an integer, the id that ends a document",
    "vocabulary": "an integer, the number of token ids",
    "fingerprint": "a text",
}


def _is_integer(given: Any) -> bool:
    """Whether this is an integer, also of NumPy's, or a tensor of one."""
    try:
        operator.index(given)
    except TypeError:
        return False
    return not isinstance(given, bool)


def check_joinable(tokenizer: Tokenizer) -> None:
    """Raise `DataError` unless texts that are encoded separately can be joined.

    A token that `encode` adds at the start or end of every text would be a target in the middle.
    """
    check_tokenizer(tokenizer)
    added = ids_of("", tokenizer, "encode('')")
    if added:
        raise DataError(
            f"tokenizer: encode('') is {added}, expected []: it adds special tokens, which would "
            "be in the middle of an example and learnt there; let your encode call "
            "inner.encode(text, add_special_tokens=False)"
        )


def ids_of(text: str, tokenizer: Any, where: str) -> list[int]:
    """The ids of a text as Python integers; `DataError`, naming `where`, if they are no integers.

    So is any that the tokenizer raises.

    A tokenizer of a user's may give an array or a tensor, or a list of the integers of either.
    """
    try:
        given = tokenizer.encode(text)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    given = given.tolist() if hasattr(given, "tolist") else given
    if not isinstance(given, Iterable):
        raise _no_ids(where, given)
    ids = list(given)
    if set(map(type, ids)) <= {int}:  # of nearly every tokenizer
        return ids
    return [_plain(each, where) for each in ids]


def _plain(given: Any, where: str) -> int:
    value = given.tolist() if hasattr(given, "tolist") else given
    if not _is_integer(value):  # a float, which NumPy and torch would truncate, or a truth
        raise _no_ids(where, given)
    return operator.index(value)


def _no_ids(where: str, given: object) -> DataError:
    return DataError(
        f"{where}: the tokenizer gives {given!r:.99}, expected integers, ids of tokens"
    )


def utf8(text: str) -> bytes:
    """The bytes of a text; `DataError` for a lone surrogate, which has none."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"text: not encodable as UTF-8 ({error.reason})") from error


@attrs.frozen
class ByteTokenizer:
    """UTF-8 bytes as ids 0 to 255, and 256 for the end of a document."""

    vocabulary: int = attrs.field(default=257, init=False)
    end: int = attrs.field(default=256, init=False)

    def encode(self, text: str) -> list[int]:
        """The bytes; `decode(encode(text)) == text` for any text without lone surrogates."""
        return list(utf8(text))

    def decode(self, ids: Iterable[int]) -> str:
        """The text; ends are left out, and a torn character becomes U+FFFD.

        Raises `DataError` for an id that is not in the vocabulary.
        """
        given = list(ids)
        for i in given:
            if not 0 <= i < self.vocabulary:
                raise DataError(
                    f"ids: {i}, expected [0, {self.vocabulary}); are they another tokenizer's?"
                )
        return bytes(i for i in given if i != self.end).decode(errors="replace")

    def count_bytes(self, ids: Iterable[int]) -> int:
        """How many bytes the text of ids has; of a torn character those that are there."""
        return sum(i != self.end for i in ids)

    @property
    def fingerprint(self) -> str:
        """A text that differs where ids do."""
        return self.to_json()

    def to_json(self) -> str:
        """What `from_json` reads."""
        return orjson.dumps({"type": "bytes"}).decode()


def from_json(text: str) -> ByteTokenizer:
    """The tokenizer that `to_json` wrote."""
    try:
        kind = orjson.loads(text)["type"]
    except (orjson.JSONDecodeError, KeyError, TypeError) as error:
        raise DataError(f"tokenizer: not a tokenizer of functrain's ({error})") from error
    if kind != "bytes":
        raise DataError(f"tokenizer: type {kind!r} is unknown; known: 'bytes'")
    return ByteTokenizer()
