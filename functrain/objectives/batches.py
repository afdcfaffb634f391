"""Batches as objectives read them: their schema, checked before any compute."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from functrain.errors import BatchError, did_you_mean

Batch = Mapping[str, Any]
"""`input_ids`, `labels`, `attention_mask`, `position_ids`: tensors of shape [batch, time].

`labels` are aligned with `input_ids`, and −100 alone says that a position is no target. An
`attention_mask` of 0 hides a token from the model and leaves its label what it is, and in a row
that is padded on the left the first real token is a target too, predicted from padding: give both
labels of −100 where they are not to be trained on. Sources of `functrain.data` pad on the right,
with labels of −100.
"""

IGNORE_INDEX = -100
MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids")
SEQUENCE_KEYS = (*MODEL_INPUTS, "labels")

_INTEGERS = (torch.int64, torch.int32)

# For `position_ids` that `to_device` has moved: whether they restart within rows.
_packed: MutableMapping[Tensor, bool] = WeakTensorKeyDictionary()


def check_sequences(batch: Batch, vocabulary: int | None, where: str = "") -> None:
    """Raise `BatchError` unless `batch` is a well-formed batch of token sequences.

    Keys, types, dtypes and shapes are always checked; the range of ids and labels only on the CPU,
    since elsewhere it would cost a synchronisation: hand the step CPU batches, which it moves
    itself. `where` prefixes the names in messages (`chosen.`).
    """
    if not isinstance(batch, Mapping):
        raise BatchError(
            f"{where.rstrip('.') or 'batch'}: expected a mapping with input_ids and labels, "
            f"got {type(batch).__name__}"
        )
    for key in batch:
        if key not in SEQUENCE_KEYS:
            raise BatchError(
                f"{where}{key}: unknown key; {did_you_mean(str(key), SEQUENCE_KEYS)} or "
                "take it out of the batch"
            )
    for key in ("input_ids", "labels"):
        if key not in batch:
            raise BatchError(
                f"{where}{key}: missing; for plain language modelling labels are the input_ids"
            )
    ids = _checked_tensor(batch["input_ids"], f"{where}input_ids", _INTEGERS)
    labels = _checked_tensor(batch["labels"], f"{where}labels", (torch.int64,))
    if ids.ndim != 2 or not ids.numel():
        raise BatchError(
            f"{where}input_ids: shape {list(ids.shape)}, expected [batch, time] with neither 0"
        )
    if "attention_mask" in batch:
        allowed = (*_INTEGERS, torch.bool)
        _checked_tensor(batch["attention_mask"], f"{where}attention_mask", allowed)
    if "position_ids" in batch:
        _checked_tensor(batch["position_ids"], f"{where}position_ids", _INTEGERS)
    for key in batch:
        if batch[key].shape != ids.shape:
            raise BatchError(
                f"{where}{key}: shape {list(batch[key].shape)} differs from input_ids' "
                f"{list(ids.shape)}"
            )
    _check_range(ids, f"{where}input_ids", 0, vocabulary)
    _check_labels(labels, f"{where}labels", vocabulary)
    if "attention_mask" in batch:
        _check_range(batch["attention_mask"], f"{where}attention_mask", 0, 2)
    if "position_ids" in batch:
        _check_range(batch["position_ids"], f"{where}position_ids", 0, None)


def _checked_tensor(value: object, name: str, dtypes: Sequence[torch.dtype]) -> Tensor:
    if not isinstance(value, Tensor):
        raise BatchError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.is_meta or value.layout is not torch.strided:
        what = "on the meta device" if value.is_meta else str(value.layout)
        raise BatchError(f"{name}: {what}, expected a dense tensor with values")
    if value.dtype not in dtypes:
        wanted = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise BatchError(
            f"{name}: dtype {str(value.dtype).removeprefix('torch.')}, expected {wanted}"
        )
    return value


def _check_range(tensor: Tensor, name: str, low: int, high: int | None) -> None:
    if tensor.device.type != "cpu":
        return
    least, most = (int(x) for x in torch.aminmax(tensor.to(torch.int64)))
    if least < low or (high is not None and most >= high):
        bad = least if least < low else most
        at = (tensor == bad).nonzero()[0].tolist()
        bound = f"[{low}, {high})" if high is not None else f"at least {low}"
        raise BatchError(f"{name}: {bad} at {at} is out of range, expected {bound}")


def _check_labels(labels: Tensor, name: str, vocabulary: int | None) -> None:
    if labels.device.type != "cpu":
        return
    targets = labels.masked_fill(labels == IGNORE_INDEX, 0)
    least, most = (int(x) for x in torch.aminmax(targets))
    if least < 0 or (vocabulary is not None and most >= vocabulary):
        bad = least if least < 0 else most
        at = (labels == bad).nonzero()[0].tolist()
        bound = f"[0, {vocabulary})" if vocabulary is not None else "at least 0"
        raise BatchError(
            f"{name}: {bad} at {at} is out of range, expected {bound}, or -100 for no target"
        )


def count_targets(batch: Batch) -> Tensor:
    """The number of predicted positions: labels other than −100 after the shift; int64, 0-d."""
    labels: Tensor = batch["labels"]
    return (labels[:, 1:] != IGNORE_INDEX).sum()


def targets_in(batch: Batch | Sequence[Batch]) -> Tensor:
    """`count_targets` of one batch, of any form, or of several: both sides of a pair count.

    0 where a custom objective reads something other than `labels`, int64 [batch, time]. What is not
    a batch at all counts 0 too, and the step says what is wrong with it.
    """
    if not isinstance(batch, Mapping):
        is_several = isinstance(batch, Sequence) and not isinstance(batch, str)
        found = [targets_in(each) for each in batch] if is_several else []
    elif "labels" in batch:
        labels = batch["labels"]
        are_tokens = isinstance(labels, Tensor) and labels.dtype == torch.int64 and labels.ndim == 2
        found = [count_targets(batch)] if are_tokens else []
    else:
        # Mismatched completions (KTO's) are scored, not trained on.
        sides = (v for k, v in batch.items() if isinstance(v, Mapping) and k != "mismatched")
        found = [targets_in(side) for side in sides]
    return torch.stack(found).sum() if found else torch.zeros((), dtype=torch.int64, device="cpu")


def beginnings(position_ids: Tensor) -> Tensor:
    """Where a sequence begins, i.e. where positions do not go up by one: bool [batch, time]."""
    return F.pad(position_ids.diff(dim=1) != 1, (1, 0), value=True)


def are_packed(batch: Batch) -> bool:
    """Whether rows hold several sequences, told apart by `position_ids` without a mask.

    On an accelerator this synchronises, except for a batch that `to_device` has moved there.
    """
    found = known_packed(batch)
    return _begin_anew(batch["position_ids"]) if found is None else found


def known_packed(batch: Batch) -> bool | None:
    """`are_packed`, or None where that would synchronise with an accelerator."""
    if "position_ids" not in batch or "attention_mask" in batch:
        return False
    positions = batch["position_ids"]
    return _begin_anew(positions) if positions.device.type == "cpu" else _packed.get(positions)


def _begin_anew(position_ids: Tensor) -> bool:
    return bool(beginnings(position_ids)[:, 1:].any())


def check_packed(batch: Batch) -> None:
    """Raise `BatchError` for a target predicted from another sequence of its row.

    Checked on the CPU only.
    """
    if batch["labels"].device.type != "cpu" or not are_packed(batch):
        return
    begins = beginnings(batch["position_ids"])
    begins[:, 0] = False  # never a target
    found = (begins & (batch["labels"] != IGNORE_INDEX)).nonzero()
    if len(found):
        row, place = found[0].tolist()
        raise BatchError(
            f"labels: {int(batch['labels'][row, place])} at {[row, place]}, where position_ids "
            "begin anew: it would be predicted from the last token of another document; make the "
            "first label of each document -100"
        )


def padding_in(batch: Batch) -> Tensor | None:
    """Which tokens are known to be padding: bool [batch, time]; None where nothing tells.

    Those that `attention_mask` hides. Without a mask, where there are `position_ids`: those without
    a label that are alone in their sequence.
    """
    if "attention_mask" in batch:
        hidden: Tensor = batch["attention_mask"] == 0
        return hidden
    if "position_ids" not in batch:
        return None
    begins = beginnings(batch["position_ids"])
    alone: Tensor = begins & F.pad(begins[:, 1:], (0, 1), value=True)
    untold: Tensor = batch["labels"] == IGNORE_INDEX
    return alone & untold


def count_padding(batch: Batch) -> tuple[Tensor, int]:
    """How many tokens of [batch, time] are padding (int64, 0-d), and how many there are.

    Padding is what `padding_in` finds or, where nothing tells, what follows a row's last target.
    """
    padding = padding_in(batch)
    if padding is None:
        padding = (batch["labels"] == IGNORE_INDEX).flip(1).cumprod(1)
    return padding.sum(), padding.numel()


def check_targets(count: Tensor, where: str) -> None:
    """Raise `BatchError` for a logical batch without a target token (checked on the CPU)."""
    if count.device.type == "cpu" and int(count) == 0:
        raise BatchError(
            f"{where}: every position is -100 (the first of each row is never a target), so the "
            "batch has no target token; check the prompt mask or the chat template's assistant "
            "mask"
        )


def split_batch(batch: Batch, parts: int) -> list[Batch]:
    """Split `batch` into `parts` equal slices of its examples, which are views, not copies.

    Raises `BatchError` unless the number of examples divides by `parts`.
    """
    if parts == 1:
        return [batch]
    examples = examples_in(batch)
    _check_rows(batch, examples, "")
    if examples % parts:
        raise BatchError(
            f"microbatches={parts} does not divide the batch's {examples} examples; choose a "
            "divisor, or pass a sequence of ready micro-batches"
        )
    size = examples // parts
    return [rows_of(batch, i * size, (i + 1) * size) for i in range(parts)]


def _check_rows(batch: Batch, examples: int, where: str) -> None:
    """Raise `BatchError` for values that cannot be sliced, or not into the same examples."""
    for key, value in batch.items():
        if isinstance(value, Mapping):
            _check_rows(value, examples, f"{where}{key}.")
        elif not isinstance(value, Tensor) or not value.ndim:
            scalar = "a 0-d one, which has no row for each example"
            given = scalar if isinstance(value, Tensor) else type(value).__name__
            raise BatchError(f"{where}{key}: expected a tensor, got {given}")
        elif value.shape[0] != examples:
            raise BatchError(
                f"{where}{key}: {value.shape[0]} rows, and the batch has {examples} examples"
            )


def rows_of(batch: Batch, start: int, stop: int) -> Batch:
    """The examples from `start` to `stop`, exclusive."""
    return {
        key: rows_of(value, start, stop) if isinstance(value, Mapping) else value[start:stop]
        for key, value in batch.items()
    }


def examples_in(batch: Batch) -> int:
    """The size of the first dimension of a batch's first tensor."""
    for value in batch.values():
        if isinstance(value, Mapping):
            return examples_in(value)
        if isinstance(value, Tensor) and value.ndim:
            return value.shape[0]
    raise BatchError("batch: empty; expected input_ids and labels, or chosen and rejected")


def batch_versions(batches: Sequence[Batch]) -> dict[str, int]:
    """By key, a number that changes when a tensor of any of the micro-batches is written to.

    Writes through `.data` change none.
    """
    found: dict[str, int] = {}
    for batch in batches:
        for name, value in batch.items():
            if isinstance(value, Mapping):
                version = sum(batch_versions([value]).values())
            else:  # tensors of inference mode have none
                version = 0 if value.is_inference() else value._version
            found[name] = found.get(name, 0) + version
    return found


_TAKEN = (Tensor, Mapping)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move the batch to `device`; tensors already there are kept, but cloned from inference mode.

    Whether it is packed is noted before the move, since finding out afterwards would synchronise.
    Raises `BatchError` for a value that is not a tensor.
    """
    for key, value in batch.items():
        if not isinstance(value, _TAKEN):
            raise BatchError(
                f"{key}: expected a tensor, got {type(value).__name__}; give numbers and arrays as "
                "tensors (torch.as_tensor), and leave out what is for no model"
            )
    moved = {
        key: to_device(value, device)
        if isinstance(value, Mapping)
        # A tensor made in inference mode takes no part in a backward pass; a copy does.
        else (value.clone() if value.is_inference() else value).to(device, non_blocking=True)
        for key, value in batch.items()
    }
    if "position_ids" in batch and "attention_mask" not in batch:
        positions: Any = moved["position_ids"]
        # A custom objective may have positions of another shape.
        if positions is not batch["position_ids"] and positions.ndim == 2:
            packed = known_packed(batch)
            if packed is not None:
                _packed[positions] = packed
    return moved
