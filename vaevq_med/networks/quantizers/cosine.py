"""Vector quantization by cosine similarity: latents and codewords of length 1 (ViT-VQGAN, arXiv 2110.04627, Sec. 3.2).

``k* = argmin_k ||z / |z| - e_k / |e_k|||^2``; the codes that the decoder sees have length 1. In few channels (8 of
LlamaGen, arXiv 2406.06525; 32 of ViT-VQGAN) the codewords of a large codebook stay in use.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vaevq_med.networks.quantizers.base import Cluster, CodebookQuantizer, new_codewords, put_at_centers


class CosineVQ(CodebookQuantizer):
    """A codebook of directions.

    The losses are those of VQ between vectors of length 1.

    Args:
        num_embeddings: K.
        embedding_dim: D.
        init: ``"normal"`` draws from N(0, 1), which is even over the directions; ``"uniform"`` from a cube, as
            LlamaGen. Codewords start at length 1.

    Raises:
        VaevqMedError: for another ``init``, or fewer than one codeword or dimension.

    Example:
        >>> quantizer = CosineVQ(num_embeddings=8, embedding_dim=4)
        >>> import torch
        >>> bool(torch.allclose(quantizer.codebook().norm(dim=1), torch.ones(8)))
        True
    """

    def __init__(self, *, num_embeddings: int, embedding_dim: int, init: str = "normal") -> None:
        super().__init__(num_embeddings=num_embeddings, embedding_dim=embedding_dim)
        self.embedding = new_codewords(num_embeddings, embedding_dim, init=init, normalize=True)

    def codebook(self) -> Tensor:
        """The codewords at length 1, ``[K, D]``."""
        return F.normalize(self.embedding, dim=1)

    def compared(self, z: Tensor) -> Tensor:
        """The direction of ``z`` ``[B, D, *grid]``, to which the gradient passes straight through."""
        return F.normalize(z, dim=1)

    def start_codebook(self, latents: Tensor, cluster: Cluster) -> bool:
        """Put the codewords at the centers of the directions, at length 1."""
        done = put_at_centers(self.embedding, self.compared(latents.float()), cluster)
        with torch.no_grad():
            self.embedding.copy_(self.codebook())
        return done
