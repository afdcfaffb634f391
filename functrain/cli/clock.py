"""The clock of a run: rates, waiting and memory over the steps between two lines of its log."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import Tensor

from functrain import memory
from functrain.cli.build import Built
from functrain.cli.config import DPO, SFT, Pretrain
from functrain.data import Prefetched
from functrain.flops import flops_of
from functrain.loop import read, world_of
from functrain.metrics import Metrics
from functrain.state import TrainState, device_of


class Clock:
    """Measures the metrics of `functrain.tracking.jsonl.CLOCKS` over the steps since last asked."""

    def __init__(
        self, config: Pretrain | SFT | DPO, built: Built, state: TrainState, source: Prefetched
    ) -> None:
        world, peak = world_of(built.step), config.train.peak_tflops
        self._peak = None if peak is None else peak * world.size
        self._flops = 0
        if self._peak is not None:
            # Summed over each worker's part of a batch: the whole may not fit into its memory.
            own = read(built.step, built.data, state.cursor.samples, built.source.batch_size)
            self._flops = world.total(flops_of(built.step, state, own, recomputed=False))
        self._counted: Tensor | None = None
        self._made = torch.zeros(())
        self._device, self._source = device_of(state.params), source
        self._step, self._tokens, self._waited = state.step, state.cursor.tokens, source.waited
        self._since = time.perf_counter()

    def saw(self, metrics: Metrics) -> None:
        """Count a step, without reading any of its values."""
        if self._peak is not None:
            made = metrics.metric("padding").weight.double()
            # Operations were counted for the first batch; those of others are in proportion to
            # their tokens.
            self._counted = made if self._counted is None else self._counted
            self._made = self._made.to(made.device) + made

    def measured(self, state: TrainState) -> dict[str, float]:
        """The metrics of the steps since the last call; the last step's must have been read."""
        rates = self._rates(state)
        waited, steps = self._source.waited, state.step - self._step
        found = {
            "data_seconds": (waited - self._waited) / steps,
            "peak_memory_gib": memory.peak(self._device) / 2**30,
        }
        self._step, self._tokens, self._waited = state.step, state.cursor.tokens, waited
        self._made = torch.zeros_like(self._made)
        self._since = time.perf_counter()
        return found | rates

    def _rates(self, state: TrainState) -> dict[str, float]:
        elapsed = max(time.perf_counter() - self._since, 1e-9)
        found = {"tokens_per_second": (state.cursor.tokens - self._tokens) / elapsed}
        if self._peak is not None and self._counted is not None:
            flops = self._flops * float(self._made / self._counted)
            found["mfu"] = flops / elapsed / (self._peak * 1e12)
        return found

    @contextmanager
    def paused(self, metrics: Metrics) -> Generator[None]:
        """Excludes an evaluation or a save from the steps' time; `metrics`: the last step's."""
        float(metrics["loss"])  # waits for an accelerator: the time until now is the steps'
        begun = time.perf_counter()
        yield
        self._since += time.perf_counter() - begun
