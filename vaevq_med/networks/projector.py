"""The trained half of an alignment with a frozen feature network: latents, or codes, to its features.

VA-VAE (arXiv 2501.01423) maps a sample of the posterior by a 1x1 convolution without a bias; the head of FQGAN
(arXiv 2411.16681) reads the codes of one sub-codebook. What the map gives is compared by
:class:`vaevq_med.losses.AlignmentLoss`. It belongs to the tokenizer, so that checkpoints, averages and several
processes keep it, and nothing but training reads it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.ranges import check_choice, check_sizes

READS = ("sample", "quantized")


class Projector(nn.Module):
    """A linear map of the channels of each position, without a bias.

    Its start is drawn from torch's global generator, which it leaves where it was: what is built or drawn after it is
    what it would be without.

    Args:
        embedding_dim: D, of the tokenizer.
        num_features: F, channels of the feature maps that are met.
        reads: ``"sample"``, a sample of the posterior, or the latent where there is none; or ``"quantized"``, the
            straight-through codes that the decoder is given.
        channels: the first channel that is read and the one after the last; None for all D. The codebook g of G
            of a factorized quantizer has the channels from ``g D / G`` to ``(g + 1) D / G``.

    Raises:
        VaevqMedError: for a size below 1, another ``reads``, or channels that are not among the D.

    Example:
        >>> Projector(embedding_dim=4, num_features=6)(torch.zeros(2, 4, 8, 8)).shape
        torch.Size([2, 6, 8, 8])
    """

    def __init__(
        self,
        *,
        embedding_dim: int,
        num_features: int,
        reads: str = "sample",
        channels: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        check_sizes(embedding_dim=embedding_dim, num_features=num_features)
        self.reads = check_choice("reads", reads, READS)
        bounds = list(channels) if channels is not None else [0, embedding_dim]
        if len(bounds) != 2 or not 0 <= bounds[0] < bounds[1] <= embedding_dim:
            raise VaevqMedError(
                f"channels is {channels}; expected the first and the one after the last, within 0 and {embedding_dim}"
            )
        self.embedding_dim = embedding_dim
        self.num_features = num_features
        self.first, self.end = bounds
        with torch.random.fork_rng(devices=()):
            self.layer = nn.Linear(self.end - self.first, num_features, bias=False)

    def forward(self, values: Tensor) -> Tensor:
        """``[B, D, *grid]`` to ``[B, F, *grid]``."""
        return F.linear(values[:, self.first : self.end].movedim(1, -1), self.layer.weight).movedim(-1, 1)
