"""Stochastic quantization (SQ-VAE, arXiv 2205.07547), in its Gaussian form with one variance for all latents.

The encoder's output is taken for a code that noise of variance ``s^2`` has moved, so that Bayes' rule says which
codeword it came from, ``P(k | z) = softmax_k(-||z - e_k||^2 / (2 s^2))``. In training a code is drawn from that, by a
Gumbel-softmax whose temperature falls. ``s^2`` is learned: as reconstructions get better it shrinks, and the assignment
becomes that of plain VQ by itself.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.outputs import Posterior, QuantizerOutput
from vaevq_med.networks.quantizers.base import (
    Cluster,
    FollowsLatents,
    Quantizer,
    channels_first,
    look_up,
    new_codewords,
    on_grid,
    put_at_centers,
    rows,
    straight_through,
)
from vaevq_med.networks.quantizers.gumbel import gumbel_codes
from vaevq_med.networks.quantizers.nearest import nearest_codeword
from vaevq_med.networks.quantizers.soft_assignment import assignment_statistics
from vaevq_med.networks.ranges import check_sizes

_VARIANCE_A_CHANNEL = 20 / 64
"""The authors' start, 20 for 64 channels; they advise more for more channels."""
_COLDEST = 1e-4


class SQVAE(FollowsLatents, Quantizer):
    """Stochastic quantization by one codebook and one learned variance.

    The losses are in nats, sums over the channels and means over the positions: ``kld_discrete = log K - H(P(. | z))``,
    the divergence of the assignment from an even one, and ``kld_continuous = ||z - q||^2 / (2 s^2)`` of what the
    decoder is given. With a calibrated likelihood a pixel, and both times positions over pixels and channels, their sum
    is the method's bound in its Gaussian form.

    In training ``quantized`` is a mixture of codewords, whose gradient reaches latents, codebook and variance; in
    evaluation it is the nearest codeword. ``codes`` and ``indices`` are the nearest codewords in both.

    The temperature is ``temperature exp(-temperature_decay n)`` after n batches of training. Their number is a buffer,
    so that a run that goes on cools on.

    Args:
        num_embeddings: K.
        embedding_dim: D.
        variance: start of ``s^2``; None for 20 a 64 channels above the floor.
        variance_floor: below which ``s^2`` does not fall; it is the floor and the exponential of what is learned. The
            authors' code has 1.
        temperature: of the first batch.
        temperature_decay: by which its logarithm falls a batch.
        temperature_minimum: below which it does not fall.
        init: ``"normal"`` draws codewords from N(0, 1), as the authors do, ``"uniform"`` from U(-1/K, 1/K).

    Raises:
        VaevqMedError: for an option out of its range.

    Example:
        >>> SQVAE(num_embeddings=8, embedding_dim=4)(torch.ones(1, 4, 2, 2)).indices.shape
        torch.Size([1, 2, 2, 1])
    """

    steps: Tensor

    def __init__(
        self,
        *,
        num_embeddings: int,
        embedding_dim: int,
        variance: float | None = None,
        variance_floor: float = 0.0,
        temperature: float = 1.0,
        temperature_decay: float = 1e-5,
        temperature_minimum: float = 0.0,
        init: str = "normal",
    ) -> None:
        super().__init__()
        check_sizes(num_embeddings=num_embeddings, embedding_dim=embedding_dim)
        if not 0 <= variance_floor < math.inf:
            raise VaevqMedError(f"variance_floor is {variance_floor}; expected at least 0")
        variance = variance_floor + embedding_dim * _VARIANCE_A_CHANNEL if variance is None else variance
        if not variance_floor < variance < math.inf:
            raise VaevqMedError(f"variance is {variance}; expected above {variance_floor}, and finite")
        if not 0 < temperature < math.inf:
            raise VaevqMedError(f"temperature is {temperature}; expected above 0, and finite")
        if not 0 <= temperature_decay < math.inf:
            raise VaevqMedError(f"temperature_decay is {temperature_decay}; expected at least 0, and finite")
        if not 0 <= temperature_minimum <= temperature:
            raise VaevqMedError(
                f"temperature_minimum is {temperature_minimum}; expected at least 0 and at most temperature, "
                f"{temperature}"
            )
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.first_temperature = temperature
        self.temperature_decay = temperature_decay
        self.temperature_minimum = max(temperature_minimum, _COLDEST)
        self.embedding = new_codewords(num_embeddings, embedding_dim, init=init)
        self.log_variance = nn.Parameter(torch.tensor(math.log(variance - variance_floor)))
        self.variance_floor = variance_floor
        self.register_buffer("steps", torch.zeros(()))

    def codebook(self) -> Tensor:
        """The table itself, ``[K, D]``."""
        return self.embedding

    def start_codebook(self, latents: Tensor, cluster: Cluster) -> bool:
        """Put the codewords at the centers."""
        return put_at_centers(self.embedding, latents, cluster)

    @property
    def temperature(self) -> Tensor:
        """Of the next batch of training, a scalar."""
        return (self.first_temperature * torch.exp(-self.temperature_decay * self.steps)).clamp_min(
            self.temperature_minimum
        )

    @torch.no_grad()
    def update(self, *observed: Tensor) -> None:
        """Count a batch."""
        self.steps += 1

    def forward(self, z: Tensor, posterior: Posterior | None = None) -> QuantizerOutput:
        """Draw codes for ``z`` ``[B, D, *grid]``, or, in evaluation, take the nearest ones."""
        self.check_latent(z)
        with torch.autocast(z.device.type, enabled=False):
            z = z.float()
            codebook, latents = self.codebook(), rows(z)
            # -||z - e||^2 / (2 s^2) but for what is the same for all e: a product of [z, 1] / s^2 and [e, -|e|^2 / 2].
            variance = self.variance_floor + self.log_variance.exp()
            scaled = torch.cat([latents, torch.ones_like(latents[:, :1])], dim=1) / variance
            keys = torch.cat([codebook, -0.5 * codebook.square().sum(dim=1, keepdim=True)], dim=1)
            indices = on_grid(nearest_codeword(latents.detach(), codebook.detach()), z)
            codes = look_up(indices, codebook)
            if self.training:
                mixtures = gumbel_codes(scaled, keys, codebook, temperature=self.temperature)
                quantized = channels_first(on_grid(mixtures, z, self.embedding_dim))
                self.follow(z.new_ones(1))
            else:
                quantized = straight_through(codes, z)
            entropy, _ = assignment_statistics(scaled, keys, temperature=1.0)
            distance = (z - (quantized if self.training else codes)).square().sum(dim=1)  # [B, *grid]
            return QuantizerOutput(
                quantized=quantized,
                codes=codes,
                indices=indices,
                losses={
                    "kld_discrete": math.log(self.num_embeddings) - entropy.mean(),
                    "kld_continuous": (distance / (2 * variance)).mean(),
                },
                codebook=codebook,
            )
