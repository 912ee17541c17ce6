"""The foreground masks of a case's contrasts as one part of a file: each once, or as what differs from another's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vaevq_med.codec.coders.mask import decode_mask, encode_mask
from vaevq_med.codec.errors import CodecError

_ALIKE = 0.02
"""A mask that differs from an earlier one in more than this share of the foreground is coded by itself."""


CELLS = {"exact": 1, "coarse": 2}
"""Side, in voxels of a slice, of the cells that a mask is made of, by what the command line calls it."""

_MOST_CELL = 64
"""A larger one would be no mask, and take memory far beyond the volume's."""


def covering(mask: NDArray[np.bool_], cell: int) -> NDArray[np.bool_]:
    """The cells of a grid over each slice that hold any foreground, whole.

    Args:
        mask: bool ``[N, rows, columns]``.
        cell: side of a cell in voxels; those of the last row and column may be cut off.

    Returns:
        A mask of the same shape; all of the other one lies in it.

    Examples:
        >>> covering(np.array([[[True, False, False], [False] * 3, [False, False, True]]]), 2).astype(int).tolist()
        [[[1, 1, 0], [1, 1, 0], [0, 0, 1]]]
    """
    rows, columns = mask.shape[1:]
    starts = np.arange(0, rows, cell), np.arange(0, columns, cell)
    held = np.logical_or.reduceat(np.logical_or.reduceat(mask, starts[0], axis=1), starts[1], axis=2)
    return _spread(held, mask.shape, cell)


def _spread(held: NDArray[np.bool_], shape: tuple[int, ...], cell: int) -> NDArray[np.bool_]:
    """The mask of cells ``[N, rows / cell, columns / cell]``, rounded up."""
    return held.repeat(cell, axis=1).repeat(cell, axis=2)[:, : shape[1], : shape[2]]


def encode_masks(masks: Sequence[NDArray[np.bool_]], cell: int = 1) -> tuple[bytes, list[dict[str, int]]]:
    """Code masks of one shape.

    Args:
        masks: bool ``[N, rows, columns]``, in order of the contrasts, of whole cells.
        cell: side of a cell, see :func:`covering`.

    Returns:
        The bytes, and of each mask ``bytes``, how many of these are its own, and ``base``, the number of the earlier
        mask that it differs from by what they hold; without it they hold the mask itself.
    """
    masks = [mask[:, ::cell, ::cell] for mask in masks]
    parts: list[bytes] = []
    entries: list[dict[str, int]] = []
    for mask in masks:
        away = [int(np.count_nonzero(mask ^ other)) for other in masks[: len(parts)]]
        base = int(np.argmin(away)) if away else -1
        if away and away[base] <= _ALIKE * np.count_nonzero(mask):
            parts.append(encode_mask(mask ^ masks[base]) if away[base] else b"")
            entries.append({"bytes": len(parts[-1]), "base": base})
        else:
            parts.append(encode_mask(mask))
            entries.append({"bytes": len(parts[-1])})
    return b"".join(parts), entries


def decode_masks(
    data: bytes, entries: Sequence[Mapping[str, Any]], shape: tuple[int, int, int], cell: int = 1
) -> list[NDArray[np.bool_]]:
    """The masks of bytes that :func:`encode_masks` gave.

    Args:
        data: the bytes.
        entries: likewise.
        shape: of each mask.
        cell: likewise.

    Raises:
        CodecError: the bytes are not those of such masks.
    """
    if not isinstance(cell, int) or not 1 <= cell <= _MOST_CELL:
        raise CodecError(f"found masks of cells of {cell!r} voxels, expected 1 to {_MOST_CELL}")
    grid = (shape[0], -(-shape[1] // cell), -(-shape[2] // cell))
    masks: list[NDArray[np.bool_]] = []
    start = 0
    for entry in entries:
        own, base = data[start : start + entry["bytes"]], entry.get("base")
        start += entry["bytes"]
        if base is not None and not 0 <= base < len(masks):
            raise CodecError(f"found a mask that differs from mask {base}, expected an earlier one")
        mask = decode_mask(own, grid) if own or base is None else np.zeros(grid, bool)
        masks.append(mask if base is None else mask ^ masks[base])
    if start != len(data):
        raise CodecError(f"found {len(data)} bytes of masks, expected {start}")
    return [_spread(mask, shape, cell) for mask in masks]
