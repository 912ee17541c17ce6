"""Reading a folder of DICOM files as one volume, by SimpleITK's GDCM; what is no regular series is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vaevq_med.core.errors import DataError

_UNEVEN = 0.01
"""Share of the distance between two slices by which it may differ from the others'."""
_POSITION = "0020|0032"
_STUDY, _NUMBER, _DESCRIPTION, _PROTOCOL, _AGENT = "0020|000d", "0020|0011", "0008|103e", "0018|1030", "0018|0010"


@dataclass(frozen=True)
class Series:
    """A series as its first file describes it.

    Attributes:
        folder: of its files.
        uid: SeriesInstanceUID.
        study: StudyInstanceUID, or nothing.
        number: SeriesNumber, or nothing.
        description: SeriesDescription, or else ProtocolName, or else the folder's name.
        enhanced: whether a contrast agent is named.
        files: how many there are.
        is_image: whether the first of them is an image, and not a report, say.
    """

    folder: Path
    uid: str
    study: str
    number: str
    description: str
    enhanced: bool
    files: int
    is_image: bool


def find_series(folder: Path) -> list[Series]:
    """The series of the DICOM files of a folder, itself and not below, by their numbers.

    Args:
        folder: any folder.
    """
    found = [_described(folder, uid) for uid in _series(folder)]
    return sorted(found, key=lambda one: (int(one.number) if one.number.isdecimal() else 0, one.description, one.uid))


def _series(folder: Path) -> tuple[str, ...]:
    import SimpleITK as sitk  # noqa: N813

    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    return tuple(sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder)))


def _described(folder: Path, uid: str) -> Series:
    import SimpleITK as sitk  # noqa: N813

    names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), uid)
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(names[0])
    try:
        reader.ReadImageInformation()
    except RuntimeError:
        told = None
    else:
        told = {key: _tag(reader, key) for key in (_STUDY, _NUMBER, _DESCRIPTION, _PROTOCOL, _AGENT)}
    is_image, told = told is not None, told or {}
    description = told.get(_DESCRIPTION) or told.get(_PROTOCOL) or folder.name
    return Series(
        folder=folder,
        uid=uid,
        study=told.get(_STUDY, ""),
        number=told.get(_NUMBER, ""),
        description=description,
        enhanced=bool(told.get(_AGENT)),
        files=len(names),
        is_image=is_image,
    )


def _tag(reader: object, key: str) -> str:
    try:
        return str(reader.GetMetaData(key)).strip() if reader.HasMetaDataKey(key) else ""  # type: ignore[attr-defined]
    except UnicodeDecodeError:  # of another character set
        return ""


def read_series(folder: Path, uid: str | None = None) -> tuple[NDArray, NDArray[np.float64]]:
    """Read a series of a folder.

    Args:
        folder: of DICOM files.
        uid: SeriesInstanceUID; None takes the only one that there is.

    Returns:
        Voxels ``[X, Y, Z]``, with the files' rescaling applied, and the 4×4 affine from voxels to millimeters in RAS+
        coordinates.

    Raises:
        DataError: there is not one series, its slices are not evenly spaced, or it cannot be read.
    """
    import SimpleITK as sitk  # noqa: N813

    found = _series(folder)
    if uid is None and len(found) != 1:
        raise DataError(f"{folder.name}: found {len(found) or 'no'} DICOM series in the folder, expected one")
    if uid is not None and uid not in found:
        raise DataError(f"{folder.name}: found no DICOM series {uid}, expected it to stay there")
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder), uid or found[0]))
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
