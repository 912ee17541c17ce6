"""The file that a volume came from: what is kept of it, so that another volume can be written in its form."""

from __future__ import annotations

import gzip
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from vaevq_med.codec.itk_headers import TEXT_BYTES, changes, header_of, is_compressed, kept_fields, nrrd_header
from vaevq_med.core.errors import DataError
from vaevq_med.images.dicom import read_series
from vaevq_med.images.nifti import GZIP, HEADER_BYTES, gunzip, is_nifti, repairs
from vaevq_med.images.quiet import quiet_stderr

_GZIP_LEVEL = 3
_ITK = {"metaimage": "MetaImageIO", "nrrd": "NrrdImageIO"}
_ITK_NAME = {"metaimage": "MetaImage", "nrrd": "NRRD"}
_ITK_SUFFIX = {"metaimage": ".mha", "nrrd": ".nrrd"}
_NIFTI1, _NIFTI2 = 348, 540


@dataclass(frozen=True)
class Original:
    """A volume's file but for its voxels.

    Attributes:
        name: of the file; of a DICOM series that of its folder or contrast, as a NIfTI.
        kind: ``nifti``, ``metaimage`` or ``nrrd``.
        shape: of its voxels, as the file has it.
        dtype: of its voxels, with the order of bytes where there is one, e.g. ``>i2``.
        compressed: whether its voxels (of a NIfTI the whole file) are.
        header: the bytes of a NIfTI's header.
        slope: stored numbers times this plus ``intercept`` are the values; None where they are the values.
        intercept: see ``slope``.
        offset: where the voxels of a NIfTI begin.
        geometry: ``spacing``, ``origin`` and ``direction`` of the other kinds, as SimpleITK has them.
        fields: of an NRRD's header, which say the same and its size.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    compressed: bool
    header: bytes = b""
    slope: float | None = None
    intercept: float = 0.0
    offset: int = 0
    geometry: Mapping[str, list[float]] | None = None
    fields: tuple[str, ...] = ()

    @classmethod
    def read(
        cls,
        path: Path,
        note: Callable[[str], None] = lambda text: None,
        *,
        series: str | None = None,
        title: str | None = None,
    ) -> Original:
        """Read what is kept of a file that :func:`vaevq_med.images.volumes.read_volume` reads.

        Args:
            path: a volume, or a folder of a DICOM series.
            note: called with what will be otherwise in the file that is written.
            series: SeriesInstanceUID, where that folder holds several.
            title: name of the series' file, without its suffix; None takes the folder's.

        Raises:
            DataError: the file cannot be read, or its header cannot be written back.
        """
        try:
            return cls._read(path, note, series, title)
        except DataError:
            raise
        except Exception as error:  # whatever the readers raise on a header that is not what it says
            what = " ".join(str(error).split())[-160:] or type(error).__name__
            raise DataError(
                f"{path.name}: found an unreadable header ({what}), expected that of NIfTI, MetaImage or NRRD"
            ) from None

    @classmethod
    def _read(cls, path: Path, note: Callable[[str], None], series: str | None, title: str | None) -> Original:
        if path.is_dir():
            note("a DICOM series comes back as NIfTI")
            return _of_series(path, series, title or path.name)
        with path.open("rb") as file:
            start = file.read(HEADER_BYTES)
        compressed = start.startswith(GZIP)
        if compressed:
            start = gunzip(path.name, path.read_bytes(), HEADER_BYTES)
        if is_nifti(start):
            return _of_nifti(path.name, start, compressed, note)
        return _of_itk(path, "nrrd" if start.startswith(b"NRRD") else "metaimage", note)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, but for the header; what is usual is left out."""
        values = {key: value for key, value in asdict(self).items() if key != "header"}
        values["header"] = len(self.header)
        for key, usual in (
            ("slope", None),
            ("intercept", 0.0),
            ("offset", 0),
            ("geometry", None),
            ("header", 0),
            ("fields", ()),
        ):
            if values[key] == usual:
                del values[key]
        return {**values, "shape": list(self.shape)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], header: bytes) -> Original:
        """What :meth:`to_dict` gave, with the header."""
        tuples = {name: tuple(values.get(name, ())) for name in ("shape", "fields")}
        return cls(**{**values, **tuples, "header": header})

    @property
    def type(self) -> np.dtype[Any]:
        """Of the voxels."""
        return np.dtype(self.dtype)

    def stored(self, values: NDArray[np.float64]) -> NDArray:
        """The nearest numbers that the file can hold of values, of any shape.

        Args:
            values: in the file's own unit, scaling applied.
        """
        numbers = values if self.slope is None else (values - self.intercept) / self.slope
        if self.type.kind not in "iub":
            with np.errstate(over="ignore"):
                most = float(np.finfo(self.type).max)
            return np.clip(numbers, -most, most).astype(self.type)
        low, high = (0, 1) if self.type.kind == "b" else (np.iinfo(self.type).min, np.iinfo(self.type).max)
        # A 64-bit integer's largest is no double; the next one below is.
        top = float(high) if float(high) <= high else np.nextafter(float(high), 0.0)
        return np.clip(np.rint(numbers), float(low), top).astype(self.type)

    def values(self, stored: NDArray) -> NDArray[np.float64]:
        """The values of stored numbers, scaling applied."""
        numbers = stored.astype(np.float64)
        return numbers if self.slope is None else numbers * self.slope + self.intercept

    def stored_exactly(self, value: float) -> Any:
        """The number that stands for a value which the file holds, such as its background.

        Args:
            value: as it was read, scaling applied.
        """
        found = self.stored(np.array([value]))
        if self.slope is not None and self.type.kind == "f":  # the quotient may be a rounding beside it
            near = [
                found,
                np.nextafter(found, found.dtype.type(-np.inf)),
                np.nextafter(found, found.dtype.type(np.inf)),
            ]
            found = next((one for one in near if self.values(one)[0] == value), found)
        return found.astype(self.type)[0]

    def check_background(self, value: float) -> None:
        """Refuse a background that would not come back exactly, as several stored integers are read as that number.

        Args:
            value: as it was read, scaling applied.

        Raises:
            DataError: it is such a one.
        """
        if self.type.kind not in "iu":
            return
        number = int(self.stored_exactly(value))
        limits = np.iinfo(self.type)
        near = [one for one in range(number - 1, number + 2) if limits.min <= one <= limits.max]
        if len(np.unique(self.values(np.array(near, self.type)))) != len(near):
            raise DataError(
                f"{self.name}: found a background of {value!r}, as which several stored integers are read, expected "
                "one that can be told from its neighbors, as integers below 2^53 can"
            )

    def content(self, stored: NDArray) -> bytes:
        """The bytes of a file of this form.

        Args:
            stored: numbers of :attr:`type`, of :attr:`shape`.
        """
        if stored.shape != self.shape or stored.dtype != self.type:
            raise ValueError(f"voxels of {stored.shape} and {stored.dtype}, expected {self.shape} and {self.type}")
        if self.kind == "nrrd":
            voxels = stored.tobytes(order="F")
            head = nrrd_header(self.type, self.fields, compressed=self.compressed)
            return head + (gzip.compress(voxels, _GZIP_LEVEL, mtime=0) if self.compressed else voxels)
        if self.kind == "metaimage":
            return self._metaimage(stored)
        # No extension follows the header, whatever did in the original.
        start = self.header + bytes(max(self.offset, len(self.header) + 4) - len(self.header))
        content = start + stored.tobytes(order="F")
        return gzip.compress(content, _GZIP_LEVEL, mtime=0) if self.compressed else content

    def _metaimage(self, stored: NDArray) -> bytes:
        import SimpleITK as sitk  # noqa: N813

        assert self.geometry is not None
        image = sitk.GetImageFromArray(np.ascontiguousarray(stored.T), isVector=False)
        image.SetSpacing(self.geometry["spacing"])
        image.SetOrigin(self.geometry["origin"])
        image.SetDirection(self.geometry["direction"])
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "volume.mha"
            sitk.WriteImage(image, str(path), useCompression=self.compressed)
            return path.read_bytes()

    def check_header(self) -> None:
        """Refuse a MetaImage or NRRD whose header, once it is written back, SimpleITK would read otherwise.

        The header is read back without voxels: a MetaImage's, of which SimpleITK writes the size, with one alone.

        Raises:
            DataError: it is such a one.
        """
        assert self.geometry is not None
        if self.kind == "nrrd":
            form, head = self, nrrd_header(self.type, self.fields, compressed=self.compressed)
        else:
            form = replace(self, shape=(1,) * len(self.shape))
            head = form._metaimage(np.zeros(form.shape, form.type))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"volume{_ITK_SUFFIX[self.kind]}"
            path.write_bytes(head)
            try:
                size, geometry, dtype = _information(path, self.kind)
            except RuntimeError:
                size, geometry, dtype = (), {}, self.type
        near = [geometry and np.allclose(geometry[name], self.geometry[name], 1e-12, 1e-12) for name in self.geometry]
        if size != form.shape or dtype != self.type or not all(near):
            name = _ITK_NAME[self.kind]
            raise DataError(
                f"{self.name}: found an {name} header that cannot be written back as it is read, expected one of the "
                "usual fields; convert it to NIfTI"
            )


def _of_nifti(name: str, start: bytes, compressed: bool, note: Callable[[str], None]) -> Original:
    sizes = {int.from_bytes(start[:4], order) for order in ("little", "big")}
    size, kind = (_NIFTI2, nib.Nifti2Header) if _NIFTI2 in sizes else (_NIFTI1, nib.Nifti1Header)
    with repairs(lambda repair: None):  # the reader of the voxels notes them
        header = kind(start[:size])
    if len(start) >= size + 1 and start[size] != 0:
        note("the extensions of its header are left out, since they may hold a patient's name")
    slope, intercept = header.get_slope_inter()
    plain = slope is None or (slope == 1 and intercept == 0)
    return Original(
        name=name,
        kind="nifti",
        shape=tuple(int(length) for length in header.get_data_shape()),
        dtype=header.get_data_dtype().str,
        compressed=compressed,
        header=start[:size],
        slope=None if plain else float(slope),
        intercept=0.0 if plain else float(intercept),
        offset=int(header["vox_offset"]),
    )


def _information(path: Path, kind: str) -> tuple[tuple[int, ...], dict[str, list[float]], np.dtype[Any]]:
    """Size, geometry and type of the voxels of a MetaImage or NRRD; a RuntimeError where ITK cannot read the header."""
    import SimpleITK as sitk  # noqa: N813

    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    reader = sitk.ImageFileReader()
    reader.SetImageIO(_ITK[kind])
    reader.SetFileName(str(path))
    with quiet_stderr():
        reader.ReadImageInformation()
    size = reader.GetSize()
    geometry = {
        "spacing": list(reader.GetSpacing()),
        "origin": list(reader.GetOrigin()),
        "direction": list(reader.GetDirection()),
    }
    empty = sitk.Image([1] * len(size), reader.GetPixelID())
    return tuple(size), geometry, sitk.GetArrayViewFromImage(empty).dtype


def _of_itk(path: Path, kind: str, note: Callable[[str], None]) -> Original:
    try:
        size, geometry, dtype = _information(path, kind)
    except RuntimeError:
        raise DataError(f"{path.name}: found a file of no known format, expected MetaImage or NRRD") from None
    with path.open("rb") as file:
        header = header_of(kind, file.read(TEXT_BYTES))
    for change in changes(kind, header, dtype):
        note(change)
    found = Original(
        name=path.name,
        kind=kind,
        shape=size,
        dtype=dtype.str,
        compressed=is_compressed(kind, header),
        geometry=geometry,
        fields=kept_fields(header) if kind == "nrrd" else (),
    )
    found.check_header()
    return found


def _of_series(folder: Path, series: str | None, title: str) -> Original:
    voxels, affine = read_series(folder, series)
    image = nib.Nifti1Image(np.empty(voxels.shape, voxels.dtype), affine, dtype=voxels.dtype)
    header = image.header
    header.set_sform(affine, code=1)
    header.set_qform(affine, code=1)
    header.set_xyzt_units("mm")
    header["vox_offset"] = _NIFTI1 + 4
    header["scl_slope"], header["scl_inter"] = 1.0, 0.0
    return Original(
        name=f"{title}.nii.gz",
        kind="nifti",
        shape=voxels.shape,
        dtype=header.get_data_dtype().str,
        compressed=True,
        header=header.binaryblock,
        offset=_NIFTI1 + 4,
    )
