"""The views of an image that a generator is trained on: the image itself, its mirror image, and ten crops.

Source: LlamaGen (arXiv 2406.06525), which encodes five crops and their mirror images of each ImageNet image, brought to
1.1 or 1.05 times the size of the crop, once and for all before the generator is trained.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from monai.transforms import Transform
from torchvision.transforms.functional import five_crop

from vaevq_med.images.manifest import Manifest
from vaevq_med.images.reading import reader

CROP_RANGES = (1.1, 1.05)
_CROPS = ("top-left", "top-right", "bottom-left", "bottom-right", "center")


@dataclass(frozen=True)
class View:
    """A square that is cut from a resized image.

    Attributes:
        scale: side of the resized image over the side of the view; 1 is the whole image.
        crop: where the view lies in it.
        flip: whether left and right change places, after the crop.
    """

    scale: float = 1.0
    crop: str = "center"
    flip: bool = False

    @property
    def name(self) -> str:
        """What a token store calls it.

        Examples:
            >>> View().name, View(1.1, "top-left", flip=True).name
            ('whole', '1.1 top-left flipped')
        """
        place = "whole" if self.scale == 1 else f"{self.scale:g} {self.crop}"
        return f"{place} flipped" if self.flip else place


def plan_views(*, flip: bool, ten_crop: bool) -> tuple[View, ...]:
    """The views of each image.

    Args:
        flip: add the mirror image of each view.
        ten_crop: the five crops at each of :data:`CROP_RANGES` in place of the whole image.

    Examples:
        >>> [view.name for view in plan_views(flip=True, ten_crop=False)]
        ['whole', 'whole flipped']
        >>> len(plan_views(flip=True, ten_crop=True)), len(plan_views(flip=False, ten_crop=True))
        (20, 10)
    """
    places = [(scale, crop) for scale in CROP_RANGES for crop in _CROPS] if ten_crop else [(1.0, "center")]
    sides = (False, True) if flip else (False,)
    return tuple(View(scale, crop, mirrored) for scale, crop in places for mirrored in sides)


class LoadViews(Transform):
    """Read the image that an entry of a datalist names as ``image``, float ``[views, C, S, S]`` in [-1, 1].

    Args:
        views: what to cut from it.
        image_size: S, side of a view in pixels.
        in_channels: C.
        manifest: of the data set.
    """

    def __init__(self, views: Sequence[View], *, image_size: int, in_channels: int, manifest: Manifest) -> None:
        self.views = tuple(views)
        self.image_size = image_size
        self.loaders = {
            scale: reader(manifest, image_size=image_size, in_channels=in_channels, scale=scale)
            for scale in dict.fromkeys(view.scale for view in views)
        }

    def __call__(self, entry: Mapping[Hashable, Any]) -> dict[str, Any]:
        """Read one entry."""
        crops = {
            (scale, name): crop
            for scale, load in self.loaders.items()
            for name, crop in zip(_CROPS, five_crop(load(entry)["image"], [self.image_size] * 2), strict=True)
        }
        cut = ((crops[view.scale, view.crop], view.flip) for view in self.views)
        return {"image": torch.stack([crop.flip(-1) if flip else crop for crop, flip in cut])}
