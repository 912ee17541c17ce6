"""Two levels of codes: one of a cell, and one of each finer position in it, given the first.

VQ-VAE-2 (arXiv 1906.00446) and structure-then-texture inpainting (2103.10022) quantize a coarse grid and a fine one.
Here the cell is a position of the latent, whose channels are those of its n finer positions, position by position
(``VisualTokenizer(cell=2)`` packs 2x2 of them): latent, codes and indices have one grid, and G is ``1 + n``. Index 0 is
the top code, 1 to n are the bottom codes of the cell, row by row.

``h_t = E(z)``, ``q_t = VQ_t(h_t)``, ``h_b = H(q_t, z)``, ``q_b = VQ_b(h_b)``, ``codes = P(q_t, q_b)``

With a gate (DQ-VAE, arXiv 2305.11718; ``gates.py``) a cell has its top code alone, or all ``1 + n``. The index K of a
bottom code says that it is absent, so that the indices hold the gate. An absent code is zero.
"""

from __future__ import annotations

import inspect
import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.outputs import Posterior, QuantizerOutput
from vaevq_med.networks.posterior import DiagonalGaussian
from vaevq_med.networks.processes import mean_without_gradient, world_size
from vaevq_med.networks.quantizers.base import (
    Cluster,
    CodebookQuantizer,
    Quantizer,
    look_up,
    on_grid,
    rows,
    straight_through,
)
from vaevq_med.networks.quantizers.gates import Gate
from vaevq_med.networks.quantizers.nearest import nearest_codeword
from vaevq_med.networks.ranges import check_sizes


class TwoLevelQuantizer(Quantizer):
    """What quantizers of two levels share; a subclass says how the levels meet.

    It has no ``codebook()``: the codes are made of two codewords. The losses are those of the levels, averaged over the
    two, the bottom one's over the codes that are there; and those of the gate.

    Args:
        top: of what the cells become, ``[B, D / n, *grid]``.
        bottom: of what the finer positions become, ``[B, D / n, *grid, n]``, of as many codewords and channels; None
            of a subclass that has bottom codes of its own.
        cell_size: n, finer positions of a cell.
        gate: which cells have bottom codes; without one all have.

    Attributes:
        num_embeddings: K of both codebooks, and one more with a gate, for what is absent.
        absent: the index K.

    Raises:
        VaevqMedError: the levels do not fit together, or not the gate.
    """

    size_arguments: ClassVar[tuple[str, ...]] = ("top", "bottom")
    first_argument: ClassVar[str | None] = "num_codes"

    def __init__(
        self, *, top: CodebookQuantizer, bottom: CodebookQuantizer | None, cell_size: int = 4, gate: Gate | None = None
    ) -> None:
        super().__init__()
        levels = [top] if bottom is None else [top, bottom]
        if any(not isinstance(level, CodebookQuantizer) for level in levels):
            found = " and ".join(type(level).__name__ for level in levels)
            raise VaevqMedError(f"the levels are {found}; expected quantizers with one explicit codebook each")
        check_sizes(cell_size=cell_size)
        sizes = [(level.num_embeddings, level.embedding_dim) for level in levels]
        if len(set(sizes)) > 1:
            found = " and ".join(map(str, sizes))
            raise VaevqMedError(
                f"the levels differ in (num_embeddings, embedding_dim); found {found}, expected the same in both"
            )
        # The top code is always there: the bottom level alone leaves positions out.
        if gate is not None and bottom is not None and "weight" not in inspect.signature(bottom.forward).parameters:
            name = type(bottom).__name__
            raise VaevqMedError(f"{name} cannot leave positions out; expected another bottom level under a gate")
        width = cell_size * top.embedding_dim
        if gate is not None and gate.width not in (None, width):
            raise VaevqMedError(
                f"the gate's embedding_dim times its cell_size is {gate.width}; expected the quantizer's, {width}"
            )
        self.top, self.bottom, self.gate = top, bottom, gate
        self.cell_size = cell_size
        self.absent = top.num_embeddings
        self.num_embeddings = self.absent + (gate is not None)
        self.embedding_dim = width
        self.num_codebooks = 1 + cell_size
        self.sees_images = gate is not None and gate.sees_images

    @abstractmethod
    def coarse(self, fine: Tensor) -> Tensor:
        """What the top codebook is given of a cell's positions ``[B, d, *grid, n]``: ``[B, d, *grid]``."""

    @abstractmethod
    def rest(self, fine: Tensor, top: Tensor) -> Tensor:
        """What the bottom codebook is given, ``[B, d, *grid, n]``, when the top code is ``[B, d, *grid]``."""

    @abstractmethod
    def join(self, top: Tensor, bottom: Tensor) -> Tensor:
        """The code ``[B, d, *grid, n]`` of top codes ``[B, d, *grid]`` and bottom codes ``[B, d, *grid, n]``."""

    @abstractmethod
    def fed(
        self, fine: Tensor, coarse: Tensor, rest: Tensor, top: Tensor, bottom: Tensor, opened: Tensor | None
    ) -> Tensor:
        """The value of :meth:`join`, with the gradient that reaches the encoder, and the gate where that learns.

        Args:
            fine: ``[B, d, *grid, n]``.
            coarse: what the top codebook was given, ``[B, d, *grid]``.
            rest: what the bottom codebook was given, of the same shape.
            top: top codes ``[B, d, *grid]``.
            bottom: bottom codes ``[B, d, *grid, n]``, also of what is absent.
            opened: 1 for a cell that has them, else 0, ``[B, 1, *grid, 1]``; None where all have.
        """

    def quantize_bottom(
        self, rest: Tensor, parents: Tensor, posterior: Posterior | None, weight: Tensor | None
    ) -> QuantizerOutput:
        """Quantize ``[B, d, *grid, n]`` in cells of top indices ``[B, *grid, 1]``, by weights ``[B, *grid, n]``."""
        assert self.bottom is not None
        return self.bottom(rest, posterior) if weight is None else self.bottom(rest, posterior, weight)

    def bottom_codes(self, indices: Tensor, parents: Tensor) -> Tensor:
        """Codes ``[B, d, *grid, n]`` of indices ``[B, *grid, n]`` up to K in cells of top indices ``[B, *grid, 1]``."""
        assert self.bottom is not None
        return look_up(indices.unsqueeze(-1), with_absent(self.bottom.codebook()))

    def coarse_posterior(self, posterior: Posterior | None) -> Posterior | None:
        """That of what the top codebook is given, where it is known: none by default."""
        return None

    def rest_posterior(self, posterior: Posterior | None, top: Tensor) -> Posterior | None:
        """That of what the bottom codebook is given, where it is known: none by default."""
        return None

    @property
    def num_codewords(self) -> int:
        """K of both codebooks: what is absent is none."""
        return self.absent

    def codebook(self) -> None:
        """None: a code is made of two codewords."""
        return

    @property
    def prefixes(self) -> tuple[int, ...]:
        """The top code alone, and all codes: some positions of each cell are no picture of their own."""
        return (1, self.num_codebooks)

    def bits_of_first(self, counts: Tensor) -> float | None:
        """As the base class; the top code alone is never absent and takes ``log2 K``, with a gate, too."""
        return math.log2(self.absent) if len(counts) == 1 else super().bits_of_first(counts)

    def positions_of(self, z: Tensor) -> Tensor:
        """A latent ``[B, D, *grid]`` by finer positions, ``[B, d, *grid, n]``."""
        return z.unflatten(1, (self.cell_size, -1)).movedim(1, -1)

    def cells_of(self, fine: Tensor) -> Tensor:
        """The inverse of :meth:`positions_of`."""
        return fine.movedim(-1, 1).flatten(1, 2)

    def indices_to_codes(self, indices: Tensor, *, num_codes: int | None = None) -> Tensor:
        """Codes ``[B, D, *grid]`` of indices ``[B, *grid, G]``.

        Args:
            indices: int64, in [0, K), and K of bottom codes that are absent.
            num_codes: decode from that many of the first codes of a cell, as though the others were absent: 1 is the
                top code alone, the picture of the structure; by default from all.

        Raises:
            VaevqMedError: the indices have another shape, one is out of range, or ``num_codes`` is not in [1, G].
        """
        if num_codes is None:
            return super().indices_to_codes(indices)
        if not 1 <= num_codes <= self.num_codebooks:
            raise VaevqMedError(f"num_codes is {num_codes}; expected 1 to {self.num_codebooks}")
        self.check_indices(indices)
        missing = torch.full_like(indices[..., num_codes:], self.absent)
        with torch.autocast(indices.device.type, enabled=False):
            return self.codes_of(torch.cat([indices[..., :num_codes], missing], dim=-1))

    def codes_of(self, indices: Tensor) -> Tensor:
        """The codes of valid indices, and of K for what is absent."""
        parents = indices[..., :1]
        # The top code is never absent; what a generator draws may say so all the same, and has a code.
        top = look_up(parents, with_absent(self.top.codebook()))
        return self.cells_of(self.join(top, self.bottom_codes(indices[..., 1:], parents)))

    def opened(self, indices: Tensor) -> Tensor:
        """The gate as indices ``[B, *grid, G]`` hold it: bool ``[B, *grid]``, true for a cell that has bottom codes."""
        return indices[..., 1] != self.absent

    def rate(self, counts: Tensor) -> dict[str, float]:
        """``mean_codes``, codes a position, and ``mean_bits``, ``(1 + n r) log2 K + H(r)``; nothing without a gate.

        Args:
            counts: of each index in a split, int64 ``[G, K + 1]``; r is the share of cells that have bottom codes.
        """
        if self.gate is None or not int(counts[0].sum()):
            return {}
        share = 1 - int(counts[1, self.absent]) / int(counts[0].sum())
        codes = 1 + self.cell_size * share
        entropy = sum(-p * math.log2(p) for p in (share, 1 - share) if p > 0)
        return {"mean_codes": codes, "mean_bits": codes * math.log2(self.absent) + entropy}

    @torch.no_grad()
    def start_codebook(self, latents: Tensor, cluster: Cluster) -> bool:
        """Start the top codebook on the cells, and the bottom one on what its codewords leave.

        Of all cells, under a gate too: no threshold is known before training. The updates that follow are of what is
        open alone.
        """
        fine = self.positions_of(latents.detach().float())
        coarse = self.coarse(fine)
        if not self.top.start_codebook(coarse, cluster):
            return False
        codebook = self.top.codebook().detach().to(coarse.device)
        found = nearest_codeword(rows(coarse), codebook)
        return self.start_bottom(self.rest(fine, look_up(on_grid(found, coarse), codebook)), cluster)

    def start_bottom(self, rest: Tensor, cluster: Cluster) -> bool:
        """Start the bottom codebook on ``[B, d, *grid, n]``."""
        assert self.bottom is not None
        return self.bottom.start_codebook(rest, cluster)

    def forward(self, z: Tensor, posterior: Posterior | None = None, images: Tensor | None = None) -> QuantizerOutput:
        """Quantize ``z`` ``[B, D, *grid]``.

        Args:
            z: the latent.
            posterior: what it came from.
            images: ``[B, C, *size]`` in [-1, 1], for a gate that looks at them.
        """
        self.check_latent(z)
        with torch.autocast(z.device.type, enabled=False):
            z = z.float()
            fine = self.positions_of(z)
            coarse = self.coarse(fine)
            gate = None if self.gate is None else self.gate(z, posterior, images)
            opened = None if gate is None or gate.opened is None else gate.opened.unsqueeze(1).unsqueeze(-1)
            weight = None if opened is None else opened.detach().expand(-1, 1, *fine.shape[2:]).squeeze(1)
            if posterior is None and not self.training:
                # A latent that a generator drew has none: unit deviations make every level's rule Euclidean.
                posterior = cast(Posterior, DiagonalGaussian(z, torch.zeros_like(z)))
            top = self.top(coarse, self.coarse_posterior(posterior))
            rest = self.rest(fine, straight_through(top.codes, coarse))
            bottom = self.quantize_bottom(rest, top.indices, self.rest_posterior(posterior, top.codes), weight)
            losses = mean_losses((top, bottom), (1.0, self._share_of_process(weight)))
            codes, indices = bottom.codes, bottom.indices.squeeze(-1)
            if weight is not None and opened is not None:
                codes = codes * opened
                indices = indices.masked_fill(weight == 0, self.absent)
            return QuantizerOutput(
                quantized=self.cells_of(self.fed(fine, coarse, rest, top.codes, bottom.codes, opened)),
                codes=self.cells_of(self.join(top.codes, codes)),
                indices=torch.cat([top.indices, indices], dim=-1),
                losses={**losses, **({} if gate is None else gate.losses)},
            )

    def _share_of_process(self, weight: Tensor | None) -> Tensor | float:
        """Bottom codes of this process over the mean of all, by which its mean counts: those of all are averaged."""
        if weight is None or not self.training:
            return 1.0
        own = weight.sum()
        # One code in all is the least above none.
        return own / mean_without_gradient(own).clamp_min(1 / world_size())


def with_absent(codebook: Tensor) -> Tensor:
    """A table ``[..., K, D]`` with a row of zeros after the last."""
    return F.pad(codebook, (0, 0, 0, 1))


def mean_losses(levels: Sequence[QuantizerOutput], factors: Sequence[Tensor | float]) -> dict[str, Tensor]:
    """Losses by name, each level's times its factor, averaged over the levels; a level without one counts as 0."""
    found: dict[str, list[Tensor]] = {}
    for level, factor in zip(levels, factors, strict=True):
        for name, loss in level.losses.items():
            found.setdefault(name, []).append(factor * loss)
    return {name: torch.stack(losses).sum() / len(levels) for name, losses in found.items()}
