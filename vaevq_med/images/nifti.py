"""Reading NIfTI by nibabel: what is wrong is said in one line, and what nibabel mends in a header is noted."""

from __future__ import annotations

import contextlib
import logging
import math
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence

import nibabel as nib
import numpy as np
from nibabel import imageglobals
from numpy.typing import NDArray

from vaevq_med.core.errors import DataError

MAX_VOXELS = 2**30
"""More than this in one file is taken for a broken header."""
HEADER_BYTES = 544
GZIP = b"\x1f\x8b"
"""What a gzip stream begins with."""
_NIFTI1, _NIFTI2 = 348, 540
_MAX_OFFSET = 2**26
_CODES = ("LR", "PA", "IS")


def read_nifti(
    name: str, content: bytes, *, orientation: str | None, note: Callable[[str], None]
) -> tuple[NDArray, NDArray[np.float64]]:
    """Read a NIfTI-1 or NIfTI-2 file, compressed by gzip or not.

    Args:
        name: for messages.
        content: of the file.
        orientation: of the voxels' axes where the header states none, e.g. ``RAS``; see :func:`assumed_affine`.
        note: called with what a user should know.

    Returns:
        As :func:`vaevq_med.images.volumes.read_volume`.

    Raises:
        DataError: the content is truncated, corrupt or no NIfTI, or states no orientation and none was named.
    """
    compressed = content[:2] == GZIP
    start = gunzip(name, content, HEADER_BYTES) if compressed else content[:HEADER_BYTES]
    if len(start) < _NIFTI1:
        raise DataError(f"{name}: found {len(start)} bytes, expected a NIfTI header of {_NIFTI1} or more")
    kind = _kind(start)
    if kind is None:
        raise DataError(f"{name}: found a file that is no NIfTI, expected one")
    with repairs(lambda repair: note(f"nibabel says of its header: {repair}")):
        header = kind.header_class(start[: kind.header_class.sizeof_hdr])
        check_size(name, header.get_data_shape())
        if header["vox_offset"] > _MAX_OFFSET:
            raise DataError(f"{name}: found voxels from byte {header['vox_offset']:g} on, expected a short header")
        end = int(header["vox_offset"]) + math.prod(header.get_data_shape()) * header.get_data_dtype().itemsize
        if compressed:
            content = gunzip(name, content, end)
        if len(content) < end:
            raise DataError(f"{name}: found {len(content)} bytes, expected {end} as the header says")
        image = kind.from_bytes(content)
        affine = _affine(name, image, orientation, note)
        return np.asanyarray(image.dataobj), affine


def is_nifti(start: bytes) -> bool:
    """Whether a file of which these are the first bytes, uncompressed, is a NIfTI in one file."""
    return len(start) >= _NIFTI1 and _kind(start) is not None


def _kind(start: bytes) -> type[nib.Nifti1Image] | None:
    sizes = {int.from_bytes(start[:4], order) for order in ("little", "big")}
    second = _NIFTI2 in sizes
    magic = start[4:8] if second else start[344:348]
    if sizes.isdisjoint({_NIFTI1, _NIFTI2}) or magic[:3] != b"n+" + (b"2" if second else b"1"):
        return None
    return nib.Nifti2Image if second else nib.Nifti1Image


def _affine(
    name: str, image: nib.Nifti1Image, orientation: str | None, note: Callable[[str], None]
) -> NDArray[np.float64]:
    """The affine that the header states, or one of the orientation that the user names; never nibabel's guess."""
    header = image.header
    if not (header["sform_code"] > 0 or header["qform_code"] > 0):
        spacing = [float(length) for length in header["pixdim"][1:4]]
        why = "sform_code and qform_code are 0"
        return assumed_affine(name, header.get_data_shape(), spacing, orientation, why, note)
    affine = np.asarray(image.affine, dtype=np.float64)
    if header["sform_code"] > 0 and header["qform_code"] > 0:
        with contextlib.suppress(Exception):  # a broken quaternion, which is not used
            first, second = ("".join(map(str, nib.aff2axcodes(a))) for a in (affine, header.get_qform()))
            if first != second:
                note(f"the header states two orientations, {first} (sform) and {second} (qform); the first was taken")
    return affine


def check_orientation(orientation: str) -> None:
    """Refuse what names no orientation.

    Args:
        orientation: where the voxels' first, second and third axis point to, e.g. ``RAS`` or ``LPS``.

    Raises:
        DataError: it is not one letter of each of L and R, P and A, I and S.
    """
    if len(orientation) != len(_CODES) or any(sum(orientation.count(c) for c in pair) != 1 for pair in _CODES):
        raise DataError(
            f"orientation is {orientation!r}; expected three letters, one of L and R, one of P and A, one of I and S, "
            "which say where the voxels' axes point to, e.g. RAS or LPS"
        )


def assumed_affine(
    name: str,
    size: Sequence[int],
    spacing: Sequence[float],
    orientation: str | None,
    why: str,
    note: Callable[[str], None],
) -> NDArray[np.float64]:
    """An affine of the orientation that the user names, for a header without one; the volume's middle is at 0.

    Args:
        name: for messages.
        size: voxels along each axis.
        spacing: mm from voxel to voxel along each axis.
        orientation: where the axes point to, or None where the user names none.
        why: what shows that the header states none.
        note: called with what a user should know.

    Raises:
        DataError: ``orientation`` is None.

    Examples:
        >>> assumed_affine("a.nii", (3, 3, 3), (1.0, 1.0, 2.0), "LPS", "", lambda text: None).diagonal().tolist()
        [-1.0, -1.0, 2.0, 1.0]
    """
    if orientation is None:
        raise DataError(
            f"{name}: found no orientation in the header ({why}), expected one; name that of the voxels with "
            "--assume-orientation, e.g. RAS or LPS"
        )
    note(f"the header states no orientation; {orientation} was assumed")
    affine = np.eye(4)
    affine[:3, :3] = 0
    for axis, (world, sign) in enumerate(nib.orientations.axcodes2ornt(tuple(orientation))):
        affine[int(world), axis] = sign * spacing[axis]
    affine[:3, 3] = -affine[:3, :3] @ ((np.asarray(size[:3]) - 1) / 2)
    return affine


@contextlib.contextmanager
def repairs(note: Callable[[str], None]) -> Iterator[None]:
    """Take in, each once, what nibabel mends in a header, which it says by its logger or as a warning.

    Args:
        note: called with each, once nothing more is mended.
    """
    logger = imageglobals.logger
    told: dict[str, None] = {}

    class Taking(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            told[record.getMessage()] = None

    before = logger.handlers, logger.level, logger.propagate, logger.disabled
    logger.handlers, logger.propagate, logger.disabled = [Taking()], False, False
    logger.setLevel(1)
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            yield
    finally:
        logger.handlers, _, logger.propagate, logger.disabled = before
        logger.setLevel(before[1])
    told |= {str(warning.message): None for warning in warned if issubclass(warning.category, UserWarning)}
    for text in told:
        note(text.strip().replace("\n", " "))


def gunzip(name: str, content: bytes, wanted: int) -> bytes:
    """Decompress the first bytes of a stream; where it ends there, or earlier, its checksum is compared.

    Args:
        name: for messages.
        content: one or several gzip members.
        wanted: how many bytes, at most.

    Raises:
        DataError: the stream is corrupt or truncated.
    """
    parts, size = [], 0
    while content and size < wanted:
        stream = zlib.decompressobj(wbits=31)
        try:
            part = stream.decompress(content, wanted - size)
            more = b"" if stream.eof else stream.decompress(stream.unconsumed_tail, 1)
        except zlib.error as error:
            raise DataError(f"{name}: found a corrupt gzip stream ({error}), expected a whole one") from None
        if not stream.eof and not more:
            raise DataError(f"{name}: found a truncated gzip stream, expected a whole one")
        size += len(part)
        parts.append(part)
        content = stream.unused_data.lstrip(b"\0")
    return b"".join(parts)


def check_size(name: str, size: Sequence[int]) -> None:
    """Refuse dimensions that only a broken header has.

    Raises:
        DataError: an axis without a voxel, or more than :data:`MAX_VOXELS` in all.
    """
    if any(count < 1 for count in size) or math.prod(size) > MAX_VOXELS:
        found = "x".join(map(str, size)) or "none"
        raise DataError(f"{name}: found dimensions {found} in the header, expected 1 to {MAX_VOXELS:,} voxels")
