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


def encode_masks(masks: Sequence[NDArray[np.bool_]]) -> tuple[bytes, list[dict[str, int]]]:
    """Code masks of one shape.

    Args:
        masks: bool ``[N, rows, columns]``, in order of the contrasts.

    Returns:
        The bytes, and of each mask ``bytes``, how many of these are its own, and ``base``, the number of the earlier
        mask that it differs from by what they hold; without it they hold the mask itself.
    """
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
    data: bytes, entries: Sequence[Mapping[str, Any]], shape: tuple[int, int, int]
) -> list[NDArray[np.bool_]]:
    """The masks of bytes that :func:`encode_masks` gave.

    Args:
        data: the bytes.
        entries: likewise.
        shape: of each mask.

    Raises:
        CodecError: the bytes are not those of such masks.
    """
    masks: list[NDArray[np.bool_]] = []
    start = 0
    for entry in entries:
        own, base = data[start : start + entry["bytes"]], entry.get("base")
        start += entry["bytes"]
        if base is not None and not 0 <= base < len(masks):
            raise CodecError(f"found a mask that differs from mask {base}, expected an earlier one")
        mask = decode_mask(own, shape) if own or base is None else np.zeros(shape, bool)
        masks.append(mask if base is None else mask ^ masks[base])
    if start != len(data):
        raise CodecError(f"found {len(data)} bytes of masks, expected {start}")
    return masks
