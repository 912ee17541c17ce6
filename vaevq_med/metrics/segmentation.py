"""How well masks agree with a reference: Dice, 95 % Hausdorff distance, lesions, volumes; defined for empty masks, too.

Conventions, as BraTS has them: where prediction and reference are both empty, Dice is 1 and the distance 0; where one
is, Dice is 0 and the distance the diagonal of the volume (373.13 mm of 240 x 240 x 155 voxels of 1 mm). So no score of
a patient is NaN, and none is left out of a mean.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.metrics.figures import Figure

Mask = NDArray[np.bool_]
LEAST_ML = 0.05
"""A part of less is no lesion beside larger ones: 50 voxels of 1 mm, as BraTS 2023 has it (arXiv 2305.17033)."""
_LIMIT = 1.96

FIGURES = (
    Figure(
        "dice",
        "Dice",
        3,
        higher_is_better=True,
        convention="2 |P and R| / (|P| + |R|) of a case's volume; 1 where both are empty",
    ),
    Figure(
        "hd95_mm",
        "HD95 (mm)",
        1,
        higher_is_better=False,
        convention="larger of the two 95th percentiles of the distances of one surface from the other; 0 where both "
        "are empty, the volume's diagonal where one is",
    ),
    Figure(
        "lesion_f1",
        "Lesion F1",
        3,
        higher_is_better=True,
        convention="2 TP / (lesions found + lesions there), a pair being those with an IoU above 0.5; 1 where there "
        "are none of either",
    ),
    Figure(
        "lesion_iou",
        "Lesion IoU",
        3,
        higher_is_better=True,
        convention="mean IoU of those pairs (segmentation quality of panoptic quality); 1 where there are no lesions "
        "of either, 0 where there is no pair",
    ),
    Figure(
        "panoptic_quality",
        "Panoptic quality",
        3,
        higher_is_better=True,
        convention="the product of both (arXiv 1801.00868)",
    ),
    Figure(
        "lesions_detected",
        "Lesions detected",
        3,
        higher_is_better=True,
        convention="share of the reference's lesions of whose voxels half or more are found; 1 where there are none",
    ),
    Figure("volume_ml", "Volume (ml)", 2, convention="of the prediction"),
    Figure("reference_ml", "Reference (ml)", 2, varies=False, convention="volume of the reference"),
    Figure("difference_ml", "Difference (ml)", 2, convention="volume of the prediction less that of the reference"),
)
"""What is measured of a region of a case, in the order of tables."""


def dice_of_counts(both: Tensor, found: Tensor, wanted: Tensor) -> Tensor:
    """Dice of counted voxels, 1 where neither mask has any.

    Args:
        both: voxels in both masks, any shape.
        found: in the prediction.
        wanted: in the reference.

    Example:
        >>> dice_of_counts(torch.tensor([1, 0, 0]), torch.tensor([2, 0, 3]), torch.tensor([2, 0, 0]))
        tensor([0.5000, 1.0000, 0.0000])
    """
    total = found + wanted
    return torch.where(total > 0, 2 * both / total.clamp_min(1), torch.ones_like(total * 1.0))


def dice(prediction: Mask, reference: Mask) -> float:
    """Dice of two masks of one shape, in [0, 1]; 1 where both are empty.

    Example:
        >>> dice(np.array([True, True, False]), np.array([True, False, False]))
        0.6666666666666666
    """
    _check(prediction, reference)
    both, total = int((prediction & reference).sum()), int(prediction.sum()) + int(reference.sum())
    return 2 * both / total if total else 1.0


def hausdorff95(prediction: Mask, reference: Mask, spacing: Sequence[float]) -> float:
    """95 % Hausdorff distance of two masks by MONAI: the larger of the 95th percentiles of both directions.

    Args:
        prediction: bool ``[D, H, W]``.
        reference: of the same shape.
        spacing: of the voxels along each axis, in mm.

    Returns:
        mm; 0 where both are empty, the volume's diagonal where one is.
    """
    _check(prediction, reference)
    if not (prediction.any() and reference.any()):
        if prediction.any() or reference.any():
            return math.hypot(*(count * mm for count, mm in zip(reference.shape, spacing, strict=True)))
        return 0.0
    from monai.metrics import compute_hausdorff_distance  # MONAI takes seconds to load

    box = _box(prediction | reference)
    # Along an axis of one voxel there is nothing outside, so that MONAI would take all of a single slice for surface.
    flat = tuple(axis for axis, length in enumerate(reference.shape) if length == 1)
    if reference.ndim - len(flat) < 2:  # a line, or a voxel
        flat = ()
    found, wanted = (
        torch.from_numpy(np.ascontiguousarray(np.squeeze(mask[box], flat)))[None, None]
        for mask in (prediction, reference)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of one of MONAI's functions to another
        distance = compute_hausdorff_distance(
            found,
            wanted,
            include_background=True,
            percentile=95,
            spacing=[float(mm) for axis, mm in enumerate(spacing) if axis not in flat],
        )
    return float(distance)


@dataclass(frozen=True)
class LesionScores:
    """How many lesions were found, and how well.

    Attributes:
        lesions: in the reference.
        lesions_found: in the prediction.
        lesions_matched: pairs of one of each with an IoU above 0.5, of which there is one at most for each lesion.
        lesion_f1: ``2 TP / (found + there)``, the recognition quality of panoptic quality.
        lesion_iou: mean IoU of the pairs, its segmentation quality.
        panoptic_quality: the product of both (Kirillov et al., arXiv 1801.00868).
        lesions_detected: share of the reference's lesions that have half of their voxels or more in the prediction.
    """

    lesions: int
    lesions_found: int
    lesions_matched: int
    lesion_f1: float
    lesion_iou: float
    panoptic_quality: float
    lesions_detected: float


def lesion_scores(
    prediction: Mask, reference: Mask, spacing: Sequence[float], *, least_ml: float = LEAST_ML
) -> LesionScores:
    """Scores of lesions: the connected parts of a mask, also over edges and corners.

    Two lesions are a pair if their IoU is above 0.5, which makes the choice of pairs unique. Where there are lesions
    neither here nor there, every score is 1; where there are some in one mask alone, F1, IoU and quality are 0. Of a
    mask whose parts are all small the largest is a lesion, so that a region is never missed for nothing.

    Args:
        prediction: bool ``[D, H, W]``.
        reference: of the same shape.
        spacing: of the voxels along each axis, in mm.
        least_ml: smaller parts, in either mask, are left out, where there is a larger one.
    """
    _check(prediction, reference)
    either = prediction | reference
    if either.any():
        box = _box(either)
        prediction, reference = prediction[box], reference[box]
    voxel = voxel_ml(spacing)
    found, found_sizes = lesion_numbers(prediction, least_ml / voxel)
    there, sizes = lesion_numbers(reference, least_ml / voxel)
    counts = np.bincount((there * len(found_sizes) + found).ravel(), minlength=len(sizes) * len(found_sizes))
    overlaps = counts.reshape(len(sizes), len(found_sizes))[1:, 1:]
    union = sizes[1:, None] + found_sizes[None, 1:] - overlaps
    iou = overlaps / np.maximum(union, 1)
    matched = iou[iou > 0.5]
    total = len(sizes) - 1 + len(found_sizes) - 1
    kept = np.bincount(there[prediction], minlength=len(sizes))[1:]
    f1 = 2 * len(matched) / total if total else 1.0
    quality = (float(matched.mean()) if len(matched) else 0.0) if total else 1.0
    return LesionScores(
        lesions=len(sizes) - 1,
        lesions_found=len(found_sizes) - 1,
        lesions_matched=len(matched),
        lesion_f1=f1,
        lesion_iou=quality,
        panoptic_quality=f1 * quality,
        lesions_detected=float((2 * kept >= sizes[1:]).mean()) if len(sizes) > 1 else 1.0,
    )


def volume_ml(mask: Mask, spacing: Sequence[float]) -> float:
    """Volume of a mask in ml.

    Args:
        mask: bool ``[D, H, W]``.
        spacing: of the voxels along each axis, in mm.

    Example:
        >>> volume_ml(np.ones((10, 10, 10), bool), (1.0, 1.0, 2.0))
        2.0
    """
    return int(mask.sum()) * voxel_ml(spacing)


def region_scores(prediction: Mask, reference: Mask, spacing: Sequence[float] | None) -> dict[str, float]:
    """All of :data:`FIGURES` of a region of a case, and the counts of lesions.

    Args:
        prediction: bool ``[D, H, W]``.
        reference: of the same shape.
        spacing: of the voxels along each axis, in mm; None where it is not known, which leaves all but Dice out.
    """
    scores: dict[str, float] = {"dice": dice(prediction, reference)}
    if spacing is None:
        return scores
    own, wanted = volume_ml(prediction, spacing), volume_ml(reference, spacing)
    return {
        **scores,
        "hd95_mm": hausdorff95(prediction, reference, spacing),
        **asdict(lesion_scores(prediction, reference, spacing)),
        "volume_ml": own,
        "reference_ml": wanted,
        "difference_ml": own - wanted,
    }


def bland_altman(differences: Iterable[float]) -> dict[str, float]:
    """Bias and limits of agreement of differences (Bland and Altman, Lancet 1986): the mean, and 1.96 SD around it.

    Args:
        differences: one a patient, at least one.

    Returns:
        ``bias``, ``sd`` (with n - 1; 0 of a single one), ``lower``, ``upper`` and ``n``.

    Raises:
        VaevqMedError: there is none.

    Example:
        >>> bland_altman([1.0, 3.0])["bias"]
        2.0
    """
    values = np.array([*differences], np.float64)
    if values.size == 0:
        raise VaevqMedError("found no differences, expected at least one")
    bias = float(values.mean())
    spread = float(values.std(ddof=1)) if values.size > 1 else 0.0
    limits = {"lower": bias - _LIMIT * spread, "upper": bias + _LIMIT * spread}
    return {"bias": bias, "sd": spread, **limits, "n": values.size}


def summarize(rows: Iterable[Mapping[str, object]]) -> dict[str, dict[str, dict[str, float]]]:
    """Means over patients of the scores of cases, by region: those of a patient's cases are averaged first.

    Args:
        rows: each with ``patient``, ``region`` and the scores of :func:`region_scores`.

    Returns:
        By region and figure ``value``, the mean, ``std`` (with n - 1; 0 of a single patient) and ``n``, patients; and,
        where volumes are known, ``volume_bias_ml``: :func:`bland_altman` of the differences of volumes.
    """
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for row in rows:
        of_region = found.setdefault(str(row["region"]), {})
        for figure in FIGURES:
            value = row.get(figure.name)
            if isinstance(value, (int, float)):
                of_region.setdefault(figure.name, {}).setdefault(str(row["patient"]), []).append(float(value))
    told: dict[str, dict[str, dict[str, float]]] = {}
    for region, figures in found.items():
        means = {name: [float(np.mean(values)) for values in by.values()] for name, by in figures.items()}
        told[region] = {
            name: {
                "value": float(np.mean(values)),
                "std": float(np.std(values, ddof=1)) if len(values) > 1 else 0.0,
                "n": len(values),
            }
            for name, values in means.items()
        }
        if "difference_ml" in means:
            told[region]["volume_bias_ml"] = bland_altman(means["difference_ml"])
    return told


def _check(prediction: Mask, reference: Mask) -> None:
    if prediction.shape != reference.shape or prediction.dtype != np.bool_ or reference.dtype != np.bool_:
        raise VaevqMedError(
            f"found masks of {prediction.shape} {prediction.dtype} and {reference.shape} {reference.dtype}, expected "
            "bool ones of one shape"
        )


def voxel_ml(spacing: Sequence[float]) -> float:
    """Volume in ml of a voxel of so many mm along each axis."""
    return math.prod(map(float, spacing)) / 1000


def _box(mask: Mask) -> tuple[slice, ...]:
    """The smallest box around a mask that is not empty, with a voxel to spare, so that a surface is one at its rim."""
    ends = [np.flatnonzero(mask.any(axis=tuple(a for a in range(mask.ndim) if a != axis))) for axis in range(mask.ndim)]
    return tuple(slice(max(0, int(end[0]) - 1), int(end[-1]) + 2) for end in ends)


def lesion_numbers(mask: Mask, least: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The number of the lesion of each voxel, 0 outside of any, and the size of each, in voxels, from number 0 on.

    Args:
        mask: bool, of any number of axes; parts that touch, corners included, are one.
        least: voxels of a lesion; smaller parts are left out, where there is a larger one.
    """
    parts, _ = ndimage.label(mask, structure=np.ones((3,) * mask.ndim))
    sizes = np.bincount(parts.ravel())
    kept = np.flatnonzero(sizes[1:] >= min(least, sizes[1:].max(initial=0))) + 1
    if len(kept) > 1 and sizes[kept[0]] < least:  # of several small ones of one size
        kept = kept[:1]
    renumbered = np.zeros(len(sizes), np.int64)
    renumbered[kept] = np.arange(1, len(kept) + 1)
    numbers = renumbered[parts]
    return numbers, np.bincount(numbers.ravel(), minlength=len(kept) + 1)
