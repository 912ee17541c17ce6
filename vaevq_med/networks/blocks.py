"""Building blocks of the VQGAN autoencoder (Esser et al., arXiv 2012.09841), in one to three dimensions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.lean_convolution import norm_swish, norm_swish_convolution, upsampled_convolution
from vaevq_med.networks.slices import SliceNorm, slices_of, stacked

_CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def convolution(
    spatial_dims: int, in_channels: int, out_channels: int, kernel_size: int, stride: int | tuple[int, ...] = 1
) -> nn.Module:
    """A convolution that keeps the spatial size at stride 1, and pads nothing at another, which may be an axis' own.

    Raises:
        VaevqMedError: if ``spatial_dims`` is not 1, 2 or 3.
    """
    if spatial_dims not in _CONVOLUTIONS:
        raise VaevqMedError(f"spatial_dims is {spatial_dims}; expected 1, 2 or 3")
    padding = kernel_size // 2 if stride == 1 else 0
    layer: Any = _CONVOLUTIONS[spatial_dims]  # one stride of all axes, or one of each
    return cast(nn.Module, layer(in_channels, out_channels, kernel_size, stride=stride, padding=padding))


def group_norm(num_channels: int, kind: type[nn.GroupNorm] = nn.GroupNorm) -> nn.GroupNorm:
    """GroupNorm with 32 groups (eps 1e-6), or with the largest smaller number that divides the channels.

    >>> group_norm(128).num_groups, group_norm(48).num_groups, group_norm(8).num_groups
    (32, 24, 8)
    """
    groups = min(32, num_channels)
    while num_channels % groups:
        groups -= 1
    return kind(groups, num_channels, eps=1e-6)


def slice_norm(num_channels: int) -> nn.GroupNorm:
    """As :func:`group_norm`, of each slice of a volume by itself."""
    return group_norm(num_channels, SliceNorm)


NormFactory = Callable[[int], nn.Module]
"""A normalization of so many channels."""


class Conditioned(nn.Module):
    """A layer that takes, besides its input, what the decoder is conditioned on, or None."""


def apply(layer: nn.Module, x: Tensor, condition: Tensor | None) -> Tensor:
    """Call a layer, with the condition if it takes one."""
    return layer(x, condition) if isinstance(layer, Conditioned) else layer(x)


class ConditionedSequential(nn.Sequential, Conditioned):
    """Layers in a row; those that take a condition all get the same one."""

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """Apply the layers to ``[B, C, ...]``."""
        for layer in self:
            x = apply(layer, x, condition)
        return x


def _is_lean(x: Tensor) -> bool:
    """Whether to keep little for the backward pass: off the CPU, and where no compiler decides what is kept."""
    return x.device.type != "cpu" and not torch.compiler.is_compiling()


def swish_of_norm(norm: nn.Module, x: Tensor, condition: Tensor | None) -> Tensor:
    """``swish(norm(x))`` ``[B, C, ...]``; off the CPU in less memory where the norm is a plain GroupNorm."""
    if type(norm) is nn.GroupNorm and _is_lean(x):
        return norm_swish(x, norm)
    return F.silu(apply(norm, x, condition))


class ResidualBlock(Conditioned):
    """Pre-activation residual block: [GroupNorm, swish, 3x3 convolution] twice, 1x1 shortcut when widths differ.

    Attributes:
        recompute: keep the input alone for the backward pass and compute the block again there.

    Args:
        spatial_dims: 1, 2 or 3.
        in_channels: channels in.
        out_channels: channels out.
        dropout: probability of dropping an activation before the second convolution, in [0, 1).
        norm: makes the normalizations.
    """

    def __init__(
        self,
        *,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        dropout: float = 0.0,
        norm: NormFactory = group_norm,
    ) -> None:
        super().__init__()
        self.recompute = False
        self.norm1 = norm(in_channels)
        self.conv1 = convolution(spatial_dims, in_channels, out_channels, 3)
        self.norm2 = norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = convolution(spatial_dims, out_channels, out_channels, 3)
        self.shortcut = (
            nn.Identity() if in_channels == out_channels else convolution(spatial_dims, in_channels, out_channels, 1)
        )

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """``[B, in_channels, ...] -> [B, out_channels, ...]``, same spatial size."""
        if self.recompute and torch.is_grad_enabled():
            return cast(Tensor, checkpoint(self._forward, x, condition, use_reentrant=False))
        return self._forward(x, condition)

    def _forward(self, x: Tensor, condition: Tensor | None) -> Tensor:
        if type(self.norm1) is nn.GroupNorm and _is_lean(x) and not (self.dropout.p and self.training):
            h = norm_swish_convolution(x, self.norm1, cast(nn.Conv2d, self.conv1))
            h = norm_swish_convolution(h, cast(nn.GroupNorm, self.norm2), cast(nn.Conv2d, self.conv2))
        else:
            h = self.conv1(swish_of_norm(self.norm1, x, condition))
            h = self.conv2(self.dropout(swish_of_norm(self.norm2, h, condition)))
        return self.shortcut(x) + h


class AttentionBlock(Conditioned):
    """Single-head self-attention over every position, with a residual connection.

    Args:
        spatial_dims: 1, 2 or 3.
        num_channels: channels in and out.
        norm: makes the normalization.
        within_slices: over the positions of each slice of a volume only.
    """

    def __init__(
        self, *, spatial_dims: int, num_channels: int, norm: NormFactory = group_norm, within_slices: bool = False
    ) -> None:
        super().__init__()
        self.within_slices = within_slices
        self.norm = norm(num_channels)
        self.query = convolution(spatial_dims, num_channels, num_channels, 1)
        self.key = convolution(spatial_dims, num_channels, num_channels, 1)
        self.value = convolution(spatial_dims, num_channels, num_channels, 1)
        self.projection = convolution(spatial_dims, num_channels, num_channels, 1)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """``[B, C, ...] -> [B, C, ...]``."""
        h = apply(self.norm, x, condition)
        maps = [layer(h) for layer in (self.query, self.key, self.value)]
        if self.within_slices:
            maps = [slices_of(one) for one in maps]  # [B d, C, H, W]
        # [B, C, ...] -> [B, 1 head, positions, C]
        query, key, value = (one.flatten(2).transpose(1, 2).unsqueeze(1) for one in maps)
        attended = F.scaled_dot_product_attention(query, key, value)
        attended = attended.squeeze(1).transpose(1, 2).reshape(maps[0].shape)
        if self.within_slices:
            attended = stacked(attended, x.shape[0])
        return x + self.projection(attended)


class Downsample(nn.Module):
    """Halves each spatial size: zero padding of one at the far end of each axis, 3x3 convolution of stride 2.

    Args:
        spatial_dims: 1, 2 or 3.
        num_channels: channels in and out.
        factors: 2 for each axis that is halved, 1 for one that is kept, which is padded at both ends.
        centered: pad an axis that is halved at both ends too, as Open-MAGVIT2.
    """

    def __init__(
        self, *, spatial_dims: int, num_channels: int, factors: Sequence[int] | None = None, centered: bool = False
    ) -> None:
        super().__init__()
        self.factors = tuple(factors or (2,) * spatial_dims)
        ends = [(0, 1) if factor == 2 and not centered else (1, 1) for factor in self.factors]
        # The last axis first, as F.pad has it.
        self.padding = tuple(size for end in reversed(ends) for size in end)
        self.conv = convolution(spatial_dims, num_channels, num_channels, 3, stride=self.factors)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W] -> [B, C, H/2, W/2]`` for even sizes."""
        return self.conv(F.pad(x, self.padding))


class Upsample(nn.Module):
    """Doubles each spatial size: nearest neighbor, then a 3x3 convolution.

    Args:
        spatial_dims: 1, 2 or 3.
        num_channels: channels in and out.
        factors: 2 for each axis that is doubled, 1 for one that is kept.
    """

    def __init__(self, *, spatial_dims: int, num_channels: int, factors: Sequence[int] | None = None) -> None:
        super().__init__()
        self.factors = tuple(factors or (2,) * spatial_dims)
        self.conv = convolution(spatial_dims, num_channels, num_channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W] -> [B, C, 2H, 2W]``."""
        if _is_lean(x) and x.ndim > 3:
            return upsampled_convolution(x, cast(nn.Conv2d, self.conv), self.factors)
        return self.conv(F.interpolate(x, scale_factor=tuple(map(float, self.factors)), mode="nearest"))


class ShuffleUpsample(nn.Module):
    """Doubles each size of an image: a 3x3 convolution to four times the channels, which become 2x2 pixels each.

    It is Open-MAGVIT2's (arXiv 2409.04410), in the order of PyTorch's ``pixel_shuffle``.

    Args:
        num_channels: channels in and out.
    """

    def __init__(self, *, num_channels: int) -> None:
        super().__init__()
        self.conv = convolution(2, num_channels, 4 * num_channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W] -> [B, C, 2H, 2W]``."""
        return F.pixel_shuffle(self.conv(x), 2)


class MiddleBlocks(ConditionedSequential):
    """Residual block, attention (or nothing), residual block: the bottom of the encoder and of the decoder."""

    def __init__(
        self,
        *,
        spatial_dims: int,
        num_channels: int,
        dropout: float,
        norm: NormFactory = group_norm,
        attention: bool = True,
        within_slices: bool = False,
    ) -> None:
        width = {"in_channels": num_channels, "out_channels": num_channels}
        super().__init__(
            ResidualBlock(spatial_dims=spatial_dims, dropout=dropout, norm=norm, **width),
            AttentionBlock(spatial_dims=spatial_dims, num_channels=num_channels, norm=norm, within_slices=within_slices)
            if attention
            else nn.Identity(),
            ResidualBlock(spatial_dims=spatial_dims, dropout=dropout, norm=norm, **width),
        )


def level_blocks(
    num_blocks: int,
    *,
    spatial_dims: int,
    in_channels: int,
    out_channels: int,
    dropout: float,
    norm: NormFactory,
    attention: bool,
    within_slices: bool,
) -> list[nn.Module]:
    """The blocks of a level: residual ones, the first of which changes the width, each followed by attention or not."""
    blocks: list[nn.Module] = []
    for width in [in_channels, *[out_channels] * num_blocks][:num_blocks]:
        blocks.append(
            ResidualBlock(
                spatial_dims=spatial_dims, in_channels=width, out_channels=out_channels, dropout=dropout, norm=norm
            )
        )
        if attention:
            blocks.append(
                AttentionBlock(
                    spatial_dims=spatial_dims, num_channels=out_channels, norm=norm, within_slices=within_slices
                )
            )
    return blocks


def recompute_levels(levels: Sequence[Sequence[nn.Module]], chosen: Sequence[int]) -> None:
    """Let the blocks of some levels that can be computed again in the backward pass do so, and the others not.

    Args:
        levels: the blocks of each level, the finest first.
        chosen: numbers of levels, 0 for the finest.

    Raises:
        VaevqMedError: there is no such level.
    """
    unknown = [level for level in chosen if level not in range(len(levels))]
    if unknown:
        raise VaevqMedError(f"activation_checkpointing has {unknown}; expected levels from 0 to {len(levels) - 1}")
    for number, blocks in enumerate(levels):
        for block in blocks:
            if hasattr(block, "recompute"):
                cast(Any, block).recompute = number in chosen


class OutputHead(ConditionedSequential):
    """GroupNorm, swish, 3x3 convolution: the last layers of the encoder and of the decoder.

    The convolution stays a layer of its own, so that a gradient of its weight alone (VQGAN's adaptive weight) costs
    that convolution and nothing before it.
    """

    def __init__(
        self, *, spatial_dims: int, in_channels: int, out_channels: int, norm: NormFactory = group_norm
    ) -> None:
        super().__init__(norm(in_channels), nn.SiLU(), convolution(spatial_dims, in_channels, out_channels, 3))

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """``[B, in_channels, ...] -> [B, out_channels, ...]``, same spatial size."""
        norm, _, convolve = self
        return convolve(swish_of_norm(norm, x, condition))


def check_channels(x: Tensor, expected: int, what: str) -> None:
    """Stop with one line when a tensor does not have the channels that a network was built for.

    Raises:
        VaevqMedError: if ``x.shape[1] != expected``.
    """
    if x.shape[1] != expected:
        raise VaevqMedError(f"{what} has {x.shape[1]} channels (shape {tuple(x.shape)}); expected {expected}")
