"""How a step's time and memory grow: with params, sequence, vocabulary, micro-batches, tensors.

    python benchmarks/scaling.py [--rounds 3] [--steps 3] [--threads 1]

One dimension grows at a time, starting from a built-in decoder of 1.6 M parameters, two sequences
of 128 tokens and a vocabulary of 4,096; AdamW, clipping, donating. Each point is a process of its
own, points take turns, and the exponent is the slope of a line through the logarithms: 1 is linear
growth. Params grow by width; tensors by layers so narrow that they cost little else. Micro-batches
have one sequence each, so that the batch grows with them: time should be linear, and memory should
not grow at all. `--picture` draws the curves, a panel per dimension; `--json` writes all results of
all points.
"""

from __future__ import annotations

import functools
import json
import statistics
from collections.abc import Sequence
from typing import Any

import attrs
import harness
import torch
from harness import Clock, Result
from picture import Growth, growth


@attrs.frozen
class Point:
    """The sizes of a step."""

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
    """Measure steps of `functrain.pretrain_step`; memory is counted above the model's own."""
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


def measured(name: str, options: Any) -> list[list[Result]]:
    """The results of all rounds at each point of a dimension."""
    kinds = [f"{name} {index}" for index in range(len(DIMENSIONS[name][1]))]
    arguments = ["--steps", str(options.steps)]
    results = harness.interleaved(__file__, kinds, options.rounds, arguments, options.threads)
    return list(results.values())


def grown(name: str, found: Sequence[Sequence[Result]]) -> Growth:
    """The curve of a dimension: the medians at each size."""
    field, points = DIMENSIONS[name]
    sizes = (
        [rounds[0][name] for rounds in found]
        if name in ("params", "tensors")
        else [getattr(point, field) for point in points]
    )
    cpu, megabytes = (
        [statistics.median(result[key] for result in rounds) for rounds in found]
        for key in ("cpu", "megabytes")
    )
    return Growth(
        name=name,
        sizes=sizes,
        milliseconds=[seconds * 1e3 for seconds in cpu],
        megabytes=[max(each, 1.0) for each in megabytes],
    )


def reported(curve: Growth, found: Sequence[Sequence[Result]]) -> Result:
    """A dimension for the JSON: sizes, medians, exponents, and each point with its rounds."""
    points = [
        {**attrs.asdict(point), "rounds": rounds}
        for point, rounds in zip(DIMENSIONS[curve.name][1], found, strict=True)
    ]
    return {**attrs.asdict(curve), "exponents": curve.exponents, "points": points}


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--dimensions", default=",".join(DIMENSIONS))
    options = parser.parse_args()
    if options.child is not None:
        torch.set_num_threads(options.threads)
        name, _, index = options.child.rpartition(" ")
        print(json.dumps(step_of(DIMENSIONS[name][1][int(index)], options.steps)))
        return
    every: list[Growth] = []
    results: dict[str, Result] = {}
    print("| | sizes | CPU ms | exponent | MB above the model | exponent |")
    print("|---|---|---|--:|---|--:|")
    for name in options.dimensions.split(","):
        found = measured(name, options)
        curve = grown(name, found)
        every.append(curve)
        results[name] = reported(curve, found)
        shown = (curve.sizes, curve.milliseconds, curve.megabytes)
        sizes, times, memory = (", ".join(f"{v:,.0f}" for v in values) for values in shown)
        powers = curve.exponents
        print(
            f"| {name} | {sizes} | {times} | {powers['time']:.2f} | {memory} | "
            f"{powers['memory']:.2f} |",
            flush=True,
        )
    title = "How a step grows: CPU time and memory, on logarithmic axes"
    harness.written(options, title, results, functools.partial(growth, title, every))


if __name__ == "__main__":
    main()
