"""What the pixels under each position of a grid are like: whether they differ, and the entropy of their gray levels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vaevq_med.core.errors import VaevqMedError

_POOLING = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_NUM_BINS, _WIDTH = 32, 0.01


def patches_of(images: Tensor, grid: Sequence[int]) -> Tensor:
    """The pixels of images ``[B, C, *size]`` under each position, in fp32, ``[B, *grid, C, p]``.

    Raises:
        VaevqMedError: the size is no multiple of the grid's.

    >>> patches_of(torch.arange(4.0).view(1, 1, 1, 4), (1, 2)).tolist()
    [[[[[0.0, 1.0]], [[2.0, 3.0]]]]]
    """
    size, axes = images.shape[2:], len(grid)
    if len(size) != axes or any(length % count for length, count in zip(size, grid, strict=True)):
        raise VaevqMedError(f"the images have size {tuple(size)}; expected multiples of the grid {tuple(grid)}")
    x = images.as_subclass(Tensor).detach().float()
    for axis in range(axes):
        x = x.unflatten(2 + 2 * axis, (grid[axis], -1))  # [B, C, h, p, w, p]
    positions = [2 + 2 * axis for axis in range(axes)]
    return x.permute(0, *positions, 1, *(place + 1 for place in positions)).flatten(2 + axes)


@torch.no_grad()
def patch_entropy(images: Tensor, grid: Sequence[int], *, centered: bool = True) -> Tensor:
    """Entropy of the gray levels under each position of a grid, by a soft histogram (DQ-VAE, arXiv 2305.11718).

    ``p_b = mean_i exp(-(x_i - b)^2 / (2 0.01^2))`` over bins b in [-1, 1], made to add up to 1, and
    ``-sum_b p_b log p_b``.

    Args:
        images: ``[B, C, *size]`` in [-1, 1]; their channels are averaged.
        grid: positions along each axis.
        centered: 33 bins around each patch's mean, so that a patch of one gray has entropy 0; otherwise the published
            32 from -1 to 1.

    Returns:
        ``[B, *grid]`` in nats.
    """
    gray = patches_of(images.float().mean(dim=1, keepdim=True), grid).squeeze(-2)  # [B, *grid, p]
    if centered:
        gray = (gray - gray.mean(dim=-1, keepdim=True)).clamp(-1, 1)
    bins = torch.linspace(-1, 1, _NUM_BINS + centered).tolist()
    # A bin at a time: all of them at once would hold 32 images.
    masses = [torch.exp(-0.5 * ((gray - one) / _WIDTH).square()).mean(dim=-1) for one in bins]
    p = torch.stack(masses, dim=-1)
    p = p / p.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(p.dtype).tiny)
    return torch.special.entr(p).sum(dim=-1)


def content_mask(images: Tensor, grid: Sequence[int]) -> Tensor:
    """Which tokens see something: the image patch of the position is not constant. ``[B, *grid]``, bool.

    Args:
        images: ``[B, C, H, W]``, or of another number of axes.
        grid: sizes of the latent grid, an axis for each of the image's.

    Raises:
        VaevqMedError: the grid has another number of axes: its positions have no patches.
    """
    if len(grid) != images.ndim - 2 or len(grid) not in _POOLING:
        raise VaevqMedError(
            f"tokens is 'content' with a grid {list(grid)} of images {list(images.shape[2:])}; expected an axis for "
            "each of the image's, or tokens 'all'"
        )
    window = tuple(size // positions for size, positions in zip(images.shape[2:], grid, strict=True))
    pool = _POOLING[len(grid)]
    highest, lowest = pool(images.float(), window), -pool(-images.float(), window)  # [B, C, *grid]
    return (highest - lowest).amax(dim=1) > 1e-6
