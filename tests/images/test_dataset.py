"""Slices as items, and the batch order."""

from __future__ import annotations

import json
import shutil
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from monai.transforms import Compose, RandFlipd
from PIL import Image

from vaevq_med.core.errors import DataError
from vaevq_med.images.dataset import ResumableBatchSampler, SliceDataset
from vaevq_med.images.loading import training_loader
from vaevq_med.images.pixels import read_image
from vaevq_med.images.transforms import LoadSliced

LABELS = {"whole_tumor": [1, 2, 3], "tumor_core": [1, 3], "enhancing_tumor": [3]}


@pytest.mark.parametrize(("array", "expected"), [(np.uint8(51), 0.2), (np.uint16(13107), 0.2)])
def test_read_image_scales_by_the_stored_depth(tmp_path: Path, array: np.generic, expected: float) -> None:
    Image.fromarray(np.full((3, 5), array)).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png")
    assert image.shape == (1, 3, 5)
    assert image.dtype == torch.float32
    torch.testing.assert_close(image, torch.full((1, 3, 5), expected))


def test_read_image_npy_and_color(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.full((4, 4), 0.25, dtype=np.float32))
    assert read_image(tmp_path / "a.npy").unique().tolist() == [0.25]
    Image.fromarray(np.dstack([np.full((2, 3), v, np.uint8) for v in (0, 51, 255)])).save(tmp_path / "c.png")
    assert read_image(tmp_path / "c.png")[:, 0, 0].tolist() == pytest.approx([0.0, 0.2, 1.0])


def test_read_image_names_a_broken_file(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"a\.png: found an unreadable image"):
        read_image(tmp_path / "a.png")


def test_item_range_masks_and_metadata(slice_dataset: Path) -> None:
    data = SliceDataset(dataset_dir=slice_dataset, split="test", transform=LoadSliced(image_size=32, label_map=LABELS))
    item = data[1]
    assert item["image"].shape == (1, 32, 32)
    assert item["image"].min() == -1
    assert item["modality"] == "t1c"
    stored = np.asarray(Image.open(Path(item["path"])))
    np.testing.assert_array_equal(item["brain"].numpy(), stored > 0)
    np.testing.assert_allclose(item["image"][0].numpy(), stored / 127.5 - 1, atol=1e-6)
    labels = np.asarray(Image.open(slice_dataset / data.data[1]["segmentation"]))
    np.testing.assert_array_equal(item["enhancing_tumor"].numpy(), labels == 3)


def test_resizing_and_channels(slice_dataset: Path) -> None:
    transform = LoadSliced(image_size=16, in_channels=3, label_map=LABELS)
    item = SliceDataset(dataset_dir=slice_dataset, split="test", transform=transform)[0]
    assert item["image"].shape == (3, 16, 16)
    assert torch.equal(item["image"][0], item["image"][2])
    assert item["enhancing_tumor"].shape == (16, 16)
    assert item["enhancing_tumor"].any()


def test_selection_by_modality_count_and_shard(slice_dataset: Path) -> None:
    kept = SliceDataset(dataset_dir=slice_dataset, split="training", modalities=["t2f"])
    assert {entry["modality"] for entry in kept.data} == {"t2f"}
    few = SliceDataset(dataset_dir=slice_dataset, split="training", max_items=3)
    assert [entry["index"] for entry in few.data] == [0, 1, 2]
    assert few.data[0]["slice"] == 0
    assert few.data[2]["slice"] == 3
    shards = [SliceDataset(dataset_dir=slice_dataset, split="training", shard=(rank, 2)) for rank in (0, 1)]
    indices = [entry["index"] for shard in shards for entry in shard.data]
    assert sorted(indices) == list(range(16))


def test_unknown_modality_and_missing_data_say_what_to_do(slice_dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no modality t9x.*expected some of t1c, t1n, t2f, t2w"):
        SliceDataset(dataset_dir=slice_dataset, split="training", modalities=["t9x"])
    with pytest.raises(DataError, match="vaevq-med slice-extract"):
        SliceDataset(dataset_dir=tmp_path / "nothing", split="training")


@pytest.mark.parametrize(
    ("key", "value"), [("slice", "/etc/hostname"), ("label", None), ("index", 2**63), ("label", float("nan"))]
)
def test_a_number_of_an_entry_is_whole(key: str, value: object, slice_dataset: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(slice_dataset, tmp_path / "copy")
    content = json.loads((folder / "dataset.json").read_text())
    content["training"][1][key] = value
    (folder / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=rf"training\[1\]: found the {key} .*, expected a whole number"):
        SliceDataset(dataset_dir=folder, split="training")


@pytest.mark.parametrize(("patients", "command"), [(True, "slice-extract"), (False, "imagenet-prepare")])
def test_an_empty_split_names_the_command_that_fills_it(
    slice_dataset: Path, tmp_path: Path, patients: bool, command: str
) -> None:
    content = json.loads((slice_dataset / "dataset.json").read_text())
    for split in ("training", "validation", "test"):
        content[split] = [] if split == "test" else content[split]
        if not patients:
            content[split] = [{"image": entry["image"]} for entry in content[split]]
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=rf"empty split 'test' .*vaevq-med {command}"):
        SliceDataset(dataset_dir=tmp_path, split="test")


def test_random_transforms_depend_on_the_index_alone(slice_dataset: Path) -> None:
    def make() -> SliceDataset:
        flip = Compose([LoadSliced(image_size=32), RandFlipd(keys="image", prob=0.5, spatial_axis=1)])
        return SliceDataset(dataset_dir=slice_dataset, split="training", transform=flip, seed=3)

    first, second = make(), make()
    n = len(first)
    epochs = range(12)
    images = [first[5 + epoch * n]["image"] for epoch in epochs]
    again = [second[5 + epoch * n]["image"] for epoch in reversed(epochs)][::-1]
    assert all(torch.equal(a, b) for a, b in zip(images, again, strict=True))
    flipped = [torch.equal(image, images[0].flip(-1)) for image in images]
    same = [torch.equal(image, images[0]) for image in images]
    assert any(flipped)
    assert all(f or s for f, s in zip(flipped, same, strict=True))


@given(
    num_items=st.integers(1, 40),
    batch_size=st.integers(1, 9),
    world_size=st.integers(1, 3),
    start=st.integers(0, 30),
    seed=st.integers(0, 5),
)
def test_sampler_is_resumable_and_complete(
    num_items: int, batch_size: int, world_size: int, start: int, seed: int
) -> None:
    def batches(rank: int, start: int, count: int) -> list[list[int]]:
        sampler = ResumableBatchSampler(
            num_items, batch_size=batch_size, seed=seed, start=start, rank=rank, world_size=world_size
        )
        return list(islice(iter(sampler), count))

    assert batches(0, start, 3) == batches(0, 0, start + 3)[start:]
    count = -(-3 * num_items // (batch_size * world_size))
    shares = [batches(rank, 0, count) for rank in range(world_size)]
    stream = [k for step in range(count) for rank in range(world_size) for k in shares[rank][step]]
    for epoch in range(3):
        seen = stream[epoch * num_items : (epoch + 1) * num_items]
        assert sorted(seen) == list(range(epoch * num_items, (epoch + 1) * num_items))


def test_epochs_are_shuffled_differently() -> None:
    stream = list(islice(iter(ResumableBatchSampler(50, batch_size=50)), 2))
    assert [k % 50 for k in stream[0]] != [k % 50 for k in stream[1]]


def test_loader_leaves_the_global_generator_alone_and_workers_change_nothing(slice_dataset: Path) -> None:
    def first_batches(workers: int) -> list[torch.Tensor]:
        flip = Compose([LoadSliced(image_size=32), RandFlipd(keys="image", prob=0.5, spatial_axis=1)])
        data = SliceDataset(dataset_dir=slice_dataset, split="training", transform=flip)
        loader = training_loader(data, ResumableBatchSampler(len(data), batch_size=5), num_workers=workers)
        return [torch.as_tensor(batch["image"]) for batch in islice(iter(loader), 5)]

    before = torch.get_rng_state()
    alone = first_batches(0)
    assert torch.equal(before, torch.get_rng_state())
    for a, b in zip(alone, first_batches(2), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(("kind", "content"), [("image", None), ("image", b"no image"), ("segmentation", b"none")])
def test_a_missing_or_damaged_file_is_one_line_that_names_it(
    kind: str, content: bytes | None, workers: int, slice_dataset: Path, tmp_path: Path
) -> None:
    shutil.copytree(slice_dataset, tmp_path, dirs_exist_ok=True)
    chain = Compose([LoadSliced(image_size=32, label_map=LABELS)])
    data = SliceDataset(dataset_dir=tmp_path, split="training", transform=chain)
    path = Path(data.data[3][kind])
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    loader = training_loader(data, ResumableBatchSampler(len(data), batch_size=16), num_workers=workers)
    with pytest.raises(DataError) as stopped:
        next(iter(loader))
    assert str(stopped.value).startswith(f"{path}: found an unreadable {kind} (")
    assert "\n" not in str(stopped.value)


def test_without_validation_patients_training_slices_are_validated_on(
    slice_dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from vaevq_med.evaluation.data import validation_split

    assert validation_split(slice_dataset) == "validation"
    content = json.loads((slice_dataset / "dataset.json").read_text())
    (tmp_path / "dataset.json").write_text(json.dumps({**content, "validation": []}))
    assert validation_split(tmp_path) == "training"
    assert "--split-file" in caplog.text
