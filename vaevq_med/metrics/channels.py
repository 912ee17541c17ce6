"""How many channels of a variational latent say something of the image."""

from __future__ import annotations

import torch
from torch import Tensor

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.processes import objects_of_each_process

THRESHOLD = 0.01


def active_channels(of_means: Tensor, threshold: float | Tensor = THRESHOLD) -> int:
    """Channels whose posterior mean varies over the data by more than a threshold.

    With the variances of the means these are the active units of Burda et al. (arXiv 1509.00519, Sec. 5.1):
    ``Cov_x(E[u|x]) > 0.01``. Where the aggregate follows N(0, I), the others say next to nothing of the image.

    Args:
        of_means: variance of each channel, ``[D]``.
        threshold: one for all, or one for each channel.

    Example:
        >>> active_channels(torch.tensor([0.9, 0.02, 0.001, 0.0]))
        2
    """
    return int((of_means > threshold).sum())


class ChannelActivity:
    """Variances of each channel over images and positions, of posterior means and within posteriors, as a stream.

    Sums are kept in float64, so that a mean far from 0 costs no digits.

    Example:
        >>> activity = ChannelActivity()
        >>> activity.update(torch.tensor([-1.0, 1.0]).view(2, 1, 1), torch.full((2, 1, 1), 0.5))
        >>> activity.of_means().tolist(), activity.within().tolist()
        ([1.0], [0.25])
    """

    def __init__(self) -> None:
        self.sums: Tensor | None = None

    def update(self, mean: Tensor, std: Tensor) -> None:
        """Take in posteriors.

        Args:
            mean: ``[B, D, *grid]``.
            std: of the same shape.

        Raises:
            VaevqMedError: for another number of channels than before, or two shapes that differ.
        """
        if mean.shape != std.shape or (self.sums is not None and mean.shape[1] != self.sums.shape[1]):
            before = "" if self.sums is None else f" of {self.sums.shape[1]} channels"
            raise VaevqMedError(
                f"found means {tuple(mean.shape)} and deviations {tuple(std.shape)}, expected one shape{before}"
            )
        mean, std = (values.double().transpose(0, 1).flatten(1) for values in (mean, std))  # [D, N]
        counts = mean.new_full((len(mean),), mean.shape[1])
        own = torch.stack([mean.sum(dim=1), mean.square().sum(dim=1), std.square().sum(dim=1), counts])
        self.sums = own if self.sums is None else self.sums + own

    def reduce(self) -> None:
        """Add up what all processes saw; one that saw nothing need not know the number of channels."""
        parts = objects_of_each_process(None if self.sums is None else self.sums.cpu())
        found = [part for part in parts if part is not None]
        self.sums = torch.stack(found).sum(dim=0) if found else None

    def of_means(self) -> Tensor:
        """Variance of the posterior means, ``[D]``."""
        total, squares, _, count = self._sums()
        return (squares / count - (total / count).square()).clamp_min(0)

    def within(self) -> Tensor:
        """Mean variance of the posteriors, ``[D]``; with :meth:`of_means` it adds up to the aggregate's variance."""
        _, _, within, count = self._sums()
        return within / count

    def figures(self) -> dict[str, float]:
        """By name the counts of active channels, empty where nothing was seen.

        ``active_channels`` is by the variance of the means; ``active_channels_relative`` by its share of the
        aggregate's variance, which is the same where the aggregate follows N(0, I), and does not depend on the scale
        of a channel, which an empirical prior leaves free.
        """
        if self.sums is None:
            return {}
        of_means = self.of_means()
        return {
            "active_channels": float(active_channels(of_means)),
            "active_channels_relative": float(active_channels(of_means, THRESHOLD * (of_means + self.within()))),
        }

    def _sums(self) -> Tensor:
        if self.sums is None:
            raise VaevqMedError("found no posteriors, expected some before their variance is asked for")
        return self.sums
