"""Models of transformers without their weights, and weights taken from files row by row.

    architecture, params, buffers = bare(lambda: skeleton("models/llama-70b", torch.float32))

Of such a model each worker reads its rows (`functrain.models.from_pretrained` with a world), and a
plan reads nothing (`functrain.planning`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import orjson
import torch
from torch import Tensor, nn

from functrain.architecture import emptied, slots
from functrain.deferred import built
from functrain.distributed import World
from functrain.errors import ArchitectureError
from functrain.trees import Tensors, owning


def bare(make: Callable[[], nn.Module]) -> tuple[nn.Module, dict[str, Tensor], Tensors]:
    """A module whose weights are nowhere: `(architecture, params, buffers)`.

    As `functrain.split(make())`, but the params are on the meta device, and `make` takes no memory
    for them. Buffers are there.
    """
    module, recorded = built(make, draws=False)
    params, buffers = emptied(module)
    made = Tensors({name: recorded.made(buffer) for name, buffer in buffers.items()})
    return module, {name: tensor.detach().to("meta") for name, tensor in params.items()}, made


def skeleton(path: Path, dtype: torch.dtype, attention: str | None = None) -> nn.Module:
    """The causal model that the `config.json` in `path` describes, with its first, random weights.

    Raises `ArchitectureError` for a description that transformers does not take.
    """
    try:
        from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
    except ModuleNotFoundError as error:
        raise ArchitectureError(
            f"{path}: models are read with {error.name}, which is not installed: "
            "pip install 'functrain[hf]'"
        ) from error
    options: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
    try:
        config = AutoConfig.from_pretrained(
            str(path), local_files_only=True, trust_remote_code=False
        )
        with quiet():
            make: Any = AutoModelForCausalLM
            module = make.from_config(config, dtype=dtype, trust_remote_code=False, **options)
            if (path / "generation_config.json").is_file():
                module.generation_config = GenerationConfig.from_pretrained(str(path))
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, TypeError) as error:
        reason = str(error).strip() or type(error).__name__
        raise ArchitectureError(f"{path}: transformers cannot make it: {reason[:500]}") from error
    if getattr(module.config, "use_cache", False):
        module.config.use_cache = False  # training asks for no next token
    made: nn.Module = module
    return made


@attrs.frozen(eq=False)
class Files:
    """The safetensors of a model: which file has which tensor."""

    path: Path
    places: Mapping[str, str]

    @classmethod
    def of(cls, path: Path) -> Files:
        """Those of a directory, as its index says or as one file has them."""
        from safetensors import safe_open

        index = path / "model.safetensors.index.json"
        if not (path / "model.safetensors").is_file():
            return cls(path, dict(orjson.loads(index.read_bytes())["weight_map"]))
        with safe_open(str(path / "model.safetensors"), framework="pt") as file:
            return cls(path, dict.fromkeys(file.keys(), "model.safetensors"))

    def hold(self, architecture: nn.Module, dtype: torch.dtype) -> bool:
        """Whether they have an architecture's own names, and nothing else.

        Then nothing has to be converted, which transformers does for older and other layouts; nor
        does it keep some modules wider than asked, or part what the config says is tied.
        """
        found = slots(architecture)
        kept = {n for n in found.buffers if n not in _passing(architecture, found.buffers)}
        needed = {*found.params, *kept}
        others = _others(architecture, found.params)
        if not needed <= self.places.keys() <= needed | others.keys():
            return False
        wide = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
        if dtype.itemsize < 4 and any(getattr(architecture, name, None) for name in wide):
            return False
        pairs = [(name, first) for name, first in others.items() if name in self.places]
        return all(self.rows(n, 0, None).equal(self.rows(first, 0, None)) for n, first in pairs)

    def rows(self, name: str, begin: int, end: int | None) -> Tensor:
        """Some rows of a tensor, or a number."""
        from safetensors import safe_open

        with safe_open(str(self.path / self.places[name]), framework="pt") as file:
            piece = file.get_slice(name)
            found: Tensor = piece[begin:end] if piece.get_shape() else file.get_tensor(name)
            return found

    def digests(self) -> dict[str, str]:
        """The sha256 of each file."""
        found: dict[str, str] = {}
        for name in sorted({*self.places.values()}):
            with (self.path / name).open("rb") as file:
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()
        return found

    def shapes(self, names: Mapping[str, Tensor]) -> dict[str, list[int]]:
        """The shapes of tensors of these names."""
        from safetensors import safe_open

        found: dict[str, list[int]] = {}
        for file in sorted({self.places[name] for name in names}):
            with safe_open(str(self.path / file), framework="pt") as opened:
                for name in names:
                    if self.places[name] == file:
                        found[name] = list(opened.get_slice(name).get_shape())
        return found


def _passing(architecture: nn.Module, names: Mapping[str, object]) -> set[str]:
    """The buffers that no file has."""
    kept = architecture.state_dict(keep_vars=True).keys()
    return {name for name in names if name not in kept}


def _others(architecture: nn.Module, names: Mapping[str, object]) -> dict[str, str]:
    """The further names of tied parameters, each with its first."""
    every = dict(architecture.named_parameters(remove_duplicate=False))
    first = {id(tensor): name for name, tensor in every.items() if name in names}
    return {name: first[id(tensor)] for name, tensor in every.items() if name not in names}


def rows_of_files(
    files: Files, params: Mapping[str, Tensor], dtype: torch.dtype, world: World
) -> Tensors:
    """This worker's rows of every parameter, read from the files; floating ones become `dtype`."""
    # Here, since DTensor takes a second to import.
    from functrain.distributed.shards import rows_of, sharded

    shapes = files.shapes(params)
    found: dict[str, Tensor] = {}
    for name, like in params.items():
        if shapes[name] != list(like.shape) or not like.ndim:
            raise ArchitectureError(
                f"{files.path}: {name} has the shape {shapes[name]}, expected {list(like.shape)}, "
                "of one dimension at least"
            )
        rows = rows_of(len(like), world.rank, world.size)
        own = files.rows(name, rows.begin, rows.end)
        kind = dtype if own.is_floating_point() else own.dtype
        # A copy: what is read lies in the pages of its file, which may change and vanish.
        laid = torch.empty(own.shape, dtype=kind, device=world.device).copy_(own)
        found[name] = sharded(laid, like.shape, world)
    return owning(Tensors(found))


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars and advice; what matters of it is raised here."""
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
