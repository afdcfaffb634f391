"""A step over sharded values: what is gathered, what is summed, and in which order."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from functrain.architecture import (
    Mode,
    Slots,
    bound,
    held_values,
    holds_shards,
    slots,
    substitution,
)
from functrain.distributed import exchange
from functrain.distributed.blocks import OTHER_ORDER, Blocks, Gathering, Sums
from functrain.distributed.shards import (
    local,
    local_state,
    padded,
    padding,
    shard,
    whole_state,
)
from functrain.distributed.units import Binding, Unit, Values, find_units
from functrain.distributed.world import World
from functrain.errors import ArchitectureError, BatchError, ConfigError
from functrain.metrics import Metrics
from functrain.norms import row_norms
from functrain.optimizers import OptimizerState
from functrain.reductions import Beside, Part, tree_sum
from functrain.state import TrainState, consume
from functrain.trees import Tensors, is_sharded, owning

Update = Callable[..., tuple[Tensors, OptimizerState]]


@attrs.frozen(kw_only=True, eq=False)
class Sharding:
    """How the workers of a world share an architecture's params: its `Workers` and its binding.

    `tree`: whether gradients are summed as one binary tree over the micro-batches. Micro-batch j of
    worker r is then its leaf j·W + r, so the lowest branches are sums over the W workers, one for
    each of a worker's micro-batches, and each worker keeps only its rows of them.

    `base`: this worker's rows of the frozen, sharded params that the architecture itself holds.
    `units` and `shapes` cover these as well as the trained state's params.
    """

    world: World
    places: Slots
    everywhere: Slots
    units: tuple[Unit, ...]
    shapes: Mapping[str, torch.Size]
    base: Mapping[str, Tensor]
    tree: bool
    # What was exchanged since the last binding, for comparison; it affects no computed value.
    _exchanged: list[str] = attrs.field(factory=list, init=False)
    _blocks: Blocks = attrs.field(init=False)

    @_blocks.default
    def _with(self) -> Blocks:
        return Blocks(world=self.world, shapes=self.shapes, tree=self.tree)

    @property
    def size(self) -> int:
        """The number of workers."""
        return self.world.size

    def local(self, params: Mapping[str, Tensor]) -> Tensors:
        """This worker's rows of params that are whole or in shards."""
        return local(shard(params, self.world))

    def whole_state(self, rows: TrainState) -> TrainState:
        """The sharded state that these rows belong to."""
        return whole_state(rows, self.shapes, self.world)

    @contextmanager
    def rows_of_state(self, state: TrainState) -> Generator[TrainState]:
        """This worker's rows of a state, whose ownership is carried back to the state at the end.

        If a step consumed the rows, by donation or by failing in the middle of its update, the
        state is consumed too. If a pure step shares tensors with its successor, the state no longer
        owns them.
        """
        rows = local_state(state)
        before = [state.params, *state.optimizer.slots.values()]
        after = [rows.params, *rows.optimizer.slots.values()]
        try:
            yield rows
        finally:
            if type(rows) is not TrainState:
                consume(state, None)
            else:
                for items, now in zip(before, after, strict=True):
                    owning(items, now.own)

    def placed(self, update: Update) -> Update:
        """An optimizer's update in which each element is vectorized as in the whole tensor.

        Where a worker's rows begin or end within a vector of the kernel, rows of zeros are added
        for the update; see `functrain.distributed.shards.padding`.
        """

        def placed(
            grads: Mapping[str, Tensor],
            state: OptimizerState,
            params: Mapping[str, Tensor],
            learning_rate: Tensor | float,
            *,
            applied: Tensor | None = None,
            donate: bool = False,
        ) -> tuple[Tensors, OptimizerState]:
            added = self._added(params)

            def wide(items: Mapping[str, Tensor]) -> Tensors:
                found = {n: padded(t, *added[n]) if _fits(n, t) else t for n, t in items.items()}
                return owning(Tensors(found), items.own if isinstance(items, Tensors) else ())

            def narrow(items: Tensors) -> Tensors:
                found = {n: _cut_out(t, *added[n]) if _wide(n, t) else t for n, t in items.items()}
                return owning(Tensors(found), items.own)

            def _fits(name: str, tensor: Tensor) -> bool:
                return name in added and tensor.shape == params[name].shape

            def _wide(name: str, tensor: Tensor) -> bool:
                return name in added and tensor.ndim > 0

            if not added:
                return update(grads, state, params, learning_rate, applied=applied, donate=donate)
            slots = {slot: wide(items) for slot, items in state.slots.items()}
            updated, found = update(
                wide(grads),
                attrs.evolve(state, slots=slots),
                wide(params),
                learning_rate,
                applied=applied,
                donate=donate,
            )
            slots = {slot: narrow(items) for slot, items in found.slots.items()}
            return narrow(updated), attrs.evolve(found, slots=slots)

        return placed

    def _added(self, params: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
        if not self.tree or self.world.device.type != "cpu":
            return {}
        found = {
            name: padding(self.shapes[name], tensor.dtype, self._blocks.rows(name))
            for name, tensor in params.items()
        }
        return {name: rows for name, rows in found.items() if any(rows)}

    def part(self, prepared: Callable[[], tuple[int, Tensor]], *, tree: bool) -> Part:
        """See `functrain.reductions.Workers`; every worker must have as many micro-batches."""
        found = self.world.part(prepared, tree=tree, even="sharded=True: its blocks are gathered")
        if not tree:
            return attrs.evolve(found, workers=self)
        return attrs.evolve(found, workers=self, first=self.world.rank, stride=self.size)

    def observations(self, observed: Sequence[Any]) -> list[Any]:
        """See `functrain.reductions.Workers`."""
        found = self.world.observations(observed)
        if not self.tree:
            return found
        own = len(observed)
        return [found[rank * own + turn] for turn in range(own) for rank in range(self.size)]

    def reduced(
        self,
        grads: dict[str, Tensor],
        reached: frozenset[str],
        measured: Sequence[Metrics],
        like: Mapping[str, Tensor],
        moved: Sequence[str],
        *,
        tree: bool,
        beside: Beside | None,
    ) -> tuple[dict[str, Tensor], Metrics]:
        """See `functrain.reductions.Workers`; here the gradients have been summed already."""
        assert beside is None
        names = sorted(like)
        forms = {exchange.form_of(each) for each in measured}
        form = exchange.hashed(b"\0".join(sorted(forms)))
        order = exchange.hashed("\0".join(self._exchanged).encode())
        told = [len(moved), form, *(int(name in reached) for name in names), order]
        rows = self.world.gathered(torch.tensor(told), "the exchange of counts")
        if len(set(rows[:, -1].tolist())) > 1:
            raise ArchitectureError(OTHER_ORDER)
        exchange.refuse_moved(rows[:, 0], moved)
        if len(forms) > 1 or len(set(rows[:, 1].tolist())) > 1:
            raise BatchError(exchange.OTHER_METRICS)
        anywhere = dict(zip(names, rows[:, 2:-1].any(0).tolist(), strict=True))
        kept = {name: grads[name] for name in names if anywhere[name]}
        every = self.world.gathered(
            torch.stack([exchange.values_of(each) for each in measured]), "the exchange of metrics"
        )
        leaves = every.transpose(0, 1) if tree else every
        values = tree_sum(list(leaves.flatten(0, 1)), lambda a, b: a + b)
        return kept, exchange.metrics_of(values, measured[0])

    def beside(self, like: Mapping[str, Tensor], *, tree: bool) -> None:
        """See `functrain.reductions.Workers`; None: a block's gradients are summed when it ends."""
        del like, tree

    def global_norm(self, items: Mapping[str, Tensor]) -> Tensor:
        """`functrain.trees.global_norm` of the whole tensors from these rows, with the same bits.

        Each worker sends the norms of its rows, eight bytes per row.
        """
        names = sorted(items)
        if not names:
            return torch.zeros((), dtype=torch.float64)
        most = {name: self._blocks.most_rows(name) for name in names}
        parts = []
        for name, norms in zip(names, row_norms([items[n] for n in names]), strict=True):
            parts.append(torch.nn.functional.pad(norms, (0, most[name] - len(norms))))
        every = self.world.gathered(torch.cat(parts), "the exchange of gradient norms")
        begin = 0
        found: list[Tensor] = []
        for name in names:
            whole = every[:, begin : begin + most[name]].flatten()
            found.append(whole[: self.shapes[name][0]])
            begin += most[name]
        norm: Tensor = torch.linalg.vector_norm(torch.cat(found))
        return norm

    @contextmanager
    def bound(
        self,
        architecture: nn.Module,
        params: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        mode: Mode,
        *,
        dtypes: Mapping[str, torch.dtype] | None = None,
        receive: Callable[[str, Tensor, bool], None] | None = None,
        recomputed: Iterable[nn.Module] = (),
    ) -> Generator[nn.Module]:
        """`functrain.bound` with this worker's rows of the params, as plain tensors.

        `receive` is called with each sum of gradients over the workers, in its dtype of `dtypes`:
        the name, this worker's rows, and whether this worker had a gradient. `recomputed`: the
        modules whose forward is run again in the backward pass.
        """
        self._exchanged.clear()
        sums = None
        if receive is not None:
            assert dtypes is not None
            sums = Sums(self._blocks, dtypes, receive)
        values = Values(self.units, {**self.base, **params}, self, sums)
        binding = Binding(self.units, self.everywhere, values)
        empty = binding.empty(params, self.shapes)
        with (
            bound(architecture, empty, buffers, mode, places=self.places, gathers=True) as model,
            binding.bound(recomputed),
            substitution(lambda other: self._other(binding, other)),
        ):
            yield model

    @contextmanager
    def _other(
        self, binding: Binding, values: Mapping[str, Tensor]
    ) -> Generator[dict[str, Tensor]]:
        if is_sharded(values):
            given = Values(self.units, {**self.base, **local(values)}, self)
        else:
            given = Values(self.units, self.base, self, whole=values)
        with binding.other(given) as found:
            yield found

    def note(self, what: str, names: Sequence[str]) -> None:
        """Record what is about to be exchanged; `reduced` compares it between the workers."""
        self._exchanged.append(f"{what} {names[0] if names else None}")

    def gather(self, names: Sequence[str], shards: Sequence[Tensor]) -> Gathering:
        """Begin to gather whole tensors from these rows."""
        self.note("gather", names)
        return self._blocks.gather(names, shards)


def _cut_out(tensor: Tensor, before: int, after: int) -> Tensor:
    return tensor[before : len(tensor) - after].clone()


def sharding(architecture: nn.Module, world: World, *, tree: bool) -> Sharding:
    """How these workers share an architecture's params."""
    places = slots(architecture)
    base = local(held_values(architecture)) if holds_shards(architecture) else Tensors()
    # A base that is whole needs no gathering.
    everywhere = slots(architecture, held=True) if base else places
    shapes = {n: t.shape for n, t in architecture.named_parameters() if n in everywhere.params}
    if tree and world.size & (world.size - 1):
        raise ConfigError(
            f"sharded: {world.size} workers, and with reduction='canonical' the lowest branches of "
            "the binary tree are sums over the workers; take a power of two of them, or "
            "reduction='fast'"
        )
    for name, shape in shapes.items():
        if not shape:
            raise ConfigError(
                f"sharded: {name} is a number without a dimension, which has no rows to share; "
                "give it the shape [1] in the module, or train with sharded=False"
            )
    return Sharding(
        world=world,
        places=places,
        everywhere=everywhere,
        units=find_units(architecture, everywhere),
        shapes=shapes,
        base=base,
        tree=tree,
    )
