"""Spread over seeds, bootstrap over patients, and the paired test of the best method against the next.

The images of one patient resemble each other, so they are not independent: where there are patients, they are what is
resampled and tested (cluster bootstrap; Wilcoxon's signed-rank test over the patients' means).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath

import numpy as np
from numpy.typing import NDArray

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.core.intervals import LEVEL, independent_units
from vaevq_med.metrics.figures import Figure

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Images:
    """Per-image figures of one method, each averaged over its seeds.

    Attributes:
        keys: what identifies each image.
        patients: patient of each image; empty strings where there are none.
        values: metric to one figure an image.
    """

    keys: tuple[str, ...]
    patients: tuple[str, ...]
    values: Mapping[str, Array]

    def units(self) -> tuple[str, NDArray[np.int64]]:
        """What is independent, ``patients`` or ``images``, and the number of the unit that each image belongs to.

        Patients where at least two are named; otherwise images.
        """
        return independent_units(self.patients)

    def groups(self) -> tuple[str, NDArray[np.int64]]:
        """What pairs are made of, ``patient`` or ``image``, and the number of the group that each image belongs to.

        Patients wherever every image names one, be it the same, so that the images of one are never taken for many.
        """
        if not self.patients or not all(self.patients):
            return "image", np.arange(len(self.keys))
        return "patient", np.unique(self.patients, return_inverse=True)[1]


def _keys(rows: Sequence[Mapping[str, str]]) -> tuple[str, ...]:
    """What identifies the images wherever the data set's folder is: number in the split and file name."""
    return tuple(f"{row.get('index', '')} {PurePath(row['path']).name}" for row in rows)


def over_seeds(runs: Sequence[Sequence[Mapping[str, str]]], names: Iterable[str]) -> Images:
    """Average the rows of ``per_image.csv`` of one method's seeds.

    Args:
        runs: one list of rows a seed.
        names: of the figures.

    Raises:
        VaevqMedError: the seeds were not evaluated on the same images.
    """
    keys = _keys(runs[0])
    for rows in runs[1:]:
        if _keys(rows) != keys:
            raise VaevqMedError(
                f"found seeds evaluated on different images ({len(keys)} and {len(rows)}), expected the same ones; "
                "evaluate them again in another output folder"
            )
    values = {
        name: np.mean([[float(row[name]) for row in rows] for rows in runs], axis=0)
        for name in names
        if keys and all(name in row for rows in runs for row in rows)
    }
    return Images(keys, tuple(row.get("patient", "") for row in runs[0]), values)


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (NaN for fewer than two values).

    Example:
        >>> mean_and_spread([1.0, 3.0])
        (2.0, 1.4142135623730951)
    """
    if not values:
        return math.nan, math.nan
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


@dataclass(frozen=True)
class PairedTest:
    """Wilcoxon's signed-rank test, two-sided, of the best method against the next.

    Attributes:
        metric: what is compared.
        best: name of the best method by its mean.
        next: name of the second best.
        unit: ``patients`` or ``images``.
        n: pairs.
        difference: mean over the pairs of best minus next.
        p_value: None where it was not computed.
        note: why not, or what to keep in mind.
    """

    metric: str
    best: str
    next: str
    unit: str
    n: int
    difference: float
    p_value: float | None
    note: str = ""


def smallest_p_value(n: int) -> float:
    """The smallest two-sided p-value that n pairs can give: all of one sign, ``2 / 2^n``.

    Example:
        >>> smallest_p_value(5), smallest_p_value(6)
        (0.0625, 0.03125)
    """
    return min(1.0, 2.0 ** (1 - n))


def wilcoxon(differences: Array) -> float:
    """Two-sided p-value of scipy's signed-rank test, zero differences left out; 1 where all are zero."""
    from scipy.stats import wilcoxon as signed_rank

    moved = differences[differences != 0]
    return 1.0 if len(moved) == 0 else float(signed_rank(moved).pvalue)


def sign_test(better: int, worse: int) -> float:
    """Two-sided p-value of the sign test, whose pairs are better or worse by even chance; 1 of no pairs.

    Example:
        >>> sign_test(6, 0)
        0.03125
    """
    from scipy.stats import binomtest

    return float(binomtest(better, better + worse).pvalue) if better + worse else 1.0


def check_same_images(methods: Mapping[str, Images]) -> None:
    """Refuse two methods that were not evaluated on the same images.

    Args:
        methods: name to its images, two of them.

    Raises:
        VaevqMedError: naming both.
    """
    (best, first), (second, other) = methods.items()
    if first.keys != other.keys:
        raise VaevqMedError(
            f"methods {best} and {second}: found different images ({len(first.keys)} and {len(other.keys)}), expected "
            "the same ones; evaluate them again in another output folder"
        )


def best_against_next(figure: Figure, methods: Mapping[str, Images]) -> list[PairedTest]:
    """Test the best method against the next by one figure.

    Args:
        figure: of which each image has one.
        methods: name to its images.

    Returns:
        Nothing for fewer than two methods with the metric; one test over patients, or over images where there are
        no patients; where there are too few patients for a p-value below 0.05, a second over images, marked.

    Raises:
        VaevqMedError: best and next were not evaluated on the same images.
    """
    metric = figure.name
    having = {name: images for name, images in methods.items() if metric in images.values}
    if len(having) < 2 or figure.higher_is_better is None:
        return []
    sign = -1 if figure.higher_is_better else 1
    best, second = sorted(having, key=lambda name: sign * float(having[name].values[metric].mean()))[:2]
    first, other = having[best], having[second]
    check_same_images({best: first, second: other})
    differences = first.values[metric] - other.values[metric]
    unit, units = first.units()
    patients, images = len({name for name in first.patients if name}), len(differences)
    paired = np.bincount(units, weights=differences) / np.bincount(units)
    tests = []
    if patients:
        values = paired if unit == "patients" else differences
        enough = unit == "patients" and smallest_p_value(patients) < LEVEL
        note = (
            f"{patients} patient{'s' if patients > 1 else ''}: too few for any p-value below {LEVEL}: "
            f"the smallest possible is {smallest_p_value(patients):.3g}, 6 patients are needed"
        )
        said = (wilcoxon(paired), "") if enough else (None, note)
        tests.append(PairedTest(metric, best, second, "patients", patients, float(values.mean()), *said))
        if enough:
            return tests
    few = smallest_p_value(images) >= LEVEL
    note = "images of one patient are not independent, so the p-value is too small" if patients else ""
    if few:
        note = f"{images} image{'s' if images > 1 else ''}: too few for any p-value below {LEVEL}"
    p_value = None if few else wilcoxon(differences)
    return [*tests, PairedTest(metric, best, second, "images", images, float(differences.mean()), p_value, note)]


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's, of the points that have both figures.

    Attributes:
        rho: in [-1, 1]; NaN for fewer than three points, or where one of the figures is the same everywhere.
        p_value: two-sided, over permutations, all of them for up to seven points; NaN likewise.
        n: points.
    """

    rho: float
    p_value: float
    n: int


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> RankCorrelation:
    """Spearman's rank correlation with a p-value by permutations, which holds for a few points too.

    Args:
        first: a figure of each point.
        second: another; a point where either is NaN is left out.

    Example:
        >>> rank_correlation([1.0, 2.0, 3.0, 4.0], [1.0, 4.0, 9.0, 16.0]).rho
        1.0
    """
    from scipy.stats import permutation_test, rankdata

    pairs = np.array([pair for pair in zip(first, second, strict=True) if not any(map(math.isnan, pair))])
    if len(pairs) < 3:
        return RankCorrelation(math.nan, math.nan, len(pairs))
    x, y = (rankdata(column) - (len(pairs) + 1) / 2 for column in pairs.T)
    scale = math.sqrt(float(x @ x) * float(y @ y))
    if not scale:
        return RankCorrelation(math.nan, math.nan, len(pairs))

    def correlation(ranks: Array, axis: int) -> Array:
        return np.round((ranks * y).sum(axis=axis) / scale, 12)  # so that equal ones are equal

    found = permutation_test(
        (x,), correlation, permutation_type="pairings", vectorized=True, n_resamples=9999, rng=np.random.default_rng(0)
    )
    return RankCorrelation(float(found.statistic), float(found.pvalue), len(pairs))
