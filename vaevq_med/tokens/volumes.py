"""Whole volumes to one grid of indices and back, in one piece or in tiles where memory does not hold them.

Encoding in tiles keeps their inner parts: each tile is read with a halo, and what the halo became is dropped, so that
every position of the grid comes from one tile, and the codebook is looked up once for the whole grid. Decoding in tiles
is MONAI's ``SlidingWindowInferer`` with Gaussian weights. A network whose normalizations and attention are within
slices encodes the same in tiles along z as in one piece, to rounding, once the halo is as wide as its convolutions
reach; any other one normalizes a tile by the tile.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.posterior import DiagonalGaussian
from vaevq_med.networks.slices import slices_of
from vaevq_med.networks.tokenizer import VisualTokenizer


def factors_of(network: VisualTokenizer) -> tuple[int, ...]:
    """Voxels that a position spans along each axis of a volume; along z one for a tokenizer of images."""
    return network.factors if network.takes_volumes else (1, *network.factors)


def padded(volume: Tensor, factors: Sequence[int]) -> Tensor:
    """A volume ``[B, C, d, H, W]`` whose sizes are multiples of the factors, its last voxels repeated."""
    ends = [-size % factor for size, factor in zip(volume.shape[2:], factors, strict=True)]
    if not any(ends):
        return volume
    return F.pad(volume, [size for end in reversed(ends) for size in (0, end)], mode="replicate")


@torch.inference_mode()
def encode_volume(
    network: VisualTokenizer, volume: Tensor, *, tile: Sequence[int] | None = None, halo: Sequence[int] = (1, 1, 1)
) -> Tensor:
    """The indices of a whole volume, from the posterior's mean.

    Args:
        network: in evaluation mode; one of images encodes slice by slice.
        volume: ``[1, C, d, H, W]`` in [-1, 1], of any size; it is padded to multiples of the factors.
        tile: inner part of a tile along each axis, in positions of the grid; None encodes in one piece.
        halo: positions around it that are encoded too, along each axis.

    Returns:
        int64 ``[1, *grid, G]``.
    """
    volume = padded(volume, factors_of(network))
    if not network.takes_volumes:
        step = 16 if tile is None else int(tile[0])
        parts = [network.encode_indices(part) for part in slices_of(volume).split(step)]
        return torch.cat(parts).unsqueeze(0)  # [d, h, w, G] -> [1, d, h, w, G]

    def latents(part: Tensor) -> Tensor:
        """Means and log variances, or latents, as one tensor."""
        found = network.encode(part)
        return torch.cat([found.mean, found.logvar], dim=1) if isinstance(found, DiagonalGaussian) else found

    whole = latents(volume) if tile is None else _in_tiles(latents, volume, network.factors, tile, halo)
    if not network.variational:
        return network.quantize(whole).indices
    mean, logvar = whole.chunk(2, dim=1)
    posterior = DiagonalGaussian(mean, logvar)
    return network.quantize(posterior.mode(), posterior).indices


def _in_tiles(
    encode: Callable[[Tensor], Tensor],
    volume: Tensor,
    factors: Sequence[int],
    tile: Sequence[int],
    halo: Sequence[int],
) -> Tensor:
    """``encode(volume)`` of tiles, whose inner parts are put together."""
    grid = [size // factor for size, factor in zip(volume.shape[2:], factors, strict=True)]
    if len(tile) != 3 or len(halo) != 3 or min(tile) < 1 or min(halo) < 0:
        raise VaevqMedError(f"found tiles of {list(tile)} and a halo of {list(halo)}, expected three positions each")
    whole: Tensor | None = None
    for start in itertools.product(*(range(0, size, step) for size, step in zip(grid, tile, strict=True))):
        end = [min(first + step, size) for first, step, size in zip(start, tile, grid, strict=True)]
        low = [max(0, first - margin) for first, margin in zip(start, halo, strict=True)]
        high = [min(last + margin, size) for last, margin, size in zip(end, halo, grid, strict=True)]
        read = [slice(a * factor, b * factor) for a, b, factor in zip(low, high, factors, strict=True)]
        found = encode(volume[_box(read)])
        inner = [slice(a - first, b - first) for a, b, first in zip(start, end, low, strict=True)]
        if whole is None:
            whole = found.new_empty(*found.shape[:2], *grid)
        whole[_box(slice(a, b) for a, b in zip(start, end, strict=True))] = found[_box(inner)]
    assert whole is not None
    return whole


@torch.inference_mode()
def decode_volume(
    network: VisualTokenizer,
    indices: Tensor,
    *,
    size: Sequence[int],
    tile: Sequence[int] | None = None,
    overlap: float = 0.5,
) -> Tensor:
    """The volume of a grid of indices.

    Args:
        network: in evaluation mode.
        indices: ``[1, *grid, G]``.
        size: voxels along each axis of the volume that was encoded, to which the result is cut.
        tile: positions of a window of MONAI's sliding-window inferer along each axis; None decodes in one piece.
        overlap: share of a window that the next one covers as well.

    Returns:
        ``[1, C, *size]``, nominally in [-1, 1].
    """
    if not network.takes_volumes:
        step = 16 if tile is None else int(tile[0])
        parts = [network.decode_indices(part) for part in indices[0].split(step)]  # [d, h, w, G] -> [d, C, H, W]
        volume = torch.cat(parts).transpose(0, 1).unsqueeze(0)
    elif tile is None:
        volume = network.decode_indices(indices)
    else:
        from monai.inferers import SlidingWindowInferer

        window = SlidingWindowInferer(list(tile), sw_batch_size=1, overlap=overlap, mode="gaussian")
        codes = network.quantizer.indices_to_codes(indices).contiguous()
        volume = cast(Tensor, window(codes, network.decode))
    return volume[_box(slice(0, length) for length in size)]


def _box(slices: Iterable[slice]) -> tuple[Any, ...]:
    """The index of a part of the last axes."""
    return (..., *slices)
