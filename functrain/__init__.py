"""functrain: training as a value passing through pure functions.

    state, metrics = step(state, batch)

Read `functrain/state.py`, then `functrain/steps.py`, and you have seen the whole idea. Names are
loaded on first use, so `functrain --help` and config checks need no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from functrain import (
        checkpoint,
        data,
        distributed,
        lora,
        models,
        objectives,
        planning,
        precision,
        schedules,
        testing,
        trees,
    )
    from functrain import optimizers as optim
    from functrain.architecture import bound, split
    from functrain.checkpoint import latest, load, save
    from functrain.clipping import adaptive_clip, clip_by_global_norm, clip_by_value
    from functrain.errors import (
        AliasError,
        ArchitectureError,
        BatchError,
        CheckpointError,
        ConfigError,
        ConsumedStateError,
        DataError,
        DivergedError,
        FunctrainError,
        StateError,
        WorkerError,
    )
    from functrain.evaluation import evaluate
    from functrain.flops import flops_of
    from functrain.gradients import accumulate, value_and_grad
    from functrain.guards import SpikeGuard
    from functrain.loop import train
    from functrain.memory import keep_pages, return_pages
    from functrain.metrics import Metrics
    from functrain.models.exporting import export
    from functrain.precision import init_loss_scale, scale_loss, unscale, update_loss_scale
    from functrain.references import ReferenceCache, Referenced, attach_reference
    from functrain.stages import dpo_step, kto_step, make_step, pretrain_step, sft_step
    from functrain.state import Cursor, TrainState, fingerprint, fingerprints
    from functrain.state import clone_state as clone
    from functrain.steps import Step

__version__ = "0.1.0"

_MODULES = {
    "checkpoint": "functrain.checkpoint",
    "data": "functrain.data",
    "distributed": "functrain.distributed",
    "lora": "functrain.lora",
    "models": "functrain.models",
    "objectives": "functrain.objectives",
    "optim": "functrain.optimizers",
    "planning": "functrain.planning",
    "precision": "functrain.precision",
    "schedules": "functrain.schedules",
    "testing": "functrain.testing",
    "trees": "functrain.trees",
}
_NAMES = {
    "functrain.architecture": ("bound", "split"),
    "functrain.checkpoint": ("latest", "load", "save"),
    "functrain.errors": (
        "AliasError",
        "ArchitectureError",
        "BatchError",
        "CheckpointError",
        "ConfigError",
        "ConsumedStateError",
        "DataError",
        "DivergedError",
        "FunctrainError",
        "StateError",
        "WorkerError",
    ),
    "functrain.clipping": ("adaptive_clip", "clip_by_global_norm", "clip_by_value"),
    "functrain.gradients": ("accumulate", "value_and_grad"),
    "functrain.guards": ("SpikeGuard",),
    "functrain.loop": ("train",),
    "functrain.metrics": ("Metrics",),
    "functrain.precision": ("init_loss_scale", "scale_loss", "unscale", "update_loss_scale"),
    "functrain.models.exporting": ("export",),
    "functrain.references": ("ReferenceCache", "Referenced", "attach_reference"),
    "functrain.state": ("Cursor", "TrainState", "fingerprint", "fingerprints"),
    "functrain.stages": ("dpo_step", "kto_step", "make_step", "pretrain_step", "sft_step"),
    "functrain.steps": ("Step",),
    "functrain.evaluation": ("evaluate",),
    "functrain.flops": ("flops_of",),
    "functrain.memory": ("keep_pages", "return_pages"),
}
_HOMES = {name: (home, name) for home, names in _NAMES.items() for name in names}
_HOMES["clone"] = ("functrain.state", "clone_state")

__all__ = [
    "AliasError",
    "ArchitectureError",
    "BatchError",
    "CheckpointError",
    "ConfigError",
    "ConsumedStateError",
    "Cursor",
    "DataError",
    "DivergedError",
    "FunctrainError",
    "Metrics",
    "ReferenceCache",
    "Referenced",
    "SpikeGuard",
    "StateError",
    "Step",
    "TrainState",
    "WorkerError",
    "accumulate",
    "adaptive_clip",
    "attach_reference",
    "bound",
    "checkpoint",
    "clip_by_global_norm",
    "clip_by_value",
    "clone",
    "data",
    "distributed",
    "dpo_step",
    "evaluate",
    "export",
    "fingerprint",
    "fingerprints",
    "flops_of",
    "init_loss_scale",
    "keep_pages",
    "kto_step",
    "latest",
    "load",
    "lora",
    "make_step",
    "models",
    "objectives",
    "optim",
    "planning",
    "precision",
    "pretrain_step",
    "return_pages",
    "save",
    "scale_loss",
    "schedules",
    "sft_step",
    "split",
    "testing",
    "train",
    "trees",
    "unscale",
    "update_loss_scale",
    "value_and_grad",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(_MODULES[name])
    if name in _HOMES:
        home, attribute = _HOMES[name]
        return getattr(importlib.import_module(home), attribute)
    raise AttributeError(f"module 'functrain' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
