"""What a token store says of the images that it was made from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vaevq_med.core.errors import DataError
from vaevq_med.images.dataset import SliceDataset
from vaevq_med.images.manifest import Manifest


def label_of(manifest: Manifest, *, stacked: bool) -> dict[str, Any]:
    """What the labels of a data set stand for.

    Args:
        manifest: its datalist.
        stacked: whether an item is all contrasts of a slice, which leaves no contrast to tell apart.

    Returns:
        ``kind``, which is ``modality`` (the contrast of an MRI), ``class`` or ``none``, and ``names``, by number.

    Raises:
        DataError: the numbers do not go from 0 up.
    """
    for kind, key in (("modality", "modality"), ("class", "labels")):
        names = manifest.content.get(key)
        if names and not (stacked and kind == "modality"):
            if set(names) != set(map(str, range(len(names)))):
                raise DataError(
                    f"{manifest.path}: found {key} numbers {', '.join(list(names)[:5])}, expected 0 to {len(names) - 1}"
                )
            return {"kind": kind, "names": [names[str(number)] for number in range(len(names))]}
    return {"kind": "none", "names": []}


def describe_items(images: SliceDataset, names: Sequence[str]) -> list[dict[str, Any]]:
    """``id`` (the path in the data set), ``patient``, ``modality`` and ``label`` of images, as far as they have them.

    Args:
        images: a split.
        names: of the labels; without any, items have no label.

    Raises:
        DataError: an image's label is none of them.
    """
    root = images.manifest.path.parent
    items = []
    for entry in images.data:
        image = entry["image"]
        item: dict[str, Any] = {"id": Path(image if isinstance(image, str) else image[0]).relative_to(root).as_posix()}
        item |= {key: str(entry[key]) for key in ("patient", "modality") if key in entry}
        if names:
            number = entry.get("label")
            if not isinstance(number, int) or not 0 <= number < len(names):
                raise DataError(f"{root}: found label {number} of {item['id']}, expected 0 to {len(names) - 1}")
            item["label"] = number
        items.append(item)
    return items
