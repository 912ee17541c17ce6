"""Whole volumes judged against their originals: in the brain, in the tumor, to a network's eye, and along z."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from vaevq_med.core.picks import evenly_spaced
from vaevq_med.metrics.figures import Figure
from vaevq_med.metrics.reconstruction import MAX_PSNR
from vaevq_med.networks.features import FeatureNetwork

FIGURES = (
    Figure(
        "psnr_brain",
        "PSNR, brain (dB)",
        2,
        higher_is_better=True,
        convention="over the foreground's voxels, range 1, at most 100 dB",
    ),
    Figure(
        "psnr_tumor", "PSNR, tumor (dB)", 2, higher_is_better=True, convention="over the voxels that are labeled tumor"
    ),
    Figure(
        "ssim",
        "SSIM",
        4,
        higher_is_better=True,
        convention="of whole slices with content, a mean over their pixels; Gaussian window 11, sigma 1.5, range 1",
    ),
    Figure(
        "ssim_brain",
        "SSIM, brain",
        4,
        higher_is_better=True,
        convention="mean of that map over the foreground's voxels",
    ),
    Figure(
        "ssim_tumor", "SSIM, tumor", 4, higher_is_better=True, convention="mean of that map over the tumor's voxels"
    ),
    Figure(
        "perceptual",
        "LPIPS-style",
        4,
        higher_is_better=False,
        convention="distance of unit-length features, of evenly spaced slices with content",
    ),
    Figure(
        "flicker",
        "Flicker along z",
        4,
        higher_is_better=False,
        convention="mean absolute difference of neighboring slices' difference, original against result, in the brain",
    ),
)
"""What is measured of a volume, in the order of tables."""
_SLICES = 16
_WINDOW, _SIGMA = 11, 1.5


@dataclass(frozen=True)
class Judgment:
    """What was measured of a result.

    Attributes:
        figures: those of :data:`FIGURES` that there are.
        pooled: the network's feature vectors of the slices that it looked at, ``[N, F]``; None without a network.
    """

    figures: dict[str, float]
    pooled: Tensor | None


@dataclass(frozen=True)
class _Seen:
    """What a network made of some slices.

    Attributes:
        layers: feature maps, a few slices at a time.
        pooled: feature vectors, ``[N, F]``.
    """

    layers: Sequence[list[Tensor]]
    pooled: Tensor


class VolumeJudge:
    """Measures results against one original, whose features are computed once.

    Args:
        unit: the original, ``[Z, Y, X]`` in [0, 1].
        brain: its foreground, bool ``[Z, Y, X]``.
        tumor: a region of it, or None.
        network: of the perceptual distance, or None.
        slices: with content, evenly spaced, of which SSIM is; None takes all.
        seen: likewise, that the network looks at.
    """

    def __init__(
        self,
        unit: NDArray[np.float32],
        brain: NDArray[np.bool_],
        tumor: NDArray[np.bool_] | None = None,
        *,
        network: FeatureNetwork | None = None,
        slices: int | None = None,
        seen: int | None = None,
    ) -> None:
        self.unit, self.brain, self.tumor = unit, brain, tumor
        self.network = network
        live = np.flatnonzero(brain.any(axis=(1, 2)))
        self._slices = live[evenly_spaced(len(live), slices)]
        self._seen = live[evenly_spaced(len(live), seen)]
        self._box = _box(brain)
        self._structure = _Structure(torch.from_numpy(unit[self._slices]))
        self._features = None if network is None else self._look(network, unit)

    def figures(self, result: NDArray[np.float32]) -> dict[str, float]:
        """Those of :data:`FIGURES` that there are, of a result ``[Z, Y, X]`` in [0, 1]."""
        return self.judge(result).figures

    @torch.inference_mode()
    def judge(self, result: NDArray[np.float32]) -> Judgment:
        """Its figures, and what the network saw of it.

        Args:
            result: ``[Z, Y, X]`` in [0, 1]; slices that are the original's are not passed through the network again.
        """
        error, brain = result[self._box] - self.unit[self._box], self.brain[self._box]
        found = {"psnr_brain": _decibels(error[brain])}
        if self.tumor is not None:
            found["psnr_tumor"] = _decibels((result - self.unit)[self.tumor])
        found |= self._ssim(result)
        pooled = None
        if self.network is not None and self._features is not None:
            same = np.array_equal(result[self._seen], self.unit[self._seen])
            seen = self._features if same else self._look(self.network, result)
            pairs = zip(seen.layers, self._features.layers, strict=True)
            distances = [self.network.distance_of(mine, own, len(mine[0])) for mine, own in pairs]
            found["perceptual"], pooled = float(torch.cat(distances).mean()), seen.pooled
        both = brain[1:] & brain[:-1]
        found["flicker"] = float(np.abs(np.diff(error, axis=0)[both]).mean())
        return Judgment(found, pooled)

    def _ssim(self, result: NDArray[np.float32]) -> dict[str, float]:
        pixels = self._structure.similarity(torch.from_numpy(result[self._slices])).numpy()  # [N, Y, X]
        found = {"ssim": float(pixels.mean()), "ssim_brain": float(pixels[self.brain[self._slices]].mean())}
        if self.tumor is not None and self.tumor[self._slices].any():
            found["ssim_tumor"] = float(pixels[self.tumor[self._slices]].mean())
        return found

    @torch.inference_mode()
    def _look(self, network: FeatureNetwork, volume: NDArray[np.float32]) -> _Seen:
        """Features of the slices that are looked at, a few at a time."""
        images = torch.from_numpy(volume[self._seen])[:, None] * 2 - 1  # [N, 1, Y, X]
        found = [network.layers_and_pooled(part) for part in images.split(8)]
        return _Seen([layers for layers, _ in found], torch.cat([pooled for _, pooled in found]))


def _box(mask: NDArray[np.bool_]) -> tuple[slice, ...]:
    """The smallest box around a mask that is not empty."""
    ends = [np.flatnonzero(mask.any(axis=tuple(a for a in range(3) if a != axis)))[[0, -1]] for axis in range(3)]
    return tuple(slice(int(first), int(last) + 1) for first, last in ends)


class _Structure:
    """SSIM of slices as :func:`vaevq_med.metrics.reconstruction.ssim_per_image` has it, the original's moments kept.

    Its window is a product of two, so that rows and columns are averaged in turn: a tenth of the time that the square
    window takes, which counts over thousands of volumes.

    Args:
        target: originals, ``[N, Y, X]`` in [0, 1].
    """

    def __init__(self, target: Tensor) -> None:
        places = torch.arange(_WINDOW) - _WINDOW // 2
        window = torch.exp(-(places / _SIGMA).square() / 2)
        self._window = window / window.sum()
        self.target = target
        self._mean = self._averaged(target)
        self._square = self._averaged(target.square())

    def _averaged(self, values: Tensor) -> Tensor:
        """The Gaussian average around each pixel of ``[N, Y, X]``, mirrored at the border."""
        reach, window, done = _WINDOW // 2, self._window, []
        for part in values.split(_SLICES):
            padded = F.pad(part[:, None], (reach, reach, reach, reach), mode="reflect")
            rows = F.conv2d(padded, window.view(1, 1, -1, 1))
            done.append(F.conv2d(rows, window.view(1, 1, 1, -1))[:, 0])
        return torch.cat(done)

    def similarity(self, result: Tensor) -> Tensor:
        """The map of ``[N, Y, X]``."""
        mean, own = self._averaged(result), self._mean
        square, cross = self._averaged(result.square()), self._averaged(result * self.target)
        spread = (square - mean.square()).clamp_min(0) + (self._square - own.square()).clamp_min(0)
        first, second = 0.01**2, 0.03**2
        light = (2 * mean * own + first) / (mean.square() + own.square() + first)
        return light * (2 * (cross - mean * own) + second) / (spread + second)


def _decibels(error: NDArray[np.float32]) -> float:
    square = float(np.square(error).mean(dtype=np.float64))
    return MAX_PSNR if square <= 0 else min(MAX_PSNR, -10 * float(np.log10(square)))
