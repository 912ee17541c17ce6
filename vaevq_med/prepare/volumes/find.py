"""Finding cases: BraTS 2017 to 2024, the Decathlon's brain tumors, and CSV files of paths.

Nothing is read here but names, so that a search over thousands of cases takes a moment.
"""

from __future__ import annotations

import contextlib
import csv
import io
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from vaevq_med.core.errors import DataError
from vaevq_med.images.patients import patient_of
from vaevq_med.prepare.job import Search, Unit
from vaevq_med.prepare.volumes.labels import BRATS2021, BRATS2024, BRATS2024_PED, DECATHLON, LABEL_MAPS
from vaevq_med.prepare.volumes.labels import label_map as known_map

SUFFIXES = (".nii.gz", ".nii", ".mha", ".nrrd")
CONTRAST_ALIASES: Mapping[str, str] = {
    "t1": "t1n",
    "t1n": "t1n",
    "t1ce": "t1c",
    "t1gd": "t1c",
    "t1c": "t1c",
    "t2": "t2w",
    "t2w": "t2w",
    "flair": "t2f",
    "t2f": "t2f",
    "seg": "seg",
}
"""What the releases call the contrasts, to the names of BraTS 2023 and 2024."""
DECATHLON_CHANNELS: Mapping[str, int] = {"t2f": 0, "t1n": 1, "t1c": 2, "t2w": 3}
"""Order of the contrasts in Task01_BrainTumour's 4D volumes: FLAIR, T1w, T1gd, T2w."""

_BRATS_2023 = re.compile(r"(?P<case>BraTS-(?P<kind>[A-Za-z]+)-[0-9]+-[0-9]+)[-_](?P<contrast>[a-z0-9]+)")
_BRATS_2021 = re.compile(
    r"(?P<case>brats[0-9]{2,4}_[a-z0-9_]+?)_(?P<contrast>t1|t1ce|t1gd|t2|flair|seg)", re.IGNORECASE
)
_DECATHLON = re.compile(r"BRATS_[0-9]+")
_MASK_LIKE = re.compile("seg|mask|label", re.IGNORECASE)
_CASE_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,126}[A-Za-z0-9_-])?")


@dataclass(frozen=True)
class Volume:
    """Where a volume is.

    Attributes:
        path: its file, or the folder of a DICOM series.
        channel: index along the fourth axis of a 4D file, or None for a 3D one.
        series: SeriesInstanceUID of a DICOM series; None where it is the only one of its folder.
        title: what a series is called.
    """

    path: Path
    channel: int | None = None
    series: str | None = None
    title: str | None = None

    @property
    def name(self) -> str:
        """For messages, and of what is written of it."""
        return self.title or self.path.name


@dataclass(frozen=True)
class Case(Unit):
    """One examination of one patient.

    Attributes:
        name: unique, and safe as a folder's name.
        patient: whom the split keeps together.
        images: contrast to volume.
        segmentation: the labels, or None.
        label_map: name of the map that the segmentation's values follow.
        target_map: name of the map that they are written in.
        map_is_stated: whether a user named the map, so that what its values seem to say against it is a remark.
    """

    patient: str
    images: Mapping[str, Volume]
    segmentation: Volume | None
    label_map: str
    target_map: str = BRATS2024.name
    map_is_stated: bool = False


def strip_suffix(name: str) -> str | None:
    """A volume's file name without its suffix, or None where it is no volume's.

    Examples:
        >>> strip_suffix("a-t1n.nii.gz"), strip_suffix("a.png")
        ('a-t1n', None)
    """
    for suffix in SUFFIXES:
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return None


def check_case_name(name: str) -> None:
    """Refuse a name that cannot be a folder's, or would lead out of one.

    Raises:
        DataError: the name has other characters than letters, digits, ``.``, ``_`` and ``-``, or is too long.
    """
    if not _CASE_NAME.fullmatch(name):
        raise DataError(
            f"found case name {name!r}, expected 1 to 128 letters, digits, '.', '_' or '-', "
            "starting with a letter or digit"
        )


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
        case_or_problem = _assemble(
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
            + (f" but {len(strangers)} volumes of other names ({_relative(strangers[0], root)})" if strangers else "")
            + ", expected BraTS or Decathlon names such as BraTS-GLI-00005-100-t1n.nii.gz; "
            "describe another layout with --cases"
        )
    return search


def read_cases(table: Path, root: Path, modalities: Sequence[str], *, label_map: str | None = None) -> Search[Case]:
    """Read cases from a CSV of paths.

    The columns are ``case``, one for each contrast (under any of :data:`CONTRAST_ALIASES`), and, where there
    are any, ``patient``, ``seg`` and ``label_map``; others are left out.

    Args:
        table: the CSV file.
        root: what relative paths start from.
        modalities: contrasts that every case must have.
        label_map: what the segmentations' values mean, where a row does not say it.

    Returns:
        Cases, and what stood in the way of others.

    Raises:
        DataError: the table cannot be read, lacks a column or has no row, or nothing says what the values of a
            segmentation mean.
    """
    header, columns, rows = _read_table(table, "cases")
    used = ("case", "patient", *modalities, "seg", "label_map")
    missing = [name for name in ("case", *modalities) if name not in columns]
    if missing:
        raise DataError(
            f"cases {table}: found columns {', '.join(header) or 'none'}, expected also {', '.join(missing)}"
        )
    repeated = [name for name in used if columns.count(name) > 1]
    if repeated:
        raise DataError(f"cases {table}: found {columns.count(repeated[0])} columns for {repeated[0]}, expected one")
    if not rows:
        raise DataError(f"cases {table}: found no rows, expected one for each case")
    unsaid = [row["case"] for row in rows if row.get("seg") and not (row.get("label_map") or label_map)]
    if unsaid:
        raise DataError(
            f"cases {table}: found a seg without its map ({listed(unsaid)}), expected a column label_map, or "
            f"--label-map, with one of {', '.join(LABEL_MAPS)}"
        )
    search = Search[Case]()
    ignored = [column for column, name in zip(header, columns, strict=True) if name not in used]
    if ignored:
        search.notes.append(f"cases {table.name}: columns {', '.join(ignored)} are not used")
    counts: dict[str, int] = defaultdict(int)
    for row in rows:
        counts[row["case"]] += 1
    for row in rows:
        name = row["case"]
        volumes = {name: [root / row[name]] for name in (*modalities, "seg") if row.get(name)}
        absent = [path for (path,) in volumes.values() if not os.path.isfile(path)]
        kind = row.get("label_map") or label_map
        try:
            check_case_name(name)
            kind = known_map(kind).name if kind else BRATS2024.name
        except DataError as error:
            search.problems.append((printable(name) or "(no name)", str(error)))
            continue
        if counts[name] > 1:
            if all(problem[0] != name for problem in search.problems):
                search.problems.append((name, f"found {counts[name]} rows of this name in {table.name}, expected one"))
            continue
        if absent:
            search.problems.append((name, f"found no file {printable(absent[0])}, expected one as {table.name} says"))
            continue
        patient = row.get("patient") or patient_of(name)
        made = _assemble(name, patient, volumes, modalities, kind, True, root)
        if isinstance(made, Case):
            search.units.append(made)
        else:
            search.problems.append((name, made))
    search.units.sort(key=lambda case: case.name)
    _note_missing_masks(search, _volumes_beside(search.units), root)
    return search


def read_patients(table: Path) -> dict[str, str]:
    """Read whose cases are from a CSV with the columns ``case`` and ``patient``; others are left out.

    Args:
        table: the CSV file; it may name cases that are nowhere.

    Returns:
        Case to patient.

    Raises:
        DataError: the table cannot be read, lacks a column, or does not name one patient for a case.
    """
    header, columns, rows = _read_table(table, "patients")
    if columns.count("case") != 1 or columns.count("patient") != 1:
        raise DataError(f"patients {table}: found columns {', '.join(header) or 'none'}, expected case and patient")
    patients: dict[str, str] = {}
    for row in rows:
        case, patient = row["case"], row["patient"]
        if not case or not patient:
            raise DataError(
                f"patients {table}: found a row without a {'patient' if case else 'case'} "
                f"({printable(case or patient)}), expected both"
            )
        if patients.setdefault(case, patient) != patient:
            raise DataError(
                f"patients {table}: found {printable(patients[case])} and {printable(patient)} for case "
                f"{printable(case)}, expected one patient"
            )
    return patients


def _read_table(table: Path, kind: str) -> tuple[list[str], list[str], list[dict[str, str]]]:
    """A CSV's header, the names of its columns as they are known here, and its rows that are not empty."""
    try:
        reader = csv.reader(io.StringIO(table.read_text(encoding="utf-8-sig")), skipinitialspace=True)
        header = [column.strip() for column in next(reader, [])]
        columns = [CONTRAST_ALIASES.get(column.lower(), column.lower()) for column in header]
        rows = [dict(zip_longest(columns, (v.strip() for v in row[: len(columns)]), fillvalue="")) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{kind} {table}: found no readable CSV ({error}), expected one with a header") from error
    return header, columns, [row for row in rows if any(row.values())]


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


def _assemble(
    name: str,
    patient: str,
    files: Mapping[str, Sequence[Path]],
    modalities: Sequence[str],
    label_map: str,
    stated: bool,
    root: Path,
) -> Case | str:
    """A case from its files, or what is wrong with it."""
    for contrast, paths in sorted(files.items()):
        if len(paths) > 1:
            shown = " and ".join(_relative(path, root) for path in paths[:2])
            same_folder = len({path.parent for path in paths}) == 1
            what = f"{len(paths)} files for {contrast}" if same_folder else "a duplicate case name"
            return f"found {what} ({shown}), expected one"
    if "image" in files:
        stacked = files["image"][0]
        unknown = [m for m in modalities if m not in DECATHLON_CHANNELS]
        if unknown:
            return f"found contrasts {', '.join(DECATHLON_CHANNELS)}, expected also {', '.join(unknown)}"
        images = {m: Volume(stacked, DECATHLON_CHANNELS[m]) for m in modalities}
    else:
        missing = [m for m in modalities if m not in files]
        if missing:
            found = ", ".join(sorted(files)) or "nothing"
            return f"missing {', '.join(missing)}; found {found}, expected {', '.join(modalities)}"
        images = {m: Volume(files[m][0]) for m in modalities}
    segmentation = Volume(files["seg"][0]) if files.get("seg") else None
    return Case(name, patient, images, segmentation, label_map, map_is_stated=stated)


def _relative(path: Path, root: Path) -> str:
    return printable(path.relative_to(root).as_posix() if path.is_relative_to(root) else path)


def printable(text: object) -> str:
    """One line that any stream can encode, whatever bytes a file's name is made of.

    Args:
        text: the name.
    """
    return "".join(c if c.isprintable() else "?" for c in str(text))


def _volumes_beside(cases: Sequence[Case]) -> list[Path]:
    """Volumes that no case names, in the folders of those without a segmentation."""
    used = {volume.path for case in cases for volume in _all_volumes(case)}
    folders = {volume.path.parent for case in cases if case.segmentation is None for volume in case.images.values()}
    found = []
    for folder in sorted(folders):
        with contextlib.suppress(OSError):  # the case itself says so
            found += sorted(
                path for path in folder.iterdir() if path not in used and strip_suffix(path.name) is not None
            )
    return found


def _all_volumes(case: Case) -> Iterator[Volume]:
    yield from case.images.values()
    if case.segmentation is not None:
        yield case.segmentation


def _note_missing_masks(search: Search[Case], strangers: Sequence[Path], root: Path) -> None:
    """Name the cases without a segmentation, where others have one or a file beside their images looks like one."""
    bare = [case for case in search.units if case.segmentation is None]
    owners: dict[Path, set[str]] = defaultdict(set)
    for case in search.units:
        for volume in _all_volumes(case):
            owners[volume.path.parent].add(case.name)
    alike: dict[str, Path] = {}
    for path in strangers:
        if _MASK_LIKE.search(path.name) and path.parent in owners:
            alone = len(owners[path.parent]) == 1
            for name in (case.name for case in bare if case.name in owners[path.parent]):
                if alone or re.match(rf"{re.escape(name)}(?![A-Za-z0-9])", path.name):
                    alike.setdefault(name, path)
    if bare and (alike or len(bare) < len(search.units)):
        search.notes.append(
            f"{len(bare)} of {len(search.units)} cases have no segmentation: {listed([c.name for c in bare])}"
        )
    if alike:
        shown = listed([_relative(path, root) for path in alike.values()])
        search.notes.append(f"files beside cases without a segmentation look like one: {shown}; name them with --cases")


def listed(names: Sequence[str], most: int = 5) -> str:
    """Names for a reader, the first ones and how many more.

    Args:
        names: what is listed.
        most: how many are shown.
    """
    shown = ", ".join(printable(name) for name in names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown


def _add_notes(search: Search[Case], strangers: Sequence[Path], label_map: str | None, root: Path) -> None:
    if strangers:
        search.notes.append(
            f"{len(strangers)} volumes of other names were left out (first: {_relative(strangers[0], root)}); "
            "describe them with --cases"
        )
    _note_missing_masks(search, strangers, root)
    if label_map is None and any(c.label_map == BRATS2024_PED.name and c.segmentation for c in search.units):
        search.notes.append(
            "BraTS-PED segmentations are read as those of 2024 (1 = ET); for the 2023 release: --label-map brats2024"
        )
