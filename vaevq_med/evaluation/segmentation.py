"""Segmentations judged: the scores of each case and region, their means over patients, and both as files."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Events
from monai.utils.enums import CommonKeys as Keys
from torch import Tensor

from vaevq_med import __version__
from vaevq_med.core.errors import VaevqMedError
from vaevq_med.core.files import atomic_write_text, atomic_writer
from vaevq_med.core.options import is_number
from vaevq_med.evaluation.data import check_unseen
from vaevq_med.images.transforms import REGIONS
from vaevq_med.metrics.segmentation import FIGURES, region_scores, summarize
from vaevq_med.trained.segmenter import StoredSegmenter
from vaevq_med.training import distributed
from vaevq_med.training.segmentation_evaluator import SegmentationEvaluator

SCORES = "scores"
"""Name of the files of scores, without their suffix."""


def case_scores(
    case: str, patient: str, prediction: Tensor, reference: Tensor, spacing: Sequence[float] | None
) -> Iterator[dict[str, Any]]:
    """A row for each region of a case.

    Args:
        case: its name.
        patient: whose it is.
        prediction: bool ``[3, D, H, W]``, in the order of :data:`vaevq_med.images.transforms.REGIONS`.
        reference: of the same shape.
        spacing: of the voxels along each axis, in mm; None where it is not known.
    """
    for number, region in enumerate(REGIONS):
        scores = region_scores(prediction[number].numpy(), reference[number].numpy(), spacing)
        yield {"case": case, "patient": patient, "region": region, **scores}


def write_scores(directory: Path, rows: Sequence[Mapping[str, Any]], provenance: Mapping[str, Any]) -> Path:
    """Write ``scores.csv``, a line a case and region, and ``scores.json``, with their means over patients.

    Args:
        directory: where they go.
        rows: of :func:`case_scores`.
        provenance: what they were made of.

    Returns:
        The JSON file, which is written last.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with atomic_writer(directory / f"{SCORES}.csv") as file:
        names = list(dict.fromkeys(name for row in rows for name in row))
        writer = csv.DictWriter(file, fieldnames=names)
        writer.writeheader()
        writer.writerows(rows)
    shown = [figure for figure in FIGURES if any(figure.name in row for row in rows)]
    record = {
        "summary": summarize(rows),
        "rows": list(rows),
        "provenance": dict(provenance),
        "figures": [figure.to_json() for figure in shown],
    }
    path = directory / f"{SCORES}.json"
    atomic_write_text(path, json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return path


class SegmentationHandler:
    """Gather the slices of each case that a :class:`SegmentationEvaluator` segments, and judge them as volumes.

    ``evaluator.state.metrics`` receives the means over patients, e.g. ``dice_whole_tumor``. A volume is the slices of a
    case that the data set has, on their grid; one between them that it lacks counts as empty in both.

    Args:
        dataset: what the evaluator reads.
        spacing: mm from slice to slice, row to row and column to column; None leaves out what needs it.
        output_dir: where ``scores.json`` and ``scores.csv`` go; None writes none.
        stored: the evaluated checkpoint, for the record.

    Raises:
        VaevqMedError: the spacing is not three lengths; when the evaluator starts, a patient was trained on.
    """

    def __init__(
        self,
        *,
        dataset: Any,
        spacing: Sequence[float] | None = None,
        output_dir: str | Path | None = None,
        stored: StoredSegmenter | None = None,
    ) -> None:
        if spacing is not None and not (len(spacing) == 3 and all(is_number(mm, 1e-3, 1e3) for mm in spacing)):
            raise VaevqMedError(f"spacing: found {spacing}, expected three lengths in mm, e.g. [1.0, 0.9375, 0.9375]")
        self.dataset = dataset
        self.spacing = None if spacing is None else [float(mm) for mm in spacing]
        self.output_dir = None if output_dir is None else Path(output_dir)
        self.stored = stored
        self._slices: dict[tuple[str, str], dict[int, tuple[Tensor, Tensor]]] = {}

    def attach(self, engine: SegmentationEvaluator) -> None:
        """Register the events."""
        engine.add_event_handler(Events.STARTED, self._started)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._iteration_completed)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._completed)

    def _started(self, engine: SegmentationEvaluator) -> None:
        self._slices = {}
        if self.stored is not None:
            check_unseen(self.dataset, self.stored)

    def _iteration_completed(self, engine: SegmentationEvaluator) -> None:
        output, batch = engine.state.output, engine.state.batch
        for item, number, place, found in slices_of_batch(output[Keys.PRED] > 0.5, batch):
            wanted = output[Keys.LABEL][item] > 0.5
            masks = wanted[:, place] if wanted.ndim == 4 else wanted
            key = str(batch["case"][item]), str(batch["patient"][item])
            self._slices.setdefault(key, {})[number] = (found.cpu(), masks.cpu())

    def _completed(self, engine: SegmentationEvaluator) -> None:
        rows = [
            row
            for (case, patient), slices in sorted(self._slices.items())
            for row in case_scores(case, patient, *_volumes(slices), self.spacing)
        ]
        summary = summarize(rows)
        for region, figures in summary.items():
            values = {f"{name}_{region}": found["value"] for name, found in figures.items() if "value" in found}
            engine.state.metrics.update(values)
        if self.output_dir is not None and distributed.is_main():
            write_scores(self.output_dir, rows, self._provenance())

    def _provenance(self) -> dict[str, Any]:
        manifest = self.dataset.manifest
        record = {
            "version": __version__,
            "split": self.dataset.split,
            "split_hash": manifest.split_hash,
            "dataset_hash": manifest.content_hash,
            "spacing": self.spacing,
        }
        if self.stored is not None:
            record |= {
                "checkpoint": self.stored.path.name,
                "checkpoint_sha256": self.stored.sha256,
                "iteration": self.stored.iteration,
                "weights": self.stored.weights,
            }
        return record


def slices_of_batch(masks: Tensor, batch: Mapping[str, Any]) -> Iterator[tuple[int, int, int, Tensor]]:
    """The slices that were segmented: number of the item, number in the volume, place in the stack, ``[R, S, S]``.

    Args:
        masks: ``[B, R, S, S]`` of the middle of each stack, or ``[B, R, d, S, S]`` of all of its slices.
        batch: with ``slice``, ``[B, d]``, -1 where a slice is repeated.
    """
    numbers = torch.as_tensor(batch["slice"])
    for item, found in enumerate(masks):
        if found.ndim == 3:
            place = numbers.shape[1] // 2
            yield item, int(numbers[item, place]), place, found
            continue
        for place in range(found.shape[1]):
            if int(numbers[item, place]) >= 0:
                yield item, int(numbers[item, place]), place, found[:, place]


def _volumes(slices: Mapping[int, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Prediction and reference ``[R, D, S, S]`` of slices by their numbers."""
    first, last = min(slices), max(slices)
    shape = next(iter(slices.values()))[0].shape
    volumes = torch.zeros(2, shape[0], last - first + 1, *shape[1:], dtype=torch.bool)
    for number, pair in slices.items():
        for volume, masks in zip(volumes, pair, strict=True):
            volume[:, number - first] = masks
    return volumes[0], volumes[1]
