"""The floating-point operations of a step, the basis of throughput and utilisation."""

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

    It counts forward and backward, and a reference's forward: matrix products, attention and
    convolutions, with a multiplication and an addition as two operations. With `recomputed`, what
    checkpointing recomputes counts too; what a chunked head computes twice counts twice. A compiled
    step is counted uncompiled. The gradient is computed once for this, and nothing is changed.

    Divided by a step's seconds and the machine's peak, the result is the hardware's utilisation
    (HFU), or, without `recomputed`, the model's (MFU; PaLM, 2204.02311, appendix B).

    Raises what the step would raise for this state and batch, and `ConfigError` for a step sharded
    over several workers, since none of them sees the whole.
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
        find_head(model)  # both call the model on first use, which must not be counted
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
    """PyTorch's counter as a context, with formulas for the operations that it lacks."""
    from torch.utils.flop_counter import FlopCounterMode  # takes a while to import

    class Counter(FlopCounterMode):
        """A counter that leaves out trials and, unless `recomputed`, recomputed activations."""

        def _count_flops(self, func_packet: Any, out: Any, args: Any, kwargs: Any) -> Any:
            if under_trial() or (not recomputed and activations.recomputing()):
                return out
            return super()._count_flops(func_packet, out, args, kwargs)  # type: ignore[no-untyped-call]

    return Counter(display=False, custom_mapping=_unknown())


def _unknown() -> dict[Any, Any]:
    """Formulas for operations that PyTorch's counter does not know, or overcounts."""
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
    """Grouped products, as of a mixture's experts: each row meets its own group's matrix only."""
    # If the groups split `other`'s columns instead, each of `one`'s matrices meets its part.
    groups = one[0] if len(one) > len(other) else 1
    return 2 * math.prod(one) * other[-1] // groups


def _convolution_backward(
    grad: Tensor, inputs: Tensor, weight: Tensor, *options: Any, out_val: Any
) -> int:
    """Each gradient takes as many operations as the forward pass.

    PyTorch counts a weight's gradient as if every channel were convolved with every other: for a
    depthwise convolution (Mamba's), too many by a factor of the number of channels.
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
