"""A step compared with the loop that one would write by hand: same model, batches and kernels.

    python benchmarks/step.py [--rounds 30] [--threads 2] [--width 256] [--layers 4]

Both sides train the built-in decoder with fused AdamW, clipping and a schedule; at the end their
params must have the same bits, or the comparison is void. In each round both sides run, one after
the other, and the result is the median of the rounds' ratios, so that what slows the machine slows
both.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

import functrain as ft

Batch = dict[str, torch.Tensor]


def batches(count: int, examples: int, length: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 1024, (count, examples, length), generator=generator)
    return [{"input_ids": each, "labels": each} for each in ids]


def by_hand(config: ft.models.DecoderConfig) -> tuple[Callable[[Batch], None], torch.nn.Module]:
    model = ft.models.decoder(config, seed=0).train()
    params = [p for _, p in sorted(model.named_parameters())]
    optimizer = torch.optim.AdamW(params, lr=1e-3, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda count: ft.schedules.linear(1.0, total=1000, warmup=10)(count)
    )

    def step(batch: Batch) -> None:
        logits = model(batch["input_ids"])[:, :-1].flatten(0, 1)
        targets = batch["labels"][:, 1:].flatten()
        F.cross_entropy(logits, targets).backward()
        # Clipped by functrain's own norm, so that both sides can be compared bit by bit.
        grads = {str(n): p.grad for n, p in enumerate(params) if p.grad is not None}
        factor = torch.clamp(1.0 / (ft.trees.global_norm(grads) + 1e-6), max=1.0)
        torch._foreach_mul_(list(grads.values()), factor)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)

    return step, model


def ours(config: ft.models.DecoderConfig) -> tuple[Callable[[Batch], None], list[ft.TrainState]]:
    architecture, params, buffers = ft.split(ft.models.decoder(config, seed=0))
    train = ft.pretrain_step(
        architecture,
        ft.optim.adamw(),
        schedule=ft.schedules.linear(1e-3, total=1000, warmup=10),
        max_grad_norm=1.0,
        donate=True,
        head="full",  # by default such logits are equal only up to rounding
    )
    states = [train.init(params, buffers)]

    def step(batch: Batch) -> None:
        states[0], metrics = train(states[0], batch)
        del metrics

    return step, states


def timed(step: Callable[[Batch], None], round_of: list[Batch]) -> float:
    begun = time.perf_counter()
    for batch in round_of:
        step(batch)
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("rounds", 30), ("threads", 2), ("width", 256), ("layers", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error("--rounds: at least 2, for quartiles")
    torch.set_num_threads(options.threads)
    config = ft.models.DecoderConfig(
        vocabulary=1024, width=options.width, layers=options.layers, heads=4
    )
    hand, model = by_hand(config)
    step, states = ours(config)
    data = batches(2, 8, 128)
    for each in (hand, step):
        timed(each, data)
    ratios, seconds = [], []
    for number in range(options.rounds):
        sides = [("hand", hand), ("ours", step)][:: 1 if number % 2 else -1]
        took = {name: timed(each, data) for name, each in sides}
        ratios.append(took["ours"] / took["hand"])
        seconds.append(took["hand"] / len(data))
    trained = dict(model.named_parameters())
    same = all(torch.equal(trained[n], p) for n, p in states[0].params.items())
    quarters = statistics.quantiles(ratios, n=4)
    print(f"params {sum(p.numel() for p in states[0].params.values()):,}, same bits: {same}")
    print(f"by hand {statistics.median(seconds) * 1e3:.1f} ms a step")
    print(f"ours / by hand {quarters[1]:.3f} (quartiles {quarters[0]:.3f} to {quarters[2]:.3f})")
    if not same:
        raise SystemExit("the two sides did not do the same work")


if __name__ == "__main__":
    main()
