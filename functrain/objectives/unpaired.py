"""Preference optimisation without pairs: KTO, on completions that are desirable or not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import attrs
import torch
from torch import Tensor, nn

from functrain import metrics as m
from functrain.architecture import Mode
from functrain.checks import boolean, positive
from functrain.errors import BatchError
from functrain.metrics import Metrics
from functrain.objectives.batches import Batch, count_padding
from functrain.objectives.logprobs import HeadMode, head_mode, token_scores
from functrain.objectives.options import own_tensors
from functrain.objectives.pairs import check_keys, check_reference_logps, check_sides
from functrain.objectives.reference import reference_scores
from functrain.trees import Tensors

UNPAIRED = ("completion", "mismatched")


def check_completed(batch: Batch, vocabulary: int | None) -> None:
    """Raise `BatchError` unless both sides are well formed and each example has its completion."""
    check_keys(batch, UNPAIRED, "desirable")
    check_sides(batch, UNPAIRED, vocabulary, "an unpaired batch")


@attrs.frozen(kw_only=True, eq=False)
class UnpairedOptimization:
    """KTO (2402.01306): the sum over examples; the weight is their number.

    An example with Δ = log π(y|x) − log ref(y|x) costs λ_D·(1 − σ(β(Δ − z₀))) if it is desirable,
    and λ_U·(1 − σ(β(z₀ − Δ))) if not. z₀ = max(0, mean Δ of prompts with completions of other
    examples) estimates how far the policy is from the reference; no gradient flows through it. It
    is a mean over the whole logical batch, so the loss is batch-coupled, and with several
    micro-batches the mismatched completions are scored first.

    A batch is `{"completion": …, "mismatched": …, "desirable": bool [examples]}`, the sides as
    sequences with labels (`functrain.data.unpaired` makes them), and optionally `reference_logps`
    of both sides. Raises `ConfigError` for options of a wrong type or range.
    """

    reference: Tensors | None = attrs.field(
        default=None, converter=attrs.converters.optional(own_tensors)
    )
    beta: float = attrs.field(default=0.1, validator=positive)
    desirable_weight: float = attrs.field(default=1.0, validator=positive)
    undesirable_weight: float = attrs.field(default=1.0, validator=positive)
    dropout: bool = attrs.field(default=False, validator=boolean)
    head: HeadMode = attrs.field(default="auto", validator=head_mode)
    name: str = "kto"
    batch_coupled: bool = attrs.field(default=True, init=False)

    @property
    def direct(self) -> bool:
        """False with `head="full"`, which gives the bits of an ordinary loop."""
        return self.head == "auto"

    @property
    def mode(self) -> Mode:
        """Eval unless dropout is asked for."""
        return "train" if self.dropout else "eval"

    def check(self, batch: Batch, vocabulary: int | None) -> None:
        """Raise `BatchError` unless both sides are well formed, and each example has its label."""
        if isinstance(batch, Mapping) and "completion" not in batch and "chosen" in batch:
            raise BatchError(
                "chosen: a batch of pairs, and KTO is for completions without a pair; give it to "
                "dpo_step, or make it with functrain.data.unpaired, which takes pairs too"
            )
        check_completed(batch, vocabulary)
        examples = batch["completion"]["input_ids"].shape[0]
        desirable = batch.get("desirable")
        if not isinstance(desirable, Tensor) or desirable.dtype != torch.bool:
            raise BatchError(f"desirable: expected a bool tensor of shape [{examples}]")
        if tuple(desirable.shape) != (examples,):
            raise BatchError(f"desirable: shape {list(desirable.shape)}, expected [{examples}]")
        if "reference_logps" in batch:
            check_reference_logps(batch, UNPAIRED)
        elif self.reference is None:
            raise BatchError(
                "reference_logps: missing, and the step has no reference; give "
                "kto_step(..., reference=params), or batches with their reference log-probs"
            )

    def weight(self, batch: Batch) -> Tensor:
        """The number of examples; int64, 0-d."""
        ids = batch["completion"]["input_ids"]
        # A fill, where `torch.tensor` would copy from the host and wait.
        return torch.full((), ids.shape[0], dtype=torch.int64, device=ids.device)

    def check_weight(self, weight: Tensor) -> None:
        """Nothing more to check: an example without completion tokens has been refused."""

    @torch.no_grad()
    def observe(self, model: nn.Module, batch: Batch) -> Tensor:
        """Δ of the mismatched completions of a micro-batch: float [examples]."""
        policy, reference, _ = self._sums(model, batch, "mismatched")
        return policy - reference

    def couple(self, observed: Sequence[Tensor]) -> list[Tensor]:
        """z₀ of the whole batch, the same for each micro-batch: 0-d."""
        divergence = torch.cat(list(observed)).mean().clamp(min=0)
        return [divergence for _ in observed]

    def __call__(
        self, model: nn.Module, batch: Batch, coupling: Tensor | None = None
    ) -> tuple[Tensor, Metrics]:
        """The summed loss, with rewards and log-probs of desirable (chosen) and other examples."""
        if coupling is None:
            (coupling,) = self.couple([self.observe(model, batch)])
        policy, reference, tokens = self._sums(model, batch, "completion")
        ratio, desirable = policy - reference, batch["desirable"]
        gain = self.beta * (ratio - coupling)
        # 1 − σ(x) is σ(−x), without the cancellation.
        total = torch.where(
            desirable,
            self.desirable_weight * (-gain).sigmoid(),
            self.undesirable_weight * gain.sigmoid(),
        ).sum()
        metrics = self._metrics(total, policy, ratio, desirable, coupling, tokens)
        counts = [count_padding(batch[side]) for side in UNPAIRED]
        padding, made = (sum(each) for each in zip(*counts, strict=True))
        return total, metrics | Metrics({"padding": m.mean(padding, made)})

    def _sums(self, model: nn.Module, batch: Batch, side: str) -> tuple[Tensor, Tensor, Tensor]:
        scores = token_scores(model, batch[side], head=self.head, detailed=False)
        if "reference_logps" in batch:
            reference = batch["reference_logps"][side].to(scores.logps.dtype)
            if reference.ndim == 2:  # prompts and padding may have been scored too
                reference = torch.where(scores.mask, reference, 0.0).sum(-1)
        else:
            assert self.reference is not None  # `check` has refused the batch otherwise
            reference = reference_scores(model, self.reference, batch[side], head=self.head).sums
        return scores.sums, reference, scores.lengths.sum()

    def _metrics(
        self,
        total: Tensor,
        policy: Tensor,
        ratio: Tensor,
        desirable: Tensor,
        divergence: Tensor,
        tokens: Tensor,
    ) -> Metrics:
        rewards = self.beta * ratio.detach()
        chosen, rejected = desirable.sum(), (~desirable).sum()
        examples = chosen + rejected

        def over(values: Tensor, mask: Tensor) -> Tensor:
            return torch.where(mask, values.detach(), 0.0).sum()

        return Metrics(
            {
                "loss": m.mean(total, examples),
                "kl": m.mean(divergence * examples, examples),
                "rewards/chosen": m.mean(over(rewards, desirable), chosen),
                "rewards/rejected": m.mean(over(rewards, ~desirable), rejected),
                "logps/chosen": m.mean(over(policy, desirable), chosen),
                "logps/rejected": m.mean(over(policy, ~desirable), rejected),
                "num_tokens": m.total(tokens),
            }
        )

    def kept(self) -> Mapping[str, Tensor] | None:
        """The reference."""
        return self.reference
