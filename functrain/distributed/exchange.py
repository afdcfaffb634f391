"""Sums over workers: of gradients, in buckets, either fast or as a tree; and of metrics."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import orjson
import torch
import torch.distributed as dist
from torch import Tensor

from functrain.errors import ArchitectureError
from functrain.metrics import Metric, Metrics
from functrain.reductions import tree_sum

BUCKET = 25 << 20
"""Bytes of one exchange."""

ALONE = 1 << 20
"""A gradient of at least so many bytes is sent by itself, in place: copying it into a bucket would
take longer than an exchange of its own."""

IN_FLIGHT = 4
"""Exchanges that may be under way at once; each may hold a bucket's copy of gradients."""

Meeting = Callable[[str], AbstractContextManager[None]]


def nothing(like: Tensor) -> Tensor:
    """The gradient of a parameter that no micro-batch here has reached: one that adds nothing.

    It is −0.0, the only number that added to any other, 0.0 included, leaves its bits unchanged.
    """
    return torch.full_like(like, -0.0, requires_grad=False)


class Beside:
    """Sums gradients over the workers as they become ready, one after another.

    They are summed in buckets, the same on every worker: large gradients by themselves, small ones
    together. A bucket is sent once its gradients and all buckets before it are ready, while later
    ones are still computed, so the order of the exchanges is the same everywhere, whatever is ready
    first. With `tree`, each sum is a binary tree over the ranks.
    """

    def __init__(
        self, like: Mapping[str, Tensor], meeting: Meeting, size: int, *, tree: bool
    ) -> None:
        self._like, self._meeting, self._size, self._tree = like, meeting, size, tree
        self.buckets = list(_together(like))
        self.sent = 0
        self._ready: dict[str, tuple[Tensor, bool]] = {}
        self._sums: dict[str, Tensor] = {}
        self._under_way: deque[_Sending] = deque()

    def ready(self, name: str, grad: Tensor, *, own: bool) -> None:
        """Hand over a gradient that is final; if its memory is its `own`, the sum may reuse it.

        A gradient that autograd has just made may not own its memory: it can be a view of an
        activation's gradient, which the rest of the backward pass still reads.
        """
        if name in self._ready or name in self._sums:
            raise ArchitectureError(
                f"{name}: its gradient has come to its end twice in one backward pass, so the "
                "model takes a backward pass of its own inside; where there are several workers "
                "it cannot (torch.utils.checkpoint with use_reentrant=True does)"
            )
        self._ready[name] = grad, own
        while self.sent < len(self.buckets) and self._complete(self.buckets[self.sent]):
            self._send()

    def finish(self, grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All sums; a gradient neither in `grads` nor `ready` before counts as `nothing`."""
        for name, like in self._like.items():
            if name not in self._ready and name not in self._sums:
                self._ready[name] = grads[name] if name in grads else nothing(like), True
        while self.sent < len(self.buckets):
            self._send()
        while self._under_way:
            self._receive()
        # Gradients without elements are in no bucket.
        return {**{name: grad for name, (grad, _) in self._ready.items()}, **self._sums}

    def _complete(self, bucket: Sequence[_Stretch]) -> bool:
        return all(name in self._ready or name in self._sums for name, _, _ in bucket)

    def _send(self) -> None:
        bucket = self.buckets[self.sent]
        self.sent += 1
        if len(self._under_way) == IN_FLIGHT:
            self._receive()
        with self._meeting(_REDUCTION):
            send = _Canonical if self._tree else _Fast
            self._under_way.append(send(self._packed(bucket), self._size))

    def _packed(self, bucket: Sequence[_Stretch]) -> Tensor:
        """The gradients of a bucket as one tensor, which will hold their sums."""
        if len(bucket) == 1:
            ((name, begin, end),) = bucket
            if name not in self._sums:
                grad, own = self._ready.pop(name)
                self._sums[name] = grad if own else grad.clone()
            return _flat(self._sums[name])[begin:end]
        grads = [self._ready.pop(name)[0] for name, _, _ in bucket]
        packed = torch.cat([_flat(grad) for grad in grads])
        for (name, _, _), grad, at in zip(bucket, grads, _begins(bucket), strict=True):
            self._sums[name] = torch.as_strided(packed, grad.shape, grad.stride(), at)
        return packed

    def _receive(self) -> None:
        sending = self._under_way.popleft()
        with self._meeting(_REDUCTION):
            sending.receive()


_REDUCTION = "the reduction of the gradients"
_Stretch = tuple[str, int, int]
"""A range of a flattened gradient: name, begin and end."""


class _Sending(Protocol):
    def receive(self) -> None:
        """Wait for the sum, which replaces what was sent, in the same memory."""
        ...


class _Fast:
    """A sum in whatever order the backend takes."""

    def __init__(self, packed: Tensor, size: int) -> None:
        del size
        self._work: Any = dist.all_reduce(packed, async_op=True)

    def receive(self) -> None:
        self._work.wait()


class _Canonical:
    """A sum as a binary tree over the ranks.

    It moves as many bytes as a ring all-reduce: each worker receives one part of every other
    worker's gradients, adds them in order, and sends the sum to all.
    """

    def __init__(self, packed: Tensor, size: int) -> None:
        self._packed, self._size, self._sent = packed, size, packed
        if len(packed) % size:
            self._sent = packed.new_zeros(math.ceil(len(packed) / size) * size)
            self._sent[: len(packed)] = packed
        self._parts = torch.empty_like(self._sent)
        self._work: Any = dist.all_to_all_single(self._parts, self._sent, async_op=True)

    def receive(self) -> None:
        self._work.wait()
        total = tree_sum(list(self._parts.view(self._size, -1)), torch.Tensor.add_)
        dist.all_gather_single(self._sent, total.contiguous())
        if self._sent is not self._packed:
            self._packed.copy_(self._sent[: len(self._packed)])


def _begins(bucket: Sequence[_Stretch]) -> list[int]:
    """The offset of each gradient in its bucket."""
    return list(itertools.accumulate((end - begin for _, begin, end in bucket[:-1]), initial=0))


def _together(like: Mapping[str, Tensor]) -> Iterator[list[_Stretch]]:
    """Buckets, each summed in one exchange: of one dtype, and about `BUCKET` bytes at most."""
    for dtype in sorted({tensor.dtype for tensor in like.values()}, key=str):
        bucket: list[_Stretch] = []
        space = most = max(1, BUCKET // dtype.itemsize)
        for name, tensor in like.items():
            numel = tensor.numel()
            if tensor.dtype != dtype or not numel:
                continue
            if tensor.nbytes >= ALONE or numel > most:
                ends = range(0, numel, most)
                yield from ([(name, at, min(at + most, numel))] for at in ends)
                continue
            if numel > space:
                yield bucket
                bucket, space = list[_Stretch](), most
            bucket.append((name, 0, numel))
            space -= numel
        if bucket:
            yield bucket


def _flat(grad: Tensor) -> Tensor:
    """The gradient as one dimension, over its own memory."""
    if grad.is_contiguous():
        return grad.view(-1)
    # Dense, with its dimensions in another order; the same on every worker, like the params.
    return torch.as_strided(grad, (grad.numel(),), (1,))


OTHER_METRICS = (
    "metrics: the objective's have other names or shapes on one worker than on another; give every "
    "batch the same metrics, of weight 0 where there is nothing"
)


def refuse_moved(counts: Tensor, moved: Sequence[str]) -> None:
    """Raise `ArchitectureError` if the forward wrote to buffers; `counts`: how many, per worker."""
    if bool(counts.any()):
        raise ArchitectureError(
            f"buffers/{moved[0] if moved else '…'}: the forward writes to it, and each worker "
            "would keep what its own part of the batch made of it; use layers without running "
            "statistics (LayerNorm, RMSNorm, GroupNorm), or one worker"
        )


def form_of(metrics: Metrics) -> bytes:
    """The names, readings and sizes of metrics, as bytes to compare."""
    parts = [(n, metrics.metric(n).reading, metrics.metric(n).sum.numel()) for n in metrics]
    return orjson.dumps(sorted(parts))


def hashed(form: bytes) -> int:
    """A hash of 63 bits, which int64 holds."""
    return int.from_bytes(hashlib.blake2b(form, digest_size=8).digest(), "little") >> 1


def values_of(metrics: Metrics) -> Tensor:
    """The sums and weights of metrics, sorted by name, as one flat float64 tensor."""
    found = [metrics.metric(name) for name in sorted(metrics)]
    if not found:
        return torch.zeros(0, dtype=torch.float64)
    device = found[0].sum.device
    values = [v.to(device).reshape(-1) for each in found for v in (each.sum, each.weight)]
    return torch.cat(values)


def metrics_of(values: Tensor, like: Metrics) -> Metrics:
    """The inverse of `values_of`, for metrics of the form of `like`."""
    found: dict[str, Metric] = {}
    begin = 0
    for name in sorted(like):
        metric = like.metric(name)
        end = begin + metric.sum.numel()
        stop = end + metric.weight.numel()
        found[name] = Metric(
            values[begin:end].view(metric.sum.shape),
            values[end:stop].view(metric.weight.shape),
            metric.reading,
        )
        begin = stop
    return Metrics({name: found[name] for name in like})


class _Speaking(Protocol):
    @property
    def size(self) -> int: ...

    def payloads(self, given: bytes, what: str = ...) -> list[bytes]: ...


def gathered_metrics(world: _Speaking, own: Sequence[Metrics]) -> list[Metrics]:
    """The metrics of turns that were dealt out to the workers, in the order of the turns.

    Turn i was worker (i mod size)'s, and `own` are this worker's. The names may differ from turn to
    turn. On an accelerator this synchronizes.
    """
    if world.size == 1:
        return list(own)
    told = [orjson.loads(each) for each in world.payloads(orjson.dumps([_plain(m) for m in own]))]
    turns = max(map(len, told))
    return [_parsed(each[turn]) for turn in range(turns) for each in told if turn < len(each)]


def _plain(metrics: Metrics) -> dict[str, list[object]]:
    """Metrics as JSON values, floats as the integers of their bits: JSON has no inf and no NaN."""

    def bits(values: Tensor) -> list[int]:
        found: list[int] = values.double().reshape(-1).view(torch.int64).tolist()
        return found

    return {
        name: [each.reading, bits(each.sum), bits(each.weight), each.sum.ndim]
        for name, each in ((name, metrics.metric(name)) for name in metrics)
    }


def _parsed(given: dict[str, list[Any]]) -> Metrics:
    def tensor(values: list[int], ndim: int) -> Tensor:
        found = torch.tensor(values, dtype=torch.int64).view(torch.float64)
        return found if ndim else found.reshape(())

    return Metrics(
        {
            name: Metric(tensor(total, ndim), tensor(weight, ndim), reading)
            for name, (reading, total, weight, ndim) in given.items()
        }
    )
