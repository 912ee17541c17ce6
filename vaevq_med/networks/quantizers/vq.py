"""Plain vector quantization with a free codebook: VQ-VAE (arXiv 1711.00937) as VQGAN (2012.09841) uses it.

``k* = argmin_k ||z - e_k||^2``, straight-through gradient, every codeword a parameter. The weights of the two VQ
losses live in the objective: ``codebook`` 1 and ``commitment`` 0.25 is the form of the paper; VQGAN's released
training swaps them (``docs/deviations.md``).
"""

from __future__ import annotations

from torch import Tensor

from vaevq_med.networks.quantizers.base import Cluster, CodebookQuantizer, new_codewords, put_at_centers


class VectorQuantizer(CodebookQuantizer):
    """A codebook of free parameters.

    Args:
        num_embeddings: K.
        embedding_dim: D.
        init: ``"uniform"`` draws from U(-1/K, 1/K), as VQGAN; ``"normal"`` from N(0, 1), the prior.
        assignment: ``"euclidean"`` or ``"posterior"``, see :class:`CodebookQuantizer`.

    Raises:
        VaevqMedError: for another ``init``.

    Example:
        >>> quantizer = VectorQuantizer(num_embeddings=8, embedding_dim=4)
        >>> import torch
        >>> quantizer(torch.zeros(1, 4, 2, 2)).indices.shape
        torch.Size([1, 2, 2, 1])
    """

    def __init__(
        self, *, num_embeddings: int, embedding_dim: int, init: str = "uniform", assignment: str = "euclidean"
    ) -> None:
        super().__init__(num_embeddings=num_embeddings, embedding_dim=embedding_dim, assignment=assignment)
        self.embedding = new_codewords(num_embeddings, embedding_dim, init=init)

    def codebook(self) -> Tensor:
        """The table itself, ``[K, D]``."""
        return self.embedding

    def start_codebook(self, latents: Tensor, cluster: Cluster) -> bool:
        """Put the codewords at the centers."""
        return put_at_centers(self.embedding, latents, cluster)
