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
from functrain.trees import Tensors


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
        """What the batch counts for: target tokens, or pairs; int64; known before compute.

        0-d; or [k] for a loss of k sums, each of which is divided by a weight of its own.
        """
        ...

    def check_weight(self, weight: Tensor) -> None:
        """Raise `BatchError` where a whole logical batch counts for nothing."""
        ...

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Metrics]:
        """The summed loss (as `weight` 0-d or [k], with its history) and metrics, in a binding.

        Among the metrics is `loss`, the mean of the sum.
        """
        ...

    def kept(self) -> Mapping[str, Tensor] | None:
        """Tensors that the objective reads at every step and nobody may overwrite."""
        ...


_MEMBERS = ("name", "mode", "batch_coupled", "check", "weight", "check_weight", "kept", "__call__")


def check_objective(given: Any) -> None:
    """Raise `ConfigError` for what is no `Objective`: a function of a loss, say, or a class."""
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
    """An objective whose micro-batches need to know of each other: `batch_coupled`.

    In a first pass, without gradients, every micro-batch is observed; what `couple` makes of the
    observations is handed to the call for each. A batch in one piece is its own whole, and its
    call is handed nothing.
    """

    def observe(self, model: nn.Module, batch: Batch) -> Any:
        """What the others need to know of a micro-batch.

        Where there are several workers a tensor, [examples] or 0-d, or a record of tensors: of
        attrs, a dataclass, a tuple, a list or a mapping.
        """
        ...

    def couple(self, observed: Sequence[Any]) -> Sequence[Any]:
        """What each micro-batch needs to know of the whole, in their order."""
        ...

    def __call__(
        self, model: nn.Module, batch: Batch, coupling: Any = None
    ) -> tuple[Tensor, Metrics]:
        """As `Objective`'s, of one part of a batch."""
        ...


@runtime_checkable
class Direct(Protocol):
    """An objective whose loss the gradient function differentiates once, and nobody else.

    Where `direct` is true, nobody does anything to the loss that it returns. A summed cross entropy
    by chunks, if it has one, is that loss as it is; and `slopes` that it gives for log-probs by
    chunks are the gradient of that loss times the accumulation's factor. Then gradients of large
    tables are summed where they are made (`functrain.accumulators`): less time, less memory, the
    same to rounding. Wherever gradients are on, the model is called only with the params that it is
    bound to, never with copies or functions of them, and no gradient of its activations is taken.
    It is asked by `is_direct`: a subclass that computes another loss is not direct unless it says
    so itself.
    """

    @property
    def direct(self) -> bool:
        """Whether that is so."""
        ...


def is_direct(objective: object) -> bool:
    """Whether an objective is `Direct`: whether the class that computes its loss says so."""
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

    `reference_mixup` α and `reference_sync` k: every k steps the reference moves by α towards the
    params; None: it does not.
    """

    @property
    def reference(self) -> Tensors | None:
        """The reference at the beginning."""
        ...

    @property
    def reference_mixup(self) -> float | None:
        """How far the reference moves."""
        ...

    @property
    def reference_sync(self) -> int:
        """Steps between its moves."""
        ...

    def init_running(self, device: torch.device) -> Tensors | None:
        """`state.running` before the first step; None where nothing is carried."""
        ...

    def advance(self, running: Tensors, metrics: Metrics) -> Tensors:
        """`state.running` after an applied step with these metrics."""
        ...

    def carrying(self, reference: Tensors | None, running: Tensors | None) -> Objective:
        """The objective with what a state carries for it."""
        ...


def logits_of(model: Callable[..., object], batch: Batch) -> Tensor:
    """The model's logits [batch, time, vocabulary] for a batch of sequences, in float32 or more.

    The model is called with the keywords that the batch has; it may return logits, a mapping with
    `logits`, or an object with `.logits`. Half precision is widened here, so that the loss is
    taken in float32 whatever the forward's precision was.
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
    """The logits in what a model returned; `ArchitectureError` where there are none."""
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
