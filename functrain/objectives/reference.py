"""The DPO reference as a value: the same architecture with other params."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from functrain.objectives.batches import Batch
from functrain.objectives.layouts import Layout
from functrain.objectives.logprobs import HeadMode, TokenScores, token_scores


def reference_scores(
    model: nn.Module,
    reference: Mapping[str, Tensor],
    batch: Batch,
    *,
    head: HeadMode = "auto",
    layout: Layout | None = None,
) -> TokenScores:
    """`token_scores` of the bound `model` with `reference` in place of its params; logps alone.

    `torch.func.functional_call` under no_grad and in eval mode, with the buffers that are bound:
    no second module, no switch on the model, and never a gradient. The same code path and dtypes
    as the policy's, so that equal params give equal bits.
    """
    bound = dict(model.named_parameters())
    values = {name: tensor.to(bound[name].dtype) for name, tensor in reference.items()}

    def with_reference(**inputs: Tensor) -> object:
        return functional_call(model, values, (), inputs)

    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            return token_scores(
                model,
                batch,
                call=with_reference,
                values=values,
                head=head,
                detailed=False,
                layout=layout,
            )
    finally:
        for module, training in modes:
            module.training = training


def reference_logps(
    model: nn.Module, reference: Mapping[str, Tensor], batch: Batch
) -> tuple[Tensor, Tensor]:
    """`sequence_logps` of the bound `model` with `reference` in place of its params."""
    scores = reference_scores(model, reference, batch)
    return scores.sums, scores.lengths
