"""The DPO reference as a value: the same architecture with other params."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call

from functrain.architecture import current_substitution
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
    paired: bool = False,
) -> TokenScores:
    """`token_scores` of the bound `model`, not detailed, under `reference` in place of its params.

    It is `torch.func.functional_call` under no_grad and in eval mode, with the bound buffers: no
    second module, no switch on the model, and never a gradient. Code path and dtypes are the
    policy's, so that equal params give equal bits.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad(), _with(model, reference) as (call, values):
            return token_scores(
                model,
                batch,
                call=call,
                values=values,
                head=head,
                detailed=False,
                layout=layout,
                paired=paired,
            )
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _with(
    model: nn.Module, reference: Mapping[str, Tensor]
) -> Generator[tuple[Callable[..., object], Mapping[str, Tensor]]]:
    """A forward of the model with these params, and the values that a head may be among."""
    bound = dict(model.named_parameters())
    values = {name: tensor.to(bound[name].dtype) for name, tensor in reference.items()}
    substitute = current_substitution()
    if substitute is not None:
        with substitute(values) as whole:
            yield model, whole
        return

    def with_reference(**inputs: Tensor) -> object:
        return functional_call(model, values, (), inputs)

    yield with_reference, values


def reference_logps(
    model: nn.Module, reference: Mapping[str, Tensor], batch: Batch
) -> tuple[Tensor, Tensor]:
    """`sequence_logps` of the bound `model` with `reference` in place of its params."""
    scores = reference_scores(model, reference, batch)
    return scores.sums, scores.lengths
