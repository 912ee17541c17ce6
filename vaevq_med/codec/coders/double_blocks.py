"""A generator's blocks in float64, one token at a time, by which the prior codes.

``prior.py`` says why that decodes elsewhere.
"""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from vaevq_med.networks.generators.llama_blocks import LlamaBlock
from vaevq_med.networks.generators.token_generator import TokenGenerator


class DoubleBlocks:
    """The blocks and the last norm of a network, with keys and values of the tokens so far; its rotations too.

    Args:
        network: in any type; its weights are read at that.
        count: sequences.

    Attributes:
        weights: the network's, by name.
        length: tokens so far.
    """

    def __init__(self, network: TokenGenerator, count: int) -> None:
        self.weights = {name: value.detach().cpu().double() for name, value in network.state_dict().items()}
        self._blocks = [cast(LlamaBlock, block) for block in cast(torch.nn.ModuleList, network.blocks)]
        assert all(block.causal for block in self._blocks)
        self._heads = self._blocks[0].num_heads
        self._head_dim = self.weights["token_embedding.weight"].shape[1] // self._heads
        height, width = network.grid_size
        quarter = self._head_dim // 4
        frequencies = 10_000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
        rows = torch.arange(height, dtype=torch.float64).repeat_interleave(width)
        columns = torch.arange(width, dtype=torch.float64).repeat(height)
        angles = torch.cat([rows[:, None] * frequencies, columns[:, None] * frequencies], dim=1)
        angles = angles.repeat_interleave(network.num_codebooks, dim=0)
        # The class token's is zero, as in the network.
        self._cosine = torch.cat([torch.zeros(1, angles.shape[1], dtype=torch.float64), angles.cos()])
        self._sine = torch.cat([torch.zeros(1, angles.shape[1], dtype=torch.float64), angles.sin()])
        shape = (len(self._blocks), count, self._heads, len(angles) + 1, self._head_dim)
        self._keys = torch.zeros(shape, dtype=torch.float64)
        self._values = torch.zeros(shape, dtype=torch.float64)
        self.length = 0

    def step(self, x: Tensor, turned_by: Tensor) -> Tensor:
        """What the heads are given where the next token goes in.

        Args:
            x: what is fed, ``[B, width]``.
            turned_by: number of the place by which it is turned, ``[B]``: 0 is the class token's, whose query and key
                vanish, and 1 the first token's of the grid.
        """
        # [B, 1, head_dim / 2] each
        turn = self._cosine[turned_by].unsqueeze(1), self._sine[turned_by].unsqueeze(1)
        for layer in range(len(self._blocks)):
            x = self._block(x, layer, turn)
        self.length += 1
        return self._norm(x, "norm")

    def _block(self, x: Tensor, layer: int, turn: tuple[Tensor, Tensor]) -> Tensor:
        name, end, weights = f"blocks.{layer}", self.length + 1, self.weights
        qkv = self._norm(x, f"{name}.attention_norm") @ weights[f"{name}.qkv.weight"].T
        query, key, value = qkv.unflatten(1, (3, self._heads, -1)).unbind(1)  # [B, heads, head_dim] each
        self._keys[layer, :, :, self.length] = _rotated(key, turn)
        self._values[layer, :, :, self.length] = value
        keys, values = self._keys[layer, :, :, :end], self._values[layer, :, :, :end]
        scores = (keys @ _rotated(query, turn).unsqueeze(3)).squeeze(3) / math.sqrt(self._head_dim)  # [B, heads, end]
        attended = (scores.softmax(dim=2).unsqueeze(2) @ values).flatten(1)
        x = x + attended @ weights[f"{name}.projection.weight"].T
        both = self._norm(x, f"{name}.ffn_norm") @ weights[f"{name}.gate_and_up.weight"].T
        gate, up = both.chunk(2, dim=1)
        return x + (F.silu(gate) * up) @ weights[f"{name}.down.weight"].T

    def _norm(self, x: Tensor, name: str) -> Tensor:
        scale = (x.square().mean(dim=1, keepdim=True) + 1e-5).rsqrt()
        return x * scale * self.weights[f"{name}.weight"]


def _rotated(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the pairs of channels of ``[B, heads, head_dim]`` by cosines and sines."""
    first, second = x.unflatten(2, (-1, 2)).unbind(3)
    cosine, sine = turn
    return torch.stack([first * cosine - second * sine, second * cosine + first * sine], dim=3).flatten(2)
