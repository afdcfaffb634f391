"""Checkpoints: a directory per step, safetensors and JSON, hashed and renamed into place.

    step-000000001000/
        model.safetensors       params, under the module's own names
        buffers.safetensors     buffers, also those that are not persistent
        optimizer.safetensors   slot/name for each of the optimizer's tensors
        extra.safetensors       every other tensor of the state, by its path
        state.json              every number and text of the state, by its path
        config.json, …          texts that were given to lie beside, if any
        manifest.json           size and sha256 of each file; written last

**Format 1**, for readers in other languages. Nothing is pickled; nothing needs this package.

*Names.* `step-` and twelve decimal digits; any other name is no checkpoint. What begins with
`.tmp-step-` or `.trash-step-` is the rest of a save or a removal that was killed, and may go;
`.damaged-step-` is what was found damaged. No file points to the newest: it has the highest number.

*safetensors* in one canonical form: eight bytes of header length, little-endian; the header as
compact JSON, padded with blanks to a multiple of eight; then the tensors, contiguous and without
gaps, little-endian. In the header `__metadata__` is first and `{"format":"pt"}`; each entry has
`dtype`, `shape` and `data_offsets` in that order, the entries sorted by dtype as `format.DTYPES`
lists them, then by name. Any reader of safetensors reads it.

*JSON* is UTF-8 with sorted keys and two blanks of indentation, and no duplicate keys. A number that
JSON has not is `{"float": "inf"}`, `"-inf"` or `"nan"`.

*state.json*: `version`, `slots` (the names of the optimizer's slots, in order), and `leaves`: each
number, text or null by its path in the state, `step`, `key`, `cursor/samples`,
`scheduler/plateau/best`, and so on; a field that a state has not is null. `base` is a fingerprint,
64 hexadecimal digits, of frozen params that adapters were trained over and that are not here, and
after a blank `scale=` and what the adapters' product is multiplied with.

*manifest.json*: `format` is `"functrain"`, `version` is 1; `step`; `files`, for each file its
`size` in bytes and `sha256` in hexadecimal; `metrics`, what was measured of the state; `numerics`,
under what the bits were computed; and `sha256`, that of this very JSON without the key `sha256`.

A checkpoint is whole if and only if every file of the manifest is there with its size and hash. The
hashes find corruption, not forgery.
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
