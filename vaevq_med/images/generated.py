"""Generated images in a folder: PNG files, and a list of their labels where there is one."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import Dataset

from vaevq_med.core.errors import DataError, as_item_error
from vaevq_med.core.picks import evenly_spaced
from vaevq_med.images.pixels import read_image

LIST_NAME = "samples.csv"
SETTINGS_NAME = "generation.json"
DRAWING_NAME = "drawing.json"
_CHANNEL = re.compile(r"-channel\d+\.png$")
_COLORED, _DARK = 0.25, 0.1
"""Saturation above which an image is in color, and brightness up to which a pixel does not count.

A tokenizer of three equal channels decodes them almost equal; three stacked contrasts of BraTS are at 0.3 to 0.7.
"""


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
        DataError: there is no such folder, it has no PNG files, the list is not what was expected or missing beside a
            ``generation.json``, or the files hold the channels of stacked contrasts.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"{root}: found no folder, expected one of generated PNG files")
    if (root / LIST_NAME).is_file():
        samples = _listed(root)
    elif (root / SETTINGS_NAME).is_file():
        raise DataError(
            f"{root}: found {SETTINGS_NAME} without {LIST_NAME}, expected both; the same generate command goes on"
        )
    else:
        names = (path.relative_to(root) for path in root.rglob("*.png") if path.is_file())
        samples = [Sample(name.as_posix()) for name in sorted(names) if name.name[0] != "."]
    if not samples:
        raise DataError(f"{root}: found no PNG files, expected generated images")
    for sample in samples:
        if _CHANNEL.search(sample.name):
            raise DataError(
                f"{root}: found {sample.name}, one channel of stacked contrasts, expected images, gray or in color"
            )
    return samples


def generation_record(folder: str | Path) -> dict[str, Any]:
    """What a run of ``generate.json`` wrote of the samples of a folder in ``generation.json``; empty where it has none.

    Raises:
        DataError: it cannot be read.
    """
    path = Path(folder) / SETTINGS_NAME
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: found an unreadable file ({error}), expected a JSON record of a generate run"
        ) from None
    if not isinstance(record, dict):
        raise DataError(f"{path}: found {type(record).__name__}, expected a JSON record of a generate run")
    return record


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


def _header(path: Path) -> tuple[tuple[int, int], str]:
    """Width and height of an image, and PIL's name of the mode of its pixels."""
    try:
        with Image.open(path) as image:
            return image.size, image.mode
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: found an unreadable image ({error}), expected PNG") from error


def image_side(folder: str | Path, samples: Sequence[Sample]) -> int:
    """Side in pixels of generated images, all squares of one size; only the files' headers are read.

    Raises:
        DataError: they are not, or one cannot be read.
    """
    sizes: dict[tuple[int, int], str] = {}
    for sample in samples:
        size, _ = _header(Path(folder) / sample.name)
        sizes.setdefault(size, sample.name)
    width, height = next(iter(sizes))
    if len(sizes) > 1 or width != height:
        found = ", ".join(f"{w}x{h} ({example})" for (w, h), example in list(sizes.items())[:3])
        raise DataError(f"{folder}: found images of {found}, expected squares of one size; name one with --image-size")
    return width


def _check_gray(path: Path) -> None:
    """Refuse an image in color; of a gray file only the header is read."""
    if _header(path)[1] == "L":
        return
    pixels = read_image(path)
    brightest = pixels.amax(0)
    shown = brightest > _DARK
    saturation = float((brightest - pixels.amin(0))[shown].sum() / brightest[shown].sum().clamp(min=_DARK))
    if saturation > _COLORED:
        raise DataError(
            f"{path}: found a color image (saturation {saturation:.2f}), expected a gray one as the data set's are"
        )


class SampleDataset(Dataset[dict[str, Any]]):
    """Generated images, read by the transform that the real ones are read by.

    Args:
        folder: of the files.
        samples: which of them.
        transform: from an entry of a datalist to an item.
        max_items: keep at most this many, evenly spaced.
        gray: refuse images in color.
    """

    def __init__(
        self,
        folder: str | Path,
        samples: Sequence[Sample],
        transform: Callable[[Mapping[str, Any]], Mapping[str, Any]],
        *,
        max_items: int | None = None,
        gray: bool = False,
    ) -> None:
        self.folder = Path(folder)
        self.gray = gray
        self.samples = [samples[i] for i in evenly_spaced(len(samples), max_items)]
        self.transform = transform

    def __len__(self) -> int:
        """Number of images."""
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """``image`` of one file.

        Raises:
            ItemError: it cannot be read, or is in color where it is to be gray.
        """
        path = self.folder / self.samples[index].name
        with as_item_error():
            if self.gray:
                _check_gray(path)
            return {"image": self.transform({"image": str(path)})["image"]}
