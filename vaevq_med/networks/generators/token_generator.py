"""What generators of indices have in common: their sizes, their labels, and the tokens that are given."""

from __future__ import annotations

import math
import sys
from abc import abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.core.options import is_int, is_number
from vaevq_med.networks.generators.base import Generator, Setting
from vaevq_med.networks.generators.drawing import GUIDANCE_SCALE, MIN_TEMPERATURE
from vaevq_med.networks.ranges import check_range

Kept = tuple[Tensor, Tensor]
"""Where tokens are given and which, ``[B, h w G]`` each: booleans, and integers that are 0 elsewhere."""

TOKEN_SETTINGS = MappingProxyType(
    {
        "guidance_scale": Setting(2.0, *GUIDANCE_SCALE),
        "temperature": Setting(
            1.0,
            lambda value: is_number(value, MIN_TEMPERATURE, 1 / MIN_TEMPERATURE),
            f"a number from {MIN_TEMPERATURE:g} to {1 / MIN_TEMPERATURE:g} (top_k 1 takes the likeliest)",
        ),
        "top_k": Setting(0, lambda value: is_int(value, 0, sys.maxsize), "a whole number, 0 to keep all"),
        "top_p": Setting(1.0, lambda value: is_number(value, sys.float_info.min, 1), "a number above 0 and at most 1"),
    }
)
"""How tokens follow from logits: the arguments of ``drawing.TokenRule``."""


class TokenGenerator(Generator):
    """A generator of the tokens of rows and columns; the G indices of a position are G tokens.

    Attributes:
        num_embeddings: K.
        num_codebooks: G, tokens of a position.
        grid_size: h and w.
        token_embedding: vectors of the tokens; their device and type are the network's.
        label_dropout: share of the labels that training replaces by the null class.
    """

    kind = "indices"
    inpaints = True
    likelihood: ClassVar[Literal["exact", "bound"] | None] = "exact"
    num_embeddings: int
    num_codebooks: int
    grid_size: tuple[int, int]
    token_embedding: nn.Embedding
    label_dropout: float = 0.0

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

    def both_classes(self, labels: Tensor | None, batch_size: int, *, guided: bool) -> Tensor:
        """:meth:`check_labels`, and behind them as many of the null class where drawing is guided."""
        classes = self.check_labels(labels, batch_size)
        return torch.cat([classes, torch.full_like(classes, self.null_class)]) if guided else classes

    def dropped(self, labels: Tensor | None, generator: torch.Generator | None) -> Tensor | None:
        """Labels ``[B]`` of a training step: in training mode, a share :attr:`label_dropout` is the null class.

        Args:
            labels: of the batch, or None.
            generator: of the draws; the global one of the labels' device when absent.
        """
        if labels is None or not self.training or not self.label_dropout:
            return labels
        device = labels.device if generator is None else generator.device
        dropped = torch.rand(len(labels), generator=generator, device=device) < self.label_dropout
        return labels.masked_fill(dropped.to(labels.device), self.null_class)

    @abstractmethod
    def loss(
        self, indices: Tensor, labels: Tensor | None = None, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """What training minimizes, in nats a token; the arguments are those of :meth:`bound`."""

    def bound(
        self, indices: Tensor, labels: Tensor | None = None, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """``-log p`` in nats a token: in evaluation mode what is minimized, where that is it."""
        return self.loss(indices, labels, generator=generator)

    def whole_grids(self, indices: Tensor) -> Tensor:
        """Tokens int64 ``[B, h w G]`` of indices ``[B, h, w, G]``.

        Raises:
            VaevqMedError: their shape is another, or one is out of range.
        """
        shape = (*self.grid_size, self.num_codebooks)
        if tuple(indices.shape[1:]) != shape:
            raise VaevqMedError(
                f"indices have shape {tuple(indices.shape)}; expected [B, {', '.join(map(str, shape))}]"
            )
        check_range("indices", indices, self.num_embeddings - 1)
        return indices.flatten(1).long()

    def kept(self, known: Tensor | None, mask: Tensor | None, batch: int) -> Kept | None:
        """Which tokens are given, on the network's device.

        Args:
            known: integers ``[B, h, w, G]``; where the mask is false they may be anything.
            mask: booleans ``[B, h, w, G]`` or ``[B, h, w]``.
            batch: B.

        Raises:
            VaevqMedError: there is one without the other, a shape does not fit, or a known index is out of range.
        """
        if known is None and mask is None:
            return None
        if known is None or mask is None:
            raise VaevqMedError(
                f"found {'mask without known' if known is None else 'known without mask'}; expected both"
            )
        shape = (batch, *self.grid_size, self.num_codebooks)
        if mask.ndim == 3:
            mask = mask.unsqueeze(-1).expand(*mask.shape, self.num_codebooks)
        if known.shape != shape or mask.shape != shape or mask.dtype != torch.bool:
            raise VaevqMedError(
                f"known has shape {tuple(known.shape)} and the mask {tuple(mask.shape)} of {mask.dtype}; "
                f"expected {list(shape)} each, and torch.bool"
            )
        values = known.long().masked_fill(~mask.to(known.device), 0)
        check_range("known indices", values, self.num_embeddings - 1)
        device = self.token_embedding.weight.device
        return mask.to(device).flatten(1), values.to(device).flatten(1)
