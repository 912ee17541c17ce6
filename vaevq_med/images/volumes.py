"""Reading volumes: NIfTI by nibabel, MetaImage and NRRD by SimpleITK; what is wrong is said in one line."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from vaevq_med.core.errors import DataError
from vaevq_med.core.numbers import told_apart
from vaevq_med.images.dicom import read_series
from vaevq_med.images.nifti import GZIP, HEADER_BYTES, assumed_affine, check_size, is_nifti, read_nifti
from vaevq_med.images.quiet import quiet_stderr

_SUFFIXES = {"NIfTI": ".nii", "NIfTI in gzip": ".nii.gz", "NRRD": ".nrrd", "MetaImage": ".mha"}

_TEXT_BYTES = 2**16
VIEWS = {
    "axial": ("LPS", (2, 1, 0), "z"),
    "coronal": ("LAI", (1, 2, 0), "y"),
    "sagittal": ("RPI", (0, 2, 1), "x"),
}
"""How slices are cut: where the axes point, then their order as slice, row, column, then the letter of the slice axis.

The letter's axis points as in RAS+. Anterior (or superior) is up; left and right are as radiologists view them, the
patient's right on the left; a sagittal slice has anterior on the left.
"""


def _nothing(text: str) -> None:
    """Of a reader whose user wants no notes."""


def read_volume(
    path: Path,
    *,
    series: str | None = None,
    orientation: str | None = None,
    note: Callable[[str], None] = _nothing,
) -> tuple[NDArray, NDArray[np.float64]]:
    """Read a volume whole. Its first bytes say what it is; where its name says something else, that is noted.

    Args:
        path: NIfTI (``.nii``, ``.nii.gz``), MetaImage (``.mha``) or NRRD (``.nrrd``), or a folder of DICOM files.
        series: SeriesInstanceUID, where that folder holds several.
        orientation: where the voxels' axes point to if the header does not say it, e.g. ``RAS`` for right, anterior,
            superior.
        note: called with what a user should know: a wrong suffix, a repair to the header, an assumed orientation.

    Returns:
        Voxels ``[X, Y, Z]`` (or with a fourth axis) in the file's own type, and the 4×4 affine from voxels to
        millimeters in RAS+ coordinates.

    Raises:
        DataError: the file is truncated, corrupt, or of another kind, or nothing says its orientation.
    """
    name = path.name
    if path.is_dir():
        return read_series(path, series)
    try:
        with path.open("rb") as file:
            start = file.read(HEADER_BYTES)
        kind = _kind(start)
        if kind is not None and not name.lower().endswith(_SUFFIXES[kind]):
            note(f"the file is {kind}, whatever its name says, and was read as that")
        if kind is None and name.lower().endswith((".nii", ".nii.gz")):
            kind = "NIfTI"  # a broken one, of which the reader says what is wrong
        if kind is not None and kind.startswith("NIfTI"):
            voxels, affine = read_nifti(name, path.read_bytes(), orientation=orientation, note=note)
        else:
            with quiet_stderr():
                voxels, affine = _read_itk(path, kind, orientation, note)
    except DataError:
        raise
    except Exception as error:  # whatever the readers raise on a file that is not what it says
        raise DataError(
            f"{name}: found an unreadable volume ({_line(error)}), expected NIfTI, MetaImage or NRRD"
        ) from None
    if voxels.dtype.kind not in "biuf":
        raise DataError(f"{name}: found voxels of type {voxels.dtype}, expected one number each")
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-12:
        raise DataError(f"{name}: found an affine that is not invertible, expected one from voxels to millimeters")
    return voxels, affine


def _kind(start: bytes) -> str | None:
    """What a file is, one of :data:`_SUFFIXES`, by its first bytes; None where they tell nothing."""
    if start.startswith(GZIP):
        return "NIfTI in gzip"
    if is_nifti(start):
        return "NIfTI"
    if start.startswith(b"NRRD"):
        return "NRRD"
    return "MetaImage" if re.search(rb"^NDims\s*=", start, re.MULTILINE) else None


def _missing_orientation(path: Path, kind: str | None) -> str | None:
    """What an NRRD or MetaImage header lacks to state an orientation, which ITK would take to be LPS; or None."""
    with path.open("rb") as file:
        start = file.read(_TEXT_BYTES)
    if kind == "NRRD":
        start = re.split(rb"\r?\n\r?\n", start, maxsplit=1)[0]
        fields = {"space": rb"^space:\s*[lr]", "space directions": rb"^space directions:"}
    else:
        start = re.split(rb"^ElementDataFile", start, maxsplit=1, flags=re.MULTILINE)[0]
        fields = {"TransformMatrix": rb"^(TransformMatrix|Rotation|Orientation)\s*="}
    missing = [name for name, line in fields.items() if not re.search(line, start, re.MULTILINE | re.IGNORECASE)]
    return f"no {missing[0]}" if missing else None


def _read_itk(
    path: Path, kind: str | None, orientation: str | None, note: Callable[[str], None]
) -> tuple[NDArray, NDArray[np.float64]]:
    import SimpleITK as sitk  # noqa: N813

    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        reader = sitk.ImageFileReader()
        if kind is not None:
            reader.SetImageIO({"NRRD": "NrrdImageIO", "MetaImage": "MetaImageIO"}[kind])
        reader.SetFileName(str(path))
        reader.ReadImageInformation()
        check_size(path.name, reader.GetSize())
    except RuntimeError as error:
        if "Unable to determine ImageIO" in str(error):
            raise DataError(f"{path.name}: found a file of no known format, expected MetaImage or NRRD") from None
        raise
    try:
        image = reader.Execute()
    except RuntimeError as error:
        if "memory" in str(error):
            raise
        raise DataError(f"{path.name}: found a truncated or corrupt volume, expected a whole one") from None
    dimension = image.GetDimension()
    if image.GetNumberOfComponentsPerPixel() != 1 or dimension < 3:
        components = image.GetNumberOfComponentsPerPixel()
        raise DataError(f"{path.name}: found {dimension} axes and {components} components, expected a scalar volume")
    voxels = sitk.GetArrayFromImage(image).T
    missing = _missing_orientation(path, kind)
    if missing is not None:
        return voxels, assumed_affine(path.name, image.GetSize(), image.GetSpacing(), orientation, missing, note)
    direction = np.asarray(image.GetDirection()).reshape(dimension, dimension)[:3, :3]
    affine = np.eye(4)
    affine[:3, :3] = direction * np.asarray(image.GetSpacing()[:3])
    affine[:3, 3] = image.GetOrigin()[:3]
    return voxels, np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def check_volume(
    name: str, voxels: NDArray, affine: NDArray[np.float64], *, max_obliquity_degrees: float | None
) -> NDArray:
    """Refuse what cannot be sliced.

    Args:
        name: for the message.
        voxels: as :func:`read_volume` gives them.
        affine: likewise.
        max_obliquity_degrees: largest lean of an axis, or None for any.

    Returns:
        The voxels ``[X, Y, Z]``; a fourth axis of length 1 is dropped.

    Raises:
        DataError: a fourth axis, a NaN or infinite voxel, or an oblique affine.
    """
    if voxels.ndim == 4 and voxels.shape[3] == 1:
        voxels = voxels[..., 0]
    if voxels.ndim != 3 or 0 in voxels.shape:
        raise DataError(f"{name}: found a {voxels.ndim}D volume of shape {shape(voxels)}, expected a 3D one")
    if voxels.dtype.kind == "f":
        bad = voxels.size - int(np.isfinite(voxels).sum())
        if bad:
            raise DataError(f"{name}: found {bad} NaN or infinite voxels, expected finite ones")
        largest = float(np.abs(voxels).max())
        most = float(np.finfo(np.float32).max)
        if largest > most:
            raise DataError(f"{name}: found an intensity of {largest!r}, expected at most {most!r}, a 32-bit float's")
    if max_obliquity_degrees is not None:
        lean = float(np.degrees(nib.affines.obliquity(affine)).max())
        if lean > max_obliquity_degrees:
            raise DataError(
                f"{name}: found an oblique affine ({told_apart(lean, max_obliquity_degrees)} degrees off the axes), "
                f"expected at most {max_obliquity_degrees:.9g}; a recipe with 'spacing' resamples such volumes"
            )
    return voxels


def shape(voxels: NDArray) -> str:
    """``240x240x155``."""
    return "x".join(map(str, voxels.shape))


def displacement(first: NDArray[np.float64], second: NDArray[np.float64], size: tuple[int, ...]) -> float:
    """How far apart two affines put the corner that they disagree about most, in mm."""
    corners = np.array([[i, j, k, 1] for i in (0, size[0]) for j in (0, size[1]) for k in (0, size[2])], dtype=float)
    return float(np.linalg.norm(corners @ (first - second).T, axis=1).max())


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1].strip()[:160] if lines else type(error).__name__
