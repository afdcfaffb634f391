"""States that no worker ever has whole: each makes and keeps its rows, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from functrain.architecture import emptied
from functrain.architecture import split as whole_split
from functrain.deferred import built
from functrain.distributed.shards import rows_made
from functrain.distributed.world import World
from functrain.trees import Tensors, in_order


def split(make: Callable[[], nn.Module], world: World) -> tuple[nn.Module, Tensors, Tensors]:
    """See `functrain.distributed.split`."""
    if world.size == 1:
        module, params, buffers = whole_split(make().to(world.device))
        return module, params, buffers
    module, recorded = world.for_all(lambda: built(make))
    given, kept = world.for_all(lambda: emptied(module))
    own = rows_made(given, world, recorded.made)
    whole = {n: in_order(recorded.made(t).to(world.device)) for n, t in kept.items()}
    return module, own, Tensors(whole)
