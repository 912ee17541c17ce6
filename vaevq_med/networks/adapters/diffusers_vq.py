"""``diffusers.VQModel``: the VQGAN of taming-transformers and its relatives in the package ``diffusers``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from vaevq_med.core.components import constructed
from vaevq_med.networks.adapters.base import ForeignTokenizer, needed
from vaevq_med.networks.quantizers.base import Quantizer


class DiffusersVQ(ForeignTokenizer):
    """A ``VQModel``, its codebook in a quantizer of this package.

    Args:
        config: the arguments of ``VQModel``, as its ``config.json`` has them.
        quantizer: a ``VectorQuantizer`` of its codebook's size.
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
        network = constructed(needed("diffusers", "diffusers").VQModel, config, "VQModel")
        widths = list(network.config.block_out_channels)
        super().__init__(
            quantizer=quantizer,
            factors=[2 ** (len(widths) - 1)] * 2,
            own_channels=int(network.config.in_channels),
            in_channels=in_channels,
            value_range=value_range,
            finest_channels=int(widths[0]),
        )
        del network.quantize  # whose codebook the quantizer has
        self.network = network
        self.reads_codes = network.config.norm_type == "spatial"

    def foreign_encode(self, images: Tensor) -> Tensor:
        """The latent ``[B, D, h, w]``."""
        return self.network.quant_conv(self.network.encoder(images))

    def foreign_decode(self, codes: Tensor) -> Tensor:
        """Images of codes ``[B, D, h, w]``."""
        return self.network.decoder(self.network.post_quant_conv(codes), codes if self.reads_codes else None)
