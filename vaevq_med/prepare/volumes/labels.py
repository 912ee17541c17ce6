"""What the integers of a segmentation mean, by release: they changed from one BraTS year to another."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vaevq_med.core.errors import DataError

_CHANCE = 0.001
"""A value is missed when so few data sets of its release would lack it."""


class UnknownLabelError(DataError):
    """A segmentation has values that its map lacks.

    Attributes:
        values: all that the segmentation has.
    """

    def __init__(self, message: str, values: Collection[int]) -> None:
        super().__init__(message)
        self.values = frozenset(values) - {0}


@dataclass(frozen=True)
class LabelMap:
    """The labels of one release.

    Attributes:
        name: what ``--label-map`` calls it.
        labels: value to name, without the background's 0.
        regions: nested regions, as BraTS evaluates them, to the values that they consist of.
        to_brats2024: value here to the value of the nearest meaning in :data:`BRATS2024`.
        shares: value to the share of a release's cases, in (0, 1], that have it at the least, a low guess over its
            tumors; a value that a whole release may lack is absent.
        companions: value to another, without which no data set has it.
    """

    name: str
    labels: Mapping[int, str]
    regions: Mapping[str, tuple[int, ...]]
    to_brats2024: Mapping[int, int]
    shares: Mapping[int, float]
    companions: Mapping[int, int] = field(default_factory=dict)

    def check(self, found: set[int]) -> None:
        """Refuse a segmentation with other values.

        Raises:
            UnknownLabelError: ``found`` has a value that is neither 0 nor a label.
        """
        unknown = sorted(found - {0, *self.labels})
        if unknown:
            raise UnknownLabelError(
                f"found label {', '.join(map(str, unknown))} in the segmentation, expected some of "
                f"0, {', '.join(map(str, self.labels))} ({self.name}); name another map with --label-map",
                found,
            )

    def contradiction(self, cases: Sequence[Collection[int]]) -> str | None:
        """What speaks against this map in the segmentations of a data set, in words; None where nothing does.

        Args:
            cases: values that occur in each segmentation.

        Examples:
            >>> BRATS2024.contradiction([{1, 2, 4}])
            'found label 4 (RC) but no 3 (ET) in 1 segmentation'
            >>> BRATS2024.contradiction([{1, 2}]), BRATS2024.contradiction([{1, 2}] * 10)
            (None, 'found no label 3 (ET) in 10 segmentations')
        """
        found = frozenset[int]().union(*cases)
        where = f"in {len(cases)} segmentation{'s' if len(cases) > 1 else ''}"
        outside = sorted(found - {0, *self.labels})
        if outside:
            return f"found label {', '.join(map(str, outside))} {where}"
        for value, other in self.companions.items():
            if value in found and other not in found:
                return f"found label {self._named(value)} but no {self._named(other)} {where}"
        missed = [v for v, share in self.shares.items() if v not in found and (1 - share) ** len(cases) < _CHANCE]
        return f"found no label {', '.join(map(self._named, missed))} {where}" if missed else None

    def _named(self, value: int) -> str:
        return f"{value} ({self.labels[value]})"

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
    {1: 0.5, 2: 0.5, 4: 0.5},
)
"""BraTS 2017 to 2021: necrotic core, edema, enhancing tumor."""

BRATS2024 = LabelMap(
    "brats2024",
    {1: "NETC", 2: "SNFH", 3: "ET", 4: "RC"},
    {"whole_tumor": (1, 2, 3), "tumor_core": (1, 3), "enhancing_tumor": (3,)},
    {1: 1, 2: 2, 3: 3, 4: 4},
    {1: 0.3, 2: 0.5, 3: 0.5},
    {4: 3},
)
"""BraTS 2023 and 2024: non-enhancing tumor core, surrounding non-enhancing FLAIR hyperintensity, enhancing
tumor, resection cavity (2024 only; no part of a region)."""

BRATS2024_PED = LabelMap(
    "brats2024-ped",
    {1: "ET", 2: "NET", 3: "CC", 4: "ED"},
    {"whole_tumor": (1, 2, 3, 4), "tumor_core": (1, 2, 3), "enhancing_tumor": (1,)},
    {1: 3, 2: 1, 3: 1, 4: 2},
    {1: 0.5, 2: 0.5, 3: 0.3, 4: 0.3},
)
"""BraTS-PEDs 2024 (arXiv 2404.15009): enhancing, non-enhancing, cystic component, edema. The 2023 release
under the same file names had merged them into BRATS2024's 1, 2, 3."""

DECATHLON = LabelMap(
    "decathlon",
    {1: "edema", 2: "non-enhancing tumor", 3: "enhancing tumor"},
    {"whole_tumor": (1, 2, 3), "tumor_core": (2, 3), "enhancing_tumor": (3,)},
    {1: 2, 2: 1, 3: 3},
    {1: 0.5, 2: 0.5, 3: 0.5},
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


def fitting_maps(name: str, cases: Sequence[Collection[int]]) -> list[str]:
    """Names of maps that fit the segmentations of a data set better than one: the values that they miss are fewest.

    Args:
        name: of the map that something speaks against.
        cases: values that occur in each segmentation.

    Examples:
        >>> fitting_maps("brats2024", [{1, 2, 4}]), fitting_maps("brats2021", [{1, 2, 3}])
        (['brats2021'], ['brats2024', 'decathlon'])
        >>> fitting_maps("brats2024", [{1, 2}] * 10), fitting_maps("brats2024", [{9}])
        ([], [])
    """
    found = frozenset[int]().union(*cases)
    missed = {m.name: len(set(m.shares) - found) for m in LABEL_MAPS.values() if m.contradiction(cases) is None}
    if found <= {0, *LABEL_MAPS[name].labels}:
        own = len(set(LABEL_MAPS[name].shares) - found)
        missed = {other: count for other, count in missed.items() if count < own}
    return [other for other, count in missed.items() if count == min(missed.values())]


class LabelCensus:
    """The values that occur in the segmentations of a data set, by their map and whether a user stated it."""

    def __init__(self) -> None:
        self._values: dict[tuple[str, bool], list[Collection[int]]] = defaultdict(list)

    def add(self, name: str, stated: bool, values: Collection[int] | None) -> None:
        """Take a case in.

        Args:
            name: of its map.
            stated: whether a user named the map.
            values: of its segmentation; None where it has none.
        """
        if values is not None:
            self._values[name, stated].append(values)

    def judge(self, where: str) -> Iterator[str]:
        """Remarks on maps that were stated against what the values say.

        Args:
            where: the segmentations stand, for a message.

        Raises:
            DataError: the values speak against a map that nobody stated.
        """
        for (name, stated), cases in sorted(self._values.items()):
            words = label_map(name).contradiction(cases)
            if words is None:
                continue
            fitting = fitting_maps(name, cases)
            fits = f"{' or '.join(fitting)} would fit" if fitting else "no other map would fit"
            if not stated:
                raise DataError(
                    f"{where}: {words}, expected those of {name}, as the files' names say; {fits}. Name the map with "
                    f"--label-map, {name} too if it is right"
                )
            yield f"{words}, although the label map {name} was named; {fits}"

    def facts(self) -> list[dict[str, Any]]:
        """Of each map, how many segmentations have each of its values, for a report."""
        return [
            {
                "map": name,
                "named": stated,
                "segmentations": len(cases),
                "with": {str(value): sum(value in case for case in cases) for value in label_map(name).labels},
            }
            for (name, stated), cases in sorted(self._values.items())
        ]
