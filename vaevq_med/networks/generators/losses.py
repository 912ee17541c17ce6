"""What a generator minimizes on a batch of a token store, as modules that ``DistributedDataParallel`` can wrap."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from monai.networks.schedulers import Scheduler
from torch import Tensor, nn

from vaevq_med.networks.generators.denoising import DenoisingLoss
from vaevq_med.networks.generators.latent_diffusion import LatentDiffusionUNet
from vaevq_med.networks.generators.llamagen import LlamaGen


class GeneratorLoss(nn.Module, ABC):
    """A scalar of a batch of indices or latents and its labels; it shares the network's parameters.

    Attributes:
        key: of the values in an item of a ``TokenDataset``, which is also what they are called there.
    """

    key: ClassVar[str]

    @abstractmethod
    def forward(self, values: Tensor, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The mean loss.

        Args:
            values: indices ``[B, *grid, G]`` or latents ``[B, D, *grid]``.
            labels: ``[B]``.
            generator: of the draws; the global one when absent.
        """

    def figures(self, loss: float) -> dict[str, float]:
        """What is reported of a split over which the mean loss is ``loss``."""
        return {"loss": loss}


class TokenLoss(GeneratorLoss):
    """Cross-entropy of :class:`LlamaGen` in nats a token, see :meth:`LlamaGen.loss`.

    Args:
        network: in training mode it drops labels.

    Example:
        >>> network = LlamaGen(num_embeddings=8, grid_size=2, width=8, depth=1, num_heads=2)
        >>> loss = TokenLoss(network=network)(torch.zeros(1, 2, 2, 1, dtype=torch.int64), torch.tensor([0]))
        >>> round(loss.exp().item(), 4)
        8.0
    """

    key = "indices"

    def __init__(self, *, network: LlamaGen) -> None:
        super().__init__()
        self.network = network

    def forward(self, values: Tensor, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The mean over all tokens; arguments as for :class:`GeneratorLoss`."""
        return self.network.loss(values, labels, generator=generator)

    def figures(self, loss: float) -> dict[str, float]:
        """The loss, and the perplexity of a token, ``exp(loss)``: K where nothing has been learned."""
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}


class LatentLoss(GeneratorLoss):
    """The denoising loss of :class:`LatentDiffusionUNet`; labels are dropped in training mode only.

    Args:
        network: with its scale factor measured.
        scheduler: noise schedule.
        label_dropout: share of the labels that give way to the null class.
    """

    key = "latent"

    def __init__(self, *, network: LatentDiffusionUNet, scheduler: Scheduler, label_dropout: float = 0.1) -> None:
        super().__init__()
        self.network = network
        self._dropping = DenoisingLoss(scheduler=scheduler, label_dropout=label_dropout)
        self._keeping = DenoisingLoss(scheduler=scheduler, label_dropout=0.0)

    def forward(self, values: Tensor, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One draw of times and noise; arguments as for :class:`GeneratorLoss`, the generator on the CPU."""
        loss = self._dropping if self.training else self._keeping
        return loss(self.network, values, labels, generator)
