"""Items of several adjacent slices, which are patches of volumes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_slice_dataset
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.images.dataset import SliceDataset, runs_of
from vaevq_med.images.reading import reader


@pytest.fixture(scope="module")
def ten_slices(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_slice_dataset(tmp_path_factory.mktemp("ten"), slices=10)


def volumes(folder: Path, depth: int | None = 4, **further: Any) -> SliceDataset:
    reading = {key: further.pop(key) for key in ("augment", "patch_size", "regions") if key in further}
    transform = reader(folder, image_size=32, in_channels=1, **reading)
    return SliceDataset(dataset_dir=folder, split="training", transform=transform, depth=depth, **further)


def test_an_item_is_the_slices_of_a_case_and_contrast_in_order(ten_slices: Path) -> None:
    dataset = volumes(ten_slices, regions=True)
    single = volumes(ten_slices, None, regions=True)
    assert len(dataset) == 4 * 3  # contrasts, of ten slices each
    by_place = {(item["modality"], item["slice"]): item for item in map(single.__getitem__, range(len(single)))}
    for item in map(dataset.__getitem__, range(len(dataset))):
        assert item["image"].shape == (1, 4, 32, 32)
        assert item["brain"].shape == (4, 32, 32)
        for position, z in enumerate(item["slice"].tolist()):
            if z >= 0:
                expected = by_place[item["modality"], z]
                assert torch.equal(item["image"][:, position], expected["image"])
                assert torch.equal(item["enhancing_tumor"][position], expected["enhancing_tumor"])
            else:
                assert torch.equal(item["image"][:, position], item["image"][:, position - 1])
    numbers = [item["slice"].tolist() for item in map(dataset.__getitem__, range(3))]
    assert numbers == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, -1, -1]]
    batch = next(iter(DataLoader(dataset, batch_size=3)))
    assert batch["image"].shape == (3, 1, 4, 32, 32)
    assert batch["slice"].tolist() == numbers


def test_random_transforms_do_the_same_to_all_slices(ten_slices: Path) -> None:
    dataset = volumes(ten_slices, augment="flip", patch_size=12, random_start=True, seed=3)
    single = volumes(ten_slices, None)
    whole = {(item["modality"], item["slice"]): item["image"][0] for item in map(single.__getitem__, range(40))}
    starts, places = set(), set()
    for epoch in range(6):
        index = epoch * len(dataset)
        item = dataset[index]
        assert torch.equal(item["image"], dataset[index]["image"])
        assert item["image"].shape == (1, 4, 12, 12)
        first = item["slice"].tolist()
        assert first == list(range(first[0], first[0] + 4))
        found = set()
        for position, z in enumerate(first):
            for flip in (False, True):
                picture = whole[item["modality"], z].flip(-1) if flip else whole[item["modality"], z]
                patches = picture.unfold(0, 12, 1).unfold(1, 12, 1)
                same = (patches == item["image"][0, position]).all(-1).all(-1).nonzero()
                found.add((flip, *same[0].tolist())) if len(same) else None
        assert len(found) == 1  # one place and one flip for all four
        starts.add(first[0])
        places |= found
    assert len(starts) > 1
    assert len(places) > 3


def test_contrasts_are_stacked_of_runs_too(ten_slices: Path) -> None:
    transform = reader(ten_slices, image_size=32, in_channels=4)
    dataset = SliceDataset(
        dataset_dir=ten_slices, split="test", transform=transform, stack_modalities=True, depth=5, max_items=2
    )
    assert dataset.channels == ["t1n", "t1c", "t2w", "t2f"]
    assert dataset[0]["image"].shape == (4, 5, 32, 32)
    assert len(dataset) == 2


places = st.tuples(st.sampled_from("ab"), st.sampled_from(("t1n", "t2w")), st.integers(0, 12))


@given(st.lists(places, unique=True))
def test_runs_have_no_gap_and_lose_nothing(found: list[tuple[str, str, int]]) -> None:
    entries = [{"case": case, "modality": modality, "slice": z} for case, modality, z in found]
    runs = runs_of(entries)
    for run in runs:
        assert len({(entry["case"], entry["modality"]) for entry in run}) == 1
        assert [entry["slice"] for entry in run] == list(range(run[0]["slice"], run[0]["slice"] + len(run)))
        above = {**run[-1], "slice": run[-1]["slice"] + 1}
        below = {**run[0], "slice": run[0]["slice"] - 1}
        assert above not in entries
        assert below not in entries
    assert sorted(map(str, (entry for run in runs for entry in run))) == sorted(map(str, entries))


def test_what_has_no_slices_is_refused(ten_slices: Path, tmp_path: Path) -> None:
    content = json.loads((ten_slices / "dataset.json").read_text())
    for entry in content["training"]:
        del entry["slice"]
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(VaevqMedError, match=r"expected slices of volumes, made by vaevq-med slice-extract"):
        SliceDataset(dataset_dir=tmp_path, split="training", depth=4)
    with pytest.raises(VaevqMedError, match="depth: found 0"):
        SliceDataset(dataset_dir=ten_slices, split="training", depth=0)
    with pytest.raises(VaevqMedError, match=r"patch_size(:| is)( found)? 33"):
        reader(ten_slices, image_size=32, in_channels=1, patch_size=33)
