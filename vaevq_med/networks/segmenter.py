"""A segmentation network of stacks of slices: MONAI's SegResNet, in 2.5D or 3D, perhaps with a quantizer in its middle.

SegResNet won BraTS 2018 (Myronenko, arXiv 1810.11654); here it lacks its autoencoder branch. In 2.5D the slices of a
stack are channels, and the middle one is segmented; in 3D all of them are. With a quantizer, the coarsest features go
through a codebook on their way to the decoder, as in VQ-Seg (arXiv 2601.10124), while the finer ones pass beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from monai.networks.nets import SegResNet
from torch import Tensor, nn

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.outputs import QuantizerOutput
from vaevq_med.networks.quantizers.base import Quantizer
from vaevq_med.networks.ranges import check_sizes

_GROUPS = 8
"""Of the group normalization, which the width has to be a multiple of."""


@dataclass(frozen=True)
class SegmenterFeatures:
    """What the encoder makes of a stack, before the decoder.

    Attributes:
        coarse: the coarsest features, ``[B, F, *grid]``; quantized where the network has a quantizer.
        fine: those of every level, the coarsest first, which go to the decoder beside it.
        quantizer: the quantizer's output, or None without one.
    """

    coarse: Tensor
    fine: Sequence[Tensor]
    quantizer: QuantizerOutput | None = None


class SliceSegmenter(nn.Module):
    """Logits of nested regions for the middle slice of a stack (2.5D), or for all of its slices (3D).

    Args:
        in_channels: C, contrasts.
        depth: d, adjacent slices of a stack; odd in 2.5D.
        num_regions: R, regions, each with a probability of its own, as they contain one another.
        spatial_dims: 2 or 3.
        num_channels: width at the finest level, a multiple of 8; each coarser level has twice that of the one before.
        blocks_down: residual blocks of each level on the way down; as many levels as numbers.
        blocks_up: of each level but the coarsest on the way up.
        dropout: share of channels that are dropped after the first convolution in training.
        quantizer: of the coarsest features; its ``embedding_dim`` is their number of channels, or smaller, and then a
            convolution of size 1 leads to it and back.

    Raises:
        VaevqMedError: sizes that do not fit together.

    Example:
        >>> import torch
        >>> network = SliceSegmenter(in_channels=4, depth=3, num_channels=8, blocks_down=(1, 1), blocks_up=(1,))
        >>> network(torch.zeros(2, 4, 3, 16, 16)).shape
        torch.Size([2, 3, 16, 16])
    """

    def __init__(
        self,
        *,
        in_channels: int,
        depth: int,
        num_regions: int = 3,
        spatial_dims: int = 2,
        num_channels: int = 32,
        blocks_down: Sequence[int] = (1, 2, 2, 4),
        blocks_up: Sequence[int] = (1, 1, 1),
        dropout: float = 0.0,
        quantizer: Quantizer | None = None,
    ) -> None:
        super().__init__()
        if spatial_dims not in (2, 3):
            raise VaevqMedError(f"spatial_dims is {spatial_dims}; expected 2 or 3")
        check_sizes(in_channels=in_channels, depth=depth, num_regions=num_regions, num_channels=num_channels)
        check_sizes(blocks_down=min(blocks_down, default=0), blocks_up=min(blocks_up, default=1))
        if spatial_dims == 2 and depth % 2 == 0:
            raise VaevqMedError(f"depth is {depth}; expected an odd number, whose middle slice is segmented")
        if num_channels % _GROUPS:
            raise VaevqMedError(f"num_channels is {num_channels}; expected a multiple of {_GROUPS}")
        if len(blocks_up) != len(blocks_down) - 1:
            raise VaevqMedError(
                f"blocks_up has {len(blocks_up)} entries; expected one fewer than blocks_down, {len(blocks_down) - 1}"
            )
        if not 0 <= dropout < 1:
            raise VaevqMedError(f"dropout is {dropout}; expected 0 to below 1")
        self.in_channels = in_channels
        self.depth = depth
        self.num_regions = num_regions
        self.spatial_dims = spatial_dims
        self.downsampling = 2 ** (len(blocks_down) - 1)
        self.backbone = SegResNet(
            spatial_dims=spatial_dims,
            init_filters=num_channels,
            in_channels=in_channels * depth if spatial_dims == 2 else in_channels,
            out_channels=num_regions,
            dropout_prob=dropout or None,
            blocks_down=tuple(blocks_down),
            blocks_up=tuple(blocks_up),
        )
        self.quantizer = quantizer
        if quantizer is not None:
            width = num_channels * self.downsampling
            convolution = nn.Conv2d if spatial_dims == 2 else nn.Conv3d
            same = quantizer.embedding_dim == width
            self.to_latent = nn.Identity() if same else convolution(width, quantizer.embedding_dim, 1)
            self.from_codes = nn.Identity() if same else convolution(quantizer.embedding_dim, width, 1)

    def check_image(self, images: Tensor) -> None:
        """Refuse what is no stack of this network.

        Raises:
            VaevqMedError: saying the shape found, or sides that the levels cannot halve.
        """
        expected = f"[B, {self.in_channels}, {self.depth}, H, W]"
        if images.ndim != 5 or images.shape[1] != self.in_channels or images.shape[2] != self.depth:
            raise VaevqMedError(f"the images have shape {tuple(images.shape)}; expected {expected}")
        sides = images.shape[-self.spatial_dims :]
        if any(side % self.downsampling for side in sides):
            raise VaevqMedError(
                f"the images have sides of {' x '.join(map(str, sides))}; expected multiples of {self.downsampling}"
            )

    def encode(self, images: Tensor) -> SegmenterFeatures:
        """The features of stacks ``[B, C, d, H, W]`` in [-1, 1]."""
        self.check_image(images)
        flat = images.flatten(1, 2) if self.spatial_dims == 2 else images
        coarse, levels = self.backbone.encode(flat)
        if self.quantizer is None:
            return SegmenterFeatures(coarse, levels[::-1])
        quantized = self.quantizer(self.to_latent(coarse))
        return SegmenterFeatures(quantized.quantized, levels[::-1], quantized)

    def decode(self, features: SegmenterFeatures) -> Tensor:
        """The logits ``[B, R, H, W]``, or ``[B, R, d, H, W]`` in 3D, of features."""
        coarse = features.coarse if self.quantizer is None else self.from_codes(features.coarse)
        return self.backbone.decode(coarse, list(features.fine))

    def forward(self, images: Tensor) -> Tensor:
        """The logits ``[B, R, H, W]``, or ``[B, R, d, H, W]`` in 3D, of stacks ``[B, C, d, H, W]`` in [-1, 1]."""
        return self.decode(self.encode(images))

    def targets(self, masks: Tensor) -> Tensor:
        """Of the regions' masks ``[B, R, d, H, W]`` of a stack those that the logits are of."""
        return masks[:, :, self.depth // 2] if self.spatial_dims == 2 else masks
