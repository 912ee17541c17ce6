"""Reading a folder of DICOM files as one volume, by SimpleITK's GDCM; what is no regular series is refused."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vaevq_med.core.errors import DataError

_UNEVEN = 0.01
"""Share of the distance between two slices by which it may differ from the others'."""
_POSITION = "0020|0032"
_STUDY, _NUMBER, _DESCRIPTION, _PROTOCOL, _AGENT = "0020|000d", "0020|0011", "0008|103e", "0018|1030", "0018|0010"
_NO_AGENT = re.compile(r"0*|no(?:ne|contrast)?|na|nil|without(?:contrast)?")
"""What is entered for a contrast agent where none was given, as letters and digits."""


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
    found = [_described(folder, uid, names) for uid, names in _series(folder).items()]
    return sorted(found, key=lambda one: (int(one.number) if one.number.isdecimal() else 0, one.description, one.uid))


def _series(folder: Path) -> Mapping[str, Sequence[str]]:
    """Files of each series of a folder, in the order of the slices."""
    status = [(path.name, path.stat()) for path in _files(folder)]
    return _grouped(folder, tuple((name, one.st_size, one.st_mtime_ns) for name, one in status))


def _files(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_file())
    except OSError:  # where GDCM finds no series either
        return []


@functools.lru_cache(maxsize=4)
def _grouped(folder: Path, state: tuple[tuple[str, int, int], ...]) -> Mapping[str, Sequence[str]]:
    """Grouped by GDCM, which reads all files of the folder for each series, and so once while they stay as they are."""
    import SimpleITK as sitk  # noqa: N813

    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    reader = sitk.ImageSeriesReader
    return {uid: reader.GetGDCMSeriesFileNames(str(folder), uid) for uid in reader.GetGDCMSeriesIDs(str(folder))}


def _check_whole(folder: Path, series: Mapping[str, Sequence[str]]) -> None:
    """Refuse a folder with a DICOM file in none of its series: GDCM leaves one that is cut short out in silence."""
    grouped = {Path(name).name for names in series.values() for name in names}
    left = next((path for path in _files(folder) if path.name not in grouped and _looks_like_dicom(path)), None)
    if left is not None:
        raise DataError(
            f"{folder.name}: found the DICOM file {left.name}, which cannot be read or belongs to no series, expected "
            "whole files of series alone"
        )


def _looks_like_dicom(path: Path) -> bool:
    if path.name.startswith(".") or path.name.upper() == "DICOMDIR":  # a medium's table of contents
        return False
    if path.suffix.lower() == ".dcm":
        return True
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:  # it may be a slice
        return True


def _described(folder: Path, uid: str, names: Sequence[str]) -> Series:
    import SimpleITK as sitk  # noqa: N813

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
        enhanced=_NO_AGENT.fullmatch(re.sub(r"[\W_]", "", told.get(_AGENT, "").lower())) is None,
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
        DataError: there is not one series, a DICOM file of the folder is in none, the slices are not evenly spaced, or
            the series cannot be read.
    """
    import SimpleITK as sitk  # noqa: N813

    found = _series(folder)
    if uid is None and len(found) != 1:
        raise DataError(f"{folder.name}: found {len(found) or 'no'} DICOM series in the folder, expected one")
    if uid is not None and uid not in found:
        raise DataError(f"{folder.name}: found no DICOM series {uid}, expected it to stay there")
    _check_whole(folder, found)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(found[uid or next(iter(found))])
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
