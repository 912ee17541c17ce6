"""Photographs and other ready-made 2D images: decoding, and MONAI dictionary transforms to squares of one size."""

from __future__ import annotations

import math
import warnings
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from monai.config import KeysCollection
from monai.transforms import MapTransform, Randomizable, Transform
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from vaevq_med.core.errors import DataError

_ORIENTATION = 0x0112


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


class LoadPhotograph(Transform):
    """Read the image that an entry names, at its own size, upright, as ``image`` in [-1, 1].

    Args:
        in_channels: 1 or 3; gray is repeated to three channels, color is averaged to one.

    The result holds ``image`` float ``[C, H, W]``, ``modality``, ``patient``, ``case``, ``path`` (strings), ``slice``,
    ``label`` and ``index`` (int).
    """

    def __init__(self, *, in_channels: int = 3) -> None:
        if in_channels not in (1, 3):
            raise DataError(f"in_channels: found {in_channels}, expected 1 or 3")
        self.in_channels = in_channels

    def __call__(self, entry: Mapping[Hashable, Any]) -> dict[str, Any]:
        """Read one entry of a datalist."""
        if not isinstance(entry["image"], str):
            raise DataError(
                "stack_modalities: found contrasts to stack in a data set of photographs, expected slices; a datalist "
                'of them says "reading": {"shape": "square", "channels": 1}'
            )
        image = match_channels(read_image(entry["image"]), self.in_channels)
        return {**describe(entry), "image": (image * 2 - 1).contiguous()}


def _resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Bicubic with a low-pass filter, kept within [-1, 1]."""
    if tuple(image.shape[-2:]) == size:
        return image
    return F.interpolate(image[None], size=size, mode="bicubic", antialias=True)[0].clamp(-1, 1)


class ResizeShortSided(MapTransform):
    """Resize so that the shorter side has a given length and the longer keeps the proportion (bicubic, antialiased).

    MONAI's ``Resized`` knows the longest side only.

    Args:
        keys: items in [-1, 1], ``[C, H, W]``.
        size: length of the shorter side in pixels.

    Examples:
        >>> ResizeShortSided("image", size=4)({"image": torch.zeros(3, 8, 16)})["image"].shape
        torch.Size([3, 4, 8])
    """

    def __init__(self, keys: KeysCollection, *, size: int) -> None:
        super().__init__(keys)
        if size < 1:
            raise DataError(f"size: found {size}, expected 1 or more")
        self.size = size

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Resize the images of one item."""
        result = dict(data)
        for key in self.key_iterator(result):
            height, width = result[key].shape[-2:]
            short = min(height, width)
            shape = (round(height * self.size / short), round(width * self.size / short))
            result[key] = _resize(result[key], shape)
        return result


class RandResizedCropd(Randomizable, MapTransform):
    """Crop a random share of the area in a random proportion, and resize it to a square (Inception's augmentation).

    Source: Szegedy et al., arXiv 1409.4842, section 6. The share is uniform, the logarithm of the proportion too. After
    ten draws that do not fit, the largest centered crop of an allowed proportion is taken.

    Args:
        keys: items in [-1, 1], ``[C, H, W]``, all of one size.
        size: side of the square in pixels.
        scale: least and greatest share of the area.
        ratio: least and greatest width over height.
    """

    def __init__(
        self,
        keys: KeysCollection,
        *,
        size: int,
        scale: tuple[float, float] = (0.5, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
    ) -> None:
        super().__init__(keys)
        if size < 1:
            raise DataError(f"size: found {size}, expected 1 or more")
        if not 0 < scale[0] <= scale[1] <= 1:
            raise DataError(f"scale: found {list(scale)}, expected two rising shares in (0, 1]")
        if not 0 < ratio[0] <= ratio[1]:
            raise DataError(f"ratio: found {list(ratio)}, expected two rising proportions above 0")
        self.size = size
        self.scale = (scale[0], scale[1])
        self.ratio = (ratio[0], ratio[1])
        self.box = (0, 0, 1, 1)

    def randomize(self, data: tuple[int, int]) -> None:
        """Draw the crop.

        Args:
            data: height and width of the image.
        """
        height, width = data
        for _ in range(10):
            area = height * width * self.R.uniform(*self.scale)
            ratio = math.exp(self.R.uniform(math.log(self.ratio[0]), math.log(self.ratio[1])))
            crop_height, crop_width = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
            if 0 < crop_height <= height and 0 < crop_width <= width:
                top = int(self.R.randint(0, height - crop_height + 1))
                left = int(self.R.randint(0, width - crop_width + 1))
                self.box = (top, left, crop_height, crop_width)
                return
        ratio = min(max(width / height, self.ratio[0]), self.ratio[1])
        crop_height = max(1, min(height, round(width / ratio)))
        crop_width = max(1, min(width, round(height * ratio)))
        self.box = ((height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Crop and resize the images of one item, all of them alike."""
        result = dict(data)
        first = result[self.first_key(result)]
        self.randomize((int(first.shape[-2]), int(first.shape[-1])))
        top, left, height, width = self.box
        for key in self.key_iterator(result):
            crop = result[key][..., top : top + height, left : left + width]
            result[key] = _resize(torch.as_tensor(crop), (self.size, self.size)).contiguous()
        return result
