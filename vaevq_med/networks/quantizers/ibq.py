"""Index backpropagation quantization (IBQ, arXiv 2412.02692): a straight-through gradient for every codeword.

The index is ``k* = argmax_k z . e_k``. The one-hot vector of it takes the gradient of ``p = softmax_k(z . e_k)``,
``sg(onehot(k*) - p) + p``, before it is multiplied by the codebook, so that one step moves all codewords and not the
chosen ones alone. In the product's value only the chosen codeword remains, its gradients are those of that codeword
and of the mixture ``sum_k p_k sg(e_k)``, which is how they are computed here, without the N x K probabilities.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.outputs import Posterior, QuantizerOutput
from vaevq_med.networks.quantizers.base import (
    Cluster,
    Quantizer,
    channels_first,
    look_up,
    on_grid,
    put_at_centers,
    rows,
    vq_losses,
)
from vaevq_med.networks.quantizers.soft_assignment import assignment_entropy, soft_codes
from vaevq_med.networks.ranges import check_sizes


class IBQ(Quantizer):
    """A free codebook of which every codeword gets a gradient from every latent.

    The losses are, with the authors' weights, ``double_quantization = mean((q - z)^2)`` (1), where q is ``quantized``
    with its gradient; ``commitment = mean((sg e - z)^2)`` (1) and ``codebook = mean((e - sg z)^2)`` (0.25) of the
    chosen codeword e; and ``entropy = mean_n H(p_n) - H(mean_n p_n)`` of ``p = softmax_k(z . e_k / T)`` in nats (0.05).
    In training under DDP the mean distribution is that of every process together; every process must have as many
    latents. Through ``quantized``, too, a gradient reaches the codebook.

    Args:
        num_embeddings: K.
        embedding_dim: D; the authors' is 256.
        entropy_temperature: T of the entropy alone.

    Raises:
        VaevqMedError: for an option out of its range.

    Example:
        >>> quantizer = IBQ(num_embeddings=8, embedding_dim=4)
        >>> (gradient,) = torch.autograd.grad(quantizer(torch.ones(1, 4, 1, 1)).quantized[0, 0].sum(),
        ...                                   quantizer.embedding)
        >>> gradient.abs().sum(dim=1).count_nonzero().item()
        8
    """

    def __init__(self, *, num_embeddings: int, embedding_dim: int, entropy_temperature: float = 0.01) -> None:
        super().__init__()
        check_sizes(num_embeddings=num_embeddings, embedding_dim=embedding_dim)
        if not entropy_temperature > 0:
            raise VaevqMedError(f"entropy_temperature is {entropy_temperature}; expected above 0")
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.entropy_temperature = entropy_temperature
        self.embedding = nn.Parameter(torch.randn(num_embeddings, embedding_dim))

    def codebook(self) -> Tensor:
        """The table itself, ``[K, D]``."""
        return self.embedding

    def start_codebook(self, latents: Tensor, cluster: Cluster) -> bool:
        """Put the codewords at the centers."""
        return put_at_centers(self.embedding, latents, cluster)

    def forward(self, z: Tensor, posterior: Posterior | None = None) -> QuantizerOutput:
        """Quantize ``z`` ``[B, D, *grid]`` by the codeword of the largest inner product."""
        self.check_latent(z)
        with torch.autocast(z.device.type, enabled=False):
            z = z.float()
            codebook, latents = self.codebook(), rows(z)
            mixture, index = soft_codes(latents, codebook, codebook.detach(), temperature=1.0)
            soft, indices = channels_first(on_grid(mixture, z, self.embedding_dim)), on_grid(index, z)
            codes = look_up(indices, codebook)
            # The difference is exactly zero, so that the value is the code to the bit.
            quantized = codes + (soft - soft.detach())
            entropy = assignment_entropy(
                latents, codebook, temperature=self.entropy_temperature, synchronize=self.training
            )
            return QuantizerOutput(
                quantized=quantized,
                codes=codes,
                indices=indices,
                losses={
                    **vq_losses(z, codes),
                    "double_quantization": F.mse_loss(quantized, z),
                    "entropy": entropy,
                },
                codebook=codebook,
            )
