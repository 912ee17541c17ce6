"""Ready-made 2D images, PNG, JPEG, TIFF or ``.npy``: decoding, and channels."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from vaevq_med.core.errors import DataError

_ORIENTATION = 0x0112
_OF_LABELS = ("L", "P", "1")
"""Of PIL's modes, those of one channel and at most 8 bit; the values of a palette are the labels, not its colors."""


def upright(image: Image.Image) -> Image.Image:
    """Turn an image as its EXIF orientation says.

    Args:
        image: an open image.
    """
    return ImageOps.exif_transpose(image) if image.getexif().get(_ORIENTATION, 1) != 1 else image


def plain(image: Image.Image) -> Image.Image:
    """An image as gray (``L``), color (``RGB``) or, if its depth is more than 8 bit, 16-bit gray (``I;16``).

    CMYK, YCbCr, Lab and palettes become RGB; what is transparent is laid on white.

    Args:
        image: an open image.

    Raises:
        DataError: the pixels are floats or wider than 16 bit, whose range nobody states.
    """
    if image.mode in ("L", "RGB", "I;16"):
        return image
    if image.mode == "1":
        return image.convert("L")
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise DataError(f"found values {values.min()} to {values.max()}, expected 0 to 65535")
        return Image.fromarray(values.astype(np.uint16))
    if image.mode == "F":
        raise DataError("found pixels that are floats, expected 8 or 16 bit; their range is nowhere stated")
    if image.has_transparency_data:
        gray = image.mode in ("LA", "La")
        color = image.convert("RGBA")
        page = Image.new("RGBA", color.size, "white")
        page.alpha_composite(color)
        return page.convert("L" if gray else "RGB")
    return image.convert("RGB")


def read_pixels(path: str | Path) -> NDArray[np.float32]:
    """Read an image file, upright.

    Args:
        path: anything that PIL reads; of several frames the first.

    Returns:
        ``[H, W]`` for gray or ``[H, W, 3]`` for color, in [0, 1].

    Raises:
        OSError: the file cannot be read.
        DataError: its pixels cannot be put in [0, 1].
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of damaged EXIF data, and of large images
        with Image.open(path) as image:
            pixels = plain(upright(image))
            return np.asarray(pixels, dtype=np.float32) / (65535.0 if pixels.mode == "I;16" else 255.0)


def read_image(path: str | Path) -> Tensor:
    """Read a stored slice or photograph.

    Args:
        path: an 8- or 16-bit image that PIL reads, or a float ``.npy`` in [0, 1].

    Returns:
        float32 ``[C, H, W]`` in [0, 1], upright; C is 1 for grayscale and 3 for color.

    Raises:
        DataError: the file cannot be read.
    """
    path = Path(path)
    try:
        array = np.load(path, allow_pickle=False).astype(np.float32) if path.suffix == ".npy" else read_pixels(path)
    except (OSError, ValueError, SyntaxError, DataError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: found an unreadable image ({error}), expected PNG, JPEG, TIFF or .npy") from error
    if array.ndim == 2:
        return torch.from_numpy(array)[None]
    return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))


def read_labels(path: str | Path) -> NDArray[np.uint8]:
    """Read a stored segmentation.

    Args:
        path: an 8-bit image whose pixels are labels, which a palette may color.

    Returns:
        ``[H, W]``.

    Raises:
        DataError: the file cannot be read, or is of colors or of more than 8 bit.
    """
    try:
        with Image.open(path) as stored:
            if stored.mode not in _OF_LABELS:
                raise DataError(f"mode {stored.mode}")
            return np.array(stored, dtype=np.uint8)
    except (OSError, ValueError, SyntaxError, DataError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: found an unreadable segmentation ({error}), expected an 8-bit PNG") from error


def match_channels(image: Tensor, in_channels: int) -> Tensor:
    """Repeat a gray image to ``in_channels``, or average a color one to 1.

    Args:
        image: ``[C, H, W]``.
        in_channels: channels wanted.

    Raises:
        DataError: neither way leads there.
    """
    channels = image.shape[0]
    if channels == in_channels:
        return image
    if channels == 1:
        return image.expand(in_channels, -1, -1)
    if in_channels == 1:
        return image.mean(0, keepdim=True)
    raise DataError(f"found an image of {channels} channels, expected 1 or in_channels = {in_channels}")


def describe(entry: Mapping[Hashable, Any]) -> dict[str, Any]:
    """What an item says of the image that an entry of a datalist names; what the entry lacks is empty or -1.

    Args:
        entry: of a datalist, with an absolute path.
    """
    image = entry["image"]
    return {
        "modality": str(entry.get("modality", "")),
        "patient": str(entry.get("patient", "")),
        "case": str(entry.get("case", "")),
        "path": str(image if isinstance(image, str) else image[0]),
        "slice": int(entry.get("slice", -1)),
        "label": int(entry.get("label", -1)),
        "index": int(entry.get("index", -1)),
    }
