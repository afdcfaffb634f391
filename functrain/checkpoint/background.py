"""Saving in the background: the state is copied, and a thread hashes and writes the copy."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from functrain import memory
from functrain.checkpoint.environment import conditioned
from functrain.checkpoint.filesystem import OPERATING_SYSTEM, FileSystem
from functrain.checkpoint.layout import check_loadable
from functrain.checkpoint.manifest import checked_metrics, checked_texts
from functrain.checkpoint.retention import Keep, as_keep
from functrain.checkpoint.store import prune, save_under, warn_of_newer
from functrain.checks import PathLike, as_path
from functrain.errors import CheckpointError, ConfigError, SaveWarning
from functrain.state import TrainState, check_state, device_of, map_tensors
from functrain.trees import is_sharded


class BackgroundWriter:
    """Saves in the background: `save` returns once the state has been copied.

        run = functrain.train(step, state, source, steps=10_000)
        with BackgroundWriter("runs/mine", keep=Keep(last=3)) as writer:
            for state, metrics in run:
                writer.check()
                if state.step % 500 == 0:
                    writer.save(state)

    At most one save is in flight: the next one waits for it. If it fails, the next call of any
    method raises its error, `close` at the latest. `save` copies the state into memory that the
    writer owns and reuses, so a donating step may follow at once; peak memory is one more state.
    """

    def __init__(
        self,
        directory: PathLike,
        *,
        keep: int | Keep | None = None,
        filesystem: FileSystem = OPERATING_SYSTEM,
    ) -> None:
        self._directory = as_path("directory", directory)
        self._keep = None if keep is None else as_keep(keep)
        self._filesystem = filesystem
        self._pool = ThreadPoolExecutor(1, "functrain-save")
        self._pending: Future[Path] | None = None
        self._memory: dict[str, Tensor] = {}
        self._closed = False

    def __enter__(self) -> BackgroundWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
            return
        try:
            self.close()
        except Exception as failure:
            # The error that ended the block is the one that should surface.
            warnings.warn(str(failure), SaveWarning, stacklevel=2)

    def save(
        self,
        state: TrainState,
        *,
        metrics: Mapping[str, float] | None = None,
        conditions: Mapping[str, Any] | None = None,
        beside: Mapping[str, str] | None = None,
    ) -> None:
        """Copy the state and start writing the copy, after waiting for the previous save.

        Afterwards the checkpoints that `keep` does not retain are removed, as by
        `prune(…, saved=…)`. Raises `ConfigError` for a state in shards, `CheckpointError` once the
        writer is closed, and at once whatever `functrain.save` raises before it writes anything.
        """
        check_state(state)
        if is_sharded(state.params):
            raise ConfigError(
                "BackgroundWriter: a state in shards is written by all workers at once, while none "
                "of them trains; every worker calls functrain.save(…, world=world)"
            )
        if self._closed:
            raise CheckpointError("BackgroundWriter: it is closed; make another to save on")
        check_loadable(state)
        values = checked_metrics(metrics)
        checked_texts(beside)
        self.wait()
        # Taken here: torch's number of threads, which is part of it, is another in the writer's.
        under = conditioned(device_of(state.params), conditions)
        before, self._memory = self._memory, dict[str, Tensor]()
        copy, used = _copied(state, before)
        self._pending = self._pool.submit(self._write, copy, used, values, under, beside or {})

    def check(self) -> None:
        """Raise the error of a save that has finished and failed; never waits."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> Path | None:
        """Wait for the save in flight and return its path, or None if there is none.

        Raises the error of a save that failed.
        """
        if self._pending is None:
            return None
        # If an interrupt ends the wait, the save is still in flight and stays pending.
        futures.wait([self._pending])
        pending, self._pending = self._pending, None
        return pending.result()

    def close(self) -> None:
        """Wait for the save in flight and end the thread."""
        self._closed = True
        try:
            self.wait()
        finally:
            self._pool.shutdown()
            self._memory = {}

    def _write(
        self,
        state: TrainState,
        used: dict[str, Tensor],
        metrics: Mapping[str, float],
        under: Mapping[str, Any],
        beside: Mapping[str, str],
    ) -> Path:
        try:
            path = save_under(
                under,
                self._directory,
                state,
                metrics=metrics,
                beside=beside,
                filesystem=self._filesystem,
            )
        finally:
            # Only now: nothing may be copied into memory that is still being written out.
            self._memory = used
        if self._keep is None:
            warn_of_newer(path)
        else:
            prune(self._directory, self._keep, saved=path, filesystem=self._filesystem)
        return path


def _copied(
    state: TrainState, before: Mapping[str, Tensor]
) -> tuple[TrainState, dict[str, Tensor]]:
    """A copy of the state, and its memory by tensor path; that of `before` is reused if it fits."""
    fresh = _pinned if device_of(state.params).type == "cuda" else memory.empty
    used = dict[str, Tensor]()

    def copied(path: str, tensor: Tensor) -> Tensor:
        old = before.get(path)
        if old is None or old.shape != tensor.shape or old.dtype != tensor.dtype:
            old = fresh(tensor.shape, tensor.dtype)
        used[path] = old.copy_(tensor.detach())
        return old

    return map_tensors(state, copied), used


def _pinned(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Pinned memory, which an accelerator copies into directly."""
    return torch.empty(shape, dtype=dtype, device="cpu", pin_memory=True)
