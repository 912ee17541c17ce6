"""``monai.networks.nets.VQVAE``: MONAI's VQ-VAE of images and volumes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from vaevq_med.core.components import constructed
from vaevq_med.networks.adapters.base import ForeignTokenizer
from vaevq_med.networks.quantizers.base import Quantizer


class MonaiVQVAE(ForeignTokenizer):
    """A ``VQVAE``, its codebook in a quantizer of this package.

    Args:
        config: its arguments, as a MONAI configuration has them.
        quantizer: a ``VectorQuantizer`` of its codebook's size.
        in_channels: image channels here, see :class:`ForeignTokenizer`.
        value_range: what black and white are to it.

    Raises:
        VaevqMedError: arguments that do not fit.
    """

    needed_packages = ("monai",)

    def __init__(
        self,
        *,
        config: Mapping[str, Any],
        quantizer: Quantizer,
        in_channels: int | None = None,
        value_range: Sequence[float] = (0.0, 1.0),
    ) -> None:
        from monai.networks.nets import VQVAE

        network = constructed(VQVAE, config, "VQVAE")
        super().__init__(
            quantizer=quantizer,
            factors=[math.prod(step[0] for step in network.encoder.downsample_parameters)] * network.spatial_dims,
            own_channels=network.in_channels,
            in_channels=in_channels,
            value_range=value_range,
            finest_channels=int(network.channels[0]),
        )
        del network.quantizer  # whose codebook the quantizer here has
        self.network = network

    def foreign_encode(self, images: Tensor) -> Tensor:
        """The latent ``[B, D, *grid]``."""
        return self.network.encode(images)

    def foreign_decode(self, codes: Tensor) -> Tensor:
        """Images of codes ``[B, D, *grid]``."""
        return self.network.decode(codes)
