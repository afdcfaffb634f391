"""File systems that record, kill, fail and tear; and the small states that are saved on them.

The operations are counted from 0 in the order in which they are asked for, whatever they are, so
that a first run without a fault says how many there are and which.
"""

from __future__ import annotations

import functools
import os
import shutil
import signal
import tempfile
import threading
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import torch
from processes import ended
from torch import Tensor, nn

import functrain as ft
from functrain import keys
from functrain.checkpoint.filesystem import FileSystem

LEFTOVERS = (".tmp-", ".trash-")
"""How the names begin of what a killed save or prune leaves behind."""


@attrs.frozen
class Operation:
    """One call of a file system: its name, the path (of a descriptor: what it was opened as)."""

    name: str
    path: Path
    target: Path | None = None
    data: bytes = b""


class Watched(FileSystem):
    """The operating system's, with each operation passed through `around`."""

    def __init__(self) -> None:
        self._paths: dict[int, Path] = {}

    def around(self, operation: Operation, perform: Callable[[], Any]) -> Any:
        """Do an operation; what a subclass makes different."""
        return perform()

    def torn(self, descriptor: int, data: memoryview) -> int:
        """Half of a write."""
        return super().write(descriptor, data[: len(data) // 2])

    def mkdir(self, path: Path) -> None:
        self.around(Operation("mkdir", path), lambda: FileSystem.mkdir(self, path))

    def create(self, path: Path) -> int:
        return self._opened("create", path, FileSystem.create)

    def write(self, descriptor: int, data: memoryview) -> int:
        operation = Operation("write", self._paths[descriptor], data=bytes(data))
        count: int = self.around(operation, lambda: FileSystem.write(self, descriptor, data))
        return count

    def sync(self, descriptor: int) -> None:
        operation = Operation("sync", self._paths[descriptor])
        self.around(operation, lambda: FileSystem.sync(self, descriptor))

    def close(self, descriptor: int) -> None:
        operation = Operation("close", self._paths[descriptor])
        self.around(operation, lambda: FileSystem.close(self, descriptor))

    def open_directory(self, path: Path) -> int:
        return self._opened("open_directory", path, FileSystem.open_directory)

    def rename(self, source: Path, target: Path) -> None:
        operation = Operation("rename", source, target)
        self.around(operation, lambda: FileSystem.rename(self, source, target))

    def unlink(self, path: Path) -> None:
        self.around(Operation("unlink", path), lambda: FileSystem.unlink(self, path))

    def rmdir(self, path: Path) -> None:
        self.around(Operation("rmdir", path), lambda: FileSystem.rmdir(self, path))

    def list(self, path: Path) -> list[str]:
        names: list[str] = self.around(Operation("list", path), lambda: FileSystem.list(self, path))
        return names

    def open(self, path: Path) -> int:
        return self._opened("open", path, FileSystem.open)

    def stat(self, descriptor: int) -> os.stat_result:
        operation = Operation("stat", self._paths[descriptor])
        found: os.stat_result = self.around(operation, lambda: FileSystem.stat(self, descriptor))
        return found

    def read(self, descriptor: int, into: memoryview) -> int:
        operation = Operation("read", self._paths[descriptor])
        count: int = self.around(operation, lambda: FileSystem.read(self, descriptor, into))
        return count

    def map(self, descriptor: int, size: int) -> Any:
        operation = Operation("map", self._paths[descriptor])
        return self.around(operation, lambda: FileSystem.map(self, descriptor, size))

    @contextmanager
    def locked(self, path: Path) -> Generator[None]:
        held = FileSystem.locked(self, path)
        self.around(Operation("lock", path), held.__enter__)
        try:
            yield
        finally:
            held.__exit__(None, None, None)

    def _opened(self, name: str, path: Path, call: Callable[[FileSystem, Path], int]) -> int:
        descriptor: int = self.around(Operation(name, path), lambda: call(self, path))
        self._paths[descriptor] = path
        return descriptor


class Recording(Watched):
    """Remembers each operation that has succeeded, in order, with what was written."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []

    def around(self, operation: Operation, perform: Callable[[], Any]) -> Any:
        result = perform()
        if operation.name == "write":
            operation = attrs.evolve(operation, data=operation.data[:result])
        self.operations.append(operation)
        return result


class Killing(Watched):
    """Kills its process before the `at`-th operation; with `half`, in the middle of that write."""

    def __init__(self, at: int, *, half: bool = False) -> None:
        super().__init__()
        self._left, self._half = at, half

    def around(self, operation: Operation, perform: Callable[[], Any]) -> Any:
        self._left -= 1
        if self._left < 0 and not self._half:
            os.kill(os.getpid(), signal.SIGKILL)
        return perform()

    def write(self, descriptor: int, data: memoryview) -> int:
        if self._half and self._left == 0:
            self.torn(descriptor, data)
            os.kill(os.getpid(), signal.SIGKILL)
        return super().write(descriptor, data)


class Failing(Watched):
    """Raises an errno at the `at`-th operation, and with `persistent` at all from then on.

    A close fails as Linux lets it fail: the descriptor is closed all the same. `torn`: a write that
    fails has written half before. `late`: the operation has been done when it fails, as over a
    network whose answer was lost.
    """

    def __init__(
        self,
        at: int,
        code: int,
        *,
        persistent: bool = False,
        torn: bool = False,
        late: bool = False,
    ) -> None:
        super().__init__()
        self._at, self._code, self._persistent = at, code, persistent
        self._torn, self._late = torn, late
        self._count, self._counting = 0, threading.Lock()
        self.failed: list[Operation] = []

    def around(self, operation: Operation, perform: Callable[[], Any]) -> Any:
        with self._counting:  # large files are written by several threads
            count, self._count = self._count, self._count + 1
        due = count >= self._at if self._persistent else count == self._at
        if not due:
            return perform()
        self.failed.append(operation)
        opens = operation.name in ("create", "open", "open_directory", "lock")
        if operation.name == "close" or (self._late and not opens):
            perform()
        raise OSError(self._code, os.strerror(self._code))

    def write(self, descriptor: int, data: memoryview) -> int:
        if self._torn and self._count == self._at:
            self.torn(descriptor, data)
        return super().write(descriptor, data)


class Short(Watched):
    """Writes and reads as little at once as the system may: one byte, or half."""

    def write(self, descriptor: int, data: memoryview) -> int:
        return super().write(descriptor, data[: max(1, len(data) // 2)])

    def read(self, descriptor: int, into: memoryview) -> int:
        return super().read(descriptor, into[: max(1, len(into) // 2)])


IDS = torch.tensor([[0, 1, 2, 3]])
"""A batch of `Tiny`'s, and its labels."""


class Tiny(nn.Module):
    """The smallest model with every kind of tensor that a checkpoint has a file for."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, 2)
        self.head = nn.Linear(2, 4, bias=False)
        self.register_buffer("scale", torch.ones(1))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        logits: Tensor = self.head(self.embedding(input_ids)) * self.scale
        return logits


@functools.cache
def step() -> ft.Step:
    """A step of `Tiny`, with an optimizer that has a slot."""
    architecture, _, _ = ft.split(Tiny())
    return ft.pretrain_step(architecture, ft.optim.sgd(0.1, momentum=0.9))


@functools.cache
def states(count: int = 8) -> tuple[ft.TrainState, ...]:
    """The states of a run: `states()[n]` is after n steps, and no two are alike."""
    with keys.seeded(0):
        _, params, buffers = ft.split(Tiny())
    found = [step().init(params, buffers, seed=5)]
    for _ in range(count - 1):
        state, _ = step()(found[-1], {"input_ids": IDS, "labels": IDS})
        found.append(state)
    return tuple(found)


@functools.cache
def truth(number: int) -> str:
    """The fingerprint of `states()[number]`."""
    return ft.fingerprint(states()[number])


def loaded(directory: Path) -> int:
    """The step of what loads from a directory, after its fingerprint has been compared."""
    state = ft.load(directory, like=states()[0], strict=True)
    assert ft.fingerprint(state) == truth(state.step), f"{directory}: step {state.step} is wrong"
    return state.step


_INTACT: set[object] = set()


def intact(run: Path) -> None:
    """Every checkpoint of a run loads; the same bytes under the same name are loaded once."""
    for path in run.glob("step-*"):
        content = (path.name, frozenset((p.name, p.read_bytes()) for p in path.iterdir()))
        if content not in _INTACT:
            loaded(path)
            _INTACT.add(content)


def telling(names: Sequence[str], changes: Sequence[bool]) -> list[int]:
    """Before which calls a kill tells something: the first, each that comes after one that changes
    files, and the first of each name. Before the others it leaves the files as these do."""
    return [
        at for at, name in enumerate(names) if at == 0 or changes[at - 1] or name not in names[:at]
    ]


def leftovers(directory: Path) -> list[str]:
    """What a killed or failed save or prune has left in a directory of checkpoints."""
    return sorted(p.name for p in directory.iterdir() if p.name.startswith(LEFTOVERS))


@contextmanager
def scratch() -> Generator[Path]:
    """A directory in memory where there is one: what is tested is the order of operations, and a
    real fsync for each would take the time that thousands of states have."""
    memory = Path("/dev/shm")
    usable = memory.is_dir() and os.access(memory, os.W_OK | os.X_OK)
    with tempfile.TemporaryDirectory(dir=memory if usable else None) as directory:
        yield Path(directory)


def operations(work: Callable[[FileSystem], object]) -> list[Operation]:
    """The operations of some work that nothing disturbs."""
    recording = Recording()
    work(recording)
    return recording.operations


def forked(work: Callable[[], object]) -> int:
    """The id of a forked process that does some work.

    A fork shares the imported torch, which costs seconds to import; it is safe here, as the work
    uses one thread. An exception ends it with status 1, and its text goes to stderr.
    """
    with warnings.catch_warnings():
        # Newer Pythons warn of a fork beside the threads of the test runner.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
            os._exit(1)
        os._exit(0)
    return child


def in_child(work: Callable[[], object]) -> int:
    """How a forked process that does some work ends: its exit code, as of `processes.ended`."""
    states(), ft.checkpoint.numerics()  # computed once, in the parent
    return ended(forked(work))


def was_killed(code: int) -> bool:
    """Whether an exit code is that of a process killed by SIGKILL."""
    return code == -signal.SIGKILL


def copy_of(run: Path) -> Path:
    """A copy of a run to work on; of one that has not begun, where it may begin."""
    copy = run.with_name("copy")
    if copy.exists():
        shutil.rmtree(copy)
    if run.exists():
        shutil.copytree(run, copy, copy_function=shutil.copyfile)
    return copy
