"""Channels that were rounded elsewhere: a few evenly spaced values in [-1, 1] each, which map to themselves.

Finite scalar quantization (arXiv 2309.15505) of a network that quantizes by itself and gives indices, without the bound
that its encoder has already applied. With one channel it stands for indices of any kind.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.quantizers.scalar import ScalarQuantizer


class LevelQuantizer(ScalarQuantizer):
    """The nearest of L values in each channel; FSQ's codes and FSQ's indices, the first channel's digit counting ones.

    Args:
        levels: L of each channel, at least 2; K is their product.

    Raises:
        VaevqMedError: there is no channel, or one of fewer values.

    Example:
        >>> quantizer = LevelQuantizer(levels=[5, 4])
        >>> output = quantizer(torch.tensor([0.4, -0.9]).view(1, 2, 1, 1))
        >>> output.indices.flatten().tolist(), output.codes.flatten().tolist()
        ([3], [0.5, -1.0])
    """

    size_arguments: ClassVar[tuple[str, ...]] = ("levels", "embedding_dim")

    def __init__(self, *, levels: Sequence[int], embedding_dim: int | None = None) -> None:
        if not levels or min(levels) < 2:
            raise VaevqMedError(f"levels are {list(levels)}; expected one or more, each at least 2")
        halves = [level // 2 for level in levels]
        super().__init__(
            levels=levels,
            strides=[math.prod(levels[:channel]) for channel in range(len(levels))],
            offset=halves,
            scale=halves,
            num_embeddings=None,
            embedding_dim=embedding_dim,
            projection=False,
        )

    def bound(self, latent: Tensor) -> Tensor:
        """``[..., d]`` in steps."""
        return latent * self.scale

    def digits(self, steps: Tensor) -> Tensor:
        """The nearest integers, counted from 0, in range."""
        rounded = torch.nan_to_num(steps).round().clamp(-1e9, 1e9).long() + self.levels // 2
        return torch.minimum(rounded.clamp_min(0), self.levels - 1)
