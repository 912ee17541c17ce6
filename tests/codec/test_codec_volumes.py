"""Volumes in, volumes out: the grid, the header and the units of files of every kind, against nibabel and SimpleITK."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import torch
from helpers.scans import SHAPE, body, write_dicom, write_itk, write_nifti
from helpers.stores import write_checkpoint

from vaevq_med.codec.case import CompressedCase
from vaevq_med.codec.model import Model
from vaevq_med.codec.options import CompressOptions, DecompressOptions
from vaevq_med.codec.originals import Original
from vaevq_med.codec.work import compress, decompress
from vaevq_med.core.errors import DataError, VaevqMedError

NIFTIS: dict[str, dict[str, Any]] = {
    "LPS": {},
    "RAS": {"codes": "RAS"},
    "flipped and permuted": {"codes": "SLA"},
    "big-endian": {"dtype": ">i2", "codes": "PIR"},
    "scaled": {"slope": 0.037, "inter": -12.5},
    "scaled float": {"slope": 0.037, "inter": 0.0, "dtype": "<f4"},
    "4D with one": {"axes": 4},
    "float32": {"dtype": "<f4"},
    "float64, big-endian": {"dtype": ">f8"},
    "uint8": {"dtype": "u1"},
    "int32, no qform": {"dtype": "<i4", "qform_code": 0},
}
ITKS: dict[str, tuple[str, Any, bool]] = {
    "MetaImage": ("a-t1c.mha", np.int16, True),
    "MetaImage, plain, float": ("a-t1c.mha", np.float32, False),
    "NRRD": ("a-t1c.nrrd", np.uint16, True),
    "NRRD, plain": ("a-t1c.nrrd", np.int16, False),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer whose image is larger than the slices."""
    return write_checkpoint(tmp_path_factory.mktemp("tokenizer") / "best.pt", image_size=48)


def through(source: Path, folder: Path, checkpoint: Path, name: str, **options: Any) -> Path:
    """What comes back of a file."""
    small = folder / "small.vvq"
    machine = {"workers": 1, "batch_size": 8}
    compress(source, small, CompressOptions(checkpoint=checkpoint, **machine, **options)).run()
    back = folder / "back" / name
    decompress(small, back, DecompressOptions(checkpoint=checkpoint, **machine)).run()
    return back


def assert_only_the_body_changed(before: np.ndarray, after: np.ndarray) -> None:
    assert after.shape == before.shape
    assert after.dtype == before.dtype
    assert np.array_equal(before == before.min(), after == before.min())  # the body has 100 and more
    inside = before != before.min()
    assert after[inside].min() >= before[inside].min() * (1 - 1e-5)
    assert after[inside].max() <= before[inside].max() * (1 + 1e-5)


@pytest.mark.parametrize("kind", NIFTIS)
def test_a_nifti_comes_back_on_its_grid_with_its_header(kind: str, checkpoint: Path, tmp_path: Path) -> None:
    name = "a-t1c.nii" if kind == "RAS" else "a-t1c.nii.gz"
    source = write_nifti(tmp_path / name, **NIFTIS[kind])
    back = through(source, tmp_path, checkpoint, name)
    first, second = nib.load(source), nib.load(back)
    assert second.header.binaryblock == first.header.binaryblock
    assert np.array_equal(second.affine, first.affine)
    assert second.header.get_xyzt_units() == ("mm", "sec")
    before, after = first.dataobj.get_unscaled(), second.dataobj.get_unscaled()
    assert_only_the_body_changed(np.asarray(first.dataobj), np.asarray(second.dataobj))
    outside = np.asarray(first.dataobj) == np.asarray(first.dataobj).min()
    assert np.array_equal(before[outside], after[outside])
    images = [sitk.ReadImage(str(path)) for path in (source, back)]
    for get in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection", "GetPixelID"):
        assert getattr(images[0], get)() == getattr(images[1], get)()


@pytest.mark.parametrize("kind", ITKS)
def test_metaimage_and_nrrd_come_back_as_the_same_kind(kind: str, checkpoint: Path, tmp_path: Path) -> None:
    name, pixel, compressed = ITKS[kind]
    source = write_itk(tmp_path / name, pixel=pixel, compressed=compressed)
    back = through(source, tmp_path, checkpoint, name)
    first, second = sitk.ReadImage(str(source)), sitk.ReadImage(str(back))
    for get in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection", "GetPixelID"):
        assert getattr(first, get)() == getattr(second, get)()
    assert_only_the_body_changed(sitk.GetArrayFromImage(first), sitk.GetArrayFromImage(second))
    start = 20 if name.endswith("nrrd") else 60
    assert source.read_bytes()[:start] == back.read_bytes()[:start]
    assert Original.read(back).compressed == compressed


def test_a_dicom_series_comes_back_as_nifti(checkpoint: Path, tmp_path: Path) -> None:
    source = write_dicom(tmp_path / "series")
    back = through(source, tmp_path, checkpoint, "series.nii.gz", modality=["t1c"])
    found = nib.load(back)
    assert np.array_equal(found.affine, [[-1, 0, 0, 10], [0, -1, 0, 20], [0, 0, 2, 5], [0, 0, 0, 1]])
    assert (found.header["sform_code"], found.header["qform_code"]) == (1, 1)
    assert_only_the_body_changed(body().astype(found.get_data_dtype()), np.asarray(found.dataobj))
    reference = sitk.ReadImage(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(source)))
    image = sitk.ReadImage(str(back))
    assert image.GetSize() == reference.GetSize()
    np.testing.assert_allclose(image.GetOrigin(), reference.GetOrigin())
    np.testing.assert_allclose(image.GetSpacing(), reference.GetSpacing())


def test_a_dicom_series_that_lacks_a_slice_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    source = write_dicom(tmp_path / "series", skip=5)
    with pytest.raises(DataError, match="not evenly spaced"):
        through(source, tmp_path, checkpoint, "series.nii.gz", modality=["t1c"])


def test_extensions_are_left_out_and_noted(checkpoint: Path, tmp_path: Path) -> None:
    source = write_nifti(tmp_path / "a-t1c.nii", extension=True)
    options = CompressOptions(checkpoint=checkpoint, workers=1)
    report = compress(source, tmp_path / "a.vvq", options).run()
    assert any("may hold a patient's name" in note for note in report.notes)
    decompress(tmp_path / "a.vvq", tmp_path / "b.nii", DecompressOptions(checkpoint=checkpoint)).run()
    content = (tmp_path / "b.nii").read_bytes()
    assert b"Jane Doe" in source.read_bytes()
    assert b"Jane Doe" not in content + (tmp_path / "a.vvq").read_bytes()
    assert nib.load(tmp_path / "b.nii").header.binaryblock == nib.load(source).header.binaryblock
    assert len(content) == len(source.read_bytes())


@pytest.mark.parametrize(("kind", "unit"), [("LPS", 1.0), ("scaled", 0.037), ("float32", 0.01), ("uint8", 1.0)])
def test_a_perfect_tokenizer_gives_the_values_back(
    kind: str, unit: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that is lost without it is what lies outside of the window, and half a unit of the stored numbers."""
    checkpoint = write_checkpoint(tmp_path / "best.pt", image_size=max(SHAPE))
    kept: list[torch.Tensor] = []

    def encode(self: Model, squares: torch.Tensor) -> np.ndarray:
        kept.append(squares)
        grid = self.image_size // self.patch
        return np.zeros((len(squares), grid, grid, 1), np.int64)

    monkeypatch.setattr(Model, "encode", encode)
    monkeypatch.setattr(Model, "decode", lambda self, indices, contrasts: kept[0])
    source = write_nifti(tmp_path / "a-t1c.nii", **NIFTIS[kind])
    back = through(source, tmp_path, checkpoint, "a-t1c.nii")
    before, after = np.asarray(nib.load(source).dataobj), np.asarray(nib.load(back).dataobj)
    low, high = CompressedCase.from_bytes("", (tmp_path / "small.vvq").read_bytes()).contrasts[0].window
    expected = np.where(before == before.min(), before, np.clip(before, low, high))
    assert np.abs(after.astype(float) - expected).max() <= 0.51 * unit + 1e-4
    assert (before[before != before.min()] <= high).mean() > 0.99


def test_numbers_outside_of_a_type_are_clipped() -> None:
    for dtype in ("u1", "<i2", ">i4", "<i8", "<u8"):
        form = Original("a.nii", "nifti", (1,), dtype, False)
        found = form.stored(np.array([-1e30, 1e30]))
        assert found[0] == np.iinfo(found.dtype).min
        assert float(found[1]) == float(np.iinfo(found.dtype).max) or found[1] > 0.999 * np.iinfo(found.dtype).max
    assert np.isfinite(Original("a.nii", "nifti", (1,), "<f4", False).stored(np.array([1e300]))).all()


def test_a_file_whose_name_says_no_contrast_or_a_segmentation_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    options = CompressOptions(checkpoint=checkpoint)
    for name, words in (("scan.nii", "--modality"), ("a-seg.nii", "labels are not compressed")):
        write_nifti(tmp_path / name)
        with pytest.raises(VaevqMedError, match=words):
            compress(tmp_path / name, tmp_path / "a.vvq", options)
    assert not (tmp_path / "a.vvq").exists()
