"""Finding cases by name and by CSV, label maps, recipes, and how patients are dealt to splits."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vaevq_med.core.errors import DataError, VaevqMedError
from vaevq_med.images.patients import patient_of
from vaevq_med.images.splits import (
    SplitRule,
    count_patients,
    patient_position,
    read_split_file,
    split_by_file,
    split_by_hash,
    split_by_rule,
)
from vaevq_med.prepare.job import Search
from vaevq_med.prepare.recipes import Recipe
from vaevq_med.prepare.volumes.case import Case, Volume
from vaevq_med.prepare.volumes.find import find_cases
from vaevq_med.prepare.volumes.labels import BRATS2021, BRATS2024, BRATS2024_PED, DECATHLON, LABEL_MAPS, label_map
from vaevq_med.prepare.volumes.table import read_cases

MODALITIES = ("t1n", "t1c", "t2w", "t2f")
NAMES_2021 = {"t1n": "t1", "t1c": "t1ce", "t2w": "t2", "t2f": "flair", "seg": "seg"}


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def touch_2024(root: Path, folder: str, case: str, *, suffix: str = ".nii.gz", seg: bool = False) -> None:
    touch(root, *(f"{folder}/{case}-{m}{suffix}" for m in (*MODALITIES, *(["seg"] if seg else []))))


def search(root: Path, **options: Any) -> Search[Case]:
    return find_cases(root, MODALITIES, **options)


# --- search by name -----------------------------------------------------------------------------------


@pytest.mark.parametrize("nesting", [".", "a", "a/b/c/BraTS2024"])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".mha", ".nrrd", ".NII.GZ"])
def test_2024_names_are_found_under_any_nesting(tmp_path: Path, nesting: str, suffix: str) -> None:
    touch_2024(tmp_path, f"{nesting}/BraTS-GLI-00005-101", "BraTS-GLI-00005-101", suffix=suffix, seg=True)
    (case,) = search(tmp_path).units
    assert (case.name, case.patient, case.label_map) == ("BraTS-GLI-00005-101", "BraTS-GLI-00005", "brats2024")
    assert {m: s.path.name for m, s in case.images.items()} == {m: f"{case.name}-{m}{suffix}" for m in MODALITIES}
    assert case.segmentation is not None
    assert case.segmentation.path.name == f"{case.name}-seg{suffix}"


@pytest.mark.parametrize("kind", ["GLI", "MET", "MEN", "PED", "SSA"])
def test_every_challenge_of_2023_and_2024_is_found(tmp_path: Path, kind: str) -> None:
    touch_2024(tmp_path, "x", f"BraTS-{kind}-00110-000", seg=True)
    (case,) = search(tmp_path).units
    assert case.patient == f"BraTS-{kind}-00110"
    assert case.label_map == ("brats2024-ped" if kind == "PED" else "brats2024")


@pytest.mark.parametrize(
    ("case", "patient"),
    [
        ("BraTS2021_00000", "BraTS2021_00000"),
        ("BraTS20_Training_001", "BraTS20_Training_001"),
        ("Brats18_TCIA01_131_1", "Brats18_TCIA01_131"),
        ("BraTS19_CBICA_AAB_1", "BraTS19_CBICA_AAB"),
        ("Brats17_2013_10_1", "Brats17_2013_10"),
    ],
)
def test_names_of_2017_to_2021(tmp_path: Path, case: str, patient: str) -> None:
    touch(tmp_path, *(f"HGG/{case}/{case}_{name}.nii.gz" for name in NAMES_2021.values()))
    (found,) = search(tmp_path).units
    assert (found.name, found.patient, found.label_map) == (case, patient, "brats2021")
    assert {m: s.path.name for m, s in found.images.items()} == {
        m: f"{case}_{NAMES_2021[m]}.nii.gz" for m in MODALITIES
    }


def test_timepoints_are_one_patient() -> None:
    assert patient_of("BraTS-GLI-00005-100") == patient_of("BraTS-GLI-00005-101") == "BraTS-GLI-00005"
    assert patient_of("BraTS-GLI-00005-100") != patient_of("BraTS-MET-00005-100")
    assert patient_of("my-scan-1") == "my-scan-1"


def test_decathlon_channels_are_in_its_own_order(tmp_path: Path) -> None:
    touch(tmp_path, *(f"Task01_BrainTumour/{f}/BRATS_{n}.nii.gz" for f in ("imagesTr", "labelsTr") for n in (1, 2)))
    touch(tmp_path, "Task01_BrainTumour/imagesTs/BRATS_485.nii.gz", "Task01_BrainTumour/imagesTr/._BRATS_1.nii.gz")
    first, second, test = search(tmp_path).units
    path = tmp_path / "Task01_BrainTumour/imagesTr/BRATS_1.nii.gz"
    assert first.images == {
        "t2f": Volume(path, 0),
        "t1n": Volume(path, 1),
        "t1c": Volume(path, 2),
        "t2w": Volume(path, 3),
    }
    assert (first.label_map, first.segmentation) == ("decathlon", Volume(path.parents[1] / "labelsTr/BRATS_1.nii.gz"))
    assert second.name == "BRATS_2"
    assert test.segmentation is None


def test_a_recipe_with_a_contrast_that_the_decathlon_lacks(tmp_path: Path) -> None:
    touch(tmp_path, "imagesTr/BRATS_001.nii.gz")
    ((name, problem),) = find_cases(tmp_path, ("t1n", "adc")).problems
    assert (name, problem) == ("BRATS_001", "found contrasts t2f, t1n, t1c, t2w, expected also adc")


def test_a_missing_contrast_is_named(tmp_path: Path) -> None:
    touch_2024(tmp_path, "x", "BraTS-GLI-00001-000")
    touch_2024(tmp_path, "y", "BraTS-GLI-00002-000")
    (tmp_path / "y/BraTS-GLI-00002-000-t2f.nii.gz").unlink()
    result = search(tmp_path)
    assert [case.name for case in result.units] == ["BraTS-GLI-00001-000"]
    assert result.problems == [
        ("BraTS-GLI-00002-000", "missing t2f; found t1c, t1n, t2w, expected t1n, t1c, t2w, t2f"),
    ]


def test_a_name_in_two_folders_and_two_files_for_one_contrast(tmp_path: Path) -> None:
    touch_2024(tmp_path, "train", "BraTS-GLI-00001-000")
    touch_2024(tmp_path, "copy", "BraTS-GLI-00001-000")
    touch_2024(tmp_path, "x", "BraTS-GLI-00002-000")
    touch(tmp_path, "x/BraTS-GLI-00002-000-t1n.nii")
    problems = dict(search(tmp_path).problems)
    assert problems["BraTS-GLI-00001-000"] == (
        "found a duplicate case name (copy/BraTS-GLI-00001-000-t1c.nii.gz and "
        "train/BraTS-GLI-00001-000-t1c.nii.gz), expected one"
    )
    assert problems["BraTS-GLI-00002-000"].startswith("found 2 files for t1n (x/BraTS-GLI-00002-000-t1n.nii and ")


def test_other_volumes_are_noted_and_other_files_are_not(tmp_path: Path) -> None:
    touch_2024(tmp_path, "x", "BraTS-GLI-00001-000")
    touch(tmp_path, "x/readme.txt", "x/scan.nii.gz", "x/BraTS-GLI-00001-000-adc.nii.gz", ".hidden/a.nii", "x/._y.nii")
    (note,) = search(tmp_path).notes
    assert note == (
        "2 volumes of other names were left out (first: x/BraTS-GLI-00001-000-adc.nii.gz); describe them with --cases"
    )


def test_a_file_name_of_any_bytes_makes_one_printable_line(tmp_path: Path) -> None:
    touch_2024(tmp_path, "x", "BraTS-GLI-00001-000")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9\n.nii.gz")).touch()
    (note,) = search(tmp_path).notes
    assert "(first: caf??.nii.gz)" in note
    note.encode()


def test_links_in_a_circle_end_and_the_output_is_left_out(tmp_path: Path) -> None:
    touch_2024(tmp_path, "x", "BraTS-GLI-00001-000")
    touch_2024(tmp_path, "out/images", "BraTS-GLI-00001-000")
    (tmp_path / "x" / "loop").symlink_to(tmp_path)
    (tmp_path / "again").symlink_to(tmp_path / "x")
    result = search(tmp_path, exclude=tmp_path / "out")
    assert len(result.units) == 1
    assert not result.problems


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "found nothing, expected a folder of cases"),
        (lambda p: p.touch(), "found a file, expected a folder of cases"),
        (lambda p: p.mkdir(), "found no case, expected BraTS or Decathlon names"),
        (lambda p: touch(p, "a/scan.nii"), r"found no case but 1 volumes of other names \(a/scan.nii\)"),
    ],
)
def test_an_input_without_a_case_is_refused(tmp_path: Path, make: Any, message: str) -> None:
    make(tmp_path / "in")
    with pytest.raises(DataError, match=message):
        search(tmp_path / "in")


def test_a_path_too_long_for_the_system_is_refused() -> None:
    with pytest.raises(DataError, match="found nothing, expected a folder"):
        search(Path("a" * 5000))


def test_a_note_on_pediatric_labels(tmp_path: Path) -> None:
    touch_2024(tmp_path, "x", "BraTS-GLI-00001-000")
    touch_2024(tmp_path, "p", "BraTS-PED-00001-000", seg=True)
    touch(tmp_path, *(f"y/BraTS2021_00001_{name}.nii.gz" for name in NAMES_2021.values()))
    notes = " ".join(search(tmp_path).notes)
    assert "for the 2023 release: --label-map brats2024" in notes
    result = search(tmp_path, label_map="brats2024")
    assert {case.label_map for case in result.units} == {"brats2024"}
    assert "--label-map" not in " ".join(result.notes)


# --- CSV ----------------------------------------------------------------------------------------------


def table(root: Path, text: str, *, encoding: str = "utf-8") -> Path:
    path = root / "cases.csv"
    path.write_bytes(text.encode(encoding))
    return path


def from_csv(root: Path, text: str, **options: Any) -> Search[Case]:
    touch(root, "a.nii", "b.mha", "c.nrrd", "d.nii.gz", "s.nii")
    return read_cases(table(root, text, **options), root, MODALITIES)


def test_csv_paths_aliases_and_patients(tmp_path: Path) -> None:
    result = from_csv(
        tmp_path,
        "case, T1, t1ce, T2, FLAIR, Seg, Patient, site, Label_Map\n"
        f"x, a.nii, b.mha, c.nrrd, {tmp_path}/d.nii.gz, s.nii, P1, here, brats2021\n"
        "w, a.nii, b.mha, c.nrrd, d.nii.gz, , , \n"
        "\n,,,,,,,\n"
        "BraTS-GLI-00001-000,a.nii,b.mha,c.nrrd,d.nii.gz\n",
        encoding="utf-8-sig",
    )
    named, w, x = result.units
    assert (named.patient, w.patient, x.patient) == ("BraTS-GLI-00001", "w", "P1")
    assert {m: s.path for m, s in x.images.items()} == dict(
        zip(MODALITIES, (tmp_path / n for n in ("a.nii", "b.mha", "c.nrrd", "d.nii.gz")), strict=True)
    )
    assert x.segmentation == Volume(tmp_path / "s.nii")
    assert w.segmentation is None
    assert x.label_map == "brats2021"
    unused, missing = result.notes
    assert unused == "cases cases.csv: columns site are not used"
    assert missing.startswith("2 of 3")
    assert not result.problems


@pytest.mark.parametrize("column", ["patient", "Patient", " PATIENT "])
def test_a_patient_column_is_never_overlooked(tmp_path: Path, column: str) -> None:
    """A split by case, where the patient stood under another spelling, would leak."""
    result = from_csv(
        tmp_path,
        f"case,{column},t1n,t1c,t2w,t2f\nx,P,a.nii,a.nii,a.nii,a.nii\ny,P,a.nii,a.nii,a.nii,a.nii\n",
    )
    assert {case.patient for case in result.units} == {"P"}


@pytest.mark.parametrize(
    ("row", "name", "message"),
    [
        ("x,a.nii,gone.nii,c.nrrd,d.nii.gz", "x", "found no file .*gone.nii, expected one as cases.csv says"),
        ("x,a.nii,.,c.nrrd,d.nii.gz", "x", "found no file .*, expected one"),
        (f"x,a.nii,{'y' * 5000},c.nrrd,d.nii.gz", "x", "found no file"),
        ("x,a.nii,,c.nrrd,d.nii.gz", "x", "missing t1c; found t1n, t2f, t2w, expected t1n, t1c, t2w, t2f"),
        ("../x,a.nii,b.mha,c.nrrd,d.nii.gz", "../x", r"found case name '\.\./x', expected 1 to 128 letters"),
        (",a.nii,b.mha,c.nrrd,d.nii.gz", "(no name)", "found case name '', expected 1 to 128 letters"),
        ('"x\ny",a.nii,b.mha,c.nrrd,d.nii.gz', "x?y", r"found case name 'x\\ny', expected"),
        ("good,a.nii,b.mha,c.nrrd,d.nii.gz", "good", "found 2 rows of this name in cases.csv, expected one"),
    ],
)
def test_a_bad_row_is_one_line(tmp_path: Path, row: str, name: str, message: str) -> None:
    rows = f"other,a.nii,b.mha,c.nrrd,d.nii.gz\ngood,a.nii,b.mha,c.nrrd,d.nii.gz\n{row}\n"
    result = from_csv(tmp_path, "case,t1n,t1c,t2w,t2f\n" + rows)
    ((found, problem),) = result.problems
    assert found == name
    assert "\n" not in problem
    with pytest.raises(DataError, match=message):
        raise DataError(problem)
    assert [case.name for case in result.units] == (["other"] if name == "good" else ["good", "other"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "found columns none, expected also case, t1n, t1c, t2w, t2f"),
        ("case;t1n;t1c;t2w;t2f\n", "found columns case;t1n;t1c;t2w;t2f, expected also case"),
        ("case,t1n,t1c,t2w\nx,a,b,c\n", "expected also t2f"),
        ("case,t1n,t1,t1c,t2w,t2f\nx,a,b,c,d,e\n", "found 2 columns for t1n, expected one"),
        ("case,case,t1n,t1c,t2w,t2f\nx,a,b,c,d,e\n", "found 2 columns for case, expected one"),
        ("case,t1n,t1c,t2w,t2f\n,,,,\n", "found no rows, expected one for each case"),
    ],
)
def test_a_bad_table_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        from_csv(tmp_path, text)


def test_a_table_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found no readable CSV"):
        read_cases(tmp_path / "gone.csv", tmp_path, MODALITIES)
    with pytest.raises(DataError, match="found no readable CSV"):
        from_csv(tmp_path, "case,t1n\nä", encoding="latin-1")


# --- label maps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LABEL_MAPS)
def test_regions_are_nested_and_keep_their_meaning_in_brats2024(name: str) -> None:
    own = label_map(name)
    regions = {region: set(values) for region, values in own.regions.items()}
    assert regions["enhancing_tumor"] < regions["tumor_core"] < regions["whole_tumor"] <= set(own.labels)
    assert set(own.to_brats2024) == set(own.labels)
    stored = np.array([0, *own.labels], np.uint8)
    converted = own.convert(stored, BRATS2024)
    for region, values in BRATS2024.regions.items():
        np.testing.assert_array_equal(np.isin(converted, values), np.isin(stored, own.regions[region]), region)
    np.testing.assert_array_equal(own.convert(stored, own), stored)


def test_label_values_by_year() -> None:
    values = np.arange(5, dtype=np.uint8)
    np.testing.assert_array_equal(BRATS2021.convert(values, BRATS2024), [0, 1, 2, 0, 3])
    np.testing.assert_array_equal(BRATS2024_PED.convert(values, BRATS2024), [0, 3, 1, 1, 2])
    np.testing.assert_array_equal(DECATHLON.convert(values[:4], BRATS2024), [0, 2, 1, 3])


def test_unknown_labels_and_maps_are_refused() -> None:
    with pytest.raises(DataError, match=r"found label 3, 9 in the segmentation, expected some of 0, 1, 2, 4 \(brats20"):
        BRATS2021.check({0, 1, 3, 9})
    with pytest.raises(DataError, match="found 'brats', expected one of brats2021, brats2024, brats2024-ped, decathl"):
        label_map("brats")
    with pytest.raises(DataError, match="found target label map decathlon"):
        BRATS2021.convert(np.zeros(1, np.uint8), DECATHLON)


# --- recipes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["brats24/axial_256", "brats24/axial_256_n4"])
def test_shipped_recipes_hold_every_field_and_go_round(name: str) -> None:
    recipe = Recipe.load(name)
    assert recipe.name == name
    assert Recipe.read(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert (recipe.percentiles, recipe.min_foreground, recipe.size, recipe.antialias) == ((0.0, 99.5), 0.05, 256, True)
    assert (recipe.split.seed, recipe.split.training, recipe.split.validation) == (0, 0.8, 0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sise": 128}, "sise is unknown; did you mean size\\?$"),
        ({"size": 7}, "size is 7; expected 8 to 4096 pixels"),
        ({"size": 4097}, "size is 4097; expected 8 to 4096 pixels"),
        ({"size": 64.0}, "size is 64.0; expected 8"),
        ({"size": "64"}, 'size is "64"; expected 8'),
        ({"size": True}, "size is true; expected 8"),
        ({"format": "jpg"}, 'format is "jpg"; expected one of png, png16, npy$'),
        ({"axis": "axail"}, 'axis is "axail"; expected one of axial, coronal, sagittal$'),
        ({"axis": ["axial"]}, "axis is"),
        ({"axis": {}}, "axis is"),
        ({"interpolation": "nearest"}, "interpolation is"),
        ({"percentiles": [99, 1]}, r"percentiles is \[99, 1\]; expected two rising numbers"),
        ({"percentiles": [0, 101]}, "percentiles is"),
        ({"percentiles": [0, 10**400]}, "percentiles is"),
        ({"percentiles": [float("nan"), 99]}, "percentiles is"),
        ({"percentiles": None}, "percentiles is null; expected two rising"),
        ({"percentiles": 99}, "percentiles is 99; expected two rising"),
        ({"min_foreground": 5}, r"min_foreground is 5; expected a share in \[0, 1\]"),
        ({"spacing": 1.0}, "spacing is 1.0; expected three lengths from 0.05 to 50 mm, or null"),
        ({"spacing": [1, 1]}, "spacing is"),
        ({"spacing": [0, 1, 1]}, "spacing is"),
        ({"modalities": 1}, "modalities is"),
        ({"modalities": []}, "modalities is"),
        ({"modalities": ["t1n", "t1n"]}, "modalities is .*; expected names of .*, each one once"),
        ({"modalities": ["t1n", "seg"]}, "modalities is .* other than seg, case, patient, image"),
        ({"modalities": ["image"]}, "modalities is"),
        ({"modalities": ["../t1"]}, "modalities is"),
        ({"modalities": [["t1n"]]}, "modalities is"),
        ({"max_obliquity_degrees": 90}, "max_obliquity_degrees is 90; expected 0 to 45"),
        ({"clip_negatives": 1}, "clip_negatives is 1; expected true or false"),
        ({"bias_field_correction": True}, "bias_field_correction is true; expected an object, or null"),
        (
            {"bias_field_correction": {"shrink": 4}},
            "bias_field_correction.shrink is unknown; did you mean shrink_factor",
        ),
        ({"bias_field_correction": {"iterations": []}}, "bias_field_correction.iterations is"),
        ({"bias_field_correction": {"shrink_factor": 0}}, "bias_field_correction.shrink_factor is 0; expected 1 to 16"),
        ({"split": None}, "split is null; expected an object"),
        (
            {"split": {"training": 0.8, "test": 0.2}},
            "split.test is unknown; expected some of seed, training, validation",
        ),
        (
            {"split": {"training": 0.8, "validation": 0.3}},
            r"split.validation is 0.3; expected a share in \[0, 1\], with training at most 1",
        ),
        ({"split": {"training": 0.95}}, "split.validation is 0.1; expected a share"),
        ({"split": {"seed": -1}}, "split.seed is -1; expected a whole number from 0"),
        ({"name": ""}, 'name is ""; expected a text'),
        ({"name": None}, "name is null; expected a text"),
        ({"description": 3}, "description is 3; expected a text"),
    ],
)
def test_a_mistaken_recipe_is_refused_in_one_line(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({**Recipe.load("brats24/axial_256").to_dict(), **change}))
    with pytest.raises(DataError, match=message) as caught:
        Recipe.load(path)
    assert "\n" not in str(caught.value)
    assert "mine.json" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "found invalid JSON"),
        ("[]", r"it is \[\]; expected an object"),
        ("{}", "name is missing; expected a text"),
        ("\xff", "found invalid JSON"),
        ("[" * 100_000, "found invalid JSON"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=message):
        Recipe.load(path)


def test_an_unknown_recipe_is_refused_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(VaevqMedError, match=r"expected one of .*brats24/axial_256"):
        Recipe.load("brats24/axial_265")
    with pytest.raises(DataError, match="found no readable file"):
        Recipe.load(tmp_path / "gone.json")


def test_the_image_hash_follows_what_decides_the_bytes() -> None:
    recipe = Recipe(name="a")
    assert recipe.image_hash == Recipe(name="b", description="x", split=SplitRule(seed=3)).image_hash
    others = [
        Recipe(name="a", size=128),
        Recipe(name="a", format="npy"),
        Recipe(name="a", percentiles=(1.0, 99.5)),
        Recipe(name="a", modalities=("t1c",)),
        recipe.changed(format="png16"),
    ]
    assert len({recipe.image_hash, *(other.image_hash for other in others)}) == 6
    assert recipe.changed() == recipe


# --- splits -------------------------------------------------------------------------------------------

patients = st.sets(st.text(st.characters(codec="utf-8"), min_size=1, max_size=20), max_size=30)


@given(patients, patients, st.integers(0, 2**63 - 1))
def test_adding_patients_moves_nobody(some: set[str], more: set[str], seed: int) -> None:
    rule = SplitRule(seed=seed)
    before, after = split_by_hash(some, rule), split_by_hash(some | more, rule)
    assert before == {patient: after[patient] for patient in some}


def test_the_split_is_frozen() -> None:
    """Values as a first release wrote them; another result here would move patients between splits."""
    assert patient_position("BraTS-GLI-00000") == 0.44496701375097925
    assert patient_position("BraTS-GLI-00005", seed=7) == 0.03207906474930111


def test_shares_come_near_80_10_10_and_seeds_differ() -> None:
    names = [f"BraTS-GLI-{n:05d}" for n in range(10_000)]
    counts = count_patients(split_by_hash(names, SplitRule()))
    assert counts["training"] == pytest.approx(8000, abs=150)
    assert counts["validation"] == pytest.approx(1000, abs=120)
    assert counts["test"] == pytest.approx(1000, abs=120)
    assert split_by_hash(names, SplitRule()) != split_by_hash(names, SplitRule(seed=1))
    positions = np.array([patient_position(name) for name in names])
    assert 0 <= positions.min() <= positions.max() < 1


@given(patients, st.floats(0, 1), st.floats(0, 1))
def test_every_patient_gets_one_split(some: set[str], a: float, b: float) -> None:
    low, high = sorted((a, b))
    rule = SplitRule(training=low, validation=high - low)
    splits = split_by_hash(some, rule)
    assert set(splits) == some
    assert sum(count_patients(splits).values()) == len(some)


shares = st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted)


@given(patients, shares, st.integers(0, 2**63 - 1), st.randoms())
def test_quotas_are_kept_to_within_one_patient(some: set[str], bounds: list[float], seed: int, chance: Any) -> None:
    rule = SplitRule(seed=seed, training=bounds[0], validation=bounds[1] - bounds[0])
    splits = split_by_rule(some, rule)
    assert set(splits) == some
    wanted = {"training": bounds[0], "validation": bounds[1] - bounds[0], "test": 1 - bounds[1]}
    for split, count in count_patients(splits).items():
        assert abs(count - wanted[split] * len(some)) < 1 + 1e-9
    shuffled = sorted(some)
    chance.shuffle(shuffled)
    assert split_by_rule(shuffled, rule) == splits


@given(patients, patients, st.integers(0, 2**63 - 1))
def test_who_was_dealt_keeps_the_split(some: set[str], more: set[str], seed: int) -> None:
    rule = SplitRule(seed=seed)
    before = split_by_rule(some, rule)
    after = split_by_rule(some | more, rule, before)
    assert before == {patient: after[patient] for patient in some}


def test_small_data_sets_get_the_shares_that_they_ask_for() -> None:
    """42 patients: the hash alone gives 34, 7 and 1."""
    names = [f"BraTS-GLI-{n:05d}" for n in range(42)]
    assert count_patients(split_by_rule(names, SplitRule())) == {"training": 34, "validation": 4, "test": 4}
    # One more after another: who comes later fills what is missing.
    splits: dict[str, str] = {}
    for number in range(1, 43):
        splits = split_by_rule(names[:number], SplitRule(), splits)
    assert count_patients(splits) == {"training": 34, "validation": 4, "test": 4}


def test_the_deal_by_quota_is_frozen() -> None:
    """In the order of the hashes, training first."""
    order = sorted("abcd", key=lambda name: int(hashlib.sha256(f"0:{name}".encode()).hexdigest(), 16))
    splits = split_by_rule("abcd", SplitRule(training=0.5, validation=0.25))
    assert [splits[name] for name in order] == ["training", "training", "validation", "test"]


def test_split_files_as_json_and_csv(tmp_path: Path) -> None:
    json_file, csv_file = tmp_path / "s.json", tmp_path / "s.CSV"
    json_file.write_text('{"a": "training", "b": "test", "c": "validation"}')
    csv_file.write_text("patient, split, why\na, training, x\nb, test,\nb,test\nc, validation\n")
    expected = {"a": "training", "b": "test", "c": "validation"}
    assert read_split_file(json_file) == read_split_file(csv_file) == expected
    assert split_by_file(["b"], json_file) == {"b": "test"}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("s.json", '{"a": "train"}', "found split 'train' for patient 'a', expected one of training, validation, test"),
        ("s.json", '{"a": "test", "a": "training"}', "found patient 'a' in test and training, expected one split"),
        ("s.json", '["a"]', "found other JSON, expected an object"),
        ("s.json", "3", "found other JSON"),
        ("s.json", '{"a": {"split": "test"}}', "found other JSON"),
        ("s.json", '{"a": ', "found invalid JSON"),
        ("s.json", "[" * 100_000, "found invalid JSON"),
        ("s.json", '{"b": "test"}', "found no patient a, expected every patient of the input"),
        ("s.csv", "a,test\n", "found columns a, test, expected patient and split"),
        ("s.csv", "", "found columns none, expected patient and split"),
        ("s.csv", "patient,split\na\n", "found split '' for patient 'a'"),
        ("s.csv", "patient,split\na,test\na,training\n", "found patient 'a' in test and training"),
        ("s.csv", f"patient,split\n{'a' * 200_000},test\n", "found no readable CSV"),
        ("s.csv", "\xff", "found no readable file"),
    ],
)
def test_a_bad_split_file_is_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=message):
        split_by_file(["a"], tmp_path / name)
    with pytest.raises(DataError, match="found no readable file"):
        split_by_file(["a"], tmp_path / "gone.json")
