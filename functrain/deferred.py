"""A module constructed without its memory; each tensor is made on request, to the bit.

Constructors allocate memory with `torch.empty` and fill it in place. Within `recording` such a
tensor is on the meta device, and the operations on it are recorded, with the state of the random
generator; `Recording.made` replays them for one tensor. So a model larger than the memory can be
made in parts (`functrain.distributed.split`), or not at all (`functrain.planning`).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from functrain.errors import ArchitectureError

_aten = torch.ops.aten
_EMPTY = frozenset(
    {
        _aten.empty.memory_format,
        _aten.empty_strided.default,
        _aten.empty_like.default,
        _aten.new_empty.default,
        _aten.new_empty_strided.default,
    }
)
# Tags of operations whose results, or their shapes, depend on the values of the arguments.
_OF_VALUES = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


@attrs.frozen(eq=False)
class _Place:
    """Where a tensor lies in a storage without memory, whatever becomes of the tensor."""

    storage: torch.UntypedStorage
    offset: int
    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> _Place:
        """The place of a tensor."""
        storage, offset = tensor.untyped_storage(), int(tensor.storage_offset())
        return cls(storage, offset, tensor.size(), tensor.stride(), tensor.dtype)

    @property
    def key(self) -> int:
        """The storage's address, unique as long as the storage is kept."""
        address: int = self.storage._cdata
        return address

    def over(self, memory: torch.UntypedStorage) -> Tensor:
        """The same place in real memory."""
        bare = torch.empty(0, dtype=self.dtype, device=memory.device)
        return bare.set_(memory, self.offset, self.size, self.stride)


@attrs.frozen(eq=False)
class _Done:
    """One recorded operation on tensors and places; `drawn`: the generator's state before it."""

    function: Any
    arguments: Sequence[Any]
    options: Mapping[str, Any]
    outputs: Sequence[_Place]
    drawn: Tensor | None


@attrs.frozen(eq=False)
class Recording:
    """The operations of constructors on tensors without memory; see `recording`."""

    draws: bool = True
    _done: list[_Done] = attrs.field(factory=list, init=False)
    _writers: dict[int, list[int]] = attrs.field(factory=dict, init=False)

    def defers(self, tensor: Tensor) -> bool:
        """Whether a tensor has no memory yet."""
        return tensor.device.type == "meta" and _Place.of(tensor).key in self._writers

    def made(self, tensor: Tensor) -> Tensor:
        """The values of a tensor, in memory of their own; a real tensor is returned as it is.

        What was never filled has undefined values, as with `torch.empty`. Intermediate tensors are
        freed.
        """
        if not self.defers(tensor):
            return tensor.detach()
        place = _Place.of(tensor)
        memory: dict[int, torch.UntypedStorage] = {}
        for index in sorted(self._behind(place.key)):
            self._again(self._done[index], memory)
        found = place.over(memory[place.key])
        return found if found.untyped_storage().nbytes() == found.nbytes else found.clone()

    def called(self, function: Any, arguments: Sequence[Any], options: Mapping[str, Any]) -> Any:
        """Record an operation that makes or takes tensors without memory; run any other."""
        given = [t for t in tree_leaves((arguments, options)) if isinstance(t, Tensor)]
        if not any(map(self.defers, given)) and not _takes_memory(function, given, options):
            return function(*arguments, **options)
        if any(each.device.type == "meta" and not self.defers(each) for each in given):
            raise ArchitectureError(
                f"{function}: takes a tensor on the meta device, which has no values; make the "
                "module on the CPU"
            )
        if not self._can_wait(function, arguments, options, given):
            return self._done_now(function, arguments, options)
        try:
            return self._noted(function, arguments, options)
        except NotImplementedError:  # the meta device has no such kernel
            # Not left to the constructor: it could catch the error, and make other values.
            return self._done_now(function, arguments, options)

    def _can_wait(
        self,
        function: Any,
        arguments: Sequence[Any],
        options: Mapping[str, Any],
        given: Sequence[Tensor],
    ) -> bool:
        """Whether an operation can run later, with the form of its result known without values."""
        written = _written(function, arguments, options)
        if any(tag in function.tags for tag in _OF_VALUES) or not _returns_tensors(function):
            return False
        if not all(map(self.defers, written)):
            return False  # it writes into a real tensor, which may be read at once
        # How much a draw takes from the generator could depend on values.
        fills = len(given) == len(written) == 1
        return fills or torch.Tag.nondeterministic_seeded not in function.tags

    def _done_now(self, function: Any, arguments: Sequence[Any], options: Mapping[str, Any]) -> Any:
        """Run an operation now, on tensors made for it, and record what it writes."""
        written = [t for t in _written(function, arguments, options) if self.defers(t)]
        made: dict[int, Tensor] = {}

        def real(tensor: Tensor) -> Tensor:
            return made.setdefault(id(tensor), self.made(tensor)) if self.defers(tensor) else tensor

        arguments, options = tree_map_only(Tensor, real, (arguments, options))
        found = function(*arguments, **options)
        for tensor in written:
            self._noted(_aten.copy_.default, (tensor, made[id(tensor)]), {})
        back = {id(made[id(tensor)]): tensor for tensor in written}
        return tree_map_only(Tensor, lambda tensor: back.get(id(tensor), tensor), found)

    def taken(self, tensor: Tensor) -> Tensor:
        """A tensor without memory that has the values of a real one."""
        found: Tensor = self._noted(_aten.clone.default, (tensor,), {})
        return found

    def _noted(self, function: Any, arguments: Sequence[Any], options: Mapping[str, Any]) -> Any:
        drawn = None
        if torch.Tag.nondeterministic_seeded in function.tags:
            drawn = (options.get("generator") or torch.default_generator).get_state()
        bare_arguments, bare_options = tree_map_only(Tensor, _bare, (arguments, dict(options)))
        if function in _EMPTY or bare_options.get("device") is not None:
            bare_options["device"] = "meta"
            bare_options.pop("pin_memory", None)
        written = [_Place.of(each) for each in _written(function, arguments, options)]
        kept = tree_map_only(Tensor, self._kept, (arguments, options))
        found = function(*bare_arguments, **bare_options)
        if drawn is not None and self.draws:
            _draw(function, arguments, options)
        outputs = [_Place.of(each) for each in tree_leaves(found) if isinstance(each, Tensor)]
        for place in [*outputs, *written]:
            self._writers.setdefault(place.key, []).append(len(self._done))
        self._done.append(_Done(function, kept[0], kept[1], outputs, drawn))
        return found

    def _kept(self, tensor: Tensor) -> Tensor | _Place:
        """A tensor as recorded: a real one is cloned, since it may change before the replay."""
        return _Place.of(tensor) if self.defers(tensor) else tensor.clone()

    def _behind(self, key: int) -> set[int]:
        """The operations that the values in a storage depend on, directly or not."""
        found: set[int] = set()
        seen, waiting = {key}, [key]
        while waiting:
            for index in self._writers[waiting.pop()]:
                if index in found:
                    continue
                found.add(index)
                done = self._done[index]
                leaves = tree_leaves((done.arguments, done.options))
                more = {each.key for each in leaves if isinstance(each, _Place)} - seen
                waiting += more
                seen |= more
        return found

    def _again(self, done: _Done, memory: dict[int, torch.UntypedStorage]) -> None:
        arguments, options = tree_map_only(
            _Place,
            lambda place: place.over(memory[place.key]),
            (done.arguments, dict(done.options)),
        )
        if done.drawn is not None:
            options["generator"] = torch.Generator()
            options["generator"].set_state(done.drawn)
        found = tree_leaves(done.function(*arguments, **options))
        for tensor, place in zip(found, done.outputs, strict=True):
            if place.key not in memory:
                memory[place.key] = _as_laid(tensor, place).untyped_storage()


class _Mode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, recording: Recording) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._recording = recording

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        return self._recording.called(func, args, kwargs or {})


class _AsReal(TorchFunctionMode):
    """Tensors without memory claim to be on the CPU: torch's own initialisers skip meta tensors."""

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self._recording = recording

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        if func == _IS_META and self._recording.defers(args[0]):
            return not self._recording.draws
        if func == _DEVICE and self._recording.defers(args[0]):
            return torch.device("cpu")
        if func == _SET_DATA and self._recording.defers(args[0]) != self._recording.defers(args[1]):
            # One has memory and the other has none, which torch refuses.
            change = self._recording.taken if self._recording.defers(args[0]) else None
            args = (args[0], change(args[1]) if change else self._recording.made(args[1]))
        if func == torch.Tensor.numpy and self._recording.defers(args[0]):
            raise ArchitectureError(
                "numpy(): of a parameter that has no memory yet, so what is written there would be "
                "lost; use torch's operations"
            )
        if func == torch.Tensor.__setitem__ and self._is_number_into_nothing(*args):
            # Torch would turn the number into a tensor on the first one's device, meta.
            args = (*args[:2], torch.tensor(args[2], dtype=args[0].dtype))
        return func(*args, **(kwargs or {}))

    def _is_number_into_nothing(self, into: Tensor, _index: object, value: object) -> bool:
        return isinstance(value, int | float | complex) and self._recording.defers(into)


_getters: Any = torch.Tensor
_IS_META, _DEVICE = _getters.is_meta.__get__, _getters.device.__get__
_SET_DATA = _getters.data.__set__


def built(make: Callable[[], nn.Module], *, draws: bool = True) -> tuple[nn.Module, Recording]:
    """Call `make` without allocating the module's memory: the module, and its recording.

    Raises `ArchitectureError` if the constructor does something that cannot be done later.
    """
    with recording(draws=draws) as found:
        try:
            return make(), found
        except (RuntimeError, TypeError) as error:
            raise ArchitectureError(
                f"the module cannot be made without its memory ({type(error).__name__}: {error}); "
                "make it whole, with functrain.split(module)"
            ) from error


@contextmanager
def recording(*, draws: bool = True) -> Generator[Recording]:
    """A context in which `torch.empty` allocates no CPU memory, and operations on it are recorded.

    Random generators advance as if everything ran at once. A value that is read (`.item()`) is
    computed then. Without `draws`, tensors filled at random have undefined values and advance no
    generator, for a structure whose weights come from elsewhere or are never needed.
    """
    found = Recording(draws)
    with _AsReal(found), _Mode(found):
        yield found


def _bare(tensor: Tensor) -> Tensor:
    return tensor if tensor.device.type == "meta" else tensor.to("meta")


def _takes_memory(function: Any, given: Sequence[Tensor], options: Mapping[str, Any]) -> bool:
    if function not in _EMPTY:
        return False
    device = options.get("device") or (given[0].device if given else "cpu")
    return torch.device(device).type == "cpu"


def _returns_tensors(function: Any) -> bool:
    return all("Tensor" in str(each.type) for each in function._schema.returns)


def _written(function: Any, arguments: Sequence[Any], options: Mapping[str, Any]) -> list[Tensor]:
    """The tensors that an operation writes into."""
    found: list[Tensor] = []
    for index, each in enumerate(function._schema.arguments):
        if each.alias_info is None or not each.alias_info.is_write:
            continue
        value = options.get(each.name, arguments[index] if index < len(arguments) else None)
        found += [t for t in tree_leaves(value) if isinstance(t, Tensor)]
    return found


def _draw(function: Any, arguments: Sequence[Any], options: Mapping[str, Any]) -> None:
    """Advance the generator as if the operation had drawn from it."""
    scratch, more = tree_map_only(
        Tensor,
        lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype),
        (arguments, dict(options)),
    )
    function(*scratch, **more)


def _as_laid(tensor: Tensor, place: _Place) -> Tensor:
    """A tensor laid out in memory as `place` asks."""
    if tensor.stride() == place.stride and not place.offset:
        return tensor
    size = place.storage.nbytes() // place.dtype.itemsize
    laid = torch.empty(size, dtype=tensor.dtype, device=tensor.device)
    place.over(laid.untyped_storage()).copy_(tensor)
    return laid
