"""The options of a preference objective: losses and their weights, numbers, and combinations."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import attrs
from torch import Tensor

from functrain.checks import check_integer, is_number
from functrain.errors import ConfigError, did_you_mean
from functrain.objectives.losses import DIVERGENCES, LOSSES, PairLoss
from functrain.trees import Tensors, clone

if TYPE_CHECKING:
    from functrain.objectives.preference import PreferenceOptimization

Mix = str | Mapping[str, float]

CALLED: Mapping[str, str] = {
    "dpo": "it is 'sigmoid'",
    "cdpo": "it is 'sigmoid' with label_smoothing",
    "rpo": "it is a mix of 'sigmoid' and 'sft'",
    "slic": "it is 'hinge'",
    "rso": "it is 'hinge'",
    "tr_dpo": "it is any loss with a reference, with reference_mixup",
    "ld_dpo": "it is 'sigmoid' with ld_alpha",
    "kto": "it is for completions without a pair, and a step of its own: functrain.kto_step",
}
"""Methods known elsewhere by another name, and what they are here."""


def nearest_loss(name: str) -> str:
    """The end of an error message about an unknown loss."""
    return CALLED.get(name.casefold().replace("-", "_")) or did_you_mean(name, LOSSES)


def own_tensors(value: Mapping[str, Tensor], what: str = "reference") -> Tensors:
    """Copy a plain mapping, since a step may donate the memory that it was made of.

    Raises `ConfigError`, naming `what`, for what is not a mapping of tensors.
    """
    if isinstance(value, Tensors):
        return value
    if not isinstance(value, Mapping) or not all(isinstance(t, Tensor) for t in value.values()):
        kind = "params" if what == "reference" else what
        raise ConfigError(
            f"{what}: expected {kind}, a mapping from names to tensors as functrain.split or "
            f"state.{kind} has them, got {type(value).__name__}"
        )
    return clone(value)


def mixed(given: Mix) -> Mapping[str, float]:
    """The weights by name of a loss, or of a mix of losses; `ConfigError` for anything else."""
    if isinstance(given, str):
        given = {given: 1.0}
    if not isinstance(given, Mapping) or not given:
        raise ConfigError(f"loss: {given!r}, expected a name, or weights by name")
    for name, weight in given.items():
        if name not in LOSSES:
            near = nearest_loss(str(name))
            raise ConfigError(f"loss: {name!r} is unknown; {near}")
        if not is_number(weight) or not 0 < weight < math.inf:
            raise ConfigError(
                f"loss: the weight of {name!r} is {weight!r}, expected a finite number above 0"
            )
    return dict(given)


def within(high: float, what: str, *, above: bool = False) -> Any:
    """A validator of a number in [0, high); with `above`, in (0, high)."""

    def check(_record: object, field: attrs.Attribute[Any], value: object) -> None:
        if not is_number(value) or not 0 <= value < high or (above and value == 0):
            raise ConfigError(f"{field.name}: {value!r}, expected {what}")

    return check


def check_combination(given: PreferenceOptimization) -> None:
    """Raise `ConfigError` for an option that a loss of the mix cannot use, or that none reads."""
    if given.divergence not in DIVERGENCES:
        near = did_you_mean(str(given.divergence), DIVERGENCES)
        raise ConfigError(f"divergence: {given.divergence!r} is unknown; {near}")
    names = list(given.loss)
    # A likelihood term beside a loss over pairs is not modified; alone it would not read an option.
    over_pairs = [name for name in names if LOSSES[name].value is not None]
    for name in over_pairs or names:
        for option, why in _unread(given, name, LOSSES[name]):
            raise ConfigError(f"{option}: the {name!r} loss {why}")
    for name in names:
        if LOSSES[name].needs_smoothing and not given.label_smoothing:
            raise ConfigError(
                f"label_smoothing: the {name!r} loss takes its logarithm, so it must be above 0; "
                "the paper's is 1e-3"
            )
    if given.ld_alpha is not None and given.length_normalized:
        raise ConfigError(
            "ld_alpha: length_normalized would divide by the whole length what it counts only in "
            "part; leave one of them out"
        )
    if not given.referred:
        for option in ("reference", "reference_mixup"):
            if getattr(given, option) is not None:
                raise ConfigError(f"{option}: the {names[0]!r} loss has no reference; leave it out")
    if given.reference_mixup is not None and given.reference is None:
        raise ConfigError("reference_mixup: no reference to move; give reference=params")
    check_integer("reference_sync", given.reference_sync)
    _check_read(given)


def _unread(given: PreferenceOptimization, name: str, each: PairLoss) -> Iterator[tuple[str, str]]:
    """The modifiers that were chosen but that a loss does not read, each with the reason."""
    if given.label_smoothing and not each.smoothing:
        have = ", ".join(known for known, other in LOSSES.items() if other.smoothing)
        yield "label_smoothing", f"has none; it has a meaning for {have}"
    if given.divergence != "reverse_kl" and not each.divergence:
        alone = "is defined for 'reverse_kl' alone; leave it out"
        yield "divergence", alone if each.reference else "has no Δ to modify; leave it out"
    if given.length_normalized and not each.on_delta:
        yield "length_normalized", _not_normalized(name, each)
    if given.ld_alpha is not None and each.by_length:
        yield "ld_alpha", "divides by the whole length what it counts only in part; leave it out"
    for option, chosen in (("wpo", given.wpo), ("ld_alpha", given.ld_alpha is not None)):
        if chosen and each.value is None:
            yield option, "is the likelihood of the chosen alone; leave it out"
    if given.wpo and name in ("aot", "aot_unpaired"):
        yield "wpo", "sorts the batch, so no pair has a weight; leave it out"


def _not_normalized(name: str, each: PairLoss) -> str:
    if name == "ipo_sum":
        return "is 'ipo' where it is by token; use 'ipo'"
    if not each.reference:
        return "has no Δ to modify; leave it out"
    return "is no function of Δ alone; leave it out"


def _check_read(given: PreferenceOptimization) -> None:
    """Raise `ConfigError` for a number that was chosen though nothing would read it."""
    alone = [(each.number, name) for name, each in LOSSES.items() if each.number is not None]
    readers = [(option, f"the {name!r} loss", name in given.loss) for option, name in alone]
    readers += [
        ("divergence_alpha", "the divergence 'alpha'", given.divergence == "alpha"),
        ("reference_sync", "reference_mixup", given.reference_mixup is not None),
    ]
    defaults = attrs.fields_dict(type(given))
    for option, reader, is_there in readers:
        value = getattr(given, option)
        if not is_there and value != defaults[option].default:
            raise ConfigError(
                f"{option}: {value!r}, and nothing reads it without {reader}; leave it out"
            )
