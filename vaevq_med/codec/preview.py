"""A picture of a case before and after: three planes of each contrast, the original, the result and the error."""

from __future__ import annotations

import io
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

ERROR_GAIN = 4
"""By how much the error is brightened; gray is none, white too bright, black too dark."""
_GAP = 4
_HEAD = 14


def preview(originals: Mapping[str, Tensor], results: Mapping[str, Tensor]) -> bytes:
    """A PNG with a row for each contrast: three planes, each as original, result and error.

    Args:
        originals: upright slices ``[N, rows, columns]`` in [0, 1] by contrast.
        results: of the same shapes.
    """
    rows = [
        _row(name, original.numpy(), results[name].numpy()) for name, original in originals.items() if name in results
    ]
    width = max(row.shape[1] for row in rows)
    canvas = np.concatenate([np.pad(row, ((0, 0), (0, width - row.shape[1]))) for row in rows])
    buffer = io.BytesIO()
    Image.fromarray(canvas).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _row(name: str, original: NDArray[np.float32], result: NDArray[np.float32]) -> NDArray[np.uint8]:
    filled = [np.flatnonzero(original.any(axis=tuple(a for a in range(3) if a != axis))) for axis in range(3)]
    middle = [int(places[len(places) // 2]) if places.size else 0 for places in filled]
    tiles = []
    for axis in range(3):
        before, after = (np.take(volume, middle[axis], axis) for volume in (original, result))
        if axis > 0:  # the last slice of a stack that rises is on top
            before, after = before[::-1], after[::-1]
        tiles += [before, after, np.clip(0.5 + ERROR_GAIN * (after - before) / 2, 0, 1)]
    height = max(tile.shape[0] for tile in tiles)
    padded = [np.pad(tile, ((0, height - tile.shape[0]), (0, _GAP))) for tile in tiles]
    picture = (np.concatenate(padded, axis=1) * 255).round().astype(np.uint8)
    head = Image.new("L", (picture.shape[1], _HEAD))
    ImageDraw.Draw(head).text((2, 1), f"{name}: original, result, error x {ERROR_GAIN}", fill=255)
    return np.concatenate([np.asarray(head), picture, np.zeros((_GAP, picture.shape[1]), np.uint8)])
