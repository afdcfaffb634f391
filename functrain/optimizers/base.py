"""The optimizer's contract: a pure pair, its state, and parameter groups by predicate."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, Protocol, runtime_checkable

import attrs
import numpy as np
import torch
from torch import Tensor, nn

from functrain.architecture import check_module
from functrain.checks import check_not_negative, check_tensors, is_number
from functrain.errors import ConfigError, StateError, did_you_mean
from functrain.trees import Tensors, are_like, described, tensors

Predicate = Callable[[str, Tensor], bool]


def _as_tensors(slots: Any) -> Any:
    """Slots with mappings as `Tensors`; anything else is left for a later check to report."""
    if not isinstance(slots, Mapping) or all(isinstance(each, Tensors) for each in slots.values()):
        return slots
    return {s: tensors(each) if isinstance(each, Mapping) else each for s, each in slots.items()}


@attrs.frozen(eq=False, kw_only=True)
class OptimizerState:
    """What an optimizer carries: per-parameter tensors by slot, and a count of applied updates.

    `count`: int64, 0-d; a skipped step does not advance it. `slots`: for each of torch's state
    names (`exp_avg`, `step`, …) a mapping from parameter name to tensor. `kind` says which
    optimizer made it, so that another one is refused instead of fed with the wrong moments.
    """

    kind: str
    count: Tensor
    # Plain mappings, as in a state that is evolved by hand, are taken too.
    slots: Mapping[str, Tensors] = attrs.field(converter=_as_tensors)


class Optimizer(Protocol):
    """A pure optimizer; `lr` is used where a step has no schedule."""

    @property
    def lr(self) -> float:
        """Learning rate when no schedule gives one."""
        ...

    @property
    def kind(self) -> str:
        """The `kind` that its states carry."""
        ...

    def init(self, params: Mapping[str, Tensor]) -> OptimizerState:
        """The state before the first update."""
        ...

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
        """New params and state; a parameter without a gradient stays as it is.

        `applied` (bool, 0-d): where False, nothing changes. `donate=True` writes into the memory
        of `params` and `state`, and may write into that of `grads`; use none of them afterwards.

        Raises `StateError`, before anything is written, for a gradient whose name, shape, dtype or
        device is not a parameter's, and for a state that another optimizer made.
        """
        ...


@runtime_checkable
class Checking(Protocol):
    """An optimizer that can say beforehand what its donated update would refuse.

    One that cannot may be a part of a `partition` too, but refuses only once the parts before it
    have been updated.
    """

    def check(
        self, grads: Mapping[str, Tensor], state: OptimizerState, params: Mapping[str, Tensor]
    ) -> None:
        """Raise what `update` would with `donate=True`, and write nothing."""
        ...


@attrs.frozen(kw_only=True)
class Group:
    """Options for the parameters that `where(name, tensor)` selects; the first match counts."""

    where: Predicate
    options: Mapping[str, Any]

    def __attrs_post_init__(self) -> None:
        check_predicate("group", self.where)
        if not isinstance(self.options, Mapping):
            raise ConfigError(f"group options: {self.options!r}, expected a mapping")
        check_not_negative("group lr_scale", self.options.get("lr_scale", 1.0))


def check_predicate(what: str, where: object) -> None:
    """Raise `ConfigError` unless `where` can be called."""
    if not callable(where):
        raise ConfigError(
            f"{what}: {where!r}, expected a predicate: lambda name, tensor: name.endswith('bias')"
        )


def as_groups(groups: Iterable[Group]) -> tuple[Group, ...]:
    """The groups as a tuple; `ConfigError` for anything else."""
    if isinstance(groups, Group):
        raise ConfigError("groups: one Group, expected a sequence of them: groups=[group]")
    if isinstance(groups, str) or not isinstance(groups, Iterable):
        raise ConfigError(f"groups: {groups!r}, expected a sequence of optim.group(where, …)")
    several = tuple(groups)
    for number, each in enumerate(several):
        if not isinstance(each, Group):
            raise ConfigError(
                f"groups[{number}]: expected optim.group(where, …), got {type(each).__name__}"
            )
    return several


def group(where: Predicate, **options: Any) -> Group:
    """A parameter group: `group(is_bias, weight_decay=0.0, lr_scale=0.1)`.

    Options are those of the optimizer; `lr_scale` multiplies the learning rate.
    """
    return Group(where=where, options=options)


def no_decay(architecture: nn.Module) -> Group:
    """The group without weight decay: biases, norms and embeddings of this architecture."""
    check_module(architecture)
    exempt: set[int] = set()
    for module in architecture.modules():
        own = dict(module.named_parameters(recurse=False))
        if isinstance(module, nn.Embedding) or "norm" in type(module).__name__.lower():
            exempt.update(id(p) for p in own.values())
        exempt.update(id(p) for name, p in own.items() if name == "bias" or p.ndim < 2)
    names = frozenset(name for name, p in architecture.named_parameters() if id(p) in exempt)
    return group(_Among(names), weight_decay=0.0)


@attrs.frozen
class _Among:
    """A predicate by name: a record, since a function made here could not be pickled."""

    names: frozenset[str]

    def __call__(self, name: str, _tensor: Tensor) -> bool:
        return name in self.names


def _is_real(given: object) -> bool:
    """Whether this is one real number in a form of torch's or NumPy's."""
    if isinstance(given, Tensor):
        return given.ndim == 0 and not (given.is_meta or given.is_complex())
    if isinstance(given, np.generic | np.ndarray):
        return given.ndim == 0 and given.dtype.kind in "fiu"
    return False


def check_rate(name: str, lr: Any) -> None:
    """Raise `ConfigError` unless `lr` is a learning rate; with a hint where params are given."""
    _check_number(name, lr)
    check_not_negative(f"{name} lr", lr)


def _check_number(name: str, lr: Any) -> None:
    if not is_number(lr):
        hint = "params are given to step.init, not to the optimizer"
        if _is_real(lr):
            hint = f"float({lr.item()!r}), say"
        raise ConfigError(f"{name}: lr is a {type(lr).__name__}, expected a number; {hint}")


def checked(cls: Callable[..., torch.optim.Optimizer], **options: Any) -> torch.optim.Optimizer:
    """Make the class over one matrix, with its own complaints as `ConfigError`."""
    name = getattr(cls, "__name__", repr(cls))
    if "lr" in options:
        _check_number(name, options["lr"])
    try:
        with first_defaults():
            return cls([torch.zeros(2, 2)], **options)
    except AssertionError as error:
        raise ConfigError(
            f"{name}: its constructor failed an assertion ({error}) with {options}"
        ) from error
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{name}: {error}") from error


@contextmanager
def first_defaults() -> Generator[None]:
    """A context with torch's own default device and dtype, the CPU and float32.

    A class makes its counts by the defaults: with others a state would have other dtypes (and of
    ASGD in half precision other bits), or would lie on a device that its update does not take. So
    under a float64 default NAdam and ASGD count in float32 here, and in float64 in a loop of torch.
    """
    made = torch.empty(0)  # what is asked here takes 1 µs, torch.get_default_device 10
    if made.device.type == "cpu" and made.dtype is torch.float32:
        yield
        return
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float32)
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(before)


def check_update(
    kind: str, grads: Mapping[str, Tensor], state: OptimizerState, params: Mapping[str, Tensor]
) -> None:
    """Raise `StateError` unless each gradient fits its parameter and `kind` made the state.

    A fused kernel trusts the sizes, and reads past the end of a gradient that is smaller. No values
    are read here, so nothing waits for an accelerator.
    """
    if not isinstance(state, OptimizerState):
        raise StateError(
            f"state: expected an OptimizerState from init(params), got {type(state).__name__}"
        )
    if state.kind != kind:
        raise StateError(
            f"state: made by {state.kind} and given to {kind}; update it with the optimizer that "
            "made it, or begin anew with init(params)"
        )
    check_tensors("grads", grads)
    check_tensors("params", params)
    for name in grads.keys() - params.keys():
        raise StateError(f"grads/{name}: no parameter has this name; {did_you_mean(name, params)}")
    if are_like(grads, params):
        return
    dtypes = set()
    for name, grad in grads.items():
        param = params[name]
        dtype = param.dtype
        if (
            not isinstance(grad, Tensor)
            or grad.shape != param.shape
            or grad.dtype != dtype
            or grad.device != param.device
        ):
            _refuse_gradient(name, grad, param)
        dtypes.add(dtype)
    if not all(dtype.is_floating_point or dtype.is_complex for dtype in dtypes):
        _refuse_integers(grads)


def _refuse_gradient(name: str, grad: object, param: Tensor) -> NoReturn:
    if not isinstance(grad, Tensor):
        raise StateError(
            f"grads/{name}: expected a tensor, got {type(grad).__name__}; leave out a parameter "
            "that has no gradient"
        )
    raise StateError(
        f"grads/{name}: {described(grad)}, expected {described(param)} as the parameter is; "
        "give the gradient with respect to these params"
    )


def _refuse_integers(grads: Mapping[str, Tensor]) -> NoReturn:
    numbers = [n for n, g in grads.items() if not (g.is_floating_point() or g.is_complex())]
    name = numbers[0]
    raise StateError(
        f"params/{name}: {described(grads[name])}, expected a floating dtype; leave it out of grads"
    )


def laid_out(grad: Tensor, param: Tensor) -> Tensor:
    """The gradient in the parameter's memory layout, which fused kernels trust as well."""
    return grad if grad.stride() == param.stride() else torch.empty_like(param).copy_(grad)


def zero_count(params: Mapping[str, Tensor]) -> Tensor:
    device = next((p.device for p in params.values()), torch.device("cpu"))
    return torch.zeros((), dtype=torch.int64, device=device)


def advanced(count: Tensor, applied: Tensor | None) -> Tensor:
    return count + (1 if applied is None else applied)


def held_back(applied: Tensor | None, *, waits: bool = False) -> bool:
    """Whether nothing is applied, if reading that costs nothing; fused kernels decide themselves.

    `waits`: read it on an accelerator too, where no kernel can decide.
    """
    told = applied is not None and (waits or applied.device.type == "cpu")
    return told and not bool(applied)


def rate_of(learning_rate: Tensor | float, options: Mapping[str, Any]) -> Tensor | float:
    scale: float = options.get("lr_scale", 1.0)
    if isinstance(learning_rate, Tensor) and learning_rate.device.type != "cpu":
        return (learning_rate * scale).float()
    if not is_number(learning_rate) and not _is_real(learning_rate):
        raise ConfigError(f"learning_rate: {learning_rate!r}, expected a number, or a 0-d tensor")
    rate = float(learning_rate)
    return rate if scale == 1.0 else rate * scale


def owned(
    params: Mapping[str, Tensor],
    slots: Mapping[str, Tensors],
    grads: Mapping[str, Tensor],
    donate: bool,
) -> tuple[Tensors, dict[str, Tensors]]:
    """Memory that the kernel may write: the given one if donated, else copies of what changes."""
    if donate:
        return Tensors(params), {slot: Tensors(t) for slot, t in slots.items()}

    names = frozenset(grads)

    def copied(items: Mapping[str, Tensor]) -> Tensors:
        return Tensors({n: t.detach().clone() if n in names else t for n, t in items.items()})

    return copied(params), {slot: copied(t) for slot, t in slots.items()}


def grouped(
    groups: Sequence[Group], params: Mapping[str, Tensor], grads: Mapping[str, Tensor]
) -> Iterator[tuple[Mapping[str, Any], list[str]]]:
    """The options of each group with the names it holds, then the defaults with the rest."""
    given = frozenset(grads)
    rest = [name for name in params if name in given]
    found: list[tuple[Mapping[str, Any], list[str]]] = []
    for each in groups:
        own = [name for name in rest if each.where(name, params[name])]
        held = frozenset(own)
        rest = [name for name in rest if name not in held]
        found.append((each.options, own))
    found.append(({}, rest))
    for options, names in found:
        if names:
            yield options, names
