"""What encoder and decoder of a stream both know before its first index."""

from __future__ import annotations

from dataclasses import dataclass

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
