"""Segmentations are read by the right map or not at all, and patients and masks that are missing are named."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from vaevq_med.core.errors import DataError
from vaevq_med.prepare.job import Prepare, Report
from vaevq_med.prepare.recipes import Recipe
from vaevq_med.prepare.volumes.find import find_cases
from vaevq_med.prepare.volumes.labels import LABEL_MAPS, UnknownLabelError, fitting_maps, label_map
from vaevq_med.prepare.volumes.source import VolumeSource
from vaevq_med.prepare.volumes.table import read_cases, read_patients

MODALITIES = ("t1n", "t1c", "t2w", "t2f")
OLD = dict(zip((*MODALITIES, "seg"), ("t1", "t1ce", "t2", "flair", "seg"), strict=True))
SHAPE = (16, 16, 4)


def make_case(root: Path, case: str, values: Sequence[int] | None, pattern: str = "{case}-{name}.nii.gz") -> None:
    rng = np.random.default_rng(sum(case.encode()))
    for name in MODALITIES:
        voxels = np.zeros(SHAPE, np.int16)
        voxels[1:-1, 1:-1, 1:-1] = rng.integers(1, 999, [n - 2 for n in SHAPE])
        write(root / case / pattern.format(case=case, name=name), voxels)
    if values is not None:
        write(root / case / pattern.format(case=case, name="seg"), mask(values))


def make_old(root: Path, case: str, values: Sequence[int] | None) -> None:
    make_case(root, case, values, "{name}.nii.gz")
    for name, old in OLD.items():
        if (path := root / case / f"{name}.nii.gz").exists():
            path.rename(root / case / f"{case}_{old}.nii.gz")


def mask(values: Sequence[int]) -> np.ndarray:
    voxels = np.zeros(SHAPE, np.uint8)
    for number, value in enumerate(values):
        voxels[2 + 3 * number : 4 + 3 * number, 4:9, 1:3] = value
    return voxels


def write(path: Path, voxels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), path)


def extract(root: Path, **options: Any) -> Report:
    recipe = Recipe.load("brats24/axial_256").changed(size=16)
    return Prepare(VolumeSource(root / "in", recipe, **options), root / "out", workers=1).run()


def entries(root: Path) -> list[dict[str, Any]]:
    content = json.loads((root / "out/dataset.json").read_text())
    return [{**entry, "split": split} for split in ("training", "validation", "test") for entry in content[split]]


# --- what speaks against a map ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "cases", "speaks", "fitting"),
    [
        ("brats2024", [{1, 2, 4}], True, ["brats2021"]),
        ("brats2024", [{2, 4}, {1, 2}], True, ["brats2021"]),
        ("brats2024", [{2, 4}, {1, 2, 3}], False, None),  # a cavity, and an enhancing tumor in another case
        ("brats2024", [{1, 2, 3}] * 50, False, None),  # 2023 has no cavity
        ("brats2024", [{1, 2}] * 9, False, None),  # a few low-grade tumors
        ("brats2024", [{1, 2}] * 12, True, []),
        ("brats2024", [{1}] * 12, True, []),  # whole tumors alone
        ("brats2021", [{1, 2, 4}] * 30 + [{1, 2}] * 5 + [set()], False, None),
        ("brats2021", [{1, 2, 3}], True, ["brats2024", "decathlon"]),
        ("decathlon", [{1, 2, 4}], True, ["brats2021"]),
        ("brats2024-ped", [{1, 2, 3}] * 30, True, ["brats2024", "decathlon"]),  # that is the release of 2023
        ("brats2024-ped", [{1, 2, 3, 4}] * 30, False, None),
        ("brats2024", [set()], False, None),
    ],
)
def test_values_over_a_data_set(name: str, cases: list[set[int]], speaks: bool, fitting: list[str] | None) -> None:
    assert (label_map(name).contradiction(cases) is not None) is speaks
    if fitting is not None:
        assert fitting_maps(name, cases) == fitting


def test_labels_of_2021_under_names_of_2024_stop_before_the_datalist(tmp_path: Path) -> None:
    for number in range(2):
        make_case(tmp_path / "in", f"BraTS-GLI-{number:05d}-000", (1, 2, 4))
    with pytest.raises(DataError, match="brats2021") as stopped:
        extract(tmp_path)
    assert "\n" not in str(stopped.value)
    assert not (tmp_path / "out/dataset.json").exists()
    with pytest.raises(DataError, match="brats2021"):  # a run that finds all cases done knows it too
        extract(tmp_path)

    right = extract(tmp_path, label_map="brats2021")
    assert right.written == 2
    assert all(entry["region_area"]["enhancing_tumor"] for entry in entries(tmp_path) if entry["slice"] == 1)
    assert right.facts["segmentations"] == [
        {"map": "brats2021", "named": True, "segmentations": 2, "with": {"1": 2, "2": 2, "4": 2}}
    ]
    assert not any("brats2021" in note for note in right.notes)


def test_a_map_that_is_named_overrides_and_is_noted(tmp_path: Path) -> None:
    make_case(tmp_path / "in", "BraTS-GLI-00000-000", (2, 4))
    with pytest.raises(DataError):
        extract(tmp_path)
    report = extract(tmp_path, label_map="brats2024")
    assert (report.written, report.reused) == (0, 1)
    (note,) = [note for note in report.notes if "brats2024" in note]
    assert "brats2021" in note
    assert report.facts["segmentations"][0]["named"] is True


def test_a_3_in_a_release_that_has_none_halts_at_once(tmp_path: Path) -> None:
    make_old(tmp_path / "in", "BraTS2021_00000", (1, 2, 3))
    make_old(tmp_path / "in", "BraTS2021_00001", (1, 2))
    with pytest.raises(DataError, match="brats2024 or decathlon") as stopped:
        extract(tmp_path)
    assert "BraTS2021_00000" in str(stopped.value)
    assert not (tmp_path / "out/dataset.json").exists()
    assert extract(tmp_path, label_map="brats2024").skipped == ()
    (skipped,) = extract(tmp_path, label_map="brats2021").skipped  # as it was told
    assert skipped[0] == "BraTS2021_00000"


def test_a_value_of_no_map_skips_the_case_alone(tmp_path: Path) -> None:
    make_case(tmp_path / "in", "BraTS-GLI-00000-000", (1, 2, 9))
    make_case(tmp_path / "in", "BraTS-GLI-00001-000", (1, 2, 3))
    report = extract(tmp_path)
    assert [name for name, _ in report.skipped] == ["BraTS-GLI-00000-000"]
    with pytest.raises(UnknownLabelError):
        label_map("brats2024").check({0, 9})


def forget_labels(output: Path) -> None:
    """Make the records those of a run from before they had the labels."""
    for path in (output / ".slices").glob("*.json"):
        record = json.loads(path.read_text())
        assert record.pop("labels")
        path.write_text(json.dumps(record))


def test_a_case_of_before_labels_were_noted_is_sliced_once_more(tmp_path: Path) -> None:
    make_case(tmp_path / "in", "BraTS-GLI-00000-000", (1, 2, 3))
    extract(tmp_path)
    before = json.loads((tmp_path / "out/dataset.json").read_text())["content_hash"]
    forget_labels(tmp_path / "out")
    report = extract(tmp_path)
    assert (report.written, report.reused) == (1, 0)
    assert report.facts["segmentations"][0]["with"] == {"1": 1, "2": 1, "3": 1, "4": 0}
    assert json.loads((tmp_path / "out/dataset.json").read_text())["content_hash"] == before


def test_records_from_before_do_not_hide_a_wrong_map(tmp_path: Path) -> None:
    """Beside a case of 2021, whose labels were written in the values of 2024."""
    make_case(tmp_path / "in", "BraTS-GLI-00000-000", (1, 2, 4))
    make_old(tmp_path / "in", "BraTS2021_00000", (1, 4))
    with pytest.raises(DataError, match="brats2021 would fit"):
        extract(tmp_path)
    forget_labels(tmp_path / "out")
    with pytest.raises(DataError, match="brats2021 would fit"):
        extract(tmp_path)


# --- tables ----------------------------------------------------------------------------------------------


def table(root: Path, *rows: str) -> Path:
    (root / "cases.csv").write_text("\n".join(rows) + "\n")
    return root / "cases.csv"


def test_a_table_with_segmentations_says_their_map(tmp_path: Path) -> None:
    (tmp_path / "v.nii").touch()
    head, images = "case,t1n,t1c,t2w,t2f,seg", "v.nii,v.nii,v.nii,v.nii"
    plain = table(tmp_path, head, f"a,{images},v.nii", f"b,{images},")
    with pytest.raises(DataError, match=r"label_map.*--label-map") as stopped:
        read_cases(plain, tmp_path, MODALITIES)
    assert all(name in str(stopped.value) for name in LABEL_MAPS)
    assert read_cases(plain, tmp_path, MODALITIES, label_map="decathlon").units[0].label_map == "decathlon"
    assert read_cases(table(tmp_path, head, f"b,{images},"), tmp_path, MODALITIES).problems == []
    mixed = table(tmp_path, head + ",label_map", f"a,{images},v.nii,brats2021", f"b,{images},v.nii,", f"c,{images},,")
    with pytest.raises(DataError, match="b"):
        read_cases(mixed, tmp_path, MODALITIES)
    found = read_cases(mixed, tmp_path, MODALITIES, label_map="brats2024").units
    assert [case.label_map for case in found[:2]] == ["brats2021", "brats2024"]
    assert all(case.map_is_stated for case in found)
    wrong = table(tmp_path, head + ",label_map", f"a,{images},v.nii,brats2019", f"b,{images},v.nii,brats2021")
    ((name, problem),) = read_cases(wrong, tmp_path, MODALITIES).problems
    assert name == "a"
    assert "brats2019" in problem


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("case\na\n", "columns case"),
        ("case,patient\na,\n", "a row without a patient"),
        ("case,patient\na,P\na,Q\n", "P and Q"),
        ("", "columns none"),
    ],
)
def test_a_bad_table_of_patients_is_refused(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text(text)
    with pytest.raises(DataError, match=said):
        read_patients(tmp_path / "p.csv")


# --- patients --------------------------------------------------------------------------------------------


def test_a_patient_of_two_years_is_one_and_stays_where_it_was_dealt(tmp_path: Path) -> None:
    make_old(tmp_path / "in", "Brats18_TCIA02_151_1", (1, 2, 4))
    for number in range(5):
        make_old(tmp_path / "in", f"Brats18_CBICA_A{number}_1", (1, 2, 4))
    extract(tmp_path)
    before = {entry["case"]: (entry["patient"], entry["split"]) for entry in entries(tmp_path)}
    make_old(tmp_path / "in", "Brats17_TCIA_151_1", (1, 2, 4))
    report = extract(tmp_path)
    assert (report.written, report.reused) == (1, 6)
    after = {entry["case"]: (entry["patient"], entry["split"]) for entry in entries(tmp_path)}
    assert after.pop("Brats17_TCIA_151_1") == before["Brats18_TCIA02_151_1"]
    assert after == before


def test_who_was_dealt_apart_comes_together_in_training(tmp_path: Path) -> None:
    for case in ("Brats17_TCIA_151_1", "Brats18_TCIA02_151_1"):
        make_old(tmp_path / "in", case, None)
    extract(tmp_path)
    splits = {"Brats17_TCIA_151": "test", "Brats18_TCIA02_151": "training"}
    (tmp_path / "out/splits.json").write_text(json.dumps(splits))  # of before
    report = extract(tmp_path)
    assert {entry["split"] for entry in entries(tmp_path)} == {"training"}
    assert len({entry["patient"] for entry in entries(tmp_path)}) == 1
    (note,) = [note for note in report.notes if "Brats17_TCIA_151" in note]
    assert "Brats18_TCIA02_151" in note


def test_releases_that_share_patients_are_noted_until_the_patients_are_given(tmp_path: Path) -> None:
    for case in ("BraTS20_Training_001", "BraTS2021_00001"):
        make_old(tmp_path / "in", case, None)
    (note,) = [note for note in extract(tmp_path).notes if "share" in note]
    assert all(word in note for word in ("BraTS20_Training_001", "BraTS2021_00001", "--patients"))
    (tmp_path / "p.csv").write_text("case,patient\nBraTS20_Training_001,BraTS2021_00001\nelsewhere,x\n")
    report = extract(tmp_path, patients=tmp_path / "p.csv")
    assert not [note for note in report.notes if "share" in note]
    assert {entry["patient"] for entry in entries(tmp_path)} == {"BraTS2021_00001"}
    (tmp_path / "p.csv").write_text("case,patient\nelsewhere,x\n")
    with pytest.raises(DataError, match="none of the cases"):
        extract(tmp_path, patients=tmp_path / "p.csv")


# --- masks that are missing ------------------------------------------------------------------------------


def touch(root: Path, case: str, *names: str) -> None:
    (root / case).mkdir(parents=True, exist_ok=True)
    for name in names:
        (root / case / f"{case}-{name}.nii.gz").touch()


def test_cases_without_a_mask_are_named_beside_cases_with_one(tmp_path: Path) -> None:
    touch(tmp_path, "BraTS-GLI-00000-000", *MODALITIES, "seg")
    assert find_cases(tmp_path, MODALITIES).notes == []
    touch(tmp_path, "BraTS-GLI-00001-000", *MODALITIES)
    touch(tmp_path, "BraTS-GLI-00002-000", *MODALITIES, "Tumor_Mask", "t1km")
    missing, stray = [note for note in find_cases(tmp_path, MODALITIES).notes if "segmentation" in note]
    assert missing.startswith("2 of 3")
    assert all(f"BraTS-GLI-0000{number}-000" in missing for number in (1, 2))
    assert "BraTS-GLI-00000-000" not in missing
    assert "BraTS-GLI-00002-000-Tumor_Mask.nii.gz" in stray
    assert "t1km" not in stray


def test_without_any_mask_only_what_looks_like_one_is_named(tmp_path: Path) -> None:
    touch(tmp_path, "BraTS-GLI-00001-000", *MODALITIES)
    assert find_cases(tmp_path, MODALITIES).notes == []
    touch(tmp_path, "BraTS-GLI-00001-000", "labels")
    assert any("BraTS-GLI-00001-000-labels.nii.gz" in note for note in find_cases(tmp_path, MODALITIES).notes)


def test_in_one_folder_a_mask_belongs_to_the_case_of_its_name(tmp_path: Path) -> None:
    for number in (1, 10):
        for name in MODALITIES:
            (tmp_path / f"p{number}_{name}.nii").touch()
    (tmp_path / "p10_mask.nii").touch()
    (tmp_path / "p1_mask.nii").touch()
    rows = [f"p{n}," + ",".join(f"p{n}_{name}.nii" for name in MODALITIES) for n in (1, 10)]
    path = table(tmp_path, "case,t1n,t1c,t2w,t2f,seg,label_map", rows[0] + ",,", rows[1] + ",p10_mask.nii,brats2021")
    missing, stray = [note for note in read_cases(path, tmp_path, MODALITIES).notes if "segmentation" in note]
    assert missing.startswith("1 of 2")
    assert "p1_mask.nii" in stray
    assert "p10_mask.nii" not in stray
