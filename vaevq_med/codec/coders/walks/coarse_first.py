"""Structure before detail: first indices in raster order, then the others of the positions that are open."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vaevq_med.codec.coders.double_blocks import DoubleBlocks
from vaevq_med.codec.coders.walks.base import Code, Slices, Walk
from vaevq_med.networks.generators.coarse_first import CoarseFirst, open_positions


class CoarseFirstWalk(Walk[CoarseFirst]):
    """The words of all first indices, each with whether its position is open, and then what the open ones have.

    A closed position costs one symbol, in place of G. All first indices are fed, also those after the last live
    position, since the others are predicted from all of them.
    """

    generator = CoarseFirst

    def run(self, slices: Slices, code: Code) -> None:
        """Code the live tokens; see :meth:`Walk.run`."""
        tokens, live = slices.tokens, slices.live
        network, count = self.network, self.network.num_embeddings
        steps = _Steps(network, torch.full((len(tokens),), self.label))
        opened = (tokens[..., 1:] != network.last).any(axis=2)  # [n, h w], of a decoder where it is not live
        with torch.inference_mode():
            for position in range(network.num_positions):
                rows = np.flatnonzero(live[:, position])
                words = tokens[:, position, 0] + count * opened[:, position]
                hidden = steps.hidden(np.full(len(tokens), network.num_codebooks * position))
                if len(rows):
                    words[rows] = code(steps.logits(hidden[torch.from_numpy(rows)], "first_head"), words[rows])
                    opened[:, position] = words >= count
                    tokens[:, position, 0] = words % count
                    tokens[rows[words[rows] < count], position, 1:] = network.last
                steps.feed(words)
            self._others(steps, slices, opened, code)

    def _others(self, steps: _Steps, slices: Slices, opened: NDArray[np.bool_], code: Code) -> None:
        """Code what the open positions have besides their first indices."""
        network, tokens, rows = self.network, slices.tokens, np.arange(len(slices.tokens))
        order, there = (found.numpy().T for found in open_positions(torch.from_numpy(opened)))  # [C, n] each
        is_coded = there & slices.live[rows, order]
        # What comes after the last one is fed for nobody.
        steps_with_some = np.flatnonzero(is_coded.any(axis=1))
        for step in range(steps_with_some[-1] + 1 if len(steps_with_some) else 0):
            position, coded = order[step], np.flatnonzero(is_coded[step])
            all_last = np.ones(len(tokens), bool)
            for number in range(1, network.num_codebooks):
                hidden = steps.hidden(network.num_codebooks * position + number)
                symbols = tokens[rows, position, number]
                if len(coded):
                    logits = steps.logits(hidden[torch.from_numpy(coded)], f"other_heads.{number - 1}")
                    if number == network.num_codebooks - 1:
                        # A position that has nothing else is not open.
                        logits[all_last[coded], -1] = -np.inf
                    symbols[coded] = code(logits, symbols[coded])
                    tokens[coded, position[coded], number] = symbols[coded]
                all_last &= symbols == network.last
                steps.feed(symbols + network.num_embeddings * (1 + number))


class _Steps:
    """A CoarseFirst in float64, one token at a time.

    Args:
        network: in any type; its weights are read at that.
        labels: ``[B]``.
    """

    def __init__(self, network: CoarseFirst, labels: Tensor) -> None:
        self._blocks = DoubleBlocks(network, len(labels))
        self._inputs = self._blocks.weights["class_embedding.weight"][labels]
        self._turned_by = torch.zeros_like(labels)

    def hidden(self, places: NDArray[np.int64]) -> Tensor:
        """What the heads are given of tokens that belong to places ``[B]`` of the grid, ``[B, width]``."""
        at = torch.from_numpy(places)
        found = self._blocks.step(self._inputs + self._blocks.weights["place_embedding.weight"][at], self._turned_by)
        self._turned_by = 1 + at
        return found

    def logits(self, hidden: Tensor, head: str) -> NDArray[np.float64]:
        """Logits ``[m, S]`` of rows of :meth:`hidden` by a head, in nats."""
        return (hidden @ self._blocks.weights[f"{head}.weight"].T).numpy()

    def feed(self, rows: NDArray[np.int64]) -> None:
        """Go on from these rows ``[B]`` of the table of tokens."""
        self._inputs = self._blocks.weights["token_embedding.weight"][torch.from_numpy(rows)]
