"""The stages: pretraining, fine-tuning, preference optimisation, each a step over an objective."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypedDict, Unpack

import attrs
from torch import Tensor, nn

from functrain.errors import ConfigError, did_you_mean
from functrain.guards import SpikeGuard
from functrain.objectives.base import Objective
from functrain.objectives.language import LanguageModeling
from functrain.objectives.preference import PreferenceOptimization
from functrain.optimizers import Optimizer
from functrain.precision import Precision
from functrain.schedules import Plateau, Schedule
from functrain.steps import Step, Transform, is_optimizer


class StepOptions(TypedDict, total=False):
    """The options that every stage's step takes; each is described at `Step`."""

    precision: str | Precision
    microbatches: int
    max_grad_norm: float | None
    transform: Transform | None
    ema_decay: float | None
    guard: SpikeGuard | None
    donate: bool


def make_step(
    objective: Objective,
    optimizer: Optimizer,
    *,
    architecture: nn.Module,
    schedule: Schedule | Plateau | float | None = None,
    **options: Unpack[StepOptions],
) -> Step:
    """The step that minimises `objective` with `optimizer`: the one place where the pieces meet.

    `schedule`: a schedule, a constant learning rate, or None for the optimizer's own `lr`. The
    other options are described at `Step`. Raises `ConfigError` for what cannot be combined.
    """
    known = {field.name for field in attrs.fields(Step) if field.init}
    for name in options:
        if name not in known:
            raise ConfigError(f"{name}: unknown option; {did_you_mean(name, known)}")
    if not isinstance(architecture, nn.Module):
        raise ConfigError(
            f"architecture: expected the nn.Module that functrain.split returns first, got "
            f"{type(architecture).__name__}"
        )
    is_optimizer(None, None, optimizer)
    return Step(
        objective=objective,
        architecture=architecture,
        optimizer=optimizer,
        schedule=optimizer.lr if schedule is None else schedule,
        **options,  # pyrefly: ignore[open-unpacking]
    )


def pretrain_step(
    architecture: nn.Module,
    optimizer: Optimizer,
    *,
    schedule: Schedule | Plateau | float | None = None,
    **options: Unpack[StepOptions],
) -> Step:
    """Next-token cross entropy over every labelled token; options as for `make_step`."""
    objective = LanguageModeling(name="pretrain")
    return make_step(objective, optimizer, architecture=architecture, schedule=schedule, **options)


def sft_step(
    architecture: nn.Module,
    optimizer: Optimizer,
    *,
    schedule: Schedule | Plateau | float | None = None,
    **options: Unpack[StepOptions],
) -> Step:
    """Cross entropy over the completion's tokens, which the labels single out."""
    objective = LanguageModeling(name="sft")
    return make_step(objective, optimizer, architecture=architecture, schedule=schedule, **options)


def dpo_step(
    architecture: nn.Module,
    optimizer: Optimizer,
    *,
    reference: Mapping[str, Tensor] | None = None,
    beta: float = 0.1,
    loss: str = "sigmoid",
    label_smoothing: float = 0.0,
    dropout: bool = False,
    schedule: Schedule | Plateau | float | None = None,
    **options: Unpack[StepOptions],
) -> Step:
    """Direct preference optimisation (2305.18290) against `reference`, params of this architecture.

    Without a reference every batch must carry `reference_logps`. See `PreferenceOptimization`.
    """
    objective = PreferenceOptimization(
        reference=reference,
        beta=beta,
        loss=loss,
        label_smoothing=label_smoothing,
        dropout=dropout,
    )
    return make_step(objective, optimizer, architecture=architecture, schedule=schedule, **options)
