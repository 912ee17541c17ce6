"""Volumes to 2D slices: one case in, a folder of images and a record of them out.

A case is written below a hidden folder first and moved into place as a whole; its record, written last, is what says
that it is done. Whatever interrupts a run leaves either a finished case or nothing.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vaevq_med.core.errors import DataError
from vaevq_med.core.folder import OutputFolder
from vaevq_med.core.numbers import percent
from vaevq_med.prepare.job import Record
from vaevq_med.prepare.recipes import Recipe
from vaevq_med.prepare.volumes.case import Case
from vaevq_med.prepare.volumes.labels import label_map
from vaevq_med.prepare.volumes.reading import VIEWS, CaseReader, Contrast

# Run-length matching after PNG's filters: on brains, smaller and faster than zlib's default search.
_PNG = {"compress_level": 1, "compress_type": 3}
_BLOCK_PIXELS = 2**24


@dataclass(frozen=True)
class CaseRecord(Record):
    """What is known of a finished case; its digest is over the bytes of every file written, in order.

    Attributes:
        files: how many were written.
        bytes: their total size.
        entries: the datalist's entries of this case.
        discarded: contrast to the fields of :class:`Discarded`.
        notes: names of files, and what a user should know of them.
        labels: values of the segmentation other than 0, as its file has them; None where there is none.
    """

    files: int
    bytes: int
    entries: list[dict[str, Any]]
    discarded: dict[str, dict[str, Any]]
    notes: list[Sequence[str]]
    labels: list[int] | None


def fingerprint(case: Case, recipe: Recipe, orientation: str | None = None) -> str:
    """What a finished case depends on: the recipe, and names, sizes and times of the input files.

    Args:
        case: what is read.
        recipe: what is done.
        orientation: that is assumed of files which state none.
    """
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
    if orientation is not None:
        content.append(orientation)
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


def write_case(
    case: Case, recipe: Recipe, folder: Path, *, orientation: str | None = None, accept: Collection[str] = ()
) -> CaseRecord:
    """Slice one case into ``images`` and ``labels`` below a folder.

    Args:
        case: what to read.
        recipe: what to do.
        folder: an empty one.
        orientation: of files that state none, e.g. ``RAS``; they are refused where it is None.
        accept: which of :data:`vaevq_med.prepare.volumes.discarded.LIMITS` may be exceeded.

    Returns:
        The record, without its fingerprint.

    Raises:
        DataError: a volume is not what was expected, too much of it would be lost, or nothing is left of the case.
        OSError: the disk is full, or not writable.
    """
    reader = CaseReader(recipe, orientation)
    contrasts: dict[str, Contrast] = {}
    for modality in recipe.modalities:
        source = case.images[modality]
        contrasts[modality] = reader.contrast(source, accept)
    labels = values = None
    if case.segmentation is not None:
        labels, values = reader.labels(case.segmentation, case)
    reader.close()
    foregrounds = {modality: contrast.foreground for modality, contrast in contrasts.items()}
    kept = np.flatnonzero(np.min([*foregrounds.values()], axis=0) >= recipe.min_foreground)
    if kept.size == 0:
        raise DataError(
            f"found no slice with {percent(recipe.min_foreground)} nonzero pixels in every contrast, expected some"
        )
    discarded = {
        modality: asdict(replace(contrast.discarded, white_regions=_white_regions(contrast, labels, case)))
        for modality, contrast in contrasts.items()
    }
    writer = _Writer(folder, recipe.format)
    (folder / "images").mkdir()
    entries: list[dict[str, Any]] = [{} for _ in range(kept.size * len(recipe.modalities))]
    shared = _write_labels(writer, case, recipe, labels, kept)
    letter = VIEWS[recipe.axis][2]
    for number, modality in enumerate(recipe.modalities):
        contrast = contrasts.pop(modality)
        low, high = contrast.window
        stack = contrast.stack[torch.from_numpy(kept)].float().sub_(low).div_(high - low).clamp_(0, 1)
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
                "intensity_window": [low - contrast.offset, high - contrast.offset],
                "foreground": round(float(foregrounds[modality][index]), 6),
                **shared[position],
            }
    digest = writer.digest.hexdigest()
    return CaseRecord("", digest, writer.files, writer.bytes, entries, discarded, reader.notes, values)


def _white_regions(contrast: Contrast, labels: Tensor | None, case: Case) -> dict[str, float]:
    """Share of each region that is white in a contrast, of the regions that are not empty."""
    if labels is None:
        return {}
    marked = labels != 0
    values, white = labels[marked], contrast.stack[marked] >= contrast.window[1]
    shares = {}
    for region, members in label_map(case.target_map).regions.items():
        inside = torch.isin(values, torch.tensor(members, dtype=values.dtype))
        if inside.any():
            shares[region] = round(float(white[inside].double().mean()), 6)
    return shares


def _write_labels(
    writer: _Writer, case: Case, recipe: Recipe, labels: Tensor | None, kept: NDArray[np.int64]
) -> list[Mapping[str, Any]]:
    """Write a case's segmentation slices; what they add to the entries of each slice."""
    if labels is None:
        return [{} for _ in kept]
    (writer.folder / "labels").mkdir()
    letter = VIEWS[recipe.axis][2]
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


def extract_case(
    case: Case, recipe: Recipe, folder: OutputFolder, *, orientation: str | None = None, accept: Collection[str] = ()
) -> CaseRecord:
    """Slice one case into a data set, all of it or nothing.

    Args:
        case: what to read.
        recipe: what to do.
        folder: of the data set.
        orientation: see :func:`write_case`.
        accept: likewise.

    Returns:
        The record, which is written too.

    Raises:
        DataError: a volume is not what was expected, or too much of it would be lost.
        OSError: the disk is full, or not writable.
    """
    mark = fingerprint(case, recipe, orientation)
    with folder.unit(case.name) as partial:
        record = write_case(case, recipe, partial, orientation=orientation, accept=accept)
        record = replace(record, fingerprint=mark)
        folder.commit(case.name, vars(record), {part: f"{part}/{case.name}" for part in ("images", "labels")})
    return record
