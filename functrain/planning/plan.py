"""A plan: memory per worker and time per step, replicated and sharded, before anyone has paid.

The model, for W workers with K micro-batches each:

- Replicated: a worker has all params, gradients and moments. Once per step the gradients are
  summed, which moves 2·(W−1)/W of their bytes. The sums overlap with the last micro-batch's
  backward pass, two thirds of its computation, and are hidden behind it as far as it lasts.
- Sharded: a worker has 1/W of each, in rows, and whole those params that belong to no block. A
  block's params are gathered in the forward and the backward pass of each micro-batch, and its
  gradients are summed to rows: each moves (W−1)/W of their bytes. This overlaps with the
  computation, except for the first block of each pass, and for the gradients of the last block and
  of the params in no block. Packing and unpacking move about 4 times the bytes gathered, and 6
  times the bytes summed, through memory.
- An exchange takes its bytes divided by the bandwidth of the slowest link, plus a latency per
  doubling of the workers. Computing takes the operations divided by the rate that a worker
  achieves; the update, the bytes that it reads and writes divided by the memory traffic.

The model leaves out waiting for the slowest worker, memory fragmentation, and what the libraries
take (a CUDA context and NCCL's buffers are one or two gigabytes).
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
    """One way of sharing a job: a worker's bytes by their purpose, and a step's seconds likewise.

    `memory` is at its peak; what exists only at other moments is not in it.
    """

    memory: Mapping[str, int]
    seconds: Mapping[str, float]
    tokens_per_second: float

    @property
    def bytes(self) -> int:
        """The total of a worker's memory."""
        return sum(self.memory.values())

    @property
    def step(self) -> float:
        """The total seconds of a step."""
        return sum(self.seconds.values())


@attrs.frozen(kw_only=True)
class Plan:
    """What a job takes on a cluster, replicated and sharded."""

    job: Job
    cluster: Cluster
    work: Work
    replicated: Layout
    sharded: Layout


def plan(job: Job, cluster: Cluster, *, canonical: bool = False) -> Plan:
    """Predict the memory and time of a job; `canonical`: with `reduction="canonical"`.

    Raises `ConfigError` if the micro-batches cannot be divided equally among the workers.
    """
    if job.microbatches % cluster.workers:
        raise ConfigError(
            f"microbatches: {job.microbatches} cannot be shared out to {cluster.workers} workers; "
            "they are those of the whole batch, so give a multiple"
        )
    work = count(job)
    return planned(job, cluster, work, canonical=canonical)


def planned(job: Job, cluster: Cluster, work: Work, *, canonical: bool = False) -> Plan:
    """`plan`, for a job that has been counted already."""
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
    # As a tree, several sums exist at once: the waiting branches, and the pair being added.
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
        # Backward through a block: its params, those of the block before, and its gradients, whole
        # and in the buffers that send and receive them.
        moments.append(
            {
                "activations": work.activations_sharded + work.head,
                "gathered": root[0] + work.head_weight + 2 * most[0] + most[1],
                "exchanged": 2 * most[1],
            }
        )
        # Params in no block come last: the gradients of the embedding and of the head.
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
