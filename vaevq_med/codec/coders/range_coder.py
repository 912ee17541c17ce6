"""A range coder over exact integer frequencies: the ``constriction`` library, fed so that it rounds nothing.

The library takes probabilities as floating-point numbers and turns them into integers of 24 bits: it scales them so
that they add up to ``2^24 - K``, rounds their running sums down, and adds 1 to each. Integers that add up to exactly
``2^24 - K`` pass through this unchanged, since all their sums are exact in float64. So what is coded with is the
frequencies themselves, and ``docs/codec_coders.md`` can say in ten lines how to read such a stream without the library.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vaevq_med.codec.errors import CodecError

PRECISION = 24
"""Frequencies of an alphabet add up to 2 to this power."""

TOTAL = 2**PRECISION
_WORD = np.dtype("<u4")


class RangeEncoder:
    """Takes symbols in the order in which they are read back."""

    def __init__(self) -> None:
        from constriction import stream

        self._coder = stream.queue.RangeEncoder()
        self._model = stream.model.Categorical(perfect=False, lazy=True)

    def encode(self, symbols: NDArray[np.int64], frequencies: NDArray[np.int64]) -> None:
        """Append symbols.

        Args:
            symbols: ``[n]``, each from 0 to below K.
            frequencies: ``[n, K]``, each at least 1, every row adding up to :data:`TOTAL`; K is at least 2.
        """
        if len(symbols):
            self._coder.encode(symbols.astype(np.int32), self._model, (frequencies - 1).astype(np.float64))

    def encode_alike(self, symbols: NDArray[np.int64], frequencies: NDArray[np.int64]) -> None:
        """Append symbols ``[n]`` that have the same frequencies ``[K]``."""
        from constriction import stream

        if len(symbols):
            shared = stream.model.Categorical((frequencies - 1).astype(np.float64), perfect=False, lazy=False)
            self._coder.encode(symbols.astype(np.int32), shared)

    def finish(self) -> bytes:
        """What was written, in words of four bytes."""
        return self._coder.get_compressed().astype(_WORD).tobytes()


class RangeDecoder:
    """Gives symbols in the order in which they were taken.

    Args:
        data: as :meth:`RangeEncoder.finish` gave them.

    Raises:
        CodecError: it does not consist of whole words.
    """

    def __init__(self, data: bytes) -> None:
        from constriction import stream

        if len(data) % _WORD.itemsize:
            raise CodecError(f"entropy-coded stream: found {len(data)} bytes, expected a multiple of {_WORD.itemsize}")
        self._coder = stream.queue.RangeDecoder(np.frombuffer(data, _WORD).astype(np.uint32))
        self._model = stream.model.Categorical(perfect=False, lazy=True)

    def decode(self, frequencies: NDArray[np.int64]) -> NDArray[np.int64]:
        """The next symbols ``[n]``, with frequencies ``[n, K]`` as they were written with.

        Raises:
            CodecError: the stream is damaged.
        """
        if not len(frequencies):
            return np.zeros(0, np.int64)
        try:
            return self._coder.decode(self._model, (frequencies - 1).astype(np.float64)).astype(np.int64)
        except AssertionError:
            raise _damaged() from None

    def decode_alike(self, count: int, frequencies: NDArray[np.int64]) -> NDArray[np.int64]:
        """The next ``count`` symbols, with frequencies ``[K]`` that they share.

        Raises:
            CodecError: the stream is damaged.
        """
        from constriction import stream

        if not count:
            return np.zeros(0, np.int64)
        shared = stream.model.Categorical((frequencies - 1).astype(np.float64), perfect=False, lazy=False)
        try:
            return self._coder.decode(shared, count).astype(np.int64)
        except AssertionError:
            raise _damaged() from None

    def finish(self) -> None:
        """Look for what should not be there.

        Raises:
            CodecError: something is left of the stream.
        """
        if not self._coder.maybe_exhausted():
            raise CodecError("entropy-coded stream: found bytes after the last symbol, expected the end")


def _damaged() -> CodecError:
    return CodecError("entropy-coded stream: found a number that no symbol has, expected an undamaged stream")


def to_frequencies(weights: NDArray[np.int64]) -> NDArray[np.int64]:
    """Frequencies in proportion to weights.

    Each is ``1 + floor(weight (2^24 - K) / sum)``; what the rounding leaves goes to the greatest weight, the first of
    several.

    Args:
        weights: ``[n, K]``, not negative and below ``2^38``, with a positive sum below ``2^62`` in each row.

    Returns:
        int64 ``[n, K]``, at least 1, adding up to :data:`TOTAL` in each row.

    Example:
        >>> to_frequencies(np.array([[3, 1, 0]])).tolist()
        [[12582911, 4194304, 1]]
    """
    free = TOTAL - weights.shape[-1]
    frequencies = weights * free
    frequencies //= weights.sum(axis=-1, keepdims=True)
    rest = free - frequencies.sum(axis=-1)
    frequencies += 1
    frequencies[np.arange(len(weights)), weights.argmax(axis=-1)] += rest
    return frequencies
