"""How files become tensors: the one definition, which a data set records and every stage calls.

The data set says the geometry, the tokenizer says size and channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vaevq_med.core.options import Options, expect
from vaevq_med.images.manifest import Manifest, load_manifest

if TYPE_CHECKING:
    from monai.transforms import Compose

SHAPES = {"LoadSliced": "square", "LoadPhotograph": "center_crop"}
"""The shape that images come to, by the transform that loads them, which configurations of all times name."""
AUGMENTATIONS = ("flip", "random_resized_crop")


class Reading(Options):
    """How the images of a data set are read.

    Attributes:
        shape: ``square``: resized in both proportions; or ``center_crop``: resized by the shorter side, the middle cut.
        channels: of the images.
        version: of this definition.
    """

    shape: Literal["square", "center_crop"]
    channels: Literal[1, 3]
    version: Literal[1] = 1

    @classmethod
    def of(cls, manifest: Manifest) -> Reading:
        """What a data set says, or, where it is older, what its images are: slices have contrasts, photographs none.

        Raises:
            DataError: it says something else.
        """
        told = manifest.content.get("reading")
        if told is None:
            channels: Literal[1, 3] = 1 if manifest.content.get("channels_per_image") == 1 else 3
            return cls(shape="square" if "modality" in manifest.content else "center_crop", channels=channels)
        return cls.read(told, f"{manifest.path}: reading")


def shape_of(loaders: Iterable[str]) -> str | None:
    """The shape that images come to by transforms of these names; None where none of them loads an image.

    Args:
        loaders: names of classes, or their addresses.

    Examples:
        >>> shape_of(["vaevq_med.data.LoadPhotograph", "CenterSpatialCropd"])
        'center_crop'
    """
    names = (loader.rpartition(".")[2] for loader in loaders)
    return next((SHAPES[name] for name in names if name in SHAPES), None)


def reader(
    dataset_dir: str | Path | Manifest,
    *,
    image_size: int,
    in_channels: int,
    augment: str | None = None,
    regions: bool = False,
    scale: float = 1.0,
    patch_size: int | None = None,
    transforms: Sequence[Any] | None = None,
) -> Compose:
    """The transform from an entry of a datalist to an item with ``image``, float ``[C, S, S]`` in [-1, 1].

    Args:
        dataset_dir: folder of ``dataset.json``, or what is in it.
        image_size: side of the image in pixels.
        in_channels: its channels.
        augment: ``flip`` for random mirror images, and a random place of the crop where there is one;
            ``random_resized_crop`` for a random share and proportion in place of that; None for neither.
        regions: add the masks of the tumor regions, where the data set has them.
        scale: S over ``image_size``.
        patch_size: cut a square of this side at a random place out of the image, in place of all of it.
        transforms: what a configuration names in place of all this.

    Raises:
        DataError: there is no data set, or an argument is out of its range.
    """
    from monai.transforms import CenterSpatialCropd, Compose, EnsureTyped, RandFlipd, RandSpatialCropd

    from vaevq_med.images.transforms import LoadPhotograph, LoadSliced, RandResizedCropd, ResizeShortSided

    if transforms is not None:
        return Compose(list(transforms))
    augment = None if augment in ("null", "none", "None") else augment  # MONAI's command line knows no null
    expect(augment is None or augment in AUGMENTATIONS, "augment", augment, f"{', '.join(AUGMENTATIONS)} or null")
    expect(not (augment and regions), "augment", augment, "null where the regions' masks are read")
    expect(image_size >= 1, "image_size", image_size, "1 or more")
    manifest = dataset_dir if isinstance(dataset_dir, Manifest) else load_manifest(dataset_dir)
    side = int(image_size * scale)
    resized = augment == "random_resized_crop"
    chain: list[Any]
    if Reading.of(manifest).shape == "square":
        label_map = manifest.label_map if regions else None
        chain = [LoadSliced(image_size=side, in_channels=in_channels, label_map=label_map)]
    else:
        chain = [LoadPhotograph(in_channels=in_channels)]
        if not resized:
            crop = RandSpatialCropd if augment else CenterSpatialCropd
            chain += [ResizeShortSided("image", size=side), crop("image", roi_size=(side, side))]
    if resized:
        chain.append(RandResizedCropd("image", size=side))
    if patch_size is not None:
        expect(1 <= patch_size <= side, "patch_size", patch_size, f"1 to image_size, which is {side}")
        chain.append(RandSpatialCropd("image", roi_size=(patch_size, patch_size), random_size=False))
    if augment:
        chain.append(RandFlipd("image", prob=0.5, spatial_axis=1))
    return Compose([*chain, EnsureTyped("image", track_meta=False)])
