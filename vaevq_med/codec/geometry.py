"""A volume's voxels to upright slices, and exactly back; which positions of a token grid hold anything of them.

Nothing is interpolated but by :func:`from_squares`; turning and padding are exact, and what is live is computed in
integers, so that every machine finds the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import nibabel as nib
import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from vaevq_med.core.errors import DataError
from vaevq_med.images.volumes import VIEWS
from vaevq_med.prepare.recipes import Recipe

_REACH = {"bilinear": 1, "bicubic": 2}
"""Pixels on each side that an interpolation reads."""


def check_invertible(recipe: Recipe) -> None:
    """Refuse a recipe whose slices cannot be brought back onto the grid that they were cut from.

    Args:
        recipe: that is to be used.

    Raises:
        DataError: it resamples volumes, or corrects their bias field.
    """
    for name, what in (("spacing", "resamples volumes"), ("bias_field_correction", "divides a bias field out")):
        if getattr(recipe, name) is not None:
            raise DataError(
                f"recipe {recipe.name}: found {name}, which {what} and cannot be undone to the voxel, expected null; "
                "e.g. brats24/axial_256"
            )


@dataclass(frozen=True)
class Turn:
    """How the axes of a volume become those of a stack of upright slices: their order first, then their directions.

    Attributes:
        axes: of the volume, for the slices, rows and columns of the stack.
        flips: which of the stack's axes run against those of the volume.
    """

    axes: tuple[int, int, int]
    flips: tuple[bool, bool, bool]

    @classmethod
    def of(cls, affine: NDArray[np.float64], view: str) -> Turn:
        """The turn for a view, as :mod:`vaevq_med.prepare.volumes.reading` has it.

        Args:
            affine: 4×4, from voxels to RAS+ coordinates.
            view: ``axial``, ``coronal`` or ``sagittal``.

        Examples:
            >>> Turn.of(np.diag([1.0, -1.0, 1.0, 1.0]), "axial")
            Turn(axes=(2, 1, 0), flips=(False, False, True))
        """
        codes, order, _ = VIEWS[view]
        # Of each axis of the volume, which axis of the view it is, and whether it points there.
        turn = nib.orientations.ornt_transform(
            nib.orientations.io_orientation(affine), nib.orientations.axcodes2ornt(tuple(codes))
        )
        source = {int(place): (axis, bool(sign < 0)) for axis, (place, sign) in enumerate(turn)}
        chosen = [source[place] for place in order]
        axes, flips = zip(*chosen, strict=True)
        return cls((axes[0], axes[1], axes[2]), (flips[0], flips[1], flips[2]))

    def stack(self, volume: NDArray) -> NDArray:
        """Upright slices ``[N, rows, columns]`` of a volume ``[X, Y, Z]``; a view of it."""
        return volume.transpose(self.axes)[self._steps]

    def volume(self, stack: NDArray) -> NDArray:
        """The volume ``[X, Y, Z]`` of upright slices ``[N, rows, columns]``; a view of them."""
        back = np.argsort(self.axes)
        return stack[self._steps].transpose([int(axis) for axis in back])

    @property
    def _steps(self) -> tuple[slice, ...]:
        return tuple(slice(None, None, -1 if flip else None) for flip in self.flips)


def margins(rows: int, columns: int) -> tuple[int, int, int]:
    """Side of the square that slices are padded to, and the rows above and columns on the left of them.

    Args:
        rows: of a slice.
        columns: likewise.

    Examples:
        >>> margins(240, 155)
        (240, 0, 42)
    """
    side = max(rows, columns)
    return side, (side - rows) // 2, (side - columns) // 2


def _spans(side: int, size: int, patch: int, reach: int) -> list[tuple[int, int]]:
    """The pixels, of ``side``, that each of the patches of a row of ``size`` pixels is made from.

    Pixel k of ``size`` has its middle at (2k + 1) side / (2 size) and reads ``reach`` pixels of the larger of the two
    spacings on both sides, or, with a reach of 0, no other than the one it lies in. Everything is a multiple of
    1 / (2 size).
    """
    half = 2 * reach * max(side, size) or size
    found = []
    for start in range(0, size, patch):
        low = (2 * start + 1) * side - half
        high = (2 * (start + patch) - 1) * side + half
        found.append((max(0, low // (2 * size)), min(side, -(-high // (2 * size)))))
    return found


def live_positions(
    mask: NDArray[np.bool_], *, size: int, patch: int, interpolation: str, resized: bool = False
) -> NDArray[np.bool_]:
    """Which positions of the token grid show anything of the foreground.

    A position is live where a pixel of its patch is made, by padding and resizing, from a voxel of the foreground.

    Args:
        mask: foreground of the slices, ``[N, rows, columns]``.
        size: side of the squares that the tokenizer is given.
        patch: f, pixels of a position along each axis.
        interpolation: by which slices are resized, ``bilinear`` or ``bicubic``.
        resized: the mask is that of squares after they were resized and rounded, in which the rim of the foreground
            may have become background: a position reads as far beyond its patch as if they were resized once more.

    Returns:
        ``[N, size / f, size / f]``.

    Examples:
        >>> mask = np.zeros((1, 8, 8), bool)
        >>> mask[0, 3, 4] = True
        >>> live_positions(mask, size=8, patch=4, interpolation="bilinear").astype(int).tolist()
        [[[0, 1], [0, 0]]]
    """
    side, top, left = margins(*mask.shape[1:])
    spans = _spans(side, size, patch, _REACH[interpolation] if resized or side != size else 0)
    rows = [slice(max(0, a - top), max(0, b - top)) for a, b in spans]
    columns = [slice(max(0, a - left), max(0, b - left)) for a, b in spans]
    by_row = np.stack([mask[:, span].any(axis=1) for span in rows], axis=1)  # [N, h, columns]
    return np.stack([by_row[:, :, span].any(axis=2) for span in columns], axis=2)  # [N, h, w]


def from_squares(squares: Tensor, shape: Sequence[int], interpolation: str) -> Tensor:
    """Resize squares back and cut the padding off.

    Args:
        squares: float ``[N, S, S]``.
        shape: rows and columns of a slice.
        interpolation: ``bilinear`` or ``bicubic``.

    Returns:
        float ``[N, rows, columns]``.
    """
    rows, columns = shape
    side, top, left = margins(rows, columns)
    if squares.shape[-1] != side:
        squares = F.interpolate(
            squares[:, None],
            size=(side, side),
            mode=interpolation,
            antialias=side < squares.shape[-1],
            align_corners=False,
        )[:, 0]
    return squares[:, top : top + rows, left : left + columns]


def to_pixels(slices: Tensor, recipe: Recipe) -> Tensor:
    """Pad slices to squares and resize them, as ``slice-extract`` does.

    Args:
        slices: float ``[N, rows, columns]`` in [0, 1].
        recipe: says the size and how to interpolate.

    Returns:
        ``[N, S, S]`` in [0, 1].
    """
    from vaevq_med.prepare.volumes.slices import resize_images  # brings MONAI along

    return resize_images(slices, recipe)
