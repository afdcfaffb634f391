"""The machines of a plan: how much memory a worker has, how fast it computes and exchanges."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

from functrain.checks import at_least_one, is_number, positive
from functrain.errors import ConfigError, did_you_mean
from functrain.precision import Precision, policy


@attrs.frozen(kw_only=True)
class Device:
    """An accelerator, by its maker's figures.

    `memory`: bytes. `half` and `single`: dense operations per second in bf16 and in fp32.
    `traffic`: bytes per second of its memory. `inside`: bytes per second to other devices of its
    node, in one direction; `between`: to other nodes, with the usual network card per device.
    """

    memory: float
    half: float
    single: float
    traffic: float
    inside: float
    between: float


DEVICES: Mapping[str, Device] = {
    "a100": Device(
        memory=80e9, half=312e12, single=19.5e12, traffic=2.0e12, inside=300e9, between=25e9
    ),
    "h100": Device(
        memory=80e9, half=989e12, single=67e12, traffic=3.35e12, inside=450e9, between=50e9
    ),
    "h200": Device(
        memory=141e9, half=989e12, single=67e12, traffic=4.8e12, inside=450e9, between=50e9
    ),
    "b200": Device(
        memory=180e9, half=2250e12, single=80e12, traffic=8.0e12, inside=900e9, between=50e9
    ),
}
"""NVIDIA's data sheets (SXM): NVLink in one direction, InfiniBand HDR, NDR, NDR and NDR."""


@attrs.frozen(kw_only=True)
class Cluster:
    """`workers` of one kind, `per_node` to a node.

    `memory`: bytes of a worker. `flops`: operations per second that it achieves, not its peak.
    `traffic`: bytes per second of its memory. `inside` and `between`: bytes per second that a
    worker sends within its node and to another. `latency`: seconds that an exchange takes besides
    its bytes, per doubling of the workers, as in trees and recursive doubling. `beside`: whether
    sums of gradients overlap with the computation, for which other hardware must do the exchange.
    """

    workers: int = attrs.field(validator=at_least_one)
    per_node: int = attrs.field(default=8, validator=at_least_one)
    memory: float = attrs.field(validator=positive)
    flops: float = attrs.field(validator=positive)
    traffic: float = attrs.field(validator=positive)
    inside: float = attrs.field(validator=positive)
    between: float = attrs.field(validator=positive)
    latency: float = attrs.field(default=20e-6, validator=positive)
    beside: bool = True

    @property
    def bandwidth(self) -> float:
        """Bytes per second of the slowest link in a ring of all workers."""
        return self.inside if self.workers <= self.per_node else min(self.inside, self.between)


def cluster(
    name: str, workers: int, precision: str | Precision, *, utilisation: float = 0.4, **more: Any
) -> Cluster:
    """A cluster of workers with a device of `DEVICES`, at a fraction `utilisation` of its peak.

    `more`: other values for the fields of the `Cluster`. Raises `ConfigError` for an unknown device
    or a `utilisation` outside (0, 1].
    """
    if name not in DEVICES:
        raise ConfigError(f"device: {name!r} is unknown; {did_you_mean(name, DEVICES)}")
    if not is_number(utilisation) or not 0 < utilisation <= 1:
        raise ConfigError(f"utilisation: {utilisation!r}, expected a number in (0, 1]")
    device = DEVICES[name]
    precision = policy(precision)
    narrow = precision.cast is not None or precision.autocast is not None
    found: dict[str, Any] = {
        "memory": device.memory,
        "flops": utilisation * (device.half if narrow else device.single),
        "traffic": device.traffic,
        "inside": device.inside,
        "between": device.between,
    }
    return Cluster(workers=workers, **{**found, **more})
