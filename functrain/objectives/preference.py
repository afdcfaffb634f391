"""Direct preference optimisation: pairs of completions, and a reference that is a value."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from functrain import metrics as m
from functrain.architecture import Mode
from functrain.errors import BatchError, ConfigError, did_you_mean, is_number
from functrain.metrics import Metrics
from functrain.objectives.base import logits_of
from functrain.objectives.batches import (
    IGNORE_INDEX,
    Batch,
    check_sequences,
    examples_in,
)
from functrain.objectives.logprobs import completion_logps, token_metrics
from functrain.objectives.reference import reference_logps
from functrain.trees import Tensors, clone


@attrs.frozen(kw_only=True, eq=False)
class PairLogps:
    """What a preference loss reads: log-probs summed over completion tokens, float [pairs], nats.

    `chosen_length` and `rejected_length` count the completion tokens, int64 [pairs].
    """

    chosen: Tensor
    rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor
    chosen_length: Tensor
    rejected_length: Tensor

    @property
    def delta_chosen(self) -> Tensor:
        """Δ_w, the policy's log-prob of the chosen completion over the reference's."""
        return self.chosen - self.reference_chosen

    @property
    def delta_rejected(self) -> Tensor:
        """Δ_l, the same of the rejected completion."""
        return self.rejected - self.reference_rejected

    @property
    def margin(self) -> Tensor:
        """m = Δ_w − Δ_l."""
        return self.delta_chosen - self.delta_rejected


PairLoss = Callable[[PairLogps, float, float], Tensor]


def sigmoid(logps: PairLogps, beta: float, smoothing: float) -> Tensor:
    """−(1−ε)·logσ(βm) − ε·logσ(−βm): DPO (2305.18290), with ε > 0 conservative DPO."""
    scaled = beta * logps.margin
    if not smoothing:
        return -F.logsigmoid(scaled)
    return -(1 - smoothing) * F.logsigmoid(scaled) - smoothing * F.logsigmoid(-scaled)


def robust(logps: PairLogps, beta: float, smoothing: float) -> Tensor:
    """[−(1−ε)·logσ(βm) + ε·logσ(−βm)] / (1−2ε): robust DPO (2403.00409), ε < ½."""
    scaled = beta * logps.margin
    signed = -(1 - smoothing) * F.logsigmoid(scaled) + smoothing * F.logsigmoid(-scaled)
    return signed / (1 - 2 * smoothing)


def hinge(logps: PairLogps, beta: float, _smoothing: float) -> Tensor:
    """max(0, 1 − βm): SLiC (2305.10425) and RSO (2309.06657)."""
    return F.relu(1 - beta * logps.margin)


def ipo(logps: PairLogps, beta: float, _smoothing: float) -> Tensor:
    """(Δ_w/|y_w| − Δ_l/|y_l| − 1/(2β))²: IPO (2310.12036), on token means."""
    chosen = logps.delta_chosen / logps.chosen_length
    rejected = logps.delta_rejected / logps.rejected_length
    return (chosen - rejected - 1 / (2 * beta)) ** 2


LOSSES: Mapping[str, PairLoss] = {
    "sigmoid": sigmoid,
    "robust": robust,
    "hinge": hinge,
    "ipo": ipo,
}
SMOOTHED = ("sigmoid", "robust")


def _loss_name(_instance: object, _attribute: object, name: str) -> None:
    if name not in LOSSES:
        raise ConfigError(f"loss: {name!r} is unknown; {did_you_mean(str(name), LOSSES)}")


def _optional_tensors(value: Mapping[str, Tensor] | None) -> Tensors | None:
    """A plain mapping is copied: a step may donate the memory that it was made of."""
    if value is None or isinstance(value, Tensors):
        return value
    if not isinstance(value, Mapping) or not all(isinstance(t, Tensor) for t in value.values()):
        raise ConfigError(
            "reference: expected params, a mapping from names to tensors as functrain.split or "
            f"state.params has them, got {type(value).__name__}"
        )
    return clone(value)


@attrs.frozen(kw_only=True, eq=False)
class PreferenceOptimization:
    """The sum over pairs of a preference loss; the weight is the number of pairs.

    `reference`: params of the same architecture, fixed; None where every batch carries
    `reference_logps`. With `dropout=False` (the default, as in TRL) the policy is in eval mode
    while it trains, so that it equals the reference at step 0: margin 0, `sigmoid` log 2.

    Raises `ConfigError` for an unknown loss, β ≤ 0, or a label smoothing outside [0, ½) or where
    the loss has none.
    """

    reference: Tensors | None = attrs.field(default=None, converter=_optional_tensors)
    beta: float = 0.1
    loss: str = attrs.field(default="sigmoid", validator=_loss_name)
    label_smoothing: float = 0.0
    dropout: bool = False
    name: str = "dpo"
    batch_coupled: bool = attrs.field(default=False, init=False)

    def __attrs_post_init__(self) -> None:
        if not is_number(self.beta) or not 0 < self.beta < float("inf"):
            raise ConfigError(f"beta: {self.beta!r}, expected a positive finite number")
        if not is_number(self.label_smoothing) or not 0 <= self.label_smoothing < 0.5:
            raise ConfigError(
                f"label_smoothing: {self.label_smoothing!r}, expected a number in [0, 0.5)"
            )
        if self.label_smoothing and self.loss not in SMOOTHED:
            raise ConfigError(
                f"label_smoothing: the {self.loss!r} loss has none; it has a meaning for "
                f"{' and '.join(SMOOTHED)}"
            )

    @property
    def mode(self) -> Mode:
        """Eval unless dropout is asked for."""
        return "train" if self.dropout else "eval"

    def check(self, batch: Batch, vocabulary: int | None) -> None:
        """Raise `BatchError` unless the batch has well-formed, non-empty pairs and a reference."""
        _check_pairs(batch, vocabulary)
        if self.reference is None and "reference_logps" not in batch:
            raise BatchError(
                "reference_logps: missing, and the step has no reference; give "
                "dpo_step(..., reference=params), or batches with their reference log-probs"
            )

    def weight(self, batch: Batch) -> Tensor:
        """The number of pairs; int64, 0-d."""
        return torch.tensor(examples_in(batch), device=batch["chosen"]["input_ids"].device)

    def check_weight(self, weight: Tensor) -> None:
        """Nothing more to check: a pair without completion tokens has been refused."""

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Metrics]:
        """The summed loss with the metrics that DPO dashboards know.

        `perplexity` is the policy's, by token of the chosen completions.

        Policy and reference take one forward each, over chosen and rejected together.
        """
        joined = concatenated(batch["chosen"], batch["rejected"])
        logits = logits_of(model, joined)
        logps = self._logps(model, batch, joined, logits)
        total = LOSSES[self.loss](logps, self.beta, self.label_smoothing).sum()
        measured = self._pair_metrics(total, logps, self.weight(batch))
        return total, measured | token_metrics(logits, joined["labels"])

    def _logps(self, model: nn.Module, batch: Batch, joined: Batch, logits: Tensor) -> PairLogps:
        sums, lengths = completion_logps(logits, joined["labels"])
        if "reference_logps" in batch:
            given = batch["reference_logps"]
            reference = torch.cat([given["chosen"], given["rejected"]]).to(sums.dtype)
        else:
            assert self.reference is not None  # `check` has refused the batch otherwise
            reference, _ = reference_logps(model, self.reference, joined)
        chosen, rejected = sums.chunk(2)
        reference_chosen, reference_rejected = reference.chunk(2)
        chosen_length, rejected_length = lengths.chunk(2)
        return PairLogps(
            chosen=chosen,
            rejected=rejected,
            reference_chosen=reference_chosen,
            reference_rejected=reference_rejected,
            chosen_length=chosen_length,
            rejected_length=rejected_length,
        )

    def _pair_metrics(self, total: Tensor, logps: PairLogps, pairs: Tensor) -> Metrics:
        chosen = self.beta * logps.delta_chosen.detach()
        rejected = self.beta * logps.delta_rejected.detach()
        sums = {
            "loss": total,
            "rewards/chosen": chosen.sum(),
            "rewards/rejected": rejected.sum(),
            "rewards/margins": (chosen - rejected).sum(),
            "rewards/accuracies": (chosen > rejected).sum(),
            "logps/chosen": logps.chosen.sum(),
            "logps/rejected": logps.rejected.sum(),
        }
        perplexity = m.exponential(-logps.chosen.sum(), logps.chosen_length.sum())
        means = {name: m.mean(value, pairs) for name, value in sums.items()}
        return Metrics({**means, "perplexity": perplexity})

    def kept(self) -> Mapping[str, Tensor] | None:
        """The reference."""
        return self.reference


def _check_pairs(batch: Batch, vocabulary: int | None) -> None:
    known = ("chosen", "rejected", "reference_logps")
    if not isinstance(batch, Mapping):
        raise BatchError(f"batch: expected a mapping, got {type(batch).__name__}")
    for key in batch:
        if key not in known:
            raise BatchError(f"{key}: unknown key; {did_you_mean(str(key), known)}")
    for side in ("chosen", "rejected"):
        if side not in batch:
            raise BatchError(f"{side}: missing; a preference batch has chosen and rejected")
        check_sequences(batch[side], vocabulary, f"{side}.")
        _check_completions(batch[side]["labels"], side)
    pairs, others = (batch[side]["input_ids"].shape[0] for side in ("chosen", "rejected"))
    if pairs != others:
        raise BatchError(f"chosen has {pairs} examples and rejected {others}; expected pairs")
    if batch["chosen"].keys() != batch["rejected"].keys():
        raise BatchError(
            f"chosen has {sorted(batch['chosen'])} and rejected {sorted(batch['rejected'])}; "
            "expected the same keys"
        )
    if "reference_logps" in batch:
        _check_reference(batch["reference_logps"], pairs)


def _check_completions(labels: Tensor, side: str) -> None:
    if labels.device.type != "cpu":
        return
    empty = (labels[:, 1:] != IGNORE_INDEX).sum(-1) == 0
    if bool(empty.any()):
        raise BatchError(
            f"{side}.labels: example {int(empty.nonzero()[0])} has no completion token (all "
            "-100); an empty or fully truncated completion cannot be preferred"
        )


def _check_reference(given: Any, pairs: int) -> None:
    for side in ("chosen", "rejected"):
        value = given.get(side) if isinstance(given, Mapping) else None
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.ndim != 1:
            raise BatchError(
                f"reference_logps.{side}: expected a floating tensor of shape [{pairs}]"
            )
        if value.shape[0] != pairs:
            raise BatchError(
                f"reference_logps.{side}: shape {list(value.shape)}, expected [{pairs}]"
            )
        if value.device.type == "cpu" and not bool(value.isfinite().all()):
            raise BatchError(f"reference_logps.{side}: not finite; compute it again")


def concatenated(chosen: Batch, rejected: Batch) -> Batch:
    """Chosen then rejected as one batch, the shorter padded at the end to the longer's time.

    What pads has no target, and under causal attention nothing before it sees it.
    """
    time = max(chosen["input_ids"].shape[1], rejected["input_ids"].shape[1])
    fill = {"labels": IGNORE_INDEX}

    def padded(side: Batch, key: str) -> Tensor:
        tensor: Tensor = side[key]
        return F.pad(tensor, (0, time - tensor.shape[1]), value=fill.get(key, 0))

    return {key: torch.cat([padded(chosen, key), padded(rejected, key)]) for key in chosen}
