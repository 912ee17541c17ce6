"""How many cells of a gate are to be open, and which have content; over all processes."""

from __future__ import annotations

import torch
from torch import Tensor

from vaevq_med.networks.patches import content_mask
from vaevq_med.networks.processes import of_each_process, sum_in_place

_CANDIDATES, _ROUNDS = 64, 3
"""Thresholds that are tried at once, and how often the interval between two of them is looked at again."""


@torch.no_grad()
def threshold_of_share(score: Tensor, has_content: Tensor, *, share: float) -> tuple[Tensor, Tensor]:
    """The threshold above which so many scores of every process lie as ``share`` of the cells with content.

    It tries evenly spaced candidates between the least and the largest score, and again between the two around it.

    Args:
        score: ``[N]`` of this process, at least one.
        has_content: 1 or 0 for each, ``[N]``.
        share: in (0, 1).

    Returns:
        The threshold, to 1 / 250,000 of the scores' range, and the number of cells with content, scalars in float64.

    >>> found, count = threshold_of_share(torch.tensor([0.0, 1.0, 2.0, 3.0]), torch.ones(4), share=0.5)
    >>> 1 <= found.item() < 2, count.item()
    (True, 4.0)
    """
    score, count = score.double(), sum_in_place(has_content.double().sum())
    ends = of_each_process(torch.stack([score.min(), score.max()]))  # [P, 2]
    low, high = ends[:, 0].min(), ends[:, 1].max()
    steps = torch.linspace(0, 1, _CANDIDATES, dtype=score.dtype, device=score.device)
    for _ in range(_ROUNDS):
        tried = low + (high - low) * steps  # [candidates], rising
        above = sum_in_place((score.unsqueeze(1) > tried).sum(dim=0, dtype=score.dtype))
        place = ((above > share * count).sum() - 1).clamp(0, _CANDIDATES - 2)
        low, high = tried.gather(0, torch.stack([place, place + 1])).unbind()
    return high, count


def budget(num_open: Tensor, num_content: Tensor, num_cells: Tensor, *, share: float) -> Tensor:
    """``((num_open - r* num_content) / num_cells)^2``, in [0, 1]; 0 where nothing has content.

    Where all cells have content it is ``(r - r*)^2`` of the share r of open cells (DQ-VAE's loss without its weight,
    2 gamma). Over the cells with content alone it would have no bound: of black images with one such cell, r is the
    number of open cells.

    >>> counts = torch.tensor(3.0), torch.tensor(4.0), torch.tensor(4.0)
    >>> budget(*counts, share=0.5).item()
    0.0625
    """
    missed = ((num_open - share * num_content) / num_cells).square()
    return missed * (num_content > 0)


@torch.no_grad()
def content(images: Tensor | None, grid: torch.Size, like: Tensor) -> Tensor:
    """Which cells have content, 1 or 0, ``[B, *grid]``; all where the images are not known."""
    if images is None:
        return torch.ones_like(like[:, 0])
    return content_mask(images.as_subclass(Tensor), grid).to(like.dtype)
