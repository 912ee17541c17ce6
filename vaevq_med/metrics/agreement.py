"""How far two measurements of the same subjects agree: intraclass correlation (McGraw and Wong, 1996)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike


@dataclass(frozen=True)
class IntraclassCorrelation:
    """Of single measurements; NaN where it is not defined.

    Attributes:
        consistency: ICC(C,1), ICC(3,1) of Shrout and Fleiss: a constant shift between the measurements does not count.
        agreement: ICC(A,1), ICC(2,1) of Shrout and Fleiss: a shift counts.
    """

    consistency: float
    agreement: float


def intraclass_correlation(measurements: ArrayLike) -> IntraclassCorrelation:
    """Intraclass correlation of two-way models (Shrout and Fleiss, 1979; McGraw and Wong, 1996).

    With the mean squares of subjects R, of measurements C and of the residual E, of n subjects and k measurements,
    ``ICC(C,1) = (R - E) / (R + (k - 1) E)`` and ``ICC(A,1) = (R - E) / (R + (k - 1) E + k (C - E) / n)``.

    Args:
        measurements: ``[n, k]``: a row a subject, a column a way of measuring, in any unit.

    Returns:
        Both; NaN for fewer than two subjects or two measurements, a value that is not finite, and where nothing
        varies, which leaves 0 / 0.

    Example:
        >>> found = intraclass_correlation([[1.0, 2.0], [2.0, 3.0], [3.0, 4.0]])
        >>> round(found.consistency, 6), round(found.agreement, 6)
        (1.0, 0.666667)
    """
    values = np.asarray(measurements, np.float64)
    if values.ndim != 2 or min(values.shape) < 2 or not np.isfinite(values).all():
        return IntraclassCorrelation(math.nan, math.nan)
    n, k = values.shape
    # A constant of ten digits would leave rounding in the place of a spread of 0.
    scale = float(np.abs(values).max())
    centered = values - values.mean()
    if np.abs(centered).max() <= 1e-12 * scale:
        return IntraclassCorrelation(math.nan, math.nan)
    subjects, ways = centered.mean(axis=1, keepdims=True), centered.mean(axis=0, keepdims=True)
    between = k * float(np.square(subjects).sum()) / (n - 1)
    shift = n * float(np.square(ways).sum()) / (k - 1)
    residual = float(np.square(centered - subjects - ways).sum()) / ((n - 1) * (k - 1))
    consistency = between + (k - 1) * residual
    agreement = consistency + k * (shift - residual) / n
    return IntraclassCorrelation(
        (between - residual) / consistency if consistency > 0 else math.nan,
        (between - residual) / agreement if agreement > 0 else math.nan,
    )
