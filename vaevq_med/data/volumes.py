"""Reading volumes: NIfTI by nibabel, MetaImage and NRRD by SimpleITK; what is wrong is said in one line."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from vaevq_med.errors import DataError


def read_volume(path: Path) -> tuple[NDArray, NDArray[np.float64]]:
    """Read a volume whole.

    Args:
        path: ``.nii``, ``.nii.gz``, ``.mha`` or ``.nrrd``.

    Returns:
        Voxels ``[X, Y, Z]`` (or with a fourth axis) in the file's own type, and the 4×4 affine from voxels to
        millimeters in RAS+ coordinates.

    Raises:
        DataError: the file is truncated, corrupt, or of another kind.
    """
    name = path.name
    try:
        if name.lower().endswith((".nii", ".nii.gz")):
            voxels, affine = _read_nifti(path)
        else:
            voxels, affine = _read_itk(path)
    except DataError:
        raise
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{name}: found a corrupt gzip stream ({_line(error)}), expected a whole one") from None
    except EOFError:
        raise DataError(f"{name}: found a truncated gzip stream, expected a whole one") from None
    except nib.filebasedimages.ImageFileError:
        raise DataError(f"{name}: found a file that is no NIfTI, expected one") from None
    except (OSError, ValueError, RuntimeError, MemoryError, nib.spatialimages.HeaderDataError) as error:
        raise DataError(
            f"{name}: found an unreadable volume ({_line(error)}), expected NIfTI, MetaImage or NRRD"
        ) from None
    if voxels.dtype.kind not in "biuf":
        raise DataError(f"{name}: found voxels of type {voxels.dtype}, expected one number each")
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-12:
        raise DataError(f"{name}: found an affine that is not invertible, expected one from voxels to millimeters")
    return voxels, affine


def _read_nifti(path: Path) -> tuple[NDArray, NDArray[np.float64]]:
    if path.name.lower().endswith(".gz"):
        # Whole and in memory, so that the checksum at the end is compared.
        content = gzip.decompress(path.read_bytes())
    else:
        content = path.read_bytes()
    if len(content) < 348:
        raise DataError(f"{path.name}: found {len(content)} bytes, expected a NIfTI header of 348 or more")
    sizes = {int.from_bytes(content[:4], order) for order in ("little", "big")}
    kind = nib.Nifti2Image if 540 in sizes else nib.Nifti1Image
    magic = content[4:8] if kind is nib.Nifti2Image else content[344:348]
    if sizes.isdisjoint({348, 540}) or magic[:2] not in (b"n+", b"ni"):
        raise DataError(f"{path.name}: found a file that is no NIfTI, expected one")
    image = kind.from_bytes(content)
    return np.asanyarray(image.dataobj), np.asarray(image.affine, dtype=np.float64)


def _read_itk(path: Path) -> tuple[NDArray, NDArray[np.float64]]:
    import SimpleITK as sitk  # noqa: N813

    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    image = sitk.ReadImage(str(path))
    dimension = image.GetDimension()
    if image.GetNumberOfComponentsPerPixel() != 1 or dimension < 3:
        components = image.GetNumberOfComponentsPerPixel()
        raise DataError(f"{path.name}: found {dimension} axes and {components} components, expected a scalar volume")
    voxels = sitk.GetArrayFromImage(image).T
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
    if max_obliquity_degrees is not None:
        lean = float(np.degrees(nib.affines.obliquity(affine)).max())
        if lean > max_obliquity_degrees:
            raise DataError(
                f"{name}: found an oblique affine ({lean:.1f} degrees off the axes), expected at most "
                f"{max_obliquity_degrees:g}; a recipe with 'spacing' resamples such volumes"
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
