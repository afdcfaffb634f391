"""Mappings from names to tensors: ordered, immutable, cloned, measured and fingerprinted."""

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

    Sorted once, here at the door, because the order reaches the bits of every sum over the leaves.
    A `dict`, so that `load_state_dict` takes it as it is (`torch.func.functional_call` writes into
    what it is given: hand it `dict(params)`); its mutating methods raise `TypeError`. When a
    donated step has reused the memory, every access raises `ConsumedStateError`.

    It knows which of the tensors no other mapping of functrain's holds (`own`): a donated step
    writes into the memory of those alone, and into copies of the others. Gradients know
    which params they are `like`, so that an optimizer does not look at hundreds of them again.
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
        # One that is in order is copied as it is, in a fraction of the time.
        in_order = all(map(operator.eq, names, given))
        super().__init__(given if in_order else {name: given[name] for name in names})

    @property
    def own(self) -> frozenset[str]:
        """The names whose memory this mapping alone holds."""
        return self._own

    def consume(self, by: str) -> None:
        """Forget the tensors: from now on each access raises, naming `by`."""
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

    # Iteration is overridden so that `dict(t)` and `{**t}` come through here as well.
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
        """A plain `dict` of both; `other` wins where they meet."""
        return {**self, **other}

    def copy(self) -> Tensors:
        """A mapping of the same tensors, which lives on when this one is consumed."""
        return Tensors(self)

    __copy__ = copy

    def __repr__(self) -> str:
        if self._consumed_by is not None:
            return f"Tensors(consumed by {self._consumed_by})"
        leaves = (f"{n}: {_kind(t)}" for n, t in self.items())
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


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def tensors(items: Mapping[str, Tensor]) -> Tensors:
    """`items` itself where it is `Tensors` already, else a sorted immutable copy of the mapping."""
    return items if isinstance(items, Tensors) else Tensors(items)


def map_leaves(function: Callable[[Tensor], Tensor], items: Mapping[str, Tensor]) -> Tensors:
    """`function` of every tensor, under the same names.

    It may give the tensor itself, or a view of it.
    """
    mapped = {name: function(tensor) for name, tensor in items.items()}
    if isinstance(items, Tensors) and items.own:
        owning(items, [name for name in items.own if not _share(items[name], mapped[name])])
    return Tensors(mapped)


def _share(one: Tensor, other: Tensor) -> bool:
    """Whether a write into the memory of one may be seen in the other."""
    one, other = rows_here(one), rows_here(other)
    if is_traceable_wrapper_subclass(one) or is_traceable_wrapper_subclass(other):
        return True
    return _address(one) == _address(other)


def clone(items: Mapping[str, Tensor]) -> Tensors:
    """The same values in memory of their own."""
    with torch.inference_mode(False):  # what is made in it cannot be trained
        return owning(Tensors({name: t.detach().clone() for name, t in items.items()}))


def owning(items: Tensors, names: Iterable[str] | None = None) -> Tensors:
    """`items` itself, now known to hold the memory of these names (of all) alone."""
    items._own = frozenset(items if names is None else names)
    return items


def writable(items: Tensors, names: Collection[str] | None = None) -> Tensors:
    """`items` with copies of those of `names` (of all) whose memory others may hold too."""
    wanted = frozenset(items if names is None else names)
    shared = wanted - items.own
    if not shared:
        return items
    kept = items.own
    copied = Tensors({n: t.detach().clone() if n in shared else t for n, t in items.items()})
    return owning(copied, kept | shared)


def succeeding(new: Mapping[str, Tensor], old: Tensors) -> Tensors:
    """`new` as the successor of `old`: what both hold is from now on nobody's own."""
    items = old.copy() if new is old else tensors(new)
    both = {name for name, tensor in items.items() if tensor is old.get(name)}
    if both:
        owning(old, old.own - both)
    return owning(items, items.keys() - both)


def disown_shared(*several: Tensors) -> None:
    """What lies in memory that two entries of these mappings hold is from now on nobody's own."""
    at = [{name: _address(tensor) for name, tensor in items.items()} for items in several]
    times = Counter(address for addresses in at for address in addresses.values())
    for items, addresses in zip(several, at, strict=True):
        shared = {name for name, address in addresses.items() if address and times[address] > 1}
        if shared:
            owning(items, items.own - shared)


def alike(items: Tensors, params: Mapping[str, Tensor]) -> Tensors:
    """`items` itself, known to have dense tensors of the params' shapes, dtypes and devices."""
    items._like = params
    return items


def are_like(items: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> bool:
    """Whether that is known of `items`, and of these very params."""
    return isinstance(items, Tensors) and items._like is params


def select(items: Mapping[str, Tensor], *patterns: str) -> Tensors:
    """The tensors whose names match one of the shell patterns; a pattern without match raises."""
    return _sharing(items, {name: items[name] for name in _matching(items, patterns)})


def zero(items: Mapping[str, Tensor], *patterns: str) -> Tensors:
    """The same mapping with the matching tensors replaced by zeros (a LoRA reference, say)."""
    zeroed = set(_matching(items, patterns))
    zeros = {n: torch.zeros_like(t) if n in zeroed else t for n, t in items.items()}
    return _sharing(items, zeros)


def _sharing(items: Mapping[str, Tensor], some: Mapping[str, Tensor]) -> Tensors:
    """A mapping that holds tensors of `items` too."""
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

    Accumulated in float64: an fp32 sum of squares overflows long before a gradient does. Row by
    row, and then over the rows in order: leaves that are sharded by rows have the same norm, to the
    bit; all workers must ask for it, for their rows are gathered.
    """
    leaves = [whole(leaf) for leaf in items.values()]
    if not leaves:
        return torch.zeros((), dtype=torch.float64, device="cpu")
    norm: Tensor = torch.linalg.vector_norm(all_row_norms(leaves))
    return norm


def versions(params: Mapping[str, Tensor]) -> list[int]:
    """What changes where any of them is written to; those made in inference mode do not tell."""
    try:
        return [param._version for param in params.values()]
    except RuntimeError:
        return [0 if param.is_inference() else param._version for param in params.values()]


def has_hooks(tensor: Tensor) -> bool:
    """Whether somebody is to be told of a tensor's gradient."""
    return bool(tensor._backward_hooks or tensor._post_accumulate_grad_hooks)


def by_dtype(dtypes: Mapping[str, torch.dtype]) -> list[list[str]]:
    """The names of each dtype, in parts; a kernel or an exchange takes one of them at a time."""
    kinds = sorted(set(dtypes.values()), key=str)
    return [[name for name in dtypes if dtypes[name] == kind] for kind in kinds]


def is_sharded(items: Mapping[str, Tensor]) -> bool:
    """Whether any tensor is a DTensor; without importing that, which takes a second."""
    return any(hasattr(tensor, "full_tensor") for tensor in items.values())


def rows_here(tensor: Tensor) -> Tensor:
    """What this worker has of a tensor in shards; any other tensor itself."""
    found: Tensor = getattr(tensor, "_local_tensor", tensor)
    return found


def whole(tensor: Tensor) -> Tensor:
    """A tensor in shards as a whole one, for which every worker must ask; any other itself."""
    found: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return found


def laid_out(tensor: Tensor, like: Any) -> Tensor:
    """A whole tensor, the same on every worker, in shards where another one of its shape is."""
    if not hasattr(like, "full_tensor"):
        return tensor
    # Here, since DTensor takes a second to import.
    from torch.distributed.tensor import distribute_tensor

    # Without a rank whose values all take, nothing is sent.
    found = distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
    return found.clone()  # else these rows would hold the whole


def in_order(tensor: Tensor) -> Tensor:
    """A tensor laid out as it is read from a file: itself, or a copy where its strides are others.

    Of a transposed matrix a kernel may give other bits than of the same numbers in order, so that a
    state would go on otherwise than what was saved of it and loaded again.
    """
    if tensor.layout is not torch.strided or is_traceable_wrapper_subclass(tensor):
        return tensor
    return tensor.resolve_conj().resolve_neg().contiguous()


def ordered(items: Mapping[str, Tensor]) -> Tensors:
    """A copy of the mapping, in which each tensor is `in_order`."""
    return Tensors({name: in_order(tensor) for name, tensor in Tensors(items).items()})


def digest(tensor: Tensor) -> str:
    """sha256 over dtype, shape and the very bytes, in hexadecimal; of shards, of the whole."""
    tensor = whole(tensor)
    hasher = hashlib.sha256(_kind(tensor).encode())
    hasher.update(data_of(tensor))
    return hasher.hexdigest()


def data_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, without a copy where it is on the CPU and in order."""
    # A conjugate or a sign that is still to be taken has other bytes.
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    if flat.numel() == 1:  # contiguous at any stride
        flat = torch.as_strided(flat, (1,), (1,))
    data: memoryview = flat.view(torch.uint8).numpy().data
    return data


def storages(items: Mapping[str, Tensor]) -> dict[int, str]:
    """The address of each leaf's storage, with the leaf's name."""
    return {_address(tensor): name for name, tensor in items.items()}


def _address(tensor: Tensor) -> int:
    """Of a tensor's storage; 0 where it has no element."""
    return rows_here(tensor).untyped_storage().data_ptr()
