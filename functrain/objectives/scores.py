"""Log-probs of targets over a head, by chunks.

What a loss makes of them is not known here. Where it says what their slopes will be, as a loss over
pairs can once a pair is scored, their gradient is computed while the logits are there; otherwise
the backward pass computes it, from logits that were kept or are made again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any

import attrs
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
from functrain.objectives.head_gradients import Gradients, given_once, less_targets, weight_sum
from functrain.objectives.measures import Measured, Measures, probabilities


@attrs.frozen(eq=False)
class Scores:
    """The log-prob of each target (with its history) and, without, of its distribution:

    entropy in nats, whether the target is its mode, the mean logit, and log Σ_v p(v)².
    """

    logps: Tensor
    entropy: Tensor
    correct: Tensor
    level: Tensor
    collision: Tensor


Slopes = Callable[[int, Scores], Tensor]
"""Given a group's index and its scores: d loss / d log-prob, float [rows of the group]."""


def scored(
    hidden: Tensor,
    targets: Tensor,
    projection: Projection,
    *,
    detailed: bool = True,
    groups: Sequence[int] | None = None,
    slopes: Slopes | None = None,
) -> Scores:
    """The log-prob of each target [n], float32 or more, and the other fields of `Scores`.

    0 where the target is −100. `detailed=False` leaves entropy, level and collision at 0: they cost
    about as much as the log-probs. The backward pass makes each chunk's logits again, unless they
    are in float32 or more, have no finish and take no more than `KEPT` budgets in all: then it
    finds them kept (a second one makes them again, the same to rounding).

    `groups`: how many consecutive rows belong together. The logits of a group are made at once
    where they take no more than `KEPT` budgets.

    `slopes`: what the backward pass will be given for a group, where its scores alone tell, as
    those of a pair do in DPO. Its gradient is then computed while its logits are there: only those
    of larger groups are made again, and none are kept. Only one backward pass is possible. Slopes
    other than those promised are a `ConfigError`; on an accelerator, where checking would
    synchronise, they make the gradients NaN. `slopes` is not called where no gradient is wanted,
    nor in fp16, whose gradients wait for their loss scale.
    """
    hidden, weight, bias = in_dtype(hidden, projection)
    check_targets(targets, len(weight))
    few = projection.may_stay(len(hidden))
    few = few and projection.finish is None and hidden.dtype.itemsize >= 4
    # By shape alone: a reference has no history, and a product of other rows may have other bits.
    parts = _parts(len(hidden), projection, groups)
    graded = torch.is_grad_enabled()
    # At unit scale small probabilities are zeros in fp16: the gradient waits for its scale.
    slopes = slopes if graded and hidden.dtype != torch.float16 else None
    direct = weight_sum(projection, hidden)
    options = _Options(
        detailed=detailed,
        parts=parts,
        kept=few and graded and slopes is None,
        into=None if direct is None else direct.into,
        slopes=slopes,
    )
    return Scores(*applied(_Scored, hidden, weight, bias, targets, projection, options))


def _parts(rows: int, projection: Projection, groups: Sequence[int] | None) -> list[list[slice]]:
    """The chunks of each group, in order; without groups, those of all rows."""
    if groups is None:
        return [list(projection.chunks(rows))]
    parts: list[list[slice]] = []
    for begin, end in pairwise(accumulate(groups, initial=0)):
        if projection.may_stay(end - begin):
            parts.append([slice(begin, end)])
        else:
            cut = projection.chunks(end - begin)
            parts.append([slice(begin + at.start, begin + at.stop) for at in cut])
    return parts


@attrs.frozen(kw_only=True, eq=False)
class _Options:
    """How scores are computed: the arguments of `scored` that are not tensors with a gradient.

    `parts`: the chunks of each group. `kept`: whether all logits stay for the backward pass.
    `into`: where the weight's gradient is summed.
    """

    detailed: bool
    parts: list[list[slice]]
    kept: bool
    into: Tensor | None
    slopes: Slopes | None


def _of_targets(measured: Measured, valid: Tensor) -> tuple[Tensor, ...]:
    """The fields of `Scores`, [rows, 1] each: 0 where there is no target, or where unmeasured."""
    logps = measured.logps.masked_fill(~valid, 0.0)
    details = [each.masked_fill(~valid, 0.0) for each in measured.details]
    entropy, level, collision = details or [torch.zeros_like(logps)] * 3
    return logps, entropy, measured.correct & valid, level, collision


def _joined(found: list[tuple[Tensor, ...]], hidden: Tensor) -> tuple[Tensor, ...]:
    """The chunks joined into the fields of `Scores`, each [rows]."""
    if not found:
        none = hidden.new_zeros(0, 1, dtype=widened(hidden.dtype))
        found = [(none, none, none.bool(), none, none)]
    return tuple(torch.cat(each).squeeze(1) for each in zip(*found, strict=True))


class _Scored(torch.autograd.Function):
    """The log-prob of each target.

    Its gradient is computed in the forward pass where the slopes are known, and otherwise in the
    backward pass, from logits that were kept or are made again.
    """

    @staticmethod
    def forward(  # pyrefly: ignore[bad-override]
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        projection: Projection,
        options: _Options,
    ) -> tuple[Tensor, ...]:
        needed = ctx.needs_input_grad
        slopes = options.slopes if any(needed) else None
        every = [at for group in options.parts for at in group]
        kept = options.kept and any(needed)
        rows = Rows(hidden, weight, bias, projection, every, kept=kept)
        grads = None if slopes is None else Gradients(hidden, weight, bias, needed, options.into)
        graded = grads is not None or kept
        measures = Measures(detailed=options.detailed, graded=graded)
        found: list[tuple[Tensor, ...]] = []
        known: list[Tensor] = []
        for index, group in enumerate(options.parts):
            before, logits = len(found), hidden
            at_once = grads is not None and len(group) == 1
            for at in group:
                logits = rows.of(hidden, at, graded=at_once)
                column, valid = columns(targets[at])
                found.append(_of_targets(measures.of(logits, column), valid))
            if slopes is None or grads is None:
                continue
            slope = slopes(index, Scores(*_joined(found[before:], hidden)))
            known.append(slope)
            sizes = [at.stop - at.start for at in group]
            for at, scale in zip(group, torch.split(-slope.unsqueeze(1), sizes), strict=True):
                if not at_once:  # its probabilities are no longer there
                    logits = rows.of(hidden, at, graded=True)
                    probabilities(logits)
                rest = less_targets(logits, *columns(targets[at]))
                grads.add(at, hidden[at], rows.before_finish(rest), scale)
        logps, entropy, correct, level, collision = _joined(found, hidden)
        ahead: list[tuple[Gradients, Tensor]] | None = None
        if grads is not None:
            none = hidden.new_zeros(0, dtype=widened(hidden.dtype))
            ahead = [(grads, torch.cat([*known, none]))]
        else:
            ctx.save_for_backward(hidden, weight, bias, targets)
        whole: list[Tensor] = [] if rows.kept is None else [rows.kept]
        ctx.ahead, ctx.kept, ctx.every = ahead, whole, every
        ctx.projection, ctx.into = projection, options.into
        ctx.autocast = _autocast(hidden.device.type)
        ctx.mark_non_differentiable(entropy, correct, level, collision)
        return logps, entropy, correct, level, collision

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyrefly: ignore[bad-override]
        ctx: Any, *grad_outputs: Any
    ) -> tuple[Tensor | None, ...]:
        ahead: list[tuple[Gradients, Tensor]] | None = ctx.ahead
        if ahead is not None:
            grads, known = given_once(ahead)
            grads.hold(_check_slopes(known, grad_outputs[0]))
            return (*grads.found(), None, None, None)
        hidden, weight, bias, targets = ctx.saved_tensors
        grads = Gradients(hidden, weight, bias, ctx.needs_input_grad, ctx.into)
        kept: list[Tensor] = ctx.kept
        if kept:
            # The kept probabilities are overwritten, so they can be used once.
            slope = less_targets(kept.pop(), *columns(targets))
            grads.add(slice(0, len(hidden)), hidden, slope, -grad_outputs[0].unsqueeze(1))
            return (*grads.found(), None, None, None)
        rows = Rows(hidden, weight, bias, ctx.projection, ctx.every)
        with ctx.autocast:  # the model's own, where a finish of it is called again
            for at in rows.chunks:
                column, valid = columns(targets[at])
                logits = rows.of(hidden, at, graded=True)
                slope = less_targets(probabilities(logits), column, valid)
                scale = -grad_outputs[0][at].unsqueeze(1)
                if hidden.dtype == torch.float16:
                    # Scaled before it is narrowed, as a loss scale intends.
                    grads.add(at, hidden[at], rows.before_finish(slope.mul_(scale)), None)
                else:
                    grads.add(at, hidden[at], rows.before_finish(slope), scale)
        return (*grads.found(), None, None, None)


def _autocast(kind: str) -> torch.autocast:
    """Autocast as it is now, to be entered again in the backward pass."""
    return torch.autocast(
        kind, dtype=torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind)
    )


def _check_slopes(known: Tensor, given: Tensor) -> Tensor | None:
    """Raise `ConfigError` unless a loss has the slopes that its objective promised.

    On an accelerator, where that would synchronise, return a factor for the gradients: 1 or NaN.
    """
    if not len(known):
        return None
    apart = (given - known).abs()
    most = known.abs().nan_to_num().max().clamp(min=torch.finfo(known.dtype).tiny)
    same = (apart <= 1e-3 * most) | (given.isnan() & known.isnan()) | (given == known)
    if known.device.type != "cpu":
        return torch.where(same.all(), 1.0, torch.nan)
    if bool(same.all()):
        return None
    at = int(apart.nan_to_num(torch.inf).masked_fill(same, -1.0).argmax())
    raise ConfigError(
        f"objective: the slope of one of its log-probs is {float(given[at])}, and it said "
        f"{float(known[at])} when they were computed; where its loss is another one, give it "
        "direct = False"
    )
