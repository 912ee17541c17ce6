"""KL divergence of the posterior from the prior, with a fixed weight or held at a budget."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.losses.base import LossTerm
from vaevq_med.networks.outputs import Posterior, TokenizerOutput
from vaevq_med.networks.patches import content_mask
from vaevq_med.networks.posterior import kl_per_token
from vaevq_med.networks.processes import sum_in_place
from vaevq_med.networks.ranges import check_choice


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
    """KL to the prior, in nats: summed over D, mean over tokens; times ``scale``.

    With a ``budget`` the term is multiplied by a factor that is steered, slowly and multiplicatively, so that the
    KL of the counted tokens tracks ``budget * log(num_embeddings)``: K codewords carry log K nats a token, and a
    posterior of many more is narrower than the codebook's spacing (METHODS of Gaussian Quant, arXiv 2512.06609). The
    factor is a buffer, so that checkpoints carry it; it moves in training only. It multiplies this term, and those that
    the objective lets follow it.

    ``prior: "empirical"`` is N(0, diag v) with ``v = E[mu^2 + sigma^2]`` of each channel (automatic relevance
    determination, ARD-VAE, arXiv 2501.10901, at the hyperprior ``a_0 = b_0 = 0``). Of all v this has the least KL,
    which is then ``1/2 E[log v - log sigma^2]`` a channel, and exactly 0 for one that is not used: ``mu = 0`` and
    ``sigma^2 = v``. Here v is a moving average over the batches of all processes. It starts at 1 and takes no gradient;
    a batch, whatever its parts, is measured by the v of before it. Once v has followed, a channel's scale costs
    nothing. DCR's prior and the codebook of Gaussian Quant know nothing of v.

    Args:
        scale: constant factor, e.g. tokens over pixels for a term a pixel.
        budget: target as a share of log K; None leaves the factor at 1.
        num_embeddings: K; needed with a budget.
        tokens: which tokens the budget counts: ``"all"``, or ``"content"``, those whose image patch is not constant.
            In MRI most tokens are black, and a mean over all hides that the brain's carry far more.
        rate: speed of the factor; each step multiplies it by ``(KL / target) ** rate``, within [0.9, 1.1].
        initial: the factor's start.
        prior: ``"standard"``, N(0, I), or ``"empirical"``.
        momentum: weight of the past of v at each update, in [0, 1).
        embedding_dim: D; needed with the empirical prior.

    Raises:
        VaevqMedError: a budget without ``num_embeddings``, or not above 0; an empirical prior without
            ``embedding_dim``; or another option out of its range.
    """

    factor: Tensor
    variance: Tensor | None

    def __init__(
        self,
        *,
        scale: float = 1.0,
        budget: float | None = None,
        num_embeddings: int | None = None,
        tokens: str = "content",
        rate: float = 0.02,
        initial: float = 1.0,
        prior: str = "standard",
        momentum: float = 0.99,
        embedding_dim: int | None = None,
    ) -> None:
        super().__init__()
        if budget is not None and (num_embeddings is None or num_embeddings < 2 or budget <= 0):
            raise VaevqMedError(
                f"budget is {budget} with num_embeddings {num_embeddings}; expected a budget above 0 and K of 2 or more"
            )
        check_choice("prior", prior, ("standard", "empirical"))
        if prior == "empirical" and (embedding_dim is None or embedding_dim < 1):
            raise VaevqMedError(
                f"prior is 'empirical' with embedding_dim {embedding_dim}; expected the number of the latent's channels"
            )
        if not 0 <= momentum < 1:
            raise VaevqMedError(f"momentum is {momentum}; expected a number in [0, 1)")
        self.scale = scale
        self._parts: list[Tensor] | None = None
        self.tokens = check_choice("tokens", tokens, ("all", "content"))
        self.rate = rate
        self.target = None if budget is None else budget * math.log(num_embeddings or 2)
        self.initial, self.momentum = initial, momentum
        self.register_buffer("factor", torch.tensor(float(initial)))
        self.register_buffer("variance", torch.ones(embedding_dim or 1) if prior == "empirical" else None)

    def forward(self, target: Tensor, output: TokenizerOutput) -> Tensor:
        """The weighted divergence, a scalar; in training, with a budget, the factor moves: first, or once a batch.

        Raises:
            VaevqMedError: the tokenizer has no posterior, or its latent another number of channels than the prior.
        """
        if output.posterior is None:
            raise VaevqMedError(
                "KLLoss needs a posterior; found a tokenizer with variational false. Set objective#weights#kl to 0"
            )
        per_token = self._per_token(output.posterior)
        if self.training and (self.target is not None or self.variance is not None):
            self._steer(per_token.detach(), output.posterior, target)
        return self.scale * self.factor.clone() * per_token.mean()

    def _per_token(self, posterior: Posterior) -> Tensor:
        mean, logvar = posterior.mean, posterior.logvar
        if self.variance is not None:
            if mean.shape[1] != len(self.variance):
                raise VaevqMedError(
                    f"the posterior has {mean.shape[1]} channels; expected {len(self.variance)}, KLLoss's embedding_dim"
                )
            # The divergence is that of both in units of the prior's deviation.
            variance = self.variance.view(-1, *[1] * (mean.ndim - 2))
            mean, logvar = mean.float() * variance.rsqrt(), logvar.float() - variance.log()
        return kl_per_token(mean, logvar)

    @contextmanager
    def one_update(self) -> Iterator[None]:
        """Count the calls inside as parts of one batch: what steers moves once, at the end, and not after an error."""
        self._parts = []
        try:
            yield
            parts, self._parts = self._parts, None
            if parts:
                self._move(torch.stack(parts).sum(dim=0))
        finally:
            self._parts = None

    def control(self) -> Tensor:
        """The factor, a scalar; with the empirical prior the factor and the variances, ``[1 + D]``."""
        return self.factor if self.variance is None else torch.cat([self.factor.view(1), self.variance])

    def load_control(self, stored: Tensor) -> None:
        """Take up the factor and, where both have them, the variances: a run may go on with another prior.

        Raises:
            VaevqMedError: the variances are those of another number of channels.
        """
        factor, variance = stored.flatten()[0], stored.flatten()[1:]
        self.factor.copy_(factor)
        if self.variance is not None and len(variance):
            if len(variance) != len(self.variance):
                raise VaevqMedError(
                    f"the checkpoint's prior has {len(variance)} channels; expected {len(self.variance)}"
                )
            self.variance.copy_(variance)

    def steered_factor(self) -> Tensor | None:
        """The factor; None without a budget, where nothing but ``initial`` sets it, at 1."""
        return None if self.target is None and self.initial == 1 else self.factor

    @property
    def needs_patches(self) -> bool:
        """Whether it has to know of what patch a token is."""
        return self.target is not None and self.tokens == "content"

    def figures(self) -> Mapping[str, Tensor]:
        """The factor, where there is a budget."""
        return {} if self.target is None else {"factor": self.factor}

    @torch.no_grad()
    def _steer(self, per_token: Tensor, posterior: Posterior, target: Tensor) -> None:
        sums = []
        if self.target is not None:
            counted = torch.ones_like(per_token)
            if self.tokens == "content":
                counted = content_mask(target, per_token.shape[1:]).to(per_token)
            sums += [(per_token * counted).sum(), counted.sum()]
        if self.variance is not None:
            squares = posterior.mean.float().square() + posterior.logvar.float().exp()  # [B, D, *grid]
            sums += [squares.sum(dim=(0, *range(2, squares.ndim))), per_token.new_full((), per_token.numel())]
        observed = torch.cat([value.view(-1) for value in sums])
        if self._parts is None:
            self._move(observed)
        else:
            self._parts.append(observed)

    @torch.no_grad()
    def _move(self, observed: Tensor) -> None:
        """Move by the sums of all parts.

        Args:
            observed: with a budget the KL of the counted tokens and their number; with an empirical prior the sums of
                squares of the D channels and the number of tokens.
        """
        observed = sum_in_place(observed)
        if self.target is not None:
            sums, observed = observed[:2], observed[2:]
            ratio = sums[0] / sums[1].clamp_min(1) / self.target
            step = ratio.clamp_min(1e-6).pow(self.rate).clamp(0.9, 1.1)
            # Without a counted token there is nothing to go by.
            self.factor.mul_(torch.where(sums[1] > 0, step, torch.ones_like(step))).clamp_(1e-6, 1e6)
        if self.variance is not None:
            self.variance.lerp_(observed[:-1] / observed[-1], 1 - self.momentum)
