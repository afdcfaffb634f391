"""The placeholder for a parameter while it is not gathered."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from functrain.errors import ArchitectureError

_getters: Any = Tensor
_NAMES = (
    "_version", "device", "dtype", "grad", "grad_fn", "is_cpu", "is_cuda", "is_leaf", "is_meta",
    "is_mkldnn", "is_mps", "is_nested", "is_quantized", "is_sparse", "is_xpu", "itemsize",
    "layout", "nbytes", "ndim", "requires_grad", "shape",
)  # fmt: skip
_OF_FORM = frozenset(
    {
        *(getattr(_getters, name).__get__ for name in _NAMES),
        *(getattr(_getters, name) for name in ("dim", "element_size", "nelement", "numel", "size")),
        *(getattr(_getters, name) for name in ("is_complex", "is_contiguous", "is_floating_point")),
        *(getattr(_getters, name) for name in ("__len__", "is_inference", "is_signed", "stride")),
        *(getattr(_getters, name) for name in ("new_empty", "new_full", "new_ones", "new_tensor")),
        *(_getters.new_zeros, torch.is_complex, torch.is_floating_point, torch.numel),
        *(torch.empty_like, torch.full_like, torch.ones_like, torch.zeros_like),
        *(torch.rand_like, torch.randn_like),
    }
)
"""Functions that read a tensor's form only (shape, dtype, device, …), never its values."""
_LIKE_ANOTHER = frozenset({_getters.to, _getters.type_as, _getters.expand_as, _getters.view_as})
"""Functions that read the values of their first argument, and only the form of the second."""


class Absent(Tensor):
    """A parameter's form without its values: reading them raises `ArchitectureError`."""

    parameter: str

    @classmethod
    def like(cls, name: str, tensor: Tensor, shape: torch.Size) -> Absent:
        """A placeholder for a parameter of this name and shape, of which `tensor` is some rows."""
        # NaN, since C++ code can read values without passing through `__torch_function__`.
        wrong = torch.nan if tensor.is_floating_point() or tensor.is_complex() else 0
        filled = torch.full((), wrong, dtype=tensor.dtype, device=tensor.device)
        found: Absent = filled.expand(shape).as_subclass(cls)
        found.parameter = name
        return found

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run functions that read only the form, and refuse the others."""
        del types
        plain = func in _LIKE_ANOTHER and not isinstance(args[0], cls)
        if not plain and func not in _OF_FORM:
            given = tree_leaves((args, kwargs))
            raise _read(next(each for each in given if isinstance(each, cls)).parameter)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def _read(name: str) -> ArchitectureError:
    return ArchitectureError(
        f"{name}: is read outside of its block, and is whole within a call of that alone "
        "(sharded=True; a block is a member of the outermost list of modules); read it in the "
        "block's forward, move it out of the list, or train with sharded=False"
    )
