"""What quantizers share whose codebooks each quantize channels of their own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.quantizers.base import Quantizer, channels_first, on_grid, rows
from vaevq_med.networks.quantizers.nearest import nearest_codeword


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
        if num_embeddings < 1 or num_codebooks < 1 or embedding_dim < 1 or embedding_dim % num_codebooks:
            raise VaevqMedError(
                f"num_embeddings is {num_embeddings}, num_codebooks {num_codebooks} and embedding_dim {embedding_dim}; "
                "expected at least 1 each, and embedding_dim a multiple of num_codebooks"
            )
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.num_codebooks = num_codebooks
        self.normalize = normalize
        self.embedding = nn.Parameter(torch.empty(num_codebooks, num_embeddings, embedding_dim // num_codebooks))
        if init == "uniform":
            nn.init.uniform_(self.embedding, -1 / num_embeddings, 1 / num_embeddings)
        elif init == "normal":
            nn.init.normal_(self.embedding)
        else:
            raise VaevqMedError(f"init is {init!r}; expected 'uniform' or 'normal'")
        if normalize:
            # A step of the optimizer would turn the short codewords of a large uniform start at random.
            with torch.no_grad():
                self.embedding.copy_(F.normalize(self.embedding, dim=-1))

    def codebook(self) -> Tensor:
        """The tables, ``[G, K, D / G]``; of codewords of length 1 where they are normalized."""
        return F.normalize(self.embedding, dim=-1) if self.normalize else self.embedding

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """Codes ``[B, D, *grid]`` of indices ``[B, *grid, G]``.

        Raises:
            VaevqMedError: the indices have another shape, or one of them is not in [0, K).
        """
        self.check_indices(indices)
        return look_up_groups(indices, self.codebook())

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
