"""Reading volumes: NIfTI by nibabel, MetaImage and NRRD by SimpleITK; what is wrong is said in one line."""

from __future__ import annotations

import contextlib
import math
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from vaevq_med.core.errors import DataError

MAX_VOXELS = 2**30
"""More than this in one file is taken for a broken header."""
_NIFTI1, _NIFTI2 = 348, 540
_HEADER_BYTES = 544
_MAX_OFFSET = 2**26


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
    except Exception as error:  # whatever the readers raise on a file that is not what it says
        raise DataError(
            f"{name}: found an unreadable volume ({_line(error)}), expected NIfTI, MetaImage or NRRD"
        ) from None
    if voxels.dtype.kind not in "biuf":
        raise DataError(f"{name}: found voxels of type {voxels.dtype}, expected one number each")
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-12:
        raise DataError(f"{name}: found an affine that is not invertible, expected one from voxels to millimeters")
    return voxels, affine


def _read_nifti(path: Path) -> tuple[NDArray, NDArray[np.float64]]:
    name = path.name
    content = path.read_bytes()
    compressed = name.lower().endswith(".gz")
    start = _gunzip(name, content, _HEADER_BYTES) if compressed else content[:_HEADER_BYTES]
    if len(start) < _NIFTI1:
        raise DataError(f"{name}: found {len(start)} bytes, expected a NIfTI header of {_NIFTI1} or more")
    sizes = {int.from_bytes(start[:4], order) for order in ("little", "big")}
    kind = nib.Nifti2Image if _NIFTI2 in sizes else nib.Nifti1Image
    magic = start[4:8] if kind is nib.Nifti2Image else start[344:348]
    if sizes.isdisjoint({_NIFTI1, _NIFTI2}) or magic[:3] != b"n+" + (b"2" if kind is nib.Nifti2Image else b"1"):
        raise DataError(f"{name}: found a file that is no NIfTI, expected one")
    with _quiet_nibabel():
        header = kind.header_class(start[: kind.header_class.sizeof_hdr])
        _check_size(name, header.get_data_shape())
        if header["vox_offset"] > _MAX_OFFSET:
            raise DataError(f"{name}: found voxels from byte {header['vox_offset']:g} on, expected a short header")
        end = int(header["vox_offset"]) + math.prod(header.get_data_shape()) * header.get_data_dtype().itemsize
        if compressed:
            content = _gunzip(name, content, end)
        if len(content) < end:
            raise DataError(f"{name}: found {len(content)} bytes, expected {end} as the header says")
        image = kind.from_bytes(content)
        return np.asanyarray(image.dataobj), np.asarray(image.affine, dtype=np.float64)


@contextlib.contextmanager
def _quiet_nibabel() -> Iterator[None]:
    """Keep nibabel from logging what it mends in a header."""
    logger = nib.imageglobals.logger
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _gunzip(name: str, content: bytes, wanted: int) -> bytes:
    """Decompress the first bytes of a stream; where it ends there, or earlier, its checksum is compared."""
    parts, size = [], 0
    while content and size < wanted:
        stream = zlib.decompressobj(wbits=31)
        try:
            part = stream.decompress(content, wanted - size)
            more = b"" if stream.eof else stream.decompress(stream.unconsumed_tail, 1)
        except zlib.error as error:
            raise DataError(f"{name}: found a corrupt gzip stream ({_line(error)}), expected a whole one") from None
        if not stream.eof and not more:
            raise DataError(f"{name}: found a truncated gzip stream, expected a whole one")
        size += len(part)
        parts.append(part)
        content = stream.unused_data.lstrip(b"\0")
    return b"".join(parts)


def _check_size(name: str, size: Sequence[int]) -> None:
    if any(count < 1 for count in size) or math.prod(size) > MAX_VOXELS:
        found = "x".join(map(str, size)) or "none"
        raise DataError(f"{name}: found dimensions {found} in the header, expected 1 to {MAX_VOXELS:,} voxels")


def _read_itk(path: Path) -> tuple[NDArray, NDArray[np.float64]]:
    import SimpleITK as sitk  # noqa: N813

    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        reader = sitk.ImageFileReader()
        reader.SetFileName(str(path))
        reader.ReadImageInformation()
        _check_size(path.name, reader.GetSize())
        image = reader.Execute()
    except RuntimeError as error:
        reason = _line(error)
        if "Unable to determine ImageIO" in reason:
            raise DataError(f"{path.name}: found a file of no known format, expected MetaImage or NRRD") from None
        if "No such file" in reason and path.is_file():  # what MetaIO says of a stream that ends early
            raise DataError(f"{path.name}: found a truncated or corrupt volume, expected a whole one") from None
        raise
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
        largest = float(np.abs(voxels).max())
        if largest > float(np.finfo(np.float32).max):
            raise DataError(f"{name}: found an intensity of {largest:g}, expected at most that of a 32-bit float")
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
