"""Cases of DICOM series: which are found, which contrast is which series, and what is said where that is not clear."""

from __future__ import annotations

import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from helpers.scans import write_dicom, write_nifti
from helpers.stores import write_checkpoint

from vaevq_med.codec.inputs import find_inputs
from vaevq_med.codec.options import CompressOptions, DecompressOptions
from vaevq_med.codec.work import compress, decompress
from vaevq_med.core.errors import DataError
from vaevq_med.images.dicom import find_series, read_series
from vaevq_med.prepare.job import Search
from vaevq_med.prepare.recipes import Recipe
from vaevq_med.prepare.volumes.case import Case
from vaevq_med.prepare.volumes.series import contrast_of_series

TWO = ("t1c", "t2f")


def search(source: Path, *series: str, modality: tuple[str, ...] = TWO) -> Search[Case]:
    recipe = Recipe.load("brats24/axial_256")
    return find_inputs(source, recipe, modality=modality, cases=None, series=series, exclude=source / "out")[0]


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A patient with two examinations, of a folder a series, and one whose series all lie in one folder."""
    root = tmp_path_factory.mktemp("studies")
    for number, visit in enumerate(("2020", "2021"), start=1):
        write_dicom(root / "p 1" / visit / "s1", study=number, series=1, description="AX T1 POST")
        write_dicom(root / "p 1" / visit / "s2", study=number, series=2, description="AX T2 FLAIR")
        write_dicom(root / "p 1" / visit / "s3", study=number, series=3, description="DWI b1000")
    for series, words in ((4, "t2_flair_tra"), (5, "t1_mprage"), (6, "ADC")):
        agent = "Gadovist" if words == "t1_mprage" else ""
        write_dicom(root / "p2", study=7, series=series, description=words, agent=agent)
    (root / "p2" / "notes.txt").write_text("no DICOM")
    return root


def test_a_case_is_a_study_and_is_called_after_its_folder(studies: Path) -> None:
    found = search(studies)
    assert [case.name for case in found.units] == ["p2", "p_1_2020", "p_1_2021"]
    assert not found.problems
    assert [case.images["t1c"].path.name for case in found.units] == ["p2", "s1", "s1"]
    assert [str(case.images["t2f"].series)[-4:] for case in found.units] == [".7.4", ".1.2", ".2.2"]
    assert found.notes == [
        "t1c is the series called 't1_mprage', 'AX T1 POST' (2 times)",
        "t2f is the series called 't2_flair_tra', 'AX T2 FLAIR' (2 times)",
        "series that are none of these contrasts are left out: 'ADC', 'DWI b1000' (2 times)",
    ]
    assert [case.name for case in search(studies / "p2").units] == ["p2"]
    assert [case.name for case in search(studies / "p 1" / "2020").units] == ["2020"]


def test_a_pattern_or_a_number_says_which_series_it_is(studies: Path) -> None:
    found = search(studies / "p2", "t1c=T1_*", "flair=4")
    assert [case.images["t1c"].title for case in found.units] == ["p2-t1c"]
    found = search(studies / "p2", "t1c=adc", "t2f=5")  # whatever the words say
    assert [str(volume.series)[-2:] for volume in found.units[0].images.values()] == [".6", ".5"]
    found = search(studies, "t1c=*t1*", "t1c=*dwi*")
    assert [name for name, _ in found.problems] == ["p_1_2020", "p_1_2021"]
    assert found.problems[0][1] == (
        "found 2 series for t1c (1 'AX T1 POST' of 12 files, 3 'DWI b1000' of 12 files), expected one; choose it by "
        "its description or number, e.g. --series t1c=1"
    )
    assert "p2-t1c" in str(search(studies / "p2", "pd=adc", modality=("t1c", "pd")).units[0].images)


def test_what_is_not_there_is_said_with_what_is(studies: Path, tmp_path: Path) -> None:
    ((name, reason),) = search(studies / "p2", modality=("t1n", *TWO)).problems
    assert name == "p2"
    assert reason == (
        "missing t1n; found the series 4 't2_flair_tra' of 12 files, 5 't1_mprage' of 12 files, 6 'ADC' of 12 files, "
        "expected t1n, t1c, t2f; say which it is by its description or number, e.g. --series 't1n=*words*'"
    )
    ((_, reason),) = search(studies / "p2", "t1c=5", "t2f=5").problems
    assert reason == "found the series 5 't1_mprage' of 12 files for t1c and for t2f, expected one for each"
    for option, expected in (
        ("t1c", "expected CONTRAST=PATTERN"),
        ("t1c= ", "expected CONTRAST=PATTERN"),
        ("pd=*", "found the contrast 'pd', expected one of t1c, t2f"),
    ):
        with pytest.raises(DataError, match=f"--series: .*{expected}"):
            search(studies, option)
    write_dicom(tmp_path / "mixed", study=1, series=1, description="t1 ce")
    write_dicom(tmp_path / "mixed", study=2, series=2, description="flair")
    ((name, reason),) = search(tmp_path).problems
    assert (name, reason) == ("mixed", "found the series of 2 studies in one folder, expected a folder for each study")
    write_nifti(tmp_path / "nifti" / "BraTS-GLI-00000-000-t1c.nii.gz")
    with pytest.raises(DataError, match="found no DICOM series, expected some for --series"):
        search(tmp_path / "nifti", "t1c=*")


def test_a_case_of_series_is_compressed_and_comes_back(studies: Path, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "best.pt", modalities=[*TWO])
    options = CompressOptions(checkpoint=checkpoint, workers=1, batch_size=8, modality=[*TWO])
    report = compress(studies, tmp_path / "small", options).run()
    assert report.written == 3
    assert "p2-t1c and 5 more: a DICOM series comes back as NIfTI" in report.notes
    assert compress(studies, tmp_path / "small", options).run().reused == 3
    decompress(tmp_path / "small", tmp_path / "back", DecompressOptions(checkpoint=checkpoint, workers=1)).run()
    names = sorted(str(path.relative_to(tmp_path / "back")) for path in (tmp_path / "back").rglob("*.nii.gz"))
    assert names == sorted(f"{c}/{c}-{m}.nii.gz" for c in ("p_1_2020", "p_1_2021", "p2") for m in TWO)
    reader = sitk.ImageSeriesReader()
    uid = "1.2.826.0.1.3680043.2.1125.1.7.5"
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(studies / "p2"), uid))
    original = reader.Execute()
    again = sitk.ReadImage(str(tmp_path / "back" / "p2" / "p2-t1c.nii.gz"))
    assert again.GetSize() == original.GetSize()
    for name in ("GetSpacing", "GetOrigin", "GetDirection"):
        np.testing.assert_allclose(getattr(again, name)(), getattr(original, name)(), atol=1e-6)
    voxels, expected = sitk.GetArrayFromImage(again), sitk.GetArrayFromImage(original)
    assert np.array_equal(voxels[expected == 0], expected[expected == 0])
    assert nib.load(tmp_path / "back" / "p2" / "p2-t2f.nii.gz").get_fdata().max() > 0


def test_another_series_of_the_same_folder_is_not_taken_as_done(studies: Path, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "best.pt", modalities=["t1n"])
    first, second, again = (
        compress(
            studies / "p2",
            tmp_path / "out",
            CompressOptions(checkpoint=checkpoint, workers=1, modality=["t1n"], series=[one]),
        )
        for one in ("t1n=4", "t1n=5", "t1n=4")
    )
    assert first.run().written == 1
    with pytest.raises(DataError, match="found another file of this name; --overwrite replaces it"):
        second.run()
    assert again.run().reused == 1


def test_the_description_of_a_single_series_says_its_contrast(tmp_path: Path) -> None:
    write_dicom(tmp_path / "a folder", description="3D FLAIR sag")
    found, recipe = find_inputs(
        tmp_path / "a folder", Recipe.load("brats24/axial_256"), modality=None, cases=None, exclude=tmp_path / "out"
    )
    assert recipe.modalities == ("t2f",)
    assert found.notes == ["t2f is the series called '3D FLAIR sag'"]
    assert [case.name for case in found.units] == ["a_folder"]


@pytest.mark.parametrize(
    ("description", "expected"),
    [
        ("AX T1", "t1n"),
        ("T1 SE PRE GD", "t1n"),
        ("T1W 3D TFE", "t1n"),
        ("t1_mpr_ns_sag_p2_iso", "t1n"),
        ("Sag MPRAGE +C", "t1c"),
        ("AX T1 FSE+C", "t1c"),
        ("T1 tra KM", "t1c"),
        ("t1ce", "t1c"),
        ("T1 GD", "t1c"),
        ("T1 POST-CONTRAST", "t1c"),
        ("AX T1 WITHOUT CONTRAST", "t1n"),
        ("Ax T1 FLAIR", "t1n"),
        ("t2_tirm_tra_dark-fluid", "t2f"),
        ("FLAIR post gd", "t2f"),
        ("T2 FSE AX", "t2w"),
        ("T2W_TSE", "t2w"),
        ("T2* GRE", None),
        ("t2 map", None),
        ("t1_starvibe_tra", "t1n"),
        ("t2_star_tra", None),
        ("T1 MIP", None),
        ("Localizer", None),
        ("3-plane loc", None),
        ("ep2d_diff_ADC", None),
        ("T1 perfusion", None),
        ("T1 headcoil", "t1n"),
        ("T1 pre-op +C", "t1c"),
        ("T1 w/o FS +C", "t1c"),
        ("MPRAGE 3.0 CE", "t1c"),
        ("T1 GRE", "t1n"),
        ("t2_fl2d_tra_hemo", None),
        ("T2 GRE", None),
        ("T2 GRADIENT", None),
        ("PD/T2", None),
        ("T2 TSE fs", "t2w"),
        ("T1 postop", "t1n"),
        ("T1 post-op +C", "t1c"),
        ("PD", None),
        ("", None),
    ],
)
def test_usual_words(description: str, expected: str | None) -> None:
    assert contrast_of_series(description) == expected


def test_a_contrast_agent_tells_t1_weighted_images_alone() -> None:
    told = {text: contrast_of_series(text, enhanced=True) for text in ("AX T1", "AX T1 PRE", "FLAIR", "T2")}
    assert told == {"AX T1": "t1c", "AX T1 PRE": "t1n", "FLAIR": "t2f", "T2": "t2w"}


@pytest.mark.parametrize("enhanced", [False, True])
@pytest.mark.parametrize(
    "description",
    [
        "T1 W/O CONTRAST",
        "T1 w/out contrast",
        "T1 without Gd",
        "T1 no contrast",
        "T1 FFE - no gd",
        "T1 0 contrast",
        "T1 mprage before contrast",
        "T1 prior to contrast",
        "T1 ohne KM",
        "T1 vor KM",
        "T1 sans gado",
        "T1 unenhanced",
        "T1 noncontrast",
        "T1 non-contrast",
        "T1 precontrast",
        "T1 -C",
        "T1 C-",
    ],
)
def test_words_for_no_contrast_agent(description: str, enhanced: bool) -> None:
    assert contrast_of_series(description, enhanced=enhanced) == "t1n"


@pytest.mark.parametrize(
    ("agent", "expected"), [("NONE", "t1n"), ("No", "t1n"), ("N/A", "t1n"), ("0", "t1n"), ("Gd", "t1c")]
)
def test_an_agent_that_says_there_was_none_is_none(agent: str, expected: str, tmp_path: Path) -> None:
    write_dicom(tmp_path / "p" / "s", description="AX T1", agent=agent, skip=0)
    (series,) = find_series(tmp_path / "p" / "s")
    assert contrast_of_series(series.description, enhanced=series.enhanced) == expected


@pytest.mark.parametrize("place", [0, -1])
def test_a_series_whose_end_is_cut_short_is_refused(place: int, tmp_path: Path) -> None:
    folder = write_dicom(tmp_path / "s", description="T1")
    (folder / "notes.txt").write_text("no DICOM")
    (folder / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
    (folder / "._1-000.dcm").write_bytes(b"of another system")
    assert read_series(folder)[0].shape[2] == 12
    file = sorted(folder.glob("[0-9]*.dcm"))[place]
    file.write_bytes(file.read_bytes()[:-500])
    with pytest.raises(DataError, match=f"s: found the DICOM file {file.name}, which cannot be read"):
        read_series(folder)


def test_folders_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for study, place in enumerate(("pat 7", "pat_7", "pat_8")):
        write_dicom(tmp_path / place, study=study, description="T1")
    found = search(tmp_path, modality=("t1n",))
    assert [case.name for case in found.units] == ["pat_8"]
    assert found.problems == [("pat_7", "found 2 folders of this name ('pat 7' and 'pat_7'), expected one; rename one")]


def test_a_folder_that_cannot_be_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_dicom(tmp_path / "p1", description="T1")
    (tmp_path / "p2").mkdir()
    scandir = os.scandir

    def refusing(path: str) -> object:
        if Path(path).name == "p2":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    found = search(tmp_path, modality=("t1n",))
    assert [case.name for case in found.units] == ["p1"]
    assert found.problems == [
        (str(tmp_path / "p2"), "found an unreadable folder (Permission denied), expected to read it")
    ]
