"""The end of the nearest-codeword search in tensors of fixed shapes, so that the host need not wait for the device.

The search itself bounds the least score of each block of codewords. Here each latent's most promising blocks are
evaluated in float64; a latent for which still another block may hold the nearest codeword is unsettled, and a fixed
number of these is searched in float64 from one end of the codebook to the other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vaevq_med.networks.quantizers.distances import distances_of, scores_of

# Blocks with the least bounds that are evaluated, beside the first that may hold the nearest codeword.
_PROMISING = 2
# Unsettled latents of a search that are searched again: all up to the first number, one in so many of more.
_AT_LEAST, _ONE_IN = 256, 16
# Codewords with the least float64 scores that are evaluated, beside the first within rounding of the least.
_NEAREST = 4


def nearest_of_block(
    latents: Tensor,
    codebook: Tensor,
    precision: Tensor | None,
    rows: Tensor,
    blocks: Tensor,
    block: int,
    columns: int,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Distance and index of the nearest codeword of one block a row, in float64.

    Args:
        latents: ``[N, D]``.
        codebook: ``[K, D]``.
        precision: weights ``[N, D]``, or None.
        rows: which latents, ``[R]``.
        blocks: the block of each, ``[R]``.
        block: codewords of a block.
        columns: blocks of a tile, whose block b holds the codewords b, b + columns, ...
        chunk_size: numbers held at once.
    """
    tile, column = blocks // columns, blocks % columns
    offsets = columns * torch.arange(block, device=latents.device)
    indices = (tile * (block * columns) + column).unsqueeze(1) + offsets  # [R, block]
    distance, position = distances_of(latents, codebook, precision, rows, indices, chunk_size).min(dim=1)
    index = indices.gather(1, position.unsqueeze(1)).squeeze(1)
    return distance, index.clamp(max=codebook.shape[0] - 1)


def nearer(distance: Tensor, index: Tensor, other_distance: Tensor, other_index: Tensor) -> tuple[Tensor, Tensor]:
    """Of two codewords a row the nearer one, of two at one distance that of the lower index."""
    tie = (other_distance == distance) & (other_index < index)
    better = (other_distance < distance) | tie
    return torch.where(better, other_distance, distance), torch.where(better, other_index, index)


def nearest_within(
    latents: Tensor,
    codebook: Tensor,
    precision: Tensor | None,
    lower: Tensor,
    bound: Tensor,
    block: int,
    columns: int,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """The nearest codeword of each latent's most promising blocks, and whether another block may hold a nearer one.

    Args:
        latents: ``[R, D]``.
        codebook: ``[K, D]``.
        precision: weights ``[R, D]``, or None.
        lower: what the least score of each block is at least, ``[R, blocks]``.
        bound: what the least score of all is at most, ``[R]``.
        block: codewords of a block.
        columns: blocks of a tile.
        chunk_size: numbers held at once.

    Returns:
        int64 ``[R]`` and bool ``[R]``.
    """
    candidates = lower <= bound.unsqueeze(1)  # [R, blocks]
    rows = torch.arange(lower.shape[0], device=lower.device)
    # The first, so that of copies of one codeword the lowest index wins.
    blocks = [candidates.to(torch.uint8).argmax(dim=1)]
    blocks += lower.topk(min(_PROMISING, lower.shape[1]), dim=1, largest=False).indices.unbind(dim=1)
    found = nearest_of_block(latents, codebook, precision, rows, blocks[0], block, columns, chunk_size)
    for other in blocks[1:]:
        found = nearer(*found, *nearest_of_block(latents, codebook, precision, rows, other, block, columns, chunk_size))
    candidates = candidates.scatter(1, torch.stack(blocks, dim=1), False)
    return found[1], candidates.any(dim=1)


def nearest_of_unsettled(
    latents: Tensor, codebook: Tensor, precision: Tensor | None, index: Tensor, unsettled: Tensor, chunk_size: int
) -> Tensor:
    """``index``, with the exact argmin for unsettled latents: all of them up to 256, or to a sixteenth of all.

    Further ones, as a codebook of near-equal codewords makes them, keep a codeword whose distance is within fp32's
    rounding of the least.

    Args:
        latents: ``[N, D]``.
        codebook: ``[K, D]``.
        precision: weights ``[N, D]``, or None.
        index: of a codeword a latent, ``[N]``.
        unsettled: for which there may be a nearer one, ``[N]``.
        chunk_size: numbers held at once.
    """
    count = min(len(index), max(_AT_LEAST, len(index) // _ONE_IN))
    rows = unsettled.to(torch.uint8).topk(count).indices  # the unsettled ones first
    step = max(1, chunk_size // (4 * codebook.shape[0]))
    wide = codebook.double()
    parts = [_nearest_in_float64(latents, wide, precision, part, chunk_size) for part in rows.split(step)]
    found = torch.where(unsettled[rows], torch.cat(parts), index[rows])
    return index.scatter(0, rows, found)


def _nearest_in_float64(
    latents: Tensor, codebook: Tensor, precision: Tensor | None, rows: Tensor, chunk_size: int
) -> Tensor:
    """The nearest of all codewords ``[K, D]``, in float64, of a few latents; float64 scores say whom to evaluate."""
    part = latents[rows].double()
    weights = None if precision is None else precision[rows].double()
    scores = scores_of(part, codebook, weights)  # [R, K]
    least, candidates = scores.topk(min(_NEAREST, scores.shape[1]), dim=1, largest=False)
    reach = torch.linalg.vector_norm(part, dim=1) + torch.linalg.vector_norm(codebook, dim=1).max()
    weight = 1.0 if weights is None else weights.amax(dim=1)
    tolerance = 8 * (part.shape[1] + 8) * torch.finfo(torch.float64).eps * weight * reach.square()
    # Of copies of one codeword the first.
    first = (scores <= (least[:, 0] + tolerance).unsqueeze(1)).to(torch.uint8).argmax(dim=1, keepdim=True)
    candidates = torch.cat([first, candidates], dim=1)
    distances = distances_of(latents, codebook, precision, rows, candidates, chunk_size)  # [R, candidates]
    best = distances.amin(dim=1, keepdim=True)
    return candidates.masked_fill(distances > best, codebook.shape[0] - 1).amin(dim=1)
