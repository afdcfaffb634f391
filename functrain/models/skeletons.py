"""Models of transformers without their weights.

    architecture, params, buffers = bare(lambda: skeleton("models/llama-70b", torch.float32))

Each worker reads its rows of such a model (`functrain.models.from_pretrained` with a world), and a
plan reads nothing (`functrain.planning`).
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from functrain.architecture import emptied
from functrain.deferred import built
from functrain.errors import ArchitectureError
from functrain.models.config import ARCHITECTURE, CONFIG
from functrain.trees import Tensors

REFUSALS = (
    *(OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError),
    *(RuntimeError, ImportError),
)
"""What transformers raises for values in a config that it does not take, by where it meets them."""


def bare(make: Callable[[], nn.Module]) -> tuple[nn.Module, dict[str, Tensor], Tensors]:
    """A module without weights: `(architecture, params, buffers)`.

    As `functrain.split(make())`, but the params are on the meta device, and `make` takes no memory
    for them. Buffers have their values.
    """
    module, recorded = built(make, draws=False)
    params, buffers = emptied(module)
    made = Tensors({name: recorded.made(buffer) for name, buffer in buffers.items()})
    return module, {name: tensor.detach().to("meta") for name, tensor in params.items()}, made


def skeleton(path: Path, dtype: torch.dtype, attention: str | None = None) -> nn.Module:
    """The causal model that the `config.json` in `path` describes, with its initial random weights.

    In a checkpoint that is not a directory of transformers' it is `architecture.json` instead
    (`functrain.models.config_files`).

    Raises `ArchitectureError` for a description that transformers does not take.
    """
    try:
        from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
    except ModuleNotFoundError as error:
        raise ArchitectureError(
            f"{path}: models are read with {error.name}, which is not installed: "
            "pip install 'functrain[hf]'"
        ) from error
    from huggingface_hub.errors import StrictDataclassError

    options: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
    whole = (path / CONFIG).is_file() or not (path / ARCHITECTURE).is_file()
    described = path if whole else path / ARCHITECTURE
    try:
        config = AutoConfig.from_pretrained(
            str(described), local_files_only=True, trust_remote_code=False
        )
        with quiet():
            make: Any = AutoModelForCausalLM
            module = make.from_config(config, dtype=dtype, trust_remote_code=False, **options)
            if (path / "generation_config.json").is_file():
                module.generation_config = GenerationConfig.from_pretrained(str(path))
    except (*REFUSALS, StrictDataclassError) as error:
        reason = str(error).strip() or type(error).__name__
        raise ArchitectureError(f"{path}: transformers cannot make it: {reason[:500]}") from error
    made: nn.Module = module
    configured(made)
    return made


def configured(module: nn.Module) -> None:
    """Turn off what a config of transformers asks for besides the model's values.

    RWKV divides its own weights in eval mode and multiplies them back in train mode, for float16's
    range.
    """
    config: Any = module.config
    if getattr(config, "rescale_every", 0):
        config.rescale_every = 0


@contextmanager
def quiet() -> Generator[None]:
    """Silence transformers' progress bars and advice; what matters of it is raised here."""
    from transformers import utils

    logging: Any = utils.logging
    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()
