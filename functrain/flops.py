"""The floating-point operations of a step, of which throughput and utilisation are made."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from functrain import activations
from functrain.architecture import bound
from functrain.errors import ConfigError
from functrain.gradients import Batches
from functrain.objectives.head import find_head
from functrain.objectives.support import check_causal, under_trial
from functrain.state import TrainState
from functrain.steps import Step


def flops_of(step: Step, state: TrainState, batch: Batches, *, recomputed: bool = True) -> int:
    """How many floating-point operations one step on this batch takes, counted by PyTorch.

    Forward and backward: matrix products, attention and convolutions, a multiplication and an
    addition being two; a reference's forward too. What checkpointing computes again counts where it
    is `recomputed`; what a head by chunks makes twice counts twice. A compiled step is counted
    uncompiled. The gradient is computed once for it, and nothing is changed. Over the seconds of a
    step and the machine's peak it is the utilisation of the hardware (HFU), or, without what is
    recomputed, of the model (MFU; PaLM, 2204.02311, appendix B).

    Raises what the step would raise for this state and batch, and `ConfigError` for a step that is
    sharded over several workers, of which none sees the whole.
    """
    if step.sharded and step.world is not None and step.world.size > 1:
        raise ConfigError(
            "step: the operations of a step are counted on a whole model, and here each worker has "
            "a part; count them with attrs.evolve(step, world=None, sharded=False) on a state of "
            "functrain.distributed.gathered(state)"
        )
    # The counter is a dispatch mode, under which nothing can be compiled.
    step = attrs.evolve(step, compile=False)
    step.check(state)
    values, places = step.value_and_grad.values(state.params), step.value_and_grad.places
    with bound(step.architecture, values, state.buffers, places=places) as model:
        find_head(model)  # which calls the model the first time, and so does the next
        check_causal(model)
    with counter(recomputed=recomputed) as counted:
        step.gradient(
            state.params,
            state.buffers,
            batch,
            key=state.key,
            scaler=state.scaler,
            objective=step.objective_of(state),
        )
    return int(counted.get_total_flops())


def counter(*, recomputed: bool = True) -> Any:
    """PyTorch's counter, a context, with what it does not know of."""
    from torch.utils.flop_counter import FlopCounterMode  # takes a while to import

    class Counter(FlopCounterMode):
        """Which leaves out trials, and may leave out what checkpointing runs again."""

        def _count_flops(self, func_packet: Any, out: Any, args: Any, kwargs: Any) -> Any:
            if under_trial() or (not recomputed and activations.recomputing()):
                return out
            return super()._count_flops(func_packet, out, args, kwargs)  # type: ignore[no-untyped-call]

    return Counter(display=False, custom_mapping=_unknown())


def _unknown() -> dict[Any, Any]:
    """The operations that PyTorch's counter does not know, or of which it knows too much."""
    aten = torch.ops.aten
    like = {
        aten.addmm_: aten.addmm,
        aten._scaled_dot_product_flash_attention_for_cpu: aten._scaled_dot_product_flash_attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: (
            aten._scaled_dot_product_flash_attention_backward
        ),
    }
    own = {aten._grouped_mm: _grouped, aten.convolution_backward: _convolution_backward}
    return {**{operation: _formula(known) for operation, known in like.items()}, **own}


def _formula(known: Any) -> Any:
    from torch.utils.flop_counter import flop_registry

    def count(*args: Any, **kwargs: Any) -> Any:
        return flop_registry[known](*args, **kwargs)

    count._get_raw = True  # type: ignore[attr-defined]  # it takes shapes from tensors already
    return count


def _grouped(one: Sequence[int], other: Sequence[int], *_more: Any, **_options: Any) -> int:
    """Products of groups, as a mixture's experts are: each row is multiplied with its own alone."""
    # Where the groups are columns of the other, each of `one`'s meets its part of them.
    groups = one[0] if len(one) > len(other) else 1
    return 2 * math.prod(one) * other[-1] // groups


def _convolution_backward(
    grad: Tensor, inputs: Tensor, weight: Tensor, *options: Any, out_val: Any
) -> int:
    """Each gradient takes what the forward pass takes.

    PyTorch counts a weight's as if every channel were convolved with every other: of a convolution
    by channels, as Mamba has it, as many times too much as there are channels.
    """
    from torch.utils.flop_counter import conv_flop_count

    del out_val
    *_, transposed, _padding, _groups, needed = options
    forward = conv_flop_count(
        list(inputs.shape), list(weight.shape), list(grad.shape), transposed=transposed
    )
    gradients: int = needed[0] + needed[1]
    return gradients * forward


_convolution_backward._get_raw = True  # type: ignore[attr-defined]  # it takes tensors
