"""Next-token cross entropy: the objective of pretraining and of supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import attrs
import torch.nn.functional as F
from torch import Tensor, nn

from functrain import metrics as m
from functrain.architecture import Mode
from functrain.metrics import Metrics
from functrain.objectives.base import logits_of
from functrain.objectives.batches import (
    IGNORE_INDEX,
    Batch,
    check_packed,
    check_sequences,
    check_targets,
    count_padding,
    count_targets,
)
from functrain.objectives.cross_entropy import summed_cross_entropy
from functrain.objectives.logprobs import HeadMode, head_mode, hidden_rows
from functrain.objectives.modes import are_modes
from functrain.objectives.packed import check_separated
from functrain.objectives.support import check_causal


@attrs.frozen(kw_only=True)
class LanguageModeling:
    """The sum over target tokens of −log p(token | tokens before it), in nats.

    `labels` are aligned with `input_ids`; the shift is inside: position t predicts the label at
    t + 1. A label of −100 is no target, and nothing else says so: an `attention_mask` of 0 leaves a
    label what it is, and the first token after padding on the left is predicted from padding unless
    its label is −100. The weight is the number of target tokens. Pretraining and SFT differ only in
    which labels the data leaves. `head`: `auto` makes large logits a few rows at a time, `full`
    never does; the results are the same to rounding.

    A batch without `attention_mask` whose `position_ids` restart within rows is packed: each
    document is predicted as if it were alone. A model whose documents see each other is refused.
    """

    name: str = "pretrain"
    mode: Mode = "train"
    head: HeadMode = attrs.field(default="auto", validator=head_mode)
    batch_coupled: bool = attrs.field(default=False, init=False)

    @property
    def direct(self) -> bool:
        """False with `head="full"`, which gives the bits of an ordinary loop."""
        return self.head == "auto"

    def check(self, batch: Batch, vocabulary: int | None) -> None:
        """Raise `BatchError` unless the batch has well-formed input_ids and labels.

        In a packed batch the first label of each document must be −100.
        """
        check_sequences(batch, vocabulary)
        check_packed(batch)

    def weight(self, batch: Batch) -> Tensor:
        """The number of target tokens; int64, 0-d."""
        return count_targets(batch)

    def check_weight(self, weight: Tensor) -> None:
        """Raise `BatchError` for a logical batch without a target token."""
        check_targets(weight, "labels")

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Metrics]:
        """The summed cross entropy, with loss, perplexity, accuracy and the number of targets.

        `mean_token_accuracy` is the fraction of targets whose logit is the largest; of equal ones
        the first is taken, as by `argmax`, however the logits are made. `padding` is the fraction
        of tokens that is padding. Raises `ArchitectureError` where documents of a packed batch
        would see each other.
        """
        return self.summed(model, batch, model)

    def summed(
        self, model: nn.Module, batch: Batch, call: Callable[..., object]
    ) -> tuple[Tensor, Metrics]:
        """As `__call__`, with `call` in place of the model's own forward."""
        check_causal(model)
        check_separated(model, batch)
        total, correct = _summed(model, batch, self.head, call)
        loss = m.mean(total, count_targets(batch))
        return total, Metrics(
            {
                "loss": loss,
                "perplexity": m.exponential(loss.sum, loss.weight),
                "mean_token_accuracy": m.mean(correct, loss.weight),
                "num_tokens": m.total(loss.weight),
                "padding": m.mean(*count_padding(batch)),
            }
        )

    def kept(self) -> Mapping[str, Tensor] | None:
        """None: the loss needs only the batch and the params."""
        return None


def _summed(
    model: nn.Module, batch: Batch, head: HeadMode, call: Callable[..., object]
) -> tuple[Tensor, Tensor]:
    """The summed cross entropy, and how many targets are the mode."""
    rows = hidden_rows(model, batch, call=call, head=head)
    if rows is not None:
        return summed_cross_entropy(rows.hidden, rows.targets, rows.projection)
    logits = logits_of(call, batch)[:, :-1].flatten(0, 1)
    targets = batch["labels"][:, 1:].flatten()
    total = F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")
    column = targets.unsqueeze(1)
    valid = column != IGNORE_INDEX
    modes = are_modes(logits.detach(), column.clamp(min=0))
    return total, (modes & valid).sum()
