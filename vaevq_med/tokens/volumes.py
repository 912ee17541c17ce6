"""Whole volumes to one grid of indices and back, in one piece or in tiles where memory does not hold them.

Encoding in tiles keeps their inner parts: each tile is read with a halo, and what the halo became is dropped, so that
every position of the grid comes from one tile, and the codebook is looked up once for the whole grid. Decoding in tiles
is MONAI's ``SlidingWindowInferer`` with Gaussian weights. A network whose normalizations and attention are within
slices encodes the same in tiles along z as in one piece, to rounding, once the halo is as wide as its convolutions
reach; any other one normalizes a tile by the tile.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.base import Tokenizer
from vaevq_med.networks.posterior import DiagonalGaussian
from vaevq_med.networks.slices import slices_of, stacked
from vaevq_med.networks.tokenizer import VisualTokenizer

Mapped = Callable[[Callable[[Any], Tensor], Iterable[Any]], Iterable[Tensor]]
"""What does a work for each item and gives the results in order: ``map``, or that of a pool of threads."""

MOST_NUMBERS = 2**23
"""Of the finest feature map of a window; the published sizes then take half a GiB for all that they hold at once."""

LEAST_WINDOW = (4, 8, 8)
"""Positions of the smallest window; of a smaller one most would be margin."""


def factors_of(network: Tokenizer) -> tuple[int, ...]:
    """Voxels that a position spans along each axis of a volume; along z one for a tokenizer of images."""
    return network.factors if network.takes_volumes else (1, *network.factors)


def padded(volume: Tensor, factors: Sequence[int]) -> Tensor:
    """A volume ``[B, C, d, H, W]`` whose sizes are multiples of the factors, its last voxels repeated."""
    ends = [-size % factor for size, factor in zip(volume.shape[2:], factors, strict=True)]
    if not any(ends):
        return volume
    return F.pad(volume, [size for end in reversed(ends) for size in (0, end)], mode="replicate")


def window_of(network: Tokenizer, grid: Sequence[int]) -> tuple[int, int, int]:
    """Positions along each axis that go through a tokenizer of volumes at once.

    Whole planes where they fit, since what is normalized within slices sees another slice in a part of it. It depends
    on the network and the grid alone, so that every machine does the same.

    Args:
        network: of volumes.
        grid: positions of the whole volume along each axis.
    """
    depth, height, width = grid
    positions = MOST_NUMBERS // (network.finest_channels * math.prod(network.factors))
    deep, rows, columns = (min(least, size) for least, size in zip(LEAST_WINDOW, grid, strict=True))
    if positions >= deep * height * width:
        return min(depth, positions // (height * width)), height, width
    side = math.isqrt(positions // deep)
    return deep, min(height, max(rows, side)), min(width, max(columns, side))


@torch.inference_mode()
def encode_volume(
    network: Tokenizer, volume: Tensor, *, tile: Sequence[int] | None = None, halo: Sequence[int] = (1, 1, 1)
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
    if not network.takes_volumes:
        step = 16 if tile is None else int(tile[0])
        parts = [network.encode_indices(part) for part in slices_of(padded(volume, factors_of(network))).split(step)]
        return torch.cat(parts).unsqueeze(0)  # [d, h, w, G] -> [1, d, h, w, G]
    return quantized(network, encode_latents(network, volume, tile=tile, halo=halo), volume)


def quantized(network: Tokenizer, encoded: DiagonalGaussian | Tensor, volume: Tensor) -> Tensor:
    """The indices of what :func:`encode_latents` gives of a volume, int64 ``[1, *grid, G]``."""
    images = padded(volume, factors_of(network))
    if isinstance(encoded, DiagonalGaussian):
        return network.quantize(encoded.mode(), encoded, images).indices
    return network.quantize(encoded, images=images).indices


@torch.inference_mode()
def encode_latents(
    network: Tokenizer,
    volume: Tensor,
    *,
    tile: Sequence[int] | None = None,
    halo: Sequence[int] = (1, 1, 1),
    mapped: Mapped = map,
) -> DiagonalGaussian | Tensor:
    """The posterior of a whole volume, or, without one, its latent; what is quantized.

    Args:
        network: of volumes, in evaluation mode.
        volume: ``[1, C, d, H, W]`` in [-1, 1], of any size; it is padded to multiples of the factors.
        tile: as for :func:`encode_volume`.
        halo: likewise.
        mapped: by which the tiles are gone through.
    """
    volume = padded(volume, factors_of(network))

    def latents(part: Tensor) -> Tensor:
        """Means and log variances, or latents, as one tensor."""
        found = network.encode(part)
        return torch.cat([found.mean, found.logvar], dim=1) if isinstance(found, DiagonalGaussian) else found

    if tile is None:
        (whole,) = mapped(latents, [volume])
    else:
        whole = _in_tiles(latents, volume, network.factors, tile, halo, mapped)
    return DiagonalGaussian(*whole.chunk(2, dim=1)) if network.variational else whole


def _in_tiles(
    encode: Callable[[Tensor], Tensor],
    volume: Tensor,
    factors: Sequence[int],
    tile: Sequence[int],
    halo: Sequence[int],
    mapped: Mapped,
) -> Tensor:
    """``encode(volume)`` of tiles, whose inner parts are put together."""
    grid = [size // factor for size, factor in zip(volume.shape[2:], factors, strict=True)]
    if len(tile) != 3 or len(halo) != 3 or min(tile) < 1 or min(halo) < 0:
        raise VaevqMedError(f"found tiles of {list(tile)} and a halo of {list(halo)}, expected three positions each")
    starts = [*itertools.product(*(range(0, size, step) for size, step in zip(grid, tile, strict=True)))]

    def inner(start: tuple[int, ...]) -> Tensor:
        low = [max(0, first - margin) for first, margin in zip(start, halo, strict=True)]
        high = [
            min(first + step + margin, size) for first, step, margin, size in zip(start, tile, halo, grid, strict=True)
        ]
        read = [slice(a * factor, b * factor) for a, b, factor in zip(low, high, factors, strict=True)]
        kept = [slice(a - first, a - first + step) for a, first, step in zip(start, low, tile, strict=True)]
        ends = [size - first for size, first in zip(grid, low, strict=True)]
        return encode(volume[_box(read)])[_box(slice(k.start, min(k.stop, e)) for k, e in zip(kept, ends, strict=True))]

    whole: Tensor | None = None
    for start, found in zip(starts, mapped(inner, starts), strict=True):
        if whole is None:
            whole = found.new_empty(*found.shape[:2], *grid)
        whole[_box(slice(a, a + size) for a, size in zip(start, found.shape[2:], strict=True))] = found
    assert whole is not None
    return whole


@torch.inference_mode()
def decode_volume(
    network: Tokenizer,
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
        return torch.cat(parts).transpose(0, 1).unsqueeze(0)[_box(slice(0, length) for length in size)]
    codes = network.quantizer.indices_to_codes(indices)
    return decode_codes(network, codes, size=size, tile=tile, overlap=overlap)


@torch.inference_mode()
def decode_codes(
    network: Tokenizer,
    codes: Tensor,
    *,
    size: Sequence[int],
    tile: Sequence[int] | None = None,
    overlap: float | Sequence[float] = 0.5,
    mapped: Mapped = map,
    at_once: int = 1,
) -> Tensor:
    """The volume of codes.

    Of a tokenizer of slices with a context, tiles are so many slices as ``tile`` says first, each of which sees all the
    codes that it saw in one piece.

    Args:
        network: of volumes, in evaluation mode.
        codes: ``[1, D, *grid]``.
        size: as for :func:`decode_volume`.
        tile: likewise.
        overlap: likewise, or of each axis.
        mapped: by which the tiles are gone through.
        at_once: windows that it is given together.

    Returns:
        ``[1, C, *size]``, nominally in [-1, 1].
    """
    codes = codes.contiguous()
    if tile is None:
        (volume,) = mapped(network.decode, [codes])
    elif network.slice_context:
        own = cast(VisualTokenizer, network)  # no other has a context
        seen = own.decoder_inputs(own.rectify(codes))
        parts = zip(*(slices_of(features).split(int(tile[0])) for features in seen), strict=True)
        volume = stacked(torch.cat([*mapped(lambda part: own.decoder(*part), parts)]), 1)
    elif all(length <= window for length, window in zip(codes.shape[2:], tile, strict=True)):
        (volume,) = mapped(network.decode, [codes])
    else:
        from monai.inferers import SlidingWindowInferer

        def windows(batch: Tensor) -> Tensor:
            return torch.cat([*mapped(network.decode, batch.split(1))])

        window = SlidingWindowInferer(list(tile), sw_batch_size=at_once, overlap=overlap, mode="gaussian")
        volume = cast(Tensor, window(codes, windows))
    return volume[_box(slice(0, length) for length in size)]


def _box(slices: Iterable[slice]) -> tuple[Any, ...]:
    """The index of a part of the last axes."""
    return (..., *slices)
