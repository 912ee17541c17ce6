"""Whom the images of a folder show: a table says it, or a pattern finds it in the files' names."""

from __future__ import annotations

import csv
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path, PurePosixPath

from vaevq_med.core.errors import DataError

People = dict[str, tuple[str, str]]
"""Patient and case of each image, by its path below the input."""


def by_pattern(names: Collection[str], pattern: str) -> People:
    r"""What a regular expression finds in the files' names, or in their paths where it has a slash.

    Args:
        names: paths of the images below the input.
        pattern: with a group ``patient``, and ``case`` where a patient has several; without, a patient is one case.

    Raises:
        DataError: it does not find a patient in each.

    Examples:
        >>> by_pattern(["cat/12_left.png"], r"^(?P<patient>\d+)_")
        {'cat/12_left.png': ('12', '12')}
        >>> by_pattern(["p1/12.png"], r"(?P<patient>[^/]+)/(?P<case>\d+)")
        {'p1/12.png': ('p1', '12')}
    """
    people: People = {}
    for name in names:
        found = re.search(pattern, name if "/" in pattern else PurePosixPath(name).name)
        values = found.groupdict() if found is not None else {}
        if values.get("patient"):
            people[name] = values["patient"], values.get("case") or values["patient"]
    return _complete(names, people, f"recipe patient {pattern!r}")


def by_table(names: Collection[str], path: Path, folder: Path | None) -> People:
    """What a CSV with the columns ``file``, ``patient`` and, where a patient has several, ``case`` says.

    Args:
        names: paths of the images below the input.
        path: the table; its files are named as in ``names``.
        folder: the input, whose other files the table may name too; None allows any.

    Raises:
        DataError: it cannot be read, names a file twice, one that is not there, or not every image.
    """
    people: People = {}
    for line, row in _rows(path):
        file, patient, case = ((row.get(key) or "").strip() for key in ("file", "patient", "case"))
        if not file or not patient:
            raise DataError(f"patients {path}: line {line}: found no {'patient' if file else 'file'}, expected one")
        name = PurePosixPath(file).as_posix()
        if name.startswith("/") or ".." in PurePosixPath(name).parts:
            raise DataError(f"patients {path}: line {line}: found {file}, expected a path below the input")
        if name in people:
            raise DataError(f"patients {path}: line {line}: found {file} a second time, expected each file once")
        people[name] = patient, case or patient
    others = sorted(set(people) - set(names)) if folder is not None else []
    absent = [name for name in others if not _is_file(Path(folder or "", name))]
    if absent:
        raise DataError(
            f"patients {path}: found {absent[0]}{_more(absent)}, expected images by their paths below the input"
        )
    return _complete(names, people, f"patients {path}")


def _rows(path: Path) -> Iterator[tuple[int, dict[str, str | None]]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            if not {"file", "patient"} <= set(reader.fieldnames or ()):
                found = ", ".join(reader.fieldnames or ()) or "none"
                raise DataError(f"patients {path}: found the columns {found}, expected file, patient and perhaps case")
            for row in reader:
                yield reader.line_num, row
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"patients {path}: found no readable CSV ({error}), expected one with a header") from None


def _complete(names: Collection[str], people: People, source: str) -> People:
    """Patient and case of each image; a case that several patients have one of has its patient's name in front."""
    unnamed = [name for name in names if name not in people]
    if unnamed:
        raise DataError(f"{source}: found no patient of {unnamed[0]}{_more(unnamed)}, expected one of every image")
    owners: dict[str, set[str]] = {}
    for patient, case in people.values():
        owners.setdefault(case, set()).add(patient)
    return {
        name: (patient, case if len(owners[case]) == 1 else f"{patient}_{case}")
        for name, (patient, case) in people.items()
        if name in names
    }


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that no disk has
        return False


def _more(names: Sequence[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
