"""The range coder's other end, as docs/codec_coders.md describes it: in Python's integers, without the library."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class RangeReader:
    """Reads one symbol at a time."""

    def __init__(self, data: bytes) -> None:
        self.words = [int(word) for word in np.frombuffer(data, "<u4")]
        self.lower, self.span, self.place = 0, 2**64 - 1, 2
        self.point = (self.word(0) << 32) | self.word(1)

    def word(self, place: int) -> int:
        return self.words[place] if place < len(self.words) else 0

    def symbol(self, frequencies: Sequence[int]) -> int:
        bounds = [0]
        for frequency in frequencies:
            bounds.append(bounds[-1] + int(frequency))
        scale = self.span >> 24
        quantile = ((self.point - self.lower) % 2**64) // scale
        found = max(k for k in range(len(frequencies)) if bounds[k] <= quantile)
        self.lower, self.span = (self.lower + scale * bounds[found]) % 2**64, scale * int(frequencies[found])
        if self.span < 2**32:
            self.lower, self.span = (self.lower << 32) % 2**64, self.span << 32
            self.point = ((self.point << 32) | self.word(self.place)) % 2**64
            self.place += 1
        return found


def frequencies_by_the_page(logarithms: Sequence[int]) -> list[int]:
    """Frequencies of logarithms to base 2 in parts of 256."""
    greatest = max(logarithms)
    weights = []
    for value in logarithms:
        below = greatest - value
        weights.append(round(2 ** (30 - below % 256 / 256)) >> min(below // 256, 31))
    total = sum(weights)
    found = [1 + weight * (2**24 - len(weights)) // total for weight in weights]
    found[weights.index(max(weights))] += 2**24 - sum(found)
    return found
