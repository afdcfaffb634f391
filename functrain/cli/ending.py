"""The results of a run's last state, computed by all its workers together."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch

from functrain import distributed
from functrain.cli.build import Built
from functrain.cli.samples import Prompt, spoken
from functrain.distributed import World
from functrain.evaluation import evaluate
from functrain.objectives import PreferenceOptimization, UnpairedOptimization
from functrain.objectives.batches import Batch
from functrain.objectives.pairs import SIDES
from functrain.state import TrainState, fingerprint
from functrain.trees import Tensors, tensors


@attrs.frozen(kw_only=True)
class Ending:
    """The last state's `fingerprint`, and its completion of each prompt, `words`.

    `likelier`, for preference pairs: the fraction of held-out pairs whose chosen completion has the
    higher log-prob, under the reference and at the end.
    """

    fingerprint: str
    words: list[str]
    likelier: tuple[float, float] | None


def ending(built: Built, state: TrainState, given: Sequence[Prompt], world: World) -> Ending:
    """The end of a run; every worker must call this."""
    return Ending(
        fingerprint=fingerprint(state),
        words=spoken(built, state, given, ended=True),
        likelier=_likelier(built, state, world),
    )


def _likelier(built: Built, state: TrainState, world: World) -> tuple[float, float] | None:
    objective = built.step.objective
    kept = objective.kept()
    if kept is None or not built.evaluation or isinstance(objective, UnpairedOptimization):
        return None
    before = distributed.shard(tensors(kept), world) if built.sharded else tensors(kept)
    return _accuracy(built, state, before), _accuracy(built, state, state.params)


def _accuracy(built: Built, state: TrainState, params: Tensors) -> float:
    """The accuracy of DPO's rewards against a reference whose every log-prob is 0."""
    # Plain DPO has no running values and no token weights, whatever the run's own loss has.
    step = attrs.evolve(built.step, objective=PreferenceOptimization())
    state = attrs.evolve(state, params=params, reference=None, running=None)
    found = evaluate(step, state, unreferenced(built.evaluation))
    return float(found["eval_rewards/accuracies"])


def unreferenced(batches: Sequence[Batch]) -> list[Batch]:
    """Batches of pairs with a reference whose every log-prob is 0."""
    found: list[Batch] = []
    for batch in batches:
        zeros = {side: torch.zeros(len(batch[side]["labels"])) for side in SIDES}
        found.append({**batch, "reference_logps": zeros})
    return found
