"""Unpaired completions, each desirable or not, for KTO."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence

import attrs
import torch

from functrain.data.examples import (
    SIDES,
    Example,
    Prompted,
    Record,
    check_given,
    read_each,
    read_pair,
    read_unpaired,
)
from functrain.data.grouping import MULTIPLE, Padded
from functrain.data.pairs import differ
from functrain.data.sequences import padded
from functrain.data.source import Batch, check_boolean
from functrain.data.tokenizers import Tokenizer, check_joinable
from functrain.data.truncation import MODES, Truncation, fitted, has_targets
from functrain.errors import DataError

_FEW = 16


@attrs.frozen(kw_only=True, eq=False)
class Unpaired(Padded):
    """Completions judged one by one, each with a mismatched one; otherwise as `Chats`.

    An example is its sequence, its prompt with another example's completion, and whether its own
    completion is desirable. KTO (2402.01306) estimates its KL term on the mismatched ones.
    """

    examples: tuple[tuple[Example, Example, bool], ...] = attrs.field(repr=False)

    def __len__(self) -> int:
        """The number of examples."""
        return len(self.examples)

    def sequences(self, index: int) -> tuple[tuple[int, ...], ...]:
        """The lengths of the completion and of the mismatched one."""
        completion, mismatched, _ = self.examples[index]
        return (len(completion[0]),), (len(mismatched[0]),)

    def collate(self, indices: list[int]) -> Batch:
        """`completion` and `mismatched`, each as `Chats` gives it, and `desirable`: bool [n]."""
        rows, multiple = [self.examples[index] for index in indices], self.pad_to_multiple_of
        return {
            "completion": padded([completion for completion, _, _ in rows], multiple),
            "mismatched": padded([mismatched for _, mismatched, _ in rows], multiple),
            "desirable": torch.tensor([desirable for _, _, desirable in rows]),
        }


def unpaired(
    records: Iterable[Record],
    tokenizer: Tokenizer,
    *,
    time: int,
    batch_size: int,
    seed: int = 0,
    shuffle: bool = True,
    truncation: str = "keep_start",
    min_prompt: int = 1,
    drop_identical: bool = False,
    group_by_length: bool = False,
    pad_to_multiple_of: int = MULTIPLE,
    on_bad_record: str = "stop",
) -> Unpaired:
    """Judged completions from `{"prompt", "completion", "label"}`, true where it is desirable.

    Pairs as `preference` reads them are taken too: the chosen completion is a desirable example,
    the rejected one an undesirable one. Examples are cut and counted one by one, as by `chat`; a
    pair is two.

    The mismatched completion is that of the next kept example, wrapping around the end, whose
    prompt and completion both differ (or, where no prompt does, whose completion does): a function
    of the example and the data set, not of the batch.

    An example is dropped and counted if no other completion can be set against its prompt, since
    the cut leaves too little.

    Raises `DataError` as `chat` and `preference` do, for an invalid label, and where no example has
    another completion.
    """
    check_given(records)
    check_joinable(tokenizer)
    check_boolean("drop_identical", drop_identical)
    how = Truncation(time=time, mode=truncation, min_prompt=min_prompt)
    read, malformed = read_each(
        records,
        lambda each, where: read_judged(each, tokenizer, where, drop_identical),
        on_bad_record,
    )
    given = [each for _, examples in read for each in examples]
    identical = 2 * sum(not examples for _, examples in read)
    kept, counts = fitted([each.prompted for each in given], how, identical=identical)
    judged = [given[n] for n in kept]
    own = [example for (example,) in kept.values()]
    examples: list[tuple[Example, Example, bool]] = []
    left: list[Prompted] = []
    for each, example, other in zip(judged, own, _mismatched(judged, own, how), strict=True):
        if other is not None:
            examples.append((example, other, each.desirable))
            left.append(each.prompted)
    if not examples:
        raise DataError(
            f"{judged[0].where}: no other completion to set against this prompt, nor against any "
            f"(all are the same text, or the same when cut at time={how.time}); KTO's KL term "
            "needs one, so give more completions or more time"
        )
    _, of_left = fitted(left, how, identical=identical)
    return Unpaired(
        examples=tuple(examples),
        counts=attrs.evolve(
            of_left,
            no_completion_left=counts.no_completion_left,
            no_other_completion=len(judged) - len(left),
        ).with_malformed(malformed),
        batch_size=batch_size,
        seed=seed,
        shuffle=shuffle,
        group_by_length=group_by_length,
        pad_to_multiple_of=pad_to_multiple_of,
    )


@attrs.frozen
class Judged:
    """A completion as it was read, whether it is desirable, and where it was read."""

    prompted: Prompted
    desirable: bool
    where: str


def _is_pair(record: Record) -> bool:
    """Whether a record is of a pair; of what were columns, the sides of another kind are null."""
    if any(record.get(side) is not None for side in SIDES):
        return True
    return any(side in record for side in SIDES) and record.get("completion") is None


def read_judged(
    record: Record, tokenizer: Tokenizer, where: str, drop_identical: bool = False
) -> list[Judged]:
    """One example, or the two of a pair, or none where the two are the same."""
    if not isinstance(record, Mapping) or not _is_pair(record):
        return [Judged(*read_unpaired(record, tokenizer, where), where)]
    for other in ("completion", "label"):
        if record.get(other) is not None:
            raise DataError(f"{where}: {other} beside chosen or rejected; give one form")
    pair = read_pair(record, tokenizer, where)
    if not differ(pair, where, drop_identical):
        return []
    return [
        Judged(Prompted(pair.prompt, (completion,)), side == "chosen", where)
        for completion, side in zip(pair.completions, SIDES, strict=True)
    ]


def _mismatched(
    judged: Sequence[Judged], own: Sequence[Example], how: Truncation
) -> list[Example | None]:
    """For each, its prompt with the next other completion that differs and leaves a target.

    None where there is no such completion.
    """
    prompts = _ring([each.prompted.prompt for each in judged])
    completions = _ring([each.prompted.completions for each in judged])

    @functools.cache
    def left(prompt: int) -> _Ring:
        return _ring([_left(each, prompt, how) for each in judged])

    def others(index: int, *more: _Ring) -> Iterator[int]:
        elsewhere = _next(index, prompts, completions, *more)
        return itertools.chain(elsewhere, _next(index, completions, *more))

    def first(index: int, among: Iterable[int]) -> Example | None:
        prompt = judged[index].prompted.prompt
        fits = (how.fit(Prompted(prompt, judged[n].prompted.completions))[0] for n in among)
        return next((x for x in fits if has_targets(x) and x != own[index]), None)

    found: list[Example | None] = []
    for index, each in enumerate(judged):
        chosen = first(index, itertools.islice(others(index), _FEW))
        if chosen is None:
            # Where the cut leaves the same of many, they are stepped over like equal ones: looked
            # at one by one, 50,000 took hours. After all prompts that fill the time it leaves the
            # same, however long they are.
            chosen = first(index, others(index, left(min(len(each.prompted.prompt), how.time))))
        found.append(chosen)
    return found


def _left(each: Judged, prompt: int, how: Truncation) -> Hashable:
    """What the cut leaves after a prompt of so many tokens: how many of those, and which ids."""
    ((ids, labels),) = each.prompted.completions
    head, tail = MODES[how.mode](prompt, len(ids), how.time, how.min_prompt)
    return len(range(prompt)[head]), ids[tail], labels[tail]


@attrs.frozen
class _Ring:
    """Keys around a circle, and how far from each the next different one is."""

    keys: Sequence[int]
    run: Sequence[int]


def _ring(keys: Sequence[Hashable]) -> _Ring:
    numbers: dict[Hashable, int] = {}
    short = [numbers.setdefault(key, len(numbers)) for key in keys]
    run = [len(keys)] * len(keys)
    for at in range(len(keys) - 1, -len(keys), -1):  # twice around: a run may cross the end
        run[at - 1] = run[at] + 1 if short[at - 1] == short[at] else 1
    return _Ring(short, run)


def _next(index: int, *rings: _Ring) -> Iterator[int]:
    """The indices after this one, wrapping around the end, whose keys differ on every ring.

    Whole runs are stepped over, so that sorted data cost no more than shuffled.
    """
    size = len(rings[0].keys)
    at = index + 1
    while at < index + size:
        same = [ring for ring in rings if ring.keys[at % size] == ring.keys[index]]
        if same:
            at += same[0].run[at % size]
        else:
            yield at % size
            at += 1
