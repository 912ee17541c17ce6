"""The interface of every entropy coder, and what both of its sides know before the first index."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Layout:
    """What encoder and decoder both know of a stream before its first index.

    Attributes:
        live: bool ``[N, *grid]``: the positions that are coded, in row-major order. The others are background.
        slices: int64 ``[N]``: numbers of the slices in their volume, rising; two that lie side by side differ by 1.
        num_embeddings: K; every index is below it.
        num_codebooks: G, indices a position.
        contrast: what is shown, e.g. ``t1c``; empty where several are stacked, or it is unknown.
        reference: int64 ``[N, *grid, G]``: the indices of the contrast of the same case that was coded before, or None.
    """

    live: NDArray[np.bool_]
    slices: NDArray[np.int64]
    num_embeddings: int
    num_codebooks: int = 1
    contrast: str = ""
    reference: NDArray[np.int64] | None = None


class IndexCoder(ABC):
    """Indices to bytes and back, without loss; its probabilities are computed in integers, or exactly rounded.

    Attributes:
        name: of the coder, as a file says it.
    """

    name: ClassVar[str]

    @property
    def settings(self) -> Mapping[str, Any]:
        """Plain values that a decoder needs to know besides the layout, e.g. the hash of a model; small."""
        return {}

    @abstractmethod
    def encode(self, indices: NDArray[np.int64], layout: Layout) -> bytes:
        """The bytes of the indices ``[N, *grid, G]`` at the live positions."""

    @abstractmethod
    def decode(self, data: bytes, layout: Layout) -> NDArray[np.int64]:
        """The indices ``[N, *grid, G]``, 0 where the layout is not live.

        Raises:
            CodecError: the bytes are not those of such a stream.
        """
