"""Units: blocks of a model, gathered shortly before they compute and let go after."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import attrs
import torch
from torch import Tensor, nn

from functrain.architecture import Slots, fill
from functrain.distributed.absent import Absent

Forward = Callable[..., Any]
_KEPT = 2
"""Regathered units kept at once in a backward pass: the computing one, and the one before it."""


@attrs.frozen(eq=False)
class Unit:
    """Parameters gathered together: those of a block, or (`module` None) those of no block."""

    module: nn.Module | None
    names: tuple[str, ...]


def find_units(architecture: nn.Module, places: Slots) -> tuple[Unit, ...]:
    """The unit of what belongs to no block, then the blocks: members of the outermost module lists.

    A parameter with slots in two blocks, or whose module is in both, belongs to no block. A member
    that is never called, such as a list within the list, is searched for blocks itself.
    """
    blocks = list(_blocks(architecture))
    owner: dict[int, int] = {}
    for number, block in enumerate(blocks):
        for module in block.modules():
            key = id(module._parameters)
            owner[key] = number if owner.get(key, number) == number else -1
    members: dict[int, list[str]] = {}
    for name, at in places.params.items():
        owners = {owner.get(id(entries), -1) for entries, _ in at}
        members.setdefault(owners.pop() if len(owners) == 1 else -1, []).append(name)
    root = Unit(None, tuple(members.pop(-1, ())))
    return root, *(Unit(blocks[number], tuple(members[number])) for number in sorted(members))


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if not isinstance(child, nn.ModuleList):
            yield from _blocks(child)
            continue
        for member in child:
            if type(member).forward is nn.Module.forward and "forward" not in vars(member):
                yield from member if isinstance(member, nn.ModuleList) else _blocks(member)
            else:
                yield member


class Coming(Protocol):
    """Whole tensors that are being gathered."""

    def whole(self) -> list[Tensor]:
        """Wait for the whole tensors and return them."""
        ...


class Exchange(Protocol):
    """How shards are gathered."""

    def gather(self, names: Sequence[str], shards: Sequence[Tensor]) -> Coming:
        """Begin to gather them."""
        ...

    def note(self, what: str, names: Sequence[str]) -> None:
        """Record what is about to be exchanged, to compare it with the other workers."""
        ...


class Sums(Protocol):
    """Sums, over the workers, of the gradients of whole tensors."""

    def begin(self, names: Sequence[str], grads: Sequence[Tensor | None]) -> None:
        """Begin the sums of a unit."""
        ...

    def finish(self) -> None:
        """Wait for the sums that are under way."""
        ...


class _Gather(torch.autograd.Function):
    """Forward: from shards to whole tensors. Backward: from gradients of these to rows of sums.

    The gradients go to `Sums`, in the dtype of the params, rather than to the shards' own `grad`,
    whose dtype may be narrower.
    """

    @staticmethod
    def forward(  # pyrefly: ignore[bad-override]
        ctx: Any, values: Values, unit: Unit, *shards: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.values, ctx.unit = values, unit
        ctx.set_materialize_grads(False)
        whole = values.taken(unit)
        frozen = [w for w, s in zip(whole, shards, strict=True) if not s.requires_grad]
        ctx.mark_non_differentiable(*frozen)
        return tuple(whole)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[None, ...]:  # pyrefly: ignore[bad-override]
        ctx.values.ended(ctx.unit, grads)
        return (None,) * (2 + len(grads))


class Values:
    """The values of all params, in shards, to compute with; `sums` takes the gradients.

    `whole`: values that are whole already and have no autograd history, a reference's, say.

    While a unit computes, the next one is being gathered and the gradients of the previous one are
    being summed. Forward, the next unit is a guess: the one that follows in the model; after one
    wrong guess there are no more, since the model has its own order. Backward, it is the unit that
    was called before, among those that will need their tensors again. All workers call the same
    units in the same order, so their exchanges are in the same order too.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        shards: Mapping[str, Tensor],
        exchange: Exchange,
        sums: Sums | None = None,
        *,
        whole: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._units, self._shards, self._exchange, self._sums = units, shards, exchange, sums
        self._whole = {} if whole is None else whole
        self._again: dict[int, list[Tensor]] = {}
        self._waiting: list[Unit] = []  # for their backward pass, in the order of the calls
        self._coming: tuple[Unit, Coming] | None = None
        self._guesses = True
        self._will_finish = False

    def gather(self, unit: Unit) -> Sequence[Tensor]:
        """A unit's whole tensors, with an autograd history if they are trained."""
        shards = self._shards_of(unit)
        if torch.is_grad_enabled() and any(shard.requires_grad for shard in shards):
            found: Sequence[Tensor] = _Gather.apply(self, unit, *shards)  # type: ignore[no-untyped-call]
            return found
        return self.taken(unit)

    def taken(self, unit: Unit) -> list[Tensor]:
        """A unit's whole tensors; also begins to gather the next unit's."""
        coming, self._coming = self._coming, None
        if coming is not None and coming[0] is not unit:
            self._guesses = False
            coming[1].whole()
            coming = None
        names = self._names(unit)
        there = (self._sent_for(unit) if coming is None else coming[1]).whole()
        whole = {**self._whole, **dict(zip(names, there, strict=True))}
        following = self._following(unit)
        if following is not None:
            self._coming = following, self._sent_for(following)
        return [whole[name] for name in unit.names]

    def again(self, unit: Unit) -> list[Tensor]:
        """A unit's whole tensors, gathered again for a backward pass."""
        if id(unit) not in self._again:
            while len(self._again) >= _KEPT:
                del self._again[next(iter(self._again))]
            with torch.no_grad():
                whole = self.taken(unit)
            # The counts match: tensors with a history are never among those given whole.
            self._again[id(unit)] = [
                tensor.requires_grad_(shard.requires_grad)
                for tensor, shard in zip(whole, self._shards_of(unit), strict=True)
            ]
        return self._again[id(unit)]

    def ended(self, unit: Unit, grads: Sequence[Tensor | None]) -> None:
        """End a unit's backward pass and begin to sum `grads`, those of its whole tensors."""
        assert self._sums is not None  # without sums, nothing has a history
        self._exchange.note("backward", unit.names)
        self._again.pop(id(unit), None)
        if (at := self._last(unit)) is not None:
            del self._waiting[at:]
        trained = [name for name in unit.names if self._shards[name].requires_grad]
        given = dict(zip(unit.names, grads, strict=True))
        if not self._will_finish:
            self._will_finish = True
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)
        self._sums.begin(trained, [given[name] for name in trained])

    def will_ask_again(self, unit: Unit) -> None:
        """Record that a call of a unit needs its whole tensors again in the backward pass."""
        self._waiting.append(unit)

    def close(self) -> None:
        """End: wait for a gather that was begun as a guess and never used."""
        coming, self._coming = self._coming, None
        if coming is not None:
            coming[1].whole()

    def _finish(self) -> None:
        """Called at the end of a backward pass; units that train nothing report no end."""
        self._will_finish = False
        self._waiting.clear()
        self._again.clear()
        assert self._sums is not None
        self._sums.finish()

    def _names(self, unit: Unit) -> list[str]:
        return [name for name in unit.names if name in self._shards]

    def _shards_of(self, unit: Unit) -> list[Tensor]:
        return [self._shards[name] for name in self._names(unit)]

    def _sent_for(self, unit: Unit) -> Coming:
        return self._exchange.gather(self._names(unit), self._shards_of(unit))

    def _following(self, unit: Unit) -> Unit | None:
        """The unit that will probably be needed after this one, if it has yet to be gathered."""
        if not self._guesses:
            return None
        if not _in_backward():
            at = next(n for n, each in enumerate(self._units) if each is unit)
            return self._units[at + 1] if at + 1 < len(self._units) else None
        last = self._last(unit)
        if last is None:
            return None
        del self._waiting[last + 1 :]  # the backward passes of later calls are over
        found = self._waiting[last - 1] if last else None
        return None if found is None or id(found) in self._again else found

    def _last(self, unit: Unit) -> int | None:
        """The index of a unit's last call among those waiting."""
        places = [at for at, each in enumerate(self._waiting) if each is unit]
        return places[-1] if places else None


def _in_backward() -> bool:
    """Whether autograd is running a backward pass, in which a forward may be run again."""
    return torch._C._current_graph_task_id() != -1


class Binding:
    """While it lasts, the blocks of a bound model gather their shards when they are called.

    Outside a call the block's slots hold tensors of the right form but without values (`Absent`),
    so that code reading a weight behind the block's back is refused. Whole weights that autograd
    would save for the backward pass are not kept but gathered again there; if a block's activations
    are recomputed, its gather is repeated too.
    """

    def __init__(self, units: Sequence[Unit], places: Slots, values: Values) -> None:
        self._root, *self._blocks = units
        self._params = places.params
        self._values = values
        self._own = values
        self._filled: set[int] = set()
        self._partly: set[int] = set()  # blocks that are run again in part in the backward pass

    @contextmanager
    def bound(self, recomputed: Iterable[nn.Module]) -> Generator[None]:
        """Enter the binding; `recomputed`: modules whose forward the backward pass runs again."""
        again = {id(each) for each in recomputed}
        self._partly = {
            id(unit)
            for unit in self._blocks
            if unit.module is not None
            and any(id(each) in again for each in unit.module.modules() if each is not unit.module)
        }
        with ExitStack() as stack:
            stack.enter_context(self._filling(self._root, self._own.gather(self._root)))
            for unit in self._blocks:
                module = unit.module
                assert module is not None  # only the root has none
                _install(stack, module, functools.partial(self._called, unit))
                # Recomputation within the block reruns its submodules without calling the block.
                for each in module.modules():
                    if each is module:
                        continue
                    if each._parameters or id(each) in again:
                        _install(stack, each, functools.partial(self._ensured, unit))
            yield
            self._own.close()

    @contextmanager
    def other(self, values: Values) -> Generator[dict[str, Tensor]]:
        """Within, the model computes with other values; yields those of no block, whole."""
        before, self._values = self._values, values
        root = values.gather(self._root)
        try:
            with self._filling(self._root, root):
                yield dict(zip(self._root.names, root, strict=True))
                values.close()
        finally:
            self._values = before

    def empty(self, shards: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> Any:
        """The placeholders in the slots while nothing is gathered."""
        return {name: Absent.like(name, shards[name], shapes[name]) for name in shards}

    @contextmanager
    def _filling(self, unit: Unit, whole: Sequence[Tensor]) -> Generator[None]:
        places = [(entries, key) for name in unit.names for entries, key in self._params[name]]
        before = [entries[key] for entries, key in places]
        try:
            for name, tensor in zip(unit.names, whole, strict=True):
                fill(self._params[name], tensor)
            self._filled.add(id(unit))
            yield
        finally:
            self._filled.discard(id(unit))
            for (entries, key), held in zip(places, before, strict=True):
                entries[key] = held

    def _called(self, unit: Unit, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        """A block's forward: gather its params, compute, and let them go."""
        whole = self._values.gather(unit)
        with ExitStack() as stack:
            stack.enter_context(self._filling(unit, whole))
            if torch.is_grad_enabled() and self._values is self._own and not _in_backward():
                # Under activation checkpointing nothing is saved, and our hooks would interfere.
                within = torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
                certain = within or id(unit) in self._partly
                if certain:
                    self._own.will_ask_again(unit)
                if not within:
                    stack.enter_context(self._let_go(unit, whole, told=certain))
            return forward(*args, **kwargs)

    def _ensured(self, unit: Unit, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        """The forward of a module inside a block, which may be rerun without calling the block."""
        if id(unit) in self._filled:
            return forward(*args, **kwargs)
        if not _in_backward():  # the model itself calls a part of the block
            return self._called(unit, forward, *args, **kwargs)
        with self._filling(unit, self._own.again(unit)):
            return forward(*args, **kwargs)

    def _let_go(self, unit: Unit, whole: Sequence[Tensor], *, told: bool) -> Any:
        known = {tensor.untyped_storage()._cdata: n for n, tensor in enumerate(whole)}
        # Not the tensors themselves: autograd keeps the hooks alive, and all that they hold.
        dtypes = [tensor.dtype for tensor in whole]
        own = self._own

        def pack(tensor: Tensor) -> Any:
            nonlocal told
            number = known.get(tensor.untyped_storage()._cdata)
            if number is None or tensor.dtype != dtypes[number]:
                # Detached: an output saved by its own node would be a cycle, never freed.
                return tensor.detach()
            if not told:
                told = True
                own.will_ask_again(unit)
            return number, tensor.size(), tensor.stride(), tensor.storage_offset()

        def unpack(packed: Any) -> Tensor:
            if isinstance(packed, Tensor):
                return packed
            number, size, stride, offset = packed
            found: Tensor = own.again(unit)[number].detach().as_strided(size, stride, offset)
            return found

        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def _install(stack: ExitStack, module: nn.Module, forward: Callable[..., Any]) -> None:
    own = vars(module)
    before: Forward | None = own.get("forward")

    def called(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        usual = functools.partial(type(module).forward, module) if before is None else before
        return forward(usual, *args, **kwargs)

    def restore() -> None:
        if before is None:
            own.pop("forward", None)
        else:
            own["forward"] = before

    own["forward"] = types.MethodType(called, module)
    stack.callback(restore)
