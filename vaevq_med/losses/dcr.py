"""Distribution consistency (DCR): the codebook's Wasserstein distance to the prior."""

from __future__ import annotations

import torch
from torch import Tensor

from vaevq_med.errors import VaevqMedError
from vaevq_med.losses.base import LossTerm
from vaevq_med.outputs import TokenizerOutput

_MIN_VARIANCE = 1e-14


def gaussian_wasserstein2_to_standard(codebook: Tensor) -> Tensor:
    """Squared 2-Wasserstein distance of the codebook's Gaussian to N(0, I) (VAEVQ, arXiv 2511.06863, Eq. 11).

    ``||m||^2 + Tr S - 2 Tr S^(1/2) + D`` for the codewords' mean m and unbiased covariance S. Eq. 11 leaves out
    Tr I = D, so that a standard normal codebook would read -D instead of 0; the gradient is the same. The square root
    is taken of S's eigenvalues, never of its eigenvectors, whose gradient is not finite where eigenvalues meet: at
    the prior, the term's own minimum.

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
        variances = torch.linalg.eigvalsh(covariance).clamp_min(_MIN_VARIANCE)
        return (mean.square().sum() + (variances.sqrt() - 1).square().sum()).to(dtype)


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
