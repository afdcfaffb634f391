"""Cross entropy and log-probabilities over a head, a few rows of logits at a time.

Logits [rows, vocabulary] are most of the memory of a language model's step, and the kernel's time
to find fresh memory for them much of its time. Here they exist for as many rows as a byte budget
has room for, in one buffer that every chunk uses again, and what is taken of them (a loss, its
gradient with respect to hidden states and weight) is taken while they are there, as Liger's fused
kernel does it (2410.10989). A chunk is several hundred rows: fewer, and reading and writing the
weight's gradient once for each would cost more than is saved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any

import attrs
import torch
from torch import Tensor

from functrain import accumulators, memory
from functrain.errors import ConfigError
from functrain.objectives.batches import IGNORE_INDEX
from functrain.objectives.modes import are_modes_of

BUDGET = 1 << 26
"""Bytes of logits that may exist at once, float32; what a finish makes of them comes on top, and so
do details of scores, on the CPU a quarter."""

WORTH = 1 << 20
"""Of so many bytes of logits on one chunk or more is worth it: an ordinary cross entropy goes over
them about three times more often."""

KEPT = 2
"""Of so many budgets logits may be there as a whole, where that spares the product that makes them
again: all of a batch's until the backward pass, or one pair's until its gradient has been taken."""

COLUMNS, NARROW = 384, 1024
"""On the CPU logits are made so many columns at a time where hidden states are narrower than this.

A single product is then little but packing and writing: with a width of 512 and a vocabulary of
50,257 it did 48 GFLOP/s on a core, and in such blocks 72; from a width of 1,024 on there was no
difference. The bits are the same.
"""

Finish = Callable[[Tensor], Tensor]


def are_worth(rows: int, vocabulary: int, budget: int = BUDGET) -> bool:
    """Whether so many rows of logits are worth chunks: more than `WORTH`, or than the budget."""
    return exceeds(rows, vocabulary, min(budget, WORTH))


def exceeds(rows: int, vocabulary: int, budget: int) -> bool:
    """Whether so many rows of logits are more than so many bytes."""
    return rows * vocabulary * 4 > budget


@attrs.frozen(kw_only=True, eq=False)
class Projection:
    """The values of a head: weight [vocabulary, width], bias [vocabulary] or None.

    `finish`: what the model makes of the projected rows (a soft cap, a scale), or None. `dtype`: in
    which they are projected; None: in that of `computed_in`, where the loss is taken.
    """

    weight: Tensor
    bias: Tensor | None
    finish: Finish | None = None
    budget: int = BUDGET
    dtype: torch.dtype | None = None

    def chunks(self, rows: int, share: int = 1) -> Iterator[slice]:
        """The rows in as few parts as that share of the budget has room for, in multiples of 16.

        Alike in size as far as that goes, so that no more is taken than so many parts need.
        """
        parts = max(1, -(-rows // self._most(share)))
        size = max(16, -(-rows // (16 * parts)) * 16)
        return (slice(at, min(at + size, rows)) for at in range(0, rows, size))

    def _most(self, share: int) -> int:
        """How many rows a share of the budget has room for."""
        return max(16, self.budget // (4 * self.weight.shape[0] * share) // 16 * 16)

    def fits(self, rows: int) -> bool:
        """Whether a chunk has room for so many rows."""
        return rows <= self._most(1)

    def may_stay(self, rows: int) -> bool:
        """Whether the log-probs of so many rows may stay until their gradient has been taken."""
        return not exceeds(rows, len(self.weight), KEPT * self.budget)


@attrs.frozen(eq=False)
class Scores:
    """Of each target: its log-prob (with its history), and of its distribution, without:

    entropy in nats, whether the target is its mode, the mean logit, and log Σ_v p(v)².
    """

    logps: Tensor
    entropy: Tensor
    correct: Tensor
    level: Tensor
    collision: Tensor


Slopes = Callable[[int, Scores], Tensor]
"""Of a group by its place, and its scores: d loss / d log-prob, float [rows of the group]."""


def summed_cross_entropy(
    hidden: Tensor, targets: Tensor, projection: Projection
) -> tuple[Tensor, Tensor]:
    """(Σ −log p(target) in nats, how many targets are the mode): 0-d, over rows [n, width].

    Rows whose target is −100 count for nothing. The gradient is taken in the forward pass, while
    the logits are there: no row of them is computed twice.
    """
    hidden, weight, bias = _in_dtype(hidden, projection)
    if hidden.dtype == torch.float16:
        # At unit scale small probabilities are zeros in fp16: the gradient waits for its scale.
        scores = _scored(hidden, targets, projection, weight, bias, detailed=False)
        total = -scores.logps.sum()
        return total, scores.correct.sum()
    _check_targets(targets, len(weight))
    # Inside the function no history is kept, and what needs a gradient is said under no_grad too.
    graded = torch.is_grad_enabled()
    direct = _direct(projection, hidden)
    total, correct = _apply(_Summed, hidden, weight, bias, targets, projection, graded, direct)
    return total, correct


def scored(
    hidden: Tensor,
    targets: Tensor,
    projection: Projection,
    *,
    detailed: bool = True,
    groups: Sequence[int] | None = None,
    slopes: Slopes | None = None,
) -> Scores:
    """The log-prob of each target [n], float32 or more, and what `Scores` holds beside.

    0 where the target is −100. The backward pass makes each chunk's logits again; where those of
    all rows are no more than `KEPT` budgets it finds them there (a second one makes them again, the
    same to rounding). `detailed=False` leaves entropy, level and collision at 0: they cost about as
    much as the log-probs.

    `groups`: how many rows belong together, one after another: the logits of a group are made at
    once where they are no more than `KEPT` budgets. `slopes`: what the backward pass will be given
    for them, where that is known of the scores of a group alone, as of a pair of DPO. Then its
    gradient is taken while its logits are there: those of larger groups alone are made again, and
    none stays. There is one backward pass then. Other slopes than those that were said are a
    `ConfigError`; on an accelerator, where to ask would be a wait, gradients of NaN. They are not
    asked where no gradient is wanted, nor in fp16, whose gradients wait for their loss scale.
    """
    hidden, weight, bias = _in_dtype(hidden, projection)
    return _scored(
        hidden, targets, projection, weight, bias, detailed=detailed, groups=groups, slopes=slopes
    )


def grouped(sizes: Sequence[int], projection: Projection) -> list[int]:
    """How many of the neighbours that have so many rows a group takes: what a chunk has room for.

    One that has more is a group of its own.
    """
    counts: list[int] = []
    rows = 0
    for size in sizes:
        if counts and projection.fits(rows + size):
            counts[-1] += 1
            rows += size
        else:
            counts.append(1)
            rows = size
    return counts


def _scored(
    hidden: Tensor,
    targets: Tensor,
    projection: Projection,
    weight: Tensor,
    bias: Tensor | None,
    *,
    detailed: bool,
    groups: Sequence[int] | None = None,
    slopes: Slopes | None = None,
) -> Scores:
    _check_targets(targets, len(weight))
    few = projection.may_stay(len(hidden))
    few = few and projection.finish is None and hidden.dtype.itemsize >= 4
    # Of the shape alone: a product of other rows may have other bits, and a reference no history.
    parts = _parts(len(hidden), projection, groups)
    graded = torch.is_grad_enabled()
    # At unit scale small probabilities are zeros in fp16: the gradient waits for its scale.
    slopes = slopes if graded and hidden.dtype != torch.float16 else None
    direct = _direct(projection, hidden)
    options = _Options(
        detailed=detailed,
        parts=parts,
        kept=few and graded and slopes is None,
        into=None if direct is None else direct.into,
        slopes=slopes,
    )
    return Scores(*_apply(_Scored, hidden, weight, bias, targets, projection, options))


def _parts(rows: int, projection: Projection, groups: Sequence[int] | None) -> list[list[slice]]:
    """The chunks of each group, in their order; without groups, those of all rows."""
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
    """How scores are taken: what of `scored` is not a tensor with a gradient.

    `parts`: the chunks of each group. `kept`: whether all logits stay for the backward pass.
    `into`: where the weight's gradient is summed.
    """

    detailed: bool
    parts: list[list[slice]]
    kept: bool
    into: Tensor | None
    slopes: Slopes | None


@attrs.frozen(eq=False)
class _Direct:
    """Where the weight's gradient is summed, and what a summed loss is to be multiplied by."""

    into: Tensor
    factor: Tensor


def _direct(projection: Projection, hidden: Tensor) -> _Direct | None:
    """Where an accumulation is under way and the weight is a leaf of it.

    Not in fp16: a gradient that overflows there is to be seen by the loss scale.
    """
    given = accumulators.current() if torch.is_grad_enabled() else None
    if given is None or hidden.dtype == torch.float16:
        return None
    into = given.sum_of(projection.weight)
    if into is None or into.dtype != _wide(hidden.dtype):
        return None
    return _Direct(into, given.factor)


def _check_targets(targets: Tensor, vocabulary: int) -> None:
    """Raise `IndexError` as `F.cross_entropy` does; on an accelerator it would be a wait."""
    if targets.device.type != "cpu" or not len(targets):
        return
    most = int(targets.max())
    if most >= vocabulary:
        raise IndexError(f"Target {most} is out of bounds.")


def _apply(function: type[torch.autograd.Function], *arguments: object) -> tuple[Tensor, ...]:
    found: tuple[Tensor, ...] = function.apply(*arguments)  # type: ignore[no-untyped-call]
    return found


def computed_in(hidden: Tensor) -> torch.dtype:
    """The dtype in which a projection of hidden states is computed here, under autocast or not."""
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64:  # which it leaves alone
        return torch.get_autocast_dtype(kind)
    return hidden.dtype


def _in_dtype(hidden: Tensor, projection: Projection) -> tuple[Tensor, Tensor, Tensor | None]:
    """Hidden states and values in the dtype in which the projection is computed."""
    dtype = computed_in(hidden) if projection.dtype is None else projection.dtype
    bias = projection.bias
    return (
        hidden.to(dtype),
        projection.weight.to(dtype),
        None if bias is None else bias.to(dtype),
    )


class _Rows:
    """The logits of one chunk after another, in one buffer; `kept`: each in a place of its own."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        projection: Projection,
        chunks: list[slice],
        *,
        kept: bool = False,
    ) -> None:
        self._weight, self._bias, self._finish = weight, bias, projection.finish
        self.chunks = chunks
        most = max((each.stop - each.start for each in self.chunks), default=0)
        size = len(hidden) if kept else most
        make = memory.empty if kept else memory.scratch
        self._buffer = _buffer((size, len(weight)), hidden, hidden.dtype, make)
        self.kept = self._buffer if kept else None
        self._widened: Tensor | None = None
        self._raw: Tensor | None = None

    def of(self, hidden: Tensor, at: slice, *, graded: bool) -> Tensor:
        """The logits of the rows `at`, in float32 or more; unless kept, the next overwrite them.

        `graded`: `before_finish` will be asked for, so what goes into a finish is kept.
        """
        hidden = hidden[at]
        rows = self._buffer[: len(hidden)] if self.kept is None else self.kept[at]
        _project(hidden, self._weight, rows)
        if self._bias is not None:
            rows.add_(self._bias)
        if self._finish is not None:
            if graded:  # a finish may write in place
                self._raw, rows = rows, rows.clone()
            rows = self._finish(rows)
        if rows.dtype.itemsize >= 4:
            return rows
        if self._widened is None:
            self._widened = _buffer((len(self._buffer), rows.shape[1]), rows, torch.float32)
        return self._widened[: len(rows)].copy_(rows)

    def before_finish(self, grad: Tensor) -> Tensor:
        """The gradient with respect to what the projection returned, of that of the logits."""
        if self._finish is None:
            return grad
        assert self._raw is not None
        with torch.enable_grad():
            raw = self._raw.detach().requires_grad_()
            finished = self._finish(raw.clone())  # no leaf may be written to
            (grad,) = torch.autograd.grad(finished, raw, grad.to(finished.dtype))
        return grad


def _project(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    """hidden · weightᵀ into `out` [rows, vocabulary]."""
    narrow = hidden.device.type == "cpu" and hidden.shape[1] < NARROW
    size = COLUMNS if narrow else len(weight)
    for at in range(0, len(weight), size):
        torch.mm(hidden, weight[at : at + size].t(), out=out[:, at : at + size])


def _autocast(kind: str) -> torch.autocast:
    """Autocast as it is now, to be entered again in the backward pass."""
    return torch.autocast(
        kind, dtype=torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind)
    )


def _buffer(
    shape: tuple[int, int],
    like: Tensor,
    dtype: torch.dtype,
    make: Callable[[tuple[int, int], torch.dtype], Tensor] = memory.empty,
) -> Tensor:
    """Memory on the device of `like`; `make`: whose on the CPU."""
    if like.device.type == "cpu":
        return make(shape, dtype)
    return like.new_empty(shape, dtype=dtype)


class _Gradients:
    """The gradients with respect to hidden states, weight and bias, summed over chunks.

    Sums in float32 or more: in bf16, 1,000 chunks would leave a weight's gradient 0.2 off. The
    weight's is summed in `into` where that is given, and then nothing is left to return of it.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        needed: tuple[bool, ...],
        into: Tensor | None,
    ) -> None:
        self._weight, self._dtype, self._into = weight, hidden.dtype, into
        wide = _wide(hidden.dtype)
        shape = (len(weight), weight.shape[1])
        self.hidden = torch.empty_like(hidden) if needed[0] else None
        self.weight = into
        if needed[1] and into is None:
            self.weight = _buffer(shape, weight, wide).zero_()
        narrow = needed[1] and wide != hidden.dtype
        self._product = _buffer(shape, weight, hidden.dtype) if narrow else None
        self.bias = torch.zeros_like(bias, dtype=wide) if bias is not None and needed[2] else None

    def add(
        self,
        at: slice,
        hidden: Tensor,
        rows: Tensor,
        scale: Tensor | None,
        factor: Tensor | None = None,
    ) -> None:
        """Of a chunk: `rows` is d(−log p)/d logits; `scale` [rows, 1], what it is multiplied by.

        The scale goes to the small factor of each product. `factor`, 0-d: another, of the weight's
        gradient alone.
        """
        rows = rows.to(self._dtype)
        if self.hidden is not None:
            torch.mm(rows, self._weight, out=self.hidden[at])
            if scale is not None:
                self.hidden[at].mul_(scale)
        if self.weight is not None:
            scaled = hidden if scale is None else hidden * scale.to(hidden.dtype)
            scaled = scaled if factor is None else scaled * factor.to(hidden.dtype)
            if self._product is None:
                self.weight.addmm_(rows.t(), scaled)
            else:
                self.weight.add_(torch.mm(rows.t(), scaled, out=self._product))
        if self.bias is not None:
            ones = torch.ones_like(hidden[:, :1]) if scale is None else scale.to(hidden.dtype)
            # Without `out` autocast would narrow what the model keeps out of it.
            found = torch.mm(rows.t(), ones, out=rows.new_empty(rows.shape[1], 1))
            self.bias.add_(found.squeeze(1))

    def hold(self, factor: Tensor | None) -> None:
        """Multiply what all other gradients come of, or else what there is."""
        every = [each for each in (self.hidden, self.weight, self.bias) if each is not None]
        if factor is not None and every:
            every[0].mul_(factor)

    def found(self) -> tuple[Tensor | None, ...]:
        """Of hidden states, weight and bias, in their dtype."""
        self._product = None
        every = (self.hidden, self.weight if self._into is None else None, self.bias)
        return tuple(None if grad is None else grad.to(self._dtype) for grad in every)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.itemsize < 4 else dtype


def _less_targets(probabilities: Tensor, targets: Tensor, valid: Tensor) -> Tensor:
    """d(−log p)/d logits, in the memory of the probabilities; 0 in rows without a target."""
    probabilities.scatter_add_(1, targets, torch.full_like(targets, -1, dtype=probabilities.dtype))
    if targets.device.type != "cpu" or not bool(valid.all()):
        probabilities.mul_(valid)
    return probabilities


def _columns(targets: Tensor) -> tuple[Tensor, Tensor]:
    """The targets as a column, 0 where there is none, and where there is one."""
    column = targets.unsqueeze(1)
    valid = column != IGNORE_INDEX
    return column.masked_fill(~valid, 0), valid


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
        direct: _Direct | None,
    ) -> tuple[Tensor, Tensor]:
        rows = _Rows(hidden, weight, bias, projection, list(projection.chunks(len(hidden))))
        needed = ctx.needs_input_grad
        grads: _Gradients | None = None
        into, factor = (None, None) if direct is None else (direct.into, direct.factor)
        if graded and any(needed):
            grads = _Gradients(hidden, weight, bias, needed, into)
        losses: list[Tensor] = []
        correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
        for at in rows.chunks:
            column, valid = _columns(targets[at])
            logits = rows.of(hidden, at, graded=grads is not None)
            correct += (are_modes_of(logits, column) & valid).sum()
            torch.log_softmax(logits, -1, out=logits)
            losses.append(-logits.gather(1, column).masked_fill(~valid, 0.0))
            if grads is not None:
                slope = _less_targets(logits.exp_(), column, valid)
                grads.add(at, hidden[at], rows.before_finish(slope), None, factor)
        given: list[_Gradients] = [] if grads is None else [grads]
        ctx.grads, ctx.factor = given, factor
        ctx.mark_non_differentiable(correct)
        none = hidden.new_zeros(0, dtype=_wide(hidden.dtype))
        return (torch.cat(losses) if losses else none).sum(), correct

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyrefly: ignore[bad-override]
        ctx: Any, *grad_outputs: Any
    ) -> tuple[Tensor | None, ...]:
        grads: _Gradients = _given_once(ctx.grads)
        _check_factor(ctx.factor, grad_outputs[0])
        for grad in (grads.hidden, None if ctx.factor is not None else grads.weight, grads.bias):
            if grad is not None:
                grad.mul_(grad_outputs[0])
        return (*grads.found(), None, None, None, None)


def _check_factor(factor: Tensor | None, given: Tensor) -> None:
    """Raise `ConfigError` where a sum is not the loss that its objective said it would be.

    On an accelerator it would be a wait.
    """
    if factor is None or factor.device.type != "cpu":
        return
    if not torch.allclose(given.double(), factor.double(), rtol=1e-3, atol=0.0, equal_nan=True):
        raise ConfigError(
            f"objective: its summed cross entropy is multiplied by {float(given)}, expected "
            f"{float(factor)}; where its loss is not that sum as it is, give it direct = False"
        )


class _Measures:
    """What `Scores` holds, of a chunk's logits, which become its log-probs.

    Details of a part of the budget at a time, since what is made beside the logits is as large. On
    the CPU of a quarter; on an accelerator the calls would take longer than what they compute.
    """

    def __init__(self, projection: Projection, *, detailed: bool) -> None:
        self._projection, self._detailed = projection, detailed
        self._second: Tensor | None = None

    def of(self, logits: Tensor, targets: Tensor) -> list[tuple[Tensor, ...]]:
        """As the fields of `Scores`, each [rows, 1]; the logits are overwritten."""
        if not self._detailed:
            return [self._taken(logits, targets)]
        slices = self._projection.chunks(len(logits), 4 if logits.device.type == "cpu" else 1)
        return [self._taken(logits[at], targets[at]) for at in slices]

    def _taken(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        column, valid = _columns(targets)
        correct = are_modes_of(logits, column) & valid
        level = logits.mean(-1, keepdim=True) if self._detailed else None
        torch.log_softmax(logits, -1, out=logits)
        logps = logits.gather(1, column).masked_fill(~valid, 0.0)
        entropy = collision = level
        if self._detailed:
            if self._second is None or len(self._second) < len(logits):
                self._second = _buffer((len(logits), logits.shape[1]), logits, logits.dtype)
            products = torch.exp(logits, out=self._second[: len(logits)])
            collision = 2 * torch.linalg.vector_norm(products, dim=-1, keepdim=True).log()
            logits.clamp_(min=torch.finfo(logits.dtype).min)  # 0·log 0 is 0
            entropy = -products.mul_(logits).sum(-1, keepdim=True)
        empty = torch.zeros_like(logps)
        extras = (
            empty if each is None else each.masked_fill(~valid, 0.0)
            for each in (entropy, level, collision)
        )
        entropy, level, collision = extras
        return logps, entropy, correct, level, collision


def _joined(found: list[tuple[Tensor, ...]], hidden: Tensor) -> tuple[Tensor, ...]:
    """The fields of `Scores`, each [rows]."""
    if not found:
        none = hidden.new_zeros(0, 1, dtype=_wide(hidden.dtype))
        found = [(none, none, none.bool(), none, none)]
    return tuple(torch.cat(each).squeeze(1) for each in zip(*found, strict=True))


class _Scored(torch.autograd.Function):
    """The log-prob of each target.

    Its gradient is taken in the forward pass where the slopes are known, and else in the backward
    pass, of the logits that stayed or are made again.
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
        rows = _Rows(hidden, weight, bias, projection, every, kept=kept)
        grads = None if slopes is None else _Gradients(hidden, weight, bias, needed, options.into)
        measures = _Measures(projection, detailed=options.detailed)
        found: list[tuple[Tensor, ...]] = []
        known: list[Tensor] = []
        for index, group in enumerate(options.parts):
            before, normed = len(found), hidden
            at_once = grads is not None and len(group) == 1
            for at in group:
                normed = rows.of(hidden, at, graded=at_once)
                found += measures.of(normed, targets[at])
            if slopes is None or grads is None:
                continue
            slope = slopes(index, Scores(*_joined(found[before:], hidden)))
            known.append(slope)
            sizes = [at.stop - at.start for at in group]
            for at, scale in zip(group, torch.split(-slope.unsqueeze(1), sizes), strict=True):
                if at_once:  # its log-probs are still there
                    probabilities = normed.exp_()
                else:
                    logits = rows.of(hidden, at, graded=True)
                    probabilities = torch.softmax(logits, -1, out=logits)
                rest = _less_targets(probabilities, *_columns(targets[at]))
                grads.add(at, hidden[at], rows.before_finish(rest), scale)
        logps, entropy, correct, level, collision = _joined(found, hidden)
        ahead: list[tuple[_Gradients, Tensor]] | None = None
        if grads is not None:
            none = hidden.new_zeros(0, dtype=_wide(hidden.dtype))
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
        ahead: list[tuple[_Gradients, Tensor]] | None = ctx.ahead
        if ahead is not None:
            grads, known = _given_once(ahead)
            grads.hold(_check_slopes(known, grad_outputs[0]))
            return (*grads.found(), None, None, None)
        hidden, weight, bias, targets = ctx.saved_tensors
        grads = _Gradients(hidden, weight, bias, ctx.needs_input_grad, ctx.into)
        kept: list[Tensor] = ctx.kept
        if kept:
            # What is found there is overwritten, and can be found once.
            slope = _less_targets(kept.pop().exp_(), *_columns(targets))
            grads.add(slice(0, len(hidden)), hidden, slope, -grad_outputs[0].unsqueeze(1))
            return (*grads.found(), None, None, None)
        rows = _Rows(hidden, weight, bias, ctx.projection, ctx.every)
        with ctx.autocast:  # the model's own, where a finish of it is called again
            for at in rows.chunks:
                column, valid = _columns(targets[at])
                logits = rows.of(hidden, at, graded=True)
                slope = _less_targets(torch.softmax(logits, -1, out=logits), column, valid)
                scale = -grad_outputs[0][at].unsqueeze(1)
                if hidden.dtype == torch.float16:
                    # Before it is narrowed, as a loss scale means it.
                    grads.add(at, hidden[at], rows.before_finish(slope.mul_(scale)), None)
                else:
                    grads.add(at, hidden[at], rows.before_finish(slope), scale)
        return (*grads.found(), None, None, None)


def _given_once(given: list[Any]) -> Any:
    """What the forward pass has left for the backward pass."""
    if not given:
        raise RuntimeError("the chunked loss has given its gradient away: one backward pass")
    return given.pop()


def _check_slopes(known: Tensor, given: Tensor) -> Tensor | None:
    """Raise `ConfigError` where a loss is not the one whose slopes its objective has said.

    On an accelerator, where that would be a wait: a factor of its gradients, 1 or NaN.
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
