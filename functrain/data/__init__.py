"""Data as a function of position: sources made from text, token files, chats and pairs.

A source has `at(position, n)`, the batch of `n` samples from a position on, shuffled anew each
epoch, and nothing that moves: to resume is to ask again.
"""

from functrain.data import embedded
from functrain.data.order import permuted
from functrain.data.records import documents, records
from functrain.data.sequences import Chats, Pairs, chat, preference
from functrain.data.source import MapSource, Source, all_batches
from functrain.data.text import TextRows, text, tokens
from functrain.data.tokenizers import ByteTokenizer, Tokenizer, from_json

__all__ = [
    "ByteTokenizer",
    "Chats",
    "MapSource",
    "Pairs",
    "Source",
    "TextRows",
    "Tokenizer",
    "all_batches",
    "chat",
    "documents",
    "embedded",
    "from_json",
    "permuted",
    "preference",
    "records",
    "text",
    "tokens",
]
