"""Resumed runs: the same bits from every split point, every field of the state matters, the order
of a mapping does not, and an interrupted step has changed nothing."""

from __future__ import annotations

import functools
import gc
import itertools
import json
import os
import random
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import attrs
import numpy as np
import pytest
import tally
import torch
from processes import reaped
from torch import Tensor, nn

import functrain as ft
from functrain import testing
from functrain.checkpoint.layout import encode
from functrain.errors import DivergedError
from functrain.precision import Precision

STEPS = 60
ROWS = 37  # no multiple of the batch: epochs end within one
BATCH = 4
AHEAD = 10  # an epoch ends within so many
CLIP = 0.2
SEEDS = (11, 2**62 + 3)
FP16 = Precision(
    name="fp16",
    autocast=torch.float16,
    loss_scale=True,
    initial_scale=2.0**14,
    growth_interval=3,
)


class Model(nn.Module):
    """Dropout, and BatchNorm whose running mean weighs by its count: every buffer matters."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(29, 8)
        self.norm = nn.BatchNorm1d(8, momentum=None)
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(8, 29)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.norm(self.embedding(input_ids).transpose(1, 2)).transpose(1, 2)
        return self.head(self.dropout(hidden))


def _step(**options: Any) -> tuple[Any, Callable[[int], ft.TrainState]]:
    """A step in which everything happens that a checkpoint may forget, and its first state."""
    with ft.keys.seeded(3):
        architecture, params, buffers = ft.split(Model())
    chosen = {
        "precision": FP16,
        "microbatches": 2,
        "max_grad_norm": CLIP,
        "ema_decay": 0.9,
        "schedule": ft.schedules.cosine(2e-2, total=STEPS, warmup=5),
        **options,
    }
    step = ft.pretrain_step(architecture, ft.optim.adamw(weight_decay=0.1), **chosen)
    return step, lambda seed: step.init(ft.trees.clone(params), buffers, seed=seed)


def _source(seed: int = 0) -> Any:
    ids = np.random.default_rng(seed).integers(0, 29, ROWS * 5 + 1).astype(np.uint16)
    return ft.data.tokens(ids, time=6, batch_size=BATCH, seed=seed)


def _last(run: Iterator[tuple[ft.TrainState, Any]], state: ft.TrainState) -> ft.TrainState:
    for now, _ in run:
        state = now
    return state


@attrs.frozen
class Saved:
    """A run that has saved every state: the fingerprint of each, and the metrics of each step."""

    directory: Path
    prints: list[str]
    seen: list[Any]


def _saved_run(seed: int, directory: Path) -> Saved:
    step, begin = _step()
    state = begin(seed)
    ft.save(directory, state)
    prints, seen = [ft.fingerprint(state)], []
    for now, metrics in ft.train(
        step, state, _source(), steps=STEPS, directory=directory, save_every=1
    ):
        prints.append(ft.fingerprint(now))
        seen.append(metrics.to_dict())
    return Saved(directory, prints, seen)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Saved]:
    """The run of a seed, which is made once."""
    return functools.cache(lambda seed: _saved_run(seed, tmp_path_factory.mktemp("saved")))


def _resumed(directory: Path, parts: list[tuple[int, int]], *, donate: bool) -> list[str]:
    """The fingerprint at the end of each part of the run, from one step to another."""
    step, begin = _step(donate=donate)
    like, ends = begin(0), []
    for split, end in parts:
        state = ft.load(directory / f"step-{split:012d}", like=like, strict=True)
        ends.append(ft.fingerprint(_last(ft.train(step, state, _source(), steps=end), state)))
    return ends


def _in_a_child(function: Callable[[], Any]) -> Any:
    """What `function` returns in a process of its own, forked from this one."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the test runner has threads
        child = os.fork()
    if child == 0:
        try:
            found = {"found": function()}
        except BaseException:
            found = {"error": traceback.format_exc()}
        with os.fdopen(writing, "w") as pipe:
            json.dump(found, pipe)
        os._exit(0)
    os.close(writing)
    with reaped(child), os.fdopen(reading) as pipe:
        answer = json.load(pipe)
    assert "error" not in answer, answer["error"]
    return answer["found"]


@pytest.mark.parametrize(
    "ahead",
    [pytest.param(AHEAD, id="an epoch"), pytest.param(STEPS, id="the end", marks=pytest.mark.long)],
)
@pytest.mark.parametrize(
    ("seed", "donate"),
    [
        pytest.param(SEEDS[0], False, id="one pure"),
        pytest.param(SEEDS[1], True, id="other donated"),
        pytest.param(SEEDS[0], True, id="one donated", marks=pytest.mark.long),
        pytest.param(SEEDS[1], False, id="other pure", marks=pytest.mark.long),
    ],
)
def test_from_every_split_point_a_new_process_goes_on_with_the_same_bits(
    seed: int, donate: bool, ahead: int, saved: Callable[[int], Saved]
) -> None:
    """60 steps with dropout, clipping, accumulation, an average, overflows and six epochs; from
    some of the points to the end of the run."""
    run = saved(seed)
    seen = run.seen
    applied = [each for each in seen if not each["skipped"]]
    assert 2 <= len(seen) - len(applied) <= 20, "overflows are skipped, but not always"
    assert seen[0]["skipped"] == 0
    assert sum(each["grad_norm"] > CLIP for each in applied) > len(applied) / 2, "clipping acts"
    assert STEPS * BATCH > 6 * ROWS, "epochs end"
    # The two variants share the split points: each is resumed once, even ones with donation.
    parts = [
        (split, STEPS if split % 20 == int(donate) else min(split + ahead, STEPS))
        for split in range(int(donate), STEPS, 2)
    ]
    ends: list[str] = []
    for begin in range(0, len(parts), 5):
        some = parts[begin : begin + 5]
        ends += _in_a_child(lambda some=some: _resumed(run.directory, some, donate=donate))
    assert ends == [run.prints[end] for _, end in parts]
    tally.add("split points resumed in a new process", len(ends), part=ahead < STEPS)


def test_a_process_started_afresh_ends_with_the_same_bits(
    saved: Callable[[int], Saved],
) -> None:
    """Nothing that a forked child inherits is needed: another interpreter, another hash seed."""
    run, parts = saved(SEEDS[0]), [(17, 17 + AHEAD), (41, STEPS)]
    command = [sys.executable, "-W", "error", __file__, str(run.directory), json.dumps(parts)]
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "OMP_NUM_THREADS": "1"}
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [run.prints[end] for _, end in parts]
    tally.add("in a fresh interpreter", 2)


# Ablation: what is not saved would be at its initial value after a resume.

SCALER = {"growth_factor": 4.0, "backoff_factor": 0.25, "growth_interval": 3}
EXEMPT = {
    "optimizer/count": "bookkeeping: the kernels count by slots/step; shown, and read by adapters",
    "optimizer/kind": "a name, the same in every state of a step; another one is refused",
}
"""What may be reset without the run parting, and why."""


def _fields(record: Any, prefix: str = "") -> Iterator[str]:
    """The path of each field of a state that holds no further record."""
    for field in attrs.fields(type(record)):
        value, path = getattr(record, field.name), f"{prefix}{field.name}"
        if attrs.has(type(value)):
            yield from _fields(value, f"{path}/")
        else:
            yield path


def _at(record: Any, path: str) -> Any:
    for name in path.split("/"):
        record = getattr(record, name)
    return record


def _with(record: Any, path: str, value: Any) -> Any:
    name, _, rest = path.partition("/")
    if rest:
        value = _with(getattr(record, name), rest, value)
    return attrs.evolve(record, **{name: value})


def _end(state: ft.TrainState, but: str | None = None) -> dict[str, str]:
    """What a run is for: the bits of params, buffers and average; and after how many steps."""
    prints = ft.fingerprints(state)
    mine = ("params/", "buffers/", "average/")
    return {p: h for p, h in prints.items() if p.startswith(mine) or (p == "step" != but)}


PLATEAU = ft.schedules.reduce_on_plateau(3e-2, patience=2, cooldown=2, factor=0.7, threshold=0.02)


class Ablation:
    """A run in which every field has left its initial value, and continues from a given state.

    Beside `ft.train` it keeps what a loop of one's own may: a loader's position in
    `cursor.loader`, in `reference` a slow copy of the params, towards which it pulls, and in
    `running` how strongly.
    """

    tokens = 900

    def __init__(self, schedule: Any = PLATEAU) -> None:
        guard = ft.SpikeGuard(window=8, deviations=2.0, most_skips=5)
        self.step, begin = _step(schedule=schedule, guard=guard)
        self.evaluation = [_source(5).at(0, 8)]
        self.initial = begin(0)
        fresh = begin(SEEDS[0])
        scaler = attrs.evolve(fresh.scaler, **SCALER)
        self.first = attrs.evolve(
            fresh,
            scaler=scaler,
            cursor=ft.Cursor(loader="0"),
            reference=ft.trees.clone(fresh.params),
            running=ft.trees.Tensors({"pull": torch.tensor(0.011)}),
        )

    def run(self, state: ft.TrainState, tokens: int) -> Iterator[ft.TrainState]:
        source = _source()
        while state.cursor.tokens < tokens:
            offset = int(state.cursor.loader or 0)
            shifted = _Shifted(source, offset)
            ((state, _),) = ft.train(
                self.step,
                state,
                shifted,
                steps=state.step + 1,
                evaluation=self.evaluation,
                evaluate_every=1,
            )
            reference = ft.trees.Tensors(
                {n: t.lerp(state.params[n], 0.1) for n, t in (state.reference or {}).items()}
            )
            pull = (state.running or {}).get("pull", torch.tensor(0.01))
            pulled = ft.trees.Tensors(
                {n: t.lerp(reference.get(n, t), float(pull)) for n, t in state.params.items()}
            )
            state = attrs.evolve(
                state,
                params=pulled,
                reference=reference,
                running=ft.trees.Tensors({"pull": pull * 0.999}),
                cursor=attrs.evolve(state.cursor, loader=str((offset * 5 + 3) % ROWS)),
            )
            yield state

    def states(self) -> list[ft.TrainState]:
        """Every state of the run."""
        return list(self.run(self.first, self.tokens))

    def after(self, state: ft.TrainState) -> Iterator[ft.TrainState]:
        """`state` and the states of a run from it on, until the guard's end if need be."""
        yield state
        try:
            yield from self.run(state, self.tokens)
        except DivergedError:
            return

    def ended(self, state: ft.TrainState) -> ft.TrainState:
        """The last state of a run from `state` on."""
        for now in self.after(state):
            state = now
        return state

    def overflowing(self, state: ft.TrainState) -> ft.TrainState:
        """A state whose next steps overflow until the guard ends the run, two of them taken."""
        scale = torch.tensor(2.0**100)
        state = attrs.evolve(state, scaler=attrs.evolve(state.scaler, scale=scale))
        run = self.run(state, self.tokens)
        next(run)
        return next(run)

    def reset(self, state: ft.TrainState, path: str) -> ft.TrainState:
        """The state with one field at its initial value."""
        if path in ("scaler/growth_factor", "scaler/backoff_factor", "scaler/growth_interval"):
            defaults = {f.name: f.default for f in attrs.fields(type(state.scaler))}
            return _with(state, path, defaults[path.rsplit("/", 1)[-1]])
        if path == "reference":
            return attrs.evolve(state, reference=ft.trees.Tensors())
        return _with(state, path, _at(self.initial, path))


@attrs.frozen
class _Shifted:
    """A source from another position on."""

    source: Any
    offset: int
    batch_size: int = BATCH

    def __len__(self) -> int:
        return len(self.source)

    def at(self, position: int, n: int) -> Any:
        return self.source.at(position + self.offset, n)


def test_every_field_of_the_state_matters(tmp_path: Path) -> None:
    """Each leaf field, reset at a save late in the run, gives other bits than the run left alone.

    The saves are at values that no field had in the beginning, in cooldown and out of it, with
    the loss scale about to grow; each field must matter at one of them at least. The count of a
    schedule is felt by one that counts, so there is a run with a cosine too.
    """
    plateau, cosine = Ablation(), Ablation(ft.schedules.cosine(2e-2, total=60))
    # A state over another base is refused, whatever its bits (tests/lora/test_lora_state.py).
    fields = [field for field in _fields(plateau.first) if field != "base"]
    assert len(fields) == 27, fields
    felt = set()
    for run in (plateau, cosine):
        states = run.states()
        middle = len(states) // 2
        saves = [states[at] for at in (_late_saves(states) if run is plateau else [middle])]
        if run is cosine:
            saves.append(run.overflowing(states[middle]))
        for number, late in enumerate(saves):
            path = ft.save(tmp_path / f"{run is plateau}{number}", late)
            saved = ft.load(path, like=run.first, strict=True)
            alone = states[states.index(late) :] if late in states else list(run.after(late))
            end = _end(alone[-1])
            assert _end(run.ended(saved)) == end, f"resumed at {late.step}, without a reset"
            for field in fields:
                if field in felt or field not in _fields(saved):
                    continue
                other = run.reset(saved, field)
                if _prints(other, field) == _prints(saved, field):
                    continue  # at its initial value here
                if _parts(run.after(other), alone, field):
                    felt.add(field)
    assert felt == set(fields) - EXEMPT.keys(), sorted(set(fields) - EXEMPT.keys() ^ felt)
    tally.add("state fields ablated", len(felt))


def _parts(run: Iterator[ft.TrainState], alone: list[ft.TrainState], field: str) -> bool:
    """Whether a run parts from the one left alone, which shows at once or at another end."""
    for number, (now, then) in enumerate(itertools.zip_longest(run, alone)):
        ended = now is None or then is None
        if ended or (number and _end(now, field) != _but(_end(then), field)):
            return True
    return False


def _but(prints: dict[str, str], field: str) -> dict[str, str]:
    return {path: leaf for path, leaf in prints.items() if path != field}


def _prints(state: ft.TrainState, field: str) -> dict[str, str]:
    prints = ft.fingerprints(state)
    return {p: h for p, h in prints.items() if p == field or p.startswith(f"{field}/")}


def _late_saves(states: list[ft.TrainState]) -> list[int]:
    """Places after the first half: the loss scale about to grow, bad > 0; then a cooldown."""

    def late(fits: Callable[[Any, Any], bool]) -> int:
        half = range(len(states) // 2, len(states) - 8)
        found = [i for i in half if fits(states[i].scaler, states[i].scheduler.plateau)]
        assert found, "the run does not come to such a state"
        return found[0]

    about = SCALER["growth_interval"] - 1
    return [
        late(lambda s, p: int(s.growth_count) == about and p.bad > 0),
        late(lambda s, p: p.bad == 2),
        late(lambda s, p: p.cooldown > 0),
    ]


def test_what_is_exempt_from_the_ablation_is_bookkeeping(tmp_path: Path) -> None:
    """Reset, `optimizer.count` changes nothing but itself, and another `kind` is refused."""
    ablation = Ablation()
    states = ablation.states()
    saved = states[len(states) // 2]
    reset = ablation.reset(saved, "optimizer/count")
    after = ablation.ended(reset)
    parted = [
        path
        for path, leaf in ft.fingerprints(states[-1]).items()
        if ft.fingerprints(after)[path] != leaf
    ]
    assert parted == ["optimizer/count"]
    other = attrs.evolve(saved, optimizer=attrs.evolve(saved.optimizer, kind="adam"))
    with pytest.raises(ft.StateError, match="optimizer"):
        ablation.step(other, _source().at(0, BATCH))
    ft.save(tmp_path, other)
    with pytest.raises(ft.CheckpointError, match="made with the optimizer 'adam'"):
        ft.load(tmp_path, like=saved)


# The order of a mapping.


def _shuffled(items: Mapping[str, Any], dice: random.Random) -> dict[str, Any]:
    names = list(items)
    dice.shuffle(names)
    return {name: items[name] for name in names}


def _permuted(state: ft.TrainState, dice: random.Random) -> ft.TrainState:
    """The same state, each of its mappings made of one in another order."""

    def tensors(items: Any) -> Any:
        return None if items is None else ft.trees.Tensors(_shuffled(items, dice))

    slots = {slot: tensors(items) for slot, items in _shuffled(state.optimizer.slots, dice).items()}
    return attrs.evolve(
        state,
        params=tensors(state.params),
        buffers=tensors(state.buffers),
        average=tensors(state.average),
        optimizer=attrs.evolve(state.optimizer, slots=slots),
    )


@pytest.mark.parametrize("orders", [40, pytest.param(100, marks=pytest.mark.long)])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_no_order_of_a_mapping_reaches_the_bits(optimizer: str, orders: int) -> None:
    """Orders of the params, buffers, slots and average: one state, and one checkpoint."""
    made = {"adamw": ft.optim.adamw(), "sgd": ft.optim.sgd(momentum=0.9, weight_decay=0.1)}
    architecture, params, buffers = ft.split(_deep())
    step = ft.pretrain_step(
        architecture, made[optimizer], schedule=1e-2, max_grad_norm=CLIP, ema_decay=0.9
    )
    state = step.init(params, buffers, seed=1)
    for _ in range(3):
        state, _ = step(state, _source().at(0, BATCH))
    following, metrics = step(state, _source().at(4, BATCH))
    expected = ft.fingerprint(following)
    assert float(metrics["grad_norm"]) > CLIP
    files = {name: b"".join(parts) for name, parts in encode(state).items()}
    dice = random.Random(0)
    for _ in range(orders):
        other = _permuted(state, dice)
        assert ft.fingerprint(step(other, _source().at(4, BATCH))[0]) == expected
        assert {name: b"".join(parts) for name, parts in encode(other).items()} == files
        shuffled = _shuffled(params, dice), _shuffled(buffers, dice)
        again = step.init(*shuffled, seed=1)
        assert list(again.params) == sorted(params)
    tally.add("orders of every mapping", orders, part=orders < 100)


class Deep(nn.Module):
    """Many parameters; in float64, the norm's own, so that an order reaches the bits of all."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Linear(8, 8) for _ in range(6)]
        self.layers = nn.Sequential(nn.Embedding(29, 8), *layers, nn.BatchNorm1d(6))
        self.head = nn.Linear(8, 29)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.layers(input_ids))


def _deep() -> nn.Module:
    with ft.keys.seeded(5):
        return Deep().double()


# A step is a transaction.

Line = tuple[str, int]
"""A file and a number in it."""


def _interrupted(at: int, call: Callable[[], Any]) -> tuple[list[Line], str | None]:
    """Run `call`, with a KeyboardInterrupt at line event `at`: events seen, and in which function.

    Every line event counts, those within torch's own Python too; a collection's callbacks do not,
    since what is raised in them is lost.
    """
    seen: list[Line] = []
    place = None

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal place
        if event == "line":
            seen.append((frame.f_code.co_filename, frame.f_lineno))
            if len(seen) - 1 == at:
                place = frame.f_code.co_name
                raise KeyboardInterrupt
        return trace

    previous = sys.gettrace()
    gc.disable()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        sys.settrace(previous)
        assert place is not None
    finally:
        sys.settrace(previous)
        gc.enable()
    return seen, place


class Transaction:
    """A small step, with everything on, at each of its line events."""

    def __init__(self) -> None:
        self.step, begin = _step(microbatches=1)
        self.batch = _source().at(0, BATCH)
        state = begin(7)
        for _ in range(2):
            state, _ = self.step(state, self.batch)
        self.state, self.before = state, ft.fingerprint(state)
        following, metrics = self.step(state, self.batch)
        assert not float(metrics["skipped"])
        self.after = ft.fingerprint(following)
        self.lines, _ = _interrupted(-1, lambda: self.step(state, self.batch))
        self.events = len(self.lines)
        assert self.events > 1500
        self.generators = testing._generators()

    def telling(self) -> list[int]:
        """The events where a line of functrain's is run first, and some of all others."""
        package = str(Path(ft.__file__).parent)
        firsts = {line: at for at, line in reversed(list(enumerate(self.lines)))}
        own = [at for (file, _), at in firsts.items() if file.startswith(package)]
        assert len(own) > 500
        return sorted({*own, *range(0, self.events, 23)})

    def moved_generators(self) -> bool:
        """Whether a global generator is not as it was."""
        return testing._generators() != self.generators


@pytest.mark.parametrize("part", [0, 1, pytest.param(None, id="all", marks=pytest.mark.long)])
@pytest.mark.timeout(900)  # thousands of steps under a tracer
def test_a_pure_step_interrupted_at_any_line_has_changed_nothing(part: int | None) -> None:
    """KeyboardInterrupt at every line: the input's bits are as they were, the global generators
    are untouched (also in the lines that put them back), and the same call gives the expected
    bits, which is seen at every fourth event. The long form takes every event for both."""
    case = Transaction()
    events = list(range(case.events)) if part is None else case.telling()[part::2]
    for number, at in enumerate(events):
        _, place = _interrupted(at, lambda: case.step(case.state, case.batch))
        assert ft.fingerprint(case.state) == case.before, f"event {at} in {place}"
        assert not case.moved_generators(), f"event {at} in {place}"
        if part is None or number % 4 == 0:
            following, _ = case.step(case.state, case.batch)
            assert ft.fingerprint(following) == case.after, f"event {at} in {place}"
    tally.add("interrupts of a step", len(events), part=part is not None)


def _left_of(case: Transaction, at: int) -> tuple[str, str | None]:
    """What a donated step, interrupted at an event, has left of the state: and where that was."""
    given = ft.clone(case.state)
    _, place = _interrupted(at, lambda: case.step(given, case.batch, donate=True))
    try:
        return ("intact" if ft.fingerprint(given) == case.before else "torn"), place
    except ft.ConsumedStateError:
        return "consumed", place


@pytest.mark.parametrize("stride", [5, pytest.param(1, marks=pytest.mark.long)])
def test_a_donated_step_interrupted_at_any_line_leaves_an_intact_state_or_a_tombstone(
    stride: int,
) -> None:
    """Never one that can be read and is neither the old state nor the new."""
    case = Transaction()
    for at in range(case.events - 1, -1, -stride):
        left, place = _left_of(case, at)
        assert left != "torn", f"event {at} of {case.events}, in {place}"
    tally.add("interrupts of a step", case.events // stride, part=stride > 1)


if __name__ == "__main__":
    torch.set_num_threads(1)
    where, parts = sys.argv[1:]
    print(json.dumps(_resumed(Path(where), json.loads(parts), donate=False)))
