"""The arguments of each command, as records into which tyro parses the command line."""

from __future__ import annotations

from typing import Annotated

import attrs
import tyro

from functrain.cli.checks import at_home, one_of
from functrain.cli.config import DPO, SFT, Pretrain
from functrain.errors import ConfigError


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
class Reference:
    """functrain reference [run.toml] [options]"""

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
    utilisation: float | None = None
    """What part of a device's peak a worker comes to, 0.4 unless given; or else tflops."""
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

    directory: str = attrs.field(default="runs/demo", converter=at_home)
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
    """A model over files: perplexity of text and completions, and which of a pair it likes.

    Documents and examples are laid out and cut as the run itself lays out and cuts its own.
    """

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """A run directory, or a checkpoint in one."""
    files: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="FILE")] = ()
    """Text, token ids, or records of text, completions or pairs; `embedded` is the default's."""
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
        if not self.tasks and (self.include is not None or self.chat):
            name = "chat" if self.chat else "include"
            raise ConfigError(f"{name}: it is of --tasks, and there are none; leave it out")


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
    dtype: str | None = attrs.field(
        default=None, validator=one_of(("float32", "bfloat16", "float16"))
    )
    """float32, bfloat16 or float16; as it was trained unless given."""


@attrs.frozen(kw_only=True)
class Data:
    """An example of a file of records, with the tokens that are trained marked."""

    what: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="show")]
    """show"""
    file: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FILE")]
    """Records (.jsonl, .json, .parquet) of dialogues, prompts with completions, or preferences."""
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
