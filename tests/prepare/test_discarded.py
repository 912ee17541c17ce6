"""What slicing makes of a volume that is not skull-stripped integers on 0, and what it says of what is lost."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import torch

from vaevq_med.core.errors import DataError
from vaevq_med.images.pixels import read_image
from vaevq_med.prepare.job import Prepare, Report
from vaevq_med.prepare.recipes import BiasFieldCorrection, Recipe
from vaevq_med.prepare.volumes.discarded import in_words
from vaevq_med.prepare.volumes.source import VolumeSource
from vaevq_med.prepare.volumes.transforms import BiasFieldCorrectionN4

SHAPE = (16, 18, 12)
CASE = "BraTS-GLI-00001-000"
RECIPE = Recipe(name="x", modalities=("t1n",), size=18, format="npy")
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
Change = Callable[[np.ndarray], np.ndarray]


def inside() -> np.ndarray:
    grids = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in SHAPE], indexing="ij"))
    return (grids**2).sum(0) < 0.8


def brain(seed: int = 0) -> np.ndarray:
    """Whole intensities of 20 to 1000 on an exact 0, as floats."""
    return np.where(inside(), np.random.default_rng(seed).integers(20, 1001, SHAPE), 0).astype(np.float32)


def labels() -> np.ndarray:
    voxels = np.zeros(SHAPE)
    voxels[5:11, 5:12, 3:9] = 2
    voxels[6:10, 6:11, 4:8] = 3
    voxels[7:9, 7:9, 5:7] = 1
    return voxels


def write(root: Path, volume: np.ndarray, *, seg: np.ndarray | None = None, affine: np.ndarray = LPS) -> Path:
    """A case of one contrast."""
    (root / CASE).mkdir(parents=True)
    nib.save(nib.Nifti1Image(volume, affine), root / CASE / f"{CASE}-t1n.nii.gz")
    if seg is not None:
        nib.save(nib.Nifti1Image(seg, affine), root / CASE / f"{CASE}-seg.nii.gz")
    return root


def changed(recipe: Recipe, **fields: Any) -> Recipe:
    return Recipe(**{**vars(recipe), **fields})


def prepare(root: Path, output: Path, recipe: Recipe = RECIPE, **options: Any) -> Report:
    return Prepare(VolumeSource(root, recipe, **options), output, workers=1).run()


def refused(root: Path, output: Path, recipe: Recipe = RECIPE, **options: Any) -> str:
    """The one reason for which the one case is skipped."""
    reasons: list[str] = []
    with pytest.raises(DataError, match="no case that could be sliced"):
        Prepare(VolumeSource(root, recipe, **options), output, workers=1).run(
            on_skip=lambda name, reason: reasons.append(reason)
        )
    (reason,) = reasons
    return reason


def files(output: Path) -> dict[str, bytes]:
    folders = (output / "images", output / "labels")
    return {str(p.relative_to(output)): p.read_bytes() for f in folders for p in f.rglob("*") if p.is_file()}


def pixels(output: Path) -> np.ndarray:
    return np.stack([read_image(path)[0].numpy() for path in sorted((output / "images").rglob("*.npy"))])


def measured(report: Report) -> Mapping[str, Any]:
    found: Mapping[str, Any] = report.facts["discarded"]["cases"][CASE]["t1n"]
    return found


# --- the background -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda v: np.where(v == 0, 0.004, v),
        lambda v: np.where(v == 0, 0.004 + np.random.default_rng(1).uniform(-1e-3, 1e-3, SHAPE), v),
        lambda v: np.where(v == 0, -1024, v),
        lambda v: np.where(v == 0, -1024, v).astype(np.int16),
    ],
    ids=["constant", "about constant", "negative", "integers"],
)
def test_another_background_than_0_changes_no_slice(tmp_path: Path, change: Change) -> None:
    exact = prepare(write(tmp_path / "a", brain()), tmp_path / "exact")
    found = prepare(write(tmp_path / "b", change(brain()).astype(change(brain()).dtype)), tmp_path / "out")
    assert files(tmp_path / "out") == files(tmp_path / "exact")
    assert measured(exact)["background"] == 0
    assert measured(found)["background"] == pytest.approx(change(brain())[0, 0, 0], abs=2e-3)
    assert measured(found)["foreground"] == measured(exact)["foreground"] == pytest.approx(inside().mean(), abs=1e-6)
    assert any("background is not 0" in note for note in found.notes)
    assert not any("background" in note for note in exact.notes)


def test_n4_is_fitted_within_the_foreground() -> None:
    """Against SimpleITK with the mask that this file knows."""
    volume = brain()
    image, mask = (sitk.GetImageFromArray(array) for array in (volume, inside().astype(np.uint8)))
    corrector = sitk.N4BiasFieldCorrectionImageFilter()
    corrector.SetMaximumNumberOfIterations([5])
    corrector.Execute(sitk.Shrink(image, [2] * 3), sitk.Shrink(mask, [2] * 3))
    expected = volume / np.exp(sitk.GetArrayFromImage(corrector.GetLogBiasFieldAsImage(image)))
    found = BiasFieldCorrectionN4(2, (5,))(torch.from_numpy(volume)[None])[0].numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert np.abs(found - volume).max() > 1


def test_n4_corrects_the_same_whatever_the_background(tmp_path: Path) -> None:
    recipe = changed(RECIPE, bias_field_correction=BiasFieldCorrection(shrink_factor=2, iterations=(5,)))
    prepare(write(tmp_path / "a", brain()), tmp_path / "exact", recipe)
    prepare(write(tmp_path / "b", np.where(brain() == 0, np.float32(0.5), brain())), tmp_path / "out", recipe)
    assert files(tmp_path / "out") == files(tmp_path / "exact")


def test_a_scan_without_a_background_is_refused_unless_that_is_accepted(tmp_path: Path) -> None:
    noise = np.random.default_rng(2).integers(1, 40, SHAPE)
    volume = np.where(inside(), brain(), noise).astype(np.int16)
    write(tmp_path / "in", volume)
    reason = refused(tmp_path / "in", tmp_path / "out")
    assert "100% of the voxels" in reason
    assert "--accept background" in reason
    report = prepare(tmp_path / "in", tmp_path / "out", accept=("background",))
    assert measured(report)["background"] is None
    assert any("0 was taken" in note for note in report.notes)
    window = json.loads((tmp_path / "out/dataset.json").read_text())["training"][0]["intensity_window"]
    assert window == pytest.approx(list(np.percentile(volume, (0, 99.5))))


@pytest.mark.parametrize("mean", [0.5, 1, 1.5, 2])
def test_faint_noise_of_integers_is_refused_however_often_it_is_0(tmp_path: Path, mean: float) -> None:
    noise = np.random.default_rng(2).poisson(mean, SHAPE)
    write(tmp_path / "in", np.where(inside(), brain(), noise).astype(np.int16))
    assert "--accept background" in refused(tmp_path / "in", tmp_path / "out")
    report = prepare(tmp_path / "in", tmp_path / "out", accept=("background",))
    assert measured(report)["background"] == (0 if mean < 0.6 else None)
    assert any("background was accepted" in note for note in report.notes)


def test_noise_within_zeros_around_the_field_of_view_is_refused(tmp_path: Path) -> None:
    volume = np.where(inside(), brain(), np.random.default_rng(2).uniform(0.1, 30, SHAPE)).astype(np.float32)
    volume[[0, 1, -1, -2]] = 0
    volume[:, [0, -1]] = 0
    write(tmp_path / "in", volume)
    reason = refused(tmp_path / "in", tmp_path / "out")
    assert "100.0%" in reason
    assert "--accept background" in reason
    report = prepare(tmp_path / "in", tmp_path / "out", accept=("background",))
    assert (measured(report)["background"], measured(report)["corners"]) == (0, 1)


def test_a_volume_of_one_intensity_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "in", np.full(SHAPE, 5, np.int16))
    assert "5.0 everywhere" in refused(tmp_path / "in", tmp_path / "out")


def test_a_volume_whose_intensities_differ_by_rounding_alone_is_refused(tmp_path: Path) -> None:
    rounded = np.nextafter(np.float32(7), np.float32(8))
    write(tmp_path / "in", np.where(inside(), np.where(brain() > 500, rounded, 7), 0).astype(np.float32))
    reason = refused(tmp_path / "in", tmp_path / "out", changed(RECIPE, percentiles=(0, 100)))
    assert "7.0 and 7.000000" in reason


# --- what clipping discards -----------------------------------------------------------------------------


def scaled(scale: float, shift: float, background: float) -> np.ndarray:
    return np.where(inside(), brain() * scale + shift, background).astype(np.float32)


SIGNED = {
    "z-scored in the brain, 0 around it": scaled(1 / 283, -510 / 283, 0),
    "z-scored with what is around it": scaled(1 / 283, -300 / 283, -300 / 283),
    "scaled to -1 and 1": scaled(2 / 1000, -1, -1),
}


@pytest.mark.parametrize("kind", SIGNED)
def test_a_scaled_volume_is_refused_and_the_recipe_that_is_named_makes_the_same_slices_of_it(
    tmp_path: Path, kind: str
) -> None:
    """A window takes scale and shift out, so that the slices are those of the volume as it was."""
    prepare(write(tmp_path / "a", brain()), tmp_path / "exact")
    root = write(tmp_path / "in", SIGNED[kind])
    reason = refused(root, tmp_path / "out")
    lost = float((SIGNED[kind][inside()] <= 0).mean())
    assert f"{100 * lost:.1f}%" in reason
    assert "--accept clipping" in reason
    name = "brats24/axial_256_signed"
    assert name in reason
    recipe = Recipe.load(name)
    assert not recipe.clip_negatives
    recipe = changed(recipe, modalities=("t1n",), size=18, format="npy")
    report = prepare(root, tmp_path / "out", recipe)
    np.testing.assert_allclose(pixels(tmp_path / "out"), pixels(tmp_path / "exact"), atol=2e-6)
    assert measured(report)["clipped"] == 0
    window = json.loads((tmp_path / "out/dataset.json").read_text())["training"][0]["intensity_window"]
    assert window == pytest.approx(list(np.percentile(SIGNED[kind][inside()], (0, 99.5))), abs=1e-5)


def test_a_brain_that_is_all_negative_is_refused_for_the_clipping(tmp_path: Path) -> None:
    prepare(write(tmp_path / "a", brain()), tmp_path / "exact")
    root = write(tmp_path / "in", -brain())
    reason = refused(root, tmp_path / "out")
    assert "100.0% of the foreground" in reason
    assert "brats24/axial_256_signed" in reason
    assert "all-zero" in refused(root, tmp_path / "out", accept=("clipping",))  # nothing is left to go on with
    report = prepare(root, tmp_path / "out", changed(RECIPE, clip_negatives=False))
    assert measured(report)["clipped"] == 0


def test_what_was_accepted_is_counted_noted_and_asked_for_again(tmp_path: Path) -> None:
    volume = SIGNED["scaled to -1 and 1"]
    write(tmp_path / "in", volume)
    report = prepare(tmp_path / "in", tmp_path / "out", accept=("clipping",))
    assert measured(report)["clipped"] == pytest.approx((volume[inside()] <= 0).mean(), abs=1e-6)
    assert any("clipping was accepted" in note for note in report.notes)
    assert json.loads((tmp_path / "out/report.json").read_text())["discarded"] == report.facts["discarded"]
    again = prepare(tmp_path / "in", tmp_path / "out", accept=("clipping",))
    assert (again.written, again.reused) == (0, 1)
    assert again.facts["discarded"] == report.facts["discarded"]
    assert "--accept clipping" in refused(tmp_path / "in", tmp_path / "out")


def test_a_little_ringing_is_clipped_and_counted(tmp_path: Path) -> None:
    volume = brain()
    places = np.flatnonzero(inside())[:10]
    volume.ravel()[places] = -3
    report = prepare(write(tmp_path / "in", volume), tmp_path / "out")
    assert measured(report)["clipped"] == pytest.approx(10 / inside().sum(), abs=1e-6)
    worst = report.facts["discarded"]["contrasts"]["t1n"]["clipped"]
    share = measured(report)["clipped"]
    assert worst == {"cases": 1, "mean": share, "max": share, "case": CASE}


def test_a_plan_says_what_would_be_discarded(tmp_path: Path) -> None:
    write(tmp_path / "in", np.where(brain() == 0, np.float32(0.004), brain()))
    facts = Prepare(VolumeSource(tmp_path / "in", RECIPE), tmp_path / "out", workers=1).plan().estimate.facts
    assert {"clipped", "saturated"} < set(facts["discarded"]["contrasts"]["t1n"])
    assert facts["discarded"]["cases"][CASE]["t1n"]["background"] == pytest.approx(0.004)
    assert any("background is not 0" in note for note in facts["notes"])


def test_a_case_that_was_sliced_before_losses_were_counted_is_sliced_anew(tmp_path: Path) -> None:
    write(tmp_path / "in", brain())
    prepare(tmp_path / "in", tmp_path / "out")
    before = files(tmp_path / "out")
    record = tmp_path / "out/.slices" / f"{CASE}.json"
    old = json.loads(record.read_text())
    record.write_text(json.dumps({key: old[key] for key in ("fingerprint", "digest", "files", "bytes", "entries")}))
    report = prepare(tmp_path / "in", tmp_path / "out")
    assert (report.written, report.reused) == (1, 0)
    assert files(tmp_path / "out") == before
    assert json.loads(record.read_text()) == old


# --- what the window saturates --------------------------------------------------------------------------


@pytest.mark.parametrize("percentiles", [(0.0, 99.5), (1.0, 99.0), (0.0, 90.0)])
def test_what_the_window_saturates_is_what_the_percentiles_ask_for(
    tmp_path: Path, percentiles: tuple[float, float]
) -> None:
    recipe = changed(RECIPE, percentiles=percentiles)
    report = prepare(write(tmp_path / "in", brain()), tmp_path / "out", recipe)
    values = brain()[inside()]
    low, high = np.percentile(values, percentiles)
    assert measured(report)["saturated"] == pytest.approx(((values >= high) | (values < low)).mean(), abs=1e-6)


def test_a_volume_that_was_saturated_before_is_refused_unless_that_is_accepted(tmp_path: Path) -> None:
    volume = brain().clip(0, 850)
    share = (volume[inside()] == 850).mean()
    assert share > 0.1
    write(tmp_path / "in", volume)
    reason = refused(tmp_path / "in", tmp_path / "out")
    assert f"{100 * share:.1f}% of the foreground" in reason
    assert "--accept saturation" in reason
    report = prepare(tmp_path / "in", tmp_path / "out", accept=("saturation",))
    assert measured(report)["saturated"] == pytest.approx(share, abs=1e-6)


def test_what_is_white_of_a_tumor_is_counted(tmp_path: Path) -> None:
    """The rim that enhances is the brightest of all: half of it lies above the window."""
    volume, seg = brain(), labels()
    rim = np.flatnonzero(seg == 3)
    volume.ravel()[rim[::2]] = 3000
    volume.ravel()[rim[1::2]] = 900
    recipe = changed(RECIPE, percentiles=(0, 90))
    report = prepare(write(tmp_path / "in", volume, seg=seg.astype(np.uint8)), tmp_path / "out", recipe)
    high = np.percentile(volume[inside()], 90)
    regions = {"whole_tumor": (1, 2, 3), "tumor_core": (1, 3), "enhancing_tumor": (3,)}
    expected = {name: float((volume[np.isin(seg, values)] >= high).mean()) for name, values in regions.items()}
    assert 0.4 < expected["enhancing_tumor"] < 0.6
    assert measured(report)["white_regions"] == pytest.approx(expected, abs=1e-6)
    (line,) = [line for line in in_words(report.facts["discarded"]) if "enhancing_tumor" in line]
    assert f"t1n {100 * expected['enhancing_tumor']:.1f}% ({CASE})" in line
    plain = prepare(write(tmp_path / "plain", brain()), tmp_path / "no labels")
    assert measured(plain)["white_regions"] == {}
    assert not [line for line in in_words(plain.facts["discarded"]) if "tumor" in line]


# --- labels ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [lambda v: v * 1.00000002, lambda v: v - 1e-4, lambda v: (v * (1 - 1e-7)).astype(np.float32)],
    ids=["above", "below", "32-bit"],
)
def test_labels_that_are_whole_but_for_rounding_are_whole(tmp_path: Path, change: Change) -> None:
    prepare(write(tmp_path / "a", brain(), seg=labels().astype(np.uint8)), tmp_path / "exact")
    report = prepare(write(tmp_path / "b", brain(), seg=change(labels())), tmp_path / "out")
    assert files(tmp_path / "out") == files(tmp_path / "exact")
    assert any("rounded" in note for note in report.notes)


@pytest.mark.parametrize("value", [1.0011, 2.5, -0.002, 0.49999999])
def test_a_label_that_is_not_whole_is_named_in_full(tmp_path: Path, value: float) -> None:
    seg = labels()
    seg[7, 7, 5] = value
    write(tmp_path / "in", brain(), seg=seg)
    assert f"the value {value} in" in refused(tmp_path / "in", tmp_path / "out")


# --- orientation ----------------------------------------------------------------------------------------


def test_volumes_of_no_stated_orientation_are_sliced_as_the_user_says(tmp_path: Path) -> None:
    prepare(write(tmp_path / "a", brain(), seg=labels().astype(np.uint8)), tmp_path / "exact")
    root = write(tmp_path / "b", brain(), seg=labels().astype(np.uint8))
    for path in (root / CASE).iterdir():
        image = nib.load(path)
        image.header["sform_code"] = image.header["qform_code"] = 0
        image = nib.Nifti1Image(np.asarray(image.dataobj), None, image.header)
        nib.save(image, path)
        assert (int(nib.load(path).header["sform_code"]), int(nib.load(path).header["qform_code"])) == (0, 0)
    assert "--assume-orientation" in refused(root, tmp_path / "out")
    report = prepare(root, tmp_path / "out", orientation="LPS")
    assert files(tmp_path / "out") == files(tmp_path / "exact")
    (note,) = [note for note in report.notes if "LPS was assumed" in note]
    assert "1 more" in note
    other = prepare(root, tmp_path / "out", orientation="RPS")
    assert (other.written, other.reused) == (1, 0)
    np.testing.assert_array_equal(pixels(tmp_path / "out")[:, :, 1:-1], pixels(tmp_path / "exact")[:, :, -2:0:-1])


def test_bad_names_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    write(tmp_path / "in", brain())
    for options, message in (
        ({"orientation": "RAI?"}, "orientation is 'RAI\\?'"),
        ({"accept": ("everything",)}, "accept is 'everything'; expected one of background, clipping, saturation"),
    ):
        with pytest.raises(DataError, match=message):
            prepare(tmp_path / "in", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
