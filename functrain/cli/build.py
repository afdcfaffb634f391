"""From a config to what is trained: step, first state, source, held-out batches, tokenizer."""

from __future__ import annotations

import datetime
import functools
import hashlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from functrain import (
    checkpoint,
    data,
    distributed,
    keys,
    lora,
    models,
    objectives,
    optimizers,
    schedules,
)
from functrain.architecture import slots, split
from functrain.cli.config import (
    DPO,
    SFT,
    Config,
    Model,
    Optimizer,
    Preference,
    Pretrain,
    Schedule,
)
from functrain.cli.directory import is_tokens
from functrain.cli.known import EMBEDDED
from functrain.cli.origins import Origin, origin
from functrain.compilation import LIMIT
from functrain.data import ByteTokenizer, PretrainedTokenizer, Tokenizer
from functrain.data.dialogues import SHAPES
from functrain.data.grouping import width
from functrain.data.pretrained import pretrained_tokenizer
from functrain.data.templates import has_template
from functrain.distributed import ALONE, World
from functrain.errors import ConfigError, DataError, NumericsWarning
from functrain.guards import SpikeGuard
from functrain.objectives.batches import Batch
from functrain.references import ReferenceCache, Referenced, attach_reference
from functrain.schedules import Plateau
from functrain.stages import dpo_step, kto_step, pretrain_step, sft_step
from functrain.state import TrainState
from functrain.steps import Step
from functrain.trees import Tensors, clone

Source = data.MapSource
_HASHED = 1 << 22


@attrs.frozen(kw_only=True, eq=False)
class Built:
    """A run's parts: `state` is the first one, `tokenizer` None for ids of a foreign tokenizer.

    `templated`: whether its data are dialogues in a chat template; None where it is the built-in
    tokenizer's.
    """

    step: Step
    state: TrainState
    source: Source
    evaluation: list[Batch]
    tokenizer: Tokenizer | None
    notes: tuple[str, ...] = ()
    templated: bool | None = None
    cache: ReferenceCache | None = None

    @property
    def sharded(self) -> bool:
        """Whether each worker has some rows of the state alone."""
        return self.step.value_and_grad.shards is not None

    @property
    def data(self) -> Any:
        """What a step reads: the source, with the reference's log-probs where they are cached."""
        if self.cache is None:
            return self.source
        # As a tree they are read one by one, and each is scored as it is read.
        parts = 1 if self.step.reduction == "canonical" else self.step.microbatches
        attach = functools.partial(self.cache, microbatches=parts)
        return Referenced(self.source, attach)

    def close(self) -> None:
        """Make a cache that was added to durable, and let others have it."""
        if self.cache is not None:
            self.cache.close()


@attrs.frozen(kw_only=True, eq=False)
class Trained:
    """A model to ask: the architecture, and the values of a checkpoint.

    `config`: None for a model of transformers that no run has made.
    """

    architecture: nn.Module
    params: Tensors
    buffers: Tensors
    tokenizer: Tokenizer | None
    config: Config | None


@attrs.frozen(kw_only=True, eq=False)
class Restored:
    """A checkpoint as it was trained: where it is, the architecture, and the state."""

    origin: Origin
    config: Config
    architecture: nn.Module
    state: TrainState


def build(config: Config, world: World = ALONE) -> Built:
    """The parts of a run; everything is checked that can be before the first step."""
    if world.size > 1 and isinstance(config, DPO) and config.preference.cache is not None:
        raise ConfigError(
            f"preference.cache: one process writes it, and there are {world.size} workers; leave "
            "it out, or use one worker"
        )
    if world.size > 1 and config.train.sharded and config.train.peak_tflops is not None:
        raise ConfigError(
            "train.peak_tflops: the operations of a step are counted on a whole model, and "
            "train.sharded has none; leave one of them out"
        )
    if config.train.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("train.device: 'cuda', and this machine has none; use 'cpu'")
    return _built(config, world.for_all(lambda: _read(config)), world)


@attrs.frozen(kw_only=True, eq=False)
class _Read:
    """What a run reads before there is a model."""

    start: Origin | None
    tokenizer: Tokenizer | None
    source: Source
    held_out: Source | None


def _read(config: Config) -> _Read:
    start = None if isinstance(config, Pretrain) else origin(config.model.from_)
    tokenizer = _tokenizer(config, start)
    source, held_out = sources(config, tokenizer)
    return _Read(start=start, tokenizer=tokenizer, source=source, held_out=held_out)


def _built(config: Config, read: _Read, world: World) -> Built:
    if read.start is not None:
        world.agree({"model.from": read.start.sha256})
    if config.train.sharded and world.size > 1:
        architecture, params, buffers = _model(config, read, world)
    else:
        alone = World(device=torch.device(config.train.device or "cpu"))
        architecture, params, buffers = world.for_all(lambda: _model(config, read, alone))
    world.for_all(lambda: _check_positions(config, architecture))
    # Not in a `for_all`: of shards they are made by all workers together, which refuse the same.
    made, trained = _adapted(config, architecture, params)

    def checked() -> tuple[Step, ReferenceCache | None]:
        step = _step(config, made, trained, world)
        return step, _cache(config, made, trained, buffers)

    step, cache = world.for_all(checked)
    state = step.init(trained, buffers, seed=config.train.seed)
    batches = world.for_all(lambda: _batches(read.held_out, config))
    return Built(
        step=step,
        state=state,
        source=read.source,
        evaluation=batches if cache is None else [cache(batch) for batch in batches],
        tokenizer=read.tokenizer,
        notes=tuple(_notes(read.source, read.held_out)),
        templated=_templated(config, read.tokenizer),
        cache=cache,
    )


def _check_positions(config: Config, architecture: nn.Module) -> None:
    most, multiple = models.positions(architecture), config.data.pad_to_multiple_of
    if most is None:
        return
    if config.data.time > most:
        raise ConfigError(
            f"data.time: {config.data.time}, and the model has learnt {most} positions; give at "
            "most as many"
        )
    widest = width([config.data.time], multiple)
    padded = not isinstance(config, Pretrain) and not config.data.packing
    if padded and widest > most:
        raise ConfigError(
            f"data.pad_to_multiple_of: {multiple} pads rows of data.time {config.data.time} to as "
            f"many as {widest} tokens, and the model has learnt {most} positions; give a divisor "
            "of data.time"
        )


def _templated(config: Config, tokenizer: Tokenizer | None) -> bool | None:
    if not has_template(tokenizer):
        return None
    record = None if config.data.train == EMBEDDED else data.first_record(config.data.train)
    keys = ("prompt", "completion", "chosen", "rejected")
    dialogues = [known for shape, known in SHAPES.items() if shape != "prompt-completion"]
    return record is not None and (
        any(all(key in record for key in known) for known in dialogues)
        or any(isinstance(record.get(key), list) for key in keys)
    )


def _cache(
    config: Config, architecture: nn.Module, params: Tensors, buffers: Tensors
) -> ReferenceCache | None:
    if not isinstance(config, DPO) or config.preference.cache is None:
        return None
    layout: Any = config.preference.layout
    attach = attach_reference(
        architecture,
        clone(params),  # the training donates its own, and an example may be missing in the cache
        clone(buffers),
        precision=config.train.precision,
        by_token=config.preference.ld_alpha is not None,
        layout=layout,
    )
    return ReferenceCache(config.preference.cache, attach)


def cached(config: DPO, say: Callable[[str], None]) -> str:
    """Fill the cache of a run's reference, in the order in which training reads; what was done."""
    built = build(config)
    try:
        assert built.cache is not None  # the command has refused a config without
        size = built.source.batch_size
        total = min(len(built.source), config.train.steps * size)
        for position in range(0, total, size):
            built.data.at(position, size)
            if position // size % 20 == 0:
                say(f"reference: {min(position + size, total):,} of {total:,} examples")
        return (
            f"{built.cache.path}: {len(built.cache):,} completions, {built.cache.computed:,} of "
            "them new"
        )
    finally:
        built.close()


def _tokenizer(config: Config, start: Origin | None) -> Tokenizer | None:
    if start is not None:
        found = tokenizer_of(start)
        if found is None and start.config is None:
            raise ConfigError(
                f"model.from: {start.checkpoint} has no tokenizer beside its weights "
                "(tokenizer.json), which prompts and completions need"
            )
        if found is None:
            raise ConfigError(
                f"{start.run.tokenizer} is missing: {start.checkpoint} was trained on ids of a "
                "tokenizer of your own, which prompts and completions would need"
            )
        return _told(found, config)
    assert isinstance(config, Pretrain)  # the other stages have a start
    return None if is_tokens(config.data.train) else ByteTokenizer()


def _told(tokenizer: Tokenizer, config: Config) -> Tokenizer:
    """With what the config tells the chat template."""
    given, day = config.data.enable_thinking, config.data.today
    if not isinstance(tokenizer, PretrainedTokenizer) or not has_template(tokenizer):
        if given is not None:
            raise ConfigError(
                "data.enable_thinking: the tokenizer has no chat template to tell it; leave it out"
            )
        return tokenizer
    return attrs.evolve(
        tokenizer,
        template_options={} if given is None else {"enable_thinking": given},
        today=None if day is None else datetime.date.fromisoformat(day),
    )


def tokenizer_of(found: Origin) -> Tokenizer | None:
    """The tokenizer of a model or of a run; None where a run has had ids of another's."""
    if found.config is None:
        return models.tokenizer_of(found.checkpoint)
    if found.shape is None:
        if not found.run.tokenizer_files.is_dir():
            raise ConfigError(f"{found.run.tokenizer_files} is missing; put it back")
        return pretrained_tokenizer(found.run.tokenizer_files)
    if not found.run.tokenizer.is_file():
        return None
    return data.from_json(found.run.tokenizer.read_text(encoding="utf-8"))


def _vocabulary(config: Config, tokenizer: Tokenizer | None) -> int:
    if tokenizer is not None:
        return tokenizer.vocabulary
    given = config.data.vocabulary if isinstance(config, Pretrain) else None
    if given is None:
        raise ConfigError(
            f"data.vocabulary: missing; {config.data.train} holds token ids, so say how many there "
            "are"
        )
    return given


def _model(config: Config, read: _Read, world: World) -> tuple[nn.Module, Tensors, Tensors]:
    """The model that training begins with; of several workers each has its rows of the params."""
    if read.start is not None:
        return started(read.start, world)
    assert isinstance(config.model, Model)  # the other stages have a start
    seed = keys.derive(config.train.seed, "model")
    shape, vocabulary = config.model, _vocabulary(config, read.tokenizer)
    if world.size == 1:
        return split(decoder(shape, vocabulary, seed=seed).to(world.device))
    return distributed.split(lambda: decoder(shape, vocabulary, seed=seed), world)


def started(found: Origin, world: World = ALONE) -> tuple[nn.Module, Tensors, Tensors]:
    """The model of a checkpoint; adapters are merged into the base that they were trained over."""
    architecture, params, buffers = _restored(found, world)
    if lora.is_adapted(architecture):
        architecture, params = lora.merged(architecture, params)
    return architecture, params, buffers


def _has_adapters(config: Config) -> bool:
    return not isinstance(config, Pretrain) and bool(config.lora.options())


def _restored(found: Origin, world: World) -> tuple[nn.Module, Tensors, Tensors]:
    """The model of a checkpoint as it was trained: adapters stay adapters."""
    config = found.config
    if config is None:
        return models.from_pretrained(found.checkpoint, device=world.device, world=world)[:3]
    if isinstance(config, Pretrain) or not _has_adapters(config):
        architecture, like, buffers = world.for_all(lambda: bare(found, config))
        params, buffers = checkpoint.load_model(found.checkpoint, like, buffers, world=world)
        return architecture, params, buffers
    below = world.for_all(lambda: _below(found, config))
    architecture, params, buffers = started(below, world)
    architecture, params = _adapted(config, architecture, params)
    base = slots(architecture).base
    params, buffers = checkpoint.load_model(
        found.checkpoint, params, buffers, base=base, world=world
    )
    return architecture, params, buffers


def _below(found: Origin, config: SFT | DPO) -> Origin:
    """The checkpoint that the adapters of another one were trained over."""
    below = origin(config.model.from_, f"{found.checkpoint}: the base of its adapters")
    if config.model.sha256 not in (None, below.sha256):
        raise ConfigError(
            f"{found.checkpoint}: its adapters were trained over {below.checkpoint}, which is "
            "another checkpoint now (another hash); put the old one back"
        )
    return below


def bare(found: Origin, config: Config) -> tuple[nn.Module, dict[str, Tensor], Tensors]:
    """The model of a checkpoint without its weights, as what lies beside them describes it."""
    shape = found.shape
    if shape is None:
        return models.bare(lambda: models.skeleton(found.checkpoint, torch.float32))
    vocabulary = _vocabulary(config, tokenizer_of(found))
    return models.bare(lambda: decoder(shape, vocabulary))


def _adapted(config: Config, architecture: nn.Module, params: Tensors) -> tuple[nn.Module, Tensors]:
    """With the adapters that a config asks for; as it is where it asks for none."""
    if isinstance(config, Pretrain):
        return architecture, params
    options = config.lora.options()
    if not options:
        return architecture, params
    seed = keys.derive(config.train.seed, "lora")
    return lora.attach(architecture, params, lora.LoRA(**options), seed=seed)


def restored(given: str, *, device: str = "cpu") -> Restored:
    """The state of a run's newest checkpoint, or of a checkpoint, and what it is a state of."""
    found = origin(given, "run")
    if found.config is None:
        raise ConfigError(
            f"{given}: a model of transformers and no run, so there is no state of it; give a run, "
            "or one of its checkpoints"
        )
    architecture, params, buffers = _restored(found, World(device=torch.device(device)))
    step = _step(found.config, architecture, params, ALONE)
    like = step.init(params, buffers, seed=found.config.train.seed)
    with warnings.catch_warnings():
        # Nothing is computed with it, so what its bits would depend on does not matter.
        warnings.simplefilter("ignore", NumericsWarning)
        state = checkpoint.load(found.checkpoint, like=like)
    return Restored(origin=found, config=found.config, architecture=architecture, state=state)


def decoder(shape: Model, vocabulary: int, *, seed: int = 0) -> models.Decoder:
    """The built-in decoder of this shape."""
    options = attrs.asdict(shape)
    return models.decoder(models.DecoderConfig(vocabulary=vocabulary, **options), seed=seed)


def _step(config: Config, architecture: nn.Module, params: Tensors, world: World) -> Step:
    train, deviations = config.train, config.train.spike_deviations
    options: dict[str, Any] = {
        "schedule": schedule(config.schedule),
        "precision": train.precision,
        "microbatches": train.microbatches,
        "max_grad_norm": None if train.max_grad_norm == float("inf") else train.max_grad_norm,
        "ema_decay": train.ema_decay,
        "guard": None if deviations is None else SpikeGuard(deviations=deviations),
        "donate": True,
        "compile": train.compile,
        "checkpoint": train.checkpointed,
        "head": train.head,
        "reduction": train.reduction,
        "sharded": train.sharded,
        "world": world,
    }
    made = optimizer(config.optimizer, config.schedule.peak, architecture)
    if isinstance(config, DPO):
        return _preference_step(config.preference, architecture, params, made, options)
    make = sft_step if isinstance(config, SFT) else pretrain_step
    return make(architecture, made, **options)


def _preference_step(
    config: Preference,
    architecture: nn.Module,
    params: Tensors,
    made: optimizers.Optimizer,
    options: dict[str, Any],
) -> Step:
    """The step of a preference loss; a cached reference comes with the batches."""
    given = attrs.asdict(config)
    kto = {name: given.pop(name) for name in ("desirable_weight", "undesirable_weight")}
    reference = params if given.pop("cache") is None else None
    try:
        if config.unpaired:
            return kto_step(
                architecture, made, reference=reference, beta=config.beta, **kto, **options
            )
        given["loss"] = config.mix
        if not any(objectives.LOSSES[name].reference for name in config.mix):
            reference = None
        return dpo_step(architecture, made, reference=reference, **given, **options)
    except ConfigError as error:
        if str(error).partition(":")[0] not in attrs.asdict(config):
            raise  # of what is no preference
        raise ConfigError(f"preference.{error}") from error


def optimizer(config: Optimizer, lr: float, architecture: nn.Module) -> optimizers.Optimizer:
    """The optimizer of this name; no weight decay on norms, biases and embeddings."""
    exempt = (optimizers.no_decay(architecture),)
    options = config.options()
    if config.name == "muon":
        decay = {n: v for n, v in options.items() if n == "weight_decay"}
        return optimizers.muon(lr, others=optimizers.adamw(lr, groups=exempt, **decay), **options)
    make: Any = getattr(optimizers, config.name)
    made: optimizers.Optimizer = make(lr, groups=exempt, **options)
    return made


def schedule(config: Schedule) -> schedules.Schedule | Plateau:
    """The schedule of this name."""
    options = config.options()
    if config.name == "cosine_with_restarts" and "cycles" in options:
        options["cycles"] = int(options["cycles"])
    return schedules.named(config.name, config.peak, **options)


def sources(config: Config, tokenizer: Tokenizer | None) -> tuple[Source, Source | None]:
    """What is trained on and, where there is some, what is held out.

    Held-out examples are never packed: they are scored the same, and a limit counts examples.
    """
    train, held_out = _sources(config, tokenizer)
    if config.data.packing and isinstance(train, data.Chats):
        return data.packed(train, time=config.data.time), held_out
    if config.train.compile and isinstance(train, data.Padded):
        _check_widths(config, train.widths())
    return train, held_out


def _check_widths(config: Config, widths: Sequence[int]) -> None:
    """Raise `ConfigError` where a step could be compiled too often, before anything is."""
    if len(widths) <= LIMIT:
        return
    multiple = config.data.pad_to_multiple_of
    while -(-widths[-1] // multiple) > LIMIT:
        multiple *= 2
    packing = ", data.packing" if config.stage == "sft" else ""
    raise ConfigError(
        f"train.compile: batches of these data can be of {len(widths)} widths ({widths[0]} to "
        f"{widths[-1]} tokens), each of which is compiled for, and {LIMIT} is the most; give "
        f"data.pad_to_multiple_of={multiple}{packing}, or leave train.compile out"
    )


def _sources(config: Config, tokenizer: Tokenizer | None) -> tuple[Source, Source | None]:
    given = config.data
    if given.train == EMBEDDED:
        train, held_out = _embedded(config.stage, given.limit)
        if given.held_out is not None:
            return _source(config, train, tokenizer), _file(config, given.held_out, tokenizer)
        return _source(config, train, tokenizer), _source(config, held_out, tokenizer)
    source = _file(config, given.train, tokenizer, given.limit)
    return source, None if given.held_out is None else _file(config, given.held_out, tokenizer)


def _file(
    config: Config, path: str, tokenizer: Tokenizer | None, limit: int | None = None
) -> Source:
    try:
        if isinstance(config, Pretrain) and config.data.cache is not None:
            return _cached(config, config.data.cache, path, tokenizer, limit)
        if isinstance(config, Pretrain) and is_tokens(path):
            ids = data.tokens(path, dtype=config.data.dtype, **_rows(config))
            return ids if limit is None else attrs.evolve(ids, ids=ids.ids[:limit])
        if config.stage == "pretrain":
            texts = data.documents(path, on_bad_record=config.data.on_bad_record)
            source: Any = _source(config, texts.first(limit), tokenizer)
            made: Source = attrs.evolve(source, origin=data.passed_over(texts.malformed))
            return made
        found = data.records(path, on_bad_record=config.data.on_bad_record)
        return _source(config, found.first(limit), tokenizer)
    except DataError as error:
        # Errors of a file's content do not all name the file.
        raise error if path in str(error) else DataError(f"{path}: {error}") from error


def _cached(
    config: Config, cache: str, path: str, tokenizer: Tokenizer | None, limit: int | None
) -> Source:
    if is_tokens(path) or tokenizer is None:
        raise ConfigError(f"data.cache: {path} holds token ids, which are mapped as they are")
    how = config.data.on_bad_record
    found = data.tokenized(path, tokenizer, cache, on_bad_record=how).first(limit)
    make: Any = found.packed_text if config.data.packing else found.text
    made: Source = make(**_rows(config))
    return made


@functools.lru_cache(maxsize=1)
def embedded(limit: int | None) -> data.embedded.Embedded:
    """The embedded data, read once for the three stages of a demo: it takes seconds."""
    return data.embedded.load(limit=limit)


def digest(source: Source) -> str:
    """A hash of what is trained on; of long token files, their length, beginning and end."""
    if isinstance(source, data.TextRows):
        ids = source.ids
        parts = [str((len(ids), ids.dtype)).encode(), ids[:_HASHED].tobytes()]
        parts.append(ids[-_HASHED:].tobytes() if len(ids) > _HASHED else b"")
    elif isinstance(source, data.Packed):
        arrays = (source.ids, source.labels, source.begins, source.lengths)
        parts = [*(each.tobytes() for each in arrays), repr(source.packs).encode()]
    else:
        parts = [repr(getattr(source, "examples", None)).encode()]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def _embedded(stage: str, limit: int | None) -> tuple[Sequence[Any], Sequence[Any]]:
    found = embedded(limit)
    return {
        "pretrain": (found.train, found.held_out),
        "sft": (found.sft_train, found.sft_held_out),
        "dpo": (found.preference_train, found.preference_held_out),
    }[stage]


def _rows(config: Config) -> dict[str, Any]:
    return {
        "time": config.data.time,
        "batch_size": config.train.batch_size,
        "seed": keys.derive(config.train.seed, "data"),
    }


def _source(config: Config, found: Sequence[Any], tokenizer: Tokenizer | None) -> Source:
    if tokenizer is None:
        raise ConfigError("data: text needs a tokenizer; pretrain on text, or on ids throughout")
    make: Any = {"pretrain": data.text, "sft": data.chat, "dpo": data.preference}[config.stage]
    if isinstance(config, Pretrain) and config.data.packing:
        make = data.packed_text
    if isinstance(config, DPO) and config.preference.unpaired:
        make = data.unpaired
    options: dict[str, Any] = {}
    if not isinstance(config, Pretrain):
        names = ["truncation", "min_prompt", "group_by_length", "pad_to_multiple_of"]
        options = {name: getattr(config.data, name) for name in [*names, "on_bad_record"]}
    made: Source = make(found, tokenizer, **_rows(config), **options)
    return made


def _batches(held_out: Source | None, config: Config) -> list[Batch]:
    if held_out is None:
        return []
    plan = config.evaluation
    return data.all_batches(held_out, plan.batch_size, limit=plan.limit)


def _notes(source: Source, held_out: Source | None) -> list[str]:
    notes = [f"training text: {line}" for line in getattr(source, "origin", ())]
    if isinstance(source, data.Packed):
        notes.append(f"training data: {source.packing}")
    if isinstance(source, data.Padded):
        notes.append(
            f"training data: {len(source):,} examples; in batches of {source.batch_size}, "
            f"{source.padding():.1%} of the tokens are padding"
        )
    for name, each in (("training", source), ("held-out", held_out)):
        counts = getattr(each, "counts", None)
        if counts is not None and (counts.truncated or counts.dropped):
            notes.append(f"{name} examples at data.time: {counts}")
            notes += [f"malformed: {complaint}" for complaint in counts.complaints]
    if held_out is None:
        notes.append("no data.held_out, so nothing is evaluated")
    return notes


def asked_with(found: Origin) -> Tokenizer | None:
    """The tokenizer of a model, with what its run told the chat template."""
    tokenizer = tokenizer_of(found)
    return (
        tokenizer if tokenizer is None or found.config is None else _told(tokenizer, found.config)
    )


def trained(given: str, *, device: str = "cpu") -> Trained:
    """The model of a run (its newest checkpoint), of a checkpoint in one, or of transformers."""
    found = origin(given, "run")
    architecture, params, buffers = started(found, World(device=torch.device(device)))
    return Trained(
        architecture=architecture,
        params=params,
        buffers=buffers,
        tokenizer=asked_with(found),
        config=found.config,
    )
