"""Uniform scalar quantization of a continuous latent: each channel rounded to evenly spaced values of its own range.

What int8 does to the latent of an autoencoder without a codebook, so that its bits can be counted:
``digit = round((z - low) / step)`` with ``step = (high - low) / (K - 1)``, an index of log2 K bits a channel. Nothing
is trained, and nothing is lost but what lies outside of the range, which is clamped, and half a step at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.outputs import Posterior, QuantizerOutput
from vaevq_med.networks.quantizers.base import Quantizer, channels_last, straight_through
from vaevq_med.networks.quantizers.grouped import look_up_groups


class UniformQuantizer(Quantizer):
    """K evenly spaced values in each channel, and an index a channel: ``D log2 K`` bits a position.

    The read-out ``"soft"`` gives the latent as it is, without bits that hold it; the indices are those of ``"hard"``.

    Args:
        low: smallest value of each channel.
        high: largest value of each channel.
        num_embeddings: K; 256 is int8.
        readout: ``"hard"`` or ``"soft"``.

    Raises:
        VaevqMedError: the ranges do not fit together, or there are fewer than two values.

    Example:
        >>> quantizer = UniformQuantizer(low=[0.0, -1.0], high=[1.0, 1.0], num_embeddings=3)
        >>> output = quantizer(torch.tensor([0.7, 9.0]).view(1, 2, 1, 1))
        >>> output.indices.flatten().tolist(), output.codes.flatten().tolist(), round(quantizer.bits_per_position, 2)
        ([1, 2], [0.5, 1.0], 3.17)
    """

    readouts: ClassVar[tuple[str, ...]] = ("hard", "soft")

    low: Tensor
    high: Tensor

    def __init__(
        self, *, low: Sequence[float], high: Sequence[float], num_embeddings: int = 256, readout: str = "hard"
    ) -> None:
        super().__init__()
        if not low or len(low) != len(high) or not all(a < b for a, b in zip(low, high, strict=True)):
            raise VaevqMedError(
                f"the ranges are {list(low)} to {list(high)}; expected a smaller and a larger number each"
            )
        if num_embeddings < 2:
            raise VaevqMedError(f"num_embeddings is {num_embeddings}; expected at least 2")
        self.num_embeddings = num_embeddings
        self.embedding_dim = self.num_codebooks = len(low)
        # Not part of the state: they are the constructor's arguments.
        self.register_buffer("low", torch.tensor(low, dtype=torch.float32), persistent=False)
        self.register_buffer("high", torch.tensor(high, dtype=torch.float32), persistent=False)
        self.select_readout(readout)

    def select_readout(self, readout: str) -> None:
        """Decode rounded values (``"hard"``) or the latent itself (``"soft"``) from now on.

        Raises:
            VaevqMedError: for another name.
        """
        super().select_readout(readout)
        self.is_discrete = readout == "hard"

    @property
    def step(self) -> Tensor:
        """Between neighboring values of each channel."""
        return (self.high - self.low) / (self.num_embeddings - 1)

    def codebook(self) -> Tensor:
        """The values of each channel, ``[G, K, 1]``."""
        digits = torch.arange(self.num_embeddings, device=self.low.device)
        return (self.low[:, None] + digits * self.step[:, None]).unsqueeze(-1)

    def codes_of(self, indices: Tensor) -> Tensor:
        """Each channel's value."""
        return look_up_groups(indices, self.codebook())

    def forward(self, z: Tensor, posterior: Posterior | None = None) -> QuantizerOutput:
        """Round ``z`` ``[B, D, *grid]``, with a straight-through gradient; the posterior is not read."""
        self.check_latent(z)
        with torch.autocast(z.device.type, enabled=False):
            z = z.float()
            steps = torch.nan_to_num((channels_last(z) - self.low) / self.step)
            indices = steps.round().clamp(0, self.num_embeddings - 1).long()
            if self.readout == "soft":
                return QuantizerOutput(quantized=z, codes=z, indices=indices, codebook=self.codebook())
            codes = self.codes_of(indices)
            return QuantizerOutput(
                quantized=straight_through(codes, z), codes=codes, indices=indices, codebook=self.codebook()
            )
