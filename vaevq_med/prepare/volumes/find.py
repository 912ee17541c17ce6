"""Finding cases under a folder: BraTS 2017 to 2024, and the Decathlon's brain tumors.

Nothing is read here but names, so that a search over thousands of cases takes a moment.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from vaevq_med.core.errors import DataError
from vaevq_med.images.patients import patient_of
from vaevq_med.prepare.job import Search
from vaevq_med.prepare.volumes.case import CONTRAST_ALIASES, Case, assemble, printable, relative, strip_suffix
from vaevq_med.prepare.volumes.labels import BRATS2021, BRATS2024, BRATS2024_PED, DECATHLON
from vaevq_med.prepare.volumes.missing import note_missing_masks

_BRATS_2023 = re.compile(r"(?P<case>BraTS-(?P<kind>[A-Za-z]+)-[0-9]+-[0-9]+)[-_](?P<contrast>[a-z0-9]+)")
_BRATS_2021 = re.compile(
    r"(?P<case>brats[0-9]{2,4}_[a-z0-9_]+?)_(?P<contrast>t1|t1ce|t1gd|t2|flair|seg)", re.IGNORECASE
)
_DECATHLON = re.compile(r"BRATS_[0-9]+")


def find_cases(
    root: Path, modalities: Sequence[str], *, label_map: str | None = None, exclude: Path | None = None
) -> Search[Case]:
    """Find cases under any nesting, by the names of their files.

    Args:
        root: folder to search.
        modalities: contrasts that every case must have.
        label_map: what the segmentations' values mean, where the file names tell it wrongly.
        exclude: a folder to leave out.

    Returns:
        Cases, and what stood in the way of others.

    Raises:
        DataError: ``root`` is no readable folder.
    """
    if not os.path.isdir(root):
        found = "a file" if os.path.exists(root) else "nothing"
        raise DataError(f"input {root}: found {found}, expected a folder of cases")
    search = Search[Case]()
    files: dict[str, dict[str, list[Path]]] = defaultdict(lambda: defaultdict(list))
    maps: dict[str, str] = {}
    strangers: list[Path] = []
    for path in walk(root, search, exclude):
        stem = strip_suffix(path.name)
        if stem is None:
            continue
        place = _decathlon_place(path, stem)
        match = None if place else _BRATS_2023.fullmatch(stem)
        older = None if place or match else _BRATS_2021.fullmatch(stem)
        if place:
            case, contrast, kind = stem, place, DECATHLON.name
        elif match and match["contrast"] in CONTRAST_ALIASES:
            case, contrast = match["case"], CONTRAST_ALIASES[match["contrast"]]
            kind = (BRATS2024_PED if match["kind"].upper() == "PED" else BRATS2024).name
        elif older:
            case, contrast, kind = older["case"], CONTRAST_ALIASES[older["contrast"].lower()], BRATS2021.name
        else:
            strangers.append(path)
            continue
        files[case][contrast].append(path)
        maps[case] = kind
    stated = label_map is not None
    for name in sorted(files):
        case_or_problem = assemble(
            name, patient_of(name), files[name], modalities, label_map or maps[name], stated, root
        )
        if isinstance(case_or_problem, Case):
            search.units.append(case_or_problem)
        else:
            search.problems.append((name, case_or_problem))
    _add_notes(search, strangers, label_map, root)
    if not search.units and not search.problems:
        raise DataError(
            f"input {root}: found no case"
            + (f" but {len(strangers)} volumes of other names ({relative(strangers[0], root)})" if strangers else "")
            + ", expected BraTS or Decathlon names such as BraTS-GLI-00005-100-t1n.nii.gz; "
            "describe another layout with --cases"
        )
    return search


def walk(root: Path, search: Search[Case], exclude: Path | None) -> Iterator[Path]:
    """Files below a folder, in order; links are followed, once each, and hidden names left out.

    Args:
        root: the folder.
        search: that takes note of folders which cannot be read.
        exclude: a folder to leave out.
    """

    def unreadable(error: OSError) -> None:
        search.problems.append(
            (printable(error.filename), f"found an unreadable folder ({error.strerror}), expected to read it")
        )

    excluded = exclude.resolve() if exclude is not None else None
    seen: set[Path] = set()
    for folder, folders, names in os.walk(root, followlinks=True, onerror=unreadable):
        real = Path(folder).resolve()
        if real in seen or real == excluded:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(folder) / name for name in sorted(names) if not name.startswith("."))


def _decathlon_place(path: Path, stem: str) -> str:
    """``image`` or ``seg`` for a file of Task01_BrainTumour, otherwise nothing."""
    if not _DECATHLON.fullmatch(stem):
        return ""
    return {"imagesTr": "image", "imagesTs": "image", "labelsTr": "seg"}.get(path.parent.name, "")


def _add_notes(search: Search[Case], strangers: Sequence[Path], label_map: str | None, root: Path) -> None:
    if strangers:
        search.notes.append(
            f"{len(strangers)} volumes of other names were left out (first: {relative(strangers[0], root)}); "
            "describe them with --cases"
        )
    note_missing_masks(search, strangers, root)
    if label_map is None and any(c.label_map == BRATS2024_PED.name and c.segmentation for c in search.units):
        search.notes.append(
            "BraTS-PED segmentations are read as those of 2024 (1 = ET); for the 2023 release: --label-map brats2024"
        )
