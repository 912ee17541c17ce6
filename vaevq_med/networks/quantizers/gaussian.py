"""Gaussian Quant (GQ, arXiv 2512.06609): a Gaussian VAE made discrete by a codebook that nobody trains.

The codebook is K draws from the prior N(0, 1); the index of a group of channels is that of the codeword nearest to the
posterior's mean in units of its deviation, ``argmin_k sum_i ((c_ki - mean_i) / std_i)^2``. Once log K exceeds the
group's KL divergence from the prior, the chance that the codeword is farther than ``std`` from the mean falls doubly
exponentially, so that a VAE whose decoder was trained on samples can decode codewords in their place. What is trained
is the VAE, with its KL divergence held near log K: see the overlay ``gq`` and :class:`~vaevq_med.losses.KLLoss`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.outputs import Posterior, QuantizerOutput
from vaevq_med.networks.quantizers.base import (
    ASSIGNMENTS,
    Quantizer,
    channels_first,
    deviations,
    on_grid,
    rows,
    straight_through,
)
from vaevq_med.networks.quantizers.nearest import nearest_codeword
from vaevq_med.networks.ranges import check_choice, check_sizes


class GaussianQuantizer(Quantizer):
    """A fixed codebook of standard normal draws, the same for every group of channels.

    It has no losses and nothing to train. The gradient passes straight through, for objectives that read the
    quantized path; the published recipe reads the continuous path alone.

    Args:
        num_embeddings: K.
        embedding_dim: D, a multiple of ``dims_per_codebook``.
        dims_per_codebook: consecutive channels that share an index; 1 quantizes each channel by itself. There are
            ``G = D / dims_per_codebook`` indices a position.
        assignment: ``"posterior"``, in units of the posterior's deviation, or ``"euclidean"``.
        seed: of the draws.

    Raises:
        VaevqMedError: sizes that do not fit together, or another assignment.

    Example:
        >>> from vaevq_med.networks.posterior import DiagonalGaussian
        >>> quantizer = GaussianQuantizer(num_embeddings=16, embedding_dim=4, dims_per_codebook=2)
        >>> mean = torch.zeros(1, 4, 2, 2)
        >>> quantizer(mean, DiagonalGaussian(mean, mean)).indices.shape, quantizer.bits_per_position
        (torch.Size([1, 2, 2, 2]), 8.0)
    """

    embedding: Tensor

    def __init__(
        self,
        *,
        num_embeddings: int,
        embedding_dim: int,
        dims_per_codebook: int = 1,
        assignment: str = "posterior",
        seed: int = 42,
    ) -> None:
        super().__init__()
        check_sizes(num_embeddings=num_embeddings, embedding_dim=embedding_dim, dims_per_codebook=dims_per_codebook)
        if embedding_dim % dims_per_codebook:
            raise VaevqMedError(
                f"embedding_dim is {embedding_dim}; expected a multiple of dims_per_codebook {dims_per_codebook}"
            )
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.dims_per_codebook = dims_per_codebook
        self.num_codebooks = embedding_dim // dims_per_codebook
        self.assignment = check_choice("assignment", assignment, ASSIGNMENTS)
        # In the state, so that a checkpoint does not hang on how a version of torch draws.
        draws = torch.randn(num_embeddings, dims_per_codebook, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("embedding", draws)

    def codebook(self) -> Tensor:
        """The table, once a group: ``[G, K, D / G]``."""
        return self.embedding.expand(self.num_codebooks, -1, -1)

    def codes_of(self, indices: Tensor) -> Tensor:
        """Codes ``[B, D, *grid]``, the groups' side by side."""
        return channels_first(F.embedding(indices, self.embedding).flatten(-2))

    def assign(self, z: Tensor, posterior: Posterior | None) -> Tensor:
        """Indices ``[B, *grid, G]`` of ``z`` ``[B, D, *grid]``.

        Raises:
            VaevqMedError: the assignment needs a posterior and there is none.
        """
        std = deviations(self.assignment, posterior)
        precision = None if std is None else self._groups(std).square().reciprocal()
        indices = nearest_codeword(self._groups(z), self.embedding, precision=precision)
        return on_grid(indices, z, self.num_codebooks)

    def _groups(self, z: Tensor) -> Tensor:
        """``[B, D, *grid]`` as ``[B n G, D / G]``, detached."""
        return rows(z.detach().float()).reshape(-1, self.dims_per_codebook)

    def forward(self, z: Tensor, posterior: Posterior | None = None) -> QuantizerOutput:
        """Quantize ``z`` ``[B, D, *grid]`` group by group."""
        self.check_latent(z)
        with torch.autocast(z.device.type, enabled=False):
            z = z.float()
            indices = self.assign(z, posterior)
            codes = self.codes_of(indices)
            quantized = straight_through(codes, z)
            return QuantizerOutput(quantized=quantized, codes=codes, indices=indices, codebook=self.codebook())
