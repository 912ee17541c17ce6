"""What every encoder and every decoder of a tokenizer is, whatever its layers are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.blocks import check_channels, recompute_levels


class Backbone(nn.Module, ABC):
    """One half of a tokenizer's backbone, as training asks of it."""

    _levels: Sequence[Sequence[nn.Module]]
    """The blocks of each level, the finest first."""

    def recompute_levels(self, chosen: Sequence[int]) -> None:
        """See :func:`vaevq_med.networks.blocks.recompute_levels`."""
        recompute_levels(self._levels, chosen)

    @abstractmethod
    def compile_layers(self) -> None:
        """Compile the layers, but a decoder's last: the adaptive weight differentiates that alone, and repeatedly."""


class BaseEncoder(Backbone):
    """Images to features on a latent grid.

    Attributes:
        spatial_dims: axes of an image, and of the grid.
        in_channels: image channels C.
        z_channels: channels out.
        downsampling_factors: image sizes over those of the grid, an axis each.
        patchwise: whether a position of the grid stands for the patch of the image at its place.
    """

    spatial_dims: int
    in_channels: int
    z_channels: int
    downsampling_factors: tuple[int, ...]
    patchwise: ClassVar[bool] = True

    @property
    @abstractmethod
    def first_layer(self) -> Tensor:
        """Weight of the layer that sees the image, ``[width, C, ...]``."""

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """Features ``[B, z_channels, *grid]`` of images ``[B, C, H, W]`` in [-1, 1]; see :meth:`check_images`."""

    def check_images(self, images: Tensor) -> None:
        """Refuse what is not ``[B, C, H, W]``, or ``[B, C, D, H, W]``, as it was built for.

        Raises:
            VaevqMedError: if the axes or the channels are others, or a factor does not divide the size.
        """
        if images.ndim != self.spatial_dims + 2:
            raise VaevqMedError(
                f"the image has shape {tuple(images.shape)}; expected a batch, channels and {self.spatial_dims} axes, "
                f"as spatial_dims is {self.spatial_dims}"
            )
        check_channels(images, self.in_channels, "the image")
        factors = self.downsampling_factors
        if any(size % factor for size, factor in zip(images.shape[2:], factors, strict=True)):
            told = factors[0] if len(set(factors)) == 1 else factors
            raise VaevqMedError(
                f"image size {tuple(images.shape[2:])} is no multiple of the downsampling factor {told}"
            )


class BaseDecoder(Backbone):
    """Features on a latent grid to images.

    Attributes:
        z_channels: channels in.
        embedding_dim: D, channels of the codes that it reads beside the features; None where it reads none.
        upsampling_factors: image sizes over those of the grid, an axis each.
        num_prefixes: at how many positions of its last axis a grid may end: n where any first ones make an image, 1
            where all are needed.
    """

    z_channels: int
    embedding_dim: int | None = None
    upsampling_factors: tuple[int, ...]
    num_prefixes: int = 1

    @property
    @abstractmethod
    def last_layer(self) -> Tensor:
        """Weight of the output layer, ``[C, ...]``, which the adaptive adversarial weight differentiates."""

    @property
    def finest_channels(self) -> int:
        """Channels of the finest feature map."""
        return self.last_layer.shape[1]

    @abstractmethod
    def forward(self, features: Tensor, codes: Tensor | None = None) -> Tensor:
        """Images ``[B, C, H, W]``, nominally in [-1, 1], of features ``[B, z_channels, *grid]``.

        Args:
            features: made from the codes.
            codes: ``[B, D, *grid]``: a latent where that is decoded.
        """
