"""No quantizer: the latent itself goes to the decoder, which makes a VAE or an autoencoder of a tokenizer.

It is what a tokenizer is before it is made discrete (OneVAE, arXiv 2508.09857; Quantize-then-Rectify, 2507.10547): any
quantizer can be set into the network that was trained with it.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.outputs import Posterior, QuantizerOutput
from vaevq_med.networks.quantizers.base import Quantizer
from vaevq_med.networks.ranges import check_sizes


class Continuous(Quantizer):
    """The identity: no codewords, no indices, no bits.

    Args:
        embedding_dim: D.

    Example:
        >>> output = Continuous(embedding_dim=4)(torch.ones(1, 4, 2, 2))
        >>> output.indices.shape, output.quantized.sum().item()
        (torch.Size([1, 2, 2, 0]), 16.0)
    """

    size_arguments: ClassVar[tuple[str, ...]] = ("embedding_dim",)

    num_embeddings = 0
    num_codebooks = 0
    is_discrete = False

    def __init__(self, *, embedding_dim: int) -> None:
        super().__init__()
        check_sizes(embedding_dim=embedding_dim)
        self.embedding_dim = embedding_dim

    @property
    def bits_per_position(self) -> None:
        """None: a latent of numbers takes as many as one gives it."""
        return

    def codebook(self) -> None:
        """None."""
        return

    def forward(self, z: Tensor, posterior: Posterior | None = None) -> QuantizerOutput:
        """``z`` ``[B, D, *grid]`` itself."""
        self.check_latent(z)
        indices = torch.zeros(z.shape[0], *z.shape[2:], 0, dtype=torch.int64, device=z.device)
        z = z.float()
        return QuantizerOutput(quantized=z, codes=z, indices=indices)

    def codes_of(self, indices: Tensor) -> Tensor:
        """Refuse.

        Raises:
            VaevqMedError: always.
        """
        raise VaevqMedError("found a tokenizer without a quantizer, which has no indices; expected one with codewords")

    def check_indices(self, indices: Tensor) -> None:
        """Refuse, see :meth:`codes_of`."""
        self.codes_of(indices)
