"""The memorization check of ``evaluate-samples``: searches, thresholds, and the list and picture of the pairs."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vaevq_med.data import SliceDataset
from vaevq_med.data.manifest import atomic_write_text
from vaevq_med.data.samples import Sample, SampleDataset
from vaevq_med.metrics.memorization import QUANTILE, Neighbors, flagged, summarize_distances
from vaevq_med.metrics.pictures import neighbor_grid

_PAIRS = 8
_FEW = 100


@dataclass(frozen=True)
class SampleNeighbors:
    """The nearest training image of each sample, in feature space and by pixel.

    Attributes:
        feature: of the samples, cosine distance.
        pixel: of the samples, RMSE on [0, 1].
        feature_summary: figures, see :func:`summarize_distances`.
        pixel_summary: likewise, with ``identical``.
    """

    feature: Neighbors
    pixel: Neighbors
    feature_summary: Mapping[str, Any]
    pixel_summary: Mapping[str, Any]

    @classmethod
    def of(
        cls, feature: Neighbors, pixel: Neighbors, count: int, thresholds: Sequence[float | None]
    ) -> SampleNeighbors:
        """From the neighbors of samples and held-out images together.

        Args:
            feature: of the samples, and after them of the held-out images.
            pixel: likewise.
            count: number of samples.
            thresholds: of the feature and of the pixel distance, None for the held-out images'.
        """
        summaries, parts = [], []
        for neighbors, threshold in zip((feature, pixel), thresholds, strict=True):
            first = Neighbors(neighbors.distance[:count].cpu(), neighbors.index[:count].cpu())
            rest = Neighbors(neighbors.distance[count:].cpu(), neighbors.index[count:].cpu())
            parts.append(first)
            summaries.append(summarize_distances(first, rest if len(rest.distance) else None, threshold=threshold))
        identical = int((parts[1].distance == 0).sum())
        return cls(parts[0], parts[1], summaries[0], {**summaries[1], "identical": identical})

    def record(self, training: int) -> dict[str, Any]:
        """The figures, for ``metrics.json``."""
        return {"n_training": training, "feature": dict(self.feature_summary), "pixel": dict(self.pixel_summary)}

    def conventions(self, network: str) -> dict[str, str]:
        """How the figures are defined, in words."""
        summary = self.feature_summary
        words = f"nearest training image by cosine distance of {network} features, and by RMSE of pixels on [0, 1]"
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

    def write_table(self, path: Path, samples: Sequence[Sample], training: SliceDataset) -> None:
        """A line a sample, closest in feature space first, as CSV; paths are relative to the data set."""
        columns = []
        for name, neighbors, summary, distance in (
            ("feature", self.feature, self.feature_summary, "distance"),
            ("pixel", self.pixel, self.pixel_summary, "rmse"),
        ):
            near = flagged(neighbors, summary["threshold"]).tolist() if "threshold" in summary else None
            columns.append((name, neighbors.distance.tolist(), neighbors.index.tolist(), near, distance))
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        heads = [[f"{n}_nearest", f"{n}_patient", f"{n}_{distance}", f"{n}_near"] for n, *_, distance in columns]
        writer.writerow(["file", "label", *heads[0], *heads[1]])
        for i in self.feature.distance.argsort(stable=True).tolist():
            row = [samples[i].name, samples[i].label]
            for _, distances, indices, near, _ in columns:
                entry = training.data[indices[i]]
                row += [_relative(entry, training), entry.get("patient", ""), f"{distances[i]:.8g}"]
                row.append("" if near is None else int(near[i]))
            writer.writerow(row)
        atomic_write_text(path, file.getvalue())

    def write_picture(self, path: Path, generated: SampleDataset, training: SliceDataset) -> None:
        """The samples closest in feature space, each beside its nearest training images, as PNG."""
        rows = self.feature.distance.argsort(stable=True)[:_PAIRS].tolist()
        titles = []
        for i in rows:
            near = [training.data[int(n.index[i])] for n in (self.feature, self.pixel)]
            names = [Path(_relative(entry, training)).name for entry in near]
            titles.append(
                (
                    generated.samples[i].name,
                    f"{names[0]}\ncosine distance {float(self.feature.distance[i]):.4f}",
                    f"{names[1]}\nRMSE {float(self.pixel.distance[i]):.4f}",
                )
            )
        columns = {
            "sample": _images(generated, rows),
            "nearest by features": _images(training, [int(self.feature.index[i]) for i in rows]),
            "nearest by pixel": _images(training, [int(self.pixel.index[i]) for i in rows]),
        }
        neighbor_grid(columns, titles=titles, path=path)


def _relative(entry: Mapping[str, Any], images: SliceDataset) -> str:
    return Path(os.path.relpath(entry["image"], images.manifest.path.parent)).as_posix()


def _images(images: SampleDataset | SliceDataset, rows: Sequence[int]) -> Tensor:
    """Images in [0, 1]."""
    return torch.stack([(torch.as_tensor(images[row]["image"]) + 1) / 2 for row in rows]).clamp(0, 1)
