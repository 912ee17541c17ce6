"""SoftVQ (SoftVQ-VAE, arXiv 2412.10958): a latent becomes a mixture of codewords, with a hard read-out beside it.

``p = softmax_k(z . sg(e_k) / T)`` and ``code = sum_k p_k e_k``, of latents and codewords of length 1: the codewords
learn through the mixture alone. The mixture is continuous, and is what the method decodes in training and inference;
the likeliest codeword, ``argmax_k p_k``, is the hard read-out, the one that compares with discrete tokenizers.

The positions, in row-major order, are cut into S contiguous segments, each with a codebook of its own. A position thus
says which codebook its index belongs to: an index stands for a codeword only along with where it is.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.outputs import Posterior, QuantizerOutput
from vaevq_med.networks.quantizers.base import (
    Cluster,
    Quantizer,
    channels_first,
    channels_last,
    new_codewords,
    on_grid,
    put_at_centers,
    straight_through,
)
from vaevq_med.networks.quantizers.soft_assignment import assignment_entropy, soft_codes
from vaevq_med.networks.ranges import check_sizes


class SoftVQ(Quantizer):
    """Mixtures of codewords, one codebook a segment of the positions.

    The one loss is ``entropy = mean_n H(p_n) - H(mean_n p_n)`` of ``p = softmax_k(z . sg(e_k) / T')`` in nats, of each
    segment, averaged over the segments; the authors' weight is 0.01. In training under DDP the mean distribution is
    that of every process together; every process must have as many latents.

    With the soft read-out ``codes`` and ``quantized`` are the mixture, ``indices`` the likeliest codewords that
    :meth:`indices_to_codes` looks up. With the hard one they are the likeliest codewords; ``quantized`` then has the
    gradient of the mixture.

    Args:
        num_embeddings: K, codewords of each segment's codebook; the authors' is 8192.
        embedding_dim: D; the authors' is 32.
        num_segments: S; the authors' is 4. The positions need not be a multiple: the first segments have one more.
        temperature: T of the mixture.
        entropy_temperature: T' of the entropy.
        readout: ``"soft"`` or ``"hard"``.
        normalize: scale latents and codewords to length 1, as the authors do.
        init: ``"uniform"`` draws from U(-1/K, 1/K), ``"normal"`` from N(0, 1); normalized codewords start at length 1.

    Raises:
        VaevqMedError: for an option out of its range.

    Example:
        >>> quantizer = SoftVQ(num_embeddings=8, embedding_dim=4, num_segments=2)
        >>> quantizer(torch.ones(1, 4, 2, 2)).indices.shape, quantizer.codebook().shape
        (torch.Size([1, 2, 2, 1]), torch.Size([2, 8, 4]))
    """

    readouts: ClassVar[tuple[str, ...]] = ("soft", "hard")

    def __init__(
        self,
        *,
        num_embeddings: int,
        embedding_dim: int,
        num_segments: int = 4,
        temperature: float = 0.07,
        entropy_temperature: float = 0.01,
        readout: str = "soft",
        normalize: bool = True,
        init: str = "uniform",
    ) -> None:
        super().__init__()
        check_sizes(num_embeddings=num_embeddings, embedding_dim=embedding_dim, num_segments=num_segments)
        if not (temperature > 0 and entropy_temperature > 0):
            raise VaevqMedError(
                f"temperature is {temperature} and entropy_temperature {entropy_temperature}; expected above 0"
            )
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.num_segments = num_segments
        self.temperature = temperature
        self.entropy_temperature = entropy_temperature
        self.normalize = normalize
        self.select_readout(readout)
        shape = (num_segments, num_embeddings, embedding_dim)
        self.embedding = new_codewords(*shape, init=init, normalize=normalize)

    def select_readout(self, readout: str) -> None:
        """Decode mixtures (``"soft"``) or codewords (``"hard"``) from now on.

        Raises:
            VaevqMedError: for another name.
        """
        super().select_readout(readout)
        self.is_discrete = readout == "hard"

    def codebook(self) -> Tensor:
        """The tables, ``[S, K, D]``; of codewords of length 1 where they are normalized."""
        return F.normalize(self.embedding, dim=-1) if self.normalize else self.embedding

    def start_codebook(self, latents: Tensor, cluster: Cluster) -> bool:
        """Put each segment's codewords at the centers of its positions, at length 1 where they are normalized.

        A segment without positions keeps its start.
        """
        z = F.normalize(latents.detach().float(), dim=1) if self.normalize else latents
        parts = self._segments(channels_last(z.flatten(2)))  # [B, n / S, D] each
        for table, part in zip(self.embedding.data, parts, strict=True):
            if part.shape[1]:
                put_at_centers(table, channels_first(part), cluster)
        if self.normalize:
            self.embedding.data.copy_(F.normalize(self.embedding.data, dim=-1))
        return True

    def codes_of(self, indices: Tensor) -> Tensor:
        """Codewords ``[B, D, *grid]``, each from the codebook of its position's segment."""
        return self._look_up(indices, self.codebook())

    def _look_up(self, indices: Tensor, codebook: Tensor) -> Tensor:
        parts = self._segments(indices.flatten(1))
        codes = torch.cat([F.embedding(i, table) for i, table in zip(parts, codebook, strict=True)], dim=1)
        return channels_first(codes.view(*indices.shape[:-1], self.embedding_dim))  # of [B, n, D]

    def _segments(self, positions: Tensor) -> tuple[Tensor, ...]:
        """``[B, n, ...]`` in S parts; some are empty where there are fewer positions than segments."""
        return positions.tensor_split(self.num_segments, dim=1)

    def forward(self, z: Tensor, posterior: Posterior | None = None) -> QuantizerOutput:
        """Mix codewords for ``z`` ``[B, D, *grid]``, or look up its likeliest ones."""
        self.check_latent(z)
        with torch.autocast(z.device.type, enabled=False):
            z = z.float()
            if self.normalize:
                z = F.normalize(z, dim=1)
            codebook = self.codebook()
            mixtures, indices, entropies = [], [], []
            for part, table in zip(self._segments(channels_last(z.flatten(2))), codebook, strict=True):
                latents, keys = part.reshape(-1, self.embedding_dim), table.detach()
                mixture, index = soft_codes(latents, keys, table, temperature=self.temperature)
                mixtures.append(mixture.view(part.shape))
                indices.append(index.view(part.shape[:2]))
                if len(latents):
                    entropies.append(
                        assignment_entropy(
                            latents, keys, temperature=self.entropy_temperature, synchronize=self.training
                        )
                    )
            soft = channels_first(on_grid(torch.cat(mixtures, dim=1), z, self.embedding_dim))
            chosen = on_grid(torch.cat(indices, dim=1), z)
            losses = {"entropy": torch.stack(entropies).mean() if entropies else soft.sum()}
            if self.readout == "soft":
                return QuantizerOutput(quantized=soft, codes=soft, indices=chosen, losses=losses, codebook=codebook)
            codes = self._look_up(chosen, codebook)
            quantized = straight_through(codes, soft)
            return QuantizerOutput(quantized=quantized, codes=codes, indices=chosen, losses=losses, codebook=codebook)
