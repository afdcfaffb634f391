"""A training loop of your own in forty lines: a step, taken apart and put together again.

`python examples/loop.py` trains the built-in decoder on a sentence, with gradients, clipping and
update in plain sight; its last lines show that `pretrain_step` gives the same bits.
"""

import torch

import functrain as ft
from functrain.objectives import LanguageModeling

TEXT = b"a state goes in with a batch, and a new state comes out with metrics. " * 30


def batches(count: int) -> list[dict[str, torch.Tensor]]:
    data = torch.frombuffer(bytearray(TEXT), dtype=torch.uint8).long()
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(0, len(data) - 64, (count, 8), generator=generator)
    rows = [torch.stack([data[s : s + 64] for s in group.tolist()]) for group in starts]
    return [{"input_ids": ids, "labels": ids} for ids in rows]


def main() -> None:
    config = ft.models.DecoderConfig(vocabulary=256, width=64, layers=2, heads=4, kv_heads=2)
    architecture, params, buffers = ft.split(ft.models.decoder(config, seed=0))
    gradient = ft.accumulate(ft.value_and_grad(LanguageModeling(), architecture), microbatches=2)
    optimizer = ft.optim.adamw(weight_decay=0.1)
    schedule = ft.schedules.cosine(3e-3, total=60, warmup=5)

    start, moments = params, optimizer.init(params)
    for count, batch in enumerate(batches(60)):
        result = gradient(params, buffers, batch, key=count)
        grads, norm = ft.clip_by_global_norm(result.grads, 1.0)
        params, moments = optimizer.update(grads, moments, params, schedule(count))
        if count % 10 == 9:
            print(f"step {count + 1:3}  loss {result.metrics['loss']:.3f}  norm {norm:.2f}")

    step = ft.pretrain_step(
        architecture, optimizer, schedule=schedule, microbatches=2, max_grad_norm=1.0
    )
    state = step.init(start, buffers, seed=0)
    for batch in batches(60):
        state, _ = step(state, batch)
    same = all(torch.equal(params[name], state.params[name]) for name in params)
    print(f"the ready-made step gives the same bits: {same}")


if __name__ == "__main__":
    main()
