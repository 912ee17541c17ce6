"""The memorization check of ``evaluate-samples``: searches, thresholds, and the list and picture of the pairs."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vaevq_med.core.files import atomic_write_text
from vaevq_med.evaluation.features import RealImages, SplitPass
from vaevq_med.evaluation.pictures import neighbor_grid
from vaevq_med.images.dataset import SliceDataset
from vaevq_med.images.generated import Sample, SampleDataset
from vaevq_med.metrics.memorization import (
    QUANTILE,
    Neighbors,
    PixelSearch,
    cosine_neighbors,
    flagged,
    summarize_distances,
)

_PAIRS = 8
_FEW = 100
_TRAINING, _HELD_OUT = "training", ("validation", "test")
_BOTH = (False, True)
"""Images as they are, and in mirror image."""


@dataclass(frozen=True)
class SampleNeighbors:
    """The nearest training image of each sample, in feature space and by pixel.

    Attributes:
        feature: of the samples, cosine distance.
        pixel: of the samples, RMSE on [0, 1].
        feature_summary: figures, see :func:`summarize_distances`.
        pixel_summary: likewise, with ``identical`` and of those ``identical_mirrored``.
        training: the training images.
        reconstructed: whether they and the held-out images were compared as a tokenizer reconstructs them.
    """

    feature: Neighbors
    pixel: Neighbors
    feature_summary: Mapping[str, Any]
    pixel_summary: Mapping[str, Any]
    training: SliceDataset
    reconstructed: bool

    @classmethod
    def of(
        cls,
        feature: Neighbors,
        pixel: Neighbors,
        count: int,
        thresholds: Sequence[float | None],
        training: SliceDataset,
        *,
        reconstructed: bool,
    ) -> SampleNeighbors:
        """From the neighbors of samples and held-out images together.

        Args:
            feature: of the samples, and after them of the held-out images.
            pixel: likewise.
            count: number of samples.
            thresholds: of the feature and of the pixel distance, None for the held-out images'.
            training: the training images.
            reconstructed: whether these were compared as a tokenizer reconstructs them.
        """
        summaries, parts = [], []
        for neighbors, threshold in zip((feature, pixel), thresholds, strict=True):
            first, rest = neighbors[:count].cpu(), neighbors[count:].cpu()
            parts.append(first)
            summaries.append(summarize_distances(first, rest if len(rest.distance) else None, threshold=threshold))
        same = parts[1].distance == 0
        identical = {"identical": int(same.sum()), "identical_mirrored": int((same & parts[1].mirrored).sum())}
        return cls(parts[0], parts[1], summaries[0], {**summaries[1], **identical}, training, reconstructed)

    def record(self) -> dict[str, Any]:
        """The figures, for ``metrics.json``."""
        figures = {"feature": dict(self.feature_summary), "pixel": dict(self.pixel_summary)}
        return {"n_training": len(self.training), **figures}

    def conventions(self, network: str) -> dict[str, str]:
        """How the figures are defined, in words."""
        summary = self.feature_summary
        words = (
            "nearest training image of any contrast, as it is or in mirror image but not cropped, by cosine distance "
            f"of {network} features, and by RMSE of pixels on [0, 1]"
        )
        if self.reconstructed:
            words += ", training and held-out images as the samples' tokenizer reconstructs them"
        if "n_held_out" not in summary:
            words += "; no held-out images, so no threshold but a given one"
        else:
            words += (
                f"; share of the samples nearer than the {QUANTILE:g} quantile of the distances of held-out images "
                "(validation and test) to the training images, unless a threshold is given; or identical"
            )
            if summary["n_held_out"] < _FEW:
                words += f"; of {summary['n_held_out']} held-out images, the quantile is about the least distance"
        return {"memorization": words}

    def write_table(self, path: Path, samples: Sequence[Sample]) -> None:
        """A line a sample, closest in feature space first, as CSV; paths are relative to the data set.

        ``feature_mirrored`` and ``pixel_mirrored`` are 1 where a sample is nearest to that file in mirror image.
        """
        training, columns = self.training, []
        for name, neighbors, summary, distance in (
            ("feature", self.feature, self.feature_summary, "distance"),
            ("pixel", self.pixel, self.pixel_summary, "rmse"),
        ):
            near = flagged(neighbors, summary["threshold"]).tolist() if "threshold" in summary else None
            columns.append((name, neighbors, near, distance))
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        heads = [
            [f"{name}_nearest", f"{name}_mirrored", f"{name}_patient", f"{name}_{distance}", f"{name}_near"]
            for name, *_, distance in columns
        ]
        writer.writerow(["file", "label", *heads[0], *heads[1]])
        for i in self.feature.distance.argsort(stable=True).tolist():
            row = [samples[i].name, samples[i].label]
            for _, neighbors, near, _ in columns:
                entry = training.data[int(neighbors.index[i])]
                row += [_relative(entry, training), int(neighbors.mirrored[i])]
                row += [entry.get("patient", ""), f"{float(neighbors.distance[i]):.8g}"]
                row.append("" if near is None else int(near[i]))
            writer.writerow(row)
        atomic_write_text(path, file.getvalue())

    def write_picture(self, path: Path, generated: SampleDataset) -> None:
        """The samples closest in feature space, each beside its nearest training images, as PNG.

        A training image that is nearest in mirror image is shown, and marked, so.
        """
        rows = self.feature.distance.argsort(stable=True)[:_PAIRS].tolist()
        training, titles = self.training, []
        for i in rows:
            names = []
            for neighbors in (self.feature, self.pixel):
                name = Path(_relative(training.data[int(neighbors.index[i])], training)).name
                names.append(f"{name} (mirrored)" if neighbors.mirrored[i] else name)
            titles.append(
                (
                    generated.samples[i].name,
                    f"{names[0]}\ncosine distance {float(self.feature.distance[i]):.4f}",
                    f"{names[1]}\nRMSE {float(self.pixel.distance[i]):.4f}",
                )
            )
        columns = {
            "sample": _images(generated, rows),
            "nearest by features": _nearest(training, self.feature, rows),
            "nearest by pixel": _nearest(training, self.pixel, rows),
        }
        neighbor_grid(columns, titles=titles, path=path)


class NeighborSearch:
    """Reads samples, held-out and training images, and looks for each one's nearest training image, either way round.

    The training images are those of all contrasts; the held-out images those of the chosen ones, as the samples are.

    Args:
        real: the data set, or its reconstructions.

    Attributes:
        passes: what is read of the data set.
        tokenizer_hash: content hash of the tokenizer that reconstructs it; empty without one.
    """

    def __init__(self, real: RealImages) -> None:
        searched = real if real.modalities is None else replace(real, modalities=None)
        self._reader, self._image_size = real.reader, real.image_size
        self.tokenizer_hash = real.tokenizer_hash
        self._held_out = [
            SplitPass(real, split, mirrored=_BOTH, visited=True) for split in _HELD_OUT if real.has(split)
        ]
        self._training = SplitPass(searched, _TRAINING, visited=True)
        self.passes = [*self._held_out, self._training]

    def read(self, generated: SampleDataset) -> Tensor:
        """Read all, the training images last.

        Args:
            generated: the samples.

        Returns:
            Features of the samples as they are, float32 ``[N, F]`` on the CPU.
        """
        device, levels = self._reader.compute_device, list[Tensor]()
        self._samples = self._reader.read(generated, mirrored=_BOTH, visit=levels.append)
        for one in self._held_out:
            one.read(levels.append)
        self._pixels = PixelSearch(torch.cat(levels).to(device), self._image_size)
        levels.clear()
        self._training.read(lambda batch: self._pixels.update(batch.to(device)))
        return self._samples[0]

    def neighbors(self, thresholds: Sequence[float | None]) -> SampleNeighbors:
        """What was found, once all is read.

        Args:
            thresholds: as for :meth:`SampleNeighbors.of`.
        """
        device = self._reader.compute_device
        queries, mirrored = (
            torch.cat([samples, *(one.features[way].features for one in self._held_out)]).to(device)
            for way, samples in enumerate(self._samples)
        )
        training = self._training.features[0].features.to(device)
        return SampleNeighbors.of(
            cosine_neighbors(queries, mirrored, training),
            self._pixels.neighbors(),
            len(self._samples[0]),
            thresholds,
            self._training.images.images(_TRAINING),
            reconstructed=self._training.images.tokenizer is not None,
        )


def _relative(entry: Mapping[str, Any], images: SliceDataset) -> str:
    return Path(os.path.relpath(entry["image"], images.manifest.path.parent)).as_posix()


def _images(images: SampleDataset | SliceDataset, rows: Sequence[int]) -> Tensor:
    """Images in [0, 1]."""
    return torch.stack([(torch.as_tensor(images[row]["image"]) + 1) / 2 for row in rows]).clamp(0, 1)


def _nearest(training: SliceDataset, neighbors: Neighbors, rows: Sequence[int]) -> Tensor:
    """The nearest training images of some samples, mirrored where they are nearer so."""
    images = _images(training, neighbors.index[rows].tolist())
    return torch.where(neighbors.mirrored[rows].view(-1, 1, 1, 1), images.flip(-1), images)
