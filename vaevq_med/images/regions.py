"""Stacks of slices with the masks of their regions: what a segmentation network is trained and judged on."""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.transforms import Compose, RandAffined, RandFlipd, Randomizable, Transform
from torch import Tensor

from vaevq_med.core.errors import DataError
from vaevq_med.core.options import expect
from vaevq_med.images.dataset import SliceDataset, mix_seeds
from vaevq_med.images.manifest import Manifest, load_manifest
from vaevq_med.images.reading import reader
from vaevq_med.images.transforms import REGIONS

_ROTATION = math.radians(15)
_ZOOM = 0.15
_SHIFT = 0.05
_STREAM = 1
"""Sets the seeds of a stack apart from those of its slices."""


class GatherRegions(Transform):
    """Put the masks of :data:`REGIONS`, ``[S, S]`` each, into one item ``regions``, float ``[3, S, S]``."""

    def __call__(self, item: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """The item without the single masks."""
        masks = torch.stack([torch.as_tensor(item[name]) for name in REGIONS]).float()
        return {key: value for key, value in item.items() if key not in (*REGIONS, "brain")} | {"regions": masks}


class RandIntensities(Randomizable, Transform):
    """Change brightness and contrast of each channel: ``min(1, gain x ** gamma)`` of x in [0, 1]; 0 remains 0.

    Args:
        gain: the gain is drawn from ``1 - gain`` to ``1 + gain``.
        gamma: the logarithm of the exponent is drawn from ``-gamma`` to ``gamma``.
    """

    def __init__(self, *, gain: float = 0.1, gamma: float = 0.2) -> None:
        self.gain = gain
        self.gamma = gamma
        self.drawn: list[tuple[float, float]] = []

    def randomize(self, data: int) -> None:
        """Draw gain and exponent.

        Args:
            data: number of channels.
        """
        self.drawn = [
            (1 + float(self.R.uniform(-self.gain, self.gain)), math.exp(self.R.uniform(-self.gamma, self.gamma)))
            for _ in range(data)
        ]

    def __call__(self, item: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Change the ``image``, ``[C, d, S, S]`` in [-1, 1]."""
        image = torch.as_tensor(item["image"])
        self.randomize(image.shape[0])
        gain, gamma = torch.tensor(self.drawn, dtype=image.dtype).view(-1, 2, 1, 1, 1).unbind(1)
        unit = ((image + 1) / 2).clamp(0, 1)
        return {**item, "image": (gain * unit.pow(gamma)).clamp(0, 1) * 2 - 1}


class RandPlaced(Randomizable, Transform):
    """Mirror, rotate, zoom and shift stacks of slices and their masks, all slices of a stack alike.

    Args:
        image_size: S, side of the slices in pixels.
        prob: of a rotation with zoom and shift; of a mirror image it is a half.
    """

    def __init__(self, *, image_size: int, prob: float = 0.8) -> None:
        keys = ("image", "regions")
        self.flip = RandFlipd(keys, prob=0.5, spatial_axis=1)
        self.affine = RandAffined(
            keys,
            prob=prob,
            rotate_range=_ROTATION,
            scale_range=(_ZOOM, _ZOOM),
            translate_range=(_SHIFT * image_size, _SHIFT * image_size),
            mode=("bilinear", "nearest"),
            padding_mode="border",
        )

    def set_random_state(self, seed: int | None = None, state: np.random.RandomState | None = None) -> RandPlaced:
        """Seed what is drawn."""
        super().set_random_state(seed, state)
        for part in (self.flip, self.affine):
            part.set_random_state(self.R.randint(2**31))
        return self

    def __call__(self, item: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Move ``image`` ``[C, d, S, S]`` and ``regions`` ``[3, d, S, S]``."""
        shapes = {key: torch.as_tensor(item[key]).shape for key in ("image", "regions")}
        flat = {key: torch.as_tensor(item[key]).flatten(0, 1) for key in shapes}  # the slices as channels
        moved = self.affine(self.flip(flat))
        plain = {key: value.as_tensor() if hasattr(value, "as_tensor") else value for key, value in moved.items()}
        return {**item, **{key: plain[key].reshape(shape) for key, shape in shapes.items()}}


def region_reader(dataset_dir: str | Path | Manifest, *, image_size: int, in_channels: int) -> Compose:
    """The transform from an entry to ``image``, float ``[C, S, S]`` in [-1, 1], and ``regions``, float ``[3, S, S]``.

    Args:
        dataset_dir: folder of ``dataset.json``, or what is in it; its slices need segmentations.
        image_size: S, side of the image in pixels.
        in_channels: C, contrasts.

    Raises:
        DataError: there is no data set, or it has no segmentations.
    """
    manifest = dataset_dir if isinstance(dataset_dir, Manifest) else load_manifest(dataset_dir)
    region_labels(manifest)
    base = reader(manifest, image_size=image_size, in_channels=in_channels, regions=True)
    return Compose([*base.transforms, GatherRegions()])


def region_augmentation(*, image_size: int) -> Compose:
    """Random changes of stacks: mirror images, rotations to 15 degrees, zoom by 15 %, shifts by 5 %, and intensities.

    Args:
        image_size: side of the slices in pixels.
    """
    return Compose([RandPlaced(image_size=image_size), RandIntensities()])


class RegionDataset(SliceDataset):
    """Stacks of slices with the masks of their regions, ``regions`` ``[3, depth, S, S]``, and whether these are known.

    A slice without a segmentation is no slice without a tumor: it is left out, or, with ``unlabeled``, its item says
    ``labeled`` false, and its masks are empty.

    Args:
        dataset_dir: folder of ``dataset.json``.
        split: ``training``, ``validation`` or ``test``.
        labeled_patients: whose segmentations are used: names, or how many, drawn by ``seed``; None uses all.
        unlabeled: keep the slices of the others, and repeat those that are labeled until they are about half of all.
        augmentation: of whole stacks, such as :func:`region_augmentation`, seeded by the item's number.
        seed: of the draw and of random transforms.
        **kwargs: see :class:`SliceDataset`.

    Attributes:
        labeled: patients whose segmentations are used.

    Raises:
        DataError: there is no segmentation in the split, or a patient that is named has none.
    """

    def __init__(
        self,
        *,
        dataset_dir: str | Path,
        split: str,
        labeled_patients: int | str | Sequence[str] | None = None,
        unlabeled: bool = False,
        augmentation: Compose | None = None,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        self._wanted = labeled_patients
        self._unlabeled = unlabeled
        self._draw = seed
        self.augmentation = augmentation
        self.labeled: tuple[str, ...] = ()
        super().__init__(dataset_dir=dataset_dir, split=split, seed=seed, **kwargs)
        if unlabeled:
            known = [item for item in self.data if item.get("segmentation")]
            others = [item for item in self.data if not item.get("segmentation")]
            self.data = [*known * max(1, round(len(others) / len(known))), *others]
            self.num_items = len(self.data)

    def chosen(self, entries: Sequence[Mapping[str, Any]], manifest: Manifest) -> Sequence[Mapping[str, Any]]:
        """Those with a segmentation that is used, and, where they are wanted, the others without theirs."""
        self.labeled = self._patients(entries, manifest)
        known = [one for one in entries if one.get("segmentation") and str(one.get("patient", "")) in self.labeled]
        if not self._unlabeled:
            return known
        used = {id(one) for one in known}
        others = [{**one, "segmentation": None} for one in entries if id(one) not in used]
        return [*known, *others]

    def _patients(self, entries: Sequence[Mapping[str, Any]], manifest: Manifest) -> tuple[str, ...]:
        where = manifest.path.parent
        found = sorted({str(one.get("patient", "")) for one in entries if one.get("segmentation")})
        if not found:
            raise DataError(f"{where}: found no segmentation in the split, expected some, which slice-extract copies")
        wanted = self._wanted
        if wanted is None:
            return tuple(found)
        if isinstance(wanted, int) and not isinstance(wanted, bool):
            expect(1 <= wanted <= len(found), "labeled_patients", wanted, f"1 to {len(found)}, the patients with one")
            order = np.random.default_rng(mix_seeds(self._draw)).permutation(len(found))
            return tuple(sorted(found[place] for place in order[:wanted]))
        names = [wanted] if isinstance(wanted, str) else [str(name) for name in wanted]
        lacking = sorted(set(names) - set(found))
        if lacking or not names:
            raise DataError(
                f"labeled_patients: found {', '.join(lacking) or 'none'}, expected some of {', '.join(found)}, who "
                "have segmentations in the split"
            )
        return tuple(sorted(names))

    def __getitem__(self, index: int) -> Any:  # type: ignore[override]
        """As :class:`SliceDataset` has it, with ``labeled``, a bool tensor."""
        item = super().__getitem__(index)
        known = bool(self.data[index % len(self.data)].get("segmentation"))
        if self.augmentation is not None:
            self.augmentation.set_random_state(seed=mix_seeds(self.seed, index, _STREAM))
            item = self.augmentation(item)
        return {**item, "labeled": torch.tensor(known)}


def region_labels(manifest: Manifest) -> Mapping[str, Sequence[int]]:
    """Label values of each region of a data set.

    Args:
        manifest: of the data set.

    Raises:
        DataError: it has no label map, as a data set of photographs.
    """
    if set(REGIONS) - set(manifest.label_map):
        raise DataError(
            f"{manifest.path.parent}: found a data set without a label map, expected slices of volumes with "
            "segmentations, made by vaevq-med slice-extract"
        )
    return manifest.label_map


def label_values(regions: Mapping[str, Sequence[int]]) -> tuple[int, ...]:
    """The label of each of :data:`REGIONS` where no smaller one is: edema, core that does not enhance, enhancing tumor.

    Where a map has several labels for one of them, the lowest stands for all.

    Args:
        regions: label values of each region.

    Raises:
        DataError: two regions have the same labels.

    Examples:
        >>> label_values({"whole_tumor": (1, 2, 4), "tumor_core": (1, 4), "enhancing_tumor": (4,)})
        (2, 1, 4)
    """
    sets = [set(regions[name]) for name in REGIONS] + [set[int]()]
    own = [outer - inner for outer, inner in itertools.pairwise(sets)]
    if not all(own):
        raise DataError(f"label map: found {dict(regions)}, expected regions with labels that the next one lacks")
    return tuple(min(values) for values in own)


def to_labels(masks: Tensor, regions: Mapping[str, Sequence[int]]) -> Tensor:
    """Nested masks as one map of labels.

    Args:
        masks: bool ``[3, *grid]``, in the order of :data:`REGIONS`; a smaller region goes before one around it.
        regions: label values of each region.

    Returns:
        uint8 ``[*grid]``, 0 outside of all.

    Raises:
        DataError: see :func:`label_values`.
    """
    labels = torch.zeros(masks.shape[1:], dtype=torch.uint8)
    for mask, value in zip(masks, label_values(regions), strict=True):
        labels[mask] = value
    return labels
