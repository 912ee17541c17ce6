"""``vaevq-med segment``: label maps on the grids of scans, scores, resumed, and what is refused."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import FIXTURES
from helpers.scans import CONTRASTS, affine_of, body, write_case
from helpers.segmenters import write_segmenter
from typer.testing import CliRunner, Result

from vaevq_med.cli.app import app
from vaevq_med.images.manifest import load_manifest
from vaevq_med.metrics.segmentation import region_scores
from vaevq_med.prepare.recipes import Recipe
from vaevq_med.prepare.volumes.labels import BRATS2021, BRATS2024
from vaevq_med.tasks.segment import _segmenter
from vaevq_med.trained.segmenter import StoredSegmenter
from vaevq_med.training.checkpoint import _identity

SEGMENTED, PLAIN = "BraTS-GLI-00000-000", "BraTS-GLI-00001-000"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_segmenter(tmp_path_factory.mktemp("segmenter") / "best.pt")


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two cases, one of which has a segmentation."""
    folder = tmp_path_factory.mktemp("cases")
    write_case(folder, PLAIN)
    labels = np.zeros(body().shape, np.uint8)
    labels[8:18, 8:20, 4:8], labels[10:14, 10:14, 5:7] = 2, 3
    nib.save(nib.Nifti1Image(labels, affine_of("LPS")), write_case(folder, SEGMENTED) / f"{SEGMENTED}-seg.nii.gz")
    return folder


def segment(cases: Path, output: Path, checkpoint: Path, *words: str) -> Result:
    _segmenter.cache_clear()
    threads = torch.get_num_threads()
    arguments = ["segment", str(cases), str(output), "--checkpoint", str(checkpoint), "--workers", "1", *words]
    try:
        return CliRunner().invoke(app, arguments)
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def done(cases: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    output = tmp_path_factory.mktemp("segmented") / "labels"
    return output, segment(cases, output, checkpoint)


def masks(path: Path, regions: Any) -> list[np.ndarray]:
    labels = np.asarray(nib.load(path).dataobj)
    return [np.isin(labels, values) for values in regions.values()]


def test_every_case_gets_labels_on_its_own_grid(done: tuple[Path, Result], cases: Path) -> None:
    output, result = done
    assert result.exit_code == 0, result.output
    for case in (SEGMENTED, PLAIN):
        found, original = nib.load(output / f"{case}-seg.nii.gz"), nib.load(cases / case / f"{case}-t1n.nii.gz")
        assert found.shape == original.shape
        np.testing.assert_allclose(found.affine, original.affine)
        assert found.get_data_dtype() == np.uint8
        assert set(np.unique(found.dataobj)) <= {0, 1, 2, 3}
        assert np.asarray(found.dataobj).any()


def test_scores_are_those_of_the_files(done: tuple[Path, Result], cases: Path) -> None:
    """Worked out anew from the label maps that were written, whose axes are those of the scan."""
    output, result = done
    record = json.loads((output / "scores.json").read_text())
    with (output / "scores.csv").open() as file:
        rows = {row["region"]: row for row in csv.DictReader(file)}
    found = masks(output / f"{SEGMENTED}-seg.nii.gz", BRATS2024.regions)
    wanted = masks(cases / SEGMENTED / f"{SEGMENTED}-seg.nii.gz", BRATS2024.regions)
    assert {row["case"] for row in record["rows"]} == {SEGMENTED}
    for number, region in enumerate(BRATS2024.regions):
        expected = region_scores(found[number], wanted[number], (1, 1, 1))
        for name, value in expected.items():
            assert float(rows[region][name]) == pytest.approx(value, rel=1e-5)
        assert record["summary"][region]["dice"]["value"] == pytest.approx(expected["dice"])
    assert "whole_tumor: Dice" in result.output
    assert {figure["name"] for figure in record["figures"]} >= {"dice", "hd95_mm", "panoptic_quality"}


def test_the_orientation_of_the_file_changes_nothing(
    done: tuple[Path, Result], cases: Path, checkpoint: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "cases" / PLAIN
    folder.mkdir(parents=True)
    for contrast in CONTRASTS:
        image = nib.load(cases / PLAIN / f"{PLAIN}-{contrast}.nii.gz")
        turn = nib.orientations.ornt_transform(
            nib.orientations.io_orientation(image.affine), nib.orientations.axcodes2ornt(("A", "S", "L"))
        )
        nib.save(image.as_reoriented(turn), folder / f"{PLAIN}-{contrast}.nii.gz")
    assert segment(tmp_path / "cases", tmp_path / "out", checkpoint).exit_code == 0
    first, second = (nib.load(path / f"{PLAIN}-seg.nii.gz") for path in (done[0], tmp_path / "out"))
    assert nib.aff2axcodes(second.affine) == ("A", "S", "L")
    first, second = (np.asarray(nib.as_closest_canonical(one).dataobj) for one in (first, second))
    np.testing.assert_array_equal(first, second)
    assert not (tmp_path / "out" / "scores.json").exists()


def test_what_is_done_is_kept_and_other_settings_are_refused(
    done: tuple[Path, Result], cases: Path, checkpoint: Path
) -> None:
    output, _ = done
    again = segment(cases, output, checkpoint)
    assert "0 cases segmented, 2 were done" in again.output
    assert "whole_tumor: Dice" in again.output
    (output / f"{PLAIN}-seg.nii.gz").unlink()
    assert "1 cases segmented, 1 were done" in segment(cases, output, checkpoint).output
    other = segment(cases, output, checkpoint, "--labels", "brats2021")
    assert "--overwrite" in str(other.exception)
    assert segment(cases, output, checkpoint, "--labels", "brats2021", "--overwrite").exit_code == 0
    before = masks(output / f"{PLAIN}-seg.nii.gz", BRATS2021.regions)
    assert segment(cases, output, checkpoint, "--overwrite").exit_code == 0
    for old, new in zip(before, masks(output / f"{PLAIN}-seg.nii.gz", BRATS2024.regions), strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--labels", "brats1999"], "label map: found 'brats1999'"),
        (["--batch-size", "0"], "--batch-size: found 0"),
        (["--recipe", "none"], "found no preprocessing/none.json"),
        (["--assume-orientation", "XYZ"], "orientation is 'XYZ'"),
    ],
)
def test_bad_options_are_refused(words: list[str], said: str, cases: Path, checkpoint: Path, tmp_path: Path) -> None:
    result = segment(cases, tmp_path / "out", checkpoint, *words)
    assert said in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_a_recipe_of_another_window_is_refused(cases: Path, tmp_path: Path) -> None:
    recipe = Recipe.load("brats24/axial_256")
    told = "does not say by which recipe"
    path = write_segmenter(tmp_path / "same.pt", recipe=recipe.to_dict())
    assert StoredSegmenter(path).check_window(recipe.to_dict()) == []
    assert told in StoredSegmenter(write_segmenter(tmp_path / "unknown.pt")).check_window(recipe.to_dict())[0]
    other = write_segmenter(tmp_path / "other.pt", recipe=recipe.changed(percentiles=(1.0, 99.0)).to_dict())
    result = segment(cases, tmp_path / "out", other)
    expected = "found percentiles [0.0, 99.5], expected [1.0, 99.0], as"
    assert expected in str(result.exception)
    assert "\n" not in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_says_by_which_recipe_its_images_were_made() -> None:
    manifest = load_manifest(FIXTURES / "slices")
    recipe = Recipe.load("brats24/axial_256").to_dict()
    known = replace(manifest, content={**manifest.content, "recipe": recipe})
    assert _identity(SimpleNamespace(manifest=known, split="training"), {})["recipe"] == recipe
    assert "recipe" not in _identity(SimpleNamespace(manifest=manifest, split="training"), {})


def test_a_tokenizer_is_no_segmentation_network(cases: Path, tmp_path: Path) -> None:
    result = segment(cases, tmp_path / "out", FIXTURES / "simvq.pt")
    assert "simvq.pt: found a checkpoint of" in str(result.exception)
    assert str(result.exception).endswith("expected that of vaevq_med.networks.SliceSegmenter")


def test_a_case_that_lacks_a_contrast_is_skipped(cases: Path, checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(cases, tmp_path / "cases")
    (folder / PLAIN / f"{PLAIN}-t1c.nii.gz").unlink()
    result = segment(folder, tmp_path / "out", checkpoint)
    assert result.exit_code == 1
    assert (tmp_path / "out" / f"{SEGMENTED}-seg.nii.gz").is_file()
    assert not (tmp_path / "out" / f"{PLAIN}-seg.nii.gz").exists()
