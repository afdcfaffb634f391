"""How workers communicate: small exchanges, decisions of worker 0, and errors shared by all."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import attrs
import numpy as np
import orjson
import torch
import torch.distributed as dist
from torch import Tensor

from functrain.distributed.exchange import hashed
from functrain.distributed.group import store_of_group
from functrain.errors import FunctrainError, RelayedError, WorkerError

T = TypeVar("T")
TIMEOUT = 600.0
_NUMBERS = 8
_NAME = 80  # bytes
_BUSY = -1


class Diary:
    """What this worker is doing, for the error messages of others; it affects no computed value."""

    def __init__(self) -> None:
        self.step: int | None = None
        self.key = -1
        self.closed = False
        self.agreed: weakref.WeakSet[Any] = weakref.WeakSet[Any]()


@attrs.frozen(kw_only=True, eq=False)
class Speaking:
    """One of `size` workers, which can exchange texts, numbers and errors; see `World`."""

    rank: int = 0
    size: int = 1
    device: torch.device = attrs.field(factory=lambda: torch.device("cpu"))
    timeout: float = TIMEOUT
    _diary: Diary = attrs.field(factory=Diary, repr=False, init=False)

    @property
    def speaks(self) -> bool:
        """Whether this is the worker that writes, saves and prints: rank 0."""
        return self.rank == 0

    @property
    def closed(self) -> bool:
        """Whether this worker has left the world."""
        return self._diary.closed

    def begin(self, step: int, key: int) -> None:
        """Record the step that this worker is about to take, and the state's key; once per step."""
        if (step, key) == self._origin():
            return
        self._diary.step, self._diary.key = step, key
        if self.size > 1:
            with self.meeting("the beginning of a step"):
                store_of_group().set(_place(self.rank), str(step))

    def _origin(self) -> tuple[int, int]:
        """The step and key of the state that this worker continues from; −1 before any."""
        return -1 if self._diary.step is None else self._diary.step, self._diary.key

    def _same_origin(self, origins: Tensor) -> None:
        """Raise `WorkerError` unless every worker has the same `_origin`: int64 [size, 2]."""
        for name, values in zip(("step", "key"), origins.T.tolist(), strict=True):
            if len(set(values)) > 1:
                raise WorkerError(
                    f"the workers go on from different states, whose {name} is "
                    f"{_versions([str(value) for value in values])}; give each of them the same "
                    "state, and load the same checkpoint on all"
                )

    def first_time(self, thing: object) -> bool:
        """Whether this is the first call with `thing`; the answer is the same on every worker."""
        new = thing not in self._diary.agreed
        self._diary.agreed.add(thing)
        return new

    @contextmanager
    def meeting(self, what: str) -> Generator[None]:
        """Wraps an exchange: if it fails, a `WorkerError` says which worker was at which step."""
        if self.closed or not dist.is_initialized():
            ended = "this world is closed" if self.closed else "the process group has ended"
            raise WorkerError(
                f"worker {self.rank} of {self.size}: {ended}, and {what} needs the others; compute "
                "within `with functrain.distributed.world() as world:`, with a step of that world"
            )
        with self.named(what):
            yield

    @contextmanager
    def named(self, what: str) -> Generator[None]:
        """Wraps an exchange, or the first meeting of all: its failure becomes a `WorkerError`."""
        try:
            yield
        except FunctrainError:
            raise
        except RuntimeError as error:  # how gloo, NCCL and the store report a lost peer
            raise WorkerError(
                f"{self._here()}: {what} failed, after at most {self.timeout:g} s: "
                f"{str(error).splitlines()[0]}. {self._whereabouts()}Start all workers again, from "
                "the newest checkpoint"
            ) from error

    def _here(self) -> str:
        step = "" if self._diary.step is None else f", step {self._diary.step + 1}"
        return f"worker {self.rank} of {self.size}{step}"

    def _whereabouts(self) -> str:
        """The step at which each worker was last heard of; empty before they have met."""
        if not dist.is_initialized():
            return ""
        found: list[str] = []
        # In a thread: if the network is cut, a request to the store may never return.
        asking = threading.Thread(target=_ask, args=(self.size, found), daemon=True)
        asking.start()
        asking.join(_PATIENCE)
        if len(found) < self.size:
            return "The store that knows where the others are (worker 0's) does not answer. "
        heard: dict[str, list[int]] = {}
        for rank, at in enumerate(found):
            heard.setdefault(f"step {int(at) + 1}", []).append(rank)
        parts = [
            f"worker{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))} in {at}"
            for at, ranks in sorted(heard.items())
        ]
        return f"Last heard of: {'; '.join(parts)}. "

    def numbers(self, given: Sequence[int], what: str = "the exchange of counts") -> Tensor:
        """Gather up to eight integers from each worker, equally many: int64 [size, n], on the CPU.

        Here workers find out that they have diverged: all such exchanges have one width and begin
        with a hash of their purpose. Gloo by itself aborts the process where one worker sends more
        than another expects, and mixes up different exchanges of equal length.
        """
        padding = [0] * (_NUMBERS - len(given))
        rows = self.gathered(torch.tensor([hashed(what.encode()), *given, *padding]), what)
        if len(set(rows[:, 0].tolist())) > 1:
            self._parted(what)
        return rows[:, 1 : 1 + len(given)]

    def _parted(self, what: str) -> NoReturn:
        """Raise `WorkerError` on all workers, naming the exchange that each of them is in."""
        step = "" if self._diary.step is None else f" (step {self._diary.step + 1})"
        own = f"{what}{step}".encode()[:_NAME].ljust(_NAME)
        rows = self.gathered(torch.frombuffer(bytearray(own), dtype=torch.uint8), what)
        told = [bytes(row.tolist()).decode(errors="replace").rstrip() for row in rows]
        raise WorkerError(
            f"the workers have parted, and meet in different exchanges: {_versions(told)}; let all "
            "of them call the same things in the same order, and leave a loop after the same step"
        )

    def gathered(self, tensor: Tensor, what: str) -> Tensor:
        """Gather a tensor, of the same shape on every worker: [size, …]."""
        if self.size == 1:
            return tensor.unsqueeze(0)
        with self.meeting(what):
            flat = tensor.contiguous().view(-1)
            found = flat.new_empty(self.size * flat.numel())
            dist.all_gather_single(found, flat)
        return found.view(self.size, *tensor.shape)

    def payloads(self, given: bytes, what: str = "an exchange") -> list[bytes]:
        """Gather bytes, of any length, from every worker."""
        sizes = [_BUSY]
        while _BUSY in sizes:
            sizes = self.numbers([len(given)], what)[:, 0].tolist()
        padded = np.zeros(max(1, *sizes), np.uint8)
        padded[: len(given)] = np.frombuffer(given, np.uint8)
        rows = self.gathered(torch.from_numpy(padded), what)
        return [rows[rank, :size].contiguous().numpy().tobytes() for rank, size in enumerate(sizes)]

    def texts(self, given: str, what: str = "an exchange") -> list[str]:
        """Gather a text from every worker."""
        return [each.decode() for each in self.payloads(given.encode(), what)]

    def from_first(self, make: Callable[[], str], what: str) -> str:
        """What worker 0 makes, however long it takes; if it raises, every worker does."""
        if self.size == 1:
            return make()
        outcome, failure = "", None
        if self.speaks:
            with self._busy(what):
                try:
                    outcome = f"+{make()}"
                except Exception as error:
                    outcome, failure = f"-{_told(error)}", error
        said = self.texts(outcome, what)[0]
        if failure is not None:
            raise failure
        if said.startswith("-"):
            raise _relayed(said[1:], 0)
        return said[1:]

    @contextmanager
    def _busy(self, what: str) -> Generator[None]:
        """Meanwhile a thread regularly tells the others that this worker is still busy."""
        done = threading.Event()
        failures: list[WorkerError] = []

        def tell() -> None:
            try:
                while not done.wait(self.timeout / 3):
                    self.numbers([_BUSY], what)
            except WorkerError as error:
                failures.append(error)

        telling = threading.Thread(target=tell, daemon=True)
        telling.start()
        try:
            yield
        finally:
            done.set()
            telling.join()
        if failures:
            raise failures[0]

    def for_all(self, make: Callable[[], T]) -> T:
        """What this worker makes; if any worker raises, every worker does."""
        return self.counted(lambda: (make(), 0), "what each worker makes")[0]

    def counted(self, make: Callable[[], tuple[T, int]], what: str) -> tuple[T, int]:
        """What this worker makes, and the sum of the workers' counts; raises as `for_all` does."""
        if self.size == 1:
            return make()
        made: list[T] = []
        count, failure = 0, None
        try:
            each, count = make()
            made.append(each)
        except Exception as error:
            failure = error
        rows = self.numbers([failure is not None, count], what)
        if bool(rows[:, 0].any()):
            self._refused(failure)
        return made[0], int(rows[:, 1].sum())

    def total(self, number: int) -> int:
        """The sum of an integer over the workers."""
        if self.size == 1:
            return number
        return int(self.numbers([number], "a sum over the workers").sum())

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any worker."""
        return bool(self.total(int(flag)))

    def agree(self, facts: Mapping[str, str], what: str = "before the first step") -> None:
        """Raise `WorkerError`, on every worker, unless all of them give the same facts."""
        if self.size == 1:
            return
        own = orjson.dumps(dict(facts))
        told = [orjson.loads(text) for text in self.payloads(own, f"the comparison {what}")]
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

    def _refused(self, failure: Exception | None) -> NoReturn:
        said = "" if failure is None else _told(failure)
        told = self.texts(said, "the exchange of an error")
        if failure is not None:
            raise failure
        rank = next(rank for rank, text in enumerate(told) if text)
        raise _relayed(told[rank], rank)


_PATIENCE = 3.0  # seconds for all the answers of the store


def _ask(size: int, found: list[str]) -> None:
    """Append to `found` the step at which each worker was last heard of, if the store answers."""
    with suppress(RuntimeError):
        store = store_of_group()
        store.set_timeout(timedelta(seconds=2))
        for place in map(_place, range(size)):
            found += [store.get(place).decode() if store.check([place]) else "-1"]


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


def _told(error: Exception) -> str:
    how = "refused" if isinstance(error, FunctrainError) else "failed"
    return f"{how}\0{type(error).__name__}\0{error}"


def _relayed(text: str, rank: int) -> WorkerError:
    """Another worker's error, raised here; a `RelayedError` if it is one of functrain's own."""
    how, kind, message = text.split("\0", 2)
    relayed = RelayedError if how == "refused" else WorkerError
    return relayed(f"worker {rank} has {how} ({kind}): {message}")
