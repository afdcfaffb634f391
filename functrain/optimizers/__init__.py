"""Optimizers as pure pairs `init`, `update` over PyTorch's own arithmetic.

`update(grads, state, params, learning_rate)` returns new params and a new state. The arithmetic
is torch.optim's, so that an update equals the class's own bit for bit (under float32, torch's own
default dtype). `adamw` and `adam` call the functional kernels directly (fused where there is one);
every other class of the `torch.optim.Optimizer` interface goes through one adapter, `from_torch`.
"""

from functrain.optimizers.adam import Adam, adam, adamw
from functrain.optimizers.adapter import Adapter, adafactor, adamw_8bit, from_torch, sgd
from functrain.optimizers.base import Group, Optimizer, OptimizerState, group, no_decay
from functrain.optimizers.partition import (
    Partition,
    hidden_matrices,
    is_any,
    is_elementwise,
    is_hidden_matrix,
    is_torchs,
    may_draw,
    may_write,
    muon,
    partition,
)

__all__ = [
    "Adam",
    "Adapter",
    "Group",
    "Optimizer",
    "OptimizerState",
    "Partition",
    "adafactor",
    "adam",
    "adamw",
    "adamw_8bit",
    "from_torch",
    "group",
    "hidden_matrices",
    "is_any",
    "is_elementwise",
    "is_hidden_matrix",
    "is_torchs",
    "may_draw",
    "may_write",
    "muon",
    "no_decay",
    "partition",
    "sgd",
]
