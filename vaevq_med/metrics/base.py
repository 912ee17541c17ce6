"""What a metric of single images is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from vaevq_med.metrics.figures import Figure


class ImageMetric(ABC):
    """A figure of each image against its original; an evaluation reports its mean.

    A bundle's ``evaluate.json`` names metrics in ``metrics``. What the table of a comparison shows of one is its
    :attr:`figure`.
    """

    figure: ClassVar[Figure]

    @abstractmethod
    def per_image(self, target: Tensor, reconstruction: Tensor) -> Tensor:
        """The figure of each image, ``[B]``; NaN leaves an image out of the mean.

        Args:
            target: originals, ``[B, C, H, W]`` in [0, 1].
            reconstruction: of the same shape.
        """

    def measure(self, target: Tensor, reconstruction: Tensor, regions: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """By name the figures ``[B]`` of whole images, and ``NAME_REGION`` where the metric has one of a region.

        Another ``NAME_PART``, of a part of the image that is no region, has its mean in the summary beside NAME's.

        Args:
            target: as for :meth:`per_image`.
            reconstruction: as for :meth:`per_image`.
            regions: masks by name, bool ``[B, H, W]``.
        """
        return {self.figure.name: self.per_image(target, reconstruction)}
