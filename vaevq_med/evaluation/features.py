"""Images of a data set, and generated ones, through a feature network, all brought to squares in one way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from monai.data import DataLoader
from monai.transforms import Compose
from torch import Tensor, nn
from torch.utils.data import Dataset

from vaevq_med.core.files import file_sha256
from vaevq_med.core.jobs import usable_cores
from vaevq_med.images.dataset import SliceDataset
from vaevq_med.images.manifest import Manifest
from vaevq_med.images.reading import Reading, reader
from vaevq_med.metrics.reconstruction import to_unit
from vaevq_med.metrics.reference import ReferenceCache, ReferenceFeatures
from vaevq_med.networks.features import FeatureNetwork


@dataclass(frozen=True)
class ImageReader:
    """Reads images once and gives their features, their pixels, or both.

    Attributes:
        network: the feature network.
        device: where the network is.
        batch_size: images at once.
        workers: processes that read images; 0 reads in this one, None takes one a core.
        on_images: called with the number of images of each batch that is done.
    """

    network: FeatureNetwork
    device: torch.device
    batch_size: int
    workers: int | None
    on_images: Callable[[int], None]

    @property
    def compute_device(self) -> torch.device:
        """Where float64 is computed: the network's GPU if it is CUDA's, the CPU otherwise."""
        return self.device if self.device.type == "cuda" else torch.device("cpu")

    def read(
        self,
        images: Dataset[Any],
        *,
        mirrored: Sequence[bool] = (False,),
        visit: Callable[[Tensor], None] | None = None,
        tokenizer: nn.Module | None = None,
    ) -> list[Tensor]:
        """Go through all images, in their order.

        Args:
            images: items with ``image``, ``[C, S, S]`` in [-1, 1].
            mirrored: what the network runs on: the images as they are (False), in mirror image (True), both or neither.
            visit: called with each batch as levels 0 to 255, uint8 ``[B, C*S*S]``.
            tokenizer: on the network's device; its reconstructions are read in place of the images.

        Returns:
            Of each of ``mirrored``, float32 ``[N, F]`` on the CPU. The network sees the rounded levels.
        """
        loader: Any = DataLoader(
            images,
            batch_size=self.batch_size,
            num_workers=usable_cores() if self.workers is None else self.workers,
        )
        features: list[list[Tensor]] = [[] for _ in mirrored]
        for batch in loader:
            signed = batch["image"]
            if tokenizer is not None:
                with torch.inference_mode():
                    signed = tokenizer(signed.to(self.device)).float().cpu()
            unit = to_unit(signed)
            for parts, turned in zip(features, mirrored, strict=True):
                shown = 2 * (unit.flip(-1) if turned else unit) - 1
                with torch.inference_mode():
                    parts.append(self.network.pooled(shown.to(self.device)).float().cpu())
            if visit is not None:
                visit((unit * 255).round().to(torch.uint8).flatten(1))
            self.on_images(len(unit))
        return [torch.cat(parts) for parts in features]


@dataclass(frozen=True)
class RealImages:
    """The splits of a data set, with their features from a cache where it has them.

    Attributes:
        manifest: the datalist.
        reader: what features come through.
        cache: where they are kept.
        image_size: pixels along each axis.
        modalities: keep these contrasts only; None keeps all.
        max_items: of each split at most, evenly spaced; None keeps all.
        tokenizer: whose reconstructions are read in place of the images; None reads the images.
        tokenizer_hash: its content hash.
    """

    manifest: Manifest
    reader: ImageReader
    cache: ReferenceCache
    image_size: int
    modalities: Sequence[str] | None = None
    max_items: int | None = None
    tokenizer: nn.Module | None = None
    tokenizer_hash: str = ""
    _splits: dict[str, SliceDataset] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def reading(self) -> Reading:
        """How they are read."""
        return Reading.of(self.manifest)

    @cached_property
    def transform(self) -> Compose:
        """From an entry to a square in [-1, 1]."""
        return reader(self.manifest, image_size=self.image_size, in_channels=self.reading.channels)

    def has(self, split: str) -> bool:
        """Whether a split has images of the chosen contrasts."""
        entries = self.manifest.entries(split)
        return any(self.modalities is None or entry.get("modality") in self.modalities for entry in entries)

    def images(self, split: str) -> SliceDataset:
        """The images of a split.

        Raises:
            DataError: there are none.
        """
        if split not in self._splits:
            self._splits[split] = SliceDataset(
                dataset_dir=self.manifest.path.parent,
                split=split,
                transform=self.transform,
                modalities=self.modalities,
                max_items=self.max_items,
            )
        return self._splits[split]

    def key(self, split: str, *, mirrored: bool = False) -> dict[str, Any]:
        """All that the features of a split, or of its mirror images, depend on."""
        content = self.manifest.content_hash or f"file:{file_sha256(self.manifest.path)}"
        key = {
            "content_hash": content,
            "split_hash": self.manifest.split_hash,
            "split": split,
            "image_size": self.image_size,
            "square": "resized" if self.reading.shape == "square" else "short side, center",
            "channels": self.reading.channels,
            "modalities": sorted(self.modalities) if self.modalities else None,
            "max_items": self.max_items,
            "network": self.reader.network.name,
            "weights_sha256": self.reader.network.weights_sha256,
        }
        if self.tokenizer is not None:
            key["tokenizer"] = self.tokenizer_hash
        return {**key, "mirrored": True} if mirrored else key

    def cached(self, split: str, *, mirrored: bool = False) -> ReferenceFeatures | None:
        """What the cache has of a split; None for another number of images than the split has now."""
        found = self.cache.load(self.key(split, mirrored=mirrored))
        return found if found is not None and found.statistics.count == len(self.images(split)) else None


class SplitPass:
    """One pass over a split, for its features, its pixels, or both.

    Args:
        images: the data set.
        split: whose images.
        mirrored: whose features, as for :meth:`ImageReader.read`.
        visited: whether the pixels are wanted.

    Attributes:
        cached: whether the cache had all of the features.
    """

    def __init__(
        self, images: RealImages, split: str, *, mirrored: Sequence[bool] = (False,), visited: bool = False
    ) -> None:
        self.images = images
        self.split = split
        self.visited = visited
        self._found = {way: images.cached(split, mirrored=way) for way in mirrored}
        self.cached = None not in self._found.values()

    def __len__(self) -> int:
        """Number of images to read; 0 where the cache has all that is wanted."""
        return len(self.images.images(self.split)) if self.visited or not self.cached else 0

    @property
    def features(self) -> list[ReferenceFeatures]:
        """Of each of ``mirrored``, once :meth:`read` is done."""
        return [found for found in self._found.values() if found is not None]

    def read(self, visit: Callable[[Tensor], None] | None = None) -> None:
        """Read what the cache does not have, and put it there.

        Args:
            visit: called with the levels of each batch, see :meth:`ImageReader.read`.

        Raises:
            DataError: an image cannot be read, or the cache not be written.
        """
        if not len(self):
            return
        missing = [way for way, found in self._found.items() if found is None]
        read = self.images.reader.read(
            self.images.images(self.split), mirrored=missing, visit=visit, tokenizer=self.images.tokenizer
        )
        for way, features in zip(missing, read, strict=True):
            self._found[way] = found = ReferenceFeatures.of(features)
            self.images.cache.store(self.images.key(self.split, mirrored=way), found)
