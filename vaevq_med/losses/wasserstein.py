"""Squared 2-Wasserstein distances between the Gaussians of point sets, by products of matrices alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.polar import polar_factor
from vaevq_med.networks.processes import is_distributed, of_each_process, rank, world_size


def gaussian_wasserstein2_to_standard(codebook: Tensor) -> Tensor:
    """Squared 2-Wasserstein distance of the codebook's Gaussian to N(0, I) (VAEVQ, arXiv 2511.06863, Eq. 11).

    ``||m||^2 + Tr S - 2 Tr S^(1/2) + D`` for the codewords' mean m and unbiased covariance S. Eq. 11 leaves out
    Tr I = D, so that a standard normal codebook would read -D instead of 0; the gradient is the same.

    With X the centered codewords over ``sqrt(K - 1)``, ``S = X^T X`` and ``Tr S^(1/2)`` is the sum of X's singular
    values, which is ``Tr U^T X`` for X's polar factor U: what depends on S is ``||X - U||^2 + D - ||U||^2``, and its
    gradient ``2 (X - U)``, as if U were constant. It is bounded and accurate also where eigenvalues meet (at the
    prior, the term's own minimum) or differ by 1e12, and a GPU's host does not wait for it, as it would for
    eigenvalues. A direction without extent, such as with fewer codewords than dimensions, gets no gradient. There is
    no second derivative.

    Several codebooks ``[G, K, D]`` that quantize channels of their own make a product distribution, whose squared
    distance is the sum of theirs.

    Args:
        codebook: ``[K, D]`` or ``[G, K, D]``, K at least 2.

    Returns:
        A scalar in fp32 (fp64 for fp64), at least 0 up to rounding.

    Raises:
        VaevqMedError: fewer than two codewords.

    Example:
        >>> round(gaussian_wasserstein2_to_standard(torch.tensor([[1.0], [3.0], [5.0]])).item(), 4)
        10.0
    """
    if codebook.ndim not in (2, 3) or codebook.shape[-2] < 2:
        raise VaevqMedError(
            f"the codebook has shape {tuple(codebook.shape)}; expected [K, D] or [G, K, D] with K of 2 or more"
        )
    with torch.autocast(codebook.device.type, enabled=False):
        mean, points = _moments(codebook)
        with torch.no_grad():
            polar = polar_factor(points)
            dimensions = codebook.shape[:-2].numel() * codebook.shape[-1]
            without_extent = dimensions - polar.square().sum()
        distance = mean.square().sum() + (points - polar).square().sum() + without_extent
        return distance.to(torch.promote_types(codebook.dtype, torch.float32))


def gaussian_wasserstein2(first: Tensor, second: Tensor) -> Tensor:
    """Squared 2-Wasserstein distance between the Gaussians of two point sets (Wasserstein-VQ, arXiv 2506.15078).

    ``||m_1 - m_2||^2 + Tr S_1 + Tr S_2 - 2 Tr (S_1^(1/2) S_2 S_1^(1/2))^(1/2)`` for means m and unbiased covariances S.
    The last trace is the nuclear norm of ``L_1^T L_2`` for any factors ``S = L L^T``.

    With X the centered points over ``sqrt(N - 1)``, U its polar factor and ``R = U^T X = S^(1/2)``, V the polar factor
    of ``R_1 R_2``: the nuclear norm is ``Tr V^T R_1 R_2``, and its gradients by X_1 and X_2 are ``U_1 V R_2`` and
    ``U_2 V^T R_1``, where Monge's map between the two Gaussians takes the points. All are products of matrices: a GPU's
    host waits for none, and the gradient is bounded and accurate also where the sets are equal. Points that lie in a
    plane stay in one, which may turn, and the other set shrinks across it. Where ``R_1 R_2`` has less than 1e-7 of its
    whole extent, the gradient of the nuclear norm is less than full. There is no second derivative.

    Args:
        first: points ``[N, D]``, or ``[G, N, D]`` for the sum over G pairs; N at least 2.
        second: ``[K, D]`` or ``[G, K, D]``, K at least 2.

    Returns:
        A scalar in fp32 (fp64 where one of them is), at least 0 up to rounding, with a gradient to both.

    Raises:
        VaevqMedError: fewer than two points, or sets that do not match.

    Example:
        >>> points = torch.tensor([[1.0], [3.0], [5.0]])  # of mean 3 and variance 4
        >>> round(gaussian_wasserstein2(points, torch.tensor([[-1.0], [0.0], [1.0]])).item(), 4)
        10.0
    """
    for points in (first, second):
        if points.ndim not in (2, 3) or points.shape[-2] < 2:
            raise VaevqMedError(
                f"the points have shape {tuple(points.shape)}; expected [N, D] or [G, N, D] with N of 2 or more"
            )
    if (first.shape[:-2], first.shape[-1]) != (second.shape[:-2], second.shape[-1]):
        raise VaevqMedError(
            f"the points have shapes {tuple(first.shape)} and {tuple(second.shape)}; expected two that differ in their "
            "number alone"
        )
    with torch.autocast(first.device.type, enabled=False):
        distance = _distance(_moments(first), _moments(second))
        return distance.to(torch.promote_types(torch.promote_types(first.dtype, second.dtype), torch.float32))


def wasserstein2_to_features(features: Tensor, codebook: Tensor) -> Tensor:
    """:func:`gaussian_wasserstein2` of the features of all processes and a codebook that is the same on each.

    Averaged over the processes, as DDP does, its gradient is that of one process with all the features.

    Args:
        features: of this process, ``[N, D]`` or ``[G, N, D]``; N may differ from process to process.
        codebook: ``[K, D]`` or ``[G, K, D]``.

    Raises:
        VaevqMedError: as :func:`gaussian_wasserstein2`; a process may have a single feature where there are several.
    """
    if not is_distributed():
        return gaussian_wasserstein2(features, codebook)
    with torch.autocast(features.device.type, enabled=False):
        distance = _distance(_moments_of_all_processes(features), _moments(codebook))
        return distance.to(torch.promote_types(torch.promote_types(features.dtype, codebook.dtype), torch.float32))


def _distance(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> Tensor:
    """The distance of two Gaussians, each a mean and points whose Gram matrix is the covariance."""
    (mean1, points1), (mean2, points2) = first, second
    with torch.no_grad():
        polar1, polar2 = polar_factor(points1), polar_factor(points2)
        root1, root2 = polar1.mT @ points1, polar2.mT @ points2  # [..., D, D]
        product = root1 @ root2
        turn = polar_factor(product)
        moved1, moved2 = polar1 @ (turn @ root2), polar2 @ (turn.mT @ root1)
        # What the two squares below have too much of.
        excess = moved1.square().sum() + moved2.square().sum() - 2 * (turn * product).sum()
    distance = (mean1 - mean2).square().sum() - excess
    return distance + (points1 - moved1).square().sum() + (points2 - moved2).square().sum()


def _moments(points: Tensor) -> tuple[Tensor, Tensor]:
    """The mean ``[..., 1, D]`` and the centered points over ``sqrt(N - 1)``, whose Gram matrix is the covariance."""
    # In fp32 the spread of a codebook that starts at U(-1/K, 1/K) drowns in rounding.
    points = points.double()
    mean = points.mean(dim=-2, keepdim=True)
    return mean, (points - mean) / math.sqrt(points.shape[-2] - 1)


def _moments_of_all_processes(points: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`_moments` of the points of all processes; the second is another matrix of the same Gram matrix.

    A process' centered points X have the Gram matrix of ``R = U^T X``, ``[D, D]`` with U their polar factor, and the
    gradient by R goes on to X as if U were constant. The matrix is made of every process' R and of the ways from the
    mean of all to its own, so that D + 2 rows of each are exchanged and no point is.
    """
    points = points.double()
    count = points.shape[-2]
    mean = points.mean(dim=-2, keepdim=True)
    centered = points - mean
    root = polar_factor(centered.detach()).mT @ centered  # [..., D, D]
    own = torch.cat([root, mean, torch.full_like(mean, count)], dim=-2)  # [..., D + 2, D]
    every = of_each_process(own)
    # The gradient is averaged over the processes, where that of the whole is a sum over them.
    every[rank()] = every[rank()] + world_size() * (own - own.detach())
    roots, means, counts = every[..., :-2, :], every[..., -2:-1, :], every[..., -1:, :].detach()
    total = counts.sum(dim=0)
    mean = (counts * means).sum(dim=0) / total  # [..., 1, D]
    ways = counts.sqrt() * (means - mean)
    matrix = torch.cat([roots, ways], dim=-2) / (total - 1).sqrt()  # [P, ..., D + 1, D]
    return mean, matrix.movedim(0, -3).flatten(-3, -2)
