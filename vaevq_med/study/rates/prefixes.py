"""``vaevq-med prefixes``: quality by how much of each image's code is kept, of several tokenizers in one figure.

What a code can be cut to the tokenizer says: the first stages of residual quantization, the first groups of MGVQ under
its nested masks, the first slots of nested one-dimensional tokens, or the top code of two levels. A tokenizer whose
code cannot be cut is a point.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.core.files import atomic_write_text
from vaevq_med.core.folder import OutputFolder, difference
from vaevq_med.core.names import names_of
from vaevq_med.evaluation.data import check_unseen
from vaevq_med.images.dataset import SliceDataset
from vaevq_med.images.reading import reader
from vaevq_med.metrics.codebook import CodebookUsage
from vaevq_med.metrics.reconstruction import to_unit
from vaevq_med.networks.base import Tokenizer
from vaevq_med.study.rates.curves import Spread
from vaevq_med.study.rates.prefix_options import PrefixOptions
from vaevq_med.study.rates.prefix_report import METRICS, REGION, draw, figures_of, table
from vaevq_med.trained.device import named_device
from vaevq_med.trained.network import StoredTokenizer

_RECORD = "prefixes.json"


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
            VaevqMedError: a checkpoint, an option or the data set does not fit, a patient was trained on, two
                tokenizers have images of different sizes or channels, or the folder has the record of other settings.
        """
        self.check()
        folder = OutputFolder(self.output, ".prefixes", "vaevq-med prefixes", "prefixes", result=_RECORD, copies=True)
        folder.check()
        stored = [StoredTokenizer(path, weights=self.weights) for path in self.checkpoints]
        datasets = [self._dataset(one) for one in stored]
        settings = {
            "data": datasets[0].manifest.content_hash,
            **_common_images(stored),
            **{name: getattr(self, name) for name in ("split", "max_items", "points", "weights", "any_shape")},
        }
        names = names_of(self.checkpoints)
        made_of = {name: one.content_hash for name, one in zip(names, stored, strict=True)}
        folder.refuse_record({**settings, "tokenizers": made_of}, "prefixes")
        self.output.mkdir(parents=True, exist_ok=True)  # a folder that cannot be is told before the work
        on_start(sum(map(len, datasets)))
        rows = [
            {"name": name, "checkpoint": made_of[name], **self._judged(one, images, on_images)}
            for name, one, images in zip(names, stored, datasets, strict=True)
        ]
        record = {**settings, "figures": [figure.to_json() for figure in figures_of(rows)], "tokenizers": rows}
        atomic_write_text(self.output / _RECORD, json.dumps(record, indent=2) + "\n")
        atomic_write_text(self.output / "prefixes.csv", table(rows))
        draw(rows, self.output / "prefixes.png")
        return PrefixReport(self.output, record)

    def _dataset(self, stored: StoredTokenizer) -> SliceDataset:
        stored.check_target()
        if stored.value("depth", None) is not None:
            raise VaevqMedError(f"{stored.path}: found a tokenizer of volumes, expected one of single images")
        asked = _images_of(stored)
        images = SliceDataset(
            dataset_dir=self.dataset,
            split=self.split,
            modalities=asked["modalities"],
            stack_modalities=asked["stack_modalities"],
            max_items=self.max_items,
            transform=reader(
                self.dataset, image_size=asked["image_size"], in_channels=asked["in_channels"], regions=True
            ),
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
        prefixes = network.prefixes
        counts = [prefixes[place - 1] for place in prefix_counts(len(prefixes), self.points)]
        kept: dict[int, _Kept] = {count: _Kept(network, count) for count in counts}
        values: dict[int, dict[str, list[float]]] = {count: {} for count in counts}
        patients: list[str] = []
        for items in _batches(images, self.batch_size):
            for count, found, indices in _measured(network, items, counts):
                kept[count].update(indices)
                for name, of_images in found.items():
                    values[count].setdefault(name, []).extend(of_images)
            patients += [str(item.get("patient") or item["path"]) for item in items]
            on_images(len(items))
        pixels = int(stored.value("image_size")) ** 2
        points = []
        for count in counts:
            figures = {name: Spread.of(one, patients).to_json() for name, one in values[count].items()}
            bits = kept[count].bits()
            rate = None if bits is None else bits / pixels
            points.append({"parts": count, "bits": bits, "bits_per_pixel": rate, "figures": figures})
        return {
            "quantizer": type(network.quantizer).__name__,
            "num_prefixes": network.num_prefixes,
            "images": len(images),
            "points": points,
        }


def _images_of(stored: StoredTokenizer) -> dict[str, Any]:
    """What a tokenizer's images are; ``modalities`` are the channels, None where each image has one."""
    stacked = bool(stored.value("stack_modalities", False))
    return {
        "image_size": int(stored.value("image_size")),
        "in_channels": int(stored.value("in_channels")),
        "stack_modalities": stacked,
        "modalities": stored.value("modalities", None) if stacked else None,
    }


def _common_images(stored: Sequence[StoredTokenizer]) -> dict[str, Any]:
    """Those of all tokenizers, which one table and one figure can hold.

    Raises:
        VaevqMedError: two differ.
    """
    expected = _images_of(stored[0])
    for one in stored[1:]:
        words = difference(_images_of(one), expected)
        if words is not None:
            raise VaevqMedError(f"{one.path}: found {words} as of {stored[0].path}; one table takes one kind of images")
    return expected


class _Kept:
    """The indices that are kept of all images, counted.

    Args:
        network: of the indices.
        count: parts that are kept.
    """

    def __init__(self, network: Tokenizer, count: int) -> None:
        self.network, self.count = network, count
        self.usage: CodebookUsage | None = None
        self.positions = 0

    def update(self, indices: Tensor) -> None:
        """Count the first parts of ``[B, *grid, G]``."""
        if self.network.quantizer.bits_per_position is None:
            return
        first = self.network.first_indices(indices, self.count)
        if self.usage is None:
            size = self.network.num_embeddings
            self.usage = CodebookUsage(num_embeddings=size, num_codebooks=first.shape[-1], device=first.device)
            self.positions = math.prod(first.shape[1:-1])
        self.usage.update(first)

    def bits(self) -> float | None:
        """Of an image, on average; None of a continuous latent."""
        bits = None if self.usage is None else self.network.quantizer.bits_of_first(self.usage.counts)
        return None if bits is None else bits * self.positions


def _batches(images: SliceDataset, size: int) -> Iterator[list[dict[str, Any]]]:
    for start in range(0, len(images), size):
        yield [images[number] for number in range(start, min(start + size, len(images)))]


@torch.inference_mode()
def _measured(
    network: Tokenizer, items: Sequence[Mapping[str, Any]], counts: Sequence[int]
) -> Iterator[tuple[int, dict[str, list[float]], Tensor]]:
    """For each number of parts, the figures of every image by name, and the indices of all parts."""
    squares = torch.stack([item["image"] for item in items]).to(network.device)
    regions = {}
    if all(REGION in item for item in items):
        regions[REGION] = torch.stack([item[REGION] for item in items]).to(network.device)
    target, quantized = to_unit(squares), network.quantize_images(squares)
    for count in counts:
        unit = to_unit(network.decode_prefix(quantized, count).float())
        found = {name: one for metric in METRICS for name, one in metric.measure(target, unit, regions).items()}
        yield count, {name: one.double().tolist() for name, one in found.items()}, quantized.indices
