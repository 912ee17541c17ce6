"""``diffusers.AutoencoderKL``: the continuous autoencoder of latent diffusion (arXiv 2112.10752)."""

from __future__ import annotations

from torch import Tensor

from vaevq_med.networks.adapters.diffusers_autoencoder import DiffusersAutoencoder
from vaevq_med.networks.posterior import DiagonalGaussian


class DiffusersKL(DiffusersAutoencoder):
    """An ``AutoencoderKL``; its quantizer is a ``UniformQuantizer`` for one.

    The latent is the encoder's own: ``scaling_factor`` and ``shift_factor``, which are a diffusion model's, are not
    applied.
    """

    class_name = "AutoencoderKL"
    has_posterior = True

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
