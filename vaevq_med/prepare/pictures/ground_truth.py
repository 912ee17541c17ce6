"""The classes of ILSVRC2012's validation images, which lie in one flat folder or archive."""

from __future__ import annotations

import csv
import io
import re
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from vaevq_med.core.errors import DataError

_WNID = re.compile(r"n\d{8}")
_NUMBER = re.compile(r"(\d+)$")
_DEVKIT_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
_CANDIDATES = (
    "LOC_val_solution.csv",
    "ILSVRC2012_devkit_t12.tar.gz",
    f"ILSVRC2012_devkit_t12/data/{_DEVKIT_TRUTH}",
    f"data/{_DEVKIT_TRUTH}",
    _DEVKIT_TRUTH,
    "imagenet_2012_validation_synset_labels.txt",
    "val.txt",
)


@dataclass(frozen=True)
class GroundTruth:
    """Classes by name, or by the number in a file's name.

    Attributes:
        path: file that it was read from.
        by_name: class by the image's stem; an ``int`` counts the sorted classes from 0.
        by_number: class of image 1, 2, ...; empty where names are given.
    """

    path: Path
    by_name: Mapping[str, str | int]
    by_number: Sequence[str]

    def class_of(self, name: str, classes: Sequence[str]) -> str | None:
        """The class of an image, or None if it is not in the list.

        Args:
            name: of the image's file, e.g. ``ILSVRC2012_val_00000293.JPEG``.
            classes: all classes, sorted, which numbers count.
        """
        stem = PurePosixPath(name).stem
        if self.by_number:
            match = _NUMBER.search(stem)
            number = int(match[1]) if match else 0
            return self.by_number[number - 1] if 1 <= number <= len(self.by_number) else None
        found = self.by_name.get(stem)
        if isinstance(found, int):
            return classes[found] if found < len(classes) else None
        return found


def find_ground_truth(folders: Sequence[Path]) -> Path | None:
    """The first file of a known name in any of the folders, or None."""
    return next((f / name for f in folders for name in _CANDIDATES if (f / name).is_file()), None)


def read_ground_truth(path: Path) -> GroundTruth:
    """Read any of the forms in circulation.

    Args:
        path: the devkit (its archive, folder, or ground-truth file with ``meta.mat`` beside it); Kaggle's
            ``LOC_val_solution.csv``; a WordNet id a line, in the order of the images; or ``name class`` a line, the
            class a WordNet id, any other name, or the position among the sorted classes from 0 on.

    Raises:
        DataError: it is none of them.
    """
    try:
        if path.is_dir():
            path = next(iter(sorted(path.glob(f"**/{_DEVKIT_TRUTH}"))), path / _DEVKIT_TRUTH)
        if path.name.endswith((".tar.gz", ".tgz", ".tar")):
            text, meta = _from_archive(path)
            return GroundTruth(path, {}, _by_identifiers(path, text.split(), meta))
        text = path.read_text(encoding="utf-8-sig")
        words = [line.replace(",", " ").split() for line in text.splitlines() if line.strip()]
        if words and all(len(line) == 1 and line[0].isdecimal() for line in words):
            beside = path.parent / "meta.mat"
            if not beside.is_file():
                raise DataError(
                    f"ground truth {path}: found numbers without meta.mat beside it, which says what they mean, "
                    "expected the devkit's folder or archive"
                )
            return GroundTruth(path, {}, _by_identifiers(path, [line[0] for line in words], beside.read_bytes()))
    except (OSError, UnicodeDecodeError, tarfile.TarError) as error:
        raise DataError(f"ground truth {path}: found no readable file ({error}), expected one") from None
    if words and all(len(line) == 1 and _WNID.fullmatch(line[0]) for line in words):
        return GroundTruth(path, {}, [line[0] for line in words])
    if path.suffix.lower() == ".csv":
        rows = [row for row in csv.reader(io.StringIO(text)) if len(row) >= 2 and row[1].split()]
        return GroundTruth(path, {PurePosixPath(r[0]).stem: r[1].split()[0] for r in rows if r[0] != "ImageId"}, ())
    if words and all(len(line) == 2 for line in words):
        return GroundTruth(path, {PurePosixPath(n).stem: int(c) if c.isdecimal() else c for n, c in words}, ())
    raise DataError(
        f"ground truth {path}: found other text, expected the devkit, LOC_val_solution.csv, a WordNet id a line, or a "
        "file name and a class a line"
    )


def _from_archive(path: Path) -> tuple[str, bytes]:
    """The devkit's ground truth and ``meta.mat``."""
    found: dict[str, bytes] = {}
    with tarfile.open(path) as archive:
        for member in archive:
            name = PurePosixPath(member.name).name
            if name in (_DEVKIT_TRUTH, "meta.mat") and (stream := archive.extractfile(member)) is not None:
                found[name] = stream.read()
    if len(found) != 2:
        raise DataError(f"ground truth {path}: found no {_DEVKIT_TRUTH} or no meta.mat in it, expected both")
    return found[_DEVKIT_TRUTH].decode("ascii", "replace"), found["meta.mat"]


def _by_identifiers(path: Path, identifiers: Sequence[str], meta: bytes) -> list[str]:
    """Class of each image, from the devkit's identifiers, whose order is not that of the sorted WordNet ids."""
    from scipy.io import loadmat

    try:
        synsets = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        names = {int(s["ILSVRC2012_ID"]): str(s["WNID"]) for s in np.atleast_1d(synsets)}
        return [names[int(identifier)] for identifier in identifiers]
    except (KeyError, ValueError, TypeError, IndexError, NotImplementedError) as error:
        raise DataError(f"ground truth {path}: found a meta.mat that does not fit it ({error}), expected one") from None
