"""One script for one process and for several: the bits of the run do not depend on their number.

`python examples/torchrun.py` and `torchrun --nproc-per-node 2 examples/torchrun.py` end with the
same fingerprint. Each worker reads its own part of a batch of 16 samples, which is summed in 8
micro-batches, so 1, 2, 4 or 8 workers can share it.
"""

import functrain as ft

TEXT = "a state goes in with a batch, and a new state comes out with metrics. " * 30


def main() -> None:
    with ft.distributed.world() as world:
        config = ft.models.DecoderConfig(
            vocabulary=ft.data.ByteTokenizer().vocabulary, width=32, layers=2, heads=4, dropout=0.1
        )
        architecture, params, buffers = ft.split(ft.models.decoder(config, seed=0))
        step = ft.pretrain_step(
            architecture,
            ft.optim.adamw(weight_decay=0.1),
            schedule=ft.schedules.cosine(3e-3, total=20, warmup=4),
            max_grad_norm=1.0,
            microbatches=8,
            reduction="canonical",
            world=world,
        )
        source = ft.data.text([TEXT], ft.data.ByteTokenizer(), time=32, batch_size=16)
        state = step.init(params, buffers, seed=0)
        run = ft.train(step, state, source, steps=20)
        for state, metrics in run:
            if world.speaks and state.step % 5 == 0:
                print(f"step {state.step:2}  loss {metrics['loss']:.4f}")
        if world.speaks:
            print(f"workers {world.size}, fingerprint {ft.fingerprint(state)[:16]}")


if __name__ == "__main__":
    main()
