"""The end of the nearest-codeword search in tensors of fixed shapes, so that the host need not wait for the device.

The search itself bounds the least score of each block of codewords. Here each latent's most promising blocks are
evaluated in float64; a latent for which still another block may hold the nearest codeword is unsettled, and a fixed
number of these is searched in float64 from one end of the codebook to the other.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from vaevq_med.networks.quantizers.distances import Search

# Blocks with the least bounds that are evaluated, beside the first that may hold the nearest codeword.
_PROMISING = 2
# Unsettled latents of a search that are searched again: all up to the first number, one in so many of more.
_AT_LEAST, _ONE_IN = 256, 16
# Codewords with the least float64 scores that are evaluated, beside the first within rounding of the least.
_NEAREST = 4


def nearest_of_block(
    search: Search, rows: Tensor, blocks: Tensor, *, block: int, columns: int
) -> tuple[Tensor, Tensor]:
    """Distance and index of the nearest codeword of one block a row, in float64.

    Args:
        search: of N latents.
        rows: which of them, ``[R]``.
        blocks: the block of each, ``[R]``.
        block: codewords of a block.
        columns: blocks of a tile, whose block b holds the codewords b, b + columns, ...
    """
    tile, column = blocks // columns, blocks % columns
    offsets = columns * torch.arange(block, device=blocks.device)
    indices = (tile * (block * columns) + column).unsqueeze(1) + offsets  # [R, block]
    distance, position = search.distances(rows, indices).min(dim=1)
    index = indices.gather(1, position.unsqueeze(1)).squeeze(1)
    return distance, index.clamp(max=len(search.codebook) - 1)


def nearer(distance: Tensor, index: Tensor, other_distance: Tensor, other_index: Tensor) -> tuple[Tensor, Tensor]:
    """Of two codewords a row the nearer one, of two at one distance that of the lower index."""
    tie = (other_distance == distance) & (other_index < index)
    better = (other_distance < distance) | tie
    return torch.where(better, other_distance, distance), torch.where(better, other_index, index)


def nearest_within(search: Search, lower: Tensor, bound: Tensor, *, block: int, columns: int) -> tuple[Tensor, Tensor]:
    """The nearest codeword of each latent's most promising blocks, and whether another block may hold a nearer one.

    Args:
        search: of R latents.
        lower: what the least score of each block is at least, ``[R, blocks]``.
        bound: what the least score of all is at most, ``[R]``.
        block: codewords of a block.
        columns: blocks of a tile.

    Returns:
        int64 ``[R]`` and bool ``[R]``.
    """
    candidates = lower <= bound.unsqueeze(1)  # [R, blocks]
    rows = torch.arange(lower.shape[0], device=lower.device)
    # The first, so that of copies of one codeword the lowest index wins.
    blocks = [candidates.to(torch.uint8).argmax(dim=1)]
    blocks += lower.topk(min(_PROMISING, lower.shape[1]), dim=1, largest=False).indices.unbind(dim=1)
    found = nearest_of_block(search, rows, blocks[0], block=block, columns=columns)
    for other in blocks[1:]:
        found = nearer(*found, *nearest_of_block(search, rows, other, block=block, columns=columns))
    candidates = candidates.scatter(1, torch.stack(blocks, dim=1), False)
    return found[1], candidates.any(dim=1)


def nearest_of_unsettled(search: Search, index: Tensor, unsettled: Tensor) -> Tensor:
    """``index``, with the exact argmin for unsettled latents: all of them up to 256, or to a sixteenth of all.

    Further ones, as a codebook of near-equal codewords makes them, keep a codeword whose distance is within fp32's
    rounding of the least.

    Args:
        search: of N latents.
        index: of a codeword a latent, ``[N]``.
        unsettled: for which there may be a nearer one, ``[N]``.
    """
    count = min(len(index), max(_AT_LEAST, len(index) // _ONE_IN))
    rows = unsettled.to(torch.uint8).topk(count).indices  # the unsettled ones first
    step = max(1, search.chunk_size // (4 * len(search.codebook)))
    wide = replace(search, codebook=search.codebook.double())
    parts = [_nearest_in_float64(wide.of(part).double()) for part in rows.split(step)]
    found = torch.where(unsettled[rows], torch.cat(parts), index[rows])
    return index.scatter(0, rows, found)


def _nearest_in_float64(search: Search) -> Tensor:
    """The nearest of all codewords of a few latents, all in float64, whose scores say whom to evaluate."""
    scores = search.scores(search.codebook)  # [R, K]
    least, candidates = scores.topk(min(_NEAREST, scores.shape[1]), dim=1, largest=False)
    reach = torch.linalg.vector_norm(search.latents, dim=1) + torch.linalg.vector_norm(search.codebook, dim=1).max()
    weight = 1.0 if search.precision is None else search.precision.amax(dim=1)
    tolerance = 8 * (search.latents.shape[1] + 8) * torch.finfo(torch.float64).eps * weight * reach.square()
    # Of copies of one codeword the first.
    first = (scores <= (least[:, 0] + tolerance).unsqueeze(1)).to(torch.uint8).argmax(dim=1, keepdim=True)
    candidates = torch.cat([first, candidates], dim=1)
    distances = search.distances(torch.arange(len(first), device=first.device), candidates)  # [R, candidates]
    best = distances.amin(dim=1, keepdim=True)
    return candidates.masked_fill(distances > best, len(search.codebook) - 1).amin(dim=1)
