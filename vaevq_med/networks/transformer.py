"""The pre-normalized transformer block of vision transformers (arXiv 2010.11929), and positions on a plane."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.ranges import check_sizes

WAVELENGTH = 10_000.0


class TransformerBlock(nn.Module):
    """Self-attention and a two-layer perceptron with GELU, each after LayerNorm (eps 1e-6) and with a residual.

    Args:
        width: channels of a token.
        num_heads: attention heads, a divisor of ``width``.
        mlp_ratio: the perceptron's hidden width over ``width``.
        affine: whether the normalizations have a scale and a shift of their own.

    Attributes:
        recompute: keep the input alone for the backward pass and compute the block again there.
    """

    def __init__(self, *, width: int, num_heads: int, mlp_ratio: float, affine: bool = True) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.recompute = False
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=affine)
        self.qkv = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=affine)
        hidden = round(width * mlp_ratio)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Tokens ``[B, T, width]`` to tokens.

        Args:
            x: the tokens.
            mask: bool ``[T, T]``, which token (row) attends to which (column); all to all where absent.
        """
        if self.recompute and torch.is_grad_enabled():
            return cast(Tensor, checkpoint(self._forward, x, mask, use_reentrant=False))
        return self._forward(x, mask)

    def _forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        # [B, T, 3 width] to three of [B, heads, T, width / heads]
        query, key, value = self.qkv(self.norm1(x)).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, mask)
        x = x + self.projection(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class TransformerStack(nn.Module):
    """Blocks and a LayerNorm after them; of no blocks, the identity. It starts by :func:`start_linear`.

    Args:
        width: channels of a token.
        depth: blocks, 0 or more.
        num_heads: attention heads, a divisor of ``width``.
        mlp_ratio: the perceptrons' hidden width over ``width``.

    Raises:
        VaevqMedError: a number is out of its range, or the heads do not divide the width.
    """

    def __init__(self, *, width: int, depth: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        check_sizes(width=width, num_heads=num_heads)
        if width % num_heads or depth < 0 or mlp_ratio <= 0:
            raise VaevqMedError(
                f"found width {width}, num_heads {num_heads}, depth {depth} and mlp_ratio {mlp_ratio}; expected "
                "a multiple of num_heads, a depth from 0 and a ratio above 0"
            )
        self.blocks = nn.ModuleList(
            TransformerBlock(width=width, num_heads=num_heads, mlp_ratio=mlp_ratio) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6) if depth else nn.Identity()
        start_linear(self)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Tokens ``[B, T, width]`` to tokens; the mask as for a block."""
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x)


def start_linear(network: nn.Module) -> None:
    """Weights of linear layers Xavier-uniform, their biases zero."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)


def sine_positions(
    grid: Sequence[int], width: int, *, known: Sequence[int], device: torch.device | None = None
) -> Tensor:
    """Sines and cosines of the row, then of the column, of each position (arXiv 1706.03762 by axis), ``[h w, width]``.

    A grid of another size covers the same plane: the places of its positions are interpolated between those of the
    known grid, by the position's center.

    Args:
        grid: rows and columns h, w.
        width: channels, a multiple of 4.
        known: rows and columns at which places are the whole numbers.
        device: where the table is made.

    >>> sine_positions((1, 2), 4, known=(1, 2))
    tensor([[0.0000, 1.0000, 0.0000, 1.0000],
            [0.0000, 1.0000, 0.8415, 0.5403]])
    """
    quarter = width // 4
    frequencies = WAVELENGTH ** (-torch.arange(quarter, dtype=torch.float32, device=device) / quarter)
    halves = []
    for size, trained in zip(grid, known, strict=True):
        centers = torch.arange(size, dtype=torch.float32, device=device) + 0.5
        places = centers * (trained / size) - 0.5
        angles = places[:, None] * frequencies
        halves.append(torch.cat([angles.sin(), angles.cos()], dim=1))  # [size, width / 2]
    rows, columns = halves
    return torch.cat([rows.repeat_interleave(grid[1], dim=0), columns.repeat(grid[0], 1)], dim=1)


def patch_grid(size: Sequence[int], patch_size: int) -> tuple[int, int]:
    """Rows and columns of patches of an image of a size ``H, W`` that they divide."""
    return size[0] // patch_size, size[1] // patch_size


def check_patches(*, image_size: int, patch_size: int, width: int, **sizes: int) -> None:
    """Refuse a plane that patches do not divide, and tokens that have no place for positions.

    Raises:
        VaevqMedError: naming the size.
    """
    check_sizes(image_size=image_size, patch_size=patch_size, width=width, **sizes)
    if image_size % patch_size:
        raise VaevqMedError(f"image_size is {image_size}; expected a multiple of patch_size, {patch_size}")
    if width % 4:
        raise VaevqMedError(f"width is {width}; expected a multiple of 4, for sines and cosines of two axes")
