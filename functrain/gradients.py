"""Gradients of an objective, taken inside the binding, over one or several micro-batches."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol, TypedDict

import attrs
import torch
from torch import Tensor, nn

from functrain import accumulators, activations, compilation, keys, memory
from functrain.accumulators import Accumulating
from functrain.activations import Recompute
from functrain.architecture import (
    Mode,
    Slots,
    bound,
    bound_buffers,
    check_reference,
    kept_buffers,
    slots,
)
from functrain.checks import check_integer, check_tensors
from functrain.descriptions import vocabulary_of
from functrain.errors import (
    ArchitectureError,
    BatchError,
    ConfigError,
    FunctrainWarning,
    StateError,
)
from functrain.forward import OwnBuffers, Watched, forward_buffers, forward_values
from functrain.lora import adapter_of, is_adapted
from functrain.metrics import Metrics
from functrain.objectives.base import Coupled, Objective, check_objective, is_direct
from functrain.objectives.batches import Batch, batch_versions, split_batch, to_device
from functrain.objectives.head import Head, find_head
from functrain.precision import LossScale, Precision, policy, scale_loss
from functrain.reductions import Beside, Part, Workers, merged
from functrain.sums import GradientSum
from functrain.trees import Tensors

Batches = Batch | Sequence[Batch]


@attrs.frozen(kw_only=True, eq=False)
class Gradients:
    """The result of a gradient function.

    `grads`: by parameter name, in the params' dtypes, without parameters that the loss does not
    reach. `buffers`: as the forward left them. `metrics`: of the whole logical batch.
    """

    grads: Tensors
    buffers: Tensors
    metrics: Metrics


class _Options(TypedDict):
    key: int
    weight: Tensor | None
    scaler: LossScale | None
    objective: Objective | None


class GradientFunction(Protocol):
    """`gradient(params, buffers, batch)`, for one batch or a sequence of micro-batches.

    `key`: the root of the step's randomness. `weight`: what the summed loss is divided by; by
    default the objective's weight of all micro-batches together. `scaler`: multiplies the loss.
    `objective`: used in place of the function's own; the same one with what a state carries for it.
    """

    def __call__(
        self,
        params: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        batch: Batches,
        *,
        key: int = 0,
        weight: Tensor | None = None,
        scaler: LossScale | None = None,
        objective: Objective | None = None,
    ) -> Gradients:
        """The gradient of (summed loss) / weight, times the loss scale."""
        ...


class Shards(Protocol):
    """How an architecture computes with sharded params, of which each worker has some rows."""

    def bound(
        self,
        architecture: nn.Module,
        params: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        mode: Mode,
        *,
        dtypes: Mapping[str, torch.dtype] | None = None,
        receive: Callable[[str, Tensor, bool], None] | None = None,
        recomputed: Iterable[nn.Module] = (),
    ) -> AbstractContextManager[nn.Module]:
        """As `functrain.bound`; `receive` takes this worker's rows of the gradients' sums."""
        ...


@attrs.frozen(kw_only=True, eq=False)
class ValueAndGrad:
    """The gradient function of an objective on an architecture; see `value_and_grad`.

    `shards`: how params of which this worker has some rows become whole where they are needed
    (`functrain.distributed.sharding`).
    """

    objective: Objective
    architecture: nn.Module
    precision: Precision
    places: Slots
    vocabulary: int | None
    compile: bool = False
    checkpointed: Mapping[str, nn.Module] = attrs.field(factory=dict)
    recompute: Recompute = "full"
    shards: Shards | None = None
    direct: bool = attrs.field(init=False)
    # A user's objective may report a parameter as a metric, or a buffer that changes later.
    foreign: bool = attrs.field(init=False)
    order: tuple[str, ...] = attrs.field(init=False)

    @order.default
    def _order(self) -> tuple[str, ...]:
        """The trainable names, in the order of the module's definition."""
        names = dict(self.architecture.named_parameters())
        return tuple(name for name in names if name in self.places.trainable)

    @foreign.default
    def _foreign(self) -> bool:
        return not type(self.objective).__module__.startswith("functrain.")

    @direct.default
    def _direct(self) -> bool:
        return self.shards is None and is_direct(self.objective)

    def bound(
        self, values: Mapping[str, Tensor], buffers: Mapping[str, Tensor], mode: Mode
    ) -> AbstractContextManager[nn.Module]:
        """Bind these values, as `functrain.bound` does; no gradient is taken inside."""
        if self.shards is not None:
            return self.shards.bound(self.architecture, values, buffers, mode)
        return bound(self.architecture, values, buffers, mode, places=self.places)

    def _bound(
        self, leaves: Mapping[str, Tensor], buffers: Mapping[str, Tensor], total: GradientSum
    ) -> AbstractContextManager[nn.Module]:
        """Bind these leaves, whose gradients are summed in `total`."""
        mode = self.objective.mode
        if self.shards is None:
            return bound(self.architecture, leaves, buffers, mode, places=self.places)
        return self.shards.bound(
            self.architecture,
            leaves,
            buffers,
            mode,
            dtypes=total.dtypes,
            receive=total.receive,
            recomputed=self.checkpointed.values(),
        )

    def __call__(
        self,
        params: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        batch: Batches,
        *,
        key: int = 0,
        weight: Tensor | None = None,
        scaler: LossScale | None = None,
        objective: Objective | None = None,
    ) -> Gradients:
        """Bind once, then run forward and backward per micro-batch; see `GradientFunction`."""
        compilation.refuse_tracing("value_and_grad")
        checked = self.checked(batch)
        with _undisturbed(_device(params)):
            whole = self.weight(checked)
            self.objective.check_weight(whole)
            return self.of_checked(
                params,
                buffers,
                checked,
                part=Part(first=0, total=len(checked), weight=whole),
                key=key,
                weight=weight,
                scaler=scaler,
                objective=objective,
            )

    def of_checked(
        self,
        params: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        micro_batches: Sequence[Batch],
        *,
        part: Part,
        key: int,
        weight: Tensor | None,
        scaler: LossScale | None,
        objective: Objective | None = None,
    ) -> Gradients:
        """The gradient for micro-batches that `checked` has seen, or slices of what it saw.

        Together they are `part` of a logical batch.
        """
        check_tensors("buffers", buffers)
        objective = self.objective if objective is None else objective
        device = _device(params)
        ready = [to_device(each, device) for each in micro_batches]
        begun = batch_versions(ready)
        weight = part.weight.to(device, non_blocking=True) if weight is None else weight
        if not isinstance(weight, Tensor):
            raise ConfigError(f"weight: {weight!r}, expected a tensor, as objective.weight is")
        leaves = self._leaves(params)
        inputs = [leaf for leaf in leaves.values() if leaf.requires_grad]
        total = GradientSum(leaves, params, tree=part.tree)
        measured_all: list[Metrics] = []
        own = OwnBuffers.of(buffers, self.places, self.precision)
        watched = self._watched(leaves)
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            self._bound(leaves, own.values, total) as model,
            activations.checkpointed(self.checkpointed, self.recompute),
            _casts_of_its_own(),
            self._compiled(model),
            self._accumulating(total, weight, scaler)
            if self.direct and not part.tree  # a tree must give the bits of a sharded step
            else nullcontext(),
        ):
            couplings = self.couplings(model, ready, objective, key, device, part)
            beside = self._beside(params, part)
            with keys.kept(device), memory.reusing():
                for index, each in enumerate(ready):
                    total.begin()
                    keys.seed(keys.derive(key, "micro-batch", part.place(index)), device)
                    with self.precision.context(device):
                        loss, measured = self.measured(model, each, objective, couplings[index])
                    _check_weighed(loss, weight, objective)
                    mean = (loss / weight).sum()
                    _check_reached(mean)
                    last = index + 1 == len(ready)
                    with total.telling(beside) if last and beside is not None else nullcontext():
                        try:
                            scaled = scale_loss(mean, scaler)
                            with accumulators.adding(scaled):
                                torch.autograd.backward(scaled, inputs=inputs)
                        except RuntimeError:
                            # The cause may be a write into what autograd saved of the batch.
                            refuse_written(batch_versions(ready), begun)
                            raise
                    total.add()
                    measured_all.append(measured)
            refuse_written(batch_versions(ready), begun)
            after = bound_buffers(self.places)
            if watched is not None:
                watched.check()
        grads, left = total.grads(), own.left(after)
        if is_adapted(self.architecture):
            _tell_of_idle(self.architecture, total.reached(grads))
        if part.workers is None:
            metrics = merged(measured_all, tree=part.tree)
            return Gradients(grads=grads, buffers=left, metrics=metrics)
        trained = {n: params[n] for n in self.places.trainable}
        found, metrics = part.workers.reduced(
            dict(grads),
            total.reached(grads),
            measured_all,
            trained,
            own.moved(after),
            tree=part.tree,
            beside=beside,
        )
        return Gradients(grads=Tensors(found), buffers=left, metrics=metrics)

    def _accumulating(
        self, total: GradientSum, weight: Tensor, scaler: LossScale | None
    ) -> AbstractContextManager[None]:
        """A context in which large tables' gradients go straight into their sums."""
        factor = scale_loss(weight.double().reciprocal(), scaler)
        given = Accumulating(total.trains, total.sum_of, factor)
        return accumulators.accumulating(self.places.modules, given, compiled=self.compile)

    def _watched(self, leaves: Mapping[str, Tensor]) -> Watched | None:
        if self.shards is not None:  # the tensors bound are not these leaves
            return None
        return Watched.of(self.architecture, leaves, self.places)

    def _beside(self, params: Mapping[str, Tensor], part: Part) -> Beside | None:
        """Sums over the workers that start in the last backward pass, from the last params on."""
        if part.workers is None:
            return None
        like = {name: params[name] for name in reversed(self.order)}
        return part.workers.beside(like, tree=part.tree)

    def _compiled(self, model: nn.Module) -> AbstractContextManager[None]:
        """A context in which the bound model's body is compiled, if `compile` is set."""
        if not self.compile:
            return nullcontext()
        head = find_head(model)
        return compilation.compiled(model, head.projection if isinstance(head, Head) else None)

    def couplings(
        self,
        model: nn.Module,
        micro_batches: Sequence[Batch],
        objective: Objective,
        key: int,
        device: torch.device,
        part: Part | None = None,
    ) -> Sequence[Any]:
        """What each micro-batch must know of the others, if the objective couples them.

        This first pass draws the same random numbers as the second, so that dropout is the same.
        """
        if part is None:
            part = Part(first=0, total=len(micro_batches), weight=torch.zeros(()))
        total = part.total
        if total == 1 or not objective.batch_coupled:
            return [None] * len(micro_batches)
        if not isinstance(objective, Coupled):
            raise ConfigError(
                f"{total} micro-batches: the {objective.name!r} loss couples the "
                "examples of a batch, so they would be another loss; give one batch, or give the "
                "objective observe and couple (functrain.objectives.Coupled)"
            )
        observed = []
        # The buffers that this pass changes (BatchNorm's) are restored before the second.
        with torch.no_grad(), kept_buffers(self.places):
            for index, each in enumerate(micro_batches):
                with (
                    keys.seeded(keys.derive(key, "micro-batch", part.place(index)), device),
                    self.precision.context(device),
                    indexing(),
                ):
                    observed.append(objective.observe(model, each))
        if part.workers is not None:
            observed = part.workers.observations(observed)
        couplings = objective.couple(observed)
        return [couplings[part.place(index)] for index in range(len(micro_batches))]

    def measured(
        self,
        model: nn.Module,
        batch: Batch,
        objective: Objective | None = None,
        coupling: Any = None,
    ) -> tuple[Tensor, Metrics]:
        """The summed loss and the metrics of a micro-batch; `coupling`: its own of `couplings`."""
        objective = self.objective if objective is None else objective
        with indexing():
            if coupling is not None and isinstance(objective, Coupled):
                found = objective(model, batch, coupling)
            else:
                found = objective(model, batch)
        if self.foreign:
            _check_measured(found, objective)
            loss, metrics = found
            return loss, metrics.copied()
        return found

    def values(self, params: Mapping[str, Tensor]) -> Tensors:
        """What the forward sees of the params; see `forward_values`."""
        return forward_values(params, self.places, self.precision)

    def buffer_values(self, buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the forward sees of the buffers; see `forward_buffers`."""
        return forward_buffers(buffers, self.places, self.precision)

    def checked(self, batch: Batches) -> list[Batch]:
        """The micro-batches, each checked; `BatchError` says which one is wrong, and how."""
        if isinstance(batch, Mapping):
            micro_batches: list[Batch] = [batch]
        elif isinstance(batch, Sequence) and not isinstance(batch, str | bytes):
            micro_batches = list(batch)
        else:
            raise BatchError(
                f"batch: expected a mapping or a sequence of micro-batches, got "
                f"{type(batch).__name__}"
            )
        if not micro_batches:
            raise BatchError("batch: an empty sequence of micro-batches; expected at least one")
        for index, each in enumerate(micro_batches):
            try:
                self.objective.check(each, self.vocabulary)
            except BatchError as error:
                if len(micro_batches) == 1:
                    raise
                raise BatchError(f"micro-batch {index}: {error}") from error
        return micro_batches

    def weight(self, micro_batches: Sequence[Batch]) -> Tensor:
        """The weight of all micro-batches together, by which their summed losses are divided."""
        found = [self.objective.weight(each) for each in micro_batches]
        wrong = next((each for each in found if not isinstance(each, Tensor)), None)
        if wrong is not None:
            raise ConfigError(
                f"objective {self.objective.name!r}: its weight is a {type(wrong).__name__}, "
                "expected a tensor, 0-d, by which the summed loss is divided"
            )
        first = found[0]
        other = next((each for each in found if each.shape != first.shape), None)
        if other is not None:
            raise ConfigError(
                f"objective {self.objective.name!r}: its weights have shapes {list(first.shape)} "
                f"and {list(other.shape)}, expected one for all micro-batches: 0-d, or [k] for a "
                "loss of k sums"
            )
        return first if len(found) == 1 else torch.stack(found).sum(0)

    def _leaves(self, params: Mapping[str, Tensor]) -> Tensors:
        leaves = self.values(params)
        for name in self.places.trainable & leaves.keys():
            try:
                leaves[name].requires_grad_()
            except RuntimeError as error:
                raise StateError(
                    f"params/{name}: {error}; of params made in torch.inference_mode give a clone "
                    "made out of it, functrain.trees.clone(params)"
                ) from error
        return leaves


def _device(params: Mapping[str, Tensor]) -> torch.device:
    check_tensors("params", params)
    return next((param.device for param in params.values()), torch.device("cpu"))


@contextmanager
def _undisturbed(device: torch.device) -> Generator[None]:
    """A context in which the bits do not depend on the contexts that the caller is in."""
    kind = device.type if torch.amp.is_autocast_available(device.type) else "cpu"
    inference, autocast = torch.is_inference_mode_enabled(), torch.is_autocast_enabled(kind)
    if torch.is_grad_enabled() and not inference and not autocast:  # as in most loops
        yield
        return
    with torch.inference_mode(False), torch.autocast(kind, enabled=False):
        yield


def _check_measured(found: object, objective: Objective) -> None:
    """Raise `ConfigError` unless a user's objective returned (total, metrics)."""
    match found:
        case (Tensor(), Metrics() as measured):
            measured.check()
            return
        case (_, _):
            given = " and ".join(type(each).__name__ for each in found)
        case _:
            given = type(found).__name__
    raise ConfigError(
        f"objective {objective.name!r}: it returned {given}, expected (total, metrics): the summed "
        "loss, a tensor, and functrain.metrics.Metrics"
    )


def _check_weighed(loss: Tensor, weight: Tensor | float, objective: Objective) -> None:
    """Raise `ConfigError` if dividing by the weight would broadcast the loss to a larger shape."""
    if not isinstance(weight, Tensor) or weight.numel() == 1 or weight.shape == loss.shape:
        return
    raise ConfigError(
        f"objective {objective.name!r}: its weight has shape {list(weight.shape)} and its loss "
        f"{list(loss.shape)}, expected a weight that is 0-d, weight.sum(), or a loss of as many "
        "sums as there are weights"
    )


@contextmanager
def _casts_of_its_own() -> Generator[None]:
    """Clear the autocast cache at the end.

    Within an autocast of the caller's, torch would keep the leaves' casts until that ends, and with
    each cast a leaf and its gradient.
    """
    try:
        yield
    finally:
        torch.clear_autocast_cache()


def refuse_written(after: Mapping[str, int], begun: Mapping[str, int]) -> None:
    """Raise `ArchitectureError` if the model has written into its batch, which is the caller's.

    On an accelerator the model wrote into a copy, and is refused all the same. A write through
    `.data` is not seen.
    """
    names = [name for name, version in begun.items() if after[name] != version]
    if names:
        raise ArchitectureError(
            f"architecture: its forward has written into the batch ({', '.join(names)}), which may "
            "be given again; write into a clone of it"
        )


def _check_reached(loss: Tensor) -> None:
    """Raise `ArchitectureError` if the loss depends on no trainable parameter."""
    if not loss.requires_grad:
        raise ArchitectureError(
            "architecture: the loss does not depend on any parameter that is trained, so there is "
            "no gradient; unfreeze what the forward uses (requires_grad before functrain.split), "
            "name other LoRA targets, and look for a detach() or torch.no_grad() in the forward"
        )


# The adapted architectures that have been through `_tell_of_idle`.
_told: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def _tell_of_idle(architecture: nn.Module, reached: Collection[str]) -> None:
    """Warn, once, of adapters that got no gradient: they would silently stay as they are."""
    if architecture in _told:
        return
    _told.add(architecture)
    idle = [n for n in adapter_of(architecture).layers if f"{n}.lora_B" not in reached]
    if idle:
        more = f" and {len(idle) - 3} more" if len(idle) > 3 else ""
        warnings.warn(
            f"lora: {', '.join(map(repr, idle[:3]))}{more} got no gradient in the first step, as "
            "the model did not call them. Where it computes with their weights by itself an "
            "adapter has no effect: leave them out of the targets. Experts that no token chose "
            "may get one later",
            FunctrainWarning,
            stacklevel=2,
        )


@contextmanager
def indexing() -> Generator[None]:
    """Turn the model's `IndexError` into a `BatchError`.

    Not every architecture tells how many ids, labels or positions it has, so `check` may miss it.
    """
    try:
        yield
    except IndexError as error:
        raise BatchError(
            f"batch: the model has no place for one of its indices ({error}); check that "
            "input_ids and labels are below the vocabulary, and the time within the positions"
        ) from error


def value_and_grad(
    objective: Objective,
    architecture: nn.Module,
    *,
    precision: str | Precision = "fp32",
    compile: bool = False,  # noqa: A002
    checkpoint: str | Sequence[str] | None = None,
    recompute: Recompute = "full",
    shards: Shards | None = None,
) -> ValueAndGrad:
    """The gradient function of `objective` on `architecture`.

    It is pure: params and buffers are not changed, the global random generators are as before, and
    the same arguments give the same bits. It runs `torch.autograd` on private leaves, inside the
    binding.

    `compile`: compile the model's body (`functrain.compilation`); the result differs from the
    uncompiled one by rounding. `checkpoint`: patterns of modules whose activations are recomputed;
    `recompute`: which of them (`functrain.activations`). `shards`: how the model computes with
    sharded params.
    """
    check_objective(objective)
    if not isinstance(compile, bool):
        raise ConfigError(f"compile: {compile!r}, expected True or False")
    if compile:
        compilation.check_uncompiled(architecture)
    names = activations.patterns(checkpoint)
    activations.check_recompute(recompute, names)
    places = slots(architecture)
    kept = objective.kept()
    # What a user's objective keeps beside the reference may be anything.
    is_reference = getattr(objective, "reference", None) is kept
    if kept is not None and is_reference:
        check_reference(kept, places.params)
    return ValueAndGrad(
        objective=objective,
        architecture=architecture,
        precision=policy(precision),
        places=places,
        vocabulary=vocabulary_of(architecture),
        compile=compile,
        checkpointed=activations.matching(architecture, names),
        recompute=recompute,
        shards=shards,
    )


@attrs.frozen(kw_only=True, eq=False)
class Accumulated:
    """A gradient function over `microbatches` equal slices; see `accumulate`."""

    gradient: GradientFunction
    microbatches: int
    tree: bool = False
    workers: Workers | None = None

    def __call__(
        self,
        params: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        batch: Batches,
        *,
        key: int = 0,
        weight: Tensor | None = None,
        scaler: LossScale | None = None,
        objective: Objective | None = None,
    ) -> Gradients:
        """The gradient of the whole logical batch, one micro-batch in memory at a time."""
        compilation.refuse_tracing("accumulate")
        options: _Options = {
            "key": key,
            "weight": weight,
            "scaler": scaler,
            "objective": objective,
        }
        if isinstance(self.gradient, ValueAndGrad):
            with _undisturbed(_device(params)):
                return self._checked(self.gradient, params, buffers, batch, options)
        parts = split_batch(batch, self.microbatches) if isinstance(batch, Mapping) else batch
        return self.gradient(params, buffers, parts, **options)  # pyrefly: ignore[open-unpacking]

    def _checked(
        self,
        gradient: ValueAndGrad,
        params: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        batch: Batches,
        options: _Options,
    ) -> Gradients:
        """The gradient of a batch that is checked before it is cut.

        An error then speaks of the batch that was given. It may be one worker's part of a logical
        batch, which may have no target.
        """
        size = 1 if self.workers is None else self.workers.size
        ready: list[Batch] = []

        def prepared() -> tuple[int, Tensor]:
            given = gradient.checked(batch)
            parts = self.microbatches // size if isinstance(batch, Mapping) else 1
            ready.extend(cut for each in given for cut in split_batch(each, parts))
            return len(ready), gradient.weight(ready)

        if self.workers is None:
            count, weight = prepared()
            part = Part(first=0, total=count, weight=weight, tree=self.tree)
        else:
            part = self.workers.part(prepared, tree=self.tree)
        gradient.objective.check_weight(part.weight)
        return gradient.of_checked(params, buffers, ready, part=part, **options)  # pyrefly: ignore[open-unpacking]


def accumulate(
    gradient: GradientFunction,
    microbatches: int,
    *,
    tree: bool = False,
    workers: Workers | None = None,
) -> Accumulated:
    """`gradient` with each batch cut into `microbatches` equal slices.

    The summed losses are divided by the weight of the whole batch, so any partition gives the same
    gradient to rounding. A sequence of ready micro-batches, of whatever lengths, is not cut.

    `tree`: sum as `functrain.reductions.Tree` does. `workers`: share the micro-batches of a batch
    (`functrain.distributed`); each worker is given its own part.
    """
    check_integer("microbatches", microbatches)
    if not isinstance(gradient, ValueAndGrad) and (tree or workers is not None):
        raise ConfigError(
            f"gradient: {type(gradient).__name__} is none of functrain.value_and_grad, so it can "
            "neither be summed as a tree nor shared out to workers; leave tree and workers out"
        )
    if workers is not None and microbatches % workers.size:
        raise ConfigError(
            f"microbatches: {microbatches} cannot be shared out to {workers.size} workers; it "
            f"counts those of the whole batch, so give a multiple of {workers.size}"
        )
    return Accumulated(gradient=gradient, microbatches=microbatches, tree=tree, workers=workers)
