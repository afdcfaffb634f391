"""Gradients of an objective: taken inside the binding, accumulated, and clipped."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol, TypedDict

import attrs
import torch
from torch import Tensor, nn

from functrain import accumulators, activations, compilation, keys, memory
from functrain.accumulators import Accumulating
from functrain.architecture import (
    Mode,
    Slots,
    bound,
    bound_buffers,
    check_reference,
    kept_buffers,
    slots,
    vocabulary_of,
)
from functrain.errors import ArchitectureError, BatchError, ConfigError
from functrain.metrics import Metrics
from functrain.objectives.base import Coupled, Direct, Objective
from functrain.objectives.batches import Batch, split_batch, to_device
from functrain.objectives.head import Head, find_head
from functrain.precision import LossScale, Precision, policy, scale_loss
from functrain.reductions import Beside, Part, Tree, Workers, added, merged
from functrain.trees import Tensors, global_norm, map_leaves

Batches = Batch | Sequence[Batch]


@attrs.frozen(kw_only=True, eq=False)
class Gradients:
    """The result of a gradient function.

    `grads`: by parameter name, in the params' dtypes; a parameter that the loss does not reach is
    absent. `buffers`: as the forward left them. `metrics`: of the whole logical batch.
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

    `key` is the root of the step's randomness; `weight` divides the summed loss (by default the
    objective's weight of all micro-batches together); `scaler` multiplies it. `objective` takes the
    place of the function's own: the same with what a state carries for it.
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
    """How an architecture computes with params of which each worker has some rows."""

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

    `shards`: how the params, which are then rows of the whole ones, become whole where they are
    needed (`functrain.distributed.sharding`).
    """

    objective: Objective
    architecture: nn.Module
    precision: Precision
    places: Slots
    vocabulary: int | None
    compile: bool = False
    checkpointed: Mapping[str, nn.Module] = attrs.field(factory=dict)
    shards: Shards | None = None
    direct: bool = attrs.field(init=False)
    order: tuple[str, ...] = attrs.field(init=False)

    @order.default
    def _order(self) -> tuple[str, ...]:
        """What trains, in the order of the module's definition."""
        names = dict(self.architecture.named_parameters())
        return tuple(name for name in names if name in self.places.trainable)

    @direct.default
    def _direct(self) -> bool:
        direct = isinstance(self.objective, Direct) and self.objective.direct
        return direct and self.shards is None

    def bound(
        self, values: Mapping[str, Tensor], buffers: Mapping[str, Tensor], mode: Mode
    ) -> AbstractContextManager[nn.Module]:
        """The architecture with these values, as `functrain.bound`; no gradient is taken inside."""
        if self.shards is not None:
            return self.shards.bound(self.architecture, values, buffers, mode)
        return bound(self.architecture, values, buffers, mode, places=self.places)

    def _bound(
        self, leaves: Mapping[str, Tensor], buffers: Mapping[str, Tensor], total: _Sum
    ) -> AbstractContextManager[nn.Module]:
        """The architecture with these leaves, whose gradients are summed in `total`."""
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
        """Bind once, then forward and backward by micro-batch; see `GradientFunction`."""
        checked = self.checked(batch)
        return self.of_checked(
            params,
            buffers,
            checked,
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
        key: int,
        weight: Tensor | None,
        scaler: LossScale | None,
        objective: Objective | None = None,
        part: Part | None = None,
    ) -> Gradients:
        """The same of micro-batches that `checked` has seen, or that are slices of what it saw.

        They are `part` of a logical batch, or by default the whole.
        """
        objective = self.objective if objective is None else objective
        device = next((p.device for p in params.values()), torch.device("cpu"))
        ready = [to_device(each, device) for each in micro_batches]
        if part is None:
            part = Part(first=0, total=len(ready), weight=self.weight(ready))
        weight = part.weight.to(device) if weight is None else weight
        leaves = self._leaves(params)
        inputs = [leaf for leaf in leaves.values() if leaf.requires_grad]
        total = _Sum(leaves, params, tree=part.tree)
        factor = scale_loss(weight.double().reciprocal(), scaler)
        measured_all: list[Metrics] = []
        # Clones, because a module may update its buffers in place (BatchNorm does).
        bound_values = self.buffer_values(buffers)
        written = {name: (id(value), value._version) for name, value in bound_values.items()}
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            self._bound(leaves, bound_values, total) as model,
            activations.checkpointed(model, self.checkpointed),
            self._compiled(model),
            accumulators.accumulating(self.places.modules, Accumulating(total.sum_of, factor))
            if self.direct and not part.tree  # as a tree the bits are those of shards too
            else nullcontext(),
        ):
            couplings = self.couplings(model, ready, objective, key, device, part)
            beside = self._beside(params, part)
            for index, each in enumerate(ready):
                total.begin()
                seed = keys.derive(key, "micro-batch", part.place(index))
                with keys.seeded(seed, device):
                    with self.precision.context(device):
                        loss, measured = self.measured(model, each, objective, couplings[index])
                    mean = (loss / weight).sum()
                    last = index + 1 == len(ready)
                    with total.telling(beside) if last and beside is not None else nullcontext():
                        torch.autograd.backward(scale_loss(mean, scaler), inputs=inputs)
                total.add()
                measured_all.append(measured)
            after = bound_buffers(self.places)
        grads = total.grads()
        left = Tensors({n: self._left(buffers[n], b, written[n]) for n, b in after.items()})
        if part.workers is None:
            metrics = merged(measured_all, tree=part.tree)
            return Gradients(grads=grads, buffers=left, metrics=metrics)
        moved = self._moved(buffers, after, written)
        trained = {n: params[n] for n in self.places.trainable}
        found, metrics = part.workers.reduced(
            dict(grads),
            total.reached(grads),
            measured_all,
            trained,
            moved,
            tree=part.tree,
            beside=beside,
        )
        return Gradients(grads=Tensors(found), buffers=left, metrics=metrics)

    def _beside(self, params: Mapping[str, Tensor], part: Part) -> Beside | None:
        """Sums over the workers that begin in the last backward pass, which goes from the end."""
        if part.workers is None:
            return None
        like = {name: params[name] for name in reversed(self.order)}
        return part.workers.beside(like, tree=part.tree)

    def _moved(
        self,
        given: Mapping[str, Tensor],
        after: Mapping[str, Tensor],
        written: Mapping[str, tuple[int, int]],
    ) -> list[str]:
        """The buffers that the forward has written to."""
        return [
            name
            for name, buffer in after.items()
            if (id(buffer), buffer._version) != written[name]
            # BatchNorm's kernel writes without moving the version.
            or (buffer.device.type == "cpu" and not buffer.to(given[name]).equal(given[name]))
        ]

    def _compiled(self, model: nn.Module) -> AbstractContextManager[None]:
        """The bound model with its body compiled, where that was asked for."""
        if not self.compile:
            return nullcontext()
        head = find_head(model)
        return compilation.compiled(model, head.projection if isinstance(head, Head) else None)

    @staticmethod
    def _left(given: Tensor, after: Tensor, before: tuple[int, int]) -> Tensor:
        """A buffer after the forward, in the dtype that it was given in.

        One that was cast and not written to is the given one, unrounded. Where nothing was cast
        every buffer is taken: BatchNorm's kernel writes without moving the version.
        """
        if after.dtype != given.dtype and before == (id(after), after._version):
            return given
        return after.detach().to(given.dtype)

    def couplings(
        self,
        model: nn.Module,
        micro_batches: Sequence[Batch],
        objective: Objective,
        key: int,
        device: torch.device,
        part: Part | None = None,
    ) -> Sequence[Any]:
        """What each micro-batch must know of the others, where the objective couples them.

        With the randomness of the second pass, so that dropout drops the same.
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
        # The buffers that this pass moves (BatchNorm's) are put back before the second.
        with torch.no_grad(), kept_buffers(self.places):
            for index, each in enumerate(micro_batches):
                with (
                    keys.seeded(keys.derive(key, "micro-batch", part.place(index)), device),
                    self.precision.context(device),
                    _indexing(),
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
        """The sum and the metrics of a micro-batch; `coupling` is its own of `couplings`."""
        objective = self.objective if objective is None else objective
        with _indexing():
            if coupling is not None and isinstance(objective, Coupled):
                return objective(model, batch, coupling)
            return objective(model, batch)

    def values(self, params: Mapping[str, Tensor]) -> Tensors:
        """What the forward sees of the params; see `forward_values`."""
        return forward_values(params, self.places, self.precision)

    def buffer_values(self, buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the forward sees of the buffers; see `forward_buffers`."""
        return forward_buffers(buffers, self.places, self.precision)

    def checked(self, batch: Batches, *, whole: bool = True) -> list[Batch]:
        """The micro-batches, each checked; `BatchError` names what is wrong in which.

        Their weight only where they are the `whole` of a batch: a part may be without a target.
        """
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
        if whole:
            self.objective.check_weight(self.weight(micro_batches))
        return micro_batches

    def weight(self, micro_batches: Sequence[Batch]) -> Tensor:
        """The weight of all micro-batches together: what their summed losses are divided by."""
        return torch.stack([self.objective.weight(each) for each in micro_batches]).sum(0)

    def _leaves(self, params: Mapping[str, Tensor]) -> Tensors:
        return Tensors(
            {
                name: value.requires_grad_(name in self.places.trainable)
                for name, value in self.values(params).items()
            }
        )


def forward_values(params: Mapping[str, Tensor], places: Slots, precision: Precision) -> Tensors:
    """What the forward sees: private values, which share the params' memory or are casts."""
    kept = places.statistical
    return Tensors({n: p.detach() if n in kept else precision.leaf(p) for n, p in params.items()})


def forward_buffers(
    buffers: Mapping[str, Tensor], places: Slots, precision: Precision
) -> dict[str, Tensor]:
    """What the forward sees of the buffers: clones, which a module may update in place.

    Where params are cast, so are the buffers that a checkpoint of the module holds; statistics
    (BatchNorm's) and what the module computes for itself (RoPE's frequencies) stay.
    """
    return {
        name: buffer.clone() if name in places.uncast else precision.leaf(buffer).clone()
        for name, buffer in buffers.items()
    }


@contextmanager
def _indexing() -> Iterator[None]:
    """An index that the model does not know as a `BatchError`.

    Not every architecture shows how many ids, labels or positions it knows.
    """
    try:
        yield
    except IndexError as error:
        raise BatchError(
            f"batch: the model has no place for one of its indices ({error}); check that "
            "input_ids and labels are below the vocabulary, and the time within the positions"
        ) from error


class _Sum:
    """Gradients summed over micro-batches.

    Autograd adds into the leaves' own `.grad`, as in an ordinary loop; where the leaves are of a
    narrower dtype than the params, the sum is kept in the params' dtype. What is summed where it is
    made (`functrain.accumulators`) is added at the end. As a `tree` each micro-batch's gradients
    are a leaf of it.
    """

    def __init__(
        self, leaves: Mapping[str, Tensor], params: Mapping[str, Tensor], *, tree: bool = False
    ) -> None:
        self._tree = Tree(added) if tree else None
        self._leaves = leaves
        self.dtypes = {name: param.dtype for name, param in params.items()}
        self._wide: dict[str, Tensor] = {}
        self._reached: set[str] = set()
        self._received = False
        self._names = {id(leaf): name for name, leaf in leaves.items() if leaf.requires_grad}
        self._direct: dict[str, Tensor] = {}
        self._added = 1
        self._ending = False
        self._told: set[str] = set()

    def begin(self) -> None:
        """The next micro-batch: where it is added to one leaf of the tree, autograd adds it there.

        The same sum of two, without memory and a pass of its own.
        """
        branch = None if self._tree is None else self._tree.pop()
        self._added = 1 if branch is None else 2
        for name, grad in (branch or {}).items():
            leaf = self._leaves[name]
            if self._received or leaf.dtype != self.dtypes[name]:
                self._wide[name] = grad
            else:
                leaf.grad = grad

    def sum_of(self, leaf: Tensor) -> Tensor | None:
        """Where gradients of a leaf that trains may be summed as they are made."""
        name = self._names.get(id(leaf))
        if name is not None and name not in self._direct:
            self._direct[name] = memory.zeros(leaf.shape, self.dtypes[name], leaf.device)
        return None if name is None else self._direct[name]

    def receive(self, name: str, rows: Tensor, reached: bool) -> None:
        """Take the rows of a gradient of one micro-batch, summed over the workers already."""
        self._received = True
        if reached:
            self._reached.add(name)
        self._wide[name] = self._wide[name].add_(rows) if name in self._wide else rows

    def reached(self, grads: Mapping[str, Tensor]) -> frozenset[str]:
        """What of the sums has had a gradient here."""
        return frozenset(self._reached if self._received else {*grads, *self._told})

    @contextmanager
    def telling(self, beside: Beside) -> Iterator[None]:
        """Within it, the last backward pass tells which sums here have come to their end."""
        self._ending = True
        handles = []
        for name, leaf in self._leaves.items():
            # What is summed where it is made may still grow.
            if leaf.requires_grad and name not in self._direct:
                ended = functools.partial(self._ended, beside, name, leaf.grad is not None)
                handle = leaf.register_post_accumulate_grad_hook(ended)  # type: ignore[no-untyped-call]
                handles.append(handle)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _ended(self, beside: Beside, name: str, begun: bool, leaf: Tensor) -> None:
        """`begun`: whether there was a sum before, to whose memory autograd has added."""
        self._take(name, leaf)
        grad = self._wide.pop(name) if name in self._wide else leaf.grad
        assert grad is not None  # it has just been added to
        whole = self._folded(name, grad)
        own = begun or whole is not leaf.grad
        leaf.grad = None
        self._told.add(name)
        beside.ready(name, whole, own=own)

    def _folded(self, name: str, grad: Tensor | None) -> Tensor:
        """A gradient of the last leaves with the branches of the tree that wait for it.

        Each worker has a power of two of leaves, so that the last one meets every branch in turn.
        """
        for branch in reversed(self._tree.waiting() if self._tree is not None else ()):
            if name in branch:
                before = branch.pop(name)
                grad = before if grad is None else before.add_(grad)
        assert grad is not None
        return grad

    def _take(self, name: str, leaf: Tensor) -> None:
        """Widen a gradient that is narrower than its sum."""
        if leaf.grad is not None and leaf.grad.layout != torch.strided:
            raise ArchitectureError(
                f"{name}: its gradient is sparse, which neither clipping nor the optimizers "
                "take; build its nn.Embedding with sparse=False"
            )
        if leaf.grad is None or leaf.dtype == self.dtypes[name]:
            return
        wide = leaf.grad.to(self.dtypes[name])
        self._wide[name] = self._wide[name].add_(wide) if name in self._wide else wide
        leaf.grad = None

    def add(self) -> None:
        for name, leaf in self._leaves.items():
            self._take(name, leaf)
        self._apart()
        if self._tree is not None and not self._ending:
            self._tree.push(dict(self._summed()), self._added)
            self._wide.clear()
            self._direct.clear()
            for leaf in self._leaves.values():
                leaf.grad = None

    def _apart(self) -> None:
        """Gradients that share their memory get their own, since they will be written to.

        Of `a[None] + b[None]` autograd hands both leaves the same memory (torch 2.13), in which an
        ordinary loop's second backward pass adds for both.
        """
        seen: set[int] = set()
        for leaf in self._leaves.values():
            if leaf.grad is None or not leaf.grad.numel():
                continue
            address = leaf.grad.untyped_storage().data_ptr()
            if address in seen:
                leaf.grad = leaf.grad.clone()
            seen.add(address)

    def grads(self) -> Tensors:
        """The sum over all micro-batches, but for what was told to be there."""
        if self._tree is None:
            return self._summed()
        if not self._ending:
            return Tensors(self._tree.total() or {})
        last = self._summed()
        names = {*last, *(name for branch in self._tree.waiting() for name in branch)}
        return Tensors({name: self._folded(name, last.get(name)) for name in names})

    def _summed(self) -> Tensors:
        own = {n: leaf.grad for n, leaf in self._leaves.items() if leaf.grad is not None}
        own |= self._wide
        for name, grad in self._direct.items():
            own[name] = grad.add_(own[name]) if name in own else grad
        return Tensors({name: own[name] for name in self._leaves if name in own})


def value_and_grad(
    objective: Objective,
    architecture: nn.Module,
    *,
    precision: str | Precision = "fp32",
    compile: bool = False,  # noqa: A002
    checkpoint: str | Sequence[str] | None = None,
    shards: Shards | None = None,
) -> ValueAndGrad:
    """The gradient function of `objective` on `architecture`.

    Pure: params and buffers are not changed, the global random generators are as before, and the
    same arguments give the same bits. `torch.autograd` on private leaves, inside the binding.
    `compile`: with the body compiled (`functrain.compilation`): other bits, the same to rounding.
    `checkpoint`: a pattern of modules whose activations are recomputed (`functrain.activations`).
    `shards`: how the model computes with params of which each worker has some rows.
    """
    if not isinstance(compile, bool):
        raise ConfigError(f"compile: {compile!r}, expected True or False")
    if compile:
        compilation.check_uncompiled(architecture)
    places = slots(architecture)
    if (kept := objective.kept()) is not None:
        check_reference(kept, places.params)
    return ValueAndGrad(
        objective=objective,
        architecture=architecture,
        precision=policy(precision),
        places=places,
        vocabulary=vocabulary_of(architecture),
        compile=compile,
        checkpointed=activations.matching(architecture, activations.patterns(checkpoint)),
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
        options: _Options = {
            "key": key,
            "weight": weight,
            "scaler": scaler,
            "objective": objective,
        }
        if isinstance(self.gradient, ValueAndGrad) and (self.tree or self.workers is not None):
            return self._shared(self.gradient, params, buffers, batch, options)
        if not isinstance(batch, Mapping):
            return self.gradient(params, buffers, batch, **options)  # pyrefly: ignore[open-unpacking]
        if not isinstance(self.gradient, ValueAndGrad):
            parts = split_batch(batch, self.microbatches)
            return self.gradient(params, buffers, parts, **options)  # pyrefly: ignore[open-unpacking]
        # Checked once and whole: what is wrong is said in the words of the batch that was given.
        (whole,) = self.gradient.checked(batch)
        parts = split_batch(whole, self.microbatches)
        return self.gradient.of_checked(params, buffers, parts, **options)  # pyrefly: ignore[open-unpacking]

    def _shared(
        self,
        gradient: ValueAndGrad,
        params: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        batch: Batches,
        options: _Options,
    ) -> Gradients:
        """Of a batch that is a part of a logical one, or is summed as a tree."""
        size = 1 if self.workers is None else self.workers.size
        ready: list[Batch] = []

        def prepared() -> tuple[int, Tensor]:
            given = gradient.checked(batch, whole=False)
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
    """`gradient` with each batch taken in `microbatches` equal slices.

    The summed losses are divided by the weight of the whole batch, so any partition gives the
    same gradient to rounding. A sequence of ready micro-batches, of whatever lengths, is taken
    as it is. `tree`: summed as `functrain.reductions.Tree`. `workers` share the micro-batches of
    the batch out among them (`functrain.distributed`); each is given its own part of it.
    """
    if isinstance(microbatches, bool) or not isinstance(microbatches, int) or microbatches < 1:
        raise ConfigError(f"microbatches: {microbatches!r}, expected an integer of at least 1")
    if workers is not None and microbatches % workers.size:
        raise ConfigError(
            f"microbatches: {microbatches} cannot be shared out to {workers.size} workers; it "
            f"counts those of the whole batch, so give a multiple of {workers.size}"
        )
    return Accumulated(gradient=gradient, microbatches=microbatches, tree=tree, workers=workers)


def clip_by_global_norm(
    grads: Mapping[str, Tensor],
    max_norm: float,
    *,
    norm: Tensor | None = None,
    donate: bool = False,
) -> tuple[Tensors, Tensor]:
    """Scale all gradients so that their global norm is at most `max_norm`: `(grads, norm)`.

    The factor is `torch.nn.utils.clip_grads_with_norm_`'s, min(1, max_norm / (norm + 1e-6)), with
    the norm accumulated in float64 (Pascanu et al., 1211.5063). `norm` spares the computation
    where it is known; `donate=True` scales the gradients in place. A norm that is not finite
    spreads to every gradient: test it before.
    """
    _check_positive("max_norm", max_norm)
    norm = global_norm(grads) if norm is None else norm
    factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    leaves = list(grads.values())
    if donate and leaves:
        if factor.device.type != "cpu" or float(factor) != 1.0:
            torch._foreach_mul_(leaves, factor)
    elif leaves:
        # A 0-d gradient times the float64 factor would become float64.
        scaled = torch._foreach_mul(leaves, factor)
        leaves = [new.to(old.dtype) for new, old in zip(scaled, leaves, strict=True)]
    return Tensors(zip(grads, leaves, strict=True)), norm


def clip_by_value(grads: Mapping[str, Tensor], limit: float) -> Tensors:
    """Each element clamped to [−limit, limit]."""
    _check_positive("limit", limit)
    return map_leaves(lambda grad: grad.clamp(-limit, limit), grads)


def adaptive_clip(
    grads: Mapping[str, Tensor],
    params: Mapping[str, Tensor],
    *,
    factor: float = 0.01,
    eps: float = 1e-3,
) -> Tensors:
    """Each unit's gradient norm held to `factor` times the norm of its weights, at least `eps`.

    A unit is a row of a matrix (an output), a whole vector or scalar otherwise; adaptive gradient
    clipping (Brock et al., 2102.06171).
    """
    _check_positive("factor", factor)
    _check_positive("eps", eps)

    def clipped(grad: Tensor, param: Tensor) -> Tensor:
        limit = factor * _unit_norm(param).clamp(min=eps)
        norm = _unit_norm(grad)
        return grad * torch.where(norm > limit, limit / norm.clamp(min=1e-12), 1.0)

    return Tensors({name: clipped(grad, params[name]) for name, grad in grads.items()})


def _unit_norm(tensor: Tensor) -> Tensor:
    dims = tuple(range(1, tensor.ndim)) if tensor.ndim > 1 else tuple(range(tensor.ndim))
    if not dims:
        return tensor.abs()
    norm: Tensor = torch.linalg.vector_norm(tensor, dim=dims, keepdim=True)
    return norm


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise ConfigError(f"{name}: {value}, expected a positive finite number")
