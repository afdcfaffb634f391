"""Whether a module's parameters can be taken out of it: nothing else may share their memory.

A step's params are other tensors than those of the module that was split. Anything else in the
module that holds the old tensors, or has hooks on their gradients, would go on with values that
nobody trains.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from functrain.errors import ArchitectureError, FunctrainWarning
from functrain.reachable import beside_slots
from functrain.trees import has_hooks


def check_separable(
    module: nn.Module, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor]
) -> None:
    """Raise `ArchitectureError` if these tensors of a module cannot be taken out of it.

    That is so if a parameter has a hook on its gradient, or shares memory with another parameter
    or a buffer. Warns the caller of `functrain.split` (`FunctrainWarning`) of attributes that lead
    to a trainable parameter or a buffer, of buffers that share memory, and of an extra state.
    """
    memory = _Memory(params)
    _refuse_hooks(params)
    _refuse_shared(params, memory)
    _refuse_shared_buffers(buffers, memory)
    lasting = _lasting(module, buffers)
    _tell_of_parted(buffers, lasting)
    _tell_of_kept(module, params, lasting)
    _tell_of_extra(module)


def _refuse_hooks(params: Mapping[str, Tensor]) -> None:
    """Refuse hooks on gradients: a step takes gradients of other tensors, so none would run."""
    for name, param in params.items():
        if has_hooks(param):
            raise ArchitectureError(
                f"{name}: it has a hook on its gradient, which no step would call; remove it "
                "before functrain.split, and give the step the same as "
                "transform=lambda grads, params: …"
            )


def _refuse_shared(params: Mapping[str, Tensor], memory: _Memory) -> None:
    """Refuse parameters that share memory: an update of one would change the other."""
    for name, param in params.items():
        for other in memory.over(param):
            if other != name:
                raise ArchitectureError(
                    f"{other} and {name} are different parameters over the same storage; tie them "
                    "by assigning the same nn.Parameter to both, or clone one"
                )


def _refuse_shared_buffers(buffers: Mapping[str, Tensor], memory: _Memory) -> None:
    """Refuse buffers over a parameter's memory: they would keep the old values."""
    for name, buffer in buffers.items():
        for other in memory.over(buffer):
            raise ArchitectureError(
                f"{name} is a buffer over the memory of the parameter {other}, and would keep "
                "the old values when that is trained; use the parameter itself in the forward, "
                "or register a clone of it"
            )


def _tell_of_parted(buffers: Mapping[str, Tensor], lasting: Mapping[str, Tensor]) -> None:
    """Warn of buffers that share memory: in a state each is a tensor of its own."""
    memory = _Memory(buffers)
    for name, buffer in lasting.items():
        other = next((each for each in memory.over(buffer) if each != name), None)
        if other is not None and (other not in lasting or name < other):
            warnings.warn(
                f"{name} and {other} are buffers over the same memory, which a state holds apart: "
                "what the forward writes to the one would not be in the other; register one of "
                "them, or the same tensor as both, or a clone where neither is written to",
                FunctrainWarning,
                stacklevel=5,
            )


def _lasting(module: nn.Module, buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The persistent buffers, which a checkpoint has; a module computes the others for itself."""
    passing = {
        id(each._buffers[key])
        for each in module.modules()
        for key in each._non_persistent_buffers_set
    }
    return {name: buffer for name, buffer in buffers.items() if id(buffer) not in passing}


def _tell_of_kept(
    module: nn.Module, params: Mapping[str, Tensor], lasting: Mapping[str, Tensor]
) -> None:
    """Warn of attributes through which a forward would find old values, beside the slots.

    It looks for trainable params and persistent buffers: what a module computes for itself (RoPE's
    frequencies) mostly stays as it is.
    """
    trained = {name: param for name, param in params.items() if param.requires_grad}
    memory, told = _Memory({**trained, **lasting}), set()
    for where, tensor in beside_slots(module):
        held = next(memory.over(tensor), None)
        if held is None or where in told:
            continue
        told.add(where)
        what, becomes = ("buffer", "written to") if held in lasting else ("parameter", "trained")
        warnings.warn(
            f"{where} holds the {what} {held} beside its slot: a forward that reads it there "
            f"would see the old values when that is {becomes}; take the {what} itself in the "
            "forward, or delete the attribute before functrain.split",
            FunctrainWarning,
            stacklevel=5,
        )


def _tell_of_extra(module: nn.Module) -> None:
    """Warn of `get_extra_state`: what it adds to a `state_dict` is in no state of ours."""
    found = [
        name or type(each).__name__
        for name, each in module.named_modules()
        if type(each).get_extra_state is not nn.Module.get_extra_state
    ]
    if found:
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        warnings.warn(
            f"{found[0]}{more}: with a get_extra_state, which neither a state nor its checkpoints "
            "hold; register what the forward needs of it as a buffer",
            FunctrainWarning,
            stacklevel=5,
        )


class _Memory:
    """Where named tensors lie in memory, to find those that overlap another tensor."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = {name: each for name, each in tensors.items() if _lies_somewhere(each)}
        self._names = list(self._tensors)
        places = [_place(each) for each in self._tensors.values()]
        self._spaces, self._begins, self._ends = np.array(places, dtype=np.int64).reshape(-1, 3).T

    def over(self, tensor: Tensor) -> Iterator[str]:
        """The names of the tensors that share at least one byte with this one."""
        if not _lies_somewhere(tensor):
            return
        space, begin, end = _place(tensor)
        beside = (self._spaces == space) & (self._begins < end) & (begin < self._ends)
        for at in np.flatnonzero(beside):
            name = self._names[at]
            if _overlap(tensor, self._tensors[name]):
                yield name


def _lies_somewhere(tensor: Tensor) -> bool:
    """Whether a tensor has elements, at strides in one storage."""
    plain = tensor.layout is torch.strided and not tensor.is_nested
    return plain and not is_traceable_wrapper_subclass(tensor) and tensor.numel() > 0


def _place(tensor: Tensor) -> tuple[int, int, int]:
    """The address space of a tensor, and the addresses of its first byte and after its last.

    A storage without memory (`functrain.deferred`) is an address space of its own.
    """
    storage = tensor.untyped_storage()
    base = storage.data_ptr()
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    begin = int(tensor.storage_offset())
    end = begin + sum((size - 1) * stride for size, stride in steps) + 1
    space = 0 if base else storage._cdata
    return space, base + begin * tensor.itemsize, base + end * tensor.itemsize


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors whose ranges overlap share a byte; columns of a matrix do not."""
    if one.is_contiguous() and other.is_contiguous():
        return True
    (_, first, last), (_, begin, end) = _place(one), _place(other)
    low = min(first, begin)
    seen = torch.zeros(max(last, end) - low, dtype=torch.bool, device="cpu")

    def bytes_of(tensor: Tensor, at: int) -> Tensor:
        steps = [(n, s) for n, s in zip(tensor.shape, tensor.stride(), strict=True) if s]
        shape = [*(size for size, _ in steps), tensor.itemsize]
        strides = [*(stride * tensor.itemsize for _, stride in steps), 1]
        return seen.as_strided(shape, strides, at - low)

    bytes_of(one, first).fill_(True)
    return bool(bytes_of(other, begin).any())
