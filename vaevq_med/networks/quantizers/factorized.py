"""Factorized quantization (FQGAN, arXiv 2411.16681): one large codebook as several small ones on their own channels.

The latent's channels are cut into G groups; sub-codebook g quantizes group g, and the codes stand side by side. With K
codewords each, ``K^G`` combinations cost a search of ``G K``. So that the sub-codebooks do not say the same thing, the
codes chosen at one position are kept at right angles (the disentanglement regularization):
``mean over positions and pairs i < j of cos(q_i, q_j)^2``.

As in the authors' code, that gradient passes the straight-through estimator to the encoder; the codebooks follow
through the codebook loss. Their frozen-vision-model representation learning (a head that predicts features of CLIP or
DINO from a sub-codebook's codes), their six-layer transformer before each sub-codebook and their entropy term are left
out: here the tokenizer's 1x1 convolution gives each group its own linear map of the features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.outputs import Posterior, QuantizerOutput
from vaevq_med.networks.quantizers.base import vq_losses
from vaevq_med.networks.quantizers.grouped import GroupedQuantizer, look_up_groups


class FactorizedQuantizer(GroupedQuantizer):
    """Sub-codebooks on channels of their own, with a penalty on codes that point the same way.

    The losses are ``codebook`` and ``commitment``, means over every element and so averaged over the sub-codebooks, and
    ``disentanglement``, unweighted (the authors' weight is 0.1).

    Args:
        num_embeddings: K, codewords of each sub-codebook.
        embedding_dim: D, a multiple of G; the authors' is 8 a sub-codebook.
        num_codebooks: G, at least 2.
        normalize: scale latent groups and codewords to length 1, as the authors do.
        init: ``"uniform"`` draws from U(-1/K, 1/K), ``"normal"`` from N(0, 1).

    Raises:
        VaevqMedError: fewer than two sub-codebooks, sizes that do not fit together, or another ``init``.

    Example:
        >>> quantizer = FactorizedQuantizer(num_embeddings=8, embedding_dim=4, num_codebooks=2)
        >>> output = quantizer(torch.ones(1, 4, 2, 2))
        >>> output.indices.shape, sorted(output.losses)
        (torch.Size([1, 2, 2, 2]), ['codebook', 'commitment', 'disentanglement'])
    """

    def __init__(
        self,
        *,
        num_embeddings: int,
        embedding_dim: int,
        num_codebooks: int = 2,
        normalize: bool = True,
        init: str = "uniform",
    ) -> None:
        if num_codebooks < 2:
            raise VaevqMedError(f"num_codebooks is {num_codebooks}; expected at least 2 to factorize a codebook")
        super().__init__(
            num_embeddings=num_embeddings,
            embedding_dim=embedding_dim,
            num_codebooks=num_codebooks,
            normalize=normalize,
            init=init,
        )

    def forward(self, z: Tensor, posterior: Posterior | None = None) -> QuantizerOutput:
        """Quantize ``z`` ``[B, D, *grid]``; the gradient passes straight through to the (normalized) groups."""
        self.check_latent(z)
        with torch.autocast(z.device.type, enabled=False):
            z = self.scale(z.float())
            codebook = self.codebook()
            indices = self.assign(z, codebook)
            codes = look_up_groups(indices, codebook)
            quantized = codes.detach() + (z - z.detach())
            losses = {**vq_losses(z, codes), "disentanglement": mean_squared_cosine(self.split(quantized))}
            return QuantizerOutput(quantized=quantized, codes=codes, indices=indices, losses=losses, codebook=codebook)


def mean_squared_cosine(groups: Tensor) -> Tensor:
    """Squared cosine of two groups' vectors, averaged over positions and pairs of groups.

    Args:
        groups: ``[B, G, C, *grid]``, G at least 2.

    >>> round(mean_squared_cosine(torch.tensor([[3.0, 4.0], [0.0, 2.0]]).view(1, 2, 2, 1, 1)).item(), 4)
    0.64
    """
    unit = F.normalize(groups, dim=2)
    cosines = torch.einsum("bic...,bjc...->bij...", unit, unit)
    first, second = torch.triu_indices(groups.shape[1], groups.shape[1], offset=1, device=groups.device)
    return cosines[:, first, second].square().mean()
