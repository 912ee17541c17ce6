"""Codebooks that each quantize channels of their own: what such quantizers share, and factorized quantization."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.outputs import Posterior, QuantizerOutput
from vaevq_med.networks.quantizers.base import (
    Cluster,
    Quantizer,
    channels_first,
    new_codewords,
    on_grid,
    put_at_centers,
    rows,
    straight_through,
    vq_losses,
)
from vaevq_med.networks.quantizers.nearest import nearest_codeword
from vaevq_med.networks.ranges import check_sizes


class GroupedQuantizer(Quantizer):
    """G free codebooks of K codewords, each on ``D / G`` consecutive channels of the latent.

    Args:
        num_embeddings: K, codewords of each codebook.
        embedding_dim: D, a multiple of G.
        num_codebooks: G.
        normalize: whether the groups of the latent and the codewords are scaled to length 1, so that the nearest
            codeword is the one of the smallest angle.
        init: ``"uniform"`` draws from U(-1/K, 1/K), ``"normal"`` from N(0, 1); normalized codewords start at length 1.

    Raises:
        VaevqMedError: the sizes do not fit together, or for another ``init``.
    """

    def __init__(
        self, *, num_embeddings: int, embedding_dim: int, num_codebooks: int, normalize: bool, init: str
    ) -> None:
        super().__init__()
        check_sizes(num_embeddings=num_embeddings, num_codebooks=num_codebooks, embedding_dim=embedding_dim)
        if embedding_dim % num_codebooks:
            raise VaevqMedError(
                f"embedding_dim is {embedding_dim}; expected a multiple of num_codebooks {num_codebooks}"
            )
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.num_codebooks = num_codebooks
        self.normalize = normalize
        shape = (num_codebooks, num_embeddings, embedding_dim // num_codebooks)
        self.embedding = new_codewords(*shape, init=init, normalize=normalize)

    def codebook(self) -> Tensor:
        """The tables, ``[G, K, D / G]``; of codewords of length 1 where they are normalized."""
        return F.normalize(self.embedding, dim=-1) if self.normalize else self.embedding

    def codes_of(self, indices: Tensor) -> Tensor:
        """Each index in the table of its group."""
        return look_up_groups(indices, self.codebook())

    def start_codebook(self, latents: Tensor, cluster: Cluster) -> bool:
        """Put each group's codewords at the centers of its channels, at length 1 where they are normalized."""
        groups = self.split(self.scale(latents.detach().float())).unbind(dim=1)
        for table, group in zip(self.embedding.data, groups, strict=True):
            put_at_centers(table, group, cluster)
        if self.normalize:
            self.embedding.data.copy_(F.normalize(self.embedding.data, dim=-1))
        return True

    def scale(self, z: Tensor) -> Tensor:
        """What is quantized of the latent ``[B, D, *grid]``: its groups at length 1 where they are normalized."""
        return F.normalize(self.split(z), dim=2).reshape(z.shape) if self.normalize else z

    def split(self, z: Tensor) -> Tensor:
        """``[B, D, *grid]`` as ``[B, G, D / G, *grid]``."""
        return z.reshape(z.shape[0], self.num_codebooks, -1, *z.shape[2:])

    def assign(self, z: Tensor, codebook: Tensor) -> Tensor:
        """Indices ``[B, *grid, G]`` of ``z`` ``[B, D, *grid]`` in the tables ``[G, K, D / G]``."""
        groups = self.split(z.detach()).unbind(dim=1)
        found = [nearest_codeword(rows(g), table) for g, table in zip(groups, codebook.detach(), strict=True)]
        return on_grid(torch.stack(found, dim=-1), z, self.num_codebooks)


def look_up_groups(indices: Tensor, codebook: Tensor) -> Tensor:
    """Codes ``[B, D, *grid]`` of indices ``[B, *grid, G]`` in tables ``[G, K, D / G]``, differentiable.

    >>> look_up_groups(torch.tensor([[[[1, 0]]]]), torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]])).flatten().tolist()
    [2.0, 3.0]
    """
    groups, size, _ = codebook.shape
    offsets = size * torch.arange(groups, device=indices.device)
    codes = F.embedding(indices + offsets, codebook.flatten(0, 1))  # [B, *grid, G, D / G]
    return channels_first(codes.flatten(-2))


class FactorizedQuantizer(GroupedQuantizer):
    """Factorized quantization (FQGAN, arXiv 2411.16681): one large codebook as several small ones.

    Sub-codebook g quantizes group g of the channels, and the codes stand side by side. With K codewords each, ``K^G``
    combinations cost a search of ``G K``. So that the sub-codebooks do not say the same thing, the codes chosen at one
    position are kept at right angles (the disentanglement regularization):
    ``mean over positions and pairs i < j of cos(q_i, q_j)^2``.

    As in the authors' code, that gradient passes the straight-through estimator to the encoder; the codebooks follow
    through the codebook loss. Their frozen-vision-model representation learning (a head that predicts features of CLIP
    or DINO from a sub-codebook's codes), their six-layer transformer before each sub-codebook and their entropy term
    are left out: here the tokenizer's 1x1 convolution gives each group its own linear map of the features.

    The losses are ``codebook`` and ``commitment``, means over every element and so averaged over the sub-codebooks, and
    ``disentanglement``, unweighted (the authors' weight is 0.1).

    Args:
        num_embeddings: K, codewords of each sub-codebook.
        embedding_dim: D, a multiple of G; the authors' is 8 a sub-codebook.
        num_codebooks: G, at least 2.
        normalize: scale latent groups and codewords to length 1, as the authors do.
        init: ``"uniform"`` draws from U(-1/K, 1/K), ``"normal"`` from N(0, 1).

    Raises:
        VaevqMedError: fewer than two sub-codebooks, sizes that do not fit together, or another ``init``.

    Example:
        >>> quantizer = FactorizedQuantizer(num_embeddings=8, embedding_dim=4, num_codebooks=2)
        >>> output = quantizer(torch.ones(1, 4, 2, 2))
        >>> output.indices.shape, sorted(output.losses)
        (torch.Size([1, 2, 2, 2]), ['codebook', 'commitment', 'disentanglement'])
    """

    def __init__(
        self,
        *,
        num_embeddings: int,
        embedding_dim: int,
        num_codebooks: int = 2,
        normalize: bool = True,
        init: str = "uniform",
    ) -> None:
        if num_codebooks < 2:
            raise VaevqMedError(f"num_codebooks is {num_codebooks}; expected at least 2 to factorize a codebook")
        super().__init__(
            num_embeddings=num_embeddings,
            embedding_dim=embedding_dim,
            num_codebooks=num_codebooks,
            normalize=normalize,
            init=init,
        )

    def forward(self, z: Tensor, posterior: Posterior | None = None) -> QuantizerOutput:
        """Quantize ``z`` ``[B, D, *grid]``; the gradient passes straight through to the (normalized) groups."""
        self.check_latent(z)
        with torch.autocast(z.device.type, enabled=False):
            z = self.scale(z.float())
            codebook = self.codebook()
            indices = self.assign(z, codebook)
            codes = look_up_groups(indices, codebook)
            quantized = straight_through(codes, z)
            losses = {**vq_losses(z, codes), "disentanglement": mean_squared_cosine(self.split(quantized))}
            return QuantizerOutput(quantized=quantized, codes=codes, indices=indices, losses=losses, codebook=codebook)


def mean_squared_cosine(groups: Tensor) -> Tensor:
    """Squared cosine of two groups' vectors, averaged over positions and pairs of groups.

    Args:
        groups: ``[B, G, C, *grid]``, G at least 2.

    >>> round(mean_squared_cosine(torch.tensor([[3.0, 4.0], [0.0, 2.0]]).view(1, 2, 2, 1, 1)).item(), 4)
    0.64
    """
    unit = F.normalize(groups, dim=2)
    cosines = torch.einsum("bic...,bjc...->bij...", unit, unit)
    first, second = torch.triu_indices(groups.shape[1], groups.shape[1], offset=1, device=groups.device)
    return cosines[:, first, second].square().mean()
