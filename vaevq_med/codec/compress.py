"""A case's volumes to the bytes of one file: read as slices are cut, through the tokenizer, entropy coded."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vaevq_med.codec.case import CompressedCase, Contrast, Stream, check_names, coded_slices, layout_of, live_of
from vaevq_med.codec.coders.base import IndexCoder
from vaevq_med.codec.geometry import Turn, to_pixels
from vaevq_med.codec.masks import covering
from vaevq_med.codec.model import Model
from vaevq_med.codec.originals import Original
from vaevq_med.codec.rate_control import chosen_indices, joined
from vaevq_med.core.errors import DataError
from vaevq_med.core.numbers import percent
from vaevq_med.images.foreground import foreground
from vaevq_med.prepare.recipes import Recipe

if TYPE_CHECKING:
    from vaevq_med.prepare.volumes.case import Case, Volume
    from vaevq_med.prepare.volumes.reading import Contrast as ReadContrast


@dataclass(frozen=True)
class Compressed:
    """What a case became.

    Attributes:
        content: of the file.
        sizes: bytes of each part of it.
        voxels: of the original volumes, together.
        indices: that were coded.
        seconds: that it took.
        network: seconds of these that the network took.
        notes: names of files, and what a user should know of them.
        originals: of each contrast the upright slices ``[N, rows, columns]``, black at 0 and white at 1.
        foregrounds: of each contrast, bool ``[N, rows, columns]``.
    """

    content: bytes
    sizes: Mapping[str, int]
    voxels: int
    indices: int
    seconds: float
    network: float
    notes: Sequence[Sequence[str]]
    originals: Mapping[str, Tensor] = field(default_factory=dict)
    foregrounds: Mapping[str, NDArray[np.bool_]] = field(default_factory=dict)

    @property
    def figures(self) -> dict[str, Any]:
        """What a report has of it."""
        return {
            "bytes": len(self.content),
            "parts": dict(self.sizes),
            "voxels": self.voxels,
            "indices": self.indices,
            "bits_per_voxel": round(8 * len(self.content) / self.voxels, 6),
            "bits_per_index": round(8 * self.sizes["tokens"] / self.indices, 4) if self.indices else None,
            "seconds": round(self.seconds, 3),
            "network_seconds": round(self.network, 3),
        }


def check_contrasts(model: Model, contrasts: Sequence[str], *, any_contrast: bool = False) -> list[str]:
    """Refuse contrasts that a tokenizer was not trained for.

    Args:
        model: the tokenizer.
        contrasts: that are to be compressed, in order.
        any_contrast: take them all the same.

    Returns:
        What a user should know.

    Raises:
        DataError: a contrast is not one of the tokenizer's; or those of a stacked one are others, or in another order.
    """
    checkpoint = model.description["file"]
    if model.stacked and len(contrasts) != model.in_channels:
        raise DataError(
            f"found {len(contrasts)} contrasts ({', '.join(contrasts)}), expected {model.in_channels}, which "
            f"{checkpoint} takes as one image"
        )
    if model.contrasts is None:
        names = ", ".join(contrasts)
        return [f"{checkpoint} does not say for which contrasts it was trained; {names} may not be among them"]
    if model.stacked and tuple(contrasts) != model.contrasts and not any_contrast:
        raise DataError(
            f"found the contrasts {', '.join(contrasts)}, expected {', '.join(model.contrasts)}, in this order, as "
            f"{checkpoint} was trained for; --any-contrast goes on"
        )
    others = [name for name in contrasts if name not in model.contrasts]
    if others and not any_contrast:
        raise DataError(
            f"found the contrast {others[0]}, expected one of {', '.join(model.contrasts)}, which {checkpoint} was "
            "trained for; --any-contrast goes on"
        )
    return [f"{checkpoint} was not trained for {', '.join(others)}"] if others else []


def compress_case(
    case: Case,
    recipe: Recipe,
    model: Model,
    coder: IndexCoder,
    *,
    orientation: str | None = None,
    accept: Collection[str] = (),
    rate_weight: float = 0.0,
    cell: int = 1,
    keep: bool = False,
) -> Compressed:
    """Compress the contrasts of a case that a recipe names.

    Args:
        case: what to read.
        recipe: how; one that can be undone, of the tokenizer's image size.
        model: the tokenizer.
        coder: of its indices.
        orientation: of files that state none, e.g. ``RAS``; they are refused where it is None.
        accept: which of :data:`vaevq_med.prepare.volumes.discarded.LIMITS` may be exceeded.
        rate_weight: squared distance in the latent that a bit is worth in the choice of codewords; 0 takes the nearest.
        cell: side of the cells that the masks are made of, see :func:`vaevq_med.codec.masks.covering`.
        keep: keep the originals and their foreground, for a comparison.

    Raises:
        DataError: a volume is not what was expected, too much of it would be lost, or a slice data set would leave the
            case out.
        CodecError: codewords cannot be chosen by their bits with this quantizer.
    """
    from vaevq_med.prepare.volumes.reading import CaseReader  # brings MONAI along

    start, before = time.monotonic(), model.seconds
    reader = CaseReader(recipe, orientation)
    read: dict[str, ReadContrast] = {}
    files: list[Original] = []
    places: dict[Volume, int] = {}
    for name in recipe.modalities:
        source = case.images[name]
        read[name] = reader.contrast(source, accept)  # first, since it says what is wrong with a file
        if _whole(source) not in places:
            places[_whole(source)] = len(files)
            note = reader.noting(source)
            files.append(Original.read(source.path, note, series=source.series, title=source.title))
    reader.close()
    check_names(file.name for file in files)
    _check_channels(case, recipe, files, places)
    areas = np.min([contrast.foreground for contrast in read.values()], axis=0)
    if areas.max() < recipe.min_foreground:
        raise DataError(
            f"found no slice with {percent(recipe.min_foreground)} foreground in every contrast, expected some, as "
            "slice-extract does"
        )
    shape, affine = reader.grid
    contrasts = []
    foregrounds = {name: foreground(found.stack).numpy() for name, found in read.items()}
    for name, found in read.items():
        source, (low, high) = case.images[name], found.window
        background = found.discarded.background
        if background is not None:
            files[places[_whole(source)]].check_background(background)
        contrasts.append(
            Contrast(
                name=name,
                file=places[_whole(source)],
                channel=source.channel,
                window=(low - found.offset, high - found.offset),
                background=0.0 if background is None else background,
                mask=covering(foregrounds[name], cell),
            )
        )
    slices = coded_slices([contrast.mask for contrast in contrasts], model.description)
    groups = [tuple(range(len(contrasts)))] if model.stacked else [(number,) for number in range(len(contrasts))]
    streams: list[Stream] = []
    for group in groups:
        reference = streams[-1].indices if streams else None
        found_of = [*read.values()]
        streams.append(_stream(model, coder, recipe, contrasts, found_of, group, slices, reference, rate_weight))
    size = (shape[0], shape[1], shape[2])
    turn = Turn.of(affine, recipe.axis)
    made = CompressedCase(
        case.name, model.description, recipe.interpolation, size, turn, files, contrasts, streams, cell
    )
    content, sizes = made.to_bytes(coder)
    coded = sum(int(np.count_nonzero(made.live(group))) for group in groups) * int(model.description["num_codebooks"])
    return Compressed(
        content=content,
        sizes=sizes,
        voxels=len(contrasts) * int(np.prod(shape)),
        indices=coded,
        seconds=time.monotonic() - start,
        network=model.seconds - before,
        notes=tuple(dict.fromkeys(map(tuple, reader.notes))),
        originals={name: windowed(found) for name, found in read.items()} if keep else {},
        foregrounds=foregrounds if keep else {},
    )


def windowed(contrast: ReadContrast, slices: NDArray[np.int64] | None = None) -> Tensor:
    """Upright slices of a contrast, black at 0 and white at 1.

    Args:
        contrast: as it was read.
        slices: numbers of those that are wanted; None takes all.
    """
    low, high = contrast.window
    stack = contrast.stack if slices is None else contrast.stack[torch.from_numpy(slices)]
    return stack.to(torch.float32, copy=True).sub_(low).div_(high - low).clamp_(0, 1)


def _whole(source: Volume) -> Volume:
    """The file, or the series, that a volume is in."""
    return replace(source, channel=None)


def _check_channels(case: Case, recipe: Recipe, files: Sequence[Original], places: Mapping[Volume, int]) -> None:
    """Refuse a file of several channels of which some would be missing in what comes back."""
    taken = Counter(places[_whole(case.images[name])] for name in recipe.modalities)
    for number, file in enumerate(files):
        channels = int(np.prod(file.shape[3:]))
        if channels != taken[number]:
            raise DataError(
                f"{file.name}: found {channels} channels, of which {taken[number]} would be compressed, expected all "
                "of them, since the file comes back whole"
            )


def _stream(
    model: Model,
    coder: IndexCoder,
    recipe: Recipe,
    contrasts: Sequence[Contrast],
    read: Sequence[ReadContrast],
    group: tuple[int, ...],
    slices: NDArray[np.int64],
    reference: NDArray[np.int64] | None,
    rate_weight: float,
) -> Stream:
    """The indices of some contrasts, as one image each slice."""

    def squares() -> Iterator[Tensor]:
        for piece in model.pieces(slices):
            each = [to_pixels(windowed(read[number], slices[piece]), recipe) for number in group]  # [n, S, S]
            yield torch.stack(each, dim=1)

    masks = [contrasts[number].mask for number in group]
    live = live_of(masks, slices, model.description, recipe.interpolation)
    if rate_weight:
        latents = joined([model.latents(block) for block in squares()])
        layout = layout_of(model.description, live, slices, [contrasts[number].name for number in group], reference)
        indices = chosen_indices(latents, layout, coder, rate_weight)
    else:
        indices = np.concatenate([model.encode(block) for block in squares()])  # [N, h, w, G]
    fill = _most_common(indices[~live]) if not live.all() else (0,) * indices.shape[-1]
    return Stream(group, fill, np.where(live[..., None], indices, 0))


def _most_common(indices: NDArray[np.int64]) -> tuple[int, ...]:
    """What most of some positions ``[P, G]`` have, the smallest of several."""
    rows, counts = np.unique(indices, axis=0, return_counts=True)
    return tuple(int(index) for index in rows[counts.argmax()])
