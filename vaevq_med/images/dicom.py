"""Reading a folder of DICOM files as one volume, by SimpleITK's GDCM; what is no regular series is refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vaevq_med.core.errors import DataError

_UNEVEN = 0.01
"""Share of the distance between two slices by which it may differ from the others'."""
_POSITION = "0020|0032"


def is_series(folder: Path) -> bool:
    """Whether a folder holds DICOM files of a series, itself and not below.

    Args:
        folder: any folder.
    """
    return bool(_series(folder))


def _series(folder: Path) -> tuple[str, ...]:
    import SimpleITK as sitk  # noqa: N813

    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    return tuple(sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder)))


def read_series(folder: Path) -> tuple[NDArray, NDArray[np.float64]]:
    """Read the only series of a folder.

    Args:
        folder: of DICOM files.

    Returns:
        Voxels ``[X, Y, Z]``, with the files' rescaling applied, and the 4×4 affine from voxels to millimeters in RAS+
        coordinates.

    Raises:
        DataError: there is not one series, its slices are not evenly spaced, or it cannot be read.
    """
    import SimpleITK as sitk  # noqa: N813

    found = _series(folder)
    if len(found) != 1:
        raise DataError(f"{folder.name}: found {len(found) or 'no'} DICOM series in the folder, expected one")
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder), found[0]))
    reader.MetaDataDictionaryArrayUpdateOn()
    try:
        image = reader.Execute()
    except RuntimeError as error:
        if "memory" in str(error):
            raise
        raise DataError(f"{folder.name}: found a DICOM series that cannot be read, expected a whole one") from None
    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
        raise DataError(
            f"{folder.name}: found a DICOM series of {image.GetDimension()} axes and "
            f"{image.GetNumberOfComponentsPerPixel()} components, expected a scalar volume"
        )
    slices = image.GetSize()[2]
    if slices > 1:
        positions = [reader.GetMetaData(number, _POSITION) for number in range(slices)]
        _check_even(folder.name, positions)
    affine = np.eye(4)
    affine[:3, :3] = np.asarray(image.GetDirection()).reshape(3, 3) * np.asarray(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    return sitk.GetArrayFromImage(image).T, np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def _check_even(name: str, positions: Sequence[str]) -> None:
    """Refuse a series that lacks slices or is tilted, for which ITK takes one distance everywhere all the same."""
    places = np.array([[float(part) for part in text.split("\\")] for text in positions])
    steps = np.diff(places, axis=0)
    usual = np.median(steps, axis=0)
    apart = float(np.abs(steps - usual).max())
    most = _UNEVEN * float(np.linalg.norm(usual))
    if not apart <= most:
        raise DataError(
            f"{name}: found slices that are not evenly spaced (by {apart:.3g} mm), expected all of a series, at equal "
            f"distances to within {most:.3g} mm"
        )
