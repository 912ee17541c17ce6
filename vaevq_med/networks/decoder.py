"""The VQGAN decoder (Esser et al., arXiv 2012.09841)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn

from vaevq_med.networks.blocks import (
    AttentionBlock,
    ConditionedSequential,
    MiddleBlocks,
    NormFactory,
    OutputHead,
    ResidualBlock,
    Upsample,
    check_channels,
    convolution,
    group_norm,
    recompute_levels,
)
from vaevq_med.networks.encoder import level_plan


class Decoder(nn.Module):
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
    """

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
    ) -> None:
        super().__init__()
        plan = level_plan(
            num_channels=num_channels,
            channel_mult=channel_mult,
            attention_resolutions=attention_resolutions,
            image_size=image_size,
        )
        self.z_channels = z_channels
        self.upsampling_factor = 2 ** (len(plan) - 1)

        width = plan[-1][0]
        layers: list[nn.Module] = [
            convolution(spatial_dims, z_channels, width, 3),
            MiddleBlocks(spatial_dims=spatial_dims, num_channels=width, dropout=dropout, norm=norm),
        ]
        self._levels: list[list[nn.Module]] = [[] for _ in plan]
        for level in reversed(range(len(plan))):
            level_width, has_attention = plan[level]
            first = len(layers)
            for _ in range(num_res_blocks + 1):
                layers.append(
                    ResidualBlock(
                        spatial_dims=spatial_dims,
                        in_channels=width,
                        out_channels=level_width,
                        dropout=dropout,
                        norm=norm,
                    )
                )
                width = level_width
                if has_attention:
                    layers.append(AttentionBlock(spatial_dims=spatial_dims, num_channels=width, norm=norm))
            self._levels[level] = layers[first:]
            if level > 0:
                layers.append(Upsample(spatial_dims=spatial_dims, num_channels=width))
        self.layers = ConditionedSequential(*layers)
        self.head = OutputHead(spatial_dims=spatial_dims, in_channels=width, out_channels=out_channels, norm=norm)

    @property
    def last_layer(self) -> Tensor:
        """Weight of the output convolution, which the adaptive adversarial weight differentiates."""
        return cast(Tensor, self.head[-1].weight)

    def recompute_levels(self, chosen: Sequence[int]) -> None:
        """See :func:`vaevq_med.networks.blocks.recompute_levels`."""
        recompute_levels(self._levels, chosen)

    def forward(self, features: Tensor) -> Tensor:
        """Decode latent features.

        Args:
            features: ``[B, z_channels, h, w]``.

        Returns:
            Images ``[B, C, f*h, f*w]``, nominally in [-1, 1], not clamped.

        Raises:
            VaevqMedError: if the channels differ from ``z_channels``.
        """
        check_channels(features, self.z_channels, "the decoder's input")
        return self.head(self.layers(features))
