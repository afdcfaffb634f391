"""The stages: pretraining, fine-tuning and preference optimisation, each a step on an objective."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict, Unpack

import attrs
from torch import Tensor, nn

from functrain.activations import Recompute
from functrain.distributed import World
from functrain.errors import ConfigError, did_you_mean
from functrain.guards import SpikeGuard
from functrain.objectives.base import Objective
from functrain.objectives.language import LanguageModeling
from functrain.objectives.layouts import LayoutName
from functrain.objectives.logprobs import HeadMode
from functrain.objectives.options import Mix
from functrain.objectives.preference import PreferenceOptimization
from functrain.objectives.routing import RoutedLanguageModeling
from functrain.objectives.unpaired import UnpairedOptimization
from functrain.optimizers import Optimizer
from functrain.precision import Precision
from functrain.reductions import Reduction
from functrain.schedules import Plateau, Schedule
from functrain.steps import Step, Transform, is_optimizer


class StepOptions(TypedDict, total=False):
    """The options that every stage's step takes; each is described at `Step`.

    `precision`: a name, `"bf16"`, or a record (`functrain.precision.Precision`).
    """

    precision: str | Precision
    microbatches: int
    max_grad_norm: float | None
    transform: Transform | None
    ema_decay: float | None
    guard: SpikeGuard | None
    donate: bool
    compile: bool
    checkpoint: str | Sequence[str] | None
    recompute: Recompute
    reduction: Reduction
    world: World | None
    sharded: bool


def make_step(
    objective: Objective,
    optimizer: Optimizer,
    *,
    architecture: nn.Module,
    schedule: Schedule | Plateau | float | None = None,
    **options: Unpack[StepOptions],
) -> Step:
    """The step that minimises `objective` with `optimizer`: the one place where the pieces meet.

    `schedule`: a schedule, a constant learning rate, or None for the optimizer's own `lr`. That is
    read here, so a step evolved with another optimizer keeps the old rate unless its schedule is
    evolved too. The other options are described at `Step`.

    Raises `ConfigError` for options that cannot be combined.
    """
    _check_known(objective, options)
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


def _check_known(objective: Objective, options: Iterable[str]) -> None:
    """Raise `ConfigError` for an option that neither the step nor its objective has."""
    known = {field.name for field in attrs.fields(Step) if field.init}
    made = type(objective)
    fields = attrs.fields(made) if attrs.has(made) else ()
    own = {field.name for field in fields if field.init and not field.name.startswith("_")}
    for name in options:
        if name in own - known:
            raise ConfigError(
                f"{name}: the objective's own option; give it to {made.__name__}({name}=…)"
            )
        if name not in known:
            raise ConfigError(f"{name}: unknown option; {did_you_mean(name, known | own)}")


def _language_modeling(name: str, head: HeadMode, router: float) -> LanguageModeling:
    if router == 0 and not isinstance(router, bool):
        return LanguageModeling(name=name, head=head)
    return RoutedLanguageModeling(name=name, head=head, router=router)


def pretrain_step(
    architecture: nn.Module,
    optimizer: Optimizer,
    *,
    head: HeadMode = "auto",
    router: float = 0.0,
    schedule: Schedule | Plateau | float | None = None,
    **options: Unpack[StepOptions],
) -> Step:
    """Next-token cross entropy over every labelled token; options as for `make_step`.

    `head`: `auto` computes logits a few rows at a time where that saves memory or passes over them
    (from 1 MiB on), the same to rounding; `full` never does, and gives the bits of an ordinary
    loop. `router`: for a mixture of experts, the weight of the loss that balances its routers, such
    as its config's `router_aux_loss_coef` (`functrain.objectives.RoutedLanguageModeling`).
    """
    objective = _language_modeling("pretrain", head, router)
    return make_step(objective, optimizer, architecture=architecture, schedule=schedule, **options)


def sft_step(
    architecture: nn.Module,
    optimizer: Optimizer,
    *,
    head: HeadMode = "auto",
    router: float = 0.0,
    schedule: Schedule | Plateau | float | None = None,
    **options: Unpack[StepOptions],
) -> Step:
    """Cross entropy over the completion's tokens, which the labels mark.

    Options as for `pretrain_step`.
    """
    objective = _language_modeling("sft", head, router)
    return make_step(objective, optimizer, architecture=architecture, schedule=schedule, **options)


class PreferenceOptions(StepOptions, total=False):
    """The further options of `dpo_step`; each is described at `PreferenceOptimization`.

    An option named after a loss concerns only that loss (`functrain.objectives.losses`).
    """

    simpo_gamma: float
    cpo_alpha: float
    orpo_lambda: float
    discopop_tau: float
    divergence: str
    divergence_alpha: float
    length_normalized: bool
    ld_alpha: float | None
    wpo: bool
    reference_mixup: float | None
    reference_sync: int
    layout: LayoutName


def dpo_step(
    architecture: nn.Module,
    optimizer: Optimizer,
    *,
    reference: Mapping[str, Tensor] | None = None,
    beta: float = 0.1,
    loss: Mix = "sigmoid",
    label_smoothing: float = 0.0,
    dropout: bool = False,
    head: HeadMode = "auto",
    schedule: Schedule | Plateau | float | None = None,
    **options: Unpack[PreferenceOptions],
) -> Step:
    """Direct preference optimisation (2305.18290) against `reference`, params of this architecture.

    `loss`: any of `functrain.objectives.LOSSES`, or a weighted mix, `{"sigmoid": 1.0, "sft": 0.2}`.
    Without a `reference`, every batch must carry `reference_logps` if a loss reads them. The other
    options are described at `PreferenceOptimization` and, for the step, at `make_step`.
    """
    given: dict[str, Any] = dict(options)
    known = PreferenceOptions.__annotations__.keys() - StepOptions.__annotations__.keys()
    modifiers = {name: given.pop(name) for name in known & given.keys()}
    objective = PreferenceOptimization(
        reference=reference,
        beta=beta,
        loss=loss,
        label_smoothing=label_smoothing,
        dropout=dropout,
        head=head,
        **modifiers,
    )
    return make_step(objective, optimizer, architecture=architecture, schedule=schedule, **given)


def kto_step(
    architecture: nn.Module,
    optimizer: Optimizer,
    *,
    reference: Mapping[str, Tensor] | None = None,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    dropout: bool = False,
    head: HeadMode = "auto",
    schedule: Schedule | Plateau | float | None = None,
    **options: Unpack[StepOptions],
) -> Step:
    """KTO (2402.01306), for unpaired completions; see `UnpairedOptimization`."""
    objective = UnpairedOptimization(
        reference=reference,
        beta=beta,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
        dropout=dropout,
        head=head,
    )
    return make_step(objective, optimizer, architecture=architecture, schedule=schedule, **options)
