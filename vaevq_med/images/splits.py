"""Dealing patients to training, validation and test."""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, ValidationInfo

from vaevq_med.core.errors import DataError
from vaevq_med.core.folder import RECIPE, SPLIT_FILE
from vaevq_med.core.options import Number, Options
from vaevq_med.images.manifest import FILE_NAME, SPLITS, load_manifest
from vaevq_med.images.patients import person_of

"""Who stands in which split of a data set; ``--split-file`` takes it too."""


def _with_training(validation: Number, info: ValidationInfo) -> Number:
    if validation + info.data.get("training", 0) > 1 + 1e-9:
        raise ValueError
    return validation


class SplitRule(Options):
    """How patients are dealt to splits; what training and validation leave is the test split.

    Attributes:
        seed: another seed deals the patients anew.
        training: share of the patients.
        validation: share of the patients.
    """

    seed: int = Field(default=0, ge=0, le=2**63 - 1, description="a whole number from 0")
    training: Number = Field(default=0.8, ge=0, le=1, description="a share in [0, 1]")
    validation: Annotated[Number, AfterValidator(_with_training)] = Field(
        default=0.1, ge=0, le=1, description="a share in [0, 1], with training at most 1"
    )


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
    """Deal by the hash of the names alone, so that every copy and every part of a data set is dealt alike.

    A small data set may miss its shares by much: see :func:`split_by_rule`.

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


def split_by_rule(patients: Iterable[str], rule: SplitRule, dealt: Mapping[str, str] | None = None) -> dict[str, str]:
    """Deal patients by quota: each split gets its share of them all, to within one.

    Who was dealt before keeps the split, under whichever of a person's names. The others are taken in the order of the
    hashes of their names, training first, so that a choice depends neither on the order they come in nor on chance.

    Args:
        patients: all that are to stand in a split; one name for each person, see :func:`one_name_each`.
        rule: seed and shares.
        dealt: splits of an earlier deal; it may hold other patients too.

    Returns:
        Patient to split.

    Examples:
        >>> sorted(split_by_rule(["a", "b", "c"], SplitRule(training=0.7, validation=0.3)).values())
        ['training', 'training', 'validation']
    """
    wanted = sorted(set(patients))
    before = split_of_persons(dealt or {})
    splits = {name: before[person_of(name)] for name in wanted if person_of(name) in before}
    new = sorted((name for name in wanted if name not in splits), key=lambda name: patient_position(name, rule.seed))
    shares = {
        "training": rule.training,
        "validation": rule.validation,
        "test": max(0.0, 1 - rule.training - rule.validation),
    }
    lacking = {split: shares[split] * len(wanted) - count for split, count in count_patients(splits).items()}
    quota = dict.fromkeys(SPLITS, 0)
    for _ in new:
        split = max(SPLITS, key=lambda name: lacking[name])
        quota[split] += 1
        lacking[split] -= 1
    order = (split for split in SPLITS for _ in range(quota[split]))
    return splits | dict(zip(new, order, strict=True))


def split_of_persons(splits: Mapping[str, str]) -> dict[str, str]:
    """The split of each person; of one whose names stand in several, the first, since that may have been trained on.

    Args:
        splits: patient to split.

    Returns:
        What :func:`person_of` says, to split.

    Examples:
        >>> split_of_persons({"Brats18_TCIA02_151": "test", "Brats17_TCIA_151": "training"})
        {'brats tcia 151': 'training'}
    """
    found: dict[str, str] = {}
    for patient, split in splits.items():
        person = person_of(patient)
        found[person] = min(found.get(person, split), split, key=SPLITS.index)
    return found


def remembered_splits(dataset_dir: Path, rule: SplitRule) -> dict[str, str]:
    """Who was dealt to which split of a data set by this rule; none where it was another one, or there is no data set.

    Args:
        dataset_dir: folder of the data set.
        rule: of the deal to come.

    Raises:
        DataError: the data set's recipe or its file of splits is damaged, so that patients might move.
    """
    path = dataset_dir / RECIPE
    try:
        before = SplitRule.read(json.loads(path.read_text(encoding="utf-8"))["split"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError, DataError) as error:
        if getattr(error, "errno", None) in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
            return {}
        raise DataError(
            f"{path}: found it damaged ({type(error).__name__}: {' '.join(str(error).split())}), expected that of "
            "the data set that is there; without it patients would be dealt anew, which deleting the file allows"
        ) from None
    if before != rule:
        return {}
    if (dataset_dir / SPLIT_FILE).is_file():
        return read_split_file(dataset_dir / SPLIT_FILE)
    # A data set from before there was such a file.
    if not (dataset_dir / FILE_NAME).is_file():
        return {}
    manifest = load_manifest(dataset_dir)
    return {entry["patient"]: split for split in SPLITS for entry in manifest.entries(split) if "patient" in entry}


def remembered_patients(dataset_dir: Path) -> dict[str, str]:
    """What the patient of each case is called in the datalist of a data set; empty where there is none.

    Args:
        dataset_dir: folder of the data set.

    Returns:
        Case to patient.

    Raises:
        DataError: the datalist is damaged.
    """
    if not (dataset_dir / FILE_NAME).is_file():
        return {}
    manifest = load_manifest(dataset_dir)
    entries = (entry for split in SPLITS for entry in manifest.entries(split))
    return {str(entry["case"]): str(entry["patient"]) for entry in entries if "case" in entry and "patient" in entry}


def dealt_before(earlier: Mapping[str, Collection[str]], dealt: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Where patients stand already, under whichever names they had.

    Args:
        earlier: patient to all names that it has or had.
        dealt: splits of an earlier deal.

    Returns:
        For each patient the names that were dealt, with their splits; empty for who is new.

    Examples:
        >>> dealt_before({"anna": ["anna", "Brats18_TCIA02_151"], "bo": ["bo"]}, {"Brats17_TCIA_151": "test"})
        {'anna': {'Brats18_TCIA02_151': 'test'}, 'bo': {}}
    """
    persons = split_of_persons(dealt)
    return {
        patient: {
            name: dealt.get(name, persons.get(person_of(name), ""))
            for name in sorted(names)
            if name in dealt or person_of(name) in persons
        }
        for patient, names in earlier.items()
    }


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
        patients: names; the file may hold others too, or name these as another release does.
        path: as for :func:`read_split_file`.

    Returns:
        Patient to split.

    Raises:
        DataError: the file is invalid, does not name a patient, or names one in two splits.
    """
    given = read_split_file(path)
    wanted = list(patients)
    persons = {person_of(patient): patient for patient in wanted}
    found: dict[str, str] = {}
    for name in given:
        first = found.setdefault(person_of(name), name)
        if given[first] != given[name] and person_of(name) in persons:
            raise DataError(
                f"split file {path}: found {first} in {given[first]} and {name} in {given[name]}, who are one patient; "
                "expected one split"
            )
    absent = sorted(patient for person, patient in persons.items() if person not in found)
    if absent:
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        raise DataError(f"split file {path}: found no patient {absent[0]}{more}, expected every patient of the input")
    return {patient: given[found[person_of(patient)]] for patient in wanted}


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
