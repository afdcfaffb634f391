"""Gradients of large tables, summed where they are made.

An embedding's gradient is a dense [vocabulary, width] of zeros but for the rows of a batch, and a
head's is another; an ordinary backward pass fills one for each micro-batch and adds it to the sum
of those before. Within `accumulating` both are added to the sum as they are made.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor, nn

TABLE = 1 << 20
"""Embeddings of so many bytes are worth it."""


@attrs.frozen(eq=False)
class Accumulating:
    """`sum_of`: where a leaf's gradient is summed, or None for what is no leaf that trains.

    Who asks has a gradient: what is asked for is there, zeros at first. `trains`: whether there
    would be one. `factor`: what a summed loss is multiplied by before its gradient is taken; 0-d,
    or [k] where it is k sums.
    """

    trains: Callable[[Tensor], bool]
    sum_of: Callable[[Tensor], Tensor | None]
    factor: Tensor


_current: ContextVar[Accumulating | None] = ContextVar("accumulating", default=None)


def current() -> Accumulating | None:
    """The accumulation that is under way."""
    return _current.get()


@contextmanager
def accumulating(modules: Sequence[nn.Module], given: Accumulating) -> Iterator[None]:
    """Within it, large embeddings among `modules` and heads by chunks add to `given`'s sums.

    For one forward and one backward pass of each loss, whose gradient is asked of these leaves and
    of nothing else. Embeddings are left alone on accelerators, where an ordinary gradient is summed
    in a fixed order and a scattered one is not, and under compilation, which sees no hooks.
    """
    token = _current.set(given)
    try:
        with ExitStack() as hooks:
            large = [m for m in modules if isinstance(m, nn.Embedding) and _plain(m)]
            if large and not any(_compiled(module) for module in modules):
                for module in large:
                    # Before hooks of the user's own, which see what this one returns.
                    handle = module.register_forward_hook(_looking_up(given), prepend=True)
                    hooks.callback(handle.remove)
            yield
    finally:
        _current.reset(token)


def _compiled(module: nn.Module) -> bool:
    return "_orig_mod" in module._modules or module._compiled_call_impl is not None


def _plain(module: nn.Embedding) -> bool:
    """Whether a module does what `F.embedding` does, on a table that is worth it."""
    usual = type(module).forward is nn.Embedding.forward and "forward" not in vars(module)
    options = module.sparse or module.scale_grad_by_freq or module.max_norm is not None
    weight = module._parameters.get("weight")
    large = weight is not None and weight.device.type == "cpu" and weight.nbytes >= TABLE
    return usual and large and not options


def _looking_up(given: Accumulating) -> Callable[..., Tensor | None]:
    def hook(module: nn.Embedding, inputs: tuple[Tensor, ...], _output: Tensor) -> Tensor | None:
        weight = module.weight
        if not (torch.is_grad_enabled() and inputs and given.trains(weight)):
            return None
        into = functools.partial(given.sum_of, weight)
        found: Tensor = _Lookup.apply(weight, inputs[0], module.padding_idx, into)  # type: ignore[no-untyped-call]
        return found

    return hook


class _Lookup(torch.autograd.Function):
    """`F.embedding`, whose gradient is added row by row to what `into` gives then."""

    @staticmethod
    def forward(  # pyrefly: ignore[bad-override]
        ctx: Any,
        weight: Tensor,
        ids: Tensor,
        padding: int | None,
        into: Callable[[], Tensor],
    ) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.padding, ctx.into = padding, into
        return F.embedding(ids, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyrefly: ignore[bad-override]
        ctx: Any, *grad_outputs: Any
    ) -> tuple[None, ...]:
        (ids,) = ctx.saved_tensors
        into = ctx.into()
        rows = grad_outputs[0].flatten(0, -2).to(into.dtype)
        ids = ids.flatten()
        if ctx.padding is not None:
            rows = rows.masked_fill((ids == ctx.padding).unsqueeze(1), 0.0)
        into.index_add_(0, ids, rows)
        return None, None, None, None
