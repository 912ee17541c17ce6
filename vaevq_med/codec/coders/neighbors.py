"""Where a context model looks: the neighbors of every position in a stack of slices, and an order that respects them.

The grid of indices is laid into a larger array with a margin of *absent* places on all sides and two slices of them
wherever the numbers of two slices do not follow each other. A neighbor is then a fixed distance away in the flat array,
and a position at an edge needs no rule of its own.

The order is that of the planes ``x + 2 y + 5 n``: whatever a position looks at in its own slice and in those below lies
in an earlier plane, so that all positions of a plane are decoded at once. Of the contrast that was coded before,
everything is known.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from vaevq_med.codec.coders.layout import Layout
from vaevq_med.codec.errors import CodecError

STEP = (5, 2, 1)
"""How far a position further in n, y and x lies behind in the order."""

CAUSAL = (
    # (n, y, x) in what is being coded
    *((0, 0, -1), (0, -1, 0), (0, -1, 1), (0, -1, -1), (0, 0, -2), (0, -2, 0)),
    *((-1, 0, 0), (-1, 0, 1), (-1, 0, -1), (-1, 1, 0), (-1, -1, 0)),
    *((-1, 1, 1), (-1, 1, -1), (-1, -1, 1), (-1, -1, -1)),
    *((-1, 0, 2), (-1, 2, 0), (-1, 0, -2), (-1, -2, 0), (-2, 0, 0)),
)
REFERENCE = (
    # likewise in the contrast that was coded before
    *((0, 0, 0), (0, 0, 1), (0, 0, -1), (0, 1, 0), (0, -1, 0)),
    *((0, 1, 1), (0, 1, -1), (0, -1, 1), (0, -1, -1), (-1, 0, 0), (1, 0, 0)),
)
OUTLOOK = ((0, 0, 1), (0, 1, -1), (0, 1, 0), (0, 1, 1), (1, 0, 0), (1, 0, 1), (1, 0, -1), (1, 1, 0), (1, -1, 0))
"""Positions not yet decoded of which it is known whether they are live."""

PLACE_SCALE = 256
"""Places within the grid are told in this many parts."""

_MARGIN = 2


class Neighborhood:
    """The live positions of a layout in the order of decoding, and the symbols around them.

    Symbols are indices, K for a position that is not live, and K + 1 for what is absent. A grid with three axes is
    taken as that many slices, whose depth is the third axis of the neighborhood; one with one axis as one row.

    Args:
        layout: of the stream.

    Attributes:
        where: int64 ``[n]``: place of each live position, in the order of decoding, in the flat array.
        source: int64 ``[n]``: its place in the layout's live positions as numpy counts them, row by row.
        starts: int64: where each plane starts in the order, and its end.
        symbols: int64 ``[places, G]``: what is known.
        reference: the same of the contrast before.
    """

    def __init__(self, layout: Layout) -> None:
        live, numbers = as_slices(layout)
        count, height, width = live.shape
        if len(numbers) > 1 and (np.diff(numbers) < 1).any():
            raise CodecError("slices: found numbers that do not rise, expected rising ones")
        # The place of each slice: the next one, or two further where a slice is missing in between.
        places = _MARGIN + np.cumsum(np.r_[0, np.where(np.diff(numbers) == 1, 1, 1 + _MARGIN)])[:count]
        room = (int(places[-1]) + 1 + _MARGIN if count else 1, height + 2 * _MARGIN, width + 2 * _MARGIN)
        self._strides = (room[1] * room[2], room[2], 1)
        n, y, x = np.nonzero(live)
        plane = STEP[0] * places[n] + STEP[1] * y + STEP[2] * x
        self.source = np.argsort(plane, kind="stable")
        n, y, x, plane = n[self.source], y[self.source], x[self.source], plane[self.source]
        self.where = ((places[n] * room[1]) + y + _MARGIN) * room[2] + x + _MARGIN
        self.starts = np.r_[np.flatnonzero(np.diff(plane, prepend=-1)), len(plane)]
        self.absent = layout.num_embeddings + 1
        blank = np.full((math.prod(room), layout.num_codebooks), self.absent, np.int64)
        grid = ((places[:, None, None] * room[1]) + np.arange(height)[:, None] + _MARGIN) * room[2]
        self._grid = (grid + np.arange(width) + _MARGIN).ravel()  # [N h w]
        self.symbols = blank.copy()
        self.symbols[self._grid] = layout.num_embeddings
        self.reference = blank
        if layout.reference is not None:
            known = layout.reference.reshape(-1, layout.num_codebooks)
            self.reference[self._grid] = np.where(live.reshape(-1, 1), known, layout.num_embeddings)
        self._live = np.zeros(math.prod(room), np.int64)
        self._live[self.where] = 1
        spread = ((y, height), (x, width), (numbers[n] - numbers[0] if count else n, _extent(numbers)))
        self._places = [(PLACE_SCALE * (2 * at + 1)) // (2 * size) - PLACE_SCALE // 2 for at, size in spread]

    def fill(self, symbols: NDArray[np.int64]) -> None:
        """Make known the symbols ``[n, G]`` of all live positions, as numpy counts them: the encoder's side."""
        self.symbols[self.where] = symbols[self.source]

    def around(self, part: slice) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """What some of the positions see.

        Args:
            part: which ones, in the order of decoding.

        Returns:
            The symbols around them ``[n, neighbors, G]``, and further inputs ``[n, further]``: of the positions to
            come, 256 if live, and where in the grid the position is, from -128 to 127.
        """
        where = self.where[part, None]
        seen = np.concatenate(
            [self.symbols[where + self._offsets(CAUSAL)], self.reference[where + self._offsets(REFERENCE)]], axis=1
        )
        coming = self._live[where + self._offsets(OUTLOOK)] * PLACE_SCALE
        return seen, np.concatenate([coming, *[place[part, None] for place in self._places]], axis=1)

    def _offsets(self, directions: tuple[tuple[int, int, int], ...]) -> NDArray[np.int64]:
        return np.array(directions) @ np.array(self._strides)


def _extent(numbers: NDArray[np.int64]) -> int:
    return int(numbers[-1] - numbers[0]) + 1 if len(numbers) else 1


def as_slices(layout: Layout) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Live positions ``[N, h, w]`` and the numbers of their slices, whatever the grid."""
    live, numbers = layout.live, np.asarray(layout.slices, np.int64)
    if live.shape[0] != len(numbers):
        raise CodecError(f"slices: found {len(numbers)} numbers, expected {live.shape[0]}")
    axes = live.ndim - 1
    if axes == 1:
        return live[:, None], numbers
    if axes == 3:
        depth = live.shape[1]
        deep = (numbers[:, None] * (depth + 1) + np.arange(depth)).ravel()
        return live.reshape(-1, *live.shape[2:]), deep
    if axes != 2:
        raise CodecError(f"grid: found {axes} axes, expected 1 to 3")
    return live, numbers
