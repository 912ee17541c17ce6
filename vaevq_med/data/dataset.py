"""Slices as training and evaluation items, and a batch order that can be taken up anywhere.

A data set's index carries the epoch: item ``k`` is element ``k % len`` as epoch ``k // len`` draws it. Random
transforms are seeded by that index alone, so what a step sees depends on its number, and neither on the
number of workers nor on where a run was interrupted.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from monai.data import Dataset
from monai.transforms import Compose, Randomizable, Transform
from PIL import Image
from torch import Tensor
from torch.utils.data import Sampler

from vaevq_med.data.manifest import load_manifest
from vaevq_med.errors import DataError

REGIONS = ("whole_tumor", "tumor_core", "enhancing_tumor")


def _mix(*values: int) -> int:
    """A 32-bit seed from several integers, by numpy's seed sequence."""
    return int(np.random.SeedSequence(values).generate_state(1)[0])


def read_image(path: str | Path) -> Tensor:
    """Read a stored slice or photograph.

    Args:
        path: an 8- or 16-bit grayscale PNG, an RGB image, or a float ``.npy`` in [0, 1].

    Returns:
        float32 ``[C, H, W]`` in [0, 1]; C is 1 for grayscale and 3 for color.

    Raises:
        DataError: the file cannot be read.
    """
    path = Path(path)
    try:
        if path.suffix == ".npy":
            array = np.load(path, allow_pickle=False).astype(np.float32)
        else:
            with Image.open(path) as image:
                if image.mode.startswith("I"):
                    array = np.asarray(image, dtype=np.float32) / 65535.0
                elif image.mode == "L":
                    array = np.asarray(image, dtype=np.float32) / 255.0
                else:
                    array = np.asarray(image.convert("RGB"), dtype=np.float32) / 255.0
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: found an unreadable image ({error}), expected PNG or .npy") from error
    if array.ndim == 2:
        return torch.from_numpy(array)[None]
    return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))


class LoadSliced(Transform):
    """Read the slice that an entry names, as ``image`` in [-1, 1], and the masks of its regions.

    Args:
        image_size: side in pixels; a stored slice of another size is resized (antialiased; masks nearest).
        in_channels: 1 or 3; a grayscale slice is repeated to three channels, color is averaged to one.
        label_map: label values of each region, for :data:`REGIONS`; None reads no segmentation.

    The result holds ``image`` float ``[C, S, S]`` in [-1, 1], ``modality``, ``patient``, ``case``, ``path``
    (strings), ``slice`` and ``label`` (int) and, with a label map, ``brain`` and each region as bool
    ``[S, S]``; the masks of a slice without a segmentation are empty.
    """

    def __init__(
        self, *, image_size: int, in_channels: int = 1, label_map: Mapping[str, Sequence[int]] | None = None
    ) -> None:
        if in_channels not in (1, 3):
            raise DataError(f"in_channels: found {in_channels}, expected 1 or 3")
        self.image_size = image_size
        self.in_channels = in_channels
        if label_map and set(REGIONS) - set(label_map):
            raise DataError(f"label_map: found {', '.join(label_map)}, expected {', '.join(REGIONS)}")
        self.label_map = {name: tuple(label_map[name]) for name in REGIONS} if label_map else None

    def __call__(self, entry: Mapping[Hashable, Any]) -> dict[str, Any]:
        """Read one entry of a slice data set."""
        image = read_image(entry["image"])
        item: dict[str, Any] = {
            "modality": str(entry.get("modality", "image")),
            "patient": str(entry.get("patient", "")),
            "case": str(entry.get("case", "")),
            "path": str(entry["image"]),
            "slice": int(entry.get("slice", -1)),
            "label": int(entry.get("label", -1)),
            "index": int(entry.get("index", -1)),
        }
        size = (self.image_size, self.image_size)
        if self.label_map is not None:
            item["brain"] = self._resize_mask(image.amax(0) > 0)
            labels = self._labels(entry, image)
            for name, values in self.label_map.items():
                mask = torch.isin(labels, torch.tensor(values, dtype=labels.dtype))
                item[name] = self._resize_mask(mask)
        if tuple(image.shape[-2:]) != size:
            image = F.interpolate(image[None], size=size, mode="bicubic", antialias=True)[0].clamp(0, 1)
        if image.shape[0] != self.in_channels:
            image = image.expand(self.in_channels, -1, -1) if image.shape[0] == 1 else image.mean(0, keepdim=True)
        item["image"] = (image * 2 - 1).contiguous()
        return item

    @staticmethod
    def _labels(entry: Mapping[Hashable, Any], image: Tensor) -> Tensor:
        if not entry.get("segmentation"):
            return torch.zeros(image.shape[-2:], dtype=torch.uint8)
        with Image.open(entry["segmentation"]) as stored:
            return torch.from_numpy(np.array(stored, dtype=np.uint8))

    def _resize_mask(self, mask: Tensor) -> Tensor:
        size = (self.image_size, self.image_size)
        if tuple(mask.shape) == size:
            return mask
        return F.interpolate(mask[None, None].float(), size=size, mode="nearest-exact")[0, 0] > 0.5


class SliceDataset(Dataset):
    """One split of a slice data set written by ``vaevq-med slice-extract``.

    Args:
        dataset_dir: folder of ``dataset.json``.
        split: ``training``, ``validation`` or ``test``.
        transform: dictionary transforms; the first is usually :class:`LoadSliced`.
        modalities: keep these contrasts only, e.g. ``["t1n", "t2f"]``; None keeps all.
        max_items: keep at most this many items, evenly spaced over the split.
        shard: ``(rank, world size)``: keep this rank's share of the items.
        seed: seed of the random transforms.

    Raises:
        DataError: there is no data set, the split is empty, or a contrast is unknown.
    """

    def __init__(
        self,
        *,
        dataset_dir: str | Path,
        split: str,
        transform: Compose | Transform | None = None,
        modalities: Sequence[str] | None = None,
        max_items: int | None = None,
        shard: tuple[int, int] = (0, 1),
        seed: int = 0,
    ) -> None:
        manifest = load_manifest(dataset_dir)
        entries = list(manifest.entries(split))
        found = sorted({str(entry["modality"]) for entry in entries})
        if modalities is not None:
            unknown = sorted(set(modalities) - set(found))
            if unknown and entries:
                raise DataError(
                    f"{dataset_dir}: found no modality {', '.join(unknown)} in split {split!r}, "
                    f"expected some of {', '.join(found)}"
                )
            entries = [entry for entry in entries if entry["modality"] in modalities]
        if not entries:
            counts = ", ".join(f"{s} {len(manifest.entries(s))}" for s in ("training", "validation", "test"))
            raise DataError(
                f"{dataset_dir}: found an empty split {split!r} ({counts}), expected at least one slice; "
                "name the patients of each split with: vaevq-med slice-extract INPUT OUTPUT --split-file FILE"
            )
        if max_items is not None and max_items < 1:
            raise DataError(f"max_items: found {max_items}, expected 1 or more, or null for all")
        if max_items is not None and max_items < len(entries):
            keep = np.linspace(0, len(entries) - 1, max_items).round().astype(int)
            entries = [entries[i] for i in keep]
        rank, world_size = shard
        root = Path(dataset_dir)
        data = []
        for index, entry in list(enumerate(entries))[rank::world_size]:
            item = {**entry, "image": str(root / str(entry["image"])), "index": index}
            if entry.get("segmentation"):
                item["segmentation"] = str(root / str(entry["segmentation"]))
            data.append(item)
        super().__init__(data=data, transform=transform)
        self.seed = seed
        self.split = split
        self.manifest = manifest
        self.num_items = len(entries)

    def __getitem__(self, index: int) -> Any:  # type: ignore[override]
        """Item ``index % len(self)`` as epoch ``index // len(self)`` draws it."""
        if index < 0:
            raise IndexError(index)
        transform = self.transform
        if isinstance(transform, (Compose, Randomizable)):
            transform.set_random_state(seed=_mix(self.seed, index))
        return super().__getitem__(index % len(self.data))


class ResumableBatchSampler(Sampler[list[int]]):
    """An endless stream of shuffled batches whose n-th batch depends on the seed and n alone.

    The stream is one permutation of the data set after the other, cut into global batches; each process
    takes its share of a global batch, so the order of the images is the same on any number of processes
    that make the same global batch.

    Args:
        num_items: size of the data set.
        batch_size: images a process and step.
        seed: seed of the permutations.
        start: the first batch to yield; a resumed run sets it to the iteration it stands at.
        rank: this process's number.
        world_size: number of processes.

    Example:
        >>> first = ResumableBatchSampler(5, batch_size=2, seed=1)
        >>> stream = iter(first)
        >>> batches = [next(stream) for _ in range(4)]
        >>> later = iter(ResumableBatchSampler(5, batch_size=2, seed=1, start=3))
        >>> next(later) == batches[3]
        True
    """

    def __init__(
        self,
        num_items: int,
        *,
        batch_size: int,
        seed: int = 0,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if num_items < 1 or batch_size < 1:
            raise DataError(f"found {num_items} items in batches of {batch_size}, expected at least 1 of each")
        self.num_items = num_items
        self.batch_size = batch_size
        self.seed = seed
        self.start = start
        self.rank = rank
        self.world_size = world_size

    @property
    def batches_per_epoch(self) -> int:
        """Steps that see about each image once: ``num_items // global batch``, at least 1."""
        return max(1, self.num_items // (self.batch_size * self.world_size))

    def _permutation(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(_mix(self.seed, epoch))
        return torch.randperm(self.num_items, generator=generator).tolist()

    def __iter__(self) -> Iterator[list[int]]:
        """Yield this process's share of each global batch, for ever, from batch ``start`` on."""
        batch = self.start
        epoch, permutation = -1, []  # type: int, list[int]
        while True:
            first = (batch * self.world_size + self.rank) * self.batch_size
            share = []
            for position in range(first, first + self.batch_size):
                if position // self.num_items != epoch:
                    epoch = position // self.num_items
                    permutation = self._permutation(epoch)
                share.append(epoch * self.num_items + permutation[position % self.num_items])
            yield share
            batch += 1
