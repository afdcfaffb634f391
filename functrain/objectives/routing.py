"""Next-token cross entropy for mixtures of experts, with the loss that balances their routers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from functrain import metrics as m
from functrain.checks import is_number
from functrain.errors import ArchitectureError, ConfigError
from functrain.metrics import Metrics
from functrain.objectives.batches import (
    MODEL_INPUTS,
    Batch,
    check_targets,
    count_targets,
    padding_in,
)
from functrain.objectives.head import Head, find_head
from functrain.objectives.language import LanguageModeling

_TOP = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_topk", "top_k")
# The families without an aux_loss in transformers whose routers still choose the likeliest.
_LIKELIEST = ("aria_text", "hunyuan_v1_moe")


def _coefficient(_record: object, _field: object, value: Any) -> None:
    if not is_number(value) or not 0 < value < float("inf"):
        raise ConfigError(
            f"router: {value!r}, expected a positive finite number, as the config's "
            "router_aux_loss_coef; 0 for none"
        )


@attrs.frozen(kw_only=True, eq=False)
class Routed:
    """How often each expert was chosen, float64 [experts], and in how many rows, 0-d."""

    counts: Tensor
    rows: Tensor


@attrs.frozen(kw_only=True)
class RoutedLanguageModeling(LanguageModeling):
    """`LanguageModeling` plus `router` times E · Σ_e f_e · p_e, over all layers (2101.03961).

    Over the tokens that are not padding, f_e is the fraction that chose expert e (of a top k, the
    fractions sum to k), without a gradient, and p_e its mean probability: what transformers returns
    as `aux_loss`. Both are means over the whole batch, which couples its examples: with
    micro-batches f_e is counted in a first pass, and the gradient is that of the batch in one
    piece; trainers that add each micro-batch's own loss have another one.

    Among the metrics, `loss` is the cross entropy alone and `aux_loss` the balance, which is k
    where all experts are chosen equally often.
    """

    router: float = attrs.field(validator=_coefficient)
    batch_coupled: bool = attrs.field(default=True, init=False)

    @property
    def direct(self) -> bool:
        """False: its sum is not a cross entropy alone."""
        return False

    def weight(self, batch: Batch) -> Tensor:
        """The number of target tokens, and of tokens that are routed; int64 [2]."""
        return torch.stack([count_targets(batch), _tokens(batch)])

    def check_weight(self, weight: Tensor) -> None:
        """As `LanguageModeling.check_weight`, for the targets."""
        check_targets(weight[0], "labels")

    def observe(self, model: nn.Module, batch: Batch) -> Routed:
        """The experts that a micro-batch chooses: the first of two passes."""
        recorded, call = _recording(model)
        head = find_head(model)
        if isinstance(head, Head):
            head.hidden(call, batch)  # no logits are made
        else:
            call(**{key: batch[key] for key in MODEL_INPUTS if key in batch})
        _, counts, rows = _routed(model, recorded, batch)
        return Routed(counts=counts, rows=rows)

    def couple(self, observed: Sequence[Routed]) -> list[Tensor]:
        """The fraction of all rows that chose each expert, for every micro-batch."""
        counts = torch.stack([each.counts for each in observed]).sum(0)
        rows = torch.stack([each.rows for each in observed]).sum()
        return [counts / rows] * len(observed)

    def __call__(
        self, model: nn.Module, batch: Batch, coupling: Any = None
    ) -> tuple[Tensor, Metrics]:
        """The summed cross entropy and the summed balance, [2]; `coupling`: f of the whole batch.

        Raises `ArchitectureError` for a model without routers, and for one whose routers choose
        experts other than the likeliest.
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
    padding = padding_in(batch)
    if padding is None:
        ids = batch["input_ids"]
        return torch.full((), ids.numel(), device=ids.device)  # a fill, which waits for no device
    return (~padding).sum()


def _recording(model: nn.Module) -> tuple[list[Sequence[Tensor]], Callable[..., Any]]:
    """A record of what the model's routers return, and the call of the model that fills it."""
    recorded: list[Sequence[Tensor]] = []

    def call(**inputs: Any) -> Any:
        try:
            outputs = model(**inputs, output_router_logits=True)
        except TypeError as error:
            raise _no_routers(model) from error
        found = getattr(outputs, "router_logits", None)
        if not found:
            raise _no_routers(model)
        _check_likeliest(model, outputs)
        recorded.append(found)
        return outputs

    return recorded, call


def _no_routers(model: nn.Module) -> ArchitectureError:
    return ArchitectureError(
        f"router: {type(model).__name__} returns no router_logits, so it has no routers to "
        "balance; leave router at 0"
    )


def _check_likeliest(model: nn.Module, outputs: Any) -> None:
    """Raise `ArchitectureError` where experts other than the likeliest may have been chosen.

    That is with sigmoid scores, with groups that are chosen first, or with biases that balance by
    themselves: for its models with one of those, transformers returns no `aux_loss`.
    """
    if getattr(outputs, "aux_loss", None) is not None:
        return
    config = _text_config(model)
    kind = getattr(config, "model_type", None)
    greedy = kind == "deepseek_v2" and getattr(config, "topk_method", None) == "greedy"
    ours = not type(model).__module__.startswith("transformers.")
    if not (ours or greedy or kind in _LIKELIEST):
        raise ArchitectureError(
            f"router: {type(model).__name__} has no aux_loss in transformers, since its routers do "
            "not choose the experts that are likeliest by softmax (sigmoid scores, groups, a bias "
            "for the balance): other choices would be balanced than the model's; leave router at 0"
        )


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _chosen(model: nn.Module) -> int:
    """How many experts each token goes to."""
    config = _text_config(model)
    for each in (config, getattr(config, "ffn_config", None)):
        for name in _TOP:
            top = getattr(each, name, None)
            if isinstance(top, int):
                return top
    raise ArchitectureError(
        f"router: the config of {type(model).__name__} does not say how many experts a token goes "
        f"to; give it {_TOP[0]}, or leave router at 0"
    )


def _routed(
    model: nn.Module, recorded: Sequence[Sequence[Tensor]], batch: Batch
) -> tuple[Tensor, Tensor, Tensor]:
    """Summed probabilities by expert, with history; how often each was chosen; of how many rows."""
    top = _chosen(model)
    padding = padding_in(batch)
    real = None if padding is None else ~padding.flatten()
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
        every = torch.full((), len(found), device=found.device) if real is None else real.sum()
        rows.append(every)
    return torch.stack(sums).sum(0), torch.stack(counts).sum(0), torch.stack(rows).sum()
