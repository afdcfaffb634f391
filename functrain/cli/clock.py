"""The clock of a run: rates, waiting and memory of the steps between two lines of its log."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from functrain import memory
from functrain.cli.build import Built
from functrain.cli.config import DPO, SFT, Pretrain
from functrain.data import Prefetched
from functrain.flops import flops_of
from functrain.loop import world_of
from functrain.metrics import Metrics
from functrain.state import TrainState, device_of


class Clock:
    """What `functrain.tracking.jsonl.CLOCKS` name, of the steps since they were last asked for."""

    def __init__(
        self, config: Pretrain | SFT | DPO, built: Built, state: TrainState, source: Prefetched
    ) -> None:
        size = world_of(built.step).size
        self._peak = None if config.train.peak_tflops is None else config.train.peak_tflops * size
        self._flops = 0
        if self._peak is not None:
            batch = built.data.at(state.cursor.samples, built.source.batch_size)
            self._flops = flops_of(built.step, state, batch, recomputed=False)
        self._counted: Tensor | None = None
        self._made = torch.zeros(())
        self._device, self._source = device_of(state.params), source
        self._step, self._tokens, self._waited = state.step, state.cursor.tokens, source.waited
        self._since = time.perf_counter()

    def saw(self, metrics: Metrics) -> None:
        """A step has been made. Nothing is read."""
        if self._peak is None:  # then nothing is made of it
            return
        made = metrics.metric("padding").weight.double()
        # The operations of the first batch were counted; others take as many more as are larger.
        self._counted = made if self._counted is None else self._counted
        self._made = self._made.to(made.device) + made

    def measured(self, state: TrainState, metrics: Metrics) -> dict[str, float]:
        """Of the steps that have ended since; `metrics` are the last one's, and have been read."""
        now, waited = time.perf_counter(), self._source.waited
        elapsed, steps = max(now - self._since, 1e-9), state.step - self._step
        tokens = state.cursor.tokens - self._tokens
        found = {
            "data_seconds": (waited - self._waited) / steps,
            "peak_memory_gib": memory.peak(self._device) / 2**30,
        }
        self._step, self._tokens = state.step, state.cursor.tokens
        self._since, self._waited = now, waited
        made, self._made = self._made, torch.zeros_like(self._made)
        if "eval_loss" in metrics:  # an evaluation's time is not the step's
            return found
        found["tokens_per_second"] = tokens / elapsed
        if self._peak is not None and self._counted is not None:
            flops = self._flops * float(made / self._counted)
            found["mfu"] = flops / elapsed / (self._peak * 1e12)
        return found

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within it, time is not the steps'."""
        begun = time.perf_counter()
        yield
        self._since += time.perf_counter() - begun
