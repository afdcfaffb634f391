"""The machine at hand as a cluster: what its workers come to, measured in a few seconds."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from functrain.distributed import World
from functrain.distributed.exchange import BUCKET
from functrain.optimizers import adamw
from functrain.planning.cluster import Cluster
from functrain.precision import Precision
from functrain.trees import Tensors

_WIDTH, _NUMBERS, _ROUNDS = 1024, 1 << 24, 5


def here(world: World, precision: Precision, *, workers: int | None = None) -> Cluster:
    """A cluster of workers like those of this world; all of them must call this.

    `flops` of square matrix products of 1,024, all workers computing at once; `traffic` of updates
    by AdamW; `inside` and `latency` of sums over the workers, large and small, of one worker alone
    those of its memory. `workers`: how many are planned for; those of this world by default.
    """
    device = world.device
    dtype = precision.cast or precision.autocast or torch.float32
    square = torch.randn(_WIDTH, _WIDTH, device=device).to(dtype)
    flops = 2 * _WIDTH**3 / _seconds(lambda: torch.mm(square, square), world)
    traffic = _traffic(world)
    inside, latency = traffic, 1e-6
    if world.size > 1:
        large = torch.zeros(BUCKET // 4, device=device)
        small = torch.zeros(1, device=device)
        rounds = torch.log2(torch.tensor(float(world.size))).item()
        latency = _seconds(lambda: dist.all_reduce(small), world) / rounds
        seconds = _seconds(lambda: dist.all_reduce(large), world) - latency * rounds
        inside = 2 * (world.size - 1) / world.size * BUCKET / max(seconds, 1e-9)
    return Cluster(
        workers=workers or world.size,
        per_node=workers or world.size,
        memory=_memory(device, world.size),
        flops=flops,
        traffic=traffic,
        inside=inside,
        between=inside,
        latency=latency,
    )


def _traffic(world: World) -> float:
    params = Tensors({"numbers": torch.zeros(_NUMBERS, device=world.device)})
    grads = Tensors({"numbers": torch.ones(_NUMBERS, device=world.device)})
    optimizer: Any = adamw(1e-9)
    state = optimizer.init(params)

    def update() -> None:
        nonlocal params, state
        params, state = optimizer.update(grads, state, params, 1e-9, donate=True)

    # Params and both moments are read and written, the gradient is read.
    return 7 * 4 * _NUMBERS / _seconds(update, world)


def _memory(device: torch.device, workers: int) -> float:
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / workers


def _seconds(work: Callable[[], object], world: World) -> float:
    """The median of a few rounds that all workers begin together; of the slowest worker."""
    found = []
    for _ in range(_ROUNDS + 1):
        world.any(False)
        begin = time.perf_counter()
        work()
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)
        found.append(time.perf_counter() - begin)
    own = torch.tensor([statistics.median(found[1:])], dtype=torch.float64)
    return float(world.gathered(own, "a measurement").max())
