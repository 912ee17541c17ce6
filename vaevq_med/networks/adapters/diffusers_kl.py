"""``diffusers.AutoencoderKL``: the continuous autoencoder of latent diffusion (arXiv 2112.10752)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from vaevq_med.core.components import constructed
from vaevq_med.networks.adapters.base import ForeignTokenizer, needed
from vaevq_med.networks.posterior import DiagonalGaussian
from vaevq_med.networks.quantizers.base import Quantizer


class DiffusersKL(ForeignTokenizer):
    """An ``AutoencoderKL``, and what makes its latent discrete.

    The latent is the encoder's own: ``scaling_factor`` and ``shift_factor``, which are a diffusion model's, are not
    applied.

    Args:
        config: the arguments of ``AutoencoderKL``, as its ``config.json`` has them.
        quantizer: of its latent, a ``UniformQuantizer`` for one.
        in_channels: image channels here, see :class:`ForeignTokenizer`.
        value_range: what black and white are to it.

    Raises:
        VaevqMedError: the package is not installed, or arguments that do not fit.
    """

    needed_packages = ("diffusers",)

    def __init__(
        self,
        *,
        config: Mapping[str, Any],
        quantizer: Quantizer,
        in_channels: int | None = None,
        value_range: Sequence[float] = (-1.0, 1.0),
    ) -> None:
        network = constructed(needed("diffusers", "diffusers").AutoencoderKL, config, "AutoencoderKL")
        widths = list(network.config.block_out_channels)
        super().__init__(
            quantizer=quantizer,
            factors=[2 ** (len(widths) - 1)] * 2,
            own_channels=int(network.config.in_channels),
            in_channels=in_channels,
            value_range=value_range,
            variational=True,
            finest_channels=int(widths[0]),
        )
        self.network = network

    def foreign_encode(self, images: Tensor) -> DiagonalGaussian:
        """The posterior over ``[B, D, h, w]``."""
        moments = self.network.encoder(images)
        if self.network.quant_conv is not None:
            moments = self.network.quant_conv(moments)
        return DiagonalGaussian(*moments.chunk(2, dim=1))

    def foreign_decode(self, codes: Tensor) -> Tensor:
        """Images of a latent ``[B, D, h, w]``."""
        if self.network.post_quant_conv is not None:
            codes = self.network.post_quant_conv(codes)
        return self.network.decoder(codes)
