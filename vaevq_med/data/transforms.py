"""MONAI transforms of whole volumes: what MONAI itself does not have."""

from __future__ import annotations

import numpy as np
import torch
from monai.transforms import Transform
from torch import Tensor

from vaevq_med.errors import DataError


def nonzero_percentiles(volume: Tensor, percentiles: tuple[float, float]) -> tuple[float, float]:
    """Percentiles of a volume's nonzero voxels, interpolated linearly.

    Args:
        volume: any shape.
        percentiles: two numbers in [0, 100].

    Raises:
        DataError: there is no nonzero voxel, or the window is empty.

    Examples:
        >>> nonzero_percentiles(torch.tensor([0.0, 0.0, 1.0, 2.0, 3.0]), (0, 100))
        (1.0, 3.0)
    """
    values = volume[volume != 0].numpy()
    if values.size == 0:
        raise DataError("found an all-zero volume, expected some nonzero voxels")
    low, high = (float(value) for value in np.percentile(values, percentiles, overwrite_input=True))
    if not high > low:
        raise DataError(
            f"found the same intensity {low:g} at percentiles {percentiles[0]:g} and {percentiles[1]:g}, "
            "expected a volume with contrast"
        )
    return low, high


class BiasFieldCorrectionN4(Transform):
    """N4 bias-field correction (Tustison et al. 2010, doi:10.1109/TMI.2010.2046908) by SimpleITK.

    The field is fitted on a shrunken volume inside its nonzero voxels and divided out at full resolution; zero voxels
    stay zero.

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
        volume = sitk.GetImageFromArray(np.ascontiguousarray(np.asarray(data[0], dtype=np.float32)))
        mask = volume != 0
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
