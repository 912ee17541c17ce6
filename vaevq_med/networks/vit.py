"""The encoder and decoder of ViT-VQGAN (arXiv 2110.04627): vision transformers over patches, for any quantizer.

A patch is a token; a linear layer makes it of the pixels, and one makes the pixels of it. Between them are
pre-normalized blocks of attention to all patches. The narrow latent of the publication is the tokenizer's own 1x1
convolutions around the quantizer. Positions are fixed sines and cosines of row and column, which images of another size
interpolate.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vaevq_med.networks.backbone import BaseDecoder, BaseEncoder
from vaevq_med.networks.blocks import check_channels, convolution
from vaevq_med.networks.ranges import check_choice
from vaevq_med.networks.transformer import (
    TransformerStack,
    check_patches,
    patch_grid,
    sine_positions,
)

POSITIONS = ("sinusoidal", "none")


class PatchPositions(nn.Module):
    """Adds to the tokens of patches where they are on the plane.

    Args:
        image_size: pixels of a side, at which positions are whole numbers.
        patch_size: pixels of a patch's side.
        width: channels of a token.
        positions: ``"sinusoidal"``, see :func:`sine_positions`, or ``"none"``.

    Raises:
        VaevqMedError: the sizes do not fit together, or there are no such positions.
    """

    def __init__(self, *, image_size: int, patch_size: int, width: int, positions: str) -> None:
        super().__init__()
        check_patches(image_size=image_size, patch_size=patch_size, width=width)
        self.positions = check_choice("positions", positions, POSITIONS)
        self.known = patch_grid((image_size, image_size), patch_size)
        self.width = width

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens ``[B, h w, width]`` of a grid h, w with their positions added."""
        if self.positions == "none":
            return tokens
        return tokens + sine_positions(grid, self.width, known=self.known, device=tokens.device)


class Patchify(nn.Module):
    """Images ``[B, C, H, W]`` to a token a patch, ``[B, h w, width]``, by a linear layer.

    Args:
        in_channels: C.
        patch_size: pixels of a patch's side.
        width: channels of a token.
    """

    def __init__(self, *, in_channels: int, patch_size: int, width: int) -> None:
        super().__init__()
        self.layer = convolution(2, in_channels, width, patch_size, stride=patch_size)
        weight, bias = cast(Tensor, self.layer.weight), cast(Tensor, self.layer.bias)
        nn.init.xavier_uniform_(weight.flatten(1))
        nn.init.zeros_(bias)

    @property
    def weight(self) -> Tensor:
        """``[width, C, patch, patch]``."""
        return cast(Tensor, self.layer.weight)

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        return self.layer(images).flatten(2).mT


class Unpatchify(nn.Module):
    """Tokens of a grid ``[B, h w, width]`` to images ``[B, C, h patch, w patch]``, by a linear layer.

    Its weight has the image channels in front, ``[C, patch, patch, width]``, as a convolution has them.

    Args:
        width: channels of a token.
        out_channels: C.
        patch_size: pixels of a patch's side.
    """

    def __init__(self, *, width: int, out_channels: int, patch_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_channels, patch_size, patch_size, width))
        self.bias = nn.Parameter(torch.zeros(out_channels, patch_size, patch_size))
        nn.init.xavier_uniform_(self.weight.view(-1, width))

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """See the class."""
        channels, patch = self.weight.shape[:2]
        pixels = F.linear(tokens, self.weight.flatten(0, 2), self.bias.flatten())  # [B, h w, C patch patch]
        blocks = pixels.unflatten(2, (channels, patch, patch)).unflatten(1, grid)  # [B, h, w, C, patch, patch]
        return blocks.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


class ViTEncoder(BaseEncoder):
    """Images to latent features by a vision transformer.

    The default sizes are those of the publication's small network.

    Args:
        in_channels: image channels C.
        image_size: pixels of a side, at which the positions are whole numbers; images of other sizes that the patch
            divides interpolate them.
        patch_size: pixels of a patch's side, the downsampling factor f.
        width: channels of a token, a multiple of 4.
        depth: blocks; 0 leaves the linear layer.
        num_heads: attention heads, a divisor of ``width``.
        mlp_ratio: hidden width of the perceptrons over ``width``.
        positions: ``"sinusoidal"`` or ``"none"``.

    Attributes:
        z_channels: channels out, the width.

    Raises:
        VaevqMedError: a size is out of its range or does not fit the others.

    Example:
        >>> ViTEncoder(in_channels=1, image_size=32, width=16, depth=1, num_heads=2)(torch.zeros(1, 1, 32, 32)).shape
        torch.Size([1, 16, 4, 4])
    """

    def __init__(
        self,
        *,
        in_channels: int = 3,
        image_size: int = 256,
        patch_size: int = 8,
        width: int = 512,
        depth: int = 8,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
        positions: str = "sinusoidal",
    ) -> None:
        super().__init__()
        self.plane = PatchPositions(image_size=image_size, patch_size=patch_size, width=width, positions=positions)
        self.spatial_dims = 2
        self.in_channels = in_channels
        self.z_channels = width
        self.downsampling_factors = (patch_size, patch_size)
        self.layers = TransformerStack(width=width, depth=depth, num_heads=num_heads, mlp_ratio=mlp_ratio)
        self.patchify = Patchify(in_channels=in_channels, patch_size=patch_size, width=width)
        self._levels = [list(self.layers.blocks)]

    @property
    def first_layer(self) -> Tensor:
        """See the base class."""
        return self.patchify.weight

    def compile_layers(self) -> None:
        """See the base class."""
        self.layers.compile()

    def forward(self, images: Tensor) -> Tensor:
        """Features ``[B, width, H/f, W/f]`` of images ``[B, C, H, W]`` in [-1, 1].

        Raises:
            VaevqMedError: as for :meth:`check_images`.
        """
        self.check_images(images)
        grid = patch_grid(images.shape[2:], self.downsampling_factors[0])
        tokens = self.layers(self.plane(self.patchify(images), grid))
        return tokens.mT.unflatten(2, grid)


class PatchDecoder(BaseDecoder):
    """A decoder whose transformer's tokens a head turns into patches: what the trainer asks of its parts.

    Attributes:
        layers: the blocks.
        head: tokens to patches.
    """

    layers: TransformerStack
    head: Unpatchify

    @property
    def last_layer(self) -> Tensor:
        """See the base class."""
        return self.head.weight

    @property
    def finest_channels(self) -> int:
        """Numbers of a token over the pixels that it stands for, at least 1."""
        return max(1, self.z_channels // self.head.weight[0, ..., 0].numel())

    def compile_layers(self) -> None:
        """See the base class; without the head."""
        self.layers.compile()


class ViTDecoder(PatchDecoder):
    """Latent features to images by a vision transformer; the arguments are those of :class:`ViTEncoder`.

    Args:
        out_channels: image channels C.
        image_size: see there.
        patch_size: pixels of a patch's side, by which a position is enlarged.
        width: channels in, and of a token.
        depth: blocks; 0 leaves the linear layer.
        num_heads: attention heads, a divisor of ``width``.
        mlp_ratio: hidden width of the perceptrons over ``width``.
        positions: see there.

    Raises:
        VaevqMedError: a size is out of its range or does not fit the others.
    """

    def __init__(
        self,
        *,
        out_channels: int = 3,
        image_size: int = 256,
        patch_size: int = 8,
        width: int = 512,
        depth: int = 8,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
        positions: str = "sinusoidal",
    ) -> None:
        super().__init__()
        self.plane = PatchPositions(image_size=image_size, patch_size=patch_size, width=width, positions=positions)
        self.z_channels = width
        self.upsampling_factors = (patch_size, patch_size)
        self.layers = TransformerStack(width=width, depth=depth, num_heads=num_heads, mlp_ratio=mlp_ratio)
        self.head = Unpatchify(width=width, out_channels=out_channels, patch_size=patch_size)
        self._levels = [list(self.layers.blocks)]

    def forward(self, features: Tensor, codes: Tensor | None = None) -> Tensor:
        """Images ``[B, C, f h, f w]``, nominally in [-1, 1], of features ``[B, width, h, w]``; codes are not read.

        Raises:
            VaevqMedError: the features have other channels.
        """
        check_channels(features, self.z_channels, "the decoder's input")
        grid = (features.shape[2], features.shape[3])
        return self.head(self.layers(self.plane(features.flatten(2).mT, grid)), grid)
