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
    """A worker's rows, cut as by `torch.chunk`: the last workers may have fewer, or none."""
    each = -(-count // size)
    return Rows(min(count, rank * each), min(count, (rank + 1) * each), count)


@functools.cache
def mesh(device: str, size: int) -> DeviceMesh:
    """The mesh of all workers."""
    return init_device_mesh(device, (size,))


def shard(items: Mapping[str, Tensor], world: World) -> Tensors:
    """Shard tensors that are whole and equal on every worker, into memory of their own.

    Tensors that are sharded already stay as they are; in a world of 1 all do. Raises `StateError`
    for a 0-d tensor.
    """
    if world.size == 1:
        return items if isinstance(items, Tensors) else Tensors(items)
    plain = {name: tensor for name, tensor in items.items() if not isinstance(tensor, DTensor)}
    found = {**items, **(rows_made(plain, world) if plain else {})}
    if isinstance(items, Tensors):
        owning(items, items.own & plain.keys())
    # Tensors that were sharded already may be held by the caller too.
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
    """This worker's rows of every tensor; `made` materializes the whole tensors one at a time."""
    found: dict[str, Tensor] = {}
    seen: dict[str, str] = {}
    for name in sorted(given):
        whole = made(given[name])
        seen[name] = digest(whole)
        found[name] = _cut(name, whole, world)
    # Rows of different tensors would make a mixture that no later comparison could detect.
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
    """The DTensor of that shape of which `own` are this worker's rows."""
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
    """Every tensor, made whole on every worker; all workers must call this."""
    return map_leaves(whole, items)


def _mapped(state: TrainState, function: Callable[[Tensors], Tensors]) -> TrainState:
    """A state with `function` applied to each of its mappings keyed by param names."""
    slots = {slot: function(items) for slot, items in state.optimizer.slots.items()}
    return attrs.evolve(
        state,
        params=function(state.params),
        optimizer=attrs.evolve(state.optimizer, slots=slots),
        average=None if state.average is None else function(state.average),
        reference=None if state.reference is None else function(state.reference),
    )


def local_state(state: TrainState) -> TrainState:
    """The state with only this worker's rows, as plain tensors over the same memory."""
    return _mapped(state, local)


def gathered_state(state: TrainState) -> TrainState:
    """The state, made whole on every worker; all workers must call this."""
    return _mapped(state, gathered)


def shard_state(state: TrainState, world: World) -> TrainState:
    """A state that is whole on every worker, sharded; the shards do not share its memory."""
    shapes = {name: tensor.shape for name, tensor in state.params.items()}

    def cut(items: Tensors) -> Tensors:
        fitting = {n: t for n, t in items.items() if t.shape == shapes[n] and t.ndim}
        return owning(Tensors({**items, **shard(fitting, world)}))

    if world.size == 1:
        return state
    return attrs.evolve(_mapped(state, cut), params=shard(state.params, world))


def whole_state(state: TrainState, shapes: Mapping[str, torch.Size], world: World) -> TrainState:
    """A state of rows, as shards of tensors of these shapes; the inverse of `local_state`."""
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


# A kernel that does not use TensorIterator (torch's fused Adam) computes the last elements of a
# tensor, which fill no whole vector, with other instructions: on the CPU an element's bits depend
# on whether it is one of them. Rows added before and after give each element the position in its
# vector that it has in the whole tensor.
_VECTORS = {"AVX512": 64, "AVX2": 32, "DEFAULT": 32}


def vector(dtype: torch.dtype) -> int:
    """The number of elements in a vector register, as torch's kernels use them on this CPU."""
    size = _VECTORS.get(torch.backends.cpu.get_cpu_capability(), 64)
    return max(1, size // dtype.itemsize)


def padding(shape: torch.Size, dtype: torch.dtype, rows: Rows) -> tuple[int, int]:
    """How many rows to add before and after a worker's rows of a tensor of this shape."""
    lanes = vector(dtype)
    each = shape[1:].numel()
    begin, end, total = rows.begin * each, rows.end * each, rows.count * each
    if not each or begin == end:
        return 0, 0
    before = rows.begin % lanes if begin % lanes else 0
    if end > total - total % lanes:
        # Even the last elements are partly computed several at a time, so all must be there.
        return before, rows.count - rows.end
    return before, -rows.end % lanes if end % lanes else 0


def padded(tensor: Tensor, before: int, after: int) -> Tensor:
    """A tensor with zero rows before and after it."""
    parts = [tensor.new_zeros(before, *tensor.shape[1:]), tensor]
    return torch.cat([*parts, tensor.new_zeros(after, *tensor.shape[1:])])
