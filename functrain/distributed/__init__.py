"""More than one worker: the same pure step on `torch.distributed`.

    with ft.distributed.world() as world:                 # torchrun's environment, or one process
        step = ft.pretrain_step(..., microbatches=8, world=world, reduction="canonical")
        for state, metrics in ft.train(step, state, source, steps=10_000):
            ...

Every worker has the whole state and computes its part of the micro-batches. The result is the same
on every worker: params, metrics, gradient norm, and whether the step was applied. With
`reduction="canonical"` it is also the same, to the bit, on any number of workers.

With `sharded=True`, each worker keeps only some rows of the state: the same step, the same bits.
`shard` turns a whole state into shards, `gathered` turns shards into a whole state, and `split`
makes the params of a model that no worker has room for:

    architecture, params, buffers = ft.distributed.split(lambda: MyModel(config), world)

Reading such a state gathers rows from all workers, so all must make these calls, in the same order:
`gathered`, `ft.evaluate`, `ft.fingerprint`, `ft.trees.global_norm` and `digest`, `ft.save`. What
worker 0 alone prints must be computed before `if world.speaks:`.
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
    """`functrain.split(make())` with sharded params, for models that fit on no single worker.

    `make` builds the module on the CPU, as usual, but its params get no memory yet. Then one tensor
    at a time is materialized, by replaying what the constructors did to it with the random numbers
    that they drew, and cut to this worker's rows: the params are `shard` of those of
    `functrain.split(make())`, to the bit, and at most one of them is whole at a time. Buffers stay
    whole. Only tensors made by `torch.empty` can be deferred, as the params of torch's own modules
    and of transformers' are; one made by `torch.randn`, say, is whole until its turn. What cannot
    be deferred (`weight.numpy()`, `weight.tolist()`) is an error. If `make` catches that, the
    params are those that it makes then.

    In a world of 1 the params are whole, plain tensors. Every worker must call this and make the
    same model: if their random generators were seeded differently, all of them refuse.
    """
    # Here, since DTensor takes a second to import.
    from functrain.distributed import shards

    return shards.split(make, world)


@overload
def shard(whole: TrainState, world: World) -> TrainState: ...
@overload
def shard(whole: Tensors, world: World) -> Tensors: ...
def shard(whole: TrainState | Tensors, world: World) -> TrainState | Tensors:
    """Shard a state, or a mapping of tensors, that is whole on every worker.

    Each worker keeps its rows of every tensor, in memory of their own, as DTensors; in a world of 1
    everything stays as it is. Raises `StateError` for a param that is 0-d and so has no rows.
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
    """A sharded state, or mapping of tensors, made whole on every worker; all must call this."""
    from functrain.distributed import shards

    if isinstance(sharded, TrainState):
        return shards.gathered_state(sharded)
    return shards.gathered(sharded)
