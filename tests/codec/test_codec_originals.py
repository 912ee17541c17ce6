"""What is kept of a volume's file: headers that come back, or are refused in one line, and what is noted of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import torch
from helpers.scans import body, write_itk, write_nifti
from helpers.stores import write_checkpoint

from vaevq_med.codec import decompress
from vaevq_med.codec.case import Contrast
from vaevq_med.codec.compress import compress_case
from vaevq_med.codec.options import CompressOptions, DecompressOptions
from vaevq_med.codec.originals import Original
from vaevq_med.codec.work import compress
from vaevq_med.codec.work import decompress as decompressing
from vaevq_med.core.errors import DataError
from vaevq_med.images.volumes import read_volume
from vaevq_med.prepare.recipes import Recipe
from vaevq_med.prepare.volumes.case import Volume

LPS = "space: left-posterior-superior"
AXES = "space directions: (1,0,0) (0,1,0) (0,0,3)"
NRRDS = {
    "space dimension": ["dimension: 3", "sizes: 3 4 5", "space dimension: 3", AXES, "space origin: (0.1,1,2)"],
    "spacings": ["dimension: 3", "sizes: 3 4 5", "spacings: 1.5 1.5 3"],
    "axis mins": ["dimension: 3", "sizes: 3 4 5", "axis mins: 0 1 2", "axis maxs: 3 7 9", "centers: cell cell cell"],
    "list of one": ["dimension: 4", "sizes: 3 4 5 1", LPS, "kinds: domain domain domain list", f"{AXES} none"],
    "list of one, first": [
        "dimension: 4",
        "sizes: 1 3 4 5",
        LPS,
        "kinds: list space space space",
        f"{AXES[:17]} none{AXES[17:]}",
    ],
    "time": [
        "dimension: 4",
        "sizes: 3 4 5 2",
        f"{LPS}-time",
        "space directions: (1,0,0,0) (0,1,0,0) (0,0,3,0) (0,0,0,1)",
        "space origin: (7,1,2,0)",
    ],
    "RAS": [
        "dimension: 3",
        "sizes: 3 4 5",
        "space: RAS",
        "space directions: (0.7,0.1,0) (-0.1,0.7,0) (0,0,1)",
        "measurement frame: (1,0,0) (0,1,0) (0,0,1)",
        "space origin: (0.1,1,2)",
    ],
}
GETS = ("GetSize", "GetSpacing", "GetOrigin", "GetDirection", "GetPixelID")


def write_nrrd(path: Path, lines: list[str], *, encoding: str = "raw", endian: str = "little", more: str = "") -> Path:
    sizes = next(line for line in lines if line.startswith("sizes")).split()[1:]
    voxels = np.arange(np.prod([int(size) for size in sizes]), dtype="<i2" if endian == "little" else ">i2")
    content = voxels.tobytes() if encoding == "raw" else " ".join(map(str, voxels)).encode()
    head = "\n".join(["NRRD0005", "type: int16", *lines, f"endian: {endian}", f"encoding: {encoding}"])
    path.write_bytes(f"{head}\n{more}\n".encode() + content)
    return path


def notes_of(path: Path) -> list[str]:
    notes: list[str] = []
    Original.read(path, notes.append)
    return notes


@pytest.mark.parametrize("kind", NRRDS)
def test_an_nrrd_header_comes_back_as_simpleitk_reads_it(kind: str, tmp_path: Path) -> None:
    source = write_nrrd(tmp_path / "a.nrrd", NRRDS[kind])
    before = sitk.ReadImage(str(source))
    form = Original.read(source)
    back = tmp_path / "b.nrrd"
    back.write_bytes(form.content(np.arange(np.prod(form.shape), dtype=form.type).reshape(form.shape, order="F")))
    after = sitk.ReadImage(str(back))
    for get in GETS:
        assert getattr(before, get)() == getattr(after, get)()
    assert np.array_equal(sitk.GetArrayFromImage(before), sitk.GetArrayFromImage(after))
    for line in NRRDS[kind]:
        assert f"\n{line}\n".encode() in back.read_bytes()


def test_a_header_that_would_be_read_otherwise_is_refused(tmp_path: Path) -> None:
    form = Original.read(write_itk(tmp_path / "a-t1c.nrrd"))
    other = {**form.geometry, "spacing": [0.9375, 0.9375, 2.2]}
    with pytest.raises(DataError, match=r"header that cannot be written back as it is read, expected .* NIfTI$"):
        replace(form, geometry=other).check_header()
    with pytest.raises(DataError, match="cannot be written back"):
        replace(form, fields=()).check_header()


def test_a_long_nrrd_header_is_refused(tmp_path: Path) -> None:
    long = "".join(f"# {number:060d}\n" for number in range(1100))
    lines = [*NRRDS["time"][:2], long.rstrip(), *NRRDS["time"][2:]]
    with pytest.raises(DataError, match="an NRRD header that cannot be written back"):
        Original.read(write_nrrd(tmp_path / "a.nrrd", lines))


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("suffix", ["mha", "nrrd"])
def test_what_simpleitk_writes_is_not_noted(suffix: str, compressed: bool, tmp_path: Path) -> None:
    assert notes_of(write_itk(tmp_path / f"a-t1c.{suffix}", compressed=compressed)) == []


@pytest.mark.parametrize("suffix", ["mha", "nrrd"])
def test_foreign_fields_are_noted(suffix: str, tmp_path: Path) -> None:
    image = sitk.ReadImage(str(write_itk(tmp_path / f"a-t1c.{suffix}")))
    image.SetMetaData("Patient", "Jane Doe")
    sitk.WriteImage(image, str(tmp_path / f"b.{suffix}"))
    assert any("may hold a patient's name" in note for note in notes_of(tmp_path / f"b.{suffix}"))
    if suffix == "nrrd":
        for more in ("content: Jane Doe\n", "# Jane Doe\n", "space:=Jane Doe\n"):
            source = write_nrrd(tmp_path / "c.nrrd", NRRDS["RAS"], more=more)
            assert any("may hold a patient's name" in note for note in notes_of(source))
            assert "Jane" not in str(Original.read(source))


def test_another_order_of_bytes_is_noted(tmp_path: Path) -> None:
    little = notes_of(write_nrrd(tmp_path / "a.nrrd", NRRDS["RAS"]))
    big = notes_of(write_nrrd(tmp_path / "b.nrrd", NRRDS["RAS"], endian="big"))
    text = notes_of(write_nrrd(tmp_path / "c.nrrd", NRRDS["RAS"], encoding="ascii"))
    assert little == []
    assert [len(big), "big-endian" in big[0]] == [1, True]
    assert [len(text), "written as text" in text[0]] == [1, True]
    content = write_itk(tmp_path / "d.mha", compressed=False).read_bytes()
    (tmp_path / "e.mha").write_bytes(content.replace(b"MSB = False", b"MSB = True"))
    (note,) = notes_of(tmp_path / "e.mha")
    assert "little-endian" in note


def compressing(path: Path, **recipe: Any) -> None:
    """Run a compression as far as its files are read."""
    case = SimpleNamespace(name="a", images={"t1c": Volume(path)})
    chosen = Recipe.load(recipe.get("name", "brats24/axial_256")).changed(modalities=["t1c"])
    model = SimpleNamespace(seconds=0.0, stacked=False)
    with pytest.raises(DataError) as caught:
        compress_case(case, chosen, model, None)
    assert "\n" not in str(caught.value)
    assert path.name in str(caught.value)
    if "match" in recipe:
        assert recipe["match"] in str(caught.value)


BROKEN = {
    "inter": ("scl_inter", np.nan),
    "type": ("datatype", 9999),
    "no type": ("datatype", 0),
    "bits": ("datatype", 1),
    "axes": ("dim", [9, 28, 36, 12, 1, 1, 1, 1]),
    "offset nan": ("vox_offset", np.nan),
    "offset -4": ("vox_offset", -4),
    "offset 348": ("vox_offset", 348),
    "offset 350": ("vox_offset", 350),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_nifti_header_is_one_line(kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = write_nifti(tmp_path / "a-t1c.nii", slope=2.0)
    content = path.read_bytes()
    header = nib.Nifti1Header(content[:348]).structarr.copy()
    field, value = BROKEN[kind]
    header[field] = value
    path.write_bytes(header.tobytes() + content[348:])
    compressing(path)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("field", "value"), [("scl_inter", np.nan), ("datatype", 9999), ("vox_offset", np.nan)])
def test_a_header_that_cannot_be_kept_is_one_line(field: str, value: Any, tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "a-t1c.nii", slope=2.0)
    content = path.read_bytes()
    header = nib.Nifti1Header(content[:348]).structarr.copy()
    header[field] = value
    path.write_bytes(header.tobytes() + content[348:])
    with pytest.raises(DataError, match=r"^a-t1c\.nii: found an unreadable header \(.*\), expected that of NIfTI"):
        Original.read(path)


def test_libraries_say_nothing_beside(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = write_nifti(tmp_path / "a-t1c.nii", pixdim=[1, -1, 1, 1, 0, 0, 0, 0])
    Original.read(path)
    for name in ("g.mha", "h.mha"):
        (tmp_path / name).write_bytes(b"NDims = 3\nfoo\n" + bytes(100) if name == "g.mha" else bytes(900))
        with pytest.raises(DataError):
            read_volume(tmp_path / name)
        with pytest.raises(DataError):
            Original.read(tmp_path / name)
    assert capfd.readouterr() == ("", "")
    print("seen")
    assert capfd.readouterr().out == "seen\n"


def test_an_integer_background_beyond_a_double_is_refused(tmp_path: Path) -> None:
    least = -9007199254740993
    values = np.where(body() == 0, least, least + 2 + (body() * 10**12).astype(np.int64))
    nib.save(nib.Nifti1Image(values, np.diag([-1.0, -1.0, 1.0, 1.0]), dtype=np.int64), tmp_path / "a-t1c.nii")
    compressing(tmp_path / "a-t1c.nii", name="brats24/axial_256_signed", match="several stored integers")


def test_a_background_keeps_its_sign(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "best.pt", image_size=48)
    values = np.where(body() == 0, -0.0, body()).astype(np.float32)
    nib.save(nib.Nifti1Image(values, np.diag([-1.0, -1.0, 1.0, 1.0])), tmp_path / "a-t1c.nii")
    compress(tmp_path / "a-t1c.nii", tmp_path / "a.vvq", CompressOptions(checkpoint=checkpoint, workers=1)).run()
    options = DecompressOptions(checkpoint=checkpoint, workers=1)
    decompressing(tmp_path / "a.vvq", tmp_path / "b.nii", options).run()
    back = np.asarray(nib.load(tmp_path / "b.nii").dataobj)
    assert np.array_equal(np.signbit(back), np.signbit(values))


def test_backgrounds_that_can_be_told_apart_are_taken() -> None:
    for dtype, value in (("<i8", -(2.0**53) + 1), ("<i2", -32768.0), ("u1", 255.0), ("<f4", 0.1)):
        Original("a.nii", "nifti", (1,), dtype, False).check_background(value)
    Original("a.nii", "nifti", (1,), "<i2", False, slope=0.037, intercept=-12.5).check_background(-12.5)
    with pytest.raises(DataError, match="several stored integers"):
        Original("a.nii", "nifti", (1,), "<i2", False, slope=1e-14, intercept=1000.0).check_background(1000.0)


def test_bicubic_interpolation_stays_in_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = np.ones((1, 9, 9), bool)
    square = (torch.arange(8) < 4).float().expand(1, 1, 8, 8)  # a step, which overshoots
    stream = SimpleNamespace(contrasts=(0,))
    case = SimpleNamespace(
        streams=[stream],
        slices=np.arange(1),
        filled=lambda stream: np.zeros((1, 2, 2, 1)),
        contrasts=[Contrast("t1c", 0, None, (0.0, 1.0), 0.0, mask)],
        interpolation="bicubic",
    )
    model = SimpleNamespace(decode=lambda indices, contrasts: square, pieces=lambda slices: [slice(0, 1)])
    found = decompress._decoded(case, model, 0)[0]
    assert (found.min(), found.max()) == (0, 1)
    assert decompress.from_squares(square[:, 0], (9, 9), "bicubic").max() > 1.01
