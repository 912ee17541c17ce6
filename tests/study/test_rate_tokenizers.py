"""Tokenizers in a study of rate against distortion: their shares of a case's file, and what a weight of bits does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from helpers.stores import write_checkpoint

from vaevq_med.codec.case import CompressedCase
from vaevq_med.codec.compress import compress_case
from vaevq_med.core.errors import VaevqMedError
from vaevq_med.study.file import check_study
from vaevq_med.study.rates.file import RateDistortionStudy
from vaevq_med.study.rates.run import RunRates
from vaevq_med.study.rates.tokenizers import TokenizerCandidate, shares
from vaevq_med.trained.file import atomic_save, read_checkpoint

CHECKPOINT = Path(__file__).parents[1] / "fixtures" / "simvq.pt"
SHAPE = (40, 44, 10)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cases")
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in SHAPE), indexing="ij")
    ball = (x**2 + y**2 < 0.7) & (abs(z) < 0.8)
    (root / "BraTS-GLI-00009-000").mkdir()
    for number, contrast in enumerate(("t1n", "t1c", "t2w", "t2f")):
        smooth = 400 + 150 * np.sin((5 + number) * x + 3 * z) + 90 * np.cos(9 * y)
        image = nib.Nifti1Image(np.where(ball, smooth, 0).astype(np.int16), np.diag([1, -1, 1, 1]))
        nib.save(image, root / "BraTS-GLI-00009-000" / f"BraTS-GLI-00009-000-{contrast}.nii.gz")
    return root


def run_of(cases: Path, output: Path, **tokenizer: Any) -> RunRates:
    content = {
        "study": "rate_distortion",
        "output": str(output),
        "input": str(cases),
        "contrasts": ["t1c", "t2f"],
        "tokenizers": [{"name": "toy", "checkpoint": str(CHECKPOINT), **tokenizer}],
        "perceptual": None,
    }
    study = check_study(content, "test")
    assert isinstance(study, RateDistortionStudy)
    return RunRates(study)


def test_a_contrast_pays_its_share_of_the_file(cases: Path, tmp_path: Path) -> None:
    command = run_of(cases, tmp_path / "out")
    report = command.run()
    assert (report.missing, report.expected) == (0, 2)
    row = command.rows[0]
    assert isinstance(row, TokenizerCandidate)
    scan = command.scans[0]
    recipe = scan.recipe.changed(size=row.model.image_size)
    content = compress_case(scan.case, recipe, row.model, row.coder).content
    found = shares(content, CompressedCase.from_bytes("case", content))
    assert [*found] == ["t1n", "t1c", "t2w", "t2f"]
    assert 0 <= sum(size for size, _ in found.values()) - len(content) < 4  # each is rounded up
    assert all(sum(parts.values()) == size for size, parts in found.values())
    assert [record["bytes"] for record in command.records()] == [found["t1c"][0], found["t2f"][0]]
    assert f"{row.shipped / 1e6:.1f} MB of weights" in report.table
    assert row.shipped >= sum(4 * p.numel() for p in row.model.network.parameters())


def test_a_tokenizer_of_volumes_is_a_row_that_does_not_look_at_slices_alone(cases: Path, tmp_path: Path) -> None:
    deep = write_checkpoint(tmp_path / "deep.pt", both={"spatial_dims": 3, "within_slices": True})
    command = run_of(cases, tmp_path / "out", checkpoint=str(deep))
    assert (command.run().missing, len(command.records())) == (0, 2)
    assert not command.rows[0].slices_alone
    flat = run_of(cases, tmp_path / "flat").rows[0]
    assert flat.slices_alone


def test_the_background_comes_back_as_nothing_and_the_grid_is_the_same(cases: Path, tmp_path: Path) -> None:
    command = run_of(cases, tmp_path / "out")
    scan, row = command.scans[1], command.rows[0]
    content = scan.read()
    coded = row.code(scan, content, 0)
    assert coded.unit.shape == content.unit.shape == SHAPE[::-1]
    assert not coded.unit[~content.brain].any()
    assert coded.unit[content.brain].std() > 0
    assert coded.encode_seconds > 0


def test_a_weight_of_bits_takes_fewer_of_them(cases: Path, tmp_path: Path) -> None:
    command = run_of(cases, tmp_path / "out", settings=[0, 1e-4, 1e9])
    assert command.run().missing == 0
    sizes = {r["setting"]: r["parts"]["tokens"] for r in command.records() if r["contrast"] == "t1c"}
    assert sizes[0] >= sizes[1e-4] > sizes[1e9]


def test_a_case_is_coded_once_a_setting(cases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many of its contrasts are measured, and also where an earlier call made some of the records."""
    coded: list[float] = []

    def counting(*arguments: Any, rate_weight: float, **options: Any) -> Any:
        coded.append(rate_weight)
        return compress_case(*arguments, rate_weight=rate_weight, **options)

    monkeypatch.setattr("vaevq_med.study.rates.tokenizers.compress_case", counting)
    report = run_of(cases, tmp_path / "out", settings=[0, 1e-4]).run()
    assert (report.missing, report.expected) == (0, 4)
    assert coded == [0, 1e-4]
    for contrast in ("t1c", "t2f"):
        (tmp_path / "out" / "records" / f"BraTS-GLI-00009-000_{contrast}" / "toy@0.json").unlink()
    assert run_of(cases, tmp_path / "out", settings=[0, 1e-4]).run().missing == 0
    assert coded == [0, 1e-4, 0]


def test_a_patient_of_the_training_is_no_case_of_the_study(cases: Path, tmp_path: Path) -> None:
    """At once and before anything is coded, whoever saw it: this training, or the one that it started from."""
    for data in (
        {"patients": ["BraTS-GLI-00009"]},
        {"started_from": {"file": "a.pt", "data": {"patients": ["BraTS-GLI-00009"]}}},
    ):
        state = read_checkpoint(CHECKPOINT)
        atomic_save({**state, "data": {**state["data"], **data}}, tmp_path / "seen.pt")
        command = run_of(cases, tmp_path / "out", checkpoint=str(tmp_path / "seen.pt"))
        with pytest.raises(VaevqMedError, match=r"toy: found patient BraTS-GLI-00009, whom .* was trained on"):
            command.run()
        with pytest.raises(VaevqMedError, match="was trained on"):
            command.dry_run()
    assert not (tmp_path / "out").exists()
    allowed = RunRates(command.study.model_copy(update={"split": "training"}))
    assert [row.name for row in allowed.rows] == ["toy"]
