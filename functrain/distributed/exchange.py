"""Sums over workers: of gradients, in buckets, fast or in the order of a tree; and of metrics."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import orjson
import torch
import torch.distributed as dist
from torch import Tensor

from functrain.errors import ArchitectureError
from functrain.metrics import Metric, Metrics
from functrain.reductions import tree_sum

BUCKET = 25 << 20
"""Bytes that are exchanged at once."""


def nothing(like: Tensor) -> Tensor:
    """The gradient of a parameter that no micro-batch here has reached: what adds nothing.

    −0.0, the one number whose sum with any other has that other's bits, 0.0 among them.
    """
    return torch.full_like(like, -0.0, requires_grad=False)


def fast(grads: Sequence[Tensor], rank: int, size: int) -> None:
    """Sum over the workers, in place; in the order that the backend takes."""
    del rank, size
    pending = []
    for pieces in _buckets(grads):
        flat = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        work = dist.all_reduce(flat, async_op=True)
        pending.append((work, flat, pieces))
    for work, flat, pieces in pending:
        work.wait()
        if len(pieces) > 1:
            _put(flat, pieces)


def canonical(grads: Sequence[Tensor], rank: int, size: int) -> None:
    """Sum over the workers, in place; as a binary tree over their ranks.

    As many bytes as a ring's all-reduce: each worker gets one part of every other's gradients,
    adds them in order, and sends the sum to all.
    """
    del rank
    for pieces in _buckets(grads):
        numel = sum(piece.numel() for piece in pieces)
        part = math.ceil(numel / size)
        sent = pieces[0].new_zeros(part * size)
        torch.cat(pieces, out=sent[:numel])
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent)
        total = tree_sum(list(received.view(size, part)), torch.Tensor.add_)
        dist.all_gather_single(sent, total.contiguous())
        _put(sent, pieces)


def _put(flat: Tensor, pieces: Sequence[Tensor]) -> None:
    begin = 0
    for piece in pieces:
        piece.copy_(flat[begin : begin + piece.numel()])
        begin += piece.numel()


def _buckets(grads: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Flat pieces of the gradients, about `BUCKET` bytes together, of one dtype each time."""
    for dtype in sorted({grad.dtype for grad in grads}, key=str):
        bucket: list[Tensor] = []
        space = most = max(1, BUCKET // dtype.itemsize)
        for grad in grads:
            if grad.dtype != dtype or not grad.numel():
                continue
            for piece in torch.split(_flat(grad), most):
                if piece.numel() > space:
                    yield bucket
                    bucket, space = list[Tensor](), most
                bucket.append(piece)
                space -= piece.numel()
        if bucket:
            yield bucket


def _flat(grad: Tensor) -> Tensor:
    """All of it as one dimension, in its own memory."""
    if grad.is_contiguous():
        return grad.view(-1)
    # Dense in another order of its dimensions; the same on every worker, as the params are.
    return torch.as_strided(grad, (grad.numel(),), (1,))


OTHER_METRICS = (
    "metrics: the objective's have other names or shapes on one worker than on another; give every "
    "batch the same metrics, of weight 0 where there is nothing"
)


def refuse_moved(counts: Tensor, moved: Sequence[str]) -> None:
    """Raise where the forward writes to a buffer: `counts` of them on each worker."""
    if bool(counts.any()):
        raise ArchitectureError(
            f"buffers/{moved[0] if moved else '…'}: the forward writes to it, and each worker "
            "would keep what its own part of the batch made of it; use layers without running "
            "statistics (LayerNorm, RMSNorm, GroupNorm), or one worker"
        )


def form_of(metrics: Metrics) -> bytes:
    """The names, readings and shapes of metrics."""
    parts = [(n, metrics.metric(n).reading, metrics.metric(n).sum.numel()) for n in metrics]
    return orjson.dumps(sorted(parts))


def hashed(form: bytes) -> int:
    """63 bits of a hash."""
    return int.from_bytes(hashlib.blake2b(form, digest_size=8).digest(), "little") >> 1


def values_of(metrics: Metrics) -> Tensor:
    """Sums and weights, sorted by name: float64, flat."""
    found = [metrics.metric(name) for name in sorted(metrics)]
    if not found:
        return torch.zeros(0, dtype=torch.float64)
    device = found[0].sum.device
    values = [v.to(device).reshape(-1) for each in found for v in (each.sum, each.weight)]
    return torch.cat(values)


def metrics_of(values: Tensor, like: Metrics) -> Metrics:
    """What `values_of` made flat, as metrics of the form of `like`."""
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
    """The metrics of every worker's turns: of turn i from worker i modulo their number.

    They may have other names from turn to turn. On an accelerator this waits for it.
    """
    if world.size == 1:
        return list(own)
    told = [orjson.loads(each) for each in world.payloads(orjson.dumps([_plain(m) for m in own]))]
    turns = max(map(len, told))
    return [_parsed(each[turn]) for turn in range(turns) for each in told if turn < len(each)]


def _plain(metrics: Metrics) -> dict[str, list[object]]:
    """As JSON; floats as text, since JSON has neither infinities nor NaN."""
    return {
        name: [
            metrics.metric(name).reading,
            [value.hex() for value in metrics.metric(name).sum.reshape(-1).tolist()],
            [value.hex() for value in metrics.metric(name).weight.reshape(-1).tolist()],
            metrics.metric(name).sum.ndim,
        ]
        for name in metrics
    }


def _parsed(given: dict[str, list[Any]]) -> Metrics:
    def tensor(values: list[str], ndim: int) -> Tensor:
        found = torch.tensor([float.fromhex(value) for value in values], dtype=torch.float64)
        return found if ndim else found.reshape(())

    return Metrics(
        {
            name: Metric(tensor(total, ndim), tensor(weight, ndim), reading)
            for name, (reading, total, weight, ndim) in given.items()
        }
    )
