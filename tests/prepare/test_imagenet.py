"""``imagenet-prepare``: folders, archives, odd files, labels, interruptions; and the bundle on what it writes."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import signal
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, toy_config
from monai.bundle import ConfigWorkflow
from monai.transforms import CenterSpatialCropd, Compose, RandFlipd, RandSpatialCropd
from PIL import Image
from scipy.io import savemat

from vaevq_med.cli import app as cli
from vaevq_med.core.errors import DataError
from vaevq_med.images.dataset import SliceDataset
from vaevq_med.images.pixels import read_image
from vaevq_med.images.transforms import LoadPhotograph, LoadSliced, RandResizedCropd, ResizeShortSided
from vaevq_med.networks.features import feature_network
from vaevq_med.prepare.pictures import store as image_store
from vaevq_med.prepare.pictures.classes import check_ilsvrc, choose_classes
from vaevq_med.prepare.pictures.find import find_images
from vaevq_med.prepare.pictures.ground_truth import read_ground_truth
from vaevq_med.trained.pack import BundlePack

BUNDLE = ROOT / "bundles" / "imagenet"
CLASSES = ("n00000001", "n00000002", "n00000003")


@dataclass
class Outcome:
    code: int
    out: str
    err: str


@pytest.fixture
def prepare(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run the command line in this process, with the exit code that the shell would see."""

    def run(*args: object) -> Outcome:
        capsys.readouterr()
        workers = () if "--workers" in map(str, args) else ("--workers", "1")
        monkeypatch.setattr(sys, "argv", ["vaevq-med", "imagenet-prepare", *map(str, args), *workers])
        handler = signal.getsignal(signal.SIGTERM)
        code = 0
        try:
            cli.main()
        except SystemExit as error:
            code = int(error.code or 0)
        finally:
            signal.signal(signal.SIGTERM, handler)
        captured = capsys.readouterr()
        assert "Traceback" not in captured.out + captured.err
        return Outcome(code, captured.out, captured.err)

    return run


def picture(seed: int, size: tuple[int, int] = (40, 30), mode: str = "RGB") -> Image.Image:
    """A smooth image of width and height ``size``."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).convert(mode)


def make_folders(root: Path, per_class: int = 3) -> Path:
    """``train`` and ``val`` with class folders."""
    number = 0
    for split, count in (("train", per_class), ("val", 1)):
        for class_name in CLASSES:
            folder = root / split / class_name
            folder.mkdir(parents=True)
            for _ in range(count):
                number += 1
                stem = f"{class_name}_{number}" if split == "train" else f"ILSVRC2012_val_{number:08d}"
                picture(number).save(folder / f"{stem}.JPEG", quality=90)
    return root


def make_archives(source: Path, root: Path) -> Path:
    """The layout of ILSVRC2012's archives: a tar of one tar a class, a flat tar, and the devkit."""
    root.mkdir()
    with tarfile.open(root / "ILSVRC2012_img_train.tar", "w") as outer:
        for folder in sorted((source / "train").iterdir()):
            buffer = io.BytesIO()
            with tarfile.open(fileobj=buffer, mode="w") as inner:
                for path in sorted(folder.iterdir()):
                    inner.add(path, path.name)
            member = tarfile.TarInfo(f"{folder.name}.tar")
            member.size = len(buffer.getvalue())
            buffer.seek(0)
            outer.addfile(member, buffer)
    images = sorted((source / "val").glob("*/*"), key=lambda path: path.name)
    with tarfile.open(root / "ILSVRC2012_img_val.tar", "w") as archive:
        for path in images:
            archive.add(path, path.name)
    return root


def write_devkit(root: Path, truth: list[int]) -> Path:
    """Ground truth as the devkit gives it; its numbers count the classes backward here, not as they sort."""
    synsets = np.array(
        [(number, name) for number, name in zip((3, 2, 1), CLASSES, strict=True)],
        dtype=[("ILSVRC2012_ID", "O"), ("WNID", "O")],
    )
    (root / "data").mkdir(parents=True, exist_ok=True)
    savemat(root / "data" / "meta.mat", {"synsets": synsets})
    path = root / "data" / "ILSVRC2012_validation_ground_truth.txt"
    path.write_text("".join(f"{number}\n" for number in truth))
    return path


def manifest(output: Path) -> dict[str, Any]:
    return json.loads((output / "dataset.json").read_text())


def tree(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folders(tmp_path_factory.mktemp("folders") / "in")


# --- folders ----------------------------------------------------------------------------------------------


def test_class_folders_keep_every_byte_and_sorted_classes_are_the_labels(
    folders: Path, prepare: Callable[..., Outcome], tmp_path: Path
) -> None:
    result = prepare(folders, tmp_path / "out")
    assert result.code == 0
    assert "12 images written, 0 were done, 0 skipped" in result.out
    content = manifest(tmp_path / "out")
    assert content["labels"] == {"0": CLASSES[0], "1": CLASSES[1], "2": CLASSES[2]}
    assert [len(content[split]) for split in ("training", "validation", "test")] == [9, 3, 0]
    for split, folder in (("training", "train"), ("validation", "val")):
        for entry in content[split]:
            path = Path(entry["image"])
            assert path.parts[:2] == ("images", folder)
            assert path.parts[2] == CLASSES[entry["label"]]
            assert (tmp_path / "out" / path).read_bytes() == (folders / Path(*path.parts[1:])).read_bytes()


def test_links_take_no_space_and_copies_do_where_no_link_can_be_made(
    folders: Path, prepare: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = next((folders / "train").glob("*/*"))
    prepare(folders, tmp_path / "linked")
    assert (tmp_path / "linked" / "images" / source.relative_to(folders)).samefile(source)

    def refuse(*args: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    prepare(folders, tmp_path / "copied")
    copy = tmp_path / "copied" / "images" / source.relative_to(folders)
    assert not copy.samefile(source)
    assert copy.read_bytes() == source.read_bytes()
    assert manifest(tmp_path / "copied")["content_hash"] == manifest(tmp_path / "linked")["content_hash"]


def test_the_number_of_workers_changes_no_byte_and_a_second_run_writes_nothing(
    folders: Path, prepare: Callable[..., Outcome], tmp_path: Path
) -> None:
    assert prepare(folders, tmp_path / "one", "--resize", 16).code == 0
    assert prepare(folders, tmp_path / "two", "--resize", 16, "--workers", 2).code == 0
    before = tree(tmp_path / "one")
    assert before == tree(tmp_path / "two")
    result = prepare(folders, tmp_path / "one", "--resize", 16)
    assert "0 images written, 12 were done" in result.out
    assert tree(tmp_path / "one") == before


def test_resizing_is_pillows_bicubic_of_the_shorter_side_and_enlarges_nothing(
    tmp_path: Path, prepare: Callable[..., Outcome]
) -> None:
    wide, small = picture(1, (60, 40)), picture(2, (30, 16))
    (tmp_path / "in").mkdir()
    wide.save(tmp_path / "in" / "wide.png")
    small.save(tmp_path / "in" / "small.png")
    recipe = {"name": "mine", "resize": 20, "format": "png"}
    (tmp_path / "mine.json").write_text(json.dumps(recipe))
    assert prepare(tmp_path / "in", tmp_path / "out", "--recipe", tmp_path / "mine.json").code == 0
    with Image.open(tmp_path / "out/images/wide.png") as stored:
        np.testing.assert_array_equal(np.asarray(stored), np.asarray(wide.resize((30, 20), Image.Resampling.BICUBIC)))
    assert (tmp_path / "out/images/small.png").read_bytes() == (tmp_path / "in/small.png").read_bytes()


def test_a_dry_run_says_what_cannot_be_read(prepare: Callable[..., Outcome], tmp_path: Path) -> None:
    (tmp_path / "in" / "one").mkdir(parents=True)
    (tmp_path / "in" / "one" / "broken.png").write_bytes(b"no image")
    result = prepare(tmp_path / "in", tmp_path / "out", "--dry-run")
    assert "broken.png" in result.err + result.out


def test_dry_run_writes_nothing_and_estimates(folders: Path, prepare: Callable[..., Outcome], tmp_path: Path) -> None:
    result = prepare(folders, tmp_path / "out", "--dry-run")
    assert result.code == 0
    assert "would read 6 batches" in result.out
    assert "about 12 images" in result.out
    assert not (tmp_path / "out").exists()


# --- odd files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "height", "width", "side"), [(["--resize", "8"], 8, 11, 8), ([], 30, 40, 9)], ids=["resized", "kept"]
)
def test_odd_files_are_reported_and_none_is_fatal(
    tmp_path: Path, prepare: Callable[..., Outcome], arguments: list[str], height: int, width: int, side: int
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    picture(1).save(folder / "plain.jpg")
    picture(2, mode="L").save(folder / "gray.jpg")
    picture(3, mode="CMYK").save(folder / "cmyk.jpg")
    picture(4).save(folder / "disguised.JPEG", "PNG")
    turned = Image.Exif()
    turned[0x0112] = 6
    picture(5).save(folder / "rotated.jpg", exif=turned)
    picture(6).convert("P").save(folder / "palette.png")
    Image.fromarray(np.full((9, 9), 40000, np.uint16)).save(folder / "deep.tif")
    Image.fromarray(np.zeros((9, 9), np.float32)).save(folder / "float.tif")
    clear = picture(7).convert("RGBA")
    clear.putalpha(0)
    clear.save(folder / "clear.png")
    content = (folder / "plain.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(content[: len(content) // 2])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("no picture")
    (folder / "notes.txt").write_text("no picture")
    (folder / ".hidden.jpg").write_text("no picture")
    result = prepare(folder, tmp_path / "out", *arguments)
    assert result.code == 1
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert {entry["file"] for entry in report["skipped"]} == {"truncated.jpg", "empty.jpg", "text.jpg", "float.tif"}
    assert all(f"image {entry['file']}: {entry['reason']}; skipped" in result.err for entry in report["skipped"])
    assert {kind: entry["count"] for kind, entry in report["unusual"].items()} == {
        **{"gray": 1, "cmyk": 1, "palette": 1, "alpha": 1, "16 bit": 1, "rotated": 1, "suffix": 1}
    }
    assert "files of other kinds were left out: 1 .txt" in report["notes"]
    read = {Path(p).stem: read_image(p) for p in (tmp_path / "out/images").iterdir()}
    assert all(0 <= image.min() <= image.max() <= 1 for image in read.values())
    assert {name: tuple(image.shape) for name, image in read.items()} == {
        **{name: (3, height, width) for name in ("plain", "cmyk", "disguised", "palette", "clear")},
        **{"gray": (1, height, width), "rotated": (3, width, height), "deep": (1, side, side)},
    }
    assert read["clear"].min() == 1
    torch.testing.assert_close(read["deep"], torch.full((1, side, side), 40000 / 65535))


def test_kept_bytes_are_read_as_the_resized_ones_would_be(tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    picture(5).save(tmp_path / "a.png", exif=turned)
    expected = np.rot90(np.asarray(picture(5)), -1) / 255
    np.testing.assert_allclose(read_image(tmp_path / "a.png").permute(1, 2, 0).numpy(), expected, atol=1e-6)


# --- archives and ground truth ----------------------------------------------------------------------------


def test_archives_give_what_the_folders_do(folders: Path, prepare: Callable[..., Outcome], tmp_path: Path) -> None:
    archives = make_archives(folders, tmp_path / "in")
    numbers = sorted((folders / "val").glob("*/*"), key=lambda path: path.name)
    first = int(numbers[0].stem[-8:])
    truth = [1] * (first - 1) + [3 - CLASSES.index(path.parent.name) for path in numbers]
    write_devkit(tmp_path / "in", truth)
    assert prepare(archives, tmp_path / "out", "--workers", 2).code == 0
    assert prepare(folders, tmp_path / "expected").code == 0

    def listed(output: Path, split: str) -> set[tuple[str, int, bytes]]:
        return {
            (Path(entry["image"]).name, entry["label"], (output / entry["image"]).read_bytes())
            for entry in manifest(output)[split]
        }

    for split, count in (("training", 9), ("validation", 3)):
        found = listed(tmp_path / "out", split)
        assert len(found) == count
        assert found == listed(tmp_path / "expected", split)


def test_without_ground_truth_flat_validation_images_have_no_label(
    folders: Path, prepare: Callable[..., Outcome], tmp_path: Path
) -> None:
    archives = make_archives(folders, tmp_path / "in")
    result = prepare(archives, tmp_path / "out")
    assert result.code == 0
    assert "no ground truth was found (--val-labels)" in result.out
    content = manifest(tmp_path / "out")
    assert all("label" not in entry for entry in content["validation"])
    assert len(content["validation"]) == 3


def test_kaggles_layout_and_its_unlabeled_test_images(
    folders: Path, prepare: Callable[..., Outcome], tmp_path: Path
) -> None:
    root = tmp_path / "in" / "ILSVRC" / "Data" / "CLS-LOC"
    shutil.copytree(folders / "train", root / "train")
    (root / "val").mkdir()
    (root / "test").mkdir()
    images = sorted((folders / "val").glob("*/*"))
    for path in images:
        shutil.copy(path, root / "val")
        shutil.copy(path, root / "test")
    rows = [f"{path.stem},{path.parent.name} 1 2 3 4" for path in images]
    (tmp_path / "in" / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *rows]))
    result = prepare(tmp_path / "in", tmp_path / "out")
    assert result.code == 0
    assert "the test images have no classes and were left out" in result.out
    content = manifest(tmp_path / "out")
    assert [entry["label"] for entry in content["validation"]] == [0, 1, 2]
    assert content["test"] == []


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("val.txt", "x_00000002.JPEG 1\nx_00000001.JPEG 2\n"),
        ("val.txt", "x_00000002.JPEG b\nx_00000001.JPEG c\n"),
        ("LOC_val_solution.csv", "ImageId,PredictionString\nx_00000002,b 1 2 3 4\nx_00000001,c 5 6 7 8 c 1 2 3 4\n"),
    ],
)
def test_ground_truth_by_name(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    truth = read_ground_truth(tmp_path / name)
    found = [truth.class_of(f"x_0000000{number}.JPEG", ("a", "b", "c")) for number in (1, 2, 3)]
    assert found == ["c", "b", None]


def test_ground_truth_by_number(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("n00000003\nn00000001\n")
    devkit = write_devkit(tmp_path, [1, 3])
    with tarfile.open(tmp_path / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "data", "ILSVRC2012_devkit_t12/data")
    for path in (tmp_path / "labels.txt", devkit, tmp_path, tmp_path / "ILSVRC2012_devkit_t12.tar.gz"):
        truth = read_ground_truth(path)
        names = [truth.class_of(f"ILSVRC2012_val_0000000{number}.JPEG", CLASSES) for number in (1, 2, 3)]
        assert names == ["n00000003", "n00000001", None], path


@pytest.mark.parametrize(
    ("text", "said"),
    [("1\n2\n", "without meta.mat"), ("some other text here\n", "other text"), ("", "other text")],
)
def test_ground_truth_of_another_form_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "truth.txt").write_text(text)
    with pytest.raises(DataError, match=said):
        read_ground_truth(tmp_path / "truth.txt")


def test_a_damaged_archive_is_refused(folders: Path, prepare: Callable[..., Outcome], tmp_path: Path) -> None:
    path = make_archives(folders, tmp_path / "in") / "ILSVRC2012_img_train.tar"
    path.write_bytes(path.read_bytes()[:9000])
    result = prepare(tmp_path / "in", tmp_path / "out")
    assert result.code == 2
    assert "ILSVRC2012_img_train.tar: found a damaged or compressed archive" in result.err
    assert not (tmp_path / "out").exists()


def test_a_name_in_an_archive_cannot_leave_the_output(tmp_path: Path, prepare: Callable[..., Outcome]) -> None:
    (tmp_path / "in").mkdir()
    buffer = io.BytesIO()
    picture(1).save(buffer, "JPEG")
    with tarfile.open(tmp_path / "in/train.tar", "w") as archive:
        for name in ("../../evil.jpg", "/evil2.jpg"):
            member = tarfile.TarInfo(name)
            member.size = len(buffer.getvalue())
            archive.addfile(member, io.BytesIO(buffer.getvalue()))
    assert prepare(tmp_path / "in", tmp_path / "out").code == 0
    found = {entry["image"] for entry in manifest(tmp_path / "out")["training"]}
    assert found == {"images/train/evil.jpg", "images/train/evil2.jpg"}
    assert not (tmp_path / "evil.jpg").exists()


# --- classes, splits, a user's own images -----------------------------------------------------------------


def test_a_number_of_classes_is_chosen_by_the_names_alone() -> None:
    names = [f"n{number:08d}" for number in range(50)]
    chosen = choose_classes(names, "10", seed=0)
    assert len(set(chosen)) == 10
    assert list(chosen) == sorted(chosen)
    assert choose_classes(names[::-1], "10", seed=0) == chosen
    assert set(choose_classes(names, "5", seed=0)) < set(chosen)
    assert choose_classes(names, "10", seed=1) != chosen
    for wrong in ("51", "0", "n99999999"):
        with pytest.raises(DataError, match="found"):
            choose_classes(names, wrong, seed=0)


def test_incomplete_ilsvrc_is_noted() -> None:
    whole = [f"n{number:08d}" for number in range(1000)]
    counts = {"training": 1_281_167, "validation": 50_000, "test": 0}
    assert check_ilsvrc(counts, whole) is None
    assert "1,281,166 training" in str(check_ilsvrc({**counts, "training": 1_281_166}, whole))
    assert "of 999 classes" in str(check_ilsvrc(counts, whole[1:]))
    assert check_ilsvrc(counts, ["cat", "dog"]) is None


def test_classes_by_file_number_the_labels_anew(folders: Path, prepare: Callable[..., Outcome], tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("n00000003 owl\nn00000002 dog\n")
    assert prepare(folders, tmp_path / "out", "--classes", tmp_path / "list.txt").code == 0
    content = manifest(tmp_path / "out")
    assert content["labels"] == {"0": "n00000002", "1": "n00000003"}
    assert [len(content[split]) for split in ("training", "validation")] == [6, 2]
    assert all(CLASSES[entry["label"] + 1] in entry["image"] for entry in content["training"])


def test_holdout_makes_the_validation_images_the_test_split(
    folders: Path, prepare: Callable[..., Outcome], tmp_path: Path
) -> None:
    assert prepare(folders, tmp_path / "out").code == 0
    before = manifest(tmp_path / "out")
    assert "0 images written" in prepare(folders, tmp_path / "out", "--holdout", 0.4).out
    after = manifest(tmp_path / "out")
    assert after["test"] == before["validation"]
    assert 0 < len(after["validation"]) < 9
    assert sorted(e["image"] for s in ("training", "validation") for e in after[s]) == sorted(
        e["image"] for e in before["training"]
    )
    assert after["content_hash"] == before["content_hash"]
    assert after["split_hash"] != before["split_hash"]


def test_own_images_are_dealt_by_name_with_classes_or_without(tmp_path: Path, prepare: Callable[..., Outcome]) -> None:
    for number in range(30):
        folder = tmp_path / "in" / ("cat" if number % 2 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        picture(number, (9, 9)).save(folder / f"{number}.{'png' if number % 3 else 'tiff'}")
    assert prepare(tmp_path / "in", tmp_path / "out").code == 0
    content = manifest(tmp_path / "out")
    counts = [len(content[split]) for split in ("training", "validation", "test")]
    assert sum(counts) == 30
    assert counts[0] > 15
    assert content["labels"] == {"0": "cat", "1": "dog"}
    assert all(("cat" in entry["image"]) == (entry["label"] == 0) for entry in content["training"])
    where = {entry["image"]: split for split in ("training", "validation", "test") for entry in content[split]}
    picture(99).save(tmp_path / "in" / "cat" / "99.png")
    assert prepare(tmp_path / "in", tmp_path / "out").code == 0
    content = manifest(tmp_path / "out")
    moved = {
        e["image"]: s for s in ("training", "validation", "test") for e in content[s] if where.get(e["image"]) != s
    }
    assert set(moved) == {"images/cat/99.png"}
    assert prepare(tmp_path / "in", tmp_path / "plain", "--no-classes").code == 0
    content = manifest(tmp_path / "plain")
    assert content["labels"] == {}
    assert all("label" not in entry for entry in content["training"])


@pytest.mark.parametrize("options", [(), ("--holdout", 0.4)], ids=["dealt", "held out"])
def test_a_resized_copy_has_the_splits_of_the_original(
    options: tuple[object, ...], tmp_path: Path, prepare: Callable[..., Outcome]
) -> None:
    root = tmp_path / "in" / "train" if options else tmp_path / "in"
    for number in range(40):
        folder = root / ("cat" if number % 2 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        # Images of 9 pixels keep their bytes and suffix, the larger ones become JPEG files.
        picture(number, (9, 9) if number % 4 == 0 else (30, 20)).save(
            folder / f"{number}.{'png' if number % 3 else 'tiff'}"
        )
    splits = []
    for name, resize in (("original", ()), ("small", ("--resize", 12))):
        assert prepare(tmp_path / "in", tmp_path / name, *options, *resize).code == 0
        content = manifest(tmp_path / name)
        splits.append({s: {Path(e["image"]).stem for e in content[s]} for s in ("training", "validation", "test")})
    assert {Path(e["image"]).suffix for e in content["training"]} == {".jpg", ".png", ".tiff"}
    assert splits[0] == splits[1]
    assert splits[0]["training"]
    assert splits[0]["validation"]


def test_names_that_would_collide_are_reported(tmp_path: Path, prepare: Callable[..., Outcome]) -> None:
    (tmp_path / "in").mkdir()
    picture(1).save(tmp_path / "in/a.jpg")
    picture(2).save(tmp_path / "in/a.png")
    result = prepare(tmp_path / "in", tmp_path / "out")
    assert result.code == 1
    assert "image a.png: found another image of that name (a.jpg), expected one; skipped" in result.err


def test_a_data_set_in_the_input_is_no_class(folders: Path, prepare: Callable[..., Outcome], tmp_path: Path) -> None:
    shutil.copytree(folders / "train", tmp_path / "in")
    assert prepare(tmp_path / "in", tmp_path / "in" / "out").code == 0
    result = prepare(tmp_path / "in", tmp_path / "other")
    assert result.code == 0
    assert "note: folders that hold a data set (dataset.json and recipe.json) were left out: out" in result.out
    first, second = manifest(tmp_path / "in" / "out"), manifest(tmp_path / "other")
    assert list(second["labels"].values()) == list(CLASSES)
    assert first == second
    (tmp_path / "other" / "dataset.json").rename(tmp_path / "in" / CLASSES[0] / "dataset.json")
    assert prepare(tmp_path / "in", tmp_path / "third").code == 0
    assert manifest(tmp_path / "third")["labels"] == first["labels"]


def test_holdout_needs_training_images(folders: Path, prepare: Callable[..., Outcome], tmp_path: Path) -> None:
    for source in (folders / "train", folders / "val"):
        result = prepare(source, tmp_path / "out", "--holdout", 0.4)
        assert result.code == 2
        assert "holdout: found 0.4 but no training images" in result.err
        assert result.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "found nothing, expected a folder"),
        (["empty"], "found no images"),
        (["in", "--classes", "4"], "classes: found 4, expected 1 to 3"),
        (["in", "--resize", "2"], "resize is 2; expected 8 to 4096 pixels, or null"),
        (["in", "--holdout", "0.9"], "holdout is 0.9; expected a share in [0, 0.5]"),
        (["in", "--recipe", "imagenet/short_999"], "imagenet/short_256"),
        (["in", "--workers", "0"], "workers: found 0"),
        (["in", "--val-labels", "nowhere.txt"], "found no readable file"),
    ],
)
def test_a_mistake_ends_with_one_line(
    folders: Path, prepare: Callable[..., Outcome], tmp_path: Path, arguments: list[str], said: str
) -> None:
    (tmp_path / "empty").mkdir()
    source = folders if arguments[0] == "in" else tmp_path / arguments[0]
    result = prepare(source, tmp_path / "out", *arguments[1:])
    assert result.code == 2
    assert said in result.err
    assert result.err.startswith("vaevq-med: ")
    assert result.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_another_recipe_needs_overwrite(folders: Path, prepare: Callable[..., Outcome], tmp_path: Path) -> None:
    assert prepare(folders, tmp_path / "out").code == 0
    result = prepare(folders, tmp_path / "out", "--resize", 16)
    assert result.code == 2
    assert "found images made by another recipe (resize None, expected 16), expected those of" in result.err
    assert "--overwrite" in result.err
    assert prepare(folders, tmp_path / "out", "--resize", 16, "--overwrite").code == 0
    assert prepare(folders, tmp_path / "fresh", "--resize", 16).code == 0
    assert tree(tmp_path / "out" / "images").keys() >= tree(tmp_path / "fresh" / "images").keys()
    assert manifest(tmp_path / "out") == manifest(tmp_path / "fresh")


# --- interruptions ----------------------------------------------------------------------------------------


def test_a_full_disk_and_an_interrupt_keep_finished_batches(
    folders: Path, prepare: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert prepare(folders, tmp_path / "expected", "--resize", 16).code == 0
    original = image_store._place
    errors: list[BaseException] = [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()]
    for error, code, kept in zip(errors, (2, 130), (3, 6), strict=True):
        calls = iter(range(99))

        def fail(*args: Any, error: BaseException = error, calls: Any = calls) -> int:
            if next(calls) == 4:  # in the middle of the second batch of this run
                raise error
            return original(*args)

        with monkeypatch.context() as patch:
            patch.setattr(image_store, "_place", fail)
            result = prepare(folders, tmp_path / "out", "--resize", 16)
        assert result.code == code
        assert "same command goes on" in result.err
        assert not (tmp_path / "out/dataset.json").exists()
        records = list((tmp_path / "out/.images").glob("*.json"))
        assert sum(len(json.loads(path.read_text())["images"]) for path in records) == kept
    result = prepare(folders, tmp_path / "out", "--resize", 16)
    assert "6 images written, 6 were done" in result.out
    assert tree(tmp_path / "out") == tree(tmp_path / "expected")


def test_changed_and_lost_files_are_prepared_again(
    folders: Path, prepare: Callable[..., Outcome], tmp_path: Path
) -> None:
    shutil.copytree(folders, tmp_path / "in")
    assert prepare(tmp_path / "in", tmp_path / "out", "--resize", 16).code == 0
    gone = next((tmp_path / "out/images/train" / CLASSES[0]).iterdir())
    gone.unlink()
    removed = sorted((tmp_path / "in/train" / CLASSES[1]).iterdir())[0]
    removed.unlink()
    result = prepare(tmp_path / "in", tmp_path / "out", "--resize", 16)
    assert "5 images written, 6 were done" in result.out
    assert gone.is_file()
    assert not list((tmp_path / "out/images").rglob(f"{removed.stem}.*"))
    assert len(manifest(tmp_path / "out")["training"]) == 8


# --- transforms -------------------------------------------------------------------------------------------


def test_shorter_side_and_center_crop_are_pillows_up_to_rounding(tmp_path: Path) -> None:
    image = picture(3, (90, 60))
    image.save(tmp_path / "a.png")
    chain = Compose(
        [LoadPhotograph(), ResizeShortSided("image", size=20), CenterSpatialCropd(keys="image", roi_size=[20, 20])]
    )
    item = chain({"image": str(tmp_path / "a.png")})
    expected = np.asarray(image.resize((30, 20), Image.Resampling.BICUBIC).crop((5, 0, 25, 20)), float) / 127.5 - 1
    np.testing.assert_allclose(np.asarray(item["image"]).transpose(1, 2, 0), expected, atol=1.5 / 127.5)
    assert item["modality"] == ""
    assert item["label"] == -1


def test_a_resized_crop_is_a_box_of_the_image_within_its_bounds() -> None:
    rows = torch.linspace(-1, 1, 50)[:, None].expand(50, 80)
    columns = torch.linspace(-1, 1, 80)[None].expand(50, 80)
    crop = RandResizedCropd("image", size=16, scale=(0.2, 0.4))
    crop.set_random_state(seed=1)
    areas = []
    for _ in range(50):
        out = crop({"image": torch.stack([rows, columns])})["image"]
        top, left, height, width = crop.box
        assert 0 <= top <= 50 - height
        assert 0 <= left <= 80 - width
        assert out.shape == (2, 16, 16)
        centers = torch.tensor([(top + height / 2 - 0.5) / 49 * 2 - 1, (left + width / 2 - 0.5) / 79 * 2 - 1])
        torch.testing.assert_close(out.mean(dim=(1, 2)), centers, atol=0.01, rtol=0)
        assert 0.7 < width / height < 1.4
        areas.append(height * width / 4000)
    assert 0.18 < min(areas) < 0.25
    assert 0.35 < max(areas) < 0.42


def test_a_proportion_that_never_fits_gives_the_largest_centered_crop() -> None:
    crop = RandResizedCropd("image", size=4, scale=(1.0, 1.0), ratio=(1.0, 1.0))
    crop({"image": torch.zeros(1, 10, 30)})
    assert crop.box == (0, 10, 10, 10)


def test_random_crops_depend_on_the_index_alone(folders: Path, prepare: Callable[..., Outcome], tmp_path: Path) -> None:
    assert prepare(folders, tmp_path / "out").code == 0

    def dataset() -> SliceDataset:
        chain = Compose(
            [
                LoadPhotograph(),
                ResizeShortSided("image", size=24),
                RandSpatialCropd(keys="image", roi_size=[24, 24], random_size=False),
                RandFlipd(keys="image", prob=0.5, spatial_axis=1),
            ]
        )
        return SliceDataset(dataset_dir=tmp_path / "out", split="training", transform=chain, seed=5)

    first, second = dataset(), dataset()
    images = [first[2 + epoch * 9]["image"] for epoch in range(6)]
    again = [second[2 + epoch * 9]["image"] for epoch in reversed(range(6))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(images, again, strict=True))
    assert len({image.numpy().tobytes() for image in images}) > 2


# --- stacked contrasts ------------------------------------------------------------------------------------


def test_stacked_contrasts_are_the_single_ones_in_order(slice_dataset: Path) -> None:
    single = SliceDataset(dataset_dir=slice_dataset, split="test", transform=LoadSliced(image_size=32))
    by_place = {(item["slice"], item["modality"]): item["image"] for item in map(single.__getitem__, range(16))}
    names = ["t2f", "t1n"]
    for chosen, order in ((names, names), (None, ["t1n", "t1c", "t2w", "t2f"])):
        stacked = SliceDataset(
            dataset_dir=slice_dataset,
            split="test",
            modalities=chosen,
            stack_modalities=True,
            transform=LoadSliced(image_size=32, in_channels=len(order)),
        )
        assert len(stacked) == 4
        for item in map(stacked.__getitem__, range(4)):
            assert item["modality"] == "+".join(order)
            expected = torch.cat([by_place[item["slice"], name] for name in order])
            assert torch.equal(item["image"], expected)


def test_stacking_leaves_out_incomplete_slices_and_checks_the_channels(slice_dataset: Path, tmp_path: Path) -> None:
    content = json.loads((slice_dataset / "dataset.json").read_text())
    content["test"] = content["test"][1:]
    shutil.copytree(slice_dataset, tmp_path / "data")
    (tmp_path / "data" / "dataset.json").write_text(json.dumps(content))
    arguments = {"dataset_dir": tmp_path / "data", "split": "test", "stack_modalities": True}
    assert [entry["slice"] for entry in SliceDataset(**arguments).data] == [1, 2, 3]
    with pytest.raises(DataError, match="in_channels: found 3, expected 4"):
        SliceDataset(**arguments, transform=LoadSliced(image_size=32, in_channels=3))[0]


@pytest.mark.parametrize("channels", [2, 4])
def test_features_of_other_channels_are_the_mean_of_gray_images(channels: int) -> None:
    network = feature_network("efficientnet-lite0")
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.rand(2, channels, 32, 32, generator=generator) * 2 - 1 for _ in range(2))
    single = [network.distance(first[:, c : c + 1], second[:, c : c + 1]) for c in range(channels)]
    torch.testing.assert_close(network.distance(first, second), torch.stack(single).mean(0))
    pooled = [network.pooled(first[:, c : c + 1]) for c in range(channels)]
    torch.testing.assert_close(network.pooled(first), torch.stack(pooled).mean(0), rtol=1e-4, atol=1e-5)


# --- the bundle -------------------------------------------------------------------------------------------


def run(bundle: Path, file: str, overrides: dict[str, Any], *overlays: str) -> None:
    workflow = ConfigWorkflow(
        config_file=[str(bundle / file), *(str(bundle / "overlays" / f"{name}.json") for name in overlays)],
        meta_file=str(bundle / "metadata.json"),
        workflow_type="train" if file == "train.json" else "infer",
        **overrides,
    )
    workflow.initialize()
    assert not workflow.check_properties()
    workflow.run()
    workflow.finalize()


def evaluated(bundle: Path, overrides: dict[str, Any]) -> None:
    names = ("dataset_dir", "output_dir", "tracking_uri", "device", "num_workers", "batch_size")
    shared = {name: overrides[name] for name in names}
    run(bundle, "evaluate.json", shared)
    del shared["tracking_uri"]
    run(bundle, "inference.json", shared)


def test_the_bundle_trains_evaluates_and_infers(
    folders: Path, prepare: Callable[..., Outcome], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare(folders, tmp_path / "data").code == 0
    overrides = {**toy_config(tmp_path / "data", tmp_path / "run"), "max_epochs": 1}
    run(BUNDLE, "train.json", overrides)
    evaluated(BUNDLE, overrides)
    record = json.loads((tmp_path / "run/evaluation/validation/metrics.json").read_text())
    assert record["summary"]["overall"]["psnr"]["n"] == 3
    assert record["summary"]["overall"]["rfid"]["n"] == 3
    assert 0 <= record["summary"]["overall"]["class_agreement"]["value"] <= 1
    assert record["summary"]["overall"]["class_kl"]["value"] > 0
    assert record["summary"]["modality"] == {}
    written = sorted((tmp_path / "run/predictions/validation/reconstructions").rglob("*.png"))
    assert len(written) == 3
    with Image.open(written[0]) as stored:
        assert (stored.mode, stored.size) == ("RGB", (32, 32))
    # Images that are dealt anew afterwards may have been trained on.
    assert prepare(folders, tmp_path / "data", "--holdout", 0.4).code == 0
    capsys.readouterr()
    with pytest.raises(SystemExit):
        evaluated(BUNDLE, overrides)
    assert "dealt to other splits" in capsys.readouterr().err


def test_the_random_resized_crop_overlay_trains_and_packs(
    folders: Path, prepare: Callable[..., Outcome], tmp_path: Path
) -> None:
    assert prepare(folders, tmp_path / "data").code == 0
    overrides = {**toy_config(tmp_path / "data", tmp_path / "run"), "max_epochs": 1}
    run(BUNDLE, "train.json", overrides, "random_resized_crop")
    report = BundlePack("imagenet", tmp_path / "zoo", tmp_path / "run/checkpoints/last.pt").run()
    assert {"configs/evaluate.json", "models/model.pt", "docs/README.md"} < set(report.files)
    metadata = json.loads((tmp_path / "zoo/configs/metadata.json").read_text())
    assert metadata["network_data_format"]["inputs"]["image"]["num_channels"] == 3


def test_the_brats_bundle_takes_stacked_contrasts(slice_dataset: Path, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    overrides = {
        **toy_config(slice_dataset, tmp_path / "run"),
        **{"max_epochs": 1, "in_channels": 2, "modalities": ["t2f", "t1c"], "stack_modalities": True},
        "tracking_uri": uri,
    }
    bundle = BUNDLE.parent / "brats"
    run(bundle, "train.json", overrides)
    evaluated(bundle, overrides)
    record = json.loads((tmp_path / "run/evaluation/test/metrics.json").read_text())
    assert record["summary"]["overall"]["psnr"]["n"] == 4
    assert set(record["summary"]["modality"]) == {"t2f+t1c"}
    written = sorted((tmp_path / "run/predictions/test/reconstructions").rglob("*.png"))
    assert [path.name[-13:] for path in written[:2]] == ["-channel0.png", "-channel1.png"]
    assert len(written) == 8
    # MLflow takes no plus sign in the name of a metric.
    client = MlflowClient(uri)
    (experiment,) = (e for e in client.search_experiments() if e.name == "vaevq_med brats")
    (tracked,) = client.search_runs([experiment.experiment_id])
    assert tracked.info.status == "FINISHED"
    for name in ("val/psnr_t2f_t1c", "test/psnr_t2f_t1c", "train/loss"):
        assert name in tracked.data.metrics, name


@pytest.mark.sampledata
def test_real_photographs(sample_data: Path, tmp_path: Path) -> None:
    search = find_images(sample_data / "imagenet-sample", tmp_path)
    assert (len(search.units), len(search.classes), search.problems) == (800, 800, [])
