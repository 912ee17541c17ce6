"""Mo-VQGAN's decoder (MoVQ, Zheng et al., arXiv 2209.09002): the codes modulate every normalization.

A GroupNorm evens out what the codes say of a place; here each one, in residual blocks, attention and output head, is
scaled and shifted position by position by the codes themselves, ``GN(h) * A(up(z_q)) + B(up(z_q))`` with 1x1
convolutions A and B of its own. The quantizer is VQGAN's: the paper quantizes four chunks of channels with one shared
codebook, which the public reimplementation leaves out, and so does this one.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.blocks import Conditioned, check_channels, convolution, group_norm
from vaevq_med.networks.decoder import Decoder


class ModulatedNorm(Conditioned):
    """``GN(h) * A(up(z_q)) + B(up(z_q))`` (arXiv 2209.09002), ``up`` by nearest neighbor to the size of ``h``.

    A and B are applied before ``up``, with which a 1x1 convolution commutes: at the latent's size they cost next to
    nothing. They start as PyTorch's convolutions do; there is no ``1 +`` at the scale.

    Args:
        num_channels: channels of ``h``.
        spatial_dims: 1, 2 or 3.
        embedding_dim: D, channels of the codes.
    """

    def __init__(self, num_channels: int, *, spatial_dims: int, embedding_dim: int) -> None:
        super().__init__()
        self.norm = group_norm(num_channels)
        self.scale = convolution(spatial_dims, embedding_dim, num_channels, 1)
        self.shift = convolution(spatial_dims, embedding_dim, num_channels, 1)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """Modulate ``x`` ``[B, C, ...]`` by codes ``[B, D, ...]`` of the same or a smaller spatial size.

        Raises:
            VaevqMedError: there are no codes.
        """
        if condition is None:
            raise VaevqMedError("a modulated normalization found no codes, expected those of the latent")
        size = x.shape[2:]
        scale, shift = (F.interpolate(layer(condition), size=size) for layer in (self.scale, self.shift))
        return self.norm(x) * scale + shift


class ModulatedDecoder(Decoder):
    """VQGAN's decoder with every GroupNorm modulated by the codes; it takes them beside the features.

    Each normalization of C channels has 2 C (D + 1) parameters more; with the published sizes at f = 8, 115,200 for
    D = 4 and 1,497,600 for D = 64.

    Args:
        embedding_dim: D, channels of the codes.
        spatial_dims: see :class:`Decoder`, as all the others.
        out_channels: image channels C.
        num_channels: width of the finest level.
        channel_mult: width of each level, finest first, as a multiple of ``num_channels``.
        num_res_blocks: the encoder's residual blocks a level; the decoder has one more.
        attention_resolutions: image sizes, in pixels, of the levels with attention.
        image_size: the image size, in pixels, at which ``attention_resolutions`` is counted.
        z_channels: channels of the features.
        dropout: dropout probability in the residual blocks.
    """

    def __init__(
        self,
        *,
        embedding_dim: int,
        spatial_dims: int = 2,
        out_channels: int = 3,
        num_channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 2, 4),
        num_res_blocks: int = 2,
        attention_resolutions: Sequence[int] = (32,),
        image_size: int = 256,
        z_channels: int = 256,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(
            spatial_dims=spatial_dims,
            out_channels=out_channels,
            num_channels=num_channels,
            channel_mult=channel_mult,
            num_res_blocks=num_res_blocks,
            attention_resolutions=attention_resolutions,
            image_size=image_size,
            z_channels=z_channels,
            dropout=dropout,
            norm=partial(ModulatedNorm, spatial_dims=spatial_dims, embedding_dim=embedding_dim),
        )
        self.embedding_dim = embedding_dim

    def forward(self, features: Tensor, codes: Tensor) -> Tensor:  # type: ignore[override]
        """Decode latent features.

        Args:
            features: ``[B, z_channels, h, w]``.
            codes: what the features were made from, ``[B, D, h, w]``: a latent where that is decoded.

        Returns:
            Images ``[B, C, f*h, f*w]``, nominally in [-1, 1], not clamped.

        Raises:
            VaevqMedError: if the channels of either differ from what the decoder was built for.
        """
        check_channels(features, self.z_channels, "the decoder's input")
        check_channels(codes, self.embedding_dim, "the decoder's codes")
        return self.head(self.layers(features, codes), codes)
