"""KL divergence of the posterior from the prior, with a fixed weight or held at a budget."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.losses.base import LossTerm
from vaevq_med.networks.outputs import TokenizerOutput
from vaevq_med.networks.posterior import kl_per_token
from vaevq_med.networks.processes import sum_in_place
from vaevq_med.networks.ranges import check_choice

_POOLING = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


def kl_to_standard_normal(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, exp(logvar)) || N(0, I)), summed over D, mean over positions, in nats.

    Args:
        mean: ``[B, D, *grid]``.
        logvar: log variance, of the same shape.

    Returns:
        A scalar, at least 0.

    Example:
        >>> kl_to_standard_normal(torch.ones(1, 2, 1, 1), torch.zeros(1, 2, 1, 1)).item()
        1.0
    """
    return kl_per_token(mean, logvar).mean()


class KLLoss(LossTerm):
    """KL to the standard normal, in nats: summed over D, mean over tokens; times ``scale``.

    With a ``budget`` the term is multiplied by a factor that is steered, slowly and multiplicatively, so that the
    KL of the counted tokens tracks ``budget * log(num_embeddings)``: K codewords carry log K nats a token, and a
    posterior of many more is narrower than the codebook's spacing (METHODS of Gaussian Quant, arXiv 2512.06609). The
    factor is a buffer, so that checkpoints carry it; it moves in training only.

    Args:
        scale: constant factor, e.g. tokens over pixels for a term a pixel.
        budget: target as a share of log K; None leaves the factor at 1.
        num_embeddings: K; needed with a budget.
        tokens: which tokens the budget counts: ``"all"``, or ``"content"``, those whose image patch is not constant.
            In MRI most tokens are black, and a mean over all hides that the brain's carry far more.
        rate: speed of the factor; each step multiplies it by ``(KL / target) ** rate``, within [0.9, 1.1].
        initial: the factor's start.

    Raises:
        VaevqMedError: a budget without ``num_embeddings``, or not above 0.
    """

    def __init__(
        self,
        *,
        scale: float = 1.0,
        budget: float | None = None,
        num_embeddings: int | None = None,
        tokens: str = "content",
        rate: float = 0.02,
        initial: float = 1.0,
    ) -> None:
        super().__init__()
        if budget is not None and (num_embeddings is None or num_embeddings < 2 or budget <= 0):
            raise VaevqMedError(
                f"budget is {budget} with num_embeddings {num_embeddings}; expected a budget above 0 and K of 2 or more"
            )
        self.scale = scale
        self._parts: list[Tensor] | None = None
        self.tokens = check_choice("tokens", tokens, ("all", "content"))
        self.rate = rate
        self.target = None if budget is None else budget * math.log(num_embeddings or 2)
        self.register_buffer("factor", torch.tensor(float(initial)))

    factor: Tensor

    def forward(self, target: Tensor, output: TokenizerOutput) -> Tensor:
        """The weighted divergence, a scalar; in training, with a budget, the factor moves: first, or once a batch.

        Raises:
            VaevqMedError: the tokenizer has no posterior.
        """
        if output.posterior is None:
            raise VaevqMedError(
                "KLLoss needs a posterior; found a tokenizer with variational false. Set objective#weights#kl to 0"
            )
        per_token = kl_per_token(output.posterior.mean, output.posterior.logvar)
        if self.target is not None and self.training:
            self._steer(per_token.detach(), target)
        return self.scale * self.factor.clone() * per_token.mean()

    @contextmanager
    def one_update(self) -> Iterator[None]:
        """Count the calls inside as parts of one batch: the factor moves once, at the end, and not after an error."""
        self._parts = []
        try:
            yield
            parts, self._parts = self._parts, None
            if parts:
                self._move(torch.stack(parts).sum(dim=0))
        finally:
            self._parts = None

    def control(self) -> Tensor:
        """The factor."""
        return self.factor

    def figures(self) -> Mapping[str, Tensor]:
        """The factor, where there is a budget."""
        return {} if self.target is None else {"factor": self.factor}

    @torch.no_grad()
    def _steer(self, per_token: Tensor, target: Tensor) -> None:
        counted = torch.ones_like(per_token)
        if self.tokens == "content":
            counted = content_mask(target, per_token.shape[1:]).to(per_token)
        sums = torch.stack([(per_token * counted).sum(), counted.sum()])
        if self._parts is None:
            self._move(sums)
        else:
            self._parts.append(sums)

    @torch.no_grad()
    def _move(self, sums: Tensor) -> None:
        """Multiply the factor by what the KL of the counted tokens and their number, ``[2]``, ask for."""
        assert self.target is not None
        sums = sum_in_place(sums)
        ratio = sums[0] / sums[1].clamp_min(1) / self.target
        step = ratio.clamp_min(1e-6).pow(self.rate).clamp(0.9, 1.1)
        # Without a counted token there is nothing to go by.
        self.factor.mul_(torch.where(sums[1] > 0, step, torch.ones_like(step))).clamp_(1e-6, 1e6)


def content_mask(images: Tensor, grid: Sequence[int]) -> Tensor:
    """Which tokens see something: the image patch of the position is not constant. ``[B, *grid]``, bool.

    Args:
        images: ``[B, C, H, W]``, or of another number of axes.
        grid: sizes of the latent grid, an axis for each of the image's.

    Raises:
        VaevqMedError: the grid has another number of axes: its positions have no patches.
    """
    if len(grid) != images.ndim - 2 or len(grid) not in _POOLING:
        raise VaevqMedError(
            f"tokens is 'content' with a grid {list(grid)} of images {list(images.shape[2:])}; expected an axis for "
            "each of the image's, or tokens 'all'"
        )
    window = tuple(size // positions for size, positions in zip(images.shape[2:], grid, strict=True))
    pool = _POOLING[len(grid)]
    highest, lowest = pool(images.float(), window), -pool(-images.float(), window)  # [B, C, *grid]
    return (highest - lowest).amax(dim=1) > 1e-6
