"""The stack of blocks that transformers of a grid are made of: what sizes it may have, how it is built and starts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.generators.llama_blocks import LlamaBlock
from vaevq_med.networks.ranges import check_sizes

# Logits that a loss holds at once: 64 MiB in fp32.
LOGITS_AT_ONCE = 2**24


def check_trunk(*, width: int, depth: int, num_heads: int, num_classes: int, shares: Mapping[str, float]) -> None:
    """Refuse sizes that no stack of blocks has.

    Args:
        width: channels of a token.
        depth: blocks.
        num_heads: attention heads; ``width / num_heads`` is a multiple of 4.
        num_classes: 0 or more.
        shares: dropouts, by name.

    Raises:
        VaevqMedError: naming the first.
    """
    check_sizes(depth=depth)
    if num_classes < 0:
        raise VaevqMedError(f"num_classes is {num_classes}; expected 0 or more")
    if num_heads < 1 or width < 1 or width % (4 * num_heads):
        raise VaevqMedError(
            f"width is {width} with num_heads {num_heads}; expected a multiple of 4 channels for each head"
        )
    check_shares(**shares)


def check_shares(**shares: float) -> None:
    """Raise a VaevqMedError that names the first of the shares that is not from 0 to below 1."""
    for name, share in shares.items():
        if not 0 <= share < 1:
            raise VaevqMedError(f"{name} is {share}; expected from 0 to below 1")


def make_blocks(
    *,
    width: int,
    depth: int,
    num_heads: int,
    dropouts: Mapping[str, float],
    causal: bool = True,
    modulated: bool = False,
) -> nn.ModuleList:
    """``depth`` blocks.

    Args:
        width: channels of a token.
        depth: blocks.
        num_heads: attention heads.
        dropouts: ``attention_dropout``, ``residual_dropout`` and ``ffn_dropout`` of :class:`LlamaBlock`.
        causal: see there.
        modulated: see there.
    """
    return nn.ModuleList(
        LlamaBlock(
            width=width,
            num_heads=num_heads,
            attention_dropout=dropouts["attention_dropout"],
            residual_dropout=dropouts["residual_dropout"],
            ffn_dropout=dropouts["ffn_dropout"],
            causal=causal,
            modulated=modulated,
        )
        for _ in range(depth)
    )


def start(network: nn.Module, *, zero: Iterable[nn.Module]) -> None:
    """Weights of linear layers and embeddings as N(0, 0.02^2); those of ``zero``, biases included, as zero."""
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
    for module in zero:
        for parameter in module.parameters():
            nn.init.zeros_(parameter)


def pair(grid_size: int | tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of a grid, which one number gives for a square.

    Raises:
        VaevqMedError: there are not two of them.
    """
    if isinstance(grid_size, int):
        return grid_size, grid_size
    if len(grid_size) != 2:
        volume = len(grid_size) == 3
        other = "; layers of volumes are for the overlay generation/autoregressive_below" if volume else ""
        raise VaevqMedError(
            f"grid_size is {tuple(grid_size)}; expected rows and columns, or one number for a square{other}"
        )
    return int(grid_size[0]), int(grid_size[1])


def summed_cross_entropy(hidden: Tensor, head: nn.Module, targets: Tensor, impossible: Tensor | None = None) -> Tensor:
    """``-log p`` of targets, summed, with logits formed a bounded number at a time, and again in the backward pass.

    Args:
        hidden: what the head is given, ``[N, width]``.
        head: to K logits.
        targets: ``[N]``; what is -100 is left out.
        impossible: bool ``[N]``, where the last of the K has the probability 0; nowhere when absent.
    """
    step = max(1, LOGITS_AT_ONCE // len(head.get_parameter("weight")))
    total = torch.zeros((), device=hidden.device)
    excluded = itertools.repeat(None) if impossible is None else impossible.split(step)
    for part in zip(hidden.split(step), targets.split(step), excluded, strict=False):
        total = total + checkpoint(_summed, head, *part, use_reentrant=False, preserve_rng_state=False)
    return total


def _summed(head: nn.Module, hidden: Tensor, targets: Tensor, impossible: Tensor | None) -> Tensor:
    logits = head(hidden).float()
    if impossible is not None:
        last = torch.arange(logits.shape[1], device=logits.device) == logits.shape[1] - 1
        logits = logits.masked_fill(impossible[:, None] & last, -math.inf)
    return F.cross_entropy(logits, targets, reduction="sum")


class TimeEmbedding(nn.Sequential):
    """A vector of a time in [0, 1]: cosines and sines of 1,000 times it (arXiv 2006.11239), and two linear layers.

    Args:
        width: its length, even.
    """

    def __init__(self, width: int) -> None:
        super().__init__(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.width = width

    def forward(self, times: Tensor) -> Tensor:
        """``[B, width]`` of times ``[B]``."""
        half = self.width // 2
        frequencies = 10_000.0 ** (-torch.arange(half, dtype=torch.float32, device=times.device) / half)
        angles = 1000 * times.float()[:, None] * frequencies
        return super().forward(torch.cat([angles.cos(), angles.sin()], dim=1))
