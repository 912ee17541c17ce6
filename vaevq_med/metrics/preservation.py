"""What a reconstruction keeps of what a recognizer sees: lesions by their size, and the class of a picture.

As TokBench (arXiv 2505.18142) and VTBench (2505.13439) measure text and faces: something is recognized in the
reconstruction, and the answers are averaged within bins of size, since what is small is lost first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.metrics.base import ImageMetric
from vaevq_med.metrics.figures import Figure
from vaevq_med.metrics.segmentation import LEAST_ML, Mask, lesion_numbers, voxel_ml
from vaevq_med.networks.features import feature_network

KEPT = 0.5
"""Share of a lesion's voxels that is found where it counts as kept, as for ``lesions_detected``."""
SIZES = ("small", "medium", "large")

Lesion = tuple[float, float]
"""Volume in ml, and the share of the voxels that is found."""


def lesions_found(
    prediction: Mask, reference: Mask, spacing: Sequence[float], *, least_ml: float = LEAST_ML
) -> list[Lesion]:
    """Each lesion of a reference, and how much of it a prediction has; a lesion is a connected part, over corners too.

    Args:
        prediction: bool ``[D, H, W]``.
        reference: of the same shape.
        spacing: of the voxels along each axis, in mm.
        least_ml: smaller parts are no lesions where there is a larger one.

    >>> mask = np.zeros((1, 1, 4), bool)
    >>> mask[..., :2] = True
    >>> lesions_found(mask, np.ones((1, 1, 4), bool), (10.0, 10.0, 10.0))
    [(4.0, 0.5)]
    """
    if prediction.shape != reference.shape:
        raise VaevqMedError(f"found masks of {prediction.shape} and {reference.shape}, expected one shape")
    voxel = voxel_ml(spacing)
    numbers, sizes = lesion_numbers(reference, least_ml / voxel)
    found = np.bincount(numbers[prediction], minlength=len(sizes))
    return [(float(size * voxel), float(own / size)) for size, own in zip(sizes[1:], found[1:], strict=True)]


def size_edges(volumes: Iterable[float]) -> tuple[float, float]:
    """Where small lesions end and large ones begin: the tertiles of volumes, in their unit.

    Raises:
        VaevqMedError: there is none.

    >>> size_edges([1.0, 2.0, 3.0, 4.0])
    (2.0, 3.0)
    """
    values = np.array([*volumes], np.float64)
    if not values.size:
        raise VaevqMedError("found no lesions, expected some whose sizes say what is small")
    low, high = np.quantile(values, (1 / 3, 2 / 3))
    return float(low), float(high)


def lesion_recall(lesions: Iterable[Lesion], edges: Sequence[float]) -> list[tuple[int, int]]:
    """How many lesions of each size are kept, and how many there are; one on an edge counts as smaller.

    Args:
        lesions: of :func:`lesions_found`.
        edges: rising, n of them for n + 1 sizes, in ml; none for all lesions together.

    >>> lesion_recall([(1.0, 1.0), (1.5, 0.4), (9.0, 0.5)], edges=(2.0, 5.0))
    [(1, 2), (0, 0), (1, 1)]
    """
    counts = [(0, 0)] * (len(edges) + 1)
    for volume, share in lesions:
        size = int(np.searchsorted(edges, volume, side="left"))
        kept, there = counts[size]
        counts[size] = kept + (share >= KEPT), there + 1
    return counts


def class_agreement(original: Tensor, reconstruction: Tensor) -> Tensor:
    """1 where the likeliest class is the same, otherwise 0, NaN where a logit is, ``[B]``.

    Args:
        original: logits ``[B, classes]``.
        reconstruction: likewise.
    """
    unknown = (original.isnan() | reconstruction.isnan()).any(dim=1)
    same = original.argmax(dim=1) == reconstruction.argmax(dim=1)
    return same.float().masked_fill(unknown, math.nan)


def class_divergence(original: Tensor, reconstruction: Tensor) -> Tensor:
    """``KL(p || p')`` in nats of the classes' probabilities p of originals and p' of reconstructions, ``[B]``.

    Args:
        original: logits ``[B, classes]``.
        reconstruction: likewise.
    """
    wanted, found = (F.log_softmax(logits.float(), dim=1) for logits in (original, reconstruction))
    return (wanted.exp() * (wanted - found)).sum(dim=1).clamp_min(0)


class _OfClasses(ImageMetric):
    """A figure of the class logits of original and reconstruction.

    Args:
        network: a feature network with a classifier, see :mod:`vaevq_med.networks.features`.
        weights: file of its weights, where it is not in a usual place.

    Raises:
        VaevqMedError: the network has no classes.
        MissingWeightsError: its weights are not on this machine.
    """

    def __init__(self, *, network: str = "efficientnet-lite0", weights: str | Path | None = None) -> None:
        self.network = feature_network(network, weights)
        if not self.network.num_classes:
            raise VaevqMedError(
                f"network is {network!r}, which has no classes; expected efficientnet-lite0 or inception"
            )
        own = self.figure
        self.figure = replace(own, convention=f"{own.convention}; by {network}")  # type: ignore[misc]

    def _logits(self, target: Tensor, reconstruction: Tensor) -> tuple[Tensor, Tensor]:
        """Of both, ``[B, classes]``."""
        network = self.network.to(target.device)
        first, second = (network.logits(network.pooled(2 * images - 1)) for images in (target, reconstruction))
        return first, second


class ClassAgreement(_OfClasses):
    """Whether a frozen classifier finds the same class; no labels are needed."""

    figure = Figure(
        "class_agreement",
        "Class agreement (%)",
        1,
        100,
        higher_is_better=True,
        convention="share of images of which a frozen classifier finds the same likeliest class as of the original",
    )

    def per_image(self, target: Tensor, reconstruction: Tensor) -> Tensor:
        """1 or 0, or NaN, ``[B]``."""
        return class_agreement(*self._logits(target, reconstruction))


class ClassDivergence(_OfClasses):
    """How far a frozen classifier's probabilities move."""

    figure = Figure(
        "class_kl",
        "Class KL",
        3,
        higher_is_better=False,
        convention="divergence in nats of a frozen classifier's class probabilities of the reconstruction from those "
        "of the original, mean over images",
    )

    def per_image(self, target: Tensor, reconstruction: Tensor) -> Tensor:
        """In nats, ``[B]``."""
        return class_divergence(*self._logits(target, reconstruction))
