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
from functrain.objectives.modes import are_modes_of, compared
from functrain.objectives.scores import scored

CACHED = 1 << 20
"""Bytes of logits that each thread of a CPU takes at once, so that they stay in its cache.

256 rows of 50,257 logits took 0.6 of the time of `log_softmax` and `exp` over the whole, and their
log-probs had an eighth of the error.
"""


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
        losses: list[Tensor] = []
        correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
        for at in rows.chunks:
            column, valid = columns(targets[at])
            logits = rows.of(hidden, at, graded=grads is not None)
            logps, modes = _measured(logits, column, graded=grads is not None)
            correct += (modes & valid).sum()
            losses.append(-logps.masked_fill(~valid, 0.0))
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


def _measured(logits: Tensor, column: Tensor, *, graded: bool) -> tuple[Tensor, Tensor]:
    """The log-prob of each target, and whether it is the mode, both [rows, 1].

    The logits are overwritten, if `graded` by their probabilities.
    """
    if logits.device.type != "cpu" or logits.nbytes <= CACHED:
        modes = are_modes_of(logits, column)
        torch.log_softmax(logits, -1, out=logits)
        logps = logits.gather(1, column)
        if graded:
            logits.exp_()
        return logps, modes
    size = max(1, CACHED * torch.get_num_threads() // (logits.shape[1] * logits.itemsize))
    blocks = zip(torch.split(logits, size), torch.split(column, size), strict=True)
    found = [_measured_block(*block, graded) for block in blocks]
    logps, modes = (torch.cat(each) for each in zip(*found, strict=True))
    return logps, modes


def _measured_block(logits: Tensor, column: Tensor, graded: bool) -> tuple[Tensor, Tensor]:
    modes, own, others = compared(logits, column)
    most = torch.maximum(own, others)
    total = logits.sub_(most).exp_().sum(-1, keepdim=True)
    if graded:
        logits.div_(total)
    return own - most - total.log(), modes


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
