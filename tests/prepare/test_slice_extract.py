"""``slice-extract`` and ``audit-split``: what is written, how it survives interruptions, and what bad input does."""

from __future__ import annotations

import contextlib
import errno
import gzip
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from vaevq_med.cli import app as cli
from vaevq_med.core import folder as workplace
from vaevq_med.core.errors import DataError
from vaevq_med.images.manifest import load_manifest
from vaevq_med.images.pixels import read_image
from vaevq_med.images.volumes import read_volume
from vaevq_med.prepare import job
from vaevq_med.prepare.job import Prepare
from vaevq_med.prepare.recipes import Recipe
from vaevq_med.prepare.volumes import slices
from vaevq_med.prepare.volumes import source as slice_extract
from vaevq_med.prepare.volumes.slices import resize_images, resize_labels
from vaevq_med.prepare.volumes.transforms import nonzero_percentiles

MODALITIES = ("t1n", "t1c", "t2w", "t2f")
SHAPE = (24, 28, 20)
SIDE = 28
CASE = "BraTS-GLI-00001-000"
BAD = "BraTS-GLI-00002-000"
RAS = np.diag([1.0, 1.0, 1.0, 1.0])


# --- helpers ------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    code: int
    out: str
    err: str

    @property
    def skips(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.endswith("; skipped")]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run the command line in this process, with the exit code that the shell would see."""

    def run(*args: object) -> Outcome:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["vaevq-med", *map(str, args)])
        handler = signal.getsignal(signal.SIGTERM)
        code = 0
        try:
            cli.main()
        except SystemExit as error:
            code = int(error.code or 0)
        finally:
            signal.signal(signal.SIGTERM, handler)
        captured = capsys.readouterr()
        assert "Traceback" not in captured.out + captured.err
        return Outcome(code, captured.out, captured.err.lstrip("\n"))

    return run


@pytest.fixture
def extract(call: Callable[..., Outcome]) -> Callable[..., Outcome]:
    """``slice-extract`` at the size that leaves the pixels of a small volume as they are."""

    def run(source: Path, output: Path, *args: object) -> Outcome:
        given = {str(arg) for arg in args}
        size = () if given & {"--size", "--recipe"} else ("--size", SIDE)
        workers = () if "--workers" in given else ("--workers", 1)
        return call("slice-extract", source, output, *size, *workers, *args)

    return run


def volume(seed: int = 0, *, shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    """A block of noise, with nothing in the first two planes and the last three, that no flip maps to itself."""
    voxels = np.zeros(shape, np.int16)
    voxels[3:-4, 2:-6, 2:-3] = np.random.default_rng(seed).integers(1, 1000, shape)[3:-4, 2:-6, 2:-3]
    return voxels


def labels(values: tuple[int, ...] = (1, 2, 3, 4)) -> np.ndarray:
    voxels = np.zeros(SHAPE, np.uint8)
    for number, value in enumerate(values):
        voxels[5 + 2 * number : 7 + 2 * number, 6 : 10 + number, 6:12] = value
    return voxels


def save(path: Path, voxels: np.ndarray, affine: np.ndarray = RAS, axcodes: str = "RAS") -> Path:
    """Write voxels given in RAS, stored in another orientation."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(voxels, affine)
    if axcodes != "RAS":
        there = nib.orientations.axcodes2ornt(tuple(axcodes))
        image = image.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(affine), there))
        assert nib.aff2axcodes(image.affine) == tuple(axcodes)
    if path.name.endswith((".mha", ".nrrd")):
        spacing = nib.affines.voxel_sizes(image.affine)
        lps = np.diag([-1, -1, 1, 1]) @ image.affine
        stored = sitk.GetImageFromArray(np.ascontiguousarray(np.asarray(image.dataobj).T))
        stored.SetSpacing(spacing.tolist())
        stored.SetOrigin(lps[:3, 3].tolist())
        stored.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
        sitk.WriteImage(stored, str(path))
    else:
        nib.save(image, path)
    return path


def make_case(
    root: Path,
    case: str = CASE,
    *,
    affine: np.ndarray = RAS,
    axcodes: str = "RAS",
    suffix: str = ".nii.gz",
    seg: np.ndarray | None = None,
    seed: int = 0,
    change: Mapping[str, Callable[[np.ndarray], np.ndarray]] | None = None,
) -> Path:
    for number, modality in enumerate(MODALITIES):
        voxels = volume(10 * seed + number)
        voxels = (change or {}).get(modality, lambda v: v)(voxels)
        save(root / case / f"{case}-{modality}{suffix}", voxels, affine, axcodes)
    if seg is not None:
        save(root / case / f"{case}-seg{suffix}", seg, affine, axcodes)
    return root


def tree(root: Path, *, state: bool = True) -> dict[str, bytes]:
    """Every file; of the records only what they say of the images, not of the input's times."""
    files = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.is_file() and name != ".slices/lock" and (state or not name.startswith(".slices")):
            files[name] = path.read_bytes()
    return files


def entries(output: Path) -> list[dict[str, Any]]:
    content = json.loads((output / "dataset.json").read_text())
    return [entry for split in ("training", "validation", "test") for entry in content[split]]


def pixels(output: Path, modality: str = "t1n", index: int = 8, case: str = CASE, axis: str = "z") -> np.ndarray:
    (path,) = (output / "images" / case).glob(f"*-{modality}-{axis}{index:03d}.*")
    return read_image(path)[0].numpy()


def upright(voxels: np.ndarray) -> np.ndarray:
    """``[X, Y, Z]`` of RAS to ``[Z, rows, columns]``: written apart from the package, voxel by voxel."""
    nx, ny, nz = voxels.shape
    out = np.zeros((nz, ny, nx), voxels.dtype)
    for x in range(nx):
        for y in range(ny):
            out[:, ny - 1 - y, nx - 1 - x] = voxels[x, y]
    return out


def recipe_file(path: Path, **change: Any) -> Path:
    path.write_text(json.dumps({**Recipe.load("brats24/axial_256").to_dict(), "name": "mine", "size": SIDE, **change}))
    return path


def assert_clean(output: Path) -> None:
    """Nothing half-written: every folder of slices has a record, and nothing temporary is left."""
    assert not list((output / ".slices").glob("*.partial"))
    hidden = [path.name for path in output.rglob(".*") if path.name != ".slices"]
    assert not hidden
    records = {path.stem for path in (output / ".slices").glob("*.json")}
    for folder in ("images", "labels"):
        assert {path.name for path in (output / folder).glob("*")} <= records


# --- what is written ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One case with labels, sliced at its own size."""
    root = tmp_path_factory.mktemp("dataset")
    make_case(root / "in", seg=labels())
    recipe = Recipe.load("brats24/axial_256").changed(size=SIDE)
    Prepare(slice_extract.VolumeSource(root / "in", recipe), root / "out", workers=1).run()
    return root / "out"


def test_pixels_are_the_windowed_volume(dataset: Path) -> None:
    for number, modality in enumerate(MODALITIES):
        voxels = volume(number)
        low, high = np.percentile(voxels[voxels != 0], (0, 99.5))
        expected = np.zeros((SHAPE[2], SIDE, SIDE))
        expected[:, :, 2:26] = np.clip((upright(voxels) - low) / (high - low), 0, 1)
        for index in range(2, 17):
            found = pixels(dataset, modality, index) * 255
            np.testing.assert_array_equal(found, np.round(found))
            np.testing.assert_allclose(found, expected[index] * 255, atol=0.501)


def test_the_datalist_describes_every_slice(dataset: Path) -> None:
    found = entries(dataset)
    assert [(e["slice"], e["modality"]) for e in found] == [(z, m) for z in range(2, 17) for m in MODALITIES]
    segmentation = upright(labels())
    for entry in found:
        number = MODALITIES.index(entry["modality"])
        voxels = volume(number)
        z = entry["slice"]
        regions = {"whole_tumor": (1, 2, 3), "tumor_core": (1, 3), "enhancing_tumor": (3,)}
        assert entry == {
            "image": f"images/{CASE}/{CASE}-{entry['modality']}-z{z:03d}.png",
            "patient": "BraTS-GLI-00001",
            "case": CASE,
            "modality": entry["modality"],
            "label": number,
            "slice": z,
            "intensity_window": pytest.approx(list(np.percentile(voxels[voxels != 0], (0, 99.5))), rel=1e-6),
            "foreground": pytest.approx(np.count_nonzero(voxels[:, :, z]) / (24 * 28), abs=1e-6),
            "segmentation": f"labels/{CASE}/{CASE}-seg-z{z:03d}.png",
            "region_area": {name: int(np.isin(segmentation[z], values).sum()) for name, values in regions.items()},
        }
        assert (dataset / entry["image"]).is_file()
    stored = np.asarray(Image.open(dataset / f"labels/{CASE}/{CASE}-seg-z008.png"))
    np.testing.assert_array_equal(stored[:, 2:26], segmentation[8])


def test_the_head_of_the_datalist_recipe_and_report(dataset: Path) -> None:
    manifest = load_manifest(dataset)
    content = manifest.content
    assert content["modality"] == {"0": "t1n", "1": "t1c", "2": "t2w", "3": "t2f"}
    assert (content["image_size"], content["format"], content["channels_per_image"]) == (SIDE, "png", 1)
    assert content["recipe"] == json.loads((dataset / "recipe.json").read_text())
    assert content["segmentation_labels"] == {"1": "NETC", "2": "SNFH", "3": "ET", "4": "RC"}
    assert re.fullmatch("sha256:[0-9a-f]{64}", manifest.content_hash)
    assert re.fullmatch("sha256:[0-9a-f]{64}", manifest.split_hash)
    report = json.loads((dataset / "report.json").read_text())
    assert report["cases"] == 1
    assert sum(report["slices"].values()) == 60 == sum(report["modalities"].values())
    assert_clean(dataset)


@pytest.mark.parametrize("axcodes", ["LPS", "PIR", "ASL", "SRA", "LAI"])
def test_every_stored_orientation_gives_the_same_bytes(
    dataset: Path, extract: Callable[..., Outcome], tmp_path: Path, axcodes: str
) -> None:
    make_case(tmp_path / "in", axcodes=axcodes, seg=labels())
    assert extract(tmp_path / "in", tmp_path / "out").code == 0
    assert tree(tmp_path / "out", state=False) == tree(dataset, state=False)


@pytest.mark.parametrize(("suffix", "axcodes"), [(".nii", "RAS"), (".mha", "LPS"), (".nrrd", "PIR")])
def test_every_file_format_gives_the_same_bytes(
    dataset: Path, extract: Callable[..., Outcome], tmp_path: Path, suffix: str, axcodes: str
) -> None:
    make_case(tmp_path / "in", axcodes=axcodes, suffix=suffix, seg=labels())
    assert extract(tmp_path / "in", tmp_path / "out").code == 0
    assert tree(tmp_path / "out", state=False) == tree(dataset, state=False)


def rewrite(path: Path, kind: str) -> None:
    """The same voxels under another header."""
    image = nib.load(path)
    voxels = np.asarray(image.dataobj)
    if kind == "big-endian":
        stored = nib.Nifti1Image(voxels, image.affine, nib.Nifti1Header(endianness=">"))
    elif kind == "NIfTI-2":
        stored = nib.Nifti2Image(voxels, image.affine)
    elif kind == "fourth axis of 1":
        stored = nib.Nifti1Image(voxels[..., None], image.affine)
    elif kind == "float64":
        stored = nib.Nifti1Image(voxels.astype(np.float64), image.affine)
    else:
        stored = nib.Nifti1Image((voxels.astype(np.float32) - 8) / 2, image.affine)
    content = bytearray(stored.to_bytes())
    if kind == "slope and intercept":
        content[112:120] = np.array([2, 8], "<f4").tobytes()
    path.write_bytes(gzip.compress(bytes(content[:999]), 1) + gzip.compress(bytes(content[999:]), 1))
    assert nib.load(path).header.endianness == (">" if kind == "big-endian" else "<")
    np.testing.assert_array_equal(np.squeeze(nib.load(path).get_fdata()), voxels)


@pytest.mark.parametrize("kind", ["big-endian", "NIfTI-2", "fourth axis of 1", "float64", "slope and intercept"])
def test_every_header_gives_the_same_bytes(
    dataset: Path, extract: Callable[..., Outcome], tmp_path: Path, kind: str
) -> None:
    make_case(tmp_path / "in", seg=labels())
    for path in (tmp_path / "in" / CASE).iterdir():
        rewrite(path, kind)
    assert extract(tmp_path / "in", tmp_path / "out").code == 0
    assert tree(tmp_path / "out", state=False) == tree(dataset, state=False)


@pytest.mark.parametrize(
    ("axis", "letter", "position"),
    [
        # rows downward and columns to the right, of the voxels that lie at the right, anterior, superior end
        ("axial", "z", {"right": (14, 3), "anterior": (1, 14), "left": (14, 24)}),
        ("coronal", "y", {"right": (12, 1), "superior": (3, 12), "left": (12, 22)}),
        ("sagittal", "x", {"anterior": (14, 1), "superior": (5, 14), "posterior": (14, 26)}),
    ],
)
def test_marked_voxels_land_where_a_radiologist_looks(
    extract: Callable[..., Outcome], tmp_path: Path, axis: str, letter: str, position: dict[str, tuple[int, int]]
) -> None:
    """The three axes of 24x28x20 voxels are padded to squares of 28, 24 and 28 pixels, which is the slices' size."""
    x, y, z = 11, 13, 9
    ends = {"left": (1, y, z), "right": (22, y, z), "posterior": (x, 1, z), "anterior": (x, 26, z)}
    ends |= {"superior": (x, y, 18), "inferior": (x, y, 1)}

    def mark(voxels: np.ndarray) -> np.ndarray:
        voxels = np.zeros(SHAPE, np.int16)
        voxels[1:-1, 1:-1, 1:-1] = 10
        for place in ends.values():
            voxels[place] = 1000
        return voxels

    make_case(tmp_path / "in", axcodes="LPS", change=dict.fromkeys(MODALITIES, mark))
    recipe = recipe_file(tmp_path / "mine.json", axis=axis, percentiles=[0, 100], size=24 if letter == "y" else 28)
    assert extract(tmp_path / "in", tmp_path / "out", "--recipe", recipe).code == 0
    image = pixels(tmp_path / "out", "t2w", {"z": z, "y": y, "x": x}[letter], axis=letter)
    assert (image == 1).sum() == 4
    for name, (row, column) in position.items():
        assert image[row, column] == 1, name


def test_a_slice_is_kept_from_five_percent_in_every_contrast(extract: Callable[..., Outcome], tmp_path: Path) -> None:
    area = SHAPE[0] * SHAPE[1]

    def fill(counts: Mapping[int, int]) -> Callable[[np.ndarray], np.ndarray]:
        def change(_: np.ndarray) -> np.ndarray:
            voxels = np.zeros((area, SHAPE[2]), np.int16)
            for z in range(SHAPE[2]):
                voxels[: counts.get(z, area // 2), z] = np.arange(1, counts.get(z, area // 2) + 1)
            return voxels.reshape(SHAPE)

        return change

    enough = int(np.ceil(0.05 * area))
    change = {"t1c": fill({3: enough, 4: enough - 1, 5: 0}), "t2f": fill({7: enough - 1}), "t1n": fill({})}
    make_case(tmp_path / "in", change={**change, "t2w": fill({})})
    assert extract(tmp_path / "in", tmp_path / "out").code == 0
    kept = sorted({entry["slice"] for entry in entries(tmp_path / "out")})
    assert kept == [z for z in range(20) if z not in (4, 5, 7)]


def test_negative_voxels_are_background_once_that_is_accepted(extract: Callable[..., Outcome], tmp_path: Path) -> None:
    def shift(voxels: np.ndarray) -> np.ndarray:
        return np.where(voxels > 0, voxels - 300, 0).astype(np.int16)

    make_case(tmp_path / "in", change={"t2w": shift})
    assert extract(tmp_path / "in", tmp_path / "out", "--accept", "clipping").code == 0
    expected = shift(volume(2)).clip(0)
    (entry,) = [e for e in entries(tmp_path / "out") if e["modality"] == "t2w" and e["slice"] == 9]
    assert entry["intensity_window"] == pytest.approx(list(np.percentile(expected[expected > 0], (0, 99.5))))
    assert entry["foreground"] == pytest.approx((expected[:, :, 9] > 0).mean(), abs=1e-6)


@settings(deadline=None)
@given(
    st.one_of(
        hnp.arrays(np.float32, 60, elements=st.floats(-100, 1e4, width=32)),
        *(hnp.arrays(dtype, 60) for dtype in (np.uint8, np.int16, np.int32)),
        hnp.arrays(np.int16, 60, elements=st.integers(-2, 2)),
    ),
    st.tuples(st.floats(0, 49), st.floats(51, 100)),
)
def test_the_window_is_numpys_percentile_of_the_nonzero_voxels(values: np.ndarray, percentiles: Any) -> None:
    nonzero = values[values != 0]
    if nonzero.dtype != np.float32:
        nonzero = nonzero.astype(np.float64)  # numpy interpolates integers with overflow
    if nonzero.size == 0 or not np.subtract(*np.percentile(nonzero, percentiles[::-1])) > 0:
        with pytest.raises(DataError):
            nonzero_percentiles(torch.from_numpy(values), percentiles)
    else:
        found = nonzero_percentiles(torch.from_numpy(values), percentiles)
        np.testing.assert_allclose(found, np.percentile(nonzero, percentiles), rtol=1e-6)


@pytest.mark.parametrize("size", [13, 28, 50])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_images_are_resized_as_pillow_does(size: int, interpolation: str) -> None:
    stack = torch.rand(3, 28, 24, generator=torch.Generator().manual_seed(1))
    found = resize_images(stack, Recipe(name="x", size=size, interpolation=interpolation))
    square = np.zeros((3, 28, 28), np.float32)
    square[:, :, 2:26] = stack
    for image, expected in zip(found, square, strict=True):
        reference = Image.fromarray(expected).resize((size, size), getattr(Image.Resampling, interpolation.upper()))
        np.testing.assert_allclose(image, np.asarray(reference).clip(0, 1), atol=1e-5)


def test_without_antialiasing_a_fine_pattern_turns_into_stripes() -> None:
    pattern = torch.zeros(1, 64, 64)
    pattern[:, :, ::4] = 1
    smooth = resize_images(pattern.clone(), Recipe(name="x", size=16))[0, :, 2:-2]
    harsh = resize_images(pattern.clone(), Recipe(name="x", size=16, antialias=False))[0, :, 2:-2]
    np.testing.assert_allclose(smooth, 0.25, atol=0.02)
    assert abs(float(harsh.mean()) - 0.25) > 0.2


@given(st.integers(8, 90), st.integers(1, 40), st.integers(1, 40))
@settings(deadline=None, max_examples=40)
def test_labels_take_the_nearest_voxel(size: int, rows: int, columns: int) -> None:
    stack = torch.from_numpy(np.random.default_rng(0).integers(0, 5, (2, rows, columns)).astype(np.uint8))
    side = max(rows, columns)
    square = np.zeros((2, side, side), np.uint8)
    top, left = (side - rows) // 2, (side - columns) // 2
    square[:, top : top + rows, left : left + columns] = stack
    nearest = np.array([(2 * i + 1) * side // (2 * size) for i in range(size)])
    sure = np.array([(2 * i + 1) * side % (2 * size) != 0 for i in range(size)])  # else two voxels are as near
    found = resize_labels(stack, size)
    assert found.dtype == np.uint8
    assert found.shape == (2, size, size)
    np.testing.assert_array_equal(found[:, sure][:, :, sure], square[:, nearest[sure]][:, :, nearest[sure]])


def test_region_areas_are_counted_on_the_written_labels(extract: Callable[..., Outcome], tmp_path: Path) -> None:
    make_case(tmp_path / "in", seg=labels())
    assert extract(tmp_path / "in", tmp_path / "out", "--size", 61).code == 0
    for entry in entries(tmp_path / "out")[::4]:
        stored = np.asarray(Image.open(tmp_path / "out" / entry["segmentation"]))
        assert stored.shape == (61, 61)
        assert entry["region_area"]["whole_tumor"] == np.isin(stored, (1, 2, 3)).sum()
        assert entry["region_area"]["enhancing_tumor"] == (stored == 3).sum()


def test_the_size_does_not_depend_on_how_many_slices_are_held_at_once(
    extract: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    make_case(tmp_path / "in", seg=labels())
    assert extract(tmp_path / "in", tmp_path / "a", "--size", 40).code == 0
    monkeypatch.setattr(slices, "_BLOCK_PIXELS", 4000)
    assert extract(tmp_path / "in", tmp_path / "b", "--size", 40).code == 0
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


@pytest.mark.parametrize(("image_format", "step"), [("png", 1 / 255), ("png16", 1 / 65535), ("npy", 0)])
def test_every_format_goes_round(
    extract: Callable[..., Outcome], tmp_path: Path, image_format: str, step: float
) -> None:
    make_case(tmp_path / "in")
    assert extract(tmp_path / "in", tmp_path / "out", "--format", image_format).code == 0
    voxels = volume(3)
    low, high = np.percentile(voxels[voxels != 0], (0, 99.5))
    expected = np.clip((upright(voxels)[10] - low) / (high - low), 0, 1)
    found = pixels(tmp_path / "out", "t2f", 10)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found[:, 2:26], expected, atol=step / 2 + 1e-6)
    assert load_manifest(tmp_path / "out").content["format"] == image_format


def test_a_decathlon_volume_equals_its_channels(dataset: Path, extract: Callable[..., Outcome], tmp_path: Path) -> None:
    stacked = np.stack([volume(n) for n in (3, 0, 1, 2)], axis=-1)  # FLAIR, T1w, T1gd, T2w
    save(tmp_path / "in/imagesTr/BRATS_001.nii.gz", stacked)
    save(tmp_path / "in/labelsTr/BRATS_001.nii.gz", labels((1, 2, 3)))
    assert extract(tmp_path / "in", tmp_path / "out").code == 0
    for modality in MODALITIES:
        np.testing.assert_array_equal(
            pixels(tmp_path / "out", modality, case="BRATS_001"), pixels(dataset, modality), modality
        )
    content = json.loads((tmp_path / "out/dataset.json").read_text())
    assert content["segmentation_labels"]["3"] == "enhancing tumor"
    assert content["label_map"]["tumor_core"] == [2, 3]


def test_two_label_maps_are_written_as_one(extract: Callable[..., Outcome], tmp_path: Path) -> None:
    make_case(tmp_path / "in", seg=labels((1, 2, 3, 4)))
    for modality, name in zip((*MODALITIES, "seg"), ("t1", "t1ce", "t2", "flair", "seg"), strict=True):
        voxels = labels((1, 2, 4)) if modality == "seg" else volume(5)
        save(tmp_path / f"in/old/BraTS2021_00001_{name}.nii.gz", voxels)
    result = extract(tmp_path / "in", tmp_path / "out")
    assert result.code == 0
    assert "the releases share patients" in result.out
    stored = np.asarray(Image.open(tmp_path / "out/labels/BraTS2021_00001/BraTS2021_00001-seg-z008.png"))
    np.testing.assert_array_equal(stored[:, 2:26], upright(labels((1, 2, 3)))[8])


def _places(output: Path, key: str) -> dict[str, str]:
    """The split of each patient or case of a data set."""
    content = load_manifest(output).content
    return {entry[key]: split for split in ("training", "validation", "test") for entry in content[split]}


@pytest.fixture
def dealt(extract: Callable[..., Outcome], tmp_path: Path) -> dict[str, str]:
    """Six cases of a patient each, dealt in ``out``: the split of each case."""
    rows = ["case,t1,t1ce,t2,flair"]
    for number in range(6):
        save(tmp_path / f"in/{number}.nii", volume(number))
        rows.append(f"case{number}" + f",{number}.nii" * 4)
    (tmp_path / "c.csv").write_text("\n".join(rows))
    recipe = recipe_file(tmp_path / "r.json", split={"training": 0.5, "validation": 0.3})
    given = ("--cases", tmp_path / "c.csv", "--recipe", recipe)
    assert extract(tmp_path / "in", tmp_path / "out", *given).code == 0
    found = _places(tmp_path / "out", "case")
    assert set(found.values()) == {"training", "validation", "test"}
    return found


def _name(extract: Callable[..., Outcome], folder: Path, table: dict[str, str]) -> Outcome:
    rows = ["case,patient", *(f"{case},{patient}" for case, patient in table.items())]
    (folder / "p.csv").write_text("\n".join(rows))
    given = ("--cases", folder / "c.csv", "--recipe", folder / "r.json", "--patients", folder / "p.csv")
    result = extract(folder / "in", folder / "out", *given)
    assert result.code == 0
    return result


@pytest.mark.parametrize("name", ["anna", "bo"])
def test_who_was_trained_on_stays_in_training_under_a_name_of_the_table(
    name: str, dealt: dict[str, str], extract: Callable[..., Outcome], tmp_path: Path
) -> None:
    firsts = {split: next(c for c in dealt if dealt[c] == split) for split in ("training", "validation", "test")}
    result = _name(extract, tmp_path, {firsts["training"]: name, firsts["validation"]: name})
    expected = {**dealt, firsts["validation"]: "training"}
    assert _places(tmp_path / "out", "case") == expected
    (note,) = [line for line in result.out.splitlines() if "stood in two splits" in line]
    assert all(word in note for word in (name, firsts["training"], firsts["validation"]))
    again = _name(extract, tmp_path, {firsts["training"]: name, firsts["validation"]: name})
    assert "stood in two splits" not in again.out
    # Another table: what the first one called them counts, too.
    result = _name(extract, tmp_path, {firsts["training"]: "new", firsts["test"]: "new"})
    assert _places(tmp_path / "out", "case") == {**expected, firsts["test"]: "training"}
    assert "stood in two splits" in result.out


def test_a_table_that_gives_the_name_of_another_split_moves_nobody_out_of_training(
    dealt: dict[str, str], extract: Callable[..., Outcome], tmp_path: Path
) -> None:
    one, other = (next(c for c in dealt if dealt[c] == split) for split in ("training", "test"))
    _name(extract, tmp_path, {one: "anna"})
    _name(extract, tmp_path, {one: other})
    assert _places(tmp_path / "out", "case") == {**dealt, other: "training"}


def test_patients_whom_an_earlier_version_took_for_one_keep_its_split(
    extract: Callable[..., Outcome], tmp_path: Path
) -> None:
    names = [f"Brats18_TCIA02_{number}" for number in (131, 151, 171)]
    for number, name in enumerate(names):
        for modality in ("t1", "t1ce", "t2", "flair"):
            save(tmp_path / f"in/{name}/{name}_{modality}.nii.gz", volume(number))
    (tmp_path / "p.csv").write_text("case,patient\n" + "\n".join(f"{name},Brats18_TCIA02" for name in names))
    (tmp_path / "s.json").write_text('{"Brats18_TCIA02": "validation"}')
    given = ("--patients", tmp_path / "p.csv", "--split-file", tmp_path / "s.json")
    assert extract(tmp_path / "in", tmp_path / "out", *given).code == 0
    result = extract(tmp_path / "in", tmp_path / "out")
    assert result.code == 0
    assert _places(tmp_path / "out", "patient") == dict.fromkeys(names, "validation")
    assert "stood in two splits" not in result.out


def test_a_csv_of_cases_and_patients(extract: Callable[..., Outcome], tmp_path: Path) -> None:
    for number in range(8):
        save(tmp_path / f"in/{number}.nii", volume(number))
    rows = ["case,patient,t1,t1ce,t2,flair", "a,P,0.nii,1.nii,2.nii,3.nii", "b,P,4.nii,5.nii,6.nii,7.nii"]
    (tmp_path / "c.csv").write_text("\n".join(rows))
    (tmp_path / "s.csv").write_text("patient,split\nP,test\n")
    result = extract(
        tmp_path / "in", tmp_path / "out", "--cases", tmp_path / "c.csv", "--split-file", tmp_path / "s.csv"
    )
    assert result.code == 0
    content = load_manifest(tmp_path / "out").content
    assert {(e["case"], e["patient"]) for e in content["test"]} == {("a", "P"), ("b", "P")}
    assert not content["training"]
    assert not content["validation"]


def test_a_case_without_labels_and_stray_bytes_in_a_file_name(extract: Callable[..., Outcome], tmp_path: Path) -> None:
    make_case(tmp_path / "in")
    Path(os.fsdecode(os.fsencode(tmp_path / "in") + b"/caf\xe9.nii.gz")).touch()
    result = extract(tmp_path / "in", tmp_path / "out")
    assert (result.code, result.err.count("skipped")) == (0, 0)
    assert "(first: caf?.nii.gz)" in result.out
    assert all("segmentation" not in entry and "region_area" not in entry for entry in entries(tmp_path / "out"))
    assert not (tmp_path / "out/labels").exists()


# --- resampling and N4 ----------------------------------------------------------------------------------


def turned(degrees: float) -> np.ndarray:
    angle = np.radians(degrees)
    affine = np.eye(4)
    affine[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    return affine


def test_spacing_resamples_thick_slices_and_oblique_scans(extract: Callable[..., Outcome], tmp_path: Path) -> None:
    make_case(tmp_path / "in", affine=np.diag([1, 2, 3, 1.0]), axcodes="LPS", seg=labels())
    make_case(tmp_path / "in", BAD, affine=turned(20), seg=labels())
    recipe = recipe_file(tmp_path / "mine.json", spacing=[1, 1, 1], size=64)
    assert extract(tmp_path / "in", tmp_path / "out", "--recipe", recipe).code == 0
    kept = {entry["slice"] for entry in entries(tmp_path / "out") if entry["case"] == CASE}
    assert len(kept) == pytest.approx(3 * 15, abs=3)
    image = pixels(tmp_path / "out", index=24)
    rows, columns = np.nonzero(image)
    assert np.ptp(rows) / np.ptp(columns) == pytest.approx(2 * 20 / 17, rel=0.1)


def test_contrasts_whose_grids_differ_by_a_hair_are_sliced_alike(
    extract: Callable[..., Outcome], tmp_path: Path
) -> None:
    """Their resampled shapes would differ by a voxel: 27 steps of 1.015 and of 0.985 mm, in steps of 0.7 mm."""
    make_case(tmp_path / "in")
    for modality, scale in (("t1c", 1.015), ("t2w", 0.985)):
        save(tmp_path / f"in/{CASE}/{CASE}-{modality}.nii.gz", volume(), np.diag([1, scale, 1, 1]))
    recipe = recipe_file(tmp_path / "mine.json", spacing=[0.7, 0.7, 0.7])
    result = extract(tmp_path / "in", tmp_path / "out", "--recipe", recipe)
    assert (result.code, result.skips) == (0, [])
    np.testing.assert_array_equal(pixels(tmp_path / "out", "t1c", 12), pixels(tmp_path / "out", "t2w", 12))


def test_resampling_without_end_is_refused(extract: Callable[..., Outcome], tmp_path: Path) -> None:
    make_case(tmp_path / "in", affine=np.diag([1000.0, 1000.0, 1000.0, 1.0]))
    recipe = recipe_file(tmp_path / "mine.json", spacing=[1, 1, 1])
    result = extract(tmp_path / "in", tmp_path / "out", "--recipe", recipe)
    assert result.code == 2
    assert "found an extent of 2.4e+04 x 2.8e+04 x 2e+04 mm, expected at most 1,073,741,824 voxels" in result.err


def test_n4_divides_a_smooth_field_out(extract: Callable[..., Outcome], tmp_path: Path) -> None:
    x, y, z = np.indices(SHAPE)
    ball = (x - 12) ** 2 + (y - 14) ** 2 + (z - 10) ** 2 < 81
    texture = 400 + 100 * ((x // 3 + y // 3 + z // 3) % 2)
    bias = np.exp((x - 12) / 24)

    def scan(_: np.ndarray) -> np.ndarray:
        return (texture * bias * ball).astype(np.float32)

    make_case(tmp_path / "in", change=dict.fromkeys(MODALITIES, scan))
    n4 = {"shrink_factor": 2, "iterations": [50, 50]}
    first = recipe_file(tmp_path / "a.json", bias_field_correction=n4, format="npy")
    for output in ("out", "again"):
        assert extract(tmp_path / "in", tmp_path / output, "--recipe", first).code == 0
    assert tree(tmp_path / "out") == tree(tmp_path / "again")
    assert extract(tmp_path / "in", tmp_path / "plain", "--format", "npy").code == 0

    def slope(output: str) -> float:
        image = pixels(tmp_path / output, index=10)
        columns = [image[:, c][image[:, c] > 0].mean() for c in range(8, 21)]
        return abs(float(np.polyfit(range(13), columns, 1)[0]))

    assert slope("out") < 0.5 * slope("plain")


def test_a_volume_that_n4_cannot_correct_is_one_line(
    extract: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("a\nb: no field")

    monkeypatch.setattr(sitk, "Shrink", fail)
    make_case(tmp_path / "in")
    recipe = recipe_file(tmp_path / "mine.json", bias_field_correction={"shrink_factor": 2})
    result = extract(tmp_path / "in", tmp_path / "out", "--recipe", recipe)
    assert result.code == 2
    assert result.skips == [
        f"vaevq-med: case {CASE}: {CASE}-t1n.nii.gz: found a volume that N4 cannot correct (b: no field), "
        "expected one with a smooth field; skipped"
    ]


# --- bad input --------------------------------------------------------------------------------------------


def of(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    """Write one volume of the bad case with other voxels."""

    def spoil(folder: Path) -> None:
        voxels = labels() if name == "seg" else volume()
        save(folder / f"{BAD}-{name}.nii.gz", change(voxels))

    return spoil


def header(change: Callable[[bytearray], None]) -> Callable[[Path], None]:
    """Change the header of the bad case's t1c."""

    def spoil(folder: Path) -> None:
        path = folder / f"{BAD}-t1c.nii.gz"
        content = bytearray(gzip.decompress(path.read_bytes()))
        change(content)
        path.write_bytes(gzip.compress(bytes(content), 1))

    return spoil


def put(offset: int, values: Any, dtype: str) -> Callable[[Path], None]:
    data = np.asarray(values, dtype).tobytes()
    return header(lambda content: content.__setitem__(slice(offset, offset + len(data)), data))


def cut(end: int) -> Callable[[Path], None]:
    return lambda folder: (
        (folder / f"{BAD}-t1c.nii.gz").write_bytes((folder / f"{BAD}-t1c.nii.gz").read_bytes()[:end]) and None
    )


def flip_byte(folder: Path) -> None:
    path = folder / f"{BAD}-t1c.nii.gz"
    content = bytearray(path.read_bytes())
    content[-6] ^= 0xFF  # in the checksum
    path.write_bytes(bytes(content))


def with_content(content: bytes, suffix: str = ".nii.gz") -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / f"{BAD}-t1c.nii.gz").unlink()
        (folder / f"{BAD}-t1c{suffix}").write_bytes(content)

    return spoil


def set_voxel(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(voxels: np.ndarray) -> np.ndarray:
        voxels = voxels.astype(np.float64 if abs(value) > 1e38 else np.float32)
        voxels[12, 12, 9] = value
        return voxels

    return change


def affine(matrix: np.ndarray, *, every: bool = True) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        for modality in MODALITIES if every else ("t1c",):
            save(folder / f"{BAD}-{modality}.nii.gz", volume(), matrix)

    return spoil


def truncated_mha(folder: Path) -> None:
    (folder / f"{BAD}-t1c.nii.gz").unlink()
    path = save(folder / f"{BAD}-t1c.mha", volume())
    path.write_bytes(path.read_bytes()[:-999])


def itk(image: sitk.Image, suffix: str = ".nrrd") -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / f"{BAD}-t1c.nii.gz").unlink()
        sitk.WriteImage(image, str(folder / f"{BAD}-t1c{suffix}"))

    return spoil


def rgb(folder: Path) -> None:
    voxels = np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")])
    nib.save(nib.Nifti1Image(voxels, RAS), folder / f"{BAD}-t1c.nii.gz")


def duplicate(folder: Path) -> None:
    shutil.copytree(folder, folder.parent / "copy" / BAD)


T1C = re.escape(f"{BAD}-t1c.nii.gz")
BAD_INPUT: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated gzip": (cut(-2000), f"{T1C}: found a truncated gzip stream, expected a whole one"),
    "truncated in the trailer": (cut(-3), f"{T1C}: found a truncated gzip stream, expected a whole one"),
    "truncated in the header": (cut(30), f"{T1C}: found a truncated gzip stream, expected a whole one"),
    "wrong checksum": (flip_byte, rf"{T1C}: found a corrupt gzip stream \(.*\), expected a whole one"),
    "corrupt gzip": (
        with_content(b"\x1f\x8b\x08" + b"not gzip" * 99),
        rf"{T1C}: found a corrupt gzip stream \(.*\), exp",
    ),
    "no gzip": (with_content(b"not gzip" * 99), f"{T1C}: found a file that is no NIfTI, expected one"),
    "empty file": (with_content(b""), f"{T1C}: found 0 bytes, expected a NIfTI header of 348 or more"),
    "empty gzip": (with_content(gzip.compress(b"")), f"{T1C}: found 0 bytes, expected a NIfTI header"),
    "no NIfTI": (with_content(b"text" * 500, ".nii"), "t1c.nii: found a file that is no NIfTI, expected one"),
    "half of a pair": (put(344, list(b"ni1\0"), "u1"), f"{T1C}: found a file that is no NIfTI, expected one"),
    "voxels cut off": (header(lambda c: c.__delitem__(slice(9000, None))), "found 9000 bytes, expected 27232 as the h"),
    "huge dimensions": (put(40, [3, 32767, 32767, 32767], "<i2"), "found dimensions 32767x32767x32767 in the header,"),
    "large dimensions": (put(40, [3, 1000, 1000, 1000], "<i2"), f"{T1C}: found 27232 bytes, expected 2000000352"),
    "negative dimensions": (put(40, [3, 24, -28, 20], "<i2"), "found dimensions 24x-28x20 in the header, expected 1"),
    "no dimensions": (put(40, [0, 24, 28, 20], "<i2"), "found dimensions 0 in the header, expected 1 to"),
    "unknown type": (put(70, 3333, "<i2"), f"{T1C}: found an unreadable volume .*, expected NIfTI, MetaImage or NRRD"),
    "offset far away": (put(108, 1e30, "<f4"), "found voxels from byte 1e.30 on, expected a short header"),
    "no offset": (put(108, np.nan, "<f4"), f"{T1C}: found an unreadable volume"),
    "slope beyond float": (
        put(112, [3e38, 0], "<f4"),
        rf"{T1C}: found an intensity of .*e.41, expected at most 3\.40.*e.38",
    ),
    "singular affine": (put(280, np.zeros(12), "<f4"), f"{T1C}: found an affine that is not invertible, expected one"),
    "NaN affine": (put(280, np.full(12, np.nan), "<f4"), f"{T1C}: found an affine that is not invertible, expected"),
    "RGB": (rgb, f"{T1C}: found voxels of type .*, expected one number each"),
    "complex": (
        of("t1c", lambda v: v.astype(np.complex64)),
        f"{T1C}: found voxels of type complex64, expected one num",
    ),
    "NaN": (of("t2f", set_voxel(np.nan)), "t2f.nii.gz: found 1 NaN or infinite voxels, expected finite ones"),
    "infinity": (of("t2f", set_voxel(np.inf)), "t2f.nii.gz: found 1 NaN or infinite voxels, expected finite ones"),
    "beyond float": (of("t2f", set_voxel(1e300)), r"t2f.nii.gz: found an intensity of 1e\+300, expected at most 3\.4"),
    "all zero": (of("t1c", np.zeros_like), f"{T1C}: found an all-zero volume, expected some nonzero voxels"),
    "one intensity": (of("t1c", lambda v: 7 * (v > 0).astype(np.int16)), f"{T1C}: found the same intensity 7 at perc"),
    "another shape": (
        of("t1c", lambda v: v[:-1]),
        f"{T1C}: found shape 23x28x20, expected 24x28x20 as {BAD}-t1n.nii.gz",
    ),
    "4D": (of("t1c", lambda v: np.stack([v, v], -1)), f"{T1C}: found a 4D volume of shape 24x28x20x2, expected a 3D"),
    "2D": (of("t1c", lambda v: v[..., 9]), f"{T1C}: found a 2D volume of shape 24x28, expected a 3D one"),
    "missing contrast": (
        lambda f: (f / f"{BAD}-t2w.nii.gz").unlink(),
        "missing t2w; found seg, t1c, t1n, t2f, expected",
    ),
    "duplicate case": (duplicate, rf"found a duplicate case name \({BAD}/.* and copy/{BAD}/.*\), expected one"),
    "oblique": (
        affine(turned(10)),
        r"found an oblique affine \(10.0 degrees off the axes\), expected at most 1; a rec",
    ),
    "oblong pixels": (
        affine(np.diag([1, 2, 1, 1.0])),
        "found axial pixels of 1 x 2 mm, expected square ones; a recipe",
    ),
    "another grid": (affine(np.diag([1, 1, 2, 1.0]), every=False), f"{T1C}: found a grid 20.0 mm away from that of"),
    "no slice left": (
        of("t1c", lambda v: v * (np.arange(SHAPE[0])[:, None, None] == 9)),
        "found no slice with 5% nonz",
    ),
    "unknown label": (
        of("seg", lambda v: v + np.uint8(5) * (v > 0)),
        r"found label 6, 7, 8, 9 in the segmentation, expected .*\(",
    ),
    "fractional label": (
        of("seg", lambda v: v * np.float32(0.5)),
        "seg.nii.gz: found the value 0.5 in the segmentation, expected whole lab",
    ),
    "large label": (
        of("seg", lambda v: v.astype(np.int16) * 99),
        "seg.nii.gz: found the value 297 in the segmentation, expected whole labels from 0 to 255",
    ),
    "labels of another shape": (
        of("seg", lambda v: v[:, 1:]),
        "seg.nii.gz: found shape 24x27x20, expected 24x28x20 as",
    ),
    "truncated MetaImage": (truncated_mha, "t1c.mha: found a truncated or corrupt volume, expected a whole one"),
    "no NRRD": (
        with_content(b"junk" * 99, ".nrrd"),
        "t1c.nrrd: found a file of no known format, expected MetaImage or",
    ),
    "vectors": (itk(sitk.Image(24, 28, 20, sitk.sitkVectorUInt8)), "found 3 axes and .* components, expected a scalar"),
    "picture": (itk(sitk.Image(24, 28, sitk.sitkUInt8)), "found 2 axes and 1 components, expected a scalar volume"),
}


@pytest.mark.parametrize("kind", BAD_INPUT)
def test_a_bad_case_is_one_line_and_the_others_go_on(
    extract: Callable[..., Outcome], tmp_path: Path, kind: str
) -> None:
    spoil, message = BAD_INPUT[kind]
    make_case(tmp_path / "in")
    make_case(tmp_path / "in", BAD, seg=labels())
    spoil(tmp_path / "in" / BAD)
    result = extract(tmp_path / "in", tmp_path / "out")
    assert result.code == 1
    (line,) = [line for line in result.err.splitlines() if line.startswith("vaevq-med:")]
    assert re.search(rf"^vaevq-med: case {BAD}: (.*{message}.*); skipped$", line), line
    assert "1 cases sliced, 0 were done, 1 skipped" in result.out
    assert len(entries(tmp_path / "out")) == 60
    assert {entry["case"] for entry in entries(tmp_path / "out")} == {CASE}
    assert [path.name for path in (tmp_path / "out/images").iterdir()] == [CASE]
    assert not (tmp_path / "out/labels").exists()
    (skip,) = json.loads((tmp_path / "out/report.json").read_text())["skipped"]
    assert skip["case"] == BAD
    assert skip["reason"] in line
    assert_clean(tmp_path / "out")


def test_a_file_that_vanishes_is_one_line(
    extract: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    make_case(tmp_path / "in")
    make_case(tmp_path / "in", BAD)
    found = slice_extract.find_cases

    def find_and_remove(*args: Any, **options: Any) -> Any:
        search = found(*args, **options)
        (tmp_path / "in" / BAD / f"{BAD}-t2w.nii.gz").unlink()
        return search

    monkeypatch.setattr(slice_extract, "find_cases", find_and_remove)
    result = extract(tmp_path / "in", tmp_path / "out")
    assert result.code == 1
    assert result.skips == [
        f"vaevq-med: case {BAD}: {BAD}-t2w.nii.gz: found no readable file (No such file or directory), "
        "expected a volume; skipped"
    ]


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("[enforce fail] can't allocate memory\nmore lines")])
def test_want_of_memory_is_one_line(
    extract: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception
) -> None:
    make_case(tmp_path / "in")
    make_case(tmp_path / "in", BAD)
    resize = slices.resize_images
    calls = iter([None] * 4)

    def fail(*args: Any) -> Any:
        if next(calls, error) is error:
            raise error
        return resize(*args)

    monkeypatch.setattr(slices, "resize_images", fail)
    result = extract(tmp_path / "in", tmp_path / "out")
    assert result.code == 1
    (line,) = result.skips
    assert line.startswith(f"vaevq-med: case {BAD}: found a case that cannot be computed (")
    assert_clean(tmp_path / "out")


def test_when_every_case_is_bad_nothing_is_done(extract: Callable[..., Outcome], tmp_path: Path) -> None:
    make_case(tmp_path / "in", change={"t1n": np.zeros_like})
    for option in ((), ("--dry-run",)):
        result = extract(tmp_path / "in", tmp_path / "out", *option)
        assert result.code == 2
        assert "found no case that could be sliced (1 skipped), expected at least one" in result.err
        assert not (tmp_path / "out/dataset.json").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--workers", 0), "workers: found 0, expected 1 to 512"),
        (("--workers", 100_000), "workers: found 100000, expected 1 to 512"),
        (("--size", 7), "size is 7; expected 8 to 4096 pixels"),
        (("--size", 10**9), "size is 1000000000; expected 8 to 4096 pixels"),
        (("--size", "big"), "Invalid value for '--size'"),
        (("--format", "jpg"), "Invalid value for '--format'"),
        (("--label-map", "brats"), "label map: found 'brats', expected one of brats2021"),
        (("--assume-orientation", "left"), "orientation is 'left'; expected three letters"),
        (("--accept", "all"), "accept is 'all'; expected one of background, clipping, saturation"),
        (("--recipe", "brats24/axial"), "found no preprocessing/brats24/axial.json, expected one of"),
        (("--recipe", "gone.json"), "recipe gone.json: found no readable file"),
        (("--cases", "gone.csv"), "cases gone.csv: found no readable CSV"),
        (("--split-file", "gone.csv"), "split file gone.csv: found no readable file"),
    ],
)
def test_a_bad_option_is_refused(
    extract: Callable[..., Outcome], tmp_path: Path, args: tuple[object, ...], message: str
) -> None:
    make_case(tmp_path / "in")
    result = extract(tmp_path / "in", tmp_path / "out", *args)
    assert result.code == 2
    assert message in result.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "found nothing, expected a folder of cases"),
        (lambda p: p.write_text("x"), "found a file, expected a folder of cases"),
        (lambda p: p.mkdir(), "found no case, expected BraTS or Decathlon names"),
    ],
)
def test_an_input_without_cases_is_refused(
    extract: Callable[..., Outcome], tmp_path: Path, make: Any, message: str
) -> None:
    make(tmp_path / "in")
    result = extract(tmp_path / "in", tmp_path / "out")
    assert result.code == 2
    assert result.err == f"vaevq-med: input {tmp_path / 'in'}: {message}" + result.err.partition(message)[2]
    assert result.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_something_else_is_refused(extract: Callable[..., Outcome], tmp_path: Path) -> None:
    make_case(tmp_path / "in")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("mine")
    before = tree(tmp_path)
    for output, message in (
        ("file", "found a file, expected a folder or nothing"),
        ("file/below", "found it not writable (Not a directory), expected a folder with room to write"),
        ("a" * 300, "found it not writable (File name too long), expected"),
        ("full", "found a folder with other things in it, expected none, an empty one, or one of an earlier"),
        ("in", "found no case"),
    ):
        result = extract(tmp_path / "in", tmp_path / output)
        assert result.code == 2
        assert message in result.err
        assert result.err.count("\n") == 1
        assert tree(tmp_path) == before


def test_an_output_that_cannot_be_written_is_refused(
    extract: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    make_case(tmp_path / "in")

    def fail(*args: object, **options: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(workplace, "atomic_write_text", fail)
    result = extract(tmp_path / "in", tmp_path / "out")
    assert result.code == 2
    assert result.err == (
        f"vaevq-med: output {tmp_path / 'out'}: found it not writable (Read-only file system), "
        "expected a folder with room to write\n"
    )


# --- a full disk ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_ends_the_run_and_the_next_goes_on(
    extract: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, workers: int
) -> None:
    for number in range(4):
        make_case(tmp_path / "in", f"BraTS-GLI-{number:05d}-000", seg=labels(), seed=number)
    write = slices._Writer._write

    def fail(self: Any, relative: str, content: bytes) -> None:
        if "00002-000-t1c-z009" in relative:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, relative, content)

    with monkeypatch.context() as patch:
        patch.setattr(threading, "active_count", lambda: 1)  # fork, whatever threads other tests left
        patch.setattr(slices._Writer, "_write", fail)
        result = extract(tmp_path / "in", tmp_path / "out", "--workers", workers)
    assert result.code == 2
    (line,) = [line for line in result.err.splitlines() if line.startswith("vaevq-med:")]
    assert line == (
        "vaevq-med: case BraTS-GLI-00002-000: found no room or no permission to write (No space left on device), "
        "expected a disk with free space; the finished cases are kept, the same command goes on from there"
    )
    assert not (tmp_path / "out/images/BraTS-GLI-00002-000").exists()
    assert_clean(tmp_path / "out")
    result = extract(tmp_path / "in", tmp_path / "out")
    assert result.code == 0
    kept = int(re.search(r"(\d) were done", result.out)[1])  # type: ignore[index]
    assert kept >= (2 if workers == 1 else 1)
    assert_clean(tmp_path / "out")


@pytest.mark.parametrize("name", ["atomic_write_text", "write_manifest"])
def test_no_room_for_the_datalist_keeps_the_cases(
    extract: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    make_case(tmp_path / "in")
    original = getattr(job, name)

    def fail(path: Path, content: Any) -> Any:
        if path.name == "recipe.sha256":
            return original(path, content)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(job, name, fail)
        result = extract(tmp_path / "in", tmp_path / "out")
    assert result.code == 2
    assert "found it not writable (No space left on device), expected a folder with room to write" in result.err
    assert not (tmp_path / "out/dataset.json").exists()
    assert_clean(tmp_path / "out")
    result = extract(tmp_path / "in", tmp_path / "out")
    assert (result.code, "0 cases sliced, 1 were done" in result.out) == (0, True)


# --- going on after an interruption -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Twelve cases of six patients, and what one worker makes of them in one go."""
    root = tmp_path_factory.mktemp("many")
    for number in range(12):
        make_case(root / "in", f"BraTS-GLI-{number // 2:05d}-{100 + number % 2}", seg=labels(), seed=number)
    recipe = Recipe.load("brats24/axial_256").changed(size=192)
    Prepare(slice_extract.VolumeSource(root / "in", recipe), root / "out", workers=1).run()
    return root / "in", root / "out"


def test_the_number_of_workers_changes_no_byte(
    many: tuple[Path, Path], extract: Callable[..., Outcome], tmp_path: Path
) -> None:
    result = extract(many[0], tmp_path / "out", "--size", 192, "--workers", 2)
    assert (result.code, "12 cases sliced" in result.out) == (0, True)
    assert tree(tmp_path / "out") == tree(many[1])


def test_a_killed_run_is_taken_up(many: tuple[Path, Path], extract: Callable[..., Outcome], tmp_path: Path) -> None:
    output = tmp_path / "out"
    command = [sys.executable, "-m", "vaevq_med.cli.app", "slice-extract", many[0], output, "--size", 192]
    process = subprocess.Popen([str(part) for part in [*command, "--workers", 2]], stderr=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while len(list((output / ".slices").glob("*.json"))) < 2:
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    while _busy(output):  # the workers notice within a second that their parent has gone
        assert time.monotonic() < end
    assert not (output / "dataset.json").exists()
    finished = {path: path.stat().st_mtime_ns for path in (output / ".slices").glob("*.json")}
    assert 2 <= len(finished) < 12
    result = extract(many[0], output, "--size", 192)
    assert (result.code, f"{12 - len(finished)} cases sliced, {len(finished)} were done" in result.out) == (0, True)
    assert all(path.stat().st_mtime_ns == before for path, before in finished.items())
    assert tree(output) == tree(many[1])


def _busy(output: Path) -> bool:
    """Whether a worker of the killed run still writes, so that a file may be gone while it is looked at."""
    try:
        before = tree(output)
        time.sleep(1.5)
        return tree(output) != before
    except FileNotFoundError:
        return True


@pytest.mark.skipif(sys.platform != "linux", reason="needs workers that are forked")
def test_a_terminated_run_finishes_the_cases_at_hand(
    many: tuple[Path, Path], extract: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The signal comes from a worker, in the middle of its second case."""
    output, original, parent = tmp_path / "out", slices.resize_labels, os.getpid()
    calls = iter(range(99))

    def terminate(*args: Any) -> Any:
        if next(calls) == 1:
            with contextlib.suppress(FileExistsError):  # the other worker was first
                (tmp_path / "sent").touch(exist_ok=False)
                os.kill(parent, signal.SIGTERM)
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(threading, "active_count", lambda: 1)  # fork, whatever threads other tests left
        patch.setattr(slices, "resize_labels", terminate)
        result = extract(many[0], output, "--size", 192, "--workers", 2)
    assert result.code == 130
    assert result.err.rstrip().endswith("vaevq-med: interrupted; finished cases are kept, and the same command goes on")
    assert not (output / "dataset.json").exists()
    assert_clean(output)
    finished = len(list((output / ".slices").glob("*.json")))
    assert 2 <= finished < 12
    assert f"{12 - finished} cases sliced, {finished} were done" in extract(many[0], output, "--size", 192).out
    assert tree(output) == tree(many[1])


def test_an_interrupt_in_the_only_process(
    many: tuple[Path, Path], extract: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    original = slices.resize_labels
    calls = iter(range(99))

    def interrupted(*args: Any) -> Any:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(slices, "resize_labels", interrupted)
        result = extract(many[0], tmp_path / "out", "--size", 192)
    assert result.code == 130
    assert "interrupted; finished cases are kept, and the same command goes on" in result.err
    assert_clean(tmp_path / "out")
    assert "9 cases sliced, 3 were done" in extract(many[0], tmp_path / "out", "--size", 192).out
    assert tree(tmp_path / "out") == tree(many[1])


@pytest.mark.parametrize("moved", [0, 1, 2])
def test_a_death_while_a_case_is_moved_into_place(
    many: tuple[Path, Path],
    extract: Callable[..., Outcome],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    moved: int,
) -> None:
    """Die after images, or images and labels, have moved, and before the record is written."""
    script = tmp_path / "in"
    shutil.copytree(many[0] / "BraTS-GLI-00000-100", script / "BraTS-GLI-00000-100", copy_function=shutil.copy2)
    output, replace_ = tmp_path / "out", os.replace
    calls = iter(range(99))

    class DeathError(BaseException):
        pass

    def die(source: Any, target: Any) -> None:
        if ".partial" in str(source) and next(calls) == moved:
            raise DeathError
        replace_(source, target)

    def die_at_the_record(path: Path, text: str) -> None:
        if path.suffix == ".json":
            raise DeathError
        write(path, text)

    write = workplace.atomic_write_text
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", die)
        patch.setattr(workplace, "atomic_write_text", die_at_the_record)
        patch.setattr(shutil, "rmtree", lambda *args, **options: None)  # a killed process cleans nothing up
        with pytest.raises(DeathError):
            extract(script, output, "--size", 192)
    assert (output / ".slices/BraTS-GLI-00000-100.partial").is_dir()
    assert not (output / "dataset.json").exists()
    result = extract(script, output, "--size", 192)
    assert (result.code, "1 cases sliced" in result.out) == (0, True)
    assert_clean(output)
    expected = tree(many[1])
    found = {name: data for name, data in tree(output).items() if name.startswith(("images", "labels", ".slices/B"))}
    assert found == {name: data for name, data in expected.items() if "BraTS-GLI-00000-100" in name}


def test_what_a_killed_run_left_is_cleared(extract: Callable[..., Outcome], tmp_path: Path) -> None:
    make_case(tmp_path / "in")
    output = tmp_path / "out"
    assert extract(tmp_path / "in", output).code == 0
    before = tree(output)
    (output / ".slices/BraTS-GLI-00009-000.partial/images").mkdir(parents=True)
    (output / ".slices/BraTS-GLI-00009-000.partial/images/x.png").write_bytes(b"half")
    for name in (
        ".dataset.json.abc_1x2y",
        ".slices/.BraTS-GLI-00009-000.json.abc",
        ".slices/.recipe.sha256.x",
        ".report.json.y_1234ab",
    ):
        (output / name).write_bytes(b"half")
    assert extract(tmp_path / "in", output).code == 0
    assert tree(output) == before
    assert_clean(output)


@pytest.mark.parametrize(
    "damage",
    [
        lambda out: next(out.glob("images/*/*.png")).unlink(),
        lambda out: next(out.glob("images/*/*.png")).write_bytes(b""),
        lambda out: shutil.rmtree(out / "labels"),
        lambda out: (out / f".slices/{CASE}.json").unlink(),
        lambda out: (out / f".slices/{CASE}.json").write_text("{"),
        lambda out: (out / f".slices/{CASE}.json").write_text("[]"),
        lambda out: (out / f".slices/{CASE}.json").write_text("{}"),
        lambda out: (out / f"images/{CASE}/more.png").write_bytes(b""),
    ],
)
def test_a_damaged_case_is_redone_and_no_other(
    extract: Callable[..., Outcome], tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    make_case(tmp_path / "in", seg=labels())
    make_case(tmp_path / "in", BAD)
    output = tmp_path / "out"
    assert extract(tmp_path / "in", output).code == 0
    before = tree(output)
    damage(output)
    result = extract(tmp_path / "in", output)
    redone = 2 if not (output / "images").exists() else 1
    assert f"{redone} cases sliced, {2 - redone} were done" in result.out
    assert tree(output) == before


def test_a_second_run_writes_no_image(extract: Callable[..., Outcome], tmp_path: Path) -> None:
    make_case(tmp_path / "in", seg=labels())
    output = tmp_path / "out"
    assert extract(tmp_path / "in", output).code == 0
    before, times = tree(output), {path: path.stat().st_mtime_ns for path in output.glob("[il]*/*/*")}
    result = extract(tmp_path / "in", output)
    assert (result.code, "0 cases sliced, 1 were done, 0 skipped" in result.out) == (0, True)
    assert tree(output) == before
    assert {path: path.stat().st_mtime_ns for path in output.glob("[il]*/*/*")} == times


def test_a_changed_volume_is_sliced_again(extract: Callable[..., Outcome], tmp_path: Path) -> None:
    make_case(tmp_path / "in")
    output = tmp_path / "out"
    assert extract(tmp_path / "in", output).code == 0
    first = load_manifest(output)
    save(tmp_path / f"in/{CASE}/{CASE}-t1c.nii.gz", volume(99))
    assert "1 cases sliced, 0 were done" in extract(tmp_path / "in", output).out
    second = load_manifest(output)
    assert second.content_hash != first.content_hash
    assert second.split_hash == first.split_hash
    make_case(tmp_path / "in")
    assert "1 cases sliced" in extract(tmp_path / "in", output).out
    assert load_manifest(output).content_hash == first.content_hash


def test_a_case_that_was_mended_joins(extract: Callable[..., Outcome], tmp_path: Path) -> None:
    make_case(tmp_path / "in")
    make_case(tmp_path / "in", BAD, change={"t1c": np.zeros_like})
    output = tmp_path / "out"
    assert extract(tmp_path / "in", output).code == 1
    make_case(tmp_path / "in", BAD)
    result = extract(tmp_path / "in", output)
    assert (result.code, "1 cases sliced, 1 were done, 0 skipped" in result.out) == (0, True)
    assert len(entries(output)) == 120


def test_a_case_that_went_bad_leaves_the_datalist(extract: Callable[..., Outcome], tmp_path: Path) -> None:
    make_case(tmp_path / "in")
    make_case(tmp_path / "in", BAD)
    output = tmp_path / "out"
    assert extract(tmp_path / "in", output).code == 0
    make_case(tmp_path / "in", BAD, change={"t1c": np.zeros_like})
    result = extract(tmp_path / "in", output)
    assert result.code == 1
    assert f"folders of cases that are not part of this data set were left: 1 ({BAD})" in result.out
    assert {entry["case"] for entry in entries(output)} == {CASE}


def test_slices_of_another_recipe_are_kept_unless_told(extract: Callable[..., Outcome], tmp_path: Path) -> None:
    make_case(tmp_path / "in")
    output = tmp_path / "out"
    assert extract(tmp_path / "in", output).code == 0
    before = tree(output)
    for options in ((), ("--dry-run",)):
        result = extract(tmp_path / "in", output, "--size", 32, *options)
        assert result.code == 2
        assert f"found slices made by another recipe (size {SIDE}, expected 32), expected those of" in result.err
        assert "--overwrite" in result.err
        assert tree(output) == before
    assert extract(tmp_path / "in", output, "--size", 32, "--overwrite").code == 0
    assert pixels(output).shape == (32, 32)
    assert extract(tmp_path / "in", output, "--overwrite").code == 0
    assert tree(output) == before


def test_one_run_at_a_time(extract: Callable[..., Outcome], tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    make_case(tmp_path / "in")
    output = tmp_path / "out"
    assert extract(tmp_path / "in", output).code == 0
    before = tree(output)
    with (output / ".slices/lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for options in ((), ("--size", 32, "--overwrite")):
            result = extract(tmp_path / "in", output, *options)
            assert result.code == 2
            assert "found another slice-extract at work in it, expected none" in result.err
    assert tree(output) == before


# --- dry run, splits and audit ------------------------------------------------------------------------------


def test_a_dry_run_writes_nothing_and_estimates_well(extract: Callable[..., Outcome], tmp_path: Path) -> None:
    make_case(tmp_path / "in", seg=labels())
    make_case(tmp_path / "in", BAD, seg=labels())
    before = tree(tmp_path)
    result = extract(tmp_path / "in", tmp_path / "out", "--dry-run")
    assert result.code == 0
    assert tree(tmp_path) == before
    assert not (tmp_path / "out").exists()
    assert "would slice 2 cases; 0 are done already" in result.out
    assert "about 120 images" in result.out
    plan = Prepare(slice_extract.VolumeSource(tmp_path / "in", Recipe(name="x", size=SIDE)), tmp_path / "out").plan()
    assert extract(tmp_path / "in", tmp_path / "out").code == 0
    written = sum(path.stat().st_size for path in (tmp_path / "out").glob("[il]*/*/*"))
    assert plan.estimate.bytes == pytest.approx(written, rel=0.05)
    result = extract(tmp_path / "in", tmp_path / "out", "--dry-run")
    assert (result.code, "would slice 0 cases; 2 are done already" in result.out) == (0, True)


def test_losses_are_shown_and_accepted_by_name(extract: Callable[..., Outcome], tmp_path: Path) -> None:
    """Of t2w the voxels below 300 are clipped, and all that is brighter than 600 has one intensity."""

    def spoil(voxels: np.ndarray) -> np.ndarray:
        return np.where(voxels > 0, np.minimum(voxels, 600) - 300, 0).astype(np.int16)

    make_case(tmp_path / "in", change={"t2w": spoil})
    for name, accepted in (("clipping", ()), ("saturation", ("--accept", "clipping"))):
        for option in ((), ("--dry-run",)):
            result = extract(tmp_path / "in", tmp_path / "out", *accepted, *option)
            assert result.code == 2
            (line,) = result.skips
            assert f"{CASE}-t2w.nii.gz" in line
            assert line.endswith(f"--accept {name}; skipped")
    for option in (("--dry-run",), ()):
        both = ("--accept", "clipping", "--accept", "saturation")
        result = extract(tmp_path / "in", tmp_path / "out", *both, *option)
        assert result.code == 0
        clipped = np.count_nonzero(spoil(volume(2)) < 0) / np.count_nonzero(spoil(volume(2)))
        (line,) = [line for line in result.out.splitlines() if "clipped of the foreground" in line]
        assert line.endswith(f"t1n 0%, t1c 0%, t2w {100 * clipped:.3g}%, t2f 0%")
        assert "t2w.nii.gz: clipping was accepted" in result.out
        assert "t2w.nii.gz: saturation was accepted" in result.out


def test_an_orientation_is_assumed_where_the_user_names_it(extract: Callable[..., Outcome], tmp_path: Path) -> None:
    make_case(tmp_path / "in")
    for path in (tmp_path / "in" / CASE).iterdir():
        content = bytearray(gzip.decompress(path.read_bytes()))
        content[252:256] = bytes(4)  # qform_code and sform_code
        path.write_bytes(gzip.compress(bytes(content), 1))
    assert "--assume-orientation" in extract(tmp_path / "in", tmp_path / "out").skips[0]
    result = extract(tmp_path / "in", tmp_path / "out", "--assume-orientation", "RAS")
    assert result.code == 0
    assert "RAS was assumed" in result.out
    low, high = np.percentile(volume()[volume() != 0], (0, 99.5))
    expected = np.clip((upright(volume())[8] - low) / (high - low), 0, 1)
    np.testing.assert_allclose(pixels(tmp_path / "out")[:, 2:26] * 255, expected * 255, atol=0.501)


def test_a_dry_run_names_what_it_would_skip(extract: Callable[..., Outcome], tmp_path: Path) -> None:
    make_case(tmp_path / "in", BAD)
    make_case(tmp_path / "in", change={"t1c": np.zeros_like})
    make_case(tmp_path / "in", "BraTS-GLI-00003-000")
    (tmp_path / "in/BraTS-GLI-00003-000/BraTS-GLI-00003-000-t2w.nii.gz").unlink()
    result = extract(tmp_path / "in", tmp_path / "out", "--dry-run")
    assert (result.code, len(result.skips)) == (1, 2)
    assert "would slice 1 cases" in result.out
    assert "about 60 images" in result.out


def test_timepoints_of_a_patient_stay_together(many: tuple[Path, Path]) -> None:
    content = load_manifest(many[1]).content
    places: dict[str, set[str]] = {}
    for split in ("training", "validation", "test"):
        for entry in content[split]:
            places.setdefault(entry["case"][:-4], set()).add(split)
    assert len(places) == 6
    assert all(len(found) == 1 for found in places.values())


def test_a_split_file_deals_patients_without_slicing_again(
    many: tuple[Path, Path], call: Callable[..., Outcome], extract: Callable[..., Outcome], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    shutil.copytree(many[1], output)
    splits = {f"BraTS-GLI-{n:05d}": ("training", "validation", "test")[n // 2] for n in range(6)}
    (tmp_path / "s.json").write_text(json.dumps(splits))
    result = extract(many[0], output, "--size", 192, "--split-file", tmp_path / "s.json")
    assert (result.code, "0 cases sliced, 12 were done" in result.out) == (0, True)
    assert "training: 2 patients, 240 slices" in result.out
    content = load_manifest(output).content
    assert all(splits[e["patient"]] == s for s in ("training", "validation", "test") for e in content[s])
    assert load_manifest(output).content_hash == load_manifest(many[1]).content_hash
    assert load_manifest(output).split_hash != load_manifest(many[1]).split_hash
    result = call("audit-split", output)
    assert (result.code, result.err) == (0, "")
    assert "no patient stands in two splits" in result.out
    (tmp_path / "s.json").write_text(json.dumps({"BraTS-GLI-00000": "test"}))
    result = extract(many[0], output, "--size", 192, "--split-file", tmp_path / "s.json")
    assert result.code == 2
    assert "found no patient BraTS-GLI-00001 and 4 more, expected every patient of the input" in result.err


@pytest.mark.parametrize("renamed", [False, True])
def test_an_audit_fails_on_a_leak(
    many: tuple[Path, Path], call: Callable[..., Outcome], tmp_path: Path, renamed: bool
) -> None:
    content = json.loads((many[1] / "dataset.json").read_text())
    everything = [entry for split in ("training", "validation", "test") for entry in content[split]]
    leak = [entry for entry in everything if entry["case"] == "BraTS-GLI-00003-101"]
    rest = [entry for entry in everything if entry["case"] != "BraTS-GLI-00003-101"]
    if renamed:
        leak = [{**entry, "patient": "somebody else"} for entry in leak]
    (tmp_path / "dataset.json").write_text(json.dumps({**content, "training": rest, "validation": [], "test": leak}))
    result = call("audit-split", tmp_path)
    assert result.code == 1
    assert result.err == "vaevq-med: patient BraTS-GLI-00003 stands in training and test\n"
    assert "1 leaks" in result.out
    assert "its split hash does not match" in result.out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "found no data set, expected one made by: vaevq-med slice-extract"),
        ("{", "found an unreadable file"),
        ("[]", "found no lists training, validation, test"),
        ('{"training": [{}], "validation": [], "test": []}', "training[0]: found no image"),
        (
            '{"training": [{"image": "a", "patient": "b"}], "validation": [], "test": []}',
            "training[0]: found no case, expected image, patient, case",
        ),
    ],
)
def test_an_audit_of_no_data_set_is_refused(
    call: Callable[..., Outcome], tmp_path: Path, text: str | None, message: str
) -> None:
    if text is not None:
        (tmp_path / "dataset.json").write_text(text)
    result = call("audit-split", tmp_path)
    assert result.code == 2
    assert message in result.err
    assert result.err.count("\n") == 1


# --- fuzz, and the real sample ------------------------------------------------------------------------------


@settings(deadline=None, max_examples=150)
@given(st.lists(st.tuples(st.integers(0, 351), st.integers(0, 255)), min_size=1, max_size=6))
def test_any_nifti_header_is_read_or_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]]
) -> None:
    content = bytearray(nib.Nifti1Image(np.ones((5, 6, 7), np.int16), RAS).to_bytes())
    for position, value in changes:
        content[position] = value
    path = tmp_path_factory.getbasetemp() / "fuzz.nii"
    path.write_bytes(bytes(content))
    stream = io.StringIO()
    try:
        voxels, affine = read_volume(path)
        assert voxels.dtype.kind in "biuf"
        assert affine.shape == (4, 4)
    except DataError as error:
        stream.write(str(error))
        assert stream.getvalue().startswith("fuzz.nii: found ")
        assert "\n" not in stream.getvalue()


@pytest.mark.sampledata
def test_a_real_case_against_numpy(sample_data: Path, extract: Callable[..., Outcome], tmp_path: Path) -> None:
    """240x240 pixels keep their size, so every pixel can be compared; the scan is stored in LPS."""
    case = "BraTS-GLI-07294-100"
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / case).symlink_to(sample_data / "brats-sample" / case)
    recipe = recipe_file(tmp_path / "mine.json", size=240, modalities=["t1c"])
    assert extract(tmp_path / "in", tmp_path / "out", "--recipe", recipe).code == 0
    image = nib.as_closest_canonical(nib.load(sample_data / "brats-sample" / case / f"{case}-t1c.nii.gz"))
    voxels = np.maximum(image.get_fdata(), 0)
    low, high = np.percentile(voxels[voxels != 0], (0, 99.5))
    found = entries(tmp_path / "out")
    kept = [z for z in range(voxels.shape[2]) if (voxels[:, :, z] != 0).mean() >= 0.05]
    assert [entry["slice"] for entry in found] == kept
    for entry in found[::20]:
        side = max(voxels.shape[:2])
        expected = np.clip((voxels[::-1, ::-1, entry["slice"]].T - low) / (high - low), 0, 1)
        stored = read_image(tmp_path / "out" / entry["image"])[0].numpy()
        if expected.shape == (side, side) == stored.shape:
            np.testing.assert_allclose(stored * 255, expected * 255, atol=0.51)
        assert entry["segmentation"]
