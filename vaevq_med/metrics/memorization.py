"""Whether generated images are copies of training images: nearest neighbors, held against those of unseen images.

Generators are trained on mirror images too, so that an image is held against each training image both ways round.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.metrics.neighbors import BLOCK_ELEMENTS, NearestNeighbors, unit_length

LEVELS = 255
QUANTILE = 0.01


@dataclass(frozen=True)
class Neighbors:
    """The nearest training image of each image.

    Attributes:
        distance: to it, float64 ``[N]``.
        index: its number, int64 ``[N]``.
        mirrored: whether it is nearer in mirror image than as it is, bool ``[N]``.
    """

    distance: Tensor
    index: Tensor
    mirrored: Tensor

    def __getitem__(self, rows: slice) -> Neighbors:
        """Those of some images."""
        return Neighbors(self.distance[rows], self.index[rows], self.mirrored[rows])

    def cpu(self) -> Neighbors:
        """The same on the CPU."""
        return Neighbors(self.distance.cpu(), self.index.cpu(), self.mirrored.cpu())


def cosine_neighbors(features: Tensor, mirrored: Tensor, training: Tensor) -> Neighbors:
    """Nearest training images in feature space, by cosine distance ``1 - cos``, either way round.

    The cosine leaves out the length of a feature vector, which on slices follows the share of black background and the
    contrast more than the content.

    Args:
        features: of images, ``[N, F]``.
        mirrored: of the same images in mirror image, ``[N, F]``.
        training: of the training images, ``[M, F]``.
    """
    (plain, index), (turned, other) = (_cosine_search(queries, training) for queries in (features, mirrored))
    nearer = turned < plain
    return Neighbors(torch.where(nearer, turned, plain), torch.where(nearer, other, index), nearer)


def _cosine_search(features: Tensor, training: Tensor) -> tuple[Tensor, Tensor]:
    search = NearestNeighbors(unit_length(features))
    for part in training.split(4096):
        search.update(unit_length(part))
    return search.squared / 2, search.indices


class PixelSearch:
    """The nearest of many training images, either way round, by RMSE on [0, 1]; exact.

    The training images come in portions, of which no more than a block is kept.

    Args:
        levels: images as levels 0 to 255, uint8 ``[N, C*H*W]``.
        width: W.

    Example:
        >>> search = PixelSearch(torch.tensor([[0, 255], [255, 255]], dtype=torch.uint8), width=2)
        >>> search.update(torch.tensor([[255, 0], [255, 254]], dtype=torch.uint8))
        >>> found = search.neighbors()
        >>> found.index.tolist(), found.mirrored.tolist()
        ([0, 1], [True, False])
    """

    def __init__(self, levels: Tensor, width: int) -> None:
        self._search = NearestNeighbors(levels)
        self._width = width
        self._waiting: list[Tensor] = []

    def update(self, levels: Tensor) -> None:
        """Look among the next training images, ``[M, C*H*W]``, and their mirror images."""
        mirrored = levels.unflatten(1, (-1, self._width)).flip(-1).flatten(1)
        self._waiting.append(torch.stack([levels, mirrored], dim=1).flatten(0, 1))
        # A larger portion costs fewer conversions of the queries to float64.
        if sum(part.numel() for part in self._waiting) >= BLOCK_ELEMENTS:
            self._flush()

    def _flush(self) -> None:
        if self._waiting:
            self._search.update(torch.cat(self._waiting))
            self._waiting.clear()

    def neighbors(self) -> Neighbors:
        """What was found."""
        self._flush()
        squared, found = self._search.squared, self._search.indices
        distance = (squared / self._search.queries.shape[1]).sqrt() / LEVELS
        return Neighbors(distance, found // 2, found % 2 == 1)


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
        ``n``, ``median``, ``min``, ``mirrored`` (how many are nearest to a mirror image); where there is a threshold
        ``threshold``, ``threshold_from``, and ``count`` and ``share`` of the images that are nearer, ``count_mirrored``
        those of them that are nearest to a mirror image; where there are held-out images ``n_held_out``,
        ``median_held_out``, ``min_held_out`` and ``share_held_out``.
    """
    entry: dict[str, Any] = {
        "n": len(sample.distance),
        "median": float(sample.distance.quantile(0.5)),
        "min": float(sample.distance.min()),
        "mirrored": int(sample.mirrored.sum()),
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
        entry |= {
            "count": int(nearer.sum()),
            "count_mirrored": int((nearer & sample.mirrored).sum()),
            "share": float(nearer.double().mean()),
        }
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
