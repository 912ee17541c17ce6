"""Reading volumes: what a file is by its bytes, where its axes point to, and what was mended in its header."""

from __future__ import annotations

import gzip
import logging
from collections.abc import Callable
from itertools import permutations, product
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813

from vaevq_med.core.errors import DataError
from vaevq_med.images.nifti import check_orientation
from vaevq_med.images.volumes import check_volume, read_volume

VOXELS = np.random.default_rng(0).integers(0, 999, (4, 5, 6)).astype(np.int16)
LPS = np.array([[-1, 0, 0, 2.0], [0, -1, 0, 3], [0, 0, 2, -4], [0, 0, 0, 1]])


def nifti(*, change: Callable[[nib.Nifti1Header], None] = lambda header: None) -> bytes:
    """A file of :data:`VOXELS` with the affine :data:`LPS`, whose header is changed unchecked."""
    image = nib.Nifti1Image(VOXELS, LPS)
    image.set_qform(LPS, 1)
    image.set_sform(LPS, 1)
    content = bytearray(image.to_bytes())
    header = nib.Nifti1Header(bytes(content[:348]), check=False)
    change(header)
    content[:348] = header.binaryblock
    return bytes(content)


def put(**fields: object) -> Callable[[nib.Nifti1Header], None]:
    def change(header: nib.Nifti1Header) -> None:
        for name, value in fields.items():
            header[name] = value

    return change


def itk(tmp_path: Path, suffix: str) -> bytes:
    """The same as NRRD or MetaImage."""
    image = sitk.GetImageFromArray(VOXELS.T)
    image.SetSpacing((1, 1, 2))
    image.SetOrigin((-2, -3, -4))
    path = tmp_path / f"made{suffix}"
    sitk.WriteImage(image, str(path))
    return path.read_bytes()


def read(path: Path, content: bytes, orientation: str | None = None) -> tuple[np.ndarray, np.ndarray, list[str]]:
    path.write_bytes(content)
    notes: list[str] = []
    voxels, affine = read_volume(path, orientation=orientation, note=notes.append)
    return voxels, affine, notes


@pytest.mark.parametrize("kind", [".nii", ".nii.gz", ".mha", ".nrrd"])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".mha", ".nrrd"])
def test_the_first_bytes_say_what_a_file_is(tmp_path: Path, kind: str, suffix: str) -> None:
    made = {".nii": nifti, ".nii.gz": lambda: gzip.compress(nifti())}
    content = made[kind]() if kind in made else itk(tmp_path, kind)
    voxels, affine, notes = read(tmp_path / f"a{suffix}", content)
    np.testing.assert_array_equal(voxels, VOXELS)
    np.testing.assert_allclose(affine, LPS)
    assert len(notes) == (kind != suffix)


def test_what_is_neither_is_refused_for_what_it_is(tmp_path: Path) -> None:
    for name in ("a.nii", "a.nii.gz"):
        with pytest.raises(DataError, match="no NIfTI") as caught:
            read(tmp_path / name, b"<html>not found</html>" * 99)
        assert "corrupt" not in str(caught.value)


def axes(affine: np.ndarray) -> str:
    return "".join(nib.aff2axcodes(affine))


def without_space(content: bytes) -> bytes:
    return content.replace(b"space: left-posterior-superior\n", b"space dimension: 3\n")


def without_matrix(content: bytes) -> bytes:
    return b"".join(line for line in content.splitlines(keepends=True) if not line.startswith(b"TransformMatrix"))


@pytest.mark.parametrize("kind", ["nifti", "nrrd", "mha"])
def test_an_orientation_that_no_header_states_is_not_guessed(tmp_path: Path, kind: str) -> None:
    content, suffix = {
        "nifti": lambda: (nifti(change=put(sform_code=0, qform_code=0)), ".nii"),
        "nrrd": lambda: (without_space(itk(tmp_path, ".nrrd")), ".nrrd"),
        "mha": lambda: (without_matrix(itk(tmp_path, ".mha")), ".mha"),
    }[kind]()
    with pytest.raises(DataError, match="--assume-orientation"):
        read(tmp_path / f"a{suffix}", content)
    for letters in permutations(("LR", "PA", "IS")):
        for name in map("".join, product(*letters)):
            check_orientation(name)
            voxels, affine, notes = read(tmp_path / f"a{suffix}", content, name)
            np.testing.assert_array_equal(voxels, VOXELS)
            assert axes(affine) == name
            np.testing.assert_allclose(nib.affines.voxel_sizes(affine), (1, 1, 2))
            np.testing.assert_allclose(affine @ [1.5, 2, 2.5, 1], [0, 0, 0, 1], atol=1e-12)
            assert len(notes) == 1
            assert name in notes[0]


def test_an_orientation_that_a_header_states_counts(tmp_path: Path) -> None:
    for codes in ({"sform_code": 0}, {"qform_code": 0}):
        _, affine, notes = read(tmp_path / "a.nii", nifti(change=put(**codes)), "RAS")
        np.testing.assert_allclose(affine, LPS)
        assert notes == []


@pytest.mark.parametrize("name", ["", "RA", "RAX", "RAR", "RRAS", "ras", "RASI"])
def test_what_names_no_orientation_is_refused(name: str) -> None:
    with pytest.raises(DataError, match="expected three letters"):
        check_orientation(name)


def test_two_orientations_in_one_header_are_noted(tmp_path: Path) -> None:
    def change(header: nib.Nifti1Header) -> None:
        header.set_qform(np.diag([1, -1, 2, 1.0]), 1)

    _, affine, notes = read(tmp_path / "a.nii", nifti(change=change))
    np.testing.assert_allclose(affine, LPS)
    (note,) = notes
    assert "LPS" in note
    assert "RPS" in note


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"pixdim": [0, 1, 1, 2, 0, 0, 0, 0]}, "qfac"),
        ({"pixdim": [1, -1, 1, 2, 0, 0, 0, 0]}, "pixdim"),
        ({"qform_code": 99}, "qform_code"),
        ({"bitpix": 99}, "bitpix"),
    ],
)
def test_repairs_of_a_header_are_noted_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fields: dict[str, object], said: str
) -> None:
    from nibabel import imageglobals

    logger = imageglobals.logger
    before = (logger.level, logger.propagate, logger.disabled, list(logger.handlers))
    voxels, affine, notes = read(tmp_path / "a.nii", nifti(change=put(**fields)))
    np.testing.assert_array_equal(voxels, VOXELS)
    np.testing.assert_allclose(affine, LPS)
    (note,) = notes
    assert said in note
    assert (logger.level, logger.propagate, logger.disabled, list(logger.handlers)) == before
    assert capsys.readouterr().err == ""
    assert isinstance(logger, logging.Logger)


def test_a_sound_header_gives_no_note(tmp_path: Path) -> None:
    assert read(tmp_path / "a.nii.gz", gzip.compress(nifti()))[2] == []


@pytest.mark.parametrize("degrees", [1.0004, 1.04, 10.0])
def test_a_message_never_shows_a_number_that_would_have_been_accepted(degrees: float) -> None:
    angle = np.radians(degrees)
    turned = np.eye(4)
    turned[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    with pytest.raises(DataError, match="degrees off the axes") as caught:
        check_volume("a", VOXELS, turned, max_obliquity_degrees=1)
    shown = float(str(caught.value).partition("(")[2].partition(" degrees")[0])
    assert 1 < shown == pytest.approx(degrees, rel=1e-3)
