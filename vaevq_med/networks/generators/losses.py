"""What a generator minimizes on a batch of a token store, as modules that ``DistributedDataParallel`` can wrap."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
import torch.nn.functional as F
from monai.inferers import DiffusionInferer
from monai.networks.schedulers import Scheduler
from torch import Tensor, nn

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.generators.ddim import NoisePredictor
from vaevq_med.networks.generators.flow import FlowPath
from vaevq_med.networks.generators.latent_diffusion import LatentDiffusionUNet
from vaevq_med.networks.generators.llamagen import LlamaGen
from vaevq_med.networks.generators.token_diffusion import TokenDiffusion

TOKEN_BITS = "token_bits"
"""What the bits of a token are called in records; an upper bound of them where a network has no likelihood."""


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
        """The loss in nats and in bits, and the perplexity of a token."""
        return token_figures(loss)


def token_figures(loss: float) -> dict[str, float]:
    """A loss in nats a token, in bits, and its perplexity ``exp(loss)``: K where nothing has been learned."""
    return {"loss": loss, TOKEN_BITS: loss / math.log(2), "perplexity": math.exp(min(loss, 700.0))}


class TokenBound(GeneratorLoss):
    """What a :class:`TokenDiffusion` minimizes in training mode; in evaluation mode its bound, in nats a token.

    Args:
        network: in training mode it drops labels.
    """

    key = "indices"

    def __init__(self, *, network: TokenDiffusion) -> None:
        super().__init__()
        self.network = network

    def forward(self, values: Tensor, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The mean over all tokens, of one draw of time and corruption; arguments as for :class:`GeneratorLoss`."""
        loss = self.network.loss if self.training else self.network.bound
        return loss(values, labels, generator=generator)

    def figures(self, loss: float) -> dict[str, float]:
        """The bound in nats and in bits a token; no perplexity, which is at most ``exp`` of it."""
        return {"loss": loss, TOKEN_BITS: loss / math.log(2)}


class LayerTokenLoss(GeneratorLoss):
    """Cross-entropy of a :class:`LlamaGen` that sees the slice below, in nats a token.

    Args:
        network: with ``sees_below``; in training mode it drops labels.

    Raises:
        VaevqMedError: it does not see the slice below.
    """

    key = "layers"

    def __init__(self, *, network: LlamaGen) -> None:
        super().__init__()
        if not network.sees_below:
            raise VaevqMedError("sees_below is false; expected true for the loss of layers, or TokenLoss")
        self.network = network

    def forward(self, values: Tensor, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The mean over all tokens.

        Args:
            values: ``[B, 2, h, w, G]``: the slice below, -1 where there is none, and the slice.
            labels: ``[B]``.
            generator: as for :class:`GeneratorLoss`.
        """
        return self.network.loss(values[:, 1], labels, below=values[:, 0], generator=generator)

    def figures(self, loss: float) -> dict[str, float]:
        """As of :class:`TokenLoss`."""
        return token_figures(loss)


class DenoisingLoss:
    """The denoising loss of a latent diffusion model (DDPM, arXiv 2006.11239, Eq. 14; LDM, arXiv 2112.10752, Eq. 2).

    ``mean((eps - eps_theta(sqrt(a_t) s z + sqrt(1 - a_t) eps, t, y))^2)`` over every element. The time ``t`` is
    uniform over the schedule, ``eps`` standard normal, ``s`` the network's scale factor. For classifier-free guidance
    (arXiv 2207.12598) a share of the labels gives way to the null class.

    Args:
        scheduler: noise schedule of MONAI; the network predicts the noise.
        label_dropout: that share, in [0, 1); 0.1 is usual.

    Raises:
        VaevqMedError: a share out of its range, or a scheduler of another target.
    """

    def __init__(self, *, scheduler: Scheduler, label_dropout: float = 0.1) -> None:
        if not 0 <= label_dropout < 1:
            raise VaevqMedError(f"label_dropout is {label_dropout}; expected a number in [0, 1)")
        prediction = str(getattr(scheduler, "prediction_type", "epsilon"))
        if prediction != "epsilon":
            raise VaevqMedError(f"the scheduler's prediction_type is {prediction!r}; expected 'epsilon'")
        self.scheduler = scheduler
        self.label_dropout = label_dropout
        self._inferer = DiffusionInferer(scheduler)

    def __call__(
        self,
        network: LatentDiffusionUNet,
        latents: Tensor,
        labels: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The loss of one draw of times and noise.

        Args:
            network: or its ``DistributedDataParallel``.
            latents: before quantization and not scaled, ``[B, D, h, w]``.
            labels: ``[B]``; the null class when absent.
            generator: of the draws, on the CPU; the global one when absent.

        Raises:
            VaevqMedError: the network has no scale factor yet.
        """
        inner: LatentDiffusionUNet = getattr(network, "module", network)
        batch, device = latents.shape[0], latents.device
        timesteps = torch.randint(self.scheduler.num_train_timesteps, (batch,), generator=generator)
        noise = torch.randn(latents.shape, generator=generator).to(device, latents.dtype, non_blocking=True)
        dropped = torch.rand(batch, generator=generator) < self.label_dropout
        if labels is None:
            labels = torch.full((batch,), inner.null_class)
        labels = labels.to(device).masked_fill(dropped.to(device, non_blocking=True), inner.null_class)
        predicted = self._inferer(
            inputs=latents * inner.measured_scale_factor(),
            diffusion_model=network,  # type: ignore[arg-type]
            noise=noise,
            timesteps=timesteps.to(device, non_blocking=True),
            condition=labels,
        )
        return F.mse_loss(predicted.float(), noise.float())


def check_predicts(network: NoisePredictor, wanted: str) -> None:
    """Refuse a network whose output means something else; it says what in :attr:`NoisePredictor.predicts`.

    Raises:
        VaevqMedError: naming both.
    """
    found = getattr(network, "predicts", None)
    if found != wanted:
        kind = f"which predicts {found!r}" if found else "which says of no latent what it predicts"
        raise VaevqMedError(f"network is a {type(network).__name__}, {kind}; expected one that predicts {wanted!r}")


class LatentLoss(GeneratorLoss):
    """The denoising loss of :class:`LatentDiffusionUNet`; labels are dropped in training mode only.

    Args:
        network: with its scale factor measured.
        scheduler: noise schedule.
        label_dropout: share of the labels that give way to the null class.

    Raises:
        VaevqMedError: the network predicts something else, the schedule is of something else, or a share is out of its
            range.
    """

    key = "latent"

    def __init__(self, *, network: LatentDiffusionUNet, scheduler: Scheduler, label_dropout: float = 0.1) -> None:
        super().__init__()
        check_predicts(network, "noise")
        self.network = network
        self._dropping = DenoisingLoss(scheduler=scheduler, label_dropout=label_dropout)
        self._keeping = DenoisingLoss(scheduler=scheduler, label_dropout=0.0)

    def forward(self, values: Tensor, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One draw of times and noise; arguments as for :class:`GeneratorLoss`, the generator on the CPU."""
        loss = self._dropping if self.training else self._keeping
        return loss(self.network, values, labels, generator)


class FlowLoss(GeneratorLoss):
    """What a rectified flow minimizes (arXiv 2209.03003): ``mean((v - (e - s z))^2)`` at a time t.

    ``x_t = (1 - t) s z + t e``, with e standard normal, s the network's scale factor and t logit-normal (arXiv
    2403.03206). Beside it ``1 - cos(v, e - s z)`` over the channels of a position may count (LightningDiT, 2501.01423).

    Args:
        network: of velocities, with its scale factor measured.
        scheduler: the way that is learned.
        label_dropout: share of the labels that give way to the null class, in training mode only.
        direction_weight: of the cosine's term.

    Raises:
        VaevqMedError: a number is out of its range, the network or the scheduler is of something else, or they
            count the time differently.
    """

    key = "latent"

    def __init__(
        self,
        *,
        network: NoisePredictor,
        scheduler: FlowPath,
        label_dropout: float = 0.1,
        direction_weight: float = 0.0,
    ) -> None:
        super().__init__()
        if not 0 <= label_dropout < 1:
            raise VaevqMedError(f"label_dropout is {label_dropout}; expected a number in [0, 1)")
        if not 0 <= direction_weight < math.inf:
            raise VaevqMedError(f"direction_weight is {direction_weight}; expected 0 or more")
        check_predicts(network, "velocity")
        kind = getattr(scheduler, "prediction_type", None)
        if kind != "velocity":
            raise VaevqMedError(
                f"scheduler is a {type(scheduler).__name__}, of the prediction_type {str(kind)!r}; expected one of "
                "'velocity', such as FlowPath"
            )
        total = getattr(network, "num_train_timesteps", scheduler.num_train_timesteps)
        if total != scheduler.num_train_timesteps:
            raise VaevqMedError(
                f"num_train_timesteps is {total} in the network; expected that of the scheduler, "
                f"{scheduler.num_train_timesteps}"
            )
        self.network = network
        self.label_dropout = label_dropout
        self.direction_weight = direction_weight
        self.path = scheduler

    def forward(self, values: Tensor, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One draw of times and noise; arguments as for :class:`GeneratorLoss`, the generator on the CPU."""
        batch, device = len(values), values.device
        times = self.path.times(batch, generator).to(device, non_blocking=True)
        noise = torch.randn(values.shape, generator=generator).to(device, values.dtype, non_blocking=True)
        dropped = torch.rand(batch, generator=generator) < (self.label_dropout if self.training else 0.0)
        labels = labels.masked_fill(dropped.to(device, non_blocking=True), self.network.null_class)
        latents = values * self.network.measured_scale_factor()
        noisy, velocity = self.path.noisy(latents, noise, times), self.path.velocity(latents, noise)
        moments = self.path.num_train_timesteps * times
        predicted = self.network(noisy, timesteps=moments, context=labels).float()
        loss = F.mse_loss(predicted, velocity.float())
        if self.direction_weight:
            loss = loss + self.direction_weight * (1 - F.cosine_similarity(predicted, velocity.float(), dim=1)).mean()
        return loss
