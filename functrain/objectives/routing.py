"""Next-token cross entropy for mixtures of experts, with the loss that balances their routers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from functrain import metrics as m
from functrain.errors import ArchitectureError, ConfigError, is_number
from functrain.metrics import Metrics
from functrain.objectives.batches import MODEL_INPUTS, Batch, check_targets, count_targets
from functrain.objectives.language import LanguageModeling

_TOP = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "top_k")


def _coefficient(_record: object, _field: object, value: Any) -> None:
    if not is_number(value) or not 0 < value < float("inf"):
        raise ConfigError(
            f"router: {value!r}, expected a positive finite number, as the config's "
            "router_aux_loss_coef; 0 for none"
        )


@attrs.frozen(kw_only=True)
class RoutedLanguageModeling(LanguageModeling):
    """`LanguageModeling` plus `router` times E · Σ_e f_e · p_e, over all layers (2101.03961).

    Of the tokens that are no padding, f_e is the part that chose expert e (of a top k, k parts in
    all), which has no gradient, and p_e its mean probability: what transformers returns as
    `aux_loss`. Both are means over the whole batch, so it couples its examples: with micro-batches
    f_e is counted in a first pass, and the gradient is that of the batch in one piece, where
    trainers that add each micro-batch's own loss have another one.

    `loss` among the metrics is the cross entropy alone, `aux_loss` the balance, which is 1 · k
    where every expert is chosen alike.
    """

    router: float = attrs.field(validator=_coefficient)
    batch_coupled: bool = attrs.field(default=True, init=False)

    @property
    def direct(self) -> bool:
        """Its sum is not a cross entropy alone."""
        return False

    def weight(self, batch: Batch) -> Tensor:
        """The target tokens, and the tokens that are routed; int64 [2]."""
        return torch.stack([count_targets(batch), _tokens(batch)])

    def check_weight(self, weight: Tensor) -> None:
        """As `LanguageModeling`'s, of the targets."""
        check_targets(weight[0], "labels")

    def observe(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """How often each expert was chosen, float64 [experts], and of how many rows."""
        recorded, call = _recording(model)
        call(**{key: batch[key] for key in MODEL_INPUTS if key in batch})
        _, counts, rows = _routed(model, recorded, batch)
        return counts, rows

    def couple(self, observed: Sequence[Any]) -> Sequence[Any]:
        """The part of all rows that chose each expert, for every micro-batch."""
        counts = torch.stack([counts for counts, _ in observed]).sum(0)
        rows = torch.stack([rows for _, rows in observed]).sum()
        return [counts / rows] * len(observed)

    def __call__(
        self, model: nn.Module, batch: Batch, coupling: Any = None
    ) -> tuple[Tensor, Metrics]:
        """The summed cross entropy and the summed balance, [2]; `coupling`: f of the whole batch.

        Raises `ArchitectureError` for a model without routers.
        """
        recorded, call = _recording(model)
        total, measured = self.summed(model, batch, call)
        probabilities, counts, rows = _routed(model, recorded, batch)
        chosen = (counts / rows if coupling is None else coupling).to(probabilities.dtype)
        layers = len(recorded[-1])
        balance = len(chosen) * (chosen * probabilities).sum() / layers
        loss = torch.stack([total, (self.router * balance).to(total.dtype)])
        return loss, measured | Metrics({"aux_loss": m.mean(balance, _tokens(batch))})


def _tokens(batch: Batch) -> Tensor:
    mask: Tensor | None = batch.get("attention_mask")
    if mask is None:
        return torch.tensor(batch["input_ids"].numel(), device=batch["input_ids"].device)
    return (mask != 0).sum()


def _recording(model: nn.Module) -> tuple[list[Sequence[Tensor]], Callable[..., Any]]:
    """A call of the model that keeps what its routers returned."""
    recorded: list[Sequence[Tensor]] = []

    def call(**inputs: Any) -> Any:
        try:
            outputs = model(**inputs, output_router_logits=True)
        except TypeError as error:
            raise _no_routers(model) from error
        found = getattr(outputs, "router_logits", None)
        if not found:
            raise _no_routers(model)
        recorded.append(found)
        return outputs

    return recorded, call


def _no_routers(model: nn.Module) -> ArchitectureError:
    return ArchitectureError(
        f"router: {type(model).__name__} returns no router_logits, so it has no routers to "
        "balance; leave router at 0"
    )


def _routed(
    model: nn.Module, recorded: Sequence[Sequence[Tensor]], batch: Batch
) -> tuple[Tensor, Tensor, Tensor]:
    """Summed probabilities by expert, with history; how often each was chosen; of how many rows."""
    config: Any = getattr(model, "config", None)
    top = next((getattr(config, name) for name in _TOP if hasattr(config, name)), 1)
    mask: Tensor | None = batch.get("attention_mask")
    real = None if mask is None else (mask != 0).flatten()
    sums: list[Tensor] = []
    counts: list[Tensor] = []
    rows: list[Tensor] = []
    for logits in recorded[-1]:
        found = logits.flatten(0, -2).float().softmax(-1)
        if real is not None:
            found = found * real.unsqueeze(1)
        chosen = torch.zeros_like(found).scatter(1, found.topk(top, dim=-1).indices, 1.0)
        if real is not None:
            chosen = chosen * real.unsqueeze(1)
        sums.append(found.sum(0))
        counts.append(chosen.detach().double().sum(0))
        rows.append(torch.tensor(len(found), device=found.device) if real is None else real.sum())
    return torch.stack(sums).sum(0), torch.stack(counts).sum(0), torch.stack(rows).sum()
