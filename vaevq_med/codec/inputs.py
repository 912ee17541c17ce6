"""What ``compress`` is given: one volume, a DICOM series, a case or a folder of cases, each as cases to be read."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vaevq_med.core.errors import DataError

if TYPE_CHECKING:
    from vaevq_med.images.dicom import Series
    from vaevq_med.prepare.job import Search
    from vaevq_med.prepare.recipes import Recipe
    from vaevq_med.prepare.volumes.case import Case


def find_inputs(
    source: Path,
    recipe: Recipe,
    *,
    modality: Sequence[str] | None,
    cases: Path | None,
    series: Sequence[str] | None = None,
    exclude: Path,
) -> tuple[Search[Case], Recipe]:
    """Find what is to be compressed, and the recipe with the contrasts of it.

    Args:
        source: a volume's file, a folder of one DICOM series, or a folder of cases, of volumes or of DICOM series.
        recipe: whose contrasts a case must have.
        modality: contrasts in place of the recipe's, or that of the volume.
        cases: CSV of paths, for a layout that the search does not know.
        series: ``CONTRAST=PATTERN``, for DICOM series whose descriptions do not say it by the usual words.
        exclude: a folder to leave out.

    Raises:
        DataError: there is nothing, or nothing says the contrast of a volume.
    """
    from vaevq_med.prepare.job import Search
    from vaevq_med.prepare.volumes.case import Case, strip_suffix
    from vaevq_med.prepare.volumes.find import find_cases
    from vaevq_med.prepare.volumes.series import find_studies, read_patterns, series_below, taken_note
    from vaevq_med.prepare.volumes.table import read_cases

    chosen = recipe.changed(modalities=[*modality]) if modality else recipe
    patterns = read_patterns(series or (), chosen.modalities)
    search = Search[Case]()
    found = series_below(source, search, exclude=exclude) if cases is None and source.is_dir() else []
    if patterns and not found:
        raise DataError(f"input {source}: found no DICOM series, expected some for --series")
    if cases is not None:
        return read_cases(cases, source, chosen.modalities), chosen
    if source.is_dir() and not (len(found) == 1 and found[0].folder == source and not patterns):
        if found:
            find_studies(source, search, found, chosen.modalities, patterns)
            return search, chosen
        return find_cases(source, chosen.modalities, exclude=exclude), chosen
    if not source.exists():
        raise DataError(f"input {source}: found nothing, expected a volume, a DICOM series or a folder of cases")
    stem = source.name if source.is_dir() else strip_suffix(source.name)
    if stem is None:
        raise DataError(f"input {source}: found a file of another name, expected .nii, .nii.gz, .mha or .nrrd")
    contrasts = [*modality] if modality else [contrast_of(stem, source, _told(found))]
    search.units.append(_one(source, stem, contrasts))
    search.notes += [taken_note(contrast, [series.description]) for series in found for contrast in contrasts]
    return search, recipe.changed(modalities=contrasts)


def _told(found: Sequence[Series]) -> str | None:
    """The contrast that the description of an only DICOM series says."""
    from vaevq_med.prepare.volumes.series import contrast_of_series

    return contrast_of_series(found[0].description, enhanced=found[0].enhanced) if found else None


def contrast_of(stem: str, source: Path, described: str | None = None) -> str:
    """The contrast that a volume's name ends with, e.g. ``t1c`` of ``BraTS-GLI-00005-100-t1c``.

    Args:
        stem: the name without its suffix.
        source: for the message.
        described: the contrast where the name says none, or None.

    Raises:
        DataError: nothing says one, or that of a segmentation.

    Examples:
        >>> contrast_of("Brats18_2013_11_1_flair", Path("x"))
        't2f'
    """
    from vaevq_med.prepare.volumes.case import CONTRAST_ALIASES

    found = CONTRAST_ALIASES.get(re.split(r"[-_.\s]", stem)[-1].lower())
    if found == "seg":
        raise DataError(f"input {source}: found a segmentation, expected an image; labels are not compressed")
    found = found or described
    if found is None:
        raise DataError(
            f"input {source}: found no contrast in the name, expected one; name it with --modality, e.g. t1c"
        )
    return found


def _one(source: Path, stem: str, contrasts: Sequence[str]) -> Case:
    """A volume as a case of its own; several contrasts are the channels of a 4D file."""
    from vaevq_med.prepare.volumes.case import Case, Volume
    from vaevq_med.prepare.volumes.labels import BRATS2024
    from vaevq_med.prepare.volumes.series import safe_name

    name = safe_name(stem)
    channels = [None] if len(contrasts) == 1 else [*range(len(contrasts))]
    images = {contrast: Volume(source, channel) for contrast, channel in zip(contrasts, channels, strict=True)}
    return Case(name, name, images, None, BRATS2024.name)


def fingerprint(case: Case, contrasts: Sequence[str], settings: Sequence[object]) -> str:
    """What a finished case depends on: the settings, and names, sizes and times of the input files.

    Args:
        case: what is read.
        contrasts: of it.
        settings: plain values.

    Raises:
        DataError: a file cannot be read.
    """
    files = []
    for contrast in contrasts:
        source = case.images[contrast]
        paths = sorted(source.path.iterdir()) if source.path.is_dir() else [source.path]
        for path in paths:
            try:
                status = path.stat()
            except OSError as error:
                raise DataError(f"{path.name}: found no readable file ({error.strerror}), expected a volume") from None
            series = [] if source.series is None else [source.series]  # a folder may hold several
            files.append([contrast, path.name, source.channel, status.st_size, status.st_mtime_ns, *series])
    return hashlib.sha256(json.dumps([case.name, files, *settings]).encode()).hexdigest()
