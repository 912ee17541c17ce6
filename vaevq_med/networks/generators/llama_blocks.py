"""The block of a Llama-like transformer (arXiv 2302.13971) over a grid of tokens, and its cache of keys and values."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def axial_rotations(
    height: int, width: int, head_dim: int, *, num_codebooks: int = 1, device: torch.device | None = None
) -> Tensor:
    """Cosine and sine of every place of the sequence, ``[1 + h w G, head_dim / 2, 2]`` in fp32.

    With ``f_i = 10000^(-4 i / head_dim)``, the first half of the ``head_dim / 2`` pairs of channels turns by
    ``row f_i`` and the second by ``column f_i``. The first place, the class token's, is zero throughout.

    >>> axial_rotations(2, 2, 4)[3, :, 0]  # the position of row 1, column 0
    tensor([0.5403, 1.0000])
    """
    quarter = head_dim // 4
    frequencies = 10_000.0 ** (-torch.arange(quarter, dtype=torch.float32, device=device) / quarter)
    rows = torch.arange(height, device=device).repeat_interleave(width)
    columns = torch.arange(width, device=device).repeat(height)
    angles = torch.cat([rows[:, None] * frequencies, columns[:, None] * frequencies], dim=1)
    table = torch.stack([angles.cos(), angles.sin()], dim=-1).repeat_interleave(num_codebooks, dim=0)
    return torch.cat([table.new_zeros(1, *table.shape[1:]), table])


def rotate(x: Tensor, rotations: Tensor) -> Tensor:
    """Turn each pair of neighboring channels of ``[..., T, head_dim]`` by ``[T, head_dim / 2, 2]``, in fp32.

    Rotations of each image are ``[B, 1, T, head_dim / 2, 2]``. They may be the complex numbers ``[T, head_dim / 2]``
    instead: the result is the same to rounding, by one product in place of six operations, which counts where a step's
    time is that of its launches.
    """
    if rotations.is_complex():
        complex_pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(complex_pairs * rotations).flatten(-2).to(x.dtype)
    first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = rotations.unbind(-1)
    turned = torch.stack([first * cosine - second * sine, second * cosine + first * sine], dim=-1)
    return turned.flatten(-2).to(x.dtype)


class KeyValueCache:
    """Keys and values of the places so far, in memory that is taken once for the whole sequence.

    Args:
        depth: blocks.
        batch_size: sequences.
        num_heads: heads of each block.
        rotations: of every place that there will be, ``[T, head_dim / 2, 2]``; on the device of the cache.
        dtype: of keys and values.

    Attributes:
        length: places that have been written.
        capacity: T.
        bias: None, as every place that :meth:`append` returns has been written.
    """

    bias = None

    def __init__(self, *, depth: int, batch_size: int, num_heads: int, rotations: Tensor, dtype: torch.dtype) -> None:
        self.length = 0
        self.capacity = len(rotations)
        self.rotations = rotations
        shape = (depth, batch_size, num_heads, self.capacity, 2 * rotations.shape[1])
        self.keys = torch.empty(shape, dtype=dtype, device=rotations.device)
        self.values = torch.empty_like(self.keys)

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write one place of a layer, ``[B, heads, 1, head_dim]`` each; all of its places until now."""
        end = self.length + 1
        self.keys[layer, :, :, self.length : end] = key
        self.values[layer, :, :, self.length : end] = value
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


class StaticCache:
    """Keys and values in memory that is taken once, with the place to write held on the device.

    A step over it is the same sequence of operations on the same memory at every place below ``end``, as a CUDA graph
    has to be. Attention reads ``end`` places, and a bias takes those not yet written out of the softmax.

    Args:
        depth: blocks.
        batch_size: sequences.
        num_heads: heads of each block.
        rotations: of every place that there will be, ``[T, head_dim / 2, 2]``; on the device of the cache.
        dtype: of keys and values.

    Attributes:
        capacity: T, or the next multiple of 16.
        place: int64 ``[1]``, the place that the next step writes.
    """

    def __init__(self, *, depth: int, batch_size: int, num_heads: int, rotations: Tensor, dtype: torch.dtype) -> None:
        # Attention on a GPU copies a bias whose rows are not multiples of 16 elements, in every layer.
        self.capacity = 16 * math.ceil(len(rotations) / 16)
        self.place = torch.zeros(1, dtype=torch.int64, device=rotations.device)
        self._turns = torch.view_as_complex(rotations.contiguous())
        shape = (depth, batch_size, num_heads, self.capacity, 2 * rotations.shape[1])
        # Zeros: what is read before it is written has the weight 0, and 0 times NaN would be NaN.
        self.keys = torch.zeros(shape, dtype=dtype, device=rotations.device)
        self.values = torch.zeros_like(self.keys)
        self._bias = self.keys.new_full((1, 1, 1, self.capacity), -math.inf)
        self._end = self.capacity

    def restart(self) -> None:
        """Forget what was written."""
        self.place.zero_()
        self._bias.fill_(-math.inf)

    def open(self, end: int) -> Tensor:
        """Let the place be seen, with the places below ``end`` to be read; the rotations of the place, complex."""
        self._end = end
        self._bias.index_fill_(3, self.place, 0.0)
        return self._turns.index_select(0, self.place)

    @property
    def bias(self) -> Tensor:
        """What is added to the logits of the places that are read, ``[1, 1, 1, end]``."""
        return self._bias[..., : self._end]

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write the place of a layer, ``[B, heads, 1, head_dim]`` each; its first ``end`` places."""
        self.keys[layer].index_copy_(2, self.place, key)
        self.values[layer].index_copy_(2, self.place, value)
        return self.keys[layer, :, :, : self._end], self.values[layer, :, :, : self._end]


class LlamaBlock(nn.Module):
    """Self-attention and a SwiGLU perceptron, each after RMSNorm (eps 1e-5) and with a residual.

    The perceptron's hidden width is the least multiple of 256 from ``int(8 width / 3)`` on.

    Args:
        width: channels of a token.
        num_heads: attention heads.
        attention_dropout: share of attention weights dropped.
        residual_dropout: of the attention's output.
        ffn_dropout: of the perceptron's output.
        causal: whether a token attends to itself and those before it alone, or to all, as a masked or a diffusion model
            of tokens has it.
        modulated: whether a condition scales and shifts what the attention and the perceptron are given, and scales
            what they give (adaLN-Zero of DiT, arXiv 2212.09748). Where the layer that makes this of the condition
            starts at zero, a block starts as the identity.
    """

    def __init__(
        self,
        *,
        width: int,
        num_heads: int,
        attention_dropout: float,
        residual_dropout: float,
        ffn_dropout: float,
        causal: bool = True,
        modulated: bool = False,
    ) -> None:
        super().__init__()
        self.causal = causal
        self.num_heads = num_heads
        self.attention_dropout = attention_dropout
        hidden = 256 * math.ceil(8 * width // 3 / 256)
        self.attention_norm = nn.RMSNorm(width, eps=1e-5)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.projection = nn.Linear(width, width, bias=False)
        self.residual_dropout = nn.Dropout(residual_dropout)
        self.ffn_norm = nn.RMSNorm(width, eps=1e-5)
        self.gate_and_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)
        self.ffn_dropout = nn.Dropout(ffn_dropout)
        self.modulation = nn.Linear(width, 6 * width) if modulated else None

    def forward(
        self,
        x: Tensor,
        rotations: Tensor,
        cache: KeyValueCache | StaticCache | None = None,
        layer: int = 0,
        condition: Tensor | None = None,
    ) -> Tensor:
        """Tokens ``[B, T, width]`` to tokens; with a cache, one token that attends to those written before.

        ``condition``, ``[B, width]``, is what a modulated block follows.
        """
        shifts: Sequence[Tensor | None] = (None,) * 6
        if self.modulation is not None:
            assert condition is not None
            shifts = self.modulation(F.silu(condition)).unsqueeze(1).chunk(6, dim=-1)
        normed = _modulated(self.attention_norm(x), shifts[0], shifts[1])
        qkv = self.qkv(normed).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        (query, key), value = rotate(qkv[:2], rotations), qkv[2]
        bias = None
        if cache is not None:
            key, value = cache.append(layer, key, value)
            bias = cache.bias
        dropout = self.attention_dropout if self.training else 0.0
        is_causal = self.causal and cache is None
        attended = F.scaled_dot_product_attention(query, key, value, bias, dropout_p=dropout, is_causal=is_causal)
        x = x + _gated(self.residual_dropout(self.projection(attended.transpose(1, 2).flatten(2))), shifts[2])
        gate, up = self.gate_and_up(_modulated(self.ffn_norm(x), shifts[3], shifts[4])).chunk(2, dim=-1)
        return x + _gated(self.ffn_dropout(self.down(F.silu(gate) * up)), shifts[5])


def _modulated(x: Tensor, shift: Tensor | None, scale: Tensor | None) -> Tensor:
    return x if shift is None or scale is None else x * (1 + scale) + shift


def _gated(x: Tensor, gate: Tensor | None) -> Tensor:
    return x if gate is None else x * gate
