"""What a step costs besides its kernels, on a model with hardly any arithmetic and many tensors.

    pip install -e '.[dev]'
    python benchmarks/overhead.py [--rounds 300] [--microbatches 1]

A hand-written loop (fused AdamW, clipping, the loss read at each step) and a donating
`functrain.pretrain_step` do the same work, from the same weights to the same losses, taking turns
step by step in one process. The extra cost of a functional step is the difference of the first
deciles of both: fast steps are the least disturbed by whatever else the machine does. A line fitted
to it over the number of tensors gives the cost per step, and per tensor.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import harness
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import functrain as ft

# The learning rate is so small that rounding differences do not grow.
RATE, CLIP, WIDTH, VOCABULARY, ROWS, TIME = 1e-6, 1.0, 8, 16, 4, 8
COUNTS = (8, 32, 128, 512)


class Light(nn.Module):
    """A model of `count` small tensors: alternately vectors and matrices, as in layers."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.scales = nn.ParameterList(
            nn.Parameter(torch.ones(WIDTH) if at % 2 else torch.eye(WIDTH))
            for at in range(count - 2)
        )
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.embedding(input_ids)
        for scale in self.scales:
            hidden = hidden * scale if scale.ndim == 1 else hidden @ scale
        logits: Tensor = self.head(hidden)
        return logits


def by_hand(count: int, ids: Tensor, microbatches: int) -> Callable[[], float]:
    """The step of an ordinary loop."""
    torch.manual_seed(0)
    model = Light(count)
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.0, fused=True)

    def step() -> float:
        total = torch.zeros(())
        for each in ids.chunk(microbatches):
            logits = model(each)[:, :-1].flatten(0, 1)
            loss = F.cross_entropy(logits, each[:, 1:].flatten()) / microbatches
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(total)

    return step


def by_functrain(count: int, ids: Tensor, microbatches: int) -> Callable[[], float]:
    """The step of functrain."""
    torch.manual_seed(0)
    architecture, params, buffers = ft.split(Light(count))
    made = ft.pretrain_step(
        architecture,
        ft.optim.adamw(RATE, weight_decay=0.0),
        microbatches=microbatches,
        max_grad_norm=CLIP,
        donate=True,
    )
    states = [made.init(params, buffers)]
    batch = {"input_ids": ids, "labels": ids}

    def step() -> float:
        state, metrics = made(states.pop(), batch)
        states.append(state)
        return float(metrics["loss"])

    return step


def measured(count: int, rounds: int, microbatches: int) -> tuple[float, float]:
    """Milliseconds of a step by hand, and of functrain's."""
    ids = torch.randint(0, VOCABULARY, (ROWS, TIME), generator=torch.Generator().manual_seed(1))
    steps = [make(count, ids, microbatches) for make in (by_hand, by_functrain)]
    times: list[list[float]] = [[], []]
    for number in range(rounds + 10):
        losses = []
        for step, found in zip(steps, times, strict=True):
            since = time.perf_counter()
            losses.append(step())
            if number >= 10:
                found.append((time.perf_counter() - since) * 1e3)
        if abs(losses[0] - losses[1]) > 1e-4:
            raise SystemExit(f"step {number}: the losses are not the same: {losses}")
    hand, ours = (statistics.quantiles(found, n=10)[0] for found in times)
    return hand, ours


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--microbatches", type=int, default=1)
    parser.add_argument("--json", type=Path, default=None, help="write the results here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [(n, *measured(n, options.rounds, options.microbatches)) for n in COUNTS]
    print("| tensors | by hand, ms | functrain, ms | more, ms |\n|--:|--:|--:|--:|")
    for count, hand, ours in rows:
        print(f"| {count} | {hand:.3f} | {ours:.3f} | {ours - hand:+.3f} |")
    more = [ours - hand for _, hand, ours in rows]
    slope, intercept = statistics.linear_regression(COUNTS, more)
    print(f"\n{intercept:.2f} ms and {slope * 1e3:.1f} µs a tensor")
    if options.json is not None:
        found = {"machine": harness.machine(), "rows": rows, "ms": intercept, "per_tensor": slope}
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
