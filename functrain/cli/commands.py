"""The commands: parse, check, run; the arguments of each are a record."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import attrs
import orjson
import tyro

from functrain.cli import toml
from functrain.cli.config import DPO, SFT, Pretrain
from functrain.errors import ConfigError, did_you_mean

A = TypeVar("A")


@attrs.frozen(kw_only=True)
class RunArguments:
    """What every stage's command takes beside its config."""

    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Go on with the run, to the bit; begin it where there is none."""


@attrs.frozen(kw_only=True)
class PretrainArguments(RunArguments):
    """functrain pretrain [run.toml] [options]"""

    config: Annotated[Pretrain, tyro.conf.arg(name="")] = attrs.field(factory=Pretrain)


@attrs.frozen(kw_only=True)
class SFTArguments(RunArguments):
    """functrain sft [run.toml] [options]"""

    config: Annotated[SFT, tyro.conf.arg(name="")] = attrs.field(factory=SFT)


@attrs.frozen(kw_only=True)
class DPOArguments(RunArguments):
    """functrain dpo [run.toml] [options]"""

    config: Annotated[DPO, tyro.conf.arg(name="")] = attrs.field(factory=DPO)


@attrs.frozen(kw_only=True)
class PlanArguments:
    """What `functrain plan` takes beside the config of a stage."""

    workers: int | None = None
    """Workers in all; those that torchrun has started unless given, or one."""
    per_node: int = 8
    """Workers to a node."""
    device: str = "h100"
    """a100, h100, h200 or b200, by their maker's figures; or here: what this machine's workers come
    to, measured. Under torchrun their exchanges too."""
    utilisation: float = 0.4
    """What part of a device's peak a worker comes to."""
    memory: float | None = None
    """GiB of a worker, where they are others than the device's; so are the next."""
    tflops: float | None = None
    """10¹² operations a second that a worker comes to."""
    inside: float | None = None
    """GB a second that a worker sends to others of its node."""
    between: float | None = None
    """GB a second that a worker sends to other nodes."""
    latency: float | None = None
    """Microseconds of an exchange beside its bytes, for each doubling of the workers."""


@attrs.frozen(kw_only=True)
class PretrainPlan(PlanArguments):
    """functrain plan pretrain [run.toml] [options]"""

    config: Annotated[Pretrain, tyro.conf.arg(name="")] = attrs.field(factory=Pretrain)


@attrs.frozen(kw_only=True)
class SFTPlan(PlanArguments):
    """functrain plan sft [run.toml] [options]"""

    config: Annotated[SFT, tyro.conf.arg(name="")] = attrs.field(factory=SFT)


@attrs.frozen(kw_only=True)
class DPOPlan(PlanArguments):
    """functrain plan dpo [run.toml] [options]"""

    config: Annotated[DPO, tyro.conf.arg(name="")] = attrs.field(factory=DPO)


@attrs.frozen(kw_only=True)
class Demo:
    """Pretrain, fine-tune and align a small model on Python's own documentation."""

    directory: str = "runs/demo"
    """Where its three runs and its report go."""
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Go on where it was stopped, to the bit."""
    seed: int = 0
    """The root of all randomness."""
    scale: str = "full"
    """full, or tiny: a rehearsal of everything in seconds, which learns nothing."""


@attrs.frozen(kw_only=True)
class Generate:
    """What the model of a run says after a prompt."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """A run directory, or a checkpoint in one."""
    prompt: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PROMPT")]
    """The text to go on from."""
    max_new_tokens: int = 200
    """Tokens at most."""
    temperature: float = 0.0
    """0 takes the likeliest token each time; higher is more varied."""
    top_k: int | None = None
    """Sample from the so many likeliest tokens."""
    top_p: float | None = None
    """Sample from the smallest set of this probability."""
    seed: int = 0
    """Of the sampling."""
    plain: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """The prompt as it is, also where the tokenizer has a chat template."""


@attrs.frozen(kw_only=True)
class Inspect:
    """What a checkpoint holds, verified."""

    checkpoint: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CHECKPOINT")]
    """A checkpoint directory, or a run (then its newest)."""
    tensors: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """List every tensor."""


@attrs.frozen(kw_only=True)
class Verify:
    """Check checkpoints against their hashes, and steps against being made again."""

    path: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CHECKPOINT|RUN")]
    """A checkpoint, or a run: then every checkpoint that it has kept."""
    replay: str | None = None
    """A..B: make the steps from checkpoint A (0: from the beginning) to B again, and compare."""


@attrs.frozen(kw_only=True)
class Diff:
    """Where two runs or checkpoints part: config, metrics, numerics, then leaf by leaf."""

    one: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="ONE")]
    """A checkpoint or a run."""
    other: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OTHER")]
    """Another; of two runs the first step is shown at which kept checkpoints differ."""


@attrs.frozen(kw_only=True)
class Init:
    """Write a config of a stage: every key, what it means, its default."""

    stage: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="pretrain|sft|dpo")]
    """Of which stage."""
    path: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="FILE")] = None
    """Where to; STAGE.toml unless given."""


@attrs.frozen(kw_only=True)
class Evaluate:
    """A model over files: perplexity of text and completions, and which of a pair it likes."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """A run directory, or a checkpoint in one."""
    files: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="FILE")] = ()
    """Text, token ids, or JSON Lines of text, completions or pairs; `embedded` is the default's."""
    tasks: tuple[str, ...] = ()
    """Tasks of lm-evaluation-harness, by name; its data come from a hub, or from files."""
    include: str | None = None
    """A directory with tasks of your own, as YAML."""
    chat: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Ask the tasks in the tokenizer's chat template."""
    time: int | None = None
    """Tokens of a row or an example at most; the run's own, of tasks the model's, unless given."""
    batch_size: int = 32
    """Rows, examples or pairs at once; the result does not depend on it."""
    limit: int | None = None
    """Rows, examples or pairs of each file at most."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """A line of JSON for each file, in the place of the table."""

    def __attrs_post_init__(self) -> None:
        for name in ("time", "batch_size", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}: {value}, expected an integer of at least 1")


@attrs.frozen(kw_only=True)
class Report:
    """One page over several runs, their curves in the same charts."""

    runs: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RUN")]
    """Run directories."""
    to: str = "report.html"
    """The page; one that is there is replaced."""


@attrs.frozen(kw_only=True)
class Export:
    """The model of a run as transformers loads it, or its adapters as peft does."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """A run directory, or a checkpoint in one."""
    directory: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DIR")]
    """Where it goes; an earlier export there is replaced."""
    merge: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Of a run with lora.rank: the whole model, with the adapters in its weights."""
    dtype: str | None = None
    """float32, bfloat16 or float16; as it was trained unless given."""


@attrs.frozen(kw_only=True)
class Data:
    """An example of a file of records, with the tokens that are trained marked."""

    what: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="show")]
    """show"""
    file: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FILE")]
    """A .jsonl or .json file of dialogues, prompts with completions, or preferences."""
    model: str | None = None
    """A directory of Hugging Face's, a GGUF file or a run, whose tokenizer reads it; else bytes."""
    index: int = 0
    """Which record, from 0 on."""
    color: str = "auto"
    """always, never, or auto: where the output is a terminal."""


@attrs.frozen(kw_only=True)
class Completion:
    """Completions for a shell.

    bash: eval "$(functrain completion bash)". fish: functrain completion fish | source. zsh:
    functrain completion zsh > DIR/_functrain, where DIR is in $fpath.
    """

    shell: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="bash|zsh|fish")]
    """For which shell."""


def say(line: str) -> None:
    """A line for the reader, beside the results on stdout."""
    print(line, file=sys.stderr, flush=True)


def _parsed(cls: type[A], command: str, rest: Sequence[str], default: A | None = None) -> A:
    options: dict[str, Any] = {} if default is None else {"default": default}
    parsed: A = tyro.cli(
        cls, prog=f"functrain {command}", description=cls.__doc__, args=list(rest), **options
    )
    return parsed


def check_extras() -> None:
    """Raise `ConfigError` where what a run's end needs is missing: not after hours of training."""
    for name in ("jinja2", "rich"):
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"a run needs {name} for its report: pip install 'functrain[cli]'")


def stage(command: str, rest: Sequence[str]) -> int:
    """`functrain pretrain|sft|dpo [run.toml] [--overrides] [--resume]`."""
    arguments = stage_arguments(command, rest)
    from functrain.cli.directory import check_files

    if not _several():  # else it is said once, when all have met
        check_files(arguments.config)
    check_extras()
    from functrain.cli.run import how_to_go_on, run_stage
    from functrain.cli.signals import stopping
    from functrain.cli.summary import conclude
    from functrain.distributed import world

    train, resume = arguments.config.train, arguments.resume or _restarted()
    with stopping() as stop, world(device=train.device, timeout=train.timeout) as workers:
        own = say if workers.speaks else _silent
        outcome = run_stage(arguments.config, resume=resume, stop=stop, say=own, world=workers)
        if outcome.finished:
            if workers.speaks:
                print(conclude(outcome))
            return 0
        own(f"stopped at step {outcome.state.step}; go on with: {how_to_go_on(outcome.config)}")
        return stop.exit_code


def _several() -> bool:
    """Whether this process is one of several workers, as torchrun starts them."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def _restarted() -> bool:
    """Whether torchrun has started the workers again after one of them had failed."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def _silent(_line: str) -> None:
    """What a worker says that is not rank 0."""


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
    arguments = stage_arguments(which, given, _PLANS)
    from functrain.cli.plan import Machines, planned
    from functrain.cli.run import threads
    from functrain.distributed import world

    fields = attrs.asdict(arguments, recurse=False)
    config = fields.pop("config")
    train = config.train
    # The machine of a plan need not be there.
    device = train.device if fields["device"] == "here" else "cpu"
    with threads(train.threads or 1), world(device=device, timeout=train.timeout) as workers:
        fields["workers"] = fields["workers"] or workers.size
        found = workers.for_all(lambda: planned(config, Machines(**fields), workers))
        if workers.speaks:
            print(found)
    return 0


def stage_arguments(command: str, rest: Sequence[str], classes: Mapping[str, Any] = _STAGES) -> Any:
    """The arguments of a stage's command: defaults, then the file, then the overrides."""
    cls: Any = classes[command]
    given = list(rest)
    config: Any = None
    if given and not given[0].startswith("-"):
        config = toml.read_as(Path(given.pop(0)), command)
    late = next((each for each in given if each.endswith(".toml")), None)
    if late is not None:
        raise ConfigError(
            f"{late}: give the config file first: functrain {command} {late} --train.steps 100 …"
        )
    default = cls() if config is None else cls(config=config)
    return _parsed(cls, command, given, default)


def reference(command: str, rest: Sequence[str]) -> int:
    """`functrain reference run.toml`: the reference's log-probs, ahead of `functrain dpo`."""
    config = stage_arguments("dpo", rest).config
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
        print(cached(settled, say))
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
    print(generated(options.pop("run"), options.pop("prompt"), **options))
    return 0


def init(command: str, rest: Sequence[str]) -> int:
    """`functrain init STAGE [FILE]`."""
    arguments = _parsed(Init, command, rest)
    from functrain.cli.template import written

    print(written(arguments.stage, Path(arguments.path or f"{arguments.stage}.toml")))
    return 0


def evaluate(command: str, rest: Sequence[str]) -> int:
    """`functrain evaluate RUN FILE …`."""
    arguments = _parsed(Evaluate, command, rest)
    if not arguments.files and not arguments.tasks:
        raise ConfigError("evaluate: no file; give some after the run, or embedded, or --tasks")
    from functrain.cli.evaluate import HEAD, Measured, evaluated
    from functrain.cli.summary import table
    from functrain.cli.tasks import JUDGED, Judged, judged

    plan: Any = {
        "time": arguments.time,
        "batch_size": arguments.batch_size,
        "limit": arguments.limit,
    }
    found: list[tuple[tuple[str, ...], Sequence[Measured | Judged]]] = []
    if arguments.files:
        found.append((HEAD, evaluated(arguments.run, arguments.files, **plan)))
    if arguments.tasks:
        more: Any = {"include": arguments.include, "chat": arguments.chat}
        found.append((JUDGED, judged(arguments.run, arguments.tasks, **more, **plan)))
    for head, rows in found:
        if arguments.json:
            for each in rows:
                print(orjson.dumps(attrs.asdict(each)).decode())
        else:
            print(table(head, [each.row() for each in rows]))
    return 0


SHELLS = ("bash", "zsh", "fish")


def completion(command: str, rest: Sequence[str]) -> int:
    """`functrain completion bash|zsh|fish`."""
    shell = _parsed(Completion, command, rest).shell
    if shell not in SHELLS:
        raise ConfigError(f"shell: {shell!r} is unknown; {did_you_mean(shell, SHELLS)}")
    asked = ["--tyro-print-completion", shell]
    try:
        tyro.extras.subcommand_cli_from_dict(ARGUMENTS, prog="functrain", args=asked)
    except SystemExit as end:  # how tyro ends after it has printed
        if end.code:
            raise
    if shell == "bash":
        # What is no option and no command is a file.
        print("complete -o default -F _tyro_functrain functrain")
    return 0


def report(command: str, rest: Sequence[str]) -> int:
    """`functrain report RUN … [--to FILE]`."""
    arguments = _parsed(Report, command, rest)
    check_extras()
    from functrain.cli.reports import compared

    print(compared(arguments.runs, Path(arguments.to)))
    return 0


def inspect(command: str, rest: Sequence[str]) -> int:
    """`functrain inspect CHECKPOINT`."""
    arguments = _parsed(Inspect, command, rest)
    from functrain.cli.show import described

    print(described(arguments.checkpoint, tensors=arguments.tensors))
    return 0


def export(command: str, rest: Sequence[str]) -> int:
    """`functrain export RUN DIR [--merge] [--dtype …]`."""
    arguments = _parsed(Export, command, rest)
    from functrain.cli.export import exported

    print(
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
    print(
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
        print(line, flush=True)
    return 0


def diff(command: str, rest: Sequence[str]) -> int:
    """`functrain diff ONE OTHER`; 0 where they are the same, 1 where not."""
    arguments = _parsed(Diff, command, rest)
    from functrain.cli.verify import compared

    same, lines = compared(arguments.one, arguments.other)
    print("\n".join(lines))
    return 0 if same else 1


ARGUMENTS: dict[str, Any] = {
    "init": Init,
    "demo": Demo,
    "pretrain": PretrainArguments,
    "sft": SFTArguments,
    "dpo": DPOArguments,
    "reference": DPOArguments,
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
"""What each command takes."""
