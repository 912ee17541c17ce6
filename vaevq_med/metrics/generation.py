"""The figures of generated images, from features that were extracted once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vaevq_med.metrics.inception import inception_score, score_splits
from vaevq_med.metrics.neighbors import precision_recall
from vaevq_med.metrics.reference import ReferenceFeatures
from vaevq_med.metrics.statistics import FeatureStatistics, extrapolate_frechet_distance, frechet_distance
from vaevq_med.networks.features import FeatureNetwork

Figures = dict[str, dict[str, Any]]


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
