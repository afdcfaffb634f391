"""Training as a generator of (state, metrics): the loop body is the user's, and so is control."""

from __future__ import annotations

import operator
import os
import warnings
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
from torch import Tensor

from functrain.agreement import described
from functrain.checkpoint import BackgroundWriter, Keep, prune, save
from functrain.checkpoint.manifest import checked_texts
from functrain.checkpoint.retention import as_keep
from functrain.checkpoint.store import warn_of_newer
from functrain.checks import PathLike, as_path, at_least_one, boolean, is_number
from functrain.data.prefetch import Prefetched
from functrain.data.source import Source
from functrain.data.streams import Stream, Taken, is_stream_state
from functrain.distributed import ALONE, World
from functrain.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DivergedError,
    RelayedError,
    SaveWarning,
)
from functrain.evaluation import checked_batches, evaluate
from functrain.metrics import Metrics
from functrain.objectives.batches import Batch, targets_in
from functrain.schedules import Plateau
from functrain.state import Cursor, TrainState, check_state
from functrain.steps import Step
from functrain.trees import is_sharded


def train(
    step: Step,
    state: TrainState,
    source: Source | Stream,
    *,
    steps: int | None = None,
    tokens: int | None = None,
    epochs: float | None = None,
    batch_size: int | None = None,
    evaluation: Iterable[Batch] | None = None,
    evaluate_every: int | None = None,
    directory: PathLike | None = None,
    save_every: int | None = None,
    keep: int | Keep | None = None,
    background: bool = False,
    beside: Mapping[str, str] | None = None,
    on_save_error: str = "stop",
) -> Generator[tuple[TrainState, Metrics], TrainState | None, None]:
    """Yield (state, metrics) after every step, from `state` on, until a total is reached.

        run = train(step, state, source, steps=10_000)
        for state, metrics in run:
            ...                                     # stop with `break`; nothing else runs

    `steps` (calls), `tokens` (targets trained on, counted in `labels`, int64 [batch, time]) and
    `epochs` are totals since the stage began, as the state counts them, so a resumed run makes the
    same call; the first total reached ends the run. The batch is
    `source.at(state.cursor.samples, batch_size)`; from a stream, it is the batch that follows
    `state.cursor.loader`, which then holds the loader's state after it.

    With `evaluation`, the metrics of every `evaluate_every`-th step and of the last one include
    `eval_…`. A `reduce_on_plateau` schedule sees the `eval_loss` of the former only, so that no bit
    depends on where a run ends.

    With `directory`, every `save_every`-th state and the last one are saved before they are
    yielded. `keep` says which checkpoints stay: the newest few, or a `Keep` of the newest, of every
    so many steps, and of the best by an evaluation. If this run has gone back from later steps
    that are in the directory, those are neither counted nor deleted, and a `SaveWarning` names
    them; a step that is already there with another state is refused. `beside`: texts to store with
    each checkpoint, as for `functrain.save`. With `background`, a save costs the step only a copy
    of the state, and is durable when the next save begins or the generator ends.
    `on_save_error="continue"` turns a failed save (a full disk) into a `SaveWarning`, where
    `"stop"` raises; a failure in the background is found at the next step.

    Under the step's `world`, every worker makes this same call on the same data. Each reads its own
    part of a batch, while the position counts the samples of all. Worker 0 saves, and a save
    succeeds for all workers or for none; a sharded state is saved by all workers, each its rows.
    Workers whose calls differ are refused before the first step.

    `run.send(other)` continues from another state; the generator yields that state back at once.
    If the step donates, the next iteration consumes the yielded state.

    Raises `DivergedError` when the step's guard has skipped too many steps in a row, and
    `ConfigError`, already at the call, for arguments that make no sense.
    """
    if not isinstance(step, Step) or not isinstance(state, TrainState):
        given = ", ".join(type(each).__name__ for each in (step, state))
        raise ConfigError(f"train: expected (step, state, source), got {given} first")
    if isinstance(source, Stream):
        _check_stream(step, epochs, batch_size)
    elif not hasattr(source, "at"):
        raise ConfigError(
            f"train: a source of the type {type(source).__name__} has no at(position, n); "
            "functrain.data makes sources, and streams of the loaders that keep a state; batches "
            "of your own go into a loop of your own"
        )
    _check_cursor("train", state, source)
    checked = _Plan(
        steps=steps,
        tokens=tokens,
        samples=_samples(epochs, source),
        batch_size=_batch_size(batch_size, source),
        evaluation=_batches(step, evaluation),
        evaluate_every=evaluate_every,
        directory=directory,
        save_every=save_every,
        keep=keep,
        background=background,
        beside=beside,
        on_save_error=on_save_error,
    )
    checked.check_schedule(step.schedule)
    _check_world(step)
    if background and step.sharded and world_of(step).size > 1:
        raise ConfigError(
            "background: a state in shards is written by all workers at once, while none of them "
            "trains; leave background out"
        )
    return _run(step, state, source, checked)


def _check_world(step: Step) -> None:
    size = os.environ.get("WORLD_SIZE", "1")
    if step.world is None and size.isdecimal() and int(size) > 1:
        raise ConfigError(
            f"world: WORLD_SIZE is {size}, and the step has no world, so each process would train "
            "by itself; give the step world=functrain.distributed.world(), or "
            "world=functrain.distributed.ALONE where that is meant"
        )


def world_of(step: Step) -> World:
    """The world of a step, or `ALONE`."""
    return ALONE if step.world is None else step.world


@attrs.frozen
class _Reading:
    """How a worker reads its part of a batch; see `World.read`."""

    world: World = attrs.field(eq=id)
    microbatches: int
    tree: bool
    strided: bool

    def __call__(self, source: Source, position: int, n: int) -> Any:
        return self.world.read(
            source,
            position,
            n,
            microbatches=self.microbatches,
            tree=self.tree,
            strided=self.strided,
        )


def read(step: Step, source: Source, position: int, n: int) -> Any:
    """Read this worker's part of the `n` samples at `position`; see `World.read`."""
    tree = step.reduction == "canonical"
    reading = _Reading(world_of(step), step.microbatches, tree, step.sharded)
    if isinstance(source, Prefetched):
        return source.read(reading, position, n)
    return reading(source, position, n)


def agree_on(step: Step, state: TrainState, source: Source, facts: Mapping[str, str]) -> None:
    """Raise `WorkerError` unless all workers were given the same data and the same `facts`."""
    world = world_of(step)
    if world.size == 1:
        return
    sample = source.at(state.cursor.samples, 1)
    texts = {"samples": str(len(source)), **described(sample, f"sample {state.cursor.samples}")}
    world.agree({**texts, **facts})


def _check_cursor(what: str, state: TrainState, source: Source | Stream) -> None:
    """Raise `ConfigError` if the cursor is of the other kind of data (source or stream)."""
    cursor = state.cursor
    if isinstance(source, Stream):
        if cursor.samples and cursor.loader is None:
            raise ConfigError(
                f"{what}: the state has consumed {cursor.samples:,} samples of a source, so where "
                "to go on in a stream is unknown; to begin it, "
                "attrs.evolve(state, cursor=functrain.Cursor())"
            )
    elif is_stream_state(cursor.loader):
        raise ConfigError(
            f"{what}: the state has consumed {cursor.samples:,} samples of a stream, so where to "
            "go on in a source is unknown; to begin it, "
            "attrs.evolve(state, cursor=functrain.Cursor(tokens=state.cursor.tokens))"
        )


def _check_stream(step: Step, epochs: float | None, batch_size: int | None) -> None:
    for name, given in (("epochs", epochs), ("batch_size", batch_size)):
        if given is not None:
            raise ConfigError(
                f"{name}: {given!r}, and the data are a stream, whose loader alone knows it; give "
                "steps or tokens, and the batch size where the loader is made"
            )
    size = world_of(step).size
    if size > 1:
        raise ConfigError(
            f"world: a stream is read by one worker, and there are {size}; for several, use a "
            "source of functrain.data, of which each reads its own part"
        )


def _batch_size(given: int | None, source: Source | Stream) -> int | None:
    if given is not None or isinstance(source, Stream):
        return given
    found: int | None = getattr(source, "batch_size", None)
    if found is None:
        raise ConfigError(
            f"batch_size: a source of the type {type(source).__name__} has none; give it to train"
        )
    return found


def _samples(epochs: float | None, source: Source | Stream) -> int | None:
    if epochs is None or isinstance(source, Stream):
        return None
    if not is_number(epochs) or not 0 < epochs < float("inf") or round(epochs * len(source)) < 1:
        raise ConfigError(
            f"epochs: {epochs!r}, expected a positive number, of at least one of the source's "
            f"{len(source):,} samples"
        )
    return round(epochs * len(source))


_count = attrs.validators.optional(at_least_one)


def _directory(given: PathLike | None) -> Path | None:
    if given is None:
        return None
    path = as_path("directory", given)
    if os.path.isfile(path):  # noqa: PTH113  of what the system refuses, the save will tell
        raise ConfigError(f"directory: {path} is a file, expected a directory, or a new name")
    return path


def _texts(_record: object, _field: object, value: Mapping[str, str] | None) -> None:
    try:
        checked_texts(value)
    except CheckpointError as error:
        raise ConfigError(str(error)) from error


@attrs.frozen(kw_only=True, eq=False)
class _Plan:
    """The arguments of `train`, checked."""

    steps: int | None = attrs.field(validator=_count)
    tokens: int | None = attrs.field(validator=_count)
    samples: int | None = attrs.field(validator=_count)
    batch_size: int | None = attrs.field(validator=_count)
    evaluation: list[Batch] | None
    evaluate_every: int | None = attrs.field(validator=_count)
    directory: Path | None = attrs.field(converter=_directory)
    save_every: int | None = attrs.field(validator=_count)
    keep: Keep | None = attrs.field(converter=attrs.converters.optional(as_keep))
    background: bool = attrs.field(validator=boolean)
    beside: Mapping[str, str] | None = attrs.field(validator=_texts)
    on_save_error: str

    def __attrs_post_init__(self) -> None:
        if self.steps is None and self.tokens is None and self.samples is None:
            raise ConfigError("train: give an end: steps=…, tokens=… or epochs=…, each a total")
        if self.evaluate_every is not None and self.evaluation is None:
            raise ConfigError("evaluate_every: there is nothing to evaluate; give evaluation=…")
        for name in ("save_every", "keep", "background", "beside"):
            if self.directory is None and getattr(self, name):
                raise ConfigError(f"{name}: there is nowhere to save; give directory=…")
        self._check_best()
        if self.on_save_error not in ("stop", "continue"):
            raise ConfigError(
                f"on_save_error: {self.on_save_error!r}, expected 'stop' or 'continue'"
            )

    def _check_best(self) -> None:
        """Raise `ConfigError` if `keep.best` judges by a metric that no checkpoint will have."""
        if self.keep is None or self.keep.best is None:
            return
        if self.evaluation is None:
            raise ConfigError(
                f"keep: best={self.keep.best}, and nothing is evaluated; give evaluation=…, or "
                "leave best out"
            )
        if not self.keep.metric.startswith("eval_"):
            raise ConfigError(
                f"keep: metric={self.keep.metric!r}, and checkpoints have those of an evaluation "
                "alone, expected 'eval_loss' or another of them"
            )

    def facts(self) -> dict[str, Any]:
        """What every worker must have been given alike; only worker 0 may know where to save."""
        elsewhere = ("directory", "keep", "beside")
        given = attrs.asdict(self, recurse=False)
        facts = {name: value for name, value in given.items() if name not in elsewhere}
        return {**facts, "saves": self.directory is not None}

    def done(self, state: TrainState) -> bool:
        """Whether a total has been reached."""
        cursor = state.cursor
        reached = (
            (self.steps, state.step),
            (self.tokens, cursor.tokens),
            (self.samples, cursor.samples),
        )
        return any(total is not None and now >= total for total, now in reached)

    def evaluates(self, state: TrainState) -> bool:
        """Whether this state is to be evaluated."""
        return self.evaluation is not None and self._due(self.evaluate_every, state)

    def check_schedule(self, schedule: object) -> None:
        """Raise `ConfigError` for a `reduce_on_plateau` schedule that would see no evaluation."""
        if (
            isinstance(schedule, Plateau)
            and self.evaluation is not None
            and not self.evaluate_every
        ):
            raise ConfigError(
                "evaluate_every: not given, and reduce_on_plateau sees the evaluations of every so "
                "many steps; give it, or tell the schedule by step.observe in a loop of your own"
            )

    def observes(self, state: TrainState) -> bool:
        """Whether the schedule sees this evaluation: only one that a longer run would make too."""
        return _at_interval(self.evaluate_every, state)

    def saves(self, state: TrainState) -> bool:
        """Whether this state is to be saved."""
        return self.directory is not None and self._due(self.save_every, state)

    def _due(self, every: int | None, state: TrainState) -> bool:
        return self.done(state) or _at_interval(every, state)


def _at_interval(every: int | None, state: TrainState) -> bool:
    return every is not None and state.step % every == 0


def _batches(step: Step, evaluation: Iterable[Batch] | None) -> list[Batch] | None:
    batches = None if evaluation is None else list(checked_batches(step, evaluation))
    if batches is not None and not batches:
        raise ConfigError("evaluation: no batches; give at least one, or None")
    return batches


def _run(
    step: Step, state: TrainState, source: Source | Stream, plan: _Plan
) -> Generator[tuple[TrainState, Metrics], TrainState | None, None]:
    if not isinstance(source, Stream):
        agree_on(step, state, source, described(plan.facts(), "train"))
    with _saving(step, plan) as saver:
        while not plan.done(state):
            state, metrics = _advanced(step, state, source, plan)
            check_guard(step, state)
            saver.check()
            if plan.saves(state):
                saver.save(state, metrics)
            sent = yield state, metrics
            while sent is not None:
                check_state(sent, "send")
                _check_cursor("send", sent, source)
                state = sent
                sent = yield state, metrics


def check_guard(step: Step, state: TrainState) -> None:
    """Raise `DivergedError` if the step's guard has skipped too many steps in a row."""
    if step.guard is None or state.guard is None:
        return
    skips = int(state.guard.skips)
    if skips > step.guard.most_skips:
        raise DivergedError(
            f"step {state.step}: {skips} steps in a row were skipped, more than the "
            f"{step.guard.most_skips} that the guard allows; the params are those of step "
            f"{state.step - skips}. Go on from an earlier checkpoint with a lower learning rate or "
            "other data"
        )


def _advanced(
    step: Step, state: TrainState, source: Source | Stream, plan: _Plan
) -> tuple[TrainState, Metrics]:
    cursor = state.cursor

    def read_and_counted() -> tuple[tuple[Any, Cursor], int]:
        batch, moved = _read(step, cursor, source, plan)
        # Counted here, while the batch is on the CPU; the step's own count is on its device.
        return (batch, moved), int(targets_in(batch))

    # If one worker fails to read, every worker raises: the others would wait for it in the step.
    world = world_of(step)
    world.begin(state.step, state.key)
    (batch, moved), count = world.counted(read_and_counted, "the reading of a batch")
    tokens = moved.tokens + count
    if plan.tokens is not None and not tokens:  # raised before a donated state is consumed
        raise ConfigError(
            "tokens: the batch has no labels, int64 [batch, time], of which they are counted, so "
            "the total would never be reached; give steps or epochs"
        )
    state, metrics = step(state, batch)
    state = attrs.evolve(state, cursor=attrs.evolve(moved, tokens=tokens))
    if plan.evaluates(state) and plan.evaluation is not None:
        measured = evaluate(step, state, plan.evaluation)
        if plan.observes(state):
            state = step.observe(state, float(measured["eval_loss"]))
        metrics = metrics | measured
    return state, metrics


def _read(step: Step, cursor: Cursor, source: Source | Stream, plan: _Plan) -> tuple[Any, Cursor]:
    """A batch, and the cursor after it, its tokens not yet counted."""
    try:
        if isinstance(source, Stream):
            taken = _checked_taken(source.after(cursor.loader))
            samples = cursor.samples + taken.samples
            return taken.batch, attrs.evolve(cursor, samples=samples, loader=taken.loader)
        assert plan.batch_size is not None  # sources have one
        batch = read(step, source, cursor.samples, plan.batch_size)
    except StopIteration as error:  # Python would turn it into a RuntimeError of the generator
        raise DataError(
            f"{type(source).__name__}: the data have ended after {cursor.samples:,} samples; begin "
            "them anew there, as epochs do, or give fewer steps"
        ) from error
    # For a user's objective, what counts as a sample is unknown.
    if world_of(step).size == 1 and not step.value_and_grad.foreign:
        _check_size(batch, plan.batch_size)
    return batch, attrs.evolve(cursor, samples=cursor.samples + plan.batch_size)


def _checked_taken(taken: object) -> Taken:
    """What a stream gave, checked: a user's stream may give anything."""
    if not isinstance(taken, Taken):
        raise DataError(
            f"stream: it gave a {type(taken).__name__}, expected functrain.data.Taken(batch=…, "
            "samples=…, loader=…)"
        )
    if not isinstance(taken.loader, str):
        raise DataError(
            f"stream: it gave a loader that is a {type(taken.loader).__name__}, expected a text; "
            "give json.dumps(loader.state_dict()), say"
        )
    try:
        return attrs.evolve(taken, samples=operator.index(taken.samples))
    except TypeError as error:
        raise DataError(f"stream: samples={taken.samples!r}, expected an integer") from error


def _check_size(batch: object, asked: int) -> None:
    """Raise `DataError` if samples are missing, since the position would then be wrong."""
    if not isinstance(batch, Mapping) or "position_ids" in batch:  # several documents in a row
        return
    side = batch.get("chosen", batch.get("completion", batch))
    ids = side.get("input_ids") if isinstance(side, Mapping) else None
    if isinstance(ids, Tensor) and ids.ndim == 2 and len(ids) < asked:
        raise DataError(
            f"source: at(position, {asked}) gave {len(ids)} samples; give as many as are asked "
            "for, those from the beginning again after the last"
        )


class _Saver:
    """Saves as a plan says, at once or in the background."""

    def __init__(self, step: Step, plan: _Plan, writer: BackgroundWriter | None) -> None:
        self._plan, self._writer, self._world = plan, writer, world_of(step)
        self._conditions = conditions(step, plan.batch_size)

    def check(self) -> None:
        """Raise, or warn, if the save in the background has failed."""
        if self._plan.background:
            with self._failing():
                self._for_all(lambda writer: writer.check())

    def save(self, state: TrainState, metrics: Metrics) -> None:
        """Save a state with the metrics of its evaluation."""
        options: dict[str, Any] = {
            "metrics": {n: v for n, v in metrics.to_dict().items() if n.startswith("eval_")},
            "conditions": self._conditions,
            "beside": self._plan.beside,
        }
        with self._failing():
            if is_sharded(state.params):
                self._save_shards(state, options)
            else:
                self._for_all(lambda writer: self._save(writer, state, options))

    def _save_shards(self, state: TrainState, options: dict[str, Any]) -> None:
        """Every worker saves its rows, in the directory that worker 0 names."""
        directory = self._world.from_first(lambda: str(self._plan.directory), "a save")
        path = save(directory, state, world=self._world, **options)
        self._for_all(lambda _: self._saved(path))

    def _save(
        self, writer: BackgroundWriter | None, state: TrainState, options: dict[str, Any]
    ) -> None:
        if writer is not None:
            writer.save(state, **options)
        elif self._plan.directory is not None:
            self._saved(save(self._plan.directory, state, **options))

    def _saved(self, path: Path) -> None:
        """Delete what is not kept. Only worker 0 may know of `keep`."""
        if self._plan.keep is None:
            warn_of_newer(path)
        else:
            prune(path.parent, self._plan.keep, saved=path)

    def wait(self) -> None:
        """Wait for the save in the background."""
        with self._failing():
            self._for_all(lambda writer: writer and writer.wait())

    def _for_all(self, act: Callable[[Any], object]) -> None:
        """Let worker 0 act; if it fails, every worker fails with its error."""

        def acted() -> str:
            act(self._writer)
            return ""

        self._world.from_first(acted, "a save of worker 0")

    @contextmanager
    def _failing(self) -> Generator[None, None, None]:
        try:
            yield
        except (CheckpointError, RelayedError) as error:
            if self._plan.on_save_error == "stop":
                raise
            warnings.warn(str(error), SaveWarning, stacklevel=4)


@contextmanager
def _saving(step: Step, plan: _Plan) -> Generator[_Saver, None, None]:
    if plan.directory is None or not plan.background:
        yield _Saver(step, plan, None)
        return
    if not world_of(step).speaks:
        saver = _Saver(step, plan, None)
        yield saver
        saver.wait()
        return
    with BackgroundWriter(plan.directory, keep=plan.keep) as writer:
        saver = _Saver(step, plan, writer)
        yield saver
        saver.wait()


def conditions(step: Step, batch_size: int | None) -> dict[str, Any]:
    """What the bits of a run depend on besides its state and its numerics."""
    size = world_of(step).size
    return {
        # None is also what older checkpoints say.
        "reduction": None if step.reduction == "fast" else step.reduction,
        # The order of a fast sum depends on the number of workers.
        "workers": size if step.reduction == "fast" and size > 1 else None,
        # And on sharding. None is also what older checkpoints say, most of them not sharded.
        "sharded": True if step.sharded and step.reduction == "fast" and size > 1 else None,
        "batch_size": batch_size,
        "microbatches": step.microbatches,
        "precision": step.precision.name,
        "compile": step.compile,
        # Uncompiled, recomputing gives the same bits.
        "checkpoint": list(step.checkpoint) if step.compile else [],
        # None is also what older checkpoints say.
        "recompute": step.recompute if step.compile and step.recompute != "full" else None,
        # For an objective that has these options; None for the usual value.
        "head": _unusual(step, "head", "auto"),
        "layout": _unusual(step, "layout", "padded"),
    }


def _unusual(step: Step, name: str, usual: str) -> str | None:
    found = getattr(step.objective, name, None)
    return found if isinstance(found, str) and found != usual else None
