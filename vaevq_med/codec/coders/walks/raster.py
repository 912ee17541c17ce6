"""LlamaGen's order: position after position in raster order, the G indices of a position in turn."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vaevq_med.codec.coders.double_blocks import DoubleBlocks
from vaevq_med.codec.coders.walks.base import Code, Slices, Walk
from vaevq_med.networks.generators.llamagen import BELOW, LlamaGen


class RasterWalk(Walk[LlamaGen]):
    """Place after place, up to the last one that is live in any of the slices.

    A slice is predicted from what lies before in it alone, or, by a network that sees it, from the slice below too.
    """

    generator = LlamaGen

    @property
    def sees_below(self) -> bool:
        """Whether the network was trained with the slice below."""
        return self.network.sees_below

    def run(self, slices: Slices, code: Code) -> None:
        """Code the live tokens; see :meth:`Walk.run`."""
        tokens, live, below = slices.tokens, slices.live, slices.below
        labels = torch.full((len(tokens),), self.label)
        steps = RasterSteps(self.network, labels, None if below is None else torch.from_numpy(below))
        with torch.inference_mode():
            for position in range(int(np.flatnonzero(live.any(axis=0))[-1]) + 1):
                rows = np.flatnonzero(live[:, position])
                for book in range(self.network.num_codebooks):
                    logits = steps.logits(steps.hidden()[torch.from_numpy(rows)]).numpy()
                    tokens[rows, position, book] = code(logits, tokens[rows, position, book])
                    steps.feed(torch.from_numpy(tokens[:, position, book]))


class RasterSteps:
    """A LlamaGen in float64, one place at a time.

    Args:
        network: in any type; its weights are read at that.
        labels: ``[B]``.
        below: indices ``[B, h, w, G]`` of the slices below, -1 for none; None where there are none.
    """

    def __init__(self, network: LlamaGen, labels: Tensor, below: Tensor | None = None) -> None:
        self.network = network
        self._blocks = DoubleBlocks(network, len(labels))
        self._inputs = self._blocks.weights["class_embedding.weight"][labels]
        self._condition = self._below_condition(len(labels), below) if network.sees_below else None  # [B, h w, width]

    def _below_condition(self, count: int, below: Tensor | None) -> Tensor:
        """What the slices below add to the inputs of each position; as ``LlamaGen.below_condition``, in float64."""
        (height, width), books = self.network.grid_size, self.network.num_codebooks
        none, weights = self.network.num_embeddings, self._blocks.weights
        if below is None:
            below = torch.full((count, height, width, books), -1)
        table = weights["below_embedding.weight"].unflatten(0, (books, none + 1))
        seen = sum(
            (table[g][torch.where(below[..., g] < 0, none, below[..., g])] for g in range(books)), torch.zeros(())
        )
        whole = table[:, none].sum(dim=0).expand(count, height + 1, width + 1, -1).clone()
        whole[:, :height, :width] = seen
        found = torch.zeros(count, height, width, whole.shape[-1], dtype=torch.float64)
        for number, (row, column) in enumerate(BELOW):
            matrix = weights[f"below_mixing.{number}.weight"]
            found += whole[:, row : row + height, column : column + width] @ matrix.T
        return found.flatten(1, 2)

    def hidden(self) -> Tensor:
        """What the head is given of the token that comes next, ``[B, width]``."""
        x, place = self._inputs, self._blocks.length
        if self._condition is not None:
            x = x + self._condition[:, place // self.network.num_codebooks]
        return self._blocks.step(x, torch.full((len(x),), place))

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits ``[m, K]`` of rows of :meth:`hidden`, in nats."""
        head = (self._blocks.length - 1) % self.network.num_codebooks
        return hidden @ self._blocks.weights[f"heads.{head}.weight"].T

    def feed(self, tokens: Tensor) -> None:
        """The tokens ``[B]`` at the place that was predicted."""
        offset = (self._blocks.length - 1) % self.network.num_codebooks * self.network.num_embeddings
        self._inputs = self._blocks.weights["token_embedding.weight"][tokens + offset]
