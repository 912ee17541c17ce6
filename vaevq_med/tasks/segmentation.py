"""A trained segmentation network on whole volumes, on the grid that they are given in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from vaevq_med.codec.geometry import from_squares, margins
from vaevq_med.core.errors import VaevqMedError
from vaevq_med.images.transforms import REGIONS
from vaevq_med.networks.precision import full_precision
from vaevq_med.trained.device import named_device
from vaevq_med.trained.segmenter import StoredSegmenter

_INTERPOLATION = "bilinear"
"""As recipes of slices have it."""


_THRESHOLD = 0.5


def to_masks(probabilities: Tensor) -> Tensor:
    """Where a region is more likely there than not.

    Args:
        probabilities: in [0, 1], any shape, as of :meth:`Segmenter.segment`.

    Returns:
        bool of the same shape; nested where the probabilities are.

    Example:
        >>> to_masks(torch.tensor([0.4, 0.5, 0.6])).tolist()
        [False, False, True]
    """
    return probabilities > _THRESHOLD


class Segmenter:
    """Segments volumes of upright slices; see :func:`load_segmenter`.

    Args:
        stored: the checkpoint.
        device: where it works; None takes the GPU where there is one.
        batch_size: stacks of slices that go through the network at once.

    Attributes:
        contrasts: names of the channels of a volume, in order.
        regions: names of the channels of the result, in order: each contains the next.
        image_size: side of the squares that the network sees, in pixels.

    Raises:
        VaevqMedError: the checkpoint is no segmentation network's, there is no such device, or no batch of that size.
    """

    regions = REGIONS

    def __init__(
        self, stored: StoredSegmenter, *, device: str | torch.device | None = None, batch_size: int = 8
    ) -> None:
        if batch_size < 1:
            raise VaevqMedError(f"--batch-size: found {batch_size}, expected 1 or more")
        self.stored = stored
        self.device = named_device(device)
        self.network = stored.network().to(self.device)
        self.batch_size = batch_size
        self.contrasts = stored.contrasts
        self.image_size = stored.image_size

    @property
    def content_hash(self) -> str:
        """SHA-256 of the network's definition and weights, with the prefix ``sha256:``."""
        return self.stored.content_hash

    @torch.inference_mode()
    def segment(self, volume: Tensor) -> Tensor:
        """The probability of each region at each voxel.

        Slices are padded to squares, resized to :attr:`image_size` and back, as a data set of slices is made, by
        bilinear interpolation with a low-pass filter where they shrink. In 2.5D the first and the last slice stand in
        for neighbors that there are none of; in 3D overlapping runs of slices are averaged.

        Args:
            volume: ``[C, D, H, W]`` in [0, 1]: contrasts in the order of :attr:`contrasts`, upright axial slices from
                below to above along D, each contrast windowed as ``slice-extract`` does, its background 0.

        Returns:
            float32 ``[3, D, H, W]`` in [0, 1] on the CPU, whole tumor, tumor core and enhancing tumor; a region's is
            nowhere above that of the one that contains it, so that a threshold gives nested masks.

        Raises:
            VaevqMedError: the volume has another shape, or no voxel.
        """
        if volume.ndim != 4 or volume.shape[0] != len(self.contrasts) or volume.numel() == 0:
            raise VaevqMedError(
                f"the volume has shape {tuple(volume.shape)}; expected [{len(self.contrasts)}, D, H, W], the contrasts "
                f"{', '.join(self.contrasts)}"
            )
        squares = self._squares(volume.float())  # [D, C, S, S]
        with full_precision(self.device.type, convolutions=True):
            runs = self._middles(squares) if self.network.spatial_dims == 2 else self._runs(squares)
            total = torch.zeros(len(squares), len(self.regions), *squares.shape[2:])
            count = torch.zeros(len(squares), 1, 1, 1)
            for places, found in runs:
                total.index_add_(0, places, found)
                count.index_add_(0, places, torch.ones(len(places), 1, 1, 1))
        nested = (total / count).cummin(dim=1).values
        shape = volume.shape[2:]
        resized = [from_squares(nested[:, region], shape, _INTERPOLATION) for region in range(len(self.regions))]
        return torch.stack(resized).clamp_(0, 1)

    def _squares(self, volume: Tensor) -> Tensor:
        """A volume ``[C, D, H, W]`` in [0, 1] as the network's squares ``[D, C, S, S]`` in [-1, 1]."""
        rows, columns = volume.shape[2:]
        side, top, left = margins(rows, columns)
        slices = F.pad(volume.transpose(0, 1), (left, side - columns - left, top, side - rows - top))
        if side != self.image_size:
            size = (self.image_size, self.image_size)
            slices = F.interpolate(slices, size=size, mode=_INTERPOLATION, antialias=True, align_corners=False)
        return slices.clamp(0, 1) * 2 - 1

    def _middles(self, squares: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Slices' numbers and probabilities ``[n, R, S, S]``, of each as the middle of a stack."""
        depth, last = self.network.depth, len(squares) - 1
        offsets = torch.arange(depth) - depth // 2
        for places in torch.arange(len(squares)).split(self.batch_size):
            stacks = squares[(places[:, None] + offsets).clamp(0, last)]  # [n, d, C, S, S]
            yield places, self._probabilities(stacks)

    def _runs(self, squares: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Slices' numbers and probabilities ``[d, R, S, S]`` of runs that overlap by half."""
        depth, last = self.network.depth, len(squares) - 1
        latest = max(0, len(squares) - depth)
        for start in sorted({*range(0, latest, max(1, depth // 2)), latest}):
            places = torch.arange(start, start + depth)
            found = self._probabilities(squares[places.clamp(0, last)][None])[0].transpose(0, 1)  # [d, R, S, S]
            inside = places <= last
            yield places[inside], found[inside]

    def _probabilities(self, stacks: Tensor) -> Tensor:
        """Probabilities on the CPU of stacks ``[n, d, C, S, S]``."""
        return self.network(stacks.transpose(1, 2).contiguous().to(self.device)).sigmoid().float().cpu()


def load_segmenter(path: str | Path, device: str | torch.device | None = None, *, batch_size: int = 8) -> Segmenter:
    """A segmentation network of ``bundles/segmentation``, ready for volumes.

    Args:
        path: checkpoint written by its training, e.g. ``outputs/segmentation/checkpoints/best.pt``.
        device: where it works; None takes the GPU where there is one.
        batch_size: stacks of slices that go through the network at once.

    Raises:
        VaevqMedError: there is no such checkpoint, or it is another network's, or there is no such device.
    """
    return Segmenter(StoredSegmenter(path), device=device, batch_size=batch_size)
