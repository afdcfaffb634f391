"""Stages that take turns on one state: language modelling in some steps, preferences in others.

Two steps with the same optimizer and precision accept each other's states, so a loop may call
either at any time. Run it with `python examples/mixed_stages.py`.
"""

import torch

import functrain as ft

Sequences = dict[str, torch.Tensor]


def sequences(rows: list[str], prompt: int = 0) -> Sequences:
    """Bytes, padded to the longest row; the first `prompt` bytes are not targets."""
    time = max(map(len, rows))
    ids = torch.tensor([list(row.encode().ljust(time, b"\0")) for row in rows])
    labels = ids.clone()
    for row, text in enumerate(rows):
        labels[row, len(text) :] = -100
        labels[row, :prompt] = -100
    return {"input_ids": ids, "labels": labels}


PROMPT = "colour of "
CHOSEN = ["grass: green", "the sky: blue", "snow: white", "coal: black"]
REJECTED = ["grass: loud", "the sky: sour", "snow: seven", "coal: polite"]
TEXT = sequences([PROMPT + text for text in CHOSEN + REJECTED])
PAIRS = {
    "chosen": sequences([PROMPT + text for text in CHOSEN], len(PROMPT)),
    "rejected": sequences([PROMPT + text for text in REJECTED], len(PROMPT)),
}


def main() -> None:
    config = ft.models.DecoderConfig(vocabulary=128, width=64, layers=2, heads=4, kv_heads=2)
    architecture, params, buffers = ft.split(ft.models.decoder(config, seed=0))
    optimizer = ft.optim.adamw(1e-3)
    reading = ft.pretrain_step(architecture, optimizer)
    state = reading.init(params, buffers, seed=0)
    for _ in range(50):
        state, metrics = reading(state, TEXT)
    print(f"after reading      loss {metrics['loss']:.3f}")

    # The reference is a value: the params as they are now.
    preferring = ft.dpo_step(architecture, optimizer, reference=state.params, beta=0.1)
    for _ in range(10):
        state, metrics = reading(state, TEXT)
        for _ in range(3):
            state, _ = preferring(state, PAIRS)
    print(f"after taking turns loss {metrics['loss']:.3f}", end="  ")
    preferences = ft.evaluate(preferring, state, [PAIRS])
    print(f"margin {preferences['eval_rewards/margins']:.2f}", end="  ")
    print(f"accuracy {preferences['eval_rewards/accuracies']:.2f}")


if __name__ == "__main__":
    main()
