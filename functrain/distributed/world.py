"""The world: which worker this is, of how many, and how they speak with each other."""

from __future__ import annotations

import atexit
import os
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType
from typing import Any, Self, TypeVar

import attrs
import numpy as np
import orjson
import torch
import torch.distributed as dist
from torch import Tensor

from functrain.distributed import exchange
from functrain.distributed.observations import gathered_observations
from functrain.errors import (
    ArchitectureError,
    BatchError,
    ConfigError,
    FunctrainError,
    FunctrainWarning,
    RelayedError,
    WorkerError,
    is_number,
)
from functrain.metrics import Metrics
from functrain.reductions import Part, tree_sum

T = TypeVar("T")
TIMEOUT = 600.0


class _Diary:
    """What this worker is at, for the errors of the others; it reaches no value."""

    def __init__(self) -> None:
        self.step: int | None = None
        self.agreed: weakref.WeakSet[Any] = weakref.WeakSet[Any]()


@attrs.frozen(kw_only=True, eq=False)
class World:
    """`size` workers, of which this is `rank`; their number 1 is no process group at all.

    `device`: where this worker computes. `timeout`: seconds that one waits for another before it
    raises `WorkerError`. Use it as a context manager: leaving it ends the process group.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = attrs.field(factory=lambda: torch.device("cpu"))
    timeout: float = TIMEOUT
    _diary: _Diary = attrs.field(factory=_Diary, repr=False, init=False)

    @property
    def speaks(self) -> bool:
        """Whether this is the worker that writes, saves and speaks: rank 0."""
        return self.rank == 0

    def begin(self, step: int) -> None:
        """Note the step that this worker is about to make."""
        self._diary.step = step
        if self.size > 1:
            with self.meeting("the beginning of a step"):
                _store().set(_place(self.rank), str(step))

    def first_time(self, thing: object) -> bool:
        """Whether this is the first call with `thing`, the same on every worker."""
        new = thing not in self._diary.agreed
        self._diary.agreed.add(thing)
        return new

    @contextmanager
    def meeting(self, what: str) -> Iterator[None]:
        """An exchange with the others; one that fails is a `WorkerError` that says who is where."""
        try:
            yield
        except FunctrainError:
            raise
        except RuntimeError as error:  # how gloo, NCCL and the store report a lost peer
            step = "" if self._diary.step is None else f", step {self._diary.step + 1}"
            raise WorkerError(
                f"worker {self.rank} of {self.size}{step}: {what} failed, after at most "
                f"{self.timeout:g} s: {str(error).splitlines()[0]}. {self._whereabouts()}Start all "
                "workers again, from the newest checkpoint"
            ) from error

    def _whereabouts(self) -> str:
        """Where the others were last heard of; nothing before they have met."""
        if not dist.is_initialized():
            return ""
        heard: dict[str, list[int]] = {}
        try:
            store = _store()
            store.set_timeout(timedelta(seconds=2))
            for rank in range(self.size):
                place = _place(rank)
                at = store.get(place).decode() if store.check([place]) else "-1"
                heard.setdefault(f"step {int(at) + 1}", []).append(rank)
        except RuntimeError:
            return "The store that knows where the others are (worker 0's) does not answer. "
        parts = [
            f"worker{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))} in {at}"
            for at, ranks in sorted(heard.items())
        ]
        return f"Last heard of: {'; '.join(parts)}. "

    def numbers(self, given: Sequence[int]) -> Tensor:
        """The same count of integers of every worker: int64 [size, n], on the CPU."""
        row = torch.tensor(list(given), dtype=torch.int64)
        return self.gathered(row, "the exchange of counts")

    def gathered(self, tensor: Tensor, what: str) -> Tensor:
        """A tensor of one shape of every worker: [size, …]."""
        if self.size == 1:
            return tensor.unsqueeze(0)
        with self.meeting(what):
            flat = tensor.contiguous().view(-1)
            found = flat.new_empty(self.size * flat.numel())
            dist.all_gather_single(found, flat)
        return found.view(self.size, *tensor.shape)

    def payloads(self, given: bytes, what: str = "an exchange") -> list[bytes]:
        """Bytes of any length of every worker."""
        sizes = self.numbers([len(given)])[:, 0].tolist()
        padded = np.zeros(max(1, *sizes), np.uint8)
        padded[: len(given)] = np.frombuffer(given, np.uint8)
        rows = self.gathered(torch.from_numpy(padded), what)
        return [rows[rank, :size].contiguous().numpy().tobytes() for rank, size in enumerate(sizes)]

    def texts(self, given: str, what: str = "an exchange") -> list[str]:
        """A text of every worker."""
        return [each.decode() for each in self.payloads(given.encode(), what)]

    def from_first(self, make: Callable[[], str], what: str) -> str:
        """What worker 0 makes; where it raises, so does every worker."""
        if self.size == 1:
            return make()
        outcome, failure = "", None
        if self.speaks:
            try:
                outcome = f"+{make()}"
            except FunctrainError as error:
                outcome, failure = f"-{type(error).__name__}\0{error}", error
        said = self.texts(outcome, what)[0]
        if failure is not None:
            raise failure
        if said.startswith("-"):
            raise relayed(said[1:], 0)
        return said[1:]

    def for_all(self, make: Callable[[], T]) -> T:
        """What each worker makes; where one raises, so does every worker."""
        if self.size == 1:
            return make()
        made: list[T] = []
        failure: FunctrainError | None = None
        try:
            made.append(make())
        except FunctrainError as error:
            failure = error
        if self.any(failure is not None):
            self._refused(failure)
        return made[0]

    def total(self, number: int) -> int:
        """The sum of an integer over the workers."""
        if self.size == 1:
            return number
        return int(self.numbers([number]).sum())

    def any(self, flag: bool) -> bool:
        """Whether it is so on any worker."""
        return bool(self.total(int(flag)))

    def agree(self, facts: Mapping[str, str], what: str = "before the first step") -> None:
        """Raise `WorkerError`, on every worker, where they do not hold the same facts."""
        if self.size == 1:
            return
        told = [orjson.loads(text) for text in self.payloads(orjson.dumps(dict(facts)), what)]
        names = sorted({name for each in told for name in each})
        lines = [
            f"  {name}: {_versions([each.get(name) for each in told])}"
            for name in names
            if len({each.get(name) for each in told}) > 1
        ]
        if lines:
            raise WorkerError(
                f"the workers disagree {what}:\n" + "\n".join(lines) + "\nstart all of them with "
                "the same program, options, data and checkpoint"
            )

    def part(self, prepared: Callable[[], tuple[int, Tensor]], *, tree: bool) -> Part:
        """See `functrain.reductions.Workers`; also refuses what cannot be a tree."""
        failure: FunctrainError | None = None
        count, weight = 0, torch.zeros(0, dtype=torch.int64)
        try:
            count, weight = prepared()
        except FunctrainError as error:
            failure = error
        # The width is fixed, since a worker that has failed knows of no weight.
        row = weight.reshape(-1).tolist()
        if len(row) > _WEIGHTS:
            raise ConfigError(
                f"objective: a weight of {len(row)} numbers, expected at most {_WEIGHTS} where "
                "there are several workers"
            )
        rows = self.numbers([failure is not None, count, *row, *[0] * (_WEIGHTS - len(row))])
        if bool(rows[:, 0].any()):
            self._refused(failure)
        counts = rows[:, 1].tolist()
        if tree and self.size > 1 and (len(set(counts)) > 1 or count & (count - 1)):
            raise ConfigError(
                f"reduction='canonical': the workers have {counts} micro-batches, expected the "
                "same power of two on each; then a worker's sum is a branch of one binary tree"
            )
        whole = rows[:, 2:].sum(0)[: len(row)].view(weight.shape).to(weight.device)
        return Part(
            first=sum(counts[: self.rank]),
            total=sum(counts),
            weight=whole,
            tree=tree,
            workers=self if self.size > 1 else None,
        )

    def _refused(self, failure: FunctrainError | None) -> None:
        said = "" if failure is None else f"{type(failure).__name__}\0{failure}"
        told = self.texts(said, "the exchange of an error")
        if failure is not None:
            raise failure
        rank = next(rank for rank, text in enumerate(told) if text)
        raise relayed(told[rank], rank)

    def observations(self, observed: Sequence[Any]) -> list[Any]:
        """See `functrain.reductions.Workers`."""
        return gathered_observations(self, observed)

    def reduced(
        self,
        grads: dict[str, Tensor],
        metrics: Metrics,
        like: Mapping[str, Tensor],
        moved: Sequence[str],
        *,
        tree: bool,
    ) -> tuple[dict[str, Tensor], Metrics]:
        """See `functrain.reductions.Workers`."""
        names = sorted(like)
        has = [int(name in grads) for name in names]
        form = exchange.hashed(exchange.form_of(metrics))
        rows = self.numbers([len(moved), form, *has])
        if bool(rows[:, 0].any()):
            raise ArchitectureError(
                f"buffers/{moved[0] if moved else '…'}: the forward writes to it, and each worker "
                "would keep what its own part of the batch made of it; use layers without running "
                "statistics (LayerNorm, RMSNorm, GroupNorm), or one worker"
            )
        if len(set(rows[:, 1].tolist())) > 1:
            raise BatchError(
                "metrics: the objective's have other names or shapes on one worker than on "
                "another; give every batch the same metrics, of weight 0 where there is nothing"
            )
        anywhere = rows[:, 2:].any(0).tolist()
        present = {
            name: grads[name] if name in grads else exchange.nothing(like[name])
            for name, found in zip(names, anywhere, strict=True)
            if found
        }
        with self.meeting("the reduction of the gradients"):
            reduce = exchange.canonical if tree else exchange.fast
            reduce(list(present.values()), self.rank, self.size)
        return present, self.merged(metrics)

    def merged(self, metrics: Metrics) -> Metrics:
        """The metrics of all workers together, which have the same names."""
        rows = self.gathered(exchange.values_of(metrics), "the exchange of metrics")
        return exchange.metrics_of(tree_sum(list(rows), lambda a, b: a + b), metrics)

    def read(
        self, source: Any, position: int, n: int, *, microbatches: int, tree: bool = False
    ) -> Any:
        """This worker's part of the `n` samples at a position of a source.

        As one batch; for a `tree`, whose bits the padding of a batch would reach, as ready
        micro-batches, each read by itself, so that they are the same on any number of workers.
        """
        if n % (microbatches if tree else self.size):
            what = f"{microbatches} micro-batches" if tree else f"{self.size} workers"
            raise ConfigError(f"batch_size: {n} samples cannot be shared out to {what} equally")
        own = n // self.size
        first = position + self.rank * own
        if not tree:
            return source.at(first, own)
        each = n // microbatches
        return [source.at(at, each) for at in range(first, first + own, each)]

    def close(self) -> None:
        """Wait for the others and end the process group; nothing where there is none."""
        if self.size > 1 and dist.is_initialized():
            self.numbers([0])
            _end()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
        elif self.size > 1:
            _end()  # without a barrier: the others may never come to it


_WEIGHTS = 4
ALONE = World()
"""One process that is no worker of others, whatever the environment says."""


def world(*, device: str | None = None, timeout: float = TIMEOUT) -> World:
    """The world of this process, from the environment that torchrun sets; `ALONE` without it.

    `RANK`, `WORLD_SIZE`, `LOCAL_RANK`, `MASTER_ADDR` and `MASTER_PORT` are read. gloo on the CPU,
    NCCL on CUDA, where the process takes the device of its local rank. Raises `ConfigError` for an
    environment that makes no sense, and `WorkerError` where a worker does not come in `timeout`
    seconds.
    """
    if not is_number(timeout) or not 0 < timeout < float("inf"):
        raise ConfigError(f"timeout: {timeout!r}, expected a positive number of seconds")
    size = _number("WORLD_SIZE", 1)
    rank = _number("RANK", 0)
    where = torch.device(_device() if device in (None, "cuda") else device or "cpu")
    if device == "cuda" and where.type == "cpu":
        raise ConfigError("device: 'cuda', and this machine has none; use 'cpu'")
    if size == 1:
        return World(device=where, timeout=timeout)
    if not 0 <= rank < size:
        raise ConfigError(f"RANK: {rank} of WORLD_SIZE {size}; torchrun sets both")
    made = World(rank=rank, size=size, device=where, timeout=timeout)
    if where.type == "cuda":
        torch.cuda.set_device(where)
    if not dist.is_initialized():
        backend = "gloo" if where.type == "cpu" else "cpu:gloo,cuda:nccl"
        with made.meeting("the meeting of all workers (one may be missing)"):
            dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
        _warn_of_stale_addresses(backend)
        # Gloo may abort a process that ends with its threads alive.
        atexit.register(_end)
    elif (dist.get_rank(), dist.get_world_size()) != (rank, size):
        raise ConfigError(
            f"world: the process group is of rank {dist.get_rank()} of {dist.get_world_size()}, "
            f"and the environment says {rank} of {size}"
        )
    return made


def _warn_of_stale_addresses(backend: str) -> None:
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    shared = os.environ.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "0") != "1"
    if restarts != "0" and shared and os.environ.get("RANK") == "0" and backend == "gloo":
        warnings.warn(
            "torchrun --max-restarts: restarted workers would look for those before them and wait "
            "for minutes; start torchrun with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1",
            FunctrainWarning,
            stacklevel=3,
        )


def _device() -> str:
    return f"cuda:{_number('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"


def _number(name: str, default: int) -> int:
    given = os.environ.get(name, "")
    if not given:
        return default
    if not given.isdecimal():
        raise ConfigError(f"{name}: {given!r} in the environment, expected an integer")
    return int(given)


def _end() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    if dist.is_initialized():
        dist.destroy_process_group()


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()


def _place(rank: int) -> str:
    return f"functrain/step/{rank}"


def _versions(values: Sequence[str | None]) -> str:
    ranks: dict[str | None, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(rank)
    parts = [
        f"{value if value is not None else 'nothing'} on worker {', '.join(map(str, which))}"
        for value, which in ranks.items()
    ]
    return "; ".join(parts)


def relayed(text: str, rank: int) -> RelayedError:
    """Another worker's error, told here."""
    kind, _, message = text.partition("\0")
    return RelayedError(f"worker {rank} has refused ({kind}): {message}")
