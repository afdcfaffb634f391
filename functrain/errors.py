"""Every error that a user can meet, in one family.

Each message says what was wrong, where, what was expected, and what to do about it.
All errors derive from `FunctrainError`; those about a value are also `ValueError`s.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class FunctrainError(Exception):
    """The base of every error raised on purpose by functrain."""


class ConfigError(FunctrainError, ValueError):
    """An option, a name or a combination of them that cannot be built."""


class BatchError(FunctrainError, ValueError):
    """A batch that a step cannot train on, raised before any compute."""


class DataError(FunctrainError, ValueError):
    """A data source, file or record that cannot be read as what it should be."""


class ArchitectureError(FunctrainError, ValueError):
    """A module that cannot be split, or values that do not fit the architecture."""


class StateError(FunctrainError, ValueError):
    """A state that does not belong to this step."""


class ConsumedStateError(StateError):
    """A state, or one of its mappings, whose memory a donated step has reused."""


class AliasError(StateError):
    """Storage that a donated step would overwrite is shared with something still needed."""


class DivergedError(FunctrainError):
    """Training that skips one step after another, so that going on is useless."""


class CheckpointError(FunctrainError, ValueError):
    """A checkpoint that is missing, incomplete, altered, or of another architecture."""


class WorkerError(FunctrainError):
    """Workers of one run that disagree, or a worker that refuses or does not answer."""


class RelayedError(WorkerError):
    """An error of another worker, which has raised it there."""


class FunctrainWarning(UserWarning):
    """The base of every warning given by functrain."""


class NumericsWarning(FunctrainWarning):
    """A run goes on, but its bits will not be those of an uninterrupted run."""


class WeightsWarning(FunctrainWarning):
    """Weights of a file have no place in the model, and are left out."""


class SaveWarning(FunctrainWarning):
    """A checkpoint could not be written or removed, and training goes on."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of an error message about an unknown name: the nearest known names, or all of them.

    Names that begin with it come before names that look like it; case is ignored.
    """
    names = sorted(known)
    return _meant(nearest(name, names)) or f"known: {', '.join(repr(n) for n in names)}"


def in_its_place(name: str, given: Iterable[object], expected: Iterable[str] = ()) -> str:
    """The end of an error message about a name that is missing: what is there that it may be.

    A name that is `expected` itself is not meant by another.
    """
    names = [str(each) for each in given]
    meant = _meant(nearest(name, set(names) - set(expected)))
    has = f"it has {', '.join(repr(n) for n in names)}" if names else "it is empty"
    return meant or has


def _meant(near: Sequence[str]) -> str:
    return f"did you mean {' or '.join(repr(n) for n in near)}?" if near else ""


def nearest(name: str, known: Iterable[str]) -> list[str]:
    """The known names, three at most, that somebody who wrote `name` may have meant."""
    names, folded = sorted(known), name.casefold()
    near = [each for each in names if each.casefold() == folded]
    if not near and folded:
        near = [each for each in names if each.casefold().startswith(folded)][:3]
    if not near:
        cases = {each.casefold(): each for each in names}
        close = difflib.get_close_matches(folded, cases, n=3, cutoff=0.5)
        near = [cases[each] for each in close]
    return near
