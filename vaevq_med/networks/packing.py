"""Cells of neighboring positions as one position of more channels, and back (space to depth)."""

from __future__ import annotations

from torch import Tensor

from vaevq_med.core.errors import VaevqMedError


def packed(x: Tensor, side: int, axes: int) -> Tensor:
    """Cells of ``side`` positions along each of the last axes of ``[B, D, *grid]``, as one position each.

    Args:
        x: of the fine grid.
        side: s.
        axes: how many of the last axes are made coarser.

    Returns:
        ``[B, s^axes D, *grid]``: the channels of the cell's first position, then those of the next, row by row.

    Raises:
        VaevqMedError: a size is no multiple of the side.

    >>> import torch
    >>> packed(torch.arange(8.0).view(1, 1, 2, 4), 2, 2).flatten(2).tolist()
    [[[0.0, 2.0], [1.0, 3.0], [4.0, 6.0], [5.0, 7.0]]]
    """
    if side == 1:
        return x
    if any(length % side for length in x.shape[-axes:]):
        raise VaevqMedError(f"the latent grid is {tuple(x.shape[2:])}; expected multiples of the cell, {side}")
    first = x.ndim - axes
    for axis in range(axes):
        x = x.unflatten(first + 2 * axis, (-1, side))  # [B, D, ..., h, s, w, s]
    inner = [first + 2 * axis + 1 for axis in range(axes)]
    outer = [axis for axis in range(2, x.ndim) if axis not in inner]
    return x.permute(0, *inner, 1, *outer).flatten(1, 1 + axes)


def unpacked(x: Tensor, side: int, axes: int) -> Tensor:
    """The inverse of :func:`packed`.

    >>> import torch
    >>> x = torch.arange(96.0).view(1, 3, 2, 4, 4)
    >>> torch.equal(unpacked(packed(x, 2, 2), 2, 2), x)
    True
    """
    if side == 1:
        return x
    x = x.unflatten(1, (*[side] * axes, -1))  # [B, s, s, D, ..., h, w]
    first = x.ndim - axes
    order = [0, 1 + axes, *range(2 + axes, first)]
    for axis in range(axes):
        order += [first + axis, 1 + axis]
    x = x.permute(order)  # [B, D, ..., h, s, w, s]
    for axis in range(axes):
        start = x.ndim - 2 * (axes - axis)
        x = x.flatten(start, start + 1)
    return x
