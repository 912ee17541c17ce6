"""What of a volume or a slice is foreground: the one definition for windows, slice filters, masks and metrics."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

A = TypeVar("A", NDArray, Tensor)

LEAST_SHARE = 0.5
"""A value is the background if it holds this share of the border."""
_EXACT_SHARE = 0.99
_RELATIVE_TOLERANCE = 1e-3
_CORNER = 16
_FAINT = 0.2
_BRIGHT = 99


@dataclass(frozen=True)
class Background:
    """What surrounds the body in an image.

    Attributes:
        value: its intensity.
        tolerance: how far from it an intensity may lie and still be background; 0 where the background is exact.
    """

    value: float = 0.0
    tolerance: float = 0.0

    @property
    def is_black(self) -> bool:
        """Whether it is 0, exactly."""
        return self == BLACK

    def foreground(self, values: A) -> A:
        """The mask of what is not background.

        Args:
            values: intensities, of any shape.

        Examples:
            >>> Background(0.5, 0.1).foreground(np.array([0.0, 0.45, 0.5, 0.7])).tolist()
            [True, False, False, True]
        """
        if self.tolerance == 0:
            return values != self.value
        return abs(values - self.value) > self.tolerance


BLACK = Background()
"""That of stored slices, and of volumes whose background was set to 0."""


def foreground(values: A) -> A:
    """The foreground of what has a black background: a stored slice, or a volume made ready to be sliced.

    Args:
        values: intensities, of any shape.

    Returns:
        A bool mask of the same shape.
    """
    return BLACK.foreground(values)


def find_background(volume: NDArray) -> Background | None:
    """The background of a volume: the value that most of its border has, or, if none has, most of its corners.

    Integers have to be equal. Floats may lie around their mode, by a thousandth of the volume's standard deviation;
    where nearly all of them (99%) are equal, the background is that value exactly.

    Args:
        volume: finite numbers ``[X, Y, Z]``.

    Returns:
        The background, or None where no value holds half of the border or of the corners, as in a scan with noise
        around the head, or one that was cut out of a brain.

    Examples:
        >>> volume = np.zeros((4, 4, 4)) + 0.004
        >>> volume[1:3, 1:3, 1:3] = 100
        >>> find_background(volume)
        Background(value=0.004, tolerance=0.0)
    """
    for pick in (_faces, _corners):
        found = _mode(pick(volume), volume)
        if found is not None:
            return found
    return None


def corner_noise(volume: NDArray, background: Background) -> float:
    """How much of the corners of the foreground's bounding box faint noise fills; a brain leaves them empty.

    Args:
        volume: finite numbers ``[X, Y, Z]``.
        background: that was found of it.

    Returns:
        The share, in [0, 1], of foreground in the blocks in the eight corners, each a sixteenth of the box along each
        axis; 0 where it is no noise, but on average a fifth as far from the background as the 99th percentile of the
        foreground or more.

    Examples:
        >>> volume = np.zeros((8, 8, 8))
        >>> volume[1:7, 1:7, 1:7] = 3
        >>> volume[2:6, 2:6, 2:6] = 100
        >>> corner_noise(volume, BLACK)
        1.0
    """
    mask = background.foreground(volume)
    box = []
    for axis in range(mask.ndim):
        along = np.flatnonzero(mask.any(axis=tuple(other for other in range(mask.ndim) if other != axis)))
        if along.size == 0:
            return 0.0
        box.append(slice(along[0], along[-1] + 1))
    filled = _corners(mask[tuple(box)])
    if not filled.any():
        return 0.0
    faint = np.abs(_corners(volume[tuple(box)])[filled].astype(np.float64) - background.value).mean()
    bright = np.percentile(np.abs(volume[mask].astype(np.float64) - background.value), _BRIGHT)
    return float(filled.mean()) if faint < _FAINT * bright else 0.0


def _mode(values: NDArray, volume: NDArray) -> Background | None:
    """The value that most of some voxels of a volume have, if one has."""
    most = _EXACT_SHARE if volume.dtype.kind == "f" else LEAST_SHARE
    if np.count_nonzero(values == values[0]) >= most * values.size:  # nearly always, and without sorting them
        return Background(float(values[0]))
    distinct, counts = np.unique(values.astype(np.float64), return_counts=True)
    if volume.dtype.kind != "f":
        best = int(counts.argmax())
        return Background(float(distinct[best])) if counts[best] >= most * values.size else None
    tolerance = _RELATIVE_TOLERANCE * float(volume.std(dtype=np.float64))
    below = np.concatenate([[0], counts.cumsum()])
    end = np.searchsorted(distinct, distinct + tolerance, side="right")
    held = below[end] - below[:-1]
    start = int(held.argmax())
    if held[start] < LEAST_SHARE * values.size:
        return None
    among = slice(start, int(end[start]))
    best = int(counts[among].argmax())
    exact = bool(counts[among][best] >= _EXACT_SHARE * held[start])
    return Background(float(distinct[among][best]), 0.0 if exact else tolerance)


def _faces(volume: NDArray) -> NDArray:
    """The voxels of the six faces."""
    ends = [(slice(None),) * axis + (end,) for axis in range(volume.ndim) for end in (0, -1)]
    return np.concatenate([volume[face].ravel(order="K") for face in ends])


def _corners(volume: NDArray) -> NDArray:
    """The voxels of a block in each corner."""
    sizes = [-(-size // _CORNER) for size in volume.shape]
    ends = [(slice(None, size), slice(-size, None)) for size in sizes]
    return np.concatenate([volume[corner].ravel() for corner in product(*ends)])
