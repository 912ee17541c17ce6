"""Curves of rate against distortion: read at a rate, and compared by Bjontegaard's delta rate (VCEG-M33, 2001).

Both interpolate over the logarithm of the rate by a monotone cubic (PCHIP), volume by volume; what is told is a mean
over volumes, with an interval over patients.
"""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.core.intervals import bootstrap_interval

Array = NDArray[np.float64]
LEAST_OVERLAP = 0.25
"""Share of an anchor's range of a figure that a curve has to cover for a delta rate."""


@dataclass(frozen=True)
class Curve:
    """A row on one volume, by rising rate.

    Attributes:
        patient: whose volume.
        case: which examination of the patient.
        contrast: which of its volumes.
        settings: of each point.
        rates: bits a voxel of each point, rising.
        figures: by name, one of each point.
    """

    patient: str
    case: str
    contrast: str
    settings: tuple[float, ...]
    rates: Array
    figures: Mapping[str, Array]

    def at(self, rate: float, figure: str) -> float:
        """A figure at a rate; NaN outside of the curve, which is not continued.

        Example:
            >>> curve = Curve("a", "a-0", "t1c", (1.0, 2.0), np.array([0.01, 1]), {"psnr_brain": np.array([20, 40])})
            >>> round(curve.at(0.1, "psnr_brain"), 6), curve.at(2.0, "psnr_brain")
            (30.0, nan)
        """
        values = self.figures.get(figure)
        if values is None or not self.rates[0] <= rate <= self.rates[-1]:
            return math.nan
        if len(self.rates) == 1:
            return float(values[0])
        from scipy.interpolate import PchipInterpolator

        return float(PchipInterpolator(np.log(self.rates), values)(math.log(rate)))


def curves_of(records: Sequence[Mapping[str, Any]]) -> list[Curve]:
    """The curves of one row's records, volume by volume; of points of one size the first is kept."""
    volumes: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for record in records:
        volumes.setdefault((record["contrast"], record["patient"], record["case"]), []).append(record)
    found = []
    for (contrast, patient, case), own in sorted(volumes.items()):
        points = list({record["bytes"]: record for record in sorted(own, key=lambda r: -r["bytes"])}.values())[::-1]
        rates = np.array([8 * record["bytes"] / record["voxels"] for record in points])
        names = set.intersection(*(set(record["figures"]) for record in points))
        figures = {name: np.array([record["figures"][name] for record in points]) for name in sorted(names)}
        found.append(Curve(patient, case, contrast, tuple(record["setting"] for record in points), rates, figures))
    return found


def check_delta_rates() -> Any:
    """The package of delta rates.

    Raises:
        VaevqMedError: it is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module("bjontegaard")
    except ImportError:
        raise VaevqMedError(
            'a delta rate needs bjontegaard, which is not installed; expected it: pip install "vaevq_med[codecs]"'
        ) from None


def delta_rate(anchor: Curve, curve: Curve, figure: str, *, higher_is_better: bool = True) -> float:
    """How many percent more bytes a curve takes than an anchor for the same figure; negative is fewer.

    Args:
        anchor: of the same volume.
        curve: what is compared with it.
        figure: that is the same.
        higher_is_better: otherwise the figure is taken with its sign turned.

    Returns:
        Bjontegaard's delta rate; NaN where the two share less than a quarter of the anchor's range.

    Raises:
        VaevqMedError: the package is not installed.
    """
    bjontegaard = check_delta_rates()
    sides = [_rising(c, figure, higher_is_better) for c in (anchor, curve)]
    (first_rates, first), (rates, values) = sides
    if len(first) < 2 or len(values) < 2:
        return math.nan
    shared = min(first[-1], values[-1]) - max(first[0], values[0])
    if shared < LEAST_OVERLAP * (first[-1] - first[0]):
        return math.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of an overlap below its own limit
        found = bjontegaard.bd_rate(
            first_rates, first, rates, values, method="pchip", require_matching_points=False, min_overlap=0
        )
    return float(found)


def _rising(curve: Curve, figure: str, higher_is_better: bool) -> tuple[Array, Array]:
    """Rates and figures of those points that are better than all smaller ones."""
    values = curve.figures.get(figure, np.empty(0)) * (1 if higher_is_better else -1)
    if not len(values):
        return values, values
    best = np.maximum.accumulate(values)
    keep = np.concatenate([[True], best[1:] > best[:-1]])
    return curve.rates[keep], values[keep]


@dataclass(frozen=True)
class Spread:
    """A mean over volumes, those with a value.

    Attributes:
        mean: NaN without any.
        low: lower end of the 95 % interval over patients; NaN for fewer than two patients.
        high: upper end.
        n: volumes.
    """

    mean: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float], patients: Sequence[str]) -> Spread:
        """Of one value a volume; NaN is left out."""
        kept = [(value, patient) for value, patient in zip(values, patients, strict=True) if not math.isnan(value)]
        if not kept:
            return cls(math.nan, math.nan, math.nan, 0)
        names = sorted({patient for _, patient in kept})
        units = np.array([names.index(patient) for _, patient in kept])
        array = np.array([value for value, _ in kept])
        return cls(float(array.mean()), *bootstrap_interval(array, units, resamples=2000), len(kept))

    def to_json(self) -> dict[str, Any]:
        """With None for what is NaN."""
        return {name: None if isinstance(v, float) and math.isnan(v) else v for name, v in vars(self).items()}
