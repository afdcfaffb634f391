"""A run's config: small nested records, checked when they are made, without importing torch."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Any, ClassVar

import attrs
import tyro
from attrs.converters import optional

from functrain.cli.checks import (
    a_day,
    a_mix,
    at_home,
    at_least,
    count,
    fraction,
    fraction_or_one,
    fraction_to_one,
    given,
    mixed,
    named,
    not_negative,
    number,
    one_of,
    positive,
    size,
)
from functrain.cli.known import (
    BARE,
    DEVICES,
    DIVERGENCES,
    EMBEDDED,
    KTO,
    LAYOUTS,
    LIKELIHOODS,
    MULTIPLE,
    OPTIMIZERS,
    PRECISIONS,
    REQUIRED,
    SCHEDULES,
    SMOOTHED,
    TOKEN_TYPES,
    TRACKERS,
    TRUNCATIONS,
)
from functrain.errors import ConfigError, did_you_mean


@attrs.frozen(kw_only=True)
class Model:
    """The shape of the built-in decoder."""

    SECTION: ClassVar[str] = "model"

    width: int = attrs.field(default=256, validator=size)
    """Width of the residual stream."""
    # Each layer takes a tenth of a second to plan and milliseconds to make, however small it is.
    layers: int = attrs.field(default=4, validator=at_least(1, 4096))
    """The number of blocks of attention and feed-forward."""
    heads: int = attrs.field(default=4, validator=size)
    """The number of query heads."""
    kv_heads: int | None = attrs.field(default=None, validator=size)
    """The number of key-value heads (grouped-query attention); unless given, as many as heads."""
    hidden: int | None = attrs.field(default=None, validator=size)
    """The width inside the feed-forward; unless given, 8/3 of the width."""
    theta: float = attrs.field(default=10_000.0, validator=positive)
    """Base of the rotary frequencies."""
    tied: bool = True
    """Whether the head is the embedding."""
    dropout: float = attrs.field(default=0.0, validator=fraction)
    """Dropout on the embedding and on every residual branch."""
    checkpointing: bool = False
    """Recompute blocks in the backward pass: less memory, a third more compute."""

    def __attrs_post_init__(self) -> None:
        if self.width % self.heads or self.width // self.heads % 2:
            raise ConfigError(
                f"model.width: {self.width} over {self.heads} heads; expected heads of an even "
                "width"
            )
        if self.kv_heads is not None and self.heads % self.kv_heads:
            raise ConfigError(f"model.kv_heads: {self.kv_heads} does not divide {self.heads} heads")


@attrs.frozen(kw_only=True)
class Start:
    """Where fine-tuning starts: a run, one of its checkpoints, or a model of transformers."""

    SECTION: ClassVar[str] = "model"

    from_: Annotated[str, tyro.conf.arg(name="from")] = attrs.field(
        default="runs/pretrain", validator=given, converter=at_home
    )
    """A run directory (then its newest checkpoint), a checkpoint in one, a local directory that
    transformers reads, or a .gguf file."""
    sha256: Annotated[str | None, tyro.conf.Fixed, tyro.conf.Suppress] = None
    """The hash of that checkpoint's manifest, or of a model's files; written when this run begins.
    """
    shape: Annotated[Model | None, tyro.conf.Fixed, tyro.conf.Suppress] = None
    """The shape of the built-in decoder, as the run has it; written when this run begins."""


@attrs.frozen(kw_only=True)
class Adapters:
    """LoRA: adapters are trained, over the model that training starts from."""

    SECTION: ClassVar[str] = "lora"

    rank: int | None = attrs.field(default=None, validator=size)
    """The rank of the adapters. Unless given, the model itself is trained."""
    alpha: float | None = attrs.field(default=None, validator=positive)
    """The adapters are scaled by alpha / rank; 16 unless given."""
    targets: str | None = attrs.field(default=None, validator=named)
    """Names of layers, "q_proj, v_proj"; unless given, every linear layer but the head."""
    dropout: float | None = attrs.field(default=None, validator=fraction)
    """Dropout before the adapters."""
    rslora: bool = False
    """Scale by alpha / √rank instead (rank-stabilised LoRA)."""
    dora: bool = False
    """Train the magnitude of each output too (DoRA)."""

    def __attrs_post_init__(self) -> None:
        for name, value in attrs.asdict(self).items():
            if self.rank is None and value not in (None, False):
                raise ConfigError(
                    f"lora.{name}: {value!r}, and nothing has adapters without lora.rank; give "
                    "lora.rank, or leave it out"
                )
        if self.targets is not None and not all(part.strip() for part in self.targets.split(",")):
            raise ConfigError(
                f"lora.targets: {self.targets!r}, expected names with commas between them: "
                '"q_proj, v_proj"'
            )

    def options(self) -> dict[str, Any]:
        """The options of `functrain.lora.LoRA` that are given; empty: no adapters."""
        found = {n: v for n, v in attrs.asdict(self).items() if v not in (None, False)}
        if self.targets is not None:
            found["targets"] = tuple(part.strip() for part in self.targets.split(","))
        return found


@attrs.frozen(kw_only=True)
class Data:
    """What is trained on, and what is held out."""

    SECTION: ClassVar[str] = "data"

    train: str = attrs.field(default=EMBEDDED, validator=given, converter=at_home)
    """A file (.jsonl, .json, .parquet; for pretraining also .txt, .md, .bin, .npy), a directory or
    a pattern of such, or `embedded`."""
    held_out: str | None = attrs.field(default=None, validator=given, converter=optional(at_home))
    """What to evaluate on: a file or several, as for `train`; the embedded data has its own."""
    time: int = attrs.field(default=256, validator=at_least(2, 2**31 - 1))
    """Tokens in a row; longer examples are cut."""
    limit: int | None = attrs.field(default=None, validator=count)
    """Take at most so many documents, records or embedded entries (of token ids: tokens)."""
    truncation: str = attrs.field(default="keep_start", validator=one_of(TRUNCATIONS))
    """What is kept of a longer example: keep_start, keep_end, or prompt_first (cuts the prompt)."""
    min_prompt: int = attrs.field(default=1, validator=size)
    """Tokens of a prompt that prompt_first keeps before it cuts the completion."""
    packing: bool = False
    """Put several documents in each row of data.time tokens; none of them sees another."""
    on_bad_record: str = attrs.field(default="stop", validator=one_of(("stop", "skip")))
    """On a malformed record: stop, or skip it and count it."""
    enable_thinking: bool | None = None
    """Passed to the chat template of a transformers model; unless given, the template decides."""
    today: str | None = attrs.field(default=None, validator=a_day)
    """The date for chat templates that ask for one, such as 2026-11-25; unless given, the day on
    which the run begins."""
    group_by_length: bool = False
    """Batch examples of similar lengths: less padding, in a slightly less random order."""
    pad_to_multiple_of: int = attrs.field(default=MULTIPLE, validator=size)
    """Pad rows to a multiple of so many tokens. A larger multiple gives fewer widths, and
    train.compile compiles for each width."""
    sha256: Annotated[str | None, tyro.conf.Fixed, tyro.conf.Suppress] = None
    """The hash of the training data; written when the run begins."""
    held_out_sha256: Annotated[str | None, tyro.conf.Fixed, tyro.conf.Suppress] = None
    """The hash of the held-out data; written when the run begins."""
    templated: Annotated[bool | None, tyro.conf.Fixed, tyro.conf.Suppress] = None
    """Whether the data are dialogues in a chat template; written when the run begins."""

    def __attrs_post_init__(self) -> None:
        if self.min_prompt > 1 and self.truncation != "prompt_first":
            raise ConfigError(
                f"data.min_prompt: {self.min_prompt} is for data.truncation='prompt_first' alone, "
                f"and it is {self.truncation!r}; leave it out, or give that"
            )
        if self.min_prompt >= self.time:
            raise ConfigError(
                f"data.min_prompt: {self.min_prompt} of the {self.time} tokens of data.time leave "
                "none for a completion; expected less"
            )
        if self.packing and self.group_by_length:
            raise ConfigError(
                "data.group_by_length: with data.packing all rows are of one length; leave it out"
            )
        if self.packing and self.pad_to_multiple_of != MULTIPLE:
            raise ConfigError(
                "data.pad_to_multiple_of: with data.packing all rows are of data.time tokens; "
                "leave it out"
            )


@attrs.frozen(kw_only=True)
class Text(Data):
    """Running text, or files of token ids."""

    dtype: str = attrs.field(default="uint16", validator=one_of(TOKEN_TYPES))
    """The type of the ids in a .bin file; llm.c's files state their own."""
    vocabulary: int | None = attrs.field(default=None, validator=at_least(2, 2**31 - 1))
    """The size of the vocabulary, where the data are token ids of your own tokenizer."""
    cache: str | None = attrs.field(default=None, validator=given, converter=optional(at_home))
    """A directory that keeps text tokenised, by its content; unless given, it is in memory."""

    def __attrs_post_init__(self) -> None:
        if self.cache is not None and self.train == EMBEDDED:
            raise ConfigError("data.cache: the embedded data are in memory anyway; leave it out")
        if self.on_bad_record != "stop" and self.train == EMBEDDED:
            raise ConfigError("data.on_bad_record: the embedded text has no records; leave it out")
        if self.group_by_length:
            raise ConfigError(
                "data.group_by_length: rows of text are all of one length; leave it out"
            )
        if self.pad_to_multiple_of != MULTIPLE:
            raise ConfigError(
                "data.pad_to_multiple_of: rows of text are all of data.time tokens; leave it out"
            )


@attrs.frozen(kw_only=True)
class Optimizer:
    """The optimizer. An option that is not given has the optimizer's own default."""

    SECTION: ClassVar[str] = "optimizer"

    name: str = attrs.field(default="adamw", validator=one_of(tuple(OPTIMIZERS)))
    """adamw, adam, adamw_8bit (bitsandbytes), sgd, adafactor or muon."""
    weight_decay: float | None = attrs.field(default=None, validator=not_negative)
    """Weight decay; not applied to norms, biases and embeddings."""
    betas: tuple[float, float] | None = None
    """Adam's decay rates of the two moments."""
    eps: float | None = attrs.field(default=None, validator=positive)
    """Adam's epsilon."""
    momentum: float | None = attrs.field(default=None, validator=fraction)
    """The momentum of sgd and muon."""

    def __attrs_post_init__(self) -> None:
        for option in self.options():
            if option not in OPTIMIZERS[self.name]:
                raise ConfigError(
                    f"optimizer.{option}: {self.name} has none; it has "
                    f"{', '.join(OPTIMIZERS[self.name])}"
                )
        for beta in self.betas or ():
            if not 0 <= beta < 1:
                raise ConfigError(f"optimizer.betas: {beta!r}, expected numbers in [0, 1)")

    def options(self) -> dict[str, Any]:
        """The options that are given."""
        fields = attrs.asdict(self)
        return {name: v for name, v in fields.items() if name != "name" and v is not None}


@attrs.frozen(kw_only=True)
class Schedule:
    """The learning rate over applied updates. An option not given has the schedule's default."""

    SECTION: ClassVar[str] = "schedule"

    name: str = attrs.field(default="cosine", validator=one_of(tuple(SCHEDULES)))
    """constant, constant_with_warmup, linear, cosine, inverse_sqrt, warmup_stable_decay, …"""
    peak: float = attrs.field(default=1e-3, validator=positive)
    """The highest learning rate."""
    warmup: int | None = attrs.field(default=None, validator=at_least(0))
    """Updates from 0 to the peak."""
    total: int | None = attrs.field(default=None, validator=count)
    """Updates to the end of the schedule; unless given, train.steps when the run begins."""
    total_filled: Annotated[bool | None, tyro.conf.Fixed, tyro.conf.Suppress] = None
    """Whether that was not given; written when the run begins."""
    min_lr: float | None = attrs.field(default=None, validator=not_negative)
    """The learning rate at which cosine ends."""
    cycles: float | None = attrs.field(default=None, validator=positive)
    """Waves of cosine; restarts of cosine_with_restarts."""
    decay: int | None = attrs.field(default=None, validator=at_least(0))
    """Updates that the decay of warmup_stable_decay takes."""
    min_ratio: float | None = attrs.field(default=None, validator=fraction)
    """The fraction of the peak at which warmup_stable_decay begins and ends."""
    power: float | None = attrs.field(default=None, validator=positive)
    """The power of polynomial."""
    end: float | None = attrs.field(default=None, validator=not_negative)
    """The last learning rate of polynomial."""
    timescale: int | None = attrs.field(default=None, validator=count)
    """The timescale of inverse_sqrt, in updates."""
    every: int | None = attrs.field(default=None, validator=count)
    """Updates between the decays of the step schedule."""
    milestones: tuple[int, ...] | None = None
    """The updates after which multistep decays."""
    gamma: float | None = attrs.field(default=None, validator=positive)
    """The decay factor of step, multistep and exponential."""
    factor: float | None = attrs.field(default=None, validator=fraction)
    """The decay factor of reduce_on_plateau."""
    patience: int | None = attrs.field(default=None, validator=at_least(0))
    """Evaluations without progress that reduce_on_plateau waits for."""

    def __attrs_post_init__(self) -> None:
        known, given = SCHEDULES[self.name], self.options()
        for option in given:
            if option not in known:
                has = f"it has {', '.join(known)}" if known else "it has no options"
                raise ConfigError(f"schedule.{option}: {self.name} has none; {has}")
        for option in REQUIRED.get(self.name, ()):
            if given.get(option) in (None, ()):
                raise ConfigError(f"schedule.{option}: must be given for {self.name}")
        warmup, total = self.warmup or 0, self.total
        if total is not None and warmup > total:
            raise ConfigError(
                f"schedule.warmup: {warmup} is more than schedule.total {total}; both count updates"
            )

    def options(self) -> dict[str, Any]:
        """The options that are given."""
        fields = attrs.asdict(self)
        left_out = ("name", "peak", "total_filled")
        return {n: v for n, v in fields.items() if n not in left_out and v is not None}


@attrs.frozen(kw_only=True)
class Train:
    """How long to train, in which batches, and how."""

    SECTION: ClassVar[str] = "train"

    steps: int = attrs.field(default=1000, validator=count)
    """The total number of steps."""
    batch_size: int = attrs.field(default=16, validator=size)
    """Rows, examples or pairs in each step."""
    microbatches: int = attrs.field(default=1, validator=size)
    """Slices into which each batch is cut: less memory, the same gradient."""
    max_grad_norm: float = attrs.field(
        default=1.0, validator=number("a positive number, or inf for none", lambda v: v > 0)
    )
    """Gradients are clipped to this global norm; inf for no clipping."""
    precision: str = attrs.field(default="fp32", validator=one_of(PRECISIONS))
    """fp32, bf16, fp16 or bf16_params."""
    checkpoint: str | None = attrs.field(default=None, validator=named)
    """Modules to recompute in the backward pass, for less memory: a pattern of names,
    `model.layers.*`, or several with commas between them."""
    recompute: str = attrs.field(default="full", validator=one_of(("full", "selective")))
    """What of these modules is recomputed: full (everything), or selective (all but products and
    attention: more memory than full, in less time)."""
    head: str = attrs.field(default="auto", validator=one_of(("auto", "full")))
    """How logits are made: auto (a few rows at a time where they are large), or full (for the
    whole batch at once)."""
    keep_pages: bool = False
    """Keep freed memory in the process for the next step: faster steps on Linux."""
    return_pages: bool = False
    """Return memory as soon as it is free: a lower peak on Linux, and slower steps."""
    compile: bool = False
    """Compile the model, once per batch shape: faster steps after a slow first one."""
    compile_cache: str | None = attrs.field(
        default=None, validator=given, converter=optional(at_home)
    )
    """A directory for compiled code, so that the next start is warm."""
    ema_decay: float | None = attrs.field(default=None, validator=fraction)
    """Keep a moving average of the params in each checkpoint. No command uses it; load it with
    functrain.checkpoint.load_tensors(CHECKPOINT, "average/*")."""
    reduction: str = attrs.field(default="fast", validator=one_of(("fast", "canonical")))
    """How gradients are summed: fast, or canonical (the same bits on any number of workers)."""
    sharded: bool = False
    """Each worker keeps only some rows of params and moments: a fraction of the memory."""
    timeout: float = attrs.field(default=600.0, validator=positive)
    """Seconds that a worker waits for the others."""
    seed: int = attrs.field(default=0, validator=at_least(0))
    """The root of all randomness: weights, order of the data, dropout."""
    save_every: int = attrs.field(default=200, validator=count)
    """Steps between checkpoints."""
    keep: int = attrs.field(default=2, validator=count)
    """How many of the newest checkpoints to keep."""
    keep_every: int | None = attrs.field(default=None, validator=count)
    """Also keep the checkpoint of every so many steps."""
    keep_best: int | None = attrs.field(default=None, validator=count)
    """Also keep so many checkpoints with the lowest held-out loss; each evaluation then ends in
    a checkpoint."""
    on_save_error: str = attrs.field(default="stop", validator=one_of(("stop", "continue")))
    """When a save fails (a full disk, say): stop, or continue with a warning."""
    spike_deviations: float | None = attrs.field(default=None, validator=positive)
    """Skip steps whose loss or gradient norm is so many standard deviations above the mean of the
    last 128."""
    log_every: int = attrs.field(default=1, validator=count)
    """Steps between lines in metrics.jsonl."""
    peak_tflops: float | None = attrs.field(default=None, validator=positive)
    """The machine's peak in this precision, in TFLOP/s; metrics then have `mfu`."""
    threads: int | None = attrs.field(default=None, validator=at_least(1, 4096))
    """CPU threads, on which the bits depend; unless given, this machine's default."""
    device: str | None = attrs.field(default=None, validator=one_of(DEVICES))
    """cpu or cuda; unless given, cuda where there is one."""

    def __attrs_post_init__(self) -> None:
        if self.batch_size % self.microbatches:
            raise ConfigError(
                f"train.microbatches: {self.microbatches} does not divide train.batch_size "
                f"{self.batch_size}"
            )
        if self.checkpoint is not None and not all(self.checkpointed):
            raise ConfigError(
                f"train.checkpoint: {self.checkpoint!r}, expected names with commas between them: "
                '"model.layers.*.mlp, model.layers.0"'
            )
        if self.recompute != "full" and self.checkpoint is None:
            raise ConfigError(
                f"train.recompute: {self.recompute!r}, and train.checkpoint names no modules; name "
                'blocks, such as "model.layers.*", or give "full"'
            )
        if self.keep_pages and self.return_pages:
            raise ConfigError(
                "train.return_pages: with train.keep_pages memory that is freed would be both kept "
                "and returned; give one of them, and against what a file has "
                "--train.no-return-pages or --train.no-keep-pages"
            )
        if self.compile_cache is not None and not self.compile:
            raise ConfigError(
                "train.compile_cache: nothing is compiled; give train.compile, or leave it out"
            )

    @property
    def checkpointed(self) -> tuple[str, ...]:
        """The patterns of `checkpoint`."""
        if self.checkpoint is None:
            return ()
        # A pattern may hold commas in brackets: model.layers.[0,2].mlp
        return tuple(part.strip() for part in re.split(r",(?![^\[]*\])", self.checkpoint))


@attrs.frozen(kw_only=True)
class Evaluation:
    """Evaluation on the held-out data: before the first step, at intervals, and at the end."""

    SECTION: ClassVar[str] = "evaluation"

    every: int = attrs.field(default=200, validator=count)
    """Steps between evaluations."""
    batch_size: int = attrs.field(default=32, validator=size)
    """Rows, examples or pairs in a batch; the result does not depend on it."""
    limit: int | None = attrs.field(default=None, validator=count)
    """Evaluate on at most so many rows, examples or pairs."""


def _services(_record: Any, _field: Any, given: Any) -> None:
    for each in given:
        if each not in TRACKERS:
            raise ConfigError(
                f"tracking.services: {each!r} is unknown; {did_you_mean(str(each), TRACKERS)}"
            )
    if len({*given}) < len(given):
        raise ConfigError(f"tracking.services: {list(given)!r} names one twice")


@attrs.frozen(kw_only=True)
class Tracking:
    """Services that metrics are sent to, beside metrics.jsonl; none of them can stop a run."""

    SECTION: ClassVar[str] = "tracking"

    services: tuple[str, ...] = attrs.field(default=(), validator=_services)
    """Any of tensorboard, wandb, mlflow, trackio."""
    project: str = attrs.field(default="functrain", validator=named)
    """The project, or MLflow's experiment."""
    name: str | None = attrs.field(default=None, validator=named)
    """The name of the run there; unless given, that of its directory."""


@attrs.frozen(kw_only=True)
class Preference:
    """The preference loss against the starting params."""

    SECTION: ClassVar[str] = "preference"

    loss: str = attrs.field(default="sigmoid", validator=a_mix)
    """sigmoid (DPO), ipo, simpo, orpo, kto, … or a mix: "sigmoid + 0.2*sft"."""
    beta: float = attrs.field(default=0.1, validator=positive)
    """β: how strongly the policy is held to the reference."""
    label_smoothing: float = attrs.field(
        default=0.0, validator=number("a number in [0, 0.5)", lambda value: 0 <= value < 0.5)
    )
    """The fraction of pairs presumed to be labelled wrongly."""
    simpo_gamma: float = attrs.field(default=0.5, validator=not_negative)
    """SimPO's target margin."""
    cpo_alpha: float = attrs.field(default=1.0, validator=not_negative)
    """The weight of CPO's likelihood."""
    orpo_lambda: float = attrs.field(default=0.1, validator=positive)
    """The weight of ORPO's odds ratio."""
    discopop_tau: float = attrs.field(default=0.05, validator=positive)
    """The temperature of DiscoPOP's gate."""
    divergence: str = attrs.field(default="reverse_kl", validator=one_of(DIVERGENCES))
    """The f-divergence: reverse_kl (DPO's), forward_kl, jensen_shannon or alpha."""
    divergence_alpha: float = attrs.field(
        default=0.5, validator=number("a number between 0 and 1", lambda value: 0 < value < 1)
    )
    """The α of the divergence `alpha`: near 1 as reverse_kl, near 0 as forward_kl."""
    length_normalized: bool = False
    """Divide log-ratios by the number of tokens."""
    ld_alpha: float | None = attrs.field(default=None, validator=fraction_or_one)
    """LD-DPO: the weight of tokens beyond the length of the shorter completion."""
    wpo: bool = False
    """WPO: weigh pairs by how likely the policy finds them."""
    reference_mixup: float | None = attrs.field(default=None, validator=fraction_to_one)
    """TR-DPO: how far the reference moves towards the policy."""
    reference_sync: int = attrs.field(default=512, validator=count)
    """TR-DPO: steps between the moves of the reference."""
    layout: str = attrs.field(default="padded", validator=one_of(LAYOUTS))
    """padded, padding_free, or shared_prompt (what both sides begin with is computed once)."""
    desirable_weight: float = attrs.field(default=1.0, validator=positive)
    """KTO: the weight of desirable examples."""
    undesirable_weight: float = attrs.field(default=1.0, validator=positive)
    """KTO: the weight of undesirable examples."""
    cache: str | None = attrs.field(default=None, validator=given, converter=optional(at_home))
    """A file for the reference's log-probs, which `functrain reference` fills in advance."""

    def __attrs_post_init__(self) -> None:
        names = (self.loss,) if self.unpaired else tuple(self.mix)
        self._check_smoothing(names)
        if self.unpaired and self.layout != "padded":
            raise ConfigError(
                f"preference.layout: {self.layout!r} is for pairs, and {self.loss} has none; leave "
                "it out"
            )
        self._check_read()
        if self.cache is not None:
            self._check_cache(names)

    def _check_smoothing(self, names: tuple[str, ...]) -> None:
        over_pairs = [name for name in names if name not in LIKELIHOODS]
        for name in over_pairs or names:
            if self.label_smoothing and name not in SMOOTHED:
                raise ConfigError(
                    f"preference.label_smoothing: the {name} loss has none; it has a meaning for "
                    f"{', '.join(SMOOTHED)}"
                )

    def _check_read(self) -> None:
        """Refuse an option that was chosen but that the loss would silently ignore."""
        kto = ("desirable_weight", "undesirable_weight")
        for field in attrs.fields(Preference):
            unread = field.name in kto
            if self.unpaired:
                unread = field.name not in ("loss", "beta", "cache", *kto)
            value = getattr(self, field.name)
            if unread and value != field.default:
                raise ConfigError(
                    f"preference.{field.name}: {value!r}, and the {self.loss} loss does not read "
                    "it; leave it out"
                )

    def _check_cache(self, names: Iterable[str]) -> None:
        if self.reference_mixup is not None:
            raise ConfigError(
                f"preference.cache: {self.cache!r} would keep log-probs of a reference that moves; "
                "leave out preference.cache, or preference.reference_mixup"
            )
        if all(name in BARE for name in names):
            raise ConfigError(
                f"preference.cache: the {self.loss} loss reads no reference; leave it out"
            )

    @property
    def unpaired(self) -> bool:
        """Whether the data are unpaired completions."""
        return self.loss == KTO

    @property
    def mix(self) -> dict[str, float]:
        """The weight of each loss in the mix, by name."""
        return mixed(self.loss)


def _stage(record: Any, _field: attrs.Attribute[Any], value: str) -> None:
    expected = attrs.fields(type(record)).stage.default
    if value != expected:
        way = f"use `functrain {value}`" if value in STAGES else did_you_mean(value, STAGES)
        raise ConfigError(f"stage: {value!r}, expected {expected!r}; {way}")


Stage = Annotated[str, tyro.conf.Fixed, tyro.conf.Suppress]
Seal = Annotated[str | None, tyro.conf.Fixed, tyro.conf.Suppress]
"""The hash of those keys of a config that may not change during a run; written at its beginning."""


@attrs.frozen(kw_only=True)
class Pretrain:
    """Pretraining: next-token prediction over text."""

    stage: Stage = attrs.field(default="pretrain", validator=_stage)
    directory: str = attrs.field(default="runs/pretrain", validator=given, converter=at_home)
    """The run directory."""
    sha256: Seal = None
    model: Model = attrs.field(factory=Model)
    data: Text = attrs.field(factory=Text)
    optimizer: Optimizer = attrs.field(factory=Optimizer)
    schedule: Schedule = attrs.field(factory=Schedule)
    train: Train = attrs.field(factory=Train)
    evaluation: Evaluation = attrs.field(factory=Evaluation)
    tracking: Tracking = attrs.field(factory=Tracking)

    def __attrs_post_init__(self) -> None:
        if self.model.checkpointing and self.train.checkpoint is not None:
            raise ConfigError(
                f"train.checkpoint: {self.train.checkpoint!r}, and model.checkpointing recomputes "
                "every block already; leave one of them out"
            )


def _check_base(lora: Adapters, train: Train) -> None:
    if lora.rank is not None and train.precision == "bf16_params":
        raise ConfigError(
            "train.precision: 'bf16_params' casts a model that is trained whole, and adapters "
            "(lora.rank) are over a base in float32; give 'bf16'"
        )


@attrs.frozen(kw_only=True)
class SFT:
    """Supervised fine-tuning: next-token prediction of completions, from a pretrained model."""

    stage: Stage = attrs.field(default="sft", validator=_stage)
    directory: str = attrs.field(default="runs/sft", validator=given, converter=at_home)
    """The run directory."""
    sha256: Seal = None
    model: Start = attrs.field(factory=Start)
    lora: Adapters = attrs.field(factory=Adapters)
    data: Data = attrs.field(factory=Data)
    optimizer: Optimizer = attrs.field(factory=Optimizer)
    schedule: Schedule = attrs.field(factory=Schedule)
    train: Train = attrs.field(factory=Train)
    evaluation: Evaluation = attrs.field(factory=Evaluation)
    tracking: Tracking = attrs.field(factory=Tracking)

    def __attrs_post_init__(self) -> None:
        _check_base(self.lora, self.train)


@attrs.frozen(kw_only=True)
class DPO:
    """Direct preference optimisation against the params it starts from."""

    stage: Stage = attrs.field(default="dpo", validator=_stage)
    directory: str = attrs.field(default="runs/dpo", validator=given, converter=at_home)
    """The run directory."""
    sha256: Seal = None
    model: Start = attrs.field(factory=lambda: Start(from_="runs/sft"))
    lora: Adapters = attrs.field(factory=Adapters)
    preference: Preference = attrs.field(factory=Preference)
    data: Data = attrs.field(factory=Data)
    optimizer: Optimizer = attrs.field(factory=Optimizer)
    schedule: Schedule = attrs.field(factory=lambda: Schedule(peak=1e-4))
    train: Train = attrs.field(factory=Train)
    evaluation: Evaluation = attrs.field(factory=Evaluation)
    tracking: Tracking = attrs.field(factory=Tracking)

    def __attrs_post_init__(self) -> None:
        _check_base(self.lora, self.train)
        if self.data.packing:
            instead = "preference.layout='padding_free', which computes no padding"
            if self.preference.unpaired:
                instead = "data.group_by_length, which pads less"
            raise ConfigError(f"data.packing: preference data are not packed; use {instead}")
        if self.train.compile and self.preference.layout != "padded":
            raise ConfigError(
                f"train.compile: with preference.layout={self.preference.layout!r} rows are of any "
                "length, and each is compiled for; use the padded layout, or leave compile out"
            )


Config = Pretrain | SFT | DPO
STAGES: dict[str, type[Pretrain] | type[SFT] | type[DPO]] = {
    "pretrain": Pretrain,
    "sft": SFT,
    "dpo": DPO,
}
