"""Codecs of still images through imagecodecs: each slice a file of its own, or all slices in one mosaic.

JPEG 2000 by OpenJPEG, JPEG XL by libjxl, JPEG-LS by CharLS, JPEG by libjpeg-turbo.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vaevq_med.codec.classical.base import ClassicalCodec, Volume

Coding = Callable[[Any, Any, int, float], bytes]
"""The module, an image ``[Y, X]``, its bits a sample and the setting, to a file."""


@dataclass(frozen=True, kw_only=True)
class SliceCodec(ClassicalCodec):
    """A file a slice.

    Attributes:
        coding: a slice to its file.
        decoding: name of the function that reads it.
    """

    coding: Coding
    decoding: str
    packages: tuple[str, ...] = ("imagecodecs",)
    slices_alone: bool = True

    def _encode(self, volume: Volume, bits: int, setting: float) -> list[bytes]:
        library = self._load("imagecodecs")
        return [bytes(self.coding(library, slice_, bits, setting)) for slice_ in volume]

    def _decode(self, files: Sequence[bytes], shape: tuple[int, int, int], bits: int) -> Volume:
        decode = getattr(self._load("imagecodecs"), self.decoding)
        return np.stack([decode(file).reshape(shape[1:]) for file in files])


@dataclass(frozen=True, kw_only=True)
class MosaicCodec(SliceCodec):
    """All slices side by side in one image, nearly square, so that headers and tables are paid for once."""

    def _encode(self, volume: Volume, bits: int, setting: float) -> list[bytes]:
        count, rows, columns = volume.shape
        across = math.ceil(math.sqrt(count))
        down = math.ceil(count / across)
        padded = np.zeros((down * across, rows, columns), volume.dtype)
        padded[:count] = volume
        # [down, across, Y, X] -> [down, Y, across, X] -> one image
        mosaic = padded.reshape(down, across, rows, columns).swapaxes(1, 2).reshape(down * rows, across * columns)
        return [bytes(self.coding(self._load("imagecodecs"), np.ascontiguousarray(mosaic), bits, setting))]

    def _decode(self, files: Sequence[bytes], shape: tuple[int, int, int], bits: int) -> Volume:
        count, rows, columns = shape
        across = math.ceil(math.sqrt(count))
        down = math.ceil(count / across)
        mosaic = getattr(self._load("imagecodecs"), self.decoding)(files[0])
        tiles = mosaic.reshape(down, rows, across, columns).swapaxes(1, 2).reshape(-1, rows, columns)
        return tiles[:count]


def _jpeg2000(library: Any, image: Any, bits: int, setting: float) -> bytes:
    """The bare code stream; its quality is a PSNR in dB, and 0 is without loss."""
    shared = {"codecformat": "j2k", "numthreads": 1, "bitspersample": bits}
    if setting == 0:
        return library.jpeg2k_encode(image, reversible=True, **shared)
    return library.jpeg2k_encode(image, level=setting, reversible=False, **shared)


def _jpegxl(library: Any, image: Any, bits: int, setting: float) -> bytes:
    """The bare code stream; the setting is libjxl's distance."""
    shared = {"usecontainer": False, "numthreads": 1, "effort": 7, "bitspersample": bits}
    if setting == 0:
        return library.jpegxl_encode(image, lossless=True, **shared)
    return library.jpegxl_encode(image, lossless=False, distance=setting, **shared)


CODECS = (
    SliceCodec(
        name="jpeg2000",
        title="JPEG 2000, slices",
        coding=_jpeg2000,
        decoding="jpeg2k_decode",
        depths=(8, 10, 12, 16),
        setting="PSNR (dB)",
        settings=(24, 28, 33, 38),
        range=(1, 120),
        lossless=0,
    ),
    SliceCodec(
        name="jpegxl",
        title="JPEG XL, slices",
        coding=_jpegxl,
        decoding="jpegxl_decode",
        depths=(8, 10, 12, 16),
        setting="distance",
        settings=(20, 10, 5),
        range=(0.01, 25),
        lossless=0,
    ),
    SliceCodec(
        name="jpegls",
        title="JPEG-LS, slices",
        coding=lambda library, image, bits, setting: library.jpegls_encode(image, level=int(setting)),
        decoding="jpegls_decode",
        # imagecodecs writes whatever has more than 8 bits as 16, where the standard's largest error is 255 of 65,535.
        depths=(8,),
        setting="near",
        settings=(60, 30, 12),
        range=(0, 127),
        whole=True,
        lossless=0,
    ),
    MosaicCodec(
        name="jpeg",
        title="JPEG, one mosaic",
        coding=lambda library, image, bits, setting: library.jpeg8_encode(image, level=int(setting), optimize=True),
        decoding="jpeg8_decode",
        depths=(8,),
        setting="quality",
        settings=(1, 5, 14, 36),
        range=(1, 100),
        whole=True,
    ),
)
