"""The gradient of what was computed from a head's logits, summed over chunks."""

from __future__ import annotations

from typing import Any

import attrs
import torch
from torch import Tensor

from functrain import accumulators
from functrain.objectives.chunks import Projection, buffer, widened


class Gradients:
    """The gradients with respect to hidden states, weight and bias, summed over chunks.

    The sums are in float32 or more: in bf16, 1,000 chunks would leave a weight's gradient 0.2 off.
    Where `into` is given, the weight's gradient is summed there, and `found` returns none of it.
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
        wide = widened(hidden.dtype)
        shape = (len(weight), weight.shape[1])
        self.hidden = torch.empty_like(hidden) if needed[0] else None
        self.weight = into
        if needed[1] and into is None:
            self.weight = buffer(shape, weight, wide).zero_()
        narrow = needed[1] and wide != hidden.dtype
        self._product = buffer(shape, weight, hidden.dtype) if narrow else None
        self.bias = torch.zeros_like(bias, dtype=wide) if bias is not None and needed[2] else None

    def add(
        self,
        at: slice,
        hidden: Tensor,
        rows: Tensor,
        scale: Tensor | None,
        factor: Tensor | None = None,
    ) -> None:
        """Add a chunk: `rows` is d(−log p)/d logits, and `scale` [rows, 1] multiplies it.

        The scale goes to the small factor of each product. `factor`, 0-d, multiplies the weight's
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
        """Scale the hidden states' gradient, from which all others follow, or else another one."""
        every = [each for each in (self.hidden, self.weight, self.bias) if each is not None]
        if factor is not None and every:
            every[0].mul_(factor)

    def found(self) -> tuple[Tensor | None, ...]:
        """The gradients of hidden states, weight and bias, in the dtype of the hidden states."""
        self._product = None
        every = (self.hidden, self.weight if self._into is None else None, self.bias)
        return tuple(None if grad is None else grad.to(self._dtype) for grad in every)


def less_targets(probabilities: Tensor, targets: Tensor, valid: Tensor) -> Tensor:
    """d(−log p)/d logits, in the memory of the probabilities; 0 in rows without a target."""
    probabilities.scatter_add_(1, targets, torch.full_like(targets, -1, dtype=probabilities.dtype))
    if targets.device.type != "cpu" or not bool(valid.all()):
        probabilities.mul_(valid)
    return probabilities


@attrs.frozen(eq=False)
class WeightSum:
    """Where the weight's gradient is summed, and what a summed loss will be multiplied by."""

    into: Tensor
    factor: Tensor


def weight_sum(projection: Projection, hidden: Tensor) -> WeightSum | None:
    """Where to sum the weight's gradient; None unless it is a leaf of an accumulation under way.

    None in fp16 too: the loss scale has to see a gradient that overflows there.
    """
    given = accumulators.current() if torch.is_grad_enabled() else None
    if given is None or hidden.dtype == torch.float16:
        return None
    into = given.sum_of(projection.weight)
    if into is None or into.dtype != widened(hidden.dtype):
        return None
    return WeightSum(into, given.factor)


def given_once(given: list[Any]) -> Any:
    """What the forward pass has left for the backward pass; `RuntimeError` the second time."""
    if not given:
        raise RuntimeError("the chunked loss has given its gradient away: one backward pass")
    return given.pop()
