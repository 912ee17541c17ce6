"""CSV files that name the volumes of cases, or whose cases are from which patient."""

from __future__ import annotations

import csv
import io
import os
from collections import defaultdict
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

from vaevq_med.core.errors import DataError
from vaevq_med.images.patients import patient_of
from vaevq_med.prepare.job import Search
from vaevq_med.prepare.volumes.case import CONTRAST_ALIASES, Case, assemble, check_case_name, listed, printable
from vaevq_med.prepare.volumes.labels import BRATS2024, LABEL_MAPS
from vaevq_med.prepare.volumes.labels import label_map as known_map
from vaevq_med.prepare.volumes.missing import note_missing_masks, volumes_beside


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
        made = assemble(name, patient, volumes, modalities, kind, True, root)
        if isinstance(made, Case):
            search.units.append(made)
        else:
            search.problems.append((name, made))
    search.units.sort(key=lambda case: case.name)
    note_missing_masks(search, volumes_beside(search.units), root)
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
