"""More than one worker: the same pure step on `torch.distributed`.

    with ft.distributed.world() as world:                 # torchrun's environment, or one process
        step = ft.pretrain_step(..., microbatches=8, world=world, reduction="canonical")
        for state, metrics in ft.train(step, state, source, steps=10_000):
            ...

Every worker has the whole state and computes its part of the micro-batches; what it returns is the
same on every worker: params, metrics, gradient norm, and whether the step was applied. With
`reduction="canonical"` it is also the same, to the bit, on any number of workers.

Or, with `sharded=True`, each worker keeps some rows of the state: the same step, and the same bits.
`shard` makes such a state of a whole one, `gathered` a whole one of it, and `split` makes the
params of a model that no worker has room for:

    architecture, params, buffers = ft.distributed.split(lambda: MyModel(config), world)

What reads such a state gathers rows of all workers, so all must call it, in the same order:
`gathered`, `ft.evaluate`, `ft.fingerprint`, `ft.trees.global_norm` and `digest`, `ft.save`. What
worker 0 alone shall print is asked for before `if world.speaks:`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import overload

from torch import nn

from functrain.distributed.environment import world
from functrain.distributed.exchange import gathered_metrics
from functrain.distributed.world import ALONE, World
from functrain.state import TrainState
from functrain.trees import Tensors

__all__ = ["ALONE", "World", "gathered", "gathered_metrics", "shard", "split", "world"]


def split(make: Callable[[], nn.Module], world: World) -> tuple[nn.Module, Tensors, Tensors]:
    """`functrain.split(make())`, of which each worker only ever makes its own rows.

    `make` builds the module, on the CPU, as it always does; the memory of its parameters is not
    taken then. Each tensor is made when it is its turn, by what the constructors have done to it
    and with the random numbers that they drew: the params are `shard` of those of
    `functrain.split(make())`, to the bit, and at most one of them is whole at a time. Buffers are
    whole. Only what `torch.empty` made can wait, as the parameters of torch's own modules and of
    transformers'; one made of `torch.randn`, say, is whole from then on until its turn.

    In a world of 1 the params are whole and plain. Every worker must call this, and must make the
    same: where the random generators were seeded differently, all refuse.
    """
    # Here, since DTensor takes a second to import.
    from functrain.distributed import shards

    return shards.split(make, world)


@overload
def shard(whole: TrainState, world: World) -> TrainState: ...
@overload
def shard(whole: Tensors, world: World) -> Tensors: ...
def shard(whole: TrainState | Tensors, world: World) -> TrainState | Tensors:
    """A state, or a mapping of tensors, that is whole on every worker, in shards.

    Each worker keeps its rows of every tensor, in memory of their own, as DTensors; in a world of 1
    everything stays as it is. Raises `StateError` for a tensor without rows.
    """
    # Here, since DTensor takes a second to import.
    from functrain.distributed import shards

    if isinstance(whole, TrainState):
        return shards.shard_state(whole, world)
    return shards.shard(whole, world)


@overload
def gathered(sharded: TrainState) -> TrainState: ...
@overload
def gathered(sharded: Tensors) -> Tensors: ...
def gathered(sharded: TrainState | Tensors) -> TrainState | Tensors:
    """A state, or a mapping of tensors, whole on every worker, which all must ask for."""
    from functrain.distributed import shards

    if isinstance(sharded, TrainState):
        return shards.gathered_state(sharded)
    return shards.gathered(sharded)
