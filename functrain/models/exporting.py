"""Export a trained model to a Hugging Face directory: weights, config, tokenizer and card."""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson
import torch
from torch import Tensor, nn

from functrain import lora
from functrain.architecture import check_fit, holds_shards, slots
from functrain.checkpoint import format as safetensors
from functrain.checkpoint.manifest import checked_metrics
from functrain.checks import PathLike, as_path
from functrain.data.pretrained import PretrainedTokenizer
from functrain.errors import CheckpointError, ConfigError
from functrain.models.card import card
from functrain.models.config import config_files
from functrain.models.decoder import Decoder
from functrain.models.layouts import further_names, is_wide, kept_wide
from functrain.state import TrainState, check_state, fingerprint
from functrain.trees import is_sharded
from functrain.writing import sync

MARK = "functrain.json"
"""A file beside the model: its step and fingerprint, and the size and hash of each other file.

An existing directory is replaced only if it has one.
"""


def export(
    state: TrainState,
    architecture: nn.Module,
    directory: PathLike,
    *,
    tokenizer: Any = None,
    dtype: str | torch.dtype | None = None,
    name: str | None = None,
    data: str | None = None,
    config: str | Mapping[str, Any] | None = None,
    metrics: Mapping[str, float] | None = None,
    max_shard_size: str | int = "5GB",
) -> Path:
    """Write the model of `state` to `directory`, as `AutoModelForCausalLM` reads it.

    It writes `config.json`, `generation_config.json`, safetensors in the layout of the hub (tensors
    that transformers fuses in memory are split again), the tokenizer's files with its chat
    template, and a `README.md` with `data`, `config`, `metrics`, step and fingerprint. Adapters are
    merged into the weights.

    `tokenizer`: one of `functrain.models.from_pretrained`, or of transformers. `dtype`: that of the
    floating params in the files, their own unless given; those that transformers keeps in float32
    beside narrower ones (routers, say), and buffers, stay as they are. `max_shard_size`: the limit
    for each file of a model of transformers; the built-in decoder is one file.

    The directory appears whole, under its name, after everything is on the disk; an export that is
    already there is replaced. Returns its path.

    Raises `CheckpointError` for a directory that holds something else, even beside an export, and
    where the disk refuses; `ConfigError` for an architecture that is neither of transformers nor
    the built-in decoder, and for a state or a base in shards.
    """
    check_state(state)
    _check_whole(state, architecture)
    target = as_path("directory", directory)
    _check_target(target)
    kind, measured = _dtype(dtype), checked_metrics(metrics)
    if data is not None and not isinstance(data, str):
        raise ConfigError(f"data: {data!r:.99}, expected a text, or None")
    params: Mapping[str, Tensor] = state.params
    if lora.is_adapted(architecture):
        architecture, params = lora.merged(architecture, params)
    if not isinstance(architecture, Decoder) and not hasattr(architecture, "save_pretrained"):
        raise ConfigError(
            f"export: {type(architecture).__name__} is no model of transformers and not the "
            "built-in decoder, so nothing would load it; save its params with functrain.save"
        )
    check_fit(params, slots(architecture).params, "params")
    weights = _weights(architecture, params, state.buffers, kind)
    text = card(
        name=name or target.name,
        architecture=architecture,
        params=params,
        state=state,
        data=data,
        config=config,
        metrics=measured,
        tokenizer=tokenizer is not None,
        chat=getattr(getattr(tokenizer, "inner", tokenizer), "chat_template", None) is not None,
    )
    try:
        with _placed(target) as temporary:
            if isinstance(architecture, Decoder):
                _write_decoder(architecture, weights, temporary)
            else:
                _write_transformers(architecture, weights, kind, temporary, max_shard_size)
            if tokenizer is not None:
                _write_tokenizer(tokenizer, temporary)
            (temporary / "README.md").write_text(text, encoding="utf-8")
            _mark(state, temporary)
    except OSError as error:
        raise CheckpointError(
            f"{target}: could not be written ({error.strerror or error}); what was there is as it "
            "was"
        ) from error
    return target


def _check_whole(state: TrainState, architecture: nn.Module) -> None:
    """Refuse shards: one worker exports, but all must take part in gathering them."""
    if holds_shards(architecture):
        raise ConfigError(
            "export: the adapters' base is in shards, and one worker writes the files; call "
            "base, params = functrain.lora.merged(architecture, state.params) and whole = "
            "functrain.distributed.gathered(attrs.evolve(state, params=params)) on all workers, "
            "then functrain.export(whole, base, …) on worker 0"
        )
    if is_sharded(state.params):
        raise ConfigError(
            "export: the state is in shards, and one worker writes the files; call whole = "
            "functrain.distributed.gathered(state) on all workers, then "
            "functrain.export(whole, …) on worker 0"
        )


def _check_target(target: Path) -> None:
    if target.name in ("", ".."):
        # A directory that a process is in would be replaced under it by another of the same name.
        raise CheckpointError(
            f"{target}: has no name of its own, under which an export appears whole; export to a "
            "directory below it"
        )
    if not target.exists() and not target.is_symlink():
        return
    if target.is_symlink() or not target.is_dir():
        raise CheckpointError(f"{target}: is there and no directory; export to a fresh one")
    names = sorted(path.name for path in target.iterdir())
    if names and MARK not in names:
        raise CheckpointError(
            f"{target}: holds {names[0]!r} and is no export of functrain's (it has no {MARK}); "
            "export to a fresh directory, or empty it"
        )
    known = _marked(target / MARK) if names else set()
    others = [name for name in names if name not in known]
    if others:
        raise CheckpointError(
            f"{target}: holds {others[0]!r}, which is not of the export that is there ({MARK} "
            "lists its files) and would be deleted with it; move it away, or export to a fresh "
            "directory"
        )


def _marked(path: Path) -> set[str]:
    """The names of an export's files, as its mark lists them, and the mark's own."""
    try:
        found = orjson.loads(path.read_bytes())
    except (OSError, orjson.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: {error}, expected the list of an export's files") from error
    files = found.get("files") if isinstance(found, dict) else None
    if not isinstance(files, dict):
        raise CheckpointError(
            f"{path}: lists no files, as that of an export does; export to a fresh directory"
        )
    return {*files, MARK}


def _dtype(given: str | torch.dtype | None) -> torch.dtype | None:
    found = getattr(torch, given, None) if isinstance(given, str) else given
    if found is not None and (not isinstance(found, torch.dtype) or not found.is_floating_point):
        raise ConfigError(f"dtype: {given!r}, expected a floating one such as 'bfloat16', or None")
    if isinstance(given, str) and found is None:
        raise ConfigError(f"dtype: {given!r} is unknown; expected 'float32', 'bfloat16', 'float16'")
    return found


def _weights(
    architecture: nn.Module,
    params: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    dtype: torch.dtype | None,
) -> dict[str, Tensor]:
    """The tensors of the files: params, cast where that is asked, and persistent buffers.

    What modules share is there under each of its names, or under one where the config ties them.
    """
    values = {**buffers, **params}
    held = {name: values[name] for name in architecture.state_dict() if name in values}
    if dtype is not None:
        # transformers does not round these when it loads: rounded here, they would stay rounded.
        wide = kept_wide(architecture, dtype)
        for name in held.keys() & params.keys():
            if held[name].is_floating_point() and not is_wide(name, wide):
                held[name] = held[name].to(dtype)
    # Copies: a safetensors file has no memory twice.
    again = {n: f for n, f in further_names(architecture).items() if f in held and n not in held}
    return held | {name: held[first].clone() for name, first in again.items()}


def _write_decoder(architecture: Decoder, weights: Mapping[str, Tensor], directory: Path) -> None:
    for name, text in config_files(architecture).items():
        (directory / name).write_text(text, encoding="utf-8")
    with (directory / "model.safetensors").open("xb") as file:
        for piece in safetensors.contents(weights):
            file.write(piece)


def _write_transformers(
    architecture: Any,
    weights: dict[str, Tensor],
    dtype: torch.dtype | None,
    directory: Path,
    max_shard_size: str | int,
) -> None:
    from safetensors import SafetensorError

    from functrain.models.skeletons import quiet

    config = architecture.config
    before = {name: getattr(config, name, None) for name in ("dtype", "architectures")}
    floating = {
        str(t.dtype).removeprefix("torch.") for t in weights.values() if t.is_floating_point()
    }
    try:
        with quiet():
            architecture.save_pretrained(
                str(directory), state_dict=weights, max_shard_size=max_shard_size
            )
    except SafetensorError as error:
        raise OSError(str(error)) from error
    except ValueError as error:
        raise ConfigError(f"export: transformers refuses to save it: {error}") from error
    finally:
        for name, value in before.items():
            setattr(config, name, value)
    path = directory / "config.json"
    values = orjson.loads(path.read_bytes())
    # A binding turns the cache off, as training did for good: older checkpoints say that it is.
    values.pop("use_cache", None)
    values["dtype"] = str(dtype).removeprefix("torch.") if dtype else sorted(floating)[0]
    options = orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS | orjson.OPT_APPEND_NEWLINE
    path.write_bytes(orjson.dumps(values, option=options))


def _write_tokenizer(tokenizer: Any, directory: Path) -> None:
    if not hasattr(tokenizer, "save"):
        tokenizer = _of_transformers(tokenizer)
    try:
        tokenizer.save(directory)
    except Exception as error:
        if type(error) is Exception:  # what tokenizers raises where the disk refuses
            raise OSError(str(error)) from error
        raise


def _of_transformers(tokenizer: Any) -> PretrainedTokenizer:
    if not hasattr(tokenizer, "save_pretrained"):
        raise ConfigError(
            f"tokenizer: {type(tokenizer).__name__} cannot be saved as transformers reads it; give "
            "one of functrain.models.from_pretrained or of transformers, or leave it out"
        )
    return PretrainedTokenizer(tokenizer)


def _mark(state: TrainState, directory: Path) -> None:
    files = {}
    for path in sorted(directory.iterdir()):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        files[path.name] = {"size": path.stat().st_size, "sha256": digest}
    body = {
        "format": "functrain export",
        "step": state.step,
        "fingerprint": fingerprint(state),
        "files": files,
    }
    options = orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS | orjson.OPT_APPEND_NEWLINE
    (directory / MARK).write_bytes(orjson.dumps(body, option=options))


@contextmanager
def _placed(target: Path) -> Generator[Path]:
    """A directory to write into, which in the end, durable, takes the place of `target`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _fresh(target, "tmp")
    temporary.mkdir()
    try:
        yield temporary
        for path in (*temporary.iterdir(), temporary):
            sync(path)
        if target.exists() and any(target.iterdir()):
            old = _fresh(target, "old")
            target.rename(old)
            temporary.rename(target)
            shutil.rmtree(old)
        else:
            temporary.rename(target)
        sync(target.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _fresh(target: Path, what: str) -> Path:
    names = (target.with_name(f".{target.name}.{what}-{n}") for n in itertools.count(os.getpid()))
    return next(path for path in names if not path.exists())
