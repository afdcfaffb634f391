"""Tensors in shards: each worker has some rows, as a DTensor with the placement `Shard(0)`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import attrs
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from functrain import architecture
from functrain.deferred import built
from functrain.distributed.world import World
from functrain.errors import StateError
from functrain.state import TrainState
from functrain.trees import Tensors, digest, in_order, map_leaves, owning, rows_here, whole


@attrs.frozen
class Rows:
    """The rows `begin` to `end` of `count`, those of one worker."""

    begin: int
    end: int
    count: int

    def __len__(self) -> int:
        return self.end - self.begin


def rows_of(count: int, rank: int, size: int) -> Rows:
    """A worker's rows, as `torch.chunk` cuts them: the last workers may have fewer, or none."""
    each = -(-count // size)
    return Rows(min(count, rank * each), min(count, (rank + 1) * each), count)


@functools.cache
def mesh(device: str, size: int) -> DeviceMesh:
    """The mesh of all workers."""
    return init_device_mesh(device, (size,))


def shard(items: Mapping[str, Tensor], world: World) -> Tensors:
    """Whole tensors, the same on every worker, as shards in memory of their own.

    What is sharded already stays; in a world of 1 everything does. Raises `StateError` for a tensor
    without a dimension.
    """
    if world.size == 1:
        return items if isinstance(items, Tensors) else Tensors(items)
    plain = {name: tensor for name, tensor in items.items() if not isinstance(tensor, DTensor)}
    found = {**items, **(rows_made(plain, world) if plain else {})}
    if isinstance(items, Tensors):
        owning(items, items.own & plain.keys())
    # What was in shards already, the caller may hold too.
    return owning(Tensors(found), plain.keys())


def split(make: Callable[[], nn.Module], world: World) -> tuple[nn.Module, Tensors, Tensors]:
    """See `functrain.distributed.split`."""
    if world.size == 1:
        return architecture.split(make().to(world.device))
    module, recorded = world.for_all(lambda: built(make))
    given, kept = world.for_all(lambda: architecture.emptied(module))
    own = rows_made(given, world, recorded.made)
    whole = {n: in_order(recorded.made(t).to(world.device)) for n, t in kept.items()}
    return module, own, Tensors(whole)


def rows_made(
    given: Mapping[str, Tensor],
    world: World,
    made: Callable[[Tensor], Tensor] = Tensor.detach,
) -> Tensors:
    """This worker's rows of every tensor, whose values are `made` when it is their turn."""
    found: dict[str, Tensor] = {}
    seen: dict[str, str] = {}
    for name in sorted(given):
        whole = made(given[name])
        seen[name] = digest(whole)
        found[name] = _cut(name, whole, world)
    # Rows of different wholes would be a mixture that no later comparison could see.
    world.agree(seen, "before they are sharded")
    return owning(Tensors(found))


def _cut(name: str, tensor: Tensor, world: World) -> Tensor:
    """This worker's rows of a whole tensor, in memory of their own."""
    if not tensor.ndim:
        raise StateError(
            f"params/{name}: a number without a dimension, which has no rows to shard; give it "
            "the shape [1] in the module, or train with sharded=False"
        )
    rows = rows_of(len(tensor), world.rank, world.size)
    own = tensor.detach()[rows.begin : rows.end].clone(memory_format=torch.contiguous_format)
    return sharded(own.to(world.device), tensor.shape, world)


def sharded(own: Tensor, shape: torch.Size, world: World) -> Tensor:
    """This worker's rows of a tensor as the whole of that shape."""
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        own, mesh(world.device.type, world.size), [Shard(0)], run_check=False, shape=shape,
        stride=stride,
    )  # fmt: skip


def local(items: Mapping[str, Tensor]) -> Tensors:
    """This worker's rows of every tensor, in their own memory."""
    own = items.own if isinstance(items, Tensors) else frozenset[str]()
    return owning(Tensors({name: rows_here(tensor) for name, tensor in items.items()}), own)


def gathered(items: Mapping[str, Tensor]) -> Tensors:
    """Every tensor whole, on every worker; all workers must ask for it."""
    return map_leaves(whole, items)


def _mapped(state: TrainState, function: Callable[[Tensors], Tensors]) -> TrainState:
    """A state with `function` of every mapping that is of the shape of its params."""
    slots = {slot: function(items) for slot, items in state.optimizer.slots.items()}
    return attrs.evolve(
        state,
        params=function(state.params),
        optimizer=attrs.evolve(state.optimizer, slots=slots),
        average=None if state.average is None else function(state.average),
        reference=None if state.reference is None else function(state.reference),
    )


def local_state(state: TrainState) -> TrainState:
    """A state of this worker's rows alone, as plain tensors over the same memory."""
    return _mapped(state, local)


def gathered_state(state: TrainState) -> TrainState:
    """A state whole on every worker; all workers must ask for it."""
    return _mapped(state, gathered)


def shard_state(state: TrainState, world: World) -> TrainState:
    """A state that is whole on every worker, in shards; its memory is not kept."""
    shapes = {name: tensor.shape for name, tensor in state.params.items()}

    def cut(items: Tensors) -> Tensors:
        fitting = {n: t for n, t in items.items() if t.shape == shapes[n] and t.ndim}
        return owning(Tensors({**items, **shard(fitting, world)}))

    if world.size == 1:
        return state
    return attrs.evolve(_mapped(state, cut), params=shard(state.params, world))


def whole_state(state: TrainState, shapes: Mapping[str, torch.Size], world: World) -> TrainState:
    """A state of rows, as shards of tensors of these shapes; the way back from `local_state`."""
    return _mapped(state, lambda items: _whole(items, shapes, state.params, world))


def _whole(
    items: Tensors, shapes: Mapping[str, torch.Size], rows: Mapping[str, Tensor], world: World
) -> Tensors:
    found: dict[str, Tensor] = {}
    for name, tensor in items.items():
        if tensor.ndim and tensor.shape != rows[name].shape:
            raise StateError(
                f"optimizer: its state of {name} has the shape {list(tensor.shape)} for rows of "
                f"{list(rows[name].shape)}, so it is not element by element; train with "
                "sharded=False"
            )
        found[name] = sharded(tensor, shapes[name], world) if tensor.ndim else tensor
    return owning(Tensors(found), items.own)


# A kernel that is not one of TensorIterator's (torch's fused Adam) computes the last elements of a
# tensor, which fill no vector, by other instructions: on the CPU the bits of an element depend on
# whether it is among them. Rows before and after give each element the place that it has in the
# whole.
_VECTORS = {"AVX512": 64, "AVX2": 32, "DEFAULT": 32}


def vector(dtype: torch.dtype) -> int:
    """Elements of a vector register, as torch's kernels use them on this CPU."""
    size = _VECTORS.get(torch.backends.cpu.get_cpu_capability(), 64)
    return max(1, size // dtype.itemsize)


def padding(shape: torch.Size, dtype: torch.dtype, rows: Rows) -> tuple[int, int]:
    """Rows to be added before and after a worker's rows of a tensor of this shape."""
    lanes = vector(dtype)
    each = shape[1:].numel()
    begin, end, total = rows.begin * each, rows.end * each, rows.count * each
    if not each or begin == end:
        return 0, 0
    before = rows.begin % lanes if begin % lanes else 0
    if end > total - total % lanes:
        # Among the last elements those that are several are computed together, and others alone.
        return before, rows.count - rows.end
    return before, -rows.end % lanes if end % lanes else 0


def padded(tensor: Tensor, before: int, after: int) -> Tensor:
    """A tensor with zero rows before and after it."""
    parts = [tensor.new_zeros(before, *tensor.shape[1:]), tensor]
    return torch.cat([*parts, tensor.new_zeros(after, *tensor.shape[1:])])
