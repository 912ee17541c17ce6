"""Adaptive frequencies: every codebook's indices by how often each was used before in the same stream."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from vaevq_med.codec.coders.base import IndexCoder
from vaevq_med.codec.coders.layout import Layout
from vaevq_med.codec.coders.range_coder import RangeDecoder, RangeEncoder, to_frequencies
from vaevq_med.codec.coders.streams import check_indices, empty_indices, no_symbols
from vaevq_med.codec.errors import CodecError

UNSEEN = 4
"""Weight of an index that was not used yet."""

RATES = (0, 1, 2, 4, 8, 16, 64)
"""Weights that a use can add; the encoder takes the best for the stream and says so in its first byte."""

BLOCK = 64
"""Positions that are coded before the frequencies learn from them."""


class AdaptiveCoder(IndexCoder):
    """Counts by contrast and codebook: a stream has one contrast, and a table for each of its codebooks."""

    name: ClassVar[str] = "adaptive"

    def encode(self, indices: NDArray[np.int64], layout: Layout) -> bytes:
        """The bytes of the indices: a rate, then the range-coded indices, position after position in blocks.

        Raises:
            CodecError: the indices do not fit the layout.
        """
        symbols = check_indices(indices, layout)[layout.live]  # [n, G]
        if no_symbols(layout):
            return b""
        return min((self._encode(symbols, layout.num_embeddings, rate) for rate in range(len(RATES))), key=len)

    @staticmethod
    def _encode(symbols: NDArray[np.int64], num_embeddings: int, rate: int) -> bytes:
        coder, tables = RangeEncoder(), _Tables(symbols.shape[1], num_embeddings, rate)
        for start in range(0, len(symbols), BLOCK):
            block = symbols[start : start + BLOCK]
            for codebook, frequencies in enumerate(tables.frequencies()):
                coder.encode_alike(block[:, codebook], frequencies)
            tables.learn(block)
        return bytes([rate]) + coder.finish()

    def decode(self, data: bytes, layout: Layout) -> NDArray[np.int64]:
        """The indices of bytes.

        Raises:
            CodecError: the bytes are not those of such a stream.
        """
        indices = empty_indices(layout)
        if no_symbols(layout):
            if data:
                raise CodecError(f"adaptive coder: found {len(data)} bytes, expected none where nothing is coded")
            return indices
        if not data or data[0] >= len(RATES):
            raise CodecError("adaptive coder: found no rate of adaption, expected one in the first byte")
        coder, tables = RangeDecoder(data[1:]), _Tables(layout.num_codebooks, layout.num_embeddings, data[0])
        symbols = np.zeros((int(layout.live.sum()), layout.num_codebooks), np.int64)
        for start in range(0, len(symbols), BLOCK):
            block = symbols[start : start + BLOCK]
            for codebook, frequencies in enumerate(tables.frequencies()):
                block[:, codebook] = coder.decode_alike(len(block), frequencies)
            tables.learn(block)
        coder.finish()
        indices[layout.live] = symbols
        return indices


class _Tables:
    """What was counted so far, ``[G, K]``."""

    def __init__(self, num_codebooks: int, num_embeddings: int, rate: int) -> None:
        self.weights = np.full((num_codebooks, num_embeddings), UNSEEN, np.int64)
        self.rate = RATES[rate]

    def frequencies(self) -> NDArray[np.int64]:
        """The frequencies of the next block, ``[G, K]``."""
        return to_frequencies(self.weights)

    def learn(self, block: NDArray[np.int64]) -> None:
        """Count the indices ``[n, G]`` of a block."""
        np.add.at(self.weights, (np.arange(block.shape[1]), block), self.rate)
