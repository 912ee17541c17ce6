"""Frozen dataclasses that cross the package's layers.

Shape legend: B batch, C channels, H W image, grid the latent grid of one axis or more (``n``, ``h w`` or
``d h w``), D ``embedding_dim``, K ``num_embeddings``, G number of codebooks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor


class Posterior(Protocol):
    """What the losses read of an encoder's posterior; ``networks.posterior.DiagonalGaussian`` is one.

    Attributes:
        mean: ``[B, D, *grid]``.
        logvar: log variance, ``[B, D, *grid]``.
        std: standard deviation, ``[B, D, *grid]``.
    """

    mean: Tensor
    logvar: Tensor
    std: Tensor


@dataclass(frozen=True)
class QuantizerOutput:
    """One quantization of a latent grid.

    Attributes:
        quantized: straight-through codes ``[B, D, *grid]``; the decoder's input.
        codes: differentiable look-up ``[B, D, *grid]``; what the losses read, since no gradient reaches a
            codebook through the straight-through estimator.
        indices: int64 ``[B, *grid, G]``.
        losses: unweighted scalars by name; a term that the method does not have is absent.
        codebook: the ``[K, D]`` table of this step, or ``[G, K, D / G]`` where each codebook has channels of its own,
            or ``[S, K, D]`` where each has positions of its own; differentiable, or None where the method has none.
    """

    quantized: Tensor
    codes: Tensor
    indices: Tensor
    losses: Mapping[str, Tensor] = field(default_factory=dict)
    codebook: Tensor | None = None


@dataclass(frozen=True)
class TokenizerOutput:
    """Everything that one training forward pass of a tokenizer makes.

    Attributes:
        reconstruction: the quantized path, ``[B, C, H, W]``, nominally in [-1, 1].
        reconstruction_continuous: the continuous path (VLQ), same shape, or None for a plain VQ tokenizer.
        latent: what the quantizer was given, ``[B, D, *grid]``.
        posterior: the encoder's posterior, or None for a plain VQ tokenizer.
        quantizer: the quantizer's output.
        projected: what the projector made of the latent or of the codes, ``[B, F, *grid]``, or None without one.
    """

    reconstruction: Tensor
    reconstruction_continuous: Tensor | None
    latent: Tensor
    posterior: Posterior | None
    quantizer: QuantizerOutput
    projected: Tensor | None = field(default=None, kw_only=True)


@dataclass(frozen=True)
class LossOutput:
    """A weighted sum of loss terms.

    Attributes:
        total: the scalar that is differentiated.
        terms: the detached, unweighted value of each term, and the adaptive weights that are in use.
    """

    total: Tensor
    terms: Mapping[str, Tensor]
