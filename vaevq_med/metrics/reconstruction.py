"""Per-image PSNR and SSIM, over whole images and inside regions.

Conventions: images in [0, 1]; both sides rounded to 256 levels first, as published work does; PSNR with range 1,
a mean over images of the images' own values, capped at 100 dB for identical ones; SSIM (Wang et al., 2004) with a
Gaussian window of 11 pixels and sigma 1.5, range 1, over all pixels with the image mirrored at its border, as
torchmetrics has it (scikit-image leaves out the five outermost pixels, which on a dark border gives another figure).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from vaevq_med.metrics import figures
from vaevq_med.metrics.base import ImageMetric
from vaevq_med.networks.precision import full_precision

MAX_PSNR = 100.0


def to_unit(images: Tensor, *, uint8: bool = True) -> Tensor:
    """Images in [-1, 1] to [0, 1]: clamped and, by default, rounded to the nearest of 256 levels.

    Args:
        images: ``[B, C, H, W]``.
        uint8: whether to round.
    """
    unit = (images.float().clamp(-1, 1) + 1) / 2
    return (unit * 255).round() / 255 if uint8 else unit


def psnr_per_image(prediction: Tensor, target: Tensor) -> Tensor:
    """PSNR of each image in dB, ``[B]``, at most 100.

    Args:
        prediction: ``[B, C, H, W]`` in [0, 1].
        target: of the same shape.
    """
    return _decibels((prediction - target).square().mean(dim=(1, 2, 3)))


def _decibels(error: Tensor) -> Tensor:
    """PSNR of mean squared errors; what is NaN stays so.

    torchmetrics' own copies sizes to the device in each call, which the host waits for.
    """
    return (-10 * torch.log10(error)).clamp(max=MAX_PSNR)


def ssim_per_image(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """SSIM of each image, ``[B]``, and its map averaged over channels, ``[B, H, W]``.

    Args:
        prediction: ``[B, C, H, W]`` in [0, 1], H and W at least 11.
        target: of the same shape.
    """
    # Its variances are differences of nearly equal means: of TF32's three digits nothing would be left.
    with full_precision(prediction.device.type, convolutions=True):
        value, full = structural_similarity_index_measure(
            prediction, target, data_range=1.0, reduction="none", return_full_image=True
        )
    return value, full.mean(dim=1)


def region_psnr(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """PSNR over the pixels of a region, ``[B]``; NaN where the region is empty.

    Args:
        prediction: ``[B, C, H, W]`` in [0, 1].
        target: of the same shape.
        mask: bool ``[B, H, W]``.
    """
    return _decibels(region_mean((prediction - target).square().mean(dim=1), mask))


def region_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of ``[B, H, W]`` over a region, ``[B]``; NaN where the region is empty."""
    weight = mask.to(values)
    return (values * weight).sum(dim=(1, 2)) / weight.sum(dim=(1, 2))


class PSNR(ImageMetric):
    """PSNR, of images and of regions."""

    figure = figures.PSNR

    def per_image(self, target: Tensor, reconstruction: Tensor) -> Tensor:
        """In dB, ``[B]``."""
        return psnr_per_image(reconstruction, target)

    def measure(self, target: Tensor, reconstruction: Tensor, regions: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of images, and over the pixels of each region."""
        of_regions = {f"psnr_{name}": region_psnr(reconstruction, target, mask) for name, mask in regions.items()}
        return {"psnr": self.per_image(target, reconstruction), **of_regions}


class SSIM(ImageMetric):
    """SSIM of images, and the mean of its map over regions."""

    figure = figures.SSIM

    def per_image(self, target: Tensor, reconstruction: Tensor) -> Tensor:
        """In [-1, 1], ``[B]``."""
        return ssim_per_image(reconstruction, target)[0]

    def measure(self, target: Tensor, reconstruction: Tensor, regions: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of images, and of each region by the same map."""
        value, pixels = ssim_per_image(reconstruction, target)  # pixels: [B, H, W]
        return {"ssim": value, **{f"ssim_{name}": region_mean(pixels, mask) for name, mask in regions.items()}}
