"""Whether generated images are copies of training images: nearest neighbors, held against those of unseen images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vaevq_med.errors import VaevqMedError
from vaevq_med.metrics.neighbors import NearestNeighbors, unit_length

LEVELS = 255
QUANTILE = 0.01


@dataclass(frozen=True)
class Neighbors:
    """The nearest training image of each image.

    Attributes:
        distance: to it, float64 ``[N]``.
        index: its number, int64 ``[N]``.
    """

    distance: Tensor
    index: Tensor


def cosine_neighbors(features: Tensor, training: Tensor) -> Neighbors:
    """Nearest training images in feature space, by cosine distance ``1 - cos``.

    The cosine leaves out the length of a feature vector, which on slices follows the share of black background and the
    contrast more than the content.

    Args:
        features: ``[N, F]``.
        training: ``[M, F]``.
    """
    search = NearestNeighbors(unit_length(features))
    for part in training.split(4096):
        search.update(unit_length(part))
    return Neighbors(search.squared / 2, search.indices)


def pixel_neighbors(search: NearestNeighbors) -> Neighbors:
    """What a search over images as levels 0 to 255, ``[N, C*H*W]``, found: RMSE on [0, 1]."""
    return Neighbors((search.squared / search.queries.shape[1]).sqrt() / LEVELS, search.indices)


def threshold_of(held_out: Tensor, quantile: float = QUANTILE) -> float:
    """The distance that this share of the unseen real images is nearer than to their nearest training image.

    Args:
        held_out: distances of held-out real images to the training images, ``[N]``.
        quantile: share, interpolated between the two distances beside it.

    Raises:
        VaevqMedError: there is no distance.

    Examples:
        >>> import torch
        >>> threshold_of(torch.arange(101.0), 0.01)
        1.0
    """
    if not len(held_out):
        raise VaevqMedError("found no held-out images, expected some to take a threshold from")
    return float(held_out.double().quantile(quantile))


def summarize_distances(
    sample: Neighbors, held_out: Neighbors | None, *, threshold: float | None = None, quantile: float = QUANTILE
) -> Mapping[str, Any]:
    """How many generated images are nearer to a training image than unseen real ones are.

    A generator that does not copy is nearer than the threshold about as often as the quantile says.

    Args:
        sample: of the generated images.
        held_out: of real images of other patients, or None where there are none.
        threshold: in place of the quantile of ``held_out``.
        quantile: share of the held-out images that are nearer than the threshold.

    Returns:
        ``n``, ``median``, ``min``; where there is a threshold ``threshold``, ``threshold_from``, and ``count`` and
        ``share`` of the images that are nearer; where there are held-out images ``n_held_out``,
        ``median_held_out``, ``min_held_out`` and ``share_held_out``.
    """
    entry: dict[str, Any] = {
        "n": len(sample.distance),
        "median": float(sample.distance.quantile(0.5)),
        "min": float(sample.distance.min()),
    }
    if threshold is not None:
        entry |= {"threshold": threshold, "threshold_from": "given"}
    elif held_out is not None:
        entry |= {
            "threshold": threshold_of(held_out.distance, quantile),
            "threshold_from": f"{quantile:g} quantile of held-out images",
        }
    if "threshold" in entry:
        nearer = flagged(sample, entry["threshold"])
        entry |= {"count": int(nearer.sum()), "share": float(nearer.double().mean())}
    if held_out is not None:
        entry |= {
            "n_held_out": len(held_out.distance),
            "median_held_out": float(held_out.distance.quantile(0.5)),
            "min_held_out": float(held_out.distance.min()),
            "share_held_out": float(flagged(held_out, entry["threshold"]).double().mean()),
        }
    return entry


def flagged(neighbors: Neighbors, threshold: float) -> Tensor:
    """Which images are nearer than the threshold, or the same as a training image; bool ``[N]``."""
    return (neighbors.distance < threshold) | (neighbors.distance == 0)
