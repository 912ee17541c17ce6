"""How well a reconstruction follows the change from one slice of a volume to the next."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from vaevq_med.metrics import figures
from vaevq_med.metrics.figures import Figure


class VolumeMetric(ABC):
    """A figure of volumes against their originals; an evaluation of volumes reports its mean.

    Attributes:
        figure: what a table shows of it.
    """

    figure: ClassVar[Figure]

    @abstractmethod
    def per_slice(self, target: Tensor, reconstruction: Tensor) -> Tensor:
        """The figure of each slice, ``[B, d]``; NaN leaves a slice out of the mean.

        Args:
            target: originals, ``[B, C, d, H, W]`` in [0, 1], slices next to one another along ``d``.
            reconstruction: of the same shape.
        """


def inter_slice_errors(target: Tensor, reconstruction: Tensor, foreground: Tensor | None = None) -> Tensor:
    """``|(x[n+1] - x[n]) - (y[n+1] - y[n])|``, averaged over the foreground of each pair of neighbors.

    It is 0 where the error is the same in both slices, whatever it is, and large where it flickers along z.

    Args:
        target: x, ``[B, C, d, H, W]``, any range.
        reconstruction: y, of the same shape.
        foreground: bool ``[B, d, H, W]``; by default what is not 0 in the original. A pixel counts that lies in the
            foreground of either slice.

    Returns:
        ``[B, d - 1]``; NaN for a pair without a foreground.

    Example:
        >>> x = torch.tensor([0.0, 0.5, 0.7]).view(1, 1, 3, 1, 1)
        >>> y = torch.tensor([0.1, 0.5, 0.8]).view(1, 1, 3, 1, 1)
        >>> inter_slice_errors(x, y)
        tensor([[0.1000, 0.1000]])
    """
    inside = (target != 0).any(dim=1) if foreground is None else foreground
    either = inside[:, 1:] | inside[:, :-1]  # [B, d - 1, H, W]
    changes = (target - reconstruction).diff(dim=2).abs().mean(dim=1)  # [B, d - 1, H, W]
    weight = either.to(changes)
    return (changes * weight).sum(dim=(2, 3)) / weight.sum(dim=(2, 3))


def inter_slice_error(target: Tensor, reconstruction: Tensor, foreground: Tensor | None = None) -> Tensor:
    """:func:`inter_slice_errors`, averaged over all pixels of all pairs at once.

    Args:
        target: ``[B, C, d, H, W]``.
        reconstruction: of the same shape.
        foreground: as there.

    Returns:
        ``[B]``.
    """
    inside = (target != 0).any(dim=1) if foreground is None else foreground
    weight = (inside[:, 1:] | inside[:, :-1]).sum(dim=(2, 3)).to(target)  # [B, d - 1]
    errors = inter_slice_errors(target, reconstruction, inside).nan_to_num(0.0)
    return (errors * weight).sum(dim=1) / weight.sum(dim=1)


class InterSliceError(VolumeMetric):
    """:func:`inter_slice_errors`, told of the lower slice of each pair."""

    figure = figures.INTER_SLICE_ERROR

    def per_slice(self, target: Tensor, reconstruction: Tensor) -> Tensor:
        """``[B, d]``, NaN for the last."""
        errors = inter_slice_errors(target, reconstruction)
        return torch.cat([errors, errors.new_full((len(errors), 1), torch.nan)], dim=1)
