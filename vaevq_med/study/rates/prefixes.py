"""``vaevq-med prefixes``: quality by how much of each image's code is kept, of several tokenizers in one figure.

What a code can be cut to the tokenizer says: the first stages of residual quantization, the first groups of MGVQ under
its nested masks, or the first slots of nested one-dimensional tokens. A tokenizer whose code cannot be cut is a point.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.core.files import atomic_write_text
from vaevq_med.evaluation.data import check_unseen
from vaevq_med.images.dataset import SliceDataset
from vaevq_med.images.reading import reader
from vaevq_med.metrics.figures import Figure
from vaevq_med.metrics.reconstruction import PSNR, SSIM, to_unit
from vaevq_med.networks.base import Tokenizer
from vaevq_med.study.rates.curves import Spread
from vaevq_med.study.rates.picture import draw_curves
from vaevq_med.study.rates.prefix_options import PrefixOptions
from vaevq_med.trained.device import named_device
from vaevq_med.trained.network import StoredTokenizer

METRICS = (PSNR(), SSIM())
"""What is judged, each image by itself."""
_REGION = "brain"


@dataclass(frozen=True)
class PrefixReport:
    """What was found.

    Attributes:
        output: folder of the files.
        record: what ``prefixes.json`` holds.
    """

    output: Path
    record: Mapping[str, Any]


def prefix_counts(most: int, points: int) -> list[int]:
    """Up to so many numbers from 1 to ``most``, evenly spaced on a log scale, the last one among them.

    >>> prefix_counts(4, 12), prefix_counts(32, 6), prefix_counts(8, 1)
    ([1, 2, 3, 4], [1, 2, 4, 8, 16, 32], [8])
    """
    if most <= points:
        return list(range(1, most + 1))
    return sorted({round(count) for count in np.geomspace(1, most, points)} if points > 1 else {most})


def names_of(checkpoints: Sequence[Path]) -> list[str]:
    """A name each: that of a run's folder where the file stands in its ``checkpoints``; all paths where two are alike.

    >>> names_of([Path("runs/rvq/checkpoints/best.pt"), Path("packed/mgvq")])
    ['rvq', 'mgvq']
    """
    short = [p.parent.parent.name if p.parent.name == "checkpoints" else p.stem for p in checkpoints]
    return short if len(set(short)) == len(short) else [str(path) for path in checkpoints]


@dataclass(frozen=True, kw_only=True)
class Prefixes(PrefixOptions):
    """Judge the first parts of the codes of tokenizers on a data set of single images.

    Attributes:
        dataset: folder of ``dataset.json``.
        output: folder of ``prefixes.json``, ``prefixes.csv`` and ``prefixes.png``.
        checkpoints: of the tokenizers.
    """

    dataset: Path
    output: Path
    checkpoints: Sequence[Path]

    def run(
        self,
        *,
        on_start: Callable[[int], None] = lambda total: None,
        on_images: Callable[[int], None] = lambda count: None,
    ) -> PrefixReport:
        """Encode and decode the images, and write record, table and figure.

        Args:
            on_start: called once with the number of images of all tokenizers.
            on_images: called with the number of images of each batch.

        Raises:
            VaevqMedError: a checkpoint, an option or the data set does not fit, or a patient was trained on.
        """
        self.check()
        if self.output.exists() and not self.output.is_dir():
            raise VaevqMedError(f"output {self.output}: found a file, expected a folder or nothing")
        stored = [StoredTokenizer(path, weights=self.weights) for path in self.checkpoints]
        datasets = [self._dataset(one) for one in stored]
        self.output.mkdir(parents=True, exist_ok=True)  # a folder that cannot be is told before the work
        on_start(sum(map(len, datasets)))
        rows = [
            {"name": name, **self._judged(one, images, on_images)}
            for name, one, images in zip(names_of(self.checkpoints), stored, datasets, strict=True)
        ]
        record = {
            "data": datasets[0].manifest.content_hash,
            "split": self.split,
            "figures": [figure.to_json() for figure in _figures(rows)],
            "tokenizers": rows,
        }
        atomic_write_text(self.output / "prefixes.json", json.dumps(record, indent=2) + "\n")
        atomic_write_text(self.output / "prefixes.csv", _table(rows))
        _draw(rows, self.output / "prefixes.png")
        return PrefixReport(self.output, record)

    def _dataset(self, stored: StoredTokenizer) -> SliceDataset:
        stored.check_target()
        if stored.value("depth", None) is not None:
            raise VaevqMedError(f"{stored.path}: found a tokenizer of volumes, expected one of single images")
        stacked = bool(stored.value("stack_modalities", False))
        size, channels = int(stored.value("image_size")), int(stored.value("in_channels"))
        images = SliceDataset(
            dataset_dir=self.dataset,
            split=self.split,
            modalities=stored.value("modalities", None) if stacked else None,
            stack_modalities=stacked,
            max_items=self.max_items,
            transform=reader(self.dataset, image_size=size, in_channels=channels, regions=True),
        )
        if not self.any_shape:
            stored.check_shape(images.shape, self.dataset, "--any-shape")
        check_unseen(images, stored)
        return images

    def _judged(
        self, stored: StoredTokenizer, images: SliceDataset, on_images: Callable[[int], None]
    ) -> dict[str, Any]:
        """What is told of a tokenizer: itself, and a point for each number of parts."""
        network = stored.network().to(named_device(self.device))
        counts = prefix_counts(network.num_prefixes, self.points)
        values: dict[int, dict[str, list[float]]] = {count: {} for count in counts}
        patients: list[str] = []
        for items in _batches(images, self.batch_size):
            for count, found in _measured(network, items, counts):
                for name, of_images in found.items():
                    values[count].setdefault(name, []).extend(of_images)
            patients += [str(item.get("patient") or item["path"]) for item in items]
            on_images(len(items))
        pixels = int(stored.value("image_size")) ** 2
        per_pixel = network.bits().get("bits_per_pixel")
        points = []
        for count in counts:
            rate = None if per_pixel is None else per_pixel * count / network.num_prefixes
            figures = {name: Spread.of(one, patients).to_json() for name, one in values[count].items()}
            bits = None if rate is None else rate * pixels
            points.append({"parts": count, "bits": bits, "bits_per_pixel": rate, "figures": figures})
        return {
            "checkpoint": stored.content_hash,
            "quantizer": type(network.quantizer).__name__,
            "num_prefixes": network.num_prefixes,
            "images": len(images),
            "points": points,
        }


def _batches(images: SliceDataset, size: int) -> Iterator[list[dict[str, Any]]]:
    for start in range(0, len(images), size):
        yield [images[number] for number in range(start, min(start + size, len(images)))]


@torch.inference_mode()
def _measured(
    network: Tokenizer, items: Sequence[Mapping[str, Any]], counts: Sequence[int]
) -> Iterator[tuple[int, dict[str, list[float]]]]:
    """For each number of parts, the figures of every image by name."""
    squares = torch.stack([item["image"] for item in items]).to(network.device)
    regions = {}
    if all(_REGION in item for item in items):
        regions[_REGION] = torch.stack([item[_REGION] for item in items]).to(network.device)
    target, quantized = to_unit(squares), network.quantize_images(squares)
    for count in counts:
        unit = to_unit(network.decode_prefix(quantized, count).float())
        found = {name: one for metric in METRICS for name, one in metric.measure(target, unit, regions).items()}
        yield count, {name: one.double().tolist() for name, one in found.items()}


def _figures(rows: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """The figures of whole images, and after each that of the region where every tokenizer has it."""
    found = []
    for figure in (metric.figure for metric in METRICS):
        found.append(figure)
        name = f"{figure.name}_{_REGION}"
        if all(name in point["figures"] for row in rows for point in row["points"]):
            found.append(
                Figure(name, f"{figure.title}, {_REGION}", figure.digits, higher_is_better=figure.higher_is_better)
            )
    return found


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line for each tokenizer and number of parts."""
    text = io.StringIO()
    figures = [figure.name for figure in _figures(rows)]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["tokenizer", "parts", "of", "bits", "bits_per_pixel", *figures])
    for row in rows:
        for point in row["points"]:
            means = [point["figures"][name]["mean"] for name in figures]
            writer.writerow(
                [row["name"], point["parts"], row["num_prefixes"], point["bits"], point["bits_per_pixel"], *means]
            )
    return text.getvalue()


def _draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The figures over bits a pixel, or over the share of the code where one of the tokenizers has no bits."""
    counted = all(point["bits_per_pixel"] is not None for row in rows for point in row["points"])

    def at(row: Mapping[str, Any], point: Mapping[str, Any]) -> Spread:
        rate = point["bits_per_pixel"] if counted else point["parts"] / row["num_prefixes"]
        return Spread(rate, math.nan, math.nan, 1)

    def spread(values: Mapping[str, Any]) -> Spread:
        mean, low, high = (math.nan if values[name] is None else values[name] for name in ("mean", "low", "high"))
        return Spread(mean, low, high, values["n"])

    lines = [
        (
            row["name"],
            [
                {"rate": at(row, point), "figures": {name: spread(one) for name, one in point["figures"].items()}}
                for point in row["points"]
            ],
        )
        for row in rows
    ]
    along = "bits a pixel" if counted else "share of the code"
    draw_curves(lines, _figures(rows), path, along=along, scale="log" if counted else "linear")


def lines(record: Mapping[str, Any]) -> Iterator[str]:
    """A line for each tokenizer and number of parts, for a reader."""
    figures = [Figure.of(one) for one in record["figures"]]
    for row in record["tokenizers"]:
        yield f"{row['name']}: {row['quantizer']}, a code of {row['num_prefixes']} parts, {row['images']} images"
        for point in row["points"]:
            rate = "" if point["bits"] is None else f", {point['bits']:,.0f} bits a picture"
            shown = ", ".join(f"{f.title} {_shown(f, point['figures'][f.name]['mean'])}" for f in figures)
            yield f"  {point['parts']}{rate}: {shown}"


def _shown(figure: Figure, value: float | None) -> str:
    return "–" if value is None else figure.show(value)
