"""MGVQ (arXiv 2507.07997): groups of channels with a codebook each, nested masking, and codewords that are revived.

The latent's channels are cut into G groups, group g is quantized by a codebook of its own, after both are scaled to
length 1.

*Nested masking*: in training one ``u ~ U(0, 1)`` a call zeroes every group i with ``u < p_i``. As p does not fall, the
groups zeroed are the last ones, so that the first groups learn to stand alone and an image can be decoded from them.

*Revival* (CVQ-VAE, arXiv 2307.15139): after each call in training, with ``P_k`` the moving frequency of codeword k,
``e_k <- (1 - a_k) e_k + a_k y_k``, ``a_k = exp(-10 K P_k / (1 - g) - 0.001)``, with the decay g; the anchor ``y_k`` is
a latent of the batch drawn with the probability ``softmax_n(-||z_n - e_k||^2)``. Used codewords have ``a_k = 0`` in
fp32 and stay; unused ones jump onto a latent near them.

The method's grouped 1x1 convolutions are contained in the tokenizer's full ones; its backbone (DC-AE) is not used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.compiling import outside_compiled_graphs
from vaevq_med.networks.outputs import Posterior, QuantizerOutput
from vaevq_med.networks.processes import (
    from_first_process,
    is_distributed,
    number_from_first_process,
    of_each_process,
    rank,
    sum_in_place,
)
from vaevq_med.networks.quantizers.base import FollowsLatents, rows, straight_through, vq_losses
from vaevq_med.networks.quantizers.grouped import GroupedQuantizer, look_up_groups

# While anchors are drawn.
_PROBABILITIES_AT_ONCE = {"cpu": 2**19, "other": 2**22}


class MGVQ(FollowsLatents, GroupedQuantizer):
    """Groups of channels with a codebook each, of which the first g make an image too.

    The losses are ``codebook`` and ``commitment``, means over the elements of the groups that were not zeroed.
    ``codes`` holds the look-up of every group; only ``quantized`` has zeros.

    Args:
        num_embeddings: K, codewords of each group; the total that the authors state is ``G K``.
        embedding_dim: D, a multiple of G; the authors' is 32.
        num_codebooks: G; the authors' is 4 or 8.
        mask_probabilities: p, one a group, from 0 for the first and not falling; the authors train four groups with
            (0, 0.2, 0.3, 0.4). None masks nothing.
        decay: g, weight of the past in the moving frequencies, in (0, 1).
        revival: whether unused codewords are revived.
        normalize: scale latent groups and codewords to length 1, as the authors do.
        init: ``"uniform"`` draws from U(-1/K, 1/K), ``"normal"`` from N(0, 1).

    Raises:
        VaevqMedError: for an option out of its range, or sizes that do not fit together.

    Example:
        >>> quantizer = MGVQ(num_embeddings=8, embedding_dim=4, num_codebooks=2).eval()
        >>> indices = quantizer(torch.ones(1, 4, 2, 2)).indices
        >>> quantizer.indices_to_codes(indices, num_active=1)[:, 2:].abs().sum().item()
        0.0
    """

    first_argument: ClassVar[str | None] = "num_active"

    usage: Tensor

    def __init__(
        self,
        *,
        num_embeddings: int,
        embedding_dim: int,
        num_codebooks: int = 4,
        mask_probabilities: Sequence[float] | None = None,
        decay: float = 0.99,
        revival: bool = True,
        normalize: bool = True,
        init: str = "uniform",
    ) -> None:
        super().__init__(
            num_embeddings=num_embeddings,
            embedding_dim=embedding_dim,
            num_codebooks=num_codebooks,
            normalize=normalize,
            init=init,
        )
        probabilities = [0.0] * num_codebooks if mask_probabilities is None else [float(p) for p in mask_probabilities]
        if (
            len(probabilities) != num_codebooks
            or probabilities[0] != 0
            or probabilities != sorted(probabilities)
            or probabilities[-1] > 1
        ):
            raise VaevqMedError(
                f"mask_probabilities is {probabilities}; expected {num_codebooks} numbers from 0 up to at most 1, "
                "none below the one before"
            )
        if not 0 < decay < 1:
            raise VaevqMedError(f"decay is {decay}; expected a number in (0, 1)")
        self.mask_probabilities = probabilities
        self.decay = decay
        self.revival = revival
        self.register_buffer("usage", torch.zeros(num_codebooks, num_embeddings))

    def codebook(self) -> Tensor:
        """The tables, ``[G, K, D / G]``; of codewords of length 1 where they are normalized."""
        # Revival writes to the parameter after the look-up, so in training no graph may have saved it.
        table = self.embedding.clone() if self.training else self.embedding
        return F.normalize(table, dim=-1) if self.normalize else table

    def indices_to_codes(self, indices: Tensor, *, num_active: int | None = None) -> Tensor:
        """Codes ``[B, D, *grid]`` of indices ``[B, *grid, G]``.

        Args:
            indices: int64, in [0, K).
            num_active: keep that many of the first groups and zero the others, as nested masking does in training; by
                default all are kept.

        Raises:
            VaevqMedError: the indices have another shape, one is not in [0, K), or ``num_active`` is not in [1, G].
        """
        codes = super().indices_to_codes(indices)
        if num_active is None:
            return codes
        if not 1 <= num_active <= self.num_codebooks:
            raise VaevqMedError(f"num_active is {num_active}; expected 1 to {self.num_codebooks}")
        return self._keep(codes, num_active)

    def _keep(self, z: Tensor, num_active: int) -> Tensor:
        """``z`` ``[B, D, *grid]`` with zeros in all but the first groups."""
        kept = torch.zeros(1, self.embedding_dim, *[1] * (z.ndim - 2), device=z.device, dtype=z.dtype)
        kept[:, : num_active * (self.embedding_dim // self.num_codebooks)] = 1
        return z * kept

    def _num_active(self, device: torch.device) -> int:
        """Groups that this call does not zero, the same on every process."""
        if not self.training or self.mask_probabilities[-1] == 0:
            return self.num_codebooks
        u = number_from_first_process(torch.rand(1), device)
        return sum(u >= p for p in self.mask_probabilities)

    def forward(self, z: Tensor, posterior: Posterior | None = None) -> QuantizerOutput:
        """Quantize ``z`` ``[B, D, *grid]``; in training mode, zero the last groups at random and revive codewords."""
        self.check_latent(z)
        num_active = self._num_active(z.device)
        with torch.autocast(z.device.type, enabled=False):
            z = self.scale(z.float())
            codebook = self.codebook()
            indices = self.assign(z, codebook)
            codes = look_up_groups(indices, codebook)
            whole = vq_losses(self._keep(z, num_active), self._keep(codes, num_active))
            losses = {name: loss * self.num_codebooks / num_active for name, loss in whole.items()}
            quantized = self._keep(straight_through(codes, z), num_active)
            if self.training:
                self.follow(z.detach(), indices)
            return QuantizerOutput(quantized=quantized, codes=codes, indices=indices, losses=losses, codebook=codebook)

    @outside_compiled_graphs
    @torch.no_grad()
    def update(self, z: Tensor, indices: Tensor) -> None:  # type: ignore[override]
        """Count the codewords' use and revive the unused ones, on every process alike.

        Args:
            z: what was quantized, ``[B, D, *grid]``.
            indices: ``[B, *grid, G]``.
        """
        codebook = self.codebook().detach()  # [G, K, D / G], as it was searched
        size = self.num_embeddings
        offsets = size * torch.arange(self.num_codebooks, device=z.device)
        places = (indices + offsets).flatten()
        counts = torch.zeros_like(self.usage)
        # Not ``bincount``: a GPU's host would wait for the largest index.
        counts.view(-1).index_add_(0, places, torch.ones_like(places, dtype=counts.dtype))
        counts = sum_in_place(counts)
        self.usage.lerp_(counts / counts.sum(dim=1, keepdim=True), 1 - self.decay)
        if not self.revival:
            return
        strength = torch.exp(-10 * size * self.usage / (1 - self.decay) - 1e-3)
        uniform = from_first_process(torch.rand(self.usage.shape).to(z.device, non_blocking=True))
        everything = torch.arange(size, device=z.device)
        for group, latents in enumerate(self.split(z).unbind(dim=1)):
            # On a CPU what is in use, of strength 0, is left out; a GPU's host would have to wait for the number.
            weak = strength[group].nonzero().squeeze(1) if z.device.type == "cpu" else everything
            old = codebook[group, weak]
            anchors = draw_anchors(rows(latents), old, uniform[group, weak])
            self.embedding[group, weak] = old.lerp(anchors, strength[group, weak].unsqueeze(1))


@torch.no_grad()
def draw_anchors(latents: Tensor, codewords: Tensor, uniform: Tensor) -> Tensor:
    """A latent of any process for each codeword, drawn with the probability ``softmax_n(-||z_n - e||^2)``.

    It inverts the distribution function, a few codewords at a time, so that no N x M matrix is held. Each process gets
    the same result, up to rounding the one that a single process would get with all the latents in the order of the
    ranks.

    Args:
        latents: ``[N, C]`` of this process in fp32; N may differ from process to process.
        codewords: ``[M, C]``, the same on every process.
        uniform: a draw from U(0, 1) a codeword, ``[M]``, the same on every process.

    Returns:
        ``[M, C]``.

    >>> latents = torch.tensor([[0.0], [1.0]])
    >>> draw_anchors(latents, torch.zeros(2, 1), torch.tensor([0.7, 0.8])).flatten().tolist()
    [0.0, 1.0]
    """
    if codewords.shape[0] == 0:
        return codewords
    chunk = _PROBABILITIES_AT_ONCE.get(latents.device.type, _PROBABILITIES_AT_ONCE["other"])
    step = max(1, chunk // max(1, latents.shape[0]))
    if not is_distributed():
        return torch.cat(
            [_invert(latents, e, u) for e, u in zip(codewords.split(step), uniform.double().split(step), strict=True)]
        )
    own = torch.cat([_logits(latents, e).logsumexp(dim=1) for e in codewords.split(step)])
    masses = of_each_process(own).softmax(dim=0)  # [P, M]
    upper = masses.cumsum(dim=0)
    chosen = (upper <= uniform).sum(dim=0).clamp_max(len(masses) - 1)
    mass = masses[rank()]
    # Not a number where this process has no mass, but then it is not the chosen one.
    within = ((uniform - upper[rank()] + mass) / mass).clamp(0, 1)
    found = [_invert(latents, e, u) for e, u in zip(codewords.split(step), within.split(step), strict=True)]
    here = (chosen == rank()).unsqueeze(1)
    return sum_in_place(torch.where(here, torch.cat(found), torch.zeros_like(codewords)))


def _logits(latents: Tensor, codewords: Tensor) -> Tensor:
    """``-||z - e||^2``, ``[M, N]``, in float64."""
    return -torch.cdist(codewords.double(), latents.double()).square()


def _invert(latents: Tensor, codewords: Tensor, uniform: Tensor) -> Tensor:
    """The latent at which the distribution function of each codeword passes its ``uniform``."""
    upper = _logits(latents, codewords).softmax(dim=1).cumsum(dim=1)
    index = torch.searchsorted(upper, uniform.double().unsqueeze(1), right=True).squeeze(1)
    return latents[index.clamp_max(latents.shape[0] - 1)]
