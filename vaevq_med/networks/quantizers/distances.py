"""Distances of latents to codewords, as products of matrices and directly."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Search:
    """Latents, and the codebook in which the nearest codeword of each is looked for.

    Attributes:
        latents: ``[N, D]``.
        codebook: ``[K, D]``.
        precision: weights ``[N, D]``, or None for the Euclidean distance.
        chunk_size: numbers held at once.
    """

    latents: Tensor
    codebook: Tensor
    precision: Tensor | None
    chunk_size: int

    def of(self, rows: Tensor | slice) -> Search:
        """The search of some of the latents."""
        precision = None if self.precision is None else self.precision[rows]
        return Search(self.latents[rows], self.codebook, precision, self.chunk_size)

    def double(self) -> Search:
        """With the latents and their weights in float64."""
        precision = None if self.precision is None else self.precision.double()
        return Search(self.latents.double(), self.codebook, precision, self.chunk_size)

    def scores(self, codebook: Tensor) -> Tensor:
        """Half the (weighted) squared distance, less what does not depend on the codeword: ``[N, K]``.

        Args:
            codebook: codewords ``[K, D]`` in the latents' type.
        """
        if self.precision is None:
            return F.linear(-self.latents, codebook, 0.5 * codebook.square().sum(dim=1))
        return F.linear(
            torch.cat([-self.latents * self.precision, self.precision], dim=1),
            torch.cat([codebook, 0.5 * codebook.square()], dim=1),
        )

    def distances(self, rows: Tensor, indices: Tensor) -> Tensor:
        """Squared distances in float64 from latent ``rows[i]`` to codewords ``indices[i]``; past the end, infinity."""
        num_codes, dim = self.codebook.shape
        parts = []
        step = max(1, self.chunk_size // (4 * indices.shape[1] * dim))
        for part, part_indices in zip(rows.split(step), indices.split(step), strict=True):
            codes = self.codebook[part_indices.clamp(max=num_codes - 1)].double()
            squares = codes.sub_(self.latents[part].double().unsqueeze(1)).square_()
            if self.precision is not None:
                squares *= self.precision[part].double().unsqueeze(1)
            parts.append(squares.sum(dim=2).masked_fill_(part_indices >= num_codes, math.inf))
        return torch.cat(parts)
