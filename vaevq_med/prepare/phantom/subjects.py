"""Synthetic multi-contrast subjects in BraTS 2024 layout, for the demo, the tests and air-gapped trials.

A subject is the MNI152 template (from nilearn's wheel) deformed into one person's brain, with a tumor grown
along its white matter, rendered in the four contrasts of BraTS and labeled in ``seg``. Nothing is
downloaded. A subject depends on the seed and its number alone: neither on how many are made, nor in which
order, nor by how many processes.
"""

from __future__ import annotations

import contextlib
import gzip
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Annotated, Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from vaevq_med.core.errors import DataError, VaevqMedError
from vaevq_med.core.files import atomic_write_bytes, atomic_write_text
from vaevq_med.core.jobs import Problem, check_workers, run_jobs
from vaevq_med.core.options import Number, Options
from vaevq_med.prepare.phantom.anatomy import FULL_SHAPE, build_anatomy, make_grid
from vaevq_med.prepare.phantom.contrast import CONTRASTS, find_vessels, render
from vaevq_med.prepare.phantom.tumor import Label, grow_tumor, plan_tumor

__all__ = [
    "Label",
    "PhantomConfig",
    "PhantomScan",
    "case_name",
    "plan_cases",
    "synthesize_subject",
    "write_phantoms",
]

TIMEPOINTS = (100, 101)
"""The timepoint numbers of BraTS 2024; the second follows surgery."""
MAX_SUBJECTS = 9999
RECORD = "phantom.json"
"""In the output folder, how its cases are made."""
_MIN_EDGE = 24
_Edge = Annotated[int, Field(ge=_MIN_EDGE, le=512)]


class _Stream(IntEnum):
    """Independent sources of randomness of one subject."""

    ANATOMY = 0
    TUMOR = 1
    GROWTH = 2
    VESSELS = 3
    SCAN = 4


class PhantomConfig(Options):
    """How synthetic subjects are made.

    Attributes:
        shape: voxels along left-right, posterior-anterior, inferior-superior; the field of view stays
            182 x 218 x 182 mm, so the default has 1 mm voxels and ``(91, 109, 91)`` has 2 mm ones.
        seed: another seed gives other subjects under the same names.
        deformation: spread of the brains' shapes, 0 (all the template's) to 1.5.
        noise: standard deviation of the noise in each receive channel, as a fraction of the brightest
            healthy parenchyma, 0 to 0.5.
        bias_field: standard deviation of the logarithm of the bias field, 0 to 0.5.
    """

    shape: tuple[_Edge, _Edge, _Edge] = Field(
        default=FULL_SHAPE, description=f"three numbers of voxels from {_MIN_EDGE} to 512"
    )
    seed: int = Field(default=0, ge=0, description="0 or more")
    deformation: Number = Field(default=1.0, ge=0, le=1.5)
    noise: Number = Field(default=0.02, ge=0, le=0.5)
    bias_field: Number = Field(default=0.08, ge=0, le=0.5)


@dataclass(frozen=True)
class PhantomScan:
    """One timepoint of one synthetic patient.

    Attributes:
        name: the case's name, as ``BraTS-GLI-90001-100``.
        volumes: ``t1n``, ``t1c``, ``t2w``, ``t2f`` int16 with zero background, and ``seg`` uint8 with the
            classes of ``Label``; each of the configured shape.
        affine: voxel to MNI millimeters, ``[4, 4]``.
    """

    name: str
    volumes: Mapping[str, NDArray[Any]]
    affine: NDArray[np.float64]


def case_name(subject: int, timepoint: int) -> str:
    """Name a case as BraTS 2024 glioma does, with patient numbers from 90001 that no release uses.

    Args:
        subject: the patient, from 1.
        timepoint: 100 or 101.

    Returns:
        The name.

    Examples:
        >>> case_name(7, 100)
        'BraTS-GLI-90007-100'
    """
    return f"BraTS-GLI-9{subject:04d}-{timepoint}"


def plan_cases(subjects: int) -> list[tuple[int, int]]:
    """List the scans of the patients: every third patient has a second timepoint.

    Args:
        subjects: number of patients, 1 to 9999.

    Returns:
        Pairs of patient and timepoint, ordered.

    Raises:
        VaevqMedError: the number is out of its range.

    Examples:
        >>> plan_cases(3)
        [(1, 100), (2, 100), (3, 100), (3, 101)]
    """
    if not 1 <= subjects <= MAX_SUBJECTS:
        raise VaevqMedError(f"{subjects} subjects: expected 1 to {MAX_SUBJECTS}")
    return [
        (subject, timepoint)
        for subject in range(1, subjects + 1)
        for timepoint in (TIMEPOINTS if subject % 3 == 0 else TIMEPOINTS[:1])
    ]


def synthesize_subject(
    subject: int,
    timepoint: int = TIMEPOINTS[0],
    config: PhantomConfig | None = None,
) -> PhantomScan:
    """Make one scan of one synthetic patient.

    Both timepoints of a patient share the anatomy, the tumor's place and its outline; at the second a
    resection cavity has replaced part of the tumor. Of three patients the first is scanned before surgery,
    the second after it, the third before and after.

    Args:
        subject: the patient, 1 to 9999.
        timepoint: 100, or 101 for the scan after surgery.
        config: how; the defaults without one.

    Returns:
        The scan; the same for the same arguments.

    Raises:
        VaevqMedError: a number is out of its range.
        DataError: nilearn's MNI152 maps are not installed.
    """
    config = config or PhantomConfig()
    if not 1 <= subject <= MAX_SUBJECTS:
        raise VaevqMedError(f"subject {subject}: expected 1 to {MAX_SUBJECTS}")
    if timepoint not in TIMEPOINTS:
        raise VaevqMedError(f"timepoint {timepoint}: expected one of {', '.join(map(str, TIMEPOINTS))}")

    def source(stream: _Stream, *more: int) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence(config.seed, spawn_key=(subject, stream, *more)))

    resected = timepoint != TIMEPOINTS[0] or subject % 3 == 2
    grid = make_grid(config.shape)
    plan = plan_tumor(source(_Stream.TUMOR))
    anatomy = build_anatomy(source(_Stream.ANATOMY), grid, config.deformation, plan.mass_effect)
    lesion = grow_tumor(source(_Stream.GROWTH), plan, grid, anatomy, resected=resected)
    vessels = find_vessels(source(_Stream.VESSELS), grid, anatomy)
    volumes: dict[str, NDArray[Any]] = {}

    def place(values: NDArray[Any]) -> NDArray[Any]:
        volume = np.zeros(grid.shape, dtype=values.dtype)
        volume[grid.window][anatomy.mask] = values
        return volume

    for number, (name, contrast) in enumerate(CONTRASTS.items()):
        scan = source(_Stream.SCAN, timepoint, number)
        volumes[name] = place(
            render(
                scan,
                contrast,
                grid,
                anatomy,
                lesion,
                vessels,
                noise=config.noise,
                bias_field=config.bias_field,
            )
        )
    volumes["seg"] = place(lesion.label)
    return PhantomScan(case_name(subject, timepoint), volumes, grid.affine)


def write_phantoms(
    output: Path,
    subjects: int,
    config: PhantomConfig | None = None,
    *,
    workers: int | None = 1,
    on_case: Callable[[str], None] = lambda name: None,
) -> list[Path]:
    """Write synthetic subjects as ``OUTPUT/<case>/<case>-{t1n,t1c,t2w,t2f,seg}.nii.gz``.

    Each file appears whole or not at all; a second run writes the same bytes over the first. ``phantom.json`` keeps how
    the cases of the folder were made, which a call of another seed or shape is refused by.

    Args:
        output: folder to write into; made where absent.
        subjects: number of patients; every third has two timepoints, a case each.
        config: how; the defaults without one.
        workers: processes, or None for one a core; the files do not depend on it.
        on_case: called with the name of each case that is done.

    Returns:
        The folders of the cases, ordered by name.

    Raises:
        VaevqMedError: a number is out of its range.
        DataError: nilearn's MNI152 maps are not installed, the output cannot be written, or it holds cases of another
            configuration.
    """
    check_workers(workers)
    cases = {case_name(*case): (output, *case, config or PhantomConfig()) for case in plan_cases(subjects)}
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot make the output folder {output}: {error.strerror}") from error
    _note_config(output, config or PhantomConfig())
    with contextlib.closing(run_jobs(_write_case, cases, kind="case", workers=workers)) as outcomes:
        for name, outcome in outcomes:
            if isinstance(outcome, Problem):
                raise DataError(outcome.reason)
            on_case(name)
    return [output / name for name in cases]


def _note_config(output: Path, config: PhantomConfig) -> None:
    """Keep how the folder's cases are made; refuse to mix those of two configurations, which have the same names."""
    path, wanted = output / RECORD, config.model_dump(mode="json")
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: found no readable record ({error}), expected that of an earlier call") from None
    cases = sorted(path.name for path in output.glob("BraTS-GLI-9*") if path.is_dir())
    if found is None and cases:
        raise DataError(
            f"output {output}: found cases without {RECORD}, such as {cases[0]}, expected none whose making is not "
            "known; choose another folder"
        )
    if not cases:
        try:
            atomic_write_text(path, json.dumps(wanted) + "\n")
        except OSError as error:
            raise DataError(f"cannot write {path}: {error.strerror}") from error
    elif found != wanted:
        raise DataError(f"{path}: found cases of {found}, expected {wanted}; choose another folder")


def _write_case(output: Path, subject: int, timepoint: int, config: PhantomConfig) -> None:
    """Make and write one case."""
    scan = synthesize_subject(subject, timepoint, config)
    folder = output / scan.name
    try:
        folder.mkdir(exist_ok=True)
        for contrast, volume in scan.volumes.items():
            image = nib.Nifti1Image(volume, scan.affine)
            image.header.set_xyzt_units("mm")
            image.set_sform(scan.affine, code="mni")
            image.set_qform(scan.affine, code="mni")
            atomic_write_bytes(
                folder / f"{scan.name}-{contrast}.nii.gz",
                gzip.compress(image.to_bytes(), compresslevel=1, mtime=0),
                durable=False,
            )
    except OSError as error:
        raise DataError(f"cannot write case {scan.name} to {output}: {error.strerror}") from error
