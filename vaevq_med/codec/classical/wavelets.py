"""SPERR, wavelets in three dimensions (Li et al. 2023, doi:10.1109/IPDPS54959.2023.00104), through imagecodecs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vaevq_med.codec.classical.base import ClassicalCodec, Volume


@dataclass(frozen=True, kw_only=True)
class Sperr(ClassicalCodec):
    """The volume as one file, at a PSNR in dB of its numbers."""

    packages: tuple[str, ...] = ("imagecodecs",)
    slices_alone: bool = False

    def _encode(self, volume: Volume, bits: int, setting: float) -> list[bytes]:
        library = self._load("imagecodecs")
        return [bytes(library.sperr_encode(volume.astype(np.float32), setting, mode="psnr", numthreads=1))]

    def _decode(self, files: Sequence[bytes], shape: tuple[int, int, int], bits: int) -> Volume:
        found = self._load("imagecodecs").sperr_decode(files[0], numthreads=1)
        top = 2**bits - 1
        return np.clip(np.rint(found), 0, top).astype(np.uint8 if bits <= 8 else np.uint16).reshape(shape)


CODECS = (
    Sperr(
        name="sperr",
        title="SPERR, 3D wavelets",
        depths=(8, 10, 12, 16),
        setting="PSNR (dB)",
        settings=(10, 15, 21, 28, 34),
        range=(0.1, 150),
    ),
)
