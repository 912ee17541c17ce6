"""MONAI transforms of whole volumes: what MONAI itself does not have."""

from __future__ import annotations

import numpy as np
import torch
from monai.transforms import Transform
from numpy.typing import NDArray
from torch import Tensor

from vaevq_med.core.errors import DataError
from vaevq_med.images.foreground import BLACK, Background, foreground

_MAX_COUNTED = 2**20
"""Integer volumes of a wider range are sorted instead of counted."""
_LEAST_CONTRAST = 1e-6
_MARGIN = 1e-3


def blacken(voxels: NDArray, background: Background, *, keep_negatives: bool) -> tuple[NDArray, float]:
    """Give a volume a background of 0 that no voxel of the foreground shares.

    Args:
        voxels: any shape.
        background: of them.
        keep_negatives: raise a foreground that reaches 0 or below as a whole, until it lies above 0.

    Returns:
        The volume (itself where nothing had to be done), and by how much its foreground was raised.

    Examples:
        >>> raised, _ = blacken(np.array([-1.0, -0.5, 1.0]), Background(-1.0), keep_negatives=True)
        >>> raised.round(4).tolist()
        [0.0, 0.0015, 1.5015]
    """
    if background.is_black and not (keep_negatives and voxels.size and voxels.min() < 0):
        return voxels, 0.0
    inside = background.foreground(voxels)
    offset = 0.0
    if keep_negatives and inside.any():
        values = voxels[inside]
        lowest, highest = float(values.min()), float(values.max())
        if lowest <= 0:
            offset = -lowest + (_MARGIN * (highest - lowest) or 1.0)
            voxels = voxels.astype(np.float64) + offset
    return np.where(inside, voxels, voxels.dtype.type(0)), offset


def nonzero_percentiles(volume: Tensor, percentiles: tuple[float, float]) -> tuple[float, float]:
    """Percentiles of the nonzero voxels of a volume, which are its foreground, interpolated linearly.

    Args:
        volume: any shape, with a background of 0.
        percentiles: two numbers in [0, 100].

    Raises:
        DataError: there is no nonzero voxel, or no difference between the percentiles but for rounding.

    Examples:
        >>> nonzero_percentiles(torch.tensor([0.0, 0.0, 1.0, 2.0, 3.0]), (0, 100))
        (1.0, 3.0)
    """
    if volume.is_floating_point():
        values = volume[foreground(volume)].numpy()
        total = values.size
        window = np.percentile(values, percentiles, overwrite_input=True) if total else (0, 0)
    else:
        total, window = _counted_percentiles(volume, percentiles)
    if total == 0:
        raise DataError("found an all-zero volume, expected some nonzero voxels")
    low, high = (float(value) for value in window)
    least = _LEAST_CONTRAST * max(abs(low), abs(high)) if volume.is_floating_point() else 0
    if not high - low > least:
        found = f"the same intensity {low:.9g}" if low == high else f"intensities as near as {low!r} and {high!r}"
        raise DataError(
            f"found {found} at percentiles {percentiles[0]} and {percentiles[1]}, expected a volume with contrast"
        )
    return low, high


def _counts(volume: Tensor) -> tuple[int, Tensor]:
    """The smallest value of an integer volume, and how often each one from there on occurs."""
    lowest = int(volume.min())
    return lowest, torch.bincount(volume.flatten().long() - lowest if lowest else volume.flatten())


def _counted_percentiles(volume: Tensor, percentiles: tuple[float, float]) -> tuple[int, NDArray[np.float64]]:
    """How many nonzero voxels an integer volume has, and their percentiles, without sorting them."""
    if int(volume.max()) - int(volume.min()) > _MAX_COUNTED:
        values = volume[foreground(volume)].double().numpy()  # numpy interpolates integers with overflow
        return values.size, np.percentile(values, percentiles) if values.size else np.zeros(2)
    lowest, counts = _counts(volume)
    black = int(BLACK.value)
    if lowest <= black < lowest + len(counts):
        counts[black - lowest] = 0
    below = np.cumsum(counts.numpy())
    total = int(below[-1])
    if total == 0:
        return 0, np.zeros(2)
    ranks = np.asarray(percentiles) / 100 * (total - 1)
    first = np.floor(ranks)
    lower, upper = (lowest + np.searchsorted(below, rank, side="right") for rank in (first, np.ceil(ranks)))
    return total, lower + (upper - lower) * (ranks - first)


def distinct(voxels: NDArray) -> NDArray:
    """The values that occur, rising.

    Args:
        voxels: any shape.

    Examples:
        >>> distinct(np.array([[2, 0], [0, 4]], np.uint8)).tolist()
        [0, 2, 4]
    """
    if voxels.dtype.kind in "iu" and voxels.size and int(voxels.max()) - int(voxels.min()) <= _MAX_COUNTED:
        lowest, counts = _counts(torch.from_numpy(voxels.ravel(order="K").astype(np.int64, copy=False)))
        return lowest + np.flatnonzero(counts.numpy())
    return np.unique(voxels)


class BiasFieldCorrectionN4(Transform):
    """N4 bias-field correction (Tustison et al. 2010, doi:10.1109/TMI.2010.2046908) by SimpleITK.

    The field is fitted on a shrunken volume inside its foreground, the nonzero voxels, and divided out at full
    resolution; zero voxels stay zero.

    Args:
        shrink_factor: fit on every so many voxels along each axis.
        iterations: at most this many at each resolution level, coarse to fine.
    """

    def __init__(self, shrink_factor: int = 4, iterations: tuple[int, ...] = (50, 50, 50, 50)) -> None:
        self.shrink_factor = shrink_factor
        self.iterations = iterations

    def __call__(self, data: Tensor) -> Tensor:
        """Correct ``[1, X, Y, Z]``.

        Raises:
            DataError: SimpleITK could not fit a field.
        """
        import SimpleITK as sitk  # noqa: N813

        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
        voxels = np.ascontiguousarray(np.asarray(data[0], dtype=np.float32))
        volume = sitk.GetImageFromArray(voxels)
        mask = sitk.GetImageFromArray(foreground(voxels).astype(np.uint8))
        shrink = [self.shrink_factor] * 3
        corrector = sitk.N4BiasFieldCorrectionImageFilter()
        corrector.SetMaximumNumberOfIterations(list(self.iterations))
        try:
            corrector.Execute(sitk.Shrink(volume, shrink), sitk.Shrink(mask, shrink))
            field = sitk.GetArrayFromImage(sitk.Exp(corrector.GetLogBiasFieldAsImage(volume)))
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise DataError(
                f"found a volume that N4 cannot correct ({reason}), expected one with a smooth field"
            ) from None
        corrected = data.clone()
        corrected[0] = corrected[0] / torch.from_numpy(np.where(field > 0, field, 1).astype(np.float32))
        return corrected
