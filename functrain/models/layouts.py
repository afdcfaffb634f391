"""Weights in files: where each tensor of a model is, and this worker's rows of it."""

from __future__ import annotations

import copy
import functools
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
import orjson
import torch
from torch import Tensor, nn

from functrain.architecture import slots
from functrain.checkpoint.format import DTYPES
from functrain.distributed import World
from functrain.errors import ArchitectureError
from functrain.models.decoder import Decoder
from functrain.trees import Tensors, owning


@attrs.frozen(eq=False)
class Files:
    """The safetensors of a model: which file has which tensor."""

    path: Path
    places: Mapping[str, str]

    @classmethod
    def of(cls, path: Path) -> Files:
        """The files of a directory, as its index lists them, or its only one."""
        from safetensors import safe_open

        index = path / "model.safetensors.index.json"
        if not (path / "model.safetensors").is_file():
            return cls(path, dict(orjson.loads(index.read_bytes())["weight_map"]))
        with safe_open(str(path / "model.safetensors"), framework="pt") as file:
            return cls(path, dict.fromkeys(file.keys(), "model.safetensors"))

    def tensor(self, name: str) -> Tensor:
        """A tensor in the pages of its file: what is not looked at is not read."""
        from safetensors import safe_open

        with safe_open(str(self.path / self.places[name]), framework="pt") as file:
            found: Tensor = file.get_tensor(name)
            return found

    def digests(self) -> dict[str, str]:
        """The sha256 of each file."""
        found: dict[str, str] = {}
        for name in sorted({*self.places.values()}):
            with (self.path / name).open("rb") as file:
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()
        return found

    def shapes(self) -> dict[str, torch.Size]:
        """The shape of every tensor."""
        from safetensors import safe_open

        found: dict[str, torch.Size] = {}
        for file in sorted({*self.places.values()}):
            with safe_open(str(self.path / file), framework="pt") as opened:
                for name in (name for name, place in self.places.items() if place == file):
                    found[name] = torch.Size(opened.get_slice(name).get_shape())
        return found

    def dtypes(self) -> dict[str, torch.dtype | None]:
        """The dtype of every tensor in the files; None for one that a checkpoint cannot hold."""
        from safetensors import safe_open

        found: dict[str, torch.dtype | None] = {}
        for file in sorted({*self.places.values()}):
            with safe_open(str(self.path / file), framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    found[name] = DTYPES.get(opened.get_slice(name).get_dtype())
        return found


@attrs.frozen(eq=False)
class Made:
    """Tensors that a converter of transformers makes from several, such as fused experts.

    `sources`: the pattern that each source matches, and its name in the files.
    """

    converter: Any
    model: Any
    first: str
    sources: list[tuple[str, str]] = attrs.field(factory=list)

    def of(self, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """These tensors by the model's own names; `read` gives a tensor of the files."""
        # A copy, in which nothing has been collected yet.
        converter = copy.deepcopy(self.converter)
        for pattern, name in self.sources:
            converter.add_tensor(self.first, name, pattern, functools.partial(read, name))
        found = converter.convert(self.first, model=self.model, config=self.model.config)
        return {n: each[0] if isinstance(each, list) else each for n, each in found.items()}


@attrs.frozen(eq=False)
class Layout:
    """Where a model's tensors are: `direct` under a name in the files, or `made` from several.

    Floating ones become `dtype`, except those that the model keeps `wide`.
    """

    files: Files
    direct: Mapping[str, str]
    made: tuple[Made, ...]
    dtype: torch.dtype
    wide: tuple[str, ...]

    def rows(self, params: Mapping[str, Tensor], world: World) -> Tensors:
        """This worker's rows of every parameter.

        Where they are made, one converter's tensors are whole at a time.
        """
        # Imported here, since DTensor takes a second to import.
        from functrain.distributed.shards import rows_of, sharded

        found: dict[str, Tensor] = {}
        for name, whole in self._told(params):
            like = params[name]
            if whole.shape != like.shape or not like.ndim:
                raise ArchitectureError(
                    f"{self.files.path}: {name} has the shape {list(whole.shape)}, expected "
                    f"{list(like.shape)}, of one dimension at least"
                )
            at = rows_of(len(like), world.rank, world.size)
            own = whole[at.begin : at.end]
            # A copy: what was read lies in the pages of its file, which may change and vanish.
            kind = self.kind(name, own)
            laid = torch.empty(own.shape, dtype=kind, device=world.device).copy_(own)
            found[name] = sharded(laid, like.shape, world)
        return owning(Tensors(found))

    def _told(self, params: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        from safetensors import SafetensorError

        try:
            yield from self.each(params)
        except (OSError, RuntimeError, ValueError, LookupError, SafetensorError) as error:
            raise ArchitectureError(f"{self.files.path}: cannot be read: {error}") from error

    def each(self, params: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Every parameter whole, one after another; those that are made already in their dtype."""
        for name in params.keys() & self.direct.keys():
            yield name, self.files.tensor(self.direct[name])
        for made in self.made:
            found = made.of(functools.partial(self._cast, made.first))
            yield from ((name, found[name]) for name in found.keys() & params.keys())

    def _cast(self, to: str, name: str) -> Tensor:
        found = self.files.tensor(name)
        return found.to(self.kind(to, found))

    def kind(self, name: str, tensor: Tensor) -> torch.dtype:
        """The dtype that a tensor of this name has in the model."""
        if not tensor.is_floating_point():
            return tensor.dtype
        return torch.float32 if is_wide(name, self.wide) else self.dtype

    def buffers(self, made: Mapping[str, Tensor]) -> Tensors:
        """The buffers of a model; those in its files have the values there."""
        found = dict(made)
        for name in self.direct.keys() & made.keys():
            value = self.files.tensor(self.direct[name])
            if value.shape != made[name].shape:
                raise ArchitectureError(
                    f"{self.files.path}: {name} has the shape {list(value.shape)}, expected "
                    f"{list(made[name].shape)}"
                )
            found[name] = value.to(self.kind(name, value), copy=True)
        return Tensors(found)


def layout_of(
    files: Files, architecture: nn.Module, params: Mapping[str, Tensor], dtype: torch.dtype
) -> Layout | None:
    """How the files hold a model; None unless each tensor can be made alone.

    They must hold all of the model and nothing else, so that there is nothing to report, and the
    same values for what the model's config ties.
    """
    found = slots(architecture)
    kept = found.buffers.keys() & architecture.state_dict(keep_vars=True).keys()
    others = _others(architecture, found.params)
    wide = kept_wide(architecture, dtype)
    try:
        layout = _renamed(files, architecture, {*found.params, *kept, *others}, dtype, wide)
    except (AttributeError, TypeError):
        return None  # a version of transformers that converts in another way
    if layout is None:
        return None
    shapes = files.shapes()

    def bare(name: str) -> Tensor:
        return torch.empty(shapes[name], dtype=dtype, device="meta")

    try:
        made = {name: t.shape for each in layout.made for name, t in each.of(bare).items()}
    except (RuntimeError, ValueError, TypeError, LookupError):
        return None  # transformers explains better what does not fit
    if any(name not in params or shape != params[name].shape for name, shape in made.items()):
        return None
    needed, names = {*found.params, *kept}, {*layout.direct, *made}
    if not needed <= names or len(layout.direct.keys() & made.keys()):
        return None
    tied = [(name, first) for name, first in others.items() if name in names]
    same = all(
        name in layout.direct
        and first in layout.direct
        and files.tensor(layout.direct[name]).equal(files.tensor(layout.direct[first]))
        for name, first in tied
    )
    return layout if same else None


def kept_wide(architecture: Any, dtype: torch.dtype) -> tuple[str, ...]:
    """Patterns of the names that a model of transformers keeps in float32, as it says itself."""
    plan = getattr(architecture, "_get_dtype_plan", None)
    if not callable(plan):
        return ()
    return tuple(pattern.replace("*", ".*") for pattern in plan(dtype))


def is_wide(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a tensor of this name matches one of the patterns of `kept_wide`."""
    return any(re.search(each, name) for each in patterns)


def _renamed(
    files: Files, architecture: Any, known: set[str], dtype: torch.dtype, wide: tuple[str, ...]
) -> Layout | None:
    """The files laid out by transformers' naming; None if the model has no place for a tensor."""
    same = {name: name for name in files.places if name in known}
    plain = Layout(files, same, (), dtype, wide)
    naming = _naming(architecture, known)
    if naming is None:
        # Another version of it, which converts the whole model where anything has to be converted.
        return plain if len(same) == len(files.places) else None
    direct: dict[str, str] = {}
    made: dict[str, Made] = {}
    for name in sorted(files.places, key=naming.order):
        to, pattern = naming.of(name)
        if to not in known or to in direct:
            return None
        if pattern is None:
            direct[to] = name
            continue
        made.setdefault(to, Made(naming.converters[pattern], architecture, to))
        made[to].sources.append((pattern, name))
    return attrs.evolve(plain, direct=direct, made=tuple(made.values()))


@attrs.frozen(eq=False)
class _Naming:
    """How transformers renames tensors of the files.

    `of`: the model's name for one, and the pattern of the converter that takes it.

    `converters`: by their patterns. `order`: that in which they must be given tensors.
    """

    of: Callable[[str], tuple[str, str | None]]
    converters: Mapping[str, Any]
    order: Callable[[str], Any]


def _naming(architecture: Any, known: set[str]) -> _Naming | None:
    """How transformers names what is in the files; None where its version does it differently."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )
    except ImportError:
        return None
    steps: Any = get_model_conversion_mapping(architecture)
    converters = [each for each in steps if isinstance(each, WeightConverter)]
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    renamings = [each for each in steps if isinstance(each, WeightRenaming)]
    prefix, has = architecture.base_model_prefix, dict.fromkeys(known, True)

    def of(name: str) -> tuple[str, str | None]:
        to, pattern = rename_source_key(name, renamings, converters, prefix, has)
        return (name, None) if to not in known and name in known else (to, pattern)

    return _Naming(of, by_pattern, dot_natural_key)


def refuse_codes(files: Files, architecture: nn.Module) -> None:
    """Raise `ArchitectureError` for floating weights that the files hold as integers or the like.

    Those are quantised codes, whose scales are elsewhere or lost; transformers would cast them as
    they are.
    """
    kinds = files.dtypes().items()
    odd = {name: kind for name, kind in kinds if kind and not kind.is_floating_point}
    if not odd:
        return
    kept = architecture.state_dict(keep_vars=True)
    floating = {n for n, t in kept.items() if isinstance(t, Tensor) and t.is_floating_point()}

    def named(name: str) -> str:
        try:
            naming = _naming(architecture, floating)
            return name if naming is None else naming.of(name)[0]
        except (AttributeError, TypeError):  # another version of transformers
            return name

    for name, kind in odd.items():
        if named(name) in floating:
            raise ArchitectureError(
                f"{files.path}: {name} is {str(kind).removeprefix('torch.')}, expected a floating "
                "dtype; quantised weights cannot be trained, take the model that they were made of"
            )


def _others(architecture: nn.Module, names: Mapping[str, object]) -> dict[str, str]:
    """The further names of tied parameters, each with its first name."""
    every = dict(architecture.named_parameters(remove_duplicate=False))
    first = {id(tensor): name for name, tensor in every.items() if name in names}
    return {name: first[id(tensor)] for name, tensor in every.items() if name not in names}


def further_names(architecture: nn.Module) -> dict[str, str]:
    """The further names of what modules share, each with its first, except what the config ties.

    Whoever makes the model from its config must find a tensor under each.
    """
    first: dict[int, str] = {}
    kept = architecture.state_dict(keep_vars=True)
    tensors = {name: each for name, each in kept.items() if isinstance(each, Tensor)}
    found = {name: first.setdefault(id(tensor), name) for name, tensor in tensors.items()}
    tied = _tied(architecture)
    return {
        name: other
        for name, other in found.items()
        if name != other and tied.get(name, name) != tied.get(other, other)
    }


def _tied(architecture: Any) -> Mapping[str, str]:
    """The names that the config ties, each with the one that it is tied to."""
    if isinstance(architecture, Decoder):
        tied = {"lm_head.weight": "model.embed_tokens.weight"}
        return tied if architecture.config.tied else {}
    tell = getattr(architecture, "get_expanded_tied_weights_keys", None)
    found: Mapping[str, str] = tell(all_submodels=True) if callable(tell) else {}
    return found
