"""SimVQ (arXiv 2411.02038): a codebook reparametrized by one linear map, so that every codeword moves at once.

``codebook = C W^T + b`` with a frozen basis ``C ~ N(0, 1/D)`` and a trainable linear layer. Each step's gradient
reaches every codeword through W, where a free codebook moves the used ones only. The authors' look-up by index
leaves out W and b; here ``indices_to_codes`` reads the same table as the search.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vaevq_med.networks.quantizers.base import Cluster, CodebookQuantizer, rows
from vaevq_med.networks.ranges import check_choice


class SimVQ(CodebookQuantizer):
    """A codebook that is the product of a basis and a trainable linear layer.

    Args:
        num_embeddings: K.
        embedding_dim: D.
        trainable_basis: train the basis too, as the released code of VAEVQ does; SimVQ freezes it.
        bias: whether the linear layer has one.
        init: the linear layer's start: ``"default"`` (PyTorch's, as the released code), or ``"orthogonal"``
            with ``scale``, which keeps the basis' isotropy.
        scale: factor of the orthogonal start; ``sqrt(D)`` makes the codewords start as N(0, I), the prior.
        assignment: ``"euclidean"`` or ``"posterior"``, see :class:`CodebookQuantizer`.

    Example:
        >>> quantizer = SimVQ(num_embeddings=8, embedding_dim=4)
        >>> quantizer.codebook().shape, quantizer.basis.requires_grad
        (torch.Size([8, 4]), False)
    """

    def __init__(
        self,
        *,
        num_embeddings: int,
        embedding_dim: int,
        trainable_basis: bool = False,
        bias: bool = True,
        init: str = "default",
        scale: float = 1.0,
        assignment: str = "euclidean",
    ) -> None:
        super().__init__(num_embeddings=num_embeddings, embedding_dim=embedding_dim, assignment=assignment)
        basis = torch.randn(num_embeddings, embedding_dim) * embedding_dim**-0.5
        if trainable_basis:
            self.basis = nn.Parameter(basis)
        else:
            self.register_buffer("basis", basis)
        self.projection = nn.Linear(embedding_dim, embedding_dim, bias=bias)
        check_choice("init", init, ("default", "orthogonal"))
        if init == "orthogonal":
            nn.init.orthogonal_(self.projection.weight, gain=scale)
            if bias:
                nn.init.zeros_(self.projection.bias)

    basis: Tensor

    def codebook(self) -> Tensor:
        """The projected table of this step, ``[K, D]``, in fp32."""
        with torch.autocast(self.basis.device.type, enabled=False):
            return self.projection(self.basis)

    @torch.no_grad()
    def start_codebook(self, latents: Tensor, cluster: Cluster) -> bool:
        """Let the map of the basis give the centers: a basis of them, at the mean squared length of a random one.

        With centers c of mean m, ``basis = (c - m) / s``, ``W = s I`` and ``b = m``, where s makes the basis' mean
        squared length 1; without a bias m is 0. The basis, which stays, then has the shape of the data.
        """
        centers = cluster(rows(latents.detach().float()), self.num_embeddings)
        mean = torch.zeros_like(centers[0]) if self.projection.bias is None else centers.mean(dim=0)
        scale = (centers - mean).square().sum(dim=1).mean().sqrt().clamp_min(1e-6)
        self.basis.copy_((centers - mean) / scale)
        self.projection.weight.copy_(scale * torch.eye(len(mean), device=mean.device))
        if self.projection.bias is not None:
            self.projection.bias.copy_(mean)
        return True
