"""A LlamaGen's logits in float64, by which the prior codes; see ``prior.py`` for why that decodes elsewhere."""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from vaevq_med.networks.generators.llama_blocks import LlamaBlock
from vaevq_med.networks.generators.llamagen import BELOW, LlamaGen


class DoubleSteps:
    """A LlamaGen in float64, one place at a time; its rotations too, which the network has in fp32.

    Args:
        network: in any type; its weights are read at that.
        labels: ``[B]``.
        below: indices ``[B, h, w, G]`` of the slices below, -1 for none; None where there are none.
    """

    def __init__(self, network: LlamaGen, labels: Tensor, below: Tensor | None = None) -> None:
        self.network = network
        self.weights = {name: value.detach().cpu().double() for name, value in network.state_dict().items()}
        self.heads, self.head_dim = network.num_heads, network.head_dim
        height, width = network.grid_size
        quarter = self.head_dim // 4
        frequencies = 10_000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
        rows = torch.arange(height, dtype=torch.float64).repeat_interleave(width)
        columns = torch.arange(width, dtype=torch.float64).repeat(height)
        angles = torch.cat([rows[:, None] * frequencies, columns[:, None] * frequencies], dim=1)
        angles = angles.repeat_interleave(network.num_codebooks, dim=0)
        # The class token's is zero, as in the network.
        self.cosine = torch.cat([torch.zeros(1, angles.shape[1], dtype=torch.float64), angles.cos()])
        self.sine = torch.cat([torch.zeros(1, angles.shape[1], dtype=torch.float64), angles.sin()])
        shape = (len(network.blocks), len(labels), self.heads, len(angles) + 1, self.head_dim)
        self.keys = torch.zeros(shape, dtype=torch.float64)
        self.values = torch.zeros(shape, dtype=torch.float64)
        self.place = 0
        self.inputs = self.weights["class_embedding.weight"][labels]
        self.condition = self._condition(len(labels), below) if network.sees_below else None  # [B, h w, width]

    def _condition(self, count: int, below: Tensor | None) -> Tensor:
        """What the slices below add to the inputs of each position; as ``LlamaGen.below_condition``, in float64."""
        (height, width), books = self.network.grid_size, self.network.num_codebooks
        none = self.network.num_embeddings
        if below is None:
            below = torch.full((count, height, width, books), -1)
        table = self.weights["below_embedding.weight"].unflatten(0, (books, none + 1))
        seen = sum(
            (table[g][torch.where(below[..., g] < 0, none, below[..., g])] for g in range(books)), torch.zeros(())
        )
        whole = table[:, none].sum(dim=0).expand(count, height + 1, width + 1, -1).clone()
        whole[:, :height, :width] = seen
        found = torch.zeros(count, height, width, whole.shape[-1], dtype=torch.float64)
        for number, (row, column) in enumerate(BELOW):
            matrix = self.weights[f"below_mixing.{number}.weight"]
            found += whole[:, row : row + height, column : column + width] @ matrix.T
        return found.flatten(1, 2)

    def hidden(self) -> Tensor:
        """What the head is given of the token that comes next, ``[B, width]``."""
        x = self.inputs
        if self.condition is not None:
            x = x + self.condition[:, self.place // self.network.num_codebooks]
        for layer in range(len(self.network.blocks)):
            x = self._block(x, layer)
        self.place += 1
        return self._norm(x, "norm")

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits ``[m, K]`` of rows of :meth:`hidden`, in nats."""
        head = (self.place - 1) % self.network.num_codebooks
        return hidden @ self.weights[f"heads.{head}.weight"].T

    def feed(self, tokens: Tensor) -> None:
        """The tokens ``[B]`` at the place that was predicted."""
        offset = (self.place - 1) % self.network.num_codebooks * self.network.num_embeddings
        self.inputs = self.weights["token_embedding.weight"][tokens + offset]

    def _block(self, x: Tensor, layer: int) -> Tensor:
        block = cast(LlamaBlock, self.network.blocks[layer])
        assert block.causal
        name, end = f"blocks.{layer}", self.place + 1
        weights = self.weights
        qkv = self._norm(x, f"{name}.attention_norm") @ weights[f"{name}.qkv.weight"].T
        query, key, value = qkv.unflatten(1, (3, self.heads, -1)).unbind(1)  # [B, heads, head_dim] each
        self.keys[layer, :, :, self.place] = self._rotate(key)
        self.values[layer, :, :, self.place] = value
        keys, values = self.keys[layer, :, :, :end], self.values[layer, :, :, :end]
        scores = (keys @ self._rotate(query).unsqueeze(3)).squeeze(3) / math.sqrt(self.head_dim)  # [B, heads, end]
        attended = (scores.softmax(dim=2).unsqueeze(2) @ values).flatten(1)
        x = x + attended @ weights[f"{name}.projection.weight"].T
        both = self._norm(x, f"{name}.ffn_norm") @ weights[f"{name}.gate_and_up.weight"].T
        gate, up = both.chunk(2, dim=1)
        return x + (F.silu(gate) * up) @ weights[f"{name}.down.weight"].T

    def _norm(self, x: Tensor, name: str) -> Tensor:
        scale = (x.square().mean(dim=1, keepdim=True) + 1e-5).rsqrt()
        return x * scale * self.weights[f"{name}.weight"]

    def _rotate(self, x: Tensor) -> Tensor:
        """Turn the pairs of channels of ``[B, heads, head_dim]`` as the place says."""
        first, second = x.unflatten(2, (-1, 2)).unbind(3)
        cosine, sine = self.cosine[self.place], self.sine[self.place]
        return torch.stack([first * cosine - second * sine, second * cosine + first * sine], dim=3).flatten(2)
