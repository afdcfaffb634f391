"""The exchanges of a block: its params whole, and rows of its gradients' sums; each begun early."""

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
"""Takes a parameter's name, this worker's rows of its gradient's sum, and whether there was a
gradient here."""


@attrs.frozen(kw_only=True, eq=False)
class Blocks:
    """How the workers of a world exchange rows of tensors whose whole `shapes` these are.

    `tree`: the sums are binary trees over the ranks.
    """

    world: World
    shapes: Mapping[str, torch.Size]
    tree: bool
    _signs: Mapping[str, int] = attrs.field(init=False)

    @_signs.default
    def _found_signs(self) -> Mapping[str, int]:
        """Small numbers, exact in any dtype, that tell most names from each other."""
        return {name: number % _SIGNS for number, name in enumerate(self.shapes)}

    def rows(self, name: str) -> Rows:
        """This worker's rows of a parameter."""
        return rows_of(self.shapes[name][0], self.world.rank, self.world.size)

    def gather(self, names: Sequence[str], shards: Sequence[Tensor]) -> Gathering:
        """Begin to make these rows whole, in one exchange for each dtype."""
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
        """Begin to sum gradients of one micro-batch of every worker, in one dtype."""
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
        """The most rows that a worker has."""
        return -(-self.shapes[name][0] // self.world.size)

    def most(self, name: str) -> int:
        """Elements of the most rows that a worker has."""
        return self.most_rows(name) * self.shapes[name][1:].numel()

    def _cut(self, into: Tensor, name: str, grad: Tensor | None) -> None:
        """A whole gradient as the parts of the workers: [workers, elements]."""
        if grad is None:
            into.fill_(-0.0)  # what adds nothing, see `exchange.nothing`
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
_SIGNS = 113  # a prime, so that blocks of equally many params have signs of their own
_GATHERING = "the gathering of params"
_REDUCTION = "the reduction of the gradients"


@attrs.frozen(eq=False)
class Gathering:
    """Tensors that are becoming whole."""

    _blocks: Blocks
    _names: Sequence[str]
    _under_way: list[tuple[list[str], Tensor, Any]]

    def whole(self) -> list[Tensor]:
        """Them, when they are there; to be asked for once."""
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
        """Raise where the workers have sent what does not belong together.

        On an accelerator to look would be a wait: there it is seen at the end of the step, if the
        exchanges come to one.
        """
        if signs.device.type == "cpu" and bool((signs != signs[0]).any()):
            raise ArchitectureError(OTHER_ORDER)

    def _joined(self, name: str, received: Tensor) -> Tensor:
        # In memory of its own, aligned as a tensor is that was never sharded.
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
    """Sums that are being made; what was sent is kept until they are."""

    _blocks: Blocks
    _reached: Mapping[str, bool]
    _sent: Tensor
    _received: Tensor
    _work: Any

    def rows(self) -> Iterator[tuple[str, Tensor, bool]]:
        """This worker's rows of them, when they are there: what a `Receive` takes."""
        with self._blocks.world.meeting(_REDUCTION):
            self._work.wait()
        total = self._received
        if self._blocks.tree:
            # A clone, else these rows would hold all that was received.
            total = tree_sum(list(self._received), torch.Tensor.add_).clone()
        begin = 0
        for name, reached in self._reached.items():
            rows = len(self._blocks.rows(name))
            shape = torch.Size([rows, *self._blocks.shapes[name][1:]])
            yield name, total[begin : begin + shape.numel()].view(shape), reached
            begin += self._blocks.most(name)


class Sums:
    """Sums of gradients over the workers, of one block at a time beside what is computed."""

    def __init__(self, blocks: Blocks, dtypes: Mapping[str, torch.dtype], receive: Receive) -> None:
        self._blocks, self._dtypes, self._receive = blocks, dtypes, receive
        self._under_way: list[Scattering] = []

    def begin(self, names: Sequence[str], grads: Sequence[Tensor | None]) -> None:
        """Begin those of a block, when those of the last one are there."""
        self.finish()
        given = dict(zip(names, grads, strict=True))
        for some in by_dtype({name: self._dtypes[name] for name in names}):
            dtype = self._dtypes[some[0]]
            self._under_way.append(self._blocks.scatter([(n, given[n]) for n in some], dtype))

    def finish(self) -> None:
        """Wait for what is under way."""
        while self._under_way:
            for name, rows, reached in self._under_way.pop(0).rows():
                self._receive(name, rows, reached)


def _pack(into: Tensor, sizes: Sequence[int], rows: Sequence[Tensor]) -> None:
    begin = 0
    for size, tensor in zip(sizes, rows, strict=True):
        into[begin : begin + tensor.numel()] = tensor.reshape(-1)
        into[begin + tensor.numel() : begin + size] = 0
        begin += size
