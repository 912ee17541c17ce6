"""What the integers of a segmentation mean, by release: they changed from one BraTS year to another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vaevq_med.core.errors import DataError


@dataclass(frozen=True)
class LabelMap:
    """The labels of one release.

    Attributes:
        name: what ``--label-map`` calls it.
        labels: value to name, without the background's 0.
        regions: nested regions, as BraTS evaluates them, to the values that they consist of.
        to_brats2024: value here to the value of the nearest meaning in :data:`BRATS2024`.
    """

    name: str
    labels: Mapping[int, str]
    regions: Mapping[str, tuple[int, ...]]
    to_brats2024: Mapping[int, int]

    def check(self, found: set[int]) -> None:
        """Refuse a segmentation with other values.

        Raises:
            DataError: ``found`` has a value that is neither 0 nor a label.
        """
        unknown = sorted(found - {0, *self.labels})
        if unknown:
            raise DataError(
                f"found label {', '.join(map(str, unknown))} in the segmentation, expected some of "
                f"0, {', '.join(map(str, self.labels))} ({self.name}); name another map with --label-map"
            )

    def convert(self, labels: NDArray[np.uint8], target: LabelMap) -> NDArray[np.uint8]:
        """Express labels in another map.

        Args:
            labels: any shape, values of this map.
            target: this map, or :data:`BRATS2024`.

        Returns:
            The same shape, in the values of ``target``.

        Raises:
            DataError: ``target`` is a third map.
        """
        if target.name == self.name:
            return labels
        if target.name != BRATS2024.name:
            raise DataError(f"found target label map {target.name}, expected {self.name} or {BRATS2024.name}")
        table = np.zeros(256, np.uint8)
        for value, converted in self.to_brats2024.items():
            table[value] = converted
        return table[labels]


BRATS2021 = LabelMap(
    "brats2021",
    {1: "NCR", 2: "ED", 4: "ET"},
    {"whole_tumor": (1, 2, 4), "tumor_core": (1, 4), "enhancing_tumor": (4,)},
    {1: 1, 2: 2, 4: 3},
)
"""BraTS 2017 to 2021: necrotic core, edema, enhancing tumor."""

BRATS2024 = LabelMap(
    "brats2024",
    {1: "NETC", 2: "SNFH", 3: "ET", 4: "RC"},
    {"whole_tumor": (1, 2, 3), "tumor_core": (1, 3), "enhancing_tumor": (3,)},
    {1: 1, 2: 2, 3: 3, 4: 4},
)
"""BraTS 2023 and 2024: non-enhancing tumor core, surrounding non-enhancing FLAIR hyperintensity, enhancing
tumor, resection cavity (2024 only; no part of a region)."""

BRATS2024_PED = LabelMap(
    "brats2024-ped",
    {1: "ET", 2: "NET", 3: "CC", 4: "ED"},
    {"whole_tumor": (1, 2, 3, 4), "tumor_core": (1, 2, 3), "enhancing_tumor": (1,)},
    {1: 3, 2: 1, 3: 1, 4: 2},
)
"""BraTS-PEDs 2024 (arXiv 2404.15009): enhancing, non-enhancing, cystic component, edema. The 2023 release
under the same file names had merged them into BRATS2024's 1, 2, 3."""

DECATHLON = LabelMap(
    "decathlon",
    {1: "edema", 2: "non-enhancing tumor", 3: "enhancing tumor"},
    {"whole_tumor": (1, 2, 3), "tumor_core": (2, 3), "enhancing_tumor": (3,)},
    {1: 2, 2: 1, 3: 3},
)
"""Medical Segmentation Decathlon, Task01_BrainTumour (arXiv 1902.09063)."""

LABEL_MAPS: Mapping[str, LabelMap] = {m.name: m for m in (BRATS2021, BRATS2024, BRATS2024_PED, DECATHLON)}


def label_map(name: str) -> LabelMap:
    """The map of that name.

    Raises:
        DataError: there is none.
    """
    if name not in LABEL_MAPS:
        raise DataError(f"label map: found {name!r}, expected one of {', '.join(LABEL_MAPS)}")
    return LABEL_MAPS[name]
