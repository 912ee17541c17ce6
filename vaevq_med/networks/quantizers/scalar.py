"""What quantizers share that round each channel to a few fixed values and so need no codebook."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.outputs import Posterior, QuantizerOutput
from vaevq_med.networks.quantizers.base import Quantizer, channels_first, channels_last


class ScalarQuantizer(Quantizer):
    """Channel i takes one of ``levels[i]`` evenly spaced values; the index is the number with these digits.

    The code of a digit is ``(digit - offset) / scale``. The codes without their projection are constants: nothing but
    the projection can learn from ``codes``.

    Args:
        levels: values of each channel; K is their product.
        strides: weight of each channel's digit in the index.
        offset: of each channel.
        scale: of each channel.
        num_embeddings: K, if given, which has to be the product of the levels.
        embedding_dim: D; the number of levels unless there is a projection.
        projection: linear layers from D channels to those that are rounded and back, so that D is free.

    Raises:
        VaevqMedError: the sizes do not fit together.
    """

    levels: Tensor
    strides: Tensor
    offset: Tensor
    scale: Tensor

    def __init__(
        self,
        *,
        levels: Sequence[int],
        strides: Sequence[int],
        offset: Sequence[float],
        scale: Sequence[float],
        num_embeddings: int | None,
        embedding_dim: int | None,
        projection: bool,
    ) -> None:
        super().__init__()
        self.num_channels = len(levels)
        self.num_embeddings = math.prod(levels)
        self.embedding_dim = self.num_channels if embedding_dim is None else embedding_dim
        if num_embeddings is not None and num_embeddings != self.num_embeddings:
            raise VaevqMedError(
                f"num_embeddings is {num_embeddings}; expected the product of the levels {list(levels)}, "
                f"{self.num_embeddings}"
            )
        if not projection and self.embedding_dim != self.num_channels:
            raise VaevqMedError(
                f"embedding_dim is {embedding_dim}; expected the number of rounded channels, {self.num_channels}, "
                "or projection true"
            )
        # Not part of the state: they are the constructor's arguments.
        self.register_buffer("levels", torch.tensor(levels), persistent=False)
        self.register_buffer("strides", torch.tensor(strides), persistent=False)
        self.register_buffer("offset", torch.tensor(offset, dtype=torch.float32), persistent=False)
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float32), persistent=False)
        self.project_in = nn.Linear(self.embedding_dim, self.num_channels) if projection else nn.Identity()
        self.project_out = nn.Linear(self.num_channels, self.embedding_dim) if projection else nn.Identity()

    @abstractmethod
    def bound(self, latent: Tensor) -> Tensor:
        """What is rounded of ``[..., d]``, in steps: one apart for adjacent codes, differentiable."""

    @abstractmethod
    def digits(self, steps: Tensor) -> Tensor:
        """The nearest digits, int64 ``[..., d]``, each in ``[0, levels[i])``."""

    def codebook(self) -> None:
        """None: no table is held, however large K is."""
        return

    def codes_of_digits(self, digits: Tensor) -> Tensor:
        """Codes ``[B, D, *grid]`` of digits ``[B, *grid, d]``."""
        return channels_first(self.project_out((digits - self.offset) / self.scale))

    def indices_to_digits(self, indices: Tensor) -> Tensor:
        """Digits ``[B, *grid, d]`` of indices ``[B, *grid, 1]``."""
        return indices // self.strides % self.levels

    def digits_to_indices(self, digits: Tensor) -> Tensor:
        """Indices ``[B, *grid, 1]`` of digits ``[B, *grid, d]``."""
        return (digits * self.strides).sum(dim=-1, keepdim=True)

    def codes_of(self, indices: Tensor) -> Tensor:
        """Codes ``[B, D, *grid]`` of the indices' digits."""
        return self.codes_of_digits(self.indices_to_digits(indices))

    def losses(self, latent: Tensor, codes: Tensor) -> Mapping[str, Tensor]:
        """The method's losses of rounded channels ``[B, *grid, d]`` and their codes; none by default."""
        return {}

    def forward(self, z: Tensor, posterior: Posterior | None = None) -> QuantizerOutput:
        """Round ``z`` ``[B, D, *grid]``, with a straight-through gradient through the rounding."""
        self.check_latent(z)
        with torch.autocast(z.device.type, enabled=False):
            latent = self.project_in(channels_last(z.float()))
            steps = self.bound(latent)
            digits = self.digits(steps.detach())
            values = (digits - self.offset) / self.scale
            # The difference is exactly zero, so that the value is the code to the bit.
            through = values + (steps - steps.detach()) / self.scale
            return QuantizerOutput(
                quantized=channels_first(self.project_out(through)),
                codes=self.codes_of_digits(digits),
                indices=self.digits_to_indices(digits),
                losses=self.losses(latent, values),
            )
