"""What an optimizer about which nothing is known returns: taken, or refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import attrs
from torch import Tensor

from functrain.errors import ConfigError
from functrain.optimizers.base import OptimizerState
from functrain.trees import Tensors, described, ordered


def begun(kind: str, state: object) -> OptimizerState:
    """The state that `init` returned, its slots in mappings that nobody else has.

    Raises `ConfigError` for what is not a state.
    """
    if not isinstance(state, OptimizerState):
        raise ConfigError(
            f"optimizer {kind!r}: its init returned a {type(state).__name__}, expected an "
            "OptimizerState"
        )
    return _in_own_mappings(kind, state)


def updated(
    kind: str, returned: Any, before: Mapping[str, Tensor]
) -> tuple[Tensors, OptimizerState]:
    """The params and the state that `update` returned, in order, in mappings that nobody else has.

    Raises `ConfigError` for what is not an update of the params `before`: other names, shapes or
    dtypes, or something else altogether.
    """
    match returned:
        case (Mapping() as params, OptimizerState() as state):
            _check_params(kind, params, before)
            return ordered(params), _in_own_mappings(kind, state)
        case (params, state):
            given = f"{type(params).__name__} and {type(state).__name__}"
        case _:
            given = f"a {type(returned).__name__}"
    raise ConfigError(
        f"optimizer {kind!r}: its update returned {given}, expected the new params, a mapping by "
        "name, and an OptimizerState"
    )


def _check_params(kind: str, params: Mapping[str, Any], before: Mapping[str, Tensor]) -> None:
    if params.keys() != before.keys():
        _refuse_names(kind, params, before)
    for name, old in before.items():
        new = params[name]
        if new is old:
            continue
        if not isinstance(new, Tensor):
            raise ConfigError(
                f"optimizer {kind!r}: its update returned params/{name}, which is a "
                f"{type(new).__name__}, expected a tensor"
            )
        if new.shape != old.shape or new.dtype != old.dtype:
            raise ConfigError(
                f"optimizer {kind!r}: its update returned params/{name} as {described(new)}, "
                f"expected {described(old)} as it was given"
            )


def _refuse_names(kind: str, params: Mapping[str, Any], before: Mapping[str, Tensor]) -> NoReturn:
    where = f"optimizer {kind!r}: its update returned"
    missing = before.keys() - params.keys()
    if missing:
        raise ConfigError(
            f"{where} no params/{min(missing)}; return all of them, one without a gradient as it is"
        )
    unknown = min(params.keys() - before.keys())
    raise ConfigError(f"{where} params/{unknown}, which it was not given; leave it out")


def _in_own_mappings(kind: str, state: OptimizerState) -> OptimizerState:
    for slot, items in state.slots.items():
        if "/" in slot:  # in a checkpoint a slash ends it
            raise ConfigError(f"optimizer {kind!r}: slot {slot!r}, expected a name without a slash")
        if not isinstance(items, Mapping):
            raise ConfigError(
                f"optimizer {kind!r}: slot {slot!r} is a {type(items).__name__}, expected a "
                "mapping from a parameter's name to a tensor"
            )
        for name, value in items.items():
            if not isinstance(value, Tensor):
                raise ConfigError(
                    f"optimizer {kind!r}: slot {slot!r} has a {type(value).__name__} of {name!r}, "
                    "expected a tensor; keep a number as a 0-d one"
                )
    return attrs.evolve(state, slots={slot: ordered(t) for slot, t in state.slots.items()})
