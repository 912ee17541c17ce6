"""Frechet distance of feature distributions (FID, arXiv 1706.08500), streaming and in constant memory."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from vaevq_med.metrics.statistics import FeatureStatistics, frechet_distance


class FrechetDistance:
    """The distance of originals and reconstructions, from features that were extracted elsewhere.

    Sums and cross products are kept in float64. With fewer images than features the covariance is singular and the
    distance biased upward: compare only at equal N.

    Args:
        num_features: length of a feature vector, F.
        device: where the sums are kept.
    """

    def __init__(self, *, num_features: int, device: torch.device | str = "cpu") -> None:
        self.num_features = num_features
        # Of originals, then of reconstructions: their sum, and below it that of their outer products.
        self._sums = torch.zeros(2, 1 + num_features, num_features, dtype=torch.float64, device=device)
        self._count = 0

    @property
    def count(self) -> int:
        """Reconstructed images seen by this process, or, after :meth:`compute` in a group, still this process."""
        return self._count

    def update(self, real: Tensor, fake: Tensor) -> None:
        """Take in feature vectors ``[B, num_features]`` of original and reconstructed images."""
        for sums, features in zip(self._sums, (real.double(), fake.double()), strict=True):
            sums[0] += features.sum(dim=0)
            sums[1:].addmm_(features.mT, features)
        self._count += len(real)

    def compute(self) -> float:
        """The distance; NaN with fewer than two images. In a process group, of all processes' images."""
        sums, count = self._sums, self._count
        if dist.is_available() and dist.is_initialized():
            sums, counted = sums.clone(), torch.tensor(count, device=sums.device)
            dist.all_reduce(sums)
            dist.all_reduce(counted)
            count = int(counted)
        if count < 2:
            return float("nan")
        real, fake = (
            FeatureStatistics(
                mean=part[0] / count,
                covariance=(part[1:] - torch.outer(part[0], part[0]) / count) / (count - 1),
                count=count,
            )
            for part in sums
        )
        return frechet_distance(fake, real)
