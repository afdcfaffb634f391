"""Mappings from names to tensors: ordering, immutability, cloning, norms and hashes."""

from __future__ import annotations

import fnmatch
import hashlib
import operator
from collections import Counter
from collections.abc import (
    Callable,
    Collection,
    ItemsView,
    Iterable,
    Iterator,
    KeysView,
    Mapping,
    ValuesView,
)
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from functrain.checks import check_tensors
from functrain.errors import ConsumedStateError, StateError, did_you_mean
from functrain.norms import all_row_norms


class Tensors(dict[str, Tensor]):
    """An immutable mapping from names to tensors, sorted by name.

    It is sorted at construction, because the order determines the bits of every sum over the
    leaves. It is a `dict`, so `load_state_dict` takes it as it is (`torch.func.functional_call`
    writes into what it is given: hand it `dict(params)`); its mutating methods raise `TypeError`.
    Once a donated step has reused the memory, every access raises `ConsumedStateError`.

    It knows which of its tensors no other mapping of functrain's holds (`own`): a donated step
    writes into the memory of those only, and copies the others. Gradients know which params they
    are like (`are_like`), so that an optimizer need not check hundreds of tensors again.
    """

    __slots__ = ("_consumed_by", "_like", "_own")

    def __init__(
        self, items: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]] = (), /, **named: Tensor
    ) -> None:
        self._consumed_by: str | None = None
        self._own: frozenset[str] = frozenset()
        self._like: Mapping[str, Tensor] | None = None
        if isinstance(items, Tensors):
            items._own = frozenset()
            if not named:
                super().__init__(items.items())  # sorted already
                return
        given = dict(items, **named)
        names = sorted(given)
        # A mapping already in order is copied as it is, in a fraction of the time.
        in_order = all(map(operator.eq, names, given))
        super().__init__(given if in_order else {name: given[name] for name in names})

    @property
    def own(self) -> frozenset[str]:
        """The names whose memory this mapping alone holds."""
        return self._own

    def consume(self, by: str) -> None:
        """Drop the tensors: from now on each access raises an error that names `by`."""
        self._consumed_by = by
        super().clear()

    def _alive(self) -> None:
        if self._consumed_by is not None:
            raise ConsumedStateError(
                f"these tensors were donated to {self._consumed_by}, which reused their memory; "
                "use the state that step returned, or call the step with donate=False"
            )

    def __missing__(self, name: str) -> NoReturn:
        self._alive()
        raise KeyError(name)

    # Overriding __iter__ makes `dict(t)` and `{**t}` take this path too.
    def __iter__(self) -> Iterator[str]:
        self._alive()
        return super().__iter__()

    def __len__(self) -> int:
        self._alive()
        return super().__len__()

    def __contains__(self, name: object) -> bool:
        self._alive()
        return super().__contains__(name)

    def keys(self) -> KeysView[str]:  # type: ignore[override]
        """The names, sorted."""
        self._alive()
        return super().keys()

    def values(self) -> ValuesView[Tensor]:  # type: ignore[override]
        """The tensors, in the order of their names."""
        self._alive()
        return super().values()

    def items(self) -> ItemsView[str, Tensor]:  # type: ignore[override]
        """The pairs, in the order of their names."""
        self._alive()
        return super().items()

    def get(self, name: str, default: Any = None) -> Any:
        """The tensor of that name, or `default`."""
        self._alive()
        return super().get(name, default)

    def __reversed__(self) -> Iterator[str]:
        self._alive()
        return super().__reversed__()

    def __eq__(self, other: object) -> bool:
        self._alive()
        return super().__eq__(other)

    __hash__ = None

    def __or__(self, other: Mapping[str, Any]) -> dict[str, Any]:  # type: ignore[override]
        """A plain `dict` of both; on a shared name `other` wins."""
        return {**self, **other}

    def copy(self) -> Tensors:
        """A mapping of the same tensors, which lives on when this one is consumed."""
        return Tensors(self)

    __copy__ = copy

    def __repr__(self) -> str:
        if self._consumed_by is not None:
            return f"Tensors(consumed by {self._consumed_by})"
        leaves = (f"{n}: {dtype_and_shape(t)}" for n, t in self.items())
        return f"Tensors({', '.join(leaves)})"

    def __reduce__(self) -> tuple[Any, ...]:
        return (Tensors, (dict(self.items()),))

    def _immutable(self, *_args: object, **_kwargs: object) -> NoReturn:
        raise TypeError(
            "Tensors is immutable; make a new one: Tensors({**old, name: tensor}), "
            "and a new state with attrs.evolve(state, params=...)"
        )

    __setitem__ = _immutable
    __delitem__ = _immutable
    __ior__ = _immutable
    clear = _immutable
    pop = _immutable
    popitem = _immutable
    setdefault = _immutable
    update = _immutable


def dtype_and_shape(tensor: Tensor) -> str:
    """A tensor's dtype and shape: `float32[2, 3]`."""
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def described(tensor: Tensor) -> str:
    """A tensor's dtype, shape and device, for a message."""
    return f"{dtype_and_shape(tensor)} on {tensor.device}"


def tensors(items: Mapping[str, Tensor]) -> Tensors:
    """`items` itself if it is `Tensors` already, else a sorted immutable copy of the mapping."""
    return items if isinstance(items, Tensors) else Tensors(items)


def map_leaves(function: Callable[[Tensor], Tensor], items: Mapping[str, Tensor]) -> Tensors:
    """Apply `function` to every tensor, under the same names.

    `function` may return the tensor itself, or a view of it.
    """
    mapped = {name: function(tensor) for name, tensor in items.items()}
    if isinstance(items, Tensors) and items.own:
        owning(items, [name for name in items.own if not _share(items[name], mapped[name])])
    return Tensors(mapped)


def _share(one: Tensor, other: Tensor) -> bool:
    """Whether a write into one may be seen in the other."""
    one, other = rows_here(one), rows_here(other)
    if is_traceable_wrapper_subclass(one) or is_traceable_wrapper_subclass(other):
        return True
    return _address(one) == _address(other)


def clone(items: Mapping[str, Tensor]) -> Tensors:
    """Copy the tensors into memory of their own."""
    with torch.inference_mode(False):  # inference tensors cannot be trained
        return owning(Tensors({name: t.detach().clone() for name, t in items.items()}))


def owning(items: Tensors, names: Iterable[str] | None = None) -> Tensors:
    """`items` itself, now marked as the sole holder of the memory of `names` (by default all)."""
    items._own = frozenset(items if names is None else names)
    return items


def writable(items: Tensors, names: Collection[str] | None = None) -> Tensors:
    """`items` with copies of those of `names` (by default all) that it does not own."""
    wanted, kept = items if names is None else names, items.own
    if kept.issuperset(wanted):
        return items
    shared = frozenset(wanted) - kept
    copied = Tensors({n: t.detach().clone() if n in shared else t for n, t in items.items()})
    return owning(copied, kept | shared)


def succeeding(new: Mapping[str, Tensor], old: Tensors) -> Tensors:
    """`new` as the successor of `old`: neither owns the tensors that both hold any more."""
    items = old.copy() if new is old else tensors(new)
    both = {name for name, tensor in items.items() if tensor is old.get(name)}
    if both:
        owning(old, old.own - both)
    return owning(items, items.keys() - both)


def disown_shared(*several: Tensors) -> None:
    """Mark tensors that share storage, within or across these mappings, as owned by none."""
    at = [{name: _address(tensor) for name, tensor in items.items()} for items in several]
    times = Counter(address for addresses in at for address in addresses.values())
    for items, addresses in zip(several, at, strict=True):
        shared = {name for name, address in addresses.items() if address and times[address] > 1}
        if shared:
            owning(items, items.own - shared)


def alike(items: Tensors, params: Mapping[str, Tensor]) -> Tensors:
    """`items` itself, marked as dense tensors of the params' shapes, dtypes and devices."""
    items._like = params
    return items


def are_like(items: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> bool:
    """Whether `items` is marked as `alike` these very params."""
    return isinstance(items, Tensors) and items._like is params


def select(items: Mapping[str, Tensor], *patterns: str) -> Tensors:
    """The tensors whose names match a shell pattern; `StateError` if a pattern matches nothing."""
    return _sharing(items, {name: items[name] for name in _matching(items, patterns)})


def zero(items: Mapping[str, Tensor], *patterns: str) -> Tensors:
    """The same mapping with the matching tensors replaced by zeros (a LoRA reference, say)."""
    zeroed = set(_matching(items, patterns))
    zeros = {n: torch.zeros_like(t) if n in zeroed else t for n, t in items.items()}
    return _sharing(items, zeros)


def _sharing(items: Mapping[str, Tensor], some: Mapping[str, Tensor]) -> Tensors:
    """`some` as `Tensors` that share tensors with `items`, which no longer owns any."""
    if isinstance(items, Tensors):
        owning(items, ())
    return Tensors(some)


def _matching(items: Mapping[str, Tensor], patterns: Iterable[str]) -> list[str]:
    check_tensors("items", items)
    matched: list[str] = []
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise StateError(
                f"pattern: {pattern!r}, expected a text, and several as select(items, *patterns)"
            )
        names = [name for name in items if fnmatch.fnmatchcase(name, pattern)]
        if not names:
            raise StateError(f"no tensor matches {pattern!r}; {did_you_mean(pattern, items)}")
        matched += names
    return matched


def global_norm(items: Mapping[str, Tensor]) -> Tensor:
    """The Euclidean norm over all leaves: a 0-d float64 tensor, without host synchronisation.

    It is accumulated in float64, since an fp32 sum of squares overflows long before a gradient
    does; first over each row, then over the rows in order, so leaves sharded by rows have the same
    norm to the bit. For those every worker must call this, since the rows are gathered.
    """
    leaves = [whole(leaf) for leaf in items.values()]
    if not leaves:
        return torch.zeros((), dtype=torch.float64, device="cpu")
    norm: Tensor = torch.linalg.vector_norm(all_row_norms(leaves))
    return norm


def versions(params: Mapping[str, Tensor]) -> list[int]:
    """The tensors' version counters; 0 for inference tensors.

    They change on writes, except on those through `.data`, which go unseen.
    """
    try:
        return [param._version for param in params.values()]
    except RuntimeError:
        return [0 if param.is_inference() else param._version for param in params.values()]


def has_hooks(tensor: Tensor) -> bool:
    """Whether a hook is registered on a tensor's gradient."""
    return bool(tensor._backward_hooks or tensor._post_accumulate_grad_hooks)


def by_dtype(dtypes: Mapping[str, torch.dtype]) -> list[list[str]]:
    """The names grouped by dtype: a kernel or an exchange handles one dtype at a time."""
    kinds = sorted(set(dtypes.values()), key=str)
    return [[name for name in dtypes if dtypes[name] == kind] for kind in kinds]


def is_sharded(items: Mapping[str, Tensor]) -> bool:
    """Whether any tensor is a DTensor, without importing that class, which takes a second."""
    return any(hasattr(tensor, "full_tensor") for tensor in items.values())


def rows_here(tensor: Tensor) -> Tensor:
    """This worker's rows of a sharded tensor; any other tensor itself."""
    found: Tensor = getattr(tensor, "_local_tensor", tensor)
    return found


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered, for which every worker must call this; any other itself."""
    found: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return found


def laid_out(tensor: Tensor, like: Any) -> Tensor:
    """A whole tensor, the same on every worker, sharded as `like` is, if that is sharded."""
    if not hasattr(like, "full_tensor"):
        return tensor
    # Here, since DTensor takes a second to import.
    from torch.distributed.tensor import distribute_tensor

    # Without a source rank nothing is sent.
    found = distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
    return found.clone()  # the rows are a view, which would keep the whole tensor alive


def in_order(tensor: Tensor) -> Tensor:
    """A tensor laid out as when read from a file: itself, or a contiguous copy.

    A kernel may give other bits for a transposed matrix than for the same numbers in order, so a
    state would continue differently after it was saved and loaded.
    """
    if tensor.layout is not torch.strided or is_traceable_wrapper_subclass(tensor):
        return tensor
    return tensor.resolve_conj().resolve_neg().contiguous()


def ordered(items: Mapping[str, Tensor]) -> Tensors:
    """A copy of the mapping with each tensor `in_order`."""
    return Tensors({name: in_order(tensor) for name, tensor in Tensors(items).items()})


def digest(tensor: Tensor) -> str:
    """The sha256 over dtype, shape and bytes, hexadecimal; of a sharded tensor, over the whole."""
    tensor = whole(tensor)
    hasher = hashlib.sha256(dtype_and_shape(tensor).encode())
    hasher.update(data_of(tensor))
    return hasher.hexdigest()


def data_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, without a copy if it is on the CPU and in order."""
    # A lazy conjugation or negation is resolved, since it is not yet in the bytes.
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    if flat.numel() == 1:  # contiguous at any stride
        flat = torch.as_strided(flat, (1,), (1,))
    data: memoryview = flat.view(torch.uint8).numpy().data
    return data


def storages(items: Mapping[str, Tensor]) -> dict[int, str]:
    """The address of each leaf's storage, mapped to the leaf's name."""
    return {_address(tensor): name for name, tensor in items.items()}


def _address(tensor: Tensor) -> int:
    """The address of a tensor's storage; 0 if it has no elements."""
    return rows_here(tensor).untyped_storage().data_ptr()
