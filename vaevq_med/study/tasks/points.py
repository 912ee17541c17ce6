"""A row of a study of downstream tasks at one setting, and its figures over the cases."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from vaevq_med.evaluation.volumes import FIGURES as VOLUME_FIGURES
from vaevq_med.metrics.preservation import SIZES, lesion_recall
from vaevq_med.study.rates.candidates import Candidate
from vaevq_med.study.rates.curves import Spread
from vaevq_med.study.tasks.features import feature_distance
from vaevq_med.tasks.detectability import Detection, detection, smallest_detected
from vaevq_med.tasks.radiomics import Reproducibility, frechet_radiomics_distance, reproducibility

RELIABLE = 0.9
"""Intraclass correlation above which a feature counts as reproduced."""


def of_case(record: Mapping[str, Any]) -> dict[str, float]:
    """The figures that a record has by itself; one of contrasts is a mean over those that have it."""
    found = {"bytes": float(record["bytes"])}
    by_contrast = [one["figures"] for one in record["contrasts"].values()]
    for figure in VOLUME_FIGURES:
        values = [figures[figure.name] for figures in by_contrast if figure.name in figures]
        if values:
            found[figure.name] = sum(values) / len(values)
    for region, scores in (record["segmentation"] or {}).items():
        found |= {f"{name}_{region}": value for name, value in scores.items()}
        found[f"volume_error_ml_{region}"] = abs(scores["difference_ml"])
    return found


@dataclass(frozen=True)
class Seen:
    """What a feature network saw of all cases of a row at a setting.

    Attributes:
        distance: to the originals; NaN where that is not known.
        slices: that it is of.
        num_features: length of a slice's feature vector.
    """

    distance: float
    slices: int
    num_features: int


@dataclass(frozen=True)
class Point:
    """A row at a setting.

    Attributes:
        row: whose it is.
        setting: which.
        title: in tables.
        records: by name of the case.
        originals: likewise, of the originals.
        edges: where small lesions end and large ones begin, in ml; None where that is not known.
    """

    row: Candidate
    setting: float
    title: str
    records: Mapping[str, Mapping[str, Any]]
    originals: Mapping[str, Mapping[str, Any]]
    edges: tuple[float, float] | None = None

    @cached_property
    def cases(self) -> Mapping[str, Mapping[str, float]]:
        """Figures of each case, beside them how far each Dice is from the original's."""
        found = {}
        for name, record in self.records.items():
            own, before = of_case(record), of_case(self.originals[name]) if name in self.originals else {}
            changes = {
                f"delta_{key}": own[key] - before[key] for key in own if key.startswith("dice_") and key in before
            }
            found[name] = own | changes
        return found

    def spread(self, figure: str) -> Spread:
        """A figure over the cases that have it, with an interval over patients; of some, of all cases at once."""
        if figure in self._pooled:
            value, source = self._pooled[figure]
            return Spread(value, math.nan, math.nan, 0 if math.isnan(value) else len(self._shared(source)))
        kept = [name for name, figures in self.cases.items() if figure in figures]
        return Spread.of([self.cases[name][figure] for name in kept], [self.records[name]["patient"] for name in kept])

    @cached_property
    def _pooled(self) -> Mapping[str, tuple[float, str]]:
        """Figures of all cases at once, and what of a record they are made of."""
        areas = [found.auc for found in self.detections.values()]
        distance = frechet_radiomics_distance(*(self._vectors(side) for side in (self.originals, self.records)))
        return {
            "rfid": (self.seen.distance, "features"),
            "frd": (distance, "radiomics"),
            "icc_share": (self.features.share(RELIABLE), "radiomics"),
            "icc_shape_share": (self.shapes.share(RELIABLE), "shapes"),
            "auc": (sum(areas) / len(areas) if areas else math.nan, "lesions"),
            "contrast_kept": (self._kept(), "lesions"),
            **{
                f"lesion_recall_{size}": (kept / there if there else math.nan, "sizes")
                for size, (kept, there) in zip(SIZES, self.lesions, strict=False)
            },
        }

    @cached_property
    def seen(self) -> Seen:
        """What the network of the perceptual distance saw, where every case has its features here and as original.

        A distance of some cases would be of fewer slices than the others', and so larger.
        """
        names = self._shared("features")
        results, originals = (
            [side[name]["features"].read() for name in names] for side in (self.records, self.originals)
        )
        kept = [pooled for pooled in (*results, *originals) if pooled is not None]
        if not names or len(names) != len(self.records) or len(kept) != 2 * len(names):
            return Seen(math.nan, 0, 0)
        distance = feature_distance(kept[: len(names)], kept[len(names) :])
        return Seen(distance, sum(map(len, kept[: len(names)])), kept[0].shape[1])

    @cached_property
    def lesions(self) -> list[tuple[int, int]]:
        """How many lesions of each size are kept, and how many there are, over all cases; empty without sizes."""
        if self.edges is None:
            return []
        return lesion_recall(
            [lesion for name in self._shared("sizes") for lesion in self.records[name]["sizes"]], self.edges
        )

    @cached_property
    def features(self) -> Reproducibility:
        """How radiomics of the experts' regions come back."""
        return self._reproduced("radiomics")

    @cached_property
    def shapes(self) -> Reproducibility:
        """How the shapes of the regions that are found come back."""
        return self._reproduced("shapes")

    @cached_property
    def pairs(self) -> tuple[int, int]:
        """Regions of cases whose shape is found in the original and here, and those found in the original."""
        both = there = 0
        for name in self._shared("shapes"):
            own, wanted = (
                {key.rpartition("/")[0] for key in side[name]["shapes"]} for side in (self.records, self.originals)
            )
            both, there = both + len(own & wanted), there + len(wanted)
        return both, there

    def _shared(self, what: str) -> list[str]:
        """Cases that have something both here and in the originals."""
        return [
            name
            for name, record in self.records.items()
            if record.get(what) is not None and self.originals.get(name, {}).get(what) is not None
        ]

    def _reproduced(self, what: str) -> Reproducibility:
        names = self._shared(what)
        return reproducibility(
            [self.originals[name][what] for name in names], [self.records[name][what] for name in names]
        )

    def _vectors(self, records: Mapping[str, Mapping[str, Any]]) -> list[dict[str, float]]:
        """Features of each contrast and region of each case."""
        groups: dict[tuple[str, str], dict[str, float]] = {}
        for case in self._shared("radiomics"):
            for name, value in records[case]["radiomics"].items():
                group, _, feature = name.rpartition("/")
                groups.setdefault((case, group), {})[feature] = value
        return list(groups.values())

    @cached_property
    def detections(self) -> Mapping[tuple[float, float], Detection]:
        """By strength and diameter, rising, how well lesions are seen."""
        kinds: dict[tuple[float, float], list[tuple[float, float, str]]] = {}
        for record in self.records.values():
            for diameter, strength, present, absent in record["lesions"] or []:
                kinds.setdefault((strength, diameter), []).append((present, absent, record["patient"]))
        return {kind: detection(*zip(*kinds[kind], strict=True)) for kind in sorted(kinds)}

    def smallest(self, strength: float) -> float | None:
        """The smallest diameter from which on lesions of a strength are seen."""
        return smallest_detected([(d, found.auc) for (own, d), found in self.detections.items() if own == strength])

    def _kept(self) -> float:
        changes = []
        for records in (self.records, self.originals):
            lesions = [lesion for name in self._shared("lesions") for lesion in records[name]["lesions"]]
            changes.append(sum(present - absent for _, _, present, absent in lesions))
        return changes[0] / changes[1] if changes[1] else math.nan
