"""How near what came back is to the original: PSNR and SSIM over the foreground, in the intensity window."""

from __future__ import annotations

import torch
from numpy.typing import NDArray
from torch import Tensor

from vaevq_med.metrics.reconstruction import MAX_PSNR, ssim_per_image


def brain_psnr(original: Tensor, result: Tensor, mask: Tensor) -> float:
    """PSNR of a volume over its foreground in dB, range 1, at most 100.

    Args:
        original: ``[N, rows, columns]`` in [0, 1].
        result: of the same shape.
        mask: bool, likewise.
    """
    error = (original[mask].double() - result[mask].double()).square().mean()
    return float((-10 * torch.log10(error)).clamp(max=MAX_PSNR))


def brain_ssim(original: Tensor, result: Tensor, mask: Tensor) -> float:
    """Mean over the foreground of the SSIM map of a volume's slices, see :mod:`vaevq_med.metrics.reconstruction`.

    Args:
        original: ``[N, rows, columns]`` in [0, 1], at least 11 pixels along each axis of a slice.
        result: of the same shape.
        mask: bool, likewise.
    """
    total, count = 0.0, 0
    for number in torch.nonzero(mask.flatten(1).any(1))[:, 0].tolist():
        pixels = ssim_per_image(result[number][None, None], original[number][None, None])[1][0]
        total += float(pixels[mask[number]].double().sum())
        count += int(mask[number].sum())
    return total / count


def compare(original: Tensor, result: Tensor, mask: NDArray) -> dict[str, float]:
    """Both, rounded for a report.

    Args:
        original: ``[N, rows, columns]`` in [0, 1].
        result: of the same shape.
        mask: bool, likewise.
    """
    inside = torch.from_numpy(mask)
    figures = {"psnr_foreground": round(brain_psnr(original, result, inside), 4)}
    if min(original.shape[1:]) >= 11:
        figures["ssim_foreground"] = round(brain_ssim(original, result, inside), 5)
    return figures
