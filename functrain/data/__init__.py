"""Data as a function of position: sources made from text, token files, chats, pairs, judgements.

A source has `at(position, n)`, the batch of `n` samples from a position on, shuffled anew each
epoch, and nothing in it moves: to resume is to ask again. A stream has `after(state)` instead, for
a loader of another library, which keeps the position.
"""

from functrain.data import embedded
from functrain.data.grouping import Padded
from functrain.data.loaders import grain_stream, iterable_stream, torchdata_stream
from functrain.data.order import permuted
from functrain.data.packing import Packed, Packing, pack, packed, packed_text
from functrain.data.pairs import Pairs, preference
from functrain.data.prefetch import Prefetched
from functrain.data.pretrained import PretrainedTokenizer
from functrain.data.records import documents, first_record, records
from functrain.data.sequences import Chats, chat
from functrain.data.source import MapSource, Source, all_batches
from functrain.data.streams import Stream, Taken
from functrain.data.text import TextRows, text, tokens
from functrain.data.token_cache import Tokenized, TokenizedFile, passed_over, tokenized
from functrain.data.tokenizers import ByteTokenizer, Tokenizer, from_json
from functrain.data.truncation import Counts
from functrain.data.unpaired import Unpaired, unpaired

__all__ = [
    "ByteTokenizer",
    "Chats",
    "Counts",
    "MapSource",
    "Packed",
    "Packing",
    "Padded",
    "Pairs",
    "Prefetched",
    "PretrainedTokenizer",
    "Source",
    "Stream",
    "Taken",
    "TextRows",
    "Tokenized",
    "TokenizedFile",
    "Tokenizer",
    "Unpaired",
    "all_batches",
    "chat",
    "documents",
    "embedded",
    "first_record",
    "from_json",
    "grain_stream",
    "iterable_stream",
    "pack",
    "packed",
    "packed_text",
    "passed_over",
    "permuted",
    "preference",
    "records",
    "text",
    "tokenized",
    "tokens",
    "torchdata_stream",
    "unpaired",
]
