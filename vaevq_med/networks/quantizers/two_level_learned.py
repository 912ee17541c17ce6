"""Two levels that meet by learned maps of a cell (VQ-VAE-2, arXiv 1906.00446): convolutions of stride = kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.quantizers.base import CodebookQuantizer, straight_through
from vaevq_med.networks.quantizers.gates import Gate
from vaevq_med.networks.quantizers.two_level import TwoLevelQuantizer


class LearnedTwoLevel(TwoLevelQuantizer):
    """Two levels that meet by learned maps of a cell, which start as those of :class:`ResidualTwoLevel`.

    The arguments are those of :class:`TwoLevelQuantizer`.

    Raises:
        VaevqMedError: as there, or a level assigns by a posterior: of what the maps make none is known.
    """

    def __init__(
        self, *, top: CodebookQuantizer, bottom: CodebookQuantizer, cell_size: int = 4, gate: Gate | None = None
    ) -> None:
        super().__init__(top=top, bottom=bottom, cell_size=cell_size, gate=gate)
        if "posterior" in (top.assignment, bottom.assignment):
            raise VaevqMedError("assignment is 'posterior' in a level of learned maps; expected 'euclidean' in both")
        width, channels = self.embedding_dim, top.embedding_dim
        self.to_coarse = nn.Linear(width, channels)
        self.to_rest = nn.Linear(channels + width, width)
        self.to_codes = nn.Linear(channels + width, width)
        self._start()

    @torch.no_grad()
    def _start(self) -> None:
        channels = self.top.embedding_dim
        mean = torch.eye(channels).repeat(1, self.cell_size) / self.cell_size  # [d, n d]
        spread = torch.eye(channels).repeat(self.cell_size, 1)  # [n d, d]
        self.to_coarse.weight.copy_(mean)
        for linear, sign in ((self.to_rest, -1), (self.to_codes, 1)):
            linear.weight.copy_(torch.cat([sign * spread, torch.eye(self.embedding_dim)], dim=1))
        for linear in (self.to_coarse, self.to_rest, self.to_codes):
            linear.bias.zero_()

    def _map(self, linear: nn.Linear, parts: Sequence[Tensor]) -> Tensor:
        """``[B, d, *grid, m]`` of parts of a cell, ``[B, d, *grid, .]`` each."""
        cells = torch.cat(list(parts), dim=-1).movedim(1, -1).flatten(-2)  # [B, *grid, . d]
        return linear(cells).unflatten(-1, (-1, self.top.embedding_dim)).movedim(-1, 1)

    def coarse(self, fine: Tensor) -> Tensor:
        """E."""
        return self._map(self.to_coarse, [fine]).squeeze(-1)

    def rest(self, fine: Tensor, top: Tensor) -> Tensor:
        """H, through whose top code a gradient passes to E."""
        return self._map(self.to_rest, [top.unsqueeze(-1), fine])

    def join(self, top: Tensor, bottom: Tensor) -> Tensor:
        """P."""
        return self._map(self.to_codes, [top.unsqueeze(-1), bottom])

    def fed(
        self, fine: Tensor, coarse: Tensor, rest: Tensor, top: Tensor, bottom: Tensor, opened: Tensor | None
    ) -> Tensor:
        """P of straight-through codes of both levels."""
        through = straight_through(bottom, rest)
        return self.join(straight_through(top, coarse), through if opened is None else through * opened)
