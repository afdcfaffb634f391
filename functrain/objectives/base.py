"""The contract of an objective: a weight before the forward, and a sum after it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from functrain.architecture import Mode, check_mode
from functrain.errors import ArchitectureError, ConfigError
from functrain.metrics import Metrics
from functrain.objectives.batches import MODEL_INPUTS, Batch
from functrain.trees import Tensors, described, tensors, versions


class Objective(Protocol):
    """What a step minimises: `sum / weight`, both additive over examples unless `batch_coupled`.

    The law that accumulation rests on: for any partition of a batch, the sums of the parts add up
    to the sum of the whole, and so do the weights.
    """

    @property
    def name(self) -> str:
        """The stage's name: `pretrain`, `sft`, `dpo`."""
        ...

    @property
    def mode(self) -> Mode:
        """The mode of the module while it trains."""
        ...

    @property
    def batch_coupled(self) -> bool:
        """Whether the loss of one example depends on the others of its batch."""
        ...

    def check(self, batch: Batch, vocabulary: int | None) -> None:
        """Raise `BatchError` for a batch that is not of this objective's form."""
        ...

    def weight(self, batch: Batch) -> Tensor:
        """The batch's weight, known before the forward: a count of target tokens or pairs; int64.

        0-d, or [k] for a loss of k sums, each of which is divided by its own weight.
        """
        ...

    def check_weight(self, weight: Tensor) -> None:
        """Raise `BatchError` if the weight of a whole logical batch is 0."""
        ...

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Metrics]:
        """The summed loss and the metrics of a bound model.

        The sum has the shape of `weight`, 0-d or [k], and carries its autograd history. The metrics
        include `loss`, the mean of the sum.
        """
        ...

    def kept(self) -> Mapping[str, Tensor] | None:
        """Tensors that the objective reads at every step and that nobody may overwrite."""
        ...


_MEMBERS = ("name", "mode", "batch_coupled", "check", "weight", "check_weight", "kept", "__call__")


def check_objective(given: Any) -> None:
    """Raise `ConfigError` for what is not an `Objective`, such as a loss function or a class."""
    if isinstance(given, type):
        raise ConfigError(f"objective: it has not been made: {given.__name__}()")
    missing = [name for name in _MEMBERS if not hasattr(given, name)]
    if missing:
        raise ConfigError(
            f"objective: {getattr(given, '__name__', type(given).__name__)} has no "
            f"{', '.join(missing)}; expected one of functrain.objectives, or an object with all "
            "of functrain.objectives.Objective"
        )
    check_mode(given.mode, f"objective {given.name!r}: ")


@runtime_checkable
class Coupled(Protocol):
    """An objective whose micro-batches depend on each other: `batch_coupled`.

    A first pass without gradients calls `observe` on every micro-batch. `couple` turns the
    observations into one coupling for each micro-batch, which is passed to its call. A batch in one
    piece is called without a coupling.
    """

    def observe(self, model: nn.Module, batch: Batch) -> Any:
        """What the other micro-batches need to know of this one.

        With several workers it is a tensor, [examples] or 0-d, or a record of tensors: an attrs
        class, a dataclass, a tuple, a list or a mapping.
        """
        ...

    def couple(self, observed: Sequence[Any]) -> Sequence[Any]:
        """What each micro-batch needs to know of the whole batch, in their order."""
        ...

    def __call__(
        self, model: nn.Module, batch: Batch, coupling: Any = None
    ) -> tuple[Tensor, Metrics]:
        """As `Objective.__call__`, for one part of a batch."""
        ...


@runtime_checkable
class Direct(Protocol):
    """An objective whose loss is differentiated once, and only by the gradient function.

    Where `direct` is true, nothing transforms the loss that it returns. A summed cross entropy by
    chunks, if it has one, is that loss unchanged; `slopes` that it gives for log-probs by chunks
    are the gradient of that loss times the accumulation's factor. Gradients of large tables are
    then summed where they are made (`functrain.accumulators`), which takes less time and memory and
    gives the same to rounding. Wherever gradients are on, the model is called only with the params
    that it is bound to, never with copies or functions of them, and no gradient of its activations
    is taken.

    Ask `is_direct`: a subclass that computes another loss is direct only if it says so itself.
    """

    @property
    def direct(self) -> bool:
        """Whether this objective keeps to that."""
        ...


def is_direct(objective: object) -> bool:
    """Whether an objective is `Direct`, according to the class that computes its loss."""
    if not isinstance(objective, Direct) or not objective.direct:
        return False
    for cls in type(objective).__mro__:
        if "direct" in vars(cls):
            return True
        if "__call__" in vars(cls) or "summed" in vars(cls):
            break
    return False


@runtime_checkable
class Carrying(Protocol):
    """An objective with tensors of its own in the state: running means, a moving reference.

    Every `reference_sync` steps the reference moves by the fraction `reference_mixup` (α) towards
    the params; with None it does not move.
    """

    @property
    def reference(self) -> Tensors | None:
        """The initial reference."""
        ...

    @property
    def reference_mixup(self) -> float | None:
        """α, the fraction by which the reference moves; None: it does not."""
        ...

    @property
    def reference_sync(self) -> int:
        """The number of steps between its moves."""
        ...

    def init_running(self, device: torch.device) -> Tensors | None:
        """`state.running` before the first step; None where nothing is carried."""
        ...

    def advance(self, running: Tensors, metrics: Metrics) -> Tensors:
        """`state.running` after an applied step with these metrics.

        New tensors, of the names, shapes, dtypes and devices of `running`.
        """
        ...

    def carrying(self, reference: Tensors | None, running: Tensors | None) -> Objective:
        """The same objective, with what a state carries for it."""
        ...


def advanced(objective: Carrying, running: Tensors, metrics: Metrics) -> Tensors:
    """What the objective's `advance` returns.

    Raises `ConfigError` if that is not of the form of `running`, by which a checkpoint is read, or
    if `running` itself, which is the old state's, was written into (other than through `.data`).
    """
    begun = versions(running)
    found: Any = objective.advance(running, metrics)
    what = f"objective {type(objective).__name__}: its advance"
    if versions(running) != begun:
        raise ConfigError(
            f"{what} has written into the tensors that it was given, which are the old state's; "
            "make new ones"
        )
    if not isinstance(found, Mapping):
        raise ConfigError(
            f"{what} returned a {type(found).__name__}, expected tensors by name, as "
            "functrain.trees.Tensors are"
        )
    if found.keys() != running.keys():
        raise ConfigError(
            f"{what} returned {_names(found)}, expected {_names(running)}, as init_running made"
        )
    for name, old in running.items():
        new = found[name]
        if not isinstance(new, Tensor) or _form(new) != _form(old):
            given = described(new) if isinstance(new, Tensor) else type(new).__name__
            raise ConfigError(
                f"{what} returned running/{name} as {given}, expected {described(old)} as it was "
                "given"
            )
    return tensors(found)


def _names(items: Mapping[str, object]) -> str:
    return ", ".join(sorted(map(str, items))) or "no tensors"


def _form(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.shape, tensor.device


def logits_of(model: Callable[..., object], batch: Batch) -> Tensor:
    """The model's logits [batch, time, vocabulary] for a batch of sequences, in float32 or more.

    The model is called with those `MODEL_INPUTS` that the batch has; it may return logits, a
    mapping with `logits`, or an object with `.logits`. Half precision is widened here, so that the
    loss is taken in float32 whatever the precision of the forward.
    """
    outputs = model(**{key: batch[key] for key in MODEL_INPUTS if key in batch})
    logits = logits_in(outputs)
    expected = tuple(batch["input_ids"].shape)
    if not isinstance(logits, Tensor) or tuple(logits.shape[:-1]) != expected:
        shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ArchitectureError(
            f"logits: the model returned {shape}, expected [batch, time, vocabulary] = "
            f"[{expected[0]}, {expected[1]}, …]"
        )
    return logits.float() if logits.dtype.itemsize < 4 else logits


def logits_in(outputs: Any) -> Any:
    """The logits in a model's output; `ArchitectureError` where there are none."""
    if isinstance(outputs, Tensor):
        return outputs
    if isinstance(outputs, Mapping) and "logits" in outputs:
        return outputs["logits"]
    if hasattr(outputs, "logits"):
        return outputs.logits
    raise ArchitectureError(
        f"the model returned a {type(outputs).__name__} without logits; expected a tensor, a "
        "mapping with 'logits', or an object with .logits"
    )
