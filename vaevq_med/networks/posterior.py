"""The encoder's diagonal Gaussian posterior (VLQ of VAEVQ, arXiv 2511.06863; Kingma & Welling, 1312.6114)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

MIN_LOGVAR, MAX_LOGVAR = -30.0, 20.0


def kl_per_token(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, exp(logvar)) || N(0, I)) of each position, summed over D: ``[B, *grid]``, in nats.

    Args:
        mean: ``[B, D, *grid]``.
        logvar: log variance, of the same shape.
    """
    mean, logvar = mean.float(), logvar.float()
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(dim=1)


@dataclass(frozen=True)
class DiagonalGaussian:
    """q(z|x) = N(mean, diag(exp(logvar))), held in fp32 also under autocast.

    Args:
        mean: ``[B, D, *grid]``.
        logvar: log variance, ``[B, D, *grid]``; clamped to [-30, 20], the range outside which no gradient flows.

    Attributes:
        std: standard deviation ``exp(logvar / 2)``, ``[B, D, *grid]``.

    >>> posterior = DiagonalGaussian(torch.zeros(1, 2, 1, 1), torch.zeros(1, 2, 1, 1))
    >>> posterior.kl().item(), posterior.std.flatten().tolist()
    (0.0, [1.0, 1.0])
    """

    mean: Tensor
    logvar: Tensor
    std: Tensor = field(init=False)

    def __post_init__(self) -> None:
        logvar = self.logvar.float().clamp(MIN_LOGVAR, MAX_LOGVAR)
        object.__setattr__(self, "mean", self.mean.float())
        object.__setattr__(self, "logvar", logvar)
        object.__setattr__(self, "std", torch.exp(0.5 * logvar))

    def mode(self) -> Tensor:
        """The most probable latent, which is the mean: ``[B, D, *grid]``."""
        return self.mean

    def sample(self, generator: torch.Generator | None = None, noise: Tensor | None = None) -> Tensor:
        """A reparameterized sample, mean + std * noise: ``[B, D, *grid]``.

        Args:
            generator: source of the noise, on the posterior's device; the global one when absent.
            noise: standard normal numbers ``[B, D, *grid]`` to use instead.
        """
        if noise is None:
            noise = torch.randn(self.mean.shape, generator=generator, device=self.mean.device, dtype=self.mean.dtype)
        return self.mean + self.std * noise

    def kl(self) -> Tensor:
        """KL(q || N(0, I)) of each latent position, summed over D: ``[B, *grid]``, in nats."""
        return kl_per_token(self.mean, self.logvar)
