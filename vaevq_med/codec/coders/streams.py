"""What every coder asks of the indices it is given and of the layout."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vaevq_med.codec.coders.layout import Layout
from vaevq_med.codec.coders.range_coder import TOTAL
from vaevq_med.codec.errors import CodecError


def check_indices(indices: NDArray[np.int64], layout: Layout) -> NDArray[np.int64]:
    """The indices ``[N, *grid, G]``, if they fit their layout.

    Raises:
        CodecError: their shape is another, or an index at a live position is not in [0, K).
    """
    expected = (*layout.live.shape, layout.num_codebooks)
    if indices.shape != expected:
        raise CodecError(f"indices have shape {list(indices.shape)}; expected {list(expected)}")
    coded = indices[layout.live]
    if coded.size and (coded.min() < 0 or coded.max() >= layout.num_embeddings):
        raise CodecError(
            f"indices: found {int(coded.min())} to {int(coded.max())}, expected 0 to {layout.num_embeddings - 1}"
        )
    return indices


def empty_indices(layout: Layout) -> NDArray[np.int64]:
    """Zeros ``[N, *grid, G]``."""
    return np.zeros((*layout.live.shape, layout.num_codebooks), np.int64)


def no_symbols(layout: Layout) -> bool:
    """Whether nothing has to be said: no position is live, or there is one codeword.

    Raises:
        CodecError: the codebook has more codewords than the range coder can tell apart.
    """
    if layout.num_embeddings > TOTAL // 4:
        raise CodecError(f"num_embeddings is {layout.num_embeddings}; expected at most {TOTAL // 4}")
    return layout.num_embeddings < 2 or not layout.live.any()
