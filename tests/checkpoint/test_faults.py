"""A full disk, an I/O error or a missing permission is loud, and loses nothing.

Each operation of a save, a prune and a load fails with each errno, once and from then on. A save
raises `CheckpointError`, a prune warns, a load raises `CheckpointError`; the old checkpoint or the
new one loads, no descriptor is left open, and nothing is left over after the next save.
"""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import tally
from checkpoint import faults
from processes import ended

import functrain as ft
from functrain import checkpoint, keys
from functrain.checkpoint import background
from functrain.checkpoint import files as checkpoint_files
from functrain.checkpoint.filesystem import FileSystem
from functrain.errors import SaveWarning

CODES = {
    code: getattr(errno, code)
    for code in ("ENOSPC", "EIO", "EACCES", "EROFS", "EDQUOT", "EMFILE", "ENOENT", "EINTR")
}
MODES: dict[str, dict[str, bool]] = {
    "once": {},
    "persistent": {"persistent": True},
    "torn": {"torn": True},
    "late": {"late": True},
}


FAULTS = [(code, mode) for code in CODES for mode in ("once", "persistent")]
"""What each operation meets; half a write, and work done but reported as failed, come on top."""

FEW = ("ENOSPC", "EIO")
"""The codes of the modes on top."""

EXTENT = pytest.mark.parametrize(
    "every",
    [pytest.param(False, id="some"), pytest.param(True, id="every", marks=pytest.mark.long)],
)
"""Where an operation fails: see `places`."""


@pytest.fixture
def base() -> Iterator[Path]:
    with faults.scratch() as directory:
        yield directory


def begun(run: Path, count: int = 2) -> Path:
    """A run that has saved a few states."""
    for number in range(count):
        ft.save(run, faults.states()[number])
    return run


@contextmanager
def no_descriptor_leaks() -> Generator[None]:
    """What is open after is what was open before."""
    before = descriptors()
    yield
    assert descriptors() == before, "a descriptor was left open"


def descriptors() -> dict[str, str]:
    """The open descriptors of this process, and of what they are."""
    found = {}
    for path in Path("/proc/self/fd").iterdir():
        try:
            found[path.name] = str(path.readlink())
        except OSError:
            continue  # The descriptor of this very listing.
    return found


def goes_on(run: Path) -> None:
    """The next save works, and leaves nothing but checkpoints and the lock."""
    newest = len(faults.states()) - 1
    ft.save(run, faults.states()[newest])
    assert faults.loaded(run) == newest
    assert faults.leftovers(run) == []


def count_of(run: Path, work: Callable[[Path, FileSystem], object]) -> int:
    """How many operations some work on a copy of a run is."""
    return len(faults.operations(lambda files: work(faults.copy_of(run), files)))


def places(
    run: Path, work: Callable[[Path, FileSystem], object], code: str, mode: str, *, every: bool
) -> list[int]:
    """Which operations of some work on a run are failed with a code in a mode.

    Not `every` one: the first of each kind with each code and mode, and the others shared among
    the codes, so that each fails in each mode.
    """
    operations = faults.operations(lambda files: work(faults.copy_of(run), files))
    if every:
        return list(range(len(operations)))
    codes = list(CODES) if mode in ("once", "persistent") else list(FEW)
    firsts = {operation.name: at for at, operation in reversed(list(enumerate(operations)))}
    return sorted({*firsts.values(), *range(codes.index(code), len(operations), len(codes))})


def save(run: Path, files: FileSystem) -> Path:
    return ft.save(run, faults.states()[2], filesystem=files)


def prune(run: Path, files: FileSystem) -> None:
    checkpoint.prune(run, checkpoint.Keep(last=1, best=1), filesystem=files)


def load(run: Path, files: FileSystem) -> ft.TrainState:
    return ft.load(run, like=faults.states()[0], strict=True, filesystem=files)


@EXTENT
@pytest.mark.parametrize(("code", "mode"), [*FAULTS, *product(FEW, ("torn", "late"))])
def test_an_operation_of_a_save_that_fails_is_loud_and_loses_nothing(
    code: str, mode: str, every: bool, base: Path
) -> None:
    run = begun(base / "run")
    assert count_of(run, save) >= 40
    failed = places(run, save, code, mode, every=every)
    for at in failed:
        copy = faults.copy_of(run)
        failing = faults.Failing(at, CODES[code], **MODES[mode])
        with no_descriptor_leaks(), pytest.raises(ft.CheckpointError, match=str(copy)):
            save(copy, failing)
        assert failing.failed
        assert faults.loaded(copy) in (1, 2)
        assert (copy / "step-000000000001").is_dir()
        faults.intact(copy)
        goes_on(copy)
    tally.add("faults injected", len(failed), part=not every)


@EXTENT
@pytest.mark.parametrize("mode", MODES)
def test_an_operation_that_fails_beside_other_files_is_loud(
    mode: str, every: bool, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large files are written, read and hashed by threads: the same promises hold.

    Which operation is the n-th differs from run to run; not `every`: two modes share the numbers.
    """
    monkeypatch.setattr(checkpoint_files, "_WORTH_THREADS", 0)
    run = begun(base / "run")
    failures, stride = 0, 1 if every else 2
    for at in range(list(MODES).index(mode) % stride, count_of(run, save), stride):
        copy = faults.copy_of(run)
        failing = faults.Failing(at, errno.ENOSPC, **MODES[mode])
        with no_descriptor_leaks(), pytest.raises(ft.CheckpointError, match=str(copy)):
            save(copy, failing)
        failures += bool(failing.failed)
        assert faults.loaded(copy) in (1, 2)
        failing = faults.Failing(at % 20, errno.EIO, **MODES[mode])
        with no_descriptor_leaks(), pytest.raises(ft.CheckpointError, match=str(copy)):
            load(copy, failing)
        goes_on(copy)
    assert failures >= 40 // stride
    tally.add("faults injected", failures, part=not every)


@EXTENT
@pytest.mark.parametrize(("code", "mode"), FAULTS)
def test_an_operation_of_a_first_save_that_fails_is_loud(
    code: str, mode: str, every: bool, base: Path
) -> None:
    """Where the directories are made: the save raises; or is durable, where what failed is the
    fsync of a directory above that this user may not even read."""
    run = base / "runs" / "mine"
    failed = places(run, save, code, mode, every=every)
    for at in failed:
        shutil.rmtree(run.parent, ignore_errors=True)
        failing = faults.Failing(at, CODES[code], **MODES[mode])
        with no_descriptor_leaks():
            try:
                save(run, failing)
            except ft.CheckpointError:
                pass
            else:
                assert failing.failed
                assert code == "EACCES"
                assert {o.name for o in failing.failed} <= {"open_directory", "sync", "close"}
                assert faults.loaded(run) == 2
        goes_on(run)
    tally.add("faults injected", len(failed), part=not every)


@EXTENT
@pytest.mark.parametrize(("code", "mode"), [*FAULTS, *product(FEW, ("late",))])
def test_an_operation_of_a_prune_that_fails_is_a_warning(
    code: str, mode: str, every: bool, base: Path
) -> None:
    run = begun(base / "run", 4)
    assert count_of(run, prune) >= 40
    failed = places(run, prune, code, mode, every=every)
    for at in failed:
        copy = faults.copy_of(run)
        failing = faults.Failing(at, CODES[code], **MODES[mode])
        with no_descriptor_leaks(), pytest.warns(SaveWarning, match="not removed"):
            prune(copy, failing)
        assert failing.failed
        assert faults.loaded(copy) == 3
        faults.intact(copy)
        goes_on(copy)
    tally.add("faults injected", len(failed), part=not every)


@pytest.mark.parametrize(("code", "mode"), FAULTS)
def test_an_operation_of_a_load_that_fails_is_a_checkpoint_error(
    code: str, mode: str, base: Path
) -> None:
    run = begun(base / "run")
    operations = len(faults.operations(lambda files: load(run, files)))
    assert operations >= 30
    for at in range(operations):
        failing = faults.Failing(at, CODES[code], **MODES[mode])
        with no_descriptor_leaks(), pytest.raises(ft.CheckpointError, match=str(run)):
            load(run, failing)
    assert faults.loaded(run) == 1
    tally.add("faults injected", operations)


def test_short_writes_and_reads_change_nothing(base: Path) -> None:
    """The system may take less at once than it was given."""
    run = base / "run"
    whole = begun(base / "whole", 3)
    save(run, faults.Short())
    for path in (whole / "step-000000000002").glob("*.safetensors"):
        assert path.read_bytes() == (run / "step-000000000002" / path.name).read_bytes()
    assert ft.fingerprint(load(run, faults.Short())) == faults.truth(2)


def test_a_failed_fsync_of_the_parent_is_told_apart(base: Path) -> None:
    """The checkpoint is in place, so the message says what is unknown; saving again asks again."""
    run = begun(base / "run")
    names = [o.name for o in faults.operations(lambda files: save(faults.copy_of(run), files))]
    last = len(names) - 1 - names[::-1].index("sync")
    with pytest.raises(ft.CheckpointError, match=r"survive a power cut is unknown.*No space"):
        save(run, faults.Failing(last, errno.ENOSPC))
    syncs = [o.path for o in faults.operations(lambda files: save(run, files)) if o.name == "sync"]
    assert syncs == [run]
    with pytest.raises(ft.CheckpointError, match="could not be saved"):
        save(run, FailingSync())


class FailingSync(faults.Watched):
    """No fsync works."""

    def sync(self, descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_only_the_lock_says_that_another_process_saves(base: Path) -> None:
    """EWOULDBLOCK of any other operation is an error as others are."""
    run = begun(base / "run")
    with pytest.raises(ft.CheckpointError, match="another process is saving here"):
        save(run, faults.Failing(0, errno.EWOULDBLOCK))
    for at in range(1, count_of(run, save)):
        copy = faults.copy_of(run)
        with pytest.raises(ft.CheckpointError) as caught:
            save(copy, faults.Failing(at, errno.EWOULDBLOCK))
        assert "another process" not in str(caught.value), f"operation {at}"


class Forking(faults.Watched):
    """Forks in the middle of a save, as a data loader may; the child lives on."""

    child = 0

    def rename(self, source: Path, target: Path) -> None:
        self.child = faults.forked(lambda: time.sleep(60))
        super().rename(source, target)


def test_a_child_forked_during_a_save_does_not_keep_its_lock(base: Path) -> None:
    """A descriptor that a worker process has inherited must not keep the next save out."""
    forking = Forking()
    save(base / "run", forking)
    try:
        goes_on(base / "run")
    finally:
        os.kill(forking.child, signal.SIGKILL)
        ended(forking.child)


def test_a_file_size_limit_is_loud_and_loses_nothing(base: Path) -> None:
    """RLIMIT_FSIZE, at every size up to that of the largest file: the kernel's own short writes."""
    run = begun(base / "run")
    sizes = [path.stat().st_size for path in (run / "step-000000000001").iterdir()]

    def limited() -> None:
        for size in range(0, max(sizes), 37):
            copy = faults.copy_of(run)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
            with no_descriptor_leaks(), pytest.raises(ft.CheckpointError, match="File too large"):
                ft.save(copy, faults.states()[2])
            resource.setrlimit(
                resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
            )
            assert faults.loaded(copy) == 1
            assert faults.leftovers(copy) == []
            goes_on(copy)

    assert faults.in_child(limited) == 0


def test_too_many_open_files_are_loud_and_lose_nothing(base: Path) -> None:
    """RLIMIT_NOFILE, met by the process itself."""
    run = begun(base / "run")

    def limited() -> None:
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        lowest = os.dup(0)
        os.close(lowest)
        for more in range(2):
            resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + more, hard))
            with pytest.raises(ft.CheckpointError, match="Too many open files"):
                ft.save(run, faults.states()[2])
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
        with pytest.raises(ft.CheckpointError, match="Too many open files"):
            ft.load(run, like=faults.states()[0])
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        assert faults.loaded(run) == 1
        goes_on(run)

    assert faults.in_child(limited) == 0


def unprivileged(work: Callable[[], object]) -> int:
    """How a child without privileges ends: this user's, or nobody's where this one is root."""

    def lowered() -> None:
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
        work()

    return faults.in_child(lowered)


@pytest.mark.parametrize("lock", ["a lock that can be taken", "no lock"])
def test_a_directory_without_permission_is_loud_and_loses_nothing(lock: str, base: Path) -> None:
    run = begun(base / "run")
    base.chmod(0o755)
    (run / ".lock").chmod(0o666)
    if lock == "no lock":
        (run / ".lock").unlink()
    run.chmod(0o555)

    def denied() -> None:
        with no_descriptor_leaks(), pytest.raises(ft.CheckpointError, match="Permission denied"):
            ft.save(run, faults.states()[2])
        with no_descriptor_leaks(), pytest.warns(SaveWarning, match="Permission denied"):
            checkpoint.prune(run, 1)
        assert faults.loaded(run) == 1

    assert unprivileged(denied) == 0
    run.chmod(0o755)
    goes_on(run)


@pytest.mark.parametrize("mode", [0o000, 0o444])
@pytest.mark.parametrize("what", ["above", "run", "step-000000000001", "model.safetensors"])
def test_what_may_not_be_read_is_a_checkpoint_error(what: str, mode: int, base: Path) -> None:
    run = begun(base / "above" / "run")
    path = {p.name: p for p in (base / "above").rglob("*")} | {"above": base / "above"}
    closed = run / "step-000000000001" / what if "." in what else path[what]
    base.chmod(0o755)
    closed.chmod(mode)

    def denied() -> None:
        calls: dict[str, Callable[[], object]] = {
            "load": lambda: ft.load(run, like=faults.states()[0]),
            "load_tensors": lambda: checkpoint.load_tensors(run, "*"),
            "load_model": lambda: checkpoint.load_model(
                run, faults.states()[0].params, faults.states()[0].buffers
            ),
        }
        for call in calls.values():
            if mode == 0o444 and "." in what:
                call()
                continue
            with no_descriptor_leaks(), pytest.raises(ft.CheckpointError, match="denied"):
                call()

    assert unprivileged(denied) == 0
    closed.chmod(0o755)
    assert faults.loaded(run) == 1


@contextmanager
def mounted(directory: Path, options: str) -> Generator[Path]:
    """A tmpfs of its own; the test is skipped where this user may not mount one."""
    directory.mkdir()
    mount = shutil.which("mount")
    command = [mount or "mount", "-t", "tmpfs", "-o", options, "none", str(directory)]
    if mount is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    try:
        yield directory
    finally:
        subprocess.run(["umount", str(directory)], check=True)


@pytest.mark.parametrize("limit", ["size", "nr_inodes"])
def test_a_disk_that_is_really_full_is_loud_and_loses_nothing(limit: str, base: Path) -> None:
    """A tmpfs with room for less and less of a save, by blocks and by files."""
    refused = 0
    with mounted(base / "disk", "size=256k,nr_inodes=64") as disk:
        run = begun(disk / "run")
        for left in range(12):
            filler = disk / "filler"
            filler.mkdir()
            fill(filler, left, limit)
            message = ""
            with no_descriptor_leaks():
                try:
                    ft.save(run, faults.states()[2])
                except ft.CheckpointError as error:
                    message = str(error)
            if message:
                refused += 1
                assert "No space left" in message
                assert faults.loaded(run) == 1
                assert faults.leftovers(run) == []
            shutil.rmtree(filler)
            ft.save(run, faults.states()[2])
            assert faults.loaded(run) == 2
            shutil.rmtree(run / "step-000000000002")
    assert 5 <= refused < 12
    tally.add("disks really full or read-only")


def fill(directory: Path, left: int, limit: str) -> None:
    """Fill the disk of a directory, but for some pages or some inodes."""
    status = os.statvfs(directory)
    if limit == "size":
        with (directory / "pages").open("wb") as file:
            file.write(bytes((status.f_bavail - left) * status.f_frsize))
    else:
        for number in range(status.f_favail - left):
            (directory / str(number)).touch()


def test_a_disk_that_becomes_read_only_is_loud_and_loses_nothing(base: Path) -> None:
    with mounted(base / "disk", "size=256k") as disk:
        run = begun(disk / "run")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with no_descriptor_leaks(), pytest.raises(ft.CheckpointError, match="Read-only"):
            ft.save(run, faults.states()[2])
        with no_descriptor_leaks(), pytest.warns(SaveWarning, match="Read-only"):
            checkpoint.prune(run, 1)
        assert faults.loaded(run) == 1
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        goes_on(run)
    tally.add("disks really full or read-only")


def finished(writer: checkpoint.BackgroundWriter) -> None:
    """Wait until the save in flight has ended, however, without asking for its result."""
    pending: Any = writer._pending
    while not pending.done():
        time.sleep(0.001)


NEXT: dict[str, Callable[[checkpoint.BackgroundWriter], object]] = {
    "check": lambda writer: writer.check(),
    "wait": lambda writer: writer.wait(),
    "save": lambda writer: writer.save(faults.states()[3]),
    "close": lambda writer: writer.close(),
}


@pytest.mark.parametrize("call", NEXT)
def test_a_background_failure_is_raised_by_the_next_call(call: str, base: Path) -> None:
    run = begun(base / "run")
    failing = faults.Failing(20, errno.ENOSPC)
    writer = checkpoint.BackgroundWriter(run, filesystem=failing)
    writer.save(faults.states()[2])
    finished(writer)
    with pytest.raises(ft.CheckpointError, match=r"step 2 could not be saved .*No space"):
        NEXT[call](writer)
    if call != "close":
        # Told once; then the writer goes on.
        writer.check()
        writer.save(faults.states()[4])
        writer.close()
        assert faults.loaded(run) == 4
    assert faults.leftovers(run) == []


def test_every_background_failure_is_loud(base: Path) -> None:
    """Each operation of a save fails beside training, and leaves what it should."""
    run = begun(base / "run")
    for at in range(count_of(run, save)):
        copy = faults.copy_of(run)
        with no_descriptor_leaks():
            writer = checkpoint.BackgroundWriter(copy, filesystem=faults.Failing(at, errno.EIO))
            writer.save(faults.states()[2])
            with pytest.raises(ft.CheckpointError):
                writer.close()
        assert faults.loaded(copy) in (1, 2)
        goes_on(copy)


def test_the_error_that_ends_the_block_is_the_one_to_see(base: Path) -> None:
    def block() -> None:
        failing = faults.Failing(0, errno.EIO, persistent=True)
        with checkpoint.BackgroundWriter(base / "run", filesystem=failing) as writer:
            writer.save(faults.states()[2])
            raise ZeroDivisionError

    with pytest.warns(SaveWarning, match="step 2 could not be saved") as caught:  # noqa: SIM117
        with pytest.raises(ZeroDivisionError):
            block()
    assert len(caught) == 1


class Gate(faults.Watched):
    """Holds each save at its beginning until the gate is opened; counts how many are within."""

    def __init__(self) -> None:
        super().__init__()
        self.open_gate = threading.Event()
        self.entered = threading.Semaphore(0)
        self.within = self.most = 0

    @contextmanager
    def locked(self, path: Path) -> Generator[None]:
        self.within += 1
        self.most = max(self.most, self.within)
        self.entered.release()
        assert self.open_gate.wait(60)
        try:
            with super().locked(path):
                yield
        finally:
            self.within -= 1


def test_at_most_one_background_save_is_in_flight(base: Path) -> None:
    """Another waits for it; `check` does not."""
    gate = Gate()
    writer = checkpoint.BackgroundWriter(base / "run", filesystem=gate)
    writer.save(faults.states()[0])
    assert gate.entered.acquire(timeout=60)
    writer.check()
    second = threading.Thread(target=lambda: writer.save(faults.states()[1]))
    second.start()
    second.join(0.3)
    assert second.is_alive()
    assert not gate.entered.acquire(blocking=False)
    gate.open_gate.set()
    second.join(60)
    writer.close()
    assert gate.most == 1
    assert faults.loaded(base / "run" / "step-000000000000") == 0
    assert faults.loaded(base / "run") == 1


@contextmanager
def interrupted() -> Generator[None]:
    """A KeyboardInterrupt in the midst of what waits here."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, interrupt)
    timer = threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGUSR1))
    try:
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            yield
    finally:
        timer.join()
        signal.signal(signal.SIGUSR1, before)


def test_an_interrupted_wait_leaves_what_is_being_written_alone(base: Path) -> None:
    """Nothing is copied into its memory, and it is waited for again."""
    gate = Gate()
    writer = checkpoint.BackgroundWriter(base / "run", filesystem=gate)
    writer.save(faults.states()[1])
    with interrupted():
        writer.save(faults.states()[2])
    last = threading.Thread(target=lambda: writer.save(faults.states()[3]))
    last.start()
    last.join(0.1)
    gate.open_gate.set()
    last.join(60)
    writer.close()
    assert faults.loaded(base / "run" / "step-000000000001") == 1
    assert faults.loaded(base / "run") == 3


class Full(Gate):
    """A gate before a disk without room."""

    def create(self, path: Path) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_failure_outlives_an_interrupted_wait(base: Path) -> None:
    full = Full()
    writer = checkpoint.BackgroundWriter(base / "run", filesystem=full)
    writer.save(faults.states()[1])
    with interrupted():
        writer.wait()
    full.open_gate.set()
    with pytest.raises(ft.CheckpointError, match=r"step 1 could not be saved .*No space"):
        writer.close()


def test_a_closed_writer_and_no_state_are_named(base: Path) -> None:
    with checkpoint.BackgroundWriter(base / "run") as writer:
        bad: Any = "state"
        with pytest.raises(ft.StateError, match="expected a TrainState"):
            writer.save(bad)
    with pytest.raises(ft.CheckpointError, match="closed; make another"):
        writer.save(faults.states()[0])
    assert not (base / "run").exists()


def test_a_state_in_shards_is_told_how_it_is_saved(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "is_sharded", lambda _: True)
    with checkpoint.BackgroundWriter(base / "run") as writer:
        with pytest.raises(ft.ConfigError, match=r"shards .*every worker calls functrain\.save"):
            writer.save(faults.states()[0])
        assert writer.wait() is None


def test_a_donated_step_changes_nothing_that_is_being_written(base: Path) -> None:
    """What loads is the state at the call of `save`, at every save, though each state's memory is
    given to the next step while the save is held."""
    with keys.seeded(0):
        _, params, buffers = ft.split(faults.Tiny())
    state = faults.step().init(params, buffers, seed=9)
    batch = {"input_ids": faults.IDS, "labels": faults.IDS}
    expected = {}
    gate = Gate()
    with checkpoint.BackgroundWriter(base / "run", filesystem=gate) as writer:
        for _ in range(6):
            expected[state.step] = ft.fingerprint(state)
            gate.open_gate.clear()
            writer.save(state)
            state, _ = faults.step()(state, batch, donate=True)
            gate.open_gate.set()
            writer.wait()
    assert len(set(expected.values())) == 6
    for number, fingerprint in expected.items():
        path = base / "run" / f"step-{number:012d}"
        assert ft.fingerprint(ft.load(path, like=state)) == fingerprint


def test_a_background_prune_that_fails_is_a_warning_and_the_save_counts(base: Path) -> None:
    run = begun(base / "run", 4)
    saving = count_of(run, lambda r, f: ft.save(r, faults.states()[4], filesystem=f))
    failing = faults.Failing(saving + 6, errno.EIO)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with checkpoint.BackgroundWriter(run, keep=2, filesystem=failing) as writer:
            writer.save(faults.states()[4])
            assert writer.wait() == run / "step-000000000004"
    assert [w.category for w in caught] == [SaveWarning]
    assert faults.loaded(run) == 4
    goes_on(run)
