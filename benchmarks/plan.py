"""A plan compared with what workers take: `functrain.planning` against resident memory and clocks.

    python benchmarks/plan.py --workers 1 2 4 [--shape 60M] [--rounds 5]

First the workers of each group measure the machine themselves (`functrain.planning.here`, which
`functrain plan --device here` uses); then come the donating steps of `benchmarks/distributed.py`,
in the same shapes. Memory is peak resident memory above what a worker had before its model.
"""

from __future__ import annotations

import argparse
import json
import statistics

import attrs
import torch
from distributed import SHAPES, launched

import functrain as ft
from functrain.models import bare, decoder

WAYS = {"replicated": (False, False), "canonical": (False, True)}
WAYS |= {"sharded": (True, False), "sharded canonical": (True, True)}


def worker() -> None:
    """One worker of a group; worker 0 prints this machine as a cluster."""
    torch.set_num_threads(1)
    with ft.distributed.world() as world:
        found = ft.planning.here(world, ft.precision.POLICIES["fp32"])
        if world.rank == 0:
            print(json.dumps(attrs.asdict(found)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--shape", choices=list(SHAPES), default="60M")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=4, help="sequences of a worker")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--microbatches", type=int, default=2, help="of a worker")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker()
        return
    architecture, params, buffers = bare(lambda: decoder(SHAPES[options.shape]))
    print("| workers | | memory: planned, taken, MB | | seconds: planned, taken | |")
    print("|--:|---|--:|--:|--:|--:|")
    for size in options.workers:
        cluster = ft.planning.Cluster(**launched(size, [], __file__))
        job = ft.planning.Job(
            architecture=architecture,
            params=params,
            buffers=buffers,
            optimizer=ft.optim.adamw(weight_decay=0.1),
            rows=options.rows * size,
            time=options.length,
            microbatches=options.microbatches * size,
        )
        work = ft.planning.count(job)
        same = [f"--{n}={getattr(options, n)}" for n in ("shape", "rows", "length", "microbatches")]
        for way, (sharded, canonical) in WAYS.items():
            if sharded and size == 1:
                continue
            plan = ft.planning.planned(job, cluster, work, canonical=canonical)
            layout = plan.sharded if sharded else plan.replicated
            once = [*same, "--ways", way]
            memory = launched(size, [*once, "--memory", "--rounds=2"])["memory"]["peak"]
            times = launched(size, [*once, f"--rounds={options.rounds}"])["times"][way]
            taken, planned = statistics.median(times), layout.bytes / 1e6
            print(
                f"| {size} | {way} | {planned:,.0f}, {memory:,.0f} | {planned / memory:.2f} | "
                f"{layout.step:.3f}, {taken:.3f} | {layout.step / taken:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
