"""The volumes of a study of rate against distortion: found by patient, read through a recipe's window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vaevq_med.codec.geometry import Turn
from vaevq_med.core.errors import DataError
from vaevq_med.images.foreground import foreground
from vaevq_med.images.splits import split_by_file
from vaevq_med.images.volumes import VIEWS
from vaevq_med.prepare.recipes import Recipe
from vaevq_med.prepare.volumes.case import Case
from vaevq_med.prepare.volumes.find import find_cases
from vaevq_med.prepare.volumes.reading import CaseReader
from vaevq_med.prepare.volumes.slices import fingerprint
from vaevq_med.prepare.volumes.table import read_cases
from vaevq_med.study.rates.file import VolumeStudy


@dataclass(frozen=True)
class Scan:
    """A volume as codecs are given it.

    Attributes:
        unit: intensities through the window, float32 ``[Z, Y, X]`` in [0, 1], the background 0.
        brain: what is foreground, bool ``[Z, Y, X]``.
        tumor: what the segmentation marks, bool ``[Z, Y, X]``; None without a segmentation, or where it is empty.
        window: the intensities of 0 and 1.
        spacing: of the voxels along Z, Y and X, in mm.
        labels: of the segmentation, uint8 ``[Z, Y, X]`` in the values of the case's target map; None without one.
    """

    unit: NDArray[np.float32]
    brain: NDArray[np.bool_]
    tumor: NDArray[np.bool_] | None
    window: tuple[float, float]
    spacing: tuple[float, float, float]
    labels: NDArray[np.uint8] | None = None


@dataclass(frozen=True)
class ScanFile:
    """Where a volume is.

    Attributes:
        case: the examination.
        contrast: which of its volumes.
        recipe: how it is read.
    """

    case: Case
    contrast: str
    recipe: Recipe

    @property
    def name(self) -> str:
        """Of its folder of records."""
        return f"{self.case.name}_{self.contrast}"

    def mark(self) -> str:
        """Hash of its files' names, sizes and times, and of the recipe."""
        own = {self.contrast: self.case.images[self.contrast]}
        return fingerprint(replace(self.case, images=own), self.recipe)

    def read(self) -> Scan:
        """Read it.

        Raises:
            DataError: it is not what the recipe expects.
        """
        reader = CaseReader(self.recipe)
        found = reader.contrast(self.case.images[self.contrast])
        labels = None
        if self.case.segmentation is not None:
            labels = reader.labels(self.case.segmentation, self.case)[0].numpy()
        spacing = stack_spacing(reader.grid[1], self.recipe)
        reader.close()
        low, high = found.window
        brain = foreground(found.stack).numpy()
        unit = found.stack.float().sub_(low).div_(high - low).clamp_(0, 1).numpy()
        unit[~brain] = 0
        tumor = labels > 0 if labels is not None and labels.any() else None
        return Scan(unit, brain, tumor, (low, high), spacing, labels)


def stack_spacing(affine: NDArray[np.float64], recipe: Recipe) -> tuple[float, float, float]:
    """Size of the voxels of upright slices along slices, rows and columns, in mm.

    Args:
        affine: 4×4 of the volume that they are cut from, to RAS+ coordinates.
        recipe: that cuts them.

    Example:
        >>> stack_spacing(np.diag([1.0, -2.0, 3.0, 1.0]), Recipe(name="a", description=""))
        (3.0, 2.0, 1.0)
    """
    if recipe.spacing is not None:
        lengths = [recipe.spacing[axis] for axis in VIEWS[recipe.axis][1]]
    else:
        sizes = np.linalg.norm(affine[:3, :3], axis=0)
        lengths = [float(sizes[axis]) for axis in Turn.of(affine, recipe.axis).axes]
    return lengths[0], lengths[1], lengths[2]


def find_scans(study: VolumeStudy) -> list[ScanFile]:
    """The volumes of the split's patients, case by case.

    Raises:
        DataError: there are none, or a contrast or a patient is missing.
    """
    recipe = Recipe.load(study.recipe)
    unknown = [contrast for contrast in study.contrasts if contrast not in recipe.modalities]
    if unknown:
        raise DataError(f"contrasts has {unknown[0]}; expected some of {', '.join(recipe.modalities)}")
    # A tokenizer's file is of a whole case.
    modalities = recipe.modalities if study.tokenizers else study.contrasts
    search = (
        find_cases(study.input, modalities) if study.cases is None else read_cases(study.cases, study.input, modalities)
    )
    cases = _of_split(search.units, study.split_file, study.split)
    if not cases:
        raise DataError(f"input {study.input}: found no case of the split {study.split}, expected at least one")
    return [ScanFile(case, contrast, recipe) for case in cases for contrast in study.contrasts]


def _of_split(cases: Sequence[Case], split_file: Path | None, split: str) -> list[Case]:
    if split_file is None:
        return list(cases)
    splits = split_by_file({case.patient for case in cases}, split_file)
    return [case for case in cases if splits[case.patient] == split]
