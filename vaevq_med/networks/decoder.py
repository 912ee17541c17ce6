"""The decoders: VQGAN's (arXiv 2012.09841), and Mo-VQGAN's (arXiv 2209.09002), which reads the codes too."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, cast

import torch.nn.functional as F
from torch import Tensor, nn

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.backbone import BaseDecoder
from vaevq_med.networks.blocks import (
    Conditioned,
    ConditionedSequential,
    MiddleBlocks,
    NormFactory,
    OutputHead,
    ShuffleUpsample,
    Upsample,
    check_channels,
    convolution,
    group_norm,
    level_blocks,
    slice_norm,
)
from vaevq_med.networks.encoder import (
    check_resampling,
    check_within_slices,
    downsampling_plan,
    level_plan,
    total_factors,
)


class Decoder(BaseDecoder):
    """Latent features to images, by taming-transformers' VQGAN architecture.

    A 3x3 convolution from ``z_channels``; residual block, attention, residual block; per level, coarsest first,
    ``num_res_blocks + 1`` residual blocks, each followed by attention at the listed resolutions, then
    upsampling by 2 (not after the finest level); GroupNorm, swish, 3x3 convolution. No output activation.

    Args:
        spatial_dims: 1, 2 or 3.
        out_channels: image channels C.
        num_channels: width of the finest level.
        channel_mult: width of each level, finest first, as a multiple of ``num_channels``.
        num_res_blocks: the encoder's residual blocks a level; the decoder has one more.
        attention_resolutions: image sizes, in pixels, of the levels with attention.
        image_size: the image size, in pixels, at which ``attention_resolutions`` is counted.
        z_channels: channels in.
        dropout: dropout probability in the residual blocks.
        norm: makes the normalizations.
        embedding_dim: D, channels of the codes that a :class:`ModulatedDecoder` reads beside the features.
        downsampling: the encoder's, see :func:`vaevq_med.networks.encoder.downsampling_plan`.
        middle_attention: whether there is attention at the bottom.
        within_slices: as for the encoder.
        resampling: ``"vqgan"`` repeats pixels before a convolution, ``"magvit"`` makes them of channels.

    Attributes:
        upsampling_factor: f, that of the last axis.
        upsampling_factors: that of each axis.
        modulated: whether the class reads codes, by which every normalization is modulated.

    Raises:
        VaevqMedError: a decoder that reads codes has no ``embedding_dim``, or one that reads none has some.
    """

    modulated: ClassVar[bool] = False

    def __init__(
        self,
        *,
        spatial_dims: int = 2,
        out_channels: int = 3,
        num_channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 2, 4),
        num_res_blocks: int = 2,
        attention_resolutions: Sequence[int] = (32,),
        image_size: int = 256,
        z_channels: int = 256,
        dropout: float = 0.0,
        norm: NormFactory = group_norm,
        embedding_dim: int | None = None,
        downsampling: Sequence[Sequence[int]] | None = None,
        middle_attention: bool = True,
        within_slices: bool = False,
        resampling: str = "vqgan",
    ) -> None:
        super().__init__()
        check_within_slices(within_slices, spatial_dims)
        shuffled = check_resampling(resampling, spatial_dims)
        if within_slices and norm is group_norm:
            norm = slice_norm
        if self.modulated != (embedding_dim is not None):
            expected = "that of the codes" if self.modulated else "None but for a ModulatedDecoder"
            raise VaevqMedError(f"embedding_dim is {embedding_dim}; expected {expected}")
        if embedding_dim is not None:
            norm = partial(ModulatedNorm, spatial_dims=spatial_dims, embedding_dim=embedding_dim, norm=norm)
        plan = level_plan(
            num_channels=num_channels,
            channel_mult=channel_mult,
            attention_resolutions=attention_resolutions,
            image_size=image_size,
        )
        self.z_channels = z_channels
        self.embedding_dim = embedding_dim
        steps = downsampling_plan(spatial_dims, len(plan), downsampling)
        self.upsampling_factors = total_factors(spatial_dims, steps)
        self.upsampling_factor = self.upsampling_factors[-1]

        shared: dict[str, Any] = {
            "spatial_dims": spatial_dims,
            "dropout": dropout,
            "norm": norm,
            "within_slices": within_slices,
        }
        width = plan[-1][0]
        layers: list[nn.Module] = [
            convolution(spatial_dims, z_channels, width, 3),
            MiddleBlocks(num_channels=width, attention=middle_attention, **shared),
        ]
        self._levels: list[list[nn.Module]] = [[] for _ in plan]
        for level in reversed(range(len(plan))):
            level_width, has_attention = plan[level]
            self._levels[level] = level_blocks(
                num_res_blocks + 1, in_channels=width, out_channels=level_width, attention=has_attention, **shared
            )
            width = level_width
            layers += self._levels[level]
            if level > 0:
                layers.append(
                    ShuffleUpsample(num_channels=width)
                    if shuffled
                    else Upsample(spatial_dims=spatial_dims, num_channels=width, factors=steps[level - 1])
                )
        self.layers = ConditionedSequential(*layers)
        self.head = OutputHead(spatial_dims=spatial_dims, in_channels=width, out_channels=out_channels, norm=norm)

    @property
    def last_layer(self) -> Tensor:
        """Weight of the output convolution, which the adaptive adversarial weight differentiates."""
        return cast(Tensor, self.head[-1].weight)

    def compile_layers(self) -> None:
        """See the base class; without the head."""
        self.layers.compile()

    def forward(self, features: Tensor, codes: Tensor | None = None) -> Tensor:
        """Decode latent features.

        Args:
            features: ``[B, z_channels, h, w]``.
            codes: what the features were made from, ``[B, D, h, w]``: a latent where that is decoded. Only a decoder
                with an ``embedding_dim`` needs them.

        Returns:
            Images ``[B, C, f*h, f*w]``, nominally in [-1, 1], not clamped.

        Raises:
            VaevqMedError: if the channels of either differ from what the decoder was built for, or there are no codes.
        """
        check_channels(features, self.z_channels, "the decoder's input")
        if self.embedding_dim is not None and codes is not None:
            check_channels(codes, self.embedding_dim, "the decoder's codes")
        return self.head(self.layers(features, codes), codes)


class ModulatedNorm(Conditioned):
    """``GN(h) * A(up(z_q)) + B(up(z_q))`` (arXiv 2209.09002), ``up`` by nearest neighbor to the size of ``h``.

    A and B are applied before ``up``, with which a 1x1 convolution commutes: at the latent's size they cost next to
    nothing. They start as PyTorch's convolutions do; there is no ``1 +`` at the scale.

    Args:
        num_channels: channels of ``h``.
        spatial_dims: 1, 2 or 3.
        embedding_dim: D, channels of the codes.
        norm: makes what is modulated.
    """

    def __init__(
        self, num_channels: int, *, spatial_dims: int, embedding_dim: int, norm: NormFactory = group_norm
    ) -> None:
        super().__init__()
        self.norm = norm(num_channels)
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
    """Mo-VQGAN's decoder (MoVQ, Zheng et al., arXiv 2209.09002): the codes modulate every normalization.

    A GroupNorm evens out what the codes say of a place; here each one, in residual blocks, attention and output head,
    is a :class:`ModulatedNorm` of its own. The quantizer is VQGAN's: the paper quantizes four chunks of channels with
    one shared codebook, which the public reimplementation leaves out, and so does this one.

    Each normalization of C channels has 2 C (D + 1) parameters more; with the published sizes at f = 8, 115,200 for
    D = 4 and 1,497,600 for D = 64.

    Args:
        embedding_dim: D, channels of the codes; the other arguments are those of :class:`Decoder`.
    """

    modulated = True
