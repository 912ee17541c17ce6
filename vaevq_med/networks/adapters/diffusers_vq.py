"""``diffusers.VQModel``: the VQGAN of taming-transformers and its relatives in the package ``diffusers``."""

from __future__ import annotations

from torch import Tensor

from vaevq_med.networks.adapters.diffusers_autoencoder import DiffusersAutoencoder


class DiffusersVQ(DiffusersAutoencoder):
    """A ``VQModel``, its codebook in a ``VectorQuantizer`` of this package of the codebook's size."""

    class_name = "VQModel"
    has_posterior = False
    unused_modules = ("quantize",)  # whose codebook the quantizer has

    def foreign_encode(self, images: Tensor) -> Tensor:
        """The latent ``[B, D, h, w]``."""
        return self.network.quant_conv(self.network.encoder(images))

    def foreign_decode(self, codes: Tensor) -> Tensor:
        """Images of codes ``[B, D, h, w]``."""
        normalized_by_codes = self.network.config.norm_type == "spatial"
        return self.network.decoder(self.network.post_quant_conv(codes), codes if normalized_by_codes else None)
