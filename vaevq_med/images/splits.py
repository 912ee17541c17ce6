"""Dealing patients to training, validation and test."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from vaevq_med.core.errors import DataError
from vaevq_med.core.options import expect, is_int, is_number
from vaevq_med.images.manifest import SPLITS


@dataclass(frozen=True)
class SplitRule:
    """How patients are dealt to splits; what training and validation leave is the test split.

    Attributes:
        seed: another seed deals the patients anew.
        training: share of the patients, in [0, 1].
        validation: share of the patients, in [0, 1].
    """

    seed: int = 0
    training: float = 0.8
    validation: float = 0.1

    def __post_init__(self) -> None:
        expect(is_int(self.seed, 0, 2**63 - 1), "split.seed", self.seed, "a whole number from 0")
        for name in ("training", "validation"):
            expect(is_number(getattr(self, name), 0, 1), f"split.{name}", getattr(self, name), "a share in [0, 1]")
        total = self.training + self.validation
        expect(total <= 1 + 1e-9, "split.training + split.validation", total, "at most 1")


def patient_position(patient: str, seed: int = 0) -> float:
    """Where a patient falls in [0, 1); it depends on the seed and the name alone.

    The first 53 bits of SHA-256 over ``"{seed}:{patient}"``, as a fraction.

    Args:
        patient: the patient's name.
        seed: another seed gives another order.
    """
    digest = hashlib.sha256(f"{seed}:{patient}".encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


def split_by_hash(patients: Iterable[str], rule: SplitRule) -> dict[str, str]:
    """Deal patients by the hash of their names, so that new patients move nobody.

    Args:
        patients: names.
        rule: seed and shares.

    Returns:
        Patient to split.

    Examples:
        >>> split_by_hash(["a", "b"], SplitRule(training=1.0, validation=0.0))
        {'a': 'training', 'b': 'training'}
    """
    splits = {}
    for patient in patients:
        position = patient_position(patient, rule.seed)
        if position < rule.training:
            splits[patient] = "training"
        elif position < rule.training + rule.validation:
            splits[patient] = "validation"
        else:
            splits[patient] = "test"
    return splits


def read_split_file(path: str | Path) -> dict[str, str]:
    """Read who stands in which split.

    Args:
        path: JSON with an object from patient to split, or CSV with the columns ``patient`` and ``split``.

    Returns:
        Patient to split.

    Raises:
        DataError: the file cannot be read, names an unknown split, or a patient twice.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"split file {path}: found no readable file ({error}), expected JSON or CSV") from error
    pairs = _csv_pairs(path, text) if path.suffix.lower() == ".csv" else _json_pairs(path, text)
    splits: dict[str, str] = {}
    for patient, split in pairs:
        if split not in SPLITS:
            raise DataError(
                f"split file {path}: found split {split!r} for patient {patient!r}, expected one of {', '.join(SPLITS)}"
            )
        if splits.setdefault(patient, split) != split:
            raise DataError(
                f"split file {path}: found patient {patient!r} in {splits[patient]} and {split}, expected one split"
            )
    return splits


def split_by_file(patients: Iterable[str], path: str | Path) -> dict[str, str]:
    """Deal patients as a file says.

    Args:
        patients: names; the file may hold others too.
        path: as for :func:`read_split_file`.

    Returns:
        Patient to split.

    Raises:
        DataError: the file is invalid or does not name a patient.
    """
    given = read_split_file(path)
    wanted = list(patients)
    absent = sorted(set(wanted) - set(given))
    if absent:
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        raise DataError(f"split file {path}: found no patient {absent[0]}{more}, expected every patient of the input")
    return {patient: given[patient] for patient in wanted}


def _json_pairs(path: Path, text: str) -> list[tuple[str, str]]:
    try:
        pairs = json.loads(text, object_pairs_hook=list)
    except (ValueError, RecursionError) as error:
        raise DataError(f"split file {path}: found invalid JSON ({error}), expected an object") from error
    if not text.lstrip().startswith("{") or not all(isinstance(split, str) for _, split in pairs):
        raise DataError(f'split file {path}: found other JSON, expected an object such as {{"patient": "training"}}')
    return [(patient, split) for patient, split in pairs]


def _csv_pairs(path: Path, text: str) -> list[tuple[str, str]]:
    reader = csv.DictReader(io.StringIO(text), skipinitialspace=True)
    try:
        columns, rows = reader.fieldnames or [], list(reader)
    except csv.Error as error:
        raise DataError(f"split file {path}: found no readable CSV ({error}), expected one with a header") from error
    if not {"patient", "split"} <= set(columns):
        raise DataError(f"split file {path}: found columns {', '.join(columns) or 'none'}, expected patient and split")
    return [((row["patient"] or "").strip(), (row["split"] or "").strip()) for row in rows]


def count_patients(splits: Mapping[str, str]) -> dict[str, int]:
    """How many patients stand in each split, for every one of :data:`SPLITS`."""
    assigned = list(splits.values())
    return {split: assigned.count(split) for split in SPLITS}
