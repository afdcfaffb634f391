"""Packed batches: rows of several documents, which a model must tell apart by their positions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from functrain.errors import ArchitectureError
from functrain.objectives.batches import Batch, are_packed, known_packed
from functrain.objectives.layouts import Layout, padding_free
from functrain.objectives.support import check_weights, fault
from functrain.objectives.verdicts import Verdicts

# By whether there are several rows: what is wrong, or None.
_found: Verdicts[str | None] = Verdicts()


def check_separated(model: nn.Module, batch: Batch) -> None:
    """Raise `ArchitectureError` where documents of a packed batch would see each other.

    Found by trying it, once for each architecture and config: on one row, and on several
    (flash attention in transformers separates the documents of a single row only).
    """
    if "position_ids" not in batch or "attention_mask" in batch:
        return
    several = len(batch["position_ids"]) > 1
    known = _found.of(model)
    if known.get(several, "") is None:
        return
    packed = known_packed(batch)
    if packed is False:
        return
    if several not in known:
        check_weights(model, "position_ids: several documents in a row")
        known[several] = fault(model, two_rows if several else padding_free)
    found = known[several]
    # Asked last: for a batch handed over on an accelerator it synchronises, in every step.
    if found is not None and (packed or are_packed(batch)):
        hint = ""
        if several and fault(model, padding_free) is None:
            hint = "give each row a micro-batch of its own, which this model separates, or "
        raise ArchitectureError(
            "position_ids: they begin anew within rows, without an attention_mask, and the model "
            f"does not keep such documents apart: {found}; {hint}do without packing"
        )


def two_rows(batch: Batch) -> Layout:
    """Four sequences packed two to a row into two rows, with padding at their ends."""
    halves = [padding_free({k: v[at : at + 2] for k, v in batch.items()}) for at in (0, 2)]
    width = 2 + max(half.inputs["input_ids"].shape[1] for half in halves)

    def placed(key: str) -> Tensor:
        rows = [half.inputs[key] for half in halves]
        return torch.cat([F.pad(row, (0, width - row.shape[1])) for row in rows])

    inputs = {key: placed(key) for key in halves[0].inputs}
    index = torch.cat([half.index + row * width for row, half in enumerate(halves)])
    tokens = sum(half.inputs["input_ids"].numel() for half in halves)
    return Layout(inputs=inputs, index=index, padding=index.new_tensor(2 * width - tokens))
