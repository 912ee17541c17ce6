"""Whom a network was trained on: names in a checkpoint, and hashes in place of them in what is given away.

A hash lets an evaluation refuse a patient of the training, and does not say a name. It is no secret where names follow
a scheme: who knows the scheme can try all of them. Each hash is therefore made slow, and salted by the network, so that
the lists of two networks cannot be laid side by side.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

from pydantic import Field

from vaevq_med.core.options import Options
from vaevq_med.images.patients import person_of

NAMES = "patients"
HASHES = "patient_hashes"
STARTED_FROM = "started_from"
"""Under which the data of a training says which file it started from, with the ``data`` of that one's training."""
_ROUNDS = 1000


class PatientHashes(Options):
    """Hashes of the persons of a training, as a packed bundle holds them.

    Attributes:
        method: of the hash.
        salt: of all of them, the hash of the network.
        rounds: of the method.
        digests: one a person, sorted, so that their order says nothing.
    """

    method: Literal["pbkdf2-hmac-sha256"] = "pbkdf2-hmac-sha256"
    salt: str
    rounds: int = Field(ge=1, le=100_000)
    digests: list[str]

    @classmethod
    def of(cls, patients: Iterable[str], salt: str) -> PatientHashes:
        """Hashes of patients' names, one a person."""
        empty = cls(salt=salt, rounds=_ROUNDS, digests=[])
        persons = {person_of(str(name)) for name in patients}
        return empty.model_copy(update={"digests": sorted(map(empty.digest, persons))})

    def digest(self, person: str) -> str:
        """Of a person, 32 hexadecimal digits."""
        return hashlib.pbkdf2_hmac("sha256", person.encode(), self.salt.encode(), self.rounds, dklen=16).hex()


class TrainingPatients:
    """The persons that a network was trained on.

    Args:
        data: what a checkpoint or a packed bundle says of its data; empty where nothing is known.
        where: the file, for messages.

    Raises:
        DataError: the hashes are not what was expected.

    Examples:
        >>> told = {HASHES: PatientHashes.of(["BraTS-GLI-00005"], "a").to_dict()}
        >>> TrainingPatients(told, "a.pt").among(["BraTS-GLI-00005", "BraTS-GLI-00006"])
        {'BraTS-GLI-00005'}
    """

    def __init__(self, data: Mapping[str, Any], where: str) -> None:
        self._persons = frozenset(person_of(str(name)) for name in data.get(NAMES) or ())
        told = data.get(HASHES)
        self._hashes = PatientHashes.read(told, f"{where}: {HASHES}") if told is not None else None
        self._digests = frozenset(self._hashes.digests if self._hashes is not None else ())

    def __len__(self) -> int:
        return len(self._persons) or len(self._digests)

    def among(self, patients: Iterable[str]) -> set[str]:
        """Those of some patients' persons that it was trained on, see :func:`vaevq_med.images.patients.person_of`."""
        persons = set(map(person_of, patients))
        hashes = self._hashes
        if hashes is None:
            return persons & self._persons
        return {person for person in persons if person in self._persons or hashes.digest(person) in self._digests}


def without_names(data: Mapping[str, Any], salt: str, *, hashes: bool = True) -> dict[str, Any]:
    """What a checkpoint says of its data, with hashes, or nothing, in place of the names of patients.

    So it is with the data of what the training started from.

    Args:
        data: as a checkpoint or a packed bundle has it.
        salt: of new hashes.
        hashes: keep hashes.
    """
    kept = {key: value for key, value in data.items() if key not in (NAMES, HASHES)}
    if hashes and data.get(HASHES) is not None:
        kept[HASHES] = data[HASHES]
    elif hashes and data.get(NAMES):
        kept[HASHES] = PatientHashes.of(data[NAMES], salt).to_dict()
    if kept.get(STARTED_FROM):
        before = kept[STARTED_FROM]
        kept[STARTED_FROM] = {**before, "data": without_names(before.get("data") or {}, salt, hashes=hashes)}
    return kept


def trainings(data: Mapping[str, Any], name: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """What is said of the data of a training and of those that it started from, each with the name of its file.

    Args:
        data: as a checkpoint or a packed bundle has it.
        name: of its file.

    Examples:
        >>> data = {STARTED_FROM: {"file": "best.pt", "data": {"split_hash": "b"}}, "split_hash": "a"}
        >>> [(name, one["split_hash"]) for name, one in trainings(data, "last.pt")]
        [('last.pt', 'a'), ('best.pt, which last.pt started from,', 'b')]
    """
    while data:
        yield name, data
        before = data.get(STARTED_FROM) or {}
        name, data = f"{before.get('file')}, which {name} started from,", before.get("data") or {}


def first_seen(data: Mapping[str, Any], name: str, patients: Iterable[str]) -> tuple[str, str] | None:
    """The first of some patients whom a training, or one that it started from, has seen, and the name of its file.

    Args:
        data: as a checkpoint or a packed bundle has it.
        name: of its file.
        patients: names.

    Returns:
        None where it has seen none of them.

    Examples:
        >>> first_seen({NAMES: ["anna", "berta"]}, "best.pt", ["clara", "berta"])
        ('berta', 'best.pt')
    """
    asked = sorted(set(patients))
    for where, trained in trainings(data, name):
        known = TrainingPatients(trained, where).among(asked)
        found = next((patient for patient in asked if person_of(patient) in known), None)
        if found is not None:
            return found, where
    return None
