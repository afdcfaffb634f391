"""What is measured of a chunk's logits while they are there: log-probs, and other statistics."""

from __future__ import annotations

from collections.abc import Iterable

import attrs
import torch
from torch import Tensor

from functrain.objectives.chunks import buffer
from functrain.objectives.modes import are_modes_of, compared

CACHED = 1 << 20
"""Bytes of logits that each thread of a CPU takes at once, so that they stay in its cache.

There one exponential of each logit is enough, which is most of the time. Of 256 rows of 50,257
logits the cross entropy took 0.6 of the time of `log_softmax` and `exp` over the whole, all
measures 0.7, and the log-probs had an eighth of the error.
"""


def cached() -> int:
    """Bytes of logits that all threads of a CPU take at once; a block has up to twice as many."""
    return CACHED * torch.get_num_threads()


@attrs.frozen(eq=False)
class Measured:
    """Of the distribution of each row, [rows, 1]: the log-prob of the target, in nats, and whether
    the target is the mode.

    `details`: the entropy in nats, the mean logit, and log Σ_v p(v)²; or nothing.
    """

    logps: Tensor
    correct: Tensor
    details: tuple[Tensor, ...] = ()


class Measures:
    """Measures the logits of one chunk after another.

    `detailed`: with details. `graded`: a gradient will be computed, so that the logits become their
    probabilities; otherwise what they become is not said.
    """

    def __init__(self, *, detailed: bool = False, graded: bool) -> None:
        self._detailed, self._graded = detailed, graded
        self._scratch: Tensor | None = None

    def of(self, logits: Tensor, column: Tensor) -> Measured:
        """Measure logits [rows, vocabulary] and their targets [rows, 1]; they are overwritten."""
        if logits.device.type != "cpu" or (logits.nbytes <= CACHED and logits.is_contiguous()):
            return self._at_once(logits, column)
        return _joined(self._cached(*each) for each in _blocks(logits, column))

    def _at_once(self, logits: Tensor, column: Tensor) -> Measured:
        """With kernels over the whole, which take the least time on an accelerator."""
        correct = are_modes_of(logits, column)
        level = logits.mean(-1, keepdim=True) if self._detailed else None
        torch.log_softmax(logits, -1, out=logits)
        logps = logits.gather(1, column)
        details: tuple[Tensor, ...] = ()
        if level is not None:
            products = torch.exp(logits, out=self._like(logits))
            collision = 2 * torch.linalg.vector_norm(products, dim=-1, keepdim=True).log()
            entropy = -products.mul_(_finite(logits)).sum(-1, keepdim=True)
            details = (entropy, level, collision)
        if self._graded:
            logits.exp_()
        return Measured(logps, correct, details)

    def _cached(self, logits: Tensor, column: Tensor) -> Measured:
        """With several passes over what stays in a cache, and one exponential of each logit."""
        correct, own, others = compared(logits, column)
        most = torch.maximum(own, others)
        if not self._detailed:
            total = logits.sub_(most).exp_().sum(-1, keepdim=True)
            if self._graded:
                logits.div_(total)
            return Measured(own - most - total.log(), correct)
        level = logits.mean(-1, keepdim=True)
        weights = torch.exp(logits.sub_(most), out=self._like(logits))
        total = weights.sum(-1, keepdim=True)
        log = total.log()
        collision = 2 * (torch.linalg.vector_norm(weights, dim=-1, keepdim=True).log() - log)
        inner = _finite(logits).mul_(weights).sum(-1, keepdim=True)
        if self._graded:
            torch.div(weights, total, out=logits)
        return Measured(own - most - log, correct, (log - inner / total, level, collision))

    def _like(self, logits: Tensor) -> Tensor:
        """Scratch of the logits' shape and dtype."""
        if self._scratch is None or len(self._scratch) < len(logits):
            self._scratch = buffer((len(logits), logits.shape[1]), logits, logits.dtype)
        return self._scratch[: len(logits)]


def probabilities(logits: Tensor) -> Tensor:
    """The softmax of each row of logits [rows, vocabulary], in their memory.

    Of rows that are not one after another torch's kernel on the CPU would make copies.
    """
    if logits.device.type != "cpu" or logits.is_contiguous():
        return torch.softmax(logits, -1, out=logits)
    for block in logits.tensor_split(_count(logits)):
        block.sub_(block.amax(-1, keepdim=True)).exp_()
        block.div_(block.sum(-1, keepdim=True))
    return logits


def _finite(logps: Tensor) -> Tensor:
    """In place: 0 · log 0 is 0."""
    return logps.clamp_(min=torch.finfo(logps.dtype).min)


def _blocks(logits: Tensor, column: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
    count = _count(logits)
    return zip(logits.tensor_split(count), column.tensor_split(count), strict=True)


def _count(logits: Tensor) -> int:
    """How many blocks the rows are taken in: of `cached` bytes, and up to twice as many.

    Of no block is there one row alone, unless of all: several threads would share its sums, with
    other roundings than where they share the rows.
    """
    size = max(2, cached() // (logits.shape[1] * logits.itemsize))
    return max(1, len(logits) // size)


def _joined(blocks: Iterable[Measured]) -> Measured:
    fields = [(each.logps, each.correct, *each.details) for each in blocks]
    logps, correct, *details = map(torch.cat, zip(*fields, strict=True))
    return Measured(logps, correct, tuple(details))
