"""Building a run from its config: step, first state, source, held-out batches, tokenizer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import attrs
import torch
from torch import nn

from functrain import memory, models
from functrain.cli.config import DPO, Config, Pretrain
from functrain.cli.origins import Origin, origin
from functrain.cli.restoring import adapted, check_size, model_for
from functrain.cli.sources import Source, held_out_batches, notes, sources
from functrain.cli.steps import schedule, step_for
from functrain.cli.tokenizers import templated, tokenizer_for, vocabulary_for
from functrain.data import Tokenizer
from functrain.data.grouping import width
from functrain.distributed import ALONE, World
from functrain.errors import ConfigError
from functrain.objectives.batches import Batch
from functrain.references import ReferenceCache, Referenced, attach_reference
from functrain.state import TrainState
from functrain.steps import Step
from functrain.trees import Tensors, clone


@attrs.frozen(kw_only=True, eq=False)
class Built:
    """A run's parts; `state` is the first one, `tokenizer` None for ids of a foreign tokenizer.

    `templated`: whether the data are dialogues in a chat template; None for a tokenizer without
    one, as the built-in one is.
    """

    step: Step
    state: TrainState
    source: Source
    held_out: Source | None
    evaluation: list[Batch]
    tokenizer: Tokenizer | None
    notes: tuple[str, ...] = ()
    templated: bool | None = None
    cache: ReferenceCache | None = None

    @property
    def sharded(self) -> bool:
        """Whether each worker has only some rows of the state."""
        return self.step.value_and_grad.shards is not None

    @property
    def data(self) -> Any:
        """What a step reads: the source, with the reference's log-probs if they are cached."""
        if self.cache is None:
            return self.source
        # For a tree, micro-batches are read one by one, and each is scored as it is read.
        parts = 1 if self.step.reduction == "canonical" else self.step.microbatches
        attach = functools.partial(self.cache, microbatches=parts)
        return Referenced(self.source, attach)

    def close(self) -> None:
        """Make the cache's new entries durable, and release it for other processes."""
        if self.cache is not None:
            self.cache.close()


def build(config: Config, world: World = ALONE) -> Built:
    """Build the parts of a run, checking everything that can be checked before the first step."""
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
    schedule(config.schedule)  # refuses wrong options, before data are read
    return _built(config, world.for_all(lambda: _read(config, world.size)), world)


def _check_batch(config: Config) -> None:
    """Raise `ConfigError` for a batch whose token ids alone are more than this machine's memory."""
    rows, time = config.train.batch_size, config.data.time
    least = time if isinstance(config, Pretrain) else 1  # rows of examples are of any length
    size = 16 * rows * least  # ids and labels
    here = memory.installed()
    if size > here:
        of = f" and data.time: {rows} rows of {time} tokens" if least > 1 else f": {rows} rows"
        raise ConfigError(
            f"train.batch_size{of}; the token ids of one batch alone take {size / 2**30:,.0f} GiB, "
            f"and this machine has {here / 2**30:,.0f}; expected a batch that fits; give less"
        )


def _check_model(config: Pretrain, tokenizer: Tokenizer | None, workers: int) -> None:
    """Raise `ConfigError` for a model whose params alone are more than the memory."""
    # Of a sharded model each worker makes its rows, at best on a machine of its own.
    machines = workers if config.train.sharded else 1
    limit = "this machine has" if machines == 1 else f"{machines} such machines have"
    vocabulary = vocabulary_for(config, tokenizer)
    check_size(config.model, vocabulary, machines * memory.installed(), limit)


@attrs.frozen(kw_only=True, eq=False)
class _Read:
    """What a run reads before it has a model."""

    start: Origin | None
    tokenizer: Tokenizer | None
    source: Source
    held_out: Source | None


def _read(config: Config, workers: int) -> _Read:
    _check_batch(config)
    start = None if isinstance(config, Pretrain) else origin(config.model.from_)
    tokenizer = tokenizer_for(config, start)
    if isinstance(config, Pretrain):
        _check_model(config, tokenizer, workers)
    source, held_out = sources(config, tokenizer)
    return _Read(start=start, tokenizer=tokenizer, source=source, held_out=held_out)


def _built(config: Config, read: _Read, world: World) -> Built:
    if read.start is not None:
        world.agree({"model.from": read.start.sha256})
    if config.train.sharded and world.size > 1:
        architecture, params, buffers = model_for(config, read.start, read.tokenizer, world)
    else:
        alone = World(device=torch.device(config.train.device or "cpu"))
        architecture, params, buffers = world.for_all(
            lambda: model_for(config, read.start, read.tokenizer, alone)
        )
    world.for_all(lambda: _check_positions(config, architecture))
    # Not in `for_all`: in shards, all workers make the adapters together, and any error is shared.
    made, trained = adapted(config, architecture, params)

    def checked() -> tuple[Step, ReferenceCache | None]:
        step = step_for(config, made, trained, world)
        return step, _cache(config, made, trained, buffers)

    step, cache = world.for_all(checked)
    state = step.init(trained, buffers, seed=config.train.seed)
    batches = world.for_all(lambda: held_out_batches(read.held_out, config))
    return Built(
        step=step,
        state=state,
        source=read.source,
        held_out=read.held_out,
        evaluation=batches if cache is None else [cache(batch) for batch in batches],
        tokenizer=read.tokenizer,
        notes=tuple(notes(read.source, read.held_out)),
        templated=templated(config, read.tokenizer),
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


def _cache(
    config: Config, architecture: nn.Module, params: Tensors, buffers: Tensors
) -> ReferenceCache | None:
    if not isinstance(config, DPO) or config.preference.cache is None:
        return None
    layout: Any = config.preference.layout
    attach = attach_reference(
        architecture,
        clone(params),  # training donates its own, and this scores examples that the cache lacks
        clone(buffers),
        precision=config.train.precision,
        by_token=config.preference.ld_alpha is not None,
        layout=layout,
    )
    return ReferenceCache(config.preference.cache, attach)


def cached(config: DPO, say: Callable[[str], None]) -> str:
    """Fill the cache of a run's reference, in training's reading order; says what was done."""
    built = build(config)
    try:
        assert built.cache is not None  # the command refuses a config without a cache
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
