"""Distances of latents to codewords, as products of matrices and directly."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def scores_of(latents: Tensor, codebook: Tensor, precision: Tensor | None) -> Tensor:
    """Half the (weighted) squared distance, less what does not depend on the codeword: ``[N, K]``."""
    if precision is None:
        return F.linear(-latents, codebook, 0.5 * codebook.square().sum(dim=1))
    return F.linear(
        torch.cat([-latents * precision, precision], dim=1),
        torch.cat([codebook, 0.5 * codebook.square()], dim=1),
    )


def distances_of(
    latents: Tensor,
    codebook: Tensor,
    precision: Tensor | None,
    rows: Tensor,
    indices: Tensor,
    chunk_size: int,
) -> Tensor:
    """Squared distances in float64 from latent ``rows[i]`` to codewords ``indices[i]``; past the end, infinity."""
    num_codes, dim = codebook.shape
    parts = []
    step = max(1, chunk_size // (4 * indices.shape[1] * dim))
    for part, part_indices in zip(rows.split(step), indices.split(step), strict=True):
        codes = codebook[part_indices.clamp(max=num_codes - 1)].double()
        squares = codes.sub_(latents[part].double().unsqueeze(1)).square_()
        if precision is not None:
            squares *= precision[part].double().unsqueeze(1)
        parts.append(squares.sum(dim=2).masked_fill_(part_indices >= num_codes, math.inf))
    return torch.cat(parts)
