"""Volumes to 2D slices: one case in, a folder of images and a record of them out.

A case is written below a hidden folder first and moved into place as a whole; its record, written last, is what says
that it is done. Whatever interrupts a run leaves either a finished case or nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from monai.data import MetaTensor, get_track_meta, set_track_meta
from monai.transforms import Compose, Orientation, Spacing, ThresholdIntensity, Transform
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vaevq_med.core.errors import DataError
from vaevq_med.core.folder import OutputFolder
from vaevq_med.images.volumes import MAX_VOXELS, check_volume, displacement, read_volume, shape
from vaevq_med.prepare.job import Record
from vaevq_med.prepare.recipes import Recipe
from vaevq_med.prepare.volumes.find import Case, Volume
from vaevq_med.prepare.volumes.labels import label_map
from vaevq_med.prepare.volumes.transforms import BiasFieldCorrectionN4, distinct, nonzero_percentiles

# Run-length matching after PNG's filters: on brains, smaller and faster than zlib's default search.
_PNG = {"compress_level": 1, "compress_type": 3}
_BLOCK_PIXELS = 2**24
# Where the axes point, then their order as slice, row, column, then the letter of the slice axis, which points as in
# RAS+. Anterior (or superior) is up; left and right are as radiologists view them, the patient's right on the left; a
# sagittal slice has anterior on the left.
_VIEWS = {
    "axial": ("LPS", (2, 1, 0), "z"),
    "coronal": ("LAI", (1, 2, 0), "y"),
    "sagittal": ("RPI", (0, 2, 1), "x"),
}


@dataclass(frozen=True)
class CaseRecord(Record):
    """What is known of a finished case; its digest is over the bytes of every file written, in order.

    Attributes:
        files: how many were written.
        bytes: their total size.
        entries: the datalist's entries of this case.
        labels: values of the segmentation other than 0, as its file has them; None where there is none, and in records
            of before they were noted.
    """

    files: int
    bytes: int
    entries: list[dict[str, Any]]
    labels: list[int] | None = None


def fingerprint(case: Case, recipe: Recipe) -> str:
    """What a finished case depends on: the recipe, and names, sizes and times of the input files."""
    sources = {**case.images, **({"seg": case.segmentation} if case.segmentation else {})}
    files = []
    for name, source in sorted(sources.items()):
        try:
            status = source.path.stat()
        except OSError as error:
            raise DataError(
                f"{source.path.name}: found no readable file ({error.strerror}), expected a volume"
            ) from None
        files.append([name, source.path.name, source.channel, status.st_size, status.st_mtime_ns])
    content = [recipe.image_hash, case.name, case.patient, case.label_map, case.target_map, files]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def read_record(folder: OutputFolder, case: str) -> CaseRecord | None:
    """The record of a finished case whose files are all there, or None."""
    places = [folder.path / part / case for part in ("images", "labels")]
    try:
        record = CaseRecord(**(folder.record(case) or {}))
        sizes = [entry.stat().st_size for place in places if place.is_dir() for entry in os.scandir(place)]
        return record if (len(sizes), sum(sizes)) == (record.files, record.bytes) else None
    except (OSError, TypeError):
        return None


def known_labels(case: Case, record: CaseRecord, folder: OutputFolder) -> set[int] | None:
    """Values of a case's segmentation other than 0, of a record without them by the slices; None without segmentation.

    Args:
        case: a finished one.
        record: of it.
        folder: of the data set.
    """
    if case.segmentation is None or record.labels is not None:
        return None if case.segmentation is None else set(record.labels or ())
    stored: set[int] = set()
    for path in sorted((folder.path / "labels" / case.name).glob("*.png")):
        with Image.open(path) as pixels:
            stored.update(value for value, count in enumerate(pixels.histogram()) if count)
    return label_map(case.label_map).sources(stored, label_map(case.target_map))


class _Writer:
    """Encodes slices into a folder, with a running hash."""

    def __init__(self, folder: Path, image_format: str) -> None:
        self.folder = folder
        self.format = image_format
        self.digest = hashlib.sha256()
        self.files = 0
        self.bytes = 0

    @property
    def suffix(self) -> str:
        return "npy" if self.format == "npy" else "png"

    def image(self, relative: str, pixels: Tensor) -> None:
        """Write float pixels ``[S, S]`` in [0, 1]."""
        buffer = io.BytesIO()
        if self.format == "npy":
            np.save(buffer, pixels.numpy())
        elif self.format == "png16":
            Image.fromarray((pixels * 65535).round().numpy().astype(np.uint16)).save(buffer, "PNG", **_PNG)
        else:
            Image.fromarray((pixels * 255).round().to(torch.uint8).numpy()).save(buffer, "PNG", **_PNG)
        self._write(relative, buffer.getvalue())

    def labels(self, relative: str, labels: NDArray[np.uint8]) -> None:
        """Write integer labels ``[S, S]``."""
        buffer = io.BytesIO()
        Image.fromarray(labels).save(buffer, "PNG", **_PNG)
        self._write(relative, buffer.getvalue())

    def _write(self, relative: str, content: bytes) -> None:
        (self.folder / relative).write_bytes(content)
        self.digest.update(relative.encode() + b"\0" + content)
        self.files += 1
        self.bytes += len(content)


def _volume_transforms(recipe: Recipe, *, labels: bool) -> Compose:
    steps: list[Transform] = []
    correction = recipe.bias_field_correction
    if correction is not None and not labels:
        steps.append(BiasFieldCorrectionN4(correction.shrink_factor, correction.iterations))
    if recipe.spacing is not None:
        mode = "nearest" if labels else "bilinear"
        steps.append(Spacing(recipe.spacing, diagonal=True, mode=mode, padding_mode="zeros", dtype=np.float32))
    steps.append(Orientation(axcodes=_VIEWS[recipe.axis][0], labels=(("L", "R"), ("P", "A"), ("I", "S"))))
    if recipe.clip_negatives and not labels:
        steps.append(ThresholdIntensity(threshold=0, above=True, cval=0))
    return Compose(steps)


def _stack(volume: Tensor, axis: str) -> Tensor:
    """An oriented volume ``[1, ., ., .]`` to upright slices ``[N, rows, columns]``."""
    return volume[0].permute(_VIEWS[axis][1]).contiguous()


def _square(stack: Tensor) -> Tensor:
    """Pad ``[N, rows, columns]`` with zeros to a square, centered."""
    rows, columns = stack.shape[-2:]
    side = max(rows, columns)
    top, left = (side - rows) // 2, (side - columns) // 2
    return F.pad(stack, (left, side - columns - left, top, side - rows - top))


def resize_images(stack: Tensor, recipe: Recipe) -> Tensor:
    """Pad to a square and resize.

    Args:
        stack: float ``[N, rows, columns]`` in [0, 1].
        recipe: says the size and how to interpolate.

    Returns:
        ``[N, S, S]`` in [0, 1].
    """
    stack = _square(stack)
    if stack.shape[-1] != recipe.size:
        stack = F.interpolate(
            stack[:, None],
            size=(recipe.size, recipe.size),
            mode=recipe.interpolation,
            antialias=recipe.antialias,
            align_corners=False,
        )[:, 0]
    return stack.clamp_(0, 1)


def resize_labels(stack: Tensor, size: int) -> NDArray[np.uint8]:
    """Pad labels ``[N, rows, columns]`` to a square and resize by nearest neighbor to ``[N, S, S]``."""
    stack = _square(stack)
    if stack.shape[-1] != size:
        stack = F.interpolate(stack[:, None], size=(size, size), mode="nearest-exact")[:, 0]
    return stack.numpy()


def _block(size: int) -> int:
    """How many slices of a size to hold at once."""
    return max(1, _BLOCK_PIXELS // size**2)


class _Reader:
    """Reads the volumes of a case on one grid, that of the first; a 4D file is read once."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.files: dict[Path, tuple[NDArray, NDArray[np.float64]]] = {}
        self.grid: tuple[str, tuple[int, ...], NDArray[np.float64]] | None = None

    def read(self, source: Volume) -> tuple[NDArray, NDArray[np.float64]]:
        name = source.path.name
        voxels, affine = self.files.pop(source.path) if source.path in self.files else read_volume(source.path)
        if source.channel is not None:
            self.files[source.path] = voxels, affine
            if voxels.ndim != 4 or voxels.shape[3] <= source.channel:
                raise DataError(
                    f"{name}: found shape {shape(voxels)}, expected a fourth axis with channel {source.channel}"
                )
            voxels = voxels[..., source.channel]
        limit = None if self.recipe.spacing is not None else self.recipe.max_obliquity_degrees
        voxels = check_volume(name, voxels, affine, max_obliquity_degrees=limit)
        if self.grid is None:
            self.grid = name, voxels.shape, affine
            self._check_pixels(name, voxels.shape, affine)
        first, size, reference = self.grid
        if voxels.shape != size:
            raise DataError(f"{name}: found shape {shape(voxels)}, expected {'x'.join(map(str, size))} as {first}")
        apart = displacement(affine, reference, size)
        if apart > 0.5 * np.linalg.norm(reference[:3, :3], axis=0).min():
            raise DataError(f"{name}: found a grid {apart:.1f} mm away from that of {first}, expected the same grid")
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
        axis = "xyz".index(_VIEWS[self.recipe.axis][2])
        first, second = np.delete(spacing, axis)
        if abs(first / second - 1) > 0.01:
            raise DataError(
                f"{name}: found {self.recipe.axis} pixels of {first:.3g} x {second:.3g} mm, expected square "
                "ones; a recipe with 'spacing' resamples such volumes"
            )


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


def _read_labels(reader: _Reader, source: Volume, case: Case) -> tuple[MetaTensor, list[int]]:
    """The labels in the values of the target map, and the values that the file has."""
    voxels, affine = reader.read(source)
    values = distinct(voxels)
    if (values != np.round(values)).any() or values.min() < 0 or values.max() > 255:
        raise DataError(f"{source.path.name}: found values {values.min():g} to {values.max():g}, expected whole labels")
    own = label_map(case.label_map)
    own.check({int(value) for value in values})
    labels = _as_tensor(own.convert(voxels.astype(np.uint8), label_map(case.target_map)), affine, np.uint8)
    return labels, [int(value) for value in values if value]


def write_case(case: Case, recipe: Recipe, folder: Path) -> CaseRecord:
    """Slice one case into ``images`` and ``labels`` below a folder.

    Args:
        case: what to read.
        recipe: what to do.
        folder: an empty one.

    Returns:
        The record, without its fingerprint.

    Raises:
        DataError: a volume is not what was expected, or nothing is left of the case.
        OSError: the disk is full, or not writable.
    """
    reader = _Reader(recipe)
    transforms = _volume_transforms(recipe, labels=False)
    stacks: dict[str, Tensor] = {}
    foregrounds: dict[str, NDArray[np.float64]] = {}
    windows: dict[str, tuple[float, float]] = {}
    for modality in recipe.modalities:
        source = case.images[modality]
        voxels, affine = reader.read(source)
        try:
            volume = transforms(_as_tensor(voxels, affine, _working_type(voxels, recipe)))
            stack = _stack(volume.as_tensor(), recipe.axis)
            windows[modality] = nonzero_percentiles(stack, recipe.percentiles)
        except (DataError, RuntimeError) as error:
            reason = error if isinstance(error, DataError) else error.__cause__  # MONAI wraps what a transform raises
            if isinstance(reason, DataError):
                raise DataError(f"{source.path.name}: {reason}") from None
            raise
        foregrounds[modality] = np.array([np.count_nonzero(pixels) for pixels in stack.numpy()]) / stack[0].numel()
        stacks[modality] = stack
    labels = values = None
    if case.segmentation is not None:
        segmentation, values = _read_labels(reader, case.segmentation, case)
        volume = _volume_transforms(recipe, labels=True)(segmentation)
        labels = _stack(volume.as_tensor(), recipe.axis).round().to(torch.uint8)
    reader.files.clear()
    kept = np.flatnonzero(np.min([foregrounds[m] for m in recipe.modalities], axis=0) >= recipe.min_foreground)
    if kept.size == 0:
        raise DataError(
            f"found no slice with {recipe.min_foreground:.0%} nonzero pixels in every contrast, expected some"
        )
    writer = _Writer(folder, recipe.format)
    (folder / "images").mkdir()
    entries: list[dict[str, Any]] = [{} for _ in range(kept.size * len(recipe.modalities))]
    shared = _write_labels(writer, case, recipe, labels, kept)
    letter = _VIEWS[recipe.axis][2]
    for number, modality in enumerate(recipe.modalities):
        low, high = windows[modality]
        stack = stacks.pop(modality)[torch.from_numpy(kept)].float().sub_(low).div_(high - low).clamp_(0, 1)
        blocks = (resize_images(block, recipe) for block in stack.split(_block(recipe.size)))
        for position, pixels in enumerate(chain.from_iterable(blocks)):
            index = int(kept[position])
            name = f"{case.name}-{modality}-{letter}{index:03d}.{writer.suffix}"
            writer.image(f"images/{name}", pixels)
            entries[position * len(recipe.modalities) + number] = {
                "image": f"images/{case.name}/{name}",
                "patient": case.patient,
                "case": case.name,
                "modality": modality,
                "label": number,
                "slice": index,
                "intensity_window": [low, high],
                "foreground": round(float(foregrounds[modality][index]), 6),
                **shared[position],
            }
    return CaseRecord("", writer.digest.hexdigest(), writer.files, writer.bytes, entries, values)


def _write_labels(
    writer: _Writer, case: Case, recipe: Recipe, labels: Tensor | None, kept: NDArray[np.int64]
) -> list[Mapping[str, Any]]:
    """Write a case's segmentation slices; what they add to the entries of each slice."""
    if labels is None:
        return [{} for _ in kept]
    (writer.folder / "labels").mkdir()
    letter = _VIEWS[recipe.axis][2]
    shared: list[Mapping[str, Any]] = []
    blocks = (resize_labels(block, recipe.size) for block in labels[torch.from_numpy(kept)].split(_block(recipe.size)))
    for index, pixels in zip(kept, chain.from_iterable(blocks), strict=True):
        name = f"{case.name}-seg-{letter}{index:03d}.png"
        writer.labels(f"labels/{name}", pixels)
        areas = {
            region: int(np.isin(pixels, values).sum()) for region, values in label_map(case.target_map).regions.items()
        }
        shared.append({"segmentation": f"labels/{case.name}/{name}", "region_area": areas})
    return shared


@contextlib.contextmanager
def _tracked_meta() -> Iterator[None]:
    """MONAI's transforms carry affines along, whatever the process has set (training turns it off)."""
    before = get_track_meta()
    set_track_meta(True)
    try:
        yield
    finally:
        set_track_meta(before)


def extract_case(case: Case, recipe: Recipe, folder: OutputFolder) -> CaseRecord:
    """Slice one case into a data set, all of it or nothing.

    Args:
        case: what to read.
        recipe: what to do.
        folder: of the data set.

    Returns:
        The record, which is written too.

    Raises:
        DataError: a volume is not what was expected.
        OSError: the disk is full, or not writable.
    """
    mark = fingerprint(case, recipe)
    with folder.unit(case.name) as partial:
        with _tracked_meta():
            record = replace(write_case(case, recipe, partial), fingerprint=mark)
        folder.commit(case.name, vars(record), {part: f"{part}/{case.name}" for part in ("images", "labels")})
    return record
