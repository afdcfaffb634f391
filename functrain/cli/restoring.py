"""The models that runs begin with and produce: from a checkpoint, or from transformers."""

from __future__ import annotations

import warnings
from pathlib import Path

import attrs
import torch
from torch import Tensor, nn

from functrain import checkpoint, distributed, keys, lora, models
from functrain.architecture import slots, split
from functrain.checkpoint.manifest import step_of
from functrain.cli.config import DPO, SFT, Config, Model, Pretrain
from functrain.cli.origins import Origin, origin
from functrain.cli.steps import step_for
from functrain.cli.tokenizers import asked_with, tokenizer_of, vocabulary_for
from functrain.data import Tokenizer
from functrain.distributed import ALONE, World
from functrain.errors import ConfigError, NumericsWarning
from functrain.state import TrainState
from functrain.trees import Tensors


@attrs.frozen(kw_only=True, eq=False)
class Trained:
    """A model to use: the architecture, and the values of a checkpoint.

    `config`: None for a transformers model that is not from a run.
    """

    architecture: nn.Module
    params: Tensors
    buffers: Tensors
    tokenizer: Tokenizer | None
    config: Config | None


@attrs.frozen(kw_only=True, eq=False)
class Restored:
    """A checkpoint as it was trained: its origin, the architecture, and the state."""

    origin: Origin
    config: Config
    architecture: nn.Module
    state: TrainState


def model_for(
    config: Config, start: Origin | None, tokenizer: Tokenizer | None, world: World
) -> tuple[nn.Module, Tensors, Tensors]:
    """The model that training begins with; in a world of several, each worker has its rows."""
    if start is not None:
        return started(start, world)
    assert isinstance(config.model, Model)  # the other stages have a start
    seed = keys.derive(config.train.seed, "model")
    shape, vocabulary = config.model, vocabulary_for(config, tokenizer)
    if world.size == 1:
        return split(decoder(shape, vocabulary, seed=seed).to(world.device))
    return distributed.split(lambda: decoder(shape, vocabulary, seed=seed), world)


def started(found: Origin, world: World = ALONE) -> tuple[nn.Module, Tensors, Tensors]:
    """The model of a checkpoint, with adapters merged into the base that they were trained over."""
    architecture, params, buffers = _restored(found, world)
    if lora.is_adapted(architecture):
        architecture, params = lora.merged(architecture, params)
    return architecture, params, buffers


def _restored(found: Origin, world: World) -> tuple[nn.Module, Tensors, Tensors]:
    """The model of a checkpoint as it was trained, with adapters left as adapters."""
    config = found.config
    if config is None:
        return models.from_pretrained(found.checkpoint, device=world.device, world=world)[:3]
    if isinstance(config, Pretrain) or not config.lora.options():
        architecture, like, buffers = world.for_all(lambda: bare(found, config))
        params, buffers = checkpoint.load_model(found.checkpoint, like, buffers, world=world)
        return architecture, params, buffers
    below = world.for_all(lambda: _below(found, config))
    architecture, params, buffers = started(below, world)
    architecture, params = adapted(config, architecture, params)
    base = slots(architecture).base
    params, buffers = checkpoint.load_model(
        found.checkpoint, params, buffers, base=base, world=world
    )
    return architecture, params, buffers


def _below(found: Origin, config: SFT | DPO) -> Origin:
    """The checkpoint that the adapters of `found` were trained over."""
    try:
        below = origin(config.model.from_, f"{found.checkpoint}: the base of its adapters")
    except ConfigError as error:
        way_out = "put it back"
        if step_of(Path(config.model.from_)) is not None:
            way_out += (
                ": a run that goes on removes its older checkpoints, but those that its train.keep "
                "or train.keep_every holds on to, and those in its directory 'used'"
            )
        raise ConfigError(f"{error}; {way_out}") from error
    if config.model.sha256 not in (None, below.sha256):
        raise ConfigError(
            f"{found.checkpoint}: its adapters were trained over {below.checkpoint}, which is "
            "another checkpoint now (another hash); put the old one back"
        )
    return below


def bare(found: Origin, config: Config) -> tuple[nn.Module, dict[str, Tensor], Tensors]:
    """The model of a checkpoint without its weights, from its description beside them."""
    shape = found.shape
    if shape is None:
        return models.bare(lambda: models.skeleton(found.checkpoint, torch.float32))
    vocabulary = vocabulary_for(config, tokenizer_of(found))
    return models.bare(lambda: decoder(shape, vocabulary))


def adapted(config: Config, architecture: nn.Module, params: Tensors) -> tuple[nn.Module, Tensors]:
    """The model with the adapters that a config asks for; unchanged if it asks for none."""
    if isinstance(config, Pretrain):
        return architecture, params
    options = config.lora.options()
    if not options:
        return architecture, params
    seed = keys.derive(config.train.seed, "lora")
    return lora.attach(architecture, params, lora.LoRA(**options), seed=seed)


def restored(given: str) -> Restored:
    """The state of a run's newest checkpoint, or of a checkpoint, with its architecture."""
    found = origin(given, "run")
    if found.config is None:
        raise ConfigError(
            f"{given}: a model of transformers and no run, so there is no state of it; give a run, "
            "or one of its checkpoints"
        )
    architecture, params, buffers = _restored(found, ALONE)
    step = step_for(found.config, architecture, params, ALONE)
    like = step.init(params, buffers, seed=found.config.train.seed)
    with warnings.catch_warnings():
        # Nothing is trained from this state, so the numerics of its steps do not matter.
        warnings.simplefilter("ignore", NumericsWarning)
        state = checkpoint.load(found.checkpoint, like=like)
    return Restored(origin=found, config=found.config, architecture=architecture, state=state)


def decoder(shape: Model, vocabulary: int, *, seed: int = 0) -> models.Decoder:
    """The built-in decoder of this shape; `ConfigError` if its bytes cannot be counted."""
    check_size(shape, vocabulary, 2**63 - 1, "torch counts up to")
    return models.decoder(_described(shape, vocabulary), seed=seed)


def check_size(shape: Model, vocabulary: int, most: int, limit: str) -> None:
    """Raise `ConfigError` if the params of the built-in decoder take more than `most` bytes.

    `limit`: what `most` is, in words that its number can follow.
    """
    config = _described(shape, vocabulary)
    size = 4 * config.parameters  # they are made in float32, whatever is computed in
    if size > most:
        raise ConfigError(
            f"model.width: {config.width}, with model.layers {config.layers}, model.hidden "
            f"{config.feed_forward} and a vocabulary of {vocabulary}: {config.parameters:,} "
            f"parameters, which alone take {size / 2**30:,.0f} GiB, and {limit} "
            f"{most / 2**30:,.0f}; expected a model that fits; give less of what is large"
        )


def _described(shape: Model, vocabulary: int) -> models.DecoderConfig:
    return models.DecoderConfig(vocabulary=vocabulary, **attrs.asdict(shape))


def trained(given: str) -> Trained:
    """The model of a run (its newest checkpoint), a checkpoint in one, or a transformers model."""
    found = origin(given, "run")
    architecture, params, buffers = started(found, ALONE)
    return Trained(
        architecture=architecture,
        params=params,
        buffers=buffers,
        tokenizer=asked_with(found),
        config=found.config,
    )
