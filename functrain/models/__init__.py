"""A small decoder to train with, and sampling from any model."""

from functrain.models.config import config_files
from functrain.models.decoder import Decoder, DecoderConfig, decoder
from functrain.models.generate import generate

__all__ = ["Decoder", "DecoderConfig", "config_files", "decoder", "generate"]
