"""Distribution consistency (DCR): the codebook's Wasserstein distance to the prior."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vaevq_med.errors import VaevqMedError
from vaevq_med.losses.base import LossTerm
from vaevq_med.outputs import TokenizerOutput

_MIN_VARIANCE = 1e-14
_PRODUCTS = 50


def gaussian_wasserstein2_to_standard(codebook: Tensor) -> Tensor:
    """Squared 2-Wasserstein distance of the codebook's Gaussian to N(0, I) (VAEVQ, arXiv 2511.06863, Eq. 11).

    ``||m||^2 + Tr S - 2 Tr S^(1/2) + D`` for the codewords' mean m and unbiased covariance S. Eq. 11 leaves out
    Tr I = D, so that a standard normal codebook would read -D instead of 0; the gradient is the same. It is
    ``I - S^(-1/2)`` by S, written down as such: that of eigenvectors is not finite where eigenvalues meet, at the
    prior, the term's own minimum.

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
        dtype = torch.promote_types(codebook.dtype, torch.float32)
        # In fp32 the eigenvalues of a codebook that starts at U(-1/K, 1/K) drown in rounding.
        codebook = codebook.double()
        mean = codebook.mean(dim=-2)
        centered = codebook - mean.unsqueeze(-2)
        covariance = centered.mT @ centered / (codebook.shape[-2] - 1)
        return (mean.square().sum() + _SquaredDistanceToIdentity.apply(covariance)).to(dtype)


class _SquaredDistanceToIdentity(torch.autograd.Function):
    """``Tr S - 2 Tr S^(1/2) + D`` of symmetric ``[..., D, D]``, summed."""

    @staticmethod
    def forward(ctx: Any, covariance: Tensor) -> Tensor:
        root, inverse = (by_eigenvalues if covariance.device.type == "cpu" else by_products)(covariance)
        ctx.save_for_backward(inverse)
        traces = covariance.diagonal(dim1=-2, dim2=-1) - 2 * root.diagonal(dim1=-2, dim2=-1) + 1
        return traces.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        (inverse,) = ctx.saved_tensors
        return upstream * (torch.eye(inverse.shape[-1], dtype=inverse.dtype, device=inverse.device) - inverse)


def by_eigenvalues(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """``S^(1/2)`` and ``S^(-1/2)`` of symmetric float64 ``[..., D, D]``; variances below 1e-14 count as that."""
    variances, vectors = torch.linalg.eigh(covariance)
    deviations = variances.clamp_min(_MIN_VARIANCE).sqrt().unsqueeze(-2)
    return (vectors * deviations) @ vectors.mT, (vectors / deviations) @ vectors.mT


def by_products(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """The same up to rounding, of ``S + 1e-14 I``, by the coupled iteration of Newton and Schulz.

    It takes a fixed number of matrix products, in each of which the root of a small eigenvalue grows by half: enough
    for one of 1e-15 of the largest. An eigenvalue routine makes the host wait for the device to see whether it went
    well.
    """
    identity = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
    matrix = covariance + _MIN_VARIANCE * identity
    scale = torch.linalg.matrix_norm(matrix, keepdim=True)  # of Frobenius, at least the largest eigenvalue
    root, inverse = matrix / scale, identity.expand_as(matrix)
    for _ in range(_PRODUCTS):
        step = 1.5 * identity - 0.5 * inverse @ root
        root, inverse = root @ step, step @ inverse
    return root * scale.sqrt(), inverse * scale.rsqrt()


class DCRLoss(LossTerm):
    """:func:`gaussian_wasserstein2_to_standard` of the step's codebook."""

    def forward(self, target: Tensor, output: TokenizerOutput) -> Tensor:
        """The term, a scalar.

        Raises:
            VaevqMedError: the quantizer has no explicit codebook, or, in training, one without a gradient.
        """
        if output.quantizer.codebook is None:
            raise VaevqMedError(
                "DCRLoss needs an explicit codebook; this quantizer has none. Remove 'dcr' from objective.weights"
            )
        if torch.is_grad_enabled() and not output.quantizer.codebook.requires_grad:
            raise VaevqMedError(
                "DCRLoss needs a codebook that takes a gradient; this quantizer's is fixed or made of averages. "
                "Set objective#weights#dcr to 0"
            )
        return gaussian_wasserstein2_to_standard(output.quantizer.codebook)
