"""Dice of label maps that a tokenizer gives back: images whose channels are masks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vaevq_med.metrics.base import ImageMetric
from vaevq_med.metrics.figures import Figure


class LabelDice(ImageMetric):
    """Dice of masks at half of the range: of all channels together, and ``dice_channel0`` and so on of each.

    ``2 |P and R| / (|P| + |R|)``; NaN, which leaves an image out of the mean, where both are empty.
    """

    figure = Figure(
        "dice",
        "Dice",
        4,
        higher_is_better=True,
        convention="of label maps at half of the range, all channels together; images without a label left out",
    )

    def per_image(self, target: Tensor, reconstruction: Tensor) -> Tensor:
        """In [0, 1], ``[B]``."""
        return _dice(target.flatten(1) > 0.5, reconstruction.flatten(1) > 0.5)

    def measure(self, target: Tensor, reconstruction: Tensor, regions: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of all channels, and of each; regions are not looked at."""
        of_channels = {
            f"dice_channel{channel}": self.per_image(target[:, channel], reconstruction[:, channel])
            for channel in range(target.shape[1])
        }
        return {"dice": self.per_image(target, reconstruction), **of_channels}


def _dice(reference: Tensor, prediction: Tensor) -> Tensor:
    """Of masks ``[B, N]``; 0 / 0 is NaN."""
    common = torch.logical_and(reference, prediction).sum(1, dtype=torch.float32)
    return 2 * common / (reference.sum(1, dtype=torch.float32) + prediction.sum(1, dtype=torch.float32))
