"""Gradients of large tables, added to their sums as they are computed.

An embedding's gradient is a dense [vocabulary, width] tensor, zero except in the rows of a batch,
and a head's is another; an ordinary backward pass fills one for each micro-batch and adds it to the
sum of those before. Within `accumulating` both are added to the sum directly, in the backward pass
that `adding` announces. Any other backward pass belongs to a forward that computes with a gradient
of its own, and gets a dense one.

Meanwhile an embedding is of another class. Compiled code may not write to a sum that is not among
its arguments: there the class looks rows up by an operator of our own. Its backward operator adds
the rows and returns the gradient of a number that nobody reads, so that the compiler keeps it.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from functrain.errors import ConfigError

TABLE = 1 << 20
"""The least size in bytes of an embedding for which this is worth it."""


@attrs.frozen(eq=False)
class Accumulating:
    """Where gradients are summed, and how they are scaled.

    `trains`: whether a tensor is a trainable leaf. `sum_of`: the sum of a leaf's gradients, zeros
    when first asked for, so ask only with a gradient to add; None if the tensor is no trainable
    leaf, or has a hook, which must see the gradient. `factor`: what a summed loss is multiplied by
    before its gradient is taken; 0-d, or [k] for k sums.
    """

    trains: Callable[[Tensor], bool]
    sum_of: Callable[[Tensor], Tensor | None]
    factor: Tensor


_current: ContextVar[Accumulating | None] = ContextVar("accumulating", default=None)
_tables: ContextVar[list[Tensor]] = ContextVar("tables")
# Autograd's number of the backward pass that adds to the sums, once it is under way.
_pass: ContextVar[list[int]] = ContextVar("pass")


def current() -> Accumulating | None:
    """The accumulation that is under way, or None."""
    return _current.get()


@contextmanager
def accumulating(
    modules: Sequence[nn.Module], given: Accumulating, *, compiled: bool = False
) -> Generator[None]:
    """A context in which large embeddings among `modules` and chunked heads add to `given`'s sums.

    It is for one forward and one backward pass of each loss; the latter is within `adding`, and
    takes the gradient of these leaves and of nothing else. Embeddings are left alone on
    accelerators, where an ordinary gradient is summed in a fixed order and a scattered one is not,
    and in a model that its user has compiled.

    `compiled`: the model is compiled by `functrain.compilation`. Then an embedding called on
    another weight raises `ConfigError`, and so does a gradient that a forward takes through one;
    embeddings are left alone if torch compiles the backward pass as a whole.
    """
    large = [m for m in modules if isinstance(m, nn.Embedding) and _is_worth(m)]
    large = [module for module in large if given.trains(module.weight)]
    if large and (_compiles_autograd() if compiled else any(map(_is_compiled, modules))):
        large.clear()
    weights: list[Tensor] = [module.weight for module in large]
    token, tables = _current.set(given), _tables.set(weights)
    try:
        with ExitStack() as changes:
            for place, module in enumerate(large):
                changes.enter_context(_replaced(module, place, _Operated if compiled else _Looked))
            yield
    finally:
        _tables.reset(tables)
        _current.reset(token)


@contextmanager
def adding(loss: Tensor) -> Generator[None]:
    """A context in which the backward pass of `loss` adds to the sums of the embeddings.

    A backward pass nested in that one does not, such as one in a forward that is recomputed for it.
    """
    if not _tables.get([]):
        yield
        return
    passes: list[int] = []
    token = _pass.set(passes)
    # Autograd numbers each pass, and calls the loss's hook first.
    begun = loss.register_hook(lambda _: passes.append(_under_way()))  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        begun.remove()
        _pass.reset(token)


def _under_way() -> int:
    """The number of the innermost backward pass that is under way."""
    return torch._C._current_graph_task_id()


def _adds() -> bool:
    """Whether the innermost backward pass under way adds to the sums."""
    return _under_way() in _pass.get([])


def _compiles_autograd() -> bool:
    """Whether the backward pass is compiled as a whole, which drops what nobody reads."""
    from torch._dynamo import config

    return bool(config.compiled_autograd)


def _is_compiled(module: nn.Module) -> bool:
    return "_orig_mod" in module._modules or module._compiled_call_impl is not None


def _is_worth(module: nn.Embedding) -> bool:
    """Whether an embedding has a large table on the CPU, no options and no forward of its own."""
    weight = module._parameters.get("weight")
    if weight is None or weight.device.type != "cpu" or weight.nbytes < TABLE:
        return False
    options = module.sparse or module.scale_grad_by_freq
    options = options or (module.padding_idx is not None and module.padding_idx < 0)
    return not options and "forward" not in vars(module)


@contextmanager
def _replaced(module: nn.Embedding, place: int, base: type[nn.Embedding]) -> Generator[None]:
    """A context in which an embedding's class has `base` in place of `nn.Embedding`.

    It is a class rather than an instance's `forward`, since compiled code guards on the class, and
    the forward of a subclass (Gemma's scales what it looks up) reaches `base` by `super()`.
    """
    own, names = type(module), vars(module)
    lent = {_PLACE: place, _UNREAD: torch.zeros((), device="cpu", requires_grad=True)}
    before = {name: names[name] for name in lent if name in names}
    try:
        names.update(lent)
        _change(module, _above(base, own))  # type: ignore[arg-type]
        yield
    finally:
        for name in lent:
            names.pop(name, None)
        names.update(before)
        _change(module, own)


_PLACE, _UNREAD = "_functrain_place", "_functrain_unread"


def _change(module: nn.Module, kind: type[Any]) -> None:
    object.__setattr__(module, "__class__", kind)  # not by the class's own __setattr__


@functools.cache
def _above(base: type[Any], own: type[Any]) -> type[Any]:
    """A class with `base` among its bases; or `own`, whose gradients stay dense.

    The latter is for a class with a metaclass or an `__init_subclass__` of its own, which must not
    see a subclass that its user has not made.
    """
    if type(own) is not type or hasattr(own.__init_subclass__, "__func__"):
        return own
    bases = (base,) if own is nn.Embedding else (own, base)
    names = {"__module__": own.__module__, "__qualname__": own.__qualname__}
    try:
        return type(own.__name__, bases, names)
    except TypeError:  # no consistent method resolution order
        return own


def _transformed() -> bool:
    """Whether a functorch transform (`torch.vmap`) is active, for which nothing here has a rule."""
    return torch._C._are_functorch_transforms_active()


class _Looked(nn.Embedding):
    """An embedding whose gradient is added row by row to its sum."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """See `nn.Embedding`."""
        given, weight = _current.get(), self.weight
        graded = given is not None and torch.is_grad_enabled() and given.trains(weight)
        if given is None or not graded or _transformed():
            return super().forward(input)
        into = functools.partial(given.sum_of, weight)
        found: Tensor = _Lookup.apply(weight, input, self.padding_idx, into)  # type: ignore[no-untyped-call]
        return found


class _Operated(nn.Embedding):
    """The same for compiled code, by the operator."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """See `nn.Embedding`."""
        weight = self.weight
        graded = torch.is_grad_enabled() and weight.requires_grad  # not a reference's or frozen
        if not graded or _transformed():
            return super().forward(input)
        padding = -1 if self.padding_idx is None else self.padding_idx
        place, unread = getattr(self, _PLACE), getattr(self, _UNREAD)
        found: Tensor = _operator(_LOOK_UP)(weight, input, unread, place, padding)
        return found


class _Lookup(torch.autograd.Function):
    """`F.embedding` whose backward adds the gradient row by row to the sum that `into` returns.

    The gradient is dense if `into` returns None, or if the backward pass is a forward's own.
    """

    @staticmethod
    def forward(  # pyrefly: ignore[bad-override]
        ctx: Any,
        weight: Tensor,
        ids: Tensor,
        padding: int | None,
        into: Callable[[], Tensor | None],
    ) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.padding, ctx.into, ctx.rows = padding, into, len(weight)
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        (ids,) = ctx.saved_tensors
        into = ctx.into() if _adds() else None
        if into is not None:
            _add_rows(into, grad_outputs[0], ids, ctx.padding)
            return None, None, None, None
        padding = -1 if ctx.padding is None else ctx.padding
        # Torch's own operator, which can be differentiated again.
        dense = torch.ops.aten.embedding_dense_backward(
            grad_outputs[0], ids, ctx.rows, padding, False
        )
        return dense, None, None, None


def _add_rows(into: Tensor, grad: Tensor, ids: Tensor, padding: int | None) -> None:
    rows = grad.reshape(ids.numel(), into.shape[1]).to(into.dtype)
    ids = ids.flatten()
    if padding is not None:
        rows = rows.masked_fill((ids == padding).unsqueeze(1), 0.0)
    into.index_add_(0, ids, rows)


# Compiled code is cached on disk by the operators' names, not by what they do: rename them when
# that changes.
_LOOK_UP, _ADD_ROWS = "look_up_1", "add_rows_1"


def _operator(name: str) -> Any:
    return getattr(torch.ops.functrain, name).default


@torch.library.custom_op(
    f"functrain::{_LOOK_UP}",
    mutates_args=(),
    schema="(Tensor weight, Tensor ids, Tensor unread, int place, int padding) -> Tensor",
)
def _look_up(weight: Tensor, ids: Tensor, unread: Tensor, place: int, padding: int) -> Tensor:
    """`F.embedding`; `place`: the table's index; `padding`: the id without a gradient, or −1.

    Raises `ConfigError` for a weight whose memory is not the table's.
    """
    tables = _tables.get([])
    if len(tables) <= place or tables[place].data_ptr() != weight.data_ptr():
        raise ConfigError(
            "compile: an embedding is called with gradients on another weight than the state's "
            "own; where the model does so take head='full', and where an objective of your own "
            "does, give it direct = False"
        )
    return F.embedding(ids, weight)


@torch.library.custom_op(
    f"functrain::{_ADD_ROWS}",
    mutates_args=(),
    schema="(Tensor grad, Tensor ids, int place, int padding, int call) -> Tensor",
)
def _add_rows_of(grad: Tensor, ids: Tensor, place: int, padding: int, call: int) -> Tensor:
    """Add a gradient's rows to the sum of a table; returns the gradient of the unread number.

    `call`: the index of the call in its graph, since a compiler merges calls of equal arguments.
    """
    if not _adds():
        raise ConfigError(
            "compile: the model takes gradients of its own through an embedding, of which compiled "
            "code has only the sum of the step; take head='full', or leave compile out"
        )
    given = _current.get()
    into = None if given is None else given.sum_of(_tables.get()[place])
    if into is None:
        raise ConfigError(
            "compile: an embedding's weight has a hook, which compiled code would not call; give "
            "the step transform= for its gradient, or leave compile out"
        )
    _add_rows(into, grad, ids, None if padding < 0 else padding)
    return grad.new_zeros((), dtype=torch.get_default_dtype())


@_look_up.register_fake
def _(weight: Tensor, ids: Tensor, unread: Tensor, place: int, padding: int) -> Tensor:
    return weight.new_empty((*ids.shape, weight.shape[1]))


@_add_rows_of.register_fake
def _(grad: Tensor, ids: Tensor, place: int, padding: int, call: int) -> Tensor:
    return grad.new_empty((), dtype=torch.get_default_dtype())


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ids, _, ctx.place, ctx.padding = inputs
    ctx.save_for_backward(ids)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (ids,) = ctx.saved_tensors
    unread = _operator(_ADD_ROWS)(grad, ids, ctx.place, ctx.padding, _numbered())
    return None, None, unread, None, None


# The index of the latest call in each graph that is being traced.
_calls: weakref.WeakKeyDictionary[object, int] = weakref.WeakKeyDictionary()


def _numbered() -> int:
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    tracing = get_proxy_mode()
    if tracing is None:
        return 0
    _calls[tracing] = _calls.get(tracing, -1) + 1
    return _calls[tracing]


_look_up.register_autograd(_backward, setup_context=_keep)
