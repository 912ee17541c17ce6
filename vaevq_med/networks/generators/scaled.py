"""Latents as a diffusion model sees them: multiplied by a factor that was measured on the training data."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.generators.ddim import NoisePredictor


class ScaledPredictor(NoisePredictor):
    """A predictor over latents times ``1 / std`` of the training latents.

    Attributes:
        scale_factor: that factor, part of the network's state; NaN before it is measured.
    """

    scale_factor: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale_factor", torch.tensor(math.nan))
        self._read: tuple[Tensor | None, int | None, float] = (None, None, math.nan)

    def prepare(self, values: Callable[[], Tensor]) -> None:
        """Measure the scale factor."""
        self.set_scale_factor(values())

    def set_scale_factor(self, latents: Tensor) -> float:
        """Measure what latents are multiplied by before diffusion, ``1 / std`` of some of them (Sec. 4.3.2 there).

        It is kept in the network's state, since samples are divided by it before they are decoded.

        Args:
            latents: ``[B, D, h, w]`` of the training split; the deviation is over all their elements.

        Raises:
            VaevqMedError: they have no spread, or are not finite.
        """
        std = float(latents.double().std())
        if not (math.isfinite(std) and std > 0):
            raise VaevqMedError(f"the latents have the standard deviation {std}; expected a finite one above 0")
        self.scale_factor.fill_(1 / std)
        return 1 / std

    def measured_scale_factor(self) -> float:
        """The factor that was measured.

        Raises:
            VaevqMedError: none was, or it is not above 0.
        """
        # Read again only where it was written: to read it makes the host wait for a device.
        version = None if self.scale_factor.is_inference() else self.scale_factor._version
        known, known_version, factor = self._read
        if known is not self.scale_factor or known_version != version or version is None:
            factor = float(self.scale_factor)
            self._read = self.scale_factor, version, factor
        if not (math.isfinite(factor) and factor > 0):
            found = "no scale factor" if math.isnan(factor) else f"the scale factor {factor:g}"
            raise VaevqMedError(f"found {found}; expected one measured in training, above 0")
        return factor
