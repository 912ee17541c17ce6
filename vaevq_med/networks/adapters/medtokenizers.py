"""Tokenizers of the package ``medtokenizers`` (arXiv 2608.07713): indices of any of its quantizers, or a latent."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from vaevq_med.core.components import constructed
from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.adapters.base import ForeignTokenizer, needed
from vaevq_med.networks.posterior import DiagonalGaussian
from vaevq_med.networks.quantizers.base import Quantizer


class _MedTokenizer(ForeignTokenizer):
    """What both have: the network, of the arguments in its ``config.json``."""

    needed_packages = ("medtokenizers",)
    architecture: ClassVar[str]

    def __init__(
        self,
        *,
        config: Mapping[str, Any],
        quantizer: Quantizer,
        in_channels: int | None = None,
        value_range: Sequence[float] = (0.0, 1.0),
    ) -> None:
        needed("medtokenizers", "medtokenizers")
        kind = getattr(importlib.import_module("medtokenizers.networks"), self.architecture)
        network = constructed(kind, config, self.architecture)
        super().__init__(
            quantizer=quantizer,
            factors=[int(network.spatial_compression)] * int(network.dim),
            own_channels=int(network.config["in_channels"]),
            in_channels=in_channels,
            value_range=value_range,
            variational=getattr(network, "formulation", "") == "VAE",
            finest_channels=int(network.config["channels"]),
        )
        self.network = network


class MedTokenizerIndices(_MedTokenizer):
    """A ``DiscreteTokenizer``, which quantizes by itself; its indices stand as levels of one channel.

    Args:
        config: its arguments, as its ``config.json`` has them.
        quantizer: a ``LevelQuantizer`` of one channel.
        in_channels: image channels here, see :class:`ForeignTokenizer`.
        value_range: what black and white are to it.

    Raises:
        VaevqMedError: the package is not installed, or it has several indices a position.
    """

    architecture = "DiscreteTokenizer"
    gives_latent = False

    def foreign_encode(self, images: Tensor) -> Tensor:
        """The codes ``[B, 1, *grid]`` of its indices."""
        indices = self.network.encode(images.contiguous())[0].long()
        if indices.ndim == images.ndim:  # of a residual quantizer, [B, Q, *grid]
            if indices.shape[1] != 1:
                raise VaevqMedError(f"the tokenizer has {indices.shape[1]} indices a position; expected 1")
            indices = indices.squeeze(1)
        return self.quantizer.indices_to_codes(indices.unsqueeze(-1))

    def foreign_decode(self, codes: Tensor) -> Tensor:
        """Images of codes."""
        indices = self.quantizer(codes).indices.squeeze(-1)
        residual = self.network.quantizer_type == "RESFSQ"
        return self.network.detokenize(indices.unsqueeze(1) if residual else indices)


class MedTokenizerLatent(_MedTokenizer):
    """A ``ContinuousTokenizer``, a VAE or an autoencoder.

    Args:
        config: its arguments, as its ``config.json`` has them.
        quantizer: of its latent, a ``UniformQuantizer`` for one.
        in_channels: image channels here, see :class:`ForeignTokenizer`.
        value_range: what black and white are to it.

    Raises:
        VaevqMedError: the package is not installed.
    """

    architecture = "ContinuousTokenizer"

    def foreign_encode(self, images: Tensor) -> DiagonalGaussian | Tensor:
        """The posterior over ``[B, D, *grid]``, or the latent."""
        latent, (_, told) = self.network.encode(images.contiguous())
        if not self.variational:
            return latent
        mean, spread = told  # log of the deviation where it has a convolution of its own, else of the variance
        return DiagonalGaussian(mean, 2 * spread if self.network.separate_quant_conv else spread)

    def foreign_decode(self, codes: Tensor) -> Tensor:
        """Images of a latent."""
        return self.network.decode(codes.contiguous())
