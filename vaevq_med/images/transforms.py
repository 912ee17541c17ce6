"""MONAI dictionary transforms from an entry of a datalist to a square: slices and photographs."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from monai.config import KeysCollection
from monai.transforms import MapTransform, Randomizable, Transform
from torch import Tensor

from vaevq_med.core.errors import DataError
from vaevq_med.images.foreground import foreground
from vaevq_med.images.pixels import describe, match_channels, read_image, read_labels

REGIONS = ("whole_tumor", "tumor_core", "enhancing_tumor")
MAX_CHANNELS = 4


class LoadSliced(Transform):
    """Read the slice that an entry names, as ``image`` in [-1, 1], and the masks of its regions.

    Args:
        image_size: side in pixels; a stored slice of another size is resized (antialiased; masks nearest).
        in_channels: channels of the image. A grayscale slice is repeated to them, color is averaged to one; of an entry
            that stacks several contrasts there have to be as many.
        label_map: label values of each region, for :data:`REGIONS`; None or empty reads no segmentation.

    The result holds ``image`` float ``[C, S, S]`` in [-1, 1], ``modality``, ``patient``, ``case``, ``path``
    (strings), ``slice`` and ``label`` (int) and, with a label map, ``brain`` and each region as bool
    ``[S, S]``; the masks of a slice without a segmentation are empty. Of stacked contrasts, ``path`` is the first's.
    """

    def __init__(
        self, *, image_size: int, in_channels: int = 1, label_map: Mapping[str, Sequence[int]] | None = None
    ) -> None:
        if not 1 <= in_channels <= MAX_CHANNELS:
            raise DataError(f"in_channels: found {in_channels}, expected 1 to {MAX_CHANNELS}")
        self.image_size = image_size
        self.in_channels = in_channels
        if label_map and set(REGIONS) - set(label_map):
            raise DataError(f"label_map: found {', '.join(label_map)}, expected {', '.join(REGIONS)}")
        self.label_map = {name: tuple(label_map[name]) for name in REGIONS} if label_map else None

    def __call__(self, entry: Mapping[Hashable, Any]) -> dict[str, Any]:
        """Read one entry of a slice data set."""
        image = self._read(entry["image"])
        item = describe(entry)
        size = (self.image_size, self.image_size)
        if self.label_map is not None:
            item["brain"] = self._resize_mask(foreground(image).any(0))
            labels = self._labels(entry, image)
            for name, values in self.label_map.items():
                mask = torch.isin(labels, torch.tensor(values, dtype=labels.dtype))
                item[name] = self._resize_mask(mask)
        if tuple(image.shape[-2:]) != size:
            image = F.interpolate(image[None], size=size, mode="bicubic", antialias=True)[0].clamp(0, 1)
        item["image"] = (match_channels(image, self.in_channels) * 2 - 1).contiguous()
        return item

    def _read(self, paths: str | Sequence[str]) -> Tensor:
        """One image, or the single channels of several, one after the other."""
        if isinstance(paths, str):
            return read_image(paths)
        if len(paths) != self.in_channels:
            raise DataError(
                f"in_channels: found {self.in_channels}, expected {len(paths)}, as many as contrasts are stacked"
            )
        images = [match_channels(read_image(path), 1) for path in paths]
        for path, image in zip(paths, images, strict=True):
            if image.shape != images[0].shape:
                raise DataError(
                    f"{path}: found {image.shape[2]}x{image.shape[1]} pixels, expected "
                    f"{images[0].shape[2]}x{images[0].shape[1]} as {paths[0]}"
                )
        return torch.cat(images)

    @staticmethod
    def _labels(entry: Mapping[Hashable, Any], image: Tensor) -> Tensor:
        if not entry.get("segmentation"):
            return torch.zeros(image.shape[-2:], dtype=torch.uint8)
        return torch.from_numpy(read_labels(entry["segmentation"]))

    def _resize_mask(self, mask: Tensor) -> Tensor:
        size = (self.image_size, self.image_size)
        if tuple(mask.shape) == size:
            return mask
        return F.interpolate(mask[None, None].float(), size=size, mode="nearest-exact")[0, 0] > 0.5


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
