"""What a forward sees of params and buffers, and what it leaves of them."""

from __future__ import annotations

import weakref
from collections.abc import Mapping

import attrs
import torch
from torch import Tensor, nn

from functrain.architecture import Slots
from functrain.errors import ArchitectureError
from functrain.precision import Precision
from functrain.quirks import lost_error, write_error
from functrain.trees import Tensors, in_order


def forward_values(params: Mapping[str, Tensor], places: Slots, precision: Precision) -> Tensors:
    """What the forward sees: private values, which share the params' memory or are casts."""
    kept = params if precision.cast is None else places.statistical
    return Tensors({n: p.detach() if n in kept else precision.leaf(p) for n, p in params.items()})


def forward_buffers(
    buffers: Mapping[str, Tensor], places: Slots, precision: Precision
) -> dict[str, Tensor]:
    """What the forward sees of the buffers: clones, which a module may update in place.

    Where params are cast, so are the buffers that a checkpoint of the module holds; statistics
    (BatchNorm's) and what the module computes for itself (RoPE's frequencies) stay.
    """
    return {
        name: buffer.clone() if name in places.uncast else precision.leaf(buffer).clone()
        for name, buffer in buffers.items()
    }


@attrs.frozen(eq=False)
class OwnBuffers:
    """The buffers that a forward was `given`, and its own `values` of them, as they began."""

    given: Mapping[str, Tensor]
    values: dict[str, Tensor]
    _begun: dict[str, tuple[int, int]]
    _lay: dict[str, int]

    @classmethod
    def of(cls, given: Mapping[str, Tensor], places: Slots, precision: Precision) -> OwnBuffers:
        """Of these buffers; see `forward_buffers`."""
        values = forward_buffers(given, places, precision)
        begun = {name: _written(value) for name, value in values.items()}
        return cls(given, values, begun, {name: _lies(value) for name, value in values.items()})

    def left(self, after: Mapping[str, Tensor]) -> Tensors:
        """The buffers after the forward, in the dtypes that they were given in.

        Each in memory of its own, in order. What was cast and not written to is as it was given,
        unrounded. Where nothing was cast every buffer is taken: BatchNorm's kernel writes without
        moving the version.

        Raises `ArchitectureError` for one of another shape, or of another kind of number, which
        would be cut: a state keeps its form, by which it is loaded again.
        """
        left = {}
        for name, buffer in after.items():
            given = self.given[name]
            self._check(name, buffer)
            cast = buffer.dtype != given.dtype
            traceless = cast and _written(buffer) == self._begun[name]
            # What was assigned may lie in the memory of a parameter, or of the batch.
            own = buffer is self.values[name] and _lies(buffer) == self._lay[name]
            taken = buffer.detach().to(given.dtype, copy=not own)
            if traceless:
                taken = _kept_where_same(buffer.detach(), given, taken)
            left[name] = in_order(taken)
        return Tensors(left)

    def _check(self, name: str, buffer: Tensor) -> None:
        given, bound = self.given[name], self.values[name]
        if buffer.shape != given.shape:
            raise ArchitectureError(
                f"buffers/{name}: the forward left it with shape {list(buffer.shape)}, expected "
                f"{list(given.shape)} as before; keep what grows outside of the buffers, or "
                "register it at its full size"
            )
        if buffer.dtype in (given.dtype, bound.dtype):
            return
        if not torch.can_cast(buffer.dtype, given.dtype):  # a number to an integer, say
            raise ArchitectureError(
                f"buffers/{name}: the forward left it as {buffer.dtype}, expected {given.dtype} as "
                "before, which would cut it; register it in the dtype that it comes to"
            )

    def moved(self, after: Mapping[str, Tensor]) -> list[str]:
        """The buffers that the forward has written to."""
        return [
            name
            for name, buffer in after.items()
            if _written(buffer) != self._begun[name]
            # BatchNorm's kernel writes without moving the version.
            or (
                buffer.device.type == "cpu" and not _same(buffer, self.given[name].to(buffer.dtype))
            )
        ]


def _written(buffer: Tensor) -> tuple[int, int]:
    """What changes where a buffer is assigned anew or written to in place."""
    return id(buffer), buffer._version


def _lies(buffer: Tensor) -> int:
    """Where it lies, which `.data` and `set_` change; 0 where that is no one place."""
    return buffer.data_ptr() if buffer.layout is torch.strided else 0


@attrs.frozen(eq=False)
class Watched:
    """The params that a forward is given, as they began, in an architecture's first step.

    What it writes by `.data` or NumPy leaves no version. To compare values waits for an
    accelerator, so it is not done in every step.
    """

    leaves: Mapping[str, Tensor]
    places: Slots
    _lying: Mapping[str, int]
    _samples: Mapping[str, Tensor]

    @classmethod
    def of(
        cls, architecture: nn.Module, leaves: Mapping[str, Tensor], places: Slots
    ) -> Watched | None:
        """Of these leaves, which are about to be bound; None after the first step."""
        if architecture in _watched:
            return None
        _watched.add(architecture)
        lying = {name: leaf.data_ptr() for name, leaf in leaves.items()}
        return cls(leaves, places, lying, _samples(leaves))

    def check(self) -> None:
        """Raise `ArchitectureError` where the forward has left other params; within the binding."""
        after, modules = _samples(self.leaves), self.places.modules
        # A recurrent layer lays its weights out anew (flatten_parameters), with their values.
        laying = {id(m._parameters) for m in modules if isinstance(m, nn.RNNBase)}
        for name, leaf in self.leaves.items():
            at = self.places.params[name]
            tables = {id(entries) for entries, _ in at}
            moved = leaf.data_ptr() != self._lying[name] and not tables & laying
            if moved or any(entries.get(key) is not leaf for entries, key in at):
                raise lost_error(name)
            if not _same(after[name], self._samples[name]):
                raise write_error(name)


_watched: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def _samples(leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """At most 1,024 numbers of each, evenly spaced."""
    flat = {name: leaf.detach().flatten() for name, leaf in leaves.items()}
    return {name: each[:: 1 + each.numel() // 1024].clone() for name, each in flat.items()}


def _kept_where_same(buffer: Tensor, given: Tensor, taken: Tensor) -> Tensor:
    """What was given, but for the values that were written by `.data`, which leaves no trace.

    On an accelerator whether there are any is not asked: the host would wait.
    """
    bound = given.to(buffer.dtype)
    if buffer.device.type == "cpu" and _same(buffer, bound):
        return given
    return torch.where((buffer == bound) | (buffer.isnan() & bound.isnan()), given, taken)


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same values; NaN is as good as any other."""
    return one.equal(other) or bool(((one == other) | (one.isnan() & other.isnan())).all())
