"""Log-probabilities of whole completions, and what else their logits say."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from functrain import metrics as m
from functrain.metrics import Metrics
from functrain.objectives.base import logits_of
from functrain.objectives.batches import IGNORE_INDEX, Batch


def sequence_logps(model: Callable[..., object], batch: Batch) -> tuple[Tensor, Tensor]:
    """Per example, Σ_t log p(label_t) over its target tokens, and how many there are.

    `(float [batch], int64 [batch])`, in nats.
    """
    return completion_logps(logits_of(model, batch), batch["labels"])


def completion_logps(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """`sequence_logps` of logits [batch, time, vocabulary] and labels [batch, time].

    Cross entropy without reduction gives −log p for each target and 0 where there is none.
    """
    logits, targets = logits[:, :-1], labels[:, 1:]
    losses = F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
    )
    return -losses.view(targets.shape).sum(-1), (targets != IGNORE_INDEX).sum(-1)


@torch.no_grad()
def token_metrics(logits: Tensor, labels: Tensor) -> Metrics:
    """Metrics over completion tokens of pairs stacked as chosen, then rejected.

    `entropy` (nats) over both; `mean_token_accuracy` over the chosen; `logits/chosen` and
    `logits/rejected`, the mean logit. Masked, not indexed: indexing would wait for an accelerator.
    """
    logits, targets = logits[:, :-1], labels[:, 1:]
    mask = targets != IGNORE_INDEX
    entropy = torch.special.entr(logits.softmax(-1)).sum(-1)
    correct = (logits.argmax(-1) == targets).chunk(2)[0]
    level_chosen, level_rejected = torch.where(mask, logits.mean(-1), 0.0).chunk(2)
    chosen, rejected = (side.sum() for side in mask.chunk(2))
    return Metrics(
        {
            "entropy": m.mean(torch.where(mask, entropy, 0.0).sum(), chosen + rejected),
            "mean_token_accuracy": m.mean(correct.sum(), chosen),
            "logits/chosen": m.mean(level_chosen.sum(), chosen),
            "logits/rejected": m.mean(level_rejected.sum(), rejected),
            "num_tokens": m.total(chosen + rejected),
        }
    )
