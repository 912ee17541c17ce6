"""The VQGAN encoder (Esser et al., arXiv 2012.09841), and the presets of its published sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, nn

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.backbone import BaseEncoder
from vaevq_med.networks.blocks import (
    Downsample,
    MiddleBlocks,
    NormFactory,
    OutputHead,
    convolution,
    group_norm,
    level_blocks,
    slice_norm,
)
from vaevq_med.networks.ranges import check_choice

_PRESETS: dict[int, dict[str, Any]] = {
    4: {"channel_mult": (1, 2, 4), "attention_resolutions": ()},
    8: {"channel_mult": (1, 2, 2, 4), "attention_resolutions": (32,)},
    16: {"channel_mult": (1, 1, 2, 2, 4), "attention_resolutions": (16,)},
}


def vqgan_preset(downsampling_factor: int) -> dict[str, Any]:
    """Keyword arguments of `Encoder` and `Decoder` for a published VQGAN size at 256 x 256 pixels.

    With ``in_channels=3`` and ``z_channels=256`` the parameters are, encoder + decoder:
    factor 4: 23.5 M + 34.1 M; factor 8: 28.6 M + 41.4 M; factor 16: 29.3 M + 42.4 M.

    Args:
        downsampling_factor: pixels a latent position spans along each axis; 4, 8 or 16.

    Returns:
        A new dictionary with ``num_channels``, ``channel_mult``, ``num_res_blocks``,
        ``attention_resolutions``, ``image_size`` and ``z_channels``.

    Raises:
        VaevqMedError: for another factor.

    >>> vqgan_preset(8)["channel_mult"]
    (1, 2, 2, 4)
    """
    if downsampling_factor not in _PRESETS:
        raise VaevqMedError(
            f"no VQGAN preset for downsampling factor {downsampling_factor}; expected one of "
            f"{', '.join(map(str, _PRESETS))}"
        )
    return {
        "num_channels": 128,
        "num_res_blocks": 2,
        "image_size": 256,
        "z_channels": 256,
        **_PRESETS[downsampling_factor],
    }


def level_plan(
    *,
    num_channels: int,
    channel_mult: Sequence[int],
    attention_resolutions: Sequence[int],
    image_size: int,
) -> list[tuple[int, bool]]:
    """Width, and whether attention follows each residual block, of each level from full resolution down.

    Raises:
        VaevqMedError: if ``channel_mult`` is empty, or an attention resolution is that of no level.
    """
    if not channel_mult:
        raise VaevqMedError("channel_mult is empty; expected one multiplier a level, such as [1, 2, 2, 4]")
    sizes = [image_size // 2**level for level in range(len(channel_mult))]
    unknown = sorted(set(attention_resolutions) - set(sizes))
    if unknown:
        raise VaevqMedError(
            f"attention_resolutions has {unknown}; with image_size {image_size} the levels have {sizes}"
        )
    return [
        (num_channels * mult, size in attention_resolutions) for mult, size in zip(channel_mult, sizes, strict=True)
    ]


def downsampling_plan(
    spatial_dims: int, num_levels: int, downsampling: Sequence[Sequence[int]] | None
) -> list[tuple[int, ...]]:
    """By what each axis shrinks from each level to the next, from full resolution down.

    Args:
        spatial_dims: axes.
        num_levels: levels.
        downsampling: for each step 1 or 2 by axis, e.g. ``[[1, 2, 2], [2, 2, 2]]`` for thick slices; None for 2 of all.

    Raises:
        VaevqMedError: it has another form.

    >>> downsampling_plan(2, 3, None)
    [(2, 2), (2, 2)]
    """
    if downsampling is None:
        return [(2,) * spatial_dims] * (num_levels - 1)
    plan = [tuple(step) for step in downsampling]
    if len(plan) != num_levels - 1 or any(len(step) != spatial_dims or set(step) - {1, 2} for step in plan):
        raise VaevqMedError(
            f"downsampling is {[list(step) for step in plan]}; expected {num_levels - 1} lists of {spatial_dims} "
            "factors, each 1 or 2"
        )
    return plan


def total_factors(spatial_dims: int, plan: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """By what each axis shrinks in all."""
    return tuple(math.prod(step[axis] for step in plan) for axis in range(spatial_dims))


RESAMPLINGS = ("vqgan", "magvit")
"""How levels follow each other: as in VQGAN, or as in Open-MAGVIT2, whose network SimVQ and the authors' VAEVQ have."""


def check_resampling(resampling: str, spatial_dims: int) -> bool:
    """Whether it is Open-MAGVIT2's.

    Raises:
        VaevqMedError: there is no such one, or it is that of images for something else.
    """
    check_choice("resampling", resampling, RESAMPLINGS)
    if resampling == "magvit" and spatial_dims != 2:
        raise VaevqMedError(
            f"resampling is 'magvit' with spatial_dims {spatial_dims}; expected 'vqgan', or spatial_dims 2"
        )
    return resampling == "magvit"


def check_within_slices(within_slices: bool, spatial_dims: int) -> None:
    """Refuse slices of what has none.

    Raises:
        VaevqMedError: saying so.
    """
    if within_slices and spatial_dims != 3:
        raise VaevqMedError(
            f"within_slices is true with spatial_dims {spatial_dims}; expected false, or spatial_dims 3"
        )


class Encoder(BaseEncoder):
    """Images to latent features, by taming-transformers' VQGAN architecture.

    A 3x3 convolution; per level ``num_res_blocks`` residual blocks, each followed by attention at the listed
    resolutions, then downsampling by 2 (not after the last level); residual block, attention, residual block;
    GroupNorm, swish, 3x3 convolution to ``z_channels``.

    Args:
        spatial_dims: 1, 2 or 3.
        in_channels: image channels C.
        num_channels: width of the first level.
        channel_mult: width of each level as a multiple of ``num_channels``; L levels give f = 2^(L-1).
        num_res_blocks: residual blocks a level.
        attention_resolutions: image sizes, in pixels, of the levels with attention.
        image_size: the image size, in pixels, at which ``attention_resolutions`` is counted; images of any
            other size that f divides run through the same layers.
        z_channels: channels out.
        dropout: dropout probability in the residual blocks.
        downsampling: see :func:`downsampling_plan`.
        middle_attention: whether there is attention at the bottom.
        within_slices: of volumes, normalize each slice by itself, and let its positions attend to one another only, so
            that convolutions alone carry something from slice to slice.
        resampling: ``"vqgan"`` pads the far end before a step down, ``"magvit"`` both ends.

    Attributes:
        downsampling_factor: f, that of the last axis.
        downsampling_factors: that of each axis.
        z_channels: channels out.
    """

    def __init__(
        self,
        *,
        spatial_dims: int = 2,
        in_channels: int = 3,
        num_channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 2, 4),
        num_res_blocks: int = 2,
        attention_resolutions: Sequence[int] = (32,),
        image_size: int = 256,
        z_channels: int = 256,
        dropout: float = 0.0,
        downsampling: Sequence[Sequence[int]] | None = None,
        middle_attention: bool = True,
        within_slices: bool = False,
        resampling: str = "vqgan",
    ) -> None:
        super().__init__()
        check_within_slices(within_slices, spatial_dims)
        centered = check_resampling(resampling, spatial_dims)
        norm: NormFactory = slice_norm if within_slices else group_norm
        plan = level_plan(
            num_channels=num_channels,
            channel_mult=channel_mult,
            attention_resolutions=attention_resolutions,
            image_size=image_size,
        )
        self.spatial_dims = spatial_dims
        self.in_channels = in_channels
        self.z_channels = z_channels
        steps = downsampling_plan(spatial_dims, len(plan), downsampling)
        self.downsampling_factors = total_factors(spatial_dims, steps)
        self.downsampling_factor = self.downsampling_factors[-1]

        shared: dict[str, Any] = {
            "spatial_dims": spatial_dims,
            "dropout": dropout,
            "norm": norm,
            "within_slices": within_slices,
        }
        layers: list[nn.Module] = [convolution(spatial_dims, in_channels, num_channels, 3)]
        width = num_channels
        self._levels: list[list[nn.Module]] = []
        for level, (level_width, has_attention) in enumerate(plan):
            blocks = level_blocks(
                num_res_blocks, in_channels=width, out_channels=level_width, attention=has_attention, **shared
            )
            width = level_width if blocks else width
            layers += blocks
            self._levels.append(blocks)
            if level < len(plan) - 1:
                layers.append(
                    Downsample(spatial_dims=spatial_dims, num_channels=width, factors=steps[level], centered=centered)
                )
        layers.append(MiddleBlocks(num_channels=width, attention=middle_attention, **shared))
        layers.append(OutputHead(spatial_dims=spatial_dims, in_channels=width, out_channels=z_channels, norm=norm))
        self.layers = nn.Sequential(*layers)

    @property
    def first_layer(self) -> Tensor:
        """Weight of the first convolution, ``[num_channels, C, ...]``."""
        return cast(Tensor, self.layers[0].weight)

    def compile_layers(self) -> None:
        """See the base class."""
        self.layers.compile()

    def forward(self, images: Tensor) -> Tensor:
        """Encode images.

        Args:
            images: ``[B, C, H, W]`` in [-1, 1], H and W multiples of f; volumes ``[B, C, D, H, W]`` alike.

        Returns:
            Features ``[B, z_channels, H/f, W/f]``.

        Raises:
            VaevqMedError: if the axes or the channels are not those that it was built for, or f does not divide the
                size.
        """
        self.check_images(images)
        return self.layers(images)
