"""``vaevq-med segment``: the label maps of whole scans on their own grid, and scores where segmentations are there."""

from __future__ import annotations

import functools
import gzip
import hashlib
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import nibabel as nib
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vaevq_med import __version__
from vaevq_med.codec.case_work import CaseWork
from vaevq_med.codec.compress import windowed
from vaevq_med.codec.geometry import Turn, check_invertible
from vaevq_med.codec.job import Job, Made, Report
from vaevq_med.core.folder import OutputFolder
from vaevq_med.evaluation.segmentation import SCORES, case_scores, write_scores
from vaevq_med.images.regions import to_labels
from vaevq_med.images.transforms import REGIONS
from vaevq_med.metrics.segmentation import summarize
from vaevq_med.prepare.recipes import Recipe
from vaevq_med.prepare.volumes.labels import label_map
from vaevq_med.tasks.options import SegmentOptions
from vaevq_med.tasks.segmentation import Segmenter, to_masks
from vaevq_med.trained.segmenter import StoredSegmenter

if TYPE_CHECKING:
    from vaevq_med.prepare.volumes.case import Case
    from vaevq_med.prepare.volumes.reading import CaseReader

_VERSION = 2
"""Part of the settings; a change of what the same settings write raises it."""


@functools.lru_cache(maxsize=1)
def _segmenter(checkpoint: Path, weights: str, device: str | None, batch_size: int) -> Segmenter:
    """A network, read once a process."""
    return Segmenter(StoredSegmenter(checkpoint, weights=weights), device=device, batch_size=batch_size)


@dataclass(frozen=True)
class Segment(CaseWork):
    """A case to its label map.

    Attributes:
        options: of the command.
        recipe: with the network's contrasts.
        cases: by name.
        settings: what every file depends on.
        found_problems: cases that lack something, and what.
        found_notes: remarks on the input.
    """

    command: ClassVar[str] = "segment"
    writes: ClassVar[str] = "label maps"

    options: SegmentOptions

    @classmethod
    def of(cls, source: Path, output: Path, options: SegmentOptions) -> Segment:
        """What is to be done.

        Args:
            source: a folder of cases.
            output: where to; it may lie inside of the source.
            options: of the command.

        Raises:
            VaevqMedError: an option, the checkpoint or the source is not what was expected.
        """
        from vaevq_med.images.nifti import check_orientation
        from vaevq_med.prepare.volumes.discarded import check_accepted
        from vaevq_med.prepare.volumes.find import find_cases
        from vaevq_med.prepare.volumes.table import read_cases

        options.check()
        if options.assume_orientation is not None:
            check_orientation(options.assume_orientation)
        check_accepted(options.accept or ())
        label_map(options.labels)
        if options.label_map is not None:
            label_map(options.label_map)
        recipe = Recipe.load(options.recipe)
        check_invertible(recipe)
        segmenter = _segmenter(*_network_of(options))
        told = segmenter.stored.check_window(recipe.to_dict())
        recipe = recipe.changed(modalities=[*segmenter.contrasts])
        source = Path(os.path.abspath(source))
        if options.cases is not None:
            search = read_cases(options.cases, source, recipe.modalities, label_map=options.label_map)
        else:
            search = find_cases(source, recipe.modalities, label_map=options.label_map, exclude=output.resolve())
        settings = {
            "version": _VERSION,
            "network": segmenter.content_hash,
            "recipe": recipe.image_hash,
            "labels": options.labels,
            "orientation": options.assume_orientation,
        }
        cases = {case.name: case for case in search.units}
        return cls(options, recipe, cases, settings, tuple(search.problems), (*search.notes, *told))

    def fingerprint(self, unit: str) -> str:
        """Of the case's files, its segmentation among them, and the settings."""
        from vaevq_med.prepare.volumes.slices import fingerprint  # brings MONAI along

        files = fingerprint(self.cases[unit], self.recipe, self.options.assume_orientation)
        return hashlib.sha256(f"{self.mark} {files}".encode()).hexdigest()

    def make(self, unit: str, threads: int) -> Made:
        """Segment a case, and score it where it has a segmentation."""
        from vaevq_med.prepare.volumes.reading import CaseReader  # brings MONAI along

        start, case = time.monotonic(), self.cases[unit]
        torch.set_num_threads(threads)
        segmenter = _segmenter(*_network_of(self.options))
        reader = CaseReader(self.recipe, self.options.assume_orientation)
        accept = self.options.accept or ()
        contrasts = [windowed(reader.contrast(case.images[name], accept)) for name in segmenter.contrasts]
        reference = None if case.segmentation is None else _masks(reader, case)
        reader.close()
        masks = to_masks(segmenter.segment(torch.stack(contrasts)))
        _, affine = reader.grid
        turn = Turn.of(affine, self.recipe.axis)
        spacing = nib.affines.voxel_sizes(affine)[list(turn.axes)].tolist()
        labels = to_labels(masks, label_map(self.options.labels).regions)
        rows = [] if reference is None else [*case_scores(unit, case.patient, masks, reference, spacing)]
        voxel_ml = float(np.prod(spacing)) / 1000
        figures = {
            "scores": rows,
            "volumes_ml": {
                name: round(int(mask.sum()) * voxel_ml, 4) for name, mask in zip(REGIONS, masks, strict=True)
            },
            "seconds": round(time.monotonic() - start, 3),
        }
        content = _nifti(turn.volume(labels.numpy()), affine)
        return Made({f"{unit}-seg.nii.gz": content}, figures, tuple(dict.fromkeys(map(tuple, reader.notes))))


def _network_of(options: SegmentOptions) -> tuple[Path, str, str | None, int]:
    """What :func:`_segmenter` takes."""
    return options.checkpoint, options.weights, options.device, options.batch_size


def _masks(reader: CaseReader, case: Case) -> Tensor:
    """The regions of a case's segmentation, bool ``[3, N, rows, columns]``."""
    assert case.segmentation is not None
    labels, _ = reader.labels(case.segmentation, case)
    regions = label_map(case.target_map).regions
    return torch.stack([torch.isin(labels, torch.tensor(regions[name], dtype=labels.dtype)) for name in REGIONS])


def _nifti(labels: NDArray[np.uint8], affine: NDArray[np.float64]) -> bytes:
    """A compressed NIfTI of labels ``[X, Y, Z]``, whose bytes depend on them alone."""
    image = nib.Nifti1Image(np.ascontiguousarray(labels), affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    return gzip.compress(image.to_bytes(), 6, mtime=0)


@dataclass(frozen=True)
class Segmented:
    """What a run did.

    Attributes:
        report: of the cases.
        scores: the file of scores, or None where no case has a segmentation.
        summary: their means over patients, by region and figure.
    """

    report: Report
    scores: Path | None
    summary: Mapping[str, Mapping[str, Mapping[str, float]]]


def segmented(job: Job, report: Report) -> Segmented:
    """Write ``scores.csv`` and ``scores.json`` of all cases that are done, these of an earlier run among them.

    Args:
        job: that has run, of a :class:`Segment`.
        report: what it did.

    Raises:
        DataError: the output cannot be written.
    """
    rows = [row for figures in report.figures.values() for row in figures["scores"]]
    with OutputFolder(job.output, "", job.work.command, job.work.writes).writing():
        if not rows:
            for suffix in ("csv", "json"):
                (job.output / f"{SCORES}.{suffix}").unlink(missing_ok=True)
            return Segmented(report, None, {})
        work: Any = job.work
        path = write_scores(job.output, rows, {"version": __version__, **work.settings})
    return Segmented(report, path, summarize(rows))


def summary_lines(summary: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Iterator[str]:
    """A line for each region.

    Args:
        summary: see :class:`Segmented`.
    """
    for region, found in summary.items():
        bias = found["volume_bias_ml"]
        yield (
            f"{region}: Dice {found['dice']['value']:.3f}, HD95 {found['hd95_mm']['value']:.1f} mm, "
            f"lesion F1 {found['lesion_f1']['value']:.3f}, volume {bias['bias']:+.2f} ml "
            f"({bias['lower']:.2f} to {bias['upper']:.2f}), {found['dice']['n']:.0f} patients"
        )
