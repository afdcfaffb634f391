"""Selective recomputation: results of products and attention are kept, and the rest made again.

Matrix products and fused attention take most of a block's time, and what lies between them much of
its memory: of the Llama of `benchmarks/steps.py` 35 of 90 MB. So their results are kept for the
second forward that activation checkpointing runs in the backward pass, which is given them in the
place of computing them. (Korthikanti et al., 2205.05198, choose by arithmetic and bytes too, and
recompute attention alone.)

A product much wider than what it sums over is made again, since it takes much memory for little
arithmetic: the scores of a long sequence, the update of an adapter. So are attention that draws
dropout, and what has been written into since.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from functrain.errors import ArchitectureError

_WIDE = 8
"""A product of more columns than this many times what it sums over is not worth its memory."""


def contexts(module: nn.Module) -> Callable[[], tuple[Any, Any]]:
    """A function that makes the contexts of a selective forward and of its recomputation."""
    # A compiler takes torch's own alone. Those refuse an operator that was not called the first
    # time, such as the cast of a weight that autocast had in its cache.
    if torch.compiler.is_compiling():
        return functools.partial(create_selective_checkpoint_contexts, _policy)

    def made() -> tuple[Any, Any]:
        results: list[Result] = []
        return _Keeping(results), _Giving(results, module)

    return made


def _policy(_context: object, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    if is_kept(operator, args, kwargs):
        return CheckpointPolicy.PREFER_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def is_kept(operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether an operator's result is kept for the second forward."""
    if operator in _PRODUCTS:
        summed, columns = args[_PRODUCTS[operator]].shape[-2:]
        return bool(columns <= _WIDE * summed)
    if operator not in _ATTENTION:
        return False
    # An attention that draws is recomputed, or whatever draws next would draw other numbers.
    place = _ATTENTION[operator]
    return bool((args[place] if place < len(args) else kwargs.get("dropout_p", 0.0)) == 0.0)


def _products() -> dict[Any, int]:
    """The operators of products, and the place of the right factor among their arguments."""
    aten = torch.ops.aten
    plain, added = (aten.mm, aten.bmm, aten._grouped_mm), (aten.addmm, aten.baddbmm)
    return {each.default: 1 for each in plain} | {each.default: 2 for each in added}


def _attention() -> dict[Any, int]:
    """The operators of fused attention, and the place of `dropout_p` among their arguments."""
    aten = torch.ops.aten
    found = (
        aten._scaled_dot_product_flash_attention_for_cpu,
        aten._scaled_dot_product_flash_attention,
        aten._scaled_dot_product_efficient_attention,
        aten._scaled_dot_product_cudnn_attention,
        aten._scaled_dot_product_fused_attention_overrideable,
        aten._flash_attention_forward,
        aten._efficient_attention_forward,
        aten._cudnn_attention_forward,
    )
    names = {op.default: [each.name for each in op.default._schema.arguments] for op in found}
    return {operator: each.index("dropout_p") for operator, each in names.items()}


_PRODUCTS, _ATTENTION = _products(), _attention()


@attrs.frozen(eq=False)
class Result:
    """What a kept operator returned, without autograd's graph.

    `watched`: tensors in its memory, and their versions when they were made. Some have versions of
    their own: autograd takes what `aten._unsafe_view` returns, as `x @ w` does, for no view.
    """

    operator: Any
    returned: Any
    watched: list[tuple[Tensor, int]] = attrs.field(factory=list)

    @classmethod
    def of(cls, operator: Any, returned: Any) -> Result:
        apart = [_apart(each) for each in _parts(returned)]
        made = cls(operator, tuple(apart) if isinstance(returned, tuple) else apart[0])
        for each in _tensors(apart):
            made.watch(each)
        return made

    def watch(self, tensor: Tensor) -> None:
        self.watched.append((tensor, tensor._version))

    def is_intact(self) -> bool:
        """Whether nobody has written into it."""
        return all(tensor._version == version for tensor, version in self.watched)


def _parts(returned: Any) -> Sequence[Any]:
    several = isinstance(returned, Sequence) and not isinstance(returned, str)
    return returned if several else (returned,)


def _tensors(parts: Sequence[Any]) -> list[Tensor]:
    return [each for each in parts if isinstance(each, Tensor)]


def _apart(value: Any) -> Any:
    """A tensor without the graph, which would refer to itself; it shares the version."""
    if not isinstance(value, Tensor):
        return value
    # Below autograd a detached tensor counts writes by itself, unless this key takes part.
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
        return value.detach()


class _Mode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A dispatch mode in which functions that are compiled stay so, as in torch's own two."""

    supports_higher_order_operators = True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __init__(self, results: list[Result]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.results = results


class _Keeping(_Mode):  # type: ignore[no-untyped-call]
    """Keeps results of a first forward in `results`."""

    def __init__(self, results: list[Result]) -> None:
        super().__init__(results)
        self.owners: dict[int, Result] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        returned = func(*args, **(kwargs or {}))
        for each in _tensors(_parts(returned)):
            owner = self.owners.get(each.untyped_storage()._cdata)
            if owner is not None:
                owner.watch(_apart(each))
        if is_kept(func, args, kwargs or {}):
            result = Result.of(func, returned)
            self.results.append(result)
            owned = [each.untyped_storage()._cdata for each, _ in result.watched]
            self.owners.update(dict.fromkeys(owned, result))
        return returned


class _Giving(_Mode):  # type: ignore[no-untyped-call]
    """Gives `results` to a second forward in the place of computing them.

    What has been written into is computed again, as the second forward will write into it again.
    """

    def __init__(self, results: list[Result], module: nn.Module) -> None:
        super().__init__(results)
        self.module = module

    def __enter__(self) -> _Giving:
        self.given = iter(self.results)  # anew for each backward pass
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        if not is_kept(func, args, kwargs or {}):
            return func(*args, **(kwargs or {}))
        result = next(self.given, None)
        if result is None or result.operator is not func:
            raise ArchitectureError(
                f"recompute: the second forward of a {type(self.module).__name__} calls other "
                f"products than its first ({func}); name modules whose forward depends on their "
                "inputs alone, or leave checkpoint out"
            )
        return result.returned if result.is_intact() else func(*args, **(kwargs or {}))
