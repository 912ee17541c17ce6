"""Whose images they are: what the names of the BraTS releases and of the Decathlon say of a patient."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

_BRATS_2023 = re.compile(r"(BraTS-[A-Za-z]+-[0-9]+)-[0-9]+")
_BRATS_2019 = re.compile(r"(brats1[789]_[a-z0-9]+_[a-z0-9]+)_[0-9]+", re.IGNORECASE)
_SITE = re.compile(r"brats1[789]_(?P<site>[a-z0-9]+)_(?P<number>[a-z0-9]+)(_[0-9]+)?", re.IGNORECASE)
_RELEASES = {
    "BraTS 2017 to 2019": re.compile(r"brats1[789]_.+", re.IGNORECASE),
    "BraTS 2020": re.compile(r"brats20_.+", re.IGNORECASE),
    "BraTS 2021": re.compile(r"brats2021_.+", re.IGNORECASE),
    "BraTS 2023/2024": re.compile(r"BraTS-GLI-.+"),
    "the Decathlon": re.compile(r"BRATS_[0-9]+"),
}


def patient_of(case: str) -> str:
    """The patient of a case that is named as BraTS names them; other names are their own patient.

    Args:
        case: name of an examination.

    Examples:
        >>> patient_of("BraTS-GLI-00005-101"), patient_of("BraTS2021_00000"), patient_of("Brats18_TCIA01_131_1")
        ('BraTS-GLI-00005', 'BraTS2021_00000', 'Brats18_TCIA01_131')
    """
    match = _BRATS_2023.fullmatch(case) or _BRATS_2019.fullmatch(case)
    return match[1] if match else case


def person_of(patient: str) -> str:
    """What is the same for all names of a person, as far as names tell it; other names are their own.

    BraTS 2017 to 2019 name a patient by the site and a number, under the prefix of the year. In 2017 the sites of
    TCIA had no numbers of their own; those of the patients are different over all of them.

    Args:
        patient: name of a patient, or of a case of 2017 to 2019.

    Examples:
        >>> person_of("Brats17_TCIA_151"), person_of("BraTS19_TCIA02_151"), person_of("BraTS2021_00151")
        ('brats tcia 151', 'brats tcia 151', 'BraTS2021_00151')
    """
    match = _SITE.fullmatch(patient)
    if match is None:
        return patient
    site = re.sub("^tcia[0-9]+$", "tcia", match["site"].lower())
    return f"brats {site} {match['number'].lower()}"


def one_name_each(patients: Iterable[str], known: Collection[str] = ()) -> dict[str, str]:
    """Each patient's name to the one name that stands for the person: the first, of those that are known before others.

    Args:
        patients: names, of which several may be one person's.
        known: names that stand in a data set already.

    Examples:
        >>> one_name_each(["Brats18_TCIA02_151", "Brats17_TCIA_151", "anna"])
        {'Brats17_TCIA_151': 'Brats17_TCIA_151', 'Brats18_TCIA02_151': 'Brats17_TCIA_151', 'anna': 'anna'}
    """
    names = sorted(set(patients))
    chosen: dict[str, str] = {}
    for name in sorted(names, key=lambda name: name not in known):
        chosen.setdefault(person_of(name), name)
    return {name: chosen[person_of(name)] for name in names}


def sharing_releases(patients: Iterable[str]) -> list[tuple[str, str]]:
    """Releases that have patients in common under names that do not tell it, each with the first of these patients.

    Args:
        patients: names of patients or cases.

    Returns:
        At least two pairs of a release and a patient, or none.

    Examples:
        >>> sharing_releases(["BraTS2021_00001", "Brats18_TCIA02_151", "anna"])
        [('BraTS 2017 to 2019', 'Brats18_TCIA02_151'), ('BraTS 2021', 'BraTS2021_00001')]
        >>> sharing_releases(["Brats17_TCIA_151", "Brats18_TCIA02_151"])
        []
    """
    names = sorted(set(patients))
    firsts = ((release, next(filter(kind.fullmatch, names), None)) for release, kind in _RELEASES.items())
    found = [(release, first) for release, first in firsts if first is not None]
    return found if len(found) > 1 else []
