"""Checkpoints: a directory per step, safetensors and JSON, hashed and renamed into place.

    step-000000001000/
        model.safetensors       params, under the module's own names
        buffers.safetensors     buffers, also those that are not persistent
        optimizer.safetensors   slot/name for each of the optimizer's tensors
        extra.safetensors       counts, loss scale, average, reference: by their path in the state
        state.json              every number of the state, by its path
        manifest.json           size and sha256 of each file, and of itself; written last

Nothing is pickled. The hashes find corruption, not forgery.
"""

from functrain.checkpoint.background import BackgroundWriter
from functrain.checkpoint.environment import numerics
from functrain.checkpoint.inspection import inspect
from functrain.checkpoint.manifest import latest
from functrain.checkpoint.retention import Keep
from functrain.checkpoint.store import load, load_model, load_tensors, prune, save

__all__ = [
    "BackgroundWriter",
    "Keep",
    "inspect",
    "latest",
    "load",
    "load_model",
    "load_tensors",
    "numerics",
    "prune",
    "save",
]
