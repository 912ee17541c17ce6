"""Stacks of slices with the masks of their regions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MODALITIES, write_slice_dataset

from vaevq_med.core.errors import DataError
from vaevq_med.images.dataset import SliceDataset
from vaevq_med.images.manifest import load_manifest
from vaevq_med.images.regions import (
    RandIntensities,
    RegionDataset,
    label_values,
    region_augmentation,
    region_labels,
    region_reader,
    to_labels,
)
from vaevq_med.prepare.volumes.labels import LABEL_MAPS


def dataset_of(root: Path, **arguments: Any) -> RegionDataset:
    settings = {"split": "training", "depth": 3, "centered": True, "modalities": list(MODALITIES), **arguments}
    reader = region_reader(root, image_size=32, in_channels=4)
    return RegionDataset(dataset_dir=root, stack_modalities=True, transform=reader, **settings)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three patients in the training split, the last without a segmentation."""
    root = write_slice_dataset(tmp_path_factory.mktemp("three"), slices=3)
    content = json.loads((root / "dataset.json").read_text())
    for entry in content["test"]:
        del entry["segmentation"]
    content["training"] += content["validation"] + content["test"]
    content["validation"] = content["test"] = []
    (root / "dataset.json").write_text(json.dumps(content))
    return root


def test_each_slice_is_the_middle_of_its_neighbors(slice_dataset: Path) -> None:
    """The first and the last are repeated at the ends of a run."""
    data = dataset_of(slice_dataset)
    assert [data[z]["slice"].tolist() for z in range(len(data))] == [[0, 0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 3]]
    item, single = (
        data[2],
        SliceDataset(
            dataset_dir=slice_dataset,
            split="training",
            modalities=["t1c"],
            transform=data.transform,
        ),
    )
    assert item["image"].shape == (4, 3, 32, 32)
    assert item["regions"].shape == (3, 3, 32, 32)
    assert bool(item["labeled"])
    plain = region_reader(slice_dataset, image_size=32, in_channels=1)
    single.transform = plain
    for place, z in enumerate((1, 2, 3)):
        torch.testing.assert_close(item["image"][1, place], single[z]["image"][0])
        torch.testing.assert_close(item["regions"][:, place], single[z]["regions"])
    assert 0 < item["regions"].sum() < 3 * 3 * 32 * 32


def test_runs_that_are_not_centered_are_as_before(slice_dataset: Path) -> None:
    data = dataset_of(slice_dataset, depth=2, centered=False)
    assert [data[n]["slice"].tolist() for n in range(len(data))] == [[0, 1], [2, 3]]
    with pytest.raises(DataError, match="depth: found 2, expected an odd number"):
        dataset_of(slice_dataset, depth=2)


def test_a_slice_without_a_segmentation_is_none_without_a_tumor(three: Path) -> None:
    assert {item["patient"] for item in dataset_of(three).data} == {"BraTS-GLI-00000", "BraTS-GLI-00001"}
    everyone = dataset_of(three, unlabeled=True)
    assert everyone.labeled == ("BraTS-GLI-00000", "BraTS-GLI-00001")
    kinds = {str(everyone[n]["patient"]): bool(everyone[n]["labeled"]) for n in range(len(everyone))}
    assert kinds == {"BraTS-GLI-00000": True, "BraTS-GLI-00001": True, "BraTS-GLI-00002": False}


def test_patients_are_labeled_by_name_or_number(three: Path) -> None:
    named = dataset_of(three, labeled_patients=["BraTS-GLI-00001"], unlabeled=True)
    items = [named[n] for n in range(len(named))]
    assert sum(bool(item["labeled"]) for item in items) == 6  # three slices, twice, of six others
    assert len(items) == 12
    for item in items:
        assert bool(item["labeled"]) == (item["patient"] == "BraTS-GLI-00001") == bool(item["regions"].any())
    chosen = {dataset_of(three, labeled_patients=1, seed=seed).labeled for seed in range(8)}
    assert chosen == {("BraTS-GLI-00000",), ("BraTS-GLI-00001",)}
    assert len({dataset_of(three, labeled_patients=1, seed=3).labeled for _ in range(3)}) == 1
    for wanted, said in ((3, "1 to 2"), (["BraTS-GLI-00002"], "BraTS-GLI-00002, expected some of"), ([], "none")):
        with pytest.raises(DataError, match=said):
            dataset_of(three, labeled_patients=wanted)


def test_masks_move_with_their_images_and_all_slices_alike(tmp_path: Path, slice_dataset: Path) -> None:
    """Of a data set whose images are the tumor itself: after any change, what is bright is what is masked."""
    root = shutil.copytree(slice_dataset, tmp_path / "spots")
    case = "BraTS-GLI-00000-100"
    from PIL import Image

    for path in (root / "images" / case).glob("*.png"):
        labels = Image.open(root / "labels" / case / f"{case}-seg-z000.png")
        labels.point(lambda value: 255 * (value > 0)).save(path)
        labels.save(root / "labels" / case / f"{case}-seg-{path.stem.rpartition('-')[2]}.png")
    data = dataset_of(root, augmentation=region_augmentation(image_size=32))
    places = []
    for index in range(1, 4 * 8, 4):  # the second slice, as eight epochs draw it
        item = data[index]
        bright, masks = item["image"] > 0, item["regions"] > 0.5
        agreement = (bright == masks[:1]).float().mean()
        assert agreement > 0.97
        assert torch.equal(masks[:, 0], masks[:, 1])
        assert set(item["regions"].unique().tolist()) <= {0.0, 1.0}
        places.append(masks[0, 1].nonzero().float().mean(dim=0))
    assert torch.stack(places).std(dim=0).min() > 1
    assert torch.equal(data[5]["image"], data[5]["image"])


def test_intensities_leave_the_background() -> None:
    image = torch.full((4, 2, 3, 3), -1.0)
    image[..., 0, 0] = 0.2
    change = RandIntensities()
    change.set_random_state(seed=0)
    found = change({"image": image})["image"]
    assert torch.equal(found[..., 1:, :], image[..., 1:, :])
    pixels = found[..., 0, 0]
    assert torch.equal(pixels[:, 0], pixels[:, 1])
    assert len(pixels[:, 0].unique()) == 4
    gain, gamma = change.drawn[0]
    assert float(pixels[0, 0]) == pytest.approx(2 * gain * 0.6**gamma - 1, abs=1e-5)


@pytest.mark.parametrize("name", LABEL_MAPS)
def test_labels_of_every_map_come_back_as_regions(name: str) -> None:
    regions = LABEL_MAPS[name].regions
    masks = torch.tensor([[0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1]], dtype=torch.bool)
    labels = to_labels(masks, regions)
    assert len(labels.unique()) == 4
    for number, values in enumerate(regions.values()):
        assert torch.equal(torch.isin(labels, torch.tensor(values, dtype=torch.uint8)), masks[number])


def test_what_has_no_regions_is_refused(slice_dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected regions with labels"):
        label_values({"whole_tumor": (1,), "tumor_core": (1,), "enhancing_tumor": (2,)})
    content = json.loads((slice_dataset / "dataset.json").read_text())
    (tmp_path / "dataset.json").write_text(json.dumps({**content, "label_map": {}}))
    with pytest.raises(DataError, match="without a label map"):
        region_labels(load_manifest(tmp_path))
    for entry in content["training"]:
        del entry["segmentation"]
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="no segmentation in the split"):
        dataset_of(tmp_path)
