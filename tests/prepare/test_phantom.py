"""Synthetic subjects: their geometry, contrasts, labels, files, and what happens on bad options."""

from __future__ import annotations

import errno
import gzip
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from vaevq_med.cli import app as cli
from vaevq_med.core.errors import DataError, VaevqMedError
from vaevq_med.prepare.phantom import anatomy as phantom_anatomy
from vaevq_med.prepare.phantom import subjects as phantom
from vaevq_med.prepare.phantom.anatomy import deform, magnify, make_grid, smooth_noise
from vaevq_med.prepare.phantom.subjects import Label, PhantomConfig, PhantomScan, synthesize_subject, write_phantoms

SHAPE = (48, 56, 48)
CONTRASTS = ("t1n", "t1c", "t2w", "t2f")


@pytest.fixture(scope="module")
def before() -> PhantomScan:
    return synthesize_subject(3, 100, PhantomConfig(shape=SHAPE))


@pytest.fixture(scope="module")
def after() -> PhantomScan:
    return synthesize_subject(3, 101, PhantomConfig(shape=SHAPE))


@pytest.fixture(scope="module")
def scans(before: PhantomScan, after: PhantomScan) -> list[PhantomScan]:
    return [synthesize_subject(k, config=PhantomConfig(shape=SHAPE)) for k in (1, 2, 4, 5)] + [before, after]


def _files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# --- geometry -----------------------------------------------------------------------------------------


def test_full_grid_is_the_mni152_grid_of_fsl() -> None:
    expected = [[-1, 0, 0, 90], [0, 1, 0, -126], [0, 0, 1, -72], [0, 0, 0, 1]]
    np.testing.assert_allclose(make_grid((182, 218, 182)).affine, expected)


@given(st.tuples(*[st.integers(24, 260)] * 3))
def test_every_grid_has_the_same_field_of_view(shape: tuple[int, int, int]) -> None:
    affine = make_grid(shape).affine
    first = affine @ [-0.5, -0.5, -0.5, 1]
    last = affine @ [*(n - 0.5 for n in shape), 1]
    np.testing.assert_allclose(first[:3], [90.5, -126.5, -72.5], atol=1e-9)
    np.testing.assert_allclose(last[:3], [-91.5, 91.5, 109.5], atol=1e-9)


@pytest.mark.parametrize("spacing", [7.0, 31.0])
def test_smooth_noise_is_the_cubic_spline_of_scipy(spacing: float) -> None:
    axes = [np.linspace(80, -80, 9, dtype=np.float32), np.linspace(-110, 80, 7), np.linspace(-70, 90, 8)]
    field = smooth_noise(np.random.default_rng(5), spacing, axes)
    count = int(np.ceil(250 / spacing)) + 4
    knots = np.random.default_rng(5).standard_normal((count,) * 3, dtype=np.float32).astype(np.float64)
    where = np.stack(np.meshgrid(*[(np.asarray(a, float) + 130) / spacing + 1 for a in axes], indexing="ij"))
    expected = ndimage.map_coordinates(knots, where, order=3, prefilter=False) / (151 / 315) ** 1.5
    np.testing.assert_allclose(field, expected, atol=2e-5)


def test_smooth_noise_has_zero_mean_and_unit_variance() -> None:
    axes = make_grid((91, 109, 91)).axes
    field = smooth_noise(np.random.default_rng(0), 5.0, axes)
    assert abs(field.mean()) < 0.02
    assert field.std() == pytest.approx(1.0, abs=0.03)


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_the_deformation_does_not_fold(seed: int) -> None:
    axes = make_grid((61, 73, 61)).axes
    points = deform(np.random.default_rng(seed), axes, 1.5)
    jacobian = np.stack([np.stack(np.gradient(component, *axes)) for component in points])
    assert np.linalg.det(np.moveaxis(jacobian, (0, 1), (-2, -1))).min() > 0


@given(st.floats(0, 0.95), st.floats(2, 40))
def test_magnify_keeps_the_order_along_a_ray(strength: float, reach: float) -> None:
    ray = np.linspace(0, 100, 400, dtype=np.float32)
    points = np.stack([ray, 0 * ray, 0 * ray])
    moved = magnify(points, (0, 0, 0), strength, reach)[0]
    assert np.all(np.diff(moved) > 0)
    assert np.all(moved <= ray)


def test_a_patient_is_the_same_person_at_every_shape(before: PhantomScan) -> None:
    finer = synthesize_subject(3, 100, PhantomConfig(shape=(64, 76, 64)))
    volumes, centers = [], []
    for scan in (before, finer):
        volumes.append((scan.volumes["t1n"] > 0).sum() * abs(np.linalg.det(scan.affine[:3, :3])))
        centers.append(nib.affines.apply_affine(scan.affine, np.argwhere(scan.volumes["seg"] > 0).mean(0)))
    assert volumes[0] == pytest.approx(volumes[1], rel=0.03)
    assert np.linalg.norm(centers[0] - centers[1]) < 3.0


# --- what is in a scan ----------------------------------------------------------------------------------


def test_volumes_have_the_configured_shape_and_types(before: PhantomScan) -> None:
    assert set(before.volumes) == {*CONTRASTS, "seg"}
    assert all(volume.shape == SHAPE for volume in before.volumes.values())
    assert all(before.volumes[name].dtype == np.int16 for name in CONTRASTS)
    assert before.volumes["seg"].dtype == np.uint8


def test_brains_are_one_piece_of_human_size_in_an_exactly_zero_background(scans: list[PhantomScan]) -> None:
    for scan in scans:
        brain = scan.volumes["t1n"] > 0
        for name in CONTRASTS:
            assert scan.volumes[name].min() == 0
            np.testing.assert_array_equal(scan.volumes[name] > 0, brain)
        assert ndimage.label(brain)[1] == 1
        assert 1.2 < brain.sum() * abs(np.linalg.det(scan.affine[:3, :3])) / 1e6 < 2.6
        for axis in range(3):
            plane = np.moveaxis(brain, axis, 0)
            assert not plane[-1].any()
            assert axis == 2 or not plane[0].any()


def test_patients_differ(scans: list[PhantomScan]) -> None:
    first, second = scans[0].volumes["t1n"] > 0, scans[1].volumes["t1n"] > 0
    dice = 2 * (first & second).sum() / (first.sum() + second.sum())
    assert 0.8 < dice < 0.98


def test_the_tumor_lies_in_the_brain_and_is_nested(scans: list[PhantomScan]) -> None:
    for scan in scans:
        seg = scan.volumes["seg"]
        assert not seg[scan.volumes["t1n"] == 0].any()
        found = set(np.unique(seg))
        assert {0, Label.NETC, Label.SNFH, Label.ET} <= found <= {0, *Label}
        core = np.isin(seg, (Label.NETC, Label.ET, Label.RC))
        depth = ndimage.distance_transform_edt(core)
        assert depth[seg == Label.NETC].mean() > depth[seg == Label.ET].mean()
        edema = ndimage.binary_dilation(core, iterations=8) & (seg == Label.SNFH)
        assert edema.sum() > 0.9 * (seg == Label.SNFH).sum()


def test_the_rim_wraps_the_necrosis_and_the_edema_the_rim() -> None:
    seg = synthesize_subject(4, config=PhantomConfig(shape=(91, 109, 91))).volumes["seg"]

    def neighbors(label: Label) -> np.ndarray:
        return seg[ndimage.binary_dilation(seg == label) & (seg != label)]

    assert (neighbors(Label.NETC) == Label.ET).mean() > 0.75
    assert np.isin(neighbors(Label.ET), (Label.NETC, Label.SNFH)).mean() > 0.8


def test_only_scans_after_surgery_have_a_cavity(scans: list[PhantomScan]) -> None:
    cavity = {scan.name: bool((scan.volumes["seg"] == Label.RC).any()) for scan in scans}
    assert cavity == {
        "BraTS-GLI-90001-100": False,
        "BraTS-GLI-90002-100": True,
        "BraTS-GLI-90003-100": False,
        "BraTS-GLI-90003-101": True,
        "BraTS-GLI-90004-100": False,
        "BraTS-GLI-90005-100": True,
    }


def test_tumor_contrasts(scans: list[PhantomScan]) -> None:
    for scan in scans:
        seg = scan.volumes["seg"]
        healthy = ~ndimage.binary_dilation(seg > 0, iterations=2) & (scan.volumes["t1n"] > 0)
        level = {
            name: {
                label: scan.volumes[name][seg == label].mean() / np.median(scan.volumes[name][healthy])
                for label in Label
                if (seg == label).any()
            }
            for name in CONTRASTS
        }
        netc, snfh, et, rc = Label
        assert level["t1c"][et] > 1.3 > level["t1n"][et]
        assert level["t1c"][et] > 1.5 * level["t1c"][netc]
        white_matter = np.percentile(scan.volumes["t1n"][healthy], 80) / np.median(scan.volumes["t1n"][healthy])
        assert level["t1n"][netc] < level["t1n"][snfh] < 0.95 * white_matter
        assert level["t2w"][snfh] > 1.2
        assert level["t2f"][snfh] > 1.3
        assert level["t2f"][netc] < level["t2f"][et]
        if rc in level["t2f"]:
            assert level["t2f"][rc] < 0.55 < level["t2f"][netc]
            assert level["t2w"][rc] > 1.5
            assert level["t1n"][rc] < 0.6


def test_tissue_contrasts_where_the_template_has_the_tissue() -> None:
    import nilearn.datasets

    scan = synthesize_subject(1, config=PhantomConfig(shape=SHAPE, deformation=0.0, bias_field=0.0))
    to_template = np.linalg.inv(nilearn.datasets.load_mni152_gm_template().affine) @ scan.affine
    where = nib.affines.apply_affine(to_template, np.indices(SHAPE).reshape(3, -1).T).T
    gm, wm, t1 = (
        ndimage.map_coordinates(image.get_fdata(), where, order=1).reshape(SHAPE)
        for image in (
            nilearn.datasets.load_mni152_gm_template(),
            nilearn.datasets.load_mni152_wm_template(),
            nilearn.datasets.load_mni152_template(),
        )
    )
    healthy = ~ndimage.binary_dilation(scan.volumes["seg"] > 0, iterations=8) & (scan.volumes["t1n"] > 0)
    masks = {
        "csf": healthy & (gm + wm < 0.35) & (t1 > 0.1),
        "gm": healthy & (gm > 0.85),
        "wm": healthy & (wm > 0.9),
    }
    assert all(mask.sum() > 20 for mask in masks.values())
    order = {name: sorted(masks, key=lambda tissue: scan.volumes[name][masks[tissue]].mean()) for name in CONTRASTS}
    assert order == {
        "t1n": ["csf", "gm", "wm"],
        "t1c": ["csf", "gm", "wm"],
        "t2w": ["wm", "gm", "csf"],
        "t2f": ["csf", "wm", "gm"],
    }


def test_timepoints_share_the_anatomy_and_the_cavity_replaces_tumor(
    before: PhantomScan, after: PhantomScan, scans: list[PhantomScan]
) -> None:
    old, new = before.volumes["seg"], after.volumes["seg"]
    np.testing.assert_array_equal(before.volumes["t1n"] > 0, after.volumes["t1n"] > 0)
    healthy = ~ndimage.binary_dilation((old > 0) | (new > 0), iterations=3) & (before.volumes["t1n"] > 0)
    for name in CONTRASTS:
        first, second = before.volumes[name], after.volumes[name]
        stranger = scans[0].volumes[name]
        assert not np.array_equal(first, second), "each scan has its own noise"
        assert np.corrcoef(first[healthy], second[healthy])[0, 1] > 0.8
        assert np.corrcoef(first[healthy], stranger[healthy])[0, 1] < 0.6
    cavity, core = new == Label.RC, np.isin(old, (Label.NETC, Label.ET))
    assert (cavity & core).sum() > 0.4 * core.sum()
    assert np.isin(new, (Label.NETC, Label.ET)).sum() < core.sum()


def test_noise_and_bias_field_do_what_they_say() -> None:
    def scan(**options: float) -> np.ndarray:
        volume = synthesize_subject(1, config=PhantomConfig(shape=SHAPE, **options)).volumes["t1n"]
        return volume[volume > 0].astype(float)

    clean = scan(noise=0.0, bias_field=0.0)
    noisy, biased = scan(noise=0.1, bias_field=0.0), scan(noise=0.0, bias_field=0.1)
    white_matter = np.percentile(clean, 85)
    bright = clean > np.percentile(clean, 50)
    assert (noisy - clean)[bright].std() == pytest.approx(0.1 * white_matter, rel=0.15)
    assert np.log(biased[bright] / clean[bright]).std() == pytest.approx(0.1, rel=0.6)


# --- determinism ------------------------------------------------------------------------------------------


def test_same_arguments_same_scan(before: PhantomScan) -> None:
    again = synthesize_subject(3, 100, PhantomConfig(shape=SHAPE))
    other = synthesize_subject(3, 100, PhantomConfig(shape=SHAPE, seed=1))
    for name, volume in before.volumes.items():
        np.testing.assert_array_equal(again.volumes[name], volume)
        assert not np.array_equal(other.volumes[name], volume)


def test_files_depend_on_neither_number_nor_order_nor_workers(tmp_path: Path) -> None:
    config = PhantomConfig(shape=(32, 36, 32))
    done: list[str] = []
    write_phantoms(tmp_path / "one", 1, config)
    write_phantoms(tmp_path / "three", 3, config, on_case=done.append)
    write_phantoms(tmp_path / "parallel", 3, config, workers=2)
    three = _files(tmp_path / "three")
    assert _files(tmp_path / "parallel") == three
    assert _files(tmp_path / "one").items() <= three.items()
    assert len(three) == 4 * 5 + 1  # and how they were made
    assert done == [f"BraTS-GLI-9000{n}" for n in ("1-100", "2-100", "3-100", "3-101")]
    write_phantoms(tmp_path / "one", 3, config)
    assert _files(tmp_path / "one") == three


def test_cases_of_two_configurations_are_not_mixed(tmp_path: Path) -> None:
    output = tmp_path / "out"
    write_phantoms(output, 1, PhantomConfig(shape=(24, 24, 24)))
    before = _files(output)
    for other in (PhantomConfig(shape=(24, 24, 24), seed=1), PhantomConfig(shape=(24, 26, 24))):
        with pytest.raises(DataError, match=r"phantom\.json: found cases of .*'seed': 0.*; choose another folder"):
            write_phantoms(output, 2, other)
    (output / "phantom.json").unlink()
    with pytest.raises(DataError, match=r"found cases without phantom\.json, such as BraTS-GLI-90001-100"):
        write_phantoms(output, 1, PhantomConfig(shape=(24, 24, 24)))
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "phantom.json").write_text(json.dumps({"seed": 5}))
    write_phantoms(tmp_path / "begun", 1, PhantomConfig(shape=(24, 24, 24)))
    assert _files(tmp_path / "begun") == before
    (output / "phantom.json").write_text("{")
    with pytest.raises(DataError, match=r"phantom\.json: found no readable record"):
        write_phantoms(output, 1, PhantomConfig(shape=(24, 24, 24)))
    assert _files(output) == before | {"phantom.json": b"{"}


# --- files ------------------------------------------------------------------------------------------------


def test_files_are_named_and_stored_as_brats_2024(tmp_path: Path) -> None:
    (folder,) = write_phantoms(tmp_path / "new" / "folder", 1, PhantomConfig(shape=SHAPE))
    assert folder == tmp_path / "new" / "folder" / "BraTS-GLI-90001-100"
    assert re.fullmatch(r"BraTS-GLI-\d{5}-\d{3}", folder.name)
    names = {p.name for p in folder.iterdir()}
    assert names == {f"{folder.name}-{name}.nii.gz" for name in (*CONTRASTS, "seg")}
    for path in folder.iterdir():
        image = nib.load(path)
        assert image.shape == SHAPE
        assert nib.aff2axcodes(image.affine) == ("L", "A", "S")
        assert image.header.get_xyzt_units()[0] == "mm"
        assert image.get_data_dtype() == (np.uint8 if "seg" in path.name else np.int16)
        np.testing.assert_allclose(image.header.get_zooms(), np.array([182, 218, 182]) / SHAPE, rtol=1e-6)
        assert path.read_bytes()[4:8] == b"\0\0\0\0", "gzip must carry no time"
        assert len(gzip.decompress(path.read_bytes())) == 352 + np.prod(SHAPE) * image.get_data_dtype().itemsize


def test_a_full_disk_is_one_line_and_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class FullDisk(io.FileIO):
        def write(self, content: Any) -> int:
            super().write(content[:10])
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "open", lambda path, mode: FullDisk(path, mode))
    with pytest.raises(DataError, match=r"cannot write .*phantom\.json: No space left"):
        write_phantoms(tmp_path, 1, PhantomConfig(shape=(24, 24, 24)))
    assert _files(tmp_path) == {}
    monkeypatch.undo()
    write_phantoms(tmp_path, 1, PhantomConfig(shape=(24, 24, 24)))
    before, opened = _files(tmp_path), Path.open

    def full(path: Path, mode: str = "r", *rest: Any, **more: Any) -> Any:
        return opened(path, mode, *rest, **more) if "r" in mode else FullDisk(path, mode)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(DataError, match=r"BraTS-GLI-90001-100.*No space left"):
        write_phantoms(tmp_path, 1, PhantomConfig(shape=(24, 24, 24)))
    assert _files(tmp_path) == before


def test_missing_nilearn_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    phantom_anatomy._load_maps.cache_clear()
    phantom_anatomy.load_template.cache_clear()
    monkeypatch.setattr(phantom_anatomy, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="nilearn is not installed"):
        synthesize_subject(1, config=PhantomConfig(shape=(24, 24, 24)))


# --- bad options ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": (48, 48)}, "shape is [48, 48]; expected three numbers of voxels from 24 to 512"),
        ({"shape": (48, 48, 8)}, "shape is [48, 48, 8]; expected three"),
        ({"seed": -1}, "seed is -1; expected 0 or more"),
        ({"deformation": 2.0}, "deformation is 2.0; expected 0 to 1.5"),
        ({"noise": -0.1}, "noise is -0.1; expected 0 to 0.5"),
        ({"bias_field": float("nan")}, "bias_field is NaN; expected 0 to 0.5"),
    ],
)
def test_bad_configuration(options: dict, message: str) -> None:
    with pytest.raises(VaevqMedError, match=re.escape(message)):
        PhantomConfig.read(options)


@pytest.mark.parametrize(("subject", "timepoint"), [(0, 100), (10000, 100), (1, 102)])
def test_bad_subject_or_timepoint(subject: int, timepoint: int) -> None:
    with pytest.raises(VaevqMedError, match="expected"):
        synthesize_subject(subject, timepoint, PhantomConfig(shape=(24, 24, 24)))


def _command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["vaevq-med", "phantom", *arguments])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    return int(exit_.value.code or 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--subjects", "0"), "0 subjects: expected 1 to 9999"),
        (("--subjects", "1", "--workers", "0"), "workers: found 0, expected 1 to 512"),
        (("--shape", "big"), "--shape 'big': expected three whole numbers, as 182,218,182"),
        (("--shape", "1,2,3"), "shape is [1, 2, 3]; expected three numbers of voxels from 24 to 512"),
        (("--seed", "-4"), "seed is -4; expected 0 or more"),
    ],
)
def test_command_says_in_one_line_what_is_wrong(
    arguments: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert _command(monkeypatch, str(tmp_path / "out"), *arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "vaevq-med:" in line]
    assert lines == [f"vaevq-med: {message}"]
    assert not (tmp_path / "out").exists()


def test_command_refuses_a_file_as_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").write_text("mine")
    assert _command(monkeypatch, str(tmp_path / "out"), "--subjects", "1", "--shape", "24,24,24") == 2
    assert "vaevq-med: cannot make the output folder" in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == "mine"


def test_command_writes_and_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    arguments = ("--subjects", "1", "--shape", "32x36x32", "--seed", "7", "--workers", "1")
    assert _command(monkeypatch, str(output), *arguments) == 0
    assert capsys.readouterr().out == f"{output}: cases 1, subjects 1\n"
    written = nib.load(output / "BraTS-GLI-90001-100" / "BraTS-GLI-90001-100-t2f.nii.gz")
    expected = phantom.synthesize_subject(1, 100, PhantomConfig(shape=(32, 36, 32), seed=7))
    np.testing.assert_array_equal(np.asanyarray(written.dataobj), expected.volumes["t2f"])
