"""Frechet distance of feature distributions (FID, arXiv 1706.08500), streaming and in constant memory."""

from __future__ import annotations

import warnings
from typing import cast

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance


class _Identity(nn.Module):
    """Features come in extracted, so that one extraction serves several accumulators."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


class FrechetDistance:
    """torchmetrics' FID over features that were extracted elsewhere.

    Sums and cross products are kept in float64. With fewer images than features the covariance is singular and the
    distance biased upward: compare only at equal N.

    Args:
        num_features: length of a feature vector.
        device: where the sums are kept.
    """

    def __init__(self, *, num_features: int, device: torch.device | str = "cpu") -> None:
        self.num_features = num_features
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._metric = FrechetInceptionDistance(feature=_Identity(num_features)).to(device).set_dtype(torch.float64)
        # Otherwise update sets it, which a process without images of a contrast never calls.
        self._metric.orig_dtype = torch.float64

    @property
    def count(self) -> int:
        """Reconstructed images seen by this process, or, after :meth:`compute` in a group, still this process."""
        return int(self._samples())

    def _samples(self) -> Tensor:
        return cast(Tensor, self._metric.fake_features_num_samples)

    def update(self, real: Tensor, fake: Tensor) -> None:
        """Take in feature vectors ``[B, num_features]`` of original and reconstructed images."""
        self._metric.update(real.double(), real=True)
        self._metric.update(fake.double(), real=False)

    def compute(self) -> float:
        """The distance; NaN with fewer than two images. In a process group, of all processes' images."""
        counts = self._samples().clone()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(counts)
        if int(counts) < 2:
            return float("nan")
        return float(self._metric.compute())
