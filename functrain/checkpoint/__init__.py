"""Checkpoints: a directory per step, safetensors and JSON, hashed and renamed into place.

    step-000000001000/
        model.safetensors       params, under the module's own names
        buffers.safetensors     buffers, also those that are not persistent
        optimizer.safetensors   slot/name for each of the optimizer's tensors
        extra.safetensors       every other tensor of the state, by its path
        state.json              every number and text of the state, by its path
        config.json, …          the texts given as `beside`, if any
        manifest.json           size and sha256 of each file; written last

**Format 1**, for readers in other languages. Nothing is pickled; nothing needs this package.

*Names.* `step-` and twelve decimal digits; a directory of any other name is not a checkpoint.
`.tmp-step-` and `.trash-step-` begin the names of what a killed save or removal left behind, which
may be deleted; `.damaged-step-`, of checkpoints found damaged. No file points to the newest
checkpoint: it is the one with the highest number.

*safetensors* in one canonical form: eight bytes of header length, little-endian; the header as
compact JSON, padded with spaces to a multiple of eight; then the tensors, contiguous and without
gaps, little-endian. In the header `__metadata__` comes first and is `{"format":"pt"}`; each entry
has `dtype`, `shape` and `data_offsets` in that order, and entries are sorted by dtype, in the order
of `format.DTYPES`, then by name. Any safetensors reader can read it.

*JSON* is UTF-8 with sorted keys, two spaces of indentation, and no duplicate keys. Numbers that
JSON cannot express are `{"float": "inf"}`, `{"float": "-inf"}` and `{"float": "nan"}`.

*state.json*: `version`, `slots` (the names of the optimizer's slots, in order), and `leaves`: each
number, text or null by its path in the state, `step`, `key`, `cursor/samples`,
`scheduler/plateau/best`, and so on; a field that the state lacks is null. `base`, for adapters, is
the fingerprint (64 hexadecimal digits) of the frozen params that they were trained over, which are
not in the checkpoint, then a space, `scale=` and the factor of the adapters' product.

*manifest.json*: `format` is `"functrain"`, `version` is 1; `step`; `files`, each file's `size` in
bytes and `sha256` in hexadecimal; `metrics`, what was measured of the state; `numerics`, the
conditions that the bits depend on; and `sha256`, that of this same JSON without the key `sha256`.

A checkpoint is whole if and only if every file of the manifest is there with its size and hash. The
hashes detect corruption, not forgery.
"""

from functrain.checkpoint.background import BackgroundWriter
from functrain.checkpoint.environment import numerics
from functrain.checkpoint.inspection import inspect
from functrain.checkpoint.loading import load, load_model, load_tensors
from functrain.checkpoint.manifest import latest
from functrain.checkpoint.retention import Keep
from functrain.checkpoint.store import prune, save

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
