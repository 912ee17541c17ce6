"""How many channels of a latent say something of the image."""

from __future__ import annotations

import torch
from torch import Tensor

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.processes import objects_of_each_process

THRESHOLD = 0.01

# Share of a channel's mean square below which its variance is rounding of fp32.
_ROUNDING = 1e-12


def active_channels(of_means: Tensor, threshold: float | Tensor = THRESHOLD) -> int:
    """Channels whose posterior mean, or whose latent, varies over the data by more than a threshold.

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
    """Variances of each channel over images and positions as a stream: of posterior means, or of what is quantized.

    Posteriors have a variance within them besides.

    Sums are kept in float64, so that a mean far from 0 costs no digits.

    Example:
        >>> activity = ChannelActivity()
        >>> activity.update(torch.tensor([-1.0, 1.0]).view(2, 1, 1), torch.full((2, 1, 1), 0.5))
        >>> activity.of_means().tolist(), activity.within().tolist()
        ([1.0], [0.25])
    """

    def __init__(self) -> None:
        self.sums: Tensor | None = None

    def update(self, mean: Tensor, std: Tensor | None = None) -> None:
        """Take in posteriors, or latents without one.

        Args:
            mean: ``[B, D, *grid]``.
            std: of the same shape; None where there is no posterior.

        Raises:
            VaevqMedError: for another number of channels than before, two shapes that differ, or latents with a
                posterior beside latents without.
        """
        if std is not None and mean.shape != std.shape:
            raise VaevqMedError(
                f"found means {tuple(mean.shape)} and deviations {tuple(std.shape)}, expected one shape"
            )
        values = _channels(mean)
        rows = [torch.ones_like(values), values, values.square(), *([] if std is None else [_channels(std).square()])]
        own = torch.stack([row.sum(dim=1) for row in rows])
        if self.sums is not None and own.shape != self.sums.shape:
            raise VaevqMedError(f"found {_words(own)}, expected {_words(self.sums)}")
        self.sums = own if self.sums is None else self.sums + own

    def reduce(self) -> None:
        """Add up what all processes saw; one that saw nothing need not know the number of channels."""
        parts = objects_of_each_process(None if self.sums is None else self.sums.cpu())
        found = [part for part in parts if part is not None]
        self.sums = torch.stack(found).sum(dim=0) if found else None

    def of_means(self) -> Tensor:
        """Variance of the posterior means, or of the latent where there is no posterior, ``[D]``."""
        count, total, squares = self._sums()[:3]
        return (squares / count - (total / count).square()).clamp_min(0)

    def within(self) -> Tensor:
        """Mean variance of the posteriors, ``[D]``; with :meth:`of_means` it adds up to the aggregate's variance.

        Raises:
            VaevqMedError: there are no posteriors.
        """
        sums = self._sums()
        if not _of_posteriors(sums):
            raise VaevqMedError(f"found {_words(sums)}, expected posteriors, whose variance is asked for")
        return sums[3] / sums[0]

    def figures(self) -> dict[str, float]:
        """By name the counts of active channels, empty where nothing was seen.

        ``active_channels`` is by the variance of the means; ``active_channels_relative`` by its share of the
        aggregate's variance, which is the same where the aggregate follows N(0, I), and does not depend on the scale
        of a channel, which an empirical prior leaves free.

        A latent without a posterior has no unit that 0.01 could be stated in, and no variance within. So it has
        ``active_channels_relative`` alone: the channels with more than 0.01 of its mean channel's variance, as the
        aggregate's total is D channels' worth. Not of the total itself: of a latent of more than 100 channels that
        all vary alike, none would have 0.01 of that.
        """
        if self.sums is None:
            return {}
        of_means = self.of_means()
        if not _of_posteriors(self.sums):
            count, _, squares = self.sums
            least = (THRESHOLD * of_means.mean()).maximum(_ROUNDING * squares / count)
            return {"active_channels_relative": float(active_channels(of_means, least))}
        return {
            "active_channels": float(active_channels(of_means)),
            "active_channels_relative": float(active_channels(of_means, THRESHOLD * (of_means + self.within()))),
        }

    def _sums(self) -> Tensor:
        if self.sums is None:
            raise VaevqMedError("found no latents, expected some before their variance is asked for")
        return self.sums


def _channels(values: Tensor) -> Tensor:
    """``[B, D, *grid]`` as float64 ``[D, N]``."""
    return values.double().transpose(0, 1).flatten(1)


def _of_posteriors(sums: Tensor) -> bool:
    """Whether sums have a row of what is within posteriors."""
    return len(sums) == 4


def _words(sums: Tensor) -> str:
    return f"{'posteriors' if _of_posteriors(sums) else 'latents without a posterior'} of {sums.shape[1]} channels"
