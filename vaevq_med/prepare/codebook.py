"""``vaevq-med feature-codebook``: cluster a feature network's features of the training images, for VQGAN-LC.

Source: VQGAN-LC (arXiv 2406.11837), which averages CLIP's patch features over a grid and clusters those of each class
apart, so that a class of few images has as many codewords as one of many.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from monai.data import DataLoader

from vaevq_med.core.clusters import Features, StreamingClusters
from vaevq_med.core.errors import DataError, VaevqMedError
from vaevq_med.core.files import atomic_binary_writer, check_free
from vaevq_med.core.jobs import check_workers, usable_cores
from vaevq_med.images.dataset import SliceDataset
from vaevq_med.images.reading import reader
from vaevq_med.networks.features import FeatureNetwork, feature_network
from vaevq_med.prepare.options import CodebookOptions
from vaevq_med.trained.device import named_device


@dataclass(frozen=True)
class FeatureCodebookReport:
    """What a run wrote.

    Attributes:
        output: the file.
        images: training images looked at.
        features: features clustered.
        classes: centers of each class; empty where all images were clustered together.
        num_embeddings: K.
        num_features: F.
        distinct: centers that differ from one another.
    """

    output: Path
    images: int
    features: int
    classes: dict[str, int]
    num_embeddings: int
    num_features: int
    distinct: int


@dataclass(frozen=True)
class FeatureCodebook(CodebookOptions):
    """Cluster the features of a data set's training images into a codebook.

    The images are brought to a square of ``image_size`` pixels; the network's deepest feature map is averaged over
    ``grid x grid`` cells, each of which is one feature. With ``per_class``, K is shared evenly among the classes
    (contrasts of an MRI, classes of ImageNet).

    Attributes:
        dataset: folder of ``dataset.json``.
        output: file to write, ``.npz``.
    """

    dataset: Path
    output: Path

    def run(
        self,
        *,
        on_start: Callable[[int], None] = lambda total: None,
        on_images: Callable[[int], None] = lambda count: None,
    ) -> FeatureCodebookReport:
        """Extract the features, cluster them as they come, and write the centers.

        Args:
            on_start: called once with the number of images.
            on_images: called with the number of images of each batch that is done.

        Raises:
            DataError: there is no data set, its training split is empty, or it has too few features for K.
            VaevqMedError: an option is out of its range, or the feature network is not here.
        """
        self._check()
        network = feature_network(self.network, self.weights).to(named_device(self.device))
        images = SliceDataset(
            dataset_dir=self.dataset,
            split="training",
            max_items=self.max_items,
            transform=reader(self.dataset, image_size=self.image_size, in_channels=3),
        )
        groups = self._groups(images)
        shares = self._shares(groups)
        self._check_number(groups, shares)
        on_start(len(images))
        parts, count = [], 0
        clusters = {name: StreamingClusters(shares[name], self.seed) for name in groups}
        left = {name: len(members) for name, members in groups.items()}
        for names, features in self._features(network, images, groups):
            for name in dict.fromkeys(names):
                chosen = [position for position, other in enumerate(names) if other == name]
                clusters[name].add(features[chosen].reshape(-1, features.shape[-1]))
                left[name] -= len(chosen)
                if not left[name]:
                    # Done with: its features are let go before the next class's come.
                    done = clusters.pop(name)
                    parts.append(done.centers())
                    count += done.count
            on_images(len(names))
        table = np.concatenate(parts)
        classes = {name: shares[name] for name in groups} if self.per_class else {}
        provenance = {
            "network": network.name,
            "weights_sha256": network.weights_sha256,
            "dataset": images.manifest.content.get("name", ""),
            "content_hash": images.manifest.content_hash,
            "split_hash": images.manifest.split_hash,
            "split": "training",
            "images": len(images),
            "features": count,
            "grid": self.grid,
            "image_size": self.image_size,
            "max_items": self.max_items,
            "seed": self.seed,
            "classes": classes,
        }
        self._write(table, provenance)
        distinct = len(np.unique(table, axis=0))
        return FeatureCodebookReport(
            output=self.output,
            images=len(images),
            features=count,
            classes=classes,
            num_embeddings=table.shape[0],
            num_features=table.shape[1],
            distinct=distinct,
        )

    def _check(self) -> None:
        check_workers(self.workers, least=0)
        if self.output.suffix != ".npz":
            raise VaevqMedError(f"output {self.output}: found the suffix {self.output.suffix!r}, expected .npz")
        check_free(self.output, self.overwrite)
        counts = {"num-embeddings": self.num_embeddings, "grid": self.grid, "batch-size": self.batch_size}
        for name, value in counts.items():
            if value < 1:
                raise VaevqMedError(f"--{name}: found {value}, expected 1 or more")
        if not 0 <= self.seed < 2**32:
            raise VaevqMedError(f"--seed: found {self.seed}, expected 0 to {2**32 - 1}")
        if not 32 <= self.image_size <= 4096:
            raise VaevqMedError(f"--image-size: found {self.image_size}, expected 32 to 4096")
        try:
            self.output.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.output.parent):
                pass
        except OSError as error:
            raise VaevqMedError(f"output {self.output}: found it not writable ({error.strerror})") from None

    def _groups(self, images: SliceDataset) -> dict[str, list[int]]:
        """Positions of the images of each class, by its name, or its number where it has none."""
        if not self.per_class:
            return {"": list(range(len(images)))}
        groups: dict[str, list[int]] = {}
        for position, entry in enumerate(images.data):
            groups.setdefault(str(entry.get("modality") or entry.get("label", "")), []).append(position)
        return groups

    def _shares(self, groups: dict[str, list[int]]) -> dict[str, int]:
        """Centers of each class: K shared evenly, the first ones one more where it does not divide."""
        if self.num_embeddings < len(groups):
            raise DataError(
                f"--num-embeddings: found {self.num_embeddings} for {len(groups)} classes, expected one a class or "
                "more; --no-per-class clusters all images together"
            )
        whole, rest = divmod(self.num_embeddings, len(groups))
        return {name: whole + (number < rest) for number, name in enumerate(groups)}

    def _check_number(self, groups: dict[str, list[int]], shares: dict[str, int]) -> None:
        """Refuse, before anything is computed, a K that there are not enough features for."""
        for name, members in groups.items():
            count = len(members) * self.grid**2
            if count < shares[name]:
                of = f" of class {name}" if name else ""
                raise DataError(
                    f"{self.dataset}: found {count} features{of} ({len(members)} training images of "
                    f"{self.grid}x{self.grid}), expected at least {shares[name]} for --num-embeddings "
                    f"{self.num_embeddings}; lower it, or raise --grid"
                )

    def _features(
        self, network: FeatureNetwork, images: SliceDataset, groups: dict[str, list[int]]
    ) -> Iterator[tuple[list[str], Features]]:
        """Classes of a batch's images and their features ``[B, grid^2, F]``, class after class, shuffled within."""
        generator = np.random.default_rng(self.seed)
        order = [(name, int(member)) for name, members in groups.items() for member in generator.permutation(members)]
        loader: Any = DataLoader(
            images,
            sampler=[member for _, member in order],
            batch_size=self.batch_size,
            num_workers=usable_cores() if self.workers is None else self.workers,
        )
        start = 0
        for batch in loader:
            with torch.inference_mode():
                maps = network.deepest(batch["image"].to(named_device(self.device)))
                if min(maps.shape[2:]) < self.grid:
                    raise VaevqMedError(
                        f"--grid: found {self.grid}, expected at most {min(maps.shape[2:])}, the feature map of "
                        f"{network.name} at {self.image_size} pixels; raise --image-size, or lower it"
                    )
                cells = F.adaptive_avg_pool2d(maps, self.grid).flatten(2).mT
            names = [name for name, _ in order[start : start + len(cells)]]
            start += len(cells)
            yield names, cells.float().cpu().numpy()

    def _write(self, table: Features, provenance: dict[str, Any]) -> None:
        """Put the whole file in place, or nothing."""
        with atomic_binary_writer(self.output) as file:
            np.savez(file, features=table, provenance=np.array(json.dumps(provenance)))
