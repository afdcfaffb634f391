"""The training state: one immutable record of everything that the next step depends on."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NoReturn, TypeVar, cast

import attrs
import torch
from torch import Tensor

from functrain.errors import AliasError, ConfigError, ConsumedStateError, StateError
from functrain.guards import GuardState
from functrain.keys import MAX_KEY
from functrain.optimizers import OptimizerState
from functrain.precision import LossScale
from functrain.schedules import PlateauState
from functrain.trees import (
    Tensors,
    clone,
    digest,
    disown_shared,
    ordered,
    storages,
    tensors,
    writable,
)

Leaf = Tensor | int | float | str | None


@attrs.frozen(kw_only=True)
class Cursor:
    """How much data has been consumed: samples and tokens trained on since the stage began.

    `loader`: the JSON state of a stateful loader after the last consumed batch. A
    `functrain.data.Stream` provides it; a loop of your own may store its loader's state here.
    """

    samples: int = 0
    tokens: int = 0
    loader: str | None = None


@attrs.frozen(kw_only=True, eq=False)
class SchedulerState:
    """The schedule's position.

    `count`: applied updates, int64, 0-d. `plateau`: the record of `reduce_on_plateau`; a step with
    another schedule leaves it as it is, so that the two can take turns.
    """

    count: Tensor
    plateau: PlateauState | None = None


def _taken(items: Mapping[str, Tensor]) -> Tensors:
    """`Tensors` unchanged; a plain mapping sorted, and `in_order` if it holds only tensors."""
    found = tensors(items)
    plain = found is not items and all(isinstance(value, Tensor) for value in found.values())
    return ordered(found) if plain else found


@attrs.frozen(kw_only=True, eq=False)
class TrainState:
    """Everything the next step depends on.

    `step` counts calls; `optimizer.count` and `scheduler.count` count applied updates, so a
    skipped step (overflow, non-finite gradients) advances only the first. `params` and `buffers`
    map the module's own names to tensors, sorted. `key` is the root of all randomness.

    Present only where something needs them: `average`, the moving average of the params;
    `reference`, a reference that moves during training (TR-DPO); `guard`, what a spike guard has
    seen; `running`, what else an objective carries (the running mean of `bco_pair`); `base`, the
    fingerprint of the frozen params under adapters, which the architecture holds and the state does
    not, and the adapters' scale.

    Change a field with `attrs.evolve(state, ...)`; to branch before a donating step, use
    `functrain.clone(state)`.
    """

    step: int
    # A state evolved by hand may bring a plain mapping.
    params: Tensors = attrs.field(converter=_taken)
    buffers: Tensors = attrs.field(converter=_taken)
    optimizer: OptimizerState
    scheduler: SchedulerState
    scaler: LossScale | None
    key: int
    cursor: Cursor = Cursor()
    average: Tensors | None = None
    reference: Tensors | None = None
    guard: GuardState | None = None
    running: Tensors | None = None
    base: str | None = None


def why_apart(made: str | None, here: str | None) -> str | None:
    """Why adapters trained over the base `made` do not fit the base `here`; None if they do.

    A base without a scale, as in the first checkpoints, fits any scale.
    """
    if made == here:  # the case of every step
        return None
    (old, scale), (new, other) = _parts(made), _parts(here)
    if old != new:
        return (
            f"it was trained over {_based(old)}, and here are {_based(new)}; attach the adapters "
            "to the params that they were made for"
        )
    if scale is None or other is None or math.isclose(scale, other):
        return None
    return (
        f"its adapters are scaled by {scale}, and those here by {other}; attach them with the "
        "rank, alpha and rslora that they were trained with"
    )


def _parts(base: str | None) -> tuple[str, float | None]:
    """The fingerprint in a base, and its scale if it has one; an unreadable base is unchanged."""
    fingerprint, _, scale = (base or "").partition(" scale=")
    try:
        return fingerprint, float(scale) if scale else None
    except ValueError:
        return base or "", None


def _based(fingerprint: str) -> str:
    return f"the frozen params {fingerprint[:16]}…" if fingerprint else "no frozen params"


class _ConsumedState(TrainState):
    """What a state becomes when a donated step has reused its memory."""

    __slots__ = ()

    def __getattribute__(self, name: str) -> Any:
        if name not in ("__class__", "__repr__"):
            _raise_consumed(object.__getattribute__(self, "step"))
        return object.__getattribute__(self, name)

    def __repr__(self) -> str:
        return "TrainState(consumed)"


def _raise_consumed(step: int) -> NoReturn:
    raise ConsumedStateError(
        f"this state was donated to the step that made step {step + 1} of it, which reused its "
        "memory; use the state that step returned, or call the step with donate=False"
    )


def consume(state: TrainState, successor: TrainState | None) -> None:
    """Tombstone a donated state: each later access raises `ConsumedStateError`.

    Its params and its optimizer's slots raise too, since a donated step reuses their memory;
    mappings that live on in `successor` (that of a skipped step) are left alone. `successor` is
    None if the step was interrupted.
    """
    if isinstance(state, _ConsumedState):
        return
    by = f"the step that made step {state.step + 1}"
    kept = set() if successor is None else {id(items) for _, items in _donated(successor)}
    for _, items in _donated(state):
        if id(items) not in kept:
            items.consume(by)
    object.__setattr__(state, "__class__", _ConsumedState)


def _donated(state: TrainState) -> Iterator[tuple[str, Tensors]]:
    yield "params", state.params
    for slot, items in state.optimizer.slots.items():
        yield f"optimizer/{slot}", items


def writable_state(state: TrainState, trainable: Collection[str]) -> TrainState:
    """The state with copies of the tensors that a donated step would overwrite but may not own.

    Such tensors are shared with an earlier state (a pure step leaves some params as they were), or
    came from a mapping of the user's.
    """
    params = writable(state.params, trainable)
    slots = {slot: writable(items) for slot, items in state.optimizer.slots.items()}
    if params is state.params and all(slots[s] is t for s, t in state.optimizer.slots.items()):
        return state
    optimizer = attrs.evolve(state.optimizer, slots=slots)
    return attrs.evolve(state, params=params, optimizer=optimizer)


def disown_repeated(state: TrainState) -> None:
    """Mark the tensors of a mapping that is given in two places of the state as owned by neither.

    A state evolved by hand may have one mapping of zeros for two slots. Each would claim its memory
    as its own, and a donated step would write both slots into it; now it copies them.
    """
    several = [items for _, items in _donated(state)]
    if len(set(map(id, several))) < len(several):
        disown_shared(*several)


def refuse_aliases(
    state: TrainState, trainable: Collection[str], *others: Mapping[str, Tensor] | None
) -> None:
    """Raise `AliasError` if a donated step would overwrite storage that it also reads.

    Overwritten: the trainable params and the optimizer's slots. Read: `state.average`,
    `state.reference` and `others` (a step's own reference).
    """
    kept = [items for items in (state.average, state.reference, *others) if items is not None]
    if not kept:
        return
    read = {address: name for items in kept for address, name in storages(items).items()}
    for owner, items in _donated(state):
        for address, name in storages(items).items():
            if address in read and address and (owner != "params" or name in trainable):
                raise AliasError(
                    f"{owner}/{name} shares storage with {read[address]} of the reference or the "
                    "average, which a donated step would overwrite; give the state params of its "
                    "own: step.init(functrain.trees.clone(params), buffers)"
                )


def checked_key(seed: int) -> int:
    """A seed as a root key; outside [0, 2**63) it raises `ConfigError`."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= MAX_KEY:
        raise ConfigError(f"seed: expected an integer in [0, 2**63), got {seed!r}")
    return seed


def leaves(record: object, prefix: str = "") -> Iterator[tuple[str, Leaf]]:
    """Every leaf of a state, in order, with its path: `optimizer/slots/exp_avg/head.weight`."""
    if isinstance(record, Mapping):
        for name in sorted(record):
            yield from leaves(record[name], f"{prefix}/{name}")
    elif (fields := getattr(type(record), "__attrs_attrs__", None)) is not None:
        for field in fields:
            path = f"{prefix}/{field.name}" if prefix else field.name
            yield from leaves(getattr(record, field.name), path)
    elif record is None or isinstance(record, Tensor | int | float | str):
        yield prefix, record
    else:
        raise StateError(f"{prefix}: a state cannot hold a {type(record).__name__}")


def check_state(state: object, where: str = "state") -> None:
    """Raise `StateError` unless `state` is a `TrainState`."""
    if not isinstance(state, TrainState):
        raise StateError(
            f"{where}: expected a TrainState, as step.init makes it, got {type(state).__name__}"
        )


R = TypeVar("R")


def map_tensors(record: R, function: Callable[[str, Tensor], Tensor], prefix: str = "") -> R:
    """The record with each tensor replaced by `function(path, tensor)`; paths as in `leaves`."""
    found: Any = record
    if isinstance(record, Tensor):
        found = function(prefix, record)
    elif isinstance(record, Mapping):
        items = {n: map_tensors(each, function, f"{prefix}/{n}") for n, each in record.items()}
        found = Tensors(items) if isinstance(record, Tensors) else items
    elif (fields := getattr(type(record), "__attrs_attrs__", None)) is not None:
        changes = {}
        for field in fields:
            path = f"{prefix}/{field.name}" if prefix else field.name
            changes[field.name] = map_tensors(getattr(record, field.name), function, path)
        found = attrs.evolve(found, **changes)
    return cast(R, found)


def fingerprints(state: TrainState) -> dict[str, str]:
    """A hash of each leaf, by path: sha256 of a tensor's dtype, shape and bytes, else its `repr`.

    For a sharded state every worker must call this, as for `fingerprint`.
    """
    check_state(state)
    return {
        path: digest(leaf) if isinstance(leaf, Tensor) else repr(leaf)
        for path, leaf in leaves(state)
    }


def fingerprint(state: TrainState) -> str:
    """One hexadecimal hash over all leaves; equal if and only if every leaf has the same bits.

    For a sharded state every worker must call this at the same point, since the rows are gathered:
    `if world.speaks: print(fingerprint(state))` would fail with an error from torch or gloo.
    """
    hasher = hashlib.sha256()
    for path, leaf in fingerprints(state).items():
        hasher.update(f"{path}\0{leaf}\0".encode())
    return hasher.hexdigest()


def clone_state(state: TrainState) -> TrainState:
    """Copy a state into memory of its own, to keep a branch beside a donating step.

    To copy params alone, use `functrain.trees.clone`.
    """
    check_state(state, "clone")
    return attrs.evolve(
        state,
        params=clone(state.params),
        buffers=clone(state.buffers),
        optimizer=attrs.evolve(
            state.optimizer, slots={s: clone(t) for s, t in state.optimizer.slots.items()}
        ),
        average=None if state.average is None else clone(state.average),
        reference=None if state.reference is None else clone(state.reference),
        running=None if state.running is None else clone(state.running),
    )


def device_of(params: Mapping[str, Tensor]) -> torch.device:
    """The one device of the params; raises `ConfigError` if there are several."""
    devices = {tensor.device for tensor in params.values()}
    if len(devices) > 1:
        raise ConfigError(f"params: on several devices {sorted(map(str, devices))}, expected one")
    return next(iter(devices), torch.device("cpu"))
