"""Nearest-codeword search in bounded memory whose result is the exact argmin.

The squared distance is expanded, so that the work is one matrix product, taken a tile at a time: of each tile
only the minimum over small blocks of codewords is kept. Rounding in fp32 can hide the nearest codeword among
its neighbors, so every block whose minimum lies within the rounding bound of the best is evaluated again in
float64, directly from the differences; ties go to the lowest index.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.compiling import outside_compiled_graphs
from vaevq_med.networks.precision import full_precision
from vaevq_med.networks.quantizers.distances import Search
from vaevq_med.networks.quantizers.nearest_fixed import nearer, nearest_of_block, nearest_of_unsettled, nearest_within

# Scores held at once when the caller does not say: a tile that stays in a CPU's cache, and one that fills a GPU.
_DEFAULT_CHUNK = {"cpu": 2**20, "other": 2**24}
_MAX_ROWS = 4096
# Up to so many codewords all scores of a row are looked at, not the least of each block.
_FEW_CODES = 512
# Rows with more candidate blocks than this go through one search in float64 instead.
_MAX_CANDIDATE_BLOCKS = 4
# Of so many rows at most that search looks through copies of one codeword too.
_FEW_LATENTS = 64
# Codewords whose float64 scores are held at once.
_CODES_AT_ONCE = 4096
# In place of an index that fp32 cannot settle.
_OPEN = -1


@outside_compiled_graphs
@torch.no_grad()
def nearest_codeword(
    latents: Tensor,
    codebook: Tensor,
    *,
    precision: Tensor | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Index of the codeword nearest to each latent, without the N x K distance matrix.

    ``argmin_k sum_i w_i (e_ki - z_i)^2`` with ``w = 1``, or ``w = precision``: with ``precision = 1 / std**2``
    it is the codeword of highest posterior density. The result is the exact argmin (as direct differences in
    float64 give it), equal distances going to the lowest index, where no product of two values leaves fp32's normal
    range. Off the CPU, where many latents at once have many codewords within fp32's rounding of the nearest, see
    :func:`nearest_of_unsettled`. Computed outside autocast and TF32; no gradient.

    Args:
        latents: ``[N, D]``, any floating type; half precision is widened to fp32 first.
        codebook: ``[K, D]``.
        precision: weights ``[N, D]``, positive, or None for the Euclidean distance.
        chunk_size: scores held at once, 4 bytes each; by default 2^20 on a CPU and 2^24 (64 MiB) elsewhere.

    Returns:
        int64 ``[N]``, each in [0, K), also where a latent is not finite.

    Raises:
        VaevqMedError: if the shapes do not match, the codebook is empty, or ``chunk_size`` is below 1.

    >>> nearest_codeword(torch.tensor([[0.9], [0.5], [-3.0]]), torch.tensor([[0.0], [1.0], [0.0]])).tolist()
    [1, 0, 0]
    """
    _check(latents, codebook, precision, chunk_size)
    dtype = torch.promote_types(torch.promote_types(latents.dtype, codebook.dtype), torch.float32)
    latents, codebook = latents.to(dtype), codebook.to(dtype)
    precision = None if precision is None else precision.to(dtype)
    if torch.jit.is_tracing() or torch.compiler.is_exporting():
        return Search(latents, codebook, precision, 0).scores(codebook).argmin(dim=1)
    # MONAI's MetaTensor costs time in every operation, and takes no sizes one by one.
    latents, codebook = latents.as_subclass(Tensor), codebook.as_subclass(Tensor)
    precision = None if precision is None else precision.as_subclass(Tensor)
    if chunk_size is None:
        chunk_size = _DEFAULT_CHUNK.get(latents.device.type, _DEFAULT_CHUNK["other"])
    with full_precision(latents.device.type):
        return _nearest(Search(latents, codebook, precision, chunk_size), _needs_fixed_shapes(latents.device))


def _check(latents: Tensor, codebook: Tensor, precision: Tensor | None, chunk_size: int | None) -> None:
    if latents.ndim != 2 or codebook.ndim != 2 or latents.shape[1] != codebook.shape[1]:
        raise VaevqMedError(
            f"latents have shape {tuple(latents.shape)} and the codebook {tuple(codebook.shape)}; "
            "expected [N, D] and [K, D]"
        )
    if codebook.shape[0] == 0:
        raise VaevqMedError("the codebook has no codeword; expected at least one")
    if precision is not None and precision.shape != latents.shape:
        raise VaevqMedError(
            f"precision has shape {tuple(precision.shape)}; expected that of the latents, {tuple(latents.shape)}"
        )
    if chunk_size is not None and chunk_size < 1:
        raise VaevqMedError(f"chunk_size is {chunk_size}; expected at least 1")


def _needs_fixed_shapes(device: torch.device) -> bool:
    """Whether a size that depends on the values would make the host wait."""
    return device.type != "cpu"


def _nearest(search: Search, of_fixed_shapes: bool) -> Tensor:
    num_rows, num_codes, chunk_size = len(search.latents), len(search.codebook), search.chunk_size
    # A block is the unit of which only the minimum is kept: wide enough that the minima are few, narrow enough
    # that evaluating one block a row again costs little.
    block = 2 ** max(0, round(math.log2(math.sqrt(num_codes) / 8))) if num_codes > _FEW_CODES else 1
    rows = max(1, min(_MAX_ROWS, math.isqrt(chunk_size), chunk_size * block // num_codes, num_rows))
    columns = max(1, min(chunk_size // rows // block, math.ceil(num_codes / block)))  # blocks a tile
    squared_norms = torch.cat(
        [part.square().sum(dim=1) for part in search.codebook.split(max(1, chunk_size // search.codebook.shape[1]))]
    )
    result = torch.empty(num_rows, dtype=torch.int64, device=search.latents.device)
    unsettled = torch.zeros(num_rows, dtype=torch.bool, device=search.latents.device)
    # Made once: allocated anew for each tile, small results would settle in the gaps and the process grow to N x K.
    buffer = search.latents.new_empty(rows, block * columns)
    for start in range(0, num_rows, rows):
        chosen = slice(start, min(start + rows, num_rows))
        part = search.of(chosen)
        tiles = _Tiles(part, squared_norms, block, columns, buffer)
        if of_fixed_shapes:
            lower, bound = tiles.bounds()
            result[chosen], unsettled[chosen] = nearest_within(part, lower, bound, block=block, columns=columns)
        elif block == 1 and columns == num_codes:
            result[chosen] = _clear_winners(*tiles.only())
        else:
            lower, bound = tiles.bounds()
            result[chosen] = _settle(part, lower <= bound.unsqueeze(1), block, columns)
    if of_fixed_shapes:
        return nearest_of_unsettled(search, result, unsettled)
    left = (result == _OPEN).nonzero().squeeze(1)
    if left.numel() > 0:
        result[left] = _search_double(search.of(left).double())
    return result


class _Tiles:
    """Scores of a few latents, a tile of codewords at a time; block b of a tile is its codewords b, b+columns, ..."""

    def __init__(self, search: Search, squared_norms: Tensor, block: int, columns: int, buffer: Tensor) -> None:
        latents, self.codebook, self.precision = search.latents, search.codebook, search.precision
        self.squared_norms, self.block, self.columns, self.buffer = squared_norms, block, columns, buffer
        self.left = -latents
        if self.precision is not None:
            self.left = torch.cat([self.left * self.precision, self.precision], dim=1)
        self.row_scale = torch.linalg.vector_norm(self.left, dim=1, keepdim=True)
        unit_roundoff = torch.finfo(latents.dtype).eps / 2
        self.relative_error = 1.01 * unit_roundoff * (self.left.shape[1] + 8)

    def _each(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Scores ``[rows, block * columns]``, and the codewords' norms on the right and halved squared norms."""
        width = self.block * self.columns
        for start in range(0, self.codebook.shape[0], width):
            codes, norms = self.codebook[start : start + width], self.squared_norms[start : start + width]
            missing = width - codes.shape[0]
            if self.precision is None:
                right, bias = codes, 0.5 * norms
                column_scale = norms.sqrt()
            else:
                squares = 0.5 * codes.square()
                right, bias = torch.cat([codes, squares], dim=1), None
                column_scale = torch.sqrt(norms + squares.square().sum(dim=1))
            tile = self.buffer[: self.left.shape[0]]
            scores = tile[:, : codes.shape[0]]
            if bias is None:
                torch.mm(self.left, right.T, out=scores)
            else:
                torch.addmm(bias, self.left, right.T, out=scores)
            if missing:
                tile[:, codes.shape[0] :] = math.inf
                column_scale, norms = F.pad(column_scale, (0, missing)), F.pad(norms, (0, missing))
            yield tile, column_scale, 0.5 * norms

    def only(self) -> tuple[Tensor, Tensor]:
        """The scores of every codeword, where they are one tile, and each row's tolerance."""
        tile, column_scale, half_norms = next(self._each())
        scale = self.row_scale.squeeze(1) * column_scale.max()
        if self.precision is None:
            scale = scale + half_norms.max()
        return tile, 2 * self.relative_error * scale

    def bounds(self) -> tuple[Tensor, Tensor]:
        """What each block's least score is at least ``[rows, blocks]``, and the least of all at most ``[rows]``."""
        lower, upper = [], []
        for tile, column_scale, half_norms in self._each():
            minima = tile.view(-1, self.block, self.columns).amin(dim=1)
            scale = self.row_scale * column_scale.view(self.block, self.columns).amax(dim=0)
            if self.precision is None:
                scale = scale + half_norms.view(self.block, self.columns).amax(dim=0)
            tolerance = self.relative_error * scale
            lower.append(minima - tolerance)
            upper.append((minima + tolerance).amin(dim=1))
        return torch.cat(lower, dim=1), torch.stack(upper).amin(dim=0)


def _clear_winners(scores: Tensor, tolerance: Tensor) -> Tensor:
    """The argmin of all codewords' scores ``[rows, K]``; ``_OPEN`` where another is within rounding of it."""
    least, index = scores.min(dim=1)
    near = (scores <= (least + tolerance).unsqueeze(1)).sum(dim=1)
    return index.masked_fill_(near > 1, _OPEN)


def _settle(search: Search, candidates: Tensor, block: int, columns: int) -> Tensor:
    """The exact argmin over the candidate blocks ``[rows, blocks]`` of each row; ``_OPEN`` where there are many."""
    evaluate = partial(nearest_of_block, search, block=block, columns=columns)
    first = candidates.to(torch.uint8).argmax(dim=1)
    candidates.scatter_(1, first.unsqueeze(1), False)
    count = candidates.sum(dim=1)
    rows = (count > 0).nonzero().squeeze(1)
    distance, index = evaluate(torch.arange(len(first), device=first.device), first)
    if rows.numel() == 0:
        return index
    index[rows[count[rows] >= _MAX_CANDIDATE_BLOCKS]] = _OPEN
    rows = rows[count[rows] < _MAX_CANDIDATE_BLOCKS]
    while rows.numel() > 0:
        blocks = candidates[rows].to(torch.uint8).argmax(dim=1)
        candidates[rows, blocks] = False
        distance[rows], index[rows] = nearer(distance[rows], index[rows], *evaluate(rows, blocks))
        rows = rows[candidates[rows].any(dim=1)]
    return index


def _distinct(codebook: Tensor) -> Tensor:
    """The first index of every codeword, rising; of a codebook that has not left its start there may be just one."""
    _, group = torch.unique(codebook, dim=0, return_inverse=True)
    numbers = torch.arange(len(group), device=group.device)
    return torch.full_like(group, len(group)).scatter_reduce(0, group, numbers, "amin").unique()[: group.max() + 1]


def _search_double(search: Search) -> Tensor:
    """The exact argmin for rows with many near-equal codewords: float64 scores choose whom to evaluate directly."""
    codebook = search.codebook
    if len(search.latents) > _FEW_LATENTS:  # so many have no clear nearest codeword: there may be copies of codewords
        distinct = _distinct(codebook)
        if len(distinct) < len(codebook):
            return distinct[_search_double(replace(search, codebook=codebook[distinct]))]
    results = []
    step = max(1, search.chunk_size // (2 * min(len(codebook), _CODES_AT_ONCE)))
    largest = torch.linalg.vector_norm(codebook, dim=1).max().double()
    for start in range(0, len(search.latents), step):
        part = search.of(slice(start, start + step))
        best = torch.full((len(part.latents),), math.inf, dtype=torch.float64, device=codebook.device)
        for codes in codebook.split(_CODES_AT_ONCE):
            best = torch.minimum(best, part.scores(codes.double()).amin(dim=1))
        reach = torch.linalg.vector_norm(part.latents, dim=1) + largest
        weight = 1.0 if part.precision is None else part.precision.amax(dim=1)
        bound = best + 8 * (codebook.shape[1] + 8) * torch.finfo(torch.float64).eps * weight * reach**2
        least = torch.full_like(best, math.inf)
        index = torch.zeros_like(best, dtype=torch.int64)
        for number, codes in enumerate(codebook.split(_CODES_AT_ONCE)):
            near = part.scores(codes.double()) <= bound.unsqueeze(1)
            rows, columns = near.nonzero(as_tuple=True)
            if rows.numel() == 0:
                continue
            distances = replace(part, codebook=codes).distances(rows, columns.unsqueeze(1)).squeeze(1)
            nearest = torch.full_like(best, math.inf).scatter_reduce(0, rows, distances, "amin")
            hit = distances == nearest[rows]
            lowest = torch.full_like(index, len(codebook)).scatter_reduce(0, rows[hit], columns[hit], "amin")
            nearer = nearest < least
            least = torch.where(nearer, nearest, least)
            index = torch.where(nearer, lowest + number * _CODES_AT_ONCE, index)
        results.append(index)
    return torch.cat(results)
