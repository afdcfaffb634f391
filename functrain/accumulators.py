"""Gradients of large tables, summed where they are made.

An embedding's gradient is a dense [vocabulary, width] of zeros but for the rows of a batch, and a
head's is another; an ordinary backward pass fills one for each micro-batch and adds it to the sum
of those before. Within `accumulating` both are added to the sum as they are made, in the backward
pass that `adding` is told of. Any other is a forward's own, for a gradient that it computes with,
and is given a dense one.

An embedding is of another class meanwhile. Compiled code may not write to a sum that it is not told
of: there the class looks up by an operator of our own, whose backward operator adds the rows, and
returns the gradient of a number that nobody reads, so that it is not left out.
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
"""Embeddings of so many bytes are worth it."""


@attrs.frozen(eq=False)
class Accumulating:
    """`sum_of`: where a leaf's gradient is summed, or None for what is no leaf that trains, or has
    a hook, which is to be told of its gradient.

    Who asks has a gradient: what is asked for is there, zeros at first. `trains`: whether there
    would be one. `factor`: what a summed loss is multiplied by before its gradient is taken; 0-d,
    or [k] where it is k sums.
    """

    trains: Callable[[Tensor], bool]
    sum_of: Callable[[Tensor], Tensor | None]
    factor: Tensor


_current: ContextVar[Accumulating | None] = ContextVar("accumulating", default=None)
_tables: ContextVar[list[Tensor]] = ContextVar("tables")
# The backward pass that adds to the sums, by autograd's number, as soon as it is under way.
_pass: ContextVar[list[int]] = ContextVar("pass")


def current() -> Accumulating | None:
    """The accumulation that is under way."""
    return _current.get()


@contextmanager
def accumulating(
    modules: Sequence[nn.Module], given: Accumulating, *, compiled: bool = False
) -> Generator[None]:
    """Within it, large embeddings among `modules` and heads by chunks add to `given`'s sums.

    For one forward and one backward pass of each loss, within `adding`, whose gradient is asked of
    these leaves and of nothing else. Embeddings are left alone on accelerators, where an ordinary
    gradient is summed in a fixed order and a scattered one is not, and in a model that its user has
    compiled. `compiled`: by `functrain.compilation`. Then a call on another weight raises
    `ConfigError`, and so does a gradient that a forward takes through them; they are left alone
    where torch compiles the backward pass as a whole.
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
    """Within it, the backward pass of `loss` adds to the sums of the embeddings.

    A backward pass inside of it does not, as one in a forward that is run again for it.
    """
    if not _tables.get([]):
        yield
        return
    passes: list[int] = []
    token = _pass.set(passes)
    # Autograd comes to it first, and gives each pass a number.
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
    """Whether the backward pass that is under way adds to the sums."""
    return _under_way() in _pass.get([])


def _compiles_autograd() -> bool:
    """Whether the backward pass is compiled as a whole, which leaves out what nobody reads."""
    from torch._dynamo import config

    return bool(config.compiled_autograd)


def _is_compiled(module: nn.Module) -> bool:
    return "_orig_mod" in module._modules or module._compiled_call_impl is not None


def _is_worth(module: nn.Embedding) -> bool:
    """Whether a module has a large table, on the CPU, and neither options nor a forward beside."""
    weight = module._parameters.get("weight")
    if weight is None or weight.device.type != "cpu" or weight.nbytes < TABLE:
        return False
    options = module.sparse or module.scale_grad_by_freq
    options = options or (module.padding_idx is not None and module.padding_idx < 0)
    return not options and "forward" not in vars(module)


@contextmanager
def _replaced(module: nn.Embedding, place: int, base: type[nn.Embedding]) -> Generator[None]:
    """Within it, an embedding is of a class that has `base` in the place of `nn.Embedding`.

    A class, and no forward of its own: compiled code is guarded by what it is, and the forward of
    a subclass, as Gemma's, which scales what it looks up, finds it by `super()`.
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
    object.__setattr__(module, "__class__", kind)  # not by a class's own


@functools.cache
def _above(base: type[Any], own: type[Any]) -> type[Any]:
    """A class with `base` below it, or `own`, whose gradients are dense then.

    That is for a class which is told of its subclasses: this one is none of its user's.
    """
    if type(own) is not type or hasattr(own.__init_subclass__, "__func__"):
        return own
    bases = (base,) if own is nn.Embedding else (own, base)
    names = {"__module__": own.__module__, "__qualname__": own.__qualname__}
    try:
        return type(own.__name__, bases, names)
    except TypeError:  # no order of their bases is that of both
        return own


def _transformed() -> bool:
    """Whether `torch.vmap` or its like is at work, for which nothing here has a rule."""
    return torch._C._are_functorch_transforms_active()


class _Looked(nn.Embedding):
    """An embedding whose gradient is added row by row to its sum."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """As `nn.Embedding`'s."""
        given, weight = _current.get(), self.weight
        graded = given is not None and torch.is_grad_enabled() and given.trains(weight)
        if given is None or not graded or _transformed():
            return super().forward(input)
        into = functools.partial(given.sum_of, weight)
        found: Tensor = _Lookup.apply(weight, input, self.padding_idx, into)  # type: ignore[no-untyped-call]
        return found


class _Operated(nn.Embedding):
    """The same by the operator, in compiled code."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """As `nn.Embedding`'s."""
        weight = self.weight
        graded = torch.is_grad_enabled() and weight.requires_grad  # no reference, no frozen copy
        if not graded or _transformed():
            return super().forward(input)
        padding = -1 if self.padding_idx is None else self.padding_idx
        place, unread = getattr(self, _PLACE), getattr(self, _UNREAD)
        found: Tensor = _operator(_LOOK_UP)(weight, input, unread, place, padding)
        return found


class _Lookup(torch.autograd.Function):
    """`F.embedding`, whose gradient is added row by row to what `into` gives then.

    It is dense where `into` gives nothing, or the backward pass is a forward's own.
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
        # Torch's own, which can be differentiated once more.
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


# Compiled code is kept on disk by the operators' names and not by what they do: where that
# changes, so must the names.
_LOOK_UP, _ADD_ROWS = "look_up_1", "add_rows_1"


def _operator(name: str) -> Any:
    return getattr(torch.ops.functrain, name).default


@torch.library.custom_op(
    f"functrain::{_LOOK_UP}",
    mutates_args=(),
    schema="(Tensor weight, Tensor ids, Tensor unread, int place, int padding) -> Tensor",
)
def _look_up(weight: Tensor, ids: Tensor, unread: Tensor, place: int, padding: int) -> Tensor:
    """`F.embedding`; `place`: among the tables; `padding`: the id without a gradient, or −1.

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
    """A gradient's rows are added to the sum of a table; the gradient of what nobody reads.

    `call`: which one it is in its graph. A compiler takes two of the same arguments for one.
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


# How many calls the graph that is being traced has so far.
_calls: weakref.WeakKeyDictionary[object, int] = weakref.WeakKeyDictionary()


def _numbered() -> int:
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    tracing = get_proxy_mode()
    if tracing is None:
        return 0
    _calls[tracing] = _calls.get(tracing, -1) + 1
    return _calls[tracing]


_look_up.register_autograd(_backward, setup_context=_keep)
