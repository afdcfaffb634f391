"""The order of an epoch: a keyed permutation, computed on demand."""

from __future__ import annotations

from functrain import keys
from functrain.errors import DataError

_ROUNDS = 6
_WORD = 2**64 - 1


def permuted(index: int, length: int, key: int) -> int:
    """Where a shuffle of `range(length)` puts `index`: a bijection for each key, in O(1).

    A Feistel network over the next power of four, walked until it lands in range. So a run can
    resume at any position without replaying the epoch, and workers agree without talking. Raises
    `DataError` for an index out of range, from which the walk might never end.
    """
    if not 0 <= index < length:
        raise DataError(f"index {index} of {length}: out of range, expected [0, {length})")
    half = max(1, ((length - 1).bit_length() + 1) // 2)
    rounds = [keys.derive(key, "round", number) for number in range(_ROUNDS)]
    while True:
        index = _encrypted(index, half, rounds)
        if index < length:
            return index


def _encrypted(index: int, half: int, rounds: list[int]) -> int:
    mask = (1 << half) - 1
    left, right = index >> half, index & mask
    for key in rounds:
        left, right = right, left ^ (_mixed(right ^ key) & mask)
    return (left << half) | right


def _mixed(word: int) -> int:
    """The finaliser of SplitMix64 (Steele et al. 2014)."""
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 & _WORD
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB & _WORD
    return word ^ (word >> 31)
