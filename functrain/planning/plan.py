"""A plan: memory of a worker and time of a step, replicated and sharded, before anybody has paid.

The model, for W workers that have K micro-batches each:

- Replicated: a worker has all params, gradients and moments. Once a step the gradients are summed,
  in 2·(W−1)/W of their bytes. That begins in the last micro-batch's backward pass, two thirds of
  its computation, and is hidden behind it as far as it goes.
- Sharded: it has 1/W of each, in rows, and the params of no block whole. The params of a block are
  gathered in the forward and in the backward pass of each micro-batch, and its gradients summed to
  rows: (W−1)/W of their bytes each. Beside the computation, but for the first block of each pass,
  and the gradients of the last block and of what is in none. What is gathered is packed and laid
  out, what is summed is cut and packed: about 4 and 6 times its bytes through the memory.
- An exchange takes its bytes over the bandwidth of the slowest link, and a latency for each
  doubling of the workers. Computing takes the operations over what a worker comes to; the update,
  the bytes that it reads and writes over the traffic of the memory.

What it leaves out: waiting for the slowest worker, fragmented memory, and what the libraries take
(a CUDA context and NCCL's buffers are one or two gigabytes).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import attrs

from functrain.distributed.exchange import BUCKET, IN_FLIGHT
from functrain.errors import ConfigError
from functrain.planning.cluster import Cluster
from functrain.planning.counting import Job, Work, count, total


@attrs.frozen(kw_only=True)
class Layout:
    """One way of sharing a job: bytes of a worker by what has them, seconds of a step likewise.

    `memory`: at the moment when it is most; what is at other moments only is in none of it.
    """

    memory: Mapping[str, int]
    seconds: Mapping[str, float]
    tokens_per_second: float

    @property
    def bytes(self) -> int:
        """All of a worker's memory."""
        return sum(self.memory.values())

    @property
    def step(self) -> float:
        """Seconds of a step."""
        return sum(self.seconds.values())


@attrs.frozen(kw_only=True)
class Plan:
    """What a job comes to on a cluster, replicated and sharded."""

    job: Job
    cluster: Cluster
    work: Work
    replicated: Layout
    sharded: Layout


def plan(job: Job, cluster: Cluster, *, canonical: bool = False) -> Plan:
    """The memory and the time of a job; `canonical`: with `reduction="canonical"`.

    Raises `ConfigError` where the micro-batches cannot be shared out to the workers.
    """
    if job.microbatches % cluster.workers:
        raise ConfigError(
            f"microbatches: {job.microbatches} cannot be shared out to {cluster.workers} workers; "
            "they are those of the whole batch, so give a multiple"
        )
    work = count(job)
    return planned(job, cluster, work, canonical=canonical)


def planned(job: Job, cluster: Cluster, work: Work, *, canonical: bool = False) -> Plan:
    """The same of a job that has been counted."""
    made = []
    for sharded in (False, True):
        memory = _memory(job, cluster, work, sharded, canonical)
        seconds = _seconds(job, cluster, work, sharded)
        step = sum(seconds.values())
        speed = work.tokens * job.microbatches / step
        made.append(Layout(memory=memory, seconds=seconds, tokens_per_second=speed))
    replicated, shards = made
    return Plan(job=job, cluster=cluster, work=work, replicated=replicated, sharded=shards)


def _memory(
    job: Job, cluster: Cluster, work: Work, sharded: bool, canonical: bool
) -> dict[str, int]:
    size = cluster.workers
    parts = size if sharded else 1
    gradients = total(work.gradients, parts)
    # As a tree there are as many sums at once as branches wait, and the pair that is added.
    own = job.microbatches // size
    sets = max(1, math.floor(math.log2(own))) if canonical else 1
    found = {
        "params": total(work.params, parts),
        "moments": total(work.moments, parts),
        "average, reference": total(work.extra, parts),
        "gradients": sets * gradients,
        "casts, buffers": total(work.cast, parts) + work.buffers,
    }
    root, *blocks = work.units
    most = max(blocks, default=(0, 0))
    moments: list[dict[str, int]] = []
    if sharded and size > 1:
        # Backward through a block: it, the one before, and its gradients, which are sent and come.
        moments.append(
            {
                "activations": work.activations_sharded + work.head,
                "gathered": root[0] + work.head_weight + 2 * most[0] + most[1],
                "exchanged": 2 * most[1],
            }
        )
        # What is in no block comes last: the embedding's gradient, and the head's.
        moments.append({"gathered": root[0] + 2 * root[1], "exchanged": 2 * root[1]})
    else:
        moments.append({"activations": work.beside(own)})
        if size > 1:
            moments.append({"exchanged": min(IN_FLIGHT * BUCKET, gradients)})
    update = 0
    if not job.donate:
        update += found["params"] + found["moments"]
    if job.precision.loss_scale:
        update += gradients
    moments.append({"update": update})
    worst = max(moments, key=lambda each: sum(each.values()))
    return {**found, **worst}


def _seconds(job: Job, cluster: Cluster, work: Work, sharded: bool) -> dict[str, float]:
    size, parts = cluster.workers, cluster.workers if sharded else 1
    own = job.microbatches // size
    params, moments = total(work.params, parts), total(work.moments, parts)
    moved = 2 * (params + moments) + 2 * total(work.gradients, parts)
    found = {"computing": own * work.flops / cluster.flops, "update": moved / cluster.traffic}
    if size == 1:
        return {**found, "copies": 0.0, "exchange": 0.0}
    part = (size - 1) / size
    root, *blocks = work.units
    computed = work.flops / cluster.flops
    if not sharded:
        gradients = total(work.gradients)
        exchanges = math.ceil(gradients / BUCKET)
        sent, copied = 2 * part * gradients, 0
        alone, hidden = 0.0, 2 / 3 * computed
    else:
        gathered, summed = sum(b[0] for b in blocks), sum(b[1] for b in blocks)
        passes = own * (2 + job.reference)
        gathered = passes * gathered + (1 + job.reference * own) * root[0]
        summed = own * (root[1] + summed)
        sent, copied = part * (gathered + summed), 4 * gathered + 6 * summed
        exchanges = 1 + passes * len(blocks) + own * (len(work.units) + job.reference)
        first = max(blocks, default=(0, 0))
        alone = part * (root[0] + passes * first[0] + own * (first[1] + root[1]))
        hidden = own * computed
    seconds = sent / cluster.bandwidth + exchanges * cluster.latency * math.log2(size)
    if cluster.beside:
        seconds = max(alone / cluster.bandwidth, seconds - hidden)
    return {**found, "copies": copied / cluster.traffic, "exchange": seconds}
