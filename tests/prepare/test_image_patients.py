"""Patients of a folder of images: a table or a pattern names them, and no patient stands in two splits."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import BUNDLE, toy_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from monai.bundle import ConfigWorkflow
from PIL import Image
from typer.testing import CliRunner

from vaevq_med.cli.app import app
from vaevq_med.core.errors import DataError
from vaevq_med.images.splits import SPLIT_FILE, read_split_file
from vaevq_med.prepare.audit import AuditSplit
from vaevq_med.prepare.job import Prepare, Report
from vaevq_med.prepare.pictures.source import PictureSource
from vaevq_med.prepare.recipes import ImageRecipe
from vaevq_med.trained.file import read_checkpoint

IMAGENET = BUNDLE.parent / "imagenet"
SPLITS = ("training", "validation", "test")


def write_images(root: Path, names: list[str], side: int = 9) -> Path:
    rng = np.random.default_rng(0)
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (side, side), dtype=np.uint8)).save(root / name)
    return root


def write_table(path: Path, rows: Mapping[str, str] | list[list[str]], *columns: str) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns or ("file", "patient"))
        writer.writerows(rows.items() if isinstance(rows, Mapping) else rows)
    return path


def prepare(source: Path, output: Path, recipe: Mapping[str, Any] | None = None, **options: Any) -> Report:
    made = ImageRecipe.load("imagenet/original") if recipe is None else ImageRecipe.read({"name": "x", **recipe})
    return Prepare(PictureSource(source, made, **options), output, workers=1).run()


def content_of(output: Path) -> dict[str, Any]:
    return json.loads((output / "dataset.json").read_text())


def where(output: Path) -> dict[str, set[str]]:
    """The splits that each patient stands in."""
    found: dict[str, set[str]] = {}
    for split in SPLITS:
        for entry in content_of(output)[split]:
            found.setdefault(entry["patient"], set()).add(split)
    return found


@pytest.fixture(scope="module")
def eyes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten patients of two to four images each, in two classes."""
    names = [
        f"{'sick' if patient % 3 else 'well'}/{patient:02d}_{number}.png"
        for patient in range(10)
        for number in range(2 + patient % 3)
    ]
    return write_images(tmp_path_factory.mktemp("eyes") / "in", names)


def files_of(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))


# --- named and dealt ----------------------------------------------------------------------------------


def test_a_table_names_the_patients_and_splits_keep_them_together(eyes: Path, tmp_path: Path) -> None:
    patients = {name: f"p{name[5:7]}" for name in files_of(eyes)}
    table = write_table(tmp_path / "patients.csv", patients)
    done = CliRunner().invoke(
        app, ["imagenet-prepare", str(eyes), str(tmp_path / "out"), "--patients", str(table), "--workers", "1"]
    )
    assert done.exit_code == 0, done.output
    assert "images of 8 patients" in done.output
    assert "independent" not in done.output
    content = content_of(tmp_path / "out")
    for split in SPLITS:
        for entry in content[split]:
            assert entry["patient"] == entry["case"] == patients[entry["image"].removeprefix("images/")]
            assert entry["label"] == ("/well/" in f"/{entry['image']}")
    found = where(tmp_path / "out")
    assert len(found) == 10
    assert all(len(splits) == 1 for splits in found.values())
    # Each split has its share of the patients, and not of the images.
    counts = [sum(splits == {split} for splits in found.values()) for split in SPLITS]
    assert counts == [8, 1, 1]
    assert read_split_file(tmp_path / "out" / SPLIT_FILE) == {name: next(iter(s)) for name, s in found.items()}
    audit = AuditSplit(tmp_path / "out").run()
    assert (audit.leaks, audit.patients) == ((), {"training": 8, "validation": 1, "test": 1})


def test_a_pattern_of_the_recipe_does_what_the_table_does(eyes: Path, tmp_path: Path) -> None:
    table = write_table(tmp_path / "patients.csv", {name: name[5:7] for name in files_of(eyes)})
    prepare(eyes, tmp_path / "table", patients=table)
    prepare(eyes, tmp_path / "pattern", {"patient": r"^(?P<patient>\d+)_"})
    first, second = (content_of(tmp_path / name) for name in ("table", "pattern"))
    for key in (*SPLITS, "content_hash", "split_hash"):
        assert first[key] == second[key]
    # Patients write no image anew, and are no part of what the images are.
    assert prepare(eyes, tmp_path / "pattern").written == 0
    third = content_of(tmp_path / "pattern")
    assert third["content_hash"] == first["content_hash"]
    assert "patient" not in third["training"][0]
    assert not (tmp_path / "pattern" / SPLIT_FILE).exists()


def test_a_pattern_with_a_slash_is_looked_for_in_the_path(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "in", ["a7/x_1.png", "a7/x_2.png", "b8/x_1.png"])
    prepare(folder, tmp_path / "out", {"patient": r"^(?P<patient>\w+)/x_(?P<case>\d)"}, use_classes=False)
    found = {
        entry["image"]: (entry["patient"], entry["case"])
        for split in SPLITS
        for entry in content_of(tmp_path / "out")[split]
    }
    # A case of a name that another patient has one of is told apart.
    assert found == {
        "images/a7/x_1.png": ("a7", "a7_1"),
        "images/a7/x_2.png": ("a7", "2"),
        "images/b8/x_1.png": ("b8", "b8_1"),
    }
    assert set(where(tmp_path / "out")) == {"a7", "b8"}


def test_cases_are_those_of_the_table_or_the_patients(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "in", ["a.png", "b.png", "c.png"])
    rows = [["./a.png", "anna", "anna_2019"], [" b.png", "anna ", "anna_2021"], ["c.png", "bo", ""]]
    prepare(folder, tmp_path / "out", patients=write_table(tmp_path / "t.csv", rows, "file", "patient", "case"))
    entries = [entry for split in SPLITS for entry in content_of(tmp_path / "out")[split]]
    found = {entry["image"][7:]: (entry["patient"], entry["case"]) for entry in entries}
    assert found == {"a.png": ("anna", "anna_2019"), "b.png": ("anna", "anna_2021"), "c.png": ("bo", "bo")}


def test_without_patients_a_note_says_so(eyes: Path, tmp_path: Path) -> None:
    command = Prepare(PictureSource(eyes), tmp_path / "out", workers=1)
    note = "no patients are named: images are taken as independent"
    assert note in command.plan().notes
    assert note in command.run().notes
    assert note in json.loads((tmp_path / "out/report.json").read_text())["notes"]


def test_patients_that_come_later_move_nobody(eyes: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    shutil.copytree(eyes, folder)
    recipe = {"patient": r"^(?P<patient>\d+)_", "split": {"training": 0.5, "validation": 0.25}}
    prepare(folder, tmp_path / "out", recipe)
    before = where(tmp_path / "out")
    write_images(folder, [f"well/{patient}_0.png" for patient in range(50, 58)])
    prepare(folder, tmp_path / "out", recipe)
    after = where(tmp_path / "out")
    assert len(after) == 18
    assert {name: after[name] for name in before} == before


def test_held_out_are_patients_and_not_images(eyes: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    shutil.copytree(eyes, folder / "train")
    recipe = {"patient": r"^(?P<patient>\d+)_", "holdout": 0.4}
    report = prepare(folder, tmp_path / "out", recipe)
    assert all(len(splits) == 1 for splits in where(tmp_path / "out").values())
    assert report.facts["patients"]["training"] + report.facts["patients"]["validation"] == 10
    assert 0 < report.facts["patients"]["validation"] < 10


def test_a_patient_in_two_folders_of_splits_is_refused(eyes: Path, tmp_path: Path) -> None:
    shutil.copytree(eyes, tmp_path / "in/train")
    shutil.copytree(eyes / "well", tmp_path / "in/val/well")
    with pytest.raises(DataError, match="found patient 00 in the folders of training and validation, expected one"):
        prepare(tmp_path / "in", tmp_path / "out", {"patient": r"^(?P<patient>\d+)_"})
    assert not (tmp_path / "out").exists()


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(owners=st.lists(st.integers(0, 7), min_size=29, max_size=29), training=st.floats(0, 0.8), seed=st.integers(0, 9))
def test_however_images_belong_to_patients_no_patient_stands_in_two_splits(
    owners: list[int], training: float, seed: int, eyes: Path, tmp_path: Path
) -> None:
    """Over one output, whose images stay and whose earlier deals are remembered."""
    names = files_of(eyes)
    table = write_table(tmp_path / "patients.csv", dict(zip(names, (f"p{n}" for n in owners), strict=True)))
    split = {"training": training, "validation": 0.2, "seed": seed}
    report = prepare(eyes, tmp_path / "out", {"split": split}, patients=table)
    assert sum(report.facts["images"].values()) == len(names) == 29
    found = where(tmp_path / "out")
    assert all(len(splits) == 1 for splits in found.values())
    assert set(found) == {f"p{number}" for number in owners}
    assert AuditSplit(tmp_path / "out").run().leaks == ()


# --- mistakes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "rows", "said"),
    [
        ("file,patient", "a.png,1\nb.png,1\n", "found no patient of c.png, expected one of every image"),
        ("file,patient", "a.png,1\n", "found no patient of b.png and 1 more"),
        ("file,patient", "a.png,1\nb.png,1\nc.png,2\na.png,2\n", "line 5: found a.png a second time"),
        ("file,patient", "a.png,1\n./a.png,1\nb.png,1\nc.png,2\n", "line 3: found ./a.png a second time"),
        ("file,patient", "a.png,1\nb.png,1\nc.png,2\nd.png,2\n", "found d.png, expected images by their paths below"),
        ("file,patient", "a.png,1\nb.png,\nc.png,2\n", "line 3: found no patient, expected one"),
        ("file,patient", "a.png,1\n,2\nc.png,2\n", "line 3: found no file, expected one"),
        ("name,patient", "a.png,1\n", "found the columns name, patient, expected file, patient"),
    ],
)
@pytest.mark.parametrize("dry", [False, True])
def test_a_mistake_in_the_table_is_one_line(columns: str, rows: str, said: str, dry: bool, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "in", ["a.png", "b.png", "c.png"])
    table = tmp_path / "patients.csv"
    table.write_text(f"{columns}\n{rows}")
    command = Prepare(PictureSource(folder, patients=table), tmp_path / "out", workers=1)
    with pytest.raises(DataError) as stopped:
        command.plan() if dry else command.run()
    assert str(stopped.value).startswith(f"patients {table}: ")
    assert said in str(stopped.value)
    assert "\n" not in str(stopped.value)
    assert not (tmp_path / "out").exists()


def test_a_table_of_a_spreadsheet_is_read(tmp_path: Path) -> None:
    """It begins with a byte-order mark, and its lines end as those of Windows do."""
    folder = write_images(tmp_path / "in", ["a.png", "b.png"])
    (tmp_path / "t.csv").write_bytes("\ufefffile,patient\r\na.png,anna\r\nb.png,bo\r\n".encode())
    prepare(folder, tmp_path / "out", patients=tmp_path / "t.csv")
    assert set(where(tmp_path / "out")) == {"anna", "bo"}


@pytest.mark.parametrize("file", ["/etc/passwd", "../outside.png", "in/../../x.png"])
def test_a_table_names_nothing_outside(file: str, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "in", ["a.png"])
    table = write_table(tmp_path / "t.csv", [["a.png", "anna"], [file, "bo"]])
    with pytest.raises(DataError, match=r"line 3: found .*, expected a path below the input"):
        prepare(folder, tmp_path / "out", patients=table)


@pytest.mark.parametrize("pattern", ["(?P<patient>a{99999999999999})", "(" * 3000 + "(?P<patient>a)" + ")" * 3000])
def test_a_pattern_that_nobody_can_read_is_one_line(pattern: str, eyes: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected a regular expression with a group"):
        prepare(eyes, tmp_path / "out", {"patient": pattern})


def test_a_missing_table_is_one_line(eyes: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.csv: found no readable CSV"):
        prepare(eyes, tmp_path / "out", patients=tmp_path / "nowhere.csv")


def test_a_table_may_name_files_that_are_no_images_and_other_classes(eyes: Path, tmp_path: Path) -> None:
    shutil.copytree(eyes, tmp_path / "in")
    (tmp_path / "in/well/notes.txt").write_text("dilated")
    rows = {name: name[5:7] for name in files_of(eyes)} | {"well/notes.txt": "00"}
    table = write_table(tmp_path / "patients.csv", rows)
    assert prepare(tmp_path / "in", tmp_path / "all", patients=table).facts["patients"] == {
        "training": 8,
        "validation": 1,
        "test": 1,
    }
    report = prepare(tmp_path / "in", tmp_path / "well", patients=table, classes="well")
    assert sum(report.facts["patients"].values()) == 4


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("(", r'patient is "\("; expected a regular expression with a group'),
        (r"^\d+_", "expected a regular expression with a group"),
        (7, "patient is 7; expected a regular expression"),
        (r"^(?P<patient>0\d)_", None),
        (r"^(?P<patient>1\d)_", "found no patient of sick/01_0.png and 28 more, expected one of every image"),
    ],
)
def test_a_pattern_that_names_nobody_is_one_line(pattern: Any, said: str | None, eyes: Path, tmp_path: Path) -> None:
    if said is None:
        prepare(eyes, tmp_path / "out", {"patient": pattern})
        return
    with pytest.raises(DataError, match=said):
        prepare(eyes, tmp_path / "out", {"patient": pattern})


def test_the_audit_finds_a_leak_and_takes_no_case_for_a_patient(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "in", [f"{number}.png" for number in range(6)])
    # The case of one patient has the name of another patient.
    rows = [[f"{number}.png", str(number), str((number + 1) % 6)] for number in range(6)]
    table = write_table(tmp_path / "t.csv", rows, "file", "patient", "case")
    prepare(folder, tmp_path / "out", {"split": {"training": 0.4, "validation": 0.3}}, patients=table)
    assert AuditSplit(tmp_path / "out").run().leaks == ()
    content = content_of(tmp_path / "out")
    content["test"][0]["patient"] = content["training"][0]["patient"]
    content["validation"][0]["case"] = content["training"][0]["case"]
    (tmp_path / "out/dataset.json").write_text(json.dumps(content))
    patient, case = content["training"][0]["patient"], content["training"][0]["case"]
    assert AuditSplit(tmp_path / "out").run().leaks == (
        f"patient {patient} stands in training and test",
        f"case {case} stands in training and validation",
    )


# --- what the patients are for ------------------------------------------------------------------------


def run(file: str, overrides: dict[str, Any]) -> ConfigWorkflow:
    kind = "train" if file == "train.json" else "infer"
    work = ConfigWorkflow(config_file=str(IMAGENET / file), workflow_type=kind, **overrides)
    work.initialize()
    work.run()
    work.finalize()
    return work


def test_an_evaluation_knows_the_patients_and_refuses_those_it_was_trained_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_images(tmp_path / "in", [f"{p}_{n}.png" for p in range(6) for n in range(2)], side=32)
    data, pattern = tmp_path / "data", r"^(?P<patient>\d)_"
    recipe: dict[str, Any] = {"split": {"training": 0.5, "validation": 0.2}}
    prepare(folder, data, {**recipe, "patient": pattern})
    toy = {**toy_config(data, tmp_path / "run"), "max_epochs": 1, "in_channels": 1, "batch_size": 2}
    run("train.json", toy)
    names = ("output_dir", "tracking_uri", "device", "num_workers", "batch_size", "dataset_dir")
    evaluation = {name: toy[name] for name in names} | {"split": "test"}
    run("evaluate.json", evaluation)
    with (tmp_path / "run/evaluation/test/per_image.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["patient"] for row in rows} == {n for n, splits in where(data).items() if splits == {"test"}}
    assert len(rows) == 2 * len({row["patient"] for row in rows})
    trained = read_checkpoint(tmp_path / "run/checkpoints/last.pt")["data"]["patients"]
    assert set(trained) == {n for n, splits in where(data).items() if splits == {"training"}}
    # Dealt anew; named otherwise; named no longer: none hides what was trained on.
    for again, said in (
        ({"patient": pattern, "split": {"training": 0.2, "validation": 0.0}}, "checkpoints/best.pt was trained on"),
        ({"patient": r"^(?P<patient>\d_)", "split": {"training": 0.2, "validation": 0.0}}, "dealt to other splits"),
        ({"split": {"training": 0.2, "validation": 0.0}}, "dealt to other splits"),
    ):
        prepare(folder, data, again)
        capsys.readouterr()
        with pytest.raises(SystemExit):
            run("evaluate.json", evaluation)
        assert said in capsys.readouterr().err
