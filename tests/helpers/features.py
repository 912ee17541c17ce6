"""Feature networks whose features are known, and figures of features by brute force."""

from __future__ import annotations

import numpy as np
import torch
from scipy.spatial.distance import cdist
from torch import Tensor

from vaevq_med.networks.features import FeatureNetwork


class Pixels(FeatureNetwork):
    """Counts how often it is asked."""

    name = "pixels"
    weights_sha256 = "ab" * 32
    num_features = 4
    cells = 2

    def __init__(self) -> None:
        super().__init__()
        self.images = 0

    def _layers(self, images: Tensor) -> list[Tensor]:
        return [images]

    def _pooled(self, images: Tensor) -> Tensor:
        self.images += len(images)
        return torch.nn.functional.adaptive_avg_pool2d(images[:, :1], self.cells).flatten(1)


def brute_force(sample: np.ndarray, real: np.ndarray, k: int) -> tuple[float, float]:
    """Precision and recall, each distance by itself."""

    def share(points: np.ndarray, centers: np.ndarray) -> float:
        radii = np.sort(cdist(centers, centers), axis=1)[:, k]
        return float((cdist(points, centers) <= radii).any(axis=1).mean())

    return share(sample, real), share(real, sample)
