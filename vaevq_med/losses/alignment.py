"""Alignment of a tokenizer's latent with a frozen feature network (VA-VAE, arXiv 2501.01423).

The network's projector maps each position's latent to a vector ``z'`` as long as the features ``f`` at that position.
The first half asks that the two point the same way, the second that the angles among the positions of an image are
those among its features; the margins leave alone what is good enough.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.losses.base import LossTerm
from vaevq_med.networks.features import feature_network
from vaevq_med.networks.outputs import TokenizerOutput
from vaevq_med.networks.ranges import check_sizes
from vaevq_med.networks.slices import some_slices
from vaevq_med.networks.untrained import redraw

_NO_DIRECTION = 1e-3
"""Length, as a share of the vectors' root mean square, up to which a vector has no direction."""
_AT_ONCE = 2**25
"""Angles between positions held at once, 128 MiB of them; those of 1,024 positions of 32 images."""


def unit_vectors(maps: Tensor) -> Tensor:
    """Vectors along dimension 1 at unit length; of what has no direction, 0 without a gradient.

    A quantizer of levels has a code of zeros, whose projection is exactly 0. The gradient of a direction grows as one
    over the length, so that a few such positions would outweigh all others, and an adaptive weight would follow them.

    Args:
        maps: ``[B, F, *size]``.

    >>> unit_vectors(torch.tensor([[3.0, 0.0], [4.0, 0.0]])[None])
    tensor([[[0.6000, 0.0000],
             [0.8000, 0.0000]]])
    """
    squares = maps.square().sum(dim=1, keepdim=True)
    directed = squares > _NO_DIRECTION**2 * squares.detach().mean()
    return torch.where(directed, maps * torch.where(directed, squares, 1).rsqrt(), 0)


def marginal_cosine(projected: Tensor, features: Tensor, margin: float = 0.5) -> Tensor:
    """``mean_i relu(1 - m_1 - cos(z'_i, f_i))`` over images and positions (arXiv 2501.01423, mcos).

    Args:
        projected: z', ``[B, F, h, w]``.
        features: f, of the same shape.
        margin: m_1, in units of a cosine.

    Returns:
        A scalar of at least 0.

    >>> marginal_cosine(torch.ones(1, 2, 1, 1), torch.tensor([1.0, -1.0]).view(1, 2, 1, 1), margin=0.25).item()
    0.75
    """
    cosines = (unit_vectors(projected.float()) * unit_vectors(features.float())).sum(dim=1)
    return F.relu(1 - margin - cosines).mean()


def marginal_distance_matrix(
    projected: Tensor, features: Tensor, margin: float = 0.25, *, at_once: int = _AT_ONCE
) -> Tensor:
    """``mean_ij relu(|cos(z'_i, z'_j) - cos(f_i, f_j)| - m_2)`` within each image (arXiv 2501.01423, mdms).

    The matrices of all positions are ``B (h w)^2``; where that is more than ``at_once`` some rows are made at a time,
    and again in the backward pass.

    Args:
        projected: z', ``[B, F, h, w]``.
        features: f, ``[B, F', h, w]``; they need not have as many channels.
        margin: m_2, in units of a cosine.
        at_once: angles held at once.

    Returns:
        A scalar of at least 0.

    >>> projected, features = torch.ones(1, 2, 1, 2), torch.eye(2).view(1, 2, 1, 2)
    >>> round(marginal_distance_matrix(projected, features, margin=0.25).item(), 4)  # of four pairs two differ by 1
    0.375
    """
    one, other = (unit_vectors(maps.float().flatten(2)) for maps in (projected, features))  # [B, F, n]
    batch_size, _, count = one.shape
    step = max(1, at_once // (batch_size * count))
    if step >= count:
        return _rows(one, one, other, other, margin) / (batch_size * count**2)
    parts = zip(one.split(step, dim=2), other.split(step, dim=2), strict=True)
    sums = [
        checkpoint(_rows, part, one, like, other, margin, use_reentrant=False, preserve_rng_state=False)
        for part, like in parts
    ]
    return torch.stack(sums).sum() / (batch_size * count**2)


def _rows(part: Tensor, one: Tensor, like: Tensor, other: Tensor, margin: float) -> Tensor:
    """The sum over the pairs of some positions ``[B, F, m]`` and all of them ``[B, F, n]``."""
    return F.relu((part.mT @ one - like.mT @ other).abs() - margin).sum()


class AlignmentLoss(LossTerm):
    """``w_1 mcos + w_2 mdms`` of the tokenizer's projector and a frozen network's features of the original.

    The features are those of one stage of the network, resized to the latent's grid where they are of another size. Of
    an image of two or four channels each is looked at by itself, and the features are their mean. Both halves are in
    the log, without their weights.

    Args:
        network: name of the feature network, see :mod:`vaevq_med.networks.features`.
        weights: file of its weights, where it is not in a usual place.
        stage: which of its feature maps, counted from 0 or, below 0, from the deepest; None for the one nearest in size
            to the latent's grid, which is that of the tokenizer's downsampling factor.
        mcos_margin: m_1 of :func:`marginal_cosine`.
        mdms_margin: m_2 of :func:`marginal_distance_matrix`.
        mcos_weight: w_1.
        mdms_weight: w_2.
        adaptive: multiply the term's weight by the ratio of the gradient norms of the reconstruction and perceptual
            loss and of this one, at the last convolution before the latent.
        untrained: give the feature network weights that are drawn from a fixed seed: the control that says whether
            what it has learned matters.
        num_slices: of each volume of adjacent slices, this many random ones.

    Raises:
        MissingWeightsError: the network's weights are not on this machine.
        VaevqMedError: a margin or a weight is below 0.
    """

    initial_files: ClassVar[tuple[str, ...]] = ("weights",)
    """Arguments that name a file, which may lie elsewhere in a run that goes on."""

    def __init__(
        self,
        *,
        network: str = "efficientnet-lite0",
        weights: str | Path | None = None,
        stage: int | None = None,
        mcos_margin: float = 0.5,
        mdms_margin: float = 0.25,
        mcos_weight: float = 1.0,
        mdms_weight: float = 1.0,
        adaptive: bool = False,
        untrained: bool = False,
        num_slices: int = 4,
    ) -> None:
        super().__init__()
        check_sizes(num_slices=num_slices)
        if min(mcos_margin, mdms_margin, mcos_weight, mdms_weight) < 0:
            raise VaevqMedError(
                f"margins are {mcos_margin} and {mdms_margin}, weights {mcos_weight} and {mdms_weight}; expected at "
                "least 0"
            )
        self.stage = stage
        self.margins = mcos_margin, mdms_margin
        self.weights = mcos_weight, mdms_weight
        self.adaptive = adaptive
        self.num_slices = num_slices
        # A library draws weights before it loads them: what is drawn after this is what it would be without.
        with torch.random.fork_rng(devices=()):
            self.features = feature_network(network, weights)
        if untrained:
            redraw(self.features, seed=0)
        self._seen: dict[str, Tensor] = {}

    def forward(self, target: Tensor, output: TokenizerOutput) -> Tensor:
        """The weighted sum of both halves for images ``[B, C, H, W]``, a scalar.

        Raises:
            VaevqMedError: the tokenizer has no projector, one of another number of features, or positions that are no
                places of an image or stand for pieces of a volume; or the network has no such stage.
        """
        projected = output.projected
        if projected is None:
            raise VaevqMedError(
                "AlignmentLoss needs what a projector made; found a tokenizer without. Set network_def#projector, or "
                "the term's weight to 0"
            )
        if projected.ndim == 5 and projected.shape[2] != target.shape[2]:
            raise VaevqMedError(
                f"the latent's grid is {tuple(projected.shape[2:])} for volumes of {target.shape[2]} slices; expected "
                "one position a slice, as AlignmentLoss has features of slices"
            )
        (height, width), (rows, columns) = target.shape[-2:], projected.shape[-2:]
        if projected.ndim < 4 or height * columns != width * rows:
            raise VaevqMedError(
                f"the latent's grid is {tuple(projected.shape[2:])} for images of {height}x{width}; expected positions "
                "that are places of the image"
            )
        images, projected = some_slices([target, projected], self.num_slices)
        features = self._features(images, projected)
        with torch.autocast(projected.device.type, enabled=False):
            mcos = marginal_cosine(projected, features, self.margins[0])
            mdms = marginal_distance_matrix(projected, features, self.margins[1])
        self._seen = {"mcos": mcos.detach(), "mdms": mdms.detach()}
        return self.weights[0] * mcos + self.weights[1] * mdms

    def figures(self) -> Mapping[str, Tensor]:
        """Both halves of the last call, unweighted."""
        return self._seen

    @torch.no_grad()
    def _features(self, images: Tensor, projected: Tensor) -> Tensor:
        """Features ``[B, F, h, w]`` on the grid of what was projected."""
        maps, grid = self.features.layers(images), projected.shape[2:]
        if self.stage is None:
            # Of two that are as near, min takes the first.
            chosen = min(reversed(maps), key=lambda one: abs(math.log(one.shape[-1] / grid[-1])))
        elif not -len(maps) <= self.stage < len(maps):
            raise VaevqMedError(f"stage is {self.stage}; expected one of the {len(maps)} of {self.features.name}")
        else:
            chosen = maps[self.stage]
        if chosen.shape[1] != projected.shape[1]:
            raise VaevqMedError(
                f"the projector's num_features is {projected.shape[1]}; expected {chosen.shape[1]}, those of "
                f"{self.features.name} at {chosen.shape[-2]}x{chosen.shape[-1]} positions"
            )
        chosen = chosen.unflatten(0, (len(images), -1)).mean(dim=1)  # of [B C, F, h, w], each channel an image
        if chosen.shape[2:] != grid:
            chosen = F.interpolate(chosen, size=tuple(grid), mode="bilinear", align_corners=False, antialias=True)
        return chosen
