"""What a run reads, from its config: its sources, and the held-out batches."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import attrs

from functrain import data, keys
from functrain.cli.config import DPO, SFT, Config, Pretrain
from functrain.cli.directory import is_tokens
from functrain.cli.known import EMBEDDED
from functrain.compilation import LIMIT
from functrain.data import Tokenizer
from functrain.data.token_files import Ids, JoinedIds
from functrain.errors import ConfigError, DataError
from functrain.objectives.batches import Batch

Source = data.MapSource
_HASHED = 1 << 20
"""How many numbers are hashed at a time."""


def sources(config: Config, tokenizer: Tokenizer | None) -> tuple[Source, Source | None]:
    """The sources of training data and, if there are any, held-out data.

    Held-out examples are never packed: their scores are the same, and a limit counts examples.
    """
    train, held_out = _sources(config, tokenizer)
    if config.data.packing and isinstance(train, data.Chats):
        return data.packed(train, time=config.data.time), held_out
    if config.train.compile and isinstance(train, data.Padded):
        _check_widths(config, train.widths())
    return train, held_out


def _check_widths(config: Config, widths: Sequence[int]) -> None:
    """Raise `ConfigError` if a step might be compiled too often, before anything is compiled."""
    if len(widths) <= LIMIT:
        return
    multiple = config.data.pad_to_multiple_of
    while -(-widths[-1] // multiple) > LIMIT:
        multiple *= 2
    packing = ", data.packing" if config.stage == "sft" else ""
    raise ConfigError(
        f"train.compile: batches of these data can be of {len(widths)} widths ({widths[0]} to "
        f"{widths[-1]} tokens), each of which is compiled for, and {LIMIT} is the most; give "
        f"data.pad_to_multiple_of={multiple}{packing}, or leave train.compile out"
    )


def _sources(config: Config, tokenizer: Tokenizer | None) -> tuple[Source, Source | None]:
    given = config.data
    if given.train == EMBEDDED:
        train, held_out = _embedded(config.stage, given.limit)
        if given.held_out is not None:
            return _source(config, train, tokenizer), _file(config, given.held_out, tokenizer)
        return _source(config, train, tokenizer), _source(config, held_out, tokenizer)
    source = _file(config, given.train, tokenizer, given.limit)
    return source, None if given.held_out is None else _file(config, given.held_out, tokenizer)


def _file(
    config: Config, path: str, tokenizer: Tokenizer | None, limit: int | None = None
) -> Source:
    try:
        if isinstance(config, Pretrain) and config.data.cache is not None:
            return _cached(config, config.data.cache, path, tokenizer, limit)
        if isinstance(config, Pretrain) and is_tokens(path):
            ids = data.tokens(path, dtype=config.data.dtype, **_rows(config))
            _check_ids(path, ids.ids, config.data.vocabulary)
            return ids.first(limit)
        if config.stage == "pretrain":
            texts = data.documents(path, on_bad_record=config.data.on_bad_record)
            source: Any = _source(config, texts.first(limit), tokenizer)
            made: Source = attrs.evolve(source, origin=data.passed_over(texts.malformed))
            return made
        found = data.records(path, on_bad_record=config.data.on_bad_record)
        return _source(config, found.first(limit), tokenizer)
    except DataError as error:
        # Not all errors in a file's content name the file.
        raise error if path in str(error) else DataError(f"{path}: {error}") from error


def _check_ids(path: str, ids: Ids | JoinedIds, vocabulary: int | None) -> None:
    """Raise `DataError` for an id outside the run's vocabulary, before a step meets it."""
    if isinstance(ids, JoinedIds):
        for each, own in zip(ids.paths, ids.arrays, strict=True):
            _check_ids(str(each), own, vocabulary)
        return
    for begin in range(0, len(ids), _HASHED):
        piece = ids[begin : begin + _HASHED]
        least, most = int(piece.min()), int(piece.max())
        if least < 0 or (vocabulary is not None and most >= vocabulary):
            bad = least if least < 0 else most
            at = begin + int((piece == bad).argmax())
            bound = "at least 0" if vocabulary is None else f"in [0, {vocabulary})"
            raise DataError(
                f"{path}: token {at} is {bad}, expected {bound}, as data.vocabulary says"
            )


def _cached(
    config: Config, cache: str, path: str, tokenizer: Tokenizer | None, limit: int | None
) -> Source:
    if is_tokens(path) or tokenizer is None:
        raise ConfigError(f"data.cache: {path} holds token ids, which are mapped as they are")
    how = config.data.on_bad_record
    found = data.tokenized(path, tokenizer, cache, on_bad_record=how).first(limit)
    make: Any = found.packed_text if config.data.packing else found.text
    made: Source = make(**_rows(config))
    return made


@functools.lru_cache(maxsize=1)
def embedded(limit: int | None) -> data.embedded.Embedded:
    """The embedded data, cached for the three stages of a demo: reading it takes seconds."""
    return data.embedded.load(limit=limit)


def digest(source: Source) -> str:
    """A hash of all that a source holds, computed piece by piece."""
    hasher = hashlib.sha256()
    for piece in _pieces(source):
        hasher.update(piece)
    return hasher.hexdigest()


def _pieces(source: Source) -> Iterator[bytes]:
    if isinstance(source, data.TextRows):
        yield from _bytes(source.ids)
    elif isinstance(source, data.Packed):
        own = source.labels is not source.ids
        labels = (source.labels,) if own else ()
        for each in (source.ids, *labels, source.begins, source.lengths):
            yield from _bytes(each)
        yield from (repr(pack).encode() for pack in source.packs)
    else:
        yield from (repr(example).encode() for example in getattr(source, "examples", ()))


def _bytes(array: Ids | JoinedIds) -> Iterator[bytes]:
    """The bytes of an array, in pieces: it may be mapped from a file larger than memory."""
    yield str((array.shape, array.dtype)).encode()
    for begin in range(0, len(array), _HASHED):
        yield array[begin : begin + _HASHED].tobytes()


def _embedded(stage: str, limit: int | None) -> tuple[Sequence[Any], Sequence[Any]]:
    found = embedded(limit)
    return {
        "pretrain": (found.train, found.held_out),
        "sft": (found.sft_train, found.sft_held_out),
        "dpo": (found.preference_train, found.preference_held_out),
    }[stage]


def _rows(config: Config) -> dict[str, Any]:
    return {
        "time": config.data.time,
        "batch_size": config.train.batch_size,
        "seed": keys.derive(config.train.seed, "data"),
    }


def _source(config: Config, found: Sequence[Any], tokenizer: Tokenizer | None) -> Source:
    if tokenizer is None:
        raise ConfigError("data: text needs a tokenizer; pretrain on text, or on ids throughout")
    make: Any = {
        "pretrain": text_maker(config),
        "sft": data.chat,
        "dpo": data.preference,
    }[config.stage]
    if isinstance(config, DPO) and config.preference.unpaired:
        make = data.unpaired
    options: dict[str, Any] = {}
    if not isinstance(config, Pretrain):
        options = cut_options(config)
        for name in ("group_by_length", "pad_to_multiple_of", "on_bad_record"):
            options[name] = getattr(config.data, name)
    made: Source = make(found, tokenizer, **_rows(config), **options)
    return made


def text_maker(config: Config | None) -> Any:
    """The function that makes rows of text, keeping documents apart if the run packs."""
    packs = isinstance(config, Pretrain) and config.data.packing
    return data.packed_text if packs else data.text


def cut_options(config: SFT | DPO) -> dict[str, Any]:
    """The options by which a run cuts its examples."""
    return {"truncation": config.data.truncation, "min_prompt": config.data.min_prompt}


def held_out_batches(held_out: Source | None, config: Config) -> list[Batch]:
    """The batches that each evaluation of a run reads."""
    if held_out is None:
        return []
    plan = config.evaluation
    return data.all_batches(held_out, plan.batch_size, limit=plan.limit)


def notes(source: Source, held_out: Source | None) -> list[str]:
    """What to say about the data before a run begins, one line each."""
    both = (("training", source), ("held-out", held_out))
    notes = [f"{name} text: {x}" for name, each in both for x in getattr(each, "origin", ())]
    for name, each in both:
        # More than half can only be of a single row.
        if isinstance(each, data.TextRows) and each.padding > 0.5:
            notes.append(
                f"{name} text: {len(each.ids):,} tokens in one row of data.time {each.time:,}, "
                f"{each.padding:.1%} of which is padding, computed all the same; a smaller "
                "data.time wastes less"
            )
    if isinstance(source, data.Packed):
        notes.append(f"training data: {source.packing}")
    if isinstance(source, data.Padded):
        notes.append(
            f"training data: {len(source):,} examples; in batches of {source.batch_size}, "
            f"{source.padding():.1%} of the tokens are padding"
        )
    for name, each in both:
        counts = getattr(each, "counts", None)
        if counts is not None and (counts.truncated or counts.dropped):
            notes.append(f"{name} examples at data.time: {counts}")
            notes += [f"malformed: {complaint}" for complaint in counts.complaints]
    if held_out is None:
        notes.append("no data.held_out, so nothing is evaluated")
    return notes
