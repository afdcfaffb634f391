"""A power cut loses no acknowledged checkpoint, and makes no wrong one.

Runs are recorded operation by operation, and replayed on a model of a disk up to each point. What
the disk may hold after a cut there is enumerated: a file's data that was not fsynced is absent,
cut anywhere, or there in length but not in content (zeros); an entry of a directory that was not
fsynced is there or not, in the order of the changes to that directory ("ordered", as a journal has
it) or in none ("unordered"). Each such state is made a directory, and the store is asked for what
it promises.
"""

from __future__ import annotations

import itertools
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attrs
import pytest
import tally
from checkpoint import faults
from checkpoint.faults import Operation

import functrain as ft
from functrain import checkpoint
from functrain.checkpoint import files
from functrain.checkpoint.filesystem import remove_directory
from functrain.checkpoint.manifest import directory_name, step_of

Tree = dict[str, Any]
"""A directory: the names in it, each with the bytes of a file or with another tree."""

Pick = Callable[[int], int]


@attrs.define
class Acknowledged:
    """In a record: a save of this step has returned."""

    step: int


@attrs.define
class Killed:
    """In a record: a process has been killed, and the next one goes on."""


Event = Operation | Acknowledged | Killed


class Stopped(BaseException):
    """The process has been killed here; the machine runs on."""


class Journal(faults.Recording):
    """Records saves and prunes in one list, each perhaps stopped before its n-th operation."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Event] = []
        self.left: int | None = None

    def around(self, operation: Operation, perform: Callable[[], Any]) -> Any:
        if self.left is not None:
            if self.left == 0:
                if operation.name == "close":
                    perform()
                raise Stopped
            self.left -= 1
        result = super().around(operation, perform)
        self.events.append(self.operations[-1])
        return result


Action = tuple[Any, ...]
"""`("save", step)` or `("prune", keep)`, with a third: before which operation it was killed."""


def record(run: Path, actions: list[Action], journal: Journal) -> list[Event]:
    """What happens to the disk in a run of these actions."""
    for what, number, *killed in actions:
        journal.left = killed[0] if killed else None
        try:
            if what == "save":
                ft.save(run, faults.states()[number], filesystem=journal)
                journal.events.append(Acknowledged(number))
            else:
                checkpoint.prune(run, number, filesystem=journal)
        except Stopped:
            assert killed
            journal.events.append(Killed())
    return journal.events


class Node:
    """A file or directory on the modelled disk: what is durable of it, and what is not yet."""

    def __init__(self, directory: bool) -> None:
        self.directory = directory
        self.now: dict[str, Node] = {}
        self.durable: dict[str, Node] = {}
        self.pending: list[tuple[str | None, str | None, Node]] = []
        self.data = b""
        self.ends = [0]  # where each write ended; what is before the first is durable
        self._contents: list[bytes] = []  # found once for all cuts until the next change

    def change(self, removed: str | None, added: str | None, node: Node) -> None:
        """Change an entry, or rename one, not yet durably."""
        apply(self.now, (removed, added, node))
        self.pending.append((removed, added, node))

    def sync(self) -> None:
        """Make what there is durable: of a directory its entries, of a file its data."""
        self.durable, self.pending = dict(self.now), []
        self.ends, self._contents = self.ends[-1:], []

    def write(self, data: bytes) -> None:
        """Add to a file, not yet durably."""
        self.data += data
        self.ends.append(len(self.data))
        self._contents = []

    def contents(self) -> list[bytes]:
        """What a file may hold after a cut."""
        if self._contents:
            return self._contents
        found = []
        for begin, end in itertools.pairwise([*self.ends, self.ends[-1]]):
            for kept in (begin, (begin + end) // 2):
                found.append(self.data[:kept])
                found.append(self.data[:kept].ljust(len(self.data), b"\0"))
        self._contents = list(dict.fromkeys(found))
        return self._contents

    def files(self) -> Iterator[Node]:
        """The files below a directory."""
        for node in self.now.values():
            if node.directory:
                yield from node.files()
            else:
                yield node

    def whole(self, torn: Node, content: bytes) -> Tree:
        """The tree with every change done, and one file with another content."""
        return {
            name: node.whole(torn, content)
            if node.directory
            else (content if node is torn else node.data)
            for name, node in sorted(self.now.items())
        }

    def crashed(self, pick: Pick, ordered: bool) -> Tree:
        """One of the trees that a directory may be after a cut; `pick(n)` chooses below n."""
        entries = dict(self.durable)
        if ordered:
            happened = self.pending[: pick(len(self.pending) + 1)]
        else:
            happened = [change for change in self.pending if pick(2)]
        for change in happened:
            apply(entries, change)
        tree: Tree = {}
        for name, node in sorted(entries.items()):
            if node.directory:
                tree[name] = node.crashed(pick, ordered)
            else:
                contents = node.contents()
                tree[name] = contents[pick(len(contents))]
        return tree


def apply(entries: dict[str, Node], change: tuple[str | None, str | None, Node]) -> None:
    """Make one change to the entries of a directory."""
    removed, added, node = change
    if removed is not None:
        entries.pop(removed, None)
    if added is not None:
        entries[added] = node


class Disk:
    """The model of a disk, with operations replayed on it."""

    def __init__(self, base: Path) -> None:
        self._base = base
        self.root = Node(directory=True)

    def replay(self, operation: Operation) -> None:
        """Do an operation on the model; those that change nothing are passed over."""
        name, path = operation.name, operation.path
        if not path.is_relative_to(self._base):
            assert name == "sync", f"{operation} is outside of the recorded directory"
        elif name == "sync":
            self._at(path).sync()
        elif name == "write":
            self._at(path).write(operation.data)
        elif name in ("mkdir", "create"):
            self._at(path.parent).change(None, path.name, Node(directory=name == "mkdir"))
        elif name in ("unlink", "rmdir"):
            self._at(path.parent).change(path.name, None, self._at(path))
        elif name == "rename":
            assert operation.target is not None
            assert operation.target.parent == path.parent
            self._at(path.parent).change(path.name, operation.target.name, self._at(path))

    def _at(self, path: Path) -> Node:
        node = self.root
        for name in path.relative_to(self._base).parts:
            node = node.now[name]
        return node


CHANGES = ("write", "mkdir", "create", "unlink", "rmdir", "rename", "sync")


@attrs.define
class Promise:
    """What must load after a cut: the newest acknowledged, and each that no prune has begun on."""

    acknowledged: set[int] = attrs.field(factory=set)
    pruned: set[int] = attrs.field(factory=set)

    def frozen(self) -> tuple[frozenset[int], frozenset[int]]:
        return frozenset(self.acknowledged), frozenset(self.pruned)


def cuts(events: list[Event], base: Path, most: int) -> Iterator[tuple[Tree, Promise]]:
    """The states that a cut at each point may leave, with what was promised there; no state twice.

    Where a point has more than `most` states in a model of the disk, the first `most` of them are
    taken and as many at random. Of a run with a kill, only the cuts after it are.
    """
    disk, promise = Disk(base), Promise()
    seen: set[object] = set()
    kills = sum(isinstance(event, Killed) for event in events)
    for count, event in enumerate(events):
        if isinstance(event, Acknowledged):
            promise.acknowledged.add(event.step)
        elif isinstance(event, Killed):
            kills -= 1
        elif event.name not in CHANGES:
            continue
        else:
            if event.name == "rename" and event.target and event.target.name.startswith(".trash-"):
                step = step_of(event.path)
                assert step is not None
                promise.pruned.add(step)
            disk.replay(event)
        if kills:
            continue
        for ordered in (True, False):
            make = lambda pick, o=ordered: disk.root.crashed(pick, o)  # noqa: E731
            for tree in enumerated(make, most, random.Random(count)):
                key = (hashable(tree), promise.frozen())
                if key not in seen:
                    seen.add(key)
                    yield tree, attrs.evolve(promise)


def enumerated(
    make: Callable[[Pick], Tree], most: int, randomness: random.Random
) -> Iterator[Tree]:
    """What `make` makes of every sequence of choices; of more than `most`, some at random."""
    script: list[int] = []
    for _ in range(most):
        sizes: list[int] = []

        def pick(
            size: int, sizes: list[int] = sizes, script: tuple[int, ...] = tuple(script)
        ) -> int:
            sizes.append(size)
            return script[len(sizes) - 1] if len(sizes) <= len(script) else 0

        yield make(pick)
        script = [*script, *[0] * (len(sizes) - len(script))]
        while script and script[-1] == sizes[len(script) - 1] - 1:
            script.pop()
        if not script:
            return
        script[-1] += 1
    for _ in range(most):
        yield make(randomness.randrange)


def hashable(tree: Tree) -> object:
    """A tree as a value that a set takes."""
    return tuple(
        (name, hashable(value) if isinstance(value, dict) else value)
        for name, value in tree.items()
    )


class Checker:
    """Makes states real directories, and asks the store for its promises.

    Of what else is in their directory a load sees the names at most: where the checkpoints and
    those names are the ones of a state before, its answer is taken, and the state is skipped. One
    in 20, or another number, is made all the same and gone on from, as a save looks at the rest.
    """

    def __init__(self, directory: Path, one_in: int = 20) -> None:
        self._directory, self._one_in = directory, one_in
        self._answers: dict[object, list[str]] = {}
        self.states = 0  # made and loaded
        self.skipped = 0
        self.resaved = 0

    def check(self, tree: Tree, promise: Promise, *, honest: bool = True) -> list[str]:
        """What is broken in a state; a disk that is not honest about fsync may lose, not lie."""
        found = tree.get("runs", {}).get("mine", {})
        shown = {name: t for name, t in found.items() if step_of(Path(name)) is not None}
        key = (hashable(shown), frozenset(found), promise.frozen(), honest)
        goes_on = honest and (self.states + self.skipped + 1) % self._one_in == 0
        if key in self._answers and not goes_on:
            self.skipped += 1
            return self._answers[key]
        self.states += 1
        run = self._made(tree)
        broken = self._answers[key] = self._broken(run, shown, promise, honest)
        return self._goes_on(run) if goes_on and not broken else broken

    def _made(self, tree: Tree) -> Path:
        base = self._directory / "disk"
        if base.exists():
            shutil.rmtree(base)
        write_tree(base, tree)
        return base / "runs" / "mine"

    def _broken(self, run: Path, shown: Tree, promise: Promise, honest: bool) -> list[str]:
        visible: dict[int, int | None] = {}
        wrong = []
        for name in shown:
            step = step_of(Path(name))
            assert step is not None
            visible[step] = verdict = self._verdict(run / name)
            if verdict not in (None, step):
                wrong.append(f"step {step} loads, and is wrong")
        wrong += self._newest(run, max(promise.acknowledged, default=None))
        if not honest:
            return wrong
        broken = wrong + [f"step {step} is there, torn" for step, v in visible.items() if v is None]
        for step in promise.acknowledged - promise.pruned:
            if visible.get(step) is None:
                broken.append(f"step {step} was acknowledged, and does not load")
        return broken

    def _verdict(self, path: Path) -> int | None:
        """The step of a directory's state: None where it is refused, -1 where it is wrong."""
        try:
            return faults.loaded(path)
        except ft.CheckpointError:
            return None
        except AssertionError:
            return -1

    def _newest(self, run: Path, acknowledged: int | None) -> list[str]:
        """What is wrong with what the run itself loads, which may be nothing before the first."""
        try:
            step = faults.loaded(run)
        except AssertionError as error:
            return [f"the newest loads, and is wrong: {error}"]
        except ft.CheckpointError as error:
            return [] if acknowledged is None else [f"the newest does not load: {error}"]
        if acknowledged is None or step >= acknowledged:
            return []
        return [f"{acknowledged} was acknowledged, {step} loads"]

    def _goes_on(self, run: Path) -> list[str]:
        """After the cut the run goes on: a save and a prune leave what they should and no more."""
        self.resaved += 1
        ft.save(run, faults.states()[-1])
        checkpoint.prune(run, 1)
        names = sorted(p.name for p in run.iterdir())
        expected = [".lock", directory_name(len(faults.states()) - 1)]
        return [] if names == expected else [f"after another save there is {names}"]


def write_tree(directory: Path, tree: Tree) -> None:
    """Make a tree real."""
    directory.mkdir()
    for name, content in tree.items():
        if isinstance(content, dict):
            write_tree(directory / name, content)
        else:
            (directory / name).write_bytes(content)


ORDINARY: list[Action] = [
    ("save", 0),
    ("save", 1),
    ("prune", 2),
    ("save", 2),
    ("prune", 2),
    ("save", 3),
    ("save", 4),
    ("prune", 1),
]
"""A run as most are: it saves, prunes, and nothing happens to it."""

SAVE = 41
"""The operations of a save of the smallest state into a directory of checkpoints."""

PRUNE = 14
"""The operations of a prune of one checkpoint."""

AFTER_SAVE: dict[str, list[Action]] = {
    "the same again": [("save", 1), ("save", 2)],
    "the next": [("save", 2)],
    "a prune": [("prune", 1), ("save", 2)],
}


def stops(begin: list[Action], action: Action) -> list[int]:
    """Before which operations of an action, after others, a kill leaves a disk of its own: the
    first, and whatever comes after a change."""
    with faults.scratch() as base:
        run, journal = base / "runs" / "mine", Journal()
        before = len(record(run, begin, journal))
        events = [e for e in record(run, [action], journal)[before:] if isinstance(e, Operation)]
    return [at for at in range(len(events)) if not at or events[at - 1].name in CHANGES]


def killed_saves() -> dict[str, list[Action]]:
    """Runs with a save that is killed at each of its stops, and go on in each way."""
    return {
        f"save killed at {at}, then {how}": [("save", 0), ("save", 1, at), *after]
        for at in stops([("save", 0)], ("save", 1))
        for how, after in AFTER_SAVE.items()
    }


def killed_prunes() -> dict[str, list[Action]]:
    """Runs with a prune that is killed at each of its stops, then save or prune."""
    begin: list[Action] = [("save", 0), ("save", 1), ("save", 2)]
    return {
        f"prune killed at {at}, then {after[0]}": [*begin, ("prune", 1, at), after, ("save", 4)]
        for at in stops(begin, ("prune", 1))
        for after in (("save", 3), ("prune", 1))
    }


def killed_first_saves() -> dict[str, list[Action]]:
    """Runs whose first save is killed at its first stops, where it makes the directories."""
    first = [at for at in stops([], ("save", 0)) if at < 10]
    return {f"first save killed at {at}": [("save", 0, at), ("save", 1)] for at in first}


def checked(
    base: Path, actions: list[Action], checker: Checker, most: int, journal: Journal | None = None
) -> list[str]:
    """What the first broken state over every cut of a run breaks; nothing where all hold."""
    disk = base / "recorded"
    if disk.exists():
        shutil.rmtree(disk)
    disk.mkdir()
    events = record(disk / "runs" / "mine", actions, journal or Journal())
    for tree, promise in cuts(events, disk, most):
        broken = checker.check(tree, promise)
        if broken:
            return broken
    return []


@pytest.fixture
def base() -> Iterator[Path]:
    with faults.scratch() as directory:
        yield directory


def test_a_power_cut_at_any_point_of_a_run_loses_nothing(base: Path) -> None:
    checker = Checker(base)
    assert checked(base, ORDINARY, checker, 150) == []
    assert checker.states >= 200
    assert checker.skipped >= 3_000
    assert checker.resaved >= 150
    tally.add("power-loss states", checker.states, part=True, of="a run")


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_power_cut_at_any_point_of_a_run_loses_nothing_long(base: Path) -> None:
    checker = Checker(base)
    assert checked(base, ORDINARY, checker, 5000) == []
    assert checker.states >= 1_300
    assert checker.skipped >= 25_000
    tally.add("power-loss states", checker.states, of="a run")


def broken_by_a_cut(base: Path, runs: dict[str, list[Action]], checker: Checker) -> dict[str, Any]:
    """The runs of those in which a cut breaks something, and what."""
    found = {name: checked(base, actions, checker, 4) for name, actions in runs.items()}
    return {name: broken for name, broken in found.items() if broken}


def test_a_power_cut_after_a_kill_loses_nothing(base: Path) -> None:
    """What a killed process had not fsynced is not taken for durable by the next one."""
    checker = Checker(base)
    killed = {**killed_saves(), **killed_prunes(), **killed_first_saves()}
    assert broken_by_a_cut(base, killed, checker) == {}
    assert len(killed) == 133
    assert checker.states >= 700
    assert checker.skipped >= 10_000
    tally.add("power-loss states", checker.states)


def killed_twice() -> dict[str, list[Action]]:
    """Runs with a save or prune killed anywhere, and what comes next killed anywhere too."""
    begin: list[Action] = [("save", 0), ("save", 1)]
    firsts: list[Action] = [("save", 2), ("prune", 1)]
    seconds: list[Action] = [("save", 2), ("save", 3), ("prune", 1)]
    return {
        f"{first} killed at {at}, {second} at {then}": [
            *begin,
            (*first, at),
            (*second, then),
            ("save", 3),
            ("prune", 1),
        ]
        for first in firsts
        for second in seconds
        for at in range(SAVE if first[0] == "save" else PRUNE)
        for then in range(SAVE if second[0] == "save" else PRUNE)
    }


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_a_power_cut_after_two_kills_loses_nothing(base: Path) -> None:
    checker = Checker(base, one_in=200)
    assert broken_by_a_cut(base, killed_twice(), checker) == {}
    assert checker.states >= 3_000
    assert checker.skipped >= 500_000
    tally.add("power-loss states", checker.states)


class NoSync(Journal):
    """A mutant: without the fsync of some paths."""

    def __init__(self, without: Callable[[Path], bool]) -> None:
        super().__init__()
        self._without = without

    def sync(self, descriptor: int) -> None:
        if not self._without(self._paths[descriptor]):
            super().sync(descriptor)


class InPlace(Journal):
    """A mutant: the files are written where they will be, and nothing is renamed."""

    def mkdir(self, path: Path) -> None:
        super().mkdir(self._final(path))

    def create(self, path: Path) -> int:
        return super().create(self._final(path))

    def open_directory(self, path: Path) -> int:
        return super().open_directory(self._final(path))

    def rename(self, source: Path, target: Path) -> None:
        if self._final(source) != target:
            super().rename(source, target)

    def _final(self, path: Path) -> Path:
        return Path(str(path).replace("/.tmp-step-", "/step-"))


class PrunesFirst(Journal):
    """A mutant: the older checkpoints go before the new one is durable."""

    def rename(self, source: Path, target: Path) -> None:
        if target.name.startswith("step-"):
            for old in sorted(target.parent.glob("step-*")):
                trash = old.with_name(f".trash-{old.name}")
                super().rename(old, trash)
                remove_directory(self, trash)
        super().rename(source, target)


MUTANTS: dict[str, Callable[[], Journal]] = {
    "no file fsync": lambda: NoSync(lambda path: path.suffix in (".json", ".safetensors")),
    "no manifest fsync": lambda: NoSync(lambda path: path.name == "manifest.json"),
    "no temporary-directory fsync": lambda: NoSync(lambda path: path.name.startswith(".tmp-")),
    "no parent fsync": lambda: NoSync(lambda path: path.name == "mine"),
    "no fsync of the parent's parent": lambda: NoSync(lambda path: path.name == "runs"),
    "written in place": InPlace,
    "pruned first": PrunesFirst,
}


SAVES: list[Action] = [("save", 0), ("save", 1), ("save", 2)]


def test_the_protocol_with_all_of_its_steps_passes(base: Path) -> None:
    """Over the very states in which its mutants are caught."""
    assert checked(base, SAVES, Checker(base), 20) == []


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_protocol_without_one_of_its_steps_is_caught(mutant: str, base: Path) -> None:
    """The checker sees each mistake that it is there for."""
    assert checked(base, SAVES, Checker(base), 20, MUTANTS[mutant]()) != []
    tally.add("protocol mutants caught")


def lied(base: Path, checker: Checker) -> list[str]:
    """What loads and is wrong where fsync has lied about one file, whichever and however."""
    disk = base / "recorded"
    disk.mkdir()
    events = record(disk / "runs" / "mine", ORDINARY[:3], Journal())
    model = Disk(disk)
    for event in events:
        # Without the syncs of files, all that they may hold is still open.
        if not isinstance(event, Operation) or event.name not in CHANGES:
            continue
        if event.name != "sync" or not event.path.suffix:
            model.replay(event)
    broken = []
    for torn in model.root.files():
        for content in torn.contents():
            broken += checker.check(model.root.whole(torn, content), Promise(), honest=False)
    return broken


def test_a_disk_that_lies_about_fsync_makes_no_wrong_checkpoint(base: Path) -> None:
    """What it tore is refused: the hashes of the manifest are over what was meant."""
    checker = Checker(base)
    assert lied(base, checker) == []
    assert checker.states >= 85


def test_a_manifest_without_hashes_is_caught(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Blind:
        def update(self, _data: object) -> None:
            pass

        def hexdigest(self) -> str:
            return "0" * 64

    monkeypatch.setattr(files, "hashlib", SimpleNamespace(sha256=Blind))
    assert any("loads, and is wrong" in found for found in lied(base, Checker(base)))
    tally.add("protocol mutants caught")
