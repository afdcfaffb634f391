"""Truncation: which tokens are cut where there are more than `time`, and how many were."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs

from functrain.data.examples import Example, Prompted
from functrain.data.source import MapSource, at_least_one
from functrain.data.text import IGNORE_INDEX
from functrain.errors import DataError, did_you_mean

Mode = Callable[[int, int, int, int], tuple[slice, slice]]
"""From (prompt, longest, time, min_prompt), the slices of a prompt and of its completions to keep.

`prompt` and `longest`: the lengths of the prompt and of its longest completion; all in tokens.
"""


def keep_start(prompt: int, longest: int, time: int, min_prompt: int) -> tuple[slice, slice]:
    """Cut the end: a completion loses its end, all of it after a prompt of `time` tokens."""
    return slice(0, time), slice(0, max(0, time - prompt))


def keep_end(prompt: int, longest: int, time: int, min_prompt: int) -> tuple[slice, slice]:
    """Cut the start: of the prompt, and of a completion longer than `time`."""
    kept = min(prompt, max(0, time - longest))
    return slice(prompt - kept, prompt), slice(-time, None)


def prompt_first(prompt: int, longest: int, time: int, min_prompt: int) -> tuple[slice, slice]:
    """Cut the prompt's start down to `min_prompt` tokens, and only then a completion's end."""
    kept = min(prompt, max(min_prompt, time - longest))
    return slice(prompt - kept, prompt), slice(0, time - kept)


MODES: Mapping[str, Mode] = {
    "keep_start": keep_start,
    "keep_end": keep_end,
    "prompt_first": prompt_first,
}


@attrs.frozen(kw_only=True)
class Truncation:
    """The limit of `time` tokens, and a name in `MODES`; `min_prompt` is for `prompt_first` alone.

    Raises `DataError` for a limit below 1, an unknown name, and a `min_prompt` that leaves no room
    for a completion or belongs to another mode.
    """

    time: int
    mode: str = "keep_start"
    min_prompt: int = 1

    def __attrs_post_init__(self) -> None:
        at_least_one("time", self.time)
        if str(self.mode) not in MODES:
            near = did_you_mean(str(self.mode), MODES)
            raise DataError(f"truncation: {self.mode!r} is unknown; {near}")
        at_least_one("min_prompt", self.min_prompt)
        if self.mode != "prompt_first" and self.min_prompt != 1:
            raise DataError(
                f"min_prompt: {self.min_prompt} has a meaning for truncation='prompt_first' alone, "
                f"not for {self.mode!r}"
            )
        if self.mode == "prompt_first" and self.min_prompt >= self.time:
            raise DataError(
                f"min_prompt: {self.min_prompt} of time={self.time} tokens leave none for a "
                "completion; expected less than time"
            )

    def fit(self, given: Prompted) -> tuple[Example, ...]:
        """The prompt with each completion, in `time` tokens; the prompt is cut alike for all.

        What the longest completion needs is cut from the prompt of each.
        """
        longest = max(len(ids) for ids, _ in given.completions)
        head, tail = MODES[self.mode](len(given.prompt), longest, self.time, self.min_prompt)
        prompt = given.prompt[head]
        ignored = (IGNORE_INDEX,) * len(prompt)
        return tuple(
            ((*prompt, *ids[tail]), (*ignored, *labels[tail])) for ids, labels in given.completions
        )


@attrs.frozen(kw_only=True)
class Counts:
    """What became of the examples read; `str()` says it in one line.

    Of those kept, `truncated` lost `tokens_cut` tokens (of a pair, both sides count). Dropped are
    those with `no_completion_left` after the cut on some side; pairs whose sides were `identical`
    (where that is not an error); pairs `identical_when_cut`, which differ only in what was cut and
    would teach nothing; and unpaired examples with `no_other_completion` to set beside theirs.
    `malformed` records were passed over, where that was asked for; `complaints` says why for the
    first ones.
    """

    kept: int = 0
    truncated: int = 0
    tokens_cut: int = 0
    no_completion_left: int = 0
    identical: int = 0
    identical_when_cut: int = 0
    no_other_completion: int = 0
    malformed: int = 0
    complaints: tuple[str, ...] = ()

    def with_malformed(self, malformed: Sequence[str]) -> Counts:
        """These counts, with what was wrong with the records that could not be read."""
        return attrs.evolve(self, malformed=len(malformed), complaints=tuple(malformed[:3]))

    @property
    def reasons(self) -> dict[str, int]:
        """Why examples were dropped, and how many each time."""
        counts = {
            "no completion left": self.no_completion_left,
            "identical": self.identical,
            "identical when cut": self.identical_when_cut,
            "no other completion": self.no_other_completion,
            "malformed": self.malformed,
        }
        return {reason: count for reason, count in counts.items() if count}

    @property
    def dropped(self) -> int:
        """Examples that were read and not kept."""
        return sum(self.reasons.values())

    @property
    def read(self) -> int:
        """Examples that were kept or dropped."""
        return self.kept + self.dropped

    def __str__(self) -> str:
        text = f"read {self.read}, kept {self.kept}"
        if self.truncated:
            text += f" ({self.truncated} truncated by {self.tokens_cut} tokens in all)"
        if self.dropped:
            listed = ", ".join(f"{count} {reason}" for reason, count in self.reasons.items())
            text += f", dropped {self.dropped} ({listed})"
        return text


@attrs.frozen(kw_only=True, eq=False)
class Counted(MapSource):
    """A source that says what became of the examples read: `counts`."""

    counts: Counts = Counts()

    @property
    def truncated(self) -> int:
        """Examples that are kept and were cut."""
        return self.counts.truncated

    @property
    def dropped(self) -> int:
        """Examples that were read and are not kept."""
        return self.counts.dropped


def fitted(
    given: Sequence[Prompted], how: Truncation, *, identical: int = 0
) -> tuple[dict[int, tuple[Example, ...]], Counts]:
    """What is left of each by its index in `given`, without those dropped; and the counts.

    `identical`: pairs that were dropped before. Raises `DataError` where nothing is left.
    """
    sides = [how.fit(each) for each in given]
    reasons = [_reason(each) for each in sides]
    kept = [n for n, reason in enumerate(reasons) if reason is None]
    cut = [_tokens_cut(given[n], sides[n]) for n in kept]
    counts = Counts(
        kept=len(kept),
        truncated=sum(tokens > 0 for tokens in cut),
        tokens_cut=sum(cut),
        identical=identical,
    )
    dropped: dict[str, Any] = Counter(reason for reason in reasons if reason is not None)
    counts = attrs.evolve(counts, **dropped)
    _check_some_left(counts, how)
    return {n: sides[n] for n in kept}, counts


def has_targets(example: Example) -> bool:
    """Whether anything is to be predicted; the first token of a row never is."""
    return any(label != IGNORE_INDEX for label in example[1][1:])


def _reason(sides: tuple[Example, ...]) -> str | None:
    """The field of `Counts` that counts the example as dropped; None if it is kept."""
    if not all(has_targets(side) for side in sides):
        return "no_completion_left"
    return "identical_when_cut" if len(sides) == 2 and sides[0] == sides[1] else None


def _tokens_cut(given: Prompted, sides: tuple[Example, ...]) -> int:
    before = sum(len(given.prompt) + len(ids) for ids, _ in given.completions)
    return before - sum(len(ids) for ids, _ in sides)


def _check_some_left(counts: Counts, how: Truncation) -> None:
    if not counts.read:
        raise DataError("records: none; expected at least one example")
    if counts.no_completion_left == counts.read:
        hint = "" if how.mode == "prompt_first" else ", or truncation='prompt_first'"
        raise DataError(
            f"time: {how.time} tokens leave no completion token of any of {counts.read} examples; "
            f"give more{hint}"
        )
    if not counts.kept:
        raise DataError(f"records: none to learn from: {counts}")
