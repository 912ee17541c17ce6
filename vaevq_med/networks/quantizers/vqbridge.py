"""FVQ (arXiv 2509.10140): a codebook that a small vision transformer, the VQBridge, makes anew at each step.

A trainable table ``E ~ U(-1/K, 1/K)`` of K codewords is laid out as an image of ``sqrt(K) x sqrt(K)`` pixels with D
channels and cut into patches; transformer blocks without positional embedding mix the patches, and a linear head gives
the patches of the codebook. Every codeword gets a gradient at each step, through what the blocks share.

The head starts at zero, so all codewords start equal, ties go to index 0, and the codebook unfolds from there: a
warm-up of the learning rate is essential (the authors take 4 of 40 epochs; ``warmup_steps`` in the bundles).

What the publication leaves open is as in DiT (arXiv 2212.09748): Xavier-uniform weights and zero biases, so that
patches, which carry no position, differ by their content from the first step on; GELU; and a normalization before the
head. The whole is computed in fp32, where the authors train in bf16.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.quantizers.base import CodebookQuantizer
from vaevq_med.networks.transformer import TransformerBlock, start_linear


class FVQ(CodebookQuantizer):
    """A codebook made by a transformer from a trainable table.

    In evaluation without gradients the codebook is made once and kept until a parameter changes.

    Args:
        num_embeddings: K, the square of a multiple of ``patch_size``.
        embedding_dim: D; the authors' is 256.
        patch_size: side of a patch, ``patch_size^2`` codewords a token; the authors' is 4, and 8 for 262,144 codewords.
        width: the transformer's channels.
        num_heads: its attention heads, a divisor of ``width``.
        depth: its blocks.
        mlp_ratio: hidden width of its perceptrons over ``width``.
        assignment: ``"euclidean"`` or ``"posterior"``, see :class:`CodebookQuantizer`.

    Raises:
        VaevqMedError: K is no such square, or a size does not fit.

    Example:
        >>> quantizer = FVQ(num_embeddings=64, embedding_dim=4, width=8)
        >>> quantizer.codebook().shape, quantizer.codebook().abs().max().item()
        (torch.Size([64, 4]), 0.0)
    """

    def __init__(
        self,
        *,
        num_embeddings: int,
        embedding_dim: int,
        patch_size: int = 4,
        width: int = 256,
        num_heads: int = 4,
        depth: int = 2,
        mlp_ratio: float = 2.0,
        assignment: str = "euclidean",
    ) -> None:
        super().__init__(num_embeddings=num_embeddings, embedding_dim=embedding_dim, assignment=assignment)
        self.side = math.isqrt(num_embeddings)
        if patch_size < 1 or self.side**2 != num_embeddings or self.side % patch_size:
            raise VaevqMedError(
                f"num_embeddings is {num_embeddings} with patch_size {patch_size}; expected the square of a multiple "
                "of patch_size, such as 16384 with 4"
            )
        if num_heads < 1 or width < 1 or width % num_heads or depth < 1 or mlp_ratio <= 0:
            raise VaevqMedError(
                f"found width {width}, num_heads {num_heads}, depth {depth} and mlp_ratio {mlp_ratio}; expected "
                "numbers above 0, and width a multiple of num_heads"
            )
        self.patch_size = patch_size
        self.table = nn.Parameter(torch.empty(num_embeddings, embedding_dim))
        nn.init.uniform_(self.table, -1 / num_embeddings, 1 / num_embeddings)
        channels = patch_size**2 * embedding_dim
        self.embed = nn.Linear(channels, width)
        self.blocks = nn.Sequential(
            *(
                TransformerBlock(width=width, num_heads=num_heads, mlp_ratio=mlp_ratio, affine=False)
                for _ in range(depth)
            )
        )
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.head = nn.Linear(width, channels)
        start_linear(self)
        nn.init.zeros_(self.head.weight)
        self._kept: tuple[tuple[object, ...], Tensor] | None = None

    def codebook(self) -> Tensor:
        """The table that the bridge makes, ``[K, D]``, in fp32."""
        exporting = torch.compiler.is_compiling() or torch.jit.is_tracing()
        if self.training or torch.is_grad_enabled() or exporting:
            self._kept = None
            return self._bridge()
        state = tuple((p.device, p.data_ptr(), p._version) for p in self.parameters())
        if self._kept is None or self._kept[0] != state:
            self._kept = (state, self._bridge())
        return self._kept[1]

    def _bridge(self) -> Tensor:
        with torch.autocast(self.table.device.type, enabled=False):
            side, patch = self.side // self.patch_size, self.patch_size
            # Codeword k is the pixel (k // sqrt K, k % sqrt K).
            patches = self.table.view(side, patch, side, patch, -1).transpose(1, 2).reshape(side * side, -1)
            patches = self.head(self.norm(self.blocks(self.embed(patches).unsqueeze(0)))).squeeze(0)
            codes = patches.view(side, side, patch, patch, -1).transpose(1, 2)
            return codes.reshape(self.num_embeddings, self.embedding_dim)
