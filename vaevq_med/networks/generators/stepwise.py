"""What sampling token by token asks of a network: sizes of the sequence, memory for it, and a step."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.generators.base import Generator
from vaevq_med.networks.generators.llama_blocks import KeyValueCache, StaticCache
from vaevq_med.networks.ranges import check_range


class StepwiseGenerator(Generator):
    """A generator that gives the distribution of an index from those before it, in raster order.

    Attributes:
        num_embeddings: K.
        num_codebooks: G, tokens of a position.
        grid_size: h and w.
        token_embedding: a vector for each index of each codebook; its device and type are the network's.
    """

    kind = "indices"
    inpaints = True
    num_embeddings: int
    num_codebooks: int
    grid_size: tuple[int, int]
    token_embedding: nn.Embedding

    @property
    def sequence_length(self) -> int:
        """Tokens of an image, ``h w G``."""
        return math.prod(self.grid_size) * self.num_codebooks

    def sizes(self, tokens: Mapping[str, Any], where: str) -> dict[str, tuple[Any, Any]]:
        """Codewords, codebooks and the grid of rows and columns."""
        self.check_plane(tokens, where)
        tokenizer = tokens["tokenizer"]
        return {
            "num_embeddings": (tokenizer["num_embeddings"], self.num_embeddings),
            "num_codebooks": (tokenizer["num_codebooks"], self.num_codebooks),
            "grid": (list(tokens["grid"]), list(self.grid_size)),
        }

    def check_labels(self, labels: Tensor | None, batch_size: int) -> Tensor:
        """Labels int64 ``[B]`` on the network's device, the null class where there are none.

        Raises:
            VaevqMedError: their shape is another, or one is out of range.
        """
        device = self.token_embedding.weight.device
        if labels is None:
            return torch.full((batch_size,), self.null_class, device=device)
        if labels.shape != (batch_size,):
            raise VaevqMedError(f"labels have shape {tuple(labels.shape)}; expected [{batch_size}]")
        check_range("labels", labels, self.null_class)
        return labels.to(device=device, dtype=torch.int64)

    @abstractmethod
    def new_cache(self, batch_size: int) -> KeyValueCache:
        """An empty cache for so many images, in the weights' type and on their device."""

    @abstractmethod
    def new_static_cache(self, batch_size: int) -> StaticCache:
        """The same for :meth:`static_step`."""

    @abstractmethod
    def step(self, inputs: Tensor, cache: KeyValueCache) -> Tensor:
        """Logits ``[B, K]`` of the next token; ``inputs`` ``[B]`` are the labels at first, then the last tokens.

        For evaluation mode without gradients; neither labels nor tokens are checked here.

        Raises:
            VaevqMedError: the cache is full.
        """

    @abstractmethod
    def static_step(self, inputs: Tensor, cache: StaticCache, *, codebook: int, end: int, first: bool) -> Tensor:
        """:meth:`step` at the place that the cache holds on the device, which stays as it is.

        The operations are the same at every place of a codebook below ``end``, and none of them waits for the device.

        Args:
            inputs: ``[B]``, as for :meth:`step`.
            cache: where the step writes.
            codebook: that of the token to predict, the place modulo G.
            end: places that attention reads, more than the place.
            first: whether the place is 0, so that the inputs are labels.

        Returns:
            Logits ``[B, K]``.
        """
