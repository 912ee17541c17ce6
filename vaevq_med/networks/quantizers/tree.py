"""A tree over one codebook: each coarse codeword owns finer ones (what VAEVQ, arXiv 2511.06863, leaves to the future).

Tree-structured vector quantization (Buzo, Gray, Gray & Markel, IEEE Trans. ASSP 1980) of two levels. The top code of
a cell is ``e_k``; each of its n finer positions takes the nearest child of k, ``e_k + o_km``. The K^2 leaves are
one codebook, of which a position is compared with K + K codewords. A cell takes ``(1 + n) log2 K`` bits.

A child is held by its offset from its parent: one that no latent has found stays near it, and a cell without bottom
codes is the parent. Were the offsets of all parents the same, this would be ``ResidualTwoLevel``.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vaevq_med.networks.compiling import outside_compiled_graphs
from vaevq_med.networks.outputs import Posterior, QuantizerOutput
from vaevq_med.networks.quantizers.base import (
    Cluster,
    CodebookQuantizer,
    channels_first,
    channels_last,
    new_codewords,
    put_at_centers,
    straight_through,
    vq_losses,
)
from vaevq_med.networks.quantizers.gates import Gate
from vaevq_med.networks.quantizers.two_level import with_absent
from vaevq_med.networks.quantizers.two_level_residual import ResidualTwoLevel

# Numbers of children held at once.
_AT_ONCE = {"cpu": 2**20, "other": 2**24}


class TreeQuantizer(ResidualTwoLevel):
    """Two levels whose bottom codebook is that of the top code.

    A store, a generator and the codec know one K, and so each parent has as many children as there are parents. The
    children are free parameters, which learn by the VQ losses.

    Args:
        top: of the cells' means, ``[B, D / n, *grid]``.
        cell_size: n, finer positions of a cell; with one it is a tree of single positions.
        gate: which cells have bottom codes; without one all have.
        init: of the offsets: ``"uniform"`` draws from U(-1/K, 1/K), ``"normal"`` from N(0, 1).

    Raises:
        VaevqMedError: as for :class:`ResidualTwoLevel`, or for another ``init``.

    Example:
        >>> from vaevq_med.networks.quantizers import VectorQuantizer
        >>> quantizer = TreeQuantizer(top=VectorQuantizer(num_embeddings=8, embedding_dim=2), cell_size=1)
        >>> quantizer(torch.zeros(1, 2, 2, 2)).indices.shape, tuple(quantizer.leaves().shape)
        (torch.Size([1, 2, 2, 2]), (64, 2))
    """

    size_arguments: ClassVar[tuple[str, ...]] = ("top",)

    def __init__(
        self, *, top: CodebookQuantizer, cell_size: int = 4, gate: Gate | None = None, init: str = "uniform"
    ) -> None:
        super().__init__(top=top, bottom=None, cell_size=cell_size, gate=gate)
        size = top.num_embeddings
        self.offsets = new_codewords(size, size, top.embedding_dim, init=init)  # [K, K, d], of each parent's children

    def leaves(self) -> Tensor:
        """The one codebook ``[K K, d]``, the children of the first parent first."""
        return (self.top.codebook().unsqueeze(1) + self.offsets).flatten(0, 1)

    def bottom_codes(self, indices: Tensor, parents: Tensor) -> Tensor:
        """Offsets ``[B, d, *grid, n]`` of indices ``[B, *grid, n]`` up to K of children of ``[B, *grid, 1]``."""
        table = with_absent(self.offsets)  # [K, K + 1, d]
        rows = parents.clamp_max(self.absent - 1) * (self.absent + 1) + indices
        return channels_first(F.embedding(rows, table.flatten(0, 1)))

    def quantize_bottom(
        self, rest: Tensor, parents: Tensor, posterior: Posterior | None, weight: Tensor | None
    ) -> QuantizerOutput:
        """The nearest child of each position's parent."""
        indices = nearest_child(channels_last(rest), self.offsets, parents.expand(-1, *rest.shape[2:]))
        codes = self.bottom_codes(indices, parents)
        return QuantizerOutput(
            quantized=straight_through(codes, rest),
            codes=codes,
            indices=indices.unsqueeze(-1),
            losses=vq_losses(rest, codes, weight),
        )

    @torch.no_grad()
    def start_bottom(self, rest: Tensor, cluster: Cluster) -> bool:
        """Start the children of every parent on the same centers of ``[B, d, *grid, n]``."""
        put_at_centers(self.offsets[0], rest, cluster)
        self.offsets.copy_(self.offsets[0].clone().expand_as(self.offsets))
        return True


@outside_compiled_graphs
@torch.no_grad()
def nearest_child(latents: Tensor, children: Tensor, parents: Tensor) -> Tensor:
    """The nearest child of each latent's parent, by direct differences in fp32, some latents at a time.

    Args:
        latents: ``[*shape, d]``.
        children: ``[P, M, d]`` of P parents.
        parents: int64 ``[*shape]`` in [0, P).

    Returns:
        int64 ``[*shape]`` in [0, M); the lowest of equal ones.

    >>> children = torch.tensor([[[0.0], [1.0]], [[5.0], [0.9]]])
    >>> nearest_child(torch.tensor([[0.8], [0.8]]), children, torch.tensor([0, 1])).tolist()
    [1, 1]
    """
    numbers = _AT_ONCE.get(latents.device.type, _AT_ONCE["other"])
    step = max(1, numbers // math.prod(children.shape[1:]))
    rows = latents.as_subclass(Tensor).detach().float().reshape(-1, latents.shape[-1]).split(step)
    found = [
        (children[owner] - part.unsqueeze(1)).square().sum(dim=-1).argmin(dim=1)
        for part, owner in zip(rows, parents.as_subclass(Tensor).reshape(-1).split(step), strict=True)
    ]
    return torch.cat(found).view(parents.shape)
