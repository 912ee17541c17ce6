"""Intervals of means by the bootstrap, over what is independent.

The images of one patient resemble each other, so they are not independent: where there are patients, whole patients are
drawn (cluster bootstrap).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
LEVEL = 0.05


def independent_units(patients: Sequence[str]) -> tuple[str, NDArray[np.int64]]:
    """What is independent of some images, ``patients`` or ``images``, and the number of the unit of each image.

    Patients where at least two are named; otherwise images.

    Args:
        patients: of each image; empty strings where there are none.

    Examples:
        >>> independent_units(["b", "a", "b"])
        ('patients', array([1, 0, 1]))
    """
    names = sorted({name for name in patients if name})
    if len(names) < 2 or not all(patients):
        return "images", np.arange(len(patients))
    number = {name: i for i, name in enumerate(names)}
    return "patients", np.array([number[name] for name in patients])


def bootstrap_interval(
    values: NDArray[np.float64],
    units: NDArray[np.int64],
    *,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of the mean over images when whole units are drawn with replacement.

    Args:
        values: one figure an image, ``[N]``.
        units: number of each image's unit, from 0 on, ``[N]``.
        resamples: draws.
        level: 1 minus the interval's coverage.
        seed: seed of the draws.

    Returns:
        The lower and the upper end; NaN for fewer than two units.
    """
    sums = np.bincount(units, weights=values)
    counts = np.bincount(units).astype(float)
    if len(counts) < 2:
        return math.nan, math.nan
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    block = max(1, 2_000_000 // len(counts))
    for first in range(0, resamples, block):
        drawn = rng.integers(0, len(counts), size=(min(block, resamples - first), len(counts)))
        means[first : first + block] = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.quantile(means, [level / 2, 1 - level / 2])
    return float(low), float(high)
