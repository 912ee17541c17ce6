"""Small scans in many forms: files of every kind that is read, with a body whose mask has no symmetry."""

from __future__ import annotations

import locale
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import SimpleITK as sitk  # noqa: N813
from numpy.typing import NDArray

SHAPE = (28, 36, 12)
CONTRASTS = ("t1n", "t1c", "t2w", "t2f")


def body(shape: tuple[int, int, int] = SHAPE, seed: int = 0) -> NDArray[np.float64]:
    """Intensities from 100 to 1000 inside of a body, 0 around it; the first and last slices along z are empty."""
    rng = np.random.default_rng(seed)
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    inside = (x - 0.1) ** 2 + (y + 0.15) ** 2 + z**2 < 0.6
    inside &= ~((x > 0.3) & (y > 0.2))  # a corner is missing
    values = 500 + 300 * np.sin(3 * x) * np.cos(2 * y + z) + 80 * rng.standard_normal(shape)
    return np.where(inside, np.clip(values, 100, 1000), 0)


def affine_of(codes: str, spacing: float = 1.0) -> NDArray[np.float64]:
    """An affine whose axes point there, with an origin of no round numbers."""
    affine = np.eye(4)
    affine[:3, :3] = 0
    for axis, (world, sign) in enumerate(nib.orientations.axcodes2ornt(tuple(codes))):
        affine[int(world), axis] = sign * spacing
    affine[:3, 3] = (-12.3456789, 7.1, 33.000001)
    return affine


def turned(codes: str, shape: tuple[int, int, int] = SHAPE) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The body of RAS axes with its axes in another order and direction, and the affine of that."""
    ornt = nib.orientations.axcodes2ornt(tuple(codes))
    start = nib.orientations.axcodes2ornt(("R", "A", "S"))
    return nib.orientations.apply_orientation(body(shape), nib.orientations.ornt_transform(start, ornt)), affine_of(
        codes
    )


def write_nifti(path: Path, *, codes: str = "LPS", dtype: str = "<i2", extension: bool = False, **fields: Any) -> Path:
    """A NIfTI file of the body.

    Args:
        path: its name says whether it is compressed.
        codes: where the axes point to.
        dtype: of the stored numbers, with the order of bytes.
        extension: add one, with a name in it.
        **fields: of the header; ``slope`` and ``inter`` scale, ``axes=4`` adds one of length 1.
    """
    values, affine = turned(codes)
    slope, inter = fields.pop("slope", None), fields.pop("inter", 0.0)
    kind = np.dtype(dtype)
    stored = values if slope is None else (values - inter) / slope
    stored = np.rint(stored) if kind.kind in "iu" else stored
    if kind == np.uint8:
        stored = np.rint(stored / 4)
    if fields.pop("axes", 3) == 4:
        stored = stored[..., None]
    header = nib.Nifti1Header(endianness="<" if kind.str[0] in "<|" else ">")
    header.set_data_dtype(kind)
    header.set_data_shape(stored.shape)
    header.set_sform(affine, code=fields.pop("sform_code", 1))
    header.set_qform(affine, code=fields.pop("qform_code", 2))
    header.set_xyzt_units("mm", "sec")
    for name, value in {"descrip": b"a note", "cal_max": 123.5, "toffset": 0.25, **fields}.items():
        header[name] = value
    header["vox_offset"] = 352
    header["scl_slope"], header["scl_inter"] = (np.nan, np.nan) if slope is None else (slope, inter)
    start = bytes(4)
    if extension:
        note = b"Jane Doe".ljust(24, b"\0")
        start = b"\1\0\0\0" + (len(note) + 8).to_bytes(4, "little") + (6).to_bytes(4, "little") + note
        header["vox_offset"] = 348 + len(start)
    content = header.binaryblock + start + stored.astype(kind).tobytes(order="F")
    if path.name.endswith(".gz"):
        import gzip

        content = gzip.compress(content)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def write_itk(path: Path, *, pixel: Any = np.int16, compressed: bool = True) -> Path:
    """A MetaImage or NRRD file of the body, a little oblique."""
    image = sitk.GetImageFromArray(body().astype(pixel).T)
    lean = np.radians(0.4)
    turn = np.array([[np.cos(lean), -np.sin(lean), 0], [np.sin(lean), np.cos(lean), 0], [0, 0, 1]])
    image.SetDirection(turn.ravel().tolist())
    image.SetSpacing([0.9375, 0.9375, 2.1])
    image.SetOrigin([-101.123456789, 1 / 3, 55.5])
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path), useCompression=compressed)
    return path


def write_dicom(
    folder: Path,
    *,
    skip: int | None = None,
    study: int = 2,
    series: int = 1,
    description: str = "",
    agent: str = "",
) -> Path:
    """A DICOM series of the body, a file a slice; several may lie in one folder.

    Args:
        folder: that is made.
        skip: number of a slice that is left out.
        study: which examination.
        series: its number in the study, by which its intensities grow.
        description: of the series.
        agent: for contrast.
    """
    folder.mkdir(parents=True, exist_ok=True)
    root = "1.2.826.0.1.3680043.2.1125"
    image = sitk.GetImageFromArray((body() * (1 + 0.1 * (series - 1))).astype(np.int16).T)
    image.SetSpacing([1.0, 1.0, 2.0])
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    before = locale.setlocale(locale.LC_ALL)
    for z in range(SHAPE[2]):
        if z == skip:
            continue
        piece = image[:, :, z]
        tags = {
            "0008|0060": "MR",
            "0020|000e": f"{root}.1.{study}.{series}",
            "0020|000d": f"{root}.{study}",
            "0008|0018": f"{root}.3.{study}.{series}.{z + 1}",
            "0020|0011": str(series),
            "0008|103e": description,
            "0018|0010": agent,
            "0020|0032": f"-10\\-20\\{5 + 2 * z}",
            "0020|0037": "1\\0\\0\\0\\1\\0",
            "0020|0013": str(z),
            "0018|0050": "2",
            "0010|0010": "Doe^Jane",
        }
        for tag, value in ((tag, value) for tag, value in tags.items() if value):
            piece.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"{series}-{z:03d}.dcm"))
        writer.Execute(piece)
    locale.setlocale(locale.LC_ALL, before)  # GDCM's writer leaves the process in the locale C
    return folder


def write_case(folder: Path, name: str, contrasts: tuple[str, ...] = CONTRASTS) -> Path:
    """A case in BraTS naming; its contrasts share their mask."""
    for number, contrast in enumerate(contrasts):
        values = body()
        image = nib.Nifti1Image((values * (1 + 0.1 * number)).astype(np.int16), affine_of("LPS"))
        (folder / name).mkdir(parents=True, exist_ok=True)
        nib.save(image, folder / name / f"{name}-{contrast}.nii.gz")
    return folder / name
