"""``monai.networks.nets.AutoencoderKL``: MONAI's continuous autoencoder of images and volumes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vaevq_med.core.components import constructed
from vaevq_med.networks.adapters.base import ForeignTokenizer
from vaevq_med.networks.posterior import DiagonalGaussian
from vaevq_med.networks.quantizers.base import Quantizer


class MonaiKL(ForeignTokenizer):
    """An ``AutoencoderKL``, and what makes its latent discrete.

    Args:
        config: its arguments, as a MONAI configuration has them.
        quantizer: of its latent, a ``UniformQuantizer`` for one.
        in_channels: image channels here, see :class:`ForeignTokenizer`.
        value_range: what black and white are to it; MAISI's are 0 and 1.

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
        kind = self.architecture()
        network = constructed(kind, config, kind.__name__)
        widths = list(config.get("channels") or config.get("num_channels") or (32, 64, 64, 64))
        super().__init__(
            quantizer=quantizer,
            factors=[2 ** (len(widths) - 1)] * int(config["spatial_dims"]),
            own_channels=int(config.get("in_channels", 1)),
            in_channels=in_channels,
            value_range=value_range,
            variational=True,
            finest_channels=int(widths[0]),
        )
        self.network = network

    @staticmethod
    def architecture() -> Any:
        """The class of the foreign network."""
        from monai.networks.nets import AutoencoderKL

        return AutoencoderKL

    def foreign_encode(self, images: Tensor) -> DiagonalGaussian:
        """The posterior over ``[B, D, *grid]``."""
        mean, std = self.network.encode(images)
        return DiagonalGaussian(mean, 2 * torch.log(std))

    def foreign_decode(self, codes: Tensor) -> Tensor:
        """Images of a latent ``[B, D, *grid]``."""
        return self.network.decode(codes)
