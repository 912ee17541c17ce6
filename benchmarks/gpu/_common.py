"""What the GPU studies share: slices in memory, and the bundle's own configuration around them."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _record import write_atomically
from monai.bundle import ConfigParser
from monai.data import set_track_meta
from torch import Tensor
from torch.utils.data import Dataset

from vaevq_med.core.errors import DataError
from vaevq_med.core.resources import bundle_path, overlay_path


def pack(dataset_dir: Path, output: Path, image_size: int, max_items: Mapping[str, int]) -> None:
    """Write a data set's training and test slices to one compressed ``.npz`` that travels to a GPU machine."""
    from vaevq_med.images.dataset import LoadSliced, SliceDataset

    arrays: dict[str, np.ndarray] = {}
    for split, limit in max_items.items():
        data = SliceDataset(
            dataset_dir=dataset_dir, split=split, max_items=limit, transform=LoadSliced(image_size=image_size)
        )
        items = [data[i] for i in range(len(data))]
        stacked = torch.stack([item["image"] for item in items])
        arrays[split] = ((stacked + 1) * 127.5).round().to(torch.uint8).numpy()
        arrays[f"{split}_modality"] = np.array([item["modality"] for item in items])
        arrays[f"{split}_patient"] = np.array([item["patient"] for item in items])
    np.savez_compressed(output, **arrays)


class PackedSlices(Dataset):
    """One split of a packed file; an index past the end is a later epoch's draw, flipped by its parity."""

    def __init__(self, *, file: str, split: str, image_size: int, augment: bool = False) -> None:
        with np.load(file, allow_pickle=False) as packed:
            if split not in packed:
                raise DataError(f"{file}: found {', '.join(packed)}, expected the split {split!r}")
            images = torch.from_numpy(packed[split])
            self.modalities = [str(name) for name in packed[f"{split}_modality"]]
            self.patients = [str(name) for name in packed[f"{split}_patient"]]
        if images.shape[-1] != image_size:
            images = torch.nn.functional.interpolate(
                images.float(), size=(image_size, image_size), mode="bilinear", antialias=True
            ).round()
        self.images = images.to(torch.uint8)
        self.augment = augment

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = index % len(self)
        image = self.images[item].float() / 127.5 - 1
        if self.augment and (index * 2654435761 >> 16) & 1:
            image = image.flip(-1)
        return {
            "image": image,
            "modality": self.modalities[item],
            "patient": self.patients[item],
            "case": self.patients[item],
            "path": str(item),
        }


class Batches:
    """Batches of images that are where they are needed already, from the ``start``-th on, over and over.

    Args:
        images: ``[N, C, H, W]``.
        batch_size: B; a batch is cut from the images in order.
        count: batches of an epoch.
    """

    def __init__(self, images: Tensor, batch_size: int, count: int) -> None:
        self.parts = [part for part in images.split(batch_size) if len(part) == batch_size]
        self.count, self.start = count, 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return ({"image": self.parts[i % len(self.parts)]} for i in range(self.start, self.count))


def scratch_folder() -> Path:
    """A folder that is gone when the process ends."""
    path = tempfile.mkdtemp(prefix="vaevq_med_study_")
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return Path(path)


def configure(
    data: str, overlays: Sequence[str], overrides: Mapping[str, Any], *, steps: int, image_size: int
) -> ConfigParser:
    """The bundle's ``train.json`` with overlays, on packed slices, without tracking and validation during training."""
    root = bundle_path("brats")
    parser = ConfigParser()
    parser.read_config([str(root / "train.json"), *(str(overlay_path(name, root)) for name in overlays)])
    parser.update(
        {
            "output_dir": str(scratch_folder()),
            "image_size": image_size,
            "max_epochs": 1,
            "epoch_length": steps,
            "num_workers": 0,
            "resume": False,
            "tracking_uri": "none",
            "train#dataset": {
                "_target_": f"{__name__}.PackedSlices",
                "file": data,
                "split": "training",
                "image_size": image_size,
                "augment": True,
            },
            "validate#dataset": {
                "_target_": f"{__name__}.PackedSlices",
                "file": data,
                "split": "test",
                "image_size": image_size,
            },
            **overrides,
        }
    )
    return parser


def configure_generator(kind: str, tokens: Path, overrides: Mapping[str, Any], *, steps: int) -> ConfigParser:
    """The bundle's ``train_autoregressive.json`` or ``train_diffusion.json`` for so many steps, an epoch each.

    Args:
        kind: ``autoregressive`` or ``diffusion``.
        tokens: the token store, one batch or more.
        overrides: values by id.
        steps: of training.
    """
    parser = ConfigParser()
    parser.read_config(str(bundle_path("brats") / f"train_{kind}.json"))
    parser.update(
        {
            "dataset_dir": str(tokens),
            "output_dir": str(scratch_folder()),
            "max_epochs": steps,
            "epoch_length": 1,
            "num_workers": 0,
            "resume": False,
            "tracking_uri": "none",
            "val_split": "training",
            "train#handlers": [],
            **overrides,
        }
    )
    return parser


def prepare(seed: int) -> None:
    """Seeds and precision as the bundle's ``initialize`` sets them."""
    set_track_meta(False)
    torch.manual_seed(seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True


def batches(dataset: PackedSlices, batch_size: int) -> Iterator[Tensor]:
    """Batches of images in order."""
    for first in range(0, len(dataset), batch_size):
        yield torch.stack([dataset[i]["image"] for i in range(first, min(first + batch_size, len(dataset)))])


def output_path(name: str, output: Path | None) -> Path:
    """``name.json`` in ``output``, by default in the folder that ``OUT`` names or the working directory."""
    return (output or Path(os.environ.get("OUT", "."))) / f"{name}.json"


def write_json(name: str, record: Mapping[str, Any], output: Path | None) -> Path:
    """Write a record to :func:`output_path`, the old one or the whole new one."""
    path = output_path(name, output)
    write_atomically(path, record)
    return path


__all__ = [
    "Batches",
    "PackedSlices",
    "batches",
    "configure",
    "configure_generator",
    "output_path",
    "pack",
    "prepare",
    "scratch_folder",
    "write_json",
]
