"""What a forward sees of params and buffers, and how it leaves them."""

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
    """What the forward sees: detached params, which share the params' memory, or casts of them."""
    if precision.cast is None:
        return Tensors({name: param.detach() for name, param in params.items()})
    kept = places.statistical
    return Tensors({n: p.detach() if n in kept else precision.leaf(p) for n, p in params.items()})


def forward_buffers(
    buffers: Mapping[str, Tensor], places: Slots, precision: Precision
) -> dict[str, Tensor]:
    """What the forward sees of the buffers: clones, which a module may update in place.

    If the precision casts params, it casts the buffers that a checkpoint holds too; statistics
    (BatchNorm's) and what a module computes for itself (RoPE's frequencies) keep their dtype.
    """
    return {
        name: buffer.clone() if name in places.uncast else precision.leaf(buffer).clone()
        for name, buffer in buffers.items()
    }


@attrs.frozen(eq=False)
class OwnBuffers:
    """The buffers that a forward was `given`, its own `values` of them, and how those began."""

    given: Mapping[str, Tensor]
    values: dict[str, Tensor]
    _begun: dict[str, tuple[int, int]]
    _lay: dict[str, int]

    @classmethod
    def of(cls, given: Mapping[str, Tensor], places: Slots, precision: Precision) -> OwnBuffers:
        """The record for these buffers; see `forward_buffers`."""
        values = forward_buffers(given, places, precision)
        begun = {name: _written(value) for name, value in values.items()}
        return cls(given, values, begun, {name: _lies(value) for name, value in values.items()})

    def left(self, after: Mapping[str, Tensor]) -> Tensors:
        """The buffers after the forward, in the dtypes in which they were given.

        Each is in memory of its own, in order. A buffer that was cast and not written to is
        returned as it was given, unrounded. Without a cast every buffer is taken, since BatchNorm's
        kernel writes without changing the version.

        Raises `ArchitectureError` for a buffer of another shape, or of a kind of number that the
        old dtype cannot hold: a state keeps its form, so that it can be loaded again.
        """
        left = {}
        for name, buffer in after.items():
            given = self.given[name]
            self._check(name, buffer)
            cast = buffer.dtype != given.dtype
            traceless = cast and _written(buffer) == self._begun[name]
            # An assigned tensor may share memory with a parameter or the batch.
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
        """The names of the buffers that the forward has written to."""
        return [
            name
            for name, buffer in after.items()
            if _written(buffer) != self._begun[name]
            # BatchNorm's kernel writes without changing the version.
            or (
                buffer.device.type == "cpu" and not _same(buffer, self.given[name].to(buffer.dtype))
            )
        ]


def _written(buffer: Tensor) -> tuple[int, int]:
    """A pair that changes when a buffer is assigned anew or written to in place."""
    return id(buffer), buffer._version


def _lies(buffer: Tensor) -> int:
    """A buffer's address, which `.data` and `set_` change; 0 if it is not a strided tensor."""
    return buffer.data_ptr() if buffer.layout is torch.strided else 0


@attrs.frozen(eq=False)
class Watched:
    """The params given to a forward in an architecture's first step, as they began.

    Writes by `.data` or NumPy change no version. Comparing values waits for an accelerator, so it
    is done in the first step only.
    """

    leaves: Mapping[str, Tensor]
    places: Slots
    _lying: Mapping[str, int]
    _samples: Mapping[str, Tensor]

    @classmethod
    def of(
        cls, architecture: nn.Module, leaves: Mapping[str, Tensor], places: Slots
    ) -> Watched | None:
        """The record for leaves that are about to be bound; None after the first step."""
        if architecture in _watched:
            return None
        _watched.add(architecture)
        lying = {name: leaf.data_ptr() for name, leaf in leaves.items()}
        return cls(leaves, places, lying, _samples(leaves))

    def check(self) -> None:
        """Raise `ArchitectureError` if the forward changed params; call it within the binding."""
        after, modules = _samples(self.leaves), self.places.modules
        # A recurrent layer moves its weights, values unchanged (flatten_parameters).
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
    """At most 1,024 numbers of each leaf, evenly spaced."""
    flat = {name: leaf.detach().flatten() for name, leaf in leaves.items()}
    return {name: each[:: 1 + each.numel() // 1024].clone() for name, each in flat.items()}


def _kept_where_same(buffer: Tensor, given: Tensor, taken: Tensor) -> Tensor:
    """The buffer as given, except where values were written by `.data`, which leaves no trace.

    On an accelerator it is not asked whether there are any, since the host would wait.
    """
    bound = given.to(buffer.dtype)
    if buffer.device.type == "cpu" and _same(buffer, bound):
        return given
    return torch.where((buffer == bound) | (buffer.isnan() & bound.isnan()), given, taken)


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same values; NaN equals NaN."""
    return one.equal(other) or bool(((one == other) | (one.isnan() & other.isnan())).all())
