"""The step of a config: objective, optimizer and schedule by their names."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any

import attrs
from torch import nn

from functrain import objectives, optimizers, schedules
from functrain.cli.config import DPO, SFT, Config, Optimizer, Preference, Schedule, Train
from functrain.distributed import World
from functrain.errors import ConfigError
from functrain.guards import SpikeGuard
from functrain.lora import is_adapted
from functrain.schedules import Plateau
from functrain.stages import dpo_step, kto_step, pretrain_step, sft_step
from functrain.steps import Step
from functrain.trees import Tensors


@contextmanager
def in_section(section: str, keys: Iterable[str]) -> Generator[None]:
    """Within, a `ConfigError` about an option of the library names the key of the config."""
    try:
        yield
    except ConfigError as error:
        if str(error).partition(":")[0] not in keys:
            raise  # not about an option of this section
        raise ConfigError(f"{section}.{error}") from error


def step_for(config: Config, architecture: nn.Module, params: Tensors, world: World) -> Step:
    """The step of a config's stage, with `donate=True`."""
    train, deviations = config.train, config.train.spike_deviations
    options: dict[str, Any] = {
        "schedule": schedule(config.schedule),
        "precision": train.precision,
        "microbatches": train.microbatches,
        "max_grad_norm": None if train.max_grad_norm == float("inf") else train.max_grad_norm,
        "ema_decay": train.ema_decay,
        "guard": None if deviations is None else SpikeGuard(deviations=deviations),
        "donate": True,
        "compile": train.compile,
        "checkpoint": train.checkpointed,
        "recompute": train.recompute,
        "head": train.head,
        "reduction": train.reduction,
        "sharded": train.sharded,
        "world": world,
    }
    made = optimizer(config.optimizer, config.schedule.peak, architecture)
    with in_section("train", (field.name for field in attrs.fields(Train))):
        if isinstance(config, DPO):
            return _preference_step(config.preference, architecture, params, made, options)
        make = sft_step if isinstance(config, SFT) else pretrain_step
        return make(architecture, made, **options)


def _preference_step(
    config: Preference,
    architecture: nn.Module,
    params: Tensors,
    made: optimizers.Optimizer,
    options: dict[str, Any],
) -> Step:
    """The step of a preference loss; a cached reference comes with the batches."""
    given = attrs.asdict(config)
    kto = {name: given.pop(name) for name in ("desirable_weight", "undesirable_weight")}
    reference = params if given.pop("cache") is None else None
    with in_section("preference", attrs.asdict(config)):
        if config.unpaired:
            return kto_step(
                architecture, made, reference=reference, beta=config.beta, **kto, **options
            )
        given["loss"] = config.mix
        if not any(objectives.LOSSES[name].reference for name in config.mix):
            reference = None
        return dpo_step(architecture, made, reference=reference, **given, **options)


def optimizer(config: Optimizer, lr: float, architecture: nn.Module) -> optimizers.Optimizer:
    """The optimizer of this name; no weight decay on norms, biases and embeddings."""
    exempt = (optimizers.no_decay(architecture),)
    options = config.options()
    if config.name == "muon":
        decay = {n: v for n, v in options.items() if n == "weight_decay"}
        if is_adapted(architecture):  # adapters' names do not reveal embeddings and heads
            options["hidden"] = optimizers.hidden_matrices(architecture)
        return optimizers.muon(lr, others=optimizers.adamw(lr, groups=exempt, **decay), **options)
    make: Any = getattr(optimizers, config.name)
    made: optimizers.Optimizer = make(lr, groups=exempt, **options)
    return made


def schedule(config: Schedule) -> schedules.Schedule | Plateau:
    """The schedule of this name."""
    options = config.options()
    if config.name == "cosine_with_restarts" and "cycles" in options:
        if options["cycles"] != int(options["cycles"]):
            raise ConfigError(
                f"schedule.cycles: {options['cycles']}, expected a whole number of restarts"
            )
        options["cycles"] = int(options["cycles"])
    try:
        return schedules.named(config.name, config.peak, **options)
    except ConfigError as error:
        own, _, field = str(error).partition(".")
        if own != config.name:
            raise  # not about a field of the schedule, `cosine.min_lr`
        raise ConfigError(f"schedule.{field}") from error


def rates_after(config: Schedule, steps: int) -> str | None:
    """What the learning rate does after the end of a schedule; None if no step comes after it.

    Some schedules continue past their end: a cosine climbs to its peak again.
    """
    if config.total is None or config.total >= steps:
        return None
    rate: Any = schedule(config)  # a function of the count, since reduce_on_plateau has no total
    every = max(1, (steps - config.total) // 1000)
    rates = [rate(count) for count in range(config.total, steps, every)]
    least, most = min(rates), max(rates)
    then = f"stays at {least:g}" if least == most else f"goes on between {least:g} and {most:g}"
    return (
        f"{config.name} ends after {config.total:,} updates (schedule.total), and the run after "
        f"{steps:,} steps: the learning rate then {then}"
    )
