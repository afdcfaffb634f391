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
    """What the command of every stage takes beside its config."""

    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Resume the run, to the bit; begin it where there is none."""


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
    """The number of workers; unless given, those that torchrun has started, or one."""
    per_node: int = 8
    """Workers on each node."""
    device: str = "h100"
    """a100, h100, h200 or b200 (their maker's figures), or here (this machine, measured).
    Under torchrun the communication of its workers is measured too."""
    utilisation: float | None = None
    """The fraction of a device's peak that a worker reaches, 0.4 unless given; or give tflops."""
    memory: float | None = None
    """GiB of memory of a worker; this and the following options override the device's figures."""
    tflops: float | None = None
    """TFLOP/s that a worker reaches."""
    inside: float | None = None
    """GB/s that a worker sends within its node."""
    between: float | None = None
    """GB/s that a worker sends to other nodes."""
    latency: float | None = None
    """Latency of an exchange in microseconds, for each doubling of the workers."""


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
    """The directory for its three runs and its report."""
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Resume where it was stopped, to the bit."""
    seed: int = 0
    """The root of all randomness."""
    scale: str = "full"
    """full, or tiny: everything in seconds, to try it out; the model learns nothing."""


@attrs.frozen(kw_only=True)
class Generate:
    """Generate text from the model of a run."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """A run directory, or a checkpoint in one."""
    prompt: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PROMPT")]
    """The text to continue."""
    max_new_tokens: int = 200
    """The most tokens to generate."""
    temperature: float = 0.0
    """0 takes the likeliest token each time; higher values vary more."""
    top_k: int | None = None
    """Sample from this many of the likeliest tokens."""
    top_p: float | None = None
    """Sample from the smallest set of tokens that has this probability."""
    seed: int = 0
    """The seed of the sampling."""
    plain: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Use the prompt as it is, even where the tokenizer has a chat template."""


@attrs.frozen(kw_only=True)
class Inspect:
    """Show what a checkpoint holds, after verifying it."""

    checkpoint: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CHECKPOINT")]
    """A checkpoint directory, or a run (its newest checkpoint)."""
    tensors: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """List every tensor."""


@attrs.frozen(kw_only=True)
class Verify:
    """Check checkpoints against their hashes, and replay steps to compare their bits."""

    path: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CHECKPOINT|RUN")]
    """A checkpoint, or a run (every checkpoint that it has kept)."""
    replay: str | None = None
    """A..B: make the steps from checkpoint A (0: the beginning) to B again, and compare."""


@attrs.frozen(kw_only=True)
class Diff:
    """Show where two runs or checkpoints differ: config, metrics, numerics, then leaf by leaf."""

    one: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="ONE")]
    """A checkpoint or a run."""
    other: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OTHER")]
    """Another. Of two runs, the first step at which kept checkpoints differ is shown."""


@attrs.frozen(kw_only=True)
class Init:
    """Write a config for a stage: every key, what it means, its default."""

    stage: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="pretrain|sft|dpo")]
    """The stage."""
    path: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="FILE")] = None
    """The file to write; STAGE.toml unless given."""


@attrs.frozen(kw_only=True)
class Evaluate:
    """Evaluate a model on files: perplexity of text and completions, and pairs ranked right.

    Documents and examples are laid out and cut as the run does with its own.
    """

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """A run directory, or a checkpoint in one."""
    files: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="FILE")] = ()
    """Text, token ids, or records of text, completions or pairs; or `embedded`, the demo's data."""
    tasks: tuple[str, ...] = ()
    """Tasks of lm-evaluation-harness, by name; their data come from a hub, or from files."""
    include: str | None = None
    """A directory with your own tasks, as YAML."""
    chat: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Put the tasks into the tokenizer's chat template."""
    time: int | None = None
    """The most tokens of a row or an example; unless given, as the run, and for tasks the model."""
    batch_size: int = 32
    """Rows, examples or pairs in a batch; the result does not depend on it."""
    limit: int | None = None
    """The most rows, examples or pairs of each file."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print a line of JSON for each file instead of a table."""

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
    """Write one page about several runs, with their curves in the same charts."""

    runs: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RUN")]
    """Run directories."""
    to: str = "report.html"
    """The file to write; an existing one is replaced."""


@attrs.frozen(kw_only=True)
class Export:
    """Write the model of a run for transformers, or its adapters for peft."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """A run directory, or a checkpoint in one."""
    directory: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DIR")]
    """The directory to write; an earlier export there is replaced."""
    merge: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """For a run with lora.rank: write the whole model, with the adapters merged into it."""
    dtype: str | None = attrs.field(
        default=None, validator=one_of(("float32", "bfloat16", "float16"))
    )
    """float32, bfloat16 or float16; unless given, as it was trained."""


@attrs.frozen(kw_only=True)
class Data:
    """Show a record of a file, with the tokens that are trained on marked."""

    what: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="show")]
    """show"""
    file: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FILE")]
    """Records (.jsonl, .json, .parquet) of dialogues, prompts with completions, or preferences."""
    model: str | None = None
    """Whose tokenizer reads it: a Hugging Face directory, a GGUF file or a run; else bytes."""
    index: int = 0
    """The number of the record, from 0."""
    color: str = "auto"
    """always, never, or auto (where the output is a terminal)."""


@attrs.frozen(kw_only=True)
class Completion:
    """Print completions for a shell.

    bash: eval "$(functrain completion bash)". fish: functrain completion fish | source. zsh:
    functrain completion zsh > DIR/_functrain, where DIR is in $fpath.
    """

    shell: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="bash|zsh|fish")]
    """The shell."""
