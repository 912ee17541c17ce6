"""Generated images in a folder: PNG files, and a list of their labels where there is one."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from vaevq_med.errors import DataError, ItemError, VaevqMedError, root_cause

LIST_NAME = "samples.csv"


@dataclass(frozen=True)
class Sample:
    """A generated image.

    Attributes:
        name: path below the folder.
        label: what it was made for, or empty.
    """

    name: str
    label: str = ""


def find_samples(folder: str | Path) -> list[Sample]:
    """The generated images of a folder.

    Args:
        folder: with PNG files at any depth; where it has a ``samples.csv`` with the columns ``file`` and ``label``, the
            files that this names, in its order, and otherwise all, sorted.

    Raises:
        DataError: there is no such folder, it has no PNG files, or the list is not what was expected.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"{root}: found no folder, expected one of generated PNG files")
    if (root / LIST_NAME).is_file():
        samples = _listed(root)
    else:
        names = (path.relative_to(root) for path in root.rglob("*.png") if path.is_file())
        samples = [Sample(name.as_posix()) for name in sorted(names) if name.name[0] != "."]
    if not samples:
        raise DataError(f"{root}: found no PNG files, expected generated images")
    return samples


def _listed(root: Path) -> list[Sample]:
    path = root / LIST_NAME
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or []
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: found an unreadable list ({error}), expected CSV with file,label") from error
    if "file" not in columns:
        raise DataError(f"{path}: found the columns {', '.join(columns) or 'none'}, expected file and label")
    samples: dict[str, Sample] = {}
    for number, row in enumerate(rows, start=2):
        name = (row["file"] or "").strip()
        if not name.endswith(".png") or name.startswith("/") or ".." in name.split("/"):
            raise DataError(f"{path}: line {number}: found the file {name!r}, expected a .png inside the folder")
        if name in samples:
            raise DataError(f"{path}: line {number}: found {name} a second time, expected each file once")
        if not (root / name).is_file():
            raise DataError(f"{path}: line {number}: found no file {name}, expected one for each line")
        samples[name] = Sample(name, (row.get("label") or "").strip())
    return list(samples.values())


def image_side(folder: str | Path, samples: Sequence[Sample]) -> int:
    """Side in pixels of generated images, all squares of one size; only the files' headers are read.

    Raises:
        DataError: they are not, or one cannot be read.
    """
    sizes: dict[tuple[int, int], str] = {}
    for sample in samples:
        path = Path(folder) / sample.name
        try:
            with Image.open(path) as image:
                sizes.setdefault(image.size, sample.name)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(f"{path}: found an unreadable image ({error}), expected PNG") from error
    width, height = next(iter(sizes))
    if len(sizes) > 1 or width != height:
        found = ", ".join(f"{w}x{h} ({example})" for (w, h), example in list(sizes.items())[:3])
        raise DataError(f"{folder}: found images of {found}, expected squares of one size; name one with --image-size")
    return width


class SampleDataset(Dataset[dict[str, Any]]):
    """Generated images, read by the transform that the real ones are read by.

    Args:
        folder: of the files.
        samples: which of them.
        transform: from an entry of a datalist to an item.
        max_items: keep at most this many, evenly spaced.
    """

    def __init__(
        self,
        folder: str | Path,
        samples: Sequence[Sample],
        transform: Callable[[Mapping[str, Any]], Mapping[str, Any]],
        *,
        max_items: int | None = None,
    ) -> None:
        self.folder = Path(folder)
        if max_items is not None and max_items < len(samples):
            samples = [samples[i] for i in np.linspace(0, len(samples) - 1, max_items).round().astype(int)]
        self.samples = list(samples)
        self.transform = transform

    def __len__(self) -> int:
        """Number of images."""
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """``image`` of one file.

        Raises:
            ItemError: it cannot be read.
        """
        try:
            item = self.transform({"image": str(self.folder / self.samples[index].name)})
        except Exception as error:
            cause = root_cause(error)
            if isinstance(cause, VaevqMedError):
                raise ItemError(str(cause)) from None
            raise
        return {"image": item["image"]}
