"""Studies of downstream tasks: what survives a coder that keeps everything, and one that erases."""

from __future__ import annotations

import csv
import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from helpers.features import Pixels
from scipy import ndimage
from scipy.linalg import sqrtm
from scipy.stats import spearmanr
from torch import Tensor
from typer.testing import CliRunner

import vaevq_med.study.rates.recording as recording
import vaevq_med.study.tasks.run as running
from vaevq_med.cli.app import app
from vaevq_med.core.errors import VaevqMedError
from vaevq_med.images.transforms import REGIONS
from vaevq_med.prepare.volumes.reading import CaseReader
from vaevq_med.study.file import check_study, read_study
from vaevq_med.study.rates.candidates import Candidate, Coded
from vaevq_med.study.rates.scans import Scan, ScanFile
from vaevq_med.study.statistics import rank_correlation
from vaevq_med.study.tasks.cases import find_case_files, lesioned_cases, through_window
from vaevq_med.study.tasks.file import TasksStudy
from vaevq_med.study.tasks.report import Report
from vaevq_med.study.tasks.rows import Original
from vaevq_med.study.tasks.run import RunTasks
from vaevq_med.trained.patients import NAMES

pytest.importorskip("imagecodecs")
SHAPE = (44, 48, 16)
CHECKPOINT = Path(__file__).parents[1] / "fixtures" / "simvq.pt"


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four patients with a bright tumor; the third has no enhancing part, the fourth no segmentation."""
    root = tmp_path_factory.mktemp("cases")
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in SHAPE), indexing="ij")
    brain = x**2 + y**2 + z**2 < 0.95
    for number in range(4):
        name, rng = f"BraTS-GLI-0000{number}-000", np.random.default_rng(number)
        (root / name).mkdir()
        away = np.sqrt((x - 0.35) ** 2 + (y + 0.1 * number) ** 2 + z**2)
        labels = np.where(away < 0.4 + 0.03 * number, 2, 0)
        labels[away < 0.25] = 1
        if number != 2:
            labels[away < 0.12] = 3
        for place, contrast in enumerate(("t1c", "t2f")):
            smooth = 300 + 60 * np.sin((6 + number) * x + 3 * z + place) + 40 * np.cos(9 * y)
            smooth = smooth + 250 * (labels > 0) + 80 * labels + rng.normal(0, 12, SHAPE)
            image = nib.Nifti1Image(np.where(brain, smooth, 0).astype(np.int16), np.diag([-1, -1, 1.5, 1]))
            nib.save(image, root / name / f"{name}-{contrast}.nii.gz")
        if number != 3:
            image = nib.Nifti1Image((labels * brain).astype(np.uint8), np.diag([-1, -1, 1.5, 1]))
            nib.save(image, root / name / f"{name}-seg.nii.gz")
    recipe = {"name": "two", "description": "two contrasts", "modalities": ["t1c", "t2f"], "size": 48}
    (root / "recipe.json").write_text(json.dumps(recipe))
    (root / "coronal.json").write_text(json.dumps({**recipe, "axis": "coronal"}))
    return root


@dataclass(frozen=True)
class Keeps(Candidate):
    """Gives the volume back."""

    name: str = "keeps"
    title: str = "Keeps"
    settings: tuple[float, ...] = (1.0,)

    @property
    def slices_alone(self) -> bool:
        return True

    def made_of(self) -> Mapping[str, Any]:
        return {"toy": self.name}

    def code(self, file: ScanFile, scan: Scan, setting: float) -> Coded:
        return Coded(1000 * int(setting), scan.unit.copy(), 0.0, 0.0)


@dataclass(frozen=True)
class Erases(Keeps):
    """Gives one intensity back, wherever there is foreground."""

    name: str = "erases"
    title: str = "Erases"

    def code(self, file: ScanFile, scan: Scan, setting: float) -> Coded:
        return Coded(10, np.where(scan.brain, np.float32(0.4), np.float32(0)), 0.0, 0.0)


@dataclass(frozen=True)
class Worsens(Keeps):
    """Adds noise, the more the lower the setting."""

    name: str = "worsens"
    title: str = "Worsens"
    settings: tuple[float, ...] = (1.0, 2.0, 3.0, 4.0)

    def code(self, file: ScanFile, scan: Scan, setting: float) -> Coded:
        noise = np.random.default_rng(0).normal(0, 0.4 / 3**setting, scan.unit.shape)
        unit = np.clip(scan.unit + noise * scan.brain, 0, 1).astype(np.float32)
        return Coded(1000 * int(setting), unit, 0.0, 0.0)


class Thresholds:
    """A stand-in for a segmentation network: what is bright in one contrast."""

    contrasts = ("t2f", "t1c")
    regions = REGIONS
    content_hash = "thresholds"
    stored = SimpleNamespace(check_window=lambda recipe: [f"unknown window of {recipe['name']}"], data={})

    def segment(self, volume: Tensor) -> Tensor:
        assert volume.dtype == torch.float32
        return torch.stack([(volume[0] > bound).float() for bound in (0.55, 0.75, 0.9)])


def run_of(
    cases: Path, output: Path, monkeypatch: pytest.MonkeyPatch, rows: list[Candidate] | None = None, **fields: Any
) -> RunTasks:
    content = {
        "study": "tasks",
        "output": str(output),
        "input": str(cases),
        "recipe": str(cases / "recipe.json"),
        "contrasts": ["t1c", "t2f"],
        "codecs": [{"name": "jpeg2000", "settings": [25, 60]}],
        "segmenter": "segmenter.pt",
        "detectability": {"diameters": [3, 5], "strengths": [0.3], "draws": 1},
        "perceptual": None,
        **fields,
    }
    study = check_study(content, "test")
    assert isinstance(study, TasksStudy)
    monkeypatch.setattr(running, "load_segmenter", lambda path, device: Thresholds())
    if rows is not None:
        monkeypatch.setattr(RunTasks, "find_rows", lambda self: [Original(), *rows])
    return RunTasks(study)


def test_what_keeps_scores_as_the_original_and_what_erases_scores_nothing(
    cases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = run_of(cases, tmp_path / "out", monkeypatch, [Keeps(), Erases()])
    report = command.run()
    assert (report.expected, report.missing, report.problems) == (4 * 3, 0, ())
    original, keeps, erases = Report(command.study, command.rows, command.records()).points
    for name in ("dice_whole_tumor", "dice_enhancing_tumor", "hd95_mm_whole_tumor", "auc", "difference_ml_whole_tumor"):
        assert keeps.spread(name) == original.spread(name)
    assert original.spread("dice_whole_tumor").mean > 0.8
    assert original.spread("dice_whole_tumor").n == 3  # the fourth has no expert
    assert keeps.spread("frd").mean == pytest.approx(0, abs=1e-6)
    assert keeps.spread("icc_share").mean == keeps.spread("icc_shape_share").mean == 1
    assert keeps.spread("contrast_kept").mean == pytest.approx(1)
    assert keeps.spread("psnr_brain").mean == 100
    assert erases.spread("dice_whole_tumor").mean == 0
    # Of three cases one has no enhancing part, where finding none is right.
    assert erases.spread("dice_enhancing_tumor").mean == pytest.approx(1 / 3)
    volume = sum(3 * [original.spread("reference_ml_whole_tumor").mean]) / 3
    assert erases.spread("difference_ml_whole_tumor").mean == pytest.approx(-volume)
    assert erases.spread("auc").mean == 0.5
    assert erases.spread("contrast_kept").mean == pytest.approx(0, abs=1e-6)
    assert erases.spread("icc_share").mean == erases.spread("icc_shape_share").mean == 0
    assert erases.pairs[0] == 0
    assert keeps.pairs == original.pairs == (erases.pairs[1], erases.pairs[1])
    assert f"| 0.0, 0 of {erases.pairs[1]} regions |" in report.table
    assert erases.spread("frd").mean > 1


def test_lesions_are_counted_by_the_sizes_of_the_training_patients(
    cases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    splits = {"training": [0, 1], "validation": [3], "test": [2]}
    named = {split: [f"BraTS-GLI-0000{n}" for n in numbers] for split, numbers in splits.items()}
    dealt = {name: split for split, names in named.items() for name in names}
    (tmp_path / "splits.json").write_text(json.dumps(dealt))
    plain = {"split_file": str(tmp_path / "splits.json"), "radiomics": False, "detectability": None}
    command = run_of(cases, tmp_path / "out", monkeypatch, [Keeps(), Erases()], **plain)
    report = command.run()
    volumes = []
    for name in named["training"]:
        labels = np.asanyarray(nib.load(cases / f"{name}-000" / f"{name}-000-seg.nii.gz").dataobj)
        numbers, count = ndimage.label(labels > 0, structure=np.ones((3, 3, 3)))
        volumes += [0.0015 * (numbers == number).sum() for number in range(1, count + 1)]
    edges = command.size_edges()
    assert edges == pytest.approx(tuple(np.quantile(volumes, (1 / 3, 2 / 3))))
    original, keeps, erases = Report(command.study, command.rows, command.records(), edges=edges).points
    assert keeps.lesions == original.lesions
    assert sum(kept for kept, _ in original.lesions) == sum(there for _, there in original.lesions) == 1
    assert [kept for kept, _ in erases.lesions] == [0, 0, 0]
    # The tumors grow from patient to patient, so that the test patient's is large.
    assert original.spread("lesion_recall_large").mean == 1
    assert erases.spread("lesion_recall_large").mean == 0
    assert original.spread("lesion_recall_small").n == 0
    assert keeps.spread("delta_dice_whole_tumor").mean == 0
    assert erases.spread("delta_dice_whole_tumor").mean == -original.spread("dice_whole_tumor").mean
    assert "Lesions by size: small to " in report.table
    assert "0 small, 0 medium, 1 large" in report.table
    given = run_of(cases, tmp_path / "out", monkeypatch, [Keeps()], **plain, lesion_sizes=[1e-3, 1e3])
    assert given.size_edges() == (1e-3, 1e3)
    assert "| Medium lesions kept (%)" in given.run().table
    with pytest.raises(VaevqMedError, match=r"lesion_sizes is .* expected two rising volumes in ml"):
        run_of(cases, tmp_path / "out", monkeypatch, lesion_sizes=[2.0, 1.0])


def test_sizes_that_nobody_can_say_leave_their_figure_out_and_nothing_else(
    cases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "cases"
    shutil.copytree(cases, source)
    names = [f"BraTS-GLI-0000{n}" for n in range(4)]
    away = {"BraTS-GLI-00009": "training"}
    plain = {"split_file": str(tmp_path / "splits.json"), "radiomics": False, "detectability": None}

    def command(training: list[str], **fields: Any) -> RunTasks:
        dealt = away | {name: "training" if name in training else "test" for name in names}
        (tmp_path / "splits.json").write_text(json.dumps(dealt))
        return run_of(source, tmp_path / "out", monkeypatch, [Keeps()], **plain, **fields)

    report = command([]).run()  # the only training patient is on another machine
    assert report.missing == 0
    assert "Lesions by size are left out (input " in report.table
    assert "found no case of the split training" in report.table
    assert "lesion_sizes in the study's file" in report.table
    assert "lesions kept" not in report.table
    assert (
        f"{tmp_path / 'splits.json'}: found no lesion in the segmentations of its 0" in command(names[3:]).run().table
    )
    # Where the segmentation of a training patient is damaged, the case is named; the images do not matter.
    for file in (source / f"{names[0]}-000").glob("*-t*.nii.gz"):
        file.write_bytes(b"x")
    assert "Large lesions kept" in command(names[:2]).run().table
    (source / f"{names[1]}-000" / f"{names[1]}-000-seg.nii.gz").write_bytes(b"x")
    report = command(names[:2]).run()
    assert f"training case {names[1]}-000: {names[1]}-000-seg.nii.gz" in report.table
    given = command(names[:2], lesion_sizes=[1.0, 2.0])
    monkeypatch.setattr(RunTasks, "_segmented", None)  # nothing is measured again
    done = given.run()
    assert (done.missing, done.problems) == (0, ())
    assert "lesions kept" in done.table


def test_sizes_are_remembered_as_long_as_the_segmentations_are_the_same(
    cases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"BraTS-GLI-0000{n}" for n in range(4)]
    (tmp_path / "splits.json").write_text(json.dumps({name: "training" for name in names[:3]} | {names[3]: "test"}))
    source = tmp_path / "cases"
    shutil.copytree(cases, source)
    command = run_of(source, tmp_path / "out", monkeypatch, split_file=str(tmp_path / "splits.json"))
    edges = command.size_edges()
    read = CaseReader.labels
    reads: list[str] = []

    def counted(self: CaseReader, volume: Any, case: Any) -> Any:
        reads.append(case.name)
        return read(self, volume, case)

    monkeypatch.setattr(CaseReader, "labels", counted)
    assert command.size_edges() == edges
    assert reads == []
    path = source / f"{names[0]}-000" / f"{names[0]}-000-seg.nii.gz"
    image = nib.load(path)
    whole = np.asanyarray(image.dataobj).copy()
    whole[30:] = 0
    nib.save(nib.Nifti1Image(whole, image.affine), path)
    assert command.size_edges() != edges
    assert reads == [f"{name}-000" for name in names[:3]]
    for damage in ("{", '{"key": 1}', "[]"):
        (tmp_path / "out" / "lesion_sizes.json").write_text(damage)
        reads.clear()
        command.size_edges()
        assert len(reads) == 3


def test_tables_figures_and_records_hold_no_nan(cases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = run_of(cases, tmp_path / "out", monkeypatch, [Worsens()], notes=["A note."])
    report = command.run()
    names = ["table.md", "records.csv", "results.json", "dice.png", "detectability.png"]
    assert [path.name for path in report.files] == names
    assert all(path.stat().st_size for path in report.files)
    text = (tmp_path / "out" / "results.json").read_text()
    assert "NaN" not in text
    assert "nan" not in report.table.lower()
    found = json.loads(text)
    assert found["patients"] == [f"BraTS-GLI-0000{n}" for n in range(4)]
    coded = [point["figures"] for point in found["points"] if point["row"] != "original"]
    assert [figures["bytes"]["mean"] for figures in coded] == [1000, 2000, 3000, 4000]
    errors = [-figures["hd95_mm_whole_tumor"]["mean"] for figures in coded]  # turned, so that more is better
    rank = found["ranks"]["bytes"]["hd95_mm_whole_tumor"]
    assert rank["n"] == 4
    assert rank["rho"] == pytest.approx(spearmanr([1, 2, 3, 4], errors).statistic)
    for words in (
        "1 of 4 cases have no segmentation: BraTS-GLI-00003-000",
        "ET is empty in 1 of 4 cases (BraTS-GLI-00002-000)",
        "## Which cheap figure predicts the expensive one?",
        "## Synthetic lesions in t2f",
        "- A note.",
        "- unknown window of two",
        "| Worsens @ 3 |",
    ):
        assert words in report.table
    with (tmp_path / "out" / "records.csv").open() as file:
        rows = [*csv.DictReader(file)]
    assert len(rows) == report.expected == 4 * 5
    assert {row["dice_whole_tumor"] for row in rows if row["case"] == "BraTS-GLI-00003-000"} == {""}


def quadrants(command: RunTasks, row: Candidate, setting: float) -> np.ndarray:
    """Means of the four quarters of every slice with content in [-1, 1], of a row's results, at half precision."""
    found = []
    for item in command.items:
        content = item.read()
        for file in item.scans:
            scan = content.scans[file.contrast]
            unit = row.code(file, scan, setting).unit[scan.brain.any(axis=(1, 2))].astype(np.float64)
            rows, columns = unit.shape[1] // 2, unit.shape[2] // 2
            means = unit.reshape(len(unit), 2, rows, 2, columns).mean(axis=(2, 4))
            found.append((2 * means - 1).reshape(len(unit), 4))
    return np.concatenate(found).astype(np.float16).astype(np.float64)


def test_rfid_is_the_frechet_distance_of_what_the_perceptual_network_saw(
    cases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = Pixels()
    monkeypatch.setattr(recording, "feature_network", lambda name, weights: network)
    rows: list[Candidate] = [Keeps(), Worsens()]
    asked = {"perceptual": {"slices": 99}, "detectability": None, "radiomics": False}
    command = run_of(cases, tmp_path / "out", monkeypatch, rows, **asked)
    assert command.run().missing == 0
    original, keeps, *worsens = Report(command.study, command.rows, command.records()).points
    before = quadrants(command, Original(), 0)
    # The originals once, and each of four results; what comes back unchanged is known.
    assert network.images == 5 * len(before)
    assert keeps.spread("rfid").n == 4
    assert keeps.spread("rfid").mean == pytest.approx(0, abs=1e-9)
    assert original.spread("rfid").mean == pytest.approx(0, abs=1e-9)
    for point in worsens:
        after = quadrants(command, Worsens(), point.setting)
        covariances = np.cov(before.T), np.cov(after.T)
        root = sqrtm(covariances[0] @ covariances[1]).real
        shift = np.square(before.mean(axis=0) - after.mean(axis=0)).sum()
        expected = shift + np.trace(covariances[0] + covariances[1] - 2 * root)
        assert point.spread("rfid").mean == pytest.approx(expected, rel=0.01)
    assert worsens[0].spread("rfid").mean > 100 * worsens[3].spread("rfid").mean > 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    values = [point["figures"]["rfid"]["mean"] for point in found["points"] if point["row"] != "original"]
    others = [point["figures"]["dice_whole_tumor"]["mean"] for point in found["points"] if point["row"] != "original"]
    rank = found["ranks"]["rfid"]["dice_whole_tumor"]
    assert (rank["n"], rank["rho"]) == (5, pytest.approx(-spearmanr(values, others).statistic))
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| rFID ↓ |" in table
    assert f"rFID: {len(before)} slices of the originals and as many of each row, which efficientnet-lite0" in table
    files = [*(tmp_path / "out" / "records").rglob("*.npz")]
    assert len(files) == 4 * 6
    assert max(file.stat().st_size for file in files) < 2 * 4 * len(before) / 4 + 300


def test_records_of_earlier_versions_have_no_rfid_and_stay(
    cases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "feature_network", lambda name, weights: Pixels())
    asked = {"perceptual": {"slices": 3}, "segmenter": None, "detectability": None, "radiomics": False}
    command = run_of(cases, tmp_path / "out", monkeypatch, [Keeps(), Erases()], **asked)
    assert "| rFID" in command.run().table
    made: list[str] = []
    again = RunTasks(command.study, made.append)
    folder = tmp_path / "out" / "records" / "BraTS-GLI-00002-000"

    def earlier(unit: str) -> None:
        record = json.loads((folder / f"{unit}.json").read_text())
        del record["features"]
        (folder / f"{unit}.json").write_text(json.dumps(record))
        (folder / f"{unit}.npz").unlink()

    earlier("erases@1")
    report = again.run()
    assert (report.missing, made) == (0, [])
    original, keeps, erases = Report(again.study, again.rows, again.records()).points
    assert [point.spread("rfid").n for point in (original, keeps, erases)] == [4, 4, 0]
    assert erases.spread("perceptual").n == 4
    assert "rFID is left out of Erases: records that an earlier version made" in report.table
    (folder / "keeps@1.npz").write_bytes((folder / "original@0.npz").read_bytes() + b"x")  # another file
    assert "rFID is left out of Keeps, Erases: " in again.run().table
    earlier("original@0")
    report = again.run()
    assert "| rFID" not in report.table
    assert "rFID is left out of Original, Keeps, Erases: " in report.table
    assert "| LPIPS-style ↓ |" in report.table
    assert made == []
    for unit in ("original@0", "keeps@1", "erases@1"):
        (folder / f"{unit}.json").unlink()
    report = again.run()
    assert len(made) == 3
    assert "| rFID" in report.table
    assert "left out" not in report.table


def test_cases_without_a_record_are_named(cases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shutil.copytree(cases, tmp_path / "cases")
    (folder / "BraTS-GLI-00001-000" / "BraTS-GLI-00001-000-t2f.nii.gz").write_bytes(b"no volume")
    more = {"segmenter": None, "detectability": None, "radiomics": False}
    report = run_of(folder, tmp_path / "out", monkeypatch, [Keeps()], **more).run()
    assert [name for name, _ in report.problems] == ["BraTS-GLI-00001-000"]
    told = "1 of 4 cases have no record, as they could not be read or coded: BraTS-GLI-00001-000."
    assert told in (tmp_path / "out" / "table.md").read_text()


def test_what_is_there_is_not_made_again(cases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run_of(cases, tmp_path / "out", monkeypatch, segmenter=None, detectability=None)
    assert first.run().missing == 0
    made: list[str] = []
    again = RunTasks(first.study, made.append)
    assert again.run().missing == 0
    assert made == []
    path = tmp_path / "out" / "records" / "BraTS-GLI-00001-000" / "jpeg2000_8@25.json"
    path.unlink()
    assert again.run().missing == 0
    assert [line.split(":")[0] for line in made] == ["BraTS-GLI-00001-000 jpeg2000_8@25"]
    other = run_of(cases, tmp_path / "out", monkeypatch, detectability=None)  # with a segmenter
    assert other.dry_run()[0] == "BraTS-GLI-00000-000: 0 of 3 records"
    assert "No segmentation network was given" in (tmp_path / "out" / "table.md").read_text()


def test_a_copy_with_lesions_reads_as_what_was_put_in(
    cases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = run_of(cases, tmp_path / "out", monkeypatch).study
    file = find_case_files(study)[0]
    content = file.read()
    original = content.scans["t2f"]
    assert original.spacing == (1.5, 1, 1)
    assert study.detectability is not None
    copies = lesioned_cases(file, content, study.detectability, tmp_path)
    (copy,) = copies
    assert sorted((one.diameter, one.contrast) for one in copy.lesions) == [(3, 0.3), (5, 0.3)]
    unit = through_window(copy.content.unit, copy.content, original)
    changed = np.abs(unit - original.unit)
    for lesion in copy.lesions:
        assert not content.regions["whole_tumor"][lesion.center]  # type: ignore[index]
        assert unit[lesion.center] - original.unit[lesion.center] == pytest.approx(0.3, abs=0.02)
        box, _, _ = lesion.profile(original.unit.shape, original.spacing)
        changed[box] = 0
    assert changed.max() < 0.01
    assert copy.content.unit.shape == original.unit.shape
    again = lesioned_cases(file, content, study.detectability, tmp_path)
    assert again[0].lesions == copy.lesions
    without = find_case_files(study)[3]
    assert lesioned_cases(without, without.read(), study.detectability, tmp_path) == []


def test_a_tokenizer_codes_the_copies(cases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizers = [{"name": "toy", "checkpoint": str(CHECKPOINT)}]
    command = run_of(cases, tmp_path / "out", monkeypatch, codecs=[], tokenizers=tokenizers, segmenter=None)
    with pytest.raises(VaevqMedError, match=r"toy: found patient BraTS-GLI-00000, whom .* was trained on"):
        command.dry_run()
    command.__dict__.pop("rows", None)
    object.__setattr__(command, "items", command.items[1:2])
    assert command.run().missing == 0
    records = {record["row"]: record for record in command.records()}
    assert records["toy"]["bytes"] < records["original"]["bytes"]
    assert [lesion[:2] for lesion in records["toy"]["lesions"]] == [
        lesion[:2] for lesion in records["original"]["lesions"]
    ]
    assert all(math.isfinite(value) for lesion in records["toy"]["lesions"] for value in lesion)


def test_a_segmenter_that_has_seen_a_patient_is_refused(
    cases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = run_of(cases, tmp_path / "out", monkeypatch)
    patient = command.items[0].case.patient
    monkeypatch.setattr(Thresholds, "stored", SimpleNamespace(check_window=lambda recipe: [], data={NAMES: [patient]}))
    with pytest.raises(VaevqMedError, match=rf"segmenter: found patient {patient}, whom segmenter.pt was trained on"):
        command.dry_run()
    run_of(cases, tmp_path / "out", monkeypatch, split="training").dry_run()


def test_wrong_fields_are_one_line(cases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for fields, message in (
        ({"detectability": {"contrast": "t1n"}}, "detectability.contrast is t1n; expected one of contrasts (t1c, t2f)"),
        ({"detectability": {"diameters": [0]}}, "detectability.diameters[0] is 0; expected greater than 0"),
        ({"detectability": {"draw": 1}}, "detectability.draw is unknown; expected draws"),
        ({"codecs": []}, "codecs and tokenizers are empty; expected at least one"),
        ({"contrasts": ["t1c"], "detectability": None}, "contrasts are t1c; expected t2f too, for the segmenter"),
        (
            {"recipe": str(cases / "coronal.json")},
            "recipe two cuts coronal slices; expected axial ones for the segmenter",
        ),
        (
            {"tokenizers": [{"name": "original", "checkpoint": str(CHECKPOINT)}]},
            "tokenizers has original, which is the row of the originals; expected another name",
        ),
    ):
        with pytest.raises(VaevqMedError) as caught:
            run_of(cases, tmp_path / "out", monkeypatch, **fields).dry_run()
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


def test_the_command(cases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = run_of(cases, tmp_path / "out", monkeypatch, segmenter=None).study
    (tmp_path / "mine.yaml").write_text(study.text())
    assert read_study(str(tmp_path / "mine.yaml")) == study
    runner = CliRunner()
    for command in ("tasks", "study"):
        dry = runner.invoke(app, [command, str(tmp_path / "mine.yaml"), "--dry-run"])
        assert dry.exit_code == 0, dry.output
        assert "BraTS-GLI-00000-000: 0 of 3 records" in dry.output
    other = runner.invoke(app, ["tasks", "rate_distortion"])
    assert str(other.exception) == "study is rate_distortion; expected tasks"
    assert isinstance(read_study("tasks"), TasksStudy)


@pytest.mark.parametrize(("first", "second"), [([1, 2, 3, 4, 5], [2, 1, 4, 3, 5]), ([3, 1, 2, 2], [1, 5, 2, 4])])
def test_ranks_as_scipy_has_them(first: list[float], second: list[float]) -> None:
    found = rank_correlation(first, second)
    assert found.rho == pytest.approx(spearmanr(first, second).statistic)


def test_the_p_value_of_a_few_ranks_is_exact() -> None:
    # Of the 4! orders two are as far from 0 as the same order: itself and its reverse.
    assert rank_correlation([1, 2, 3, 4], [2, 3, 5, 9]).p_value == pytest.approx(2 / 24)
    assert rank_correlation([1, 2, 3, 4, math.nan], [2, 3, 5, 9, 1]).n == 4
    assert math.isnan(rank_correlation([1, 1, 1, 1], [1, 2, 3, 4]).rho)
    assert math.isnan(rank_correlation([1, 2], [1, 2]).p_value)
