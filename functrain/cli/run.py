"""One stage, from its config to its outcome: begin or resume, train, log, save, stop if asked."""

from __future__ import annotations

import io
import logging
import os
import shlex
import sys
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TextIO, TypeVar

import attrs
import torch

from functrain import checkpoint, memory, models
from functrain.checkpoint.filesystem import OPERATING_SYSTEM
from functrain.checkpoint.manifest import checkpoints, step_of
from functrain.checkpoint.store import whole
from functrain.cli import directory as directories
from functrain.cli import facts, toml
from functrain.cli.build import Built, build
from functrain.cli.clock import Clock
from functrain.cli.config import DPO, SFT, Pretrain, Train
from functrain.cli.ending import Ending, ending
from functrain.cli.holding import hold, used_steps
from functrain.cli.lock import held
from functrain.cli.origins import RunDirectory
from functrain.cli.samples import GATHERED, Prompt, bytes_to_gather, prompts, spoken
from functrain.cli.signals import Stop
from functrain.cli.sources import digest
from functrain.cli.steps import rates_after
from functrain.compilation import cache_directory
from functrain.data import ByteTokenizer, Prefetched, PretrainedTokenizer
from functrain.distributed import ALONE, World
from functrain.errors import CheckpointError, ConfigError, DataError, RelayedError
from functrain.evaluation import evaluate
from functrain.loop import check_guard, conditions, train, world_of
from functrain.metrics import Metrics
from functrain.state import TrainState
from functrain.tracking import jsonl, progress
from functrain.tracking.beside import Beside
from functrain.tracking.jsonl import Several, Tracker
from functrain.tracking.services import TrackedRun, opened
from functrain.trees import is_sharded

C = TypeVar("C", Pretrain, SFT, DPO)
Say = Callable[[str], None]


@attrs.frozen(kw_only=True, eq=False)
class Outcome:
    """The outcome of a stage: its last state, every record of metrics.jsonl, and samples.

    `prompts` are from its held-out data, `first_words` the first state's completions of them; `end`
    is set if the stage is finished.
    """

    config: Pretrain | SFT | DPO
    built: Built
    state: TrainState
    records: list[dict[str, Any]]
    prompts: list[Prompt]
    first_words: list[str]
    end: Ending | None = None

    @property
    def finished(self) -> bool:
        """Whether the last step has been made."""
        return self.state.step >= self.config.train.steps

    def ended(self) -> Ending:
        """The end of a finished run."""
        assert self.end is not None
        return self.end

    @property
    def before(self) -> dict[str, Any]:
        """The evaluation of the first state; empty without held-out data."""
        return self.records[0] if self.records and self.records[0]["step"] == 0 else {}

    @property
    def after(self) -> dict[str, Any]:
        """The newest evaluation; empty without held-out data."""
        return next((r for r in reversed(self.records) if "eval_loss" in r), {})


def run_stage(config: C, *, resume: bool, stop: Stop, say: Say, world: World = ALONE) -> Outcome:
    """Train one stage in its run directory, until it is finished or `stop` is set.

    Every worker calls this; rank 0 decides, writes and prints.

    Law: whatever stopped a run (a signal, kill -9, a power cut), resuming it ends with the state,
    to the bit, of an uninterrupted run. Raises `FunctrainError` for a config that cannot be run.
    """
    world.for_all(lambda: directories.check_files(config))
    world.agree({"config": toml.dumps(config)})
    settled = world.from_first(lambda: toml.dumps(_settled(config, resume)), "the config")
    config = toml.loads(settled, type(config))
    run = RunDirectory(config.directory)
    # Before weights are read and data tokenised: that takes long enough for the other run to prune.
    if note := world.from_first(lambda: _held_start(config), "the start of the run"):
        say(note)
    if config.train.keep_pages and not memory.keep_pages():
        say("train.keep_pages: this system's allocator has no such setting, so nothing is kept")
    if config.train.return_pages and not memory.return_pages():
        say("train.return_pages: this system's allocator has no such setting, and works as usual")
    with (
        threads(config.train.threads or 1),
        cache_directory(config.train.compile_cache),
        _logged(say),
        ExitStack() as stack,
    ):
        built = build(config, world)
        stack.callback(built.close)
        for note in built.notes:
            say(f"{config.stage}: {note}")
        found = digests(built)
        world.agree(found)
        check_data(config, found)
        config = _with_hashes(config, found, built.templated)
        # Worker 0 holds the lock for as long as this sitting lasts.

        def locked() -> str:
            stack.enter_context(held(run, new=not resume))
            return ""

        world.from_first(locked, "the run directory")
        given = _prompts(built, say)
        # Now, since the first step reuses the memory of the first state.
        first_words = spoken(built, built.state, given)
        newest = world.from_first(lambda: _newest(run), "the newest checkpoint")
        state = world.for_all(lambda: _state(built, run, newest, config.train.steps, world))
        # Only now: a run that cannot be resumed stays as it was.
        world.from_first(lambda: _written(run, config, built, world), "the config")
        if state.step < config.train.steps:
            _say_where(config, built, state, say)
            state = _trained(config, built, state, run, stop, say)
        end = None
        if state.step >= config.train.steps:
            end = ending(built, state, given, world)
    return Outcome(
        config=config,
        built=built,
        state=state,
        records=facts.logged(run) if world.speaks else [],
        prompts=given,
        first_words=first_words,
        end=end,
    )


def _prompts(built: Built, say: Say) -> list[Prompt]:
    """The prompts for samples before the first step and after the last; none if that is slow."""
    size = bytes_to_gather(built)
    if size <= GATHERED:
        return prompts(built.evaluation, built.tokenizer)
    say(
        f"no samples: {size / 2**20:,.0f} MiB would be gathered for each token; "
        "ask the model afterwards, with functrain generate"
    )
    return []


def _settled(config: C, resume: bool) -> C:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    threads = torch.get_num_threads()
    run = RunDirectory(config.directory)
    if resume and run.config.is_file():
        config = directories.resumed(config, threads=threads, device=device)
        _check_total(run, config.train.steps)
        return config
    return directories.begun(config, threads=threads, device=device, resume=resume)


def _check_total(run: RunDirectory, steps: int) -> None:
    """Refuse a total below the run's step: it would have nothing to do and look finished."""
    newest = checkpoint.latest(run.checkpoints)
    step = None if newest is None else step_of(newest)
    if step is not None and step > steps:
        raise ConfigError(
            f"train.steps: {steps}, and {run.path} is at step {step} already; give at least that "
            "many"
        )


def digests(built: Built) -> dict[str, str]:
    """The hashes of a run's data, by their keys."""
    found = {"data.train": digest(built.source)}
    if built.held_out is not None:
        found["data.held_out"] = digest(built.held_out)
    return found


def check_data(config: Pretrain | SFT | DPO, found: Mapping[str, str]) -> None:
    """Raise `ConfigError` if the data's hashes differ from those that a run was begun with.

    This includes held-out data: a schedule may follow it, and it decides the best checkpoints.
    """
    given = config.data
    for key, path, begun in (
        ("data.train", given.train, given.sha256),
        ("data.held_out", given.held_out, given.held_out_sha256),
    ):
        if begun not in (None, found.get(key)):
            raise ConfigError(
                f"{key}: {path or given.train} is not what this run was begun with (another "
                "hash); put the old data back, or begin another --directory"
            )


def _with_hashes(config: C, found: Mapping[str, str], templated: bool | None) -> C:
    known = attrs.evolve(
        config.data,
        sha256=found["data.train"],
        held_out_sha256=found.get("data.held_out"),
        templated=templated,
    )
    return directories.sealed(attrs.evolve(config, data=known))


class _Saying(logging.Handler):
    """A logging handler that passes messages to `say`."""

    def __init__(self, say: Say) -> None:
        super().__init__()
        self._say = say

    def emit(self, record: logging.LogRecord) -> None:
        """Pass a message to `say`."""
        self._say(record.getMessage())


@contextmanager
def _logged(say: Say) -> Generator[None]:
    """Within, the library's log (use of whole logits, what is compiled) is passed to `say`."""
    log, handler = logging.getLogger("functrain"), _Saying(say)
    before = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.setLevel(before)
        log.removeHandler(handler)


@contextmanager
def threads(count: int) -> Generator[None]:
    """Within, torch uses `count` threads; afterwards as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _written(run: RunDirectory, config: Pretrain | SFT | DPO, built: Built, world: World) -> str:
    directories.write(run.config, toml.dumps(config))
    facts.written(run, built, world)
    if isinstance(built.tokenizer, ByteTokenizer):
        directories.write(run.tokenizer, built.tokenizer.to_json())
    elif isinstance(built.tokenizer, PretrainedTokenizer) and not run.tokenizer_files.exists():
        with directories.placed(run.tokenizer_files) as temporary:
            built.tokenizer.save(temporary)
    return ""


def _newest(run: RunDirectory) -> str:
    newest = checkpoint.latest(run.checkpoints)
    if newest is None:
        run.metrics.unlink(missing_ok=True)
    return "" if newest is None else str(newest)


def _state(built: Built, run: RunDirectory, newest: str, steps: int, world: World) -> TrainState:
    if not newest:
        return built.state
    try:
        under = conditions(built.step, built.source.batch_size)
        state = checkpoint.load(newest, like=built.state, conditions=under, world=world)
    except CheckpointError as error:
        way_out = _way_out(Path(newest))
        if way_out is None:
            raise
        raise CheckpointError(f"{error}\n{way_out}") from error
    if state.step < steps and world.speaks:
        facts.logged(run)  # refuses an invalid record, with a way out
        jsonl.truncate_after(run.metrics, state.step)
    return state


def _way_out(newest: Path) -> str | None:
    """What to do about a damaged checkpoint; None for one that is whole.

    A whole checkpoint that is refused is of another architecture or optimizer, as are those before
    it: removing it would only lead to the next.
    """
    try:
        if whole(OPERATING_SYSTEM, newest):
            return None
    except CheckpointError:  # it cannot be told whether it is whole
        return None
    if len(checkpoints(newest.parent)) == 1:
        return "it is damaged, and it is the only one of this run; begin another --directory"
    return f"it is damaged; to go on from the one before, remove {newest} and resume again"


def _held_start(config: Pretrain | SFT | DPO) -> str:
    """The message if the run that made this run's start cannot be told to keep it; else empty."""
    if isinstance(config, Pretrain):
        return ""
    start = config.model.from_
    refused = hold(Path(start), Path(config.directory))
    if refused is None:
        return ""
    return (
        f"{config.stage}: {refused}, so the run that made {start} is not told to keep it. "
        "Where that goes on, give it train.keep or train.keep_every: to go on here, and to use "
        "adapters, needs it"
    )


def _say_where(config: Pretrain | SFT | DPO, built: Built, state: TrainState, say: Say) -> None:
    count = sum(p.numel() for p in built.state.params.values())
    slow = ", compiled (the first step of each shape takes long)" if config.train.compile else ""
    size = world_of(built.step).size
    several = f"{size} workers, " if size > 1 else ""
    where = f"from step {state.step} on" if state.step else "from the beginning"
    say(
        f"{config.stage}: {count:,} parameters, {len(built.source):,} samples, "
        f"{config.train.steps:,} steps {where}, {config.train.threads} "
        f"thread{'s' if config.train.threads != 1 else ''}, "
        f"{several}{config.train.precision} on {config.train.device}{slow}, in {config.directory}"
    )
    after = rates_after(config.schedule, config.train.steps)
    if after is not None:
        say(f"{config.stage}: {after}")


def _trained(
    config: Pretrain | SFT | DPO,
    built: Built,
    state: TrainState,
    run: RunDirectory,
    stop: Stop,
    say: Say,
) -> TrainState:
    """The training loop; metrics are logged before saving, so no checkpoint is ahead of them."""
    plan, world = config.train, world_of(built.step)
    with (
        ExitStack() as stack,
        closing(jsonl.JSONLTracker(run.metrics if world.speaks else os.devnull)) as own,
        closing(progress.Progress(plan.steps, config.stage, stream=_stream(world))) as bar,
    ):
        told = own if plan.on_save_error == "stop" else _Forgiving(own, say)
        tracker = Several([told, *_services(config, run, state, stack, say, world)])
        if state.step == 0 and built.evaluation:
            tracker.log(0, evaluate(built.step, state, built.evaluation).to_dict())
        if world.any(bool(stop)):
            return state
        under = conditions(built.step, built.source.batch_size)
        beside = _beside(built)
        source = _ahead(built, stack)
        clock = Clock(config, built, state, source)
        for now, metrics in _steps(config, built, state, source, clock):
            state = now
            clock.saw(metrics)
            last = state.step == plan.steps
            # A stop adds no line of its own, so that the file equals an uninterrupted run's.
            logged = last or state.step % plan.log_every == 0 or "eval_loss" in metrics
            values: dict[str, float] = {}
            if logged or bar.due(state.step):  # reading the metrics waits for an accelerator
                values = metrics.to_dict() | clock.measured(state)
                values["epoch"] = state.cursor.samples / len(built.source)
                bar.update(state.step, values)
            if logged:
                tracker.log(state.step, values)
            # Read once: a signal between two reads would end the run with this step unsaved.
            stopping = world.any(bool(stop))
            # With keep_best, every evaluated state is saved: only such a one can be the best.
            due = state.step % plan.save_every == 0 or (plan.keep_best and "eval_loss" in metrics)
            if last or stopping or due:
                measured = {n: v for n, v in values.items() if n.startswith("eval_")}
                ends = last or stopping
                with clock.paused(metrics):
                    _save(world, plan, run, state, measured, under, beside, say, ends=ends)
            check_guard(built.step, state)
            if stopping:
                break
    return state


def _steps(
    config: Pretrain | SFT | DPO,
    built: Built,
    state: TrainState,
    source: Prefetched,
    clock: Clock,
) -> Iterator[tuple[TrainState, Metrics]]:
    """The steps of `train`, with evaluations, during which the clock is paused."""
    steps, every = config.train.steps, config.evaluation.every
    made = train(built.step, state, source, steps=steps)
    for now, metrics in made:
        state, measured = now, metrics
        if built.evaluation and (state.step % every == 0 or state.step == steps):
            with clock.paused(metrics):
                measured = metrics | evaluate(built.step, state, built.evaluation)
            # Not an evaluation at the last step alone: a longer run would not evaluate there.
            if state.step % every == 0:
                state, _ = made.send(built.step.observe(state, float(measured["eval_loss"])))
        yield state, measured


class _Forgiving:
    """A tracker for a run that continues on a full disk: it reports lines it cannot write."""

    def __init__(self, tracker: Tracker, say: Say) -> None:
        self._tracker, self._say = tracker, say

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics, or report that they cannot be written."""
        try:
            self._tracker.log(step, metrics)
        except DataError as error:
            self._say(f"{error}\ngoing on without step {step}, as train.on_save_error says")

    def close(self) -> None:
        """Close the tracker."""
        self._tracker.close()


def _beside(built: Built) -> dict[str, str]:
    """The texts that make each checkpoint a directory that transformers reads, with tokenizer."""
    found = models.config_files(built.step.architecture)
    if found and isinstance(built.tokenizer, PretrainedTokenizer):
        found |= built.tokenizer.files()
    return found


def _services(
    config: Pretrain | SFT | DPO,
    run: RunDirectory,
    state: TrainState,
    stack: ExitStack,
    say: Say,
    world: World,
) -> list[Beside]:
    """Open the trackers that the config names, on worker 0 only; the stack closes them."""
    told = TrackedRun(
        directory=run.path,
        project=config.tracking.project,
        name=config.tracking.name or run.path.absolute().name,
        config={key: value for key, value in toml.flat(config).items() if value is not None},
        step=state.step,
    )
    found = []
    for service in config.tracking.services if world.speaks else ():
        made = Beside(service, partial(opened, service, told), say)
        stack.callback(made.close)
        found.append(made)
    for each in found:
        each.ready()
    return found


def _stream(world: World) -> TextIO:
    return sys.stderr if world.speaks else io.StringIO()


def _ahead(built: Built, stack: ExitStack) -> Prefetched:
    """The data, read ahead by a thread, except where reading binds the architecture."""
    ahead = Prefetched(built.data)
    stack.callback(ahead.close)
    if built.cache is not None:
        ahead.close()  # from now on each batch is made on request
    return ahead


def _save(
    world: World,
    plan: Train,
    run: RunDirectory,
    state: TrainState,
    measured: dict[str, float],
    under: dict[str, Any],
    beside: dict[str, str],
    say: Say,
    *,
    ends: bool,
) -> None:
    """Save and prune; `ends`: whether the sitting ends here, so that a failure must be raised."""
    given: Any = {"metrics": measured, "conditions": under, "beside": beside}

    def saved() -> str:
        return str(checkpoint.save(run.checkpoints, state, **given))

    try:
        if is_sharded(state.params):
            checkpoint.save(run.checkpoints, state, world=world, **given)
        else:
            world.from_first(saved, "a save")
    except (CheckpointError, RelayedError) as error:
        if ends or plan.on_save_error == "stop":
            raise
        say(f"{error}\ngoing on without it, as train.on_save_error says")
        return
    if not world.speaks:
        return
    keep = checkpoint.Keep(
        last=plan.keep, every=plan.keep_every, best=plan.keep_best, steps=used_steps(run)
    )
    checkpoint.prune(run.checkpoints, keep)


def how_to_go_on(config: Pretrain | SFT | DPO) -> str:
    """The command that resumes a run."""
    path = shlex.quote(str(RunDirectory(config.directory).config))
    return f"functrain {config.stage} {path} --resume"
