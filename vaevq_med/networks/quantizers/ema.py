"""VQ with a codebook of moving averages: VQ-VAE (arXiv 1711.00937, appendix A.1).

With N_k latents assigned to codeword k in a batch, and S_k their sum,

``n_k <- g n_k + (1 - g) N_k``, ``m_k <- g m_k + (1 - g) S_k``, ``e_k = m_k / n'_k``,
``n'_k = (n_k + eps) / (sum n + K eps) sum n``

with the decay g; the smoothing n' is that of VQGAN's code. No gradient reaches the codebook, and the only loss is the
commitment. As published, a batch is looked up in the codebook as it was before the batch's own update. The averages
start from ``n = 1`` and ``m = e``: from ``n = 0``, as some code has it, the first updates throw unused codewords far
away.

Without revival an unused codeword's count decays until the smoothing outweighs it, and it drifts to the origin. With
revival (SoundStream, arXiv 2107.03312, section III-C) codewords whose count falls below a threshold are replaced by
random latents of the batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.outputs import Posterior, QuantizerOutput
from vaevq_med.networks.processes import from_first_process, rank, rows_of_each_process, sum_in_place
from vaevq_med.networks.quantizers.base import Cluster, CodebookQuantizer, FollowsLatents, put_at_centers, rows


class AveragedCodebook(FollowsLatents, CodebookQuantizer):
    """A codebook of averages: no gradient reaches it, and it moves after the output of a call was made.

    Attributes:
        embedding: the table, a buffer ``[K, D]``.
    """

    embedding: Tensor

    def codebook(self) -> Tensor:
        """The table, ``[K, D]``, without a gradient."""
        return self.embedding

    def losses(self, z: Tensor, codes: Tensor, weight: Tensor | None = None) -> Mapping[str, Tensor]:
        """The commitment alone."""
        return {"commitment": super().losses(z, codes, weight)["commitment"]}

    def look_up(self, z: Tensor, posterior: Posterior | None = None, weight: Tensor | None = None) -> QuantizerOutput:
        """Quantize ``z`` ``[B, D, *grid]`` and update nothing, whatever the mode."""
        output = super().forward(z, posterior, weight)
        return QuantizerOutput(
            quantized=output.quantized,
            codes=output.codes,
            indices=output.indices,
            losses=output.losses,
            # The update happens in place, after this output was made.
            codebook=self.embedding.clone() if self.training else self.embedding,
        )


class VectorQuantizerEMA(AveragedCodebook):
    """A codebook that follows the latents assigned to it, by moving averages over the calls in training mode.

    Every call in training mode updates the codebook, but for the calls within :meth:`one_update`, which count as one
    batch. Under DDP each update is that of the batches of all processes together. Codebook and averages are buffers:
    no optimizer sees them, and ``codebook()`` has no gradient, so a loss on the codebook alone (DCR) would do nothing.

    Args:
        num_embeddings: K.
        embedding_dim: D.
        decay: g, weight of the past at each update, in (0, 1).
        epsilon: eps of the counts' smoothing, above 0.
        revival_share: codewords whose moving count n_k falls below this share of the mean count are replaced, after
            each update, by random latents of the batch; None replaces none. It holds for any batch, image size and K.
        revival_threshold: the same by the count itself, in place of a share. The counts' mean is the latents of a call
            over K, and a threshold near it would replace codewords without end.
        revival_count: count that a replaced codeword starts with, as a share of the mean count beside a share, and as
            a count beside a threshold. It is at least the one or the other, which is also the default, with which a
            codeword that the next batch does not use is replaced again at once.
        assignment: ``"euclidean"`` or ``"posterior"``, see :class:`CodebookQuantizer`.

    Raises:
        VaevqMedError: for an option out of its range, or both a share and a threshold.

    Example:
        >>> quantizer = VectorQuantizerEMA(num_embeddings=8, embedding_dim=4)
        >>> output = quantizer(torch.zeros(1, 4, 2, 2))
        >>> list(output.losses), list(quantizer.parameters())
        (['commitment'], [])
    """

    cluster_size: Tensor
    embedding_sum: Tensor

    def __init__(
        self,
        *,
        num_embeddings: int,
        embedding_dim: int,
        decay: float = 0.99,
        epsilon: float = 1e-5,
        revival_share: float | None = None,
        revival_threshold: float | None = None,
        revival_count: float | None = None,
        assignment: str = "euclidean",
    ) -> None:
        super().__init__(num_embeddings=num_embeddings, embedding_dim=embedding_dim, assignment=assignment)
        if not 0 < decay < 1:
            raise VaevqMedError(f"decay is {decay}; expected a number in (0, 1)")
        if epsilon <= 0:
            raise VaevqMedError(f"epsilon is {epsilon}; expected a number above 0")
        self.decay = decay
        self.epsilon = epsilon
        self.revival = _revival(revival_share, revival_threshold, revival_count)
        embedding = torch.randn(num_embeddings, embedding_dim)
        self.register_buffer("embedding", embedding)
        self.register_buffer("cluster_size", torch.ones(num_embeddings))
        self.register_buffer("embedding_sum", embedding.clone())

    def forward(self, z: Tensor, posterior: Posterior | None = None, weight: Tensor | None = None) -> QuantizerOutput:
        """Quantize ``z`` ``[B, D, *grid]``, straight-through; in training mode, update the codebook afterwards.

        Args:
            z: the latent.
            posterior: what it came from.
            weight: of each position in the loss and in the update, 0 or 1, ``[B, *grid]``; by default all count.
        """
        output = self.look_up(z, posterior, weight)
        if self.training:
            self.follow(rows(z.detach()), *counted(output.indices, weight, self.num_embeddings))
        return output

    def start_codebook(self, latents: Tensor, cluster: Cluster) -> bool:
        """Put the codewords at the centers, and the averages with them."""
        put_at_centers(self.embedding, latents, cluster)
        self.embedding_sum.copy_(self.embedding * self.cluster_size.unsqueeze(1))
        return True

    @torch.no_grad()
    def update(self, latents: Tensor, indices: Tensor, present: Tensor | None = None) -> None:  # type: ignore[override]
        """Move the averages by latents ``[N, D]`` and what ``counted`` gives, then revive, on every process alike."""
        with torch.autocast(latents.device.type, enabled=False):
            latents = latents.float()
            counts, sums = assignment_totals(latents, indices, self.num_embeddings)
            self.cluster_size.lerp_(counts, 1 - self.decay)
            self.embedding_sum.lerp_(sums, 1 - self.decay)
            total = self.cluster_size.sum()
            smoothed = (self.cluster_size + self.epsilon) / (total + self.num_embeddings * self.epsilon) * total
            self.embedding.copy_(self.embedding_sum / smoothed.unsqueeze(1))
            if self.revival is not None:
                revived, drawn, count = self.revival.replace(latents, self.cluster_size, present)
                revived = revived.unsqueeze(1)
                self.embedding.copy_(torch.where(revived, drawn, self.embedding))
                self.embedding_sum.copy_(torch.where(revived, drawn * count, self.embedding_sum))


@dataclass(frozen=True)
class Revival:
    """Replaces codewords of a low moving count by latents of the batch.

    Args:
        least: the count below which a codeword is replaced.
        count: that a replaced codeword starts with.
        of_mean: whether both are shares of the mean count, for which batch, image size and K may be any.
    """

    least: float
    count: float
    of_mean: bool = True

    @classmethod
    def by_share(cls, share: float, count: float) -> Revival:
        """Below ``share`` of the mean count, with ``count`` of it.

        Raises:
            VaevqMedError: not 0 < share <= count <= 1.
        """
        if not 0 < share <= count <= 1:
            raise VaevqMedError(
                f"revival_share is {share} and revival_count {count}; expected a share above 0, and a count from it to "
                "1"
            )
        return cls(share, count)

    @torch.no_grad()
    def replace(
        self, latents: Tensor, cluster_size: Tensor, present: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Draw latents for the codewords of low count, and give these their new count.

        Args:
            latents: ``[N, D]`` of this process.
            cluster_size: moving counts ``[K]``, changed in place.
            present: which latents may be drawn, boolean ``[N]``; by default all.

        Returns:
            Which codewords get a latent, boolean ``[K]``, the latents ``[K, D]``, of use at those codewords alone, and
            the new count, a scalar.
        """
        unit = cluster_size.mean() if self.of_mean else torch.ones_like(cluster_size[0])
        revived, drawn = draw_replacements(latents, cluster_size < self.least * unit, present)
        count = self.count * unit
        cluster_size.copy_(torch.where(revived, count, cluster_size))
        return revived, drawn, count


def _revival(share: float | None, threshold: float | None, count: float | None) -> Revival | None:
    if share is not None and threshold is not None:
        raise VaevqMedError(f"revival_threshold is {threshold} with revival_share {share}; expected one of the two")
    if share is not None:
        return Revival.by_share(share, share if count is None else count)
    if threshold is not None and threshold <= 0:
        raise VaevqMedError(f"revival_threshold is {threshold}; expected a number above 0, or None")
    if count is not None and (threshold is None or count < threshold):
        raise VaevqMedError(
            f"revival_count is {count} with revival_threshold {threshold}; expected a threshold and a count of at "
            "least it"
        )
    return None if threshold is None else Revival(threshold, threshold if count is None else count, of_mean=False)


def counted(indices: Tensor, weight: Tensor | None, num_embeddings: int) -> tuple[Tensor, ...]:
    """Indices ``[B, *grid, 1]`` in a row, ``[N]``, with K for those of weight 0, ``[B, *grid]``.

    With weights, which of them count comes second, boolean ``[N]``: no codeword is revived from another's latent.
    """
    flat = indices.flatten()
    if weight is None:
        return (flat,)
    present = weight.flatten() != 0
    return flat.masked_fill(~present, num_embeddings), present


@torch.no_grad()
def assignment_totals(latents: Tensor, indices: Tensor, num_embeddings: int) -> tuple[Tensor, Tensor]:
    """How many latents each codeword was assigned, and their sum, over every process.

    Args:
        latents: ``[N, D]`` in fp32.
        indices: int64 ``[N]`` in [0, K]; K is that of a latent that does not count.
        num_embeddings: K.

    Returns:
        Counts ``[K]`` and sums ``[K, D]``, in fp32.

    >>> counts, sums = assignment_totals(torch.tensor([[1.0], [2.0], [5.0]]), torch.tensor([0, 0, 2]), 3)
    >>> counts.tolist(), sums.flatten().tolist()
    ([2.0, 0.0, 1.0], [3.0, 0.0, 5.0])
    """
    ones = torch.ones_like(latents[:, :1])
    totals = latents.new_zeros(num_embeddings + 1, latents.shape[1] + 1)
    totals.index_add_(0, indices, torch.cat([latents, ones], dim=1))
    totals = sum_in_place(totals)[:-1]
    return totals[:, -1], totals[:, :-1]


@torch.no_grad()
def draw_replacements(latents: Tensor, expired: Tensor, present: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A random latent of any process for each expired codeword, none twice.

    Each process gets the same, what a single process would get with all the latents in the order of the ranks.

    Where the latents are fewer than the expired codewords, a random part of the codewords gets one. The shapes do not
    depend on how many have expired, which a GPU's host would have to wait for.

    Args:
        latents: ``[N, D]`` of this process; N may differ from process to process.
        expired: which codewords to replace, boolean ``[K]``, the same on every process.
        present: which latents may be drawn, boolean ``[N]``, on every process or on none; by default all.

    Returns:
        Which codewords get a latent, boolean ``[K]``, and the latents ``[K, D]``, of use at those codewords alone.
    """
    sizes = rows_of_each_process(latents)
    total, device = sum(sizes), latents.device
    first = sum(sizes[: rank()])  # this process's first place among all latents
    everyone = None
    if present is not None:
        everyone = torch.zeros(total, dtype=torch.int64, device=device)
        everyone[first : first + len(latents)] = present
        everyone = sum_in_place(everyone)  # 1 or 0 of every process's latents, [total]
    if everyone is not None or len(expired) > total:
        # The first expired ones of a random order, as many as there are latents.
        available = total if everyone is None else everyone.sum()
        shuffled = from_first_process(torch.randperm(len(expired)).to(device, non_blocking=True))
        expired = expired[shuffled]
        expired = torch.empty_like(expired).scatter_(0, shuffled, expired & (expired.cumsum(dim=0) <= available))
    positions = from_first_process(torch.randperm(total).to(device, non_blocking=True))
    if everyone is not None:
        # What may be drawn comes first, in the order drawn; its number stays on the device.
        positions = positions[(1 - everyone[positions]).argsort(stable=True)]
    place = (expired.cumsum(dim=0) - 1).clamp(0, total - 1)  # of each codeword among the expired ones
    positions = positions[place] - first  # [K]
    drawn = latents[positions.clamp(0, len(latents) - 1)]  # [K, D]
    if len(sizes) > 1:
        here = (positions >= 0) & (positions < len(latents))
        drawn = sum_in_place(torch.where(here.unsqueeze(1), drawn, torch.zeros_like(drawn)))
    return expired, drawn
