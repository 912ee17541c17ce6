"""Two levels without parameters: the mean of a cell, and what it leaves (two scales of VAR, arXiv 2404.02905)."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor

from vaevq_med.networks.outputs import Posterior
from vaevq_med.networks.posterior import DiagonalGaussian
from vaevq_med.networks.quantizers.base import straight_through
from vaevq_med.networks.quantizers.two_level import TwoLevelQuantizer


class ResidualTwoLevel(TwoLevelQuantizer):
    """Two levels without parameters of their own: the mean of a cell, and what it leaves.

    Of one position a cell it is a residual quantizer of two stages. The arguments are those of
    :class:`TwoLevelQuantizer`.

    Example:
        >>> from vaevq_med.networks.quantizers import VectorQuantizer
        >>> levels = [VectorQuantizer(num_embeddings=8, embedding_dim=2) for _ in range(2)]
        >>> quantizer = ResidualTwoLevel(top=levels[0], bottom=levels[1], cell_size=4)
        >>> quantizer(torch.zeros(1, 8, 2, 2)).indices.shape, quantizer.bits_per_position
        (torch.Size([1, 2, 2, 5]), 15.0)
    """

    def coarse(self, fine: Tensor) -> Tensor:
        """The mean."""
        return fine.mean(dim=-1)

    def rest(self, fine: Tensor, top: Tensor) -> Tensor:
        """The differences to the top code."""
        return fine - top.detach().unsqueeze(-1)

    def join(self, top: Tensor, bottom: Tensor) -> Tensor:
        """The sums."""
        return top.unsqueeze(-1) + bottom

    def fed(
        self, fine: Tensor, coarse: Tensor, rest: Tensor, top: Tensor, bottom: Tensor, opened: Tensor | None
    ) -> Tensor:
        """One straight-through gradient: of a cell without bottom codes to its mean, else to each position."""
        if opened is None:
            return straight_through(self.join(top, bottom), fine)
        given = opened.detach()
        carrier = torch.where(given > 0, fine, coarse.unsqueeze(-1))
        # The difference is exactly zero; through it a gradient reaches a gate that learns.
        return straight_through(self.join(top, bottom * given), carrier) + bottom.detach() * (opened - given)

    def coarse_posterior(self, posterior: Posterior | None) -> Posterior | None:
        """That of the mean of independent positions."""
        if posterior is None:
            return None
        mean, logvar = self.positions_of(posterior.mean), self.positions_of(posterior.logvar)
        of_mean = logvar.logsumexp(dim=-1) - 2 * math.log(self.cell_size)
        return cast(Posterior, DiagonalGaussian(self.coarse(mean), of_mean))

    def rest_posterior(self, posterior: Posterior | None, top: Tensor) -> Posterior | None:
        """That of the differences to the top codes."""
        if posterior is None:
            return None
        mean, logvar = self.positions_of(posterior.mean), self.positions_of(posterior.logvar)
        return cast(Posterior, DiagonalGaussian(self.rest(mean, top), logvar))
