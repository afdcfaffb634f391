"""A block's exchanges, each begun early: gathering its params, reducing its gradients to rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch
import torch.distributed as dist
from torch import Tensor

from functrain.distributed.shards import Rows, rows_of
from functrain.distributed.world import World
from functrain.errors import ArchitectureError
from functrain.reductions import tree_sum
from functrain.trees import by_dtype

Receive = Callable[[str, Tensor, bool], None]
"""Takes a parameter's name, this worker's rows of the sum of its gradients, and whether this worker
had a gradient for it."""


@attrs.frozen(kw_only=True, eq=False)
class Blocks:
    """How the workers of a world exchange rows of tensors; `shapes` are those of the whole ones.

    `tree`: whether sums are binary trees over the ranks.
    """

    world: World
    shapes: Mapping[str, torch.Size]
    tree: bool
    _signs: Mapping[str, int] = attrs.field(init=False)

    @_signs.default
    def _found_signs(self) -> Mapping[str, int]:
        """A small number for each name, exact in any dtype, that distinguishes most names."""
        return {name: number % _SIGNS for number, name in enumerate(self.shapes)}

    def rows(self, name: str) -> Rows:
        """This worker's rows of a parameter."""
        return rows_of(self.shapes[name][0], self.world.rank, self.world.size)

    def gather(self, names: Sequence[str], shards: Sequence[Tensor]) -> Gathering:
        """Begin to gather whole tensors from these rows, in one exchange per dtype."""
        given = dict(zip(names, shards, strict=True))
        groups = by_dtype({name: tensor.dtype for name, tensor in given.items()})
        under_way = []
        for some in groups:
            sizes = [self.most(name) for name in some]
            sent = given[some[0]].new_empty(sum(sizes) + 1)
            _pack(sent, sizes, [given[name].detach() for name in some])
            sent[-1:].fill_(self._signs[some[0]])
            received = torch.empty(self.world.size, len(sent), dtype=sent.dtype, device=sent.device)
            with self.world.meeting(_GATHERING):
                work: Any = dist.all_gather_single(received.view(-1), sent, async_op=True)
            under_way.append((some, received, work))
        return Gathering(self, names, under_way)

    def scatter(self, grads: Sequence[tuple[str, Tensor | None]], dtype: torch.dtype) -> Scattering:
        """Begin to sum the gradients of one micro-batch per worker, all of one dtype."""
        sizes = [self.most(name) for name, _ in grads]
        sent = torch.empty(self.world.size, sum(sizes), dtype=dtype, device=self.world.device)
        begin = 0
        for (name, grad), size in zip(grads, sizes, strict=True):
            self._cut(sent[:, begin : begin + size], name, grad)
            begin += size
        reached = {name: grad is not None for name, grad in grads}
        received = torch.empty_like(sent if self.tree else sent[0])
        with self.world.meeting(_REDUCTION):
            work: Any
            if self.tree:
                work = dist.all_to_all_single(received, sent, async_op=True)
            else:
                work = dist.reduce_scatter_single(received, sent.view(-1), async_op=True)
        return Scattering(self, reached, sent, received, work)

    def most_rows(self, name: str) -> int:
        """The number of rows of the worker that has the most."""
        return -(-self.shapes[name][0] // self.world.size)

    def most(self, name: str) -> int:
        """The number of elements in `most_rows` rows."""
        return self.most_rows(name) * self.shapes[name][1:].numel()

    def _cut(self, into: Tensor, name: str, grad: Tensor | None) -> None:
        """Cut a whole gradient into the workers' parts: [workers, elements]."""
        if grad is None:
            into.fill_(-0.0)  # adds nothing, see `exchange.nothing`
            return
        flat, size = grad.reshape(-1), into.shape[1]
        if len(flat) == into.numel():
            into.copy_(flat.view(self.world.size, size))
            return
        for rank in range(self.world.size):
            piece = flat[rank * size : (rank + 1) * size]
            into[rank, : len(piece)] = piece
            into[rank, len(piece) :] = 0.0


OTHER_ORDER = (
    "sharded: the workers have called the model's blocks in another order, or others of them, so "
    "that they exchanged what does not belong together; a model that chooses its blocks at random "
    "or by its input cannot be sharded"
)
_SIGNS = 113  # a prime, so that blocks with equally many params get different signs
_GATHERING = "the gathering of params"
_REDUCTION = "the reduction of the gradients"


@attrs.frozen(eq=False)
class Gathering:
    """Whole tensors that are being gathered."""

    _blocks: Blocks
    _names: Sequence[str]
    _under_way: list[tuple[list[str], Tensor, Any]]

    def whole(self) -> list[Tensor]:
        """Wait for the whole tensors and return them; may be called once."""
        found: dict[str, Tensor] = {}
        while self._under_way:
            names, received, work = self._under_way.pop(0)
            with self._blocks.world.meeting(_GATHERING):
                work.wait()
            self._refuse_others(received[:, -1])
            begin = 0
            for name in names:
                end = begin + self._blocks.most(name)
                found[name] = self._joined(name, received[:, begin:end])
                begin = end
        return [found[name] for name in self._names]

    def _refuse_others(self, signs: Tensor) -> None:
        """Raise `ArchitectureError` if the workers exchanged tensors that do not belong together.

        Only on the CPU: on an accelerator the check would have to wait, and the mistake is found at
        the end of the step instead, if the exchanges get that far.
        """
        if signs.device.type == "cpu" and bool((signs != signs[0]).any()):
            raise ArchitectureError(OTHER_ORDER)

    def _joined(self, name: str, received: Tensor) -> Tensor:
        # In memory of its own, aligned like a tensor that was never sharded.
        shape = self._blocks.shapes[name]
        whole = torch.empty(shape, dtype=received.dtype, device=received.device)
        flat, (workers, size) = whole.view(-1), received.shape
        if len(flat) == received.numel():
            flat.view(workers, size).copy_(received)
            return whole
        for rank in range(workers):
            piece = flat[rank * size : (rank + 1) * size]
            piece.copy_(received[rank, : len(piece)])
        return whole


@attrs.frozen(eq=False)
class Scattering:
    """Sums under way; keeps what was sent until they are complete."""

    _blocks: Blocks
    _reached: Mapping[str, bool]
    _sent: Tensor
    _received: Tensor
    _work: Any

    def rows(self) -> Iterator[tuple[str, Tensor, bool]]:
        """Wait for the sums; yields this worker's rows of each, as the arguments of `Receive`."""
        with self._blocks.world.meeting(_REDUCTION):
            self._work.wait()
        total = self._received
        if self._blocks.tree:
            # Cloned, or these rows would keep all that was received in memory.
            total = tree_sum(list(self._received), torch.Tensor.add_).clone()
        begin = 0
        for name, reached in self._reached.items():
            rows = len(self._blocks.rows(name))
            shape = torch.Size([rows, *self._blocks.shapes[name][1:]])
            yield name, total[begin : begin + shape.numel()].view(shape), reached
            begin += self._blocks.most(name)


class Sums:
    """Sums of gradients over the workers, one block at a time, overlapping with the computation."""

    def __init__(self, blocks: Blocks, dtypes: Mapping[str, torch.dtype], receive: Receive) -> None:
        self._blocks, self._dtypes, self._receive = blocks, dtypes, receive
        self._under_way: list[Scattering] = []

    def begin(self, names: Sequence[str], grads: Sequence[Tensor | None]) -> None:
        """Begin the sums of a block, after waiting for those of the previous one."""
        self.finish()
        given = dict(zip(names, grads, strict=True))
        for some in by_dtype({name: self._dtypes[name] for name in names}):
            dtype = self._dtypes[some[0]]
            self._under_way.append(self._blocks.scatter([(n, given[n]) for n in some], dtype))

    def finish(self) -> None:
        """Wait for the sums that are under way."""
        while self._under_way:
            for name, rows, reached in self._under_way.pop(0).rows():
                self._receive(name, rows, reached)


def _pack(into: Tensor, sizes: Sequence[int], rows: Sequence[Tensor]) -> None:
    begin = 0
    for size, tensor in zip(sizes, rows, strict=True):
        into[begin : begin + tensor.numel()] = tensor.reshape(-1)
        into[begin + tensor.numel() : begin + size] = 0
        begin += size
