"""``audit-split`` finds an image that stands in two splits, whatever its name and however it was changed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vaevq_med.core.errors import DataError
from vaevq_med.prepare.audit import AuditReport, AuditSplit
from vaevq_med.prepare.twins import strangers

SIDE = 192
SPLITS = ("training", "validation", "test")


def picture(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    tissue = np.kron(rng.random((12, 12)), np.ones((16, 16))) + 0.5 * np.kron(rng.random((24, 24)), np.ones((8, 8)))
    rows, columns = np.mgrid[-1 : 1 : SIDE * 1j, -1 : 1 : SIDE * 1j]
    return np.where(rows**2 + columns**2 < 0.8, 40 + 110 * tissue, 0).astype(np.uint8)


def audit(root: Path, images: Mapping[str, np.ndarray | bytes], splits: Mapping[str, str], **more: Any) -> AuditReport:
    """Audit a data set of images by name, each in the split, and with the patient where there is one, before a dash."""
    entries: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    for name, pixels in images.items():
        path = root / name
        if isinstance(pixels, bytes):
            path.write_bytes(pixels)
        else:
            Image.fromarray(pixels).save(path)
        case = name.split("-")[0]
        known = {"patient": case, "case": case} if "-" in name else {}
        entries[splits[case]].append({"image": name, **known, **more.get(name, {})})
    (root / "dataset.json").write_text(json.dumps(entries))
    return AuditSplit(root, workers=1).run()


THREE = {"anna": "training", "bo": "validation", "cleo": "test"}
HONEST = {f"{name}-{z}.png": picture(10 * n + z) for n, name in enumerate(THREE) for z in range(3)}


def test_different_patients_are_no_leak(tmp_path: Path) -> None:
    report = audit(tmp_path, HONEST, THREE)
    assert (report.leaks, report.notes) == ((), ())
    assert report.patients == {"training": 1, "validation": 1, "test": 1}


@pytest.mark.parametrize("kind", ["identical", "darker", "moved", "mirrored"])
def test_a_case_under_another_name_is_a_leak(kind: str, tmp_path: Path) -> None:
    change = {
        "identical": lambda v: v,
        "darker": lambda v: (v * 0.5).astype(np.uint8),
        "moved": lambda v: np.roll(v, 1, 1),
        "mirrored": lambda v: v[:, ::-1],
    }[kind]
    copies = {f"cleo-{z}.png": change(picture(z)) for z in range(3)}
    (leak,) = audit(tmp_path, {**HONEST, **copies}, THREE).leaks
    for word in ("anna", "training", "cleo", "test", "3 identical" if kind == "identical" else "near-identical"):
        assert word in leak
    assert "bo" not in leak
    assert ("mirrored" in leak) is (kind == "mirrored")


def test_photographs_without_patients_are_compared_too(tmp_path: Path) -> None:
    images = {f"{name}.png": picture(number) for number, name in enumerate(("a", "b", "c", "d"))}
    splits = {"a.png": "training", "b.png": "training", "c.png": "validation", "d.png": "validation"}
    report = audit(tmp_path, images, splits)
    assert (report.leaks, report.patients, report.slices["training"]) == ((), {}, 2)
    again = audit(tmp_path, {**images, "d.png": picture(0)}, splits)
    (leak,) = again.leaks
    assert "a.png" in leak
    assert "d.png" in leak


def test_copies_within_a_split_and_within_a_patient_are_none(tmp_path: Path) -> None:
    twice = {f"{name}-{z}.png": picture(n) for n, name in enumerate(THREE) for z in range(3)}
    assert audit(tmp_path, twice, THREE).leaks == ()


class Counted(list[str]):
    """A list that counts how often it is asked for an item."""

    asked = 0

    def __getitem__(self, place: Any) -> Any:
        self.asked += 1
        return super().__getitem__(place)


@pytest.mark.parametrize("persons", ["each its own", "one alone", "one a split"])
def test_thousands_of_identical_images_in_a_split_take_a_step_each(persons: str) -> None:
    """A placeholder, say; the pairs of a split are 12.5 million."""
    count, few = 5000, 3
    split = Counted(["training"] * count + ["test"] * few)
    person = Counted(
        {
            "each its own": map(str, range(count + few)),
            "one alone": ["anna"] * (count + few),
            "one a split": ["anna"] * count + ["bo"] * few,
        }[persons]
    )
    found = list(islice(strangers(range(count + few), split, person), 7))
    assert found == ([] if persons == "one alone" else [(n // few, count + n % few) for n in range(7)])
    assert split.asked + person.asked <= 3 * (count + few)


def test_strangers_are_all_pairs_of_two_splits_and_two_persons() -> None:
    rng = np.random.default_rng(0)
    split, person = ([names[n] for n in rng.integers(0, 3, 40)] for names in (SPLITS, ("anna", "bo", "cleo")))
    expected = {(i, j) for i in range(40) for j in range(i) if split[i] != split[j] and person[i] != person[j]}
    found = [(max(pair), min(pair)) for pair in strangers(range(40), split, person)]
    assert len(found) == len(expected)
    assert set(found) == expected


def test_empty_images_match_nothing_and_are_counted(tmp_path: Path) -> None:
    blank, sparse = np.zeros((SIDE, SIDE), np.uint8), np.zeros((SIDE, SIDE), np.uint8)
    sparse[80:112, 80:120] = 90
    brighter = np.where(sparse > 0, 120, 0).astype(np.uint8)
    images = {"anna-x.png": blank, "bo-x.png": blank, "anna-y.png": sparse, "bo-y.png": brighter}
    report = audit(tmp_path, {**HONEST, **images}, THREE)
    assert report.leaks == ()
    assert len(report.notes) == 2
    assert all(note.startswith("2 ") for note in report.notes)
    (leak,) = audit(tmp_path, {**HONEST, **images, "bo-y.png": sparse}, THREE).leaks  # byte by byte
    assert "1 identical" in leak


def test_images_that_cannot_be_read_are_noted(tmp_path: Path) -> None:
    report = audit(tmp_path, {**HONEST, "bo-9.png": b"no image"}, THREE)
    assert report.leaks == ()
    (note,) = report.notes
    assert "bo-9.png" in note


def test_a_patient_under_the_names_of_two_years_is_a_leak(tmp_path: Path) -> None:
    images = {"Brats17_TCIA_151-1.png": picture(1), "Brats18_TCIA02_151-1.png": picture(2)}
    splits = {"Brats17_TCIA_151": "training", "Brats18_TCIA02_151": "test"}
    (leak,) = audit(tmp_path, images, splits).leaks
    for word in ("Brats17_TCIA_151", "Brats18_TCIA02_151", "training", "test"):
        assert word in leak


@pytest.mark.sampledata
def test_photographs_of_imagenet_and_a_copy_of_one(sample_data: Path, tmp_path: Path) -> None:
    files = sorted((sample_data / "imagenet-sample").rglob("*.JPEG"))[::4]
    lists = {split: [{"image": str(n)} for n in range(k, len(files), 3)] for k, split in enumerate(SPLITS)}
    for number, file in enumerate(files):
        (tmp_path / str(number)).symlink_to(file)
    (tmp_path / "dataset.json").write_text(json.dumps(lists))
    assert AuditSplit(tmp_path, workers=1).run().leaks == ()
    with Image.open(files[0]) as image:
        image.convert("RGB").reduce(2).save(tmp_path / "copy.jpeg", quality=60)
    lists["test"].append({"image": "copy.jpeg"})
    (tmp_path / "dataset.json").write_text(json.dumps(lists))
    (leak,) = AuditSplit(tmp_path, workers=1).run().leaks
    assert "copy.jpeg" in leak


def test_a_number_of_processes_out_of_range_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="workers: found -2, expected 1 to 512"):
        AuditSplit(tmp_path, workers=-2).run()
