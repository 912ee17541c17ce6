"""Radiomics of a region: features that IBSI defines, how they survive, and the Frechet distance of their vectors.

Names, formulas and reference values are those of the Image Biomarker Standardisation Initiative (IBSI 1,
arXiv 1612.07003; Zwanenburg et al., Radiology 2020). ``pyradiomics`` has no wheel for Python 3.11 or later and its
source does not build there, so that the set is what SciPy, scikit-image and SimpleITK give: intensity statistics, the
intensity histogram, the co-occurrence matrix of gray levels, and the shape of a mask.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.metrics.agreement import IntraclassCorrelation, intraclass_correlation
from vaevq_med.metrics.statistics import FeatureStatistics, frechet_distance

Features = dict[str, float]
LEVELS = 32
"""Gray levels of the window: a fixed bin size of 1/32, which does not move with a region's range."""
LEAST_SUBJECTS = 3
"""Fewest subjects that an intraclass correlation is told of."""
NOTHING_AT_EMPTINESS = (
    "volume_voxel_counting",
    "surface_area",
    "maximum_3d_diameter",
    "major_axis_length",
    "minor_axis_length",
    "least_axis_length",
)
"""Features of a shape that are 0 of an empty region; the others have no value of one."""
_ANGLES = (0, math.pi / 4, math.pi / 2, 3 * math.pi / 4)
_CO_OCCURRENCE = {
    "joint_variance": "variance",
    "angular_second_moment": "ASM",
    "contrast": "contrast",
    "dissimilarity": "dissimilarity",
    "inverse_difference_moment": "homogeneity",
    "correlation": "correlation",
}
"""IBSI's name to that of scikit-image."""


def gray_levels(unit: NDArray[np.floating], mask: NDArray[np.bool_], levels: int = LEVELS) -> NDArray[np.uint8]:
    """Gray levels of equal width over the window; 0 outside of a region.

    Args:
        unit: intensities in [0, 1], of any shape; what lies beyond counts as the end.
        mask: of the region, of the same shape.
        levels: how many, at most 255.

    Returns:
        From 1 to ``levels`` in the region.

    Example:
        >>> gray_levels(np.array([0.0, 0.49, 0.5, 1.0]), np.array([True, True, True, True]), levels=2).tolist()
        [1, 1, 2, 2]
    """
    binned = np.clip(np.floor(np.asarray(unit, np.float64) * levels) + 1, 1, levels)
    return np.where(mask, binned, 0).astype(np.uint8)


def intensity_features(values: NDArray[np.floating]) -> Features:
    """IBSI's intensity-based statistics (Sec. 3.3) but for the energy, which tells the size of the region.

    Args:
        values: intensities of the voxels of a region, one or more; of any unit.

    Returns:
        By name. Without a spread, skewness and kurtosis are 0; a coefficient whose divisor is 0 is 0.
    """
    x = np.asarray(values, np.float64).ravel()
    low, first, median, third, high = np.percentile(x, [10, 25, 50, 75, 90])
    mean, variance = float(x.mean()), float(x.var())
    centered = x - mean
    flat = math.isclose(float(np.ptp(x)), 0, abs_tol=1e-12 * max(1.0, abs(mean)))
    robust = x[(x >= low) & (x <= high)]
    return {
        "mean": mean,
        "variance": variance,
        "skewness": 0.0 if flat else float((centered**3).mean() / variance**1.5),
        "kurtosis": 0.0 if flat else float((centered**4).mean() / variance**2) - 3,
        "median": float(median),
        "minimum": float(x.min()),
        "percentile_10": float(low),
        "percentile_90": float(high),
        "maximum": float(x.max()),
        "interquartile_range": float(third - first),
        "range": float(np.ptp(x)),
        "mean_absolute_deviation": float(np.abs(centered).mean()),
        "robust_mean_absolute_deviation": float(np.abs(robust - robust.mean()).mean()),
        "median_absolute_deviation": float(np.abs(x - median).mean()),
        "coefficient_of_variation": math.sqrt(variance) / mean if mean else 0.0,
        "quartile_coefficient_of_dispersion": float((third - first) / (third + first)) if third + first else 0.0,
        "root_mean_square": math.sqrt(float(np.square(x).mean())),
    }


def texture_features(levels: NDArray[np.integer]) -> Features:
    """The histogram's entropy and uniformity, and IBSI's features of the co-occurrence matrix (Sec. 3.6).

    The matrix is symmetric, of neighbors at distance 1 in the four directions of a slice, merged over directions and
    slices (IBSI's "2.5D, merged"), as voxels of MRI are often longer across slices.

    Args:
        levels: gray levels from 1 on, ``[Z, Y, X]``; 0 is outside of the region.

    Returns:
        By name; those of the matrix are absent where no two voxels of a slice are neighbors.
    """
    from skimage.feature import graycomatrix, graycoprops

    inside = levels[levels > 0]
    if not inside.size:
        raise VaevqMedError("levels: found an empty region, expected a voxel or more")
    shares = np.bincount(inside)[1:] / inside.size
    found = {"histogram_entropy": _bits(shares), "histogram_uniformity": float(np.square(shares).sum())}
    top = int(inside.max()) + 1
    counts = np.zeros((top, top))
    for piece in levels[(levels > 0).any(axis=(1, 2))]:
        counts += graycomatrix(piece.astype(np.uint8), [1], _ANGLES, top, symmetric=True).sum(axis=(2, 3))
    matrix = counts[1:, 1:]
    if not matrix.sum():
        return found
    stacked = matrix[:, :, None, None]
    found |= {name: float(graycoprops(stacked, theirs)[0, 0]) for name, theirs in _CO_OCCURRENCE.items()}
    found["joint_average"] = float(graycoprops(stacked, "mean")[0, 0]) + 1  # levels count from 1
    found["joint_entropy"] = _bits(matrix / matrix.sum())
    return found


def _bits(shares: NDArray[np.float64]) -> float:
    kept = shares[shares > 0]
    return float(-(kept * np.log2(kept)).sum()) + 0.0


def region_features(unit: NDArray[np.floating], mask: NDArray[np.bool_]) -> Features | None:
    """Intensities and texture of a region.

    Args:
        unit: intensities, ``[Z, Y, X]`` in [0, 1].
        mask: of the region, bool ``[Z, Y, X]``.

    Returns:
        By name; None for an empty region.
    """
    box = _box(mask)
    if box is None:
        return None
    piece, inside = unit[box], mask[box]
    return intensity_features(piece[inside]) | texture_features(gray_levels(piece, inside))


def shape_features(mask: NDArray[np.bool_], spacing: Sequence[float]) -> Features | None:
    """IBSI's morphological features (Sec. 3.1) that SimpleITK's ``LabelShapeStatistics`` gives.

    Args:
        mask: of the region, bool ``[Z, Y, X]``.
        spacing: of voxels along Z, Y and X, in mm.

    Returns:
        By name, in mm, mm² and mm³; None for an empty region. Elongation and flatness are 1 for a sphere and fall.
    """
    import SimpleITK as sitk  # noqa: N813

    box = _box(mask)
    if box is None:
        return None
    image = sitk.GetImageFromArray(mask[box].astype(np.uint8))
    image.SetSpacing([float(length) for length in reversed(spacing)])
    filtered = sitk.LabelShapeStatisticsImageFilter()
    filtered.ComputeFeretDiameterOn()
    filtered.Execute(image)
    least, minor, major = (math.sqrt(max(0.0, moment)) for moment in sorted(filtered.GetPrincipalMoments(1)))
    return {
        "volume_voxel_counting": float(filtered.GetPhysicalSize(1)),
        "surface_area": float(filtered.GetPerimeter(1)),
        "sphericity": float(filtered.GetRoundness(1)),
        "maximum_3d_diameter": float(filtered.GetFeretDiameter(1)),
        "major_axis_length": 4 * major,
        "minor_axis_length": 4 * minor,
        "least_axis_length": 4 * least,
        "elongation": minor / major if major else 1.0,
        "flatness": least / major if major else 1.0,
    }


def _box(mask: NDArray[np.bool_]) -> tuple[slice, ...] | None:
    """The smallest box around a mask; None where it is empty."""
    found = []
    for axis in range(3):
        places = np.flatnonzero(mask.any(axis=tuple(other for other in range(3) if other != axis)))
        if not places.size:
            return None
        found.append(slice(int(places[0]), int(places[-1]) + 1))
    return tuple(found)


@dataclass(frozen=True)
class Reproducibility:
    """How features of originals come back.

    Attributes:
        correlations: of each feature that has one.
        constant: features that are the same in every subject and both ways, which have no correlation.
        rare: features of fewer than three subjects.
        lost: features without a correlation that some result lacks where its original has one, which count as not
            reproduced.
    """

    correlations: Mapping[str, IntraclassCorrelation]
    constant: tuple[str, ...]
    rare: tuple[str, ...]
    lost: tuple[str, ...] = ()

    def share(self, above: float = 0.9, *, kind: str = "agreement") -> float:
        """Share of the features, those that are lost among them, with a correlation above a bound; NaN without any.

        Args:
            above: the bound.
            kind: ``agreement`` or ``consistency``.
        """
        values = [getattr(found, kind) for found in self.correlations.values()]
        count = len(values) + len(self.lost)
        return sum(value > above for value in values) / count if count else math.nan


def reproducibility(
    originals: Sequence[Mapping[str, float]], results: Sequence[Mapping[str, float]]
) -> Reproducibility:
    """The intraclass correlation of each feature between originals and what came back.

    What a result lacks and its original has was erased: a feature of :data:`NOTHING_AT_EMPTINESS` is 0 there, and
    another one is lost.

    Args:
        originals: features of each subject by name, or by ``GROUP/NAME``; one that a subject lacks is left out there.
        results: of the same subjects in the same order.

    Raises:
        VaevqMedError: they are not of equally many subjects.
    """
    if len(originals) != len(results):
        raise VaevqMedError(f"results: found {len(results)} subjects, expected the {len(originals)} of the originals")
    correlations: dict[str, IntraclassCorrelation] = {}
    constant: list[str] = []
    rare: list[str] = []
    lost: list[str] = []
    for name in dict.fromkeys(name for subject in originals for name in subject):
        own = [(one[name], other.get(name)) for one, other in zip(originals, results, strict=True) if name in one]
        erased = any(value is None for _, value in own)
        if len(own) < LEAST_SUBJECTS:
            rare.append(name)
            continue
        if erased and name.rpartition("/")[2] not in NOTHING_AT_EMPTINESS:
            lost.append(name)
            continue
        found = intraclass_correlation([(value, 0.0 if other is None else other) for value, other in own])
        undefined = math.isnan(found.agreement) or math.isnan(found.consistency)
        if undefined and erased:
            lost.append(name)
        elif undefined:
            constant.append(name)
        else:
            correlations[name] = found
    return Reproducibility(correlations, tuple(constant), tuple(rare), tuple(lost))


def frechet_radiomics_distance(
    originals: Sequence[Mapping[str, float]], results: Sequence[Mapping[str, float]]
) -> float:
    """Frechet radiomics distance (arXiv 2412.01496): of vectors of features, in units of the originals' spread.

    Each feature is brought to mean 0 and deviation 1 over the originals, as the authors' second version does. One
    that is constant over the originals is left out, and so is a region that lacks a feature of another.

    Args:
        originals: features of each region by name.
        results: of any regions.

    Returns:
        The distance; NaN for fewer than two regions on a side, or without a feature.
    """
    names = [*dict.fromkeys(name for one in originals for name in one)]
    rows = [
        [[one[name] for name in names] for one in side if one.keys() >= set(names)] for side in (originals, results)
    ]
    if min(map(len, rows)) < 2:
        return math.nan
    first, second = map(np.array, rows)
    deviation = first.std(axis=0)
    kept = deviation > 1e-12 * np.maximum(1.0, np.abs(first.mean(axis=0)))
    if not kept.any():
        return math.nan
    sides = [torch.from_numpy((side - first.mean(axis=0))[:, kept] / deviation[kept]) for side in (second, first)]
    return max(0.0, frechet_distance(FeatureStatistics.of(sides[0]), FeatureStatistics.of(sides[1])))
