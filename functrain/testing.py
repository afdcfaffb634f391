"""The laws, to test on your own models: each takes a step, a state and a batch.

    from functrain import testing

    testing.assert_pure(step, state, batch)
    testing.assert_accumulation_invariant(step, state, batch, parts=[3, 1, 4])

A law that fails raises `AssertionError`, which names the first leaf that differs between states.
`batches`, `pairs` and `partitions` are Hypothesis strategies (the `testing` extra) for properties
of your own.
"""

from __future__ import annotations

import inspect
import itertools
import math
import random
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from functrain.architecture import bound
from functrain.checkpoint import load, save
from functrain.clipping import clip_by_global_norm
from functrain.data.source import Source
from functrain.data.streams import Stream
from functrain.errors import ConfigError, ConsumedStateError
from functrain.evaluation import evaluate
from functrain.gradients import Gradients
from functrain.loop import train
from functrain.metrics import Metrics
from functrain.objectives.batches import (
    IGNORE_INDEX,
    Batch,
    are_packed,
    beginnings,
    examples_in,
    rows_of,
    to_device,
)
from functrain.objectives.logprobs import token_scores
from functrain.objectives.preference import PreferenceOptimization
from functrain.state import TrainState, clone_state, device_of, fingerprint, fingerprints
from functrain.steps import Step
from functrain.trees import digest, global_norm

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

TOLERANCE: Mapping[torch.dtype, float] = {
    **dict.fromkeys((torch.float64, torch.complex128), 1e-12),
    **dict.fromkeys((torch.float32, torch.complex64), 1e-5),
    torch.float16: 2e-3,
    torch.bfloat16: 1e-2,
}
"""How far sums in another order may differ, relative to their norm, for values kept in a dtype or
computed in it (`precision`)."""


def _require(holds: bool, otherwise: str) -> None:
    """Raise `AssertionError` unless `holds`; `python -O` would skip an `assert`."""
    if not holds:
        raise AssertionError(otherwise)


def first_difference(one: TrainState, other: TrainState) -> str | None:
    """The path of the first leaf whose bits differ between two states; None if none does."""
    ours, theirs = fingerprints(one), fingerprints(other)
    for path in sorted(ours.keys() | theirs.keys()):
        if ours.get(path) != theirs.get(path):
            return path
    return None


def assert_same(one: TrainState, other: TrainState, what: str) -> None:
    """Assert that both states have the same bits in every leaf."""
    path = first_difference(one, other)
    _require(path is None, f"{what}: the states part at {path}")


def assert_pure(step: Step, state: TrainState, batch: Batch) -> None:
    """Assert that a step changes nothing it was given, and that the same call gives the same bits.

    The digests of the inputs, the architecture, and the global random generators of torch, Python
    and NumPy are unchanged.
    """
    before, given, generators = fingerprints(state), _digests(batch), _generators()
    slots = [id(p) for p in step.architecture.parameters()]
    first, metrics = step(state, batch, donate=False)
    _require(fingerprints(state) == before, "the step changed the state that it was given")
    _require(_digests(batch) == given, "the step changed the batch that it was given")
    _require(_generators() == generators, "the step moved a global random generator")
    _require([id(p) for p in step.architecture.parameters()] == slots, "the architecture changed")
    second, again = step(state, batch, donate=False)
    assert_same(first, second, "the same call twice")
    _require(_bits(metrics) == _bits(again), "the same call twice gave other metrics")


def assert_donation_equal(step: Step, state: TrainState, batch: Batch) -> None:
    """Assert that a donated step gives the bits of a pure one, and consumes the donated state."""
    pure, metrics = step(state, batch, donate=False)
    given = clone_state(state)
    donated, same = step(given, batch, donate=True)
    assert_same(pure, donated, "donated and pure")
    _require(_bits(metrics) == _bits(same), "donated and pure gave other metrics")
    for name in ("params", "step", "optimizer"):
        try:
            getattr(given, name)
        except ConsumedStateError:
            continue
        raise AssertionError(f"a donated state still lets its {name} be read")


def assert_accumulation_invariant(
    step: Step, state: TrainState, batch: Batch, parts: Sequence[int]
) -> None:
    """Assert that a batch cut into micro-batches of `parts` examples has the same gradient.

    It is the same to rounding, and so are the metrics; where a pair's margin is within rounding of
    0, as at the reference, either side may count as preferred. The law holds for a model whose
    examples do not see each other and that draws no random numbers: with BatchNorm or dropout, give
    an objective in eval mode. The tolerance is that of the step's precision; float64 is the
    strictest.
    """
    whole = step.value_and_grad(state.params, state.buffers, batch)
    cut = step.value_and_grad(state.params, state.buffers, list(_cut(batch, parts)))
    _assert_close(step, state, batch, whole, cut, f"parts {list(parts)}")


def assert_padding_invariant(step: Step, state: TrainState, batch: Batch, columns: int = 3) -> None:
    """Assert that `columns` of padding at the end (mask 0, label −100) change no loss or gradient.

    A model that takes no `attention_mask` gets none: a causal model does not see what comes after.
    """
    masked = _takes_mask(step)
    plain = step.value_and_grad(state.params, state.buffers, _padded(batch, 0, masked))
    if columns < 1:
        raise ConfigError(f"columns: {columns}, expected at least 1 of padding")
    padded = step.value_and_grad(state.params, state.buffers, _padded(batch, columns, masked))
    _assert_close(step, state, batch, plain, padded, f"{columns} columns of padding")


def assert_packing_isolated(step: Step, state: TrainState, batch: Batch) -> None:
    """Assert that a packed document's log-probs do not depend on the others, to rounding.

    `batch` is one that `functrain.data.packed` makes; a model whose documents see each other fails.
    """
    step.objective.check(batch, step.value_and_grad.vocabulary)
    _require(are_packed(batch), "not a packed batch: no row holds several documents")
    ids, labels = batch["input_ids"], batch["labels"]
    documents = beginnings(batch["position_ids"]).flatten().cumsum(0).view_as(ids)
    limit = step.value_and_grad.vocabulary or int(ids.max()) + 1
    before, tolerance = _logps(step, state, batch), _tolerance(step, state)
    for document in range(1, int(documents.max()) + 1):
        own = documents == document
        others = torch.where(own, (ids + 1) % limit, ids)
        targets = torch.where(labels == IGNORE_INDEX, labels, torch.where(own, others, labels))
        after = _logps(step, state, {**batch, "input_ids": others, "labels": targets})
        apart = torch.where(own[:, 1:], 0.0, (after - before).abs())
        row, place = (int(n) for n in own.nonzero()[0])
        most = 10 * tolerance * max(1.0, float(before.abs().max()))
        _require(
            float(apart.max()) <= most,
            f"another document sees the one that begins at {[row, place]}: a log-prob is "
            f"{float(apart.max()):.3g} off",
        )


def _logps(step: Step, state: TrainState, batch: Batch) -> Tensor:
    """The targets' log-probs in eval mode, [batch, time − 1]; 0 where there is no target."""
    gradient = step.value_and_grad
    values, buffers = gradient.values(state.params), gradient.buffer_values(state.buffers)
    device = device_of(state.params)
    moved = to_device(batch, device)
    with (
        torch.no_grad(),
        bound(step.architecture, values, buffers, "eval", places=gradient.places) as model,
        step.precision.context(device),
    ):
        return token_scores(model, moved, detailed=False).logps.cpu()


def assert_clip_laws(grads: Mapping[str, Tensor], max_norm: float) -> None:
    """Assert the laws of clipping, to the rounding of the gradients' coarsest dtype.

    Clipped gradients have a norm of at most `max_norm` and their old direction, and clipping them
    again changes nothing; gradients below the limit keep their bits.
    """
    norm = float(global_norm(grads))
    _require(math.isfinite(norm), f"the gradients' norm is {norm}, which no clipping makes finite")
    dtypes = {grad.dtype for grad in grads.values()}
    coarsest = max((TOLERANCE.get(dtype, 1e-2) for dtype in dtypes), default=0.0)
    narrow = coarsest if coarsest > TOLERANCE[torch.float32] else 0.0
    clipped, measured = clip_by_global_norm(grads, max_norm)
    _require(float(measured) == norm, "clipping reports another norm than it clips by")
    after = float(global_norm(clipped))
    _require(after <= max_norm * (1 + 1e-6 + narrow), f"norm {after} after clipping to {max_norm}")
    if norm + 1e-6 < max_norm:
        same = all(torch.equal(clipped[name], grad) for name, grad in grads.items())
        _require(same, "clipped below the limit")
    factor = after / norm if norm else 1.0
    for name, grad in grads.items():
        slack = 1e-6 * factor * float(grad.abs().max()) + _least(grad) if grad.numel() else 0.0
        _require(
            torch.allclose(clipped[name], grad * factor, rtol=1e-5 + narrow, atol=slack),
            f"{name} points elsewhere after clipping",
        )
    twice, _ = clip_by_global_norm(clipped, max_norm)
    slack = 1e-5 + narrow + 2e-6 / max_norm  # torch's factor has an epsilon of 1e-6 beside the norm
    for name, grad in clipped.items():
        _require(torch.allclose(twice[name], grad, rtol=slack, atol=0.0), f"{name} clipped twice")


def _least(grad: Tensor) -> float:
    """The error that underflow of an element may cause; frequent in float16 gradients."""
    kind = torch.finfo(grad.dtype)
    return max(1e-30, kind.smallest_normal * kind.eps)


def assert_evaluation_invariant(
    step: Step, state: TrainState, batch: Batch, parts: Sequence[int]
) -> None:
    """Assert that an evaluation is the same for any partition and order, and disturbs nothing."""
    before, generators = fingerprint(state), _generators()
    whole = evaluate(step, state, [batch])
    for order in (1, -1):
        cut = evaluate(step, state, list(_cut(batch, parts))[::order])
        _assert_metrics_close(step, state, batch, whole, cut, f"parts {list(parts)}")
    _require(fingerprint(state) == before, "the evaluation changed the state")
    _require(_generators() == generators, "the evaluation moved a global random generator")


def assert_resumable(
    step: Step, state: TrainState, source: Source | Stream, steps: int, directory: Path
) -> None:
    """Assert that a run resumed from a checkpoint of any of its steps ends with the same bits.

    `steps` is a total, as for `train`. `state` is left alone, even by a step that donates.
    """
    states = [clone_state(state)]
    run = train(step, clone_state(state), source, steps=steps)
    states += [clone_state(now) for now, _ in run]
    _require(
        len(states) > 1,
        f"nothing was run: {steps} is a total, and this is step {state.step}",
    )
    for saved in states[:-1]:
        at = saved.step
        loaded = load(save(directory, saved), like=saved)
        assert_same(saved, loaded, f"saved and loaded at step {at}")
        resumed = loaded
        for now, _ in train(step, loaded, source, steps=steps):
            resumed = now
        assert_same(states[-1], resumed, f"resumed at step {at}")


def assert_preference_laws(step: Step, state: TrainState, batch: Batch) -> None:
    """Assert that the margin is 0 at the reference, and that swapping the pair negates it.

    `step` is a `dpo_step` with any β and loss, whose reference is `state.params`.
    """
    _require(isinstance(step.objective, PreferenceOptimization), "not a preference step")
    measured = evaluate(step, state, [batch])
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        value = float(measured[f"eval_{name}"])
        _require(value == 0.0, f"{name} is {value} where the policy is the reference")
    moved, _ = step(state, batch, donate=False)
    moved, _ = step(moved, batch, donate=False)
    swapped = {**batch, "chosen": batch["rejected"], "rejected": batch["chosen"]}
    margin = float(evaluate(step, moved, [batch])["eval_rewards/margins"])
    opposite = float(evaluate(step, moved, [swapped])["eval_rewards/margins"])
    tolerance = 1e-5 + 1e-4 * abs(margin)
    _require(abs(margin + opposite) <= tolerance, f"margin {margin}, and {opposite} when swapped")


def _digests(batch: Batch) -> dict[str, Any]:
    return {
        key: _digests(value) if isinstance(value, Mapping) else digest(value)
        for key, value in batch.items()
    }


def _generators() -> tuple[bytes, object, str]:
    inner: Any = np.random.get_state(legacy=False)["state"]
    numpy_state = f"{inner['pos']} {inner['key'].tolist()}"
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), numpy_state


def _bits(metrics: Metrics) -> dict[str, str]:
    return {name: digest(metrics[name]) for name in metrics}


def _cut(batch: Batch, parts: Sequence[int]) -> Iterator[Batch]:
    bounds = [0, *itertools.accumulate(parts)]
    if bounds[-1] != examples_in(batch) or min(parts) < 1:
        raise ConfigError(
            f"parts: {list(parts)}, expected positive integers that add up to the batch's "
            f"{examples_in(batch)} examples"
        )
    for start, stop in itertools.pairwise(bounds):
        yield rows_of(batch, start, stop)


def _takes_mask(step: Step) -> bool:
    """Whether the model's forward takes an `attention_mask`, by name or among any keywords."""
    known = inspect.signature(step.architecture.forward).parameters
    return "attention_mask" in known or any(p.kind is p.VAR_KEYWORD for p in known.values())


def _padded(batch: Batch, columns: int, masked: bool = True) -> Batch:
    if "input_ids" not in batch:
        sides = {k: v for k, v in batch.items() if isinstance(v, Mapping) and "input_ids" in v}
        _require(bool(sides), f"a batch of {sorted(batch)}, of which nothing is known to be padded")
        padded = {side: _padded(each, columns, masked) for side, each in sides.items()}
        if "reference_logps" in batch:
            padded["reference_logps"] = {
                side: F.pad(logps, (0, columns)) if logps.ndim > 1 else logps
                for side, logps in batch["reference_logps"].items()
            }
        return {**batch, **padded}
    _require(not are_packed(batch), "a packed batch: with a mask beside it it would be another one")
    if masked:
        batch = {"attention_mask": torch.ones_like(batch["input_ids"]), **batch}
    fill = {"labels": IGNORE_INDEX}
    wider = {k: F.pad(t, (0, columns), value=fill.get(k, 0)) for k, t in batch.items()}
    if "position_ids" in batch and "attention_mask" not in batch:
        # Positions that restart would make it a packed batch.
        given = batch["position_ids"]
        onward = given[:, -1:] + torch.arange(1, columns + 1, device=given.device)
        wider["position_ids"] = torch.cat([given, onward], 1)
    return wider


def _tolerance(step: Step, state: TrainState) -> float:
    """The tolerance of the coarsest dtype among the params and the step's precision."""
    kept = {p.dtype for p in state.params.values() if p.is_floating_point() or p.is_complex()}
    computed = {each for each in (step.precision.autocast, step.precision.cast) if each}
    return max(TOLERANCE.get(dtype, 1e-2) for dtype in kept | computed)


def _ties(step: Step, state: TrainState, batch: Batch, margin: float) -> float:
    """The share of pairs whose reward margin is at most `margin`."""
    if not isinstance(step.objective, PreferenceOptimization):
        return 0.0
    pairs = list(_cut(batch, [1] * examples_in(batch)))
    found = [float(evaluate(step, state, [pair])["eval_rewards/margins"]) for pair in pairs]
    return sum(abs(each) <= margin for each in found) / len(found)


def _assert_close(
    step: Step, state: TrainState, batch: Batch, one: Gradients, other: Gradients, what: str
) -> None:
    _require(one.grads.keys() == other.grads.keys(), f"{what}: gradients of other parameters")
    scale, tolerance = float(global_norm(one.grads)), _tolerance(step, state)
    for name, grad in one.grads.items():
        apart = float(global_norm({name: grad - other.grads[name]}))
        _require(
            apart <= tolerance * max(scale, 1e-3),
            f"{what}: the gradient of {name} is {apart:.3g} off, at a global norm of {scale:.3g}",
        )
    _assert_metrics_close(step, state, batch, one.metrics, other.metrics, what)


def _assert_metrics_close(
    step: Step, state: TrainState, batch: Batch, one: Metrics, other: Metrics, what: str
) -> None:
    tolerance = 10 * _tolerance(step, state)
    _require(set(one) == set(other), f"{what}: other metrics")
    for name in one:
        if name == "padding":  # how a batch is padded is free
            continue
        if one.metric(name).empty and other.metric(name).empty:  # a mean over nothing, NaN
            continue
        a, b = float(one[name]), float(other[name])
        slack = tolerance * max(1.0, abs(a))
        if abs(a - b) > slack and name.endswith("rewards/accuracies"):
            slack += _ties(step, state, batch, tolerance)  # rounding may turn their order
        _require(abs(a - b) <= slack, f"{what}: {name} {a} and {b}")


@contextmanager
def _extra() -> Generator[None]:
    """A context that names the extra if a package is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"strategies need {error.name}, which is not installed: "
            "pip install 'functrain[testing]'"
        ) from error


def batches(
    vocabulary: int, *, max_examples: int = 6, max_time: int = 10
) -> SearchStrategy[dict[str, Tensor]]:
    """A Hypothesis strategy: batches of sequences in which some labels are −100.

    Every example has at least one target. `input_ids` and `labels`: int64 [batch, time].
    """
    with _extra():
        from hypothesis import strategies as st

    def build(seed: int, examples: int, time: int, ignored: float) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, vocabulary, (examples, time), generator=generator)
        drop = torch.rand(ids.shape, generator=generator) < ignored
        drop[:, -1] = False
        return {"input_ids": ids, "labels": ids.masked_fill(drop, IGNORE_INDEX)}

    return st.builds(
        build,
        st.integers(0, 2**32 - 1),
        st.integers(1, max_examples),
        st.integers(2, max_time),
        st.floats(0, 0.9),
    )


def pairs(
    vocabulary: int, *, max_examples: int = 4, max_time: int = 10
) -> SearchStrategy[dict[str, dict[str, Tensor]]]:
    """A Hypothesis strategy: preference batches, whose two sides may differ in length."""
    with _extra():
        from hypothesis import strategies as st

    def build(chosen: dict[str, Tensor], cut: int, seed: int) -> dict[str, dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        examples, time = chosen["input_ids"].shape
        shape = (examples, max(2, time - cut))
        ids = torch.randint(0, vocabulary, shape, generator=generator)
        # The completions must differ, or neither would be preferred.
        ids[:, -1] = (chosen["input_ids"][:, shape[1] - 1] + 1) % vocabulary
        return {"chosen": chosen, "rejected": {"input_ids": ids, "labels": ids.clone()}}

    sequences = batches(vocabulary, max_examples=max_examples, max_time=max_time)
    return st.builds(build, sequences, st.integers(0, 4), st.integers(0, 2**32 - 1))


def partitions(total: int) -> SearchStrategy[list[int]]:
    """A Hypothesis strategy: lists of positive integers that add up to `total`."""
    with _extra():
        from hypothesis import strategies as st

    def cut(marks: set[int]) -> list[int]:
        bounds = [0, *sorted(marks), total]
        return [b - a for a, b in itertools.pairwise(bounds)]

    inner = st.integers(1, total - 1) if total > 1 else st.nothing()
    return st.sets(inner, max_size=total - 1).map(cut)
