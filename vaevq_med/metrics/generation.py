"""The figures of generated images, from features that were extracted once; the Inception score from logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.metrics.neighbors import precision_recall
from vaevq_med.metrics.reference import ReferenceFeatures
from vaevq_med.metrics.statistics import FeatureStatistics, extrapolate_frechet_distance, frechet_distance
from vaevq_med.networks.features import FeatureNetwork

Figures = dict[str, dict[str, Any]]

_PUBLISHED_SPLITS = 10
_LEAST_IMAGES_OF_SPLIT = 1000
_SHUFFLE_SEED = 2020
"""Torch-fidelity's."""


def measure_generation(
    features: Tensor,
    reference: ReferenceFeatures,
    network: FeatureNetwork,
    *,
    k: int = 3,
    fid_infinity: bool = False,
    logits: Tensor | None = None,
) -> tuple[Figures, Mapping[str, str]]:
    """GFID, precision and recall, and where asked FID_infinity and the Inception score.

    Args:
        features: ``[N, F]`` of the generated images.
        reference: of the real ones, on the same device.
        network: that both come from.
        k: neighbor of precision and recall.
        fid_infinity: extrapolate gFID to infinitely many generated images.
        logits: class logits of the generated images, for the Inception score.

    Returns:
        The figures by name, each with ``value`` and ``n``, and how each is defined, in words.

    Raises:
        VaevqMedError: there are too few images for a figure.
    """
    count, real = len(features), reference.statistics.count
    sizes = {"n": count, "n_reference": real}
    manifold = precision_recall(features, reference.features, k=k)
    statistics = FeatureStatistics.of(features)
    figures: Figures = {
        "gfid": {"value": frechet_distance(statistics, reference.statistics), **sizes},
        "precision": {"value": manifold.precision, **sizes},
        "recall": {"value": manifold.recall, **sizes},
    }
    bias = f"biased upward at few images, compare at equal numbers only (here {count} and {real} of them"
    if min(count, real) <= network.num_features:
        bias += f", no more than the {network.num_features} features: strongly biased"
    space = f"{network.name} features, k = {k}"
    conventions = {
        "gfid": f"Frechet distance of {network.name} features, float64; {bias})",
        "precision": f"share of the generated images in the manifold of the real ones, {space}",
        "recall": f"share of the real images in the manifold of the generated ones, {space}",
    }
    if fid_infinity:
        line = extrapolate_frechet_distance(features, reference.statistics)
        figures["fid_infinity"] = {"value": line.value, "r_squared": line.r_squared, **sizes}
        words = f"extrapolation, not gFID: intercept of a line through gFID over 1 / N at {len(line.counts)} N"
        if line.counts[0] <= network.num_features:
            words += f"; N from {line.counts[0]} is not above the {network.num_features} features: do not rely on it"
        conventions["fid_infinity"] = words
    if logits is not None:
        splits = score_splits(count)
        value, deviation = inception_score(logits, splits=splits)
        figures["inception_score"] = {"value": value, "std": deviation, "splits": splits, "n": count}
        called = "Inception score" if network.name == "inception" else f"Inception-style score of {network.name}"
        parts = f"mean over {splits} parts" if splits > 1 else "all images as one part"
        conventions["inception_score"] = f"{called}, {logits.shape[1]} classes, {parts}"
    return figures, conventions


def score_splits(count: int) -> int:
    """Parts that the score is averaged over: 10, as published, where each has 1,000 images; otherwise one."""
    return _PUBLISHED_SPLITS if count >= _PUBLISHED_SPLITS * _LEAST_IMAGES_OF_SPLIT else 1


def inception_score(logits: Tensor, *, splits: int = 10) -> tuple[float, float]:
    """Inception score (arXiv 1606.03498), ``exp(E_x KL(p(y|x) || p(y)))``: mean and deviation over parts of the images.

    p(y|x) is the softmax of an image's logits, p(y) its mean over the part. The images are shuffled first, by the
    permutation that torch-fidelity uses. The score of a part is at most the number of its images.

    Args:
        logits: ``[N, classes]``.
        splits: number of parts.

    Raises:
        VaevqMedError: there are fewer images than parts.

    Examples:
        >>> certain = 100 * torch.eye(4)
        >>> round(inception_score(certain, splits=1)[0], 6)
        4.0
    """
    count = len(logits)
    if not 1 <= splits <= count:
        raise VaevqMedError(f"splits: found {splits} for {count} images, expected 1 to {count}")
    order = torch.from_numpy(np.random.RandomState(_SHUFFLE_SEED).permutation(count)).to(logits.device)
    scores = []
    for part in range(splits):
        chosen = order[part * count // splits : (part + 1) * count // splits]
        log_p = logits[chosen].double().log_softmax(dim=1)
        p = log_p.exp()
        log_marginal = p.mean(dim=0).log()
        divergence = torch.where(p > 0, p * (log_p - log_marginal), 0).sum(dim=1)
        scores.append(float(divergence.mean().exp()))
    return float(np.mean(scores)), float(np.std(scores))
