"""Mappings from names to tensors: ordered, immutable, cloned, measured and fingerprinted."""

from __future__ import annotations

import fnmatch
import hashlib
import operator
from collections.abc import (
    Callable,
    Collection,
    ItemsView,
    Iterable,
    Iterator,
    KeysView,
    Mapping,
    Sequence,
    ValuesView,
)
from typing import Any, NoReturn

import torch
from torch import Tensor

from functrain.errors import ConsumedStateError, StateError, did_you_mean


class Tensors(dict[str, Tensor]):
    """An immutable mapping from names to tensors, sorted by name.

    Sorted once, here at the door, because the order reaches the bits of every sum over the leaves.
    A `dict`, so that `load_state_dict` takes it as it is (`torch.func.functional_call` writes into
    what it is given: hand it `dict(params)`); its mutating methods raise `TypeError`. When a
    donated step has reused the memory, every access raises `ConsumedStateError`.

    It knows which of the tensors no other mapping of functrain's holds (`own`): a donated step
    writes into the memory of those alone, and into copies of the others.
    """

    __slots__ = ("_consumed_by", "_own")

    def __init__(
        self, items: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]] = (), /, **named: Tensor
    ) -> None:
        self._consumed_by: str | None = None
        self._own: frozenset[str] = frozenset()
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
    """`function` of every tensor, under the same names."""
    return Tensors({name: function(tensor) for name, tensor in items.items()})


def clone(items: Mapping[str, Tensor]) -> Tensors:
    """The same values in memory of their own."""
    return owning(map_leaves(lambda tensor: tensor.detach().clone(), items))


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
    matched: list[str] = []
    for pattern in patterns:
        names = [name for name in items if fnmatch.fnmatchcase(name, pattern)]
        if not names:
            raise StateError(f"no tensor matches {pattern!r}; {did_you_mean(pattern, items)}")
        matched += names
    return matched


def global_norm(items: Mapping[str, Tensor]) -> Tensor:
    """The Euclidean norm over all leaves: a 0-d float64 tensor, without host synchronisation.

    Accumulated in float64: an fp32 sum of squares overflows long before a gradient does. Row by
    row, and then over the rows in order: leaves that are sharded by rows have the same norm, to the
    bit.
    """
    norms = row_norms([whole(leaf) for leaf in items.values()])
    if not norms:
        return torch.zeros((), dtype=torch.float64)
    norm: Tensor = torch.linalg.vector_norm(torch.cat(norms))
    return norm


_PIECE = 1 << 16
"""So many numbers are copied to float64 at a time: what stays in a core's cache."""

_SMALL = 1 << 14
"""Of no more numbers a tensor is laid beside others: calling a kernel would take longer."""


def row_norms(leaves: Sequence[Tensor]) -> list[Tensor]:
    """The Euclidean norms of the rows of each tensor, float64 [rows]; of a vector, magnitudes.

    Small tensors whose rows are of one length are taken together: a model has hundreds of them, and
    calling the kernels for each takes longer than the kernels do.
    """
    found: dict[int, Tensor] = {}
    alike: dict[tuple[int, torch.dtype, torch.device], list[tuple[int, int, Tensor]]] = {}
    for at, leaf in enumerate(leaves):
        rows = _rows(leaf)
        count, *width = rows.shape
        if count * (width[0] if width else 1) > _SMALL:
            found[at] = _row_norms(rows)
        else:
            kind = width[0] if width else -1, rows.dtype, rows.device
            alike.setdefault(kind, []).append((at, count, rows))
    for several in alike.values():
        places, counts, parts = zip(*several, strict=True)
        norms = _row_norms(torch.cat(parts))
        found |= zip(places, torch.split_with_sizes(norms, counts), strict=True)
    return [found[at] for at in range(len(leaves))]


def _rows(leaf: Tensor) -> Tensor:
    """A tensor as a matrix of its rows; of fewer dimensions, as a vector."""
    leaf = torch.view_as_real(leaf) if leaf.is_complex() else leaf
    dims = leaf.ndim
    if dims > 2:
        return leaf.flatten(1)
    return leaf if dims else leaf.reshape(1)


def _row_norms(rows: Tensor) -> Tensor:
    if rows.ndim < 2:
        return rows.to(torch.float64).abs()
    if rows.device.type != "cpu":
        return _norms(rows)
    # In pieces: the CPU's kernel makes a copy of its argument in float64.
    count = max(2, _PIECE // max(1, rows.shape[1]))
    if len(rows) <= count:
        return _norms(rows)
    return torch.cat([_norms(piece) for piece in torch.split(rows, count)])


def _norms(rows: Tensor) -> Tensor:
    if len(rows) == 1:
        # A single row would be shared out to the threads, and summed in another order.
        return _norms(rows.expand(2, -1))[:1]
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    return norms


def versions(params: Mapping[str, Tensor]) -> list[int]:
    """What changes where any of them is written to; those made in inference mode do not tell."""
    try:
        return [param._version for param in params.values()]
    except RuntimeError:
        return [0 if param.is_inference() else param._version for param in params.values()]


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


def digest(tensor: Tensor) -> str:
    """sha256 over dtype, shape and the very bytes, in hexadecimal; of shards, of the whole."""
    tensor = whole(tensor)
    hasher = hashlib.sha256(_kind(tensor).encode())
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    hasher.update(flat.view(torch.uint8).numpy().data)
    return hasher.hexdigest()


def storages(items: Mapping[str, Tensor]) -> dict[int, str]:
    """The address of each leaf's storage, with the leaf's name."""
    return {rows_here(t).untyped_storage().data_ptr(): name for name, t in items.items()}
