"""Log-probabilities of whole completions."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from functrain.objectives.base import logits_of
from functrain.objectives.batches import IGNORE_INDEX, Batch


def sequence_logps(model: Callable[..., object], batch: Batch) -> tuple[Tensor, Tensor]:
    """Per example, Σ_t log p(label_t) over its target tokens, and how many there are.

    `(float [batch], int64 [batch])`, in nats. Cross entropy without reduction gives −log p for
    each target and 0 where there is none.
    """
    logits = logits_of(model, batch)[:, :-1]
    targets = batch["labels"][:, 1:]
    losses = F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
    )
    return -losses.view(targets.shape).sum(-1), (targets != IGNORE_INDEX).sum(-1)
