"""Several workers on one machine: time and memory of a step, compared with DDP's and FSDP2's loops.

    python benchmarks/distributed.py --workers 2 --rounds 9
    python benchmarks/distributed.py --workers 1 2 4 --memory

Time: every way has its own model in the same processes, and the ways take turns, one step each, in
an order drawn anew each round; a step ends when all workers have finished it. Ratios are of the
medians, with the quartiles of the ratios of each round. Memory: each way runs in processes of its
own; a worker's resident memory is measured before the model is made, after three steps (params,
moments, and gradients if they are kept), and at its peak during them. For this, freed memory is
returned to the system at once (MALLOC_MMAP_THRESHOLD_); otherwise the measurement would be of what
glibc keeps, in every way.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import harness
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import functrain as ft
from functrain.models import DecoderConfig, decoder

VOCABULARY = 8_000
SHAPES = {
    "small": DecoderConfig(vocabulary=VOCABULARY, width=256, layers=4, heads=4),
    "60M": DecoderConfig(vocabulary=VOCABULARY, width=768, layers=8, heads=12),
}
WAYS = ("DDP", "replicated", "canonical", "FSDP2", "sharded", "sharded canonical")
BESIDE = {
    "replicated": "DDP",
    "canonical": "replicated",
    "sharded": "FSDP2",
    "sharded canonical": "sharded",
}

Step = Callable[[dict[str, Tensor]], Tensor]


def batch(seed: int, rows: int, length: int) -> dict[str, Tensor]:
    """Random token ids, which are their own targets."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (rows, length), generator=generator)
    return {"input_ids": ids, "labels": ids}


def loop(shape: DecoderConfig, way: str, microbatches: int) -> Step:
    """The loop that a user of DDP or FSDP2 would write: accumulation, clipping, fused AdamW."""
    module = decoder(shape, seed=1)
    if way == "FSDP2":
        for block in module.model.layers:
            fully_shard(block)
        fully_shard(module)
        model: Any = module
    else:
        model = DistributedDataParallel(module, gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)

    def step(own: dict[str, Tensor]) -> Tensor:
        total = torch.zeros(())
        parts = list(zip(*(own[key].chunk(microbatches) for key in own), strict=True))
        for number, part in enumerate(parts):
            last = number == len(parts) - 1
            if way == "FSDP2":
                model.set_requires_gradient_sync(last)
            else:
                model.require_backward_grad_sync = last
            each = dict(zip(own, part, strict=True))
            logits = model(input_ids=each["input_ids"])[:, :-1]
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), each["labels"][:, 1:].flatten()
            )
            (loss / microbatches).backward()
            total += loss.detach() / microbatches
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return total

    return step


def ours(shape: DecoderConfig, way: str, microbatches: int, world: Any) -> Step:
    """The same with functrain, donating."""
    if way.startswith("sharded"):
        architecture, params, buffers = ft.distributed.split(lambda: decoder(shape, seed=1), world)
    else:
        architecture, params, buffers = ft.split(decoder(shape, seed=1))
    made = ft.pretrain_step(
        architecture,
        ft.optim.adamw(weight_decay=0.1),
        schedule=1e-4,
        microbatches=microbatches * world.size,
        max_grad_norm=1.0,
        donate=True,
        world=world,
        sharded=way.startswith("sharded"),
        reduction="canonical" if "canonical" in way else "fast",
    )
    state = made.init(params, buffers)
    del params

    def step(own: dict[str, Tensor]) -> Tensor:
        nonlocal state
        state, metrics = made(state, own)
        return metrics["loss"]

    return step


def make(shape: DecoderConfig, way: str, microbatches: int, world: Any) -> Step:
    """The step of one of the `WAYS`."""
    if way in ("DDP", "FSDP2"):
        return loop(shape, way, microbatches)
    return ours(shape, way, microbatches, world)


def resident() -> float:
    """The resident memory of this process, in MB."""
    return harness.resident() / 1e6


class Peak:
    """The peak of resident memory from now on, sampled every 2 ms."""

    def __init__(self) -> None:
        self._most, self._ended = resident(), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        while not self._ended.wait(0.002):
            self._most = max(self._most, resident())

    def end(self) -> float:
        """Stop sampling; returns the peak, in MB."""
        self._ended.set()
        self._thread.join()
        return self._most


def worker(options: Any) -> None:
    """One worker of a group started by the launcher; worker 0 prints the measurements."""
    torch.set_num_threads(options.threads)
    shape, ways = SHAPES[options.shape], options.ways
    with ft.distributed.world() as world:
        if not dist.is_initialized():
            os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())})
            dist.init_process_group("gloo", rank=0, world_size=1)
        own = batch(world.rank, options.rows, options.length)
        warm = torch.nn.Linear(8, 8)
        torch.optim.AdamW(warm.parameters(), fused=True)  # loads what torch imports on first use
        before = resident()
        steps = {way: make(shape, way, options.microbatches, world) for way in ways}
        harness.release()
        peak = Peak()
        check_losses({way: step(own) for way, step in steps.items()}, world)
        if not options.memory:
            peak.end()  # sampling would disturb the timing
        times: dict[str, list[float]] = {way: [] for way in ways}
        order = random.Random(0)
        for _ in range(options.rounds):
            for way in order.sample(ways, len(ways)):
                dist.barrier()
                begin = time.perf_counter()
                steps[way](own)
                dist.barrier()
                times[way].append(time.perf_counter() - begin)
        most = peak.end()
        harness.release()
        memory = {"held": resident() - before, "peak": most - before}
        if world.rank == 0:
            print(json.dumps({"times": times, "memory": memory}), flush=True)


def check_losses(own: dict[str, Tensor], world: Any) -> None:
    """Exit unless all ways have the same losses: a comparison of unequal work would be void."""
    every = world.gathered(torch.tensor([float(each) for each in own.values()]), "a check")
    losses = every.mean(0).tolist()
    if max(losses) - min(losses) > 1e-4:
        raise SystemExit(f"the losses are not the same: {dict(zip(own, losses, strict=True))}")


def free_port() -> int:
    """A port that nobody is listening on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def launched(size: int, arguments: list[str], script: str = __file__) -> Any:
    """Run a script in a group of `size` workers; returns what worker 0 has measured."""
    port = str(free_port())
    group = []
    for rank in range(size):
        named = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
        environment = {**os.environ, **{k: str(v) for k, v in named.items()}}
        environment |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
        if "--memory" in arguments:
            environment["MALLOC_MMAP_THRESHOLD_"] = str(1 << 20)
        command = [sys.executable, script, "--worker", *arguments]
        group.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    told = [process.communicate()[0] for process in group]
    if any(process.returncode for process in group):
        raise SystemExit(f"a worker has failed: {[process.returncode for process in group]}")
    return json.loads(told[0].splitlines()[-1])


def show_times(times: dict[str, list[float]], size: int) -> None:
    """Print a line for each way: seconds, and the ratio to the way that it is compared with."""
    print(f"{size} workers: seconds of a step, and over the way beside it")
    for way, own in times.items():
        line = f"  {way:<18} {statistics.median(own):7.3f}"
        other = times.get(BESIDE.get(way, ""))
        if other:
            ratios = sorted(a / b for a, b in zip(own, other, strict=True))
            low, high = harness.quartiles(ratios)
            line += f"   {statistics.median(own) / statistics.median(other):.2f}"
            line += f" ({low:.2f} to {high:.2f}) of {BESIDE[way]}"
        print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--workers", type=int, nargs="+", default=[2])
    parser.add_argument("--shape", choices=list(SHAPES), default="60M")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--rows", type=int, default=4, help="sequences of a worker")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--microbatches", type=int, default=2, help="of a worker")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory", action="store_true", help="memory instead of time")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options)
        return
    same = [f"--{n}={getattr(options, n)}" for n in ("shape", "rows", "length", "microbatches")]
    same += [f"--threads={options.threads}"]
    for size in options.workers:
        if not options.memory:
            found = launched(size, [*same, f"--rounds={options.rounds}", "--ways", *options.ways])
            show_times(found["times"], size)
            continue
        print(f"{size} workers: MB of a worker above what it had before the model")
        for way in options.ways:
            found = launched(size, [*same, "--memory", "--rounds=2", "--ways", way])["memory"]
            print(f"  {way:<18} {found['held']:7.0f} held, {found['peak']:7.0f} at the peak")


if __name__ == "__main__":
    main()
