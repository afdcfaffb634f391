"""The commands: each parses its arguments into a record, checks them, and runs."""

from __future__ import annotations

import importlib.util
import os
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import attrs
import orjson
import tyro

from functrain.cli import toml
from functrain.cli.arguments import (
    Completion,
    Data,
    Demo,
    Diff,
    DPOArguments,
    DPOPlan,
    Evaluate,
    Export,
    Generate,
    Init,
    Inspect,
    PretrainArguments,
    PretrainPlan,
    Reference,
    Report,
    SFTArguments,
    SFTPlan,
    Verify,
)
from functrain.cli.checks import check_path
from functrain.cli.config import STAGES
from functrain.cli.output import print_result, printing, say
from functrain.errors import ConfigError, DivergedError, did_you_mean

A = TypeVar("A")


def _parsed(cls: type[A], command: str, rest: Sequence[str], default: A | None = None) -> A:
    options: dict[str, Any] = {} if default is None else {"default": default}
    with printing():  # its --help
        parsed: A = tyro.cli(
            cls, prog=f"functrain {command}", description=cls.__doc__, args=list(rest), **options
        )
    _check_paths(parsed)
    return parsed


def _check_paths(arguments: Any) -> None:
    """Raise `ConfigError` for what cannot be a path: a prompt in place of a run, say."""
    for name, value in attrs.asdict(arguments, recurse=False).items():
        for each in value if isinstance(value, tuple) else (value,):
            if isinstance(each, str) and name != "prompt":
                check_path(name, each)


def check_extras() -> None:
    """Raise `ConfigError` if packages that a run needs at its end are missing, before it starts."""
    for name in ("jinja2", "rich"):
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"a run needs {name} for its report: pip install 'functrain[cli]'")


def stage(command: str, rest: Sequence[str]) -> int:
    """`functrain pretrain|sft|dpo [run.toml] [--overrides] [--resume]`."""
    arguments = stage_arguments(command, rest)
    train, resume = arguments.config.train, arguments.resume or _restarted()
    if resume and rest and not rest[0].startswith("-"):
        asked = any(each.split("=")[0] == "--directory" for each in rest)
        if not asked:
            _check_place(Path(rest[0]), arguments.config.directory)
    if resume:
        _check_unset(rest, arguments.config.directory)
    from functrain.cli.directory import check_files

    if not _several():  # several workers report it once, after they have met
        check_files(arguments.config)
    check_extras()
    from functrain.cli.run import how_to_go_on, run_stage
    from functrain.cli.signals import stopping
    from functrain.cli.summary import conclude
    from functrain.distributed import world

    with stopping() as stop, world(device=train.device, timeout=train.timeout) as workers:
        own = say if workers.speaks else _silent
        try:
            outcome = run_stage(arguments.config, resume=resume, stop=stop, say=own, world=workers)
        except DivergedError as error:
            # --resume permits neither change that the error advises: it would be another run.
            raise DivergedError(
                f"{error}\nwith --resume this run goes on as it was begun alone: begin another, "
                "with another --directory and a lower --schedule.peak or other data"
            ) from error
        if outcome.finished:
            if workers.speaks:
                print_result(conclude(outcome))
            return 0
        own(f"stopped at step {outcome.state.step}; go on with: {how_to_go_on(outcome.config)}")
        return stop.exit_code


def _check_place(file: Path, directory: str) -> None:
    """Raise `ConfigError` for the config of a moved run: a new run would begin at the old place."""
    here = file.parent
    if file.name != "config.toml" or not (here / "checkpoints").is_dir():
        return
    if Path(directory).resolve() != here.resolve():
        raise ConfigError(
            f"{file}: is of a run that was begun in {directory} and lies in {here} now (looked "
            f"from {Path.cwd()}); to go on with it, give --directory {shlex.quote(str(here))}"
        )


_FILLED = ("data.enable_thinking", "data.today", "schedule.total", "train.device", "train.threads")
"""Keys that a run fills in when it begins, so that None stands for the filled-in value."""


def _check_unset(rest: Sequence[str], directory: str) -> None:
    """Raise `ConfigError` for an option None that a resumed run would ignore.

    On resuming, a key left open is taken from the run, and a None in the config counts as open.
    """
    from functrain.cli.directory import free_keys
    from functrain.cli.origins import RunDirectory

    file = RunDirectory(directory).config
    unset = [key for key in _unset(rest) if key not in _FILLED]
    if not unset or not file.is_file():
        return
    begun = toml.read_any(file)
    has, free = toml.flat(begun), free_keys(begun)
    for key in unset:
        if has.get(key) is None:
            continue
        way = "begin another --directory"
        if key in free:
            way = f"take {key.rpartition('.')[2]} out of {file}, and resume without this option"
        raise ConfigError(
            f"{key}: None, and the run has {has[key]!r}, which --resume keeps for what is left "
            f"open; {way}"
        )


def _unset(rest: Sequence[str]) -> Iterator[str]:
    """The keys that the command line sets to None: `--train.keep-best None`."""
    for each, after in zip(rest, [*rest[1:], ""], strict=True):
        option, equals, value = each.partition("=")
        if option.startswith("--") and (value if equals else after) == "None":
            yield option[2:].replace("-", "_")


def _several() -> bool:
    """Whether this process is one of several workers started by torchrun."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def _restarted() -> bool:
    """Whether torchrun has restarted the workers after a failure."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def _silent(_line: str) -> None:
    """`say` for workers other than rank 0."""


_STAGES = {"pretrain": PretrainArguments, "sft": SFTArguments, "dpo": DPOArguments}
_PLANS = {"pretrain": PretrainPlan, "sft": SFTPlan, "dpo": DPOPlan}


def plan(_command: str, rest: Sequence[str]) -> int:
    """`functrain plan pretrain|sft|dpo [run.toml] [--workers …] [--overrides]`."""
    which, *given = rest or ("",)
    if which not in _PLANS and which not in ("-h", "--help"):
        known = "functrain plan pretrain|sft|dpo [run.toml] --workers 8 --device h100"
        raise ConfigError(f"plan: {which!r}; {did_you_mean(which, _PLANS)}: {known}")
    if which not in _PLANS:
        _parsed(PretrainPlan, "plan pretrain|sft|dpo", ["--help"])
    arguments = stage_arguments(which, given, _PLANS, prog=f"plan {which}")
    from functrain.cli.plan import Machines, planned
    from functrain.cli.run import threads
    from functrain.distributed import world

    fields = attrs.asdict(arguments, recurse=False)
    config = fields.pop("config")
    train = config.train
    # The machine that is planned for need not be at hand.
    device = train.device if fields["device"] == "here" else "cpu"
    with threads(train.threads or 1), world(device=device, timeout=train.timeout) as workers:
        if fields["workers"] is None:
            fields["workers"] = workers.size
        found = workers.for_all(lambda: planned(config, Machines(**fields), workers))
        if workers.speaks:
            print_result(found)
    return 0


def stage_arguments(
    stage: str,
    rest: Sequence[str],
    classes: Mapping[str, Any] = _STAGES,
    prog: str | None = None,
) -> Any:
    """The arguments of a stage's command: defaults, then the file, then the overrides.

    `prog`: the command, if it is not the stage's own.
    """
    cls: Any = classes[stage]
    command = prog or stage
    given = list(rest)
    config: Any = None
    if given and not given[0].startswith("-"):
        config = _reopened(toml.read_as(Path(given.pop(0)), stage))
    late = _file_in(given, stage)
    if late is not None and config is not None:
        raise ConfigError(f"{late}: a second config file, after {rest[0]}; give one of them")
    if late is not None:
        raise ConfigError(
            f"{late}: give the config file first: functrain {command} {shlex.quote(late)} "
            "--train.steps 100 …"
        )
    default = cls() if config is None else cls(config=config)
    _check_sections(given, toml.flat(default.config))
    return _parsed(cls, command, given, default)


def _check_sections(given: Sequence[str], known: Collection[str]) -> None:
    """Raise `ConfigError` for an option of the wrong section; tyro would not name the right one."""
    for each in given:
        name = each.partition("=")[0].removeprefix("--").replace("-", "_")
        if not each.startswith("--") or "." not in name or name in known:
            continue
        key = name.rpartition(".")[2]
        homes = [other for other in known if other.rpartition(".")[2] == key]
        if homes:
            right = " or ".join(f"--{other.replace('_', '-')}" for other in homes)
            raise ConfigError(f"{name}: unknown option; it is {right}")


def _file_in(given: Sequence[str], stage: str) -> str | None:
    """A config file among options, which must not be mistaken for the value of an option."""
    defaults = toml.flat(STAGES[stage]())
    flags = {"resume", *(key for key, value in defaults.items() if isinstance(value, bool))}
    for option, each in zip(["", *given], given, strict=False):
        is_flag = option.removeprefix("--").replace("-", "_") in flags
        is_value = option.startswith("--") and "=" not in option and not is_flag
        if each.endswith(".toml") and not each.startswith("-") and not is_value:
            return each
    return None


def _reopened(config: Any) -> Any:
    """A config without its schedule's end, if a run has filled that in from its steps.

    So a new run gets an end of its own, and a resumed one keeps the end that it was begun with.
    """
    schedule = config.schedule
    filled = schedule.total_filled
    if filled is None:  # a run from before `total_filled` was recorded, or no run's config
        filled = config.data.sha256 is not None and schedule.total == config.train.steps
    if not filled:
        return config
    return attrs.evolve(config, schedule=attrs.evolve(schedule, total=None, total_filled=None))


def reference(command: str, rest: Sequence[str]) -> int:
    """`functrain reference run.toml`: compute the reference's log-probs before `functrain dpo`."""
    config = stage_arguments("dpo", rest, {"dpo": Reference}, prog=command).config
    from functrain.cli.directory import check_files, resolved

    if config.preference.cache is None:
        raise ConfigError(
            "preference.cache: missing; name a file for the log-probs: "
            "functrain reference run.toml --preference.cache runs/reference.jsonl"
        )
    check_files(config)
    import torch

    from functrain.cli.build import cached
    from functrain.cli.run import threads

    device = "cuda" if torch.cuda.is_available() else "cpu"
    settled = resolved(config, threads=torch.get_num_threads(), device=device)
    with threads(settled.train.threads or 1):
        print_result(cached(settled, say))
    return 0


def demo(command: str, rest: Sequence[str]) -> int:
    """`functrain demo [--directory …] [--seed …] [--resume]`."""
    arguments = _parsed(Demo, command, rest)
    from functrain.cli.recipe import recipe

    # Checked before torch is loaded.
    recipe(arguments.directory, seed=arguments.seed, scale=arguments.scale)
    check_extras()
    from functrain.cli.demo import run_demo

    return run_demo(
        arguments.directory,
        seed=arguments.seed,
        scale=arguments.scale,
        resume=arguments.resume,
        say=say,
    )


def generate(command: str, rest: Sequence[str]) -> int:
    """`functrain generate RUN "prompt"`."""
    arguments = _parsed(Generate, command, rest)
    from functrain.cli.show import generated

    options = attrs.asdict(arguments)
    print_result(generated(options.pop("run"), options.pop("prompt"), **options))
    return 0


def init(command: str, rest: Sequence[str]) -> int:
    """`functrain init STAGE [FILE]`."""
    arguments = _parsed(Init, command, rest)
    from functrain.cli.template import written

    print_result(written(arguments.stage, Path(arguments.path or f"{arguments.stage}.toml")))
    return 0


def evaluate(command: str, rest: Sequence[str]) -> int:
    """`functrain evaluate RUN FILE …`."""
    arguments = _parsed(Evaluate, command, rest)
    if not arguments.files and not arguments.tasks:
        raise ConfigError("evaluate: no file; give some after the run, or embedded, or --tasks")
    from functrain.cli.evaluate import HEAD, Measured, check, evaluated
    from functrain.cli.restoring import trained
    from functrain.cli.summary import table
    from functrain.cli.tasks import JUDGED, Judged, found, judged

    plan: Any = {
        "time": arguments.time,
        "batch_size": arguments.batch_size,
        "limit": arguments.limit,
    }
    run, files = arguments.run, arguments.files
    check(run, files)
    tasks = None
    if arguments.tasks:
        tasks = found(run, arguments.tasks, include=arguments.include, chat=arguments.chat)
    model = trained(run)
    results: list[tuple[tuple[str, ...], Sequence[Measured | Judged]]] = []
    if files:
        results.append((HEAD, evaluated(model, files, **plan)))
    if tasks is not None:
        results.append((JUDGED, judged(model, tasks, **plan)))
    for head, rows in results:
        if arguments.json:
            for each in rows:
                print_result(orjson.dumps(attrs.asdict(each)).decode())
        else:
            print_result(table(head, [each.row() for each in rows]))
    return 0


SHELLS = ("bash", "zsh", "fish")


def completion(command: str, rest: Sequence[str]) -> int:
    """`functrain completion bash|zsh|fish`."""
    shell = _parsed(Completion, command, rest).shell
    if shell not in SHELLS:
        raise ConfigError(f"shell: {shell!r} is unknown; {did_you_mean(shell, SHELLS)}")
    asked = ["--tyro-print-completion", shell]
    try:
        with printing():
            tyro.extras.subcommand_cli_from_dict(ARGUMENTS, prog="functrain", args=asked)
    except SystemExit as end:  # raised by tyro after it has printed
        if end.code:
            raise
    if shell == "bash":
        # Complete as a file whatever is neither an option nor a command.
        print_result("complete -o default -F _tyro_functrain functrain")
    return 0


def report(command: str, rest: Sequence[str]) -> int:
    """`functrain report RUN … [--to FILE]`."""
    arguments = _parsed(Report, command, rest)
    check_extras()
    from functrain.cli.reports import compared

    print_result(compared(arguments.runs, Path(arguments.to)))
    return 0


def inspect(command: str, rest: Sequence[str]) -> int:
    """`functrain inspect CHECKPOINT`."""
    arguments = _parsed(Inspect, command, rest)
    from functrain.cli.show import described

    print_result(described(arguments.checkpoint, tensors=arguments.tensors))
    return 0


def export(command: str, rest: Sequence[str]) -> int:
    """`functrain export RUN DIR [--merge] [--dtype …]`."""
    arguments = _parsed(Export, command, rest)
    from functrain.cli.export import exported

    print_result(
        exported(arguments.run, arguments.directory, merge=arguments.merge, dtype=arguments.dtype)
    )
    return 0


def data(command: str, rest: Sequence[str]) -> int:
    """`functrain data show FILE [--model DIR] [--index N]`."""
    arguments = _parsed(Data, command, rest)
    if arguments.what != "show":
        raise ConfigError(f"data: {arguments.what!r} is unknown; known: 'show'")
    from functrain.cli.data import shown

    colored = {"always": True, "never": False, "auto": None}
    if arguments.color not in colored:
        raise ConfigError(f"color: {arguments.color!r}, expected auto, always or never")
    print_result(
        shown(
            arguments.file,
            model=arguments.model,
            index=arguments.index,
            color=colored[arguments.color],
        )
    )
    return 0


def verify(command: str, rest: Sequence[str]) -> int:
    """`functrain verify CHECKPOINT|RUN [--replay A..B]`."""
    arguments = _parsed(Verify, command, rest)
    from functrain.cli.verify import verified

    for line in verified(arguments.path, arguments.replay):
        print_result(line)
    return 0


def diff(command: str, rest: Sequence[str]) -> int:
    """`functrain diff ONE OTHER`; returns 0 if they are the same, 1 if not."""
    arguments = _parsed(Diff, command, rest)
    from functrain.cli.verify import compared

    same, lines = compared(arguments.one, arguments.other)
    print_result("\n".join(lines))
    return 0 if same else 1


ARGUMENTS: dict[str, Any] = {
    "init": Init,
    "demo": Demo,
    "pretrain": PretrainArguments,
    "sft": SFTArguments,
    "dpo": DPOArguments,
    "reference": Reference,
    "generate": Generate,
    "evaluate": Evaluate,
    "plan": PretrainPlan,
    "report": Report,
    "data": Data,
    "inspect": Inspect,
    "export": Export,
    "verify": Verify,
    "diff": Diff,
    "completion": Completion,
}
"""The arguments of each command."""
