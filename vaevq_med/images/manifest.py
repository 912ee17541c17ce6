"""The datalist of a slice data set, ``dataset.json``: schema, atomic writing, validated reading."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vaevq_med.core.errors import DataError
from vaevq_med.core.files import atomic_writer

FILE_NAME = "dataset.json"
SPLITS = ("training", "validation", "test")


@dataclass(frozen=True)
class Manifest:
    """A validated datalist.

    Attributes:
        path: its file.
        content: the whole JSON object.
    """

    path: Path
    content: Mapping[str, Any]

    def entries(self, split: str) -> Sequence[Mapping[str, Any]]:
        """Entries of ``training``, ``validation`` or ``test``.

        Raises:
            DataError: for another split.
        """
        if split not in SPLITS:
            raise DataError(f"split: found {split!r}, expected one of {', '.join(SPLITS)}")
        return self.content[split]

    @property
    def label_map(self) -> Mapping[str, Sequence[int]]:
        """Label values of each tumor region."""
        return self.content.get("label_map", {})

    @property
    def split_hash(self) -> str:
        """Hash of which image stands in which split."""
        return str(self.content.get("split_hash", ""))

    @property
    def content_hash(self) -> str:
        """Hash of the recipe, the entries and the images."""
        return str(self.content.get("content_hash", ""))

    def splitting_advice(self) -> str:
        """How images come into an empty split."""
        firsts = [entry for split in SPLITS for entry in self.entries(split)[:1]]
        if firsts and not any("patient" in entry and "modality" in entry for entry in firsts):
            return (
                "sort the images into folders train, val and test for vaevq-med imagenet-prepare, or see its --holdout"
            )
        return "name the patients of each split with: vaevq-med slice-extract INPUT OUTPUT --split-file FILE"

    def tags(self) -> dict[str, str]:
        """What an experiment tracker notes of the data set."""
        counts = {f"data.{split}": str(len(self.entries(split))) for split in SPLITS}
        return {
            "data.name": str(self.content.get("name", "")),
            "data.content_hash": self.content_hash,
            "data.split_hash": self.split_hash,
            **counts,
        }


def split_hash(entries: Mapping[str, Iterable[Mapping[str, Any]]]) -> str:
    """SHA-256 over the sorted ``split<TAB>image`` lines of a datalist, with the prefix ``sha256:``."""
    lines = sorted(f"{split}\t{entry['image']}" for split in SPLITS for entry in entries.get(split, ()))
    return "sha256:" + hashlib.sha256("\n".join(lines).encode()).hexdigest()


def write_manifest(root: Path, content: Mapping[str, Any]) -> Path:
    """Write ``dataset.json`` below ``root``, atomically, one entry a line.

    Args:
        root: folder of the data set.
        content: the JSON object; its splits may be iterators, which are never held in memory as a whole.

    Returns:
        The file.
    """
    path = root / FILE_NAME
    with atomic_writer(path) as file:
        head = {key: value for key, value in content.items() if key not in SPLITS}
        file.write(json.dumps(head, indent=1, ensure_ascii=False).removesuffix("\n}"))
        for number, split in enumerate(SPLITS):
            file.write((",\n" if head or number else "\n") + f" {json.dumps(split)}: [")
            separator = "\n"
            for entry in content[split]:
                file.write(f"{separator}  {json.dumps(entry, ensure_ascii=False)}")
                separator = ",\n"
            file.write("\n ]")
        file.write("\n}\n")
    return path


def load_manifest(dataset_dir: str | Path, *, required: Sequence[str] = ("image",)) -> Manifest:
    """Read and check the datalist of a data set of slices or photographs.

    Args:
        dataset_dir: folder of ``dataset.json``.
        required: what every entry must have.

    Raises:
        DataError: there is none, it is no such datalist, or an entry's path leaves the folder.
    """
    path = Path(dataset_dir) / FILE_NAME
    if not path.is_file():
        raise DataError(
            f"{path}: found no data set, expected one made by: vaevq-med slice-extract INPUT {dataset_dir} "
            f"(or imagenet-prepare)"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: found an unreadable file ({error}), expected a JSON datalist") from error
    if not isinstance(content, dict) or any(not isinstance(content.get(split), list) for split in SPLITS):
        raise DataError(
            f"{path}: found no lists {', '.join(SPLITS)}, expected a datalist of slice-extract or imagenet-prepare"
        )
    for split in SPLITS:
        for number, entry in enumerate(content[split]):
            _check_entry(entry, required, f"{path}: {split}[{number}]")
    return Manifest(path, content)


def _check_entry(entry: Any, required: Sequence[str], where: str) -> None:
    missing = [key for key in required if not isinstance(entry, dict) or key not in entry]
    if missing:
        raise DataError(f"{where}: found no {', '.join(missing)}, expected {', '.join(required)}")
    for key in ("image", "segmentation"):
        if key in entry:
            relative = entry[key]
            if not isinstance(relative, str) or relative.startswith("/") or ".." in relative.split("/"):
                raise DataError(f"{where}: found the {key} path {entry[key]!r}, expected one inside the data set")
    for key in ("slice", "label", "index"):
        if key in entry and not _is_whole(entry[key]):
            raise DataError(f"{where}: found the {key} {entry[key]!r}, expected a whole number")


def _is_whole(value: Any) -> bool:
    """Whether it is a number of an image or of a class, also one that a table wrote as text."""
    try:
        return abs(int(value)) < 2**31
    except (TypeError, ValueError, OverflowError):
        return False
