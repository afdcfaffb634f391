"""Batches of pairs: their schema, checked before any compute, and both sides joined into one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from functrain.errors import BatchError, did_you_mean
from functrain.objectives.batches import IGNORE_INDEX, Batch, check_sequences

SIDES = ("chosen", "rejected")


def check_pairs(batch: Batch, vocabulary: int | None) -> None:
    """Raise `BatchError` unless `batch` is a well-formed batch of pairs, each with completions."""
    if isinstance(batch, Mapping) and "chosen" not in batch and "completion" in batch:
        raise BatchError(
            "completion: a batch without pairs, and this loss prefers one of two; give it to "
            "kto_step, or give chosen and rejected"
        )
    check_keys(batch, SIDES)
    check_sides(batch, SIDES, vocabulary, "a preference batch")
    if batch["chosen"].keys() != batch["rejected"].keys():
        raise BatchError(
            f"chosen has {sorted(batch['chosen'])} and rejected {sorted(batch['rejected'])}; "
            "expected the same keys"
        )
    _check_different(batch["chosen"], batch["rejected"])
    if "reference_logps" in batch:
        check_reference_logps(batch, SIDES)


def check_keys(batch: Batch, sides: tuple[str, ...], *more: str) -> None:
    """Raise `BatchError` for what is not a mapping, and for an unknown key."""
    known = (*sides, *more, "reference_logps")
    if not isinstance(batch, Mapping):
        raise BatchError(f"batch: expected a mapping, got {type(batch).__name__}")
    for key in batch:
        if key not in known:
            raise BatchError(f"{key}: unknown key; {did_you_mean(str(key), known)}")


def check_sides(batch: Batch, sides: tuple[str, str], vocabulary: int | None, what: str) -> None:
    """Raise `BatchError` unless both sides are there and well formed, with as many examples."""
    for side in sides:
        if side not in batch:
            raise BatchError(f"{side}: missing; {what} has {' and '.join(sides)}")
        check_completions(batch[side], vocabulary, side)
    one, other = (batch[side]["input_ids"].shape[0] for side in sides)
    if one != other:
        raise BatchError(
            f"{sides[0]} has {one} examples and {sides[1]} {other}; expected as many on both sides"
        )


def check_completions(side: Any, vocabulary: int | None, name: str) -> None:
    """Raise `BatchError` unless each example of a side is well formed and has a completion."""
    check_sequences(side, vocabulary, f"{name}.")
    labels = side["labels"]
    if labels.device.type != "cpu":
        return
    empty = (labels[:, 1:] != IGNORE_INDEX).sum(-1) == 0
    if bool(empty.any()):
        raise BatchError(
            f"{name}.labels: example {int(empty.nonzero()[0])} has no completion token (all "
            "-100); an empty or fully truncated completion cannot be preferred"
        )


def _check_different(chosen: Batch, rejected: Batch) -> None:
    """Raise `BatchError` for a pair of equal completions: its gradient would be 0, silently."""
    if chosen["labels"].device.type != "cpu":
        return
    one, other = (_bare(side) for side in (chosen, rejected))
    time = max(one.shape[1], other.shape[1])
    one, other = (F.pad(each, (0, time - each.shape[1]), value=-1) for each in (one, other))
    same = (one == other).all(-1)
    if bool(same.any()):
        raise BatchError(
            f"example {int(same.nonzero()[0])}: chosen and rejected are the same tokens, so "
            "nothing is preferred; leave the pair out"
        )


def _bare(side: Batch) -> Tensor:
    """Each row's tokens up to its last target, without padding and moved to the front, then −1."""
    ids, labels = side["input_ids"], side["labels"]
    last = last_target(labels).unsqueeze(1)
    outside = torch.arange(ids.shape[1], device=ids.device) > last
    if "attention_mask" in side:
        # A target counts, whatever its mask.
        outside = outside | ((side["attention_mask"] == 0) & (labels == IGNORE_INDEX))
    # A stable sort keeps the tokens in their order, wherever the padding was.
    outside, order = outside.sort(dim=1, stable=True)
    bare: Tensor = ids.gather(1, order).masked_fill(outside, -1)
    return bare


def last_target(labels: Tensor) -> Tensor:
    """The index of each row's last target: int64 [batch]."""
    time = labels.shape[1]
    return time - 1 - (labels != IGNORE_INDEX).flip(1).int().argmax(1)


def check_reference_logps(batch: Batch, sides: tuple[str, ...]) -> None:
    """Raise `BatchError` unless `reference_logps` has, by side, a sum or a row for each example."""
    given = batch["reference_logps"]
    for key in given if isinstance(given, Mapping) else ():
        if key not in sides:
            raise BatchError(
                f"reference_logps.{key}: unknown side; expected {' and '.join(sides)} alone"
            )
    for side in sides:
        value = given.get(side) if isinstance(given, Mapping) else None
        examples, time = batch[side]["input_ids"].shape
        name = f"reference_logps.{side}"
        if not isinstance(value, Tensor) or not value.is_floating_point() or not value.ndim:
            raise BatchError(f"{name}: expected a floating tensor of shape [{examples}]")
        if tuple(value.shape) not in ((examples,), (examples, time - 1)):
            raise BatchError(
                f"{name}: shape {list(value.shape)}, expected [{examples}], or by token "
                f"[{examples}, {time - 1}]"
            )
        if value.device.type == "cpu" and not bool(value.isfinite().all()):
            raise BatchError(f"{name}: not finite; compute it again")
    one, other = (given[side] for side in sides)
    if one.ndim != other.ndim:
        raise BatchError(
            f"reference_logps: {sides[0]} has shape {list(one.shape)} and {sides[1]} "
            f"{list(other.shape)}; expected sums of both, or both by token"
        )


def concatenated(chosen: Batch, rejected: Batch) -> Batch:
    """Chosen, then rejected, as one batch; the shorter side is padded at the end to the longer.

    The padding has no target, and under causal attention nothing before it sees it.
    """
    time = max(chosen["input_ids"].shape[1], rejected["input_ids"].shape[1])
    fill = {"labels": IGNORE_INDEX}

    def padded(side: Batch, key: str) -> Tensor:
        tensor: Tensor = side[key]
        return F.pad(tensor, (0, time - tensor.shape[1]), value=fill.get(key, 0))

    return {key: torch.cat([padded(chosen, key), padded(rejected, key)]) for key in chosen}


def reference_tokens(attached: Mapping[str, Tensor], time: int) -> Tensor:
    """Attached log-probs by token, chosen above rejected: [2 · pairs, time], padded with 0."""
    sides = (attached[side] for side in SIDES)
    return torch.cat([F.pad(each, (0, time - each.shape[1])) for each in sides])


def sequence_labels(side: Batch) -> Tensor:
    """Labels of prompt and completion: every unmasked token up to its row's last target.

    Under a mask the first token after padding has none: only padding would predict it. Targets stay
    what they are.
    """
    ids, labels = side["input_ids"].to(torch.int64), side["labels"]
    places = torch.arange(ids.shape[1], device=ids.device)
    outside = places > last_target(labels).unsqueeze(1)
    if "attention_mask" in side:
        hidden = side["attention_mask"] == 0
        outside = outside | hidden | F.pad(hidden[:, :-1], (1, 0), value=True)
    whole: Tensor = ids.masked_fill(outside, IGNORE_INDEX)
    return torch.where(labels == IGNORE_INDEX, whole, labels)
