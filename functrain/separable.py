"""Whether a module's parameters can be taken out of it: nothing else may be over their memory.

A step's params are other tensors than those of the module that was split. Whatever else of the
module holds the old ones, or was told of their gradients, would go on with values that nobody
trains.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from functrain.errors import ArchitectureError, FunctrainWarning
from functrain.trees import has_hooks


def check_separable(
    module: nn.Module, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor]
) -> None:
    """Raise `ArchitectureError` where these tensors of a module cannot be taken out of it.

    That are hooks on a parameter's gradient, different parameters over one storage, and buffers
    over a parameter's memory. What an attribute holds of a parameter is a `FunctrainWarning`, for
    the caller of `functrain.split`.
    """
    _refuse_hooks(params)
    _refuse_shared(params)
    _refuse_shared_buffers(params, buffers)
    _tell_of_kept(module, params)


def _refuse_hooks(params: Mapping[str, Tensor]) -> None:
    """A step takes gradients of values of its own, of which such a hook would not hear."""
    for name, param in params.items():
        if has_hooks(param):
            raise ArchitectureError(
                f"{name}: it has a hook on its gradient, which no step would call; remove it "
                "before functrain.split, and give the step the same as "
                "transform=lambda grads, params: …"
            )


def _refuse_shared(params: Mapping[str, Tensor]) -> None:
    seen: dict[tuple[int, int], str] = {}
    for name, tensor in params.items():
        if not tensor.numel():
            continue
        where = (tensor.data_ptr(), _storage(tensor))
        other = seen.setdefault(where, name)
        if other != name:
            raise ArchitectureError(
                f"{name} and {other} are different parameters over the same storage; tie them by "
                "assigning the same nn.Parameter to both, or clone one"
            )


def _refuse_shared_buffers(params: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> None:
    """A step's params are other tensors, beside which such a buffer would keep the old values."""
    beside = _by_storage(params) if buffers else {}
    for name, buffer in buffers.items():
        for other in _over(buffer, params, beside):
            raise ArchitectureError(
                f"{name} is a buffer over the memory of the parameter {other}, and would keep "
                "the old values when that is trained; use the parameter itself in the forward, "
                "or register a clone of it"
            )


def _tell_of_kept(module: nn.Module, params: Mapping[str, Tensor]) -> None:
    """A forward that reads a parameter elsewhere than in its slot would read the old values."""
    beside = _by_storage(params)
    for path, each in module.named_modules():
        if isinstance(each, nn.RNNBase):  # its own list is made anew of what is in the slots
            continue
        for key, value in vars(each).items():
            # Before each forward torch.nn.utils.spectral_norm makes its weight anew.
            if key in ("_parameters", "_buffers", "_modules") or f"{key}_orig" in each._parameters:
                continue
            held = [n for tensor in _tensors_in(value) for n in _over(tensor, params, beside)]
            if held:
                where = f"{path}.{key}" if path else key
                warnings.warn(
                    f"{where} holds the parameter {held[0]} beside its slot: a forward that reads "
                    "it there would see the old values when that is trained; take the parameter "
                    "itself in the forward, or delete the attribute before functrain.split",
                    FunctrainWarning,
                    stacklevel=5,
                )


def _by_storage(params: Mapping[str, Tensor]) -> dict[int, list[str]]:
    """The names of the parameters in each storage."""
    found: dict[int, list[str]] = {}
    for name, param in params.items():
        if param.numel():
            found.setdefault(_storage(param), []).append(name)
    return found


def _over(
    tensor: Tensor, params: Mapping[str, Tensor], beside: Mapping[int, list[str]]
) -> Iterator[str]:
    """The parameters over whose memory a tensor lies."""
    if not tensor.numel() or not _has_storage(tensor):
        return
    begin, end = _extent(tensor)
    for name in beside.get(_storage(tensor), ()):
        first, last = _extent(params[name])
        if begin < last and first < end:
            yield name


def _tensors_in(value: object, depth: int = 3) -> Iterator[Tensor]:
    """The tensors in an attribute, and in what is within it."""
    if isinstance(value, Tensor):
        yield value
    if not depth:
        return
    within: Iterable[object] = ()
    if isinstance(value, functools.partial):
        within = (*value.args, *value.keywords.values())
    elif isinstance(value, Mapping):
        within = value.values()
    elif isinstance(value, (list, tuple, set)):
        within = value
    for each in within:
        yield from _tensors_in(each, depth - 1)


def _has_storage(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not is_traceable_wrapper_subclass(tensor)


def _storage(tensor: Tensor) -> int:
    storage = tensor.untyped_storage()
    # Without memory (`functrain.deferred`) it is told by the storage itself.
    return storage.data_ptr() or storage._cdata


def _extent(tensor: Tensor) -> tuple[int, int]:
    """The bytes of its storage from the first of a tensor to behind its last."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    begin = int(tensor.storage_offset())
    end = begin + sum((size - 1) * stride for size, stride in steps) + 1
    return begin * tensor.itemsize, end * tensor.itemsize
