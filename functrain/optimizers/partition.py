"""Several optimizers at once, each for its own parameters; Muon with AdamW is one such."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor

from functrain.errors import ConfigError
from functrain.optimizers.adam import adamw
from functrain.optimizers.adapter import from_torch
from functrain.optimizers.base import (
    Optimizer,
    OptimizerState,
    Predicate,
    advanced,
    check_update,
    held_back,
    zero_count,
)
from functrain.trees import Tensors, tensors


def muon(
    lr: float = 1e-3,
    *,
    weight_decay: float = 0.1,
    momentum: float = 0.95,
    adjust_lr_fn: str = "match_rms_adamw",
    where: Predicate | None = None,
    others: Optimizer | None = None,
    **options: Any,
) -> Partition:
    """Muon (Jordan et al. 2024) for hidden matrices, as `torch.optim.Muon`; AdamW for the rest.

    `where` selects Muon's parameters: by default matrices other than embeddings and the head.
    `others` trains the rest. One learning rate serves both, because `match_rms_adamw`
    (2502.16982) gives Muon's updates AdamW's size.
    """
    hidden = from_torch(
        torch.optim.Muon,
        lr=lr,
        weight_decay=weight_decay,
        momentum=momentum,
        adjust_lr_fn=adjust_lr_fn,
        **options,
    )
    rest = adamw(lr, weight_decay=weight_decay) if others is None else others
    return partition([("muon", where or is_hidden_matrix, hidden), ("others", is_any, rest)])


_EDGES = re.compile(r"(^|[._])(embed\w*|wte|wpe|lm_head|head|output)([._]|$)")


def is_hidden_matrix(name: str, tensor: Tensor) -> bool:
    """A matrix that is neither an embedding nor the head, judged by its name."""
    return tensor.ndim == 2 and _EDGES.search(name) is None


def is_any(_name: str, _tensor: Tensor) -> bool:
    """Every parameter."""
    return True


@attrs.frozen(kw_only=True)
class Partition:
    """Several optimizers, each for its own parameters; see `partition`."""

    parts: tuple[tuple[str, Predicate, Optimizer], ...]

    @property
    def lr(self) -> float:
        """The first part's learning rate."""
        return self.parts[0][2].lr

    @property
    def kind(self) -> str:
        """The parts by label, `muon=Muon,others=adamw`."""
        return ",".join(f"{label}={optimizer.kind}" for label, _, optimizer in self.parts)

    def init(self, params: Mapping[str, Tensor]) -> OptimizerState:
        """Every part's slots, under `part.slot`."""
        slots: dict[str, Tensors] = {}
        for label, members in self._members(params).items():
            state = self._part(label).init(members)
            slots |= {f"{label}.{slot}": t for slot, t in state.slots.items()}
        return OptimizerState(kind=self.kind, count=zero_count(params), slots=slots)

    def update(
        self,
        grads: Mapping[str, Tensor],
        state: OptimizerState,
        params: Mapping[str, Tensor],
        learning_rate: Tensor | float,
        *,
        applied: Tensor | None = None,
        donate: bool = False,
    ) -> tuple[Tensors, OptimizerState]:
        """Every part's update on its own parameters."""
        check_update(self.kind, grads, state, params)
        if held_back(applied):
            return tensors(params), state
        new_params = dict(params)
        slots: dict[str, Tensors] = {}
        for label, members in self._members(params).items():
            own = {
                slot.removeprefix(f"{label}."): t
                for slot, t in state.slots.items()
                if slot.startswith(f"{label}.")
            }
            updated, part = self._part(label).update(
                {n: g for n, g in grads.items() if n in members},
                OptimizerState(kind=self._part(label).kind, count=state.count, slots=own),
                members,
                learning_rate,
                applied=applied,
                donate=donate,
            )
            new_params |= dict(updated)
            slots |= {f"{label}.{slot}": t for slot, t in part.slots.items()}
        count = advanced(state.count, applied)
        return Tensors(new_params), attrs.evolve(state, count=count, slots=slots)

    def _part(self, label: str) -> Optimizer:
        return next(optimizer for name, _, optimizer in self.parts if name == label)

    def _members(self, params: Mapping[str, Tensor]) -> dict[str, Tensors]:
        members: dict[str, dict[str, Tensor]] = {label: {} for label, _, _ in self.parts}
        for name, tensor in params.items():
            label = next((lab for lab, where, _ in self.parts if where(name, tensor)), None)
            if label is None:
                raise ConfigError(f"{name}: no part of the partition takes it; end with `is_any`")
            members[label][name] = tensor
        return {label: Tensors(items) for label, items in members.items() if items}


def partition(parts: Iterable[tuple[str, Predicate, Optimizer]]) -> Partition:
    """Several optimizers by predicate: `[("muon", is_hidden_matrix, m), ("rest", is_any, a)]`."""
    parts = tuple(parts)
    labels = [label for label, _, _ in parts]
    if not parts or len(set(labels)) < len(labels) or any("." in label for label in labels):
        raise ConfigError(f"partition: labels must be distinct and without dots, got {labels}")
    return Partition(parts=parts)
