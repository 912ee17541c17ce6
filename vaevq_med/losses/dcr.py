"""Distribution consistency (DCR): the codebook's Wasserstein distance to the prior."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.losses.base import LossTerm
from vaevq_med.networks.outputs import TokenizerOutput
from vaevq_med.networks.polar import polar_factor


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
        dtype = torch.promote_types(codebook.dtype, torch.float32)
        # In fp32 the spread of a codebook that starts at U(-1/K, 1/K) drowns in rounding.
        codebook = codebook.double()
        mean = codebook.mean(dim=-2, keepdim=True)
        points = (codebook - mean) / math.sqrt(codebook.shape[-2] - 1)
        with torch.no_grad():
            polar = polar_factor(points)
            dimensions = codebook.shape[:-2].numel() * codebook.shape[-1]
            without_extent = dimensions - polar.square().sum()
        return (mean.square().sum() + (points - polar).square().sum() + without_extent).to(dtype)


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
