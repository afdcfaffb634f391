"""Adapters in peft's format: `adapter_config.json` and `adapter_model.safetensors`.

Read and written without peft; the outputs of both are the same (tests/lora/test_lora_peft.py).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson
import torch
from torch import Tensor, nn

from functrain.architecture import check_fit, slots
from functrain.checks import PathLike, as_path
from functrain.errors import CheckpointError, ConfigError
from functrain.lora.attach import adapter_of, attach, layers_of
from functrain.lora.config import LoRA
from functrain.lora.layers import LoRAConv1D, never_called
from functrain.trees import Tensors, is_sharded, owning
from functrain.writing import sync

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_SUFFIXES = {
    "lora_A": "lora_A.weight",
    "lora_B": "lora_B.weight",
    "lora_magnitude": "lora_magnitude_vector",
}
# Options of peft's that change the arithmetic, each with the values that stand for this one.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "lora_bias": (None, False),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "layer_replication": (None, []),
    "use_qalora": (None, False),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "use_bdlora": (None, False),
    "megatron_config": (None,),
}
# Initialisations of adapters, in lower case, that leave the base as it is.
_STILL = ("gaussian", "mica")


def save_adapter(
    directory: PathLike,
    architecture: nn.Module,
    params: Mapping[str, Tensor],
    *,
    base: PathLike | None = None,
) -> Path:
    """Write the adapters in peft's format, with `base` as the name or path of their model.

    Both files are on the disk before either is put in place. Where an adapter is there, its config
    goes first, so that weights never lie under another adapter's config: a process killed at that
    moment leaves a directory without a config, which every reader refuses.

    Raises `CheckpointError` for a directory that holds a model, and where the disk refuses;
    `ConfigError` for params in shards, and where some are trained besides the adapters, which peft
    keeps by whole modules: merge and export those.
    """
    from safetensors.torch import save

    adapter = adapter_of(architecture)
    check_fit(params, slots(architecture).params, "params")
    if adapter.lora.train:
        raise ConfigError(
            f"lora train: {', '.join(adapter.lora.train)} are trained beside the adapters, which "
            "peft's format has no place for; write the merged model: functrain.export"
        )
    if is_sharded(params):
        raise ConfigError(
            "save_adapter: the params are in shards, and one worker writes the files; call whole = "
            "functrain.distributed.gathered(params) on all workers, then functrain.lora."
            "save_adapter(…, whole) on worker 0"
        )
    weights = {_name(name): tensor.detach().cpu().contiguous() for name, tensor in params.items()}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None if base is None else os.fspath(base),
        "r": adapter.lora.rank,
        "lora_alpha": adapter.lora.alpha,
        "lora_dropout": adapter.lora.dropout,
        "use_rslora": adapter.lora.rslora,
        "use_dora": adapter.lora.dora,
        "target_modules": sorted(adapter.layers),
        "fan_in_fan_out": any(isinstance(e, LoRAConv1D) for e in layers_of(architecture).values()),
        "bias": "none",
        "inference_mode": True,
    }
    target = as_path("directory", directory)
    if (target / "config.json").exists():
        # transformers would apply them to that model whenever it loads it, merged or not.
        raise CheckpointError(
            f"{target}: holds a model (config.json), to which transformers would then apply the "
            "adapters; give them a directory of their own"
        )
    options = orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS | orjson.OPT_APPEND_NEWLINE
    try:
        target.mkdir(parents=True, exist_ok=True)
        weights_file = save(weights, {"format": "pt"})
        _write(target, {WEIGHTS: weights_file, CONFIG: orjson.dumps(config, option=options)})
    except OSError as error:
        raise CheckpointError(
            f"{target}: the adapter could not be written ({error.strerror or error})"
        ) from error
    return target


def _name(name: str) -> str:
    layer, _, part = name.rpartition(".")
    return f"{_PREFIX}{layer}.{_SUFFIXES[part]}"


def _write(directory: Path, files: Mapping[str, bytes]) -> None:
    temporary = {name: directory / f".{name}.tmp" for name in files}
    try:
        for name, data in files.items():
            with temporary[name].open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        (directory / CONFIG).unlink(missing_ok=True)
        sync(directory)  # else a power cut could bring it back
        for name in files:
            temporary[name].replace(directory / name)
        sync(directory)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


def load_adapter(
    directory: PathLike, architecture: nn.Module, params: Mapping[str, Tensor]
) -> tuple[nn.Module, Tensors]:
    """`attach`, with the adapters that peft or `save_adapter` has written into `directory`.

    `architecture` and `params` are those of the base. A peft adapter does not identify it: only
    names and shapes can be checked. Adapters become float32.

    Raises `CheckpointError` for files that are missing or not LoRA's, for options that would change
    the arithmetic (each is named), and for adapters that do not fit.
    """
    where = as_path("directory", directory)
    config = _config(where / CONFIG)
    # Adapters of layers that are never called have no effect in peft either.
    passed = never_called(architecture)
    every = _weights(where / WEIGHTS)
    weights = {n: t for n, t in every.items() if n.rpartition(".")[0] not in passed}
    layers = tuple(sorted({name.rpartition(".")[0] for name in weights}))
    try:
        lora = LoRA(
            rank=config["r"],
            alpha=config["lora_alpha"],
            dropout=config.get("lora_dropout") or 0.0,
            rslora=bool(config.get("use_rslora")),
            dora=bool(config.get("use_dora")),
            targets=layers,
        )
        adapted, first = attach(architecture, params, lora)
    except KeyError as error:
        raise CheckpointError(f"{where / CONFIG}: no {error}, which LoRA's config has") from error
    except ConfigError as error:
        raise CheckpointError(f"{where}: does not fit this model: {error}") from error
    if weights.keys() != first.keys():
        odd = sorted(weights.keys() ^ first.keys())
        raise CheckpointError(
            f"{where / WEIGHTS}: {odd[0]} is {'missing' if odd[0] in first else 'without a place'}"
        )
    for name, tensor in weights.items():
        if tensor.shape != first[name].shape:
            raise CheckpointError(
                f"{where / WEIGHTS}: {name} has shape {list(tensor.shape)}, expected "
                f"{list(first[name].shape)}; the adapter is of another model"
            )
    found = {name: weights[name].to(first[name]) for name in first}
    return adapted, owning(Tensors(found))


def _config(path: Path) -> dict[str, Any]:
    try:
        config = orjson.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except orjson.JSONDecodeError as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: expected an object, got {type(config).__name__}")
    for key, allowed in _PLAIN.items():
        if key in config and config[key] not in allowed:
            raise CheckpointError(
                f"{path}: {key} is {str(config[key])[:80]}, which is not supported; expected "
                f"{allowed[0]!r}"
            )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower() not in _STILL:
        raise CheckpointError(
            f"{path}: init_lora_weights is {start!r}, which moves the base too, as far as is known "
            "here; save it with peft's path_initial_model_for_weight_conversion first"
        )
    return config


def _weights(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        given = load(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path}: not a safetensors file ({error})") from error
    parts = {suffix: part for part, suffix in _SUFFIXES.items()}
    found: dict[str, Tensor] = {}
    for name, tensor in given.items():
        suffix = next((each for each in parts if name.endswith(f".{each}")), None)
        if suffix is None or not name.startswith(_PREFIX):
            raise CheckpointError(
                f"{path}: {name} is no adapter of a linear layer (….lora_A.weight, ….lora_B.weight)"
            )
        if not tensor.is_floating_point():
            raise CheckpointError(f"{path}: {name} is {tensor.dtype}, expected a floating dtype")
        layer = name.removeprefix(_PREFIX).removesuffix(f".{suffix}")
        found[f"{layer}.{parts[suffix]}"] = tensor.to(torch.float32)
    if not found:
        raise CheckpointError(f"{path}: holds no adapters")
    return found
