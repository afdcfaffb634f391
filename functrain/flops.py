"""The floating-point operations of a step, of which throughput and utilisation are made."""

from __future__ import annotations

from typing import Any

import torch

from functrain.architecture import bound
from functrain.gradients import Batches
from functrain.objectives.head import find_head
from functrain.state import TrainState
from functrain.steps import Step


def flops_of(step: Step, state: TrainState, batch: Batches) -> int:
    """How many floating-point operations one step on this batch takes, counted by PyTorch.

    Forward and backward as they are run: matrix products, attention and convolutions, a
    multiplication and an addition being two; what is recomputed (checkpointing, a head by chunks)
    and a reference's forward count too. The gradient is computed once for it, and nothing is
    changed. Over the seconds of a step and the machine's peak it is the utilisation (HFU; MFU
    where nothing is recomputed; PaLM, 2204.02311, appendix B).

    Raises what the step would raise for this state and batch.
    """
    step.check(state)
    values, places = step.value_and_grad.values(state.params), step.value_and_grad.places
    with bound(step.architecture, values, state.buffers, places=places) as model:
        find_head(model)  # which calls the model the first time
    with counter() as counted:
        step.gradient(
            state.params,
            state.buffers,
            batch,
            key=state.key,
            scaler=state.scaler,
            objective=step.objective_of(state),
        )
    return int(counted.get_total_flops())


def counter() -> Any:
    """PyTorch's counter, a context, with what it does not know of."""
    from torch.utils.flop_counter import FlopCounterMode  # takes a while to import

    return FlopCounterMode(display=False, custom_mapping=_unknown())


def _unknown() -> dict[Any, Any]:
    """The operations that PyTorch's counter does not know, with the formulas of their like."""
    aten = torch.ops.aten
    like = {
        aten.addmm_: aten.addmm,
        aten._scaled_dot_product_flash_attention_for_cpu: aten._scaled_dot_product_flash_attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: (
            aten._scaled_dot_product_flash_attention_backward
        ),
    }
    return {operation: _formula(known) for operation, known in like.items()}


def _formula(known: Any) -> Any:
    from torch.utils.flop_counter import flop_registry

    def count(*args: Any, **kwargs: Any) -> Any:
        return flop_registry[known](*args, **kwargs)

    count._get_raw = True  # type: ignore[attr-defined]  # it takes shapes from tensors already
    return count
