"""The bytes of a compressed case to its volumes: on the original grid, in the original units and kind of file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vaevq_med.codec.case import CompressedCase, Contrast
from vaevq_med.codec.geometry import from_squares
from vaevq_med.codec.model import Model
from vaevq_med.codec.originals import Original


@dataclass(frozen=True)
class Restored:
    """A file of a case as it comes back.

    Attributes:
        original: its form.
        stored: its voxels as they are stored, of the file's shape and type.
        contrasts: numbers of the contrasts in it.
    """

    original: Original
    stored: NDArray
    contrasts: tuple[int, ...]


def restore(case: CompressedCase, model: Model) -> Iterator[Restored]:
    """The files of a case, one after the other.

    Args:
        case: as it was read from its file.
        model: the tokenizer that made it.
    """
    decoded: dict[int, Tensor] = {}
    for number, file in enumerate(case.files):
        members = tuple(place for place, contrast in enumerate(case.contrasts) if contrast.file == number)
        stored = np.empty(file.shape, file.type)
        for member in members:
            contrast = case.contrasts[member]
            if member not in decoded:
                decoded.update(_decoded(case, model, member))
            volume = case.turn.volume(_stored(contrast, file, decoded.pop(member), case.slices))
            if contrast.channel is None:
                stored[...] = volume.reshape(file.shape)
            else:
                stored[..., contrast.channel] = volume
        yield Restored(file, stored, members)


def _decoded(case: CompressedCase, model: Model, contrast: int) -> dict[int, Tensor]:
    """Coded slices ``[n, rows, columns]`` in [0, 1] of each contrast in the stream of one."""
    stream = next(stream for stream in case.streams if contrast in stream.contrasts)
    indices = case.filled(stream)
    shape = case.contrasts[contrast].mask.shape[1:]
    parts: dict[int, list[Tensor]] = {number: [] for number in stream.contrasts}
    slices = case.slices
    for piece in model.pieces(slices):
        squares = model.decode(indices[piece], len(stream.contrasts))  # [n, C, S, S]
        shown = squares[: len(slices[piece])]  # a volume's last layer may be of more slices than there are
        for channel, number in enumerate(stream.contrasts):
            resized = from_squares(shown[:, channel], shape, case.interpolation)
            parts[number].append(resized.clamp(0, 1))  # bicubic interpolation goes beyond
    return {number: torch.cat(slices) for number, slices in parts.items()}


def _stored(contrast: Contrast, file: Original, slices: Tensor, places: NDArray[np.int64]) -> NDArray:
    """Numbers of a file's type for upright slices ``[N, rows, columns]``: the background where there is no foreground.

    Args:
        contrast: whose they are.
        file: that they are of.
        slices: those that were coded, ``[n, rows, columns]`` in [0, 1].
        places: their numbers.
    """
    low, high = contrast.window
    found = np.full(contrast.mask.shape, file.stored_exactly(contrast.background), file.type)
    for pixels, place in zip(slices, places, strict=True):
        inside = contrast.mask[place]
        found[place][inside] = file.stored(low + (high - low) * pixels.numpy()[inside].astype(np.float64))
    return found


def window(case: CompressedCase, restored: Restored, contrast: int) -> Tensor:
    """A contrast of a file that came back as upright slices ``[N, rows, columns]``, black at 0 and white at 1.

    Args:
        case: the file's.
        restored: the file.
        contrast: number of one of its contrasts.
    """
    found = case.contrasts[contrast]
    stored = restored.stored if found.channel is None else restored.stored[..., found.channel]
    values = restored.original.values(case.turn.stack(stored.reshape(case.shape)))
    low, high = found.window
    pixels = np.clip((values - low) / (high - low), 0, 1)
    return torch.from_numpy(np.where(found.mask, pixels, 0).astype(np.float32))
