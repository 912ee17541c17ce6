"""Lookup-free quantization (LFQ, MAGVIT-v2, arXiv 2310.05737) as Open-MAGVIT2 (2409.04410) uses it: signs of channels.

The code of ``d`` channels is ``sign(z)`` (0 goes to -1), its index the number with these bits, so that ``K = 2^d``. An
entropy term makes single latents sure of their code and all of them together use every code:
``mean_n H(p_n) - H(mean_n p_n)`` with ``p_n = softmax(2 z_n . C / T)`` over all K codes ``C = {-1, 1}^d``.

The N x K probabilities are never formed. ``p_n`` is a product of d independent bits with ``P(+1) = sigmoid(4 z / T)``,
so that its entropy is the sum of theirs. The mean over n is no product, but each ``p_n`` is the outer product of the
probabilities of its first and of its last bits, so that the mean over n is one product of ``[N, 2^(d/2)]`` matrices.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.processes import mean_of_processes
from vaevq_med.networks.quantizers.scalar import ScalarQuantizer


class LFQ(ScalarQuantizer):
    """Each channel is one bit.

    The losses are ``commitment = mean((z - sg sign(z))^2)`` over every element, and ``entropy``, see
    :func:`bit_entropies`, in nats. Open-MAGVIT2's weights are 0.25 and 0.1. In training under DDP the mean
    distribution is that of every process together; every process must have as many latents.

    Args:
        num_embeddings: K, a power of 2; the first channel is the highest of its log2 K bits.
        embedding_dim: D; log2 K, which is the default, unless there is a projection.
        temperature: T.
        bits_per_group: bits whose joint distribution the entropy of the mean is taken of; by default all, which
            is exact. With fewer, the entropies of groups of bits are added up, an upper bound that needs memory for
            ``2^bits_per_group`` codes in place of K (Open-MAGVIT2: 9 of 18 bits).
        projection: linear layers from D channels to one a bit and back.
        codebook_per_bit: give each bit as an index of its own, the first channel's first: G = log2 K codebooks of two
            codewords in place of one of K, for a prior over bits (as MaskBit's, arXiv 2409.16211). Codes and losses are
            the same.

    Raises:
        VaevqMedError: sizes that do not fit together, or a temperature that is not above 0.

    Example:
        >>> output = LFQ(num_embeddings=8)(torch.tensor([0.5, -2.0, 0.1]).view(1, 3, 1, 1))
        >>> output.indices.item(), output.codes.flatten().tolist()
        (5, [1.0, -1.0, 1.0])
    """

    size_arguments: ClassVar[tuple[str, ...]] = ("num_embeddings", "embedding_dim")

    def __init__(
        self,
        *,
        num_embeddings: int,
        embedding_dim: int | None = None,
        temperature: float = 0.01,
        bits_per_group: int | None = None,
        projection: bool = False,
        codebook_per_bit: bool = False,
    ) -> None:
        if num_embeddings < 2 or num_embeddings & (num_embeddings - 1):
            raise VaevqMedError(f"num_embeddings is {num_embeddings}; expected a power of 2")
        if temperature <= 0:
            raise VaevqMedError(f"temperature is {temperature}; expected above 0")
        bits = num_embeddings.bit_length() - 1
        if bits_per_group is not None and not 1 <= bits_per_group <= bits:
            raise VaevqMedError(f"bits_per_group is {bits_per_group}; expected 1 to {bits}, the bits of an index")
        super().__init__(
            levels=[2] * bits,
            strides=[2**bit for bit in reversed(range(bits))],
            offset=[0.5] * bits,
            scale=[0.5] * bits,
            num_embeddings=num_embeddings,
            embedding_dim=embedding_dim,
            projection=projection,
        )
        self.temperature = temperature
        self.bits_per_group = bits if bits_per_group is None else bits_per_group
        self.codebook_per_bit = codebook_per_bit
        if codebook_per_bit:
            self.num_embeddings, self.num_codebooks = 2, bits

    def indices_to_digits(self, indices: Tensor) -> Tensor:
        """Bits ``[B, *grid, d]`` of indices ``[B, *grid, G]``."""
        return indices if self.codebook_per_bit else super().indices_to_digits(indices)

    def digits_to_indices(self, digits: Tensor) -> Tensor:
        """Indices ``[B, *grid, G]`` of bits ``[B, *grid, d]``."""
        return digits if self.codebook_per_bit else super().digits_to_indices(digits)

    def bound(self, latent: Tensor) -> Tensor:
        """Half the latent: codes are 2 apart."""
        return latent / 2

    def digits(self, steps: Tensor) -> Tensor:
        """1 where the latent is above 0, else 0."""
        return (steps > 0).long()

    def losses(self, latent: Tensor, codes: Tensor) -> Mapping[str, Tensor]:
        """``commitment`` and ``entropy`` of the channels ``[B, *grid, d]``."""
        of_each, of_mean = bit_entropies(
            latent.flatten(0, -2), self.temperature, self.bits_per_group, synchronize=self.training
        )
        return {"commitment": F.mse_loss(latent, codes), "entropy": of_each - of_mean}


def bit_entropies(
    latents: Tensor, temperature: float, bits_per_group: int, *, synchronize: bool = False
) -> tuple[Tensor, Tensor]:
    """Mean entropy of ``p_n = softmax(2 z_n . C / T)`` over ``C = {-1, 1}^d``, and the entropy of their mean.

    Args:
        latents: ``[N, d]``.
        temperature: T.
        bits_per_group: the second is the sum of the entropies of the mean over consecutive groups of so many bits;
            exact where that is d, otherwise an upper bound.
        synchronize: take the mean over every process. The gradient is such that its average over the processes is
            that of one process with all the latents.

    Returns:
        Two scalars, in nats.

    >>> of_each, of_mean = bit_entropies(torch.tensor([[-9.0, 9.0], [9.0, 9.0]]), 1.0, 2)
    >>> round(of_each.item(), 4), round(of_mean.item(), 4)
    (0.0, 0.6931)
    """
    logits = 4 / temperature * latents
    size = logits.abs()
    of_each = (F.softplus(-size) + size * torch.sigmoid(-size)).sum(dim=1).mean()
    of_mean = torch.zeros_like(of_each)
    for group in logits.split(bits_per_group, dim=1):
        half = (group.shape[1] + 1) // 2
        mean = joint_probabilities(group[:, :half]).T @ joint_probabilities(group[:, half:]) / len(group)
        if synchronize:
            mean = mean_of_processes(mean)
        # The gradient of p log p is not finite at 0, where most of the codes are when T is small.
        mean = mean.clamp_min(torch.finfo(mean.dtype).tiny)
        of_mean = of_mean - (mean * mean.log()).sum()
    return of_each, of_mean


def joint_probabilities(logits: Tensor) -> Tensor:
    """Probability of each of the ``2^b`` values of b independent bits with these logits: ``[N, b]`` to ``[N, 2^b]``.

    >>> joint_probabilities(torch.tensor([[0.0, 99.0]])).tolist()
    [[0.0, 0.5, 0.0, 0.5]]
    """
    joint = logits.new_ones(len(logits), 1)
    for one in logits.unbind(dim=1):
        bit = torch.sigmoid(torch.stack([-one, one], dim=1))
        joint = (joint.unsqueeze(2) * bit.unsqueeze(1)).flatten(1)
    return joint
