"""What a GGUF file holds by its header, and what of it transformers silently ignores.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. It is read here, since gguf's
own reader makes an array of every token of a vocabulary, which takes seconds to minutes.
"""

from __future__ import annotations

import functools
import mmap
import re
import struct
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs

from functrain.errors import ArchitectureError

# The numbers of types, each with its `struct` letter.
_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_STRING, _ARRAY = 8, 9
# llama.cpp's names for what is multiplied into the frequencies.
_SCALED = re.compile(r"(.*\.)?rope_(freqs|factors_\w+)\.weight")
# For these transformers scales the frequencies by itself, from the metadata or its defaults.
_SCALED_BY_ITSELF = ("gpt-oss", "gemma4")


@attrs.frozen
class Header:
    """The metadata of a file, arrays left out, and the names of its tensors."""

    values: Mapping[str, Any]
    tensors: tuple[str, ...]

    @property
    def architecture(self) -> str:
        """The architecture's name, such as `llama`."""
        return str(self.values.get("general.architecture"))


def header_of(path: Path) -> Header:
    """The header of a GGUF file; no tensor is read.

    Raises `ArchitectureError` for another kind of file, or one that ends within its header.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as pages:
            return _header(pages)
    except (OSError, ValueError) as error:
        raise ArchitectureError(f"{path}: cannot be read as a GGUF file: {error}") from error


def _header(pages: mmap.mmap) -> Header:
    reading = _Reading(pages)
    magic, version = reading.take("4sI")
    if magic != b"GGUF":
        raise ValueError(f"begins with {magic!r}, not b'GGUF'")
    if not version & 0xFFFF:
        reading.order = ">"
    tensors, values = reading.take("QQ")
    found = {reading.text(): reading.value(*reading.take("I")) for _ in range(values)}
    return Header(found, tuple(reading.tensor() for _ in range(tensors)))


@attrs.define
class _Reading:
    """A file and the position of the next value in it."""

    pages: mmap.mmap
    at: int = 0
    order: str = "<"

    def take(self, form: str) -> tuple[Any, ...]:
        begin = self.at
        self.skip(struct.calcsize(self.order + form))
        return struct.unpack_from(self.order + form, self.pages, begin)

    def skip(self, size: int) -> None:
        self.at += size
        if self.at > len(self.pages):
            raise ValueError(f"ends after {len(self.pages):,} bytes, within its header")

    def text(self) -> str:
        (size,) = self.take("Q")
        self.skip(size)
        return self.pages[self.at - size : self.at].decode()

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.take(_SCALARS[kind])[0]
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise ValueError(f"holds a value of type {kind}, which is none of GGUF's")
        self.pass_array()
        return None

    def pass_array(self) -> None:
        kind, count = self.take("IQ")
        if kind in _SCALARS:
            self.skip(count * struct.calcsize(self.order + _SCALARS[kind]))
        elif kind == _STRING:
            for _ in range(count):
                self.skip(*self.take("Q"))
        else:
            raise ValueError(f"holds an array of type {kind}, expected one of numbers or texts")

    def tensor(self) -> str:
        """The name of the next tensor; its shape, type and offset are skipped."""
        name = self.text()
        (dimensions,) = self.take("I")
        self.skip(8 * dimensions + 4 + 8)
        return name


def refuse_scaling(path: Path, header: Header) -> None:
    """Raise `ArchitectureError` for scaled rotary frequencies, as in Llama 3.1 and Phi-3.

    llama.cpp writes the scaling as a tensor or as metadata, and transformers reads neither: with
    the same weights the model would compute other logits.
    """
    if header.architecture in _SCALED_BY_ITSELF:
        return
    name = f"{header.architecture}.rope.scaling.type"
    kind = header.values.get(name, "none")
    scaled = [each for each in header.tensors if _SCALED.fullmatch(each)]
    if kind != "none":
        scaled.append(f"{name} = {kind}")
    if scaled:
        raise ArchitectureError(
            f"{path}: its rotary frequencies are scaled ({scaled[0]}), which transformers does not "
            "read of a GGUF file, so the model would be another; give the directory of the same "
            "model (config.json and safetensors)"
        )


def passed_over(header: Header, module: Any) -> list[str]:
    """The tensors that have no place in `module`, where transformers does not report them.

    Its reader of more recent architectures reports them, as `unexpected_keys`.
    """
    try:
        from transformers.integrations.gguf.utils import is_gguf_arch_supported

        if is_gguf_arch_supported(header.architecture):
            return []
    except ImportError:
        pass  # a version before it existed
    from transformers import modeling_gguf_pytorch_utils

    reader: Any = modeling_gguf_pytorch_utils
    processor = reader.TENSOR_PROCESSORS.get(header.architecture, reader.TensorProcessor)
    known = reader.get_gguf_hf_weights_map(module, processor(config={}))
    # Experts are named there without the suffix.
    unknown = [n for n in header.tensors if not {n, n.removesuffix(".weight")} & known.keys()]
    return [name for name in unknown if not _SCALED.fullmatch(name)]


@contextmanager
def no_bar() -> Generator[None]:
    """Hide the progress bar over a GGUF file's tensors, which no switch of transformers' does."""
    from transformers import modeling_gguf_pytorch_utils

    module: Any = modeling_gguf_pytorch_utils
    shown = getattr(module, "tqdm", None)
    if shown is not None:
        module.tqdm = functools.partial(shown, disable=True)
    try:
        yield
    finally:
        if shown is not None:
            module.tqdm = shown
