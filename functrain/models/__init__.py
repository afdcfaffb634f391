"""A small decoder to train with, and sampling from any model."""

from functrain.models.decoder import Decoder, DecoderConfig, decoder
from functrain.models.generate import generate

__all__ = ["Decoder", "DecoderConfig", "decoder", "generate"]
