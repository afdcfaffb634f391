"""How a step's time and memory grow: with params, sequence, vocabulary, micro-batches, tensors.

    python benchmarks/scaling.py [--rounds 3] [--steps 3] [--threads 1]

One dimension at a time, from a built-in decoder of 1.6 M parameters, two sequences of 128 and a
vocabulary of 4,096, AdamW, clipping, donated. Each point is a process of its own, points take
turns, and the exponent is the slope of a line through the logarithms: 1 is linear growth. The
params grow by width, and the tensors by layers of a width so small that they are little else. More
micro-batches are of one sequence each, of a batch that grows with them: time should be linear, and
memory not grow at all.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from typing import Any

import attrs
import harness
import torch
from harness import Clock, Result


@attrs.frozen
class Point:
    """What a step is made of."""

    width: int = 160
    layers: int = 4
    vocabulary: int = 4_096
    time: int = 128
    rows: int = 2
    microbatches: int = 1


DIMENSIONS: dict[str, tuple[str, list[Point]]] = {
    "params": ("width", [Point(width=width) for width in (128, 256, 512, 1024)]),
    "sequence": ("time", [Point(time=time) for time in (128, 512, 2048)]),
    "vocabulary": (
        "vocabulary",
        [Point(vocabulary=size) for size in (4_096, 16_384, 65_536, 262_144)],
    ),
    "micro-batches": ("microbatches", [Point(rows=n, microbatches=n) for n in (1, 4, 16)]),
    "tensors": (
        "layers",
        [Point(width=16, layers=layers, vocabulary=64, time=8, rows=1) for layers in (4, 16, 64)],
    ),
}


def step_of(point: Point, steps: int) -> Result:
    """Steps of `functrain.pretrain_step`; the memory is above the model's own."""
    import functrain as ft
    from functrain.models import DecoderConfig, decoder

    config = DecoderConfig(
        vocabulary=point.vocabulary, width=point.width, layers=point.layers, heads=4
    )
    model = decoder(config)
    clock = Clock()
    architecture, params, buffers = ft.split(model)
    step = ft.pretrain_step(
        architecture,
        ft.optim.adamw(1e-3, weight_decay=0.0),
        microbatches=point.microbatches,
        max_grad_norm=1.0,
        donate=True,
    )
    state = step.init(params, buffers)
    size = sum(p.numel() for p in params.values())
    del params
    generator = torch.Generator().manual_seed(1)
    losses = []
    clock.start()
    for _ in range(steps):
        ids = torch.randint(0, point.vocabulary, (point.rows, point.time), generator=generator)
        state, metrics = step(state, {"input_ids": ids, "labels": ids})
        losses.append(metrics.to_dict()["loss"])
        clock.step()
    return {**clock.report(losses), "params": size, "tensors": len(state.params)}


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The slope of a least-squares line through the logarithms."""
    x, y = ([math.log(v) for v in each] for each in (sizes, values))
    return statistics.linear_regression(x, y).slope


def measured(name: str, options: Any) -> list[Result]:
    """The medians at each point of a dimension."""
    kinds = [f"{name} {index}" for index in range(len(DIMENSIONS[name][1]))]
    arguments = ["--steps", str(options.steps)]
    results = harness.interleaved(__file__, kinds, options.rounds, arguments, options.threads)
    return [
        {
            key: statistics.median(result[key] for result in found)
            for key in ("cpu", "megabytes", "params", "tensors")
        }
        for found in results.values()
    ]


def sizes_of(name: str, points: Sequence[Point], found: Sequence[Result]) -> list[float]:
    """What a dimension is measured in."""
    if name in ("params", "tensors"):
        return [result[name] for result in found]
    return [getattr(point, DIMENSIONS[name][0]) for point in points]


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--dimensions", default=",".join(DIMENSIONS))
    options = parser.parse_args()
    if options.child is not None:
        torch.set_num_threads(options.threads)
        name, _, index = options.child.rpartition(" ")
        print(json.dumps(step_of(DIMENSIONS[name][1][int(index)], options.steps)))
        return
    every: dict[str, list[Result]] = {}
    print("| | sizes | CPU ms | exponent | MB above the model | exponent |")
    print("|---|---|---|--:|---|--:|")
    for name in options.dimensions.split(","):
        found = every[name] = measured(name, options)
        sizes = sizes_of(name, DIMENSIONS[name][1], found)
        times = [result["cpu"] * 1e3 for result in found]
        memory = [max(result["megabytes"], 1.0) for result in found]
        rows = (", ".join(f"{v:,.0f}" for v in values) for values in (sizes, times, memory))
        shown, milliseconds, megabytes = rows
        print(
            f"| {name} | {shown} | {milliseconds} | {exponent(sizes, times):.2f} | {megabytes} | "
            f"{exponent(sizes, memory):.2f} |",
            flush=True,
        )
    harness.written(options, "scaling", every)


if __name__ == "__main__":
    main()
