"""Metrics as (sum, weight): merged exactly, divided once, read only on demand."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Literal

import attrs
import torch
from torch import Tensor

from functrain.errors import ConfigError, did_you_mean

Reading = Literal["mean", "total", "exp"]


@attrs.frozen(eq=False)
class Metric:
    """A sum and its weight, both 0-d float64 tensors, and how to read them.

    `reading`: `mean` is sum/weight; `exp` is the exponential of that (a perplexity has the loss's
    own sum and weight, so it merges as the loss does); `total` is the sum. Of k sums with k
    weights, both [k], the mean is the sum of the k quotients.
    """

    sum: Tensor
    weight: Tensor
    reading: Reading = "mean"

    def merge(self, other: Metric) -> Metric:
        """The metric over both parts: sums and weights are added."""
        return Metric(self.sum + other.sum, self.weight + other.weight, self.reading)

    @property
    def empty(self) -> bool:
        """Whether this is a mean over nothing, 0/0; on an accelerator this waits."""
        nothing = (self.sum == 0) & (self.weight == 0)
        return self.reading != "total" and bool(nothing.any())

    @property
    def value(self) -> Tensor:
        """The reading: a 0-d float64 tensor."""
        if self.reading == "total":
            return self.sum
        mean = self.sum / self.weight
        mean = mean.sum() if mean.ndim else mean
        return mean.exp() if self.reading == "exp" else mean


def mean(total: Tensor | float, weight: Tensor | float = 1) -> Metric:
    """A weighted mean, given its sum and its weight."""
    return Metric(_scalar(total), _scalar(weight))


def total(value: Tensor | float) -> Metric:
    """A count that adds up when metrics are merged."""
    return Metric(_scalar(value), _scalar(1), "total")


def exponential(total_loss: Tensor | float, weight: Tensor | float) -> Metric:
    """The exponential of a weighted mean: a perplexity, given the loss's sum and weight."""
    return Metric(_scalar(total_loss), _scalar(weight), "exp")


def _scalar(value: Tensor | float) -> Tensor:
    if not isinstance(value, Tensor):
        return torch.scalar_tensor(value, dtype=torch.float64, device="cpu")
    return (value.detach() if value.requires_grad else value).double()


class Metrics(Mapping[str, Tensor]):
    """Named metrics: a mapping from name to 0-d tensor that merges as (sum, weight).

    Nothing is divided before a value is read, and until then the host does not wait for an
    accelerator. Law: merging the metrics of any partition of a batch gives the batch's metrics.
    """

    __slots__ = ("_metrics",)

    def __init__(self, metrics: Mapping[str, Metric]) -> None:
        self._metrics = dict(metrics)

    def __getitem__(self, name: str) -> Tensor:
        return self.metric(name).value

    def __contains__(self, name: object) -> bool:
        return name in self._metrics  # `Mapping` would divide to find out

    def __iter__(self) -> Iterator[str]:
        return iter(self._metrics)

    def __len__(self) -> int:
        return len(self._metrics)

    def __repr__(self) -> str:
        return f"Metrics({', '.join(f'{n}={v:.6g}' for n, v in self.to_dict().items())})"

    def metric(self, name: str) -> Metric:
        """The (sum, weight) behind a name; `KeyError`, with the nearest names, if it is unknown."""
        if name not in self._metrics:
            raise KeyError(f"{name!r}; {did_you_mean(name, self._metrics)}")
        return self._metrics[name]

    def check(self) -> None:
        """Raise `ConfigError` unless every value is a `Metric`."""
        for name, metric in self._metrics.items():
            if not isinstance(metric, Metric):
                raise ConfigError(
                    f"metrics/{name}: a {type(metric).__name__}, expected a sum with its weight, "
                    "by which micro-batches are merged: functrain.metrics.mean(total, weight)"
                )

    def merge(self, other: Metrics) -> Metrics:
        """Merge by name; a name that only one of them has keeps its own sum and weight."""
        merged = dict(self._metrics)
        for name, metric in other._metrics.items():
            merged[name] = merged[name].merge(metric) if name in merged else metric
        return Metrics(merged)

    def __or__(self, other: Metrics) -> Metrics:
        """The metrics of both, meant for disjoint names; on a shared name `other` wins."""
        return Metrics({**self._metrics, **other._metrics})

    def copied(self) -> Metrics:
        """The same metrics in memory of their own."""
        return Metrics(
            {
                name: Metric(metric.sum.clone(), metric.weight.clone(), metric.reading)
                for name, metric in self._metrics.items()
            }
        )

    def prefixed(self, prefix: str) -> Metrics:
        """The same metrics under `prefix + name`."""
        return Metrics({prefix + name: metric for name, metric in self._metrics.items()})

    def to_dict(self) -> dict[str, float]:
        """All values as Python floats; on an accelerator this waits for them.

        A mean over nothing is left out, such as the reward of rejected examples in a batch without.
        """
        values = {name: float(metric.value) for name, metric in self._metrics.items()}
        return {n: v for n, v in values.items() if not (math.isnan(v) and self._metrics[n].empty)}
