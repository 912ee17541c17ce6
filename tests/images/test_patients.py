"""One patient is one, whatever a release calls them, and the splits that are dealt already stay."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vaevq_med.core.errors import DataError
from vaevq_med.images.patients import one_name_each, patient_of, person_of, sharing_releases
from vaevq_med.images.splits import SplitRule, split_by_file, split_by_rule

SAME = [
    ("Brats17_TCIA_151_1", "Brats18_TCIA_151_1"),
    ("Brats17_TCIA_151_1", "BraTS19_TCIA02_151_1"),  # the sites of TCIA had no number in 2017
    ("Brats17_CBICA_AAB_1", "BraTS19_CBICA_AAB_1"),
    ("Brats17_2013_10_1", "Brats18_2013_10_1"),
    ("BraTS-GLI-00005-000", "BraTS-GLI-00005-101"),
    ("Brats18_TCIA02_151", "Brats18_TCIA02_151_1"),  # a patient's name without the number of the examination
    ("BRATS17_2013_10", "Brats18_2013_10_2"),
]
OTHER = [
    ("Brats18_TCIA02_151_1", "Brats18_TCIA02_171_1"),
    ("Brats18_2013_10_1", "Brats18_CBICA_10_1"),
    ("Brats18_TCIA02_131", "Brats18_TCIA02_151"),
    ("Brats17_TCIA_131", "Brats17_TCIA_151"),
    ("Brats18_2013_10", "Brats18_2013_11"),
    ("BraTS20_Training_001", "BraTS20_Validation_001"),
    ("BraTS2021_00001", "BraTS-GLI-00001-000"),  # nothing says that the numbers are the same
    ("BraTS-GLI-00005-100", "BraTS-MET-00005-100"),
    ("scan_1", "scan_2"),
]


@pytest.mark.parametrize(
    ("one", "other", "same"), [(*pair, True) for pair in SAME] + [(*pair, False) for pair in OTHER]
)
def test_names_of_a_person(one: str, other: str, same: bool) -> None:
    patients = patient_of(one), patient_of(other)
    assert (person_of(patients[0]) == person_of(patients[1])) is same
    assert (len(set(one_name_each(patients).values())) == 1) is same
    assert person_of(person_of(patients[0])) == person_of(patients[0])


@pytest.mark.parametrize(
    ("case", "patient"),
    [
        ("Brats17_TCIA_131", "Brats17_TCIA_131"),
        ("Brats18_2013_10", "Brats18_2013_10"),
        ("Brats17_2013_10_1", "Brats17_2013_10"),
        ("BraTS19_CBICA_AAB_1", "BraTS19_CBICA_AAB"),
        ("BRATS18_TCIA02_131_12", "BRATS18_TCIA02_131"),
    ],
)
def test_the_last_number_is_the_examination_where_there_is_one(case: str, patient: str) -> None:
    assert patient_of(case) == patient


def test_the_name_that_stands_in_a_data_set_stays() -> None:
    names = ["Brats17_TCIA_151", "Brats18_TCIA02_151"]
    assert set(one_name_each(names).values()) == {"Brats17_TCIA_151"}
    assert set(one_name_each(names, {"Brats18_TCIA02_151": "test"}).values()) == {"Brats18_TCIA02_151"}


@pytest.mark.parametrize("split", ["training", "validation", "test"])
def test_who_was_dealt_under_another_name_keeps_the_split(split: str) -> None:
    rule = SplitRule(training=0.4, validation=0.3)
    splits = split_by_rule(["Brats18_TCIA02_151", "anna", "bo"], rule, {"Brats17_TCIA_151": split})
    assert splits["Brats18_TCIA02_151"] == split
    assert set(splits) == {"Brats18_TCIA02_151", "anna", "bo"}


def test_a_split_file_may_use_the_names_of_another_year(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    path.write_text(json.dumps({"Brats17_TCIA_151": "test", "anna": "training"}))
    assert split_by_file(["BraTS19_TCIA02_151"], path) == {"BraTS19_TCIA02_151": "test"}
    path.write_text(json.dumps({"Brats17_TCIA_151": "test", "Brats18_TCIA02_151": "training", "anna": "training"}))
    assert split_by_file(["anna"], path) == {"anna": "training"}
    with pytest.raises(DataError, match=r"Brats17_TCIA_151.*Brats18_TCIA02_151"):
        split_by_file(["BraTS19_TCIA02_151"], path)


def test_releases_with_patients_in_common() -> None:
    mixed = ["BraTS20_Training_001", "BraTS-GLI-00005", "BRATS_001", "BraTS-MET-00001", "anna"]
    assert [patient for _, patient in sharing_releases(mixed)] == [
        "BraTS20_Training_001",
        "BraTS-GLI-00005",
        "BRATS_001",
    ]
    assert sharing_releases(["BraTS-GLI-00005", "BraTS-MET-00001", "BraTS-PED-00001"]) == []
    assert sharing_releases(["Brats17_TCIA_151", "BraTS19_TCIA02_151"]) == []
