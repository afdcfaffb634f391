"""States that no worker ever has whole: each makes and keeps its rows, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from functrain.architecture import emptied
from functrain.architecture import split as whole_split
from functrain.deferred import built
from functrain.distributed.shards import cut
from functrain.distributed.world import World
from functrain.trees import Tensors, digest, owning


def split(make: Callable[[], nn.Module], world: World) -> tuple[nn.Module, Tensors, Tensors]:
    """See `functrain.distributed.split`."""
    if world.size == 1:
        module, params, buffers = whole_split(make().to(world.device))
        return module, params, buffers
    module, recorded = world.for_all(lambda: built(make))
    given, kept = world.for_all(lambda: emptied(module))
    own = rows(given, world, recorded.made)
    return module, own, Tensors({n: recorded.made(t).to(world.device) for n, t in kept.items()})


def rows(
    given: Mapping[str, Tensor],
    world: World,
    made: Callable[[Tensor], Tensor] = Tensor.detach,
) -> Tensors:
    """This worker's rows of every tensor, whose values are `made` when it is their turn."""
    found: dict[str, Tensor] = {}
    seen: dict[str, str] = {}
    for name in sorted(given):
        whole = made(given[name])
        seen[f"params/{name}"] = digest(whole)
        found[name] = cut(name, whole, world)
    # Rows of different wholes would be a mixture that no later comparison could see.
    world.agree(seen, "before they are sharded")
    return owning(Tensors(found))
