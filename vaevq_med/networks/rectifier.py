"""The rectifier of Quantize-then-Rectify (ReVQ, arXiv 2507.10547): codes moved towards the latents that they stand for.

In a tokenizer whose encoder and decoder are those of a continuous one and stay as they are, what the decoder is given
is no longer what it has learned: ``q`` instead of ``z``. The rectifier learns the difference from the codes around a
position, ``q + r(q)``. Its last layer starts at zero, so that a tokenizer begins as it is without.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from vaevq_med.networks.blocks import NormFactory, ResidualBlock, convolution, group_norm, slice_norm
from vaevq_med.networks.encoder import check_within_slices
from vaevq_med.networks.ranges import check_sizes


class Rectifier(nn.Module):
    """Residual blocks on codes, added to them.

    Args:
        embedding_dim: D.
        num_channels: width of the blocks.
        num_blocks: residual blocks of two 3x3 convolutions each.
        spatial_dims: those of encoder and decoder.
        within_slices: of volumes, normalize each slice by itself, as for the encoder.

    Example:
        >>> import torch
        >>> codes = torch.randn(1, 4, 8, 8)
        >>> torch.equal(Rectifier(embedding_dim=4, num_channels=8)(codes), codes)
        True
    """

    def __init__(
        self,
        *,
        embedding_dim: int,
        num_channels: int = 128,
        num_blocks: int = 2,
        spatial_dims: int = 2,
        within_slices: bool = False,
    ) -> None:
        super().__init__()
        check_sizes(embedding_dim=embedding_dim, num_channels=num_channels, num_blocks=num_blocks)
        check_within_slices(within_slices, spatial_dims)
        norm: NormFactory = slice_norm if within_slices else group_norm
        self.embedding_dim = embedding_dim
        self.spatial_dims = spatial_dims
        last = cast(nn.Conv2d, convolution(spatial_dims, num_channels, embedding_dim, 3))
        nn.init.zeros_(last.weight)
        nn.init.zeros_(cast(Tensor, last.bias))
        blocks = (
            ResidualBlock(spatial_dims=spatial_dims, in_channels=num_channels, out_channels=num_channels, norm=norm)
            for _ in range(num_blocks)
        )
        self.layers = nn.Sequential(convolution(spatial_dims, embedding_dim, num_channels, 3), *blocks, last)

    def forward(self, codes: Tensor) -> Tensor:
        """``[B, D, *grid]`` to the same."""
        return codes + self.layers(codes)
