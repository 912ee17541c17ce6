"""The volumes of a case, read on one grid and made ready to be cut: upright, with a window, and with what is lost."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor, get_track_meta, set_track_meta
from monai.transforms import Compose, Orientation, Spacing, ThresholdIntensity, Transform
from numpy.typing import NDArray
from torch import Tensor

from vaevq_med.core.errors import DataError
from vaevq_med.core.numbers import told_apart
from vaevq_med.images.foreground import BLACK, corner_noise, find_background, foreground
from vaevq_med.images.nifti import MAX_VOXELS
from vaevq_med.images.volumes import VIEWS, check_volume, displacement, read_volume, shape
from vaevq_med.prepare.recipes import Recipe
from vaevq_med.prepare.volumes.case import Case, Volume
from vaevq_med.prepare.volumes.discarded import Discarded, check_discarded
from vaevq_med.prepare.volumes.labels import label_map
from vaevq_med.prepare.volumes.transforms import BiasFieldCorrectionN4, blacken, distinct, nonzero_percentiles

_LABEL_TOLERANCE = 1e-3
_GRID_TOLERANCE = 0.5


def _volume_transforms(recipe: Recipe, *, labels: bool) -> Compose:
    steps: list[Transform] = []
    correction = recipe.bias_field_correction
    if correction is not None and not labels:
        steps.append(BiasFieldCorrectionN4(correction.shrink_factor, correction.iterations))
    if recipe.spacing is not None:
        mode = "nearest" if labels else "bilinear"
        steps.append(Spacing(recipe.spacing, diagonal=True, mode=mode, padding_mode="zeros", dtype=np.float32))
    steps.append(Orientation(axcodes=VIEWS[recipe.axis][0], labels=(("L", "R"), ("P", "A"), ("I", "S"))))
    if recipe.clip_negatives and not labels:
        steps.append(ThresholdIntensity(threshold=0, above=True, cval=0))
    return Compose(steps)


def _stack(volume: Tensor, axis: str) -> Tensor:
    """An oriented volume ``[1, ., ., .]`` to upright slices ``[N, rows, columns]``."""
    return volume[0].permute(VIEWS[axis][1]).contiguous()


@contextlib.contextmanager
def _tracked_meta() -> Iterator[None]:
    """MONAI's transforms carry affines along, whatever the process has set (training turns it off)."""
    before = get_track_meta()
    set_track_meta(True)
    try:
        yield
    finally:
        set_track_meta(before)


def _working_type(voxels: NDArray, recipe: Recipe) -> Any:
    """The volume's own integer type where nothing is interpolated, which halves the traffic; else 32-bit float."""
    plain = recipe.bias_field_correction is None and recipe.spacing is None
    return voxels.dtype.newbyteorder("=") if plain and voxels.dtype.name in ("uint8", "int16", "int32") else np.float32


def _as_tensor(voxels: NDArray, affine: NDArray[np.float64], dtype: Any) -> MetaTensor:
    """A channel-first tensor in the file's own memory order, in which an axial slice is contiguous already."""
    voxels = np.asarray(voxels, dtype=dtype)
    if not voxels.flags.writeable:
        voxels = voxels.copy(order="K")
    return MetaTensor(torch.from_numpy(voxels)[None], affine=torch.from_numpy(affine))


@dataclass(frozen=True)
class Contrast:
    """One contrast of a case.

    Attributes:
        stack: upright slices ``[N, rows, columns]``, with a background of 0.
        window: their intensities of black and white.
        offset: by how much they lie above those of the file.
        foreground: share of each slice.
        discarded: what was measured.
    """

    stack: Tensor
    window: tuple[float, float]
    offset: float
    foreground: NDArray[np.float64]
    discarded: Discarded


class CaseReader:
    """Reads the volumes of a case on one grid, that of the first; a 4D file is read once.

    Args:
        recipe: what is done to them.
        orientation: of files that state none, e.g. ``RAS``; they are refused where it is None.

    Attributes:
        notes: names of files, and what a user should know of them.
    """

    def __init__(self, recipe: Recipe, orientation: str | None = None) -> None:
        self.recipe = recipe
        self.orientation = orientation
        self.notes: list[Sequence[str]] = []
        self._transforms = _volume_transforms(recipe, labels=False)
        self._files: dict[Path, tuple[NDArray, NDArray[np.float64]]] = {}
        self._grid: tuple[str, tuple[int, ...], NDArray[np.float64]] | None = None

    def noting(self, source: Volume) -> Callable[[str], None]:
        """What takes notes on a volume.

        Args:
            source: the volume.
        """
        return lambda text: self.notes.append((source.name, text))

    @property
    def grid(self) -> tuple[tuple[int, ...], NDArray[np.float64]]:
        """Shape ``[X, Y, Z]`` and 4×4 affine, in RAS+ coordinates, of the volumes that were read."""
        assert self._grid is not None, "nothing was read"
        return self._grid[1], self._grid[2]

    def _read(self, source: Volume) -> tuple[NDArray, NDArray[np.float64]]:
        name = source.name
        if source.path in self._files:
            voxels, affine = self._files.pop(source.path)
        else:
            voxels, affine = read_volume(
                source.path, series=source.series, orientation=self.orientation, note=self.noting(source)
            )
        if source.channel is not None:
            self._files[source.path] = voxels, affine
            if voxels.ndim != 4 or voxels.shape[3] <= source.channel:
                raise DataError(
                    f"{name}: found shape {shape(voxels)}, expected a fourth axis with channel {source.channel}"
                )
            voxels = voxels[..., source.channel]
        limit = None if self.recipe.spacing is not None else self.recipe.max_obliquity_degrees
        voxels = check_volume(name, voxels, affine, max_obliquity_degrees=limit)
        if self._grid is None:
            self._grid = name, voxels.shape, affine
            self._check_pixels(name, voxels.shape, affine)
        first, size, reference = self._grid
        if voxels.shape != size:
            raise DataError(f"{name}: found shape {shape(voxels)}, expected {'x'.join(map(str, size))} as {first}")
        apart = displacement(affine, reference, size)
        most = _GRID_TOLERANCE * float(np.linalg.norm(reference[:3, :3], axis=0).min())
        if apart > most:
            raise DataError(
                f"{name}: found a grid {told_apart(apart, most)} mm away from that of {first}, expected the same grid "
                f"to within {most:.3g} mm"
            )
        return voxels, reference

    def _check_pixels(self, name: str, size: tuple[int, ...], affine: NDArray[np.float64]) -> None:
        """Refuse pixels that are not square, which a square slice would distort, and grids without end."""
        if self.recipe.spacing is not None:
            spacing = np.asarray(self.recipe.spacing)
            extent = np.abs(affine[:3, :3]) @ np.asarray(size)
            if np.prod(np.ceil(extent / spacing)) > MAX_VOXELS:
                raise DataError(
                    f"{name}: found an extent of {' x '.join(f'{mm:.3g}' for mm in extent)} mm, expected at most "
                    f"{MAX_VOXELS:,} voxels of {' x '.join(f'{mm:g}' for mm in spacing)} mm in it"
                )
        else:
            spacing = np.empty(3)
            spacing[nib.io_orientation(affine)[:, 0].astype(int)] = nib.affines.voxel_sizes(affine)
        axis = "xyz".index(VIEWS[self.recipe.axis][2])
        first, second = np.delete(spacing, axis)
        if abs(first / second - 1) > 0.01:
            raise DataError(
                f"{name}: found {self.recipe.axis} pixels of {first:.3g} x {second:.3g} mm, expected square "
                "ones; a recipe with 'spacing' resamples such volumes"
            )

    def contrast(self, source: Volume, accept: Collection[str] = ()) -> Contrast:
        """Read a contrast as upright slices on a background of 0.

        Args:
            source: the volume.
            accept: which of :data:`vaevq_med.prepare.volumes.discarded.LIMITS` may be exceeded.

        Raises:
            DataError: it is not what was expected, or too much of it would be lost.
        """
        with _tracked_meta():
            contrast = self._contrast(source, accept)
        check_discarded(source.name, contrast.discarded, self.recipe, accept=accept, note=self.noting(source))
        return contrast

    def _contrast(self, source: Volume, accept: Collection[str]) -> Contrast:
        recipe, name = self.recipe, source.name
        voxels, affine = self._read(source)
        found = find_background(voxels)
        background = found or BLACK
        mask = background.foreground(voxels)
        inside = int(np.count_nonzero(mask))
        if inside == 0 and background.value != 0:
            raise DataError(f"{name}: found the intensity {background.value!r} everywhere, expected some contrast")
        lost = 0
        if recipe.clip_negatives and inside and voxels.min() <= 0:
            lost = int(np.count_nonzero(mask & (voxels <= 0)))
        discarded = Discarded(
            background=None if found is None else background.value,
            tolerance=background.tolerance,
            foreground=round(inside / voxels.size, 6),
            clipped=round(lost / max(inside, 1), 6),
            saturated=0.0,
            corners=round(corner_noise(voxels, background), 6),
        )
        # What is lost already is refused before a window is sought in what is left; it is noted once, with the rest.
        check_discarded(name, discarded, recipe, accept=accept, note=lambda text: None)
        if not background.is_black:
            self.noting(source)("its background is not 0; slices show it as black")
        elif found is None:
            self.noting(source)("no value holds most of its border; 0 was taken for the background")
        black, offset = blacken(voxels, background, keep_negatives=not recipe.clip_negatives)
        try:
            turned = self._transforms(_as_tensor(black, affine, _working_type(black, recipe))).as_tensor()
            stack = _stack(turned, recipe.axis)
            low, high = nonzero_percentiles(stack, recipe.percentiles)
        except (DataError, RuntimeError) as error:
            reason = error if isinstance(error, DataError) else error.__cause__  # MONAI wraps what a transform raises
            if isinstance(reason, DataError):
                raise DataError(f"{name}: {reason}") from None
            raise
        pixels = stack.numpy()
        areas = np.array([np.count_nonzero(foreground(slice_)) for slice_ in pixels])
        total = int(areas.sum())
        # The background lies below black as well: what is left of the foreground is above 0.
        outside = np.count_nonzero(pixels >= high) + np.count_nonzero(pixels < low) - (pixels.size - total)
        discarded = replace(discarded, saturated=round(outside / total, 6))
        return Contrast(stack, (low, high), offset, areas / stack[0].numel(), discarded)

    def labels(self, source: Volume, case: Case) -> tuple[Tensor, list[int]]:
        """Read a segmentation as upright slices; labels that are whole but for rounding are made whole.

        Args:
            source: the volume.
            case: whose maps say what its values mean, and in which they are wanted.

        Returns:
            uint8 ``[N, rows, columns]``, and the values other than 0 that the file has, rising.

        Raises:
            DataError: it is not what was expected, or has other values than whole labels of its map.
        """
        name = source.name
        voxels, affine = self._read(source)
        values = distinct(voxels)
        whole = np.rint(values)
        away = np.abs(values - whole)
        odd = values[(away > _LABEL_TOLERANCE) | (whole < 0) | (whole > 255)]
        if odd.size:
            raise DataError(
                f"{name}: found the value {odd[0]} in the segmentation, expected whole labels from 0 to 255 "
                f"to within {_LABEL_TOLERANCE}"
            )
        if away.any():
            self.noting(source)(f"its labels were not whole, by up to {away.max():.2g}, and were rounded")
            voxels = np.rint(voxels)
        own = label_map(case.label_map)
        own.check({int(value) for value in whole})
        labels = _as_tensor(own.convert(voxels.astype(np.uint8), label_map(case.target_map)), affine, np.uint8)
        with _tracked_meta():
            turned = _volume_transforms(self.recipe, labels=True)(labels).as_tensor()
        stack = _stack(turned, self.recipe.axis).round().to(torch.uint8)
        return stack, sorted({int(value) for value in whole if value})

    def close(self) -> None:
        """Forget the 4D files."""
        self._files.clear()
