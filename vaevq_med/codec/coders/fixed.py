"""Fixed length: every index in as many bits as the largest one needs; what the other coders are measured against."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vaevq_med.codec.coders.base import IndexCoder
from vaevq_med.codec.coders.layout import Layout
from vaevq_med.codec.errors import CodecError


def bits_of(num_embeddings: int) -> int:
    """Bits of an index below K.

    Args:
        num_embeddings: K.

    Examples:
        >>> bits_of(1), bits_of(2), bits_of(1024), bits_of(1025)
        (0, 1, 10, 11)
    """
    return (num_embeddings - 1).bit_length()


class FixedLength(IndexCoder):
    """Every index in ceil(log2 K) bits, the highest first; the last byte is filled with zeros."""

    name = "fixed"

    def encode(self, indices: NDArray[np.int64], layout: Layout) -> bytes:
        """The bytes of the indices ``[N, *grid, G]`` at the live positions.

        Raises:
            CodecError: an index is not in [0, K).
        """
        values = indices[layout.live].reshape(-1)  # [live positions * G]
        if values.size and not 0 <= values.min() <= values.max() < layout.num_embeddings:
            raise CodecError(
                f"found indices {values.min()} to {values.max()}, expected 0 to {layout.num_embeddings - 1}"
            )
        bits = bits_of(layout.num_embeddings)
        shifts = np.arange(bits)[::-1]
        return np.packbits((values[:, None] >> shifts & 1).astype(np.uint8)).tobytes()

    def decode(self, data: bytes, layout: Layout) -> NDArray[np.int64]:
        """The indices ``[N, *grid, G]``, 0 where the layout is not live.

        Raises:
            CodecError: the bytes are not those of such a stream.
        """
        bits = bits_of(layout.num_embeddings)
        count = int(np.count_nonzero(layout.live)) * layout.num_codebooks
        if len(data) != -(-count * bits // 8):
            raise CodecError(f"found a stream of {len(data)} bytes, expected {-(-count * bits // 8)}")
        unpacked = np.unpackbits(np.frombuffer(data, np.uint8))
        if unpacked[count * bits :].any():
            raise CodecError("found a stream with something after its last index, expected zeros")
        digits = unpacked[: count * bits].reshape(count, bits).astype(np.int64)
        values = digits @ (np.int64(1) << np.arange(bits, dtype=np.int64)[::-1])
        if values.size and values.max() >= layout.num_embeddings:
            raise CodecError(f"found the index {values.max()}, expected at most {layout.num_embeddings - 1}")
        indices = np.zeros((*layout.live.shape, layout.num_codebooks), np.int64)
        indices[layout.live] = values.reshape(-1, layout.num_codebooks)
        return indices
