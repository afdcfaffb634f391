"""More than one worker: the same pure step on `torch.distributed`.

    with ft.distributed.world() as world:                 # torchrun's environment, or one process
        step = ft.pretrain_step(..., microbatches=8, world=world, reduction="canonical")
        for state, metrics in ft.train(step, state, source, steps=10_000):
            ...

Every worker has the whole state and computes its part of the micro-batches; what it returns is the
same on every worker: params, metrics, gradient norm, and whether the step was applied. With
`reduction="canonical"` it is also the same, to the bit, on any number of workers.
"""

from functrain.distributed.environment import world
from functrain.distributed.exchange import gathered_metrics
from functrain.distributed.world import ALONE, World

__all__ = ["ALONE", "World", "gathered_metrics", "world"]
