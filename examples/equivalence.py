"""The laws on a model of your own: any `nn.Module` that maps `input_ids` to logits.

`python examples/equivalence.py` checks that a step is pure, that a donated step gives the same
bits, that accumulation does not change the gradient, and that a run resumes to the bit. With
BatchNorm, accumulation fails on purpose: it lets examples see each other, so it matters how a batch
is split.
"""

import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

import functrain as ft
from functrain import testing


class Yours(nn.Module):
    """A recurrent model with dropout, which knows nothing of functrain."""

    def __init__(self, norm: bool = False, dropout: float = 0.1) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 32)
        self.norm = nn.BatchNorm1d(32) if norm else nn.Identity()
        self.rnn = nn.GRU(32, 32, batch_first=True)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(32, 50)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.norm(self.embedding(input_ids).transpose(1, 2)).transpose(1, 2)
        outputs: Tensor = self.head(self.dropout(self.rnn(hidden)[0]))
        return outputs


class Random:
    """A source whose samples are a function of their position."""

    batch_size = 8

    def __len__(self) -> int:
        return 1000

    def at(self, position: int, n: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(position)
        ids = torch.randint(0, 50, (n, 12), generator=generator)
        return {"input_ids": ids, "labels": ids}


def made(module: nn.Module) -> tuple[ft.Step, ft.TrainState]:
    architecture, params, buffers = ft.split(module.double())
    step = ft.pretrain_step(architecture, ft.optim.adamw(1e-3), max_grad_norm=1.0)
    return step, step.init(params, buffers, seed=0)


def main() -> None:
    batch = Random().at(0, 8)
    step, state = made(Yours())
    testing.assert_pure(step, state, batch)
    print("pure:         nothing that was passed in has changed")
    testing.assert_donation_equal(step, state, batch)
    print("donation:     the same bits in the old state's memory")
    with tempfile.TemporaryDirectory() as directory:
        testing.assert_resumable(step, state, Random(), 4, Path(directory))
    print("resume:       saved and loaded at every step, the same bits at the end")
    step, state = made(Yours(dropout=0.0))
    testing.assert_accumulation_invariant(step, state, batch, parts=[3, 1, 4])
    print("accumulation: 3 + 1 + 4 examples have the gradient of 8")
    step, state = made(Yours(norm=True, dropout=0.0))
    try:
        testing.assert_accumulation_invariant(step, state, batch, parts=[3, 1, 4])
    except AssertionError as error:
        print(f"with BatchNorm it has not: {error}")
    else:
        raise SystemExit("BatchNorm couples the examples, and the law did not notice")


if __name__ == "__main__":
    main()
