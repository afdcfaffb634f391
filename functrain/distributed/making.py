"""States that no worker ever has whole: each makes and keeps its rows, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from functrain.architecture import emptied
from functrain.deferred import Recording, recording
from functrain.distributed.shards import cut
from functrain.distributed.world import World
from functrain.trees import Tensors, digest, owning


def split(make: Callable[[], nn.Module], world: World) -> tuple[nn.Module, Tensors, Tensors]:
    """See `functrain.distributed.split`."""

    def recorded() -> tuple[nn.Module, Recording]:
        with recording() as found:
            return make(), found

    module, found = world.for_all(recorded)
    params, buffers = world.for_all(lambda: emptied(module))
    own = rows(params, world, found.made)
    return module, own, Tensors({n: found.made(t).to(world.device) for n, t in buffers.items()})


def rows(
    given: Mapping[str, Tensor],
    world: World,
    made: Callable[[Tensor], Tensor] = Tensor.detach,
    dtype: torch.dtype | None = None,
) -> Tensors:
    """This worker's rows of every tensor, whose values are `made` when it is their turn.

    In a world of 1 all of them. Floating ones become `dtype`.
    """
    found: dict[str, Tensor] = {}
    seen: dict[str, str] = {}
    for name in sorted(given):
        whole = made(given[name])
        kind = dtype if whole.is_floating_point() else None
        if world.size == 1:
            found[name] = whole.to(world.device, kind or whole.dtype)
            continue
        seen[f"params/{name}"] = digest(whole)
        found[name] = cut(name, whole, world, kind)
    # Rows of different wholes would be a mixture that no later comparison could see.
    world.agree(seen, "before they are sharded")
    return owning(Tensors(found))
