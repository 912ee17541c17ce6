"""Is a small lesion still seen? Synthetic lesions of known size and contrast, and an observer that looks for them.

A lesion is a smooth-edged ellipsoid that is added to healthy tissue of a real volume. The observer is a
non-prewhitening matched filter (Burgess, JOSA A 1999; Barrett and Myers, *Foundations of Image Science*, ch. 13): it
knows size, shape and place, weighs the voxels by the lesion's profile, and takes the mean of the surroundings off.
Its responses with and without the lesion give the area under the ROC curve, which is the share of right answers where
one of two places has a lesion and the observer says which (two-alternative forced choice).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Volume = NDArray[np.float32]
Mask = NDArray[np.bool_]
DETECTED = 0.9
"""Area under the curve from which a lesion counts as detected."""
_EDGE_MM = 1.0
_GAP_MM, _SHELL_MM = 1.0, 3.0
"""From the lesion's edge to the surroundings that are taken off, and how thick these are."""
_APART_MM = 6.0
"""Between the edges of two lesions, so that neither stands in the other's surroundings."""
_LONGEST = 1.25
"""Of a lesion's axes, in units of its radius."""
_QUANTILES = 0.2, 0.8
"""Of the brain's intensities, between which the tissue around a place lies: neither liquid nor vessels."""
_TRIES = 200


@dataclass(frozen=True)
class Lesion:
    """An ellipsoid with a smooth edge.

    Attributes:
        center: along Z, Y and X, in voxels.
        diameter: of the sphere of its volume, in mm.
        contrast: that is added in its middle, in units of the window.
        axes: its half axes along Z, Y and X in units of the radius; their product is 1.
    """

    center: tuple[int, int, int]
    diameter: float
    contrast: float
    axes: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def profile(self, shape: Sequence[int], spacing: Sequence[float]) -> tuple[tuple[slice, ...], Volume, Mask]:
        """How much of the contrast each voxel gets, and the surroundings.

        The edge falls from 1 to 0 over 1 mm, or over the width of a voxel where that is more, half of it on each side.

        Args:
            shape: of the volume, Z, Y, X.
            spacing: of its voxels along these, in mm.

        Returns:
            The box that holds both, the profile in [0, 1] there, and which voxels of it are surroundings: from 1 to
            4 mm away from the edge.
        """
        radius = self.diameter / 2
        edge = max(_EDGE_MM, *spacing)
        reach = _LONGEST * radius + max(edge, _GAP_MM + _SHELL_MM)
        steps = [math.ceil(reach / length) for length in spacing]
        box = tuple(
            slice(max(0, middle - step), min(size, middle + step + 1))
            for middle, step, size in zip(self.center, steps, shape, strict=True)
        )
        places = np.ogrid[box]
        parts = zip(places, self.center, spacing, self.axes, strict=True)
        away = np.sqrt(sum(((place - middle) * length / axis) ** 2 for place, middle, length, axis in parts)) - radius
        weights = np.clip(0.5 - away / edge, 0, 1).astype(np.float32)
        around = (away > max(_GAP_MM, edge / 2)) & (away <= max(_GAP_MM, edge / 2) + _SHELL_MM)
        return box, weights, around


def insert(unit: Volume, lesions: Sequence[Lesion], spacing: Sequence[float]) -> Volume:
    """A copy of a volume with lesions in it, nowhere beyond [0, 1].

    Args:
        unit: ``[Z, Y, X]`` in [0, 1].
        lesions: which.
        spacing: of the voxels along Z, Y and X, in mm.
    """
    result = unit.copy()
    for lesion in lesions:
        box, weights, _ = lesion.profile(unit.shape, spacing)
        result[box] += lesion.contrast * weights
    return np.clip(result, 0, 1, out=result)


def response(volume: Volume, lesion: Lesion, spacing: Sequence[float], brain: Mask) -> float:
    """What the observer sees at a lesion's place: its mean under the profile, less that of the surroundings.

    Args:
        volume: ``[Z, Y, X]``, in which the lesion may be or not.
        lesion: that is looked for.
        spacing: of the voxels along Z, Y and X, in mm.
        brain: bool ``[Z, Y, X]``; no surroundings lie outside of it.

    Returns:
        In the unit of the volume, to a millionth, so that no rounding decides which of two equal places has a lesion.
    """
    box, weights, around = lesion.profile(volume.shape, spacing)
    piece, around = volume[box].astype(np.float64), around & brain[box]
    beside = float(piece[around].mean()) if around.any() else 0.0
    return round(float((weights * piece).sum() / weights.sum()) - beside, 6) + 0.0


def place(
    unit: Volume,
    brain: Mask,
    tumor: Mask,
    spacing: Sequence[float],
    kinds: Sequence[tuple[float, float]],
    rng: np.random.Generator,
) -> list[Lesion]:
    """Places for lesions in healthy tissue: within the brain, away from the tumor and from each other.

    A lesion and its surroundings lie within the brain and outside of the tumor; the tissue of its middle is between
    the 20th and the 80th percentile of the brain's intensities.

    Args:
        unit: ``[Z, Y, X]`` in [0, 1].
        brain: bool ``[Z, Y, X]``.
        tumor: bool ``[Z, Y, X]``, which may be empty.
        spacing: of the voxels along Z, Y and X, in mm.
        kinds: diameter in mm and contrast of each.
        rng: draws places and axes.

    Returns:
        Those that found room, the largest first.
    """
    from scipy.ndimage import distance_transform_edt, uniform_filter

    healthy = brain & ~tumor
    if not healthy.any():
        return []
    free = distance_transform_edt(np.pad(healthy, 1), sampling=spacing)[1:-1, 1:-1, 1:-1]
    low, high = np.quantile(unit[brain], _QUANTILES)
    tissue = uniform_filter(unit, 3)
    open_ = healthy & (tissue >= low) & (tissue <= high)
    found: list[Lesion] = []
    for diameter, contrast in sorted(kinds, reverse=True):
        reach = _LONGEST * diameter / 2
        candidates = np.flatnonzero(open_ & (free >= reach + _GAP_MM))
        if not candidates.size:
            continue
        for number in rng.choice(candidates, size=min(_TRIES, candidates.size), replace=False):
            center = tuple(int(i) for i in np.unravel_index(number, unit.shape))
            if all(
                _apart(center, other, spacing) >= reach + _LONGEST * other.diameter / 2 + _APART_MM for other in found
            ):
                found.append(Lesion((center[0], center[1], center[2]), diameter, contrast, _axes(rng)))
                break
    return found


def _apart(center: Sequence[int], other: Lesion, spacing: Sequence[float]) -> float:
    return math.dist(*([i * length for i, length in zip(c, spacing, strict=True)] for c in (center, other.center)))


def _axes(rng: np.random.Generator) -> tuple[float, float, float]:
    """Half axes between 0.8 and 1.25 of the radius, whose product is 1."""
    first = rng.uniform(math.log(1 / _LONGEST), math.log(_LONGEST))
    second = rng.uniform(max(-1.0, -1 - first / math.log(_LONGEST)), min(1.0, 1 - first / math.log(_LONGEST)))
    second *= math.log(_LONGEST)
    axes = [first, second, -first - second]
    rng.shuffle(axes)
    return math.exp(axes[0]), math.exp(axes[1]), math.exp(axes[2])


@dataclass(frozen=True)
class Detection:
    """How well lesions of one kind are seen.

    Attributes:
        auc: area under the ROC curve, 0.5 for chance.
        low: lower end of its 95 % interval over patients; NaN for fewer than two patients.
        high: upper end.
        d_prime: difference of the mean responses over the root of their mean variance; NaN without a variance.
        n: lesions.
    """

    auc: float
    low: float
    high: float
    d_prime: float
    n: int


def detection(
    present: Sequence[float], absent: Sequence[float], patients: Sequence[str], *, resamples: int = 1000, seed: int = 0
) -> Detection:
    """The area under the curve of responses with a lesion against those of the same places without it.

    A response without a lesion of any place is compared with one with a lesion of any place, since a reader does not
    know what a place would look like without it: anatomy is the noise. Equal responses count one half, so that a coder
    that erases everything has 0.5.

    Args:
        present: responses with the lesion.
        absent: at the same places without it.
        patients: whose place each is.
        resamples: draws of patients for the interval.
        seed: of the draws.

    Returns:
        With NaN throughout where there is no lesion.
    """
    signal, noise = np.asarray(present, np.float64), np.asarray(absent, np.float64)
    if not signal.size:
        return Detection(math.nan, math.nan, math.nan, math.nan, 0)
    wins = (signal[:, None] > noise) + 0.5 * (signal[:, None] == noise)
    names, units = np.unique(np.asarray(patients), return_inverse=True)
    member = np.eye(len(names))[units]  # [n, patients]
    sums, counts = member.T @ wins @ member, np.outer(*(member.sum(axis=0),) * 2)
    low = high = math.nan
    if len(names) > 1:
        rng = np.random.default_rng(seed)
        drawn = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples).astype(float)
        areas = np.einsum("rp,pq,rq->r", drawn, sums, drawn) / np.einsum("rp,pq,rq->r", drawn, counts, drawn)
        low, high = (float(end) for end in np.quantile(areas, [0.025, 0.975]))
    spread = math.sqrt((signal.var() + noise.var()) / 2)
    d_prime = float(signal.mean() - noise.mean()) / spread if spread > 0 else math.nan
    return Detection(float(sums.sum() / counts.sum()), low, high, d_prime, len(signal))


def smallest_detected(areas: Sequence[tuple[float, float]], bound: float = DETECTED) -> float | None:
    """The smallest size from which on every area reaches a bound.

    Args:
        areas: size and area under the curve; NaN where it is unknown.
        bound: that it has to reach.

    Returns:
        None where the largest size does not reach it.

    Example:
        >>> smallest_detected([(3, 0.95), (5, 0.8), (8, 0.92), (12, 1.0)])
        8
    """
    found = None
    for size, area in sorted(areas, reverse=True):
        if not area >= bound:
            break
        found = size
    return found
