"""A codebook that minimizes representation coherence (RCS of VAEVQ, arXiv 2511.06863, Eq. 7) in closed form.

For posteriors N(mu_n, diag sigma_n^2), RCS is ``1/2 sum_n sum_i ((e_k(n),i - mu_n,i) / sigma_n,i)^2``: the objective of
a k-means in which every latent brings its own metric. Both of its coordinate steps are known, so that the codebook
needs no gradient:

``k(n) = argmin_k sum_i (e_ki - mu_ni)^2 / sigma_ni^2``,
``e_ki = sum_{n in k} mu_ni sigma_ni^-2 / sum_{n in k} sigma_ni^-2``.

Online, with the decay g, the counts N_k, weights W_k and sums S_k of codeword k are moving averages over the batches of
``sum 1``, ``sum sigma^-2`` and ``sum mu sigma^-2`` of what it was assigned, and ``e_k = S_k / W_k``. The means are
averaged, whether they or samples were quantized.

Why the precision is the right weight: to second order the posterior's ``1 / sigma_i^2`` is 1 plus the curvature of the
loss over the KL's weight, so that RCS is what quantizing will cost the reconstruction, and this is Lloyd's algorithm
under the sensitivity matrix of high-resolution quantization theory (Gardner & Rao, IEEE Trans. Speech Audio Process.
1995; Linder, Zamir & Zeger, IEEE Trans. Inf. Theory 1999).
"""

from __future__ import annotations

import torch
from torch import Tensor

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.outputs import Posterior, QuantizerOutput
from vaevq_med.networks.polar import polar_factor
from vaevq_med.networks.quantizers.base import Cluster, put_at_centers, rows
from vaevq_med.networks.quantizers.ema import AveragedCodebook, Revival, assignment_totals, counted
from vaevq_med.networks.ranges import check_choice

WEIGHTINGS = ("precision", "plain")


class CoherentVQ(AveragedCodebook):
    """A codebook of precision-weighted averages of the posterior means that are assigned to its codewords.

    Every call in training mode updates the codebook, but for the calls within :meth:`one_update`, which count as one
    batch; under DDP each update is that of all processes' batches together. Codebook and averages are buffers.

    Args:
        num_embeddings: K.
        embedding_dim: D.
        decay: g, weight of the past at each update, in [0, 1).
        assignment: ``"posterior"``, RCS's own, or ``"euclidean"``.
        weighting: ``"precision"``, RCS's own, or ``"plain"`` averages of the means.
        revival_share: codewords whose moving count falls below this share of the mean count are replaced by posterior
            means of the batch; None replaces none. It holds for any batch, image size and K.
        revival_count: share of the mean count that a replaced codeword starts with, at least ``revival_share``.
        prior_step: share, in [0, 1], of the way to N(0, I) that the codebook goes after each update, along the
            shortest one in the 2-Wasserstein distance between Gaussians (DCR, Eq. 11); 0 stays.

    Raises:
        VaevqMedError: for an option out of its range.
    """

    cluster_size: Tensor
    weight: Tensor
    weighted_sum: Tensor

    def __init__(
        self,
        *,
        num_embeddings: int,
        embedding_dim: int,
        decay: float = 0.99,
        assignment: str = "posterior",
        weighting: str = "precision",
        revival_share: float | None = 0.1,
        revival_count: float = 0.5,
        prior_step: float = 0.0,
    ) -> None:
        super().__init__(num_embeddings=num_embeddings, embedding_dim=embedding_dim, assignment=assignment)
        if not 0 <= decay < 1:
            raise VaevqMedError(f"decay is {decay}; expected a number in [0, 1)")
        if not 0 <= prior_step <= 1:
            raise VaevqMedError(f"prior_step is {prior_step}; expected a number in [0, 1]")
        if prior_step and num_embeddings < 2:
            raise VaevqMedError(f"prior_step is {prior_step} with one codeword; expected 0, or two codewords or more")
        self.decay = decay
        self.weighting = check_choice("weighting", weighting, WEIGHTINGS)
        self.revival = None if revival_share is None else Revival.by_share(revival_share, revival_count)
        self.prior_step = prior_step
        embedding = torch.randn(num_embeddings, embedding_dim)
        self.register_buffer("embedding", embedding)
        self.register_buffer("cluster_size", torch.ones(num_embeddings))
        self.register_buffer("weight", torch.ones(num_embeddings, embedding_dim))
        self.register_buffer("weighted_sum", embedding.clone())

    def forward(self, z: Tensor, posterior: Posterior | None = None, weight: Tensor | None = None) -> QuantizerOutput:
        """Quantize ``z`` ``[B, D, *grid]``, straight-through; in training mode, update the codebook afterwards.

        Args:
            z: the latent.
            posterior: what it came from.
            weight: of each position in the loss and in the update, 0 or 1, ``[B, *grid]``; by default all count.

        Raises:
            VaevqMedError: an option needs a posterior and there is none.
        """
        output = self.look_up(z, posterior, weight)
        if self.training:
            means = rows((z if posterior is None else posterior.mean).detach().float())  # [N, D]
            indices = counted(output.indices, weight, self.num_embeddings)
            self.follow(means, self._precisions(means, posterior), *indices)
        return output

    def start_codebook(self, latents: Tensor, cluster: Cluster) -> bool:
        """Put the codewords at the centers, and the averages with them."""
        put_at_centers(self.embedding, latents, cluster)
        self.weighted_sum.copy_(self.embedding * self.weight)
        return True

    def _precisions(self, means: Tensor, posterior: Posterior | None) -> Tensor:
        """The weight of every coordinate of the means, ``[N, D]``."""
        if self.weighting == "plain":
            return torch.ones_like(means)
        if posterior is None:
            raise VaevqMedError(
                "weighting 'precision' needs the encoder's posterior; found none: set network_def#variational to "
                "true, or the weighting to 'plain'"
            )
        return rows(posterior.std.detach().float()).square().reciprocal()

    @torch.no_grad()
    def update(  # type: ignore[override]
        self, means: Tensor, precisions: Tensor, indices: Tensor, present: Tensor | None = None
    ) -> None:
        """Move the averages by means and precisions ``[N, D]`` and what ``counted`` gives, on every process alike."""
        with torch.autocast(means.device.type, enabled=False):
            both = torch.cat([means * precisions, precisions], dim=1)  # [N, 2 D]
            counts, totals = assignment_totals(both, indices, self.num_embeddings)
            sums, weights = totals.chunk(2, dim=1)  # [K, D] each
            self.weighted_sum.lerp_(sums, 1 - self.decay)
            self.weight.lerp_(weights, 1 - self.decay)
            self.cluster_size.lerp_(counts, 1 - self.decay)
            # What has not been used for so long that nothing is left of its weight stays where it is.
            known = self.weight > torch.finfo(self.weight.dtype).tiny
            moved = self.weighted_sum / torch.where(known, self.weight, torch.ones_like(self.weight))
            self.embedding.copy_(torch.where(known, moved, self.embedding))
            if self.revival is not None:
                self._revive(self.revival, means, weights.sum(dim=0) / counts.sum().clamp_min(1), present)
            if self.prior_step:
                self._step_to_prior()

    def _revive(self, revival: Revival, means: Tensor, precision: Tensor, present: Tensor | None) -> None:
        """Replace what is little used by means of the batch, with the batch's mean precision ``[D]``."""
        revived, drawn, count = revival.replace(means, self.cluster_size, present)
        revived, weight = revived.unsqueeze(1), (count * precision).expand_as(self.weight)
        self.embedding.copy_(torch.where(revived, drawn, self.embedding))
        self.weight.copy_(torch.where(revived, weight, self.weight))
        self.weighted_sum.copy_(torch.where(revived, drawn * weight, self.weighted_sum))

    def _step_to_prior(self) -> None:
        """Go a part of the way along Monge's map, ``e -> S^(-1/2) (e - m)`` with the codewords' moments m and S.

        Of the centered codewords X over ``sqrt(K - 1)``, ``S^(-1/2) (e - m)`` is ``sqrt(K - 1)`` times the polar
        factor. A direction without extent stays without.
        """
        codewords = self.embedding.double()
        scale = (self.num_embeddings - 1) ** 0.5
        target = scale * polar_factor((codewords - codewords.mean(dim=0)) / scale)
        self.embedding.copy_(codewords.lerp(target, self.prior_step))
        self.weighted_sum.copy_(self.embedding * self.weight)
