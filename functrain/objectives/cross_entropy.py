"""Cross entropy over a head, by chunks, with its gradient in the same pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from functrain.errors import ConfigError
from functrain.objectives.chunks import (
    Projection,
    Rows,
    applied,
    check_targets,
    columns,
    in_dtype,
    widened,
)
from functrain.objectives.head_gradients import (
    Gradients,
    WeightSum,
    given_once,
    less_targets,
    weight_sum,
)
from functrain.objectives.measures import Measures
from functrain.objectives.scores import scored


def summed_cross_entropy(
    hidden: Tensor, targets: Tensor, projection: Projection
) -> tuple[Tensor, Tensor]:
    """(Σ −log p(target) in nats, how many targets are the mode): 0-d, over rows [n, width].

    Rows whose target is −100 count for nothing. The gradient is computed in the forward pass, while
    the logits are there, so that no logits are computed twice.
    """
    if projection.computed_in(hidden) == torch.float16:
        # At unit scale small probabilities are zeros in fp16: the gradient waits for its scale.
        scores = scored(hidden, targets, projection, detailed=False)
        return -scores.logps.sum(), scores.correct.sum()
    hidden, weight, bias = in_dtype(hidden, projection)
    check_targets(targets, len(weight))
    # Inside the Function grad mode is off, and `needs_input_grad` is set even under no_grad.
    graded = torch.is_grad_enabled()
    direct = weight_sum(projection, hidden)
    total, correct = applied(_Summed, hidden, weight, bias, targets, projection, graded, direct)
    return total, correct


class _Summed(torch.autograd.Function):
    """The summed loss, with its gradient taken in the forward pass."""

    @staticmethod
    def forward(  # pyrefly: ignore[bad-override]
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        projection: Projection,
        graded: bool,
        direct: WeightSum | None,
    ) -> tuple[Tensor, Tensor]:
        rows = Rows(hidden, weight, bias, projection, list(projection.chunks(len(hidden))))
        needed = ctx.needs_input_grad
        grads: Gradients | None = None
        into, factor = (None, None) if direct is None else (direct.into, direct.factor)
        if graded and any(needed):
            grads = Gradients(hidden, weight, bias, needed, into)
        measures = Measures(graded=grads is not None)
        losses: list[Tensor] = []
        correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
        for at in rows.chunks:
            column, valid = columns(targets[at])
            logits = rows.of(hidden, at, graded=grads is not None)
            measured = measures.of(logits, column)
            correct += (measured.correct & valid).sum()
            losses.append(-measured.logps.masked_fill(~valid, 0.0))
            if grads is not None:
                slope = less_targets(logits, column, valid)
                grads.add(at, hidden[at], rows.before_finish(slope), None, factor)
        given: list[Gradients] = [] if grads is None else [grads]
        ctx.grads, ctx.factor = given, factor
        ctx.mark_non_differentiable(correct)
        none = hidden.new_zeros(0, dtype=widened(hidden.dtype))
        return (torch.cat(losses) if losses else none).sum(), correct

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyrefly: ignore[bad-override]
        ctx: Any, *grad_outputs: Any
    ) -> tuple[Tensor | None, ...]:
        grads: Gradients = given_once(ctx.grads)
        _check_factor(ctx.factor, grad_outputs[0])
        for grad in (grads.hidden, None if ctx.factor is not None else grads.weight, grads.bias):
            if grad is not None:
                grad.mul_(grad_outputs[0])
        return (*grads.found(), None, None, None, None)


def _check_factor(factor: Tensor | None, given: Tensor) -> None:
    """Raise `ConfigError` where the sum is not the loss, though its objective said it would be.

    Skipped on an accelerator, where it would synchronise.
    """
    if factor is None or factor.device.type != "cpu":
        return
    if not torch.allclose(given.double(), factor.double(), rtol=1e-3, atol=0.0, equal_nan=True):
        raise ConfigError(
            f"objective: its summed cross entropy is multiplied by {float(given)}, expected "
            f"{float(factor)}; where its loss is not that sum as it is, give it direct = False"
        )
