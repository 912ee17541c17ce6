"""K-means over rows of numbers that come in portions."""

from __future__ import annotations

import warnings

import numpy as np
from numpy.typing import NDArray

from vaevq_med.core.errors import DataError

Features = NDArray[np.float32]
_START = 3
"""Features a center that the centers are drawn from at first."""
_STEP = 1024
"""Features of an update, at least."""


class StreamingClusters:
    """K-means over features that come in portions; it holds no more than a few features a center.

    The centers start by k-means++ among the first three features a center and move by mini-batches
    (scikit-learn's ``MiniBatchKMeans``), each feature seen once.

    Args:
        num_clusters: number of centers.
        seed: seed of the start.
    """

    def __init__(self, num_clusters: int, seed: int = 0) -> None:
        from sklearn.cluster import MiniBatchKMeans

        self.num_clusters = num_clusters
        self.model = MiniBatchKMeans(n_clusters=num_clusters, random_state=seed, n_init=1)
        self.waiting: list[Features] = []
        self.count = 0

    @property
    def _portion(self) -> int:
        """Features that the next update waits for."""
        return max(_STEP, self.num_clusters if hasattr(self.model, "cluster_centers_") else _START * self.num_clusters)

    def add(self, features: Features) -> None:
        """Take ``[N, F]`` features."""
        self.waiting.append(features)
        self.count += len(features)
        while sum(map(len, self.waiting)) >= self._portion:
            joined = np.concatenate(self.waiting)
            portion, rest = joined[: self._portion], joined[self._portion :]
            self.waiting = [rest]
            self._update(portion)

    def _update(self, portion: Features) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of fewer distinct features than centers, which the report counts
            self.model.partial_fit(portion)

    def centers(self) -> Features:
        """The centers ``[num_clusters, F]``.

        Raises:
            DataError: there were fewer features than centers.
        """
        if self.count < self.num_clusters:
            raise DataError(f"found {self.count} features, expected at least {self.num_clusters}, one a codeword")
        rest = np.concatenate(self.waiting)
        if len(rest):
            self.waiting = [rest[:0]]
            self._update(rest)
        return np.asarray(self.model.cluster_centers_, dtype=np.float32)
