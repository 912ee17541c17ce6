"""Volumes as batches of slices, and back: what a network does within each slice, and what looks at some of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def slices_of(volumes: Tensor) -> Tensor:
    """The slices of volumes ``[B, C, d, H, W]`` as a batch of images ``[B d, C, H, W]``, volume by volume."""
    return volumes.transpose(1, 2).flatten(0, 1)


def stacked(slices: Tensor, batch_size: int) -> Tensor:
    """Volumes ``[B, C, d, H, W]`` of slices ``[B d, C, H, W]``: the inverse of :func:`slices_of`.

    >>> volumes = torch.arange(24.0).view(2, 3, 4, 1, 1)
    >>> torch.equal(stacked(slices_of(volumes), 2), volumes)
    True
    """
    return slices.unflatten(0, (batch_size, -1)).transpose(1, 2)


def some_slices(volumes: list[Tensor], count: int) -> list[Tensor]:
    """The same random slices of several batches of volumes, or the images that they are already.

    The places are drawn by torch's global generator of the device, each volume's own, without repetition.

    Args:
        volumes: ``[B, C, d, H, W]`` each, of one shape; or ``[B, C, H, W]``, which are given back.
        count: slices of each volume; at most the d that there are.

    Returns:
        ``[B count, C, H, W]`` each.
    """
    first = volumes[0]
    if first.ndim == 4:
        return volumes
    batch_size, depth = first.shape[0], first.shape[2]
    count = min(count, depth)
    order = torch.rand(batch_size, depth, device=first.device).argsort(dim=1)[:, :count]  # [B, count]
    rows = (order + depth * torch.arange(batch_size, device=first.device).unsqueeze(1)).flatten()
    return [slices_of(volume).index_select(0, rows) for volume in volumes]


class SliceNorm(nn.GroupNorm):
    """GroupNorm of each slice of a volume by itself.

    What a slice becomes then depends on the slices that the convolutions reach, and not on how many others are in the
    volume: a network trained on patches of a few slices does the same on a whole scan, and in tiles along z.
    """

    def forward(self, volumes: Tensor) -> Tensor:
        """Normalize ``[B, C, d, H, W]``."""
        return stacked(super().forward(slices_of(volumes)), volumes.shape[0])
