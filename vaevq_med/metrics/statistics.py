"""Frechet distance of feature distributions (FID, arXiv 1706.08500): of stored features, streamed, and extrapolated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.processes import is_distributed, sum_in_place

_ROWS = 4096
MIN_EXTRAPOLATED = 100
"""Fewest images that a Frechet distance is extrapolated from."""


@dataclass(frozen=True)
class FeatureStatistics:
    """Moments of a set of feature vectors.

    Attributes:
        mean: float64 ``[F]``.
        covariance: float64 ``[F, F]``, with divisor count - 1.
        count: number of vectors.
    """

    mean: Tensor
    covariance: Tensor
    count: int

    @classmethod
    def of(cls, features: Tensor) -> FeatureStatistics:
        """Moments of ``[N, F]`` features, in float64, a portion at a time.

        Raises:
            VaevqMedError: N is below 2.
        """
        count, width = features.shape
        if count < 2:
            raise VaevqMedError(f"found {count} images, expected at least 2 for a covariance")
        total = torch.zeros(width, dtype=torch.float64, device=features.device)
        for part in features.split(_ROWS):
            total += part.double().sum(dim=0)
        mean = total / count
        scatter = torch.zeros(width, width, dtype=torch.float64, device=features.device)
        for part in features.split(_ROWS):
            centered = part.double() - mean
            scatter += centered.mT @ centered
        return cls(mean, scatter / (count - 1), count)


def _eigenvectors(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues ``[F]`` and eigenvectors ``[F, F]``, also where the faster method gives up.

    The divide and conquer of torch's MKL stops in several threads where the covariance of fewer images than features
    has a thousand eigenvalues of 0; the implicit QR method does not.
    """
    try:
        values, vectors = torch.linalg.eigh(covariance)
    except torch.linalg.LinAlgError:
        found = scipy.linalg.eigh(covariance.cpu().numpy(), driver="ev")
        values, vectors = (torch.from_numpy(array).to(covariance.device) for array in found)
    return values, vectors


def _square_root(covariance: Tensor) -> Tensor:
    values, vectors = _eigenvectors(covariance)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.mT


def _distance(sample: FeatureStatistics, reference: FeatureStatistics, root: Tensor) -> float:
    """The distance, given the square root of the reference's covariance."""
    product = root @ sample.covariance @ root
    cross = torch.linalg.eigvalsh((product + product.mT) / 2).clamp_min(0).sqrt().sum()
    trace = sample.covariance.trace() + reference.covariance.trace() - 2 * cross
    return float((sample.mean - reference.mean).square().sum() + trace)


def frechet_distance(sample: FeatureStatistics, reference: FeatureStatistics) -> float:
    """Frechet distance of two Gaussians (FID, arXiv 1706.08500, Eq. 6).

    ``|m - m_r|^2 + Tr(C + C_r - 2 (C C_r)^(1/2))``. The trace of the root is the sum of the square roots of the
    eigenvalues of ``C_r^(1/2) C C_r^(1/2)``, which is symmetric, so that no eigenvalue is complex.

    Args:
        sample: statistics of generated images.
        reference: statistics of real images.

    Raises:
        VaevqMedError: the features are of different lengths.

    Examples:
        >>> flat = FeatureStatistics(torch.zeros(2).double(), torch.eye(2).double(), 10)
        >>> wide = FeatureStatistics(torch.tensor([3.0, 0.0]).double(), 4 * torch.eye(2).double(), 10)
        >>> round(frechet_distance(wide, flat), 6)
        11.0
    """
    if sample.mean.shape != reference.mean.shape:
        raise VaevqMedError(
            f"found statistics of {len(sample.mean)} features, expected {len(reference.mean)} as the reference has"
        )
    return _distance(sample, reference, _square_root(reference.covariance))


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
        if is_distributed():
            sums, count = sum_in_place(sums.clone()), int(sum_in_place(torch.tensor(count, device=sums.device)))
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


@dataclass(frozen=True)
class Extrapolation:
    """A Frechet distance extrapolated over the number of images.

    Attributes:
        value: the intercept, for infinitely many generated images.
        slope: of the distance over 1 / N.
        r_squared: share of the distances' variance that the line explains.
        counts: N of each point.
        distances: at each N.
    """

    value: float
    slope: float
    r_squared: float
    counts: Sequence[int]
    distances: Sequence[float]


def extrapolate_frechet_distance(
    features: Tensor, reference: FeatureStatistics, *, num_points: int = 15, seed: int = 0
) -> Extrapolation:
    """FID_infinity (arXiv 1911.07023, section 3): the intercept of a line through FID over 1 / N.

    FID's bias goes as 1 / N to first order. ``num_points`` sizes N stand evenly between a tenth of the images and all
    of them; each distance is that of a random subset. Only the bias of the generated images is taken out: the
    reference's stays as it is. The line presumes that N is well above the number of features.

    Args:
        features: ``[N, F]`` of generated images.
        reference: statistics of real images.
        num_points: distances that the line is fitted to, at least 2.
        seed: of the subsets.

    Raises:
        VaevqMedError: there are fewer than :data:`MIN_EXTRAPOLATED` images.
    """
    total = len(features)
    if total < MIN_EXTRAPOLATED:
        raise VaevqMedError(f"found {total} images, expected at least {MIN_EXTRAPOLATED} to extrapolate FID from")
    counts = np.linspace(total // 10, total, num_points).round().astype(int).tolist()
    generator = torch.Generator().manual_seed(seed)
    root = _square_root(reference.covariance)
    distances = []
    for count in counts:
        chosen = torch.randperm(total, generator=generator)[:count].to(features.device)
        distances.append(_distance(FeatureStatistics.of(features[chosen]), reference, root))
    inverse, values = 1 / np.array(counts), np.array(distances)
    slope, intercept = np.polyfit(inverse, values, 1)
    residual = values - (slope * inverse + intercept)
    spread = ((values - values.mean()) ** 2).sum()
    return Extrapolation(
        value=float(intercept),
        slope=float(slope),
        r_squared=float(1 - (residual**2).sum() / spread) if spread > 0 else 1.0,
        counts=counts,
        distances=distances,
    )
