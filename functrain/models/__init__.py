"""A small decoder to train with, models of transformers, exports, and sampling from any model."""

from functrain.models.config import config_files
from functrain.models.decoder import Decoder, DecoderConfig, decoder
from functrain.models.exporting import export
from functrain.models.generate import ends, generate, positions
from functrain.models.harness import harness
from functrain.models.pretrained import Pretrained, from_pretrained, tokenizer_of
from functrain.models.skeletons import bare, skeleton

__all__ = [
    "Decoder",
    "DecoderConfig",
    "Pretrained",
    "bare",
    "config_files",
    "decoder",
    "ends",
    "export",
    "from_pretrained",
    "generate",
    "harness",
    "positions",
    "skeleton",
    "tokenizer_of",
]
