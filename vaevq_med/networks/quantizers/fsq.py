"""Finite scalar quantization (FSQ, arXiv 2309.15505) and iFSQ (2601.17124): bounded channels, rounded.

FSQ bounds channel i by ``f(z) = tanh(z + s) h - o`` with ``h = (L - 1)(1 + 1e-3) / 2``, ``o = 1/2`` for even L, else 0,
and ``s = atanh(o / h)``, so that ``f(0) = 0``; the code is ``round(f(z)) / floor(L / 2)``. iFSQ takes odd L only and
``f(z) = (2 sigmoid(1.6 z) - 1)(L - 1) / 2``, which spreads a standard normal latent more evenly over the interval.

There is no codebook, no loss and nothing that could collapse; the rate is the product of the levels. As the digits are
integers before they make an index, no rounding of floats can move it (iFSQ's code truncates there).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.quantizers.scalar import ScalarQuantizer

_EPSILON = 1e-3


class FSQ(ScalarQuantizer):
    """Each channel bounded by a hyperbolic tangent and rounded to one of L values.

    Args:
        levels: L of each channel, at least 3; the authors advise 5 or more. K is their product, the first channel's
            digit counts ones.
        num_embeddings: K, if given, which has to be the product of the levels.
        embedding_dim: D; the number of levels, which is the default, unless there is a projection.
        projection: linear layers from D channels to one a level and back.

    Raises:
        VaevqMedError: a level that the method does not take, or sizes that do not fit together.

    Example:
        >>> quantizer = FSQ(levels=[8, 5, 5, 5])
        >>> output = quantizer(torch.zeros(1, 4, 2, 2))
        >>> quantizer.num_embeddings, output.indices[0, 0, 0].tolist(), output.codes[0, :, 0, 0].tolist()
        (1000, [500], [0.0, 0.0, 0.0, 0.0])
    """

    size_arguments: ClassVar[tuple[str, ...]] = ("levels", "embedding_dim")

    def __init__(
        self,
        *,
        levels: Sequence[int],
        num_embeddings: int | None = None,
        embedding_dim: int | None = None,
        projection: bool = False,
    ) -> None:
        self.check_levels(levels)
        half_widths = [level // 2 for level in levels]
        super().__init__(
            levels=levels,
            strides=[math.prod(levels[:channel]) for channel in range(len(levels))],
            offset=half_widths,
            scale=half_widths,
            num_embeddings=num_embeddings,
            embedding_dim=embedding_dim,
            projection=projection,
        )
        reaches = [(level - 1) * (1 + _EPSILON) / 2 for level in levels]
        centers = [0.5 if level % 2 == 0 else 0.0 for level in levels]
        shifts = [math.atanh(center / reach) for center, reach in zip(centers, reaches, strict=True)]
        self.register_buffer("reach", torch.tensor(reaches), persistent=False)
        self.register_buffer("center", torch.tensor(centers), persistent=False)
        self.register_buffer("shift", torch.tensor(shifts), persistent=False)

    reach: Tensor
    center: Tensor
    shift: Tensor

    @staticmethod
    def check_levels(levels: Sequence[int]) -> None:
        """Refuse levels that the method does not take.

        Raises:
            VaevqMedError: none, or one below 3: two values would not be symmetric about 0.
        """
        if not levels or min(levels) < 3:
            raise VaevqMedError(f"levels are {list(levels)}; expected one or more, each at least 3")

    def bound(self, latent: Tensor) -> Tensor:
        """``tanh(z + s) h - o``, ``[..., d]``."""
        return torch.tanh(latent + self.shift) * self.reach - self.center

    def digits(self, steps: Tensor) -> Tensor:
        """The nearest integers, counted from 0; in range also where the latent is not finite."""
        rounded = torch.nan_to_num(steps).round().long() + self.levels // 2
        # From L = 1001 on the bound is wider than the last bin.
        return torch.minimum(rounded.clamp_min(0), self.levels - 1)


class IFSQ(FSQ):
    """FSQ with the bound ``2 sigmoid(1.6 z) - 1`` and an odd number of values in each channel.

    Args:
        levels: L of each channel, odd and at least 3; the authors' are 17 in each of 4 channels.
        num_embeddings: K, if given, which has to be the product of the levels.
        embedding_dim: D; the number of levels, which is the default, unless there is a projection.
        projection: linear layers from D channels to one a level and back.

    Raises:
        VaevqMedError: a level that the method does not take, or sizes that do not fit together.

    Example:
        >>> IFSQ(levels=[5, 5])(torch.tensor([-9.0, 0.8]).view(1, 2, 1, 1)).codes.flatten().tolist()
        [-1.0, 0.5]
    """

    @staticmethod
    def check_levels(levels: Sequence[int]) -> None:
        """Refuse levels that the method does not take.

        Raises:
            VaevqMedError: none, or one that is even or below 3.
        """
        if not levels or any(level < 3 or level % 2 == 0 for level in levels):
            raise VaevqMedError(f"levels are {list(levels)}; expected one or more, each odd and at least 3")

    def bound(self, latent: Tensor) -> Tensor:
        """``(2 sigmoid(1.6 z) - 1)(L - 1) / 2``, ``[..., d]``."""
        return (2 * torch.sigmoid(1.6 * latent) - 1) * (self.levels - 1) / 2
