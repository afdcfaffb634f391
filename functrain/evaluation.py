"""Evaluation of an objective over batches: it changes nothing and depends on no batch size."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from functrain import compilation, keys
from functrain.distributed import ALONE, gathered_metrics
from functrain.errors import BatchError, ConfigError
from functrain.gradients import refuse_written
from functrain.metrics import Metrics
from functrain.objectives.batches import Batch, batch_versions, to_device
from functrain.state import TrainState, device_of
from functrain.steps import Step
from functrain.trees import rows_here

_NONE = "batches: none, so there is nothing to evaluate"


def checked_batches(step: Step, batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches of an evaluation, each checked; `BatchError` says which is wrong, and how."""
    if isinstance(batches, Mapping):
        raise BatchError("evaluation: one batch; expected a sequence of batches: [batch]")
    if not isinstance(batches, Iterable):
        raise BatchError(
            f"evaluation: expected batches, got {type(batches).__name__}; of a source, "
            "functrain.data.all_batches(source, n) makes them"
        )
    for index, batch in enumerate(batches):
        try:
            step.objective.check(batch, step.value_and_grad.vocabulary)
        except BatchError as error:
            raise BatchError(f"evaluation batch {index}: {error}") from error
        yield batch


def evaluate(step: Step, state: TrainState, batches: Iterable[Batch]) -> Metrics:
    """Evaluate the step's objective over `batches`, in eval mode and without gradients.

    The result has `eval_loss`, `eval_perplexity` and the stage's other metrics except `padding`.
    Each is divided once, by the weight of all batches, so neither batch size nor order matters
    (except to a model that draws in eval mode). Nothing is changed: no state is returned, and the
    global random generators are as before.

    Each worker of the step's world is given all batches, and they share the work unless the loss
    couples the examples of a batch; the result is that of one worker alone, to the bit. If the
    state is sharded, all workers must call this at the same point; `WorkerError` names one that
    does not.

    Raises `BatchError` if there is nothing to evaluate, and `ConfigError` inside `torch.compile`.
    """
    compilation.refuse_tracing("evaluate")
    if not isinstance(step, Step):
        raise ConfigError(
            f"step: {type(step).__name__}; expected evaluate(step, state, batches), in this order"
        )
    step.check(state)
    gradient = step.value_and_grad
    if step.world is not None and gradient.shards is not None:
        # A worker that is elsewhere is found here, before the first block's params are gathered.
        step.world.numbers([], "an evaluation")
    device = device_of(state.params)
    measured: list[Metrics] = []
    weight = torch.zeros((), dtype=torch.int64, device="cpu")
    # Not map_leaves, after which the state would no longer own its memory.
    values = gradient.values({name: rows_here(tensor) for name, tensor in state.params.items()})
    buffers = gradient.buffer_values(state.buffers)
    seed = keys.derive(state.key, "evaluate")
    objective = step.objective_of(state)
    checked: Iterable[Batch] = checked_batches(step, batches)
    world = ALONE if step.world is None or objective.batch_coupled else step.world
    with (
        torch.no_grad(),
        gradient.bound(values, buffers, "eval") as model,
        keys.seeded(seed, device),
    ):

        def measure(batch: Batch, coupling: Any) -> Metrics:
            moved = to_device(batch, device)
            begun = batch_versions([batch])
            with step.precision.context(device):
                measured = gradient.measured(model, moved, objective, coupling)[1]
            refuse_written(batch_versions([batch]), begun)
            return measured

        couplings: Iterable[Any] = itertools.repeat(None)
        index = -1
        if objective.batch_coupled:
            # Over all batches together: the result must not depend on how they were cut.
            checked = [to_device(batch, device) for batch in checked]
            if not checked:
                raise BatchError(_NONE)
            couplings = gradient.couplings(model, checked, objective, seed, device)
        for index, (batch, coupling) in enumerate(zip(checked, couplings, strict=False)):
            weight = weight + objective.weight(batch).to(weight.device)
            if index % world.size != world.rank:
                continue
            measured.append(measure(batch, coupling))
        if gradient.shards is not None and index >= 0 and world.rank > index % world.size:
            # A worker without a batch in the last round computes along, since the others gather
            # the params of blocks from it.
            measure(batch, coupling)
    every = gathered_metrics(world, measured)
    if not every:
        raise BatchError(_NONE)
    step.objective.check_weight(weight)
    # Merged in the order of the batches, whichever worker measured them.
    whole = functools.reduce(Metrics.merge, every)
    # `padding` depends on how the batches were cut.
    return Metrics({n: whole.metric(n) for n in whole if n != "padding"}).prefixed("eval_")
