"""The machine at hand as a cluster: the speed of its workers, measured in a few seconds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from functrain import memory
from functrain.architecture import split
from functrain.distributed import World
from functrain.distributed.exchange import BUCKET
from functrain.flops import flops_of
from functrain.models import DecoderConfig, decoder
from functrain.optimizers import adamw
from functrain.planning.cluster import Cluster
from functrain.precision import Precision
from functrain.stages import pretrain_step
from functrain.trees import Tensors

_NUMBERS, _ROUNDS = 1 << 24, 5


def here(world: World, precision: Precision) -> Cluster:
    """Measure a cluster of workers like those of this world; all of them must call this.

    `flops` is measured on the gradient of a two-layer decoder, with all workers computing at once;
    `traffic` on AdamW updates; `inside` and `latency` on large and small sums over the workers. For
    a single worker `inside` is its memory's traffic, and `latency` 1 µs. On a CPU, exchanges take
    time from the cores that compute, so `beside` is False.
    """
    device = world.device
    flops = _flops(world, precision)
    traffic = _traffic(world)
    inside, latency = traffic, 1e-6
    if world.size > 1:
        large = torch.zeros(BUCKET // 4, device=device)
        small = torch.zeros(1, device=device)
        rounds = torch.log2(torch.tensor(float(world.size))).item()
        with world.meeting("a measurement"):
            latency = _seconds(lambda: dist.all_reduce(small), world) / rounds
            seconds = _seconds(lambda: dist.all_reduce(large), world) - latency * rounds
        inside = 2 * (world.size - 1) / world.size * BUCKET / max(seconds, 1e-9)
    return Cluster(
        workers=world.size,
        per_node=world.size,
        memory=_memory(device, world.size),
        flops=flops,
        traffic=traffic,
        inside=inside,
        between=inside,
        latency=latency,
        beside=device.type != "cpu",
    )


def _flops(world: World, precision: Precision) -> float:
    small = world.device.type == "cpu"
    shape = DecoderConfig(vocabulary=8_000, width=768 if small else 2_304, layers=2, heads=12)
    architecture, params, buffers = split(decoder(shape).to(world.device))
    step = pretrain_step(architecture, adamw(1e-9), precision=precision)
    state = step.init(params, buffers)
    rows, time_ = (2, 128) if small else (8, 1_024)
    ids = torch.zeros(rows, time_, dtype=torch.int64, device=world.device)
    batch = {"input_ids": ids, "labels": ids}

    def gradient() -> object:
        return step.gradient(state.params, state.buffers, batch, scaler=state.scaler)

    return flops_of(step, state, batch) / _seconds(gradient, world)


def _traffic(world: World) -> float:
    params = Tensors({"numbers": torch.zeros(_NUMBERS, device=world.device)})
    grads = Tensors({"numbers": torch.ones(_NUMBERS, device=world.device)})
    optimizer: Any = adamw(1e-9)
    state = optimizer.init(params)

    def update() -> None:
        nonlocal params, state
        params, state = optimizer.update(grads, state, params, 1e-9, donate=True)

    # Params and both moments are read and written; the gradient is only read.
    return 7 * 4 * _NUMBERS / _seconds(update, world)


def _memory(device: torch.device, workers: int) -> float:
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return memory.installed() / workers


def _seconds(work: Callable[[], object], world: World) -> float:
    """The slowest worker's median over a few rounds, which all workers begin together."""
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
