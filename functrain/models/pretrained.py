"""Models of transformers from a local directory or a GGUF file, as values.

    architecture, params, buffers, tokenizer = functrain.models.from_pretrained("models/smollm2")

transformers makes the skeleton, finds the weights in whatever layout and computes the buffers that
no file holds (rotary frequencies); each tensor then moves into memory of its own, one at a time.
"""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import torch
from torch import Tensor, nn

from functrain import memory
from functrain.architecture import split
from functrain.checks import as_path
from functrain.data.pretrained import PretrainedTokenizer, pretrained_tokenizer
from functrain.distributed import World
from functrain.errors import ArchitectureError, WeightsWarning
from functrain.lora.peft import CONFIG as ADAPTERS
from functrain.models.config import ARCHITECTURE
from functrain.models.gguf_files import header_of, no_bar, passed_over, refuse_scaling
from functrain.models.layouts import Files, layout_of, refuse_codes
from functrain.models.skeletons import REFUSALS, bare, configured, quiet, skeleton
from functrain.trees import Tensors, owning

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


class Pretrained(NamedTuple):
    """A model as values: structure without weights, its weights, and its tokenizer if it has one.

    `params` and `buffers`: by the module's own names, on one device, in memory of their own.
    """

    architecture: nn.Module
    params: Tensors
    buffers: Tensors
    tokenizer: PretrainedTokenizer | None


def from_pretrained(
    path: str | Path,
    *,
    dtype: str | torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    attention: str | None = None,
    world: World | None = None,
) -> Pretrained:
    """The causal language model in `path`: `(architecture, params, buffers, tokenizer)`.

    `path`: a local directory with `config.json` and safetensors (one file, or shards with an
    index), as transformers writes it or as a checkpoint or an export of functrain's is; or a GGUF
    file. `dtype`: that of the floating params; steps train in float32, narrower ones serve for a
    frozen base. `attention`: transformers' `attn_implementation`, such as `"sdpa"` or `"eager"`.
    Nothing is fetched, no code of the directory is run, nothing is unpickled.

    In memory there is one copy of the weights, and at most one tensor twice; the system may drop
    the pages of the files. Weights that no part of the model takes give a `WeightsWarning`.

    `world`: for a step that is `sharded`. Every worker calls this, and reads and keeps only its
    rows of the params, on the world's device. Tensors that transformers makes from several (fused
    experts) are made one at a time; with a GGUF file, or weights that the model has no place for,
    each worker holds the whole for a moment.

    Raises `ArchitectureError` for a path without such a model, for quantised weights, for a GGUF
    file with scaled rotary frequencies (Llama 3.1, Phi-3 of 128k), which transformers does not
    read, and where weights are missing or of other shapes, since those would be random.
    """
    kind = _dtype(dtype)
    given = as_path("path", path)
    if world is not None and world.size > 1:
        return _in_shards(given, kind, attention, world)
    return _whole(given, kind, device if world is None else world.device, attention)


def _in_shards(given: Path, kind: torch.dtype, attention: str | None, world: World) -> Pretrained:
    where, options = world.for_all(lambda: _located(given))
    found = None if "gguf_file" in options else _row_by_row(where, kind, attention, world)
    if found is None:
        # Imported here, since DTensor takes a second to import.
        from functrain.distributed.shards import rows_made

        whole = world.for_all(lambda: _whole(given, kind, "cpu", attention))
        found = whole.architecture, rows_made(whole.params, world), whole.buffers
    architecture, params, buffers = found
    moved = {name: buffer.to(world.device) for name, buffer in buffers.items()}
    return Pretrained(architecture, params, Tensors(moved), tokenizer_of(given))


def _row_by_row(
    where: Path, kind: torch.dtype, attention: str | None, world: World
) -> tuple[nn.Module, Tensors, Tensors] | None:
    """The model with this worker's rows; None where its files must be converted as a whole."""
    module, params, made = world.for_all(lambda: bare(lambda: skeleton(where, kind, attention)))
    if kind != torch.float32:
        # What a constructor computes in a narrow default dtype, transformers computes once more.
        exact = world.for_all(lambda: bare(lambda: skeleton(where, torch.float32, attention)))[2]
        made = Tensors({name: exact[name].to(buffer.dtype) for name, buffer in made.items()})
    files = world.for_all(lambda: Files.of(where))
    world.for_all(lambda: refuse_codes(files, module))
    layout = world.for_all(lambda: layout_of(files, module, params, kind))
    if world.any(layout is None):
        return None
    assert layout is not None
    # Rows of different models would be a mixture that no later comparison could see.
    world.agree(files.digests(), "before the model is sharded")
    shards = world.for_all(lambda: layout.rows(params, world))
    return module, shards, world.for_all(lambda: layout.buffers(made))


def _whole(
    given: Path, kind: torch.dtype, device: str | torch.device, attention: str | None
) -> Pretrained:
    where, options = _located(given)
    if attention is not None:
        options["attn_implementation"] = attention
    module = _loaded(given, where, kind, options)
    # The blocks of a GGUF file are unpacked into memory of their own.
    files = None if "gguf_file" in options else Files.of(where)
    if files is not None:
        refuse_codes(files, module)
    configured(module)
    architecture, params, buffers = split(module.to(device))
    if files is not None and kind in files.dtypes().values():
        # Pages of the files, without casts. Handed over, not lent: a tensor that is also named here
        # would be held twice.
        handed = dict(params)
        del params
        params = _moved(handed)
    return Pretrained(architecture, params, _moved(dict(buffers)), tokenizer_of(given))


def _dtype(given: str | torch.dtype) -> torch.dtype:
    found = getattr(torch, given, None) if isinstance(given, str) else given
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ArchitectureError(
            f"dtype: {given!r}, expected a floating one: 'float32', 'bfloat16' or 'float16'"
        )
    return found


def _located(path: Path) -> tuple[Path, dict[str, Any]]:
    """The directory of a model, and what transformers must be told besides."""
    if path.is_file() and path.suffix == ".gguf":
        _refuse_adapters(path.parent, path.name)
        return path.parent, {"gguf_file": path.name}
    if not path.is_dir():
        what = (
            "expected a directory, or a file that ends in .gguf"
            if path.exists()
            else (
                f"not there (looked from {Path.cwd()}); models are read from the disk, so fetch it "
                "first: hf download NAME --local-dir DIR"
            )
        )
        raise ArchitectureError(f"{path}: {what}")
    if not (path / "config.json").is_file():
        found = sorted(each.name for each in path.glob("*.gguf"))
        hint = f"; give the file: {path / found[0]}" if found else ""
        if (path / ARCHITECTURE).is_file():
            hint = (
                "; this checkpoint has buffers that transformers would not find: export it "
                "(functrain export, functrain.export), and give the export"
            )
        raise ArchitectureError(
            f"{path}: no config.json; expected a model as save_pretrained writes it{hint}"
        )
    if not any((path / name).is_file() for name in WEIGHTS):
        raise ArchitectureError(
            f"{path}: neither {' nor '.join(WEIGHTS)}; weights in another format (pickled .bin "
            "files, say) are not read: load them with transformers, and save_pretrained them"
        )
    _check_config(path / "config.json")
    _refuse_adapters(path, "config.json")
    return path, {"use_safetensors": True}


def _refuse_adapters(directory: Path, beside: str) -> None:
    """Refuse adapters beside a model: transformers would apply them only where peft is there."""
    if (directory / ADAPTERS).exists():
        raise ArchitectureError(
            f"{directory}: {ADAPTERS} lies beside {beside}; move the adapters to a directory of "
            "their own, load the model, and put them on it with functrain.lora.load_adapter"
        )


def _check_config(path: Path) -> None:
    try:
        config = orjson.loads(path.read_bytes())
    except (OSError, orjson.JSONDecodeError) as error:
        raise ArchitectureError(f"{path}: not JSON ({error})") from error
    if not isinstance(config, dict):
        raise ArchitectureError(f"{path}: expected an object, got {type(config).__name__}")
    quantised = config.get("quantization_config")
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise ArchitectureError(
            f"{path}: its weights are quantised ({method}), which cannot be trained; take the "
            "model that it was made of, or one in a GGUF file"
        )


def _loaded(given: Path, where: Path, dtype: torch.dtype, options: dict[str, Any]) -> Any:
    try:
        from transformers import AutoModelForCausalLM
    except ModuleNotFoundError as error:
        raise ArchitectureError(
            f"{given}: models are read with {error.name}, which is not installed: "
            "pip install 'functrain[hf]'"
        ) from error
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    header = header_of(given) if "gguf_file" in options else None
    if header is not None:
        refuse_scaling(given, header)
    try:
        with quiet(), nullcontext() if header is None else no_bar():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                str(where),
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                **options,
            )
    except (*REFUSALS, StrictDataclassError, SafetensorError) as error:
        reason = str(error).strip() or type(error).__name__
        raise ArchitectureError(f"{given}: transformers cannot load it: {reason[:500]}") from error
    module, report = loaded
    missing = sorted(report["missing_keys"]) + sorted(map(str, report["mismatched_keys"]))
    if missing:
        raise ArchitectureError(
            f"{given}: lacks {_some(missing)}, which would be random; the files are of another "
            "model than config.json says, or incomplete"
        )
    unknown = sorted(report["unexpected_keys"])
    unknown += [] if header is None else passed_over(header, module)
    if unknown:
        warnings.warn(
            f"{given}: {type(module).__name__} has no place for {_some(unknown)}; they are left "
            "out, and an export will not have them",
            WeightsWarning,
            stacklevel=3,
        )
    return _unquantised(module)


def _unquantised(module: Any) -> Any:
    """Clear the marks of quantisation on a model of a GGUF file, as its weights have none now."""
    if hasattr(module.config, "quantization_config"):
        del module.config.quantization_config
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        if name in vars(module):
            delattr(module, name)
    return module


def _moved(given: dict[str, Tensor]) -> Tensors:
    """Move every tensor of `given`, which is emptied, into memory of its own.

    One that was loaded as it is lies in the pages of its file: it would change and vanish with the
    file, and its alignment, on which the bits of a kernel may depend, would be the file's. Each old
    tensor is released before the next one is made.
    """
    moved: dict[str, Tensor] = {}
    for name in sorted(given):
        tensor = given.pop(name)
        if tensor.device.type == "cpu":
            tensor = memory.empty(tensor.shape, tensor.dtype).copy_(tensor)
        moved[name] = tensor
    return owning(Tensors(moved))


def tokenizer_of(path: str | Path) -> PretrainedTokenizer | None:
    """The tokenizer of a model: of its directory, None where there is none, or in its GGUF file."""
    given = as_path("path", path)
    if given.suffix != ".gguf" and not any((given / name).is_file() for name in _TOKENIZERS):
        return None
    return pretrained_tokenizer(given)


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
