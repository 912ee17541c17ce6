"""The cases of a study of downstream tasks: all contrasts together, the regions, and copies with synthetic lesions."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from vaevq_med.images.volumes import VIEWS
from vaevq_med.prepare.recipes import Recipe
from vaevq_med.prepare.volumes.case import Case, Volume
from vaevq_med.prepare.volumes.labels import label_map
from vaevq_med.prepare.volumes.slices import fingerprint
from vaevq_med.study.rates.scans import Scan, ScanFile, find_scans
from vaevq_med.study.tasks.file import Detectability, TasksStudy
from vaevq_med.tasks.detectability import Lesion, insert, place

_TOWARD_RAS = {"L": -1, "P": -1, "I": -1, "R": 1, "A": 1, "S": 1}


@dataclass(frozen=True)
class CaseContent:
    """What a case holds.

    Attributes:
        scans: each contrast.
        regions: masks of whole tumor, tumor core and enhancing tumor, bool ``[Z, Y, X]``, any of which may be empty;
            None without a segmentation.
    """

    scans: Mapping[str, Scan]
    regions: Mapping[str, NDArray[np.bool_]] | None


@dataclass(frozen=True)
class CaseFile:
    """Where a case is.

    Attributes:
        case: the examination.
        scans: its contrasts that the study codes.
        recipe: how they are read.
    """

    case: Case
    scans: tuple[ScanFile, ...]
    recipe: Recipe

    @property
    def name(self) -> str:
        """Of its folder of records."""
        return self.case.name

    def mark(self) -> str:
        """Hash of all of the case's files' names, sizes and times, and of the recipe."""
        return fingerprint(self.case, self.recipe)

    def read(self) -> CaseContent:
        """Read it.

        Raises:
            DataError: it is not what the recipe expects.
        """
        found = {scan.contrast: scan.read() for scan in self.scans}
        labels = next(iter(found.values())).labels
        regions = None
        if labels is not None:
            values = label_map(self.case.target_map).regions
            regions = {name: np.isin(labels, wanted) for name, wanted in values.items()}
        return CaseContent(found, regions)


def find_case_files(study: TasksStudy) -> list[CaseFile]:
    """The cases of the split's patients.

    Raises:
        DataError: there are none, or a contrast or a patient is missing.
    """
    found = []
    for _, scans in groupby(find_scans(study), key=lambda scan: scan.case.name):
        own = tuple(scans)
        found.append(CaseFile(own[0].case, own, own[0].recipe))
    return found


@dataclass(frozen=True)
class Lesioned:
    """A copy of a case with lesions in one contrast.

    Attributes:
        lesions: that are in it.
        scan: the contrast's file, beside those of the others.
        content: of that file.
    """

    lesions: Sequence[Lesion]
    scan: ScanFile
    content: Scan


def lesioned_cases(file: CaseFile, content: CaseContent, asked: Detectability, folder: Path) -> list[Lesioned]:
    """Copies of a case with lesions, written as files, as a tokenizer compresses whole cases.

    Volumes are written as the recipe has made them ready, so that the recipe of the copies does nothing but window
    them; float32, on the grid of their slices.

    Args:
        file: the case.
        content: what it holds.
        asked: which lesions.
        folder: where the copies are written.

    Returns:
        One a draw; none without a segmentation, since nobody says where the tissue is healthy.

    Raises:
        DataError: a contrast of the case cannot be read.
    """
    if content.regions is None:
        return []
    recipe = file.recipe.changed(spacing=None, bias_field_correction=None)
    original = content.scans[asked.contrast]
    labels = original.labels
    assert labels is not None, "regions come from labels"
    others = {}
    for contrast in file.case.images:  # all that a tokenizer codes, where the study has one
        if contrast != asked.contrast:
            scan = content.scans.get(contrast) or ScanFile(file.case, contrast, file.recipe).read()
            others[contrast] = Volume(_write(folder / f"{contrast}.nii", scan.unit, scan, recipe))
    kinds = [(diameter, strength) for diameter in asked.diameters for strength in asked.strengths]
    found = []
    for draw in range(asked.draws):
        seed = hashlib.sha256(f"{asked.seed} {file.name} {draw}".encode()).digest()
        rng = np.random.default_rng(int.from_bytes(seed[:8], "little"))
        lesions = place(original.unit, original.brain, labels > 0, original.spacing, kinds, rng)
        changed = insert(original.unit, lesions, original.spacing)
        path = _write(folder / f"{asked.contrast}_{draw}.nii", changed, original, recipe)
        images = {**others, asked.contrast: Volume(path)}
        case = replace(file.case, name=f"{file.name}_lesions_{draw}", images=images, segmentation=None)
        scan_file = ScanFile(case, asked.contrast, recipe)
        found.append(Lesioned(lesions, scan_file, scan_file.read()))
    return found


def through_window(unit: NDArray[np.float32], own: Scan, original: Scan) -> NDArray[np.float32]:
    """A copy's intensities, in [0, 1] of its own window, in units of the original's window."""
    (low, high), (first, last) = own.window, original.window
    return ((unit * (high - low) + low - first) / (last - first)).astype(np.float32)


def _write(path: Path, unit: NDArray[np.float32], scan: Scan, recipe: Recipe) -> Path:
    """A volume of upright slices as a NIfTI file, in the intensities that the window was made of, background 0."""
    low, high = scan.window
    stack = np.where(scan.brain, unit * np.float32(high - low) + np.float32(low), 0).astype(np.float32)
    codes, order, _ = VIEWS[recipe.axis]
    back = np.argsort(order)
    sizes = [scan.spacing[place] * _TOWARD_RAS[code] for place, code in zip(back, codes, strict=True)]
    image = nib.Nifti1Image(stack.transpose([int(place) for place in back]), np.diag([*sizes, 1.0]))
    nib.save(image, path)
    return path
