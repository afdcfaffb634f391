"""What a step takes, counted without running it: lasting bytes, temporary bytes, operations.

The model is run on tensors with shapes but no memory (`torch._subclasses.FakeTensorMode`): one
micro-batch forward and backward, as a step runs it, with its precision and its recomputed modules.
The bytes that torch would hold at each moment are summed. The head, which a step computes a few
rows at a time, is counted by its shapes.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from functrain import activations
from functrain.activations import Recompute
from functrain.architecture import Slots, bound, slots
from functrain.checks import check_integer
from functrain.errors import ArchitectureError, ConfigError, FunctrainError
from functrain.flops import counter
from functrain.forward import forward_buffers
from functrain.objectives import chunks, measures
from functrain.objectives.base import logits_in
from functrain.objectives.head import Head, shown
from functrain.optimizers import Optimizer
from functrain.precision import POLICIES, Precision, policy
from functrain.steps import is_optimizer


@attrs.frozen(kw_only=True, eq=False)
class Job:
    """A training step as a plan sees it.

    `architecture`, `params`, `buffers`: as `functrain.models.bare` makes them, the params without
    values. `rows`: sequences of `time` tokens in the whole batch, in `microbatches` equal parts.
    `sides`: how many forwards a row has, 2 for pairs and KTO. `paired`: whether rows are pairs
    whose logits are kept for the gradient of the head: those of DPO, with `reduction="fast"` and
    without shards, unless the loss couples the pairs of a single micro-batch. `reference`: whether
    frozen params score each row as well. `average`: whether a moving average is kept. `donate`:
    whether the state's memory is reused.
    """

    architecture: nn.Module = attrs.field(repr=False)
    params: Mapping[str, Tensor] = attrs.field(repr=False)
    buffers: Mapping[str, Tensor] = attrs.field(repr=False)
    optimizer: Optimizer = attrs.field(repr=False, validator=is_optimizer)
    rows: int
    time: int
    microbatches: int = 1
    precision: Precision = attrs.field(default=POLICIES["fp32"], converter=policy)
    checkpoint: tuple[str, ...] = attrs.field(default=(), converter=activations.patterns)
    recompute: Recompute = "full"
    sides: int = 1
    paired: bool = False
    reference: bool = False
    average: bool = False
    donate: bool = True

    def __attrs_post_init__(self) -> None:
        for name in ("rows", "time", "microbatches", "sides"):
            check_integer(name, getattr(self, name))
        activations.check_recompute(self.recompute, self.checkpoint)
        if self.rows % self.microbatches:
            raise ConfigError(
                f"rows: {self.rows} cannot be cut into {self.microbatches} equal micro-batches"
            )


@attrs.frozen(kw_only=True)
class Leaf:
    """A tensor of the state, cut by rows: the number of `rows`, and the bytes of one `row`."""

    rows: int
    row: int

    def bytes_of(self, workers: int) -> int:
        """The bytes of it on the worker with the most rows."""
        return -(-self.rows // workers) * self.row


@attrs.frozen(kw_only=True)
class Work:
    """The bytes that one micro-batch takes, and the state between two steps.

    By tensor: `params`, `gradients`, `moments`, `extra` (average, reference) and `cast` (the params
    in the dtype that is computed with, if it is another). `units`: for each unit that a sharded
    state gathers together, first that of no block, its bytes as computed with, and as its gradients
    are summed.

    `activations`: the most that is alive at once besides all of these; `forward`: the same in the
    forward pass only; `together`: the same with the gradients that have been made by then;
    `activations_sharded`: `activations` where the params are gathered. `head`: what the head takes
    besides, `head_weight`: the gradient of its weight. `flops`: operations of a micro-batch, a
    multiplication and an addition counting as two; `tokens`: its tokens.
    """

    params: tuple[Leaf, ...]
    gradients: tuple[Leaf, ...]
    moments: tuple[Leaf, ...]
    extra: tuple[Leaf, ...]
    cast: tuple[Leaf, ...]
    units: tuple[tuple[int, int], ...]
    activations: int
    forward: int
    together: int
    activations_sharded: int
    head: int
    head_weight: int
    flops: int
    buffers: int
    numbers: int
    tokens: int

    def beside(self, microbatches: int) -> int:
        """The most that a worker with so many micro-batches holds besides all its gradients.

        With a single micro-batch, gradients appear as activations are freed.
        """
        if microbatches > 1:
            return self.activations + self.head
        return max(self.forward + self.head, self.together) - total(self.gradients)


def count(job: Job) -> Work:
    """Count what a job takes.

    Raises `ConfigError` for a model whose forward or backward reads values, since there are none,
    and for an optimizer whose update needs real memory.
    """
    from functrain.distributed.units import find_units

    places = slots(job.architecture)
    trained = {n: p for n, p in job.params.items() if n in places.trainable}
    narrow = job.precision.cast
    cast = {n: p.to(narrow) for n, p in job.params.items()} if narrow is not None else {}
    kept = [job.params] * (job.average + job.reference)
    found = _counted(job, places)
    # Without autocast there are no cached casts, so the two counts are equal.
    apart = found if job.precision.autocast is None else _counted(job, places, gathered=True)
    units = find_units(job.architecture, places)
    computed = {**job.params, **cast}
    return Work(
        params=_leaves(job.params),
        gradients=_leaves(trained),
        moments=_moments(job.optimizer, trained),
        extra=tuple(leaf for items in kept for leaf in _leaves(items)),
        cast=_leaves(cast),
        units=tuple(
            (
                sum(computed[name].nbytes for name in unit.names),
                sum(trained[name].nbytes for name in unit.names if name in trained),
            )
            for unit in units
        ),
        activations_sharded=apart.activations,
        buffers=sum(buffer.nbytes for buffer in job.buffers.values()),
        numbers=sum(p.numel() for p in job.params.values()),
        tokens=job.rows // job.microbatches * job.time * job.sides,
        **attrs.asdict(found),
    )


def _leaves(items: Mapping[str, Tensor]) -> tuple[Leaf, ...]:
    return tuple(
        Leaf(rows=len(t), row=t.nbytes // max(1, len(t))) if t.ndim else Leaf(rows=1, row=t.nbytes)
        for t in items.values()
    )


def _moments(optimizer: Optimizer, trained: Mapping[str, Tensor]) -> tuple[Leaf, ...]:
    """What the optimizer keeps after one update: many classes create their slots in the first."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    halves = _Halves()  # type: ignore[no-untyped-call]
    # Eager, since torchao's classes compile their update, which fake tensors would break for good.
    with torch.compiler.set_stance("force_eager"), FakeTensorMode(), halves:
        params = {n: torch.empty(p.shape, dtype=p.dtype) for n, p in trained.items()}
        grads = {n: torch.empty_like(p) for n, p in params.items()}
        begun = optimizer.init(params)
        try:
            _, state = optimizer.update(grads, begun, params, optimizer.lr, donate=True)
        except FunctrainError:
            raise
        except Exception as error:  # whatever a kernel raises that needs real memory
            raise ConfigError(
                f"plan: {optimizer.kind} makes its moments in an update, and its update cannot be "
                f"made without memory ({_reason(error)}); plan with adamw, which has 8 bytes of "
                "them for a float32 parameter, and reckon from those"
            ) from error
        return tuple(leaf for items in state.slots.values() for leaf in _leaves(items))


class _Halves(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Answers every read of a value with 0.5, or with 1 where it is not a float.

    What an optimizer keeps hardly depends on values. 0.5 is neither 0 nor 1, since an update may
    divide by the value, or by 1 minus it.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        if func is torch.ops.aten._local_scalar_dense.default:
            return 0.5 if args[0].is_floating_point() else 1
        return func(*args, **(kwargs or {}))


class _Grouped(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Grouped products of a mixture of experts, whose shapes PyTorch infers only in bf16."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        if func is not torch.ops.aten._grouped_mm.default:
            return func(*args, **(kwargs or {}))
        one, other, *options = args
        shape = [one.shape[-2], other.shape[-1]]
        if one.ndim == other.ndim:  # the gradient of weights, or whole batches
            shape.insert(0, len(options[0] if one.ndim == 2 else one))
        return one.new_empty(shape)


@attrs.frozen(kw_only=True)
class _Run:
    activations: int
    forward: int
    together: int
    head: int
    head_weight: int
    flops: int


def _counted(job: Job, places: Slots, *, gathered: bool = False) -> _Run:
    """Count a micro-batch's forward and backward, on tensors without memory.

    `gathered`: for params that are gathered from shards and so are not leaves: autocast caches no
    casts of them.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    rows = job.rows // job.microbatches * job.sides
    counted = counter()
    living = _Living()
    with FakeTensorMode() as fake:
        leaves = {n: _fake(p, job.precision, n in places.trainable) for n, p in job.params.items()}
        values = {n: fake.from_tensor(b) for n, b in job.buffers.items()}
        buffers = forward_buffers(values, places, job.precision)
        ids = torch.zeros(rows, job.time, dtype=torch.int64)
        with (
            torch.enable_grad(),
            bound(job.architecture, leaves, buffers, "train", places=places) as model,
            activations.checkpointed(activations.matching(model, job.checkpoint), job.recompute),
            _Grouped(),  # type: ignore[no-untyped-call]
            counted,
            living.gradients_of(leaves.values()),
            living,
        ):
            try:
                with job.precision.context(torch.device("cpu")), _casts_kept(not gathered):
                    out, head = _forward(model, ids)
                forward, before = counted.get_total_flops(), living.most
                torch.autograd.backward(out, torch.ones_like(out))
            except (RuntimeError, TypeError) as error:
                raise _asks_for_values(job.architecture, error) from error
    flops = counted.get_total_flops()
    made = ids.numel()
    if head is None:
        flops += job.reference * forward
        return _Run(
            activations=living.most,
            forward=before,
            together=living.together,
            head=0,
            head_weight=0,
            flops=flops,
        )
    products = 2 * made * head.numel()
    # Log-probs recompute their logits for the gradient, except for pairs whose logits can be kept.
    stays = not chunks.exceeds(job.time * job.sides, len(head), chunks.KEPT * chunks.BUDGET)
    stays = stays and job.paired and job.precision.autocast != torch.float16
    times = 3 + (job.sides > 1 and not stays)
    flops += times * products + job.reference * (forward + products)
    return _Run(
        activations=living.most,
        forward=before,
        # The head's own gradient is the first to exist.
        together=living.together + head.numel() * 4,
        head=_head_bytes(made, head, job.time * job.sides if stays else 0, job.sides > 1),
        head_weight=head.numel() * 4,
        flops=flops,
    )


@contextmanager
def _casts_kept(kept: bool) -> Generator[None]:
    """Within, autocast caches its casts of leaves, or not; it never caches those of non-leaves."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(kept and before)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def _asks_for_values(architecture: nn.Module, error: Exception) -> ConfigError:
    return ConfigError(
        f"plan: {type(architecture).__name__} asks for values on its way, and a plan has shapes "
        f"alone ({_reason(error)})"
    )


def _reason(error: Exception) -> str:
    """An error's type, and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"


def _fake(param: Tensor, precision: Precision, trained: bool) -> Tensor:
    narrow = precision.cast is not None and param.is_floating_point()
    dtype = precision.cast if narrow else param.dtype
    return torch.empty(param.shape, dtype=dtype).requires_grad_(trained)


def _forward(model: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor | None]:
    """What to differentiate: hidden states, and the head's weight, or a loss over whole logits."""
    projection = shown(model)
    if projection is None:
        logits = logits_in(model(input_ids=ids))
        if not isinstance(logits, Tensor):
            raise ArchitectureError("the model returns no logits")
        flat, targets = logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
        return torch.nn.functional.cross_entropy(flat.float(), targets), None
    # The head itself is not run here: neither its rows nor anything made of them is counted.
    head = Head(projection, "", None, trunk="")
    return head.hidden(model, {"input_ids": ids}), projection.weight


def _head_bytes(rows: int, weight: Tensor, pair: int, scored: bool) -> int:
    """The bytes of the head while its logits exist, without the gradient that it is summed into.

    Where there are few logits, all exist at once, as in ordinary cross entropy: logits, their
    log-softmax and its gradient. Otherwise there are the logits of one chunk, or of one pair whose
    logits are kept, of `pair` rows (else 0), if that is more. `scored`: log-probs have details, a
    few rows at a time for each thread.
    """
    vocabulary, width = weight.shape
    hidden = rows * width * weight.dtype.itemsize
    if not chunks.are_worth(rows, vocabulary, chunks.BUDGET):
        return 3 * rows * vocabulary * 4 + hidden
    most = min(chunks.BUDGET, rows * vocabulary * 4)
    most = max(most, pair * vocabulary * 4)
    details = min(most, 2 * measures.cached())
    return most + scored * details + hidden


_GROWTH = 1.02


class _Living(TorchDispatchMode):
    """Tracks the bytes alive at once of tensors made within, except gradients of leaves."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most = self.together = 0
        self._now = self._gradients = 0
        self._collected = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        found = func(*args, **(kwargs or {}))
        for each in tree_leaves(found):
            if isinstance(each, Tensor):
                self._seen(each)
        return found

    def _seen(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known[key] = storage.nbytes()
        self._now += storage.nbytes()
        weakref.finalize(storage, self._gone, key)
        if self._now > self.most:
            # Recomputation that stops early leaves a cycle of frames behind (here, not in a real
            # step), and the tensors that they hold live until the next garbage collection.
            if self._now > _GROWTH * self._collected:
                gc.collect()
                self._collected = self._now
            self.most = max(self.most, self._now)
        self.together = max(self.together, self._now + self._gradients)

    def _gone(self, key: int) -> None:
        self._now -= self._known.pop(key, 0)

    @contextmanager
    def gradients_of(self, leaves: Any) -> Generator[None]:
        """Count a tensor separately (in `together` only) once it is the gradient of a leaf."""
        gc.collect()
        gc.freeze()  # so that each collection need not traverse all that exists already
        handles = [
            leaf.register_post_accumulate_grad_hook(self._kept)
            for leaf in leaves
            if leaf.requires_grad
        ]
        for leaf in leaves:
            self._known[leaf.untyped_storage()._cdata] = 0
        try:
            yield
        finally:
            gc.unfreeze()
            for handle in handles:
                handle.remove()

    def _kept(self, leaf: Tensor) -> None:
        assert leaf.grad is not None
        key = leaf.grad.untyped_storage()._cdata
        self._gradients += self._known.get(key, 0)
        self._now -= self._known.get(key, 0)
        self._known[key] = 0


def total(leaves: Sequence[Leaf], workers: int = 1) -> int:
    """The bytes of these tensors on the worker with the most rows, out of so many workers."""
    return sum(leaf.bytes_of(workers) for leaf in leaves)
